"""Random binary trees with a goal, drawn many at a time from three distributions.

A batch of trees is a struct of arrays: a Python loop over trees makes 10,000 per second, a loop
over the nodes of all trees at once 100,000. Each tree consumes a fixed number of uniforms from the
random generator. Tree i of a seed is therefore the same tree however many are drawn, and any range
of a stream can be drawn alone.

Distributions: reproduction  the uniform split: the left child of a subtree of size s gets uniform
    0…s-1 nodes. The
                  goal is a uniform leaf. Edges are shuffled.
    baseline      Brinkmann et al. 2024 (arXiv 2402.11917, `generate_example_secondary_path` of
                  their repository): a main path of length uniform 1…n-1 ends in the goal, and a
                  second path leaves the root. The other nodes hang on nodes with fewer than two
                  children, never on the goal. Even trees list their edges backward, odd trees
                  shuffled. (Their code hangs the other nodes in label order; here labels say
                  nothing about places.)
    deep          the goal's depth is uniform over a given set, and the main path has that length.
                  The other nodes hang at random, as in the baseline without its second path. Edges
                  are shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import xxhash

from actstore.errors import BadInput, nearest

DISTRIBUTIONS = ("reproduction", "baseline", "deep")
MIN_NODES, MAX_NODES = 2, 64  # 64 nodes are 255 positions, so that a position and a token id both fit a byte
Batch = TypeVar("Batch")
NO_NODE = 255  # past the end of a path, and the root's own parent


@dataclass(frozen=True)
class Trees:
    """A batch of n_trees binary trees, each with a goal, its path and an order of its edges.

    Attributes:
        edges: uint8 [n_trees, n_nodes - 1, 2], (source, target) labels in the order listed.
        root: uint8 [n_trees], label of the root.
        goal: uint8 [n_trees], label of the goal, a leaf.
        path: uint8 [n_trees, n_nodes - 1], labels from the root's child to the goal, then NO_NODE.
        depth: uint8 [n_trees], edges between root and goal: the length of the path.
    """

    edges: np.ndarray
    root: np.ndarray
    goal: np.ndarray
    path: np.ndarray
    depth: np.ndarray

    def __len__(self) -> int:
        return len(self.root)

    def __getitem__(self, which: slice | np.ndarray) -> Trees:
        return Trees(self.edges[which], self.root[which], self.goal[which], self.path[which], self.depth[which])

    @property
    def n_nodes(self) -> int:
        """Nodes per tree."""
        return self.edges.shape[1] + 1

    def parents(self) -> np.ndarray:
        """uint8 [n_trees, MAX_NODES]: each label's parent; NO_NODE for root and unused labels."""
        return self._by_label(self.edges[:, :, 1], self.edges[:, :, 0], otherwise=NO_NODE)

    def hashes(self) -> np.ndarray:
        """uint64 [n_trees]: xxh3-64 of each labelled tree, without goal and order of edges.

        Two prompts over one tree have one hash, so a split by this hash never has a tree on both
        sides.
        """
        return np.fromiter((xxhash.xxh3_64_intdigest(row) for row in self.parents()), np.uint64, len(self))

    def node_depths(self) -> np.ndarray:
        """uint8 [n_trees, MAX_NODES]: edges from root to each label; NO_NODE for unused labels."""
        n_labels = 1 + int(max(self.edges.max(initial=0), self.root.max(initial=0)))  # no more columns than are used
        labels, root, parents = np.arange(n_labels), self.root[:, None], self.parents()[:, :n_labels]
        above = np.where((parents == NO_NODE) | (labels == root), labels, parents)
        depths = (above != labels).astype(np.uint8)
        for _ in range((self.n_nodes - 2).bit_length()):  # all nodes climb at once, twice as far each round
            depths += np.take_along_axis(depths, above, axis=1)
            above = np.take_along_axis(above, above, axis=1)
        depths[above != root] = NO_NODE
        return np.pad(depths, ((0, 0), (0, MAX_NODES - n_labels)), constant_values=NO_NODE)

    def is_backward(self) -> np.ndarray:
        """bool [n_trees]: whether every edge is listed after all the edges below it."""
        edge = np.arange(self.n_nodes - 1, dtype=np.uint8)
        listed = self._by_label(self.edges[:, :, 1], edge, otherwise=NO_NODE)  # where the edge to each label stands
        return np.all(at_label(listed, self.edges[:, :, 0]) > edge, axis=1)

    def edges_on_path(self) -> np.ndarray:
        """bool [n_trees, n_nodes - 1]: whether each listed edge lies on the path."""
        walked = np.where(self.path == NO_NODE, self.goal[:, None], self.path)  # past its end a path stays at the goal
        return np.asarray(at_label(self._by_label(walked, 1, otherwise=0), self.edges[:, :, 1]) == 1)

    def _by_label(self, labels: np.ndarray, values: np.ndarray | int, otherwise: int) -> np.ndarray:
        """Scatter values to labels [n_trees, n]: uint8 [n_trees, MAX_NODES], else `otherwise`."""
        table = np.full((len(self), MAX_NODES), otherwise, np.uint8)
        np.put_along_axis(table, labels.astype(np.intp), values, axis=1)
        return table


def leaves(trees: Trees) -> np.ndarray:
    """bool [n_trees, MAX_NODES]: which labels are leaves."""
    is_leaf = trees.node_depths() != NO_NODE
    is_leaf[np.arange(len(trees))[:, None], trees.edges[:, :, 0]] = False
    return is_leaf


def at_label(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The cells of a table [n_trees, MAX_NODES] at labels uint8 [n_trees, n]: [n_trees, n]."""
    return np.take_along_axis(table, labels.astype(np.intp), axis=1)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Join batches that are structs of arrays, such as Trees, along the trees."""
    columns = zip(*(vars(batch).values() for batch in batches), strict=True)
    return type(batches[0])(*map(np.concatenate, columns))


def draw(
    distribution: str,
    seed: int,
    start: int,
    stop: int,
    n_nodes: int = 16,
    n_labels: int | None = None,
    depths: Sequence[int] | None = None,
) -> Trees:
    """Draw trees start…stop-1 of a seed's endless stream.

    The generator jumps to `start`, so a late range costs no more than an early one.

    Args:
        distribution: one of DISTRIBUTIONS.
        n_nodes: nodes per tree, 2…64.
        n_labels: labels are drawn without repetition from 0…n_labels-1; default n_nodes.
        depths: goal depths that `deep` draws from, each 1…n_nodes-1; default all.

    Raises:
        BadInput: the distribution is unknown, or no such tree has this size or depth.
    """
    n_labels = n_nodes if n_labels is None else n_labels
    _check(distribution, n_nodes, n_labels, depths)
    if seed < 0:
        raise BadInput(f"got seed {seed}: a seed is 0 or more (--seed)")
    if not 0 <= start <= stop:
        raise BadInput(f"got trees {start} to {stop}; a range runs forward from 0 or more")
    bits = np.random.PCG64DXSM(np.random.SeedSequence([seed, *distribution.encode()]))
    bits.advance(start * _n_uniforms(n_nodes, n_labels))  # every tree takes the same number
    n_trees = stop - start
    u = np.random.Generator(bits).random((n_trees, _n_uniforms(n_nodes, n_labels)))
    u_shape, u_goal, u_second, u_label, u_order = np.split(u, np.cumsum([n_nodes, 1, 1, n_labels]).tolist(), axis=1)
    labels = np.argsort(u_label, axis=1, kind="stable")[:, :n_nodes].astype(np.uint8)
    order = np.argsort(u_order, axis=1, kind="stable")
    if distribution == "reproduction":
        parent, goal = _uniform_split(u_shape, u_goal[:, 0])
    else:
        lengths = np.arange(1, n_nodes) if depths is None else np.unique(depths)
        main = lengths[_pick(u_goal[:, 0], np.full(n_trees, len(lengths)))]
        left_over = n_nodes - 1 - main
        second = np.zeros_like(main)
        if distribution == "baseline":
            second = np.where(left_over > 0, 1 + _pick(u_second[:, 0], np.maximum(left_over, 1)), 0)
        parent, goal = _paths_and_rest(u_shape, main, second), main
    if distribution == "baseline":
        backward = np.arange(start, stop) % 2 == 0
        order[backward] = _breadth_first(parent[backward], labels[backward])[:, :0:-1] - 1
    return _label(parent, goal, labels, order)


def _check(distribution: str, n_nodes: int, n_labels: int, depths: Sequence[int] | None) -> None:
    if distribution not in DISTRIBUTIONS:
        hint, known = nearest(distribution, DISTRIBUTIONS), ", ".join(DISTRIBUTIONS)
        raise BadInput(f"no distribution {distribution!r}{hint}; there are {known} (--distribution)")
    if not MIN_NODES <= n_nodes <= MAX_NODES:
        raise BadInput(f"got {n_nodes} nodes; a tree has {MIN_NODES} to {MAX_NODES} (--nodes)")
    if not n_nodes <= n_labels <= MAX_NODES:
        raise BadInput(f"got {n_labels} labels for {n_nodes} nodes; a tree needs {n_nodes} to {MAX_NODES} labels")
    if depths is not None and distribution != "deep":
        raise BadInput(
            f"depths are the `deep` distribution's to choose (--distribution deep); {distribution!r} draws its own"
        )
    if depths is not None and not (len(depths) and all(1 <= depth < n_nodes for depth in depths)):
        raise BadInput(f"got goal depths {sorted(depths)}; {n_nodes} nodes allow 1 to {n_nodes - 1} (--depths)")


def _n_uniforms(n_nodes: int, n_labels: int) -> int:
    """Uniforms per tree: for its shape, goal, second path, labels and edge order."""
    return n_nodes + 1 + 1 + n_labels + (n_nodes - 1)


def _pick(u: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Turn uniforms in [0, 1) into integers uniform in 0…n-1."""
    return (u * n).astype(np.intp)


def _uniform_split(u_shape: np.ndarray, u_goal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shapes whose subtrees split uniformly; nodes are numbered in preorder, parents first.

    Returns:
        parent: intp [n_trees, n_nodes], goal: intp [n_trees], a uniform leaf.
    """
    n_trees, n_nodes = u_shape.shape
    rows = np.arange(n_trees)
    size = np.zeros((n_trees, n_nodes + 1), np.intp)  # one column more: a child that does not exist goes there
    parent = np.zeros((n_trees, n_nodes + 1), np.intp)
    size[:, 0] = n_nodes
    for node in range(n_nodes):
        left = _pick(u_shape[:, node], size[:, node])
        right = size[:, node] - 1 - left
        left_child = np.where(left > 0, node + 1, n_nodes)
        right_child = np.where(right > 0, node + 1 + left, n_nodes)
        size[rows, left_child], size[rows, right_child] = left, right
        parent[rows, left_child] = parent[rows, right_child] = node
    leaves = size[:, :n_nodes] == 1
    return parent[:, :n_nodes], pick_true(leaves, u_goal)


def _paths_and_rest(u_shape: np.ndarray, main: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Shapes with a main path 0, 1, …, main (the goal), a second path, and the rest at random.

    Returns:
        parent: intp [n_trees, n_nodes], each parent numbered before its child.
    """
    n_trees, n_nodes = u_shape.shape
    rows = np.arange(n_trees)
    parent = np.zeros((n_trees, n_nodes), np.intp)
    free = np.zeros((n_trees, n_nodes), bool)  # nodes that can take another child
    free[:, 0] = True
    n_children = np.zeros((n_trees, n_nodes), np.int8)
    for node in range(1, n_nodes):
        hung = pick_true(free, u_shape[:, node])
        on_a_path = node <= main + second
        parent[:, node] = np.where(node == main + 1, np.where(on_a_path, 0, hung), np.where(on_a_path, node - 1, hung))
        n_children[rows, parent[:, node]] += 1
        free[:, node] = node != main
        free[rows, parent[:, node]] = n_children[rows, parent[:, node]] < 2
    return parent


def pick_true(mask: np.ndarray, u: np.ndarray) -> np.ndarray:
    """intp [n]: a uniformly drawn true column per row of a bool [n, m]; 0 for a row without any."""
    rank = _pick(u, mask.sum(axis=1))
    return np.argmax(np.cumsum(mask, axis=1, dtype=np.int16) > rank[:, None], axis=1)


def _breadth_first(parent: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """intp [n_trees, n_nodes]: nodes by level, siblings by label: networkx's topological order."""
    n_trees, n_nodes = parent.shape
    rows = np.arange(n_trees)
    first_child = np.zeros((n_trees, n_nodes), np.intp)  # 0 is the root, which is no one's child
    second_child = np.zeros((n_trees, n_nodes), np.intp)
    for node in range(1, n_nodes):
        above = parent[:, node]
        other = first_child[rows, above]
        comes_first = (other == 0) | (labels[:, node] < labels[rows, other])
        first_child[rows, above] = np.where(comes_first, node, other)
        second_child[rows, above] = np.where(comes_first, other, node)
    queue = np.zeros((n_trees, n_nodes + 2), np.intp)
    tail = np.ones(n_trees, np.intp)
    for head in range(n_nodes):
        for children in (first_child, second_child):
            child = children[rows, queue[:, head]]
            queue[rows, tail] = child
            tail += child > 0
    return queue[:, :n_nodes]


def _label(parent: np.ndarray, goal: np.ndarray, labels: np.ndarray, order: np.ndarray) -> Trees:
    """Label the nodes and list the edges: edge j of a shape runs from parent[j + 1] to j + 1."""
    n_trees, n_nodes = parent.shape
    rows = np.arange(n_trees)
    targets = order + 1
    edges = np.stack([parent[rows[:, None], targets], targets], axis=2)
    depth = np.zeros((n_trees, n_nodes), np.intp)
    for node in range(1, n_nodes):
        depth[:, node] = depth[rows, parent[:, node]] + 1
    path = np.full((n_trees, n_nodes - 1), NO_NODE, np.uint8)
    here, step = goal, depth[rows, goal] - 1
    while (live := step >= 0).any():
        path[rows[live], step[live]] = labels[rows[live], here[live]]
        here, step = parent[rows, here], step - 1
    return Trees(
        edges=labels[rows[:, None, None], edges],
        root=labels[:, 0].copy(),
        goal=labels[rows, goal],
        path=path,
        depth=depth[rows, goal].astype(np.uint8),
    )
