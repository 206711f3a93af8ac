"""One batch of a run: its sequences, the model's answers to them, and the files of both.

The files of a batch depend only on the run's definition and the batch's number. `ingest` commits
the files, `repair` replaces damaged files by them, and `verify --recompute` compares the stored
rows with the same forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from actstore.arrays.address import Ids
from actstore.arrays.staged import buffers as buffers_on
from actstore.errors import BadInput
from actstore.ingest.jobs.job import Buffers, Ingest
from actstore.ingest.task import Drawn
from actstore.writing.contents import Content, batch_contents
from actstore.writing.plan import SitePlan


@dataclass(frozen=True)
class Batch:
    """One batch of sequences and what the model computed from it, not yet encoded as files.

    Attributes:
        first: ids of the batch's first sequence.
        originals: tree_id of the first tree of the set that a variant set was made from; else None.
        answers: the rows of `predictions` and `outcomes`, or of `generations`; none if the job does
            not grade.
        buffers: the activations; fill them again only after a call of `contents`.
    """

    job: Ingest
    number: int
    first: Ids
    originals: int | None
    drawn: Drawn
    answers: dict[str, pl.DataFrame]
    buffers: Buffers

    def __len__(self) -> int:
        return len(self.drawn)

    def contents(self) -> list[Content]:
        """Encode the batch as files: rows of its sequences and its answers, one shard per site."""
        dataset = str(self.job.plan.dataset["dataset"])
        of_set = {} if self.job.patch else self.drawn.rows(self.first, dataset, self.originals)  # the base run has them
        return batch_contents(self.job.plan, self.number, of_set, self.answers, self._sealed())

    def shards(self) -> list[Content]:
        """Encode the activations alone, for sites that are added to a run."""
        return batch_contents(self.job.plan, self.number, {}, {}, self._sealed())

    def _sealed(self) -> dict[str, memoryview]:
        return {site.site: self._seal(site) for site in self.job.plan.sites}

    def _seal(self, site: SitePlan) -> memoryview:
        """The shard of one site.

        Raises:
            BadInput: an activation does not fit the run's dtype.
        """
        try:
            return self.buffers[site.site].seal(self.drawn.lengths)
        except BadInput as error:
            wider = "bfloat16 or float32" if site.layout.dtype == "float16" else "float32"
            raise BadInput(
                f"{site.short} of batch {self.number} cannot be stored as {site.layout.dtype}: {error}; store it as {wider} "
                f"(--dtype), under another name (--run): {self.job.kept()}"
            ) from error


def run_batch(
    job: Ingest,
    number: int,
    first: Ids,
    originals: int | None = None,
    buffers: Buffers | None = None,
    advance: Callable[[int], None] = lambda sequences: None,
) -> Batch:
    """Draw a batch of sequences and run the model over it.

    Args:
        first: the first ids of the whole set.
        originals: see Batch.
        buffers: receive the activations, one for each site or more; default: new buffers.
        advance: called with the number of sequences of the batch done so far.
    """
    drawn = job.sequences.drawn(number)
    layouts = {site.site: site.layout for site in job.plan.sites}
    into = buffers_on(layouts, job.device) if buffers is None else buffers
    of_batch = first.of_batch(job.plan.dataset, number, drawn.start)
    answers = job.answers(drawn, of_batch, into, lambda done: advance(done - drawn.start))
    for site in layouts:
        into[site].hand_over()
    return Batch(job, number, of_batch, originals, drawn, answers, into)


def files(job: Ingest, number: int, first: Ids, originals: int | None = None) -> dict[str, bytes]:
    """Compute the files of one batch: path in the store → bytes.

    Args:
        first, originals: see run_batch.
    """
    made = run_batch(job, number, first, originals).contents()
    return {content.path: bytes(content.content) for content in made}
