"""Packed goals: every leaf of a tree as a goal in one sequence, and the forward pass that training runs over them.

A sequence is the edge list once and then one suffix `goal : root →step …` for each leaf. A suffix sees the edge list and
itself, never another suffix, and its positions go on from the edge list's end, so that each suffix gets the very logits
that it would get alone; but the edge list, two thirds of the tokens, is computed once instead of once a goal.

The forward pass is written here from the equations, in HookedTransformer names, because TransformerLens' own spends more
time on hooks, masks and unembeddings that training never looks at than on its matrix products; a test holds the two
together.
"""

from __future__ import annotations

import numpy as np
import torch

from actstore.ingest.models.equations import EDGE_LIST, PADDING, Packed
from actstore.ingest.trees.draw import NO_NODE, Trees, leaves
from actstore.ingest.trees.tokens import Vocabulary, encode, goal_at


def every_goal(trees: Trees, is_goal: np.ndarray | None = None) -> tuple[np.ndarray, Trees]:
    """One row for each leaf of each tree, with that leaf as its goal.

    Args:
        is_goal: bool [n_trees, MAX_NODES], the labels to make goals of; the leaves' by default.

    Returns:
        tree: intp [n_goals], which of the trees; ascending, and goals by label within a tree.
        trees: the n_goals trees; edges and root are those of the tree, goal, path and depth the goal's own.
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
    """Lay the trees out with every leaf as a goal, or with the goals that `is_goal` says; see `every_goal`.

    Args:
        trees: of n_nodes nodes each, as many as the vocabulary's or fewer.
        vocabulary: the system's; its own n_nodes says where a goal stands.
        slots: intp [n_trees, n_nodes - 1], ascending: the place in the vocabulary's full edge list of each edge of a
            smaller tree, which is then written as a full prompt with the other edges left out. The goals keep their
            positions, so what is learnt on small trees holds on large ones. The last n_nodes - 1 places by default.

    The reproduction predicts the steps of each path. The baseline predicts the padding after it too: to the end of the
    sequence (4n+2 tokens) for the tree's own goal, and the first token of it for the other goals, where the rest would
    say nothing new and cost a third of the tokens.
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
    position[:, :goal] = (3 * slots[:, :, None] + np.arange(3)).reshape(len(trees), -1)
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
    """intp [n_goals]: tokens of padding that each goal is to predict."""
    if vocabulary.system == "reproduction":
        return np.zeros(len(tree), np.intp)
    own = goals.goal == trees.goal[tree]
    return np.where(own, vocabulary.n_nodes + 2 - goals.depth.astype(np.intp), 1)  # 4n+2 tokens, 3n of them the prompt


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """0…length-1 for each length, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
