"""What commits, openings, `info`, a join and reads take as a store grows to a million trees.

The stores are planted: trees are drawn, and their rows written as an ingest writes them, by the
same writer. No model runs: the activations, float16, are noise, the same for every batch, and all
answers are right. A million trees at d_model 128 take 17 GB and some four minutes.

As a program (`python -m tests.benchmarks.large STORE TREES [WIDTH]`): plants one store, or measures
one that is there.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np

from actstore.arrays.pack import ShardBuffer
from actstore.ingest.trees.rows import edge_rows, tree_rows
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import token_rows
from actstore.store import Store
from actstore.writing.contents import batch_contents
from actstore.writing.plan import RunPlan, SitePlan
from actstore.writing.writer import open_writer
from tests.benchmarks import Row, median
from tests.benchmarks.timing import timed
from tests.stores import all_right

SIZES = (10_000, 100_000, 1_000_000)  # trees
WIDTH = 128  # numbers per token
SITE = "resid_post.0"
ROUNDS = 5
N_SMALL, N_READ = 100, 10_000  # trees of a small commit; tokens of a read
JOIN = "select depth, role, count(*) from tokens join trees using (tree_id) group by all"
_numbers = count(os.getpid())  # no name twice in a store that is measured again


def rows() -> list[Row]:
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for n_trees in SIZES:
            root = Path(folder) / "large.act"
            plant(root, n_trees)
            for what, took in measured(root).items():
                seconds.setdefault(what, []).append(took)
            for path in sorted(root.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
    sizes = " / ".join(f"{n:,}" for n in SIZES)
    return [Row(f"{what}, {sizes} trees", " / ".join(map(figure, took)), "") for what, took in seconds.items()]


def measured(root: Path) -> dict[str, float]:
    """Seconds of each act on a planted store, in the middle of some; the first commit, which copies, is left out."""
    found = {}
    label(root)
    for what, act in {"a label, committed": label, f"a run of {N_SMALL} trees, committed": _small}.items():
        found[what] = median([timed(partial(act, root))[0] for _ in range(ROUNDS)])
    found["an opening"] = median([timed(partial(open_and_close, root))[0] for _ in range(ROUNDS)])
    with Store(root) as store:
        some = store.sql(f"select token_id from tokens where dataset = 'd-r' using sample {N_READ} rows (reservoir, 0)")
        ids = some["token_id"].sort().to_numpy()
        acts: dict[str, Callable[[], object]] = {
            "`info`": store.info,
            "a join of all tokens with their trees": partial(store.sql, JOIN),
            f"{N_READ:,} tokens of all shards, by id, warm": partial(store.read, ids, run="r", site=SITE),
        }
        for what, act in acts.items():
            act()
            found[what] = median([timed(act)[0] for _ in range(ROUNDS)])
    return found


def figure(seconds: float) -> str:
    """Milliseconds, as a table shows them."""
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.0095 else f"{1e3 * seconds:.1f} ms"


def open_and_close(root: Path) -> None:
    """An opening of a store."""
    Store(root).close()


def label(root: Path) -> None:
    """Label two tokens, in one commit."""
    with Store(root) as store:
        store.label(f"label_{next(_numbers)}", store.sql("select token_id, 1 as x from tokens limit 2"))


def _small(root: Path) -> None:
    plant(root, N_SMALL, f"small-{next(_numbers)}", 1, is_durable=True)


def plant(root: Path, n_trees: int, run: str = "r", seed: int = 0, is_durable: bool = False) -> None:
    """Store a planted run of drawn trees at one site.

    Args:
        is_durable: fsync, as a writer does; else the disk writes when it likes.
    """
    trees = TreeSet("reproduction", n_trees, seed, name=f"d-{run}")
    plan, sync = planned(trees, run), os.fsync
    with mock.patch.object(os, "fsync", sync if is_durable else mock.Mock()), open_writer(root, make=True) as writer:
        first = writer.define(plan).sequence_id
        [site] = plan.sites
        buffer = ShardBuffer(site.layout)
        noise = np.random.default_rng(0).standard_normal(buffer.rows.shape, dtype=np.float32).astype(buffer.rows.dtype)
        for batch in range(trees.n_batches):
            drawn, start = trees.drawn(batch), first + batch * site.layout.rows_per_chunk
            buffer.rows[:] = noise
            buffer.n_put = len(drawn)
            shard = buffer.seal(drawn.lengths)
            of_trees = {
                "trees": tree_rows(drawn.trees, start, f"d-{run}"),
                "edges": edge_rows(drawn.trees, start),
                "tokens": token_rows(drawn.trees, start),
            }
            of_run = all_right(run, of_trees["trees"], of_trees["tokens"])
            contents = batch_contents(plan, batch, of_trees, of_run, {site.site: shard})
            writer.commit_batch(plan, batch, start, len(drawn), contents)


def planned(trees: TreeSet, run: str) -> RunPlan:
    """The plan of a planted run."""
    dataset, weights = trees.row(), b"planted"
    site = SitePlan.over(dataset, "blocks.0.hook_resid_post", SITE, "resid", (WIDTH,), ("d_model",))
    site = replace(site, layout=replace(site.layout, dtype="float16"))
    model = {"weights_sha256": hashlib.sha256(weights).hexdigest(), "model": "planted", "n_nodes": 16, "config": "{}"}
    return RunPlan(run, model, weights, dataset, [site], {"device": "cpu", "versions": "{}"})


if __name__ == "__main__":
    path, WIDTH = Path(sys.argv[1]), int(sys.argv[3]) if sys.argv[3:] else WIDTH
    if not path.exists():
        plant(path, int(sys.argv[2]))
    else:
        for what, took in measured(path).items():
            print(f"{what}: {figure(took)}")
