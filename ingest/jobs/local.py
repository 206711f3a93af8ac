"""Store a run in this process, with one thread that commits while the model runs.

While the model runs over one batch, the thread encodes and commits the batch before. Memory holds
two batches of the chosen sites, for any number of sequences.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from typing import ParamSpec

from actstore.arrays.pack import ShardBuffer
from actstore.errors import ComputedOtherwise
from actstore.ingest.jobs.batch import Batch, run_batch
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.prepare import prepare
from actstore.storage.at import check_room
from actstore.writing.committed import lacking
from actstore.writing.writer import Writer, open_writer, part_content

P = ParamSpec("P")


def execute(job: Ingest, advance: Callable[[int], None] = lambda sequences: None) -> None:
    """Store what of a run is not stored yet: whole batches, or further sites of a finished run.

    The answers of a finished run stay as they are. Those of the first batch are computed again and
    compared: if they differ, this machine computes otherwise, and the warning ComputedOtherwise
    says so.

    Args:
        advance: called with the number of sequences done so far.

    Raises:
        NoRoom: the disk has less free space than the run needs; nothing was written.
        BadInput: another run with this name has other weights, sequences or passes; or a run that
            is not finished has other sites.
        Busy: another process writes to the store.
        KeyboardInterrupt: after Ctrl-C; finished batches are committed and published.
    """
    check_room(job.store, job.bytes_left(), f"run {job.plan.run!r}")
    with open_writer(job.store, make=True, wait=job.wait) as writer:
        originals = job.originals(writer.rows_of("datasets"))
        first = writer.define(job.plan)
        held = writer.sites_of(job.plan.run)
        left = lacking(job.plan, held)
        needed = {name for sites in left.values() for name in sites}
        layouts = {site.site: site.layout for site in job.plan.sites if site.site in needed}
        buffers = [{name: ShardBuffer(layout) for name, layout in layouts.items()} for _ in range(min(2, len(left)))]
        published = time.monotonic()
        with ThreadPoolExecutor(1, thread_name_prefix="commit") as pool:
            pending: Future[None] | None = None
            for turn, (number, sites) in enumerate(left.items()):
                of_these = job.over(sites, grades=turn == 0) if number in held else job
                batch = run_batch(of_these, number, first, originals, buffers[turn % 2], advance)
                if turn == 0 and number in held:
                    _compare(writer, batch)
                if pending:
                    pending.result()
                    if time.monotonic() - published > job.publish_every:
                        writer.publish()
                        published = time.monotonic()
                pending = pool.submit(_add if number in held else _commit, writer, batch)
            if pending:
                pending.result()


def _commit(writer: Writer, batch: Batch) -> None:
    writer.commit_batch(batch.job.plan, batch.number, batch.first.sequence_id, len(batch), batch.contents())


def _add(writer: Writer, batch: Batch) -> None:
    writer.commit_batch(batch.job.plan, batch.number, batch.first.sequence_id, len(batch), batch.shards(), "site")


def _compare(writer: Writer, batch: Batch) -> None:
    """Warn if a batch's answers are not those that are stored."""
    run = batch.job.plan.run
    for table, rows in batch.answers.items():
        if not writer.agrees(part_content(table, run, rows, batch.number)):
            warnings.warn(
                f"the {table} of batch {batch.number} differ from those that run {run!r} holds: this machine computes otherwise "
                "than the one that stored the run (see runs), so the added sites are not bit for bit those of the same pass",
                ComputedOtherwise,
                stacklevel=3,
            )


def _prepared(prepare: Callable[P, Ingest]) -> Callable[P, str]:
    """The function `ingest`, with the arguments of `prepare`."""

    @wraps(prepare)
    def ingest(*args: P.args, **options: P.kwargs) -> str:
        job = prepare(*args, **options)
        execute(job)
        return job.plan.run

    ingest.__doc__ = "Store a run, as `actstore ingest` does, and return its name: `prepare`, then `execute`.\n\n"
    ingest.__doc__ += f"    prepare: {prepare.__doc__}"
    return ingest


ingest = _prepared(prepare)
