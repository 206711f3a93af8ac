"""Pages of mapped files: whether they are in memory, and asking the system to read them ahead.

A fault on a page that is not in memory makes Linux read around it, 8 MB on some disks, and wait. A
system other than Linux is asked nothing: its pages count as in memory, and are read when touched.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache
from typing import Any

import numpy as np

LONGEST = 128 << 10  # bytes per piece of advice: what exceeds the disk's readahead is cut without a word
LEAST_LOOKS, ROWS_PER_LOOK, MOST_LOOKS = 2, 1 << 14, 32  # rows looked at before a read; 2.5 microseconds each
VECTOR = 1024  # pieces of advice per system call; Linux takes no more
PROCESS_MADVISE = 440  # the system call's number, on every processor alike
GOLDEN = 0.6180339887498949  # its multiples are spread evenly, and in step with no period


@cache
def _mincore() -> Any:
    """mincore, called without releasing the interpreter, which would take longer than the call."""
    if sys.platform != "linux":
        return None
    found = ctypes.PyDLL(None).mincore
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return found


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.syscall.restype = ctypes.c_long
    return libc


def some_missing(origin: int, offsets: np.ndarray, item_bytes: int) -> bool:
    """True if a sample of rows has one whose page is not in memory.

    The system says of every page that it is in memory if this user may not write to the file.

    Args:
        origin: the address of offset 0.
        offsets: int64 [n]: where each row starts, in numbers.
        item_bytes: bytes of a number.
    """
    n, mincore = len(offsets), _mincore()
    if mincore is None or not n:
        return False
    looks = min(LEAST_LOOKS + n // ROWS_PER_LOOK, MOST_LOOKS)
    there = ctypes.c_ubyte()
    into = ctypes.addressof(there)
    for number in range(looks):
        address = origin + offsets.item(int(number * GOLDEN % 1 * n)) * item_bytes
        if not mincore(address - address % mmap.PAGESIZE, 1, into) and not there.value & 1:
            return True
    return False


def n_resident(address: int, n_bytes: int) -> int:
    """Bytes of mapped pages that are in memory.

    Args:
        address: of the first page.
        n_bytes: a multiple of the page's size, or up to the end of the map.
    """
    there = np.ones(-(-n_bytes // mmap.PAGESIZE), np.uint8)
    if (mincore := _mincore()) is not None:
        mincore(address, n_bytes, there.ctypes.data)
    return int((there & 1).sum()) * mmap.PAGESIZE


def fetch(addresses: np.ndarray, lengths: np.ndarray) -> None:
    """Ask the system to read mapped pages, without waiting for them.

    Args:
        addresses: int64 [n]: of the first page of each run.
        lengths: int64 [n]: bytes of each run, at most LONGEST.
    """
    if sys.platform != "linux" or not len(addresses):
        return
    runs, done = np.ascontiguousarray(np.stack([addresses, lengths], axis=1)), 0
    try:
        process = os.pidfd_open(os.getpid())
    except OSError:  # the kernel is older than 5.3
        process = -1
    try:
        while process >= 0 and done < len(runs):
            n = min(VECTOR, len(runs) - done)
            vector = ctypes.c_void_p(runs[done:].ctypes.data)
            if _libc().syscall(PROCESS_MADVISE, process, vector, ctypes.c_size_t(n), mmap.MADV_WILLNEED, 0) < 0:
                break  # some kernels allow it to root alone
            done += n
    finally:
        if process >= 0:
            os.close(process)
    for address, length in runs[done:].tolist():
        _libc().madvise(address, length, mmap.MADV_WILLNEED)
