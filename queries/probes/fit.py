"""A linear probe, multinomial logistic regression on whitened rows, and the data of its controls.

A probe has a weight w_k and an intercept b_k for each of K classes. Of n rows x_i with classes y_i,
it minimises the objective of scikit-learn's LogisticRegression(C=C), divided by C n:

    f = mean_i (log sum_k exp(l_ik) - l_iy) + penalty / 2 * sum_k |w_k|²,    l_ik = w_k · x_i + b_k

The penalty is 1 / (C n), or 2 / (C n) for two classes, since scikit-learn then penalises the
difference of the two weights alone. With p_ik, the probability of class k at row i, the gradient is

    df/dw_k = mean_i (p_ik - [y_i = k]) x_i + penalty * w_k,    df/db_k = mean_i (p_ik - [y_i = k])

L-BFGS starts at 0 and corrects an approximate inverse of the second derivative. Whitened rows make
K times the identity exact there, and end a fit without a signal after three iterations. A fit that
goes on takes the inverse of each class's block of the second derivative instead,

    block_k = mean_i p_ik (1 - p_ik) x_i x_iᵀ + penalty * identity

The blocks are estimated from a sample of rows, and again each time the number of iterations has
doubled. With blocks, a control task takes about 20 iterations instead of 100.

Every fit runs on one BLAS thread, with several fits in parallel. The numbers therefore do not
depend on the number of cores, and BLAS threads do not wait for each other on a busy machine.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

C = 1.0  # weight of the data against the L2 penalty, scikit-learn's default
TOL = 1e-4  # largest gradient of a converged fit, scikit-learn's default
GAP = 1e-6  # share of the objective that a converged fit leaves by its own estimate
MAX_ITER = 300  # a fit takes about 10 iterations
MEMORY = 10  # steps that L-BFGS remembers, as in scikit-learn
ENOUGH, SHORTEST = 1e-4, 1e-6  # of a step: share of the promised fall that suffices; share of the step itself
FIRST_BLOCKS = 8  # iterations after which blocks pay; a power of two
MOST_BLOCKS = 4  # squared width per row: blocks of wider rows cost more than the iterations that they save
ROWS_PER_WIDTH = 8  # sampled rows of a block, per coordinate
RIDGE = 0.02  # share of the mean curvature added to a block, since a sample misses directions
AT_ONCE = 1 << 17  # numbers computed at once: they stay in the processor's cache
SMALLEST_VARIANCE = 1e-7  # share of the largest; less is float32's rounding, which whitening would amplify
ROUNDING = 1e-6  # share of the largest number; float32's error in a mean of equal rows


@dataclass(frozen=True)
class Fit:
    """One fitted probe, scored.

    Attributes:
        right: bool [n_test], test rows that the probe gets right.
        n_iter: iterations of L-BFGS.
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
    def of(cls, X: np.ndarray) -> Whitening:
        """Fit the map to float32 [n, d_model]; d is smaller if rows span fewer dimensions.

        The axes are the principal components, in falling order of variance; the largest entry of
        each is positive. Equal rows (a separator's embedding) have one coordinate, which is 0.
        """
        mean = X.mean(axis=0, dtype=np.float64).astype(np.float32)
        centred = X - mean
        if max(centred.max(), -centred.min()) <= ROUNDING * max(X.max(), -X.min()):
            return cls(mean, np.zeros((X.shape[1], 1), np.float32))
        with one_thread():
            variance, axes = np.linalg.eigh(centred.T @ centred / np.float32(max(len(X) - 1, 1)))
        variance, axes = variance[::-1], axes[:, ::-1]
        kept = variance > SMALLEST_VARIANCE * variance[0]
        variance, axes = variance[kept], axes[:, kept]
        largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
        return cls(mean, axes * np.sign(largest) / np.sqrt(variance))

    def __call__(self, X: np.ndarray) -> np.ndarray:
        """float32 [n, d]: the coordinates of rows, float32 [n, d_model]."""
        whitened = np.empty((len(X), self.axes.shape[1]), np.float32)
        step = max(1, AT_ONCE // X.shape[1])
        with one_thread():
            for start in range(0, len(X), step):
                np.matmul(X[start : start + step] - self.mean, self.axes, out=whitened[start : start + step])
        return whitened


@dataclass(frozen=True)
class Objective:
    """The objective of a probe, see the module's docstring; K is 2 or more.

    Attributes:
        X: float32 [n, d].
        y: intp [n], classes from 0 to K - 1.
        n_classes: K.
    """

    X: np.ndarray
    y: np.ndarray
    n_classes: int

    @property
    def penalty(self) -> float:
        """Weight of half the squared weights."""
        return (2 if self.n_classes == 2 else 1) / (C * len(self.X))

    def __call__(self, w: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective and its gradient at w, both float64 [K, d + 1] with intercepts last.

        Products are float32, sums over blocks of rows float64.
        """
        n, step = len(self.X), max(1, AT_ONCE // self.n_classes)
        loss, gradient = 0.0, np.zeros_like(w)
        for start in range(0, n, step):
            X, y = self.X[start : start + step], self.y[start : start + step]
            rows = np.arange(len(y))
            p = _logits(w, X)
            own = p[y, rows]
            total = _normalise(p)
            loss += float((np.log(total) - own).sum(dtype=np.float64))
            p[y, rows] -= 1
            gradient[:, :-1] += p @ X
            gradient[:, -1] += p.sum(axis=1, dtype=np.float64)
        gradient /= n
        gradient[:, :-1] += self.penalty * w[:, :-1]
        return loss / n + self.penalty / 2 * float((w[:, :-1] ** 2).sum()), gradient

    def inverse_blocks(self, w: np.ndarray) -> np.ndarray:
        """float64 [K, d + 1, d + 1]: the inverse of each class's block of the second derivative.

        A block is estimated from rows drawn as often as they curve the objective, in proportion to
        p (1 - p), one from each of as many strata. The draw is the same in every call.
        """
        n, d = self.X.shape
        p = _logits(w, self.X)
        _normalise(p)
        n_drawn = ROWS_PER_WIDTH * (d + 1)
        drawn = (np.arange(n_drawn) + np.random.default_rng(0).random(n_drawn)) / n_drawn
        X = np.ones((n_drawn, d + 1), np.float32)
        blocks = np.empty((self.n_classes, d + 1, d + 1))
        for block, of_class in zip(blocks, p, strict=True):
            curvature = np.cumsum(of_class * (1 - of_class), dtype=np.float64)
            row = np.searchsorted(curvature, drawn * curvature[-1]).clip(max=n - 1)
            X[:, :-1] = self.X[row]
            block[:] = X.T @ X * (curvature[-1] / (n_drawn * n))
            block.flat[:: d + 2] += self.penalty + RIDGE * curvature[-1] / n
        return np.linalg.inv(blocks)


def _logits(w: np.ndarray, X: np.ndarray) -> np.ndarray:
    """float32 [K, n]: logits less the largest of each row of X."""
    logits = w[:, :-1].astype(np.float32) @ X.T
    logits += w[:, -1:].astype(np.float32)
    logits -= logits.max(axis=0)
    return logits


def _normalise(logits: np.ndarray) -> np.ndarray:
    """Turn logits into probabilities, in place; return the sums of exponentials, float32 [n]."""
    total = np.exp(logits, out=logits).sum(axis=0)
    logits /= total
    return total


Pair = tuple[np.ndarray, np.ndarray]  # a step of L-BFGS and the change of the gradient along it


def minimise(objective: Objective, max_iter: int) -> tuple[np.ndarray, int, bool]:
    """L-BFGS from 0: weights with intercepts, float64 [K, d + 1]; iterations; whether it converged.

    The gap to the minimum is estimated as half the product of gradient and step. A fit also ends
    where float32 allows no further step; its gradient then tells whether it converged.
    """
    (n, d), n_classes = objective.X.shape, objective.n_classes
    w = np.zeros((n_classes, d + 1))
    value, gradient = objective(w)
    pairs: deque[Pair] = deque(maxlen=MEMORY)
    inverse = n_classes * np.ones((n_classes, 1, 1))
    for n_iter in range(max_iter + 1):
        if n_iter >= FIRST_BLOCKS and n_iter & (n_iter - 1) == 0 and d * d <= MOST_BLOCKS * n:
            inverse = objective.inverse_blocks(w)
        step = _step(gradient, pairs, inverse)
        slope = float((gradient * step).sum())
        small = bool(np.abs(gradient).max() <= TOL)
        if small and -slope / 2 <= GAP * value:
            return w, n_iter, True
        found = _search(objective, w, step, value, slope) if n_iter < max_iter else None
        if found is None:
            break
        pairs.append((found[0] - w, found[2] - gradient))
        w, value, gradient = found
    return w, n_iter, small and n_iter < max_iter


def _step(gradient: np.ndarray, pairs: Sequence[Pair], inverse: np.ndarray) -> np.ndarray:
    """The step of L-BFGS, float64 [K, d + 1]; `inverse` is a block or a number per class.

    https://doi.org/10.1007/BF01589116
    """

    def start(v: np.ndarray) -> np.ndarray:
        v = (inverse @ v[:, :, None])[:, :, 0] if inverse.shape[1] > 1 else inverse[:, 0] * v
        return v - v.mean(axis=0)  # what all classes share changes no probability

    left, shares = gradient, []
    for moved, change in reversed(pairs):
        shares.append((moved * left).sum() / (moved * change).sum())
        left = left - shares[-1] * change
    step = start(left)
    if pairs:
        moved, change = pairs[-1]
        step *= (moved * change).sum() / (change * start(change)).sum()
    for (moved, change), share in zip(pairs, reversed(shares), strict=True):
        step += moved * (share - (change * step).sum() / (moved * change).sum())
    return -step


def _search(
    objective: Objective, w: np.ndarray, step: np.ndarray, value: float, slope: float
) -> tuple[np.ndarray, float, np.ndarray] | None:
    """The first of ever shorter steps that lowers the objective enough; None at float32's limit.

    Returns:
        Weights, objective and gradient there.
    """
    scale = 1.0
    while scale > SHORTEST:
        there = w + scale * step
        found, gradient = objective(there)
        if found <= value + ENOUGH * scale * slope:
            return there, found, gradient
        bend = found - value - scale * slope
        scale *= min(0.5, max(0.1, -scale * slope / (2 * bend)))  # to the minimum of a parabola
    return None


def fit(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray, max_iter: int = MAX_ITER) -> Fit:
    """Fit a probe to training rows and score it on test rows.

    Args:
        X, X_test: float32 [n, d] and [n_test, d], whitened.
        y, y_test: int64 [n] and [n_test], labels.
        max_iter: largest number of iterations of L-BFGS.
    """
    classes, y = np.unique(y, return_inverse=True)
    if len(classes) == 1:
        return Fit(y_test == classes[0], 0, True, np.zeros((1, X.shape[1]), np.float32), np.zeros(1, np.float32))
    w, n_iter, converged = minimise(Objective(X, y, len(classes)), max_iter)
    right = classes[_logits(w, X_test).argmax(axis=0)] == y_test
    w = w.astype(np.float32)
    return Fit(right, n_iter, converged, w[:, :-1], w[:, -1])


def one_thread() -> threadpool_limits:
    """Limit BLAS and OpenMP to one thread in a with block; covers only libraries loaded before."""
    return threadpool_limits(1)


def fit_all(jobs: Sequence[tuple[np.ndarray, np.ndarray]], train: np.ndarray, max_iter: int = MAX_ITER) -> list[Fit]:
    """Fit a probe per job, in order, with one fit per core at a time.

    Args:
        jobs: rows X, float [n, d], whitened, computed with as float32; and labels y, int64 [n].
            Jobs may share one X. Where long fits come first, cores end together.
        train: bool [n], training rows; the others are test rows. All rows of one tree must be on
            one side.
        max_iter: largest number of iterations of L-BFGS.
    """
    shared = {id(X): X for X, _ in jobs}
    sides = {at: [np.asarray(X[side], np.float32) for side in (train, ~train)] for at, X in shared.items()}

    def fitted(job: tuple[np.ndarray, np.ndarray]) -> Fit:
        (X, X_test), y = sides[id(job[0])], job[1]
        return fit(X, y[train], X_test, y[~train], max_iter)

    with one_thread(), ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        return list(pool.map(fitted, jobs))


def random_directions(X: np.ndarray, k: int, seed: int) -> np.ndarray:
    """float32 [n, k]: rows projected on k orthogonal random directions, or on d if d is less."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((X.shape[1], min(k, X.shape[1])))
    return X @ np.linalg.qr(directions)[0].astype(np.float32)


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
