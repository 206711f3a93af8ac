"""Trees against networkx, against naive samplers written from the definitions, and against probabilities found by hand."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable
from functools import cache

import networkx as nx
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from actstore.errors import BadInput
from actstore.ingest.trees.draw import DISTRIBUTIONS, MAX_NODES, NO_NODE, Trees, draw
from actstore.ingest.trees.rows import edge_rows, tree_rows

UNLIKELY = 1e-6  # seeds are fixed, so a test that passes once passes always; a wrong sampler gives far less than this


@st.composite
def batches(
    pick: st.DrawFn, max_nodes: int = MAX_NODES, max_trees: int = 5, distributions: tuple[str, ...] = DISTRIBUTIONS
) -> Trees:
    """A few trees of any distribution, size, labels, seed and place in the stream."""
    distribution = pick(st.sampled_from(distributions))
    n_nodes = pick(st.integers(2, max_nodes))
    start = pick(st.integers(0, 10**6))
    depths = st.none() | st.sets(st.integers(1, n_nodes - 1), min_size=1).map(list)
    return draw(
        distribution,
        seed=pick(st.integers(0, 2**63 - 1)),
        start=start,
        stop=start + pick(st.integers(1, max_trees)),
        n_nodes=n_nodes,
        n_labels=pick(st.none() | st.integers(n_nodes, MAX_NODES)),
        depths=pick(depths) if distribution == "deep" else None,
    )


def graph_of(trees: Trees, i: int) -> nx.DiGraph:
    """Tree i as networkx reads it, siblings in the order of their labels."""
    edges = sorted(map(tuple, trees.edges[i].tolist()))
    graph = nx.DiGraph()
    graph.add_nodes_from(sorted({node for edge in edges for node in edge}))
    graph.add_edges_from(edges)
    return graph


def path_of(trees: Trees, i: int) -> list[int]:
    return trees.path[i, : trees.depth[i]].tolist()


def assert_same(some: Trees, others: Trees) -> None:
    for name in ("edges", "root", "goal", "path", "depth"):
        mine, theirs = getattr(some, name), getattr(others, name)
        assert mine.dtype == theirs.dtype == np.uint8
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


# What every tree is.


@given(batches())
def test_a_tree_is_binary_and_hangs_on_its_root(trees: Trees) -> None:
    for i in range(len(trees)):
        graph = graph_of(trees, i)
        assert nx.is_arborescence(graph)
        assert len(graph) == trees.n_nodes
        assert graph.in_degree(trees.root[i]) == 0
        assert max(degree for _, degree in graph.out_degree()) <= 2


@given(batches())
def test_the_goal_is_a_leaf_and_the_path_leads_to_it_from_the_root(trees: Trees) -> None:
    for i in range(len(trees)):
        graph = graph_of(trees, i)
        assert graph.out_degree(trees.goal[i]) == 0
        assert nx.shortest_path(graph, trees.root[i], trees.goal[i])[1:] == path_of(trees, i)
        assert (trees.path[i, trees.depth[i] :] == NO_NODE).all()


@given(st.data(), st.sampled_from(DISTRIBUTIONS), st.integers(2, MAX_NODES))
def test_labels_are_drawn_from_the_range_asked_for(data: st.DataObject, distribution: str, n_nodes: int) -> None:
    n_labels = data.draw(st.integers(n_nodes, MAX_NODES))
    trees = draw(distribution, 0, 0, 3, n_nodes, n_labels)
    assert trees.edges.max() < n_labels


@given(st.data(), st.integers(2, MAX_NODES))
def test_deep_trees_have_only_the_goal_depths_asked_for(data: st.DataObject, n_nodes: int) -> None:
    depths = data.draw(st.lists(st.integers(1, n_nodes - 1), min_size=1))
    assert set(draw("deep", 0, 0, 20, n_nodes, depths=depths).depth.tolist()) <= set(depths)


def test_a_depth_named_twice_counts_once() -> None:
    assert_same(draw("deep", 0, 0, 50, depths=[9, 2, 9, 9]), draw("deep", 0, 0, 50, depths=[2, 9]))


# What a stream is.


@given(
    st.sampled_from(DISTRIBUTIONS),
    st.integers(0, 2**63 - 1),
    st.integers(0, 10**9),
    st.integers(1, 6),
    st.integers(2, MAX_NODES),
    st.data(),
)
def test_a_tree_is_the_same_however_many_are_drawn_and_from_where(
    distribution: str, seed: int, start: int, n_trees: int, n_nodes: int, data: st.DataObject
) -> None:
    n_labels = data.draw(st.integers(n_nodes, MAX_NODES))
    together = draw(distribution, seed, start, start + n_trees, n_nodes, n_labels)
    for i in range(n_trees):
        alone = draw(distribution, seed, start + i, start + i + 1, n_nodes, n_labels)
        assert_same(together[i : i + 1], alone)


def test_another_seed_or_distribution_is_another_stream() -> None:
    seen = [set(draw(name, seed, 0, 200).hashes().tolist()) for name in DISTRIBUTIONS for seed in (0, 1)]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 200 * len(seen)


@pytest.mark.parametrize(
    ("distribution", "edges", "path"),
    [
        ("reproduction", [(3, 5), (2, 3), (0, 4), (0, 2), (4, 1)], [2, 3, 5]),
        ("baseline", [(0, 2), (3, 4), (3, 1), (0, 3), (1, 5)], [2]),
        ("deep", [(1, 0), (5, 2), (0, 4), (2, 1), (2, 3)], [2, 1, 0, 4]),
    ],
)
def test_a_seed_names_the_trees_it_always_named(
    distribution: str, edges: list[tuple[int, int]], path: list[int]
) -> None:
    """Stores are resumed and compared by seed: if this fails, each dataset drawn before has become another one."""
    tree = draw(distribution, 0, 1, 2, n_nodes=6)
    assert [tuple(edge) for edge in tree.edges[0].tolist()] == edges
    assert path_of(tree, 0) == path


def test_no_trees_are_no_rows() -> None:
    none, some = draw("baseline", 0, 7, 7), draw("baseline", 0, 7, 9)
    assert len(none) == 0
    assert tree_rows(none, 7, "d").schema == tree_rows(some, 7, "d").schema
    assert edge_rows(none, 7).schema == edge_rows(some, 7).schema
    assert len(tree_rows(none, 7, "d")) == len(edge_rows(none, 7)) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"distribution": "uniform"}, "there are reproduction, baseline, deep"),
        ({"n_nodes": 1}, "a tree has 2 to 64"),
        ({"n_nodes": 65}, "a tree has 2 to 64"),
        ({"n_nodes": -3}, "a tree has 2 to 64"),
        ({"n_nodes": 16, "n_labels": 15}, "a tree needs 16 to 64 labels"),
        ({"n_nodes": 16, "n_labels": 0}, "a tree needs 16 to 64 labels"),
        ({"n_nodes": 16, "n_labels": 65}, "a tree needs 16 to 64 labels"),
        ({"seed": -1}, "a seed is 0 or more"),
        ({"start": -1}, "a range runs forward"),
        ({"start": 5, "stop": 4}, "a range runs forward"),
        ({"distribution": "baseline", "depths": [3]}, "`deep` distribution's to choose"),
        ({"distribution": "deep", "depths": []}, "16 nodes allow 1 to 15"),
        ({"distribution": "deep", "depths": [0, 3]}, "16 nodes allow 1 to 15"),
        ({"distribution": "deep", "depths": [3, 16]}, "16 nodes allow 1 to 15"),
    ],
)
def test_what_no_tree_can_be_is_refused_in_one_line(arguments: dict, says: str) -> None:
    with pytest.raises(BadInput, match=says) as refusal:
        draw(**{"distribution": "reproduction", "seed": 0, "start": 0, "stop": 2, **arguments})
    assert "\n" not in str(refusal.value)


# The distributions, from their definitions.

Drawn = tuple[dict[int, list[int]], int, int]  # children of each node, root, goal


def naive_reproduction(n_nodes: int, rng: random.Random) -> Drawn:
    children: dict[int, list[int]] = {}

    def grow(size: int) -> int:
        node = len(children)
        children[node] = []
        left = rng.randint(0, size - 1)
        children[node] = [grow(part) for part in (left, size - 1 - left) if part]
        return node

    root = grow(n_nodes)
    return children, root, rng.choice([node for node in children if not children[node]])


def naive_baseline(n_nodes: int, rng: random.Random) -> Drawn:
    main = rng.randint(1, n_nodes - 1)
    left_over = n_nodes - 1 - main
    return naive_paths(n_nodes, main, rng.randint(1, left_over) if left_over else 0, rng)


def naive_deep(n_nodes: int, rng: random.Random) -> Drawn:
    return naive_paths(n_nodes, rng.randint(1, n_nodes - 1), 0, rng)


def naive_paths(n_nodes: int, main: int, second: int, rng: random.Random) -> Drawn:
    children: dict[int, list[int]] = {0: []}

    def hang(parent: int) -> int:
        node = len(children)
        children[parent].append(node)
        children[node] = []
        return node

    def walk(length: int) -> int:
        here = 0
        for _ in range(length):
            here = hang(here)
        return here

    goal = walk(main)
    walk(second)
    while len(children) < n_nodes:
        hang(rng.choice([node for node in children if node != goal and len(children[node]) < 2]))
    return children, 0, goal


NAIVE = {"reproduction": naive_reproduction, "baseline": naive_baseline, "deep": naive_deep}


def read_off(trees: Trees) -> list[Drawn]:
    read = []
    for edges, root, goal in zip(trees.edges.tolist(), trees.root.tolist(), trees.goal.tolist(), strict=True):
        children: dict[int, list[int]] = {node: [] for edge in edges for node in edge}
        for source, target in edges:
            children[source].append(target)
        read.append((children, root, goal))
    return read


def drawing(tree: Drawn) -> str:
    """The shape without its labels: a leaf is `o`, the goal `G`, an inner node its children in brackets."""
    children, root, goal = tree

    def draw_from(node: int) -> str:
        below = "".join(sorted(map(draw_from, children[node])))
        return f"({below})" if below else "G" if node == goal else "o"

    return draw_from(root)


def height(tree: Drawn, start: int | None = None) -> int:
    children, root, _ = tree
    below = children[root if start is None else start]
    return 1 + max(height(tree, child) for child in below) if below else 0


def goal_depth(tree: Drawn) -> int:
    children, root, goal = tree
    above = {child: node for node in children for child in children[node]}
    return 0 if goal == root else 1 + goal_depth((children, root, above[goal]))


def n_leaves(tree: Drawn) -> int:
    return sum(not below for below in tree[0].values())


def second_branch(tree: Drawn) -> tuple[int, int]:
    """Goal depth, and how deep the root's other branch goes: 0 where there is none."""
    children, root, goal = tree
    ways = {child: height(tree, child) + 1 for child in children[root]}
    below = {child: drawing((children, child, goal)) for child in ways}
    return goal_depth(tree), sum(way for child, way in ways.items() if "G" not in below[child])


STATISTICS: list[tuple[int, int, Callable[[Drawn], Hashable]]] = [  # n_nodes, trees drawn, what is counted
    (5, 10_000, drawing),
    (7, 10_000, drawing),
    (16, 5_000, goal_depth),
    (16, 5_000, height),
    (16, 5_000, n_leaves),
    (16, 5_000, second_branch),
]
each_statistic = pytest.mark.parametrize(
    ("n_nodes", "n_trees", "statistic"),
    STATISTICS,
    ids=[f"{statistic.__name__} at {n}" for n, _, statistic in STATISTICS],
)


@cache
def drawn(distribution: str, n_nodes: int, n_trees: int) -> list[Drawn]:
    return read_off(draw(distribution, 0, 0, n_trees, n_nodes))


@cache
def naively_drawn(distribution: str, n_nodes: int, n_trees: int) -> list[Drawn]:
    rng = random.Random(0)
    return [NAIVE[distribution](n_nodes, rng) for _ in range(n_trees)]


def p_of_one_distribution(some: list[Hashable], others: list[Hashable]) -> float:
    """The chi-square test's p that both are drawn from one distribution; values too rare for it count as one."""
    counts = [Counter(some), Counter(others)]
    common = [value for value in counts[0] | counts[1] if counts[0][value] + counts[1][value] >= 20]
    table = [[count[value] for value in common] for count in counts]
    rest = [sum(count.values()) - sum(row) for count, row in zip(counts, table, strict=True)]
    if sum(rest):
        table = [[*row, other] for row, other in zip(table, rest, strict=True)]
    return float(chi2_contingency(table).pvalue)


@each_statistic
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_trees_are_distributed_as_a_naive_sampler_draws_them(
    distribution: str, n_nodes: int, n_trees: int, statistic: Callable[[Drawn], Hashable]
) -> None:
    fast, naive = drawn(distribution, n_nodes, n_trees), naively_drawn(distribution, n_nodes, n_trees)
    assert p_of_one_distribution([*map(statistic, fast)], [*map(statistic, naive)]) > UNLIKELY


@each_statistic
def test_the_comparison_tells_the_distributions_apart(
    n_nodes: int, n_trees: int, statistic: Callable[[Drawn], Hashable]
) -> None:
    seen = [[*map(statistic, drawn(distribution, n_nodes, n_trees))] for distribution in ("reproduction", "deep")]
    assert p_of_one_distribution(*seen) < UNLIKELY


@pytest.mark.parametrize(
    ("distribution", "n_nodes", "probabilities"),
    [
        ("reproduction", 3, {"((G))": 2 / 3, "(Go)": 1 / 3}),
        ("baseline", 3, {"((G))": 1 / 2, "(Go)": 1 / 2}),
        ("deep", 3, {"((G))": 1 / 2, "(Go)": 1 / 2}),
        ("reproduction", 4, {"(((G)))": 1 / 3, "((Go))": 1 / 6, "((o)G)": 1 / 4, "((G)o)": 1 / 4}),
        ("baseline", 4, {"(((G)))": 1 / 3, "((o)G)": 1 / 3, "((G)o)": 1 / 3}),
        ("deep", 4, {"(((G)))": 1 / 3, "((Go))": 1 / 6, "((o)G)": 1 / 3, "((G)o)": 1 / 6}),
    ],
)
def test_small_shapes_have_the_probabilities_found_by_hand(
    distribution: str, n_nodes: int, probabilities: dict[str, float]
) -> None:
    counts = Counter(map(drawing, drawn(distribution, n_nodes, 20_000)))
    assert set(counts) == set(probabilities)
    expected = [20_000 * probabilities[shape] for shape in probabilities]
    assert chisquare([counts[shape] for shape in probabilities], expected).pvalue > UNLIKELY


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_goal_depths_of_deep_and_baseline_are_uniform_and_the_reproductions_are_not(distribution: str) -> None:
    counts = np.bincount(draw(distribution, 1, 0, 15_000).depth, minlength=16)[1:]
    assert (chisquare(counts).pvalue > UNLIKELY) == (distribution != "reproduction")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_labels_are_dealt_to_the_nodes_uniformly(distribution: str) -> None:
    trees = draw(distribution, 0, 0, 30_000, n_nodes=3, n_labels=4)
    for depth in (1, 2):  # the goal beside a leaf, and a chain
        alike = trees[trees.depth == depth]
        other = np.where(depth == 2, alike.path[:, 0], alike.edges[:, :, 1].sum(axis=1) - alike.goal)
        counts = Counter(zip(alike.root.tolist(), alike.goal.tolist(), other.tolist(), strict=True))
        assert len(counts) == 4 * 3 * 2
        assert chisquare(list(counts.values())).pvalue > UNLIKELY


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_shuffled_edges_come_in_every_order_alike(distribution: str) -> None:
    trees = draw(distribution, 0, 0, 30_000, n_nodes=4)[1::2]
    chains = trees[trees.depth == 3]
    depths = np.take_along_axis(chains.node_depths(), chains.edges[:, :, 1].astype(int), axis=1)
    counts = Counter(map(tuple, depths.tolist()))
    assert len(counts) == 3 * 2
    assert chisquare(list(counts.values())).pvalue > UNLIKELY


# The order of the edges.


@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(2, MAX_NODES), st.data())
def test_even_baseline_trees_list_their_edges_backward(
    seed: int, start: int, n_nodes: int, data: st.DataObject
) -> None:
    trees = draw("baseline", seed, start, start + 4, n_nodes, data.draw(st.integers(n_nodes, MAX_NODES)))
    for i in range(start % 2, 4, 2):
        graph = graph_of(trees, i)
        order = {node: place for place, node in enumerate(nx.topological_sort(graph))}
        forward = sorted(graph.edges, key=lambda edge: (order[edge[0]], order[edge[1]]))
        assert [tuple(edge) for edge in trees.edges[i].tolist()] == forward[::-1]
    assert trees.is_backward()[start % 2 :: 2].all()


def test_odd_baseline_trees_are_not_listed_backward() -> None:
    assert not draw("baseline", 0, 0, 400).is_backward()[1::2].any()


@given(batches(max_nodes=6))
def test_backward_means_that_no_edge_is_listed_before_one_below_it(trees: Trees) -> None:
    for i, backward in enumerate(trees.is_backward()):
        listed = [tuple(edge) for edge in trees.edges[i].tolist()]
        below = [(above, edge) for above in listed for edge in listed if edge[0] == above[1]]
        assert backward == all(listed.index(above) > listed.index(edge) for above, edge in below)


# What is read off a tree.


@given(batches())
def test_parents_and_depths_are_those_networkx_finds(trees: Trees) -> None:
    parents, depths = trees.parents(), trees.node_depths()
    assert parents.shape == depths.shape == (len(trees), MAX_NODES)
    for i in range(len(trees)):
        graph = graph_of(trees, i)
        found = nx.shortest_path_length(graph, trees.root[i])
        for label in range(MAX_NODES):
            above = list(graph.predecessors(label)) if label in graph else []
            assert parents[i, label] == (above[0] if above else NO_NODE)
            assert depths[i, label] == found.get(label, NO_NODE)


@given(batches(max_nodes=5, max_trees=40))
def test_trees_hash_alike_exactly_when_they_have_the_same_edges(trees: Trees) -> None:
    edges = [frozenset(map(tuple, listed)) for listed in trees.edges.tolist()]
    assert (
        len(set(edges))
        == len(set(trees.hashes().tolist()))
        == len(set(zip(edges, trees.hashes().tolist(), strict=True)))
    )


@given(batches(), st.randoms())
def test_a_hash_knows_neither_the_goal_nor_the_order(trees: Trees, rng: random.Random) -> None:
    order = rng.sample(range(trees.n_nodes - 1), trees.n_nodes - 1)
    again = Trees(trees.edges[:, order], trees.root, trees.root, trees.path[:, ::-1], trees.depth)
    np.testing.assert_array_equal(trees.hashes(), again.hashes())


def test_a_hash_is_the_xxh3_of_64_parents() -> None:
    """Splits and comparisons with a training stream rest on it, so it may not change between versions."""
    tree = Trees(*(np.array([value], np.uint8) for value in ([[2, 0], [2, 1]], 2, 1, [1, NO_NODE], 1)))
    assert tree.hashes().tolist() == [xxhash.xxh3_64_intdigest(bytes([2, 2] + [NO_NODE] * 62))]


# The rows.


@given(batches(), st.integers(0, 2**31 - 100))
def test_tree_rows_say_what_networkx_says(trees: Trees, first_tree_id: int) -> None:
    rows = tree_rows(trees, first_tree_id, "some trees").to_dicts()
    assert len(rows) == len(trees)
    for i, row in enumerate(rows):
        graph, root, goal = graph_of(trees, i), int(trees.root[i]), int(trees.goal[i])
        parents = [
            next(graph.predecessors(label), NO_NODE) if label in graph else NO_NODE for label in range(MAX_NODES)
        ]
        tree_hash = xxhash.xxh3_64_intdigest(bytes(parents))
        path = nx.shortest_path(graph, root, goal)[1:]
        assert row == {
            "tree_id": first_tree_id + i,
            "dataset": "some trees",
            "root": root,
            "goal": goal,
            "depth": len(path),
            "height": nx.dag_longest_path_length(graph),
            "n_leaves": sum(degree == 0 for _, degree in graph.out_degree()),
            "path": path,
            "backward": bool(trees.is_backward()[i]),
            "tree_hash": tree_hash,
            "split": "test" if tree_hash % 5 == 0 else "train",
            "variant_of": None,
            "change": None,
        }


@given(batches(), st.integers(0, 2**31 - 100))
def test_edge_rows_say_what_networkx_says(trees: Trees, first_tree_id: int) -> None:
    expected = []
    for i in range(len(trees)):
        root, goal = int(trees.root[i]), int(trees.goal[i])
        walk = nx.shortest_path(graph_of(trees, i), root, goal)
        steps = {edge: step for step, edge in enumerate(nx.utils.pairwise(walk))}
        depths = nx.shortest_path_length(graph_of(trees, i), root)
        for edge, (source, target) in enumerate(trees.edges[i].tolist()):
            step = steps.get((source, target))
            is_last = edge == trees.n_nodes - 2
            expected.append((first_tree_id + i, edge, source, target, depths[source], step is not None, step, is_last))
            assert step is None or path_of(trees, i)[step] == target
    rows = edge_rows(trees, first_tree_id)
    assert rows.columns == ["tree_id", "edge", "source", "target", "source_depth", "on_path", "step", "is_last"]
    assert rows.rows() == expected


def test_a_tree_id_that_no_row_can_hold_is_refused_and_not_wrapped() -> None:
    trees = draw("deep", 0, 0, 2)
    for build in (lambda: tree_rows(trees, 2**31 - 1, "d"), lambda: edge_rows(trees, 2**31 - 1)):
        with pytest.raises(OverflowError):
            build()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_one_tree_in_five_is_a_test_tree(distribution: str) -> None:
    counts = tree_rows(draw(distribution, 0, 0, 20_000), 0, "d")["split"].value_counts().rows()
    assert dict(counts)["test"] == pytest.approx(4_000, abs=6 * (20_000 * 0.2 * 0.8) ** 0.5)
