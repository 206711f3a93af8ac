"""Store a run in this process, with one thread that commits while the model runs.

While the model runs over one batch, the thread encodes and commits the batch before. The last
batch's shards are published several at a time, since no model runs beside them. Memory holds two
batches of the chosen sites, or three where a GPU computes them, for any number of sequences.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from actstore.arrays.address import Ids
from actstore.arrays.staged import is_staged
from actstore.errors import ComputedOtherwise
from actstore.ingest.jobs.batch import Batch, run_batch
from actstore.ingest.jobs.gpu import N_THREADS, buffer_sets, fitting, n_sets, within_memory
from actstore.ingest.jobs.job import Ingest
from actstore.storage.at import check_room
from actstore.writing.committed import lacking
from actstore.writing.contents import Content, part_content
from actstore.writing.writer import Writer, open_writer

N_LAST = 4  # threads that publish the last batch: one waits for the disk while another hashes
Kind = Literal["batch", "site"]
Advance = Callable[[int, int], None]  # (sequences done, of how many); first with those that were there before
# stores a batch: its files, its kind, the batch before, and who publishes several shards at once
Store = Callable[[Batch, "Future[list[Content]]", Kind, "Future[None] | None", "Executor | None"], None]


def execute(job: Ingest, advance: Advance = lambda done, total: None) -> None:
    """Store what of a run is not stored yet: whole batches, or further sites of a finished run.

    The answers of a finished run stay as they are. Those of the first batch are computed again and
    compared: if they differ, this machine computes otherwise, and the warning ComputedOtherwise
    says so.

    Args:
        advance: called with the number of sequences done so far, and of all. The first call, before
            any work, says how many were there already.

    Raises:
        NoRoom: the disk has less free space than the run needs; nothing was written.
        BadInput: another run with this name has other weights, sequences or passes; or a run that
            is not finished has other sites.
        Busy: another process writes to the store.
        LimitReached: the GPU has too little memory; finished batches are committed and published.
        KeyboardInterrupt: after Ctrl-C; finished batches are committed and published.
    """
    job = fitting(job)
    check_room(job.store, job.bytes_left(), f"run {job.plan.run!r}")
    with open_writer(job.store, make=True, wait=job.wait) as writer:
        originals = job.originals(writer.rows_of("datasets"))
        first = writer.define(job.plan)
        held = writer.sites_of(job.plan.run)
        commits = _Commits(writer, job.publish_every)
        left = lacking(job.plan, held)
        done = Done(job, range(job.n_batches), left, advance)
        run_batches(job, left, held, first, originals, commits.commit, partial(compare, writer.agrees), done)


class Done:
    """How many sequences of some batches are done, those that were there before among them.

    Args:
        batches: numbers of the batches.
        left: numbers of those that are not there yet.
        advance: see execute; called now, and whenever more is done.
    """

    def __init__(self, job: Ingest, batches: Collection[int], left: Collection[int], advance: Advance) -> None:
        self._job, self._advance = job, advance
        self._there = [batch for batch in batches if batch not in left]
        self._total = job.n_of(batches)
        self._n = job.n_of(self._there)
        advance(self._n, self._total)

    def within(self, number: int) -> Callable[[int], None]:
        """A function to call with how many sequences of a batch are done."""
        before, after = self._n, self._job.n_of([*self._there, number])
        return lambda done: self._advance(min(before + done, after), self._total)

    def whole(self, number: int) -> None:
        """Take note that a batch is done."""
        self._there.append(number)
        self._n = self._job.n_of(self._there)
        self._advance(self._n, self._total)


def run_batches(
    job: Ingest,
    left: Mapping[int, Collection[str]],
    held: Collection[int],
    first: Ids,
    originals: int | None,
    store: Store,
    compare: Callable[[Batch], None],
    progress: Done,
) -> None:
    """Compute batches one after another, while one thread stores those before.

    Args:
        left: number of a batch → TransformerLens' names of its sites that are stored.
        held: numbers of the batches that are committed; sites are added to those.
        first: the first ids of the whole set.
        originals: see Batch.
        store: stores a batch.
        compare: called with the first batch, if sites are added to it.
        progress: is told how far the batches are.
    """
    needed = {name for sites in left.values() for name in sites}
    # a GPU computes ahead of this process, so that threads of their own encode for it
    threads = ThreadPoolExecutor(N_THREADS, "encode") if is_staged(job.device) else nullcontext()
    last = ThreadPoolExecutor(N_LAST, "last")
    with within_memory(job), threads as encoding, last, ThreadPoolExecutor(1, "commit") as storing:
        sets = buffer_sets(job, needed, min(n_sets(job), len(left)))
        done: list[Future[None]] = []
        for turn, (number, sites) in enumerate(left.items()):
            if turn >= len(sets):
                done[turn - len(sets)].result()  # its buffers are filled again
            is_added = number in held
            of_these = job.over(sites, grades=turn == 0) if is_added else job
            batch = run_batch(of_these, number, first, originals, sets[turn % len(sets)], progress.within(number))
            progress.whole(number)
            if turn == 0 and is_added:
                compare(batch)
            contents = (encoding or storing).submit(batch.shards if is_added else batch.contents)
            before = done[-1] if done else None
            pool = encoding or (last if turn == len(left) - 1 else None)
            done.append(storing.submit(store, batch, contents, "site" if is_added else "batch", before, pool))
        for stored in done:
            stored.result()


@dataclass
class _Commits:
    """Commits batches one after another, and publishes the catalog from time to time."""

    writer: Writer
    publish_every: float
    published: float = field(default_factory=time.monotonic)

    def commit(
        self,
        batch: Batch,
        contents: Future[list[Content]],
        kind: Kind,
        before: Future[None] | None,
        pool: Executor | None,
    ) -> None:
        """Commit a batch, unless the commit before failed; see Store."""
        if before is not None:
            before.result()
        if time.monotonic() - self.published > self.publish_every:
            self.writer.publish()
            self.published = time.monotonic()
        plan, first = batch.job.plan, batch.first.sequence_id
        self.writer.commit_batch(plan, batch.number, first, len(batch), contents.result(), kind, pool)


def compare(agrees: Callable[[Content], bool], batch: Batch) -> None:
    """Warn if a batch's answers are not those that are stored.

    Args:
        agrees: see Writer.agrees.
    """
    run = batch.job.plan.run
    for table, rows in batch.answers.items():
        if not agrees(part_content(table, run, rows, batch.number)):
            warnings.warn(
                f"the {table} of batch {batch.number} differ from those that run {run!r} holds: this machine computes otherwise "
                "than the one that stored the run (see runs), so the added sites are not bit for bit those of the same pass",
                ComputedOtherwise,
                stacklevel=3,
            )
