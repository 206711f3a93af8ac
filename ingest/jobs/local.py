"""Store a run in this process, with one thread that commits while the model runs.

While the model runs over one batch, the thread encodes and commits the batch before. The last
batch's shards are published several at a time, since no model runs beside them. Memory holds two
batches of the chosen sites, or three where a GPU computes them, for any number of sequences.

Where two passes run at once (see models/passes.py), the passes over the next batch are queued
before the last ones over a batch are done, the thread that commits also grades, and the first batch
is begun while a new store is made.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Literal

from actstore.arrays.address import Ids
from actstore.arrays.staged import is_staged
from actstore.errors import ComputedOtherwise
from actstore.ingest.jobs.batch import Batch, Begun, begin
from actstore.ingest.jobs.gpu import N_THREADS, buffer_sets, fitting, n_sets, within_memory
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.models.passes import Passes, side_by_side
from actstore.storage.at import at, check_room
from actstore.writing.committed import lacking
from actstore.writing.contents import Content, part_content
from actstore.writing.writer import Writer, open_writer

LAST_PASSES, BATCHES_PER_PASS = 2, 4  # the last catalog is begun before so many passes; it takes four batches in one
N_LAST = 4  # threads that publish the last batch: one waits for the disk while another hashes
Kind = Literal["batch", "site"]
Advance = Callable[[int, int], None]  # (sequences done, of how many); first with those that were there before
Contents = Callable[[], Iterable[Content]]  # makes the files of a batch
# stores a batch: its files, its kind, the batch before, and who publishes several shards at once
Store = Callable[[Batch, Contents, Kind, "Future[None] | None", "Executor | None"], None]


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
    with passes_of(job) as passes:
        early = _early(job, passes)
        with open_writer(job.store, make=True, wait=job.wait) as writer:
            originals = job.originals(writer.rows_of("datasets"))
            first = writer.define(job.plan)
            held = writer.sites_of(job.plan.run)
            left = lacking(job.plan, held)
            done = Done(job, range(job.n_batches), left, advance)
            agrees = partial(compare, writer.agrees)
            with _Commits(writer, job.publish_every, len(left)) as commits:
                run_batches(
                    job, left, held, first, originals, commits.commit, agrees, done, passes, commits.begin_last, early
                )


def passes_of(job: Ingest) -> Passes:
    """What runs a job's forward passes, two at once where that is quicker."""
    is_plain = job.patch is None and job.generator is None
    return Passes(job.model, side_by_side(job.model) if is_plain else 1)


def _early(job: Ingest, passes: Passes) -> Begun | None:
    """The first batch of a store that is yet to be made, with its passes queued, or none."""
    if passes.at_once == 1 or at(job.store).has("store.json"):
        return None
    [buffers] = buffer_sets(job, {site.site for site in job.plan.sites}, 1)
    return begin(job, 0, buffers, passes)


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
    passes: Passes,
    ending: Callable[[], None] = lambda: None,
    early: Begun | None = None,
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
        passes: runs the forward passes.
        ending: called when few passes are left, and after each pass from then on; see LAST_PASSES.
        early: a batch that is begun, with all sites; it is used if it is the first that is left.
    """
    needed = {name for sites in left.values() for name in sites}
    if early is not None and (held or early.number != next(iter(left), None)):  # another process was at work
        early = None
    # a GPU computes ahead of this process, so that threads of their own encode for it
    threads = ThreadPoolExecutor(N_THREADS, "encode") if is_staged(job.device) else nullcontext()
    last = ThreadPoolExecutor(N_LAST, "last")
    with within_memory(job), threads as encoding, last, ThreadPoolExecutor(1, "commit") as storing:
        sets = [early.buffers] if early else []
        sets += buffer_sets(job, needed, min(n_sets(job), len(left)) - len(sets))
        done: list[Future[None]] = []

        def finish(begun: Begun) -> None:
            number, turn, is_added = begun.number, len(done), begun.number in held
            is_last, within = turn == len(left) - 1, progress.within(number)

            def advance(sequences: int) -> None:
                within(sequences)
                n_passes = (len(begun.drawn) - sequences) / job.per_pass
                if is_last and n_passes <= LAST_PASSES + len(left) / BATCHES_PER_PASS:
                    ending()

            batch = begun.finish(first, originals, advance)
            progress.whole(number)
            if turn == 0 and is_added:
                compare(batch)
            contents: Contents = batch.shards if is_added else batch.contents
            if encoding:
                contents = encoding.submit(list, contents()).result
            before = done[-1] if done else None
            pool = encoding or (last if is_last else None)
            done.append(storing.submit(store, batch, contents, "site" if is_added else "batch", before, pool))

        under_way = deque[Begun]()
        for turn, (number, sites) in enumerate(left.items()):
            if turn >= len(sets):
                done[turn - len(sets)].result()  # its buffers are filled again
            if early and turn == 0:
                under_way.append(early)
            else:
                of_these = job.over(sites, grades=turn == 0) if number in held else job
                under_way.append(begin(of_these, number, sets[turn % len(sets)], passes))
            if len(under_way) == passes.at_once:
                finish(under_way.popleft())
        while under_way:
            finish(under_way.popleft())
        for stored in done:
            stored.result()


class _Commits:
    """Commits batches one after another, and publishes the catalog from time to time.

    A context manager.

    Args:
        writer: the store's.
        publish_every: seconds between two catalogs.
        n_batches: batches that will be committed.
    """

    def __init__(self, writer: Writer, publish_every: float, n_batches: int) -> None:
        self._writer, self._publish_every, self._n_left = writer, publish_every, n_batches
        self._published = time.monotonic()
        self._last: Future[None] | None = None  # the catalog of the last batch
        self._committed: Future[None] = Future()  # the last batch
        self._thread, self._choosing = ThreadPoolExecutor(1, "catalog"), threading.Lock()

    def __enter__(self) -> _Commits:
        """Nothing is to be done."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Wait for the last catalog, which is discarded if the last batch was not committed.

        If the catalog failed, `Writer.publish` makes it again, or says why it cannot.
        """
        self._committed.cancel()  # unless it is done
        self._thread.shutdown()

    def begin_last(self) -> None:
        """Begin the last catalog, in a thread of its own, with the rows of the batches before.

        DuckDB returns memory that this process freed to the system, after half a second without
        work and when it is closed. Passes that still run then take its pages anew, so that the
        catalog is best begun shortly before the last pass ends.
        """
        with self._choosing:
            if self._last is None:
                self._last = self._thread.submit(self._writer.publish_after, self._committed.result)

    def commit(
        self, batch: Batch, contents: Contents, kind: Kind, before: Future[None] | None, pool: Executor | None
    ) -> None:
        """Commit a batch, unless the commit before failed; see Store."""
        if before is not None:
            before.result()
        with self._choosing:  # the last catalog waits for the last batch, and no other one may wait for that catalog
            if self._last is None and time.monotonic() - self._published > self._publish_every:
                self._writer.publish()
                self._published = time.monotonic()
        plan, first = batch.job.plan, batch.first.sequence_id
        self._writer.commit_batch(plan, batch.number, first, len(batch), contents(), kind, pool)
        self._n_left -= 1
        if self._n_left == 0:
            self._committed.set_result(None)


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
