"""Readers beside a writer: eight processes ask random questions while an ingest publishes; each answer is of one snapshot.

python -m tests.torture.readers          # prints how many answers there were
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

from tests.torture.template import fork, wait

PER_SHARD = 4
TABLES = ("trees", "outcomes", "(select distinct tree_id from tokens)", "(select distinct tree_id from edges)")


def ingest(root: Path, model: object, n_trees: int) -> None:
    from actstore.ingest.jobs.job import Ingest
    from actstore.ingest.jobs.local import execute
    from actstore.ingest.trees.task import TreeSet

    trees = TreeSet("reproduction", n_trees, n_nodes=6, trees_per_shard=PER_SHARD, name="d")
    execute(Ingest(root, model, trees, sites=["embed"], publish_every=0.2))  # type: ignore[arg-type]


def ask(root: Path, seed: int, n_trees: int, said: Path) -> None:
    """Ask until the store is whole; every answer must follow from the snapshot's number alone."""
    from actstore.store import Store

    rng, n, slowest = random.Random(seed), 0, 0.0
    while True:
        if not (root / "store.json").exists():
            time.sleep(0.01)
            continue
        started = time.monotonic()
        with Store(root) as store:
            expected = min(n_trees, PER_SHARD * max(0, store.snapshot - 1))
            for _ in range(rng.randrange(1, 4)):
                table = rng.choice(TABLES)
                held = store.sql(f"select count(*) as n from {table}")["n"].item()
                assert held == expected, f"snapshot {store.snapshot}: {table} holds {held}, not {expected}"
                n += 1
            if expected:
                tree = rng.randrange(expected)
                X, rows = store.read(
                    "select token_id, position from tokens where tree_id = $t", None, "embed", {"t": tree}
                )
                assert len(X) == len(rows) > 0
                n += 1
        slowest = max(slowest, time.monotonic() - started)
        if expected == n_trees:
            said.write_text(f"{n} {slowest:.3f}")
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--trees", type=int, default=800)
    parser.add_argument("--readers", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    from tests.test_pipeline import small_model

    model = small_model()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "s.act"
        said = [Path(folder) / f"said{i}" for i in range(asked.readers)]
        readers = [fork(lambda i=i: ask(root, i, asked.trees, said[i])) for i in range(asked.readers)]  # type: ignore[misc]
        codes = [wait(fork(lambda: ingest(root, model, asked.trees))), *map(wait, readers)]
        if any(codes):
            raise SystemExit(f"exit codes {codes}")
        answers = [path.read_text().split() for path in said]
        n, slowest = sum(int(count) for count, _ in answers), max(float(seconds) for _, seconds in answers)
    print(
        f"{asked.readers} readers: {n} answers, each of one snapshot; the slowest opening and asking took {slowest:.2f} s"
    )


if __name__ == "__main__":
    main()
