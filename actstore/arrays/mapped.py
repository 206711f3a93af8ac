"""The shards of one site, mapped into memory and seen as one array of rows.

numpy copies rows out of one array with one call, and each call costs; a selection has rows in every
shard. One strided view therefore spans the addresses around the first map; item i is the row
beginning i numbers later. Addresses between maps are never read: each offset comes from a shard's
own index of chunks, which is checked when the shard is mapped. A further shard therefore takes the
same time however many are mapped.

A mapped shard holds no descriptor, so a store may have more shards than a process may open files.
Each shard takes one of the maps that the system allows a process (65,530 by default). Where this
process has mapped half as many, all sites let go of theirs, and map again what they need.

Shortening a mapped file kills every process that reads it, by SIGBUS. Committed files are therefore
read-only, and actstore never shortens one.

Pages that are not in memory are fetched before they are touched, run by run (`pages.py`). A few
rows of shards that were not read before are read without a map (`unmapped.py`).
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from actstore.arrays import index, pages
from actstore.arrays.copying import n_threads
from actstore.arrays.plan import Runs, cut, row_pages
from actstore.arrays.unmapped import FEW, OPEN_AT_ONCE, read_rows
from actstore.errors import ActstoreError, Damaged
from actstore.storage.backend import Storage
from actstore.storage.machine import allowed_maps, limit_reached

if TYPE_CHECKING:
    from actstore.arrays.layout import Layout

NOWHERE = -(2**62)  # the offset of a chunk that is not mapped; it stays negative whatever is added
REACH = 1 << 44  # bytes of addresses in a view: 16 TB, and the system maps files next to one another
MOST_BYTES = 1 << 62  # that numpy lets an array have, by its shape
COPIED_AT_ONCE = 8  # shards that are copied out of a bucket at the same time, and mapped
SHARE = 2  # one in so many of the maps that the system allows is for shards
_there: set[int] = set()  # addresses of this process's maps
_every: dict[int, weakref.ref[Shards]] = {}  # those that are open, by id; a dict is changed in one step


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
        _there.add(address)
        # not at the interpreter's end, when a thread may still read; the system unmaps what is left
        weakref.finalize(self, _unmap, address, size).atexit = False


def _unmap(address: int, size: int) -> None:
    _there.discard(address)
    _libc().munmap(address, size)


def _forget(number: int, _: object) -> None:
    _every.pop(number, None)


def _let_go() -> None:
    """Unmap the shards of all sites, but for those that are being read."""
    for shards in [reference() for reference in list(_every.values())]:
        if shards:
            shards.let_go()


def most_maps() -> int:
    """Shards that this process maps at the same time, of all sites; a gather takes at most half."""
    return max(allowed_maps() // SHARE, 2)


class View:
    """The shards that are mapped; others are added, and none is taken out.

    A reader in another thread may keep a view: its maps last as long as it, or its `windows`.

    Args:
        layout: the array's layout on the disk.
        maps: around which the view reaches.

    Attributes:
        windows: V<row bytes> [numbers in the view]: item i is the row beginning at number i.
        table: int64 [shards * 2^key_bits]: table[shard, chunk] is the offset of row 0; add row *
            row_numbers. NOWHERE if nothing is mapped there.
        maps: by shard: its bytes, and where its chunks start in them (int64 [chunks_per_shard], in
            numbers).
    """

    def __init__(self, layout: Layout, maps: Sequence[np.ndarray]) -> None:
        item, row_bytes = layout.item_bytes, layout.row_bytes
        addresses = [mapped.ctypes.data for mapped in maps]
        first, end = min(addresses), max(map(int.__add__, addresses, map(len, maps)))
        around = max(min(REACH, MOST_BYTES // row_bytes * item) - (end - first), 0) // 2
        self._layout, self._origin = layout, max(first - around // mmap.PAGESIZE * mmap.PAGESIZE, mmap.PAGESIZE)
        self._end = end + around
        self.maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.table = np.full(layout.n_shards << layout.key_bits, NOWHERE)
        span = _Span(self._origin, (self._end - self._origin - row_bytes) // item + 1, item, row_bytes, self.maps)
        self.windows = np.asarray(span)

    def reaches(self, mapped: np.ndarray) -> bool:
        """True if a map lies where this view reaches."""
        address: int = mapped.ctypes.data
        return self._origin <= address and address + len(mapped) <= self._end

    def add(self, batch: int, mapped: np.ndarray, chunks: np.ndarray) -> None:
        """Show a further shard, which `reaches`; see `maps`."""
        layout = self._layout
        self.maps[batch] = mapped, chunks  # before the table leads there
        start = (mapped.ctypes.data - self._origin) // layout.item_bytes
        start -= batch * layout.rows_per_chunk * layout.row_numbers
        first = batch << layout.key_bits
        self.table[first : first + len(chunks)] = np.where(chunks < 0, NOWHERE, chunks + start)


class _Span:
    """Addresses as one array of rows, which keeps the maps among them."""

    def __init__(
        self, address: int, n: int, item: int, row_bytes: int, maps: dict[int, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        self.address, self.maps = address, maps
        about = {"shape": (n,), "strides": (item,), "typestr": f"|V{row_bytes}", "data": (address, True), "version": 3}
        self.__array_interface__ = about


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
        self._view: View | None = None
        self._were_read: set[int] = set()  # batches of which rows were read
        _every[id(self)] = weakref.ref(self, partial(_forget, id(self)))

    def find(self, row: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool] | None:
        """Locate rows, after mapping the shards that hold them.

        A few rows are read without a map if one of their shards was not read before. Where the
        indexes of shards that are mapped are not in memory, the system is asked for all of them at
        once.

        Args:
            row, position: int64 [n], see Layout.split; overwritten.

        Returns:
            (windows, offsets, is_read): View.windows, or V<row bytes> [n]; int64 [n] into it; True
            if the rows were read. None if a row lies in no shard or no chunk.

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
            if view is None:
                batches = np.flatnonzero(np.bincount(key >> bits)).tolist()
                if len(key) <= FEW and self._are_first(batches):
                    rows = read_rows(layout, self._place, self.paths, self.where, key, row)
                    return None if rows is None else (rows, np.arange(len(rows)), True)
                view = self._map(batches)
            if view is None:
                return None if len(key) else (np.empty(0, f"V{layout.row_bytes}"), key, True)
            offsets = view.table.take(key)
            offsets += row
            if offsets.min(initial=0) >= 0:
                return view.windows, offsets, False
        return None

    def _are_first(self, batches: list[int]) -> bool:
        """True if a shard among some, all stored, was not read before; it is now."""
        if self.reads_whole or not all(batch in self.paths for batch in batches):
            return False
        are_first = not self._were_read.issuperset(batches)
        self._were_read.update(batches)
        return are_first

    def chunk_starts(self, batch: int) -> np.ndarray:
        """int64 [chunks_per_shard]: the byte of the batch's file at which each chunk starts."""
        view = self._map([batch])
        assert view, "only of a stored batch"
        return view.maps[batch][1] * self.layout.item_bytes

    def size(self, batch: int) -> int:
        """Bytes of the batch's file, which is not read."""
        full = self.layout.position_axis is not None
        return self.layout.shard_bytes if full else self._place.size(self.paths[batch])

    def fetcher(self, windows: np.ndarray) -> Callable[[np.ndarray], None]:
        """A function that asks the system to read the pages of rows, without waiting for them.

        Args:
            windows: as `find` returned it; the function takes such offsets, int64 [n].
        """
        span: _Span = windows.base  # type: ignore[assignment]
        bases = np.sort([mapped.ctypes.data for mapped, _ in list(span.maps.values())])

        def fetch(offsets: np.ndarray) -> None:
            starts = offsets * self.layout.item_bytes + span.address
            files = np.searchsorted(bases, starts, "right") - 1
            pages.fetch(*_pieces(bases, row_pages(self.layout, files, starts - bases[files])))

        return fetch

    def is_cold(self, windows: np.ndarray, offsets: np.ndarray) -> bool:
        """True if pages of rows are not in memory, as far as a sample tells; see `fetcher`."""
        span: _Span | None = windows.base  # type: ignore[assignment]
        return span is not None and pages.some_missing(span.address, offsets, self.layout.item_bytes)

    def n_resident(self, runs: Runs) -> int:
        """Bytes of runs of pages that are in memory; `files` are numbers of stored batches."""
        n_bytes = 0
        for batch in np.unique(runs.files).tolist():
            view, of_batch = self._map([batch]), runs.files == batch
            assert view, "only of stored batches"
            address = view.maps[batch][0].ctypes.data
            for start, end in zip(runs.starts[of_batch].tolist(), runs.ends[of_batch].tolist(), strict=True):
                n_bytes += pages.n_resident(address + start, end - start)
        return n_bytes

    def _map(self, batches: list[int]) -> View | None:
        """Returns a view in which these batches are mapped too, as far as they are stored.

        Returns None if nothing is mapped.
        """
        with self._lock:
            view = self._view
            if view and all(batch in view.maps for batch in batches if batch in self.paths):
                return view
            if len(_there) > most_maps() - len(batches):
                _let_go()
                view = None
            held = view.maps if view else {}
            found = self._map_all([batch for batch in batches if batch in self.paths and batch not in held])
            if view is None or not all(view.reaches(mapped) for mapped, _ in found.values()):
                found = {**held, **found}
                view = View(self.layout, [mapped for mapped, _ in found.values()]) if found else None
            for batch, (mapped, chunks) in found.items():
                assert view
                view.add(batch, mapped, chunks)
            self._were_read.update(found)
            self._view = view
            return view

    def let_go(self) -> None:
        """Unmap all shards, but for those that are being read."""
        self._view = None

    def _map_all(self, batches: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Map shards, with threads if they are hashed; one map costs less than a thread."""
        n_floats = len(batches) * math.prod(self.layout.shard_shape) if self.reads_whole else 0
        threads_wanted = COPIED_AT_ONCE if self._place.reads_ranges else n_threads(n_floats)
        if threads_wanted > 1 and len(batches) > 1:
            with ThreadPoolExecutor(threads_wanted) as threads:
                return dict(itertools.chain.from_iterable(threads.map(self._map_group, ([batch] for batch in batches))))
        groups = (batches[first : first + OPEN_AT_ONCE] for first in range(0, len(batches), OPEN_AT_ONCE))
        return dict(itertools.chain.from_iterable(map(self._map_group, groups)))

    def _map_group(self, batches: list[int]) -> list[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """Map a few shards; their indexes are read, and checked, after all were asked for."""
        layout, found, inside = self.layout, [], ""
        (packed, starts), whole = index.packed(layout), layout.shard_bytes
        try:
            with ExitStack() as opened:
                descriptors, maps = [], []
                for batch in batches:
                    inside = self.paths[batch]
                    descriptors.append(self._place.descriptor(inside))
                    opened.callback(os.close, descriptors[-1])
                    size = os.fstat(descriptors[-1]).st_size
                    if size != whole:
                        index.check_size(layout, size, self._place.root / inside, self.where)
                    maps.append(np.asarray(_Map(descriptors[-1], size)))
                _fetch_indexes(layout, maps)
                for batch, descriptor, mapped in zip(batches, descriptors, maps, strict=True):
                    inside, size, chunks = self.paths[batch], len(mapped), starts
                    end = os.pread(descriptor, layout.index_bytes, size - layout.index_bytes)
                    if end != packed or size != whole:
                        chunks = index.chunk_starts(layout, end, size, self._place.root / inside, self.where)
                    found.append((batch, (mapped, chunks)))
        except (ActstoreError, MemoryError):
            raise
        except (OSError, ValueError) as error:
            what = f"cannot map {self._place.root / inside} of {self.where}"
            raise limit_reached(error, what) or Damaged(
                f"{what} ({error}); restore it from a copy of the store"
            ) from error
        return found


def _fetch_indexes(layout: Layout, maps: list[np.ndarray]) -> None:
    """Ask for the indexes of shards, if a sample of them has one that is not in memory."""
    bases, sizes = np.array([(mapped.ctypes.data, len(mapped)) for mapped in maps], np.int64).reshape(-1, 2).T
    if pages.some_missing(0, bases + sizes - layout.index_bytes, 1):
        ends = bases + sizes  # the system takes whole pages, up to the end of a map
        first = (ends - layout.index_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        pages.fetch(first, ends - first)


def _pieces(bases: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and lengths for pages.fetch, given the address of each file's map."""
    pieces = cut(runs, pages.LONGEST)
    return bases[pieces.files] + pieces.starts, pieces.ends - pieces.starts
