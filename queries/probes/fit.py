"""A linear probe, multinomial logistic regression on whitened rows, and the data of its controls.

Whitening makes the L2 penalty independent of the basis, and ends a fit without a signal after about
10 iterations instead of 100. Every fit runs on one BLAS thread, with several fits in parallel. The
numbers therefore do not depend on the number of cores, and BLAS threads do not wait for each other
on a busy machine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

C = 1.0  # weight of the data against the L2 penalty, scikit-learn's default
TOL = 1e-4  # largest gradient of a converged fit, scikit-learn's default
MAX_ITER = 300  # a fit takes about 10 iterations
SMALLEST_VARIANCE = 1e-7  # share of the largest; less is float32's rounding, which whitening would amplify
ROUNDING = 1e-6  # share of the largest number; float32's error in a mean of equal rows


@dataclass(frozen=True)
class Fit:
    """One fitted probe, scored.

    Attributes:
        right: bool [n_test], test rows that the probe gets right.
        n_iter: iterations of lbfgs.
        converged: the gradient is below the tolerance, so more iterations would change little.
        weights: float32 [n_classes, d], logit of each class per whitened coordinate.
        intercepts: float32 [n_classes].
    """

    right: np.ndarray
    n_iter: int
    converged: bool
    weights: np.ndarray
    intercepts: np.ndarray


@dataclass(frozen=True)
class Whitening:
    """An affine map that gives its own rows mean 0, variance 1 and no correlations.

    Attributes:
        mean: float32 [d_model].
        axes: float32 [d_model, d]; coordinates = (row - mean) @ axes.
    """

    mean: np.ndarray
    axes: np.ndarray

    @classmethod
    def of(cls, X: np.ndarray) -> Whitening:
        """Fit the map to float32 [n, d_model]; d is smaller if rows span fewer dimensions.

        Equal rows (a separator's embedding) have one coordinate, which is 0.
        """
        from sklearn.decomposition import PCA

        mean = X.mean(axis=0, dtype=np.float64).astype(np.float32)
        centred = X - mean
        if np.abs(centred).max(initial=0) <= ROUNDING * np.abs(X).max(initial=0):
            return cls(mean, np.zeros((X.shape[1], 1), np.float32))
        found = PCA(svd_solver="covariance_eigh").fit(centred)  # PCA itself subtracts the mean only after squaring
        variance = found.explained_variance_
        kept = variance > SMALLEST_VARIANCE * variance[0]
        axes = found.components_[kept].T / np.sqrt(variance[kept])
        return cls(mean, axes.astype(np.float32))

    def __call__(self, X: np.ndarray) -> np.ndarray:
        """float32 [n, d]: the coordinates of rows, float32 [n, d_model]."""
        return np.asarray((X - self.mean) @ self.axes)


def fit(X: np.ndarray, y: np.ndarray, train: np.ndarray, max_iter: int = MAX_ITER) -> Fit:
    """Fit a probe to the training rows and score it on the others.

    Args:
        X: float32 [n, d], whitened.
        y: int64 [n] labels.
        train: bool [n]; the rows of one tree must all be on one side.
        max_iter: largest number of iterations of lbfgs.
    """
    from sklearn.linear_model import LogisticRegression

    if (y[train] == y[train][0]).all():  # scikit-learn refuses a single class
        return Fit(y[~train] == y[train][0], 0, True, np.zeros((1, X.shape[1]), np.float32), np.zeros(1, np.float32))
    probe = LogisticRegression(C=C, tol=TOL, max_iter=max_iter).fit(X[train], y[train])
    # a fit ends at the cap, or where float32 allows no further step; the gradient tells whether it
    # converged
    converged = largest_gradient(probe, X[train], y[train]) <= 2 * TOL  # 2: this and the fit round differently
    weights, intercepts = probe.coef_, probe.intercept_
    if len(weights) == 1:  # for two classes, scikit-learn keeps the difference
        weights, intercepts = np.vstack([-weights, weights]) / 2, np.concatenate([-intercepts, intercepts]) / 2
    right = probe.predict(X[~train]) == y[~train]
    return Fit(right, int(probe.n_iter_[0]), converged, weights, intercepts)


def one_thread() -> threadpool_limits:
    """Limit BLAS and OpenMP to one thread in a with block; covers only libraries loaded before."""
    return threadpool_limits(1)


def fit_all(jobs: Sequence[tuple[np.ndarray, np.ndarray]], train: np.ndarray, max_iter: int = MAX_ITER) -> list[Fit]:
    """Fit a probe per (X, y), in order, with one fit per core at a time."""
    from sklearn.exceptions import (
        ConvergenceWarning,  # imported here: the thread limit covers only libraries loaded before
    )

    with warnings.catch_warnings(), one_thread(), ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore", ConvergenceWarning)  # Fit.converged says so per probe
        return list(pool.map(lambda job: fit(job[0], job[1], train, max_iter), jobs))


def largest_gradient(probe: LogisticRegression, X: np.ndarray, y: np.ndarray) -> float:
    """The largest gradient of mean log loss plus penalty; lbfgs reduces it to TOL."""
    residual = probe.predict_proba(X).astype(np.float64)
    residual[np.arange(len(y)), np.searchsorted(probe.classes_, y)] -= 1
    residual = residual[:, -len(probe.coef_) :]  # two classes share one row of weights, the second's
    by_weight = (X.T @ residual + probe.coef_.T / C) / len(y)
    return float(max(np.abs(by_weight).max(), np.abs(residual.mean(axis=0)).max()))


def random_directions(X: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """float32 [n, k]: rows projected on k orthogonal random directions, one per class in y."""
    rng = np.random.default_rng(seed)
    k = min(len(np.unique(y)), X.shape[1])
    return X @ np.linalg.qr(rng.standard_normal((X.shape[1], k)))[0].astype(np.float32)


def shuffle_within(train: np.ndarray, seed: int) -> np.ndarray:
    """intp [n]: an order that shuffles rows within each side of the split.

    No label can get lost in training.
    """
    rng = np.random.default_rng(seed)
    order = np.arange(len(train))
    for side in (train, ~train):
        order[side] = rng.permutation(order[side])
    return order


def control_labels(words: np.ndarray, positions: np.ndarray, y: np.ndarray, train: np.ndarray, seed: int) -> np.ndarray:
    """int64 [n]: the labels of Hewitt and Liang's control task (https://arxiv.org/abs/1909.03368).

    Each type of token gets one label, drawn from the distribution of training labels. A type is the
    network's input at a token: word and position. The labels are meaningless: a probe can be right
    only if it tells types apart and memorises their labels.

    Args:
        words, positions: [n], word and position of each row's token.
        y: int64 [n], the labels whose distribution is used.
        train: bool [n], training rows.
        seed: seed of the draw.
    """
    _, word = np.unique(words, return_inverse=True)
    _, kind = np.unique(np.stack([word, positions.astype(np.intp)]), axis=1, return_inverse=True)
    drawn = np.random.default_rng(seed).choice(y[train], size=kind.max() + 1)
    return np.asarray(drawn[kind])
