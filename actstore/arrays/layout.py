"""The layout of one site's array on the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CRC_BYTES = 4


@dataclass(frozen=True)
class Layout:
    """Shape, chunks and sizes in bytes of one site's array on the disk.

    Attributes:
        shape: the whole array's shape, trees first.
        position_axis: the axis along which a chunk is one long: 1 for [tree, position, d_model], 2
            for [tree, head, query, key].
        trees_per_shard: number of trees in a shard, and in a chunk.
        dtype: of the stored numbers: float32 or float16.
    """

    shape: tuple[int, ...]
    position_axis: int
    trees_per_shard: int
    dtype: str = "float32"

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return np.dtype(self.dtype).itemsize

    @property
    def n_positions(self) -> int:
        """Positions per tree, and so chunks per shard."""
        return self.shape[self.position_axis]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one token's activation: (d_model,), or (head, key)."""
        return tuple(size for axis, size in enumerate(self.shape) if axis not in (0, self.position_axis))

    @property
    def row_items(self) -> int:
        """Numbers per row."""
        return math.prod(self.row_shape)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of an inner chunk: all the shard's trees, one position."""
        return tuple(
            self.trees_per_shard if axis == 0 else 1 if axis == self.position_axis else size
            for axis, size in enumerate(self.shape)
        )

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of a shard: trees_per_shard trees."""
        return (self.trees_per_shard, *self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk and its checksum.

        The number is a multiple of item_bytes, so that every row starts on a float.
        """
        return self.item_bytes * self.trees_per_shard * self.row_items + CRC_BYTES

    @property
    def index_bytes(self) -> int:
        """Bytes of a shard's index: offset and length of each chunk, and a checksum."""
        return self.n_positions * 16 + CRC_BYTES

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard's file."""
        return self.n_positions * self.chunk_bytes + self.index_bytes

    def shard_name(self, batch: int) -> str:
        """Path of a shard's file inside its array's folder: `c/3/0/0`."""
        return "/".join(["c", str(batch), *["0"] * (len(self.shape) - 1)])
