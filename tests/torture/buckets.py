"""A real S3 server, and what happens on the way to it: kills, cut connections, slowness, races.

    python -m tests.torture.buckets          # 30 kills, each shard and a tenth of all requests cut, 8 publishers on 200 keys
    python -m tests.torture.buckets --share 0.1

After each, a reader opens what is there, the same run goes on, and every object is held against a folder's file.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import TYPE_CHECKING

from actstore.cli.progress import progress
from actstore.errors import ActstoreError, Busy, Damaged, Unreachable
from tests.bucket_server import BUCKET, server
from tests.cut_proxy import cutting

if TYPE_CHECKING:
    from actstore.store import Store

FAULTS = ("refuse", "lost", "torn", "503")
DERIVED = ("catalog.duckdb", "catalog.json", "store.json", ".lock")
N_SHARDS, N_KEYS, RACERS = 6, 200, 8
numbers = count()


def write(root: Path) -> None:
    """A run of six batches, a shard each, into a store that is made."""
    from tests.stores import fake

    fake(n_trees=12, trees_per_shard=2, sites=("resid_post.0",)).store(root)


def address() -> Path:
    return Path(f"s3://{BUCKET}/torture-{next(numbers)}")


def look(root: Path) -> None:
    """Whatever is there is a whole store of so many batches, or none yet."""
    from actstore.storage.at import at
    from actstore.store import Store
    from actstore.upkeep.verify import verify

    if not at(root).has("store.json"):
        return
    with Store(root) as store:
        n_trees, n_shards = store.sql("select (select count(*) from trees), (select count(*) from shards)").row(0)
        assert n_trees == 2 * n_shards, f"{n_trees} trees and {n_shards} shards"
        if n_shards:
            rows_of(store)
            batch_of(store)
    assert not verify(root).damage


def same(root: Path, folder: Path) -> None:
    """Every object is the file of a store that met nothing."""
    from actstore.storage.at import at
    from tests.stores import files

    ours, place = files(folder), at(root)
    assert set(place.list("")) == ours.keys() - {".lock"}
    for path in ours.keys() - set(DERIVED):
        assert place.read(path) == ours[path], path


def kill(root: Path, after: float) -> bool:
    """Write in another process and kill it; True if it had ended before."""
    writer = subprocess.Popen([sys.executable, "-m", "tests.torture.buckets", "--write", str(root)])
    with suppress(subprocess.TimeoutExpired):
        assert writer.wait(timeout=after) == 0
        return True
    writer.kill()
    writer.wait()
    return False


def kills(folder: Path, n: int) -> None:
    rng, began, root = random.Random(0), time.monotonic(), address()
    assert kill(root, 1e3)
    takes = time.monotonic() - began
    same(root, folder)
    root = address()
    with progress("kills", n, "kills") as advance:
        for number in range(n):
            has_ended = kill(root, takes * rng.uniform(0.3, 1))
            look(root)
            if has_ended:
                same(root, folder)
                root = address()
            advance(number + 1)
    assert kill(root, 1e3)
    same(root, folder)


def cuts(folder: Path, s3: str, share: float) -> None:
    """From the n-th request on every one fails, for each n; then the same run goes on."""
    with cutting(s3) as (url, proxy):
        os.environ["AWS_ENDPOINT_URL"] = url
        asked = Counter[str]()
        proxy.choose = lambda method, path: asked.update([method]) or ""
        write(address())
        places = [n for n in range(asked.total()) if random.Random(n).random() < share / 10]
        with progress("cuts", len(places) * len(FAULTS), "cuts") as advance:
            for number, (fault, place) in enumerate((fault, place) for fault in FAULTS for place in places):
                left, lock = [place], threading.Lock()

                def choose(
                    method: str, path: str, fault: str = fault, left: list[int] = left, lock: threading.Lock = lock
                ) -> str:
                    with lock:
                        left[0] -= 1
                        return fault if left[0] < 0 else ""

                proxy.choose, root = choose, address()
                with suppress(Unreachable, Busy):
                    write(root)
                proxy.choose = lambda method, path: ""
                look(root)
                go_on(root)
                same(root, folder)
                advance(number + 1)
        proxy.delay, proxy.bytes_per_second = 0.03, 5e6
        began = time.monotonic()
        write(root := address())
        look(root)
        same(root, folder)
        print(f"30 ms for each request and 5 MB/s: {time.monotonic() - began:.1f} s")
    os.environ["AWS_ENDPOINT_URL"] = s3


class Cut:
    """Ends the connection in the middle of one shard, once, or for good.

    Args:
        method: PUT or GET: whether the shard is written or read.
        place: the requests for shards before this one.
        for_good: every later request is refused.
    """

    def __init__(self, method: str, place: int, for_good: bool) -> None:
        self._method, self._left, self._for_good, self._lock = method, place, for_good, threading.Lock()
        self.is_done = False

    def __call__(self, method: str, path: str) -> str:
        with self._lock:
            if self.is_done:
                return "refuse" if self._for_good else ""
            if method != self._method or "/c/" not in path:
                return ""
            self._left -= 1
            self.is_done = self._left < 0
            return "torn" if self.is_done else ""


def in_shards(folder: Path, s3: str, share: float) -> None:
    """The connection ends in the middle of each shard, as it is put and as it is read."""
    from actstore.store import Store

    with cutting(s3) as (url, proxy):
        os.environ["AWS_ENDPOINT_URL"] = url

        def is_told(cut: Cut, act: Callable[[], object]) -> bool:
            """Act while the connection is cut; True if that was told."""
            proxy.choose, told = cut, False
            try:
                act()
            except (Unreachable, Busy):
                told = True
            proxy.choose = lambda method, path: ""
            assert cut.is_done, "the connection was not cut"
            return told

        for place, for_good in product(range(round(N_SHARDS * share)), (False, True)):
            root = address()
            assert is_told(Cut("PUT", place, for_good), partial(write, root)) == for_good
            look(root)
            go_on(root)
            same(root, folder)
            os.environ["ACTSTORE_CACHE"] = str(folder.with_name(f"cache-{root.name}"))
            for read in (rows_of, batch_of):
                with Store(root) as store:
                    assert is_told(Cut("GET", place, for_good), partial(read, store)) == for_good
                    read(store)
    os.environ["AWS_ENDPOINT_URL"] = s3
    print("the connection ended in the middle of each shard, put and read, once and for good")


def rows_of(store: Store) -> None:
    """Read all rows, by ranges of the shards."""
    X, rows = store.read("select token_id, tree_id from tokens", "r", "resid_post.0")
    assert (X[:, 0] == rows["tree_id"].to_numpy()).all()


def batch_of(store: Store) -> None:
    """Read all rows as one batch, from copies of the shards."""
    [(X, columns)] = store.batches("select token_id, tree_id from tokens", "r", "resid_post.0", batch_size=1 << 20)
    assert (X[:, 0] == columns["tree_id"]).all()


def go_on(root: Path) -> None:
    """The same run again; this process still lives, so its lost lease is waited for."""
    from actstore.storage.bucket import Bucket
    from actstore.storage.lease_object import LEASE

    Bucket(root).put(LEASE, b'{"holder": "", "process": [], "seconds": 1, "held": false}')
    write(root)


def race(share: float) -> None:
    """Of eight that publish each key, one wins, and its bytes are there."""
    from actstore.storage.at import at

    place, won = at(address()), Counter[str]()
    keys = [f"key/{number}" for number in range(round(N_KEYS * share))]

    def publish(racer: int) -> list[tuple[str, bytes]]:
        found = []
        for key in random.Random(racer).sample(keys, len(keys)):
            content = f"{racer} of {key}".encode()
            with suppress(Damaged):
                place.publish(key, content)
                found.append((key, content))
        return found

    with ThreadPoolExecutor(RACERS) as threads:
        for key, content in (each for found in threads.map(publish, range(RACERS)) for each in found):
            won[key] += 1
            assert place.read(key) == content
    assert won == Counter(keys), "a key has no winner, or two"
    print(f"{RACERS} publishers on {len(keys)} keys: one winner each")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--share", type=float, default=1.0, help="of the kills, cuts and keys")
    options.add_argument("--only", choices=["race", "kills", "shards", "cuts"])
    options.add_argument("--write", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.write:
        write(Path(asked.write))
        return
    with tempfile.TemporaryDirectory() as folder, server(Path(folder) / "server") as env:
        from actstore.storage import bucket

        os.environ.update(env, ACTSTORE_CACHE=str(Path(folder) / "cache"))
        write(beside := Path(folder) / "beside.act")
        if asked.only in (None, "race"):
            race(asked.share)
        if asked.only in (None, "kills"):
            kills(beside, round(30 * asked.share))
        bucket.RETRIES["max_retries"] = 1  # or each cut would take a minute
        if asked.only in (None, "shards"):
            in_shards(beside, env["AWS_ENDPOINT_URL"], asked.share)
        if asked.only in (None, "cuts"):
            cuts(beside, env["AWS_ENDPOINT_URL"], asked.share)
    print("nothing that was committed was lost, and every object is the file of a store that met nothing")


if __name__ == "__main__":
    try:
        main()
    except ActstoreError as error:
        sys.exit(f"{type(error).__name__}: {error}")
