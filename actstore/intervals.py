"""Intervals at 95 % and tests, of what a study counts: shares, means, differences, and many of them at once.

One rule for all of them. A share has Clopper and Pearson's exact interval; rows that come several to a tree have the same
over trees (`over_trees`); a difference joins the intervals of its two sides (`square_and_add`). None of these can be
without a width: where a side has no error, its end is what no error among so many trees leaves open. Score intervals
would be shorter, but cover less than they say near 100 %: Wilson's of 1,758 trees, of which 0.01 % are wrong, covers 84 %.
The bootstrap is left to what is no mean.

Tests are exact or by chance draws over trees: a sign flip of each tree's difference, or the trees' exposures shuffled
among trees alike. `holm` adjusts for many of them. An interval is for its own comparison alone; what is found, a test
that Holm leaves standing says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Z_95 = 1.959964  # of the normal distribution, two-sided
ENDS = (0.025, 0.975)  # quantiles, two-sided
N_RESAMPLES = 1000  # of the bootstrap; 25 of them lie beyond each end of a 95 % interval
N_DRAWS = 9999  # of a test by chance draws: the smallest p is 1 in 10,000, which Holm over 500 tests leaves below 5 %
AT_ONCE = 100  # resamples: n_trees × 10,000 numbers at once would be large

Interval = tuple[float, float]


def share(n_right: int, n: int) -> Interval:
    """Clopper and Pearson's exact 95 % interval of a share: it covers 95 % or more, whatever the share and n.

    Where all of n are right its lower end is 0.025^(1/n), about 1 - 3.7/n. Of nothing (n = 0) it is 0 to 1.
    https://doi.org/10.1093/biomet/26.4.404
    """
    low = _beta_quantile(ENDS[0], n_right, n - n_right + 1) if n_right else 0.0
    high = _beta_quantile(ENDS[1], n_right + 1, n - n_right) if n_right < n else 1.0
    return low, high


def wilson(n_right: int, n: int) -> Interval:
    """Wilson's 95 % interval of a share: shorter than the exact one, and near 100 % it covers less than it says.

    Of nothing (n = 0) it is 0 to 1. https://doi.org/10.1080/01621459.1927.10502953
    """
    if not n:
        return 0.0, 1.0
    proportion = n_right / n
    centre, half = (
        proportion + Z_95**2 / (2 * n),
        Z_95 * np.sqrt(proportion * (1 - proportion) / n + (Z_95 / (2 * n)) ** 2),
    )
    low, high = (centre - half) / (1 + Z_95**2 / n), (centre + half) / (1 + Z_95**2 / n)
    return float(max(0.0, low)), float(min(1.0, high))


def share_over_trees(values: np.ndarray, trees: np.ndarray, seed: int = 0) -> Interval:
    """As `over_trees`; of changes as `change_over_trees`."""
    values = np.asarray(values, np.float64)
    if values.min(initial=0) >= 0:
        return over_trees(values, trees)
    return change_over_trees(values, trees, 1.0 if values.min() >= -1 and values.max() <= 1 else 2.0)


def over_trees(values: np.ndarray, trees: np.ndarray, weights: np.ndarray | None = None) -> Interval:
    """The 95 % interval of a mean of rows, over trees: rows of one tree may hang together in any way.

    Clopper and Pearson's upper end is a quantile of the beta distribution whose mean and variance are those of the
    sample with one row more, a right one; their lower end, with a wrong one. Here it is one tree more, the heaviest, with
    the variance over trees, as Fay and Feuer do it for weighted sums of Poisson counts. So one row a tree, right or wrong, has
    Clopper and Pearson's interval, and where every row is right the lower end is theirs for so many trees.
    https://doi.org/10.1002/(SICI)1097-0258(19970415)16:7<791::AID-SIM500>3.0.CO;2-#

    Args:
        values: bool or float [n], 0 to 1.
        trees: int [n], the tree of each row.
        weights: float [n] of the rows in the mean, not below 0; all alike by default.

    Returns:
        Its ends; 0 and 1 where no row has a weight.
    """
    value, weight = _by_tree(values, trees, weights)
    if not weight.sum() > 0:
        return 0.0, 1.0
    mean = float(value.sum() / weight.sum())
    return min(mean, _end(value, weight, 0)), max(mean, _end(value, weight, 1))


def _by_tree(values: np.ndarray, trees: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums of each tree, of the weighted values and of the weights."""
    _, tree = np.unique(trees, return_inverse=True)
    weights = np.ones(len(tree)) if weights is None else weights
    return np.bincount(tree, weights=np.asarray(values, np.float64) * weights), np.bincount(tree, weights=weights)


def _end(value: np.ndarray, weight: np.ndarray, end: int) -> float:
    """The lower (0) or upper (1) end, with the heaviest tree once more, all of it at that end."""
    value, weight = np.append(value, end * weight.max()), np.append(weight, weight.max())
    mean = value.sum() / weight.sum()
    variance = ((value - mean * weight) ** 2).sum() / weight.sum() ** 2
    if not variance > 0:  # all of them lie at that end
        return float(end)
    size = mean * (1 - mean) / variance
    return _beta_quantile(ENDS[end], size * mean, size * (1 - mean))


def _beta_quantile(quantile: float, a: float, b: float) -> float:
    from scipy.special import (
        betaincinv,  # a third of what scipy.stats takes to import, and that only where it is needed
    )

    return float(betaincinv(a, b, quantile))


def change_over_trees(changes: np.ndarray, trees: np.ndarray, most: float = 1.0) -> Interval:
    """The 95 % interval of a mean change of rows, over trees: what rose and what fell, each as in `over_trees`, joined.

    Args:
        changes: float [n], -most to most.
        trees: int [n], the tree of each row.
        most: the largest change that could be.
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
    """The first less the other, with the interval that their intervals make, as Newcombe joins them and Zou and Donner say why.

    https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I, https://doi.org/10.1002/sim.3095

    Args:
        first, other: an estimate and its ends.
        correlation: of the two estimates.

    Returns:
        The difference and its ends.
    """
    (value, low, high), (other_value, other_low, other_high) = first, other

    def reach(one: float, two: float) -> float:
        return float(np.sqrt(max(0.0, one**2 + two**2 - 2 * correlation * one * two)))

    difference = value - other_value
    down, up = reach(value - low, other_high - other_value), reach(high - value, other_value - other_low)
    return float(difference), float(difference - down), float(difference + up)


def difference(n_right: int, n: int, other_right: int, n_other: int) -> tuple[float, float, float]:
    """How much larger a share is than another of other trees, and the 95 % interval; NaN, -1 and 1 of nothing."""
    if not (n and n_other):
        return float("nan"), -1.0, 1.0
    first, other = (n_right / n, *share(n_right, n)), (other_right / n_other, *share(other_right, n_other))
    return square_and_add(first, other)


def paired(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """How much a share changes, after less before, when the same n trees are looked at twice, and its 95 % interval.

    Args:
        before, after: bool [n], row i of both is of one tree.
    """
    changes = after.astype(np.float64) - before
    return float(changes.mean()) if len(changes) else 0.0, *change_over_trees(changes, np.arange(len(changes)))


def stratified_difference(
    values: np.ndarray, exposed: np.ndarray, strata: np.ndarray, trees: np.ndarray
) -> tuple[float, float, float]:
    """How much larger values are where exposed than where not, within strata alike, and its 95 % interval over trees.

    Strata are weighed as Mantel and Haenszel do, n1 n0 / (n1 + n0), so one without both kinds says nothing. Each kind is then
    a weighted mean with an interval over trees, and the two are joined.

    Args:
        values: bool or float [n] rows, 0 to 1.
        exposed: bool [n].
        strata: int [n], what is held equal.
        trees: int [n], the tree of each row.

    Returns:
        The difference and its interval; NaN where no stratum has both kinds.
    """
    sides, apart = [], []
    for kind, weights in zip((True, False), _weights(exposed, strata), strict=True):
        some, of = np.asarray(values[exposed == kind], np.float64), trees[exposed == kind]
        if not weights.any():
            return float("nan"), float("nan"), float("nan")
        mean = float(np.average(some, weights=weights))
        sides.append((mean, *over_trees(some, of, weights)))
        apart.append((weights * (some - mean), of))
    return square_and_add(sides[0], sides[1], _correlation(apart))


def _weights(exposed: np.ndarray, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64, of the exposed rows and of the others: n0 / (n1 + n0) and n1 / (n1 + n0) of their stratum."""
    _, stratum = np.unique(strata, return_inverse=True)
    n, n_exposed = np.bincount(stratum), np.bincount(stratum, weights=exposed)
    return (1 - n_exposed / n)[stratum[exposed]], (n_exposed / n)[stratum[~exposed]]


def _correlation(sides: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Of two means that the same trees may carry; of each side its rows, weighted and less their mean, and their trees."""
    first, other = sides
    _, tree = np.unique(np.concatenate([first[1], other[1]]), return_inverse=True)
    n_trees, of = tree.max() + 1, (tree[: len(first[1])], tree[len(first[1]) :])
    one, two = (np.bincount(at, weights=rows, minlength=n_trees) for at, (rows, _) in zip(of, sides, strict=True))
    size = np.sqrt((one**2).sum() * (two**2).sum())
    return float((one * two).sum() / size) if size else 0.0


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], n_trees: int, seed: int) -> Interval:
    """The 95 % percentile interval of any statistic of n_trees trees that is no mean, each resampled as a whole.

    It holds the statistic of the trees themselves. NaN at both ends where all resamples give the same, which says nothing.

    Args:
        statistic: takes counts, float64 [resamples, n_trees] (how often each tree was drawn), and gives float64 [resamples].
            NaNs among them (a resample the statistic is not defined for) are left out.
        seed: of the resamples.
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
    """The p of a mean difference of 0, two-sided, when each tree's difference could as well have had the other sign.

    Right where a tree's two answers could be exchanged if nothing mattered, however few trees carry the mean. By chance draws.

    Args:
        differences: float [n_trees].
        seed: of the draws.
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
    """The p of a stratified difference of 0, two-sided, when trees alike could as well have had each other's exposures.

    Trees are alike whose rows lie in the same strata. Exact but for the chance draws, however the rows of a tree hang together.

    Args:
        values, exposed, strata, trees: as of `stratified_difference`.
        seed: of the draws.

    Returns:
        1 where no two trees alike have other exposures.
    """
    order = np.lexsort((strata, trees))
    values, exposed, strata, trees = (np.asarray(of)[order] for of in (values, exposed, strata, trees))
    _, stratum = np.unique(strata, return_inverse=True)
    n = np.bincount(stratum)
    centred = values.astype(np.float64) - (np.bincount(stratum, weights=values) / n)[stratum]
    rng, total, totals = np.random.default_rng(seed), 0.0, np.zeros(N_DRAWS)
    for rows in _alike(trees, stratum):
        some, at = centred[rows], exposed[rows].astype(np.float64)
        total += float((some * at).sum())
        patterns, which = np.unique(at, axis=0, return_inverse=True)
        if len(patterns) == 1:
            totals += float((some * at).sum())
            continue
        by_pattern, tree = some @ patterns.T, np.arange(len(some))
        for start in range(0, N_DRAWS, AT_ONCE):
            drawn = rng.permuted(np.tile(which.ravel(), (min(AT_ONCE, N_DRAWS - start), 1)), axis=1)
            totals[start : start + AT_ONCE] += by_pattern[tree, drawn].sum(axis=1)
    return (1 + int((np.abs(totals) >= abs(total) - 1e-9).sum())) / (1 + N_DRAWS)


def _alike(trees: np.ndarray, stratum: np.ndarray) -> list[np.ndarray]:
    """Rows, int [n_trees, rows of each], of the trees whose rows lie in the same strata; rows are sorted by tree and stratum."""
    starts = np.flatnonzero(np.diff(trees, prepend=trees[0] - 1)) if len(trees) else np.zeros(0, int)
    sizes, groups = np.diff(starts, append=len(trees)), []
    for size in np.unique(sizes):
        rows = starts[sizes == size][:, None] + np.arange(size)
        kinds, kind = np.unique(stratum[rows], axis=0, return_inverse=True)
        groups += [rows[kind.ravel() == one] for one in range(len(kinds))]
    return groups


def n_as_far(values: Sequence[float], which: int, rounding: float = 0.0) -> int:
    """How many of n values lie as far from the median of all as one of them, itself counted.

    Over n it is a p, two-sided, where any of the values could as well have been that one; no less than 1 / n.

    Args:
        values: n of them.
        which: place of the one.
        rounding: what distances are equal within.
    """
    distances = np.abs(np.asarray(values, np.float64) - np.median(values))
    return int((distances >= distances[which] - rounding).sum())


def holm(p: Sequence[float]) -> list[float]:
    """Each p adjusted for all of them, as Holm does: one below 5 % is so in less than 5 % of studies where nothing is.

    https://www.jstor.org/stable/4615733
    """
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(one) for one in adjusted]


def total_variation(counts: np.ndarray, others: np.ndarray) -> float:
    """Half the sum of the differences of two distributions, each given as counts or shares [k]: 0 alike, 1 disjoint."""
    return float(np.abs(counts / max(counts.sum(), 1e-300) - others / max(others.sum(), 1e-300)).sum() / 2)
