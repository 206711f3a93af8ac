"""Files of this machine, written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from uuid import uuid4

from actstore.errors import Damaged, Unsupported
from actstore.storage.backend import Content
from actstore.storage.refused import relying_on

DIRECT_FROM = 1 << 20  # bytes; a smaller copy through the page cache costs nothing
BLOCK = mmap.PAGESIZE  # O_DIRECT wants memory, offsets and lengths aligned to this, on any disk of today


def write_whole(
    final: Path,
    content: Content,
    *,
    once: bool = False,
    surely: bool = True,
    guard: AbstractContextManager[object] | None = None,
) -> None:
    """Write a file whole or not at all: durably under a temporary name, and then under its own.

    Args:
        final: the file; its folder exists.
        content: the bytes of a read-only file, or a function that writes a file to a given path.
        once: fail if the name is taken; the default replaces the file.
        surely: fail if the file system has no fsync; if False, a power cut may still tear the file.
        guard: entered for the renaming alone; if the guard raises, nothing is changed.

    Raises:
        FileExistsError: the name is taken (with `once`).
        Damaged: `final` is a folder.
        Unsupported: the file system has no fsync, or no hard links (with `once`).
    """
    temporary, linked = beside(final), False
    try:
        if callable(content):
            content(temporary)
            with nullcontext() if surely else suppress(Unsupported):
                fsync(temporary)
        else:
            write_durably(temporary, content)
        if once:
            try:
                with relying_on("hard links", final.parent):
                    os.link(temporary, final)
                linked = True
            finally:
                os.unlink(temporary)
        else:
            with guard or nullcontext():
                replace_file(temporary, final)
        with nullcontext() if surely else suppress(OSError):
            fsync_folder(final.parent)
    except BaseException:
        for left in (temporary, *[final] * linked):  # a name that a power cut may remove is not published
            with suppress(OSError):
                left.unlink(missing_ok=True)
        raise


def beside(final: Path) -> Path:
    """A temporary name in a file's own folder, the same for no other process, thread or attempt."""
    return final.with_name(f".{final.name[:40]}.{uuid4().hex}.tmp")  # a name may have 255 bytes


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
        raise Damaged(f"{final} is a folder, where a file belongs: move it away, then go on") from error


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
