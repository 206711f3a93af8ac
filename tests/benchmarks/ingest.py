"""Ingest against the bare forward pass in the same batches, and its memory against the number of trees.

As a program (`python -m tests.benchmarks.ingest STORE TREES`): the peak memory of one ingest, in bytes.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import load
from actstore.ingest.models.model import Model
from actstore.ingest.trees.task import TreeSet
from tests.benchmarks import Row, median

SIZES = {4000: (0.92, 4), 20_000: (0.95, 2)}  # trees → least share of the bare forward pass, rounds
BATCH_SIZE = 128


def speed() -> list[Row]:
    """Trees per second of ingest at the default sites, over those of the bare forward pass, in turns in one process."""
    model = load("reproduction")
    return [row for n_trees, wanted in SIZES.items() for row in _speed(model, n_trees, *wanted)]


def _speed(model: Model, n_trees: int, goal: float, n_rounds: int) -> list[Row]:
    trees = TreeSet("reproduction", n_trees)
    ids = torch.from_numpy(model.config.vocabulary.encode(trees.between(0, n_trees).words))
    bare, stored = [], []

    def pass_over(some: torch.Tensor) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            for batch in some.split(BATCH_SIZE):
                model.bridge(batch)
        return time.perf_counter() - started

    for _ in range(n_rounds):
        first, second = ids.split(n_trees // 2)  # before and after the ingest, since a machine's speed drifts
        before = pass_over(first)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            started = time.perf_counter()
            execute(Ingest(Path(folder) / "bench.act", model, trees, batch_size=BATCH_SIZE))
            stored.append(time.perf_counter() - started)
        bare.append(before + pass_over(second))
    ratios = [alone / with_all for alone, with_all in zip(bare, stored, strict=True)]
    ratio, spread = median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
    figure = f"{ratio:.2f} ({spread} in {n_rounds} rounds; {n_trees / median(stored):,.0f} / {n_trees / median(bare):,.0f} trees/s)"
    return [Row(f"ingest, default sites / forward pass alone; {n_trees:,} trees", figure, f"≥ {goal}", ratio >= goal)]


def memory(large_store: Path) -> list[Row]:
    """Peak memory of an ingest of 2,000 trees and of 20,000, each in a process of its own; keeps the large store."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        small = _peak(Path(folder) / "small.act", 2000)
    large = _peak(large_store, 20_000)
    ratio = large / small
    return [
        Row("peak memory, 2,000 trees", f"{small / 1e6:,.0f} MB", ""),
        Row("peak memory, 20,000 trees", f"{large / 1e6:,.0f} MB", ""),
        Row("20,000 / 2,000", f"{ratio:.2f}", "does not grow: ≤ 1.1", ratio <= 1.1),
    ]


def _peak(store: Path, n_trees: int) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.ingest", str(store), str(n_trees)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    execute(Ingest(Path(sys.argv[1]), load("reproduction"), TreeSet("reproduction", int(sys.argv[2]))))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
