"""The studies `depth`, `last-edge`, `swap` and `dreams` on answers that are made up: each must say what was planted."""

from dataclasses import replace

import numpy as np
import pytest

from actstore.errors import BadInput, NotStored
from actstore.ingest.pipeline import TreeSet
from actstore.queries import dreams as dreams_module
from actstore.queries import study
from actstore.store import Store
from tests.answering import Answering, Dreaming, last_step, noise
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


def without_variants(root, says, trees=TREES):
    Answering(root, MODEL, trees, sites=[], says=says).execute()
    return root


def with_variants(root, says):
    without_variants(root, says)
    for change in ("swap_last", "swap_inner"):
        varied = replace(TREES, name=f"d-{change}", variant_of="d", change=change)
        Answering(root, MODEL, varied, sites=[], says=says).execute()
    return root


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    says = {"blind": ignores_the_last_edge, "noise": noise, "deep": fails_when_deep}
    return {name: with_variants(root / f"{name}.act", how) for name, how in says.items()}


def ask(path, name, **options):
    with Store(path) as store:
        return study.run(store, name, run="small", **options)


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
    assert "which is a fall" in answer.sentence


def test_noise_falls_with_depth_no_more_than_its_steps_multiply(stores):
    step = [row for row in ask(stores["noise"], "depth").results.iter_rows(named=True) if row["metric"] == "step"]
    assert all(row["low"] < 0.9 < row["high"] or row["n"] < 200 for row in step)


def test_a_model_that_ignores_the_last_edge_is_caught(stores):
    answer = ask(stores["blind"], "last-edge")
    assert value(answer, "path", "last")["value"] == 0
    assert value(answer, "path", "others")["value"] == 1
    assert value(answer, "path", "difference_at_equal_depth")["high"] == -1
    assert value(answer, "p_target", "difference_at_equal_depth")["value"] == pytest.approx(-0.8)
    assert value(answer, "step", "place 4")["value"] == 0
    assert value(answer, "step", "place 3")["value"] == 1
    assert answer.sentence.count("yes, it drops") == 3


@pytest.mark.parametrize("name", ["noise", "deep"])
def test_neither_noise_nor_depth_passes_for_the_last_edge(stores, name):
    answer = ask(stores[name], "last-edge")
    assert "yes" not in answer.sentence
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
    assert value(answer, "inner", "p_change")["value"] == 0
    assert value(answer, "to_last", "p_change_beyond_control")["value"] == pytest.approx(-0.8, abs=1e-6)
    assert "performance drops" in answer.sentence
    with Store(stores["blind"]) as store:
        n_last = store.sql(
            "select count(*) as n from edges join trees using (tree_id) where dataset = 'd' and is_last and on_path"
        )
    n_changed = value(answer, "from_last", "change")["n"]
    assert n_changed <= n_last["n"].item()


@pytest.mark.parametrize("name", ["noise", "deep"])
def test_a_swap_finds_nothing_where_the_order_does_nothing(stores, name):
    answer = ask(stores[name], "swap")
    assert "no drop can be told from chance" in answer.sentence
    for kind in ("to_last", "inner"):
        found = value(answer, kind, "change")
        assert found["low"] <= 0 <= found["high"]


def test_a_missing_variant_says_what_adds_it(tmp_path):
    path = without_variants(tmp_path / "s.act", noise, TreeSet("reproduction", 30, n_nodes=6, name="d"))
    with pytest.raises(NotStored, match="--model small --dataset d --variant swap_last --sites none"):
        ask(path, "swap")
    with pytest.raises(NotStored, match="--model small --dataset d --prompt tree"):
        ask(path, "dreams")


@pytest.mark.parametrize("name", ["depth", "last-edge", "swap"])
def test_a_study_run_twice_gives_the_same_numbers_and_a_figure(stores, name):
    first, again = ask(stores["noise"], name), ask(stores["noise"], name)
    assert first.results.equals(again.results)
    assert first.table.equals(again.table)
    assert study.plot(first).axes


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
    """A goal drawn anew as training draws one: here, uniform among the leaves of depth 2 and more where there are any."""
    return [dream_of(trees, tree, int(trees.goal[tree])) for tree in range(len(trees))]


def even_leaves(trees, first):
    rng = np.random.default_rng(first)
    return [dream_of(trees, tree, int(rng.choice(leaves_of(trees, tree)))) for tree in range(len(trees))]


def rambles(trees, first):
    """Words by chance, of all that there are."""
    rng, words = np.random.default_rng(first), [",", ":", "|", *(w for k in range(6) for w in (str(k), f"→{k}"))]
    return [list(rng.choice(words, 8)) for _ in range(len(trees))]


def dreaming(root, dreams, distribution="deep"):
    trees = TreeSet(distribution, 1500, seed=2, n_nodes=6, depths=(1, 4) if distribution == "deep" else None, name="d")
    Answering(root, MODEL, trees, sites=[], says=noise).execute()
    Dreaming(root, MODEL, trees, prompt="tree", samples=0, dreams=dreams).execute()
    return root


def test_a_model_that_copies_the_goals_of_its_training_is_reported_as_such(tmp_path):
    answer = ask(dreaming(tmp_path / "s.act", copies_its_training), "dreams")
    assert value(answer, "greedy", "well_formed")["value"] == 1
    assert value(answer, "greedy", "way_found")["value"] == 1
    assert value(answer, "greedy", "depth_distance_as_given")["value"] == 0
    assert "as goals given in training, and not as leaves drawn evenly" in answer.sentence


def test_a_model_that_takes_any_leaf_is_not_said_to_copy(tmp_path):
    answer = ask(dreaming(tmp_path / "s.act", even_leaves), "dreams")
    assert "as leaves drawn evenly, and not as goals given in training" in answer.sentence
    assert value(answer, "greedy", "leaf")["value"] == 1
    assert study.plot(answer).axes


def test_where_goals_are_even_among_leaves_neither_is_told_apart(tmp_path):
    answer = ask(dreaming(tmp_path / "s.act", even_leaves, "reproduction"), "dreams")
    assert "which these trees do not tell apart" in answer.sentence


def test_noise_dreams_nothing_and_finds_no_way(tmp_path):
    answer = ask(dreaming(tmp_path / "s.act", rambles), "dreams")
    formed = value(answer, "greedy", "well_formed")
    chance = 6 / 15 * 1 / 15 * 6 / 15  # a label, the colon, a label
    assert formed["low"] < chance < formed["high"]
    assert "nothing is said of where the goals are from" in answer.sentence
    assert value(answer, "greedy", "first_step")["value"] == pytest.approx(6 / 15, abs=0.05)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("3 : 0 →1 →3", (True, True, True, True)),
        ("3 : 0 →1 →2", (True, True, True, False)),  # another way
        ("3 : 0 →1", (True, True, True, False)),  # half of it
        ("1 : 0 →1", (True, True, False, True)),  # no leaf
        ("0 : 0", (True, True, False, False)),  # the root, to which there is no way
        ("3 : 1 →1 →3", (True, False, True, True)),  # not the root
        ("→3 : 0 →1 →3", (False, False, False, False)),
        ("9 : 0 →1", (False, False, False, False)),  # no node of the tree
        ("3 :", (False, False, False, False)),
    ],
)
def test_a_continuation_is_graded_as_by_hand(said, expected):
    graded = dreams_module._grade_one(said.split(), [0, 1, 1, 0], [1, 3, 2, 4], 0, 3, 2)
    assert graded[:4] == expected
    assert graded[5:7] == ((2, 1) if expected[0] and said[0] == "3" else graded[5:7])
    assert (graded[9], graded[10]) == ([2, 2, 1], [2, 1, 3])
