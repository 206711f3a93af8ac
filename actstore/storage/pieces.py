"""A large file of a bucket as pieces, each an object under the hash of its content.

A new version of a catalog shares most of its blocks with the version before. So a writer puts only
the pieces that are new, and a reader fetches only those that no file of its cache has. A list of
the pieces stands in the place of the file's own object.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from actstore.errors import Damaged

FROM = 1 << 24  # bytes: a smaller file is one object
HEADER, BLOCK = 3 << 12, 1 << 18  # of DuckDB's files: what each checkpoint changes, and then blocks
MOST = 2048  # pieces of a file; of a larger one, each has more blocks
LONGEST = 1 << 20  # bytes of a list
AT_ONCE = 32  # pieces that are put or fetched at the same time
LIST = re.compile(rb"actstore pieces 1\n(\d{1,19}) (\d{1,19})\n((?:[0-9a-f]{32}\n)*)")


@dataclass(frozen=True)
class Pieces:
    """The pieces of a file: its header, and then stretches of one length.

    Attributes:
        size: bytes of the file.
        length: bytes of a piece after the header; the last may be shorter.
        hashes: xxh3-128 of each, hexadecimal.
    """

    size: int
    length: int
    hashes: list[str]

    @classmethod
    def of_file(cls, path: Path, length: int | None = None) -> Pieces:
        """The pieces of a file of this machine.

        Args:
            length: of a piece; default: one or more blocks, so that there are MOST at most.
        """
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = length or BLOCK * (1 << max(0, -(-size // BLOCK // MOST) - 1).bit_length())
            parts = (os.pread(file.fileno(), n, start) for start, n in _places(size, length))
            return cls(size, length, [xxhash.xxh3_128_hexdigest(part) for part in parts])

    @classmethod
    def of(cls, content: bytes) -> Pieces | None:
        """The list that an object is; None if it is none."""
        if not (found := LIST.fullmatch(content)):
            return None
        listed = cls(int(found[1]), int(found[2]), found[3].decode().split())
        is_whole = listed.length > 0 and listed.size <= listed.length * len(listed.hashes) + HEADER
        return listed if is_whole and len(list(_places(listed.size, listed.length))) == len(listed.hashes) else None

    def to_bytes(self) -> bytes:
        """The list's object."""
        return "\n".join(["actstore pieces 1", f"{self.size} {self.length}", *self.hashes, ""]).encode()

    def places(self) -> dict[str, list[tuple[int, int]]]:
        """Hash → (start, length) of each piece with that content."""
        found: dict[str, list[tuple[int, int]]] = {}
        for name, place in zip(self.hashes, _places(self.size, self.length), strict=True):
            found.setdefault(name, []).append(place)
        return found

    def put(self, path: Path, known: Iterable[str], put: Callable[[str, bytes], object]) -> None:
        """Put the pieces of a file that are not there yet.

        Args:
            known: hashes of those that are.
            put: puts one under its hash.
        """
        new = {name: places[0] for name, places in self.places().items() if name not in set(known)}
        with open(path, "rb") as file, ThreadPoolExecutor(AT_ONCE) as threads:

            def put_one(name: str) -> None:
                start, length = new[name]
                put(name, os.pread(file.fileno(), length, start))

            list(threads.map(put_one, new))

    def write(self, to: Path, near: Iterable[Path], get: Callable[[str], bytes]) -> None:
        """Write the file.

        Args:
            near: files of this machine that may have some of the pieces.
            get: fetches one by its hash.

        Raises:
            Damaged: a piece is not what was put.
        """
        left = self.places()
        with open(to, "wb") as file, ThreadPoolExecutor(AT_ONCE) as threads:
            file.truncate(self.size)

            def place(name: str, content: bytes) -> None:
                for start, _ in left[name]:
                    os.pwrite(file.fileno(), content, start)

            def fetch(name: str) -> None:
                content = get(name)
                if xxhash.xxh3_128_hexdigest(content) != name:
                    raise Damaged("a piece of it is not what was put in place")
                place(name, content)

            for path in near:
                if not left:
                    break
                with suppress(FileNotFoundError), open(path, "rb") as other:
                    for name, [(start, length), *_] in Pieces.of_file(path, self.length).places().items():
                        content = os.pread(other.fileno(), length, start) if name in left else b""
                        if content and xxhash.xxh3_128_hexdigest(content) == name:
                            place(name, content)
                            del left[name]
            list(threads.map(fetch, left))


def _places(size: int, length: int) -> Iterator[tuple[int, int]]:
    """(start, length) of each piece of a file."""
    if size:
        yield 0, min(HEADER, size)
    for start in range(HEADER, size, length):
        yield start, min(length, size - start)
