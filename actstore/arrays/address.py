"""How a token's id is made, and which sets of sequences lay their tokens out how.

A set of sequences owns a range of ids, from its first_token_id on. In the layout `grid`, sequence i
begins `stride` ids after sequence i - 1, a power of two, and id and position follow from each
other: token_id = first_token_id + i * stride + position. Trees are such a set; their stride is 256,
so token_id = tree_id * 256 + position. In the layout `rows`, for sequences of many lengths, tokens
are numbered in a row, and `sequences.first_token_id` says where each sequence begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

Arrangement = Literal["grid", "rows"]
POSITIONS_PER_TREE = 256  # a tree's stride: more than the 255 positions of the largest tree
POSITION_BITS, POSITION_MASK = 8, 255
ROWS_PER_CHUNK, CHUNKS_PER_SHARD = 64, 256  # of the layout `rows`: powers of two
MOST_POSITIONS = 2**20  # of a sequence in a grid


def is_of_trees(dataset: Mapping[str, Any]) -> bool:
    """Whether a row of `datasets` is of trees; a part of trees holds no task."""
    return dataset.get("task") in (None, "trees")


class Ids(NamedTuple):
    """The first ids of a set of sequences, or of one of its batches."""

    token_id: int
    sequence_id: int

    def of_batch(self, dataset: Mapping[str, Any], batch: int, start: int) -> Ids:
        """The first ids of a batch, given those of the set.

        Args:
            dataset: the set's row of `datasets`; a set of trees may lack layout and stride.
            start: number of the batch's first sequence in the set.
        """
        if dataset.get("layout") == "rows":
            return Ids(self.token_id + batch * dataset["rows_per_shard"], self.sequence_id + start)
        return Ids(self.token_id + start * (dataset.get("stride") or POSITIONS_PER_TREE), self.sequence_id + start)

    @classmethod
    def of_dataset(cls, row: Mapping[str, Any]) -> Ids:
        """The first ids of a set, from its row of `datasets`, as a part or the catalog holds it."""
        if row.get("first_token_id") is not None:
            return cls(row["first_token_id"], row["first_sequence_id"])
        return cls(row["first_tree_id"] * POSITIONS_PER_TREE, row["first_tree_id"])

    @classmethod
    def beyond(cls, datasets: list[dict[str, Any]], dropped: Ids | None = None) -> Ids:
        """The least ids that are above those of all sets that are or were stored.

        Args:
            datasets: rows of `datasets`, from their parts.
            dropped: ids beyond those of the sets that were dropped; they are never given again.
        """
        token, sequence = dropped or (0, 0)
        for row in datasets:
            first = cls.of_dataset(row)
            n = row["n_trees"] if row.get("n_sequences") is None else row["n_sequences"]
            ids = n * POSITIONS_PER_TREE if row.get("n_ids") is None else row["n_ids"]
            token, sequence = max(token, first.token_id + ids), max(sequence, first.sequence_id + n)
        return cls(token, sequence)

    @classmethod
    def after(cls, datasets: list[dict[str, Any]], dataset: Mapping[str, Any], dropped: Ids | None = None) -> Ids:
        """The first ids of a new set, after those of all sets that are or were stored.

        Args:
            datasets, dropped: see `beyond`.
            dataset: the new set's row.
        """
        token, sequence = cls.beyond(datasets, dropped)
        unit = dataset.get("rows_per_shard") or dataset.get("stride") or POSITIONS_PER_TREE
        token = -(-token // unit) * unit
        if is_of_trees(dataset):  # a tree's number makes its tokens' ids
            sequence = max(sequence, token // POSITIONS_PER_TREE)
            token = sequence * POSITIONS_PER_TREE
        return cls(token, sequence)


def stride_of(n_positions: int) -> int:
    """The stride of a grid of sequences: the least power of two, 256 or more, that holds one."""
    return max(POSITIONS_PER_TREE, 1 << (n_positions - 1).bit_length())


def token_ids(tree_id: np.ndarray, position: np.ndarray | int) -> np.ndarray:
    """int64: ids of the tokens at the given positions of trees.

    Args:
        position: integers in [0, 256), of a shape that broadcasts with tree_id's.
    """
    return tree_id.astype("int64") * POSITIONS_PER_TREE + position


def positions(token_id: np.ndarray) -> np.ndarray:
    """Position of each token in its tree, [0, 256), in the dtype of the ids."""
    return token_id & POSITION_MASK


def tree_ids(token_id: np.ndarray) -> np.ndarray:
    """The tree_id of each token, in the dtype of the ids."""
    return token_id >> POSITION_BITS
