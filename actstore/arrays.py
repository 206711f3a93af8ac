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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from actstore.errors import Damaged, NotStored

if TYPE_CHECKING:
    import torch

CRC_BYTES = 4
POSITIONS_PER_TREE = 256  # token_id = tree_id * 256 + position: more than the 255 positions of the largest tree


@dataclass(frozen=True)
class Layout:
    """How one site's array lies on the disk.

    Attributes:
        shape: of the whole array, trees first.
        position_axis: the axis that chunks cut one by one: 1 for [tree, position, d_model], 2 for [tree, head, query, key].
        trees_per_shard: trees a shard and a chunk hold.
    """

    shape: tuple[int, ...]
    position_axis: int
    trees_per_shard: int

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
        """One inner chunk with its checksum; a multiple of 4, so that every row starts on a float."""
        return 4 * self.trees_per_shard * self.row_items + CRC_BYTES

    @property
    def shard_bytes(self) -> int:
        return self.n_positions * (self.chunk_bytes + 16) + CRC_BYTES

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
        dtype="float32",
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
            np.float32,
            self.bytes,
            strides=(layout.chunk_bytes, 4 * layout.row_items, *_contiguous_strides(layout.row_shape)),
        )
        index = np.ndarray((layout.n_positions, 2), "<u8", self.bytes, layout.n_positions * layout.chunk_bytes)
        index[:, 0] = np.arange(layout.n_positions, dtype=np.uint64) * np.uint64(layout.chunk_bytes)
        index[:, 1] = layout.chunk_bytes

    def put(self, first_row: int, activations: torch.Tensor) -> None:
        """Copy a batch in, behind the first_row rows that are there.

        Args:
            activations: float32 [tree, position, d_model] or [tree, head, query, key], on any device.

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


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(4 * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class SiteReader:
    """The committed shards of one site of one run, mapped into memory.

    Args:
        layout: how the array lies on the disk.
        first_tree_id: tree_id of row 0 of the array.
        shards: path of the shard file of each batch that is there.
        where: run and site, for messages.
    """

    def __init__(self, layout: Layout, first_tree_id: int, shards: Mapping[int, Path], where: str) -> None:
        self.layout, self.first_tree_id, self.shards, self.where = layout, first_tree_id, dict(shards), where
        self._mapped: dict[int, np.ndarray] = {}

    def gather(self, token_ids: np.ndarray) -> np.ndarray:
        """Read the activations of the given tokens.

        Each row is copied once, out of the mapped shard it lies in; ids that come sorted by tree need no sorting here.

        Args:
            token_ids: int64 [n], in any order; repeats are allowed.

        Returns:
            float32 [n, d_model] (patterns: [n, head, key]), in the order of `token_ids` and in the model's own units.

        Raises:
            NotStored: an id has no activation here (another dataset's, padding, or not yet ingested).
            Damaged: a shard is not there or not as long as it was committed.
        """
        layout = self.layout
        row, position = np.divmod(token_ids, POSITIONS_PER_TREE)
        row -= self.first_tree_id
        batch, slot = np.divmod(row, layout.trees_per_shard)
        inside = (row >= 0) & (row < layout.shape[0]) & (position < layout.n_positions)
        self._refuse(token_ids, ~inside, "of no tree of this run")
        self._refuse(token_ids, ~np.isin(batch, list(self.shards)), "not ingested yet")
        X = np.empty((len(token_ids), layout.row_items), np.float32)
        cells = X.view(f"V{4 * layout.row_items}")[:, 0]  # one cell a row: numpy copies each with one memcpy
        offsets = position * (layout.chunk_bytes // 4) + slot * layout.row_items
        for which, of_batch in _groups(batch):
            cells[of_batch] = self._windows(which)[offsets[of_batch]]
        self._refuse(token_ids, np.isnan(X[:, 0]), "padding, past its tree's last token")
        return X.reshape(-1, *layout.row_shape)

    def _windows(self, batch: int) -> np.ndarray:
        """A view of a shard whose item i is the row that would start at its i-th float."""
        if batch not in self._mapped:
            self._mapped[batch] = self._map(self.shards[batch])
        return self._mapped[batch]

    def _map(self, path: Path) -> np.ndarray:
        try:
            mapped = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise Damaged(
                f"cannot map {path} of {self.where} ({error}); restore it from a copy of the store"
            ) from error
        if len(mapped) != self.layout.shard_bytes:
            raise Damaged(
                f"{path} of {self.where} is {len(mapped):,} bytes long; it was {self.layout.shard_bytes:,} when committed"
            )
        row_bytes = 4 * self.layout.row_items
        n_windows = (self.layout.shard_bytes - row_bytes) // 4 + 1
        return np.lib.stride_tricks.as_strided(
            mapped[:row_bytes].view(f"V{row_bytes}"), (n_windows,), (4,), writeable=False
        )

    def _refuse(self, token_ids: np.ndarray, bad: np.ndarray, why: str) -> None:
        if bad.any():
            raise NotStored(
                f"{self.where} has no activation for {int(bad.sum()):,} of {len(token_ids):,} token ids, the first being "
                f"{int(token_ids[np.argmax(bad)])} ({why}); choose tokens of the run's own dataset (where dataset = …)"
            )


def _groups(batch: np.ndarray) -> list[tuple[int, slice | np.ndarray]]:
    """The places of each batch's ids: slices where the batches come in order, indices where they do not."""
    if not len(batch):
        return []
    starts = np.flatnonzero(np.diff(batch, prepend=batch[0] - 1))
    if len(starts) == len(np.unique(batch[starts])):
        stops = [*starts[1:].tolist(), len(batch)]
        return [(int(batch[a]), slice(a, b)) for a, b in zip(starts.tolist(), stops, strict=True)]
    order = np.argsort(batch, kind="stable")
    starts = np.flatnonzero(np.diff(batch[order], prepend=-1))
    return [(int(batch[places[0]]), places) for places in np.split(order, starts[1:])]
