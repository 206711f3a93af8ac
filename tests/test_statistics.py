"""Intervals of shares, differences and paired changes, against published examples, scipy and repeated draws."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from actstore.statistics import (
    newcombe,
    paired,
    share_over_trees,
    stratified_difference,
    total_variation,
    wilson,
)


@pytest.mark.parametrize(("n_right", "n"), [(0, 5), (5, 5), (1, 3), (19_981, 20_000), (7, 1000)])
def test_the_interval_is_wilsons(n_right, n):
    expected = binomtest(n_right, n).proportion_ci(0.95, method="wilson")
    assert wilson(n_right, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_interval_resamples_trees_and_not_rows():
    """100 trees, each all right or all wrong: 100 coins and not 1,500, whose resampled sum is binomial."""
    right = (np.arange(100) % 2 == 0).repeat(15)
    low, high = share_over_trees(right, np.arange(100).repeat(15), seed=0)
    assert (low, high) == pytest.approx(binom.ppf([0.025, 0.975], 100, 0.5) / 100, abs=0.015)
    low, high = share_over_trees(right, np.arange(1500), seed=0)
    assert (low, high) == pytest.approx(binom.ppf([0.025, 0.975], 1500, 0.5) / 1500, abs=0.004)


def test_the_interval_weighs_trees_by_their_rows_wherever_they_stand():
    """One tree of 30 rows, all right, and one of 10, all wrong, in any order: a resample is 0, 3/4 or 1."""
    rng = np.random.default_rng(0)
    tree = rng.permutation(np.repeat([7, 3], [30, 10]))
    assert share_over_trees(tree == 7, tree, seed=0) == (0.0, 1.0)
    mixed = np.concatenate([tree, np.full(40, 9)])  # a third tree, half right: no resample of one tree is special
    share = np.concatenate([tree == 7, np.arange(40) % 2 == 0])
    low, high = share_over_trees(share, mixed, seed=0)
    assert low == 0.0
    assert high == 1.0


def test_the_interval_of_a_difference_is_newcombes_published_one():
    assert newcombe(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)  # his table II, row a, method 10


def test_nothing_counted_leaves_everything_open():
    assert wilson(0, 0) == (0.0, 1.0)
    assert newcombe(0, 0, 3, 4) == (-1.0, 1.0)


def test_a_paired_interval_covers_the_true_change_as_often_as_it_says():
    rng, covered, change = np.random.default_rng(0), 0, 0.9 * 0.1 - 0.1 * 0.3
    for _ in range(2000):
        before = rng.random(150) < 0.1
        after = np.where(before, rng.random(150) >= 0.3, rng.random(150) < 0.1)
        _, low, high = paired(before, after)
        covered += low <= change <= high
    assert 0.93 < covered / 2000 < 0.98


def test_pairs_that_all_stay_right_give_no_change_and_a_width():
    change, low, high = paired(np.ones(400, bool), np.ones(400, bool))
    assert change == 0
    assert -0.02 < low < 0 < high < 0.02


def test_a_paired_interval_is_narrower_than_one_of_independent_trees():
    before = np.arange(1000) % 2 == 0
    after = before.copy()
    after[::100] = False
    _, low, high = paired(before, after)
    wide = newcombe(int(after.sum()), 1000, int(before.sum()), 1000)
    assert high - low < 0.5 * (wide[1] - wide[0])


def test_strata_undo_what_only_depth_does():
    """Deep trees fail and are exposed more often; within a depth exposure does nothing."""
    rng = np.random.default_rng(0)
    deep = rng.random(4000) < 0.5
    exposed = rng.random(4000) < np.where(deep, 0.8, 0.2)
    right = rng.random(4000) < np.where(deep, 0.6, 0.95)
    crude = right[exposed].mean() - right[~exposed].mean()
    difference, low, high = stratified_difference(right, exposed, deep, np.arange(4000), 0)
    assert crude < -0.15
    assert low < 0 < high
    assert abs(difference) < 0.04


def test_a_difference_within_strata_is_the_weighted_one_by_hand():
    values = np.array([1, 0, 1, 1, 0, 0, 1.0])
    exposed = np.array([1, 1, 0, 1, 0, 0, 1], bool)
    strata = np.array([0, 0, 0, 1, 1, 1, 2])
    # stratum 0: 1/2 - 1, weight 2/3; stratum 1: 1 - 0, weight 2/3; stratum 2 has one kind
    assert stratified_difference(values, exposed, strata, np.arange(7), 0)[0] == pytest.approx(0.25)
    assert np.isnan(stratified_difference(values, exposed, np.arange(7), np.arange(7), 0)).all()


def test_total_variation_of_what_is_alike_and_what_is_disjoint():
    assert total_variation(np.array([1, 2, 1]), np.array([2, 4, 2])) == 0
    assert total_variation(np.array([1, 0]), np.array([0, 3])) == 1
    assert total_variation(np.array([3, 1]), np.array([1, 1])) == pytest.approx(0.25)
