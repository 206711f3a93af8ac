"""A local folder as the place of a store's bytes; what reads it holds it open."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import xxhash

from actstore.errors import BadInput, Busy, Damaged, NoRoom, Unsupported, advised
from actstore.storage import earlier, links
from actstore.storage import lease as leases
from actstore.storage.backend import ANY, Content, File, Reading, Storage
from actstore.storage.hashing import hash_of
from actstore.storage.lease import LOCK, Lease
from actstore.storage.machine import check_process, finalize_here
from actstore.storage.refused import DISK_FULL, needing_room, say_where
from actstore.storage.regular import LONGEST, irregular, open_regular, read_regular
from actstore.storage.whole import beside, discard, fsync_folder, make_folder, write_whole

UNDER_WAY = re.compile(r"\..*\.tmp")  # names of unfinished files; see whole.beside


class Local(Storage):
    """A folder of this machine. Storage says what each method takes, gives and raises."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hashed: dict[str, tuple[str, tuple[int, ...]]] = {}  # by path: a file's token, and its state at that time

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

    def adopt(self, path: str, source: Storage, file: File) -> File:
        """See Storage.adopt; a file of the same disk gets a second name, by a hard link."""
        target, is_linked = self.root / path, False
        if self.shares(source):
            with suppress(OSError):  # the name is taken, or the file is another user's: then it is copied
                make_folder(target.parent)
                os.link(os.path.realpath(source.root / file.path), target)
                is_linked = True
        if not is_linked:
            return super().adopt(path, source, file)
        try:
            if self.size(path) != file.bytes or self.token(path) != file.xxh3_128:
                raise Damaged(f"{source.root / file.path} is not what was committed")
            fsync_folder(target.parent)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return File(path, file.bytes, file.xxh3_128)

    def shares(self, source: Storage) -> bool:
        """See Storage.shares; links are made between folders of one disk."""
        if not isinstance(source, Local):
            return False
        return os.stat(_existing(self.root)).st_dev == os.stat(source.root).st_dev

    def swap(self, path: str, content: Content, expected: str | None = ANY, number: int | None = None) -> None:
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
            if not self._is_still(path, expected) and self.token(path) != expected:
                raise Busy(f"another process changed {self.root / path} meanwhile; wait for it or stop it, then go on")
            yield
        finally:
            os.close(folder)

    def _is_still(self, path: str, expected: str | None) -> bool:
        """True if a file had the token, and the system says that no other took its place."""
        with suppress(OSError):
            return self._hashed.get(path) == (expected, _state(os.stat(self.root / path)))
        return False

    def keep_earlier(self, path: str) -> None:
        """See Storage.keep_earlier; see earlier.py for which files."""
        earlier.keep(self.root / path)

    def forget_earlier(self, path: str) -> None:
        """See Storage.forget_earlier."""
        earlier.forget(self.root / path)

    def take_earlier(self, path: str, to: Path, hashes: Collection[str]) -> bool:
        """See Storage.take_earlier."""
        return earlier.take(self.root / path, to, hashes)

    def token(self, path: str) -> str | None:
        """See Storage.token; xxh3-128 of the file's content."""
        try:
            descriptor = self.open_for_map(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            state = _state(os.fstat(descriptor))
            hashed = hash_of(descriptor)
            self._hashed[path] = hashed, state
            return hashed
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

    def end(self, path: str, n_bytes: int) -> tuple[int, bytes]:
        """See Storage.end."""
        descriptor = self.open_for_map(path)
        try:
            size = os.fstat(descriptor).st_size
            return size, os.pread(descriptor, n_bytes, max(size - n_bytes, 0))
        finally:
            os.close(descriptor)

    def size(self, path: str) -> int:
        """See Storage.size."""
        found = os.stat(f"{self.root}/{path}")  # not Path, which takes longer than the system
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(irregular(self.root / path, found.st_mode))
        return found.st_size

    def has(self, path: str) -> bool:
        """See Storage.has."""
        return (self.root / path).exists()

    def age(self, path: str) -> float:
        """See Storage.age; the clock is that of whoever keeps the folder, a file server, say."""
        written = os.stat(self.root / path).st_mtime
        now = beside(self.root / path)
        try:
            now.touch()
            return os.stat(now).st_mtime - written
        finally:
            now.unlink(missing_ok=True)

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
            discard(self.root / path)

    def lease(self, wait: float = 0.0) -> AbstractContextManager[Lease]:
        """See Storage.lease."""
        return leases.lease(self.root, wait)

    def free_room(self) -> int:
        """See Storage.free_room; the folder need not exist yet."""
        return shutil.disk_usage(_existing(self.root)).free

    def open_for_map(self, path: str) -> int:
        """See Storage.open_for_map; never None."""
        return open_regular(self.root / path)

    def local(self, paths: Iterable[str]) -> AbstractContextManager[Sequence[Path]]:
        """See Storage.local; the files themselves, which need not exist."""
        return nullcontext([self.root / path for path in paths])

    def hold(self, committed: Mapping[str, str] | None = None, kept: Mapping[str, str] | None = None) -> Folder:
        """See Storage.hold."""
        return Folder(self.root) if committed is None else CheckedFolder(self.root, committed)

    def make(self, last: str, folders: Iterable[str], fill: Callable[[Path], object], wait: float = 0.0) -> None:
        """See Storage.make; the folder is filled beside its place, and renamed."""
        under_way = self.root.parent / f".{self.root.name}.new"
        with needing_room(self.root):
            make_folder(under_way)
            try:
                with leases.lease(under_way, wait):  # the lease moves with the folder
                    if self.has(last):  # another process made it since
                        shutil.rmtree(under_way, ignore_errors=True)
                        return
                    for left in under_way.iterdir():  # left by a process that was killed
                        if left.name != LOCK:
                            discard(left)
                    for folder in folders:
                        make_folder(under_way / folder)
                    try:
                        fill(under_way)
                    except BaseException:
                        shutil.rmtree(under_way, ignore_errors=True)
                        raise
                    under_way.rename(self.root)
                    fsync_folder(self.root.parent)
            except Unsupported:  # so no other process can be at work there
                shutil.rmtree(under_way, ignore_errors=True)
                raise

    def unusable(self) -> str:
        """See Storage.unusable."""
        root = self.root
        if root.is_symlink() or (root.exists() and (not root.is_dir() or any(root.iterdir()))):
            return f"{root} exists and is no actstore store; name a new folder, or an empty one"
        if root.name in ("", "..") or (root.exists() and root.samefile(Path.cwd())):
            return f"a store is a folder of its own and cannot be made of {str(root)!r}; name a new folder"
        return ""

    def unwritable(self) -> str:
        """See Storage.unwritable."""
        above = _existing(self.root.absolute())
        if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
            return ""
        return f"{above} is read-only, or another user's" if above.is_dir() else f"{above} is no folder"

    def linked(self, paths: Iterable[str]) -> Sequence[str]:
        """See Storage.linked."""
        return links.linked(self.root, paths)

    def broken(self, path: str) -> str:
        """See Storage.broken."""
        return links.broken(self.root / path)

    def unnamed(self, folders: Iterable[str], named: Iterable[str]) -> Sequence[str]:
        """See Storage.unnamed."""
        return links.unnamed(self.root, folders, named)

    def tidy(self, names: Iterable[str], folders: Iterable[str]) -> None:
        """See Storage.tidy; empty folders go, too: one that was not fsynced must be made again."""
        for path in [path for name in names for path in self.root.glob(f".{name}.*.tmp*")]:
            discard(path)
        for folder in [self.root / folder for folder in folders if not (self.root / folder).is_symlink()]:
            links.remove_empty(str(folder))


class Folder(Local, Reading):
    """A folder whose files are opened by descriptor: a store put in its place is never read.

    Raises:
        OSError: the folder does not exist.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._process = os.getpid()
        self._close = finalize_here(self, os.close, self._descriptor)

    def close(self) -> None:
        """Close the folder's descriptor."""
        self._close()
        self._descriptor = -1  # the number may soon be another file's

    def identity(self) -> tuple[int, int]:
        """Device and inode, by which another process can tell whether it has the same folder.

        Raises:
            BadInput: the folder is closed, or this process was forked after it was opened.
        """
        check_process(self._process)
        if not self._close.alive:
            raise BadInput("the store is closed; open it again")
        about = os.fstat(self._descriptor)
        return about.st_dev, about.st_ino

    def open_for_map(self, path: str) -> int:
        """Open a file inside for reading, and return its descriptor.

        Args:
            path: relative to the folder, with forward slashes.

        Raises:
            OSError: the file cannot be opened, see os.open.
            BadInput: this process was forked after the folder was opened.
            Damaged: the path is not a regular file.
        """
        check_process(self._process)
        return open_regular(path, self._descriptor)

    def check(self) -> None:
        """Check that the folder is still what its path leads to.

        Raises:
            Damaged: the folder was moved or removed, or another is in its place.
            BadInput: this process was forked after the folder was opened.
        """
        check_process(self._process)
        try:
            is_same = os.path.samestat(os.stat(self.root), os.fstat(self._descriptor))
        except OSError:
            is_same = False
        if not is_same:
            raise Damaged(f"{self.root} was moved or replaced since it was opened; open the store again")


class CheckedFolder(Folder):
    """A folder that compares each file, whole, with its committed hash when the file is opened.

    A file is hashed when it is first opened, and again when it is opened after it moved or changed.
    Changes under an existing map are not seen. The crc32c of a chunk is not checked, since the
    file's hash covers the same bytes, and since a chunk of another shard has a right crc32c, too.

    Args:
        path: the folder.
        committed: xxh3-128 of each file that may be opened, by its path inside the folder, with
            forward slashes.
    """

    def __init__(self, path: Path, committed: Mapping[str, str]) -> None:
        super().__init__(path)
        self.committed = self._hashes = committed
        self._whole: dict[
            str, tuple[int, int]
        ] = {}  # files that were, and what the system says of one that is unchanged

    def open_for_map(self, path: str) -> int:
        """See Folder.open_for_map.

        Args:
            path: relative to the folder, with forward slashes.

        Raises:
            Damaged: the file is not what was committed.
        """
        descriptor = super().open_for_map(path)
        try:
            self._check_hash(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_hash(self, descriptor: int, path: str) -> None:
        about = os.fstat(descriptor)
        state = about.st_ino, about.st_ctime_ns
        if self._whole.get(path) == state:
            return
        if hash_of(descriptor) != self._hashes.get(path):
            raise Damaged(
                f"{self.root / path} is not what was committed (its hash is another): look with "
                f"{advised('verify', self.root)}, then mend it with {advised('repair', self.root)}"
            )
        self._whole[path] = state


def _state(about: os.stat_result) -> tuple[int, ...]:
    """What tells a file from one that takes its place; a further name does not change it."""
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _existing(folder: Path) -> Path:
    """The folder itself, or the first folder above that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())
