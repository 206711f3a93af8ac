"""One site of the shipped model, from 10,000 trees to a million: an ingest, and what its store is like.

`python -m tests.benchmarks large --model [TREES …]`; a million trees take 16 GB and some eight minutes. Each ingest
is a command in a process of its own, with so many threads as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from actstore.store import Store
from tests.benchmarks import Row, median
from tests.benchmarks.large import JOIN, SITE, SIZES, figure, label, open_and_close
from tests.benchmarks.timing import drop_pages, timed

INGEST = f"ingest --model reproduction --run r --sites {SITE} --dtype float16 --answers none --quiet"
ROUNDS = 5
N_TREES = 5  # single trees that are read


def rows(sizes: tuple[int, ...] = SIZES) -> list[Row]:
    """Every figure at every size; the figures of a size are printed as soon as they are there."""
    found: dict[str, list[str]] = {}
    for n_trees in sizes:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            root = Path(folder) / "curve.act"
            for what, said in (_ingested(root, n_trees) | _asked(root)).items():
                print(f"{n_trees:,} trees: {what}: {said}", flush=True)
                found.setdefault(what, []).append(said)
            shutil.rmtree(root)
    listed = " / ".join(f"{n:,}" for n in sizes)
    return [Row(f"{what}, {listed} trees", " / ".join(said), "") for what, said in found.items()]


def _ingested(root: Path, n_trees: int) -> dict[str, str]:
    """Make a store by the command; what it took, and what it left."""
    verb, *options = INGEST.split()
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "actstore", verb, str(root), "--trees", str(n_trees), *options])
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    assert status == 0, "the ingest failed"
    sizes = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    n_bytes, catalog = sum(sizes.values()), sizes[root / "catalog.duckdb"]
    return {
        "an ingest": f"{seconds:,.0f} s ({n_trees / seconds:,.0f} trees/s)",
        "its peak memory": f"{used.ru_maxrss * 1024 / 1e6:,.0f} MB",
        "on the disk, of it the catalog": f"{n_bytes / 1e9:.2f} GB, {catalog / 1e9:.3f}",
    }


def _asked(root: Path) -> dict[str, str]:
    """What openings, questions, reads and a commit take."""
    found = {"an opening": median([timed(partial(open_and_close, root))[0] for _ in range(ROUNDS)])}
    with Store(root) as store:
        for what, act in {
            "`info`": store.info,
            "a join of all tokens with their trees": partial(store.sql, JOIN),
        }.items():
            act()
            found[what] = median([timed(act)[0] for _ in range(ROUNDS)])
        n_trees = store.sql("select count(*) from trees").item()
        trees = np.linspace(0, n_trees - 1, N_TREES).astype(int)
        one = "select token_id from tokens where tree_id = $tree order by token_id"
        ids = [store.sql(one, {"tree": int(tree)})["token_id"].to_numpy() for tree in trees]
        hundredth = store.sql("select token_id from tokens where token_id % 100 = 0 order by token_id")[
            "token_id"
        ].to_numpy()
    for what, chosen in {"one tree": ids, "1 % of tokens": [hundredth]}.items():
        drop_pages(path for path in (root / "activations.zarr").rglob("*") if path.is_file())
        with Store(root) as store:
            reads = [partial(store.read, of_one, run="r", site=SITE) for of_one in chosen]
            store.read(ids[0][:0], run="r", site=SITE)  # opens the site, and reads nothing
            found[f"{what}, by id, cold"] = median([timed(read)[0] for read in reads])
            found[f"{what}, by id, warm"] = median([timed(read)[0] for _ in range(ROUNDS) for read in reads])
    label(root)  # the first copies the catalog
    found["a label, committed"] = median([timed(partial(label, root))[0] for _ in range(ROUNDS)])
    return {what: figure(seconds) for what, seconds in found.items()}
