"""The shards of one site, mapped into memory and seen as one array of rows.

numpy copies rows out of one array with one call, and each call costs; a selection has rows in every
shard. One strided view therefore starts at the lowest map; item i is the row beginning i numbers
later. Addresses between maps are never read: each offset comes from a shard's own index of chunks,
which is checked when the shard is mapped.

A mapped shard holds no descriptor, so a store may have more shards than a process may open files.
Each shard takes one of the maps that the system allows a process (65,530 by default). Shortening a
mapped file kills every process that reads it, by SIGBUS. Committed files are therefore read-only,
and actstore never shortens one.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from actstore.arrays import index
from actstore.arrays.copying import n_threads
from actstore.errors import ActstoreError, Damaged
from actstore.storage.backend import Storage
from actstore.storage.machine import limit_reached

if TYPE_CHECKING:
    from actstore.arrays.layout import Layout

NOWHERE = -(2**62)  # the offset of a chunk that is not mapped; it stays negative whatever is added


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


class _Map:
    """A file in memory, read-only, mapped as long as an array shows it.

    Python's own mmap would keep a duplicate of the descriptor as long (`trackfd=False` is new in
    Python 3.13).

    Raises:
        OSError: the system allows no more maps, or cannot map this file.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, True), "version": 3}
        # not at the interpreter's end, when a thread may still read; the system unmaps what is left
        weakref.finalize(self, _libc().munmap, address, size).atexit = False


class View(NamedTuple):
    """What is mapped at one moment; never changed, so a reader in another thread may keep it.

    Attributes:
        windows: V<row bytes> [numbers in the view]: item i is the row beginning at number i.
        table: int64 [shards * 2^key_bits]: table[shard, chunk] is the offset of row 0; add row *
            row_numbers. NOWHERE if nothing is mapped there.
        maps: by shard: its bytes, and where its chunks start in them (int64 [chunks_per_shard], in
            numbers).
    """

    windows: np.ndarray
    table: np.ndarray
    maps: dict[int, tuple[np.ndarray, np.ndarray]]


class Shards:
    """The shard files of one site; each is mapped when it is first needed.

    Args:
        layout: the array's layout on the disk.
        paths: the path of each stored batch's shard.
        where: run and site, for messages.
        place: where the shards are.
    """

    def __init__(
        self,
        layout: Layout,
        paths: Mapping[int, str],
        where: str,
        place: Storage,
    ) -> None:
        self.layout, self.paths, self.where = layout, dict(paths), where
        self._place, self.reads_whole = place, place.committed is not None or place.reads_ranges
        self._lock = threading.Lock()
        self._view = self._see({})

    def find(self, row: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Locate rows, after mapping the shards that hold them.

        Args:
            row, position: int64 [n], see Layout.split; overwritten.

        Returns:
            (windows, offsets): View.windows, and int64 [n] into it. None if a row lies in no shard
            or no chunk.

        Raises:
            Damaged: a shard cannot be mapped, has another length than was committed, or has a wrong
                index.
            LimitReached: the system allows this process no more open files, maps or memory.
        """
        layout, key = self.layout, row // self.layout.rows_per_chunk
        bits = layout.key_bits
        key <<= bits
        key |= position
        row *= layout.row_numbers
        for view in (self._view, None):
            view = view or self._map(np.unique(key >> bits).tolist())
            offsets = view.table.take(key)
            offsets += row
            if offsets.min(initial=0) >= 0:
                return view.windows, offsets
        return None

    def chunk_starts(self, batch: int) -> np.ndarray:
        """int64 [chunks_per_shard]: the byte of the batch's file at which each chunk starts."""
        return self._map([batch]).maps[batch][1] * self.layout.item_bytes

    def size(self, batch: int) -> int:
        """Bytes of the batch's file, which is not read."""
        full = self.layout.position_axis is not None
        return self.layout.shard_bytes if full else self._place.size(self.paths[batch])

    def _map(self, batches: list[int]) -> View:
        """Returns a view in which these batches are mapped too, as far as they are stored."""
        with self._lock:
            wanted = [batch for batch in batches if batch in self.paths and batch not in self._view.maps]
            if wanted:
                self._view = self._see({**self._view.maps, **self._map_all(wanted)})
            return self._view

    def _map_all(self, batches: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Map shards, with threads if they are hashed; one map costs less than a thread."""
        paths = [self.paths[batch] for batch in batches]
        n_floats = len(paths) * math.prod(self.layout.shard_shape) if self.reads_whole else 0
        if (threads_wanted := n_threads(n_floats)) == 1:
            return dict(zip(batches, map(self._map_one, paths), strict=True))
        with ThreadPoolExecutor(threads_wanted) as threads:
            return dict(zip(batches, threads.map(self._map_one, paths), strict=True))

    def _see(self, maps: dict[int, tuple[np.ndarray, np.ndarray]]) -> View:
        layout, item = self.layout, self.layout.item_bytes
        row_bytes = layout.row_bytes
        table = np.full((layout.n_shards, 1 << layout.key_bits), NOWHERE)
        if not maps:
            return View(np.empty(0, f"V{row_bytes}"), table.reshape(-1), maps)
        addresses = {batch: mapped.ctypes.data for batch, (mapped, _) in maps.items()}
        first = min(maps, key=lambda batch: addresses[batch])
        origin = addresses[first]
        end = max(addresses[batch] + len(mapped) for batch, (mapped, _) in maps.items())
        for batch, (_, chunks) in maps.items():
            start = (addresses[batch] - origin) // item - batch * layout.rows_per_chunk * layout.row_numbers
            table[batch, : layout.chunks_per_shard] = np.where(chunks < 0, NOWHERE, chunks + start)
        windows = np.lib.stride_tricks.as_strided(
            maps[first][0][:row_bytes].view(f"V{row_bytes}"),
            ((end - origin - row_bytes) // item + 1,),
            (item,),
            writeable=False,
        )
        return View(windows, table.reshape(-1), maps)

    def _map_one(self, inside: str) -> tuple[np.ndarray, np.ndarray]:
        path = self._place.root / inside
        try:
            descriptor = self._place.descriptor(inside)
            try:
                size = os.fstat(descriptor).st_size
                index.check_size(self.layout, size, path, self.where)
                mapped = np.asarray(_Map(descriptor, size))
                end = os.pread(descriptor, self.layout.index_bytes, size - self.layout.index_bytes)
            finally:
                os.close(descriptor)
        except (ActstoreError, MemoryError):
            raise
        except (OSError, ValueError) as error:
            raise limit_reached(error, f"cannot map {path} of {self.where}") or Damaged(
                f"cannot map {path} of {self.where} ({error}); restore it from a copy of the store"
            ) from error
        return mapped, index.chunk_starts(self.layout, end, size, path, self.where)
