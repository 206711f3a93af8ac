"""Batches that slices of a run published, and that no writer has committed yet.

A slice is a process that computes some batches of a run and holds no lease. It publishes a batch's
files under their own names, and then a *record*: the manifest that would commit them. A batch is
whole once its record is there, with all files that the record names. Until a writer commits it,
the batch is in no snapshot.

All of this lies in `slices/RUN/`:

- `begun-HASH.json`: slices of the run were started; says the dataset, and what all of them must
  have alike. HASH is that of the manifest which defines the run, so that what belongs to another
  definition, of a run that was dropped, say, counts for nothing.
- `at-work-NONCE.json`: a slice is at work. The slice writes the file anew every few seconds.
- `BATCH-HASH.json`: a record, by the hash of its own bytes.

While `begun` is there, no writer sweeps what the slices may have published. A writer that finds no
slice at work takes what is whole, removes all of `slices/RUN/`, and sweeps the rest.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

from actstore.commits.format import ARRAYS, PARTS
from actstore.commits.manifest import Manifest
from actstore.errors import ActstoreError, Damaged
from actstore.storage import sealed
from actstore.storage.at import at
from actstore.storage.machine import is_known_dead, process_name, signature

SLICES = "slices"
RECORD = re.compile(r"[0-9]{6,}-[0-9a-f]{16}\.json")
SECONDS = 120.0  # after which a slice that wrote nothing counts as dead; it writes eight times in that time


def runs(root: Path) -> list[str]:
    """The runs that have something in `slices/`, sorted."""
    return sorted({path.split("/")[1] for path in at(root).list(f"{SLICES}/") if path.count("/") == 2})


def definition(live: Sequence[Manifest], run: str) -> Manifest | None:
    """The commit that defines a run; None if no such run is stored.

    Args:
        live: see log.live.
    """
    return next((manifest for manifest in reversed(live) if manifest.kind == "run" and manifest.run == run), None)


@contextmanager
def at_work(
    root: Path, defined: Manifest, dataset: str, alike: Mapping[str, Any], seconds: float = SECONDS
) -> Iterator[dict[str, Any]]:
    """Say, while the context lasts, that a slice of a run is at work.

    Args:
        defined: the commit that defines the run.
        dataset: the run's dataset.
        alike: what all slices of the run must have alike, as JSON has it.
        seconds: see SECONDS.

    Yields:
        What the first slice of the run said of itself: its `alike`.

    Raises:
        Damaged: a file that slices write is not what was written.
    """
    here, ended = f"{SLICES}/{defined.run}/at-work-{uuid4().hex}.json", threading.Event()
    about = sealed.to_json({"holder": signature(), "process": process_name(), "seconds": seconds})
    begun, place = _begun(defined), at(root)

    def say() -> None:
        place.swap(here, about)
        if not place.has(begun):  # a writer that found no slice at work removed it
            with suppress(Damaged):  # another slice was first
                place.publish(begun, sealed.to_json({"dataset": dataset, "alike": dict(alike)}))

    def say_again() -> None:
        while not ended.wait(seconds / 8):
            with suppress(ActstoreError, OSError):  # tried again until it is too late
                say()

    say()
    saying = threading.Thread(target=say_again, daemon=True, name="actstore-slice")
    saying.start()
    try:
        yield _read(root, begun)["alike"]
    finally:
        ended.set()
        saying.join()
        with suppress(ActstoreError, OSError):
            place.delete(here)


def working(root: Path, run: str) -> list[str]:
    """Who is at work on slices of a run: a line for each.

    Raises:
        Damaged: a file that slices write is not what was written.
    """
    found = []
    for path in at(root).list(f"{SLICES}/{run}/at-work-"):
        with suppress(FileNotFoundError):  # it ended just now
            about = _read(root, path)
            if not is_known_dead(about["process"]) and at(root).age(path) <= about["seconds"]:
                found.append(str(about["holder"]))
    return found


def record(root: Path, defined: Manifest, made: Manifest) -> None:
    """Publish the record of a batch whose files are published.

    Args:
        defined: the commit that defines the run.
        made: the manifest that would commit the batch.
    """
    content = replace(made, number=defined.number + 1, previous=defined.xxh3_128).to_json()
    name = f"{made.batch or 0:06d}-{xxhash.xxh3_128_hexdigest(content)[:16]}.json"
    at(root).publish(f"{SLICES}/{made.run}/{name}", content)


def whole(root: Path, defined: Manifest) -> list[Manifest]:
    """The records of batches that are whole, by number of the batch.

    Args:
        defined: the commit that defines the run; records of another definition are left out.
    """
    place, found = at(root), list[Manifest]()
    paths = [
        path for path in place.list(f"{SLICES}/{defined.run}/") if RECORD.fullmatch(path.rpartition("/")[2])
    ]  # sorted, so by batch up to a million of them
    known = place.ahead(paths)
    for path in paths:
        with suppress(FileNotFoundError):  # a writer took it just now
            made = Manifest.from_json(known[path] if path in known else place.read(path), root / path)
            if made.previous == defined.xxh3_128:
                found.append(made)
    sizes = place.sizes([file.path for made in found for file in made.files])

    def is_there(path: str, n_bytes: int) -> bool:
        with suppress(FileNotFoundError, NotADirectoryError):
            return (sizes[path] if path in sizes else place.size(path)) == n_bytes
        return False

    there = [made for made in found if all(is_there(file.path, file.bytes) for file in made.files)]
    return sorted(there, key=lambda made: made.batch or 0)


def forget(root: Path, run: str) -> None:
    """Remove all that slices of a run noted, but not what they published."""
    place = at(root)
    for path in place.unnamed([f"{SLICES}/{run}"], ()):  # with what swaps that were killed left
        place.delete(path)
    place.tidy((), (SLICES,))


def is_open(root: Path, live: Sequence[Manifest]) -> bool:
    """True if slices of some run were started, and no writer has found them ended since."""
    return bool(_open(root, live))


def kept(root: Path, live: Sequence[Manifest]) -> Callable[[str], bool]:
    """A function that is true of paths which slices may have published, or may be publishing.

    Args:
        live: see log.live.
    """
    datasets = _open(root, live)
    owners = {*datasets, *datasets.values()}
    folders = tuple(f"{ARRAYS}/{run}/" for run in datasets)

    def is_kept(path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if name.startswith(".") and name.endswith(".tmp"):
            return bool(owners)
        of_part = folder.startswith(f"{PARTS}/") and name.removesuffix(".parquet").rpartition("-")[0] in owners
        return of_part or path.startswith(folders)

    return is_kept


def _open(root: Path, live: Sequence[Manifest]) -> dict[str, str]:
    """Run → dataset of the runs of which slices were started."""
    found = {}
    for run in runs(root):
        if defined := definition(live, run):
            with suppress(FileNotFoundError, Damaged):
                found[run] = str(_read(root, _begun(defined))["dataset"])
    return found


def _read(root: Path, path: str) -> dict[str, Any]:
    content = at(root).read(path)
    if not sealed.is_whole(content):
        raise Damaged(f"{root / path} is not what a slice wrote; remove that file, then go on")
    about: dict[str, Any] = json.loads(content)
    return about


def _begun(defined: Manifest) -> str:
    return f"{SLICES}/{defined.run}/begun-{defined.xxh3_128}.json"
