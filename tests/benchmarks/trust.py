"""What trust costs: checksums and fsync in an ingest, and reading everything again."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

from actstore import log
from actstore.arrays import ShardBuffer
from actstore.hashing import BLOCK
from actstore.ingest.models import load
from actstore.ingest.pipeline import Ingest, TreeSet
from actstore.verify import verify
from tests.benchmarks import Row, median

N_TREES = 4000
ROUNDS = 5


def rows() -> list[Row]:
    """The share of an ingest that checksums and fsync take, and the speed of `verify` over that of reading the same files."""
    model, trees = load("reproduction"), TreeSet("reproduction", N_TREES)
    with_, without = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for round_ in range(ROUNDS):
            with_.append(_timed(lambda at=round_: Ingest(Path(folder) / f"with{at}.act", model, trees).execute()))  # type: ignore[misc]
            with (
                mock.patch.object(ShardBuffer, "_checksum"),
                mock.patch.object(log.xxhash, "xxh3_128_hexdigest", return_value="0" * 32),
                mock.patch.object(os, "fsync"),
            ):
                bare = Ingest(Path(folder) / f"without{round_}.act", model, trees)
                without.append(_timed(bare.execute))
        store = Path(folder) / "with0.act"
        verify(store), _read(store)  # so that both find every page in memory
        verified = [_timed(lambda: verify(store)) for _ in range(ROUNDS)]
        read = [_timed(lambda: _read(store)) for _ in range(ROUNDS)]
        quick = [_timed(lambda: verify(store, quick=True)) for _ in range(ROUNDS)]
        n_bytes = verify(store).n_bytes
    share = 1 - median(without) / median(with_)
    ratio = median(read) / median(verified)
    return [
        Row("checksums and fsync, share of an ingest", f"{100 * share:.1f} %", "≤ 5 %", share <= 0.05),
        Row("every file read in turn, from memory", f"{n_bytes / median(read) / 1e6:,.0f} MB/s", ""),
        Row("verify", f"{n_bytes / median(verified) / 1e6:,.0f} MB/s", ""),
        Row("verify / reading", f"{ratio:.2f}", "≥ 0.5", ratio >= 0.5),
        Row("verify --quick", f"{1e3 * median(quick):.0f} ms", ""),
    ]


def _timed(work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started


def _read(store: Path) -> None:
    """Every committed file, in large blocks, and nothing done with it."""
    block = memoryview(mmap.mmap(-1, BLOCK))
    for manifest in log.manifests(store):
        for file in manifest.files:
            with (store / file.path).open("rb") as opened:
                offset = 0
                while n := os.preadv(opened.fileno(), [block], offset):
                    offset += n
