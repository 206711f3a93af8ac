"""Multinomial logistic regression by Newton's method, with the curvature of a sample of rows.

A probe has a weight w_k and an intercept b_k for each of K classes. Of n rows x_i with classes y_i,
it minimises the objective of scikit-learn's LogisticRegression(C=C), divided by C n:

    f = mean_i (log sum_k exp(l_ik) - l_iy) + penalty / 2 * sum_k |w_k|²,    l_ik = w_k · x_i + b_k

The penalty is 1 / (C n), or 2 / (C n) for two classes, since scikit-learn then penalises the
difference of the two weights alone. With p_ik, the probability of class k at row i, the gradient is

    df/dw_k = mean_i (p_ik - [y_i = k]) x_i + penalty * w_k,    df/db_k = mean_i (p_ik - [y_i = k])

A fit starts at weights of 0 and the intercepts of the classes' shares. The second derivative of
whitened rows is known there. Its steps end a fit without a signal, and are taken as long as they
are small and f falls as they promise.

A fit with a signal begins with one row in four, until what is left is about what these rows
cannot tell: their objective is cheap, and they stay in the cache.

A fit that goes on asks all rows once per iteration, for f and df at w. Between two such passes it
minimises a model, f of a sample of rows with the gradient of all rows at w:

    model(u) = f_sample(u) + (df(w) - df_sample(w)) · u

Newton's method minimises the model, and conjugate gradients solve for its steps. A step to the
model's minimum is shortened until it lowers f of all rows. The sample has one row in eight, each
drawn as often as it curves f: in proportion to 1 - sum_k p_ik², with a floor, and weighed by the
inverse. The labels of the notebook's grid take 5 iterations in the median and 11 at most; by L-BFGS
they took 11 and 23.

Where a step lowers f by less than half of what its model promised, the sample has missed much of
the curvature. The last steps, and what each changed of df, then correct the step of the sample's
curvature, as in L-BFGS (https://doi.org/10.1007/BF01589116).

Conjugate gradients are preconditioned by the mean curvature of each class, a number on whitened
rows. Where a solution takes long, it is preconditioned by the inverse of each class's block of the
second derivative instead,

    block_k = mean_i p_ik (1 - p_ik) x_i x_iᵀ + penalty * identity
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

C = 1.0  # weight of the data against the L2 penalty, scikit-learn's default
TOL = 1e-4  # largest gradient of a converged fit, scikit-learn's default
GAP = 1e-5  # share of the objective that a converged fit leaves by its own estimate
AT_ONCE = 1 << 17  # numbers computed at once: they stay in the processor's cache
LEAST_COLUMNS = 32  # for which blocks of rows are made: more rows would not stay in the cache either
LARGEST = 40  # of a logit whose exponential float32 can divide by another's
ENOUGH, SHORTEST = 1e-4, 1e-6  # of a step: share of the promised fall that suffices; share of the step itself
NEAR = 0.1  # share of f that a step takes, and of the step that f misses, while the start's curvature holds
PART, PAYS = 4, 1.0  # one row in so many is in the part; promised share of f from which on the part pays
SAMPLED, SAMPLED_OF_PART = 8, 4  # one row in so many is sampled, of all and of the part
FEWEST = 2048  # rows of a sample or a part
FLOOR = 0.1  # share of the mean curvature with which a row is drawn at least
MODEL_STEPS, MODEL_FALL = 2, 0.04  # Newton steps in one model; share of the squared gradient that is small enough
SOLVED, SOLVED_AT_LAST = 0.3, 0.5  # share of a gradient that conjugate gradients leave; where only the gap is asked for
MOST_PRODUCTS = 100  # of one solution by conjugate gradients
MANY_PRODUCTS = 8  # after which blocks pay
KEPT = 0.5  # share of its promise that a model has to keep, or pairs are kept
MEMORY = 8  # pairs
ROWS_PER_WIDTH = 8  # sampled rows of a block, per coordinate
RIDGE = 0.02  # share of the mean curvature added to a block, since a sample misses directions


@dataclass(frozen=True)
class Objective:
    """The objective of a probe, see the module's docstring; K is 2 or more.

    Attributes:
        X: float32 [n, d + 1], rows with a last column of ones.
        y: intp [n], classes from 0 to K - 1, each of them at some row.
        n_classes: K.
    """

    X: np.ndarray
    y: np.ndarray
    n_classes: int

    @property
    def penalty(self) -> float:
        """Weight of half the squared weights."""
        return (2 if self.n_classes == 2 else 1) / (C * len(self.X))

    def start(self) -> tuple[np.ndarray, float, np.ndarray]:
        """Weights of 0 with intercepts of the classes' shares, and objective and gradient there.

        All rows have the same probabilities, so sums of each class's rows are enough.
        """
        n, step = len(self.X), max(1, AT_ONCE // max(self.n_classes, LEAST_COLUMNS))
        sums = np.zeros((self.n_classes, self.X.shape[1]))
        for first in range(0, n, step):
            y = self.y[first : first + step]
            of_class = np.zeros((len(y), self.n_classes), np.float32)
            of_class.reshape(-1)[_places(y, self.n_classes)] = 1
            sums += of_class.T @ self.X[first : first + step]
        share = sums[:, -1] / n
        w = np.zeros_like(sums)
        w[:, -1] = np.log(share) - np.log(share).mean()
        return w, -float((share * np.log(share)).sum()), (share[:, None] * sums.sum(axis=0) - sums) / n

    def __call__(self, w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Objective, gradient and curvature of each row at w, float64 [K, d + 1], intercepts last.

        The gradient has the shape of w. The curvature of a row, float32 [n], is 1 - sum_k p_ik²,
        the trace of its second derivative by its logits. Products are float32, sums over blocks of
        rows float64.
        """
        n, step = len(self.X), max(1, AT_ONCE // max(self.n_classes, LEAST_COLUMNS))
        loss, gradient, curvature = 0.0, np.zeros_like(w), np.empty(n, np.float32)
        near = np.empty((min(n, step), self.X.shape[1]), np.float32)
        for start in range(0, n, step):
            X, own = self.X[start : start + step], _places(self.y[start : start + step], self.n_classes)
            X = _copied(X, near)  # which loads rows into the cache faster than a product does
            p, losses = _probabilities(w, X, own)
            loss += float(losses.sum(dtype=np.float64))
            curvature[start : start + step] = 1 - (p * p) @ np.ones(self.n_classes, np.float32)
            p.reshape(-1)[own] -= 1
            gradient += p.T @ X
        value, slope = _penalty(self.penalty, w)
        return loss / n + value, gradient / n + slope, curvature.clip(min=0)


def _copied(X: np.ndarray, to: np.ndarray) -> np.ndarray:
    """The first rows of `to`, after X was copied there."""
    there = to[: len(X)]
    there[:] = X
    return there


def _places(y: np.ndarray, n_classes: int) -> np.ndarray:
    """intp [n]: where the class of each row lies in a flattened [n, K]."""
    return np.arange(0, len(y) * n_classes, n_classes) + y


def logits(w: np.ndarray, X: np.ndarray) -> np.ndarray:
    """float32 [n, K]: logits at w, [K, d + 1], of rows with a last column of ones."""
    return np.asarray(X @ w.astype(np.float32).T)


def _probabilities(w: np.ndarray, X: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, float32 [n, K], and the loss of each row, float32 [n]; own: see _places."""
    p = logits(w, X)
    large = max(p.max(), -p.min()) > LARGEST
    if large:
        p -= p.max(axis=1, keepdims=True)
        at = p.take(own)
    np.exp(p, out=p)
    total = p @ np.ones(p.shape[1], np.float32)  # five times as fast as a sum over so few columns
    p /= total[:, None]
    return p, np.log(total) - at if large else -np.log(p.take(own))


def _penalty(penalty: float, w: np.ndarray) -> tuple[float, np.ndarray]:
    """The penalty at w, and its gradient; intercepts have none."""
    slope = penalty * w
    slope[:, -1] = 0
    return float((slope * w).sum()) / 2, slope


@dataclass(frozen=True)
class Sample:
    """Rows that stand for all, see the module's docstring.

    Attributes:
        X: float32 [m, d + 1].
        own: intp [m], see _places.
        weight: float32 [m], of each row; the sum is about 1.
        penalty: see Objective.
        shift: float64 [K, d + 1], added to the gradient.
    """

    X: np.ndarray
    own: np.ndarray
    weight: np.ndarray
    penalty: float
    shift: np.ndarray

    @classmethod
    def of(cls, objective: Objective, curvature: np.ndarray, m: int, rng: np.random.Generator) -> Sample:
        """Draw m rows, one from each of m strata of equal curvature; the shift is 0."""
        n, n_classes, shift = len(objective.X), objective.n_classes, np.zeros((objective.n_classes, 1))
        if m >= n:
            weight = np.full(n, 1 / n, np.float32)
            return cls(objective.X, _places(objective.y, n_classes), weight, objective.penalty, shift)
        chance = curvature + (FLOOR * curvature.mean(dtype=np.float64) + np.finfo(np.float32).tiny)
        rows = _draw(chance, m, rng)
        weight = (chance.sum(dtype=np.float64) / (m * n * chance[rows])).astype(np.float32)
        return cls(objective.X[rows], _places(objective.y[rows], n_classes), weight, objective.penalty, shift)

    def at(self, w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The model, its gradient [K, d + 1], and probabilities, float32 [m, K], at w."""
        p, losses = _probabilities(w, self.X, self.own)
        residual = p.copy()
        residual.reshape(-1)[self.own] -= 1
        residual *= self.weight[:, None]
        value, slope = _penalty(self.penalty, w)
        value += float(losses.astype(np.float64) @ self.weight) + float((self.shift * w).sum())
        return value, residual.T @ self.X + slope + self.shift, p


@dataclass
class Curvature:
    """The second derivative of a sample's objective at one w.

    Attributes:
        sample: the rows.
        p: float32 [m, K], probabilities at w.
    """

    sample: Sample
    p: np.ndarray

    def __post_init__(self) -> None:
        self._weighted = self.p * self.sample.weight[:, None]
        self._own = self._weighted * (1 - self.p)
        self.of_class = self._own.sum(axis=0, dtype=np.float64)[:, None] + self.sample.penalty  # float64 [K, 1]

    def __matmul__(self, v: np.ndarray) -> np.ndarray:
        """float64 [K, d + 1]: the product with v, of the same shape."""
        moved = logits(v, self.sample.X)
        moved -= ((moved * self.p) @ np.ones(len(v), np.float32))[:, None]
        moved *= self._weighted
        return (moved.T @ self.sample.X) + _penalty(self.sample.penalty, v)[1]

    def inverse_blocks(self, rng: np.random.Generator) -> np.ndarray:
        """float32 [K, d + 1, d + 1]: the inverse of each class's block, from a sample of rows."""
        width = self.sample.X.shape[1]
        blocks = np.empty((len(self.of_class), width, width), np.float32)
        for block, chance in zip(blocks, np.ascontiguousarray(self._own.T), strict=True):
            X, total = self.sample.X[_draw(chance, ROWS_PER_WIDTH * width, rng)], chance.sum(dtype=np.float64)
            np.matmul(X.T, X, out=block)
            block *= np.float32(total / len(X))
            block.flat[:: width + 1] += np.float32(self.sample.penalty + RIDGE * total)
        return np.linalg.inv(blocks)


def _draw(chance: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """intp [n], ascending: places drawn in proportion to `chance`, one from each of n strata."""
    reached = np.cumsum(chance, dtype=np.float64)
    return np.searchsorted(reached, (np.arange(n) + rng.random(n)) / n * reached[-1]).clip(max=len(chance) - 1)


@dataclass
class Models:
    """The models of one fit, and what is kept from one to the next.

    Attributes:
        objective: of all rows, or of the part.
        sampled: one row in so many is sampled.
        blocks: float32 [K, d + 1, d + 1], the last inverse blocks; None before there are any.
        n_products: of the last solution by conjugate gradients.
        promised: fall of the objective by the last step, as its model has it; 0 without a model.
        pairs: the last steps, and what each changed of the gradient; none before a model promised
            too much.
        rng: of samples; every fit draws from one seed.
    """

    objective: Objective
    sampled: int = SAMPLED
    blocks: np.ndarray | None = None
    n_products: int = 0
    promised: float = 0.0
    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def step(
        self, w: np.ndarray, value: float, gradient: np.ndarray, curvature: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """A step from w to about the minimum of a new model, and the gap of w to f's minimum.

        The gap is estimated as half the product of the gradient and the model's first Newton step.
        There is no other step if w has converged. For the arguments see Objective.
        """
        m = max(FEWEST, len(self.objective.X) // self.sampled)
        sample = Sample.of(self.objective, curvature, m, self.rng)
        model, of_sample, p = sample.at(w)
        sample = replace(sample, shift=gradient - of_sample)
        model += float((sample.shift * w).sum())
        if self.pairs:
            step = self._corrected(Curvature(sample, p), gradient, GAP * value)
            self.promised = -float((gradient * step).sum()) / 2
            return step, self.promised
        u, at_w, slope, gap, least = w, model, gradient, 0.0, 0.0
        for n_steps in range(MODEL_STEPS):
            second = Curvature(sample, p)
            size = float((slope**2 / second.of_class).sum())
            if size <= least:
                break
            step = self._solve(second, slope, GAP * value)
            fall = -float((slope * step).sum())
            if n_steps == 0:
                gap, least = fall / 2, MODEL_FALL * size
                if converged(gap, value, gradient):
                    return step, gap
            scale = 1.0
            while (found := sample.at(u + scale * step))[0] > model - ENOUGH * scale * fall and scale > SHORTEST:
                scale /= 2
            u, (model, slope, p) = u + scale * step, found
        self.promised = at_w - model
        return u - w, gap

    def learn(self, moved: np.ndarray, turned: np.ndarray, fell: float) -> None:
        """Keep a step and what it changed of the gradient, once a model promised too much.

        Args:
            moved, turned: the step, and the gradient after it less that before, [K, d + 1].
            fell: the objective before the step, less that after it.
        """
        if (self.pairs or fell < KEPT * self.promised) and (moved * turned).sum() > 0:
            self.pairs = [*self.pairs, (moved, turned)][-MEMORY:]

    def _corrected(self, second: Curvature, gradient: np.ndarray, small: float) -> np.ndarray:
        """The Newton step of the sample, corrected by the pairs as L-BFGS does; see _solve."""
        left, shares = gradient, list[float]()
        for moved, turned in reversed(self.pairs):
            shares.append(float((moved * left).sum() / (moved * turned).sum()))
            left = left - shares[-1] * turned
        step = self._solve(second, left, small)
        for (moved, turned), share in zip(self.pairs, reversed(shares), strict=True):
            step = step - (share + float((turned * step).sum() / (moved * turned).sum())) * moved
        return step

    @property
    def error_of_part(self) -> float:
        """About what the minimum of the part of the rows misses of all rows' minimum."""
        n, width = self.objective.X.shape
        return PART * width * (self.objective.n_classes - 1) / (2 * n)

    def over_part(self, w: np.ndarray, step: np.ndarray, max_iter: int) -> np.ndarray:
        """About the minimum of the part of the rows, from w, where all rows promise a step.

        The part has one of each PART rows in turn. Its blocks are kept.
        """
        whole, n_part = self.objective, len(self.objective.X) // PART
        rows = PART * np.arange(n_part) + self.rng.integers(PART, size=n_part)
        part, enough = Objective(whole.X[rows], whole.y[rows], whole.n_classes), self.error_of_part
        self.objective, self.sampled = part, SAMPLED_OF_PART
        value, gradient, curvature = part(w)
        for _ in range(max_iter):
            found = _search(part, w, step - step.mean(axis=0), value, float((gradient * step).sum()))
            if found is None:
                break
            w, value, gradient, curvature = found
            step, gap = self.step(w, value, gradient, curvature)
            if gap <= min(enough, NEAR * value):
                w = w + step
                break
        self.objective, self.sampled, self.promised = whole, SAMPLED, 0.0
        return w

    def _solve(self, second: Curvature, gradient: np.ndarray, small: float) -> np.ndarray:
        """The Newton step, by conjugate gradients; `small` is the gap of a converged fit."""
        (_, width), (n, n_classes) = gradient.shape, (len(self.objective.X), self.objective.n_classes)
        if self.n_products >= MANY_PRODUCTS and width * max(width, n_classes) <= n:
            self.blocks = second.inverse_blocks(self.rng)

        def start(v: np.ndarray) -> np.ndarray:
            if self.blocks is None:
                v = v / second.of_class
            else:
                v = (self.blocks @ v[:, :, None].astype(np.float32))[:, :, 0].astype(np.float64)
            return v - v.mean(axis=0)  # what all classes share changes no probability

        step, left = np.zeros_like(gradient), -gradient
        ahead = along = start(left)
        size = first = float((left * ahead).sum())
        enough = (SOLVED_AT_LAST if size / 2 <= small else SOLVED) ** 2 * first
        for self.n_products in range(MOST_PRODUCTS):
            if size <= enough:
                break
            product = second @ along
            bend = float((along * product).sum())
            if bend <= 0:  # float32's rounding
                break
            step, left = step + size / bend * along, left - size / bend * product
            ahead = start(left)
            before, size = size, float((left * ahead).sum())
            along = ahead + size / before * along
        return step


def converged(gap: float, value: float, gradient: np.ndarray) -> bool:
    """Whether gradient and estimated gap are below their tolerances."""
    return gap <= GAP * value and bool(np.abs(gradient).max() <= TOL)


def minimise(objective: Objective, max_iter: int) -> tuple[np.ndarray, int, bool]:
    """Weights with intercepts, float64 [K, d + 1]; number of iterations; whether the fit converged.

    Iterations over the part of the rows are not counted. A fit also ends where float32 allows no
    further step; its gradient then tells whether it converged.
    """
    (n, width), (w, value, gradient) = objective.X.shape, objective.start()
    as_at_start, models = True, Models(objective)
    # of the start's second derivative; small classes are not fitted at once
    inverse = n / (np.bincount(objective.y) + width)[:, None]
    step = -inverse * gradient
    gap = -float((gradient * step).sum()) / 2
    if gap > PAYS * value and n >= PART * FEWEST:
        as_at_start, step = False, models.over_part(w, step, max_iter) - w
    for n_iter in range(max_iter + 1):
        if converged(gap, value, gradient):
            return w, n_iter, True
        step -= step.mean(axis=0)
        found = _search(objective, w, step, value, float((gradient * step).sum())) if n_iter < max_iter else None
        if found is None:
            break
        as_at_start = as_at_start and gap <= NEAR * value and abs(value - found[1] - gap) <= NEAR * gap
        models.learn(found[0] - w, found[2] - gradient, value - found[1])
        w, value, gradient, curvature = found
        if as_at_start:
            step = -inverse * gradient
            gap = -float((gradient * step).sum()) / 2
        else:
            step, gap = models.step(w, value, gradient, curvature)
    return w, n_iter, n_iter < max_iter and bool(np.abs(gradient).max() <= TOL)


def _search(
    objective: Objective, w: np.ndarray, step: np.ndarray, value: float, slope: float
) -> tuple[np.ndarray, float, np.ndarray, np.ndarray] | None:
    """The first of ever shorter steps that lowers the objective enough; None at float32's limit.

    Returns:
        Weights, and the objective's answers there.
    """
    scale = 1.0
    while scale > SHORTEST:
        there = w + scale * step
        found, gradient, curvature = objective(there)
        if found <= value + ENOUGH * scale * slope:
            return there, found, gradient, curvature
        bend = found - value - scale * slope
        scale *= min(0.5, max(0.1, -scale * slope / (2 * bend)))  # to the minimum of a parabola
    return None
