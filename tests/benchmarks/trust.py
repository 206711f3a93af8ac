"""What trust costs: checksums and fsync in an ingest, reading everything again, and reads that check what they read."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest import mock

import google_crc32c
import xxhash

from actstore.catalog.tables import CATALOG
from actstore.commits import log
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import load
from actstore.ingest.trees.task import TreeSet
from actstore.storage.hashing import BLOCK
from actstore.store import Store
from actstore.upkeep.verify import verify
from tests.benchmarks import Row, median
from tests.benchmarks.timing import drop_pages

N_TREES = 4000
N_VERIFIED = (4000, 20_000)  # what takes the same time whatever the size shows in the first
ROUNDS = 8
EDGE_TARGETS = "select token_id from edge_targets order by token_id"


def rows() -> list[Row]:
    """The share of an ingest that checksums and fsync take, the speed of `verify` over that of reading the same files, and
    what a read of all edge targets takes with check over what it takes without."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        return [_cost_in_ingest(Path(folder)), *(row for n in N_VERIFIED for row in _of_store(Path(folder), n))]


def _cost_in_ingest(folder: Path) -> Row:
    """Pairs of ingests, with and without, in turns of who is first: an ingest's time drifts by more than this costs."""
    model, trees = load("reproduction"), TreeSet("reproduction", N_TREES)

    def ingest(safe: bool) -> float:
        store = folder / "s.act"
        try:
            with contextlib.ExitStack() as off:
                for patch in () if safe else _without_safety():
                    off.enter_context(patch)
                return _timed(partial(execute, Ingest(store, model, trees)))
        finally:
            shutil.rmtree(store, ignore_errors=True)

    ingest(True)
    shares = []
    for turn in range(ROUNDS):
        order = (True, False) if turn % 2 else (False, True)
        took = {safe: ingest(safe) for safe in order}
        shares.append(1 - took[False] / took[True])
    share, low, high = median(shares), min(shares), max(shares)
    figure = f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f} in {ROUNDS} pairs)"
    return Row("checksums and fsync, share of an ingest", figure, "≤ 5 %", share <= 0.05)


def _without_safety() -> list[AbstractContextManager[object]]:
    return [
        mock.patch.object(google_crc32c, "value", return_value=0),
        mock.patch.object(xxhash, "xxh3_128_hexdigest", return_value="0" * 32),
        mock.patch.object(os, "fsync"),
    ]


def _of_store(folder: Path, n_trees: int) -> list[Row]:
    store = folder / f"{n_trees}.act"
    execute(Ingest(store, load("reproduction"), TreeSet("reproduction", n_trees)))
    try:
        return [*_verify(store, n_trees), *_checked_read(store, n_trees)]
    finally:
        shutil.rmtree(store)


def _checked_read(store: Path, n_trees: int) -> list[Row]:
    """All edge targets at every site, from memory: the first read of a store that was just opened, and the second."""
    seconds: dict[tuple[bool, str], list[float]] = {}
    for turn in range(ROUNDS):
        for check in (False, True) if turn % 2 else (True, False):
            with Store(store, check) as opened:
                sites = opened.sites(opened.runs()[0])
                for which in ("first", "second"):
                    took = _timed(lambda opened=opened, sites=sites: opened.read(EDGE_TARGETS, sites=sites))
                    seconds.setdefault((check, which), []).append(took)
    rows = []
    for which in ("first", "second"):
        plain, checked = median(seconds[False, which]), median(seconds[True, which])
        rows.append(
            Row(
                f"{which} read of all edge targets at {len(sites)} sites with check / without; {n_trees:,} trees",
                f"{checked / plain:.2f} ({1e3 * checked:.0f} ms / {1e3 * plain:.0f} ms)",
                "",
            )
        )
    return rows


def _verify(store: Path, n_trees: int) -> list[Row]:
    """Verify against reading the same files, from memory and then from the disk; in turns."""
    acts = {
        "read": partial(_read, store),
        "verify": partial(verify, store),
        "quick": partial(verify, store, quick=True),
    }
    n_bytes = verify(store).n_bytes + (store / CATALOG).stat().st_size
    of, rows = f"{n_trees:,} trees, {n_bytes / 1e9:.1f} GB", []
    for where in ("memory", "the disk"):
        seconds: dict[str, list[float]] = {name: [] for name in acts}
        for _ in range(ROUNDS):
            for name, act in acts.items():
                if where == "the disk":
                    drop_pages(_files(store))
                seconds[name].append(_timed(act))
        read, verified, quick = (median(seconds[name]) for name in acts)
        ratio = read / verified
        rows += [
            Row(f"every file read in turn, from {where}; {of}", f"{n_bytes / read / 1e6:,.0f} MB/s", ""),
            Row(f"verify, from {where}; {of}", f"{n_bytes / verified / 1e6:,.0f} MB/s", ""),
            Row(f"verify / reading, from {where}; {of}", f"{ratio:.2f}", "≥ 0.8", ratio >= 0.8),
            Row(f"verify --quick, from {where}; {of}", f"{1e3 * quick:.0f} ms", ""),
        ]
    return rows


def _timed(work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started


def _read(store: Path) -> None:
    """Every file that verify hashes, in large blocks, and nothing done with it."""
    block = memoryview(mmap.mmap(-1, BLOCK))
    for path in _files(store):
        with path.open("rb") as opened:
            offset = 0
            while n := os.preadv(opened.fileno(), [block], offset):
                offset += n


def _files(store: Path) -> list[Path]:
    """Every committed file, and the catalog."""
    return [store / file.path for manifest in log.manifests(store) for file in manifest.files] + [store / CATALOG]
