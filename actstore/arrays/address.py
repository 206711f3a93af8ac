"""How a token's id is made, and where the id says that the token's activation is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

POSITIONS_PER_TREE = 256  # token_id = tree_id * 256 + position: more than the 255 positions of the largest tree
POSITION_BITS, POSITION_MASK = 8, 255


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
