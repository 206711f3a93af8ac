"""Open regular files only: a pipe in the place of a file would keep its reader waiting for ever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from actstore.errors import Damaged

LONGEST = 16 << 20  # most bytes of a store's JSON file; a manifest has a few thousand
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
NEVER_OPENS = (
    errno.ELOOP,
    errno.ENXIO,
    errno.ENODEV,
    errno.ENAMETOOLONG,
)  # links in a circle, a socket, a device, a name


def open_regular(path: Path | str, dir_fd: int | None = None) -> int:
    """Open a file for reading, and return its descriptor.

    Args:
        path: the file; relative to the folder of `dir_fd` if given.
        dir_fd: descriptor of a folder.

    Raises:
        Damaged: the path is not a regular file.
        OSError: see os.open; FileNotFoundError if the path does not exist.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)  # a pipe would wait
    except OSError as error:
        if error.errno in NEVER_OPENS:
            raise Damaged(f"{path} cannot be opened ({error.strerror}); restore it from a copy of the store") from error
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise Damaged(irregular(path, mode))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def irregular(path: Path | str, mode: int) -> str:
    """The message for a path of the store that is not a regular file.

    Args:
        mode: st_mode from os.stat.
    """
    kind = KINDS.get(stat.S_IFMT(mode), "no regular file")
    return f"{path} is {kind}, where the store has a file: move it away, then see what `actstore verify` says"


def check_regular(path: Path) -> None:
    """Check a path before a library opens it by its name; raises as open_regular."""
    os.close(open_regular(path))


def read_regular(path: Path, descriptor: int | None = None, longest: int = LONGEST) -> bytes:
    """Read a file; raises as open_regular.

    Args:
        descriptor: of the file if it is open already; it is closed.
        longest: most bytes that the file may have, so that none fills the memory; a longer file is
            Damaged.
    """
    with os.fdopen(open_regular(path) if descriptor is None else descriptor, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > longest:
            raise Damaged(f"{path} has {size:,} bytes, and at most {longest:,} were written; restore it from a copy")
        return file.read()
