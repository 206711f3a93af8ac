"""What a place for a store's bytes must do. storage/local.py is one: a folder of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from actstore.storage.content import Hash, Size

Content = bytes | memoryview | Callable[[Path], object]  # a function writes to the path it is given
ANY = "*"  # in place of a token: whatever stands there


@dataclass(frozen=True)
class File:
    """A published file.

    Attributes:
        path: relative to the store, with forward slashes.
        bytes: its size.
        xxh3_128: hash of its content, hexadecimal.
    """

    path: str
    bytes: Size
    xxh3_128: Hash


class Held(Protocol):
    """The right to write to a place."""

    def check(self) -> None:
        """Raise Damaged if the place was moved, removed or replaced."""


class Storage(Protocol):
    """A place for bytes.

    Paths are relative to the place, with forward slashes. Methods that read a file raise
    FileNotFoundError if nothing has the path, and Damaged if it is not a regular file.
    tests/storage_contract.py tests each promise.
    """

    def publish(self, path: str, content: bytes | memoryview) -> File:
        """Publish one file, durably, under a name that is free or has the same bytes.

        Args:
            path: of the file.

        Returns:
            The file's path, size and hash.

        Raises:
            Damaged: the name is taken by other bytes.
            NoRoom: the place is full; nothing is left under the name.
            Unsupported: the place cannot publish durably; nothing is left under the name.
        """

    def swap(self, path: str, content: Content, expected: str | None = ANY) -> None:
        """Replace a file, durably, whole or not at all.

        Args:
            path: of the file.
            content: its new bytes, or a function that writes them to a given local path.
            expected: the present file's token, None if there must be no file, ANY for no check.

        Raises:
            Busy: the present file is not the expected one, and stays.
            NoRoom: the place is full; the present file stays.
        """

    def token(self, path: str) -> str | None:
        """The version of a file's content, for `swap`; None if there is no file."""

    def read(self, path: str, longest: int = ...) -> bytes:
        """The content of a file; a file of more than `longest` bytes is Damaged."""

    def read_ranges(self, path: str, ranges: Iterable[tuple[int, int]]) -> Sequence[bytes]:
        """The bytes of each (start, length), in that order; a range ends with the file."""

    def size(self, path: str) -> int:
        """Size of a file, in bytes."""

    def list(self, prefix: str) -> Sequence[str]:
        """Paths that start with a prefix, sorted; unfinished files are left out."""

    def delete(self, path: str) -> None:
        """Remove a file; do nothing if there is none."""

    def lease(self, wait: float = 0.0) -> AbstractContextManager[Held]:
        """Lock the place for writing, until the context or the process ends.

        Args:
            wait: seconds to wait for another process.

        Raises:
            Busy: another process held the lease for all that time.
        """

    def free_room(self) -> int:
        """Bytes that can still be written."""

    def open_for_map(self, path: str) -> int | None:
        """A descriptor that can be mapped, which the caller closes; None if this place has none."""
