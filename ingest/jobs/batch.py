"""One batch of a run: its sequences, the model's answers to them, and the files of both.

The files of a batch depend only on the run's definition and the batch's number. `ingest` commits
the files, `repair` replaces damaged files by them, and `verify --recompute` compares the stored
rows with the same forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from actstore.arrays.address import Ids
from actstore.arrays.staged import buffers as buffers_on
from actstore.errors import BadInput
from actstore.ingest.jobs.job import Buffers, Graded, Ingest
from actstore.ingest.models.passes import Passes
from actstore.ingest.task import Drawn
from actstore.writing.contents import Content, batch_contents
from actstore.writing.plan import SitePlan


@dataclass(frozen=True)
class Batch:
    """One batch of sequences and what the model computed from it, not yet encoded as files.

    Attributes:
        first: ids of the batch's first sequence.
        originals: tree_id of the first tree of the set that a variant set was made from; else None.
        graded: gives the answers, and may run passes for that.
        buffers: the activations; fill them again only after their shards are sealed, see `shards`.
    """

    job: Ingest
    number: int
    first: Ids
    originals: int | None
    drawn: Drawn
    graded: Graded
    buffers: Buffers

    def __len__(self) -> int:
        return len(self.drawn)

    @cached_property
    def answers(self) -> dict[str, pl.DataFrame]:
        """The rows of `predictions` and `outcomes`, or of `generations`.

        None if the job does not grade.
        """
        return self.graded()

    def contents(self) -> Iterator[Content]:
        """Encode the batch as files, one after another.

        One shard per site comes first, and then the rows of its sequences and its answers.
        """
        yield from self.shards()
        dataset = str(self.job.plan.dataset["dataset"])
        of_set = {} if self.job.patch else self.drawn.rows(self.first, dataset, self.originals)  # the base run has them
        yield from batch_contents(self.job.plan, self.number, of_set, self.answers, {})

    def shards(self) -> Iterator[Content]:
        """Encode the activations alone, for sites that are added to a run."""
        for site in self.job.plan.sites:
            yield from batch_contents(self.job.plan, self.number, {}, {}, {site.site: self._seal(site)})

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


@dataclass(frozen=True)
class Begun:
    """A batch whose passes are queued, or none of it is done yet; see `begin`."""

    job: Ingest
    number: int
    drawn: Any
    buffers: Buffers
    passes: Passes
    found: Iterator[Any]

    def finish(
        self, first: Ids, originals: int | None, advance: Callable[[int], None] = lambda sequences: None
    ) -> Batch:
        """Run the model over what is left of the batch.

        Args:
            first, originals, advance: see run_batch.
        """
        job, start = self.job, self.drawn.start
        of_batch = first.of_batch(job.plan.dataset, self.number, start)
        done = lambda sequences: advance(sequences - start)  # noqa: E731
        graded = job.answers(self.drawn, of_batch, self.buffers, done, self.passes, self.found)
        for site in job.plan.sites:
            self.buffers[site.site].hand_over()
        batch = Batch(job, self.number, of_batch, originals, self.drawn, graded, self.buffers)
        if self.passes.at_once == 1:
            _ = batch.answers  # by this thread, since no other may use the model
        return batch


def begin(job: Ingest, number: int, buffers: Buffers, passes: Passes) -> Begun:
    """Draw a batch of sequences, and queue its passes where two run at once.

    Args:
        buffers: receive the activations, one for each site or more.
        passes: runs them.
    """
    drawn = job.sequences.drawn(number)
    return Begun(job, number, drawn, buffers, passes, job.begin(drawn, buffers, passes))


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
    layouts = {site.site: site.layout for site in job.plan.sites}
    into = buffers_on(layouts, job.device) if buffers is None else buffers
    return begin(job, number, into, Passes(job.model)).finish(first, originals, advance)


def files(job: Ingest, number: int, first: Ids, originals: int | None = None) -> dict[str, bytes]:
    """Compute the files of one batch: path in the store → bytes.

    Args:
        first, originals: see run_batch.
    """
    made = run_batch(job, number, first, originals).contents()
    return {content.path: bytes(content.content) for content in made}
