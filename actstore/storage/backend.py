"""What a place for a store's bytes must do. storage/local.py is one: a folder of this machine."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from actstore.errors import Damaged
from actstore.storage.content import Hash, Size
from actstore.storage.hashing import hash_of

Content = bytes | memoryview | Callable[[Path], object]  # a function writes to the path it is given
ANY = "*"  # in place of a token: whatever stands there
ENDLESS = 1 << 60  # bytes of free room, or of a file, where nothing ends


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
    tests/storage_contract.py tests each promise. The methods with a body suit a place whose files
    are no files of this machine, and which has no links.

    Attributes:
        root: the place's address, for messages and for storage.at.
        at_once: files that are best published, hashed or deleted at the same time, see `several`.
        committed: hashes that each file is compared with when it is opened; None compares nothing.
        reads_ranges: True if a few rows of a file are better read by ranges than from a copy of it.
    """

    root: Path
    at_once: int = 1
    committed: Mapping[str, str] | None = None
    reads_ranges: bool = False

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

    def adopt(self, path: str, source: Storage, file: File) -> File:
        """Publish a file of another place, unchanged; the two places may then share its bytes.

        Args:
            path: of the file here.
            source: the other place.
            file: the file there, as it was committed.

        Returns:
            The file's path here, size and hash.

        Raises:
            FileNotFoundError: the file is not there.
            Damaged: the file is not what was committed, or the name is taken by other bytes.
            NoRoom, Unsupported: see publish.
        """
        content = source.read(file.path, file.bytes)
        if xxhash.xxh3_128_hexdigest(content) != file.xxh3_128:
            raise Damaged(f"{source.root / file.path} is not what was committed")
        return self.publish(path, content)

    def shares(self, source: Storage) -> bool:
        """True if a file that is adopted from the other place takes no room here."""
        return False

    def swap(self, path: str, content: Content, expected: str | None = ANY, number: int | None = None) -> None:
        """Replace a file, durably, whole or not at all.

        Args:
            path: of the file.
            content: its new bytes, or a function that writes them to a given local path.
            expected: the present file's token, None if there must be no file, ANY for no check.
            number: the snapshot's, of a catalog; a place may note it beside the file.

        Raises:
            Busy: the present file is not the expected one, and stays.
            NoRoom: the place is full; the present file stays.
        """

    def keep_earlier(self, path: str) -> None:
        """Keep the bytes of a file for `take_earlier`, before a swap; a place may keep none."""
        return None

    def forget_earlier(self, path: str) -> None:
        """Remove what was kept of a file."""
        return None

    def take_earlier(self, path: str, to: Path, hashes: Collection[str]) -> bool:
        """Move what was kept of a file to a path of this machine, to be changed there.

        Args:
            path: of the file.
            to: the path that a function given to `swap` got.
            hashes: of contents that may be taken.

        Returns:
            False if nothing was kept, or somebody still reads it; then nothing is kept any more.
        """
        return False

    def token(self, path: str) -> str | None:
        """xxh3-128, hexadecimal, of a file's content, for `swap`; None if there is no file."""

    def read(self, path: str, longest: int = ...) -> bytes:
        """The content of a file; a file of more than `longest` bytes is Damaged.

        ENDLESS for `longest` takes a file of any size.
        """

    def read_ranges(self, path: str, ranges: Iterable[tuple[int, int]]) -> Sequence[bytes]:
        """The bytes of each (start, length), in that order; a range ends with the file."""

    def end(self, path: str, n_bytes: int) -> tuple[int, bytes]:
        """The size of a file, in bytes, and its last bytes; all of a shorter file."""
        size = self.size(path)
        return size, bytes(self.read_ranges(path, [(max(size - n_bytes, 0), n_bytes)])[0])

    def hashed(self, path: str) -> tuple[int, str]:
        """The size of a file, in bytes, and its xxh3-128, hexadecimal, by the place's own bytes."""
        descriptor = self.descriptor(path)
        try:
            return os.fstat(descriptor).st_size, hash_of(descriptor)
        finally:
            os.close(descriptor)

    def size(self, path: str) -> int:
        """Size of a file, in bytes."""

    def sizes(self, paths: Sequence[str]) -> Mapping[str, int]:
        """Sizes of those files that are there, where asking for each takes long; default: none.

        Args:
            paths: of the files; the answer may hold others, too.
        """
        return {}

    def ahead(self, paths: Sequence[str]) -> Mapping[str, bytes]:
        """Contents of small files, where reading each takes long; default: none.

        A file that cannot be read is left out. A place that is held for reading may keep them
        until each is read.
        """
        return {}

    def has(self, path: str) -> bool:
        """True if something has the path."""

    def age(self, path: str) -> float:
        """Seconds since a file was written, by the place's own clock and not this machine's."""

    def list(self, prefix: str) -> Sequence[str]:
        """Paths that start with a prefix, sorted; unfinished files are left out."""

    def delete(self, path: str) -> None:
        """Remove a file, or whatever stands there; do nothing if nothing does."""

    def lease(self, wait: float = 0.0) -> AbstractContextManager[Held]:
        """Lock the place for writing, until the context or the process ends.

        Args:
            wait: seconds to wait for another process.

        Raises:
            Busy: another process held the lease for all that time.
        """

    def free_room(self) -> int:
        """Bytes that can still be written; ENDLESS if there is no end."""

    def open_for_map(self, path: str) -> int | None:
        """A descriptor that can be mapped, which the caller closes; None if this place has none."""
        return None

    def descriptor(self, path: str) -> int:
        """A descriptor of a file, or of a nameless copy of this machine; the caller closes it."""
        if (descriptor := self.open_for_map(path)) is not None:
            return descriptor
        with tempfile.TemporaryFile() as copy:
            copy.write(self.read(path, ENDLESS))
            copy.flush()
            return os.dup(copy.fileno())

    def local(self, paths: Iterable[str]) -> AbstractContextManager[Sequence[Path]]:
        """Files or folders as paths of this machine, for a library that opens paths.

        The context gives a path for each: the file itself, or a copy that lasts as long.

        Raises:
            FileNotFoundError: nothing has the path, and there is nothing to copy.
        """
        return _copies(self, paths)

    def hold(self, committed: Mapping[str, str] | None = None, kept: Mapping[str, str] | None = None) -> Reading:
        """Open the place for reading; the caller closes it.

        Args:
            committed: xxh3-128 of each file that may be opened, which is compared; default: none.
            kept: xxh3-128 of files that are best read from whole copies, which a place may keep on
                this machine; default: none.

        Raises:
            OSError: there is no such place.
        """

    def make(self, last: str, folders: Iterable[str], fill: Callable[[Path], object], wait: float = 0.0) -> None:
        """Make the place with its first files, whole or not at all; do nothing if it is made.

        Args:
            last: the file that `fill` publishes last, which a place that is made has.
            folders: folders to make, where there are folders.
            fill: publishes the files into the place at the given address.
            wait: seconds to wait for another process that is making it.

        Raises:
            Busy, NoRoom, Unsupported: see lease and publish.
        """
        with self.lease(wait):
            if not self.has(last):
                fill(self.root)

    def unusable(self) -> str:
        """Why no store can be made here; "" if one can."""
        return ""

    def unwritable(self) -> str:
        """Why nothing can be written here; "" if nothing speaks against it."""
        return ""

    def linked(self, paths: Iterable[str]) -> Sequence[str]:
        """Those of some paths, and of the folders above, that are links; outermost first."""
        return []

    def broken(self, path: str) -> str:
        """Describe the link on the way to a file that leads nowhere; "" if there is none."""
        return ""

    def unnamed(self, folders: Iterable[str], named: Iterable[str]) -> Sequence[str]:
        """Files in some folders that are not on the way to a named path, sorted."""
        there = {path for folder in folders for path in self.list(f"{folder}/")}
        return sorted(there.difference(named))

    def tidy(self, names: Iterable[str], folders: Iterable[str]) -> None:
        """Remove what interrupted swaps of some files left, and what interrupted publishes left.

        Args:
            names: files at the top of the place, by the first part of their names.
            folders: folders in which files are published.
        """


class Reading(Storage, Protocol):
    """A place that is held open for reading."""

    def close(self) -> None:
        """Let go of the place."""

    def identity(self) -> tuple[Any, ...]:
        """Numbers and texts by which another process tells whether it has the same place.

        Raises:
            BadInput: the place is closed, or this process was forked after it was opened.
        """

    def check(self) -> None:
        """Raise Damaged if the place was moved, removed or replaced since it was opened."""


@contextmanager
def _copies(place: Storage, paths: Iterable[str]) -> Iterator[Sequence[Path]]:
    with tempfile.TemporaryDirectory(prefix="actstore-") as folder:
        wanted = list(paths)
        for path in wanted:
            inside = [found for found in place.list(path) if found == path or found.startswith(f"{path}/")]
            if not inside:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place.root / path))
            for found in inside:
                (copy := Path(folder, found)).parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(place.read(found, ENDLESS))
        yield [Path(folder, path) for path in wanted]
