"""Intervals of what a study counts: shares, differences of shares, and paired changes, at 95 %.

Rows of one tree are not independent of each other. Where a tree gives one row, the intervals are in closed form (Wilson's
and Newcombe's); where it gives several, they are bootstrapped over trees.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Z_95 = 1.959964  # of the normal distribution, two-sided
N_RESAMPLES = 1000  # of the bootstrap; 25 of them lie beyond each end of a 95 % interval
AT_ONCE = 100  # resamples: n_trees × 1,000 indices at once would be large


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: it stays within 0 and 1, and has a width even where all are right.

    Of nothing (n = 0) it is 0 to 1. https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval
    """
    if not n:
        return 0.0, 1.0
    share = n_right / n
    centre, half = share + Z_95**2 / (2 * n), Z_95 * np.sqrt(share * (1 - share) / n + (Z_95 / (2 * n)) ** 2)
    low, high = (centre - half) / (1 + Z_95**2 / n), (centre + half) / (1 + Z_95**2 / n)
    return float(max(0.0, low)), float(min(1.0, high))


def newcombe(n_right: int, n: int, other_right: int, n_other: int) -> tuple[float, float]:
    """Newcombe's 95 % interval of the difference of two independent shares, the first less the other (his method 10).

    https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I
    """
    if not (n and n_other):
        return -1.0, 1.0
    first, other = n_right / n, other_right / n_other
    (low, high), (other_low, other_high) = wilson(n_right, n), wilson(other_right, n_other)
    down = np.hypot(first - low, other_high - other)
    up = np.hypot(high - first, other - other_low)
    return float(first - other - down), float(first - other + up)


def paired(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """How much a share changes, after less before, when the same n trees are looked at twice.

    Args:
        before, after: bool [n], row i of both is of one tree.

    Returns:
        The change and its 95 % interval (Newcombe's for paired shares, his method 10), which has a width even where
        nothing changed. https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C
    """
    n = len(before)
    if not n:
        return 0.0, -1.0, 1.0
    both, lost = int((before & after).sum()), int((before & ~after).sum())
    won = int((~before & after).sum())
    neither = n - both - lost - won
    share_before, share_after = (both + lost) / n, (both + won) / n
    (low_b, high_b), (low_a, high_a) = wilson(both + lost, n), wilson(both + won, n)
    product = float(both + lost) * (won + neither) * (both + won) * (lost + neither)
    phi = 0.0
    if product:
        cross = float(both * neither - lost * won)
        phi = (max(cross - n / 2, 0.0) if cross > 0 else cross) / np.sqrt(product)  # Newcombe's continuity correction
    change = share_after - share_before
    down, down_b = share_after - low_a, high_b - share_before
    up, up_b = high_a - share_after, share_before - low_b
    low = change - np.sqrt(max(0.0, down**2 - 2 * phi * down * down_b + down_b**2))
    high = change + np.sqrt(max(0.0, up**2 - 2 * phi * up * up_b + up_b**2))
    return float(change), float(low), float(high)


def share_over_trees(right: np.ndarray, trees: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of a share of rows, over trees: rows of one tree come and go together.

    Where no tree errs it has no width, which says no more than that: n trees without one bound the share of trees that
    err by some 3/n.

    Args:
        right: bool (or any number) [n] rows; the mean is what the interval is of.
        trees: int [n], the tree of each row.
        seed: of the resamples; two calls over the same trees get the same ones, so they can be compared.

    Returns:
        Its ends, in the rows' unit.
    """
    _, tree = np.unique(trees, return_inverse=True)
    n_right, n_rows = np.bincount(tree, weights=right), np.bincount(tree)

    def share(counts: np.ndarray) -> np.ndarray:
        return np.asarray((counts @ n_right) / (counts @ n_rows))

    return bootstrap(share, len(n_rows), seed)


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], n_trees: int, seed: int) -> tuple[float, float]:
    """The 95 % percentile interval of any statistic of n_trees trees, each resampled as a whole.

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
    low, high = np.nanquantile(np.concatenate(found), (0.025, 0.975))
    return float(low), float(high)


def stratified_difference(
    values: np.ndarray, exposed: np.ndarray, strata: np.ndarray, trees: np.ndarray, seed: int
) -> tuple[float, float, float]:
    """How much larger values are where exposed than where not, within strata alike, and its 95 % interval over trees.

    Strata are weighed as Mantel and Haenszel do, n1 n0 / (n1 + n0), so one without both kinds says nothing.

    Args:
        values: bool or float [n] rows.
        exposed: bool [n].
        strata: int [n], what is held equal.
        trees: int [n], the tree of each row.
        seed: of the resamples.

    Returns:
        The difference and its interval; NaN where no stratum has both kinds.
    """
    _, tree = np.unique(trees, return_inverse=True)
    _, stratum = np.unique(strata, return_inverse=True)
    n_trees, n_cells = tree.max(initial=-1) + 1, 2 * (stratum.max(initial=-1) + 1)
    cell = tree * n_cells + 2 * stratum + exposed
    sums = np.bincount(cell, weights=values, minlength=n_trees * n_cells).reshape(n_trees, n_cells)
    rows = np.bincount(cell, minlength=n_trees * n_cells).reshape(n_trees, n_cells).astype(np.float64)

    def difference(counts: np.ndarray) -> np.ndarray:
        total, n = (counts @ sums).reshape(len(counts), -1, 2), (counts @ rows).reshape(len(counts), -1, 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            within = total[:, :, 1] / n[:, :, 1] - total[:, :, 0] / n[:, :, 0]
            weight = n.prod(axis=2) / n.sum(axis=2)
            return np.asarray(np.where(weight > 0, within * weight, 0).sum(axis=1) / np.nansum(weight, axis=1))

    if not (rows.sum(axis=0).reshape(-1, 2) > 0).all(axis=1).any():
        return float("nan"), float("nan"), float("nan")
    low, high = bootstrap(difference, n_trees, seed)
    return float(difference(np.ones((1, n_trees)))[0]), low, high


def total_variation(counts: np.ndarray, others: np.ndarray) -> float:
    """Half the sum of the differences of two distributions, each given as counts or shares [k]: 0 alike, 1 disjoint."""
    return float(np.abs(counts / max(counts.sum(), 1e-300) - others / max(others.sum(), 1e-300)).sum() / 2)
