"""The data of a probe: tokens, labels, and the split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from actstore.intervals import sign_flip
from actstore.queries.study import Test


@dataclass(frozen=True)
class Asked:
    """One kind of token and its labels.

    Attributes:
        tokens: n rows of `probe_tokens`, without activations.
        train: bool [n], rows of training trees.
        labels: label → int64 [n].
        guessed: label → baseline → float64 [n_test], the probability that a guess from the tree
            alone is right.
        n_nodes: nodes per tree.
    """

    tokens: pl.DataFrame
    train: np.ndarray
    labels: dict[str, np.ndarray]
    guessed: dict[str, dict[str, np.ndarray]]
    n_nodes: int

    @property
    def test_trees(self) -> np.ndarray:
        """int64 [n_test], tree_id of each test row."""
        return self.tokens["tree_id"].to_numpy()[~self.train]


def above_test(above: np.ndarray, trees: np.ndarray, row: dict[str, Any], seed: int) -> Test:
    """Test whether a probe is above the highest baseline.

    Args:
        above: float64 [n], correctness of each test row less that of the baseline.
        trees: int64 [n], tree_id of each test row.
        row: the row of `results` with the mean of `above`.
        seed: seed of the sign flips.
    """
    p = sign_flip(np.bincount(np.unique(trees, return_inverse=True)[1], weights=above), seed)
    what = f"a probe for the {row['label']}, less its baseline from the tree alone"
    return Test.of(row, p, what, exceeds="its baseline")
