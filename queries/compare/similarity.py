"""Linear CKA (Kornblith et al. 2019, https://arxiv.org/abs/1905.00414), and its interval."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from actstore.intervals import bootstrap


def cka(X: np.ndarray, Z: np.ndarray) -> float:
    """Linear CKA of float [n, d] and [n, e]: 1 for a scaled rotation; about d / n by chance."""
    X, Z = X - X.mean(axis=0, dtype=np.float64), Z - Z.mean(axis=0, dtype=np.float64)
    shared = np.square(X.T @ Z).sum()
    own = np.linalg.norm(X.T @ X) * np.linalg.norm(Z.T @ Z)
    return float(shared / own) if own else 0.0


def cka_interval(X: np.ndarray, Z: np.ndarray, trees: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of CKA over trees.

    Each tree's sums of products are computed once; a resample adds them.
    """
    order = np.argsort(trees, kind="stable")
    starts = np.flatnonzero(np.diff(trees[order], prepend=-1))
    X, Z = (values - values.mean(axis=0, dtype=np.float64) for values in (X[order], Z[order]))
    n = np.diff(starts, append=len(X)).astype(np.float64)
    sums = [np.add.reduceat(values, starts) for values in (X, Z)]
    n_trees = len(starts)

    def products(A: np.ndarray, B: np.ndarray) -> np.ndarray:
        by_tree = [a.T @ b for a, b in zip(np.split(A, starts[1:]), np.split(B, starts[1:]), strict=True)]
        return np.stack(by_tree).reshape(n_trees, -1)

    shared, own, others = products(X, Z), products(X, X), products(Z, Z)

    def resampled(counts: np.ndarray) -> np.ndarray:
        total = (counts @ n)[:, None]
        (x, z) = (counts @ of / total for of in sums)
        sizes = [
            np.linalg.norm(counts @ of - total * (a[:, :, None] * b[:, None, :]).reshape(len(counts), -1), axis=1)
            for of, a, b in ((shared, x, z), (own, x, x), (others, z, z))
        ]
        return np.asarray(sizes[0] ** 2 / (sizes[1] * sizes[2]))

    return bootstrap(resampled, n_trees, seed)


def cka_interval_of_rows(X: np.ndarray, Z: np.ndarray, sequences: np.ndarray, seed: int) -> tuple[float, float]:
    """As `cka_interval`, for few rows of wide vectors.

    The cost is n * n numbers, where that of `cka_interval` is d * d numbers per sequence.

    Args:
        X, Z: float [n, d] and [n, e].
        sequences: int [n], the sequence of each row; whole sequences are drawn.
        seed: seed of the bootstrap.
    """
    _, at = np.unique(sequences, return_inverse=True)
    X, Z = (values - values.mean(axis=0, dtype=np.float64) for values in (X, Z))
    member = np.eye(at.max() + 1)[at]  # [n, n_sequences]
    K, L = X @ X.T, Z @ Z.T
    shared, own, others = (_weighted(A, B, member, at) for A, B in ((K, L), (K, K), (L, L)))

    def resampled(counts: np.ndarray) -> np.ndarray:
        return np.asarray(shared(counts) / np.sqrt(own(counts) * others(counts)))

    return bootstrap(resampled, member.shape[1], seed)


def _weighted(A: np.ndarray, B: np.ndarray, member: np.ndarray, at: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The sum of products of two Gram matrices, centred by each resample's own means.

    Args:
        A, B: float64 [n, n].
        member: float64 [n, n_sequences], 1 where the row is of the sequence.
        at: intp [n], the sequence of each row.

    Returns:
        A function of counts, float64 [resamples, n_sequences], to float64 [resamples].
    """
    a, b = A @ member, B @ member
    whole, of_a, of_b = member.T @ (A * B) @ member, member.T @ a, member.T @ b
    sizes = member.sum(axis=0)

    def of(counts: np.ndarray) -> np.ndarray:
        n = counts @ sizes
        both, in_a, in_b = (((counts @ sums) * counts).sum(axis=1) for sums in (whole, of_a, of_b))
        by_row = (counts[:, at] * (counts @ a.T) * (counts @ b.T)).sum(axis=1)
        return np.asarray(both - 2 * by_row / n + in_a * in_b / n**2)

    return of
