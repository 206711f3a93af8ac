"""Trees per second of one core, with the rows of their tokens, edges and trees: `python -m tests.benchmarks.generate`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("POLARS_MAX_THREADS", "1")  # one core is what the goal is about; set before polars is imported

import polars as pl

from actstore.ingest.trees.draw import DISTRIBUTIONS, Trees, draw
from actstore.ingest.trees.rows import edge_rows, tree_rows
from actstore.ingest.trees.tokens import token_rows
from tests.benchmarks import Row, median

TREES_PER_BATCH = 1_024
BATCHES_PER_ROUND = 20
ROUNDS = 5
GOAL = 50_000  # trees a second at 16 nodes


def rows(n_nodes: int = 16) -> list[Row]:
    """Trees a second of processor time: for each distribution drawn alone, and drawn with all three tables' rows.

    Processor time counts what every thread of the process works, so neither other processes nor polars' threads, where
    it was imported with more than one, can flatter or spoil the figure. The median of ROUNDS rounds, after one to warm up.
    """
    lines = []
    for distribution in DISTRIBUTIONS:
        alone = _trees_per_second(partial(_draw, distribution, n_nodes))
        whole = _trees_per_second(partial(_draw_rows, distribution, n_nodes))
        lines.append(Row(f"{distribution}, drawn", f"{alone:,.0f} trees/s", ""))
        met = whole >= GOAL if n_nodes == 16 else None
        goal = f"≥ {GOAL:,} trees/s" if n_nodes == 16 else ""
        lines.append(Row(f"{distribution}, drawn, with all rows", f"{whole:,.0f} trees/s", goal, met))
    return lines


def _trees_per_second(work: Callable[[int], object]) -> float:
    rates = []
    for round_ in range(1 + ROUNDS):
        first = round_ * BATCHES_PER_ROUND * TREES_PER_BATCH
        started = time.process_time()
        for batch in range(BATCHES_PER_ROUND):
            work(first + batch * TREES_PER_BATCH)
        rates.append(BATCHES_PER_ROUND * TREES_PER_BATCH / (time.process_time() - started))
    return median(rates[1:])


def _draw(distribution: str, n_nodes: int, start: int) -> Trees:
    return draw(distribution, 0, start, start + TREES_PER_BATCH, n_nodes)


def _draw_rows(distribution: str, n_nodes: int, start: int) -> tuple[pl.DataFrame, ...]:
    trees = _draw(distribution, n_nodes, start)
    return token_rows(trees, start), edge_rows(trees, start), tree_rows(trees, start, "bench")


def main() -> None:
    print(f"16 nodes, batches of {TREES_PER_BATCH:,} trees, one core (polars runs {pl.thread_pool_size()} thread)")
    for row in rows():
        print(f"{row.what:40} {row.figure:>18}  {row.goal}")


if __name__ == "__main__":
    main()
