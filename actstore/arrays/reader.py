"""The Zarr half of a store: one array a site, float32 [tree, position, d_model] (patterns: [tree, head, query, key]).

A shard holds a batch of trees, an inner chunk one position of that batch, because every study reads a few positions (the
target token of each edge, say) of many trees, and none reads every position of one tree. Chunks are uncompressed
(residual streams hardly compress) with a crc32c behind each, so a reader can map a shard into memory and copy rows out
of it. What was never written, padding included, is NaN.

Shards are packed here, from the Zarr v3 specification (https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/):
the inner chunks, then (offset, length) of each as little-endian u64, then the crc32c of that index.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from actstore.arrays.mapped import (
    POSITION_BITS,
    POSITION_MASK,
    POSITIONS_PER_TREE,
    Shards,
    copy_rows,
    flat_rows,
    n_threads,
)
from actstore.errors import Damaged, NotStored
from actstore.storage.regular import open_regular

if TYPE_CHECKING:
    import torch

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


def metadata(layout: Layout, names: tuple[str, ...], attributes: Mapping[str, Any]) -> bytes:
    """The array's zarr.json, as zarr-python writes it."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync
    from zarr.storage import MemoryStore

    store = MemoryStore()
    zarr.create_array(
        store,
        shape=layout.shape,
        chunks=layout.shard_shape,
        dtype=layout.dtype,
        fill_value=float("nan"),
        serializer=ShardingCodec(chunk_shape=layout.chunk_shape, codecs=[BytesCodec(endian="little"), Crc32cCodec()]),
        compressors=None,
        dimension_names=names,
        attributes=dict(attributes),
        config={"write_empty_chunks": True},
    )
    buffer = sync(store.get("zarr.json", default_buffer_prototype()))
    assert buffer is not None
    return buffer.to_bytes()


class ShardBuffer:
    """The bytes of one shard while it is filled; reused from batch to batch, since fresh memory costs page faults."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.n_put = 0  # trees since the last seal
        self.bytes = np.frombuffer(mmap.mmap(-1, layout.shard_bytes), np.uint8)  # page-aligned, to be written directly
        self.rows = np.ndarray(  # [position, tree, *row]: the order on the disk
            (layout.n_positions, layout.trees_per_shard, *layout.row_shape),
            layout.dtype,
            self.bytes,
            strides=(layout.chunk_bytes, *_contiguous_strides((1, *layout.row_shape), layout.item_bytes)),
        )
        index = np.ndarray((layout.n_positions, 2), "<u8", self.bytes, layout.n_positions * layout.chunk_bytes)
        index[:, 0] = np.arange(layout.n_positions, dtype=np.uint64) * np.uint64(layout.chunk_bytes)
        index[:, 1] = layout.chunk_bytes

    def put(self, first_row: int, activations: torch.Tensor) -> None:
        """Copy a batch in, behind the first_row rows that are there.

        Args:
            activations: float [tree, position, d_model] or [tree, head, query, key], on any device.

        Raises:
            ValueError: they are of another shape, or more trees than the shard has room for.
        """
        import torch

        rows = torch.from_numpy(self.rows)[:, first_row : first_row + len(activations)]
        by_position = activations.movedim(self.layout.position_axis, 0)
        if by_position.shape != rows.shape:  # which copy_ would broadcast
            raise ValueError(
                f"got activations {list(activations.shape)} for row {first_row} of a shard of {list(self.layout.shard_shape)}"
            )
        rows.copy_(by_position)
        self.n_put += len(activations)

    def seal(self, lengths: np.ndarray) -> memoryview:
        """Blank what is no token, checksum every chunk and the index, and return the shard's bytes.

        Args:
            lengths: intp [n_trees], tokens of each tree; rows past the last tree are blanked too.

        Raises:
            ValueError: other trees were put in than there are lengths; what stood there before would be stored as theirs.
        """
        n_trees = len(lengths)
        if self.n_put != n_trees:
            raise ValueError(f"got {n_trees} lengths for {self.n_put} trees of activations")
        self.n_put = 0
        self.rows[:, n_trees:] = np.nan
        for position in range(int(lengths.min()), self.layout.n_positions):
            self.rows[position, :n_trees][lengths <= position] = np.nan
        for position in range(self.layout.n_positions):
            start = position * self.layout.chunk_bytes
            self._checksum(start, start + self.layout.chunk_bytes - CRC_BYTES)
        self._checksum(self.layout.n_positions * self.layout.chunk_bytes, self.layout.shard_bytes - CRC_BYTES)
        return self.bytes.data

    def _checksum(self, start: int, stop: int) -> None:
        crc = google_crc32c.value(self.bytes[start:stop])
        self.bytes[stop : stop + CRC_BYTES] = np.frombuffer(crc.to_bytes(CRC_BYTES, "little"), np.uint8)


def _contiguous_strides(shape: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    return tuple(item_bytes * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class SiteReader:
    """The committed shards of one site of one run, mapped into memory.

    Args:
        layout: how the array lies on the disk.
        first_tree_id: tree_id of row 0 of the array.
        shards: path of the shard file of each batch that is there.
        where: run and site, for messages.
        is_token: whether each of some token ids is a token, bool [n]; what is none is padding. Asked only about rows that
            begin with NaN, so that an activation that is NaN can be told from padding; without it they count as padding.
        opener: opens a shard's path, and returns its descriptor.
        opener_reads: whether the opener reads the whole shard, to check it.
    """

    def __init__(
        self,
        layout: Layout,
        first_tree_id: int,
        shards: Mapping[int, Path],
        where: str,
        is_token: Callable[[np.ndarray], np.ndarray] | None = None,
        opener: Callable[[Path], int] = open_regular,
        opener_reads: bool = False,
    ) -> None:
        self.layout, self.first_tree_id, self.shards, self.where = layout, first_tree_id, dict(shards), where
        self._is_token, self.mapped = is_token, Shards(layout, shards, where, opener, opener_reads)

    def gather(self, token_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Read the activations of the given tokens.

        Each row is copied out of the mapped shard it lies in; ids need no sorting, though sorted ones are read faster.

        Args:
            token_ids: int64 [n], in any order; repeats are allowed.
            out: where to put them, of any float dtype and the shape of what is returned; its rows may lie apart
                (`X[:, 0]`). A new float32 array without it.

        Returns:
            float32 [n, d_model] (patterns: [n, head, key]), in the order of `token_ids` and in the model's own units; `out`
            where it was given.

        Raises:
            NotStored: an id has no activation here (another dataset's, padding, or not yet ingested).
            Damaged: a shard is not there or not as it was committed.
            BadInput: a number is too large for `out`.
        """
        layout, token_ids = self.layout, np.asarray(token_ids).astype(np.int64, casting="safe", copy=False)
        windows, offsets = self._find(token_ids)
        if out is None and layout.dtype == "float32" and n_threads(len(offsets) * layout.row_items) == 1:
            X = windows[offsets].view(np.float32).reshape(-1, layout.row_items)
            blank = bool(np.isnan(X[:, 0].min(initial=0)))
        else:
            whole = np.empty((len(token_ids), *layout.row_shape), np.float32) if out is None else out
            X = flat_rows(whole, len(token_ids), layout)
            blank = copy_rows(windows, offsets, X, layout.dtype)
        if blank:
            self._refuse_padding(token_ids, X)
        return X.reshape(-1, *layout.row_shape) if out is None else out

    def _find(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Windows and offsets, as of Shards.find; two dozen nanoseconds a row are what a row costs, so each pass counts."""
        row = token_ids - self.first_tree_id * POSITIONS_PER_TREE
        inside = row.min(initial=0) >= 0 and row.max(initial=0) < self.layout.shape[0] * POSITIONS_PER_TREE
        position = row & POSITION_MASK
        row >>= POSITION_BITS
        found = self.mapped.find(row, position) if inside else None
        if found is None:
            self.places(token_ids)  # says which, and why
            raise Damaged(
                f"a shard of {self.where} lacks chunks that were committed; restore it from a copy of the store"
            )
        return found

    def places(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row of the array and position of each id, int64 [n] each.

        Raises:
            NotStored: an id has none, or its batch is not ingested yet.
        """
        layout = self.layout
        row, position = (token_ids >> POSITION_BITS) - self.first_tree_id, token_ids & POSITION_MASK
        outside = (row < 0) | (row >= layout.shape[0]) | (position >= layout.n_positions)
        if outside.any():
            raise not_stored(self.where, token_ids, outside, "of no tree of this run")
        missing = ~np.isin(row // layout.trees_per_shard, list(self.shards))
        if missing.any():
            raise not_stored(self.where, token_ids, missing, "not ingested yet")
        return row, position

    def _refuse_padding(self, token_ids: np.ndarray, X: np.ndarray) -> None:
        """Padding reads as NaN throughout; a row of a token may hold NaN because the model computed it."""
        padding = np.isnan(X[:, 0])
        if self._is_token:
            padding[padding] = ~self._is_token(token_ids[padding])
        if padding.any():
            raise not_stored(self.where, token_ids, padding, "padding, past its tree's last token")


def not_stored(where: str, token_ids: np.ndarray, bad: np.ndarray, why: str) -> NotStored:
    """The error that says how many of the ids are bad, and names the first."""
    return NotStored(
        f"{where} has no activation for {int(bad.sum()):,} of {len(token_ids):,} token ids, the first being "
        f"{int(token_ids[np.argmax(bad)])} ({why}); choose tokens of the run's own dataset (where dataset = …)"
    )
