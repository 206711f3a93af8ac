"""The layout of one site's array on the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from actstore.arrays.address import CHUNKS_PER_SHARD, POSITIONS_PER_TREE
from actstore.arrays.encoding import SCALE_BYTES, decoded, numpy_dtype

CRC_BYTES = 4
NO_CHUNK = 2**64 - 1  # in a shard's index: the chunk was never written


@dataclass(frozen=True)
class Layout:
    """Shape, chunks and sizes in bytes of one site's array on the disk.

    In a grid of sequences, a chunk is one position of all the shard's sequences. In the layout
    `rows`, the array has a row for each id, and a chunk is `rows_per_chunk` rows that follow one
    another. A row lies in the slot `row % rows_per_chunk` of a chunk in both.

    Attributes:
        shape: the whole array's shape, sequences (or rows) first; without the scales of int8.
        position_axis: the axis along which a chunk is one long: 1 for [sequence, position,
            d_model], 2 for [sequence, head, query, key]. None for the layout `rows`.
        rows_per_chunk: number of sequences in a shard, and in a chunk; or of rows in a chunk, a
            power of two.
        dtype: how numbers are stored: float32, float16, bfloat16 or int8, see encoding.
        codec: how chunks are compressed: none, zstd or blosc, see codec.
        stride: ids from one sequence of a grid to the next, a power of two.
    """

    shape: tuple[int, ...]
    position_axis: int | None
    rows_per_chunk: int
    dtype: str = "float32"
    stride: int = POSITIONS_PER_TREE
    codec: str = "none"

    @property
    def item_bytes(self) -> int:
        """Bytes of one stored number."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def chunks_per_shard(self) -> int:
        """Chunks of a whole shard: one per position, or CHUNKS_PER_SHARD."""
        return CHUNKS_PER_SHARD if self.position_axis is None else self.shape[self.position_axis]

    @property
    def rows_per_shard(self) -> int:
        """Length of a shard along the array's first axis."""
        return self.rows_per_chunk * (CHUNKS_PER_SHARD if self.position_axis is None else 1)

    @property
    def n_shards(self) -> int:
        """Number of shards of the whole array."""
        return -(-self.shape[0] // self.rows_per_shard)

    @property
    def n_ids(self) -> int:
        """Number of token ids that the array spans."""
        return self.shape[0] * (1 if self.position_axis is None else self.stride)

    @cached_property
    def key_bits(self) -> int:
        """Bits that number the chunks of a shard in a key, see Shards.find."""
        return ((CHUNKS_PER_SHARD if self.position_axis is None else self.stride) - 1).bit_length()

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one token's activation: (d_model,), or (head, key)."""
        return tuple(size for axis, size in enumerate(self.shape) if axis not in (0, self.position_axis))

    @cached_property
    def row_items(self) -> int:
        """Numbers per row."""
        return math.prod(self.row_shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The array's shape on the disk, where a vector of int8 begins with its scale."""
        return (*self.shape[:-1], self.shape[-1] + SCALE_BYTES * (self.dtype == "int8"))

    @cached_property
    def stored_row_shape(self) -> tuple[int, ...]:
        """Shape of what is stored of one token's activation."""
        return (*self.row_shape[:-1], self.stored_shape[-1])

    @cached_property
    def row_numbers(self) -> int:
        """Numbers stored per row."""
        return math.prod(self.stored_row_shape)

    @property
    def row_bytes(self) -> int:
        """Bytes stored per row."""
        return self.row_numbers * self.item_bytes

    def decoded(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of some rows, [n, row_items], see encoding.decoded.

        Args:
            rows: V<row_bytes> [n].
        """
        stored = rows.view(numpy_dtype(self.dtype)).reshape(-1, self.row_numbers)
        return decoded(stored, self.dtype, self.row_shape[-1])

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of an inner chunk."""
        return tuple(
            self.rows_per_chunk if axis == 0 else 1 if axis == self.position_axis else size
            for axis, size in enumerate(self.stored_shape)
        )

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Shape of a shard."""
        return (self.rows_per_shard, *self.stored_shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk and its checksum, before it is compressed.

        The number is a multiple of item_bytes, so that every row starts on a number.
        """
        return self.rows_per_chunk * self.row_bytes + CRC_BYTES

    @property
    def index_bytes(self) -> int:
        """Bytes of a shard's index: offset and length of each chunk, and a checksum."""
        return self.chunks_per_shard * 16 + CRC_BYTES

    @property
    def shard_bytes(self) -> int:
        """Bytes of a whole shard's file."""
        return self.bytes_of(self.chunks_per_shard)

    def bytes_of(self, n_chunks: int) -> int:
        """Bytes of a shard's file that holds so many chunks; an upper bound if compressed."""
        return n_chunks * self.chunk_bytes + self.index_bytes

    def shard_name(self, batch: int) -> str:
        """Path of a shard's file inside its array's folder: `c/3/0/0`."""
        return "/".join(["c", str(batch), *["0"] * (len(self.shape) - 1)])

    def split(self, local: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where ids lie: shard row // rows_per_chunk, chunk `position`, slot row % rows_per_chunk.

        Args:
            local: int64 [n], ids less the array's first id; overwritten.

        Returns:
            (row, position): int64 [n] each. In a grid: a sequence's number, and a position in it.
        """
        if self.position_axis is not None:
            position = local & (self.stride - 1)
            local >>= self.stride.bit_length() - 1
            return local, position
        bits = self.rows_per_chunk.bit_length() - 1
        slot = local & (self.rows_per_chunk - 1)
        local >>= bits
        position = local & (CHUNKS_PER_SHARD - 1)
        local >>= CHUNKS_PER_SHARD.bit_length() - 1
        local <<= bits
        local |= slot
        return local, position

    def shard_of(self, local: np.ndarray) -> np.ndarray:
        """int64 [n]: number of the shard of each id, given less the array's first id."""
        per_row = 1 if self.position_axis is None else self.stride
        return local // (self.rows_per_shard * per_row)
