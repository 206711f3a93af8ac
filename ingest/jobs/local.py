"""Store a run in this process, with one thread that commits while the model runs.

While the model runs over one batch, the thread encodes and commits the batch before. Memory holds
two batches of the chosen sites, for any number of sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import wraps
from typing import ParamSpec

from actstore.arrays.pack import ShardBuffer
from actstore.ingest.jobs.batch import Batch, run_batch
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.prepare import prepare
from actstore.storage.at import check_room
from actstore.writing.writer import Writer, open_writer

P = ParamSpec("P")


def execute(job: Ingest, advance: Callable[[int], None] = lambda sequences: None) -> None:
    """Store the batches of a run that are not stored yet.

    Args:
        advance: called with the number of sequences done so far.

    Raises:
        NoRoom: the disk has less free space than the run needs; nothing was written.
        BadInput: another run with this name has other weights, sequences or sites.
        Busy: another process writes to the store.
        KeyboardInterrupt: after Ctrl-C; finished batches are committed and published.
    """
    check_room(job.store, job.bytes_left(), f"run {job.plan.run!r}")
    with open_writer(job.store, make=True, wait=job.wait) as writer:
        originals = job.originals(writer.rows_of("datasets"))
        first = writer.define(job.plan)
        done = writer.batches(job.plan.run)
        left = [batch for batch in range(job.n_batches) if batch not in done]
        buffers = [{site.site: ShardBuffer(site.layout) for site in job.plan.sites} for _ in left[:2]]
        published = time.monotonic()
        with ThreadPoolExecutor(1, thread_name_prefix="commit") as pool:
            pending: Future[None] | None = None
            for turn, number in enumerate(left):
                batch = run_batch(job, number, first, originals, buffers[turn % 2], advance)
                if pending:
                    pending.result()
                    if time.monotonic() - published > job.publish_every:
                        writer.publish()
                        published = time.monotonic()
                pending = pool.submit(_commit, writer, batch)
            if pending:
                pending.result()


def _commit(writer: Writer, batch: Batch) -> None:
    writer.commit_batch(batch.job.plan, batch.number, batch.first.sequence_id, len(batch), batch.contents())


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
