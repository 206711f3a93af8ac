"""Free continuations of a tree, graded against the tree: a goal of the model's own, and steps.

A goal is well formed if a continuation begins `goal : root` with two labels of the tree. If a
continuation begins with a step, as if a goal stood before it, the walk is graded: does it follow
edges down to a leaf? A walk can do so by chance, so each walk is also graded on another tree, that
of the next continuation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

CONTINUATIONS = """
-- one row per continuation: its tokens in order, and its tree
with continued as (
    select tree_id, sample, list(token::varchar order by position) as words
    from generations where run = $dreams group by tree_id, sample
),
listed as (
    select tree_id, list(source order by edge) as sources, list(target order by edge) as targets
    from edges semi join continued using (tree_id) group by tree_id
)
select tree_id, sample, words, sources, targets, root, goal, depth
from continued join listed using (tree_id) join trees using (tree_id)
order by sample, tree_id
"""
STOPS = (",", "<PAD>")  # a continuation ends after these


@dataclass(frozen=True)
class Tree:
    """A tree in the order of its prompt: edge i runs from sources[i] to targets[i]."""

    sources: list[int]
    targets: list[int]
    root: int

    @property
    def leaves(self) -> list[int]:
        """Labels of the leaves, ascending."""
        return sorted(set(self.targets) - set(self.sources))

    def way(self, node: int) -> list[int]:
        """Labels from the root's child to a node; empty for the root."""
        parent = dict(zip(self.targets, self.sources, strict=True))
        way: list[int] = []
        while node in parent:
            way.append(node)
            node = parent[node]
        return way[::-1]


@dataclass(frozen=True)
class Walk:
    """The first steps of a continuation, graded on a tree.

    Attributes:
        from_root: the first step goes to a child of the root.
        inside: the first step goes to a node with children.
        to_leaf: also, the steps after it follow edges down to a leaf.
    """

    from_root: bool = False
    inside: bool = False
    to_leaf: bool = False


@dataclass(frozen=True)
class Goal:
    """The goal that a continuation makes up; other attributes count only if it is well formed.

    Attributes:
        formed: the continuation begins `goal : root` with labels of the tree.
        root_right: the continuation names the tree's root.
        leaf: the goal is a leaf.
        way_found: the whole path to the goal follows.
        depth: depth of the goal; -1 without a goal.
        place: place in the list of the edge to the goal; -1 without such an edge.
    """

    formed: bool = False
    root_right: bool = False
    leaf: bool = False
    way_found: bool = False
    depth: int = -1
    place: int = -1


@dataclass(frozen=True)
class Continuations:
    """n graded continuations; all columns are arrays [n] or lists of n.

    Attributes:
        tree: int, tree_id.
        first_word: str, the first word.
        formed, root_right, leaf, way_found, depth, place: see Goal.
        stopped: bool, the continuation ended at once.
        stepped: bool, the first word is a step, `→k`.
        from_root, inside, to_leaf: see Walk; other_…: the same words graded on another tree.
        given_depth, given_place: int, depth and place of the tree's own goal.
        leaf_share: float, share of leaves among the tree's nodes.
        leaf_depths, leaf_places: depth and place of each leaf of the tree.
        n_edges: edges per tree.
    """

    tree: np.ndarray
    first_word: np.ndarray
    formed: np.ndarray
    root_right: np.ndarray
    leaf: np.ndarray
    way_found: np.ndarray
    depth: np.ndarray
    place: np.ndarray
    stopped: np.ndarray
    stepped: np.ndarray
    from_root: np.ndarray
    inside: np.ndarray
    to_leaf: np.ndarray
    other_from_root: np.ndarray
    other_inside: np.ndarray
    other_to_leaf: np.ndarray
    given_depth: np.ndarray
    given_place: np.ndarray
    leaf_share: np.ndarray
    leaf_depths: list[list[int]]
    leaf_places: list[list[int]]
    n_edges: int

    @property
    def leaf_goal(self) -> np.ndarray:
        """bool [n]: the goal is a leaf, comparable with given goals; at most one per tree."""
        first = np.zeros(len(self.tree), bool)
        chosen = np.flatnonzero(self.formed & self.leaf)
        first[chosen[np.unique(self.tree[chosen], return_index=True)[1]]] = True
        return first


def grade(frame: pl.DataFrame) -> Continuations:
    """Grade one or more rows of CONTINUATIONS."""
    continuations, given = frame["words"].to_list(), frame["goal"].to_list()
    trees = [Tree(*row) for row in frame.select("sources", "targets", "root").iter_rows()]
    goals = [grade_goal(words, tree) for words, tree in zip(continuations, trees, strict=True)]
    walks = [grade_walk(words, tree) for words, tree in zip(continuations, trees, strict=True)]
    others = [grade_walk(words, tree) for words, tree in zip(continuations, trees[1:] + trees[:1], strict=True)]
    leaves = [tree.leaves for tree in trees]
    first = np.array([words[0] for words in continuations])
    columns = {name: np.array([getattr(goal, name) for goal in goals]) for name in Goal.__dataclass_fields__}
    for name in Walk.__dataclass_fields__:
        columns[name] = np.array([getattr(walk, name) for walk in walks])
        columns[f"other_{name}"] = np.array([getattr(walk, name) for walk in others])
    return Continuations(
        tree=frame["tree_id"].to_numpy(),
        first_word=first,
        stopped=np.isin(first, STOPS),
        stepped=np.char.startswith(first, "→"),
        given_depth=frame["depth"].to_numpy().astype(int),
        given_place=np.array([tree.targets.index(goal) for tree, goal in zip(trees, given, strict=True)]),
        leaf_share=np.array([len(of) / (len(tree.targets) + 1) for of, tree in zip(leaves, trees, strict=True)]),
        leaf_depths=[[len(tree.way(leaf)) for leaf in of] for of, tree in zip(leaves, trees, strict=True)],
        leaf_places=[[tree.targets.index(leaf) for leaf in of] for of, tree in zip(leaves, trees, strict=True)],
        n_edges=len(trees[0].targets),
        **columns,
    )


def grade_goal(words: list[str], tree: Tree) -> Goal:
    """Grade the goal that words make up."""
    nodes = {str(node): node for node in [tree.root, *tree.targets]}
    dreamed, colon, start = [*words, "", "", ""][:3]
    if dreamed not in nodes or colon != ":" or start not in nodes:
        return Goal()
    node = nodes[dreamed]
    way = tree.way(node)
    return Goal(
        formed=True,
        root_right=nodes[start] == tree.root,
        leaf=node not in tree.sources,
        way_found=bool(way) and words[3 : 3 + len(way)] == [f"→{step}" for step in way],
        depth=len(way),
        place=tree.targets.index(node) if way else -1,
    )


def grade_walk(words: list[str], tree: Tree) -> Walk:
    """Grade the walk that words begin with."""
    edges, nodes = set(zip(tree.sources, tree.targets, strict=True)), set(tree.sources)
    steps = [int(word[1:]) if word.startswith("→") else None for word in words]
    from_root = (tree.root, steps[0]) in edges
    if steps[0] not in nodes:
        return Walk(from_root)
    for here, there in zip(steps, [*steps[1:], None], strict=True):
        if here not in nodes:
            return Walk(from_root, inside=True, to_leaf=True)
        if (here, there) not in edges:
            break
    return Walk(from_root, inside=True)
