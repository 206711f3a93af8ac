"""Large files of object stores on this machine, each under the hash of its content.

They are catalogs, and the shards that `batches` reads. All processes of a user share the folder,
and one of them fetches a file. A file that is open is locked (flock) and not removed; when the
folder grows beyond its limit, the files that were used longest ago go.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from actstore.errors import BadInput, Damaged
from actstore.storage.hashing import hash_of
from actstore.storage.refused import DISK_FULL, needing_room

FOLDER, LIMIT = "ACTSTORE_CACHE", "ACTSTORE_CACHE_SIZE"  # names of the environment
MOST_GB = 20.0
CATALOG, SHARD = ".duckdb", ".shard"  # endings of names
MOST_NEAR = 3  # files in which pieces of another are looked for
OTHERWISE = "its content is not what was put in place"
LEFT_FOR = 86400.0  # seconds after which an unfinished file is that of a process that was killed
UNFINISHED = (".*.tmp", ".*.lock")


def folder() -> Path:
    """The cache's folder: ACTSTORE_CACHE, or `actstore` in the user's folder of caches."""
    named = os.environ.get(FOLDER)
    return Path(named or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "actstore"))


@contextmanager
def cached(name: str, fetch: Callable[[Path], object]) -> Iterator[Path]:
    """The path of a catalog in the cache; it stays in the context. See `opened`."""
    descriptor = opened(name, fetch)
    try:
        yield folder() / (name + CATALOG)
    finally:
        os.close(descriptor)


def opened(name: str, fetch: Callable[[Path], object], ending: str = CATALOG, check: bool = True) -> int:
    """A descriptor of a file of the cache, which is fetched if it is not there or not whole.

    The file stays until the caller closes the descriptor.

    Args:
        name: xxh3-128 of the content, hexadecimal.
        fetch: writes the content to a path.
        ending: CATALOG or SHARD.
        check: False leaves out the comparison of a file that is there with its hash.

    Raises:
        BadInput: the cache's folder cannot be written.
        Damaged: what was fetched has another hash.
        NoRoom: the cache's disk is full.
    """
    path = folder() / (name + ending)
    with needing_room(path):
        descriptor = _opened(path, name, check)
        if descriptor is None:
            _make_folder(path)
            with _alone(path):  # or another process has fetched it meanwhile
                descriptor = _opened(path, name, check)
                descriptor = _put(path, name, fetch) if descriptor is None else descriptor
        return descriptor


def put(name: str, fetch: Callable[[Path], object]) -> None:
    """Put a catalog into the cache, and remove what is beyond the limit; raises as `opened`."""
    path = folder() / (name + CATALOG)
    _make_folder(path)
    os.close(_put(path, name, fetch))


def _make_folder(path: Path) -> None:
    """Make the cache's folder, in which a path is.

    Raises:
        BadInput: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise BadInput(
            f"the cache {path.parent} cannot be written ({error.strerror}); name another folder (`--cache DIR`, {FOLDER})"
        ) from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from fetching the same file meanwhile."""
    lock = path.with_name(f".{path.name}.lock")
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _put(path: Path, name: str, fetch: Callable[[Path], object]) -> int:
    """Put a file in place, and remove what is beyond the limit; gives a locked descriptor of it."""
    temporary = path.with_name(f".{name}.{uuid4().hex}.tmp")
    try:
        try:
            fetch(temporary)
        except OSError as error:
            if error.errno not in DISK_FULL or not _shrink(path, 0):
                raise
            fetch(temporary)
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # before another process can remove it
            if hash_of(descriptor) != name:
                raise Damaged(OTHERWISE)
            os.chmod(temporary, 0o400)
            os.replace(temporary, path)
            _shrink(path, limit())
        except BaseException:
            os.close(descriptor)
            raise
    finally:
        temporary.unlink(missing_ok=True)
    return descriptor


def recent() -> list[Path]:
    """The catalogs that were used last, the last first; their content may be any."""
    found = []
    for path in folder().glob(f"*{CATALOG}"):
        with suppress(OSError):
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)[:MOST_NEAR]]


def drop(name: str) -> None:
    """Remove a catalog that no place has any more, unless somebody has it open."""
    _removed(folder() / (name + CATALOG))


def _opened(path: Path, name: str, check: bool) -> int | None:
    """A locked descriptor of a whole file of the cache; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_still(path, descriptor) and (not check or hash_of(descriptor) == name):
            with suppress(OSError):
                os.utime(descriptor)  # used now
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _shrink(kept: Path, most: float) -> bool:
    """Remove the files that were used longest ago, as far as nobody has them open.

    Args:
        kept: a file that stays.
        most: bytes that may stay.

    Returns:
        True if a file was removed.
    """
    files, are_removed = [], False
    for unfinished in [path for pattern in UNFINISHED for path in kept.parent.glob(pattern)]:
        with suppress(OSError):
            if unfinished.stat().st_mtime < time.time() - LEFT_FOR:
                unfinished.unlink()
    for path in [path for ending in (CATALOG, SHARD) for path in kept.parent.glob(f"*{ending}")]:
        with suppress(OSError):
            about = path.stat()
            files.append((about.st_mtime, about.st_size, path))
    left = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if left <= most:
            break
        if path != kept and _removed(path):
            left, are_removed = left - size, True
    return are_removed


def _removed(path: Path) -> bool:
    with suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False


def limit() -> float:
    """Most bytes of the cache, from ACTSTORE_CACHE_SIZE.

    Raises:
        BadInput: the variable holds no number of gigabytes.
    """
    text = os.environ.get(LIMIT) or str(MOST_GB)
    try:
        most = float(text)
    except ValueError:
        most = -1.0
    if not 0 <= most < float("inf"):
        raise BadInput(f"got {LIMIT} {text!r}; it is a number of gigabytes, such as {MOST_GB:g}")
    return most * 1e9
