"""What a file system refuses, as the package's errors."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from actstore.errors import NoRoom, Unsupported

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SUCH_CALL = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
QUOTED = re.compile(r"\(os error (\d+)\)")  # an error of the system in the words of polars and safetensors
ABILITIES = {  # what a file system may lack, and the errors that then come
    "hard links": (*NO_SUCH_CALL, errno.EPERM, errno.EMLINK),
    "locks (flock)": (*NO_SUCH_CALL, errno.ENOLCK, errno.EINVAL),
    "fsync": (*NO_SUCH_CALL, errno.EINVAL),
}


def say_where(error: OSError, path: Path) -> None:
    """Add the path to an error of the system; errors of calls on a descriptor name none."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


@contextmanager
def needing_room(path: Path) -> Iterator[None]:
    """Turn the system's error of a full disk into the package's.

    Raises:
        NoRoom: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            say_where(error, path)
            where, reason, said = error.filename or path, error.errno, error.strerror
        else:
            quoted = QUOTED.search(str(error))
            where, reason = path, int(quoted[1]) if quoted else 0
            said = os.strerror(reason)
        if reason in DISK_FULL:
            raise NoRoom(f"no room for {where}: {said}; free some, then go on") from error
        raise


@contextmanager
def relying_on(ability: str, path: Path) -> Iterator[None]:
    """Turn the refusal of a call by a file system into an error that names the missing ability.

    Args:
        ability: one of ABILITIES.

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
