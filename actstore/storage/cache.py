"""Large files of object stores on this machine, each under the hash of its content.

All processes of a user share the folder. A file that is open is locked (flock) and not removed;
when the folder grows beyond its limit, the files that were used longest ago go.
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
ENDING = ".duckdb"
MOST_NEAR = 3  # files in which pieces of another are looked for
LEFT_FOR = 86400.0  # seconds after which an unfinished file is that of a process that was killed


def folder() -> Path:
    """The cache's folder: ACTSTORE_CACHE, or `actstore` in the user's folder of caches."""
    named = os.environ.get(FOLDER)
    return Path(named or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "actstore"))


@contextmanager
def cached(name: str, fetch: Callable[[Path], object]) -> Iterator[Path]:
    """A file of the cache, fetched if it is not there or not whole; it stays in the context.

    Args:
        name: xxh3-128 of the content, hexadecimal.
        fetch: writes the content to a path.

    Raises:
        BadInput: the cache's folder cannot be written.
        Damaged: what was fetched has another hash.
        NoRoom: the cache's disk is full.
    """
    path = folder() / (name + ENDING)
    with needing_room(path):
        descriptor = _opened(path, name)
        if descriptor is None:
            put(name, fetch)
            descriptor = _opened(path, name)
    if descriptor is None:
        raise Damaged(f"{path} does not keep what is written to it; name another folder for the cache ({FOLDER})")
    try:
        yield path
    finally:
        os.close(descriptor)


def put(name: str, fetch: Callable[[Path], object]) -> None:
    """Put a file into the cache, and remove what is beyond the limit; raises as `cached`."""
    path = folder() / (name + ENDING)
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
    temporary = path.with_name(f".{name}.{uuid4().hex}.tmp")
    try:
        fetch(temporary)
        with open(temporary, "rb") as file:
            if hash_of(file.fileno()) != name:
                raise Damaged("its content is not what was put in place")
        os.chmod(temporary, 0o400)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _shrink(path)


def recent() -> list[Path]:
    """The files that were used last, the last first; their content may be any."""
    found = []
    for path in folder().glob(f"*{ENDING}"):
        with suppress(OSError):
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)[:MOST_NEAR]]


def drop(name: str) -> None:
    """Remove a file that no place has any more, unless somebody has it open."""
    _removed(folder() / (name + ENDING))


def _opened(path: Path, name: str) -> int | None:
    """A locked descriptor of a whole file of the cache; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_still(path, descriptor) and hash_of(descriptor) == name:
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


def _shrink(kept: Path) -> None:
    """Remove the files that were used longest ago, as far as nobody has them open."""
    files = []
    for unfinished in kept.parent.glob(".*.tmp"):
        with suppress(OSError):
            if unfinished.stat().st_mtime < time.time() - LEFT_FOR:
                unfinished.unlink()
    for path in kept.parent.glob(f"*{ENDING}"):
        with suppress(OSError):
            about = path.stat()
            files.append((about.st_mtime, about.st_size, path))
    left = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if left <= limit():
            return
        if path != kept and _removed(path):
            left -= size


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
