"""A local folder as the place of a store's bytes; files are written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from uuid import uuid4

import xxhash

from actstore.errors import Busy, Damaged, NoRoom, Unsupported
from actstore.storage import lease as leases
from actstore.storage.backend import ANY, Content, File
from actstore.storage.hashing import hash_of
from actstore.storage.lease import Lease
from actstore.storage.refused import DISK_FULL, needing_room, relying_on, say_where
from actstore.storage.regular import LONGEST, irregular, open_regular, read_regular

DIRECT_FROM = 1 << 20  # bytes; a smaller copy through the page cache costs nothing
BLOCK = mmap.PAGESIZE  # O_DIRECT wants memory, offsets and lengths aligned to this, on any disk of today
UNDER_WAY = re.compile(r"\..*\.tmp")  # names of unfinished files; see `beside`


class Local:
    """A folder of this machine. Storage says what each method takes, gives and raises."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def publish(self, path: str, content: bytes | memoryview) -> File:
        """See Storage.publish."""
        file, target = File(path, len(content), xxhash.xxh3_128_hexdigest(content)), self.root / path
        try:
            make_folder(target.parent)
            try:
                write_whole(target, content, once=True)
            except FileExistsError:
                if self.size(path) != file.bytes or self.token(path) != file.xxh3_128:
                    raise Damaged(
                        f"{target} exists with other content, and no commit names it: another writer is at work on this "
                        "store, or left it behind a link; if none is at work, remove that file"
                    ) from None
                fsync_folder(target.parent)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise NoRoom(
                    f"no room for {target} ({len(content):,} bytes): {error.strerror}; free some, then go on"
                ) from error
            say_where(error, target)
            raise
        return file

    def swap(self, path: str, content: Content, expected: str | None = ANY) -> None:
        """See Storage.swap."""
        target = self.root / path
        with needing_room(target):
            make_folder(target.parent)
            write_whole(target, content, guard=nullcontext() if expected == ANY else self._only_after(path, expected))

    @contextmanager
    def _only_after(self, path: str, expected: str | None) -> Iterator[None]:
        """Keep other swaps out; raise Busy if the file's token is not the expected one."""
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # some file systems lock no folder; the lease still keeps others out
                fcntl.flock(folder, fcntl.LOCK_EX)
            if self.token(path) != expected:
                raise Busy(f"another process changed {self.root / path} meanwhile; wait for it or stop it, then go on")
            yield
        finally:
            os.close(folder)

    def token(self, path: str) -> str | None:
        """See Storage.token; xxh3-128 of the file's content."""
        try:
            descriptor = self.open_for_map(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return hash_of(descriptor)
        finally:
            os.close(descriptor)

    def read(self, path: str, longest: int = LONGEST) -> bytes:
        """See Storage.read."""
        return read_regular(self.root / path, self.open_for_map(path), longest)

    def read_ranges(self, path: str, ranges: Iterable[tuple[int, int]]) -> Sequence[bytes]:
        """See Storage.read_ranges."""
        descriptor = self.open_for_map(path)
        try:
            return [os.pread(descriptor, length, start) for start, length in ranges]
        finally:
            os.close(descriptor)

    def size(self, path: str) -> int:
        """See Storage.size."""
        found = os.stat(self.root / path)
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(irregular(self.root / path, found.st_mode))
        return found.st_size

    def list(self, prefix: str) -> Sequence[str]:
        """See Storage.list; links to folders are followed, and each folder is entered once."""
        found, seen = list[str](), set[str]()
        for folder, inner, files in os.walk(self.root / prefix.rpartition("/")[0], True, _unless_gone, True):
            seen.add(os.path.realpath(folder))
            inner[:] = [name for name in inner if os.path.realpath(os.path.join(folder, name)) not in seen]
            inside = os.path.relpath(folder, self.root)
            found += [name if inside == "." else f"{inside}/{name}" for name in files if not UNDER_WAY.fullmatch(name)]
        return sorted(path for path in found if path.startswith(prefix))

    def delete(self, path: str) -> None:
        """See Storage.delete."""
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(self.root / path)

    def lease(self, wait: float = 0.0) -> AbstractContextManager[Lease]:
        """See Storage.lease."""
        return leases.lease(self.root, wait)

    def free_room(self) -> int:
        """See Storage.free_room; the folder need not exist yet."""
        return shutil.disk_usage(_existing(self.root)).free

    def open_for_map(self, path: str) -> int:
        """See Storage.open_for_map; never None."""
        return open_regular(self.root / path)


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


def check_room(root: Path, wanted: int, what: str) -> int:
    """Returns the bytes free on the disk where the store is (or will be).

    Args:
        wanted: bytes needed.
        what: what needs them, for the message.

    Raises:
        NoRoom: fewer than `wanted` bytes are free.
    """
    free = Local(root).free_room()
    if free < wanted:
        raise NoRoom(
            f"{what} needs {wanted / 1e9:.2f} GB and {_existing(root)} has {free / 1e9:.2f} GB free; free some or ask for less"
        )
    return free


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _existing(folder: Path) -> Path:
    """The folder itself, or the first folder above that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())
