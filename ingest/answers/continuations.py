"""Free continuations: the model reads the edges up to the bar and then generates by itself.

Sample 0 is greedy; the other samples are drawn from the model's distribution at temperature 1. A
continuation ends after padding or a comma (the baseline stops with a comma), or at the length of
the longest prompt and path, since the reproduction was never trained to stop. Keys and values are
cached: a forward pass over all 45 tokens of the tree per new token costs thirty times as much. A
test compares the tokens with the model's own forward pass.
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
    """Continuations of n_trees trees of n nodes: samples + 1 per tree, of at most n + 2 tokens.

    Attributes:
        words: uint8 [n_trees, samples + 1, n + 2] word numbers, see ingest/trees/tokens.py.
        p: float32, shape of `words`: probability of each word.
        p_best: float32, shape of `words`: probability of the likeliest word at that place.
        length: intp [n_trees, samples + 1], tokens generated.
    """

    words: np.ndarray
    p: np.ndarray
    p_best: np.ndarray
    length: np.ndarray


class Generator:
    """A model that continues prompts.

    Args:
        samples: number of sampled continuations, 0 to 255, in addition to the greedy one.
        seed: with tree and sample number, determines every draw.
    """

    def __init__(self, model: Model, samples: int, seed: int) -> None:
        self.config, self.samples, self.seed = model.config, samples, seed
        self._device = next(model.bridge.parameters()).device
        self._weights = {name: value.to(self._device) for name, value in state(model.bridge, model.config).items()}

    @torch.no_grad()
    def go_on(self, words: np.ndarray, first: int) -> Generations:
        """Continue a batch of trees.

        Args:
            words: uint8 [n_trees, 4n-1] word numbers, see `tokens.encode`; only those up to the bar
                are read.
            first: index in its set of the batch's first tree.
        """
        n_trees, n_nodes = len(words), n_nodes_of(words)
        n_new, vocabulary = n_nodes + 2, self.config.vocabulary
        prompt = vocabulary.encode(words[:, : goal_at(n_nodes)])
        uniforms = self._uniforms(first, n_trees, n_new)
        cache = Cache(self.config, self._weights)
        logits = cache.extend(torch.from_numpy(prompt).to(self._device))
        logits = logits.repeat_interleave(self.samples + 1, 0)
        cache.repeat(self.samples + 1)
        ids, p, p_best = np.zeros((n_trees * (self.samples + 1), n_new), np.int64), *np.zeros((2, len(logits), n_new))
        going = np.ones(len(logits), bool)
        length = np.zeros(len(logits), np.intp)
        stops = np.isin(vocabulary.word_of_id, (PAD, COMMA))
        for place in range(n_new):
            ids[:, place], p[:, place], p_best[:, place] = choose(logits, uniforms[:, place])
            length += going
            going &= ~stops[ids[:, place]]
            if place + 1 < n_new:
                if not going.any():
                    break
                logits = cache.extend(torch.from_numpy(ids[:, place, None]).to(self._device))
        shape = (n_trees, self.samples + 1, n_new)
        return Generations(
            vocabulary.decode(ids).reshape(shape),
            p.astype(np.float32).reshape(shape),
            p_best.astype(np.float32).reshape(shape),
            length.reshape(shape[:2]),
        )

    def _uniforms(self, first: int, n_trees: int, n_new: int) -> np.ndarray:
        """float64 [n_trees * (samples + 1), n_new]: the draw per token; NaN is greedy."""
        drawn = np.full((n_trees, self.samples + 1, n_new), np.nan)
        for sample in range(1, self.samples + 1):
            bits = np.random.PCG64DXSM(np.random.SeedSequence([self.seed, sample, *b"generations"]))
            bits.advance(first * n_new)
            drawn[:, sample] = np.random.Generator(bits).random((n_trees, n_new))
        return drawn.reshape(-1, n_new)


def choose(logits: Tensor, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose a token id per sequence by draws; NaN chooses the likeliest.

    Args:
        logits: float [n, d_vocab].
        u: float64 [n], in [0, 1).

    Returns:
        The ids, their probabilities, and the probabilities of the likeliest ids.
    """
    p = torch.softmax(logits.double(), dim=-1).cpu().numpy()
    best = p.argmax(axis=1)
    drawn = (p.cumsum(axis=1) <= np.nan_to_num(u)[:, None]).sum(axis=1)
    ids = np.where(np.isnan(u), best, np.minimum(drawn, p.shape[1] - 1))
    rows = np.arange(len(p))
    return ids, p[rows, ids], p[rows, best]


def generation_rows(generated: Generations, run: str, first_tree_id: int) -> pl.DataFrame:
    """The rows of `generations`, one per token, by (tree, sample, position), as in schema.sql."""
    n_new = generated.words.shape[2]
    n_nodes = n_new - 2
    tree, sample, place = np.nonzero(np.arange(n_new) < generated.length[:, :, None])
    return pl.DataFrame(
        {
            "run": pl.repeat(run, len(tree), dtype=pl.String, eager=True),
            "tree_id": (first_tree_id + tree).astype(np.int32),
            "sample": sample.astype(np.uint8),
            "position": (goal_at(n_nodes) + place).astype(np.uint8),
            "token": enum_series(generated.words[tree, sample, place], WORDS),
            "p": generated.p[tree, sample, place],
            "p_best": generated.p_best[tree, sample, place],
        }
    )
