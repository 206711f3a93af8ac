"""The forward passes over one batch of text: short with short, long with long, padded on the right.

Sequences of one length waste no padding, so a pass takes the next ones by length. The order depends
on the lengths alone. Rows are put back in the order of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from actstore.arrays.address import Ids
from actstore.arrays.pack import ShardBuffer
from actstore.ingest.answers import next_token
from actstore.ingest.answers.next_token import Asked
from actstore.ingest.corpus.drawn import Drawn
from actstore.ingest.models.forward import activations as activations_of
from actstore.ingest.models.forward import forward
from actstore.ingest.models.load import Model
from actstore.ingest.models.sites import SiteSpec

if TYPE_CHECKING:
    from torch import Tensor


def passes(lengths: np.ndarray, per_pass: int) -> list[np.ndarray]:
    """The sequences of each forward pass, the longest first.

    Args:
        lengths: intp [n], tokens of each sequence.
        per_pass: most sequences of a pass.

    Returns:
        intp [≤ per_pass] each: numbers of sequences, each in one pass.
    """
    by_length = np.argsort(-lengths, kind="stable")
    return [by_length[start : start + per_pass] for start in range(0, len(by_length), per_pass)]


def run_text(
    model: Model,
    specs: Sequence[SiteSpec],
    drawn: Drawn,
    first: Ids,
    into: Mapping[str, ShardBuffer],
    per_pass: int,
    asked: Asked | None,
    run: str,
    advance: Callable[[int], None],
) -> dict[str, pl.DataFrame]:
    """Run a model over one batch of text.

    Args:
        drawn: the batch, see ingest/corpus/drawn.py.
        first: ids of the batch's first sequence.
        into: receives the activations, by TransformerLens' name of the site.
        per_pass: sequences per forward pass.
        asked: the predictions to grade; None for none, so that a pass ends after the last site.
        run: name of the run.
        advance: called with the number of sequences of the set done so far.

    Returns:
        The rows of `predictions`; nothing if none are asked for.
    """
    import torch

    lengths = drawn.lengths
    begins = np.cumsum(lengths) - lengths
    graded = None if asked is None else next_token.Grades(int(lengths.sum()), asked.top)
    done = 0
    for chosen in passes(lengths, per_pass):
        of_these = lengths[chosen]
        numbers = torch.from_numpy(padded(drawn.numbers, begins[chosen], of_these))
        ids = numbers.to(model.device, non_blocking=True)  # or the pass before would be waited for

        def take(
            spec: SiteSpec, activations: Tensor, chosen: np.ndarray = chosen, of_these: np.ndarray = of_these
        ) -> None:
            put(into[spec.name], spec, activations, chosen, begins[chosen], of_these)

        if graded is None:
            activations_of(model, ids, specs, take, of_these)
        else:
            graded.add(forward(model, ids, specs, take, of_these), ids, of_these, begins[chosen])
        done += len(chosen)
        advance(drawn.start + done)
    if graded is None:
        return {}
    rows = graded.rows(run, drawn.token_ids(first), np.repeat(drawn.sequence_ids(first), lengths), drawn.pieces)
    return {"predictions": rows}


def padded(numbers: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Token numbers of some sequences, int64 [n, longest], padded on the right with 0."""
    ids = np.zeros((len(lengths), int(lengths.max())), np.int64)
    for row, begin, length in zip(ids, begins.tolist(), lengths.tolist(), strict=True):
        row[:length] = numbers[begin : begin + length]
    return ids


def put(
    buffer: ShardBuffer,
    spec: SiteSpec,
    activations: Tensor,
    chosen: np.ndarray,
    begins: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Copy what one site gave in a forward pass into its shard, without padding.

    Args:
        activations: float32 [sequence, pos, *row] or [sequence, head, query, key].
        chosen: intp [n], the sequences' numbers in the batch.
        begins, lengths: intp [n], first row in the batch and tokens of each sequence.
    """
    if buffer.layout.position_axis is not None:  # all sequences have one length
        for i, sequence in enumerate(chosen.tolist()):
            buffer.put(sequence, activations[i : i + 1])
        return
    for i, (begin, length) in enumerate(zip(begins.tolist(), lengths.tolist(), strict=True)):
        buffer.put(begin, as_rows(activations[i], spec, length, buffer.layout.row_shape))


def as_rows(activations: Tensor, spec: SiteSpec, length: int, row_shape: tuple[int, ...]) -> Tensor:
    """The rows of one sequence's tokens, float32 [length, *row_shape].

    Args:
        activations: [pos, *row] or [head, query, key], padded on the right.
        row_shape: of the array; the keys of a pattern that a sequence has not are NaN.
    """
    if spec.kind != "pattern":
        return activations[:length]
    rows = activations.new_full((length, *row_shape), float("nan"))
    rows[..., :length] = activations[:, :length, :length].movedim(1, 0)
    return rows
