"""A few rows of shards that are not mapped, read by descriptors.

To map a shard, and to take a fault for each page, takes longer than to read a few of its rows. The
pages of the indexes and of the rows are asked for before the first is waited for: those of the rows
where they lie in a shard that actstore packed. Each index is read and checked all the same, and
says where the rows lie.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np

from actstore.arrays import index, pages
from actstore.arrays.plan import cut, row_pages
from actstore.errors import ActstoreError, Damaged
from actstore.storage.machine import limit_reached

if TYPE_CHECKING:
    from actstore.arrays.layout import Layout
    from actstore.storage.backend import Storage

FEW = 1 << 12  # rows; each takes a system call, and more of them a part of a read that can be seen
OPEN_AT_ONCE = 32  # shards whose pages are asked for together; each takes a descriptor meanwhile


def read_rows(
    layout: Layout, place: Storage, paths: Mapping[int, str], where: str, key: np.ndarray, row: np.ndarray
) -> np.ndarray | None:
    """Read a few rows.

    Args:
        layout: the array's layout on the disk.
        place: where the shards are.
        paths: the path of each stored batch's shard.
        where: run and site, for messages.
        key, row: int64 [n], see Shards.find; of stored batches.

    Returns:
        V<row bytes> [n]. None if a row lies in no chunk.

    Raises:
        Damaged, LimitReached: see Shards.find.
    """
    batch = key >> layout.key_bits
    chunk = key - (batch << layout.key_bits)
    if (chunk >= layout.chunks_per_shard).any():
        return None
    within = (row - batch * (layout.rows_per_chunk * layout.row_numbers)) * layout.item_bytes
    starts = chunk * layout.chunk_bytes + within
    wanted: dict[int, list[tuple[int, int]]] = {}
    runs = cut(row_pages(layout, batch, starts), pages.LONGEST)
    for number, start, end in zip(*map(np.ndarray.tolist, runs), strict=True):
        wanted.setdefault(number, []).append((start, end - start))
    rows: dict[int, list[int]] = {}
    for number_of_row, number in enumerate(batch.tolist()):
        rows.setdefault(number, []).append(number_of_row)
    found, numbers = [b""] * len(key), list(wanted)
    for first in range(0, len(numbers), OPEN_AT_ONCE):
        with ExitStack() as opened:
            shards = []
            for number in numbers[first : first + OPEN_AT_ONCE]:
                shards.append(_Shard(layout, place, paths[number], where, opened))
                shards[-1].ask([shards[-1].index, *wanted[number]])
            for number, shard in zip(numbers[first:], shards, strict=False):
                of_shard = rows[number]
                places = shard.places(chunk[of_shard], within[of_shard], starts[of_shard])
                if places is None:
                    return None
                for number_of_row, content in zip(of_shard, shard.read(places, layout.row_bytes), strict=True):
                    found[number_of_row] = content
    return np.frombuffer(b"".join(found), f"V{layout.row_bytes}")


class _Shard:
    """A shard that is open.

    Args:
        layout, place, where: see read_rows.
        path: the shard's.
        opened: closes the shard.

    Attributes:
        index: start and length of the index, in bytes.
    """

    def __init__(self, layout: Layout, place: Storage, path: str, where: str, opened: ExitStack) -> None:
        self._layout, self._where, self._path = layout, where, place.root / path
        with self._errors():
            self._descriptor = place.descriptor(path)
            opened.callback(os.close, self._descriptor)
            self._size = os.fstat(self._descriptor).st_size
            index.check_size(layout, self._size, self._path, where)
        self.index = self._size - layout.index_bytes, layout.index_bytes

    def ask(self, wanted: list[tuple[int, int]]) -> None:
        """Ask the system for stretches, (start, length) each, and for nothing around them."""
        if advise := getattr(os, "posix_fadvise", None):  # Linux has it
            with self._errors():
                advise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                for start, length in wanted:
                    advise(self._descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def places(self, chunk: np.ndarray, within: np.ndarray, packed: np.ndarray) -> list[int] | None:
        """The byte at which each row starts, by the shard's index; None if a row lies in no chunk.

        Args:
            chunk: int64 [n]: the rows' chunks.
            within: int64 [n]: bytes from the start of each row's chunk.
            packed: int64 [n]: where the rows lie in a shard that actstore packed.
        """
        layout, (start, length) = self._layout, self.index
        [end] = self.read([start], length)
        of_packed, starts_packed = index.packed(layout)
        if end == of_packed and self._size == layout.shard_bytes:
            return packed.tolist()
        starts = index.chunk_starts(layout, end, self._size, self._path, self._where)[chunk]
        if (starts < 0).any():
            return None
        places: list[int] = (starts * layout.item_bytes + within).tolist()
        if (starts != starts_packed[chunk]).any():  # other pages were asked for
            self.ask([(start, layout.row_bytes) for start in places])
        return places

    def read(self, starts: list[int], length: int) -> list[bytes]:
        """Read stretches of one length."""
        with self._errors():
            found = [os.pread(self._descriptor, length, start) for start in starts]
            if not all(len(content) == length for content in found):
                raise ValueError("it ends before they do")
        return found

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (ActstoreError, MemoryError):
            raise
        except (OSError, ValueError) as error:
            what = f"cannot read {self._path} of {self._where}"
            raise limit_reached(error, what) or Damaged(
                f"{what} ({error}); restore it from a copy of the store"
            ) from error
