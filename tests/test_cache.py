"""The cache of files of buckets: one fetches what several need, and what nobody has open gives way."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from actstore.errors import Damaged, NoRoom
from actstore.storage import cache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(content: bytes, ending: str = cache.SHARD) -> Path:
    """The path of a file of the cache, which nobody has open."""
    name = xxhash.xxh3_128_hexdigest(content)
    os.close(cache.opened(name, lambda path: path.write_bytes(content), ending))
    return cache.folder() / (name + ending)


def test_of_several_that_need_a_file_one_fetches_it(folder: Path) -> None:
    fetched, another = list[str](), threading.Event()

    def fetch(path: Path) -> None:
        fetched.append(path.name)
        if len(fetched) > 1:
            another.set()
        another.wait(0.3)
        path.write_bytes(b"x")

    def read(_: int) -> bytes:
        with os.fdopen(cache.opened(xxhash.xxh3_128_hexdigest(b"x"), fetch, cache.SHARD), "rb") as file:
            return file.read()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, range(4))) == [b"x"] * 4
    assert len(fetched) == 1
    assert [path.suffix for path in folder.iterdir()] == [cache.SHARD], "no lock is left"


def test_a_fetch_that_failed_is_done_by_the_next(folder: Path) -> None:
    name = xxhash.xxh3_128_hexdigest(b"x")
    with pytest.raises(Damaged, match="not what was put in place"):
        cache.opened(name, lambda path: path.write_bytes(b"y"))
    assert not list(folder.iterdir())
    os.close(cache.opened(name, lambda path: path.write_bytes(b"x")))


def test_where_the_disk_is_full_what_nobody_has_open_gives_way() -> None:
    held, other = kept(b"held", cache.CATALOG), kept(b"other")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fetch(path: Path) -> None:
        if other.exists():
            raise full
        path.write_bytes(b"x")

    descriptor = cache.opened(held.stem, fetch)
    try:
        os.close(cache.opened(xxhash.xxh3_128_hexdigest(b"x"), fetch))
        assert held.exists()
        other.write_bytes(b"of others, and in use")
        with open(other, "rb") as used:
            fcntl.flock(used, fcntl.LOCK_SH)
            with pytest.raises(NoRoom, match="free some, then go on"):
                cache.opened("0" * 32, fetch)
    finally:
        os.close(descriptor)


def test_shards_and_catalogs_share_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.LIMIT, "25e-9")
    first, second, third = kept(bytes(10)), kept(b"1" * 10, cache.CATALOG), kept(b"2" * 10)
    assert [path.exists() for path in (first, second, third)] == [False, True, True]
    assert cache.recent() == [second], "pieces of catalogs are looked for in catalogs"
