"""A large file that was replaced, kept so that its next content is made of these bytes.

To copy a large file takes time that follows its size. The file that is replaced is therefore kept
under a hidden name, and what is new is added to it: two files take turns. A reader keeps the file
that it opened, and a file that anybody has open is not changed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from actstore.storage import whole
from actstore.storage.hashing import hash_of

KEPT_FROM = 1 << 26  # bytes: a smaller file is copied in 0.1 s
ROOM = 4  # times the file's size that must be free, or it is not kept
HAS_LEASES = hasattr(fcntl, "F_SETLEASE")  # Linux has


def _kept(file: Path) -> Path:
    return file.with_name(f".{file.name}.earlier")


def keep(file: Path) -> None:
    """Keep a file that is about to be replaced, if it is large and the disk has room and leases."""
    if not HAS_LEASES:
        return
    with suppress(OSError):
        about = os.lstat(file)
        has_room = shutil.disk_usage(file.parent).free > ROOM * about.st_size
        if stat.S_ISREG(about.st_mode) and about.st_size >= KEPT_FROM and has_room and _may_be_leased(file):
            whole.discard(_kept(file))
            os.link(file, _kept(file))


def _may_be_leased(file: Path) -> bool:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return _leased(descriptor, fcntl.F_RDLCK)
    finally:
        os.close(descriptor)


def forget(file: Path) -> None:
    """Remove what was kept of a file."""
    with suppress(OSError):
        whole.discard(_kept(file))


def take(file: Path, to: Path, hashes: Collection[str]) -> bool:
    """Move what was kept of a file to a path, writable, if nobody would see it change.

    Nobody may have it open, it may have no other name (a backup may be made of hard links), and its
    content must have one of the hashes.

    Args:
        to: on the same disk.
        hashes: xxh3-128, hexadecimal.

    Returns:
        False if there is no such file; then nothing is kept any more.
    """
    try:
        os.rename(_kept(file), to)
        descriptor = os.open(to, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            about = os.fstat(descriptor)
            is_alone = stat.S_ISREG(about.st_mode) and about.st_nlink == 1 and _leased(descriptor, fcntl.F_WRLCK)
            if is_alone and hash_of(descriptor) in hashes:
                os.fchmod(descriptor, 0o644)
                return True
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return False
    except OSError:  # another user's, say
        forget(file)
    with suppress(OSError):
        whole.discard(to)
    return False


def _leased(descriptor: int, kind: int) -> bool:
    """True if the system grants a lease on a file, which is given back at once.

    Args:
        kind: F_WRLCK is granted if no other descriptor and no map of the file exists, of any
            process of this machine; F_RDLCK if nobody has it open to write.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # SIGIO, which an opening would bring, ends a process
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, kind)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:  # or the file is another user's, or the file system has no leases
        return False
    return True
