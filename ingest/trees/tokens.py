"""Tree ↔ tokens: the form of a prompt, the role of each position, each system's vocabulary.

Both systems write `source →target ,` per edge, `|` in place of the last comma, then `goal : root`
and one `→node` per step. A position therefore means the same in both:

    edge e   source 3e   target 3e+1   separator 3e+2 (the last edge's is the bar)
    goal 3(n-1)   colon 3(n-1)+1   root 3(n-1)+2   path from 3n   at most 4n-1 tokens

Trees are first written as words that both systems share, uint8 [tree, position] of word numbers.
`<PAD> , | :` are 0 to 3, label k is 4+2k, and the arrow →k is 5+2k, for any number of nodes. A
`Vocabulary` maps words to the token ids of one model. In the reproduction, ids equal word numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import polars as pl

from actstore.arrays.address import Ids, token_ids
from actstore.errors import BadInput
from actstore.ingest.trees.draw import MAX_NODES, MIN_NODES, NO_NODE, Trees, at_label
from actstore.ingest.trees.rows import edge_rows, enum_series, null_where_no_node, tree_rows

PAD, COMMA, BAR, COLON = 0, 1, 2, 3
WORDS = ("<PAD>", ",", "|", ":", *(word for k in range(MAX_NODES) for word in (str(k), f"→{k}")))
ROLES = ("edge_source", "edge_target", "separator", "bar", "goal", "colon", "root", "path")

SYSTEMS = ("reproduction", "baseline")
Edges = TypeVar("Edges", int, np.ndarray)


def n_positions(n_nodes: int) -> int:
    """Tokens of a prompt with the longest path: 4n-1."""
    return 4 * n_nodes - 1


def source_at(edge: Edges) -> Edges:
    """Position of an edge's source; its target and the separator after it are the next two."""
    return 3 * edge


def goal_at(n_nodes: int) -> int:
    """Position of the goal, after the list of n - 1 edges."""
    return source_at(n_nodes - 1)


def root_at(n_nodes: int) -> int:
    """Position of the root, the first word of the path; the goal and a colon come before it."""
    return goal_at(n_nodes) + 2


def path_at(n_nodes: int) -> int:
    """Position of the path's first step. The token before a step predicts it."""
    return root_at(n_nodes) + 1


def n_nodes_of(words: np.ndarray) -> int:
    """Nodes per tree of words [..., 4n-1]."""
    return (words.shape[-1] + 1) // 4


def node_word(label: np.ndarray) -> np.ndarray:
    """uint8 word numbers of plain labels (`7`)."""
    return (4 + 2 * label).astype(np.uint8)


def arrow_word(label: np.ndarray) -> np.ndarray:
    """uint8 word numbers of labels written as steps (`→7`)."""
    return (5 + 2 * label).astype(np.uint8)


def word_label(word: np.ndarray) -> np.ndarray:
    """uint8: the label that a word names, plain or as a step; NO_NODE for any other number."""
    return np.where((word >= 4) & (word < len(WORDS)), (word - 4) // 2, NO_NODE).astype(np.uint8)


def is_arrow(word: np.ndarray) -> np.ndarray:
    """bool: whether a word is a step, `→k`."""
    return (word >= 4) & (word % 2 == 1)


def encode(trees: Trees) -> np.ndarray:
    """Write trees as words.

    Returns:
        uint8 [n_trees, 4n-1] word numbers; PAD after a tree's last step.
    """
    n_trees, goal = len(trees), goal_at(trees.n_nodes)
    words = np.zeros((n_trees, n_positions(trees.n_nodes)), np.uint8)
    words[:, 0:goal:3] = node_word(trees.edges[:, :, 0])
    words[:, 1:goal:3] = arrow_word(trees.edges[:, :, 1])
    words[:, 2:goal:3] = COMMA
    words[:, goal - 1] = BAR
    words[:, goal] = node_word(trees.goal)
    words[:, goal + 1] = COLON
    words[:, root_at(trees.n_nodes)] = node_word(trees.root)
    words[:, path_at(trees.n_nodes) :] = np.where(trees.path == NO_NODE, PAD, arrow_word(trees.path))
    return words


def decode(words: np.ndarray) -> Trees:
    """Read trees back from words; the inverse of `encode`.

    Args:
        words: uint8 [n_trees, 4n-1] word numbers. A comma after the root reads as padding, since
            the baseline pads with commas.

    Raises:
        BadInput: a row is not the prompt of a binary tree and a leaf, followed by the path from
            root to leaf.
    """
    n_nodes = n_nodes_of(words)
    if words.ndim != 2 or words.shape[1] != n_positions(n_nodes) or not MIN_NODES <= n_nodes <= MAX_NODES:
        raise BadInput(
            f"got words {list(words.shape)}; a tree of n nodes is 4n-1 of them, n {MIN_NODES} to {MAX_NODES}"
        )
    goal, path = goal_at(n_nodes), path_at(n_nodes)
    labels, answer = word_label(words), words[:, path:]
    answer = np.where(answer == COMMA, PAD, answer)
    trees = Trees(
        edges=np.stack([labels[:, 0:goal:3], labels[:, 1:goal:3]], axis=2),
        root=labels[:, root_at(n_nodes)],
        goal=labels[:, goal],
        path=labels[:, path:],
        depth=(answer != PAD).sum(axis=1).astype(np.uint8),
    )
    good = (trees.edges != NO_NODE).all(axis=(1, 2)) & (trees.goal != NO_NODE) & (trees.root != NO_NODE)
    good &= (encode(trees) == np.concatenate([words[:, :path], answer], axis=1)).all(axis=1)
    good[good] = _are_trees_with_paths(trees[good])
    if not good.all():
        row = int(np.argmin(good))
        raise BadInput(
            f"row {row} is no tree, goal and path: {' '.join(spell(words[row]))!r}; write `source →target ,` for every "
            "edge of a binary tree, `|` in place of the last comma, then `goal : root` of a leaf and the steps to it"
        )
    return trees


def _are_trees_with_paths(trees: Trees) -> np.ndarray:
    """bool [n_trees]: the edges form one binary tree; the path leads from root to a leaf."""
    source, path = trees.edges[:, :, 0], trees.path
    sources = np.sort(source, axis=1)
    good = (sources[:, 2:] != sources[:, :-2]).all(axis=1)  # no source thrice
    good &= (trees.node_depths() != NO_NODE).sum(axis=1) == trees.n_nodes  # n reached by n-1 edges: a tree
    live = np.arange(path.shape[1]) < trees.depth[:, None]
    before = np.concatenate([trees.root[:, None], path[:, :-1]], axis=1)
    parent = at_label(trees.parents(), np.where(path == NO_NODE, trees.root[:, None], path))
    good &= (~live | (parent == before)).all(axis=1)  # a gap stands for the root, which has no parent
    last = np.take_along_axis(path, trees.depth[:, None].astype(np.intp) - 1, axis=1)[:, 0]
    return good & (last == trees.goal) & (source != trees.goal[:, None]).all(axis=1)


def spell(words: np.ndarray) -> list[str]:
    """The words of one row, `['15', '→4', …]`, up to its padding; `?200` for an unknown number."""
    n_words = int(np.flatnonzero(words != PAD).max(initial=-1)) + 1
    return [WORDS[word] if 0 <= word < len(WORDS) else f"?{word}" for word in words[:n_words]]


@dataclass(frozen=True)
class Drawn:
    """A range of trees of a set, written as words once.

    Attributes:
        start: index in the set of the first tree.
        changes: what was changed in each tree of a variant; None for a drawn set.
    """

    start: int
    trees: Trees
    changes: list[str | None] | None = None

    @cached_property
    def words(self) -> np.ndarray:
        """uint8 [n_trees, 4n-1] word numbers; see encode."""
        return encode(self.trees)

    @property
    def lengths(self) -> np.ndarray:
        """intp [n_trees]: tokens per tree, without padding."""
        return (self.words != PAD).sum(axis=1)

    def __len__(self) -> int:
        return len(self.trees)

    def rows(self, first: Ids, dataset: str, originals: int | None = None) -> dict[str, pl.DataFrame]:
        """The rows of `trees`, `edges` and `tokens`, by table.

        Args:
            first: ids of the first of these trees.
            dataset: name of the set.
            originals: tree_id of the first tree of the set that a variant was made from; None for a
                drawn set.
        """
        first_tree_id = first.sequence_id
        frame = tree_rows(self.trees, first_tree_id, dataset)
        if originals is not None:
            ids = np.arange(len(frame), dtype=np.int32) + np.int32(originals + self.start)
            frame = frame.with_columns(variant_of=ids, change=pl.Series(self.changes, dtype=pl.String))
        tokens = word_rows(self.words, first_tree_id)
        return {"trees": frame, "edges": edge_rows(self.trees, first_tree_id), "tokens": tokens}


def token_rows(trees: Trees, first_tree_id: int = 0) -> pl.DataFrame:
    """The rows of `tokens`, in (tree, position) order, without padding; as in schema.sql."""
    return word_rows(encode(trees), first_tree_id)


def word_rows(words: np.ndarray, first_tree_id: int) -> pl.DataFrame:
    """The rows of `tokens`, made from words; see `token_rows`.

    Args:
        words: uint8 [n_trees, 4n-1] word numbers; see encode.
    """
    width = words.shape[1]
    edge, role, step = _position_columns(n_nodes_of(words))
    kept = np.flatnonzero(words)  # PAD is word 0
    tree, position = np.divmod(kept, width)
    word = words.reshape(-1)[kept]
    return pl.DataFrame(
        {
            "token_id": token_ids(first_tree_id + tree, position),
            "tree_id": (first_tree_id + tree).astype(np.int32),
            "position": position.astype(np.uint8),
            "token": enum_series(word, WORDS),
            "role": enum_series(role[position], ROLES),
            "edge": null_where_no_node(edge[position]),
            "node": null_where_no_node(word_label(word)),
            "step": null_where_no_node(step[position]),
        }
    )


def _position_columns(n_nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edge, role and step of each position, each uint8 [4n-1]; NO_NODE where there is none."""
    width, goal, path = n_positions(n_nodes), goal_at(n_nodes), path_at(n_nodes)
    position = np.arange(width)
    edge = np.where(position < goal, position // 3, NO_NODE).astype(np.uint8)
    role = np.where(position < goal, position % 3, ROLES.index("path")).astype(np.uint8)
    role[goal - 1 : path] = [ROLES.index(name) for name in ("bar", "goal", "colon", "root")]
    step = np.where(position < path, NO_NODE, position - path).astype(np.uint8)
    return edge, role, step


@dataclass(frozen=True)
class Vocabulary:
    """The words that a model of one system and size knows, in the order of its token ids.

    Attributes:
        system: `reproduction` or `baseline`.
        n_nodes: number of labels, and nodes of the largest tree it can write.
    """

    system: str
    n_nodes: int

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            raise BadInput(f"no system {self.system!r}; there are {', '.join(SYSTEMS)}")
        if not MIN_NODES <= self.n_nodes <= MAX_NODES:
            raise BadInput(f"got a vocabulary of {self.n_nodes} nodes; there are {MIN_NODES} to {MAX_NODES} (--nodes)")

    def __len__(self) -> int:
        return len(self.word_of_id)

    @cached_property
    def word_of_id(self) -> np.ndarray:
        """uint8 [d_vocab]: the word number of each token id."""
        labels = np.arange(self.n_nodes)
        if self.system == "reproduction":
            return np.arange(4 + 2 * self.n_nodes).astype(np.uint8)
        by_length = np.array(sorted(labels, key=lambda label: len(str(label)), reverse=True))  # stable: 10…15, 0…9
        return np.concatenate([[COMMA, COLON, BAR], arrow_word(by_length), node_word(by_length)]).astype(np.uint8)

    @cached_property
    def id_of_word(self) -> np.ndarray:
        """int64 [256]: the token id of each word number; -1 for a word outside the vocabulary."""
        ids = np.full(256, -1, np.int64)
        ids[self.word_of_id] = np.arange(len(self.word_of_id))
        if self.system == "baseline":
            ids[PAD] = ids[COMMA]  # the baseline pads with its separator
        return ids

    def words(self) -> list[str]:
        """The spelling of each id in the system's own code (`→7` or `>7`)."""
        words = [WORDS[word] for word in self.word_of_id]
        return [word.replace("→", ">") for word in words] if self.system == "baseline" else words

    def encode(self, words: np.ndarray) -> np.ndarray:
        """int64 token ids of word numbers, any shape.

        Raises:
            BadInput: a label is too large for this vocabulary.
        """
        ids = self.id_of_word[words]
        if (ids < 0).any():
            unknown = spell(words[ids < 0][:1])[0]
            raise BadInput(
                f"the {self.system} vocabulary of {self.n_nodes} nodes has no {unknown!r}; "
                f"use trees of at most {self.n_nodes} nodes (--nodes)"
            )
        return ids

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """uint8 word numbers of token ids, any shape; the baseline's padding reads as commas.

        Raises:
            BadInput: an id is outside the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise BadInput(f"got token ids {ids.min()} to {ids.max()}; the vocabulary has 0 to {len(self) - 1}")
        return self.word_of_id[ids]
