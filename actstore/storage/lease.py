"""The right to write to a store, held by one process at a time."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from actstore.errors import Busy, Damaged
from actstore.storage.machine import check_process, refuse_forked, signature
from actstore.storage.refused import relying_on

LOCK = ".lock"
LOOK_AGAIN = 0.1  # seconds between attempts at a lease that another process holds


@dataclass(frozen=True)
class Lease:
    """The right to write to a store, while `lease` lasts."""

    root: Path
    descriptor: int
    process: int = field(default_factory=os.getpid)

    def check(self) -> None:
        """Check that the store is still in its place; no store would hold files written elsewhere.

        Raises:
            Damaged: the store was moved or removed, or another is in its place.
            BadInput: this process was forked from the one that holds the lease.
        """
        check_process(self.process)
        try:
            is_same = os.path.samestat(os.stat(self.root / LOCK), os.fstat(self.descriptor))
        except OSError:
            is_same = False
        if not is_same:
            raise Damaged(
                f"{self.root} was moved, removed or replaced while it was written; put it back, then run the same command: "
                "what was committed is in it, and it goes on from there"
            )


@contextmanager
def lease(root: Path, wait: float = 0.0) -> Iterator[Lease]:
    """Hold the store for writing; the kernel drops the lease when the process ends, in any way.

    Args:
        wait: seconds to wait for another process that holds the store.

    Yields:
        The Lease.

    Raises:
        Busy: another process held the store for all that time; the message says which.
        Unsupported: the file system has no locks.
        BadInput: this process was forked from one that had opened a store.
    """
    refuse_forked()
    deadline = time.monotonic() + wait
    with open(root / LOCK, "a+", encoding="utf-8", errors="backslashreplace", opener=_open_lock) as file:  # any bytes
        while not _taken(file.fileno(), root):
            if not time.monotonic() < deadline:  # NaN waits for nothing
                file.seek(0)
                holder = file.read().strip() or "another process"
                waited = f" (waited {wait:g} s; --wait SECONDS sets how long)" if wait else ""
                raise Busy(f"{root} is being written by {holder}; wait for it or stop it, then go on{waited}")
            time.sleep(LOOK_AGAIN)
        with suppress(OSError):  # the lease holds even if the disk has no room for its holder's name
            _sign(file.fileno())
        held = Lease(root, file.fileno())
        yield held
        with suppress(OSError):
            if os.getpid() == held.process:  # one that was forked leaves the name of the one that still holds it
                os.ftruncate(file.fileno(), 0)


def _open_lock(path: str, flags: int) -> int:
    """Open the lease's file, which is made if need be, and return its descriptor.

    Raises:
        Damaged: the path is not a regular file.
    """
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # a pipe would wait
    except (IsADirectoryError, FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{path} cannot be opened ({error.strerror}); remove what stands there, then go on") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{path} is no regular file; remove it, then go on")
    return descriptor


def _taken(descriptor: int, root: Path) -> bool:
    try:
        with relying_on("locks (flock)", root):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(descriptor: int) -> None:
    """Write who holds the lease into its file, on one line, whatever the process's arguments."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{signature()}\n".encode(errors="backslashreplace"))
