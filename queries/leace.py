"""Erasing a label from rows: LEACE, a probe's directions, or random directions of the same rank.

LEACE (Belrose and others 2023, https://arxiv.org/abs/2306.03819, theorem 4.3) is the smallest
change of rows, in mean square, that takes away every linear trace of a label. For rows x with mean
m and covariance S, and the cross-covariance S_xz with the label's one-hot classes z,

    r(x) = x - W⁺ U Uᵀ W (x - m),    W = (S^½)⁺,    U an orthonormal basis of the columns of W S_xz

Afterwards all classes have the same mean, so no linear probe has a lower loss than a constant. Here
W is the whitening of the probes, which differs from theirs by a rotation and gives the same map.

The other two erasures differ in U alone: the directions in which a probe reads, or random ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from actstore.queries.probes.fit import Whitening, one_thread

NOTHING = 1e-5  # share of the largest singular value; less is float32's rounding


@dataclass(frozen=True)
class Erasure:
    """An affine map of rows that takes some whitened directions away.

    Attributes:
        whiten: the whitening W of the training rows.
        basis: float32 [d, rank], orthonormal: U.
    """

    whiten: Whitening
    basis: np.ndarray

    @classmethod
    def leace(cls, whiten: Whitening, whitened: np.ndarray, y: np.ndarray) -> Erasure:
        """LEACE.

        Args:
            whiten: whitening of the training rows.
            whitened: float32 [n, d], these rows, whitened.
            y: int64 [n], their classes.
        """
        classes, y = np.unique(y, return_inverse=True)
        one_hot = np.eye(len(classes))[y]
        return cls(whiten, _span(whitened.T.astype(np.float64) @ (one_hot - one_hot.mean(axis=0)), len(classes) - 1))

    @classmethod
    def of_probe(cls, whiten: Whitening, weights: np.ndarray) -> Erasure:
        """The directions of a probe, whose classes then all have the same logits at every row.

        Args:
            weights: float32 [n_classes, d], of whitened rows; they sum to 0 over classes.
        """
        return cls(whiten, _span(weights.T.astype(np.float64), len(weights) - 1))

    @classmethod
    def at_random(cls, whiten: Whitening, rank: int, rng: np.random.Generator) -> Erasure:
        """As many random directions as `rank` says."""
        directions = rng.standard_normal((whiten.axes.shape[1], rank))
        return cls(whiten, np.linalg.qr(directions)[0].astype(np.float32))

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.basis.shape[1]

    @cached_property
    def _back(self) -> np.ndarray:
        """float32 [rank, d_model]: from coordinates in U back to rows, (W⁺ U)ᵀ."""
        axes = self.whiten.axes.astype(np.float64)
        squared = (axes**2).sum(axis=0)
        outward = np.divide(axes, squared, out=np.zeros_like(axes), where=squared > 0)
        return (outward @ self.basis).T.astype(np.float32)

    def __call__(self, X: np.ndarray) -> np.ndarray:
        """float32 [n, d_model]: rows without these directions."""
        with one_thread():
            return X - (self.whiten(X) @ self.basis) @ self._back


def _span(columns: np.ndarray, most: int) -> np.ndarray:
    """float32 [d, rank]: an orthonormal basis of the columns' span, at most `most` directions."""
    U, singular, _ = np.linalg.svd(columns, full_matrices=False)
    rank = int((singular[:most] > NOTHING * singular[0]).sum())
    return U[:, :rank].astype(np.float32)
