"""The data of a probe: tokens, labels, and the split."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from actstore.intervals import sign_flip
from actstore.queries.study import Test


@dataclass(frozen=True)
class Asked:
    """One kind of token and its labels.

    Attributes:
        tokens: n rows, with columns `token` and `position`, without activations.
        sequences: int64 [n], the tree, document or other sequence of each row. Rows of one may
            depend on each other.
        train: bool [n], rows of training sequences.
        labels: label → int64 [n].
        guessed: label → baseline → float64 [n_test], the probability that a guess without the
            network is right.
        n_classes: label → number of classes.
        names: label → names of the classes [n_classes]; a label that is missing here has its
            numbers for names.
        baseline: what a probe is compared with, in words.
        embedding: bool [n_test], test rows that the same probe of the embedding gets right; None
            if the embedding is no control.
    """

    tokens: pl.DataFrame
    sequences: np.ndarray
    train: np.ndarray
    labels: dict[str, np.ndarray]
    guessed: dict[str, dict[str, np.ndarray]]
    n_classes: dict[str, int]
    names: dict[str, np.ndarray] = field(default_factory=dict)
    baseline: str = "its baseline from the tree alone"
    embedding: np.ndarray | None = None

    @property
    def test_sequences(self) -> np.ndarray:
        """int64 [n_test], the sequence of each test row."""
        return self.sequences[~self.train]

    @cached_property
    def types(self) -> np.ndarray:
        """int64 [n], the type of each row's token, from 0, in the order of word and then position.

        A type is the network's input at a token: word and position.
        """
        types = pl.struct(pl.col("token").cast(pl.String), "position").rank("dense") - 1
        return self.tokens.select(types.cast(pl.Int64)).to_series().to_numpy()


def above_test(above: np.ndarray, sequences: np.ndarray, row: dict[str, Any], seed: int, baseline: str) -> Test:
    """Test whether a probe is above the highest baseline.

    Args:
        above: float64 [n], correctness of each test row less that of the baseline.
        sequences: int64 [n], the sequence of each test row.
        row: the row of `results` with the mean of `above`.
        seed: seed of the sign flips.
        baseline: see Asked.
    """
    p = sign_flip(np.bincount(np.unique(sequences, return_inverse=True)[1], weights=above), seed)
    what = f"a probe for the {row['label']}, less {baseline}"
    return Test.of(row, p, what, exceeds="its baseline")
