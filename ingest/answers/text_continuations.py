"""Continuations of text: the model reads a whole sequence and then generates by itself.

Sample 0 is greedy; the other samples are drawn from the model's distribution at temperature 1. A
continuation ends after the tokenizer's end of text, after as many tokens as were asked for, or at
the model's context. Each new token is a forward pass over all tokens before it, so that any model
that predicts can be asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

from actstore.arrays.address import Ids
from actstore.ingest.answers.continuations import choose
from actstore.ingest.answers.passes import padded, passes
from actstore.ingest.corpus.drawn import Drawn
from actstore.ingest.models.forward import forward
from actstore.ingest.models.load import Model


@dataclass(frozen=True)
class TextGenerator:
    """A model that continues sequences of text.

    Attributes:
        samples: number of sampled continuations, 0 to 255, in addition to the greedy one.
        n_new: most tokens of a continuation.
    """

    model: Model
    samples: int
    n_new: int

    def go_on(
        self, drawn: Drawn, which: np.ndarray, per_pass: int, advance: Callable[[int], None] = lambda done: None
    ) -> pl.DataFrame:
        """Continue some sequences of a batch.

        Args:
            drawn: the batch.
            which: intp [n], numbers of the sequences in the batch.
            per_pass: sequences per forward pass; a sequence counts once for each continuation.
            advance: called with the number of sequences done so far.

        Returns:
            Columns sequence (its number in the batch), sample, position, number, p, p_best; one row
            per token, by sequence, sample and position.
        """
        found, done, at_once = [], 0, max(1, per_pass // (self.samples + 1))
        for some in passes(drawn.lengths[which], at_once):
            found.append(self._go_on(drawn, which[some]))
            done += len(some)
            advance(done)
        return pl.concat(found).sort("sequence", "sample", "position")

    def _go_on(self, drawn: Drawn, which: np.ndarray) -> pl.DataFrame:
        """Continue the sequences of one pass."""
        import torch

        each = np.repeat(which, self.samples + 1)
        sample = np.tile(np.arange(self.samples + 1), len(which))
        lengths, uniforms = drawn.lengths[each].copy(), self._uniforms(drawn.start + each, sample)
        ids = np.zeros((len(each), int(lengths.max()) + self.n_new), np.int64)
        prompts = padded(drawn.numbers, drawn.ends[:-1][each], lengths)
        ids[:, : prompts.shape[1]] = prompts
        stop = getattr(self.model.tokenizer, "eos_token_id", None)
        going, rows = np.flatnonzero(lengths < self.model.n_ctx), []
        for place in range(self.n_new):
            if not len(going):
                break
            given = torch.from_numpy(ids[going, : lengths[going].max()]).to(self.model.device)
            logits = forward(self.model, given, [], lambda site, x: None, lengths[going])
            last = torch.from_numpy(lengths[going] - 1)
            number, p, p_best = choose(logits[torch.arange(len(going)), last], uniforms[going, place])
            ids[going, lengths[going]] = number
            rows.append(
                pl.DataFrame(
                    {
                        "sequence": each[going],
                        "sample": sample[going].astype(np.uint8),
                        "position": lengths[going].astype(np.int32),
                        "number": number,
                        "p": p.astype(np.float32),
                        "p_best": p_best.astype(np.float32),
                    }
                )
            )
            lengths[going] += 1
            going = going[(number != stop) & (lengths[going] < self.model.n_ctx)]
        return pl.concat(rows) if rows else pl.DataFrame(schema=SCHEMA)

    def _uniforms(self, numbers: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """float64 [n, n_new]: the draw per token; NaN is greedy.

        Args:
            numbers: intp [n], numbers of the sequences in the set.
            samples: intp [n], numbers of the samples.
        """
        drawn = np.full((len(numbers), self.n_new), np.nan)
        for row, (number, sample) in enumerate(zip(numbers.tolist(), samples.tolist(), strict=True)):
            if sample:
                seed = np.random.SeedSequence([number, sample, *b"generations"])
                drawn[row] = np.random.Generator(np.random.PCG64DXSM(seed)).random(self.n_new)
        return drawn


SCHEMA = {
    "sequence": pl.Int64(),
    "sample": pl.UInt8(),
    "position": pl.Int32(),
    "number": pl.Int64(),
    "p": pl.Float32(),
    "p_best": pl.Float32(),
}


def generation_rows(generated: pl.DataFrame, drawn: Drawn, run: str, first: Ids) -> pl.DataFrame:
    """The rows of `generations`, as in schema.sql.

    Args:
        generated: see `TextGenerator.go_on`.
        first: ids of the batch's first sequence.
    """
    pieces = pl.Series("pieces", drawn.pieces, dtype=pl.String)
    return generated.select(
        pl.lit(run).alias("run"),
        (pl.col("sequence") + first.sequence_id).alias("sequence_id"),
        "sample",
        "position",
        pieces.gather(generated["number"]).alias("token"),
        "p",
        "p_best",
    )
