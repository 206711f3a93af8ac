"""Pack one batch of one site into the bytes of a shard."""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from actstore.arrays import encoding
from actstore.arrays.codec import compressed
from actstore.arrays.layout import CRC_BYTES, NO_CHUNK, Layout
from actstore.errors import BadInput

if TYPE_CHECKING:
    import torch


class ShardBuffer:
    """The bytes of one shard; reused for each batch, since fresh memory costs page faults.

    Args:
        layout: the site's.
        memory: uint8 [shard_bytes], page-aligned to be written directly; default: fresh memory.
    """

    def __init__(self, layout: Layout, memory: np.ndarray | None = None) -> None:
        self.layout = layout
        self.n_put = 0  # sequences (or rows) since the last seal
        self.bytes = _fresh(layout.shard_bytes) if memory is None else memory
        shards = self.bytes[: -layout.index_bytes]
        self._chunks = shards.reshape(layout.chunks_per_shard, layout.chunk_bytes)
        numbers = self._chunks[:, :-CRC_BYTES].view(encoding.numpy_dtype(layout.dtype))
        self.rows = numbers.reshape(-1, layout.rows_per_chunk, *layout.stored_row_shape)  # [chunk, slot, *row], a view
        self._overflows: torch.Tensor | None = None  # bool []: a number that was put since the last seal was too large
        self._counting = threading.Lock()  # several threads may put

    def put(self, first_row: int, activations: torch.Tensor) -> None:
        """Copy sequences in, so that the first of them is number first_row; or rows.

        Several threads may put, each other sequences.

        Args:
            first_row: number of the first sequence's row, or of the first row.
            activations: float [sequence, position, d_model] or [sequence, head, query, key], or
                [row, *row_shape] in the layout `rows`; on any device. They are stored in the
                layout's dtype, see encoding.

        Raises:
            ValueError: `activations` has another shape, or more rows than the shard has room for.
        """
        given, activations = activations, self._encoded(activations)
        if self.layout.position_axis is None:
            self._put_rows(first_row, activations, given)
        else:
            rows = self._target()[:, first_row : first_row + len(activations)]
            by_position = activations.movedim(self.layout.position_axis, 0)
            if by_position.shape != rows.shape:  # copy_ would broadcast
                raise self._misfit(first_row, given)
            rows.copy_(by_position)
        with self._counting:
            self.n_put += len(activations)

    def _encoded(self, activations: torch.Tensor) -> torch.Tensor:
        """What is copied, which the copy rounds to float16 or bfloat16."""
        dtype = self.layout.dtype
        if dtype == "int8":
            return encoding.quantised(activations)
        if dtype in encoding.TOO_LARGE:
            found = encoding.overflows(activations, dtype)
            with self._counting:
                self._overflows = found if self._overflows is None else self._overflows | found
        return activations

    def _put_rows(self, first_row: int, activations: torch.Tensor, given: torch.Tensor) -> None:
        """Copy rows in, chunk by chunk: a checksum lies between two chunks."""
        layout, chunks = self.layout, self._target()
        if activations.shape[1:] != layout.stored_row_shape or first_row + len(activations) > layout.rows_per_shard:
            raise self._misfit(first_row, given)
        done = 0
        while done < len(activations):
            chunk, slot = divmod(first_row + done, layout.rows_per_chunk)
            n = min(layout.rows_per_chunk - slot, len(activations) - done)
            if slot == 0 and len(activations) - done >= layout.rows_per_chunk:
                n_chunks = (len(activations) - done) // layout.rows_per_chunk
                n = n_chunks * layout.rows_per_chunk
                whole = activations[done : done + n].reshape(n_chunks, layout.rows_per_chunk, *layout.stored_row_shape)
                chunks[chunk : chunk + n_chunks].copy_(whole)
            else:
                chunks[chunk, slot : slot + n].copy_(activations[done : done + n])
            done += n

    def _target(self) -> torch.Tensor:
        """What `put` copies to, [chunk, slot, *row]."""
        import torch

        if self.layout.dtype == "bfloat16":
            return torch.from_numpy(self.rows.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(self.rows)

    @property
    def _n_chunks(self) -> int:
        """Chunks that hold what was put; all chunks in a grid."""
        if self.layout.position_axis is None:
            return -(-self.n_put // self.layout.rows_per_chunk)
        return self.layout.chunks_per_shard

    def hand_over(self) -> None:
        """Say that the batch is put; the bytes of a shard on a GPU are then copied to the host."""

    def _misfit(self, first_row: int, activations: torch.Tensor) -> ValueError:
        return ValueError(
            f"got activations {list(activations.shape)} for row {first_row} of a shard of {list(self.layout.shard_shape)}"
        )

    def seal(self, lengths: np.ndarray) -> memoryview:
        """Blank padding, checksum every chunk and the index, and return the shard's bytes.

        In the layout `rows`, the chunks after the last row are left out.

        Args:
            lengths: intp [n_sequences], tokens of each sequence. Rows after the last sequence are
                blanked too.

        Raises:
            ValueError: the number of sequences (or rows) put in is not that of `lengths`; rows of
                the batch before would be stored.
            BadInput: a number is too large for float16 or bfloat16, or infinite and stored as int8.
        """
        layout, n_put = self.layout, self.n_put
        in_rows, blank = layout.position_axis is None, encoding.blank(layout.dtype)
        if n_put != (int(lengths.sum()) if in_rows else len(lengths)):
            what = f"{int(lengths.sum())} tokens" if in_rows else f"{len(lengths)} lengths"
            raise ValueError(f"got {what} for {n_put} {'rows' if in_rows else 'trees'} of activations")
        n_chunks, self.n_put = self._n_chunks, 0
        if in_rows:
            self.rows[n_chunks - 1, n_put - (n_chunks - 1) * layout.rows_per_chunk :] = blank
        else:
            self.rows[:, n_put:] = blank
            for position in range(int(lengths.min()), layout.chunks_per_shard):
                self.rows[position, :n_put][lengths <= position] = blank
        self._refuse_overflow(self.rows[:n_chunks])
        start, stop = n_chunks * layout.chunk_bytes, layout.bytes_of(n_chunks)
        index = self.bytes[start : stop - CRC_BYTES].view("<u8").reshape(-1, 2)
        index[:n_chunks, 0] = np.arange(n_chunks, dtype=np.uint64) * np.uint64(layout.chunk_bytes)
        index[:n_chunks, 1] = layout.chunk_bytes
        index[n_chunks:] = NO_CHUNK
        if layout.codec != "none":
            return self._compressed(n_chunks)
        for part in (*self._chunks[:n_chunks], self.bytes[start:stop]):
            crc = google_crc32c.value(part[:-CRC_BYTES])
            part[-CRC_BYTES:] = np.frombuffer(crc.to_bytes(CRC_BYTES, "little"), np.uint8)
        return self.bytes[:stop].data

    def _compressed(self, n_chunks: int) -> memoryview:
        """The shard's bytes with its first n chunks compressed, and no other chunk."""
        layout, parts, at = self.layout, list[bytes](), 0
        index = np.full((layout.chunks_per_shard, 2), NO_CHUNK, "<u8")
        for number, chunk in enumerate(self._chunks[:n_chunks, :-CRC_BYTES]):
            small = compressed(layout.codec, layout.item_bytes, chunk.data)
            index[number] = at, len(small) + CRC_BYTES
            parts += [small, _crc(small)]
            at += len(small) + CRC_BYTES
        return memoryview(b"".join([*parts, index.tobytes(), _crc(index.tobytes())]))

    def _refuse_overflow(self, rows: np.ndarray) -> None:
        """Refuse numbers that the dtype cannot hold; those of padding are blanked already."""
        dtype, too_large = self.layout.dtype, self._overflowed()
        if too_large and encoding.has_infinite(rows, dtype):
            raise BadInput(f"a number is too large for {dtype}")
        if dtype == "int8" and encoding.has_infinite(rows, dtype):
            raise BadInput("a number is infinite, which int8 cannot hold")

    def _overflowed(self) -> bool:
        """Whether a number that was put since the last call was too large for the dtype."""
        found, self._overflows = self._overflows, None
        return found is not None and bool(found)


def _fresh(n_bytes: int) -> np.ndarray:
    """uint8 [n_bytes], page-aligned.

    The memory is private: the first use of shared memory, which is Python's default, takes twice as
    long. Huge pages are not asked for, since the system may move other pages about to make them.
    """
    return np.frombuffer(mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def _crc(content: bytes) -> bytes:
    return google_crc32c.value(content).to_bytes(CRC_BYTES, "little")
