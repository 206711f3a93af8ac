"""Reads whose cost is not the copy: of ids at hand, and the first one of a store that was just opened."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import load
from actstore.ingest.trees.task import TreeSet
from actstore.store import Store
from tests.benchmarks import Row
from tests.benchmarks.timing import Action, alternate, milliseconds, ratio, timed

SITE, N_TREES, N_IDS = "resid_post.0", 2_000, 6_000
ROUNDS = 31


def rows() -> list[Row]:
    """Of a store that is made for it."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "some.act"
        execute(Ingest(path, load("reproduction"), TreeSet("reproduction", N_TREES)))
        with Store(path) as store:
            every = store.sql("select token_id from tokens order by token_id")["token_id"].to_numpy()
            past_sql = _past_sql(store, every[:: len(every) // N_IDS][:N_IDS])
        one_tree = every[every >> 8 == every[0] >> 8]
        return [*past_sql, _opening(path, one_tree)]


def _past_sql(store: Store, ids: np.ndarray) -> list[Row]:
    reader, frame = store._opened.reader("reproduction", SITE), pl.DataFrame({"token_id": ids})
    forms = {"an array": ids, "a frame": frame}
    actions = {
        name: Action(lambda of=of: store.read(of, site=SITE), lambda read: read[0]) for name, of in forms.items()
    }
    seconds = alternate({"gather": Action(lambda: reader.gather(ids), lambda X: X), **actions}, reader.gather(ids))
    found = []
    for name in forms:
        times = ratio(seconds[name], seconds["gather"])
        figure = f"{times:.2f} ({milliseconds(seconds[name])} / {milliseconds(seconds['gather'])} ms)"
        found.append(Row(f"{len(ids):,} ids in {name}: read / gather", figure, "≤ 1.5", times <= 1.5))
    return found


def _opening(path: Path, ids: np.ndarray) -> Row:
    def first() -> Store:
        store = Store(path)
        store.read(ids, site=SITE)
        return store

    seconds = []
    for _ in range(ROUNDS):
        took, store = timed(first)
        store.close()
        seconds.append(took)
    figure = f"{min(seconds) * 1e3:.1f} ms at best, {milliseconds(seconds)} in the middle"
    return Row(f"open, and read one tree's {len(ids)} tokens", figure, "≤ 20 ms at best", min(seconds) <= 20e-3)
