"""Intervals of shares, differences and changes, against published ones, scipy and repeated draws; and tests."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import betabinom, binom, binomtest, fisher_exact

from actstore.intervals import (
    bootstrap,
    change_over_trees,
    difference,
    holm,
    n_as_far,
    over_trees,
    paired,
    share,
    shuffled_within,
    sign_flip,
    square_and_add,
    stratified_difference,
    total_variation,
)

SHARES, SIZES = (0.5, 0.99, 0.9999), (60, 200, 1758, 5000, 20_000)  # 1,758 × 0.0001 is where Wilson's covers least
NOMINAL = 0.93  # what 95 % intervals must cover at the least


def wilson(n_right, n):
    interval = binomtest(n_right, n).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


@pytest.mark.parametrize(("n_right", "n"), [(0, 5), (5, 5), (1, 3), (19_981, 20_000), (7, 1000)])
def test_the_interval_is_the_published_one(n_right, n):
    expected = binomtest(n_right, n).proportion_ci(0.95, method="exact")
    assert share(n_right, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("n_right", "n"), [(0, 5), (5, 5), (1, 3), (19_981, 20_000), (7, 1000)])
def test_one_row_a_tree_has_the_exact_interval(n_right, n):
    assert over_trees(np.arange(n) < n_right, np.arange(n)) == pytest.approx(share(n_right, n))


def test_rows_that_come_together_are_trees_and_not_rows():
    """100 trees, each all right or all wrong: 100 coins and not 1,500."""
    right = (np.arange(100) % 2 == 0).repeat(15)
    assert over_trees(right, np.arange(100).repeat(15)) == pytest.approx(share(50, 100))
    assert over_trees(right, np.arange(1500)) == pytest.approx(share(750, 1500))


def test_where_all_are_right_the_lower_end_is_that_of_so_many_trees():
    low, high = over_trees(np.ones(5790, bool), np.arange(386).repeat(15))
    assert (low, high) == (pytest.approx(0.025 ** (1 / 386)), 1.0)
    assert over_trees(np.zeros(5790, bool), np.arange(386).repeat(15)) == pytest.approx((0.0, 1 - low))


def test_trees_weigh_by_their_rows_wherever_they_stand():
    rng = np.random.default_rng(0)
    tree = rng.permutation(np.repeat(np.arange(40), rng.integers(1, 9, 40)))
    right = rng.random(len(tree)) < 0.7
    names, n_rows = np.unique(tree, return_counts=True)
    by_tree = np.array([right[tree == name].mean() for name in names])
    assert over_trees(right, tree) == pytest.approx(over_trees(by_tree, names, weights=n_rows))


def test_square_and_add_gives_newcombes_published_interval():
    first, other = (56 / 70, *wilson(56, 70)), (48 / 80, *wilson(48, 80))
    assert square_and_add(first, other)[1:] == pytest.approx(
        (0.0524, 0.3339), abs=5e-5
    )  # his table II, row a, method 10


def test_nothing_counted_leaves_everything_open():
    assert share(0, 0) == over_trees(np.zeros(0), np.zeros(0, int)) == (0.0, 1.0)
    assert difference(0, 0, 3, 4)[1:] == paired(np.zeros(0, bool), np.zeros(0, bool))[1:] == (-1.0, 1.0)


# How often do they hold the truth?


def covered(intervals, truth):
    return np.mean([low - 1e-12 <= truth <= high + 1e-12 for low, high in intervals])


@pytest.mark.parametrize("right", SHARES)
def test_the_interval_of_a_share_covers_what_it_says(right):
    """Summed over all that can be counted, at every size: no draws."""
    for n in np.unique(np.geomspace(60, 20_000, 100).astype(int)):
        counts = np.arange(binom.ppf(1e-6, n, right), binom.ppf(1 - 1e-6, n, right) + 1).astype(int)
        held = [low <= right <= high for low, high in (share(int(count), n) for count in counts)]
        assert binom.pmf(counts, n, right) @ held >= 0.95 - 1e-5


def test_wilsons_does_not():
    assert binom.pmf(1758, 1758, 0.9999) < 0.84  # and of one wrong among so many, Wilson's leaves the truth out:
    assert wilson(1757, 1758)[1] < 0.9999 < share(1757, 1758)[1]


@pytest.mark.parametrize("together", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("right", SHARES)
def test_the_interval_over_trees_covers_what_it_says(right, together):
    """Rows of a tree that err together, by their correlation."""
    rng, (a, b) = np.random.default_rng(0), (share * (1 / together - 1) for share in (1 - right, right))
    for n_trees, n_rows in ((60, 15), (400, 5), (1758, 15), (20_000, 15)):
        chances = betabinom.pmf(np.arange(n_rows + 1), n_rows, a, b)
        found = rng.multinomial(n_trees, chances / chances.sum(), size=300)
        shares, trees = 1 - np.arange(n_rows + 1) / n_rows, np.arange(n_trees)
        assert covered([over_trees(shares.repeat(counts), trees) for counts in found], right) >= NOMINAL


@pytest.mark.parametrize(("right", "other"), list(product(SHARES, SHARES)))
def test_the_interval_of_a_difference_covers_what_it_says(right, other):
    rng = np.random.default_rng(0)
    for n, n_other in ((60, 60), (100, 20_000), (1758, 20_000), (5000, 1758)):
        drawn = zip(rng.binomial(n, right, 300).tolist(), rng.binomial(n_other, other, 300).tolist(), strict=True)
        found = [difference(mine, n, theirs, n_other)[1:] for mine, theirs in drawn]
        assert covered(found, right - other) >= NOMINAL


@pytest.mark.parametrize(
    ("right", "lost", "won"),
    [(0.5, 0.1, 0.1), (0.5, 0.001, 0), (0.99, 0.005, 0.5), (0.99, 0.001, 0), (0.9999, 0.0003, 0.5), (0.9999, 1e-4, 1)],
)
def test_the_interval_of_pairs_covers_what_it_says(right, lost, won):
    """Right before; of these lost, of the others won."""
    rng = np.random.default_rng(0)
    chances = [right * lost, (1 - right) * won, right * (1 - lost) + (1 - right) * (1 - won)]
    for n in SIZES:
        counts = rng.multinomial(n, chances, size=300)
        found = [change_over_trees(np.repeat([-1.0, 1.0, 0.0], some), np.arange(n)) for some in counts]
        assert covered(found, chances[1] - chances[0]) >= NOMINAL


@pytest.mark.parametrize("right", SHARES)
@pytest.mark.parametrize("together", [0.0, 0.9])
def test_the_interval_of_a_stratified_difference_covers_what_it_says(right, together):
    """Four rows a tree in strata of its kind and of their place, of which one is exposed in some trees."""
    rng, effect = np.random.default_rng(0), -0.1 * (1 - right)
    for n_trees in (60, 1758, 5000):
        found = []
        for _ in range(200):
            kind = rng.integers(3, size=n_trees)
            exposed = np.zeros((n_trees, 4), bool)
            exposed[np.arange(n_trees), rng.integers(4, size=n_trees)] = rng.random(n_trees) < (0.2 + 0.2 * kind)
            u = np.where(rng.random((n_trees, 4)) < together, rng.random((n_trees, 1)), rng.random((n_trees, 4)))
            good = u < right - (1 - right) * kind[:, None] / 4 + effect * exposed
            strata, trees = 4 * kind[:, None] + np.arange(4), np.arange(n_trees).repeat(4)
            found.append(stratified_difference(good.ravel(), exposed.ravel(), strata.ravel(), trees)[1:])
        assert covered(found, effect) >= NOMINAL


def test_a_mean_change_that_few_trees_carry_is_covered():
    rng = np.random.default_rng(0)
    for n_carry in (0.2, 1, 3, 10):
        found = [np.append(-rng.random(rng.poisson(n_carry)), np.zeros(1000)) for _ in range(300)]
        intervals = [change_over_trees(changes, np.arange(len(changes))) for changes in found]
        assert covered(intervals, -n_carry / 2 / 1000) >= NOMINAL


# What no interval may be.


# each tree's two rows are equal, one exposed and one not
@example([(0, False, False, 1), (0, False, True, 1), (1, True, False, 0), (1, True, True, 0)])
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans(), st.integers(0, 2)), min_size=1))
def test_no_interval_is_without_a_width_or_leaves_its_own_estimate_out(rows):
    trees, first, second, strata = (np.array(column) for column in zip(*rows, strict=True))
    n, n_first = len(rows), int(first.sum())
    intervals = [
        (n_first / n, *share(n_first, n)),
        (first.mean(), *over_trees(first, trees)),
        ((second * 1.0 - first).mean(), *change_over_trees(second * 1.0 - first, trees)),
        paired(first, second),
        difference(n_first, n, int(second.sum()), n),
        stratified_difference(first, second, strata, trees),
    ]
    for estimate, low, high in intervals:
        if not np.isnan(estimate):
            assert low < high
            assert low <= estimate <= high
            assert max(-low, high) <= 1 + 1e-12


def test_pairs_that_all_stay_right_give_no_change_and_a_width():
    change, low, high = paired(np.ones(400, bool), np.ones(400, bool))
    assert change == 0
    assert -0.02 < low < -0.009 < 0.009 < high < 0.02


def test_a_paired_interval_is_narrower_than_one_of_independent_trees():
    before = np.arange(1000) % 2 == 0
    after = before.copy()
    after[::100] = False
    _, low, high = paired(before, after)
    _, *wide = difference(int(after.sum()), 1000, int(before.sum()), 1000)
    assert high - low < 0.5 * (wide[1] - wide[0])


def test_a_bootstrap_holds_what_it_is_of_and_says_nothing_where_all_is_alike():
    largest = np.arange(30)
    low, high = bootstrap(lambda counts: (counts > 0) @ largest / 1.0, 30, seed=0)  # each resample loses trees
    assert low < high == largest.sum()
    assert np.isnan(bootstrap(lambda counts: np.ones(len(counts)), 30, seed=0)).all()


# Strata.


def test_strata_undo_what_only_depth_does():
    """Deep trees fail and are exposed more often; within a depth exposure does nothing."""
    rng = np.random.default_rng(0)
    deep = rng.random(4000) < 0.5
    exposed = rng.random(4000) < np.where(deep, 0.8, 0.2)
    right = rng.random(4000) < np.where(deep, 0.6, 0.95)
    crude = right[exposed].mean() - right[~exposed].mean()
    apart, low, high = stratified_difference(right, exposed, deep, np.arange(4000))
    assert crude < -0.15
    assert low < 0 < high
    assert abs(apart) < 0.04
    assert shuffled_within(right, exposed, deep, np.arange(4000), 0) > 0.05
    assert shuffled_within(right, exposed, np.zeros(4000), np.arange(4000), 0) == 1e-4


def test_a_difference_within_strata_is_the_weighted_one_by_hand():
    values = np.array([1, 0, 1, 1, 0, 0, 1.0])
    exposed = np.array([1, 1, 0, 1, 0, 0, 1], bool)
    strata = np.array([0, 0, 0, 1, 1, 1, 2])
    # stratum 0: 1/2 - 1, weight 2/3; stratum 1: 1 - 0, weight 2/3; stratum 2 has one kind
    assert stratified_difference(values, exposed, strata, np.arange(7))[0] == pytest.approx(0.25)
    assert np.isnan(stratified_difference(values, exposed, np.arange(7), np.arange(7))).all()
    assert shuffled_within(values, exposed, np.arange(7), np.arange(7), 0) == 1


# Tests.


def test_a_shuffle_within_one_stratum_is_fishers_test():
    right, exposed = np.repeat([1, 0, 1, 0], [3, 6, 14, 5]), np.repeat([1, 0], [9, 19]).astype(bool)
    expected = fisher_exact([[3, 6], [14, 5]]).pvalue
    assert shuffled_within(right, exposed, np.zeros(28), np.arange(28), 0) == pytest.approx(expected, abs=0.01)


def test_a_sign_flip_of_pairs_is_mcnemars_test():
    flips = np.repeat([1.0, -1.0, 0.0], [12, 3, 500])
    assert sign_flip(flips, 0) == pytest.approx(binomtest(3, 15).pvalue, abs=0.006)
    assert sign_flip(np.zeros(30), 0) == sign_flip(np.zeros(0), 0) == 1
    assert sign_flip(np.append(np.full(3, -0.3), np.zeros(10_000)), 0) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("test", ["shuffle", "flip"])
def test_where_nothing_is_a_test_finds_something_as_often_as_it_says(test):
    """Rows of a tree hang together; one of them is exposed in half of the trees."""
    rng, p = np.random.default_rng(0), []
    for _ in range(120):
        values = rng.random((40, 1)) * rng.random((40, 3))
        exposed = np.zeros((40, 3), bool)
        exposed[np.arange(40), rng.integers(3, size=40)] = np.arange(40) % 2
        if test == "shuffle":
            p.append(
                shuffled_within(values.ravel(), exposed.ravel(), np.tile(range(3), 40), np.arange(40).repeat(3), 0)
            )
        else:
            p.append(sign_flip(values[:, 0] - values[:, 1], 0))
    assert 1 <= np.sum(np.array(p) < 0.05) <= 12
    assert 0.35 < np.mean(p) < 0.65


def test_how_many_lie_as_far_from_the_median_is_counted_on_both_sides():
    values = [0.0, 1.0, 2.0, 3.0, 10.0]
    assert [n_as_far(values, which) for which in range(5)] == [2, 4, 5, 4, 1]
    assert n_as_far([0.0, 1e-9, -1e-9], 0, rounding=1e-6) == 3


def test_as_far_as_by_chance_is_said_no_more_often_than_it_is():
    rng = np.random.default_rng(0)
    p = np.array([n_as_far(rng.standard_normal(14), 13) / 14 for _ in range(4000)])
    for level in (1 / 14, 3 / 14, 0.5):
        assert (p <= level + 1e-9).mean() == pytest.approx(level, abs=0.03)


def test_holm_adjusts_as_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_total_variation_of_what_is_alike_and_what_is_disjoint():
    assert total_variation(np.array([1, 2, 1]), np.array([2, 4, 2])) == 0
    assert total_variation(np.array([1, 0]), np.array([0, 3])) == 1
    assert total_variation(np.array([3, 1]), np.array([1, 1])) == pytest.approx(0.25)
