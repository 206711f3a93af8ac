"""Ten questions about circuits, each against a count of its own over networkx graphs of the same trees."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import polars as pl
import pytest

from actstore import queries
from actstore.errors import BadInput, NotStored
from actstore.ingest.trees.draw import draw
from actstore.store import Store
from tests.planted import plant
from tests.planted_answers import (
    CHECKPOINTS,
    DIRECTIONS,
    KNOWN,
    N_HEADS,
    N_NODES,
    N_TREES,
    OFFSETS,
    PATTERN,
    PER_SHARD,
    ROOT_AT,
    TREES,
    WIDTH,
    X,
    answers,
)

EDGES = [[(int(a), int(b)) for a, b in edges] for edges in TREES.edges]
GRAPHS = [nx.DiGraph(edges) for edges in EDGES]
ROOTS, GOALS = TREES.root.tolist(), TREES.goal.tolist()
PATHS = [nx.shortest_path(graph, root, goal) for graph, root, goal in zip(GRAPHS, ROOTS, GOALS, strict=True)]
DEPTH = [len(path) - 1 for path in PATHS]
PLACE = [{target: edge for edge, (_, target) in enumerate(edges)} for edges in EDGES]  # node → the edge into it
BACKWARD = [
    all(PLACE[i].get(source, N_NODES) > edge for edge, (source, _) in enumerate(edges)) for i, edges in enumerate(EDGES)
]
PARAMS: dict[str, dict[str, Any]] = {
    "probe_tokens_at_place": {"run": "tiny", "token_role": "separator", "place": 2},
    "donors": {"run": "tiny", "distance": 1, "backward": False, "second": 0, "n": 3, "seed": 0},
    "ancestors": {"run": "tiny"},
    "accuracy_by_child_first": {"run": "tiny"},
    "failures_by_other_subtree": {"run": "tiny"},
    "attention_by_goal_distance": {"run": "tiny", "site": "pattern.0", "token_role": "root"},
    "two_inner_children": {"run": "tiny"},
    "emergence": {"dataset": "made-up", "model": "tiny"},
    "matched_failures": {"run": "tiny", "n": 3, "seed": 0},
    "causal_directions": {"run": "tiny", "site": "resid_post.0", "token_role": "edge_target", "label": "source"},
}


def other_depth(i: int) -> int:
    """Edges from the root to the deepest leaf that is not below the path's first node; 0 if there is none."""
    below = nx.descendants(GRAPHS[i], PATHS[i][1]) | {PATHS[i][1]}
    return max(nx.shortest_path_length(GRAPHS[i], ROOTS[i], node) for node in set(GRAPHS[i]) - below)


OTHER_DEPTH = [other_depth(i) for i in range(N_TREES)]


@pytest.fixture(scope="module")
def store(answered_path: Path) -> Iterator[Store]:
    with Store(answered_path) as opened:
        yield opened


def ask(store: Store, name: str, **params: Any) -> pl.DataFrame:
    return queries.select(store, name, **{**PARAMS[name], **params})


@pytest.mark.parametrize(
    ("role", "offset"), [("edge_source", 0), ("edge_target", 1), ("separator", 2), ("next_source", 3)]
)
@pytest.mark.parametrize("place", [0, 3, -1, -3])
def test_tokens_at_one_place_are_those_of_one_edge_of_each_tree(store, role, offset, place):
    edge = place % (N_NODES - 1)
    found = ask(store, "probe_tokens_at_place", token_role=role, place=place)
    if edge == N_NODES - 2 and offset > 1:
        assert not len(found)
        return
    expected = []
    for i, edges in enumerate(EDGES):
        source, target = edges[edge]
        up = nx.shortest_path_length(GRAPHS[i], ROOTS[i], source)
        on_path = int(target in PATHS[i])
        listed = source in {node for _, node in edges[:edge]}
        expected.append((256 * i + 3 * edge + offset, i, edge, source, target, GOALS[i], on_path, up, listed, DEPTH[i]))
    assert found.drop("split").rows() == expected
    splits = store.sql("select tree_id, split from trees order by tree_id")
    assert found.select("tree_id", "split").equals(splits)


@pytest.mark.parametrize("place", [N_NODES - 1, -N_NODES])
def test_a_place_that_no_edge_has_gives_no_token(store, place):
    assert not len(ask(store, "probe_tokens_at_place", place=place))


def at_distance(i: int, distance: int) -> int:
    """The node so far up the path from the goal; past the path's end the root's child is repeated, as the authors do."""
    up = PATHS[i][:0:-1]
    return (up + up[-1:] * N_NODES)[distance]


@pytest.mark.parametrize("distance", [0, 1, 3, 5])
@pytest.mark.parametrize(("backward", "second"), [(False, 0), (True, 2)])
def test_donors_are_all_trees_with_the_node_at_the_distance(store, distance, backward, second):
    expected = {
        (clean, donor)
        for clean in range(N_TREES)
        for donor in range(N_TREES)
        if clean != donor
        and DEPTH[donor] > distance
        and at_distance(clean, distance) == at_distance(donor, distance)
        and OTHER_DEPTH[clean] >= second
        and (not backward or (BACKWARD[clean] and BACKWARD[donor]))
    }
    asked = {"distance": distance, "backward": backward, "second": second}
    found = ask(store, "donors", **asked, n=N_TREES)
    pairs = found.select("tree_id", "donor_tree_id").rows()
    assert len(pairs) == len(expected)
    assert set(pairs) == expected
    for row in found.iter_rows(named=True):
        clean, donor = row["tree_id"], row["donor_tree_id"]
        assert row["node"] == at_distance(donor, distance)
        assert (row["token_id"], row["donor_token_id"]) == (256 * clean + ROOT_AT, 256 * donor + ROOT_AT)
        assert (row["depth"], row["donor_depth"]) == (DEPTH[clean], DEPTH[donor])
    assert ask(store, "donors", **asked, n=2).equals(found.filter(pl.col("sample") < 2)), "fewer samples are the first"


def test_the_draw_of_donors_depends_on_the_seed_alone_and_reaches_each_donor(store):
    n_seeds, distance = 40, 4
    there = ask(store, "donors", distance=distance, n=N_TREES).group_by("tree_id").agg("donor_tree_id").sort("tree_id")
    clean, donors = there.filter(pl.col("donor_tree_id").list.len().is_between(3, 6)).row(0)
    drawn = [ask(store, "donors", seed=seed, distance=distance, n=1) for seed in range(n_seeds)]
    assert drawn[0].equals(ask(store, "donors", seed=0, distance=distance, n=1))
    times = Counter(frame.filter(tree_id=clean)["donor_tree_id"].item() for frame in drawn)
    assert set(times) == set(donors)
    assert max(times.values()) < 2 * n_seeds / len(donors)
    (per_tree,) = {frame.height for frame in drawn}
    shared = [(drawn[0]["donor_tree_id"] == frame["donor_tree_id"]).mean() for frame in drawn[1:]]
    assert per_tree > 50
    assert max(shared) < 0.6


def test_donors_and_ancestors_of_a_run_are_trees_that_it_answered(store):
    for name, column in (("donors", "donor_tree_id"), ("ancestors", "tree_id"), ("probe_tokens_at_place", "tree_id")):
        found = ask(store, name, run="half")
        assert set(found[column]) <= set(range(PER_SHARD))
        assert found["tree_id"].max() < PER_SHARD
        assert len(found) > 20


def test_ancestors_are_the_way_up_from_each_target(store):
    expected = []
    for i, edges in enumerate(EDGES):
        for edge, (_, target) in enumerate(edges):
            up = nx.shortest_path(GRAPHS[i], ROOTS[i], target)[::-1]
            ways = [PLACE[i][node] for node in up[:-1]]  # the edges climbed
            for distance, ancestor in enumerate(up[1:], start=1):
                listed = [place <= edge for place in ways[:distance]]
                expected.append(
                    (256 * i + 3 * edge + 1, distance, i, edge, ancestor, ways[distance - 1], listed[-1], all(listed))
                )
                expected[-1] += (ancestor == ROOTS[i],)
    assert ask(store, "ancestors").drop("split").rows() == expected


def outcomes(run: str = "tiny") -> list[dict[str, Any]]:
    return answers(run)["outcomes"].to_dicts()


def test_accuracy_by_child_first_counts_edges_that_come_after_the_next(store):
    groups = defaultdict(list)
    for i, outcome in enumerate(outcomes()):
        places = [PLACE[i][node] for node in PATHS[i][1:]]
        n = sum(above > below for above, below in itertools.pairwise(places))
        groups[DEPTH[i], n].append(outcome)
    found = ask(store, "accuracy_by_child_first")
    assert found.select("depth", "n_child_first").rows() == sorted(groups)
    for depth, n, n_trees, whole, greedy in found.iter_rows():
        its = groups[depth, n]
        assert n_trees == len(its)
        assert whole == pytest.approx(np.mean([one["teacher_forced_right"] for one in its]))
        assert greedy == pytest.approx(np.mean([one["greedy_right"] for one in its]))
    assert found["n_child_first"].max() > 2


def test_failures_by_the_deepest_leaf_beside_the_goals_subtree(store):
    groups = defaultdict(list)
    for i, outcome in enumerate(outcomes()):
        groups[DEPTH[i], OTHER_DEPTH[i]].append((i, outcome))
    found = ask(store, "failures_by_other_subtree")
    assert found.select("depth", "other_depth").rows() == sorted(groups)
    assert {0, 1, 2} <= set(found["other_depth"])
    for depth, other, n_trees, n_wrong, n_into, failures in found.iter_rows():
        its = groups[depth, other]
        wrong = [one for one in its if not one[1]["greedy_right"]]
        into = [
            i
            for i, one in wrong
            if one["greedy_path"] and one["greedy_path"][0] in set(GRAPHS[i].successors(ROOTS[i])) - {PATHS[i][1]}
        ]
        assert (n_trees, n_wrong, n_into) == (len(its), len(wrong), len(into))
        assert failures == pytest.approx(len(wrong) / len(its))
    assert found["n_into"].sum() > 3


@pytest.mark.parametrize("role", ["root", "path"])
def test_attention_by_the_distance_from_the_goal(store, role):
    sums = defaultdict(list)
    for i in range(N_TREES):
        away = nx.single_source_shortest_path_length(GRAPHS[i].to_undirected(), GOALS[i])
        for step in range(1) if role == "root" else range(1, DEPTH[i]):
            for head in range(N_HEADS):
                for edge, (_, target) in enumerate(EDGES[i]):
                    weight = PATTERN[i, head, ROOT_AT + step, 3 * edge + 1]
                    sums[head, target in PATHS[i], away[target]].append((weight, 1 / (ROOT_AT + step + 1)))
    found = ask(store, "attention_by_goal_distance", token_role=role)
    assert found.select("head", "on_path", "distance").rows() == sorted(sums)
    assert found["n"].to_list() == [len(sums[key]) for key in sorted(sums)]
    means = np.array([np.mean(sums[key], axis=0) for key in sorted(sums)])
    np.testing.assert_allclose(found.select("attention", "even").to_numpy(), means, rtol=1e-5)


def test_attention_in_sql_is_what_a_read_gives(store):
    query = "select token_id from answer_tokens where tree_id < 9 and step % 2 = 0"
    read, rows = store.read(query, run="tiny", site="pattern.0")
    found = store.sql(f"select token_id, attention(token_id, 'tiny', 'pattern.0') as weights from ({query})")
    assert found["token_id"].equals(rows["token_id"])
    assert found.schema["weights"] == pl.List(pl.List(pl.Float32))
    np.testing.assert_array_equal(np.array(found["weights"].to_list(), np.float32), read)
    assert store.sql("select attention(null, 'tiny', 'pattern.0') as w").item() is None


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("attention(5, 'tiny', 'resid_post.0')", BadInput, "'resid_post.0' .* residual stream, no attention pattern; "),
        ("attention(5, 'tiny', 'pattern.3')", NotStored, "no site 'pattern.3'"),
        ("attention(tree_id, 'tiny', 'pattern.0')", BadInput, r"attention\(tree_id, …\) takes tree_id for a token_id"),
        ("attention(5, 'pattern.0')", BadInput, r"attention\(token_id, 'RUN', 'pattern.0'\)"),
        ("act(5, 'tiny', 'pattern.0')", BadInput, "is an attention pattern, no vector of d_model numbers; "),
    ],
)
def test_attention_is_asked_for_a_token_and_a_pattern(store, call, error, words):
    with pytest.raises(error, match=words):
        store.sql(f"select {call} as x from trees")


def test_two_inner_children_leave_no_shortcut(store):
    groups = defaultdict(list)
    for row in answers("tiny")["predictions"].to_dicts():
        i, step = row["tree_id"], row["step"]
        below = list(GRAPHS[i].successors(PATHS[i][step]))
        if len(below) == 2 and all(GRAPHS[i].out_degree(node) for node in below):
            (sibling,) = set(below) - {PATHS[i][step + 1]}
            groups[step].append((row["correct"], row["predicted"] == f"→{sibling}", row["p_target"]))
    found = ask(store, "two_inner_children")
    assert found.select("step", "n_steps").rows() == [(step, len(groups[step])) for step in sorted(groups)]
    means = np.array([np.mean(groups[step], axis=0) for step in sorted(groups)])
    np.testing.assert_allclose(found.select("accuracy", "sibling", "p_target").to_numpy(), means, rtol=1e-5)
    assert len(found) > 1
    assert found["sibling"].max() > 0


def test_emergence_lists_checkpoints_by_their_step_and_the_model_last(store):
    found = ask(store, "emergence")
    assert found.select("train_step", "run").rows() == [(20, "tiny-step20"), (100, "tiny-step100"), (None, "tiny")]
    for row in found.iter_rows(named=True):
        its, steps = outcomes(row["run"]), answers(row["run"])["predictions"]
        firsts = [one["first_wrong_step"] for one in its if not one["greedy_right"]]
        assert row["n_trees"] == N_TREES
        assert row["step_accuracy"] == pytest.approx(steps["correct"].mean())
        assert row["path_accuracy"] == pytest.approx(np.mean([one["teacher_forced_right"] for one in its]))
        assert row["greedy_accuracy"] == pytest.approx(np.mean([one["greedy_right"] for one in its]))
        assert row["first_wrong_step"] == pytest.approx(np.mean(firsts))
        assert row["wrong_at_root"] == pytest.approx(firsts.count(0) / N_TREES)
    assert not len(ask(store, "emergence", dataset="another"))
    assert ask(store, "emergence", model="tiny-step20")["train_step"].to_list() == [None]
    assert set(CHECKPOINTS) < set(found["run"])


@pytest.mark.parametrize("n", [1, 3, 20])
def test_failures_are_matched_with_right_trees_of_their_kind(store, n):
    kind = [
        (DEPTH[i], nx.dag_longest_path_length(GRAPHS[i]), sum(d == 0 for _, d in GRAPHS[i].out_degree()))
        for i in range(N_TREES)
    ]
    right = [one["greedy_right"] for one in outcomes()]
    found = ask(store, "matched_failures", n=n)
    assert set(found["tree_id"]) == {i for i in range(N_TREES) if not right[i]}
    pairs = found.drop_nulls("right_tree_id")
    assert pairs["right_tree_id"].is_unique().all()
    for tree, _, other, *its in pairs.iter_rows():
        assert right[other]
        assert kind[tree] == kind[other] == tuple(its)
    counts = defaultdict(list)
    for (tree,), its in found.group_by("tree_id"):
        numbers = its["match"].drop_nulls().to_list()
        assert numbers == list(range(len(numbers)))
        assert len(its) == max(1, len(numbers))
        counts[kind[tree]].append(len(numbers))
    for its_kind, numbers in counts.items():
        n_right = sum(kind[i] == its_kind and right[i] for i in range(N_TREES))
        assert sum(numbers) == min(n_right, n * len(numbers)), "as many as there are"
        assert max(numbers) - min(numbers) <= 1, "shared evenly"
    assert found.equals(ask(store, "matched_failures", n=n))
    assert not found.equals(ask(store, "matched_failures", n=n, seed=1))


def test_a_failure_without_a_right_tree_of_its_kind_keeps_its_row(store):
    alone = ask(store, "matched_failures").filter(pl.col("match").is_null())
    assert len(alone)
    assert alone["right_tree_id"].is_null().all()
    assert not alone["depth"].is_null().any()


def test_causal_directions_are_the_probes_and_swap_its_two_answers(store):
    found = ask(store, "causal_directions")
    expected = [(i, edge) for i, edges in enumerate(EDGES) for edge, (source, _) in enumerate(edges) if source in KNOWN]
    assert found["token_id"].to_list() == [256 * i + 3 * edge + 1 for i, edge in expected]
    unit = DIRECTIONS / np.linalg.norm(DIRECTIONS, axis=1, keepdims=True)
    for (i, edge), row in zip(expected, found.iter_rows(named=True), strict=True):
        x, right = X[i, 3 * edge + 1], EDGES[i][edge][0]
        logits = DIRECTIONS @ x + OFFSETS
        wrong = max((k for k in KNOWN if k != right), key=lambda k: logits[k])
        assert (row["tree_id"], row["class"], row["wrong_class"]) == (i, str(right), str(wrong))
        assert row["projection"] == pytest.approx(unit[right] @ x, abs=1e-5)
        assert row["wrong_projection"] == pytest.approx(unit[wrong] @ x, abs=1e-5)
        assert row["margin"] == pytest.approx(logits[right] - logits[wrong], abs=1e-5)
        moved = DIRECTIONS @ (x + np.array(row["vector"])) + OFFSETS
        assert moved[right] - moved[wrong] == pytest.approx(-row["margin"], abs=1e-4)
        along = DIRECTIONS[right] - DIRECTIONS[wrong]
        cosine = np.dot(row["vector"], along) / np.linalg.norm(row["vector"]) / np.linalg.norm(along)
        assert abs(cosine) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["probe_tokens_at_place", "donors", "matched_failures"])
def test_numbers_may_be_text_as_on_the_command_line(store, name):
    as_text = {key: str(value).lower() for key, value in PARAMS[name].items()}
    assert queries.select(store, name, **as_text).equals(ask(store, name))


def test_without_recorded_directions_there_is_no_causal_one(store):
    assert not len(ask(store, "causal_directions", label="target"))


@pytest.mark.parametrize("name", PARAMS)
def test_what_is_stored_later_changes_no_row(store, more, name):
    params = {**PARAMS[name]}
    before, after = ask(store, name), ask(more, name)
    assert len(before)
    assert after.equals(before)
    if "run" in params:
        assert ask(more.of("tiny"), name).equals(before)
        assert more.sql(queries.load(name).sql, params).equals(before)


@pytest.fixture(scope="module")
def more(answered_path, tmp_path_factory):
    """The store with another set of trees, and another model over the same ones."""
    root = tmp_path_factory.mktemp("more") / "s.act"
    shutil.copytree(answered_path, root)
    others = draw("baseline", 7, 0, 40, N_NODES)
    width = {"resid_post.0": np.ones((40, WIDTH, 6), np.float32), "pattern.0": PATTERN[:40]}
    plant(root, others, width, "later", None, answers_at("later", others, N_TREES), 40, dataset="others", seed=7)
    plant(root, TREES, {"pattern.0": PATTERN[::-1].copy()}, "second", None, answers("second"), PER_SHARD)
    with Store(root) as opened:
        yield opened


def answers_at(run, trees, first):
    """Rows of answers to trees that are numbered from `first` on."""
    moved = [pl.col("tree_id") + first, pl.col("^token_id$") + 256 * first]
    return {table: frame.with_columns(moved) for table, frame in answers(run, trees).items()}
