"""A few rows of shards that are not mapped, read by descriptors.

To map a shard, and to take a fault for each page, takes longer than to read a few of its rows. The
pages of the indexes and of the rows are asked for before the first is waited for: those of the rows
where they lie in a shard that actstore packed. Each index is read and checked all the same, and
says where the rows lie.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from actstore.arrays import index, pages
from actstore.arrays.plan import cut, row_pages
from actstore.errors import ActstoreError, Damaged
from actstore.storage.machine import limit_reached

if TYPE_CHECKING:
    from pathlib import Path

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
    chunk = key & ((1 << layout.key_bits) - 1)
    return None if (chunk >= layout.chunks_per_shard).any() else _Rows(layout, place, paths, where, key, row).read()


class _Rows:
    """A few rows, see read_rows."""

    def __init__(
        self, layout: Layout, place: Storage, paths: Mapping[int, str], where: str, key: np.ndarray, row: np.ndarray
    ) -> None:
        self._layout, self._place, self._paths, self._where = layout, place, paths, where
        batch = key >> layout.key_bits
        self._chunk = key - (batch << layout.key_bits)
        self._within = (row - batch * (layout.rows_per_chunk * layout.row_numbers)) * layout.item_bytes
        starts = self._chunk * layout.chunk_bytes + self._within
        self._starts: list[int] = starts.tolist()  # where rows lie in a shard that actstore packed
        self._wanted: dict[int, list[tuple[int, int]]] = {}  # batch → start and length of each run of pages
        runs = cut(row_pages(layout, batch, starts), pages.LONGEST)
        for number, start, end in zip(*map(np.ndarray.tolist, runs), strict=True):
            self._wanted.setdefault(number, []).append((start, end - start))
        self._rows: dict[int, list[int]] = {}  # batch → numbers of its rows
        for number_of_row, number in enumerate(batch.tolist()):
            self._rows.setdefault(number, []).append(number_of_row)
        self._inside = ""  # the path of the shard that is being read

    def read(self) -> np.ndarray | None:
        """See read_rows."""
        found, numbers = [b""] * len(self._starts), list(self._wanted)
        try:
            for first in range(0, len(numbers), OPEN_AT_ONCE):
                with ExitStack() as opened:
                    some = numbers[first : first + OPEN_AT_ONCE]
                    shards = [self._open(number, opened) for number in some]
                    for number, (descriptor, size) in zip(some, shards, strict=True):
                        places = self._places(number, descriptor, size)
                        if places is None:
                            return None
                        for number_of_row, start in zip(self._rows[number], places, strict=True):
                            found[number_of_row] = os.pread(descriptor, self._layout.row_bytes, start)
                            if len(found[number_of_row]) < self._layout.row_bytes:
                                raise ValueError("it ends before its rows do")
        except (ActstoreError, MemoryError):
            raise
        except (OSError, ValueError) as error:
            what = f"cannot read {self._path} of {self._where}"
            raise limit_reached(error, what) or Damaged(
                f"{what} ({error}); restore it from a copy of the store"
            ) from error
        return np.frombuffer(b"".join(found), f"V{self._layout.row_bytes}")

    @property
    def _path(self) -> Path:
        return self._place.root / self._inside

    def _open(self, number: int, opened: ExitStack) -> tuple[int, int]:
        """Descriptor and size of a shard whose pages are asked for."""
        layout, self._inside = self._layout, self._paths[number]
        descriptor = self._place.descriptor(self._inside)
        opened.callback(os.close, descriptor)
        size = os.fstat(descriptor).st_size
        if size != layout.shard_bytes:
            index.check_size(layout, size, self._path, self._where)
        _ask(descriptor, [(size - layout.index_bytes, layout.index_bytes), *self._wanted[number]])
        return descriptor, size

    def _places(self, number: int, descriptor: int, size: int) -> list[int] | None:
        """The byte at which each row of a shard starts, by its index; None if it is in no chunk."""
        layout, rows, self._inside = self._layout, self._rows[number], self._paths[number]
        end, (packed, starts) = (
            os.pread(descriptor, layout.index_bytes, size - layout.index_bytes),
            index.packed(layout),
        )
        if end == packed and size == layout.shard_bytes:
            return [self._starts[number_of_row] for number_of_row in rows]
        chunks = index.chunk_starts(layout, end, size, self._path, self._where)[self._chunk[rows]]
        if (chunks < 0).any():
            return None
        places: list[int] = (chunks * layout.item_bytes + self._within[rows]).tolist()
        if (chunks != starts[self._chunk[rows]]).any():  # other pages were asked for
            _ask(descriptor, [(start, layout.row_bytes) for start in places])
        return places


def _ask(descriptor: int, wanted: list[tuple[int, int]]) -> None:
    """Ask the system for stretches of a file, (start, length) each, and for nothing around them."""
    if advise := getattr(os, "posix_fadvise", None):  # Linux has it
        advise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for start, length in wanted:
            advise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
