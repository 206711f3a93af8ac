"""A linear probe, multinomial logistic regression on whitened rows, and the data of its controls.

What a fit minimises, and how, is said in newton.py. Every fit runs on one BLAS thread, with several
fits in parallel. The numbers therefore do not depend on the number of cores, and BLAS threads do
not wait for each other on a busy machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from actstore.queries.probes import newton

C, TOL = newton.C, newton.TOL
MAX_ITER = 300  # a fit takes about 5 iterations
AT_ONCE = 1 << 17  # numbers whitened or copied at once: they stay in the processor's cache
SMALLEST_VARIANCE = 1e-7  # share of the largest; less is float32's rounding, which whitening would amplify
ROUNDING = 1e-6  # share of the largest mean; float32's error in equal rows


@dataclass(frozen=True)
class Fit:
    """One fitted probe, scored.

    Attributes:
        right: bool [n_test], test rows that the probe gets right.
        n_iter: iterations.
        converged: gradient and estimated gap are below their tolerances, so more iterations would
            change little.
        weights: float32 [n_classes, d], logit of each class per whitened coordinate; their sum over
            classes is 0.
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
    def of(cls, X: np.ndarray, rows: np.ndarray | None = None) -> Whitening:
        """Fit the map to rows of X, float [n, d_model]; d is smaller if rows span fewer dimensions.

        `rows` is a mask; default: all rows. The axes are the principal components, in falling order
        of variance; the largest entry of each is positive. Equal rows (a separator's embedding)
        have one coordinate, which is 0.
        """
        n, width = len(X) if rows is None else int(rows.sum()), X.shape[1]
        first = np.float32(X[0 if rows is None else rows.argmax()])
        beyond, products = np.zeros(width), np.zeros((width, width))
        with one_thread():
            for _, block in _blocks(X, rows):
                block -= first  # of equal rows, nothing is left to round
                beyond += np.ones(len(block), np.float32) @ block
            mean = (first + beyond / n).astype(np.float32)
            for _, block in _blocks(X, rows):
                block -= mean
                products += block.T @ block
            if np.trace(products) <= n * width * (ROUNDING * np.abs(mean).max()) ** 2:
                return cls(mean, np.zeros((width, 1), np.float32))
            variance, axes = np.linalg.eigh((products / max(n - 1, 1)).astype(np.float32))
        variance, axes = variance[::-1], axes[:, ::-1]
        kept = variance > SMALLEST_VARIANCE * variance[0]
        variance, axes = variance[kept], axes[:, kept]
        largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
        return cls(mean, axes * np.sign(largest) / np.sqrt(variance))

    def __call__(self, X: np.ndarray) -> np.ndarray:
        """float32 [n, d]: the coordinates of rows, float [n, d_model]."""
        whitened = np.empty((len(X), self.axes.shape[1]), np.float32)
        self.fill(whitened, X)
        return whitened

    def fill(self, out: np.ndarray, X: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Write the coordinates of rows into `out`, float32 [n, d]; for rows see `of`."""
        with one_thread():
            for at, block in _blocks(X, rows):
                block -= self.mean
                np.matmul(block, self.axes, out=out[at])


def _blocks(X: np.ndarray, rows: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """Copies of rows, float32 [.., d_model], block by block, and where they lie among the rows.

    A copy lasts until the next. `rows` is a mask; default: all rows.
    """
    at = None if rows is None else np.flatnonzero(rows)
    n, step = len(X) if at is None else len(at), max(1, AT_ONCE // X.shape[1])
    copies = np.empty((min(n, step), X.shape[1]), np.float32)
    for start in range(0, n, step):
        some, block = slice(start, min(start + step, n)), copies[: n - start]
        block[:] = X[some if at is None else at[some]]
        yield some, block


@dataclass(frozen=True)
class Sides:
    """Rows of fits, divided; each float32 [.., d + 1], with a last column of ones.

    Attributes:
        training: rows to fit.
        test: rows to score.
    """

    training: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, X: np.ndarray, train: np.ndarray, whiten: Whitening | None = None) -> Sides:
        """Divide rows of X, float [n, d_model], by a mask; `whiten` maps them first."""
        return cls(with_ones(X, train, whiten), with_ones(X, ~train, whiten))

    @classmethod
    def whitened(cls, X: np.ndarray, train: np.ndarray) -> Sides:
        """As `of`, by the whitening of the training rows."""
        return cls.of(X, train, Whitening.of(X, train))

    def projected(self, directions: np.ndarray) -> Sides:
        """The rows' products with directions, float32 [d, k]."""
        return Sides(_projected(self.training, directions), _projected(self.test, directions))


def _projected(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    made = np.ones((len(rows), directions.shape[1] + 1), np.float32)
    with one_thread():
        np.matmul(rows[:, :-1], directions, out=made[:, :-1])
    return made


def fit(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray, max_iter: int = MAX_ITER) -> Fit:
    """Fit a probe to training rows and score it on test rows.

    Args:
        X, X_test: float32 [n, d] and [n_test, d], whitened.
        y, y_test: int64 [n] and [n_test], labels.
        max_iter: largest number of iterations.
    """
    return fit_with_ones(with_ones(X), y, with_ones(X_test), y_test, max_iter)


def fit_with_ones(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray, max_iter: int) -> Fit:
    """As `fit`, of rows with a last column of ones, float32 [n, d + 1] and [n_test, d + 1]."""
    classes, y = np.unique(y, return_inverse=True)
    if len(classes) == 1:
        return Fit(y_test == classes[0], 0, True, np.zeros((1, X.shape[1] - 1), np.float32), np.zeros(1, np.float32))
    w, n_iter, converged = newton.minimise(newton.Objective(X, y, len(classes)), max_iter)
    right = classes[newton.logits(w, X_test).argmax(axis=1)] == y_test
    w = w.astype(np.float32)
    return Fit(right, n_iter, converged, w[:, :-1], w[:, -1])


def with_ones(X: np.ndarray, rows: np.ndarray | None = None, whiten: Whitening | None = None) -> np.ndarray:
    """float32 [n, d + 1]: rows of X, float [.., d], with a last column of ones.

    `rows` is a mask; default: all rows. `whiten` maps them first, to its own d.
    """
    n, width = len(X) if rows is None else int(rows.sum()), X.shape[1] if whiten is None else whiten.axes.shape[1]
    made = np.empty((n, width + 1), np.float32)
    made[:, -1] = 1
    if whiten is not None:
        whiten.fill(made[:, :-1], X, rows)
    else:
        for at, block in _blocks(X, rows):
            made[at, :-1] = block
    return made


def one_thread() -> threadpool_limits:
    """Limit BLAS and OpenMP to one thread in a with block; covers only libraries loaded before."""
    return threadpool_limits(1)


@contextmanager
def fitting() -> Iterator[Executor]:
    """Threads for fits, one per core, each on one BLAS thread; fits still waiting are dropped."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    with one_thread():
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


Job = tuple[np.ndarray | Sides, np.ndarray]  # rows and labels, see fit_all


def start_all(pool: Executor, jobs: Sequence[Job], train: np.ndarray, max_iter: int = MAX_ITER) -> list[Future[Fit]]:
    """As `fit_all`, without waiting; rows are copied before, so the caller need not keep any."""
    shared = {id(X): X for X, _ in jobs}
    sides = {at: X if isinstance(X, Sides) else Sides.of(X, train) for at, X in shared.items()}

    def start(rows: Sides, y: np.ndarray) -> Future[Fit]:
        return pool.submit(fit_with_ones, rows.training, y[train], rows.test, y[~train], max_iter)

    return [start(sides[id(X)], y) for X, y in jobs]


def fit_all(jobs: Sequence[Job], train: np.ndarray, max_iter: int = MAX_ITER) -> list[Fit]:
    """Fit a probe per job, in order, with one fit per core at a time.

    Args:
        jobs: whitened rows, divided by `train` or float [n, d], computed with as float32; and
            labels y, int64 [n]. Jobs may share their rows. Where long fits come first, cores end
            together.
        train: bool [n], training rows; the others are test rows. All rows of one tree must be on
            one side.
        max_iter: largest number of iterations.
    """
    with fitting() as pool:
        return [fitted.result() for fitted in start_all(pool, jobs, train, max_iter)]


def random_directions(d: int, k: int, seed: int) -> np.ndarray:
    """float32 [d, k]: orthogonal random directions, one per column; d columns if k is more."""
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.standard_normal((d, min(k, d))))[0].astype(np.float32)


def shuffle_within(train: np.ndarray, seed: int) -> np.ndarray:
    """intp [n]: an order that shuffles rows within each side of the split.

    No label can get lost in training.
    """
    rng = np.random.default_rng(seed)
    order = np.arange(len(train))
    for side in (train, ~train):
        order[side] = rng.permutation(order[side])
    return order


def control_labels(types: np.ndarray, y: np.ndarray, train: np.ndarray, seed: int) -> np.ndarray:
    """int64 [n]: the labels of Hewitt and Liang's control task (https://arxiv.org/abs/1909.03368).

    Each type of token gets one label, drawn from the distribution of training labels. The labels
    are meaningless: a probe can be right only if it tells types apart and memorises their labels.

    Args:
        types: int64 [n], the type of each row's token, see Asked.types.
        y: int64 [n], the labels whose distribution is used.
        train: bool [n], training rows.
        seed: seed of the draw.
    """
    drawn = np.random.default_rng(seed).choice(y[train], size=types.max() + 1)
    return np.asarray(drawn[types])
