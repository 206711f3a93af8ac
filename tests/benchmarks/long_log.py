"""What an opening reads of a store with 10 commits and of one with 10,000: `python -m tests.benchmarks log`.

Both stores hold one small run. All other commits are planted: each names two shards, which are links to one file, and is
written without an fsync, since only what a reader meets is measured.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import xxhash

from actstore.catalog import build
from actstore.commits import checkpoint, log
from actstore.commits.format import ARRAYS, CHECKPOINT
from actstore.commits.manifest import Manifest, Shard, manifest_path
from actstore.store import Store
from tests.benchmarks import Row, median
from tests.benchmarks.timing import timed
from tests.stores import fake

COMMITS = (10, 10_000)
ROUNDS = 15
SITES = ("embed", "resid_post.0")
CONTENT = bytes(1_000)


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        short, long = (plant(Path(folder) / f"{n}.act", n) for n in COMMITS)
        stores = {f"{n:,} commits": store for n, store in zip(COMMITS, (short, long), strict=True)}
        seconds: dict[str, list[float]] = {name: [] for name in stores}
        for _ in range(ROUNDS):
            for name, store in stores.items():
                seconds[name].append(timed(partial(_open, store))[0])
        found = {name: counted(partial(_open, store)) for name, store in stores.items()}
        (long / CHECKPOINT).unlink()
        without = f"{COMMITS[1]:,} commits without their checkpoint"
        seconds[without] = [timed(partial(_open, long))[0] for _ in range(3)]
        found[without] = counted(partial(_open, long))
    of_short, of_long, _ = found.values()
    result = [
        Row(
            f"opening a store of {name}",
            f"{n_bytes / 1e3:,.0f} kB read, {n_files:,} files opened, {1e3 * median(seconds[name]):,.1f} ms",
            "",
        )
        for name, (n_bytes, n_files) in found.items()
    ]
    for what, short_one, long_one in zip(("bytes read", "files opened"), of_short, of_long, strict=True):
        ratio = long_one / short_one
        result.append(Row(f"{what}, {COMMITS[1]:,} commits / {COMMITS[0]}", f"{ratio:.2f}", "≤ 1.5", ratio <= 1.5))
    return result


def _open(store: Path) -> None:
    Store(store).close()


def plant(root: Path, n: int) -> Path:
    """A store with so many commits, a catalog of them all, and a checkpoint where a writer would leave one."""
    fake("r", n_trees=4, trees_per_shard=2, sites=SITES).store(root)
    names = [path.name for path in (root / ARRAYS / "r").iterdir() if path.is_dir()]
    (root / "content").write_bytes(CONTENT)
    hashed, committed = xxhash.xxh3_128_hexdigest(CONTENT), log.manifests(root)
    while len(committed) < n:
        batch = len(committed)
        paths = {site: f"{ARRAYS}/r/{site}/c/{batch}/0/0" for site in names}
        for path in paths.values():
            (root / path).parent.mkdir(parents=True)
            os.link(root / "content", root / path)
        shards = [Shard(path, len(CONTENT), hashed, "r", site, batch, 2 * batch, 2) for site, path in paths.items()]
        planted = Manifest(batch + 1, "batch", "r", batch, shards=shards, previous=committed[-1].xxh3_128)
        content = planted.to_json()
        (root / manifest_path(planted.number)).write_bytes(content)
        committed.append(Manifest.from_json(content, root))
    build.publish(root)
    checkpoint.write(root, committed)
    return root


def counted(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that this process reads, by whatever library, and files that Python opens."""
    opened, real = 0, os.open

    def counting(*args: object, **options: object) -> int:
        nonlocal opened
        opened += 1
        return real(*args, **options)  # type: ignore[arg-type]

    before = _bytes_read()
    os.open = counting  # type: ignore[assignment]
    try:
        work()
    finally:
        os.open = real
    return _bytes_read() - before, opened


def _bytes_read() -> int:
    about = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(about["rchar"])
