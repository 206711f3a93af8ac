"""Read a site whose chunks are compressed: each wanted chunk is read whole, checked and decoded.

A chunk holds a position of all the shard's sequences, or rows that follow one another. A read of a
few rows therefore decodes many more, unlike one of mapped shards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial

import google_crc32c
import numpy as np

from actstore.arrays import index
from actstore.arrays.codec import decompressed
from actstore.arrays.layout import CRC_BYTES, Layout
from actstore.arrays.ranged import Plan, RangedReader
from actstore.arrays.site import Cost, IsToken, Reader
from actstore.storage.backend import Reading


class CodedReader(RangedReader):
    """The committed shards of one site of one run, whose chunks are compressed.

    Args:
        layout, first_token_id, shards, where, place, is_token: see SiteReader.
    """

    def _plan(self, batch: int, row: np.ndarray, position: np.ndarray, token_ids: np.ndarray) -> Plan:
        """See RangedReader; the chunks of the wanted positions, whole."""
        wanted = np.unique(position)
        offsets, lengths = self._chunks(batch)[:, wanted]
        if (lacking := offsets < 0).any():
            raise self._lacking(self.shards[batch], int(lacking.sum()), token_ids)
        return Plan(list(zip(offsets.tolist(), lengths.tolist(), strict=True)), offsets, offsets)

    def _rows(self, batch: int, plan: Plan, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        """See RangedReader."""
        layout, path = self.layout, self.shards[batch]
        _, of_chunk = np.unique(position, return_inverse=True)
        found, slot = np.empty(len(row), f"V{layout.row_bytes}"), row % layout.rows_per_chunk
        for number, chunk in enumerate(self._read(path, plan.ranges)):
            of_this = of_chunk == number
            found[of_this] = self._decoded(chunk, path)[slot[of_this]]
        return layout.decoded(found)

    def _decoded(self, chunk: bytes, path: str) -> np.ndarray:
        """V<row bytes> [rows_per_chunk]: the rows of one chunk."""
        layout, content = self.layout, memoryview(chunk)[:-CRC_BYTES]
        if google_crc32c.value(bytes(content)).to_bytes(CRC_BYTES, "little") == chunk[-CRC_BYTES:]:
            try:
                rows = decompressed(layout.codec, content)
            except (RuntimeError, ValueError):
                rows = b""
            if len(rows) == layout.rows_per_chunk * layout.row_bytes:
                return np.frombuffer(rows, f"V{layout.row_bytes}")
        raise self._damaged(path, "has a chunk that is not what was committed")

    @property
    def _is_compared(self) -> bool:
        """Whether files are compared with their hashes, of which ranges are read of copies then."""
        return self._place.committed is not None and self._place.reads_ranges

    def _read(self, path: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Ranges of a file; of one that is compared with its hash if the place compares."""
        try:
            if not self._is_compared:
                return [bytes(part) for part in self._place.read_ranges(path, ranges)]
            descriptor = self._place.descriptor(path)
        except FileNotFoundError:
            raise self._damaged(path, "is missing") from None
        try:
            return [os.pread(descriptor, length, start) for start, length in ranges]
        finally:
            os.close(descriptor)

    def _chunks(self, batch: int) -> np.ndarray:
        """int64 [2, chunks_per_shard]: offset and length of each chunk; -1 if there is none."""
        if batch not in self._indexes:
            path, size = self.shards[batch], self.layout.index_bytes
            try:
                if self._is_compared:
                    whole = self._place.size(path)
                    [content] = self._read(path, [(max(whole - size, 0), size)])
                else:
                    whole, content = self._place.end(path, size)
            except FileNotFoundError:
                raise self._damaged(path, "is missing") from None
            if whole < size:
                raise self._damaged(path, f"is {whole:,} bytes long, which is too short")
            chunks = index.chunks(self.layout, content, whole, self._place.root / path, self.where)
            self._indexes[batch] = np.stack(chunks)
        return self._indexes[batch]

    def cost(self, token_ids: np.ndarray) -> Cost:
        """The chunks of a gather, and the indexes of their shards.

        Args:
            token_ids: int64 [n], distinct.

        Raises:
            NotStored: see `places`.
        """
        row, position = self.places(token_ids)
        batch, n_chunks, n_bytes = row // self.layout.rows_per_chunk, 0, 0
        batches = self.look_at(batch)
        for number in batches:
            chunks = np.unique(position[batch == number])
            n_chunks += len(chunks)
            n_bytes += int(self._chunks(number)[1][chunks].clip(min=0).sum()) + self.layout.index_bytes
        n_runs, n_needed = n_chunks + len(batches), len(row) * self.layout.row_bytes
        return Cost(n_chunks, len(batches), n_runs, n_needed, n_bytes, bytes_in_memory=None)

    def again(self) -> Callable[[Reading, IsToken], Reader]:
        """See site.Reader."""
        return partial(_open_again, self.layout, self.first_token_id, self.shards, self.where)


def _open_again(
    layout: Layout, first_token_id: int, shards: Mapping[int, str], where: str, place: Reading, is_token: IsToken
) -> CodedReader:
    return CodedReader(layout, first_token_id, shards, where, place, is_token)
