"""Packed goals: one sequence holds a tree's edge list once and every leaf as a goal.

A sequence is the edge list and one suffix `goal : root →step …` per leaf. A suffix attends to the
edge list and itself, never to another suffix, and its positions continue from the edge list's end.
Each suffix therefore has the same logits as alone, but the edge list, two thirds of the tokens, is
computed once instead of once per goal.

models/equations.py has the forward pass of training, since TransformerLens' own spends more time on
hooks, masks and unused unembeddings than on matrix products. A test compares the two.
"""

from __future__ import annotations

import numpy as np
import torch

from actstore.ingest.models.equations import EDGE_LIST, PADDING, Packed
from actstore.ingest.trees.draw import NO_NODE, Trees, leaves
from actstore.ingest.trees.tokens import Vocabulary, encode, goal_at, source_at


def every_goal(trees: Trees, is_goal: np.ndarray | None = None) -> tuple[np.ndarray, Trees]:
    """One row per leaf of each tree, with that leaf as goal.

    Args:
        is_goal: bool [n_trees, MAX_NODES], labels to use as goals; default: the leaves.

    Returns:
        tree: intp [n_goals], index of each goal's tree, ascending; goals of a tree are ordered by
            label.
        trees: n_goals trees, with edges and root of the tree, and goal, path and depth of the goal.
    """
    parents, depths = trees.parents(), trees.node_depths()
    tree, node = np.nonzero(leaves(trees) if is_goal is None else is_goal)
    goal, depth = node.astype(np.uint8), depths[tree, node]
    path = np.full((len(tree), trees.n_nodes - 1), NO_NODE, np.uint8)
    for above in range(int(depth.max(initial=0))):
        live = np.flatnonzero(above < depth)
        path[live, depth[live].astype(np.intp) - 1 - above] = node[live]
        node[live] = parents[tree[live], node[live]]
    return tree, Trees(trees.edges[tree], trees.root[tree], goal, path, depth)


def pack(
    trees: Trees, vocabulary: Vocabulary, slots: np.ndarray | None = None, is_goal: np.ndarray | None = None
) -> Packed:
    """Pack trees, each with every goal of `every_goal` in one sequence.

    Args:
        trees: trees of n_nodes nodes, at most as many as the vocabulary's.
        vocabulary: the system's vocabulary; its n_nodes determines the positions of goals.
        slots: intp [n_trees, n_nodes - 1], ascending: place of each edge in the vocabulary's full
            edge list. A small tree is thus a full prompt with some edges left out. Goals keep their
            positions, so that large trees profit from what small trees taught. Default: the last
            n_nodes - 1 places.
        is_goal: see `every_goal`.

    The reproduction predicts the steps of each path. The baseline also predicts padding: to the end
    of the sequence (4n+2 tokens) after the tree's own goal, and one token after other goals, since
    more would teach nothing new and cost a third of the tokens.
    """
    tree, goals = every_goal(trees, is_goal)
    n_goals, goal, full_goal = len(tree), goal_at(trees.n_nodes), goal_at(vocabulary.n_nodes)
    if slots is None:
        slots = np.broadcast_to(np.arange(goal // 3) + (full_goal - goal) // 3, (len(trees), goal // 3))
    depth = goals.depth.astype(np.intp)
    n_targets = depth + _n_padding_targets(trees, goals, tree, vocabulary)
    words = encode(goals)
    words = np.pad(words, ((0, 0), (0, 4 * vocabulary.n_nodes + 2 - words.shape[1])))  # room for all padding
    length = n_targets + 2  # goal, colon, root and all targets but the last, which is never read
    offset = np.cumsum(length) - length
    first = np.searchsorted(tree, np.arange(len(trees)))
    offset += goal - offset[first][tree]
    row, within = np.repeat(np.arange(n_goals), length), _count_up(length)

    n_pos = int((offset + length).max())
    shape = (len(trees), n_pos)
    flat = tree[row] * n_pos + offset[row] + within
    ids = np.full(shape, vocabulary.id_of_word[words[0, 2]], np.int64)
    position, segment = np.zeros(shape, np.int64), np.full(shape, PADDING, np.int64)
    ids[:, :goal] = vocabulary.encode(words[first, :goal])
    position[:, :goal] = (source_at(slots)[:, :, None] + np.arange(3)).reshape(len(trees), -1)
    segment[:, :goal] = EDGE_LIST
    np.put(ids, flat, vocabulary.encode(words[row, goal + within]))
    np.put(position, flat, full_goal + within)
    np.put(segment, flat, 1 + row - first[tree[row]])

    predicting = within >= 2  # from the root on
    row, within = row[predicting], within[predicting]
    target = vocabulary.encode(words[row, goal + within + 1])
    arrays = (ids, position, segment, flat[predicting], target, row, depth)
    return Packed(*(torch.from_numpy(np.ascontiguousarray(array, np.int64)) for array in arrays))


def _n_padding_targets(trees: Trees, goals: Trees, tree: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """intp [n_goals]: tokens of padding to predict, per goal."""
    if vocabulary.system == "reproduction":
        return np.zeros(len(tree), np.intp)
    own = goals.goal == trees.goal[tree]
    return np.where(own, vocabulary.n_nodes + 2 - goals.depth.astype(np.intp), 1)  # 4n+2 tokens, 3n of them the prompt


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges 0…length-1 of all lengths."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
