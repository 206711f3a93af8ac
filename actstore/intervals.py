"""95 % intervals and tests of what a study counts: shares, means, differences, many at once.

A share has Clopper and Pearson's exact interval. If a tree has several rows, the same interval is
taken over trees (`over_trees`). A difference joins the intervals of its two sides
(`square_and_add`). None of these intervals has width zero: if a side has no error, its end is what
no error among so many trees leaves open. Score intervals would be shorter, but cover less than they
say near 100 %: Wilson's of 1,758 trees, of which 0.01 % are wrong, covers 84 %. The bootstrap is
used only for statistics that are not means.

Tests are exact, or by random draws over trees: a sign flip of each tree's difference, or exposures
shuffled among similar trees. `holm` adjusts for many tests. An interval holds for its own
comparison only; a finding is a test that Holm leaves standing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Z_95 = 1.959964  # quantile of the normal distribution, two-sided
ENDS = (0.025, 0.975)  # quantiles, two-sided
N_RESAMPLES = 1000  # resamples of the bootstrap; 25 lie beyond each end of a 95 % interval
N_DRAWS = 9999  # draws per test: the smallest p is 1 in 10,000, which Holm over 500 tests leaves below 5 %
AT_ONCE = 100  # resamples: n_trees × 10,000 numbers at once would be large

Interval = tuple[float, float]


def share(n_right: int, n: int) -> Interval:
    """Clopper and Pearson's exact 95 % interval of a share; it covers at least 95 %, whatever n.

    If all of n are right, the lower end is 0.025^(1/n), about 1 - 3.7/n. For n = 0 the interval is
    0 to 1. https://doi.org/10.1093/biomet/26.4.404
    """
    low = _beta_quantile(ENDS[0], n_right, n - n_right + 1) if n_right else 0.0
    high = _beta_quantile(ENDS[1], n_right + 1, n - n_right) if n_right < n else 1.0
    return low, high


def share_over_trees(values: np.ndarray, trees: np.ndarray, seed: int = 0) -> Interval:
    """As `over_trees`; of changes as `change_over_trees`."""
    values = np.asarray(values, np.float64)
    if values.min(initial=0) >= 0:
        return over_trees(values, trees)
    return change_over_trees(values, trees, 1.0 if values.min() >= -1 and values.max() <= 1 else 2.0)


def over_trees(values: np.ndarray, trees: np.ndarray, weights: np.ndarray | None = None) -> Interval:
    """The 95 % interval of a mean of rows, over trees; rows of one tree may depend on each other.

    Clopper and Pearson's upper end is a quantile of the beta distribution with mean and variance of
    the sample plus one right row; the lower end, plus one wrong row. Here one tree is added, the
    heaviest, and the variance is over trees, as Fay and Feuer do for weighted sums of Poisson
    counts. With one row per tree, right or wrong, the interval is Clopper and Pearson's. If every
    row is right, the lower end is theirs for the number of trees.
    https://doi.org/10.1002/(SICI)1097-0258(19970415)16:7<791::AID-SIM500>3.0.CO;2-#

    Args:
        values: bool or float [n], 0 to 1.
        trees: int [n], the tree of each row.
        weights: float [n], weights of the rows in the mean, 0 or more; default: equal.

    Returns:
        The two ends; 0 and 1 if no row has a weight.
    """
    value, weight = _by_tree(values, trees, weights)
    if not weight.sum() > 0:
        return 0.0, 1.0
    mean = float(value.sum() / weight.sum())
    return min(mean, _end(value, weight, 0)), max(mean, _end(value, weight, 1))


def _by_tree(values: np.ndarray, trees: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Per tree, the sums of the weighted values and of the weights."""
    _, tree = np.unique(trees, return_inverse=True)
    weights = np.ones(len(tree)) if weights is None else weights
    return np.bincount(tree, weights=np.asarray(values, np.float64) * weights), np.bincount(tree, weights=weights)


def _end(value: np.ndarray, weight: np.ndarray, end: int) -> float:
    """The lower (0) or upper (1) end; the heaviest tree counts once more, wholly at that end."""
    value, weight = np.append(value, end * weight.max()), np.append(weight, weight.max())
    mean = value.sum() / weight.sum()
    variance = ((value - mean * weight) ** 2).sum() / weight.sum() ** 2
    if not variance > 0:  # all of them lie at that end
        return float(end)
    size = mean * (1 - mean) / variance
    return _beta_quantile(ENDS[end], size * mean, size * (1 - mean))


def _beta_quantile(quantile: float, a: float, b: float) -> float:
    from scipy.special import betaincinv  # imports three times faster than scipy.stats; imported only when needed

    return float(betaincinv(a, b, quantile))


def change_over_trees(changes: np.ndarray, trees: np.ndarray, most: float = 1.0) -> Interval:
    """The 95 % interval of a mean change of rows, over trees.

    Rises and falls each have an interval of `over_trees`, and the two are joined.

    Args:
        changes: float [n], -most to most.
        trees: int [n], the tree of each row.
        most: the largest possible change.
    """
    changes = np.asarray(changes, np.float64) / most
    up, down = np.clip(changes, 0, None), np.clip(-changes, 0, None)
    if not len(changes):
        return -most, most
    sides = [(float(part.mean()), *over_trees(part, trees)) for part in (up, down)]
    correlation = _correlation([(part - part.mean(), trees) for part in (up, down)])
    _, low, high = square_and_add(sides[0], sides[1], correlation)
    return most * low, most * high


def square_and_add(
    first: tuple[float, float, float], other: tuple[float, float, float], correlation: float = 0.0
) -> tuple[float, float, float]:
    """The first estimate minus the other, with the interval that follows from their intervals.

    The intervals are joined as Newcombe does; Zou and Donner say why.
    https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I,
    https://doi.org/10.1002/sim.3095

    Args:
        first, other: an estimate and its two ends.
        correlation: the correlation of the two estimates.

    Returns:
        The difference and its two ends.
    """
    (value, low, high), (other_value, other_low, other_high) = first, other

    def reach(end: float, other_end: float) -> float:
        return float(np.sqrt(max(0.0, end**2 + other_end**2 - 2 * correlation * end * other_end)))

    difference = value - other_value
    down, up = reach(value - low, other_high - other_value), reach(high - value, other_value - other_low)
    return float(difference), float(difference - down), float(difference + up)


def difference(n_right: int, n: int, other_right: int, n_other: int) -> tuple[float, float, float]:
    """A share minus a share of other trees, and its 95 % interval; NaN, -1 and 1 if a count is 0.

    Args:
        n_right: the count of the first share.
        n: out of how many.
        other_right: the count of the other share.
        n_other: out of how many.
    """
    if not (n and n_other):
        return float("nan"), -1.0, 1.0
    first, other = (n_right / n, *share(n_right, n)), (other_right / n_other, *share(other_right, n_other))
    return square_and_add(first, other)


def paired(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """The change of a share, after minus before, over the same n trees, and its 95 % interval.

    Args:
        before: bool [n], one row per tree.
        after: bool [n], the same trees.
    """
    changes = after.astype(np.float64) - before
    return float(changes.mean()) if len(changes) else 0.0, *change_over_trees(changes, np.arange(len(changes)))


def stratified_difference(
    values: np.ndarray, exposed: np.ndarray, strata: np.ndarray, trees: np.ndarray
) -> tuple[float, float, float]:
    """How much larger values are for exposed rows, within strata, and the 95 % interval over trees.

    Strata are weighted as Mantel and Haenszel do, n1 n0 / (n1 + n0), so a stratum with one kind
    only says nothing. Each kind then has a weighted mean with an interval over trees, and the two
    are joined.

    Args:
        values: bool or float [n] rows, 0 to 1.
        exposed: bool [n].
        strata: int [n], what is held equal.
        trees: int [n], the tree of each row.

    Returns:
        The difference and its interval; NaN if no stratum has both kinds.
    """
    sides, apart = [], []
    for kind, weights in zip((True, False), _weights(exposed, strata), strict=True):
        side, side_trees = np.asarray(values[exposed == kind], np.float64), trees[exposed == kind]
        if not weights.any():
            return float("nan"), float("nan"), float("nan")
        mean = float(np.average(side, weights=weights))
        sides.append((mean, *over_trees(side, side_trees, weights)))
        apart.append((weights * (side - mean), side_trees))
    return square_and_add(sides[0], sides[1], _correlation(apart))


def _weights(exposed: np.ndarray, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 weights of the exposed rows and of the others: n0 / (n1 + n0) and n1 / (n1 + n0).

    The counts are those of the row's stratum.
    """
    _, stratum = np.unique(strata, return_inverse=True)
    n, n_exposed = np.bincount(stratum), np.bincount(stratum, weights=exposed)
    return (1 - n_exposed / n)[stratum[exposed]], (n_exposed / n)[stratum[~exposed]]


def _correlation(sides: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """The correlation of two means that may share trees.

    It is at most n / (n + 1) for n trees: one more tree, in which the sides differ, would leave no
    more. Two sides that are equal in every tree would otherwise have a difference without a width.

    Args:
        sides: per mean, its rows, weighted and minus their mean, and the rows' trees.
    """
    first, other = sides
    _, tree = np.unique(np.concatenate([first[1], other[1]]), return_inverse=True)
    n_trees, rows_trees = tree.max() + 1, (tree[: len(first[1])], tree[len(first[1]) :])
    sums, others = (
        np.bincount(at, weights=rows, minlength=n_trees) for at, (rows, _) in zip(rows_trees, sides, strict=True)
    )
    size = np.sqrt((sums**2).sum() * (others**2).sum())
    return min(float((sums * others).sum() / size), n_trees / (n_trees + 1)) if size else 0.0


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], n_trees: int, seed: int) -> Interval:
    """The 95 % percentile interval of a statistic of n_trees trees, resampled as whole trees.

    The interval includes the statistic of the trees themselves. Both ends are NaN if all resamples
    agree, since such an interval says nothing.

    Args:
        statistic: takes counts, float64 [resamples, n_trees] (how often each tree was drawn);
            returns float64 [resamples]. NaNs (resamples for which the statistic is undefined) are
            left out.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(0, N_RESAMPLES, AT_ONCE):
        drawn = rng.integers(n_trees, size=(AT_ONCE, n_trees))
        by_resample = drawn + n_trees * np.arange(AT_ONCE)[:, None]
        counts = np.bincount(by_resample.ravel(), minlength=AT_ONCE * n_trees).reshape(AT_ONCE, n_trees)
        found.append(statistic(counts.astype(np.float64)))
    low, high = np.nanquantile(np.concatenate(found), ENDS)
    itself = float(statistic(np.ones((1, n_trees)))[0])
    low, high = float(np.fmin(low, itself)), float(np.fmax(high, itself))
    return (low, high) if low < high else (float("nan"), float("nan"))


def sign_flip(differences: np.ndarray, seed: int) -> float:
    """Two-sided p of a mean difference of 0, if each tree's difference could have the other sign.

    The test is right if a tree's two answers are exchangeable under the null hypothesis, however
    few trees carry the mean. It draws at random.

    Args:
        differences: float [n_trees].
    """
    carried = np.asarray(differences, np.float64)
    carried = carried[carried != 0]
    rng, observed, n_beyond = np.random.default_rng(seed), abs(carried.sum()), 0
    for start in range(0, N_DRAWS, AT_ONCE):
        n = min(AT_ONCE, N_DRAWS - start)
        signs = np.unpackbits(np.frombuffer(rng.bytes(n * -(-len(carried) // 8)), np.uint8).reshape(n, -1), axis=1)
        sums = 2.0 * (signs[:, : len(carried)] @ carried) - carried.sum()
        n_beyond += int((np.abs(sums) >= observed * (1 - 1e-9)).sum())
    return (1 + n_beyond) / (1 + N_DRAWS)


def shuffled_within(values: np.ndarray, exposed: np.ndarray, strata: np.ndarray, trees: np.ndarray, seed: int) -> float:
    """Two-sided p of a stratified difference of 0, if similar trees could exchange their exposures.

    Trees are similar if their rows lie in the same strata. The test is exact but for the random
    draws, however the rows of a tree depend on each other.

    Args:
        values, exposed, strata, trees: see `stratified_difference`.

    Returns:
        p; 1 if no two similar trees differ in exposure.
    """
    order = np.lexsort((strata, trees))
    values, exposed, strata, trees = (np.asarray(column)[order] for column in (values, exposed, strata, trees))
    _, stratum = np.unique(strata, return_inverse=True)
    n = np.bincount(stratum)
    centred = values.astype(np.float64) - (np.bincount(stratum, weights=values) / n)[stratum]
    rng, total, totals = np.random.default_rng(seed), 0.0, np.zeros(N_DRAWS)
    for rows in _alike(trees, stratum):
        group, at = centred[rows], exposed[rows].astype(np.float64)
        total += float((group * at).sum())
        patterns, which = np.unique(at, axis=0, return_inverse=True)
        if len(patterns) == 1:
            totals += float((group * at).sum())
            continue
        by_pattern, tree = group @ patterns.T, np.arange(len(group))
        for start in range(0, N_DRAWS, AT_ONCE):
            drawn = rng.permuted(np.tile(which.ravel(), (min(AT_ONCE, N_DRAWS - start), 1)), axis=1)
            totals[start : start + AT_ONCE] += by_pattern[tree, drawn].sum(axis=1)
    return (1 + int((np.abs(totals) >= abs(total) - 1e-9).sum())) / (1 + N_DRAWS)


def _alike(trees: np.ndarray, stratum: np.ndarray) -> list[np.ndarray]:
    """Rows, int [n_trees, rows per tree], of trees whose rows lie in the same strata.

    The rows must be sorted by tree and stratum.
    """
    starts = np.flatnonzero(np.diff(trees, prepend=trees[0] - 1)) if len(trees) else np.zeros(0, int)
    sizes, groups = np.diff(starts, append=len(trees)), []
    for size in np.unique(sizes):
        rows = starts[sizes == size][:, None] + np.arange(size)
        kinds, kind = np.unique(stratum[rows], axis=0, return_inverse=True)
        groups += [rows[kind.ravel() == number] for number in range(len(kinds))]
    return groups


def n_as_far(values: Sequence[float], which: int, rounding: float = 0.0) -> int:
    """How many of n values are as far from the median of all as a given value, itself included.

    Divided by n, the count is a two-sided p, if any of the values could as well have been the given
    one. This p is at least 1 / n.

    Args:
        which: index of the given value.
        rounding: distances that differ by no more than this are equal.
    """
    distances = np.abs(np.asarray(values, np.float64) - np.median(values))
    return int((distances >= distances[which] - rounding).sum())


def holm(p: Sequence[float]) -> list[float]:
    """Adjust each p for all of them, as Holm does.

    If all null hypotheses hold, fewer than 5 % of studies have an adjusted p below 5 %.
    https://www.jstor.org/stable/4615733
    """
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def total_variation(counts: np.ndarray, others: np.ndarray) -> float:
    """Half the summed difference of two distributions: 0 equal, 1 disjoint.

    Args:
        counts, others: counts or shares [k].
    """
    return float(np.abs(counts / max(counts.sum(), 1e-300) - others / max(others.sum(), 1e-300)).sum() / 2)
