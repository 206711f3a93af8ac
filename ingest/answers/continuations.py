"""Free continuations: the model is given the tree alone, up to the bar, and goes on by itself.

One continuation is greedy (sample 0), the others are drawn from the model's own distribution, at temperature 1. Each ends
behind the token that is padding or a comma (how the baseline stops), or where the longest prompt and path would end: the
reproduction was never trained to stop. Keys and values of what was said are kept from token to token, since running all 45
tokens of the tree again for each one costs thirty times as much; a test holds the tokens against the model's own forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from actstore.ingest.models.decode import Cache
from actstore.ingest.models.load import Model
from actstore.ingest.models.weights import state
from actstore.ingest.trees.rows import enum_series
from actstore.ingest.trees.tokens import COMMA, PAD, WORDS, goal_at, n_nodes_of


@dataclass(frozen=True)
class Generations:
    """Continuations of n_trees trees of n nodes, samples + 1 of each, of at most n + 2 tokens.

    Attributes:
        words: uint8 [n_trees, samples + 1, n + 2] word numbers as in ingest/trees/tokens.py.
        p: float32, as words: probability of each.
        p_best: float32, as words: probability of the likeliest.
        length: intp [n_trees, samples + 1], tokens said.
    """

    words: np.ndarray
    p: np.ndarray
    p_best: np.ndarray
    length: np.ndarray


class Generator:
    """A model that goes on from prompts.

    Args:
        model: any.
        samples: continuations that are drawn beside the greedy one, 0 to 255.
        seed: of the draws; tree and sample number say which draws are whose.
    """

    def __init__(self, model: Model, samples: int, seed: int) -> None:
        self.config, self.samples, self.seed = model.config, samples, seed
        self._device = next(model.bridge.parameters()).device
        self._weights = {name: value.to(self._device) for name, value in state(model.bridge, model.config).items()}

    @torch.no_grad()
    def go_on(self, words: np.ndarray, first: int) -> Generations:
        """Continue a batch of trees.

        Args:
            words: uint8 [n_trees, 4n-1] word numbers, as `tokens.encode` writes them; read up to the bar.
            first: number in its set of the batch's first tree.
        """
        n_trees, n_nodes = len(words), n_nodes_of(words)
        n_said, vocabulary = n_nodes + 2, self.config.vocabulary
        prompt = vocabulary.encode(words[:, : goal_at(n_nodes)])
        uniforms = self._uniforms(first, n_trees, n_said)
        cache = Cache(self.config, self._weights)
        logits = cache.extend(torch.from_numpy(prompt).to(self._device))
        logits = logits.repeat_interleave(self.samples + 1, 0)
        cache.repeat(self.samples + 1)
        ids, p, p_best = np.zeros((n_trees * (self.samples + 1), n_said), np.int64), *np.zeros((2, len(logits), n_said))
        going = np.ones(len(logits), bool)
        length = np.zeros(len(logits), np.intp)
        stops = np.isin(vocabulary.word_of_id, (PAD, COMMA))
        for place in range(n_said):
            ids[:, place], p[:, place], p_best[:, place] = _choose(logits, uniforms[:, place])
            length += going
            going &= ~stops[ids[:, place]]
            if place + 1 < n_said:
                if not going.any():
                    break
                logits = cache.extend(torch.from_numpy(ids[:, place, None]).to(self._device))
        shape = (n_trees, self.samples + 1, n_said)
        return Generations(
            vocabulary.decode(ids).reshape(shape),
            p.astype(np.float32).reshape(shape),
            p_best.astype(np.float32).reshape(shape),
            length.reshape(shape[:2]),
        )

    def _uniforms(self, first: int, n_trees: int, n_said: int) -> np.ndarray:
        """float64 [n_trees * (samples + 1), n_said]: what decides each token; NaN for the likeliest."""
        drawn = np.full((n_trees, self.samples + 1, n_said), np.nan)
        for sample in range(1, self.samples + 1):
            bits = np.random.PCG64DXSM(np.random.SeedSequence([self.seed, sample, *b"generations"]))
            bits.advance(first * n_said)
            drawn[:, sample] = np.random.Generator(bits).random((n_trees, n_said))
        return drawn.reshape(-1, n_said)


def _choose(logits: Tensor, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One token id a sequence, its probability, and the likeliest's; u float64 [n] in [0, 1), NaN for the likeliest."""
    p = torch.softmax(logits.double(), dim=-1).cpu().numpy()
    best = p.argmax(axis=1)
    drawn = (p.cumsum(axis=1) <= np.nan_to_num(u)[:, None]).sum(axis=1)
    ids = np.where(np.isnan(u), best, np.minimum(drawn, p.shape[1] - 1))
    rows = np.arange(len(p))
    return ids, p[rows, ids], p[rows, best]


def concatenate(batches: list[Generations]) -> Generations:
    """The continuations of several batches, in order."""
    return Generations(
        *(np.concatenate([getattr(some, name) for some in batches]) for name in ("words", "p", "p_best", "length"))
    )


def generation_rows(said: Generations, run: str, first_tree_id: int) -> pl.DataFrame:
    """The rows of the `generations` table, one a token, in (tree, sample, position) order; columns as in schema.sql."""
    n_said = said.words.shape[2]
    n_nodes = n_said - 2
    tree, sample, place = np.nonzero(np.arange(n_said) < said.length[:, :, None])
    return pl.DataFrame(
        {
            "run": pl.repeat(run, len(tree), dtype=pl.String, eager=True),
            "tree_id": (first_tree_id + tree).astype(np.int32),
            "sample": sample.astype(np.uint8),
            "position": (goal_at(n_nodes) + place).astype(np.uint8),
            "token": enum_series(said.words[tree, sample, place], WORDS),
            "p": said.p[tree, sample, place],
            "p_best": said.p_best[tree, sample, place],
        }
    )
