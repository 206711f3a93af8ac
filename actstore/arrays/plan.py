"""What is read of files: wanted stretches, joined across small gaps, as runs.

Readers of files ask the system for runs of pages (`mapped.py`, `unmapped.py`). A reader of a bucket
asks for ranges (`ranged.py`). All make their runs here.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from actstore.arrays.layout import Layout

NEAR = 16 << 10  # bytes between two runs that the disk reads sooner than it takes up another run
FILE_BITS = 44  # a key is a file's number and a byte of that file, below 16 TB


class Runs(NamedTuple):
    """Stretches of some files that lie apart, by file and then by start.

    Attributes:
        files: int64 [n]: the number of each run's file.
        starts: int64 [n]: its first byte.
        ends: int64 [n]: the byte after its last.
    """

    files: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @property
    def n_bytes(self) -> int:
        """Bytes of all runs."""
        return int((self.ends - self.starts).sum())


def joined(files: np.ndarray, starts: np.ndarray, ends: np.ndarray, near: int) -> Runs:
    """Join stretches of one file that overlap, touch, or have at most `near` bytes between them.

    Args:
        files: int64 [n]: the number of each stretch's file.
        starts, ends: int64 [n]: its first byte, and the byte after its last; in any order.
    """
    keys = (files << FILE_BITS) | starts
    order = np.argsort(keys, kind="stable")
    first, last = keys[order], np.maximum.accumulate((keys + (ends - starts))[order])
    apart = np.ones(len(first), bool)
    apart[1:] = (first[1:] > last[:-1] + near) | (first[1:] >> FILE_BITS != first[:-1] >> FILE_BITS)
    begins = np.flatnonzero(apart)
    first, last = first[begins], last[np.append(begins[1:], len(last))[: len(begins)] - 1]
    files = first >> FILE_BITS
    return Runs(files, first & ((1 << FILE_BITS) - 1), last - (files << FILE_BITS))


def whole_pages(runs: Runs, page: int) -> Runs:
    """Stretches grown to the pages that they touch; they may then touch each other."""
    return Runs(runs.files, runs.starts // page * page, -(-runs.ends // page) * page)


def cut(runs: Runs, longest: int) -> Runs:
    """Runs of at most `longest` bytes each, which cover the same."""
    if (runs.ends - runs.starts).max(initial=0) <= longest:
        return runs
    n_parts = -(-(runs.ends - runs.starts) // longest)
    before = np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
    starts = np.repeat(runs.starts, n_parts) + (np.arange(len(before)) - before) * longest
    return Runs(np.repeat(runs.files, n_parts), starts, np.minimum(starts + longest, np.repeat(runs.ends, n_parts)))


def row_pages(layout: Layout, files: np.ndarray, starts: np.ndarray) -> Runs:
    """The runs of pages that are fetched for rows.

    Args:
        files: int64 [n]: a number for the file of each row.
        starts: int64 [n]: the byte of that file at which the row starts.
    """
    return joined(*whole_pages(Runs(files, starts, starts + layout.row_bytes), mmap.PAGESIZE), NEAR)
