"""The shards of one site mapped into memory, seen as one stretch of rows, so that one call copies rows out of any of them.

numpy copies rows of one array by one call, and each call costs; a selection has rows in every shard. So all maps of a site
are seen through one view whose item i is the row that would start i numbers behind the first map. What lies between the
maps is never touched: an offset into the view comes only from a shard's own index of chunks, which is checked when the
shard is mapped.

A mapped shard holds no descriptor, so a store may have more shards than a process may have files open; each takes one of
the maps that the system allows a process (65,530 by default). Whoever cuts a shard short while it is mapped kills every
process that then reads it, by SIGBUS: committed files are read-only, and actstore itself never shortens one.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import google_crc32c
import numpy as np

from actstore.arrays.address import POSITION_BITS, POSITIONS_PER_TREE
from actstore.arrays.copying import n_threads
from actstore.errors import ActstoreError, Damaged
from actstore.storage.machine import limit_reached
from actstore.storage.regular import open_regular

if TYPE_CHECKING:
    from actstore.arrays.layout import Layout

NOWHERE = -(2**62)  # in a table of offsets: that chunk is not mapped, or not there; it stays negative whatever is added
NO_CHUNK = 2**64 - 1  # in a shard's index: this chunk was never written


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


class _Map:
    """A file in memory, read-only, until no array is left that shows it.

    Python's own mmap keeps a duplicate of the descriptor as long (`trackfd=False` is of Python 3.13).

    Raises:
        OSError: the system maps no more, or not this file.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, True), "version": 3}
        # not at the interpreter's end, when a thread may still read; the system unmaps what is left
        weakref.finalize(self, _libc().munmap, address, size).atexit = False


class View(NamedTuple):
    """What is mapped at one moment; never changed, so that a reader in another thread may go on with the one it has.

    Attributes:
        windows: V<bytes of a row> [numbers in the stretch]: item i is the row that would start at number i.
        table: int64 [batches * 256]: for each batch and position, where the row of the array's tree 0 would start; add
            tree * numbers in a row. NOWHERE where nothing is mapped.
        maps: of each batch that is mapped: its bytes, and where its chunks start in them (int64 [n_positions], in numbers).
    """

    windows: np.ndarray
    table: np.ndarray
    maps: dict[int, tuple[np.ndarray, np.ndarray]]


class Shards:
    """The shard files of one site; each is mapped when first asked for.

    Args:
        layout: how the array lies on the disk.
        paths: of the shard file of each batch that is there.
        where: run and site, for messages.
        opener: opens a path, and returns its descriptor.
        opener_reads: whether the opener reads the whole file, to check it.
    """

    def __init__(
        self,
        layout: Layout,
        paths: Mapping[int, Path],
        where: str,
        opener: Callable[[Path], int] = open_regular,
        opener_reads: bool = False,
    ) -> None:
        self.layout, self.paths, self.where = layout, dict(paths), where
        self._opener, self._opener_reads = opener, opener_reads
        self._lock = threading.Lock()
        self._view = self._see({})

    def find(self, row: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Where rows start, mapping what is not mapped yet.

        Args:
            row: int64 [n]: rows of the array, each inside it; overwritten.
            position: int64 [n], each in [0, 256); overwritten.

        Returns:
            windows: see View.
            offsets: int64 [n], into windows; None in place of both where a row is in no shard or no chunk.

        Raises:
            Damaged: a shard cannot be mapped, or is not as long as it was committed, or its index is not its own.
            LimitReached: the system allows this process no more open files, maps or memory.
        """
        layout, key = self.layout, row // self.layout.trees_per_shard
        key <<= POSITION_BITS
        key |= position
        row *= layout.row_items
        for view in (self._view, None):
            view = view or self._map(np.unique(key >> POSITION_BITS).tolist())
            offsets = view.table.take(key)
            offsets += row
            if offsets.min(initial=0) >= 0:
                return view.windows, offsets
        return None

    def chunk_starts(self, batch: int) -> np.ndarray:
        """int64 [n_positions]: the byte of its file where each chunk of a batch that is there starts."""
        return self._map([batch]).maps[batch][1] * self.layout.item_bytes

    def _map(self, batches: list[int]) -> View:
        """What is mapped once these batches are, too; those that there are."""
        with self._lock:
            wanted = [batch for batch in batches if batch in self.paths and batch not in self._view.maps]
            if wanted:
                self._view = self._see({**self._view.maps, **self._map_all(wanted)})
            return self._view

    def _map_all(self, batches: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By threads where the opener reads much; to map a shard alone costs less than a thread."""
        paths = [self.paths[batch] for batch in batches]
        n_floats = len(paths) * math.prod(self.layout.shard_shape) if self._opener_reads else 0
        if (threads_wanted := n_threads(n_floats)) == 1:
            return dict(zip(batches, map(self._map_one, paths), strict=True))
        with ThreadPoolExecutor(threads_wanted) as threads:
            return dict(zip(batches, threads.map(self._map_one, paths), strict=True))

    def _see(self, maps: dict[int, tuple[np.ndarray, np.ndarray]]) -> View:
        layout, item = self.layout, self.layout.item_bytes
        row_bytes = layout.row_items * item
        table = np.full((-(-layout.shape[0] // layout.trees_per_shard), POSITIONS_PER_TREE), NOWHERE)
        if not maps:
            return View(np.empty(0, f"V{row_bytes}"), table.reshape(-1), maps)
        addresses = {batch: mapped.ctypes.data for batch, (mapped, _) in maps.items()}
        first = min(maps, key=lambda batch: addresses[batch])
        origin = addresses[first]
        end = max(addresses[batch] + len(mapped) for batch, (mapped, _) in maps.items())
        for batch, (_, chunks) in maps.items():
            start = (addresses[batch] - origin) // item - batch * layout.trees_per_shard * layout.row_items
            table[batch, : layout.n_positions] = np.where(chunks < 0, NOWHERE, chunks + start)
        windows = np.lib.stride_tricks.as_strided(
            maps[first][0][:row_bytes].view(f"V{row_bytes}"),
            ((end - origin - row_bytes) // item + 1,),
            (item,),
            writeable=False,
        )
        return View(windows, table.reshape(-1), maps)

    def _map_one(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        try:
            descriptor = self._opener(path)
            try:
                size = os.fstat(descriptor).st_size
                if size != self.layout.shard_bytes:
                    raise Damaged(
                        f"{path} of {self.where} is {size:,} bytes long; it was {self.layout.shard_bytes:,} when committed"
                    )
                mapped = np.asarray(_Map(descriptor, size))
                index = os.pread(descriptor, self.layout.index_bytes, size - self.layout.index_bytes)
            finally:
                os.close(descriptor)
        except (ActstoreError, MemoryError):
            raise
        except (OSError, ValueError) as error:
            raise limit_reached(error, f"cannot map {path} of {self.where}") or Damaged(
                f"cannot map {path} of {self.where} ({error}); restore it from a copy of the store"
            ) from error
        return mapped, self._chunks(index, path)

    def _chunks(self, index: bytes, path: Path) -> np.ndarray:
        """int64 [n_positions]: where the index says that each chunk starts, in numbers; -1 where there is none."""
        layout = self.layout
        offset, length = np.frombuffer(index[:-4], "<u8").reshape(-1, 2).T
        there = offset != NO_CHUNK
        whole = (
            (length == layout.chunk_bytes)
            & (offset <= layout.shard_bytes - layout.index_bytes - layout.chunk_bytes)
            & (offset % layout.item_bytes == 0)
        )
        if google_crc32c.value(index[:-4]).to_bytes(4, "little") != index[-4:] or not (whole | ~there).all():
            raise Damaged(
                f"the index of {path} of {self.where} is not what was committed; restore it from a copy of the store"
            )
        return np.where(there, (offset // layout.item_bytes).astype(np.int64), -1)
