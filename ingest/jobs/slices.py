"""Store a slice of a run: some of its batches, without the lease, beside other slices.

No slice waits for another, or talks to one. See actstore/commits/pending.py.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial

import polars as pl

from actstore import cluster
from actstore.arrays.address import Ids
from actstore.commits import log, pending
from actstore.commits.manifest import Manifest
from actstore.errors import BadInput, Busy, advised
from actstore.ingest.jobs.batch import Batch
from actstore.ingest.jobs.environment import environment
from actstore.ingest.jobs.gpu import fitting
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import Advance, Contents, Done, Kind, compare, passes_of, run_batches
from actstore.storage.at import at, check_room
from actstore.writing.committed import lacking, new_sites, sites_of, stored_dataset, stored_run
from actstore.writing.parts import rows_committed
from actstore.writing.published import Published
from actstore.writing.slices import commit
from actstore.writing.writer import open_writer

SLICE = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")
LEAST_WAIT = 60.0  # seconds: the slices of an array begin at once, and one of them defines the run
LOOK_AGAIN = 1.0  # seconds


@dataclass(frozen=True)
class Slice:
    """One of n slices of a run.

    Attributes:
        number: from 1 to n.
        of: n.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """The slice that a text such as `2/8` names.

        Raises:
            BadInput: it names none.
        """
        found = SLICE.fullmatch(text.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise BadInput(f"got --slice {text}; write i/n with i from 1 to n, such as 2/8 (sbatch --array=1-8)")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.number}/{self.of}"

    def has(self, batch: int) -> bool:
        """Whether a batch belongs to the slice."""
        return batch % self.of == self.number - 1


@dataclass(frozen=True)
class Sliced:
    """What is whole after a slice.

    Attributes:
        n_published: batches that the slice published.
        n_batches: batches of the slice.
        n_left: batches of the whole run that are neither committed nor whole.
        is_committed: whether all batches of the run are committed.
    """

    n_published: int
    n_batches: int
    n_left: int
    is_committed: bool


@dataclass(frozen=True)
class _Found:
    """What the store holds of a run that is defined."""

    defined: Manifest
    committed: list[Manifest]
    held: dict[int, set[str]]
    datasets: pl.DataFrame

    @classmethod
    def of(cls, job: Ingest) -> _Found | None:
        """None if the run, or one of its sites, is not defined.

        Raises:
            BadInput: the run is defined otherwise.
        """
        root, plan = job.store, job.plan
        if not at(root).has("store.json"):
            return None
        committed = log.manifests(root)
        held = sites_of(committed, plan.run)
        rows = {name: rows_committed(root, committed, name) for name in ("datasets", "runs", "sites", "models")}
        datasets, runs, sites, models = (frame.to_dicts() for frame in rows.values())
        stored_dataset(datasets, plan.dataset)
        defined = pending.definition(log.live(committed), plan.run)
        if not stored_run(runs, plan) or new_sites(models, sites, plan, held) or defined is None:
            return None
        return cls(defined, committed, held, rows["datasets"])

    def left(self, job: Ingest) -> Mapping[int, list[str]]:
        """What is neither committed nor whole; see `lacking`."""
        there = {number: set(sites) for number, sites in self.held.items()}
        for made in pending.whole(job.store, self.defined):
            if made.batch is not None and (made.kind == "batch" or made.batch in there):
                there.setdefault(made.batch, set()).update(shard.site for shard in made.shards)
        return lacking(job.plan, there)


def execute_slice(job: Ingest, which: Slice, advance: Advance = lambda done, total: None) -> Sliced:
    """Publish the batches of a slice that are neither committed nor published whole.

    The first slice of a run defines it, for which it takes the lease for a moment. A slice that
    finds all batches of the run whole commits them.

    Args:
        advance: see `local.execute`; called with the sequences of the slice's batches alone.

    Raises:
        NoRoom: the disk has less free space than the slice needs.
        BadInput: the run is stored with another definition, or other slices have other versions.
        Busy: another process writes to the store, and the run is not defined yet.
        LimitReached: see `local.execute`.
    """
    job = fitting(job)
    root, plan = job.store, job.plan
    found = _defined(job)
    mine = {number: sites for number, sites in found.left(job).items() if which.has(number)}
    every = [number for number in range(job.n_batches) if which.has(number)]
    check_room(root, job.bytes_of(len(mine)) if mine else 0, f"slice {which} of run {plan.run!r}")
    here = environment(job)
    with pending.at_work(root, found.defined, str(plan.dataset["dataset"]), here) as first:
        also = f"; or, once no slice is at work, {advised('commit', root)} takes what is whole, and others may begin"
        cluster.refuse_otherwise(f"slice {which}", here, f"the slices of run {plan.run!r} began with", first, also)
        published = Published(root, found.committed)
        row = next(row for row in found.datasets.to_dicts() if row["dataset"] == plan.dataset["dataset"])
        with passes_of(job) as passes:
            run_batches(
                job,
                mine,
                found.held,
                Ids.of_dataset(row),
                job.originals(found.datasets),
                partial(_publish, published, found.defined),
                partial(compare, published.agrees),
                Done(job, every, mine, advance),
                passes,
            )
    found = _Found.of(job) or found
    n_left = len(found.left(job))
    if not n_left and plan.run in pending.runs(root):
        commit(root, max(job.wait, LEAST_WAIT))
    return Sliced(len(mine), len(every), n_left, not job.left())


def kept(job: Ingest, which: Slice) -> str:
    """One sentence: what a stop keeps now of a slice."""
    found = _Found.of(job)
    of_slice = [number for number in range(job.n_batches) if which.has(number)]
    left = found.left(job) if found else of_slice
    done = sum(number not in left for number in of_slice)
    return f"{done} of {len(of_slice)} batches of slice {which} are published, and the same command goes on from there"


def _defined(job: Ingest) -> _Found:
    """Define the run, unless another slice has done it."""
    deadline = time.monotonic() + max(job.wait, LEAST_WAIT)
    while True:
        if found := _Found.of(job):
            return found
        try:
            with open_writer(job.store, make=True, wait=LOOK_AGAIN) as writer:
                writer.define(job.plan)
        except Busy:
            if time.monotonic() > deadline:
                raise


def _publish(
    published: Published,
    defined: Manifest,
    batch: Batch,
    contents: Contents,
    kind: Kind,
    before: Future[None] | None,
    pool: Executor | None,
) -> None:
    """Publish a batch and its record, unless the batch before failed; see local.Store."""
    if before is not None:
        before.result()
    plan, first = batch.job.plan, batch.first.sequence_id
    made = published.batch(plan, batch.number, first, len(batch), contents(), kind, pool)
    pending.record(published.root, defined, made)
