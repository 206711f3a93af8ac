"""Two ingests side by side on the same processors, against one alone.

As a program (`python -m tests.benchmarks.side_by_side STORE TREES THREADS`): prints a line when the model is loaded,
ingests once a line comes in, and prints the seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from actstore.storage.machine import keep_freed_memory, n_processors, share_processors
from tests.benchmarks import Row, median

N_TREES = 3000
ROUNDS = 2
SPINNING = {"OMP_WAIT_POLICY": "active"}


def rows() -> list[Row]:
    """Trees per second of each of two, over those of one alone: as `actstore` runs them, with one thread, and spinning."""
    every = n_processors()
    alone, beside, single = [], [], []
    for _ in range(ROUNDS):
        alone += _took(1, every, {})
        beside += _took(2, every, {})
        single += _took(2, 1, {})
    spun = _took(1, every, SPINNING), _took(2, every, SPINNING)  # once: it takes a minute
    return [
        _row("threads sleep while they wait, the default", alone, beside, "≥ 0.5"),
        _row("--threads 1 each", alone, single, "≥ 0.5"),
        _row("threads spin (OMP_WAIT_POLICY=active)", *spun, ""),
    ]


def _row(what: str, alone: list[float], beside: list[float], goal: str) -> Row:
    ratio = median(alone) / median(beside)
    figure = f"{ratio:.2f} ({N_TREES / median(beside):,.0f} / {N_TREES / median(alone):,.0f} trees/s)"
    return Row(f"each of two / one alone; {what}", figure, goal, ratio >= 0.5 if goal else None)


def _took(n: int, threads: int, more: dict[str, str]) -> list[float]:
    """The seconds of each of n ingests that start at once, each in a process and a store of its own."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        program = [sys.executable, "-m", "tests.benchmarks.side_by_side"]
        running = [
            subprocess.Popen(
                [*program, str(Path(folder).resolve() / f"{i}.act"), str(N_TREES), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **more},
            )
            for i in range(n)
        ]
        for each in running:
            assert each.stdout
            each.stdout.readline()
        for each in running:
            assert each.stdin
            each.stdin.write("go\n")
            each.stdin.flush()
        return [float(each.communicate()[0]) for each in running]


def _ingest(store: Path, n_trees: int, threads: int) -> None:
    import torch

    from actstore.ingest.jobs.job import Ingest
    from actstore.ingest.jobs.local import execute
    from actstore.ingest.models.load import load
    from actstore.ingest.trees.task import TreeSet

    torch.set_num_threads(threads)
    model = load("reproduction")
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    execute(Ingest(store, model, TreeSet("reproduction", n_trees)))
    print(time.perf_counter() - started)


if __name__ == "__main__":
    share_processors()
    keep_freed_memory()
    _ingest(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
