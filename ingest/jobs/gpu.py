"""What a run does on a GPU that has too little memory for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from actstore.arrays.address import Ids
from actstore.arrays.staged import buffers, is_staged
from actstore.errors import HalvedBatch, LimitReached
from actstore.ingest.jobs.batch import begin
from actstore.ingest.jobs.job import Buffers, Ingest
from actstore.ingest.models.passes import Passes
from actstore.writing.committed import committed_run

N_THREADS = 6  # two wait for a batch each, and four publish: the disk is busy while one of them hashes


def fitting(job: Ingest) -> Ingest:
    """The job, with half as many sequences per forward pass if the GPU lacks memory for one pass.

    A run's definition notes its sequences per pass, so that the first pass of a new run is tried
    before the run is defined. A run that is stored keeps its number.

    Raises:
        LimitReached: half as many are too many, too.
    """
    if not is_staged(job.device) or committed_run(job.store, job.plan.run) is not None or _fits(job):
        return job
    halved = replace(job, batch_size=max(1, job.per_pass // 2))
    if halved.per_pass == job.per_pass or not _fits(halved):
        fewer = "take fewer" if halved.per_pass > 1 else "use another device, or store fewer"
        raise LimitReached(
            f"{job.device} lacks memory for {halved.per_pass} sequences per forward pass, beside {n_sets(job)} shards of each of "
            f"{len(job.specs)} sites: {fewer} (--batch-size, --sites), or free memory there; nothing was stored"
        )
    warnings.warn(
        f"{job.device} lacks memory for {job.per_pass} sequences per forward pass: run {job.plan.run!r} takes {halved.per_pass} "
        f"(--batch-size {halved.per_pass})",
        HalvedBatch,
        stacklevel=3,
    )
    return halved


def n_sets(job: Ingest) -> int:
    """Sets of buffers: one is filled, and one is stored; a GPU works on a further one meanwhile."""
    return 3 if is_staged(job.device) else 2


def buffer_sets(job: Ingest, sites: set[str], n_sets: int) -> list[Buffers]:
    """The buffers of some sites, for so many batches at once."""
    layouts = {site.site: site.layout for site in job.plan.sites if site.site in sites}
    return [buffers(layouts, job.device) for _ in range(n_sets)]


@contextmanager
def within_memory(job: Ingest) -> Iterator[None]:
    """Say in one line that the GPU's memory did not suffice, and what is kept of the run.

    Raises:
        LimitReached: it did not suffice.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LimitReached(
            f"{job.device} ran out of memory at {job.per_pass} sequences per forward pass: free memory there, or store another "
            f"run (--run) with a smaller --batch-size; {job.kept()}"
        ) from error


def _fits(job: Ingest) -> bool:
    """Whether the first pass of the first batch runs beside the buffers of all sites."""
    import torch

    try:
        sets = buffer_sets(job, {site.site for site in job.plan.sites}, min(n_sets(job), job.n_batches))
        begin(job, 0, sets[0], Passes(job.model)).finish(Ids(0, 0), None, _stop)
    except _Passed:
        return True
    except torch.OutOfMemoryError:
        pass  # the frames that hold tensors end with the handler
    else:
        return True
    del sets
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    return False


class _Passed(Exception):
    """Ends a batch after its first pass."""


def _stop(sequences: int) -> None:
    raise _Passed
