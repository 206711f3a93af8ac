"""Pack one batch of one site into the bytes of a shard."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from actstore.arrays.layout import CRC_BYTES, Layout

if TYPE_CHECKING:
    import torch


class ShardBuffer:
    """The bytes of one shard; reused for each batch, since fresh memory costs page faults."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.n_put = 0  # trees since the last seal
        self.bytes = np.frombuffer(mmap.mmap(-1, layout.shard_bytes), np.uint8)  # page-aligned, to be written directly
        self._index = self.bytes[-layout.index_bytes :]
        self._chunks = self.bytes[: -layout.index_bytes].reshape(layout.n_positions, layout.chunk_bytes)
        numbers = self._chunks[:, :-CRC_BYTES].view(layout.dtype)
        self.rows = numbers.reshape(-1, layout.trees_per_shard, *layout.row_shape)  # [position, tree, *row], a view
        index = self._index[:-CRC_BYTES].view("<u8").reshape(layout.n_positions, 2)
        index[:, 0] = np.arange(layout.n_positions, dtype=np.uint64) * np.uint64(layout.chunk_bytes)
        index[:, 1] = layout.chunk_bytes

    def put(self, first_row: int, activations: torch.Tensor) -> None:
        """Copy trees in, after the first_row trees that were put before.

        Args:
            first_row: number of the first tree's row.
            activations: float [tree, position, d_model] or [tree, head, query, key], on any device.

        Raises:
            ValueError: `activations` has another shape, or more trees than the shard has room for.
        """
        import torch

        rows = torch.from_numpy(self.rows)[:, first_row : first_row + len(activations)]
        by_position = activations.movedim(self.layout.position_axis, 0)
        if by_position.shape != rows.shape:  # copy_ would broadcast
            raise ValueError(
                f"got activations {list(activations.shape)} for row {first_row} of a shard of {list(self.layout.shard_shape)}"
            )
        rows.copy_(by_position)
        self.n_put += len(activations)

    def seal(self, lengths: np.ndarray) -> memoryview:
        """Blank padding, checksum every chunk and the index, and return the shard's bytes.

        Args:
            lengths: intp [n_trees], tokens of each tree. Rows after the last tree are blanked too.

        Raises:
            ValueError: the number of trees put in is not the number of lengths; rows of the batch
                before would be stored.
        """
        n_trees = len(lengths)
        if self.n_put != n_trees:
            raise ValueError(f"got {n_trees} lengths for {self.n_put} trees of activations")
        self.n_put = 0
        self.rows[:, n_trees:] = np.nan
        for position in range(int(lengths.min()), self.layout.n_positions):
            self.rows[position, :n_trees][lengths <= position] = np.nan
        for part in (*self._chunks, self._index):
            crc = google_crc32c.value(part[:-CRC_BYTES])
            part[-CRC_BYTES:] = np.frombuffer(crc.to_bytes(CRC_BYTES, "little"), np.uint8)
        return self.bytes.data
