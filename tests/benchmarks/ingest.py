"""Ingest against the bare forward pass in the same batches, and its memory against the number of trees.

As a program: `python -m tests.benchmarks.ingest STORE TREES` prints the peak memory of one ingest, in bytes;
`python -m tests.benchmarks.ingest forward TREES` prints the seconds of the forward pass of a process that returns
freed memory to the system, as Python does where nobody asks for another way.
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
from actstore.ingest.models.passes import Passes, side_by_side
from actstore.ingest.trees.task import TreeSet
from actstore.storage.machine import keep_freed_memory, share_processors
from tests.benchmarks import Row, median

SIZES = {4000: (0.92, 3), 20_000: (0.95, 1)}  # trees → least share of the bare forward pass, rounds
BATCH_SIZE = 128
PLAIN = 2048  # trees of the forward pass of another process


def speed() -> list[Row]:
    """Trees per second of ingest at the default sites, over those of the bare forward pass, in turns in one process.

    The bare forward pass keeps freed memory, as the ingest does. The other rows of a size compare the ingest with bare
    passes that also run two at once, and with a forward pass of another process that returns freed memory.
    """
    model = load("reproduction")
    return [row for n_trees, wanted in SIZES.items() for row in _speed(model, n_trees, *wanted)]


def _ids(model: Model, n_trees: int) -> torch.Tensor:
    return torch.from_numpy(model.config.vocabulary.encode(TreeSet("reproduction", n_trees).between(0, n_trees).words))


def _forward(model: Model, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        for batch in ids.split(BATCH_SIZE):
            model.bridge(batch)
    return time.perf_counter() - started


def _at_once(model: Model, ids: torch.Tensor) -> float:
    """As `_forward`, with as many passes at once as an ingest runs."""

    def run(model: Model, batch: torch.Tensor) -> None:
        with torch.no_grad():
            model.bridge(batch)

    with Passes(model, side_by_side(model)) as passes:
        started = time.perf_counter()
        for _ in passes.each(run, ids.split(BATCH_SIZE)):
            pass
        return time.perf_counter() - started


def _speed(model: Model, n_trees: int, goal: float, n_rounds: int) -> list[Row]:
    trees = TreeSet("reproduction", n_trees)
    ids = _ids(model, n_trees)
    bare, at_once, stored, plain = [], [], [], []
    for _ in range(n_rounds):
        first, second = ids.split(n_trees // 2)  # before and after the ingest, since a machine's speed drifts
        before, before_at_once = _forward(model, first), _at_once(model, first)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            started = time.perf_counter()
            execute(Ingest(Path(folder) / "bench.act", model, trees, batch_size=BATCH_SIZE))
            stored.append(time.perf_counter() - started)
        at_once.append(before_at_once + _at_once(model, second))
        bare.append(before + _forward(model, second))
        plain.append(_run("forward", PLAIN) / PLAIN * n_trees)
    ratios = [alone / with_all for alone, with_all in zip(bare, stored, strict=True)]
    ratio, spread = median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
    figure = f"{ratio:.2f} ({spread} in {n_rounds} rounds; {n_trees / median(stored):,.0f} / {n_trees / median(bare):,.0f} trees/s)"
    of_two = median([alone / with_all for alone, with_all in zip(at_once, stored, strict=True)])
    kept = median(plain) / median(stored)
    return [
        Row(f"ingest, default sites / forward pass alone; {n_trees:,} trees", figure, f"≥ {goal}", ratio >= goal),
        Row(
            "the same / forward passes alone, two at once",
            f"{of_two:.2f} ({n_trees / median(at_once):,.0f} trees/s)",
            "",
        ),
        Row(
            "the same / a forward pass that returns freed memory",
            f"{kept:.2f} ({n_trees / median(plain):,.0f} trees/s)",
            "",
        ),
    ]


def memory(large_store: Path) -> list[Row]:
    """Peak memory of an ingest of 2,000 trees and of 20,000, each in a process of its own; keeps the large store."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        small = _run(Path(folder).resolve() / "small.act", 2000)
    large = _run(large_store.resolve(), 20_000)
    ratio = large / small
    return [
        Row("peak memory, 2,000 trees", f"{small / 1e6:,.0f} MB", ""),
        Row("peak memory, 20,000 trees", f"{large / 1e6:,.0f} MB", ""),
        Row("20,000 / 2,000", f"{ratio:.2f}", "does not grow: ≤ 1.1", ratio <= 1.1),
    ]


def _run(*words: object) -> float:
    """What this file prints as a program."""
    command = [sys.executable, "-m", "tests.benchmarks.ingest", *map(str, words)]
    root = Path(__file__).parents[2]  # where a child finds `tests`
    return float(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    share_processors()
    what, n = sys.argv[1], int(sys.argv[2])
    if what == "forward":
        model = load("reproduction")
        _forward(model, _ids(model, 2 * BATCH_SIZE))
        print(_forward(model, _ids(model, n)))
    else:
        keep_freed_memory()
        execute(Ingest(Path(what), load("reproduction"), TreeSet("reproduction", n)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
