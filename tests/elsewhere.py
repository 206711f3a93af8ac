"""A second backend: files that lie where no path of the store leads, so that nothing can be mapped or opened by a path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import xxhash

from actstore.errors import Damaged
from actstore.storage.backend import ANY, Content, File, Held, Reading, Storage
from actstore.storage.local import Local

SCHEME = "elsewhere"
calls: Counter[str] = Counter()  # of this process, by verb


def address(folder: Path) -> Path:
    """The address of the store whose files lie in a folder."""
    return Path(f"{SCHEME}:{folder}")


class Elsewhere(Storage):
    """The place at an address; only the verbs that every backend must have."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files = Local(Path(str(root).removeprefix(f"{SCHEME}:")) / "objects")

    def publish(self, path: str, content: bytes | memoryview) -> File:
        calls["publish"] += 1
        return self._files.publish(path, content)

    def swap(self, path: str, content: Content, expected: str | None = ANY, number: int | None = None) -> None:
        calls["swap"] += 1
        self._files.swap(path, content, expected)

    def token(self, path: str) -> str | None:
        return self._files.token(path)

    def read(self, path: str, longest: int = 16 << 20) -> bytes:
        calls["read"] += 1
        content = self._files.read(path, longest)
        if self.committed is not None and self.committed.get(path) != xxhash.xxh3_128_hexdigest(content):
            raise Damaged(f"{self.root / path} is not what was committed")
        return content

    def read_ranges(self, path: str, ranges: Iterable[tuple[int, int]]) -> Sequence[bytes]:
        return self._files.read_ranges(path, ranges)

    def size(self, path: str) -> int:
        return self._files.size(path)

    def has(self, path: str) -> bool:
        return self._files.has(path)

    def age(self, path: str) -> float:
        return self._files.age(path)

    def list(self, prefix: str) -> Sequence[str]:
        return [path for path in self._files.list(prefix) if path != ".lock"]

    def delete(self, path: str) -> None:
        self._files.delete(path)

    def lease(self, wait: float = 0.0) -> AbstractContextManager[Held]:
        self._files.root.mkdir(parents=True, exist_ok=True)
        return self._files.lease(wait)

    def free_room(self) -> int:
        return self._files.free_room()

    def open_for_map(self, path: str) -> None:
        calls["open_for_map"] += 1
        self.size(path)  # raises for what is not there

    def hold(self, committed: Mapping[str, str] | None = None, kept: Mapping[str, str] | None = None) -> HeldElsewhere:
        return HeldElsewhere(self.root, committed)


class HeldElsewhere(Elsewhere, Reading):
    """The same, held open."""

    def __init__(self, root: Path, committed: Mapping[str, str] | None) -> None:
        super().__init__(root)
        self.committed = committed

    def close(self) -> None:
        pass

    def identity(self) -> tuple[Any, ...]:
        return (str(self.root),)

    def check(self) -> None:
        pass
