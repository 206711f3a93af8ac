"""The studies `depth`, `last-edge`, `swap` and `dreams` on answers that are made up: each must say what was planted."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from actstore.errors import BadInput, NotStored
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.task import TreeSet
from actstore.intervals import holm, share
from actstore.queries import study, swap
from actstore.queries.depth import against_the_others
from actstore.queries.dreams.figures import walks
from actstore.queries.dreams.grading import Goal, Tree, Walk, grade_goal, grade_walk
from actstore.queries.dreams.study import _share
from actstore.queries.last_edge import direction
from actstore.store import Store
from tests.answering import Answering, Dreaming, last_step, noise
from tests.test_figures import assert_legible
from tests.test_output import lines_at_80
from tests.test_pipeline import small_model

TREES = TreeSet("reproduction", 2000, seed=5, n_nodes=6, name="d", trees_per_shard=500)
MODEL = small_model()


def ignores_the_last_edge(trees, first):
    """Never takes the edge listed last, and is right otherwise."""
    at_last = last_step(trees)
    return ~at_last, np.where(at_last, 0.1, 0.9)


def fails_when_deep(trees, first):
    """Wrong on half of the deep trees, wherever their edges stand."""
    u = np.random.default_rng(first).random((len(trees), 1))
    deep = (trees.depth >= 3)[:, None] & (np.arange(trees.n_nodes - 1) == 0)
    return ~(deep & (u < 0.5)), np.full(deep.shape, 0.8)


def restless(trees, first):
    """Each step right or wrong by chance, drawn anew for every order of the edges."""
    u = np.random.default_rng(int(trees.edges[:, -1].sum())).random((len(trees), trees.n_nodes - 1))
    return u < 0.9, 0.5 + u / 4


def without_variants(root, says, trees=TREES):
    execute(Answering(root, MODEL, trees, sites=[], says=says))
    return root


def with_variants(root, says):
    without_variants(root, says)
    for change in ("swap_last", "swap_inner"):
        varied = replace(TREES, name=f"d-{change}", variant_of="d", change=change)
        execute(Answering(root, MODEL, varied, sites=[], says=says))
    return root


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    says = {"blind": ignores_the_last_edge, "noise": noise, "deep": fails_when_deep, "restless": restless}
    return {name: with_variants(root / f"{name}.act", how) for name, how in says.items()}


def ask(path, name, **options):
    with Store(path) as store:
        return study.ask(store, name, run="small", **options)


def value(answer, label, metric):
    return answer.results.filter(label=label, metric=metric).row(0, named=True)


def test_depth_says_how_many_are_right_at_each(stores):
    answer = ask(stores["deep"], "depth")
    with Store(stores["deep"]) as store:
        counted = store.sql(
            "select depth, count(*) as n, sum(greedy_right::int)::int as n_right, "
            "sum(n_right) over () / sum(n) over ()::double as share from outcomes join trees using (tree_id) "
            "where run = 'small' group by depth order by depth"
        )
    for depth, n, n_right, _ in counted.rows():
        found = value(answer, f"depth {depth}", "greedy")
        assert (found["value"], found["n"]) == (n_right / n, n)
        assert found["low"] < n_right / n <= found["high"]
        assert 0.35 < n_right / n < 0.65 if depth >= 3 else n_right == n
    assert value(answer, "all", "whole_path")["value"] == pytest.approx(counted["share"][0])
    for way, depths in (("lower", "depths 3, 4 and 5"), ("higher", "depths 1 and 2")):
        said = f"accuracy is significantly {way} than at all other depths together at {depths}, most at"
        assert said in answer.sentence


def test_noise_falls_with_depth_no_more_than_its_steps_multiply(stores):
    step = [row for row in ask(stores["noise"], "depth").results.iter_rows(named=True) if row["metric"] == "step"]
    assert all(row["low"] < 0.9 < row["high"] or row["n"] < 200 for row in step)


def test_a_model_that_ignores_the_last_edge_is_caught(stores):
    answer = ask(stores["blind"], "last-edge")
    assert value(answer, "path", "last")["value"] == 0
    assert value(answer, "path", "others")["value"] == 1
    apart = value(answer, "path", "difference_at_equal_depth")
    assert apart["low"] == apart["value"] == -1
    assert -1 < apart["high"] < -0.98
    assert value(answer, "p_target", "difference_at_equal_depth")["value"] == pytest.approx(-0.8)
    assert value(answer, "step", "place 4")["value"] == 0
    assert value(answer, "step", "place 3")["value"] == 1
    assert answer.sentence.count(" drops: -") == 3


@pytest.mark.parametrize("name", ["noise", "deep"])
def test_neither_noise_nor_depth_passes_for_the_last_edge(stores, name):
    answer = ask(stores[name], "last-edge")
    assert "drops" not in answer.sentence
    for label in ("path", "step"):
        found = value(answer, label, "difference_at_equal_depth")
        assert found["low"] <= 0 <= found["high"]


def test_depth_alone_would_have_passed_for_the_last_edge(stores):
    assert value(ask(stores["deep"], "last-edge"), "path", "difference")["high"] < 0


def test_too_few_trees_say_how_many_are_needed(tmp_path):
    few = TreeSet("reproduction", 12, n_nodes=6, name="few")
    with pytest.raises(BadInput, match=r"10 of each kind are needed .* ingest about [\d,]+ trees"):
        ask(without_variants(tmp_path / "s.act", noise, few), "last-edge")


def test_a_swap_catches_a_model_that_ignores_the_last_edge(stores):
    answer = ask(stores["blind"], "swap")
    assert value(answer, "to_last", "change")["value"] == -1
    assert value(answer, "from_last", "change")["value"] == 1
    both = value(answer, "through", "change")
    n_pairs = sum(value(answer, kind, "change")["n"] for kind in ("to_last", "from_last"))
    assert (both["value"], both["n"], value(answer, "through", "right_only_through")["value"]) == (-1, n_pairs, 0)
    assert value(answer, "through", "p_change")["value"] == pytest.approx(-0.8, abs=1e-6)
    assert value(answer, "inner", "p_change")["value"] == 0
    assert value(answer, "to_last", "p_change_beyond_control")["value"] == pytest.approx(-0.8, abs=1e-6)
    assert "the share of right whole paths drops: -" in answer.sentence
    with Store(stores["blind"]) as store:
        n_last = store.sql(
            "select count(*) as n from edges join trees using (tree_id) where dataset = 'd' and is_last and on_path"
        )
    n_changed = value(answer, "from_last", "change")["n"]
    assert n_changed <= n_last["n"].item()


def test_both_ways_of_a_swap_together_are_counted_as_by_hand():
    columns = ["was_last", "right_before", "right_after", "p_before", "p_after"]
    rows = [(False, True, False, 0.9, 0.2), (True, True, False, 0.8, 0.3), (True, False, True, 0.1, 0.7)]
    pairs = swap.through_less_not(pl.DataFrame(rows, schema=columns, orient="row"))
    assert pairs["right_before"].to_list() == [True, False, True]
    assert pairs["right_after"].to_list() == [False, True, False]
    assert pairs["p_before"].to_list() == [0.9, 0.3, 0.7]
    tally = {row["metric"]: row["value"] for row in swap._tally(pairs)}
    assert tally == {"right_only_without": 2, "right_only_through": 1, "mcnemar_p": pytest.approx(1)}


@pytest.mark.parametrize("name", ["noise", "deep", "restless"])
def test_a_swap_finds_nothing_where_the_order_does_nothing(stores, name):
    answer = ask(stores[name], "swap")
    assert "the share of right whole paths does not change significantly" in answer.sentence
    for kind in ("through", "to_last", "inner"):
        found = value(answer, kind, "change")
        assert found["low"] <= 0 <= found["high"]


def test_a_missing_variant_says_what_adds_it(tmp_path):
    path = without_variants(tmp_path / "s.act", noise, TreeSet("reproduction", 30, n_nodes=6, name="d"))
    with pytest.raises(
        NotStored, match="--model-of small --dataset d --run small-swap_last --variant swap_last --sites none"
    ):
        ask(path, "swap")
    with pytest.raises(NotStored, match="--model-of small --dataset d --run small-dreams --prompt tree"):
        ask(path, "dreams")


@pytest.mark.parametrize("name", ["depth", "last-edge", "swap"])
def test_the_table_fits_a_terminal_of_80_columns(stores, name, monkeypatch):
    frame = ask(stores["deep"], name).frame
    lines = lines_at_80(frame, monkeypatch)
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert "p = 1.000" in "".join(lines) or "p < 0.001" in "".join(lines), "the table shows the test"


@pytest.mark.parametrize("name", ["depth", "last-edge", "swap"])
def test_a_study_run_twice_gives_the_same_numbers_and_a_figure(stores, name):
    first, again = ask(stores["noise"], name), ask(stores["noise"], name)
    assert first.results.equals(again.results)
    assert first.frame.equals(again.frame)
    assert study.plot(first).axes


# What is tested, and what is claimed.


@pytest.mark.parametrize("name", ["blind", "noise", "deep", "restless"])
@pytest.mark.parametrize("asked", ["depth", "last-edge", "swap"])
def test_no_interval_is_without_a_width_or_leaves_its_estimate_out(stores, name, asked):
    rows = ask(stores[name], asked).results.drop_nulls(["low", "high"])
    assert (rows["low"] < rows["high"]).all()
    inside = pl.col("value").is_between(pl.col("low") - 1e-12, pl.col("high") + 1e-12)
    assert rows.select(inside.all()).item()


@pytest.mark.parametrize(("asked", "n_tests"), [("depth", 5), ("last-edge", 3), ("swap", 4)])
def test_all_that_is_tested_is_adjusted_recorded_and_counted(stores, asked, n_tests):
    answer = ask(stores["noise"], asked)
    assert len(answer.tests) == n_tests
    assert (
        f"Holm's correction covers all {n_tests} comparisons of the study; each interval covers its own comparison alone."
        in answer.sentence
    )
    assert [test.p_holm for test in answer.tests] == holm([test.p for test in answer.tests])
    for test in answer.tests:
        recorded = [value(answer, test.label, metric)["value"] for metric in ("p", "p_holm")]
        assert recorded == [test.p, test.p_holm]
        assert test.p_holm > test.p or test.p in (1, max(one.p for one in answer.tests))


def test_what_holm_does_not_leave_standing_is_not_claimed():
    alone = study.Test("path", -0.01, 0.03, 1000, -0.02, -0.001)
    held = study.adjusted([alone, replace(alone, p=0.4), replace(alone, p=0.5)])[0]
    assert direction(held).startswith("does not change significantly")
    assert direction(study.adjusted([alone])[0]) == "drops"
    assert direction(study.adjusted([replace(alone, estimate=0.01)])[0]) == "rises"


def test_the_worst_of_many_depths_is_not_tested_as_if_it_were_the_only_one():
    """Paths found by chance at every depth alike: in one set of twenty at most may any depth be called worse."""
    rng, n_sets = np.random.default_rng(0), 100
    depth = np.arange(3000) % 15 + 1
    claimed = 0
    for _ in range(n_sets):
        tests = against_the_others(pl.DataFrame({"greedy": rng.random(3000) < 0.9, "depth": depth}))
        claimed += any(test.found for test in tests)
    assert claimed <= 10


# Dreams.


def way(parent, node):
    steps = []
    while node in parent:
        steps.append(node)
        node = parent[node]
    return steps[::-1]


def dream_of(trees, tree, goal):
    parent = {int(t): int(s) for s, t in trees.edges[tree]}
    return [str(goal), ":", str(trees.root[tree]), *(f"→{step}" for step in way(parent, goal))]


def leaves_of(trees, tree):
    sources, targets = trees.edges[tree].T
    return sorted(set(targets.tolist()) - set(sources.tolist()))


def copies_its_training(trees, first):
    """The goal that training would give with this very tree."""
    return [dream_of(trees, tree, int(trees.goal[tree])) for tree in range(len(trees))]


def shape(trees, tree):
    """The tree without its labels and the order of its edges, as nested tuples."""
    children = {}
    for source, target in trees.edges[tree].tolist():
        children.setdefault(source, []).append(target)

    def below(node):
        return tuple(sorted(map(below, children.get(node, []))))

    return below(int(trees.root[tree]))


def draws_as_training(trees, first):
    """A goal of a depth drawn anew as the baseline's training draws it: of the goal of another tree of the same shape."""
    others, depths = draw("baseline", 99, 0, 6000, trees.n_nodes), {}
    for other in range(len(others)):
        depths.setdefault(shape(others, other), []).append(int(others.depth[other]))
    rng, dreams = np.random.default_rng(first), []
    for tree in range(len(trees)):
        parent = {int(t): int(s) for s, t in trees.edges[tree]}
        depth = rng.choice(depths[shape(trees, tree)])
        goal = rng.choice([leaf for leaf in leaves_of(trees, tree) if len(way(parent, leaf)) == depth])
        dreams.append(dream_of(trees, tree, int(goal)))
    return dreams


def even_leaves(trees, first):
    rng = np.random.default_rng(first)
    return [dream_of(trees, tree, int(rng.choice(leaves_of(trees, tree)))) for tree in range(len(trees))]


def even_nodes(trees, first):
    rng = np.random.default_rng(first)
    return [dream_of(trees, tree, int(rng.integers(trees.n_nodes))) for tree in range(len(trees))]


def first_listed_leaf(trees, first):
    """Always the leaf that the list names first."""
    goals = [next(int(t) for t in trees.edges[tree, :, 1] if t in leaves_of(trees, tree)) for tree in range(len(trees))]
    return [dream_of(trees, tree, goal) for tree, goal in enumerate(goals)]


def walks_without_a_goal(trees, first):
    """Steps to label 0, as the reproduction does, and from there to the first child until a leaf."""
    dreams = []
    for tree in range(len(trees)):
        children = {int(s): int(t) for s, t in trees.edges[tree, ::-1]}
        said = [0]
        while said[-1] in children:
            said.append(children[said[-1]])
        dreams.append([f"→{step}" for step in said])
    return dreams


def steps_at_random(trees, first):
    rng = np.random.default_rng(first)
    return [[f"→{step}" for step in rng.integers(trees.n_nodes, size=8)] for _ in range(len(trees))]


def stops(trees, first):
    return [[","]] * len(trees)


def rambles(trees, first):
    """Words by chance, of all that there are."""
    rng, words = np.random.default_rng(first), [",", ":", "|", *(w for k in range(6) for w in (str(k), f"→{k}"))]
    return [list(rng.choice(words, 8)) for _ in range(len(trees))]


def dreaming(root, dreams, distribution="deep", system="reproduction"):
    trees = TreeSet(distribution, 1500, seed=2, n_nodes=6, depths=(1, 4) if distribution == "deep" else None, name="d")
    execute(Answering(root, small_model(system), trees, sites=[], says=noise))
    execute(Dreaming(root, small_model(system), trees, prompt="tree", samples=0, dreams=dreams))
    return root


@pytest.mark.parametrize("dreams", [copies_its_training, draws_as_training])
def test_a_model_that_copies_the_goals_of_its_training_is_reported_as_such(tmp_path, dreams):
    answer = ask(dreaming(tmp_path / "s.act", dreams, "baseline", "baseline"), "dreams")
    assert value(answer, "greedy", "well_formed")["value"] == 1
    assert value(answer, "greedy", "way_found")["value"] == 1
    assert "fit the goals of its training distribution, and contradict leaves drawn evenly" in answer.sentence


def test_the_goals_of_trees_that_training_did_not_draw_are_not_called_its_own(tmp_path):
    answer = ask(dreaming(tmp_path / "s.act", copies_its_training), "dreams")
    assert value(answer, "greedy", "depth_distance_as_given")["value"] == 0
    assert "fit the goals of these `deep` trees, and contradict leaves drawn evenly" in answer.sentence


def test_a_model_that_takes_any_leaf_is_not_said_to_copy(tmp_path):
    answer = ask(dreaming(tmp_path / "s.act", even_leaves), "dreams")
    assert "fit leaves drawn evenly, and contradict the goals of these `deep` trees" in answer.sentence
    assert value(answer, "greedy", "leaf")["value"] == 1
    assert value(answer, "greedy", "leaf_beyond_even")["low"] > 0
    assert value(answer, "greedy", "place_p_even_list")["value"] > 0.01
    figure = study.plot(answer)
    assert len(figure.axes) == 3
    assert_legible(figure)


def test_a_model_that_takes_any_node_has_as_many_leaves_as_there_are(tmp_path):
    answer = ask(dreaming(tmp_path / "s.act", even_nodes), "dreams")
    beyond, shares = value(answer, "greedy", "leaf_beyond_even"), value(answer, "greedy", "leaf_if_even")
    assert beyond["low"] < 0 < beyond["high"]
    with Store(tmp_path / "s.act") as store:
        assert shares["value"] == pytest.approx(
            store.sql("select avg(n_leaves) / 6 as share from trees")["share"].item()
        )
    assert value(answer, "greedy", "not_root")["value"] == pytest.approx(5 / 6, abs=0.04)


def test_a_model_that_takes_what_the_list_names_first_is_caught(tmp_path):
    answer = ask(dreaming(tmp_path / "s.act", first_listed_leaf), "dreams")
    assert (
        value(answer, "greedy", "place_p_even_list")["value"]
        == value(answer, "greedy", "place_p_as_given")["value"]
        == 0.001
    )
    assert value(answer, "greedy", "place 0")["low"] > 0.2 > value(answer, "greedy", "place 4")["high"]


def test_where_goals_are_even_among_leaves_neither_is_told_apart(tmp_path):
    answer = ask(dreaming(tmp_path / "s.act", even_leaves, "reproduction"), "dreams")
    assert "contradict neither the goals of" in answer.sentence


def test_noise_dreams_nothing_and_finds_no_way(tmp_path):
    answer = ask(dreaming(tmp_path / "s.act", rambles), "dreams")
    formed = value(answer, "greedy", "well_formed")
    chance = 6 / 15 * 1 / 15 * 6 / 15  # a label, the colon, a label
    assert formed["low"] < chance < formed["high"]
    assert "the study does not ask where goals come from" in answer.sentence
    assert value(answer, "greedy", "first_step")["value"] == pytest.approx(6 / 15, abs=0.05)
    assert value(answer, "greedy", "stopped")["value"] == pytest.approx(1 / 15, abs=0.03)


def test_a_walk_that_follows_the_tree_is_told_from_one_that_does_not(tmp_path):
    walker = ask(dreaming(tmp_path / "walks.act", walks_without_a_goal), "dreams")
    assert value(walker, "greedy", "first_word →0")["value"] == value(walker, "greedy", "to_leaf")["value"] == 1
    assert value(walker, "greedy", "to_leaf_elsewhere")["high"] < 0.6
    assert "the next steps follow edges down to a leaf in 100.00 %" in walker.sentence
    assert ", more often than on another tree" in walker.sentence
    random = ask(dreaming(tmp_path / "random.act", steps_at_random), "dreams")
    assert "not significantly more often than on another tree" in random.sentence
    for answer in (walker, random):
        assert "Fewer than" not in answer.sentence
        assert len(study.plot(answer).axes) == 1


@pytest.mark.parametrize(
    ("estimate", "p", "said"),
    [(0.3, 0.01, " more often"), (-0.3, 0.01, " less often"), (-0.3, 0.5, " not significantly more often")],
)
def test_a_walk_is_said_to_follow_its_tree_in_the_direction_that_it_does(estimate, p, said):
    by_metric = {name: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9} for name in ("to_leaf", "to_leaf_elsewhere")}
    test = study.Test("greedy, to_leaf", estimate, p, 9, p_holm=p, exceeds="the other tree's share")
    assert f"of 9,{said} than on another tree" in walks(by_metric, test)


def test_a_model_that_stops_is_said_to(tmp_path):
    answer = ask(dreaming(tmp_path / "s.act", stops, system="baseline"), "dreams")
    assert "goal in 0.00 %" in answer.sentence
    assert "The run stops at once in 100.00 % (99.75 to 100.00)." in answer.sentence


def test_continuations_of_one_tree_do_not_pass_for_independent():
    hits, trees = np.repeat(np.arange(40) % 2 == 0, 9), np.repeat(np.arange(40), 9)
    several, one = _share("m", hits, trees), _share("m", hits[::9], trees[::9])
    assert several["high"] - several["low"] == pytest.approx(one["high"] - one["low"], rel=0.2)
    all_of_them = _share("m", np.ones(360, bool), trees)
    assert all_of_them["low"] == pytest.approx(share(40, 40)[0])


SMALL = Tree(sources=[0, 1, 1, 0], targets=[1, 3, 2, 4], root=0)


@pytest.mark.parametrize(
    ("said", "goal"),
    [
        ("3 : 0 →1 →3", Goal(True, True, True, True, 2, 1)),
        ("3 : 0 →1 →2", Goal(True, True, True, False, 2, 1)),  # another way
        ("3 : 0 →1", Goal(True, True, True, False, 2, 1)),  # half of it
        ("1 : 0 →1", Goal(True, True, False, True, 1, 0)),  # no leaf
        ("0 : 0", Goal(True, True, False, False, 0, -1)),  # the root, to which there is no way
        ("3 : 1 →1 →3", Goal(True, False, True, True, 2, 1)),  # not the root
        ("→3 : 0 →1 →3", Goal()),
        ("9 : 0 →1", Goal()),  # no node of the tree
        ("3 :", Goal()),
    ],
)
def test_a_goal_is_graded_as_by_hand(said, goal):
    assert grade_goal(said.split(), SMALL) == goal
    assert (SMALL.leaves, [SMALL.way(leaf) for leaf in SMALL.leaves]) == ([2, 3, 4], [[1, 2], [1, 3], [4]])


@pytest.mark.parametrize(
    ("said", "walk"),
    [
        ("→1 →3", Walk(True, True, True)),
        ("→1 →3 →0 →4", Walk(True, True, True)),  # what stands behind the leaf is not asked
        ("→1 →4", Walk(True, True, False)),  # no edge
        ("→1", Walk(True, True, False)),  # not at a leaf
        ("→1 ,", Walk(True, True, False)),
        ("→0 →1 →2", Walk(False, True, True)),  # the root itself
        ("→4 →0", Walk(True, False, False)),  # a leaf
        ("→3", Walk(False, False, False)),
        ("3 : 0 →1 →3", Walk()),
        (",", Walk()),
    ],
)
def test_a_walk_is_graded_as_by_hand(said, walk):
    assert grade_walk(said.split(), SMALL) == walk
