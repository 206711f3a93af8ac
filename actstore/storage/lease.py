"""The right to write to a store, which one process at a time holds."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from actstore.errors import Busy, Damaged
from actstore.storage.local import relying_on
from actstore.storage.machine import check_process

LOCK = ".lock"
LOOK_AGAIN = 0.1  # seconds between looks at a lease that another holds


@dataclass(frozen=True)
class Lease:
    """The right to write to a store, while `lease` lasts."""

    root: Path
    descriptor: int
    process: int = field(default_factory=os.getpid)

    def check(self) -> None:
        """Look whether the store is still where it was; what is written elsewhere would belong to no store.

        Raises:
            Damaged: it was moved or removed, or another is in its place.
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
    """Hold the store for writing; the kernel drops it with the process, however that ends.

    Args:
        wait: seconds to wait for another process that holds it.

    Raises:
        Busy: another process holds it, and did so for all that time; the message says which.
        Unsupported: the file system has no locks.
    """
    deadline = time.monotonic() + wait
    with open(root / LOCK, "a+", encoding="utf-8", errors="backslashreplace", opener=_open_lock) as file:  # any bytes
        while not _taken(file.fileno(), root):
            if not time.monotonic() < deadline:  # NaN waits for nothing
                file.seek(0)
                holder = file.read().strip() or "another process"
                waited = f" (waited {wait:g} s; --wait SECONDS sets how long)" if wait else ""
                raise Busy(f"{root} is being written by {holder}; wait for it or stop it, then go on{waited}")
            time.sleep(LOOK_AGAIN)
        with suppress(OSError):  # a disk may have no room for who holds it, and the lease holds all the same
            _sign(file.fileno())
        held = Lease(root, file.fileno())
        yield held
        with suppress(OSError):
            if os.getpid() == held.process:  # one that was forked leaves the name of the one that still holds it
                os.ftruncate(file.fileno(), 0)


def _open_lock(path: str, flags: int) -> int:
    """Descriptor of the lease's file, made if need be.

    Raises:
        Damaged: something else stands there.
    """
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # a pipe would wait
    except (IsADirectoryError, FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{path} cannot be opened ({error.strerror}); remove what stands there, then go on") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{path} is no regular file; remove it, then go on")
    return descriptor


def wait_until_free(root: Path, wait: float) -> None:
    """Wait until no process holds the store for writing; for work whose end is to write, before it begins.

    Args:
        root: a store; where there is none yet, nothing holds it.
        wait: seconds.

    Raises:
        Busy: another process held it for all that time.
        OSError: the store cannot be written.
    """
    if (root / "store.json").exists():
        with lease(root, wait):
            pass


def _taken(descriptor: int, root: Path) -> bool:
    try:
        with relying_on("locks (flock)", root):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(descriptor: int) -> None:
    """Write into the lease's file who holds it, on one line, whatever the process's arguments."""
    command = " ".join(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]).split())
    os.ftruncate(descriptor, 0)
    os.write(
        descriptor, f"process {os.getpid()} on {socket.gethostname()}: {command}\n".encode(errors="backslashreplace")
    )
