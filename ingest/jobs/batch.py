"""One batch of a run: its trees drawn and written as words once, the model run over them, and the files that follow.

The files of a batch are a function of the run's definition and the batch's number alone. An ingest commits them, `repair`
puts them in the place of damaged ones, and `verify --recompute` holds what is stored against the same forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from actstore.arrays.pack import ShardBuffer
from actstore.ingest.jobs.job import Buffers, Ingest
from actstore.ingest.trees.tokens import Drawn
from actstore.writing.writer import Content, batch_contents


@dataclass(frozen=True)
class Batch:
    """What a model made of one batch of trees, not yet encoded.

    Attributes:
        first_tree_id: tree_id of the batch's first tree.
        originals: of a variant set: tree_id of the first tree of the whole set that it was made from.
        answers: the rows of `predictions` and `outcomes`, or of `generations`.
        buffers: the activations; not to be filled again before `contents` was called.
    """

    job: Ingest
    number: int
    first_tree_id: int
    originals: int | None
    drawn: Drawn
    answers: dict[str, pl.DataFrame]
    buffers: Buffers

    def __len__(self) -> int:
        return len(self.drawn.trees)

    def contents(self) -> list[Content]:
        """The files of the batch: rows of its trees, rows of its answers, a shard of each site."""
        of_trees = self.drawn.rows(self.first_tree_id, str(self.job.plan.dataset["dataset"]), self.originals)
        arrays = {site: buffer.seal(self.drawn.lengths) for site, buffer in self.buffers.items()}
        return batch_contents(self.job.plan, self.number, of_trees, self.answers, arrays)


def run_batch(
    job: Ingest,
    number: int,
    first_tree_id: int,
    originals: int | None = None,
    buffers: Buffers | None = None,
    advance: Callable[[int], None] = lambda trees: None,
) -> Batch:
    """Draw a batch of trees and run the model over it.

    Args:
        first_tree_id: tree_id of the first tree of the whole set.
        originals: see Batch.
        buffers: what to fill; new ones by default.
        advance: called with the trees of the set that are done so far.
    """
    start, stop = job.bounds(number)
    drawn = job.trees.drawn(start, stop)
    into = {site.site: ShardBuffer(site.layout) for site in job.plan.sites} if buffers is None else buffers
    answers = job.answers(drawn, first_tree_id + start, into, advance)
    return Batch(job, number, first_tree_id + start, originals, drawn, answers, into)


def files(job: Ingest, number: int, first_tree_id: int, originals: int | None = None) -> dict[str, bytes]:
    """The files of one batch, by path in the store.

    Args:
        first_tree_id, originals: see run_batch.
    """
    made = run_batch(job, number, first_tree_id, originals).contents()
    return {content.path: bytes(content.content) for content in made}
