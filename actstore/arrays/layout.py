"""How the array of one site lies on the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CRC_BYTES = 4


@dataclass(frozen=True)
class Layout:
    """How one site's array lies on the disk.

    Attributes:
        shape: of the whole array, trees first.
        position_axis: the axis that chunks cut one by one: 1 for [tree, position, d_model], 2 for [tree, head, query, key].
        trees_per_shard: trees a shard and a chunk hold.
        dtype: of the numbers stored: float32 or float16.
    """

    shape: tuple[int, ...]
    position_axis: int
    trees_per_shard: int
    dtype: str = "float32"

    @property
    def item_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def n_positions(self) -> int:
        return self.shape[self.position_axis]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one token's activation: (d_model,), or (head, key)."""
        return tuple(size for axis, size in enumerate(self.shape) if axis not in (0, self.position_axis))

    @property
    def row_items(self) -> int:
        return math.prod(self.row_shape)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return tuple(
            self.trees_per_shard if axis == 0 else 1 if axis == self.position_axis else size
            for axis, size in enumerate(self.shape)
        )

    @property
    def shard_shape(self) -> tuple[int, ...]:
        return (self.trees_per_shard, *self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """One inner chunk with its checksum; a multiple of item_bytes, so that every row starts on a float."""
        return self.item_bytes * self.trees_per_shard * self.row_items + CRC_BYTES

    @property
    def index_bytes(self) -> int:
        return self.n_positions * 16 + CRC_BYTES

    @property
    def shard_bytes(self) -> int:
        return self.n_positions * self.chunk_bytes + self.index_bytes

    def shard_name(self, batch: int) -> str:
        """Of a shard's file inside its array's folder: `c/3/0/0`."""
        return "/".join(["c", str(batch), *["0"] * (len(self.shape) - 1)])
