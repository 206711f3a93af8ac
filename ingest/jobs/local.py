"""A run stored by this process: while the model runs over one batch of trees, a thread encodes and commits the one before.

So storing hides behind the forward pass. Memory is two batches of the wanted sites, however many trees there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from actstore.arrays.pack import ShardBuffer
from actstore.ingest.jobs.batch import Batch, run_batch
from actstore.ingest.jobs.job import Ingest
from actstore.storage.local import check_room
from actstore.writing.writer import Writer, open_writer


def execute(job: Ingest, advance: Callable[[int], None] = lambda trees: None) -> None:
    """Store what is not stored yet of a run.

    Args:
        advance: called with the trees done so far.

    Raises:
        NoRoom: the disk has less free than what is left to write; nothing was touched.
        BadInput: the run's name is taken by other weights, trees or sites.
        Busy: another process writes to the store.
        KeyboardInterrupt: Ctrl-C; the batches that were finished are committed and published.
    """
    check_room(job.store, job.bytes_left(), f"run {job.plan.run!r}")
    with open_writer(job.store, make=True, wait=job.wait) as writer:
        originals = _originals(job, writer)
        first_tree_id = writer.define(job.plan)
        done = writer.batches(job.plan.run)
        left = [batch for batch in range(job.n_batches) if batch not in done]
        buffers = [{site.site: ShardBuffer(site.layout) for site in job.plan.sites} for _ in left[:2]]
        published = time.monotonic()
        with ThreadPoolExecutor(1, thread_name_prefix="commit") as pool:
            pending: Future[None] | None = None
            for turn, number in enumerate(left):
                batch = run_batch(job, number, first_tree_id, originals, buffers[turn % 2], advance)
                if pending:
                    pending.result()
                    if time.monotonic() - published > job.publish_every:
                        writer.publish()
                        published = time.monotonic()
                pending = pool.submit(_commit, writer, batch)
            if pending:
                pending.result()


def _originals(job: Ingest, writer: Writer) -> int | None:
    """tree_id of the first tree that a variant set was made from; None for a drawn set."""
    if not job.trees.variant_of:
        return None
    known = {row["dataset"]: row["first_tree_id"] for row in writer.table("datasets").to_dicts()}
    return int(known[job.trees.variant_of])


def _commit(writer: Writer, batch: Batch) -> None:
    writer.commit_batch(batch.job.plan, batch.number, batch.first_tree_id, len(batch), batch.contents())
