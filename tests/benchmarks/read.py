"""Reads against `np.take` from an `np.memmap` of the same numbers, with ids at hand: the limit of any store."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from actstore.arrays import POSITIONS_PER_TREE
from actstore.store import Store
from tests.benchmarks import Row, median

SITE = "resid_post.0"
ROUNDS = 7
EVERY_TARGET = "select token_id from edge_targets"


def edge_targets(path: Path) -> list[Row]:
    """Every edge-target row of one site: the gather alone, and the read with its SQL, over np.take."""
    with Store(path) as store, tempfile.TemporaryDirectory(dir=".") as folder:
        reader = store._reader(store.run(None), SITE)
        ids = store.sql(EVERY_TARGET)["token_id"].to_numpy()
        flat, raw = _flat_copy(store, Path(folder) / "raw.npy", ids)
        np.testing.assert_array_equal(np.take(raw, flat, axis=0), reader.gather(ids))
        limit, gather, read, sql = _alternate(
            lambda: np.take(raw, flat, axis=0),
            lambda: reader.gather(ids),
            lambda: store.read(EVERY_TARGET, site=SITE),
            lambda: store.sql(EVERY_TARGET),
        )
    n_bytes = len(ids) * raw.shape[1] * 4
    return [
        Row("np.take from np.memmap", f"{limit * 1e3:.1f} ms, {n_bytes / limit / 1e6:,.0f} MB/s", ""),
        Row(f"gather of {len(ids):,} rows", f"{gather * 1e3:.1f} ms, {n_bytes / gather / 1e6:,.0f} MB/s", ""),
        Row("np.take / gather", f"{limit / gather:.2f}", "≥ 0.6", limit / gather >= 0.6),
        Row("the SQL alone (DuckDB to polars)", f"{sql * 1e3:.1f} ms", ""),
        Row("np.take / read with its SQL", f"{limit / read:.2f}", ""),
        Row("(SQL + np.take) / read with its SQL", f"{(sql + limit) / read:.2f}", ""),
    ]


def _flat_copy(store: Store, path: Path, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same site as one plain array of rows in token order, mapped; and where each id lies in it."""
    every = store.sql("select token_id from tokens order by token_id")["token_id"].to_numpy()
    X = store._reader(store.run(None), SITE).gather(every)
    X.tofile(path)
    assert (ids // POSITIONS_PER_TREE >= 0).all()
    return np.searchsorted(every, ids), np.memmap(path, np.float32, mode="r", shape=X.shape)


def _alternate(*actions: Callable[[], object]) -> list[float]:
    """Median seconds of each action, taken in turns so that all see the same machine; the first round warms up."""
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(1 + ROUNDS):
        for action, taken in zip(actions, seconds, strict=True):
            started = time.perf_counter()
            action()
            taken.append(time.perf_counter() - started)
    return [median(taken[1:]) for taken in seconds]
