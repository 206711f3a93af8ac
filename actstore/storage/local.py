"""Files of a local file system: written durably, published once, replaced whole."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from actstore.errors import Damaged, NoRoom, Unsupported
from actstore.storage.backend import File
from actstore.storage.regular import read_regular

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SUCH_CALL = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
ABILITIES = {  # what a file system may lack, and the errors that then come
    "hard links": (*NO_SUCH_CALL, errno.EPERM, errno.EMLINK),
    "locks (flock)": (*NO_SUCH_CALL, errno.ENOLCK, errno.EINVAL),
    "fsync": (*NO_SUCH_CALL, errno.EINVAL),
}
DIRECT_FROM = 1 << 20  # bytes; a smaller copy through the page cache costs nothing
BLOCK = mmap.PAGESIZE  # O_DIRECT wants memory, offsets and lengths aligned to this, on any disk of today


def publish(root: Path, path: str, content: bytes | memoryview) -> File:
    """Publish one file, durably, under a name that is free.

    Args:
        root: the store.
        path: the file's path inside the store, with forward slashes.
        content: its bytes.

    Returns:
        The file's path, size and hash.

    Raises:
        Damaged: the name is taken by other bytes.
        NoRoom: the disk is full; nothing is left under the name.
        Unsupported: the file system has no hard links or no fsync; nothing is left under the name.
    """
    file = File(path, len(content), xxhash.xxh3_128_hexdigest(content))
    target = root / path
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    linked = False
    try:
        make_folder(target.parent)
        write_durably(temporary, content)
        try:
            with relying_on("hard links", target.parent):
                os.link(temporary, target)
            linked = True
        except FileExistsError:
            is_as_long = target.stat().st_size == file.bytes
            if not is_as_long or xxhash.xxh3_128_hexdigest(read_regular(target, file.bytes)) != file.xxh3_128:
                raise Damaged(
                    f"{target} exists with other content, and no commit names it: another writer is at work on this store, "
                    "or left it behind a link; if none is at work, remove that file"
                ) from None
        finally:
            os.unlink(temporary)
        fsync_folder(target.parent)
    except OSError as error:
        for left in (temporary, *[target] * linked):  # a name that a power cut may remove is not published
            with suppress(OSError):
                left.unlink(missing_ok=True)
        if error.errno in DISK_FULL:
            raise NoRoom(
                f"no room for {target} ({len(content):,} bytes): {error.strerror}; free some, then go on"
            ) from error
        say_where(error, target)
        raise
    return file


def say_where(error: OSError, path: Path) -> None:
    """Add the path to an error of the system; errors of calls on a descriptor name none."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


@contextmanager
def needing_room(path: Path) -> Iterator[None]:
    """Turn the system's error of a full disk into the package's.

    Args:
        path: the file or folder, for the message.

    Raises:
        NoRoom: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise NoRoom(f"no room for {error.filename or path}: {error.strerror}; free some, then go on") from error
        say_where(error, path)
        raise


@contextmanager
def relying_on(ability: str, path: Path) -> Iterator[None]:
    """Turn the refusal of a call by a file system into an error that names the missing ability.

    Args:
        ability: one of ABILITIES.
        path: the file or folder, for the message.

    Raises:
        Unsupported: the file system lacks the ability.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in ABILITIES[ability]:
            raise
        raise Unsupported(
            f"the file system of {path} has no {ability} ({error.strerror}), and nothing can be written there that is sure to "
            "stay whole; name a place on another file system"
        ) from error


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a read-only file and wait until the disk has it."""
    left = memoryview(content).cast("B")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        if len(left) >= DIRECT_FROM:
            left = _write_blocks_directly(descriptor, left)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fchmod(descriptor, 0o444)
        sync(descriptor, path)
    finally:
        os.close(descriptor)


def _write_blocks_directly(descriptor: int, content: memoryview) -> memoryview:
    """Write whole blocks of page-aligned content straight to the disk; return the unwritten rest.

    A copy into the page cache would take more processor time than all the rest of a commit, and
    take it from the model that runs at the same time. If the file system allows no direct writes,
    nothing is written.
    """
    import numpy as np

    o_direct = getattr(os, "O_DIRECT", 0)  # Linux has it
    if not o_direct or np.frombuffer(content, np.uint8).ctypes.data % BLOCK:
        return content
    flags, written, blocks = fcntl.fcntl(descriptor, fcntl.F_GETFL), 0, len(content) // BLOCK * BLOCK
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | o_direct)
        while written < blocks:
            written += os.write(descriptor, content[written:blocks])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return content[written:]


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; each entry is on the disk before anything is put inside."""
    if not folder.is_dir():
        make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            what = "a link that leads nowhere" if folder.is_symlink() else "no folder"
            raise Damaged(
                f"{folder} is {what}, where a folder belongs: move it away, or put back what it led to, then go on"
            ) from error
        try:
            fsync_folder(folder.parent)
        except OSError:
            with suppress(OSError):
                folder.rmdir()  # or the next attempt would take the folder for durable
            raise


def replace_file(temporary: Path, final: Path) -> None:
    """Rename a file over another, which need not exist.

    Args:
        temporary: the new file.
        final: the name to take.

    Raises:
        Damaged: `final` is a folder.
    """
    try:
        os.replace(temporary, final)
    except IsADirectoryError as error:
        raise Damaged(f"{final} is a folder, where the store has a file: move it away, then go on") from error


def fsync(path: Path) -> None:
    """Wait until the disk has a file's content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor, path)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor, folder)
    finally:
        os.close(descriptor)


def sync(descriptor: int, path: Path) -> None:
    """Wait until the disk has a file or folder.

    Args:
        descriptor: of the open file or folder.
        path: for the message.

    Raises:
        Unsupported: the file system has no fsync.
    """
    with relying_on("fsync", path):
        os.fsync(descriptor)


def discard(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; do nothing if the name is free."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def check_room(root: Path, wanted: int, what: str) -> int:
    """Returns the bytes free on the disk where the store is (or will be).

    Args:
        root: the store.
        wanted: bytes needed.
        what: what needs them, for the message.

    Raises:
        NoRoom: fewer than `wanted` bytes are free.
    """
    existing = root
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < wanted:
        raise NoRoom(
            f"{what} needs {wanted / 1e9:.2f} GB and {existing} has {free / 1e9:.2f} GB free; free some or ask for less"
        )
    return free


def swap(temporary: Path, final: Path) -> None:
    """Rename a finished file over the old one, durably."""
    fsync(temporary)
    replace_file(temporary, final)
    fsync_folder(final.parent)


def put(path: Path, content: bytes) -> None:
    """Replace a damaged file, durably, whole or not at all."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durably(temporary, content)
        replace_file(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
