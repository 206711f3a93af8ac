"""Commit what slices of runs published; see commits/pending.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actstore.commits import log, pending
from actstore.storage.at import place
from actstore.writing.plan import n_batches
from actstore.writing.writer import Writer, open_writer


@dataclass(frozen=True)
class Taken:
    """What a commit found of one run.

    Attributes:
        run: the run's name.
        taken: numbers of the batches that were committed now.
        n_committed: batches of the run that are committed in all.
        n_batches: batches of the whole run.
        at_work: who computes slices of the run: a line for each.
    """

    run: str
    taken: list[int]
    n_committed: int
    n_batches: int
    at_work: list[str]


def commit(store: str | Path, wait: float = 10.0) -> list[Taken]:
    """Commit the batches that slices published whole, and publish a catalog with them.

    Args:
        store: the store's folder.
        wait: seconds to wait for another process that writes to the store.

    Returns:
        What was found of each run that has slices.

    Raises:
        Busy, Damaged, NotStored, TooNew: see open_writer.
        BadInput: a slice computed a committed file otherwise.
    """
    with open_writer(place(store), wait=wait) as writer:
        return take(writer)


def take(writer: Writer) -> list[Taken]:
    """Commit the batches that slices published whole.

    Where no slice is at work any more, what was published and is not whole is swept.
    """
    root, found, ended = writer.root, list[Taken](), False
    for run in pending.runs(root):
        at_work = pending.working(root, run)  # before the records: a slice may end meanwhile
        defined = pending.definition(log.live(writer.committed), run)
        if defined:
            held, taken = writer.batches(run), list[int]()
            for made in pending.whole(root, defined):
                if made.batch is not None and (made.kind == "site" or made.batch not in held):
                    taken += [made.batch] * writer.commit_published(made)
                    held.add(made.batch)
            about = next(row for row in writer.rows_of("runs").to_dicts() if row["run"] == run)
            datasets = writer.rows_of("datasets").to_dicts()
            dataset = next(row for row in datasets if row["dataset"] == about["dataset"])
            found.append(Taken(run, taken, len(held), n_batches(dataset), at_work))
        if not at_work:
            pending.forget(root, run)
            ended = True
    if ended:
        log.sweep(root, list(writer.committed))
    return found
