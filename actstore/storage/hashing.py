"""xxh3-128 of whole files, as fast as the files can be read."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import xxhash

from actstore.storage.regular import open_regular

BLOCK = 1 << 20  # bytes read at a time: so few are hashed while they are in the processor's cache
AHEAD = 32 << 20  # bytes that the disk is asked to read ahead
_of_thread = threading.local()


def hash_of(descriptor: int) -> str:
    """xxh3-128, hexadecimal, of a whole open file; what the page cache lacks is read ahead."""
    digest, block, offset = xxhash.xxh3_128(), _block(), 0
    while n := os.preadv(descriptor, [block], offset):
        if offset % AHEAD == 0:
            _read_ahead(descriptor, offset + n)
        digest.update(block[:n])
        offset += n
    return digest.hexdigest()


def hash_of_file(path: Path) -> str:
    """xxh3-128, hexadecimal, of a file by its name; raises as open_regular."""
    descriptor = open_regular(path)
    try:
        return hash_of(descriptor)
    finally:
        os.close(descriptor)


def _block() -> memoryview:
    """This thread's own buffer; a new buffer per file would take longer than hashing the file."""
    if not hasattr(_of_thread, "block"):
        # private: a forked process hashes at the same time, and would otherwise read into the very
        # same memory
        _of_thread.block = memoryview(mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE))
    return _of_thread.block


def _read_ahead(descriptor: int, offset: int) -> None:
    if advise := getattr(os, "posix_fadvise", None):  # Linux has it
        advise(descriptor, offset, AHEAD, os.POSIX_FADV_WILLNEED)
