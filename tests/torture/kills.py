"""Kill ingest, training, repair and studies at random moments; open what is left, go on, and compare with what nobody killed.

python -m tests.torture.kills 200        # kills in all; prints how many there were and what differed
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child has no other threads of torch's

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.torture.template import SIGNALS, attempt, check

N_TREES, PER_SHARD = 60, 3
RECIPE = """
system: reproduction
n_nodes: 5
model: {d_model: 16, d_head: 16, n_heads: 1, n_layers: 1, d_mlp: 16, act_fn: gelu, attention_dir: causal}
batch_size: 4
max_iters: 120
"""


def ingest(root: Path, model: object) -> None:
    """20 batches, with a catalog put in place after each."""
    from actstore.ingest.jobs.job import Ingest
    from actstore.ingest.jobs.local import execute
    from actstore.ingest.trees.task import TreeSet

    trees = TreeSet("reproduction", N_TREES, n_nodes=6, trees_per_shard=PER_SHARD, name="d")
    execute(Ingest(root, model, trees, sites=["embed", "resid_post.1"], publish_every=0.0))  # type: ignore[arg-type]


def open_as_reader(root: Path) -> None:
    """Whatever was published is one of the known states: so many commits, so many whole batches."""
    from actstore.store import Store

    if not (root / "store.json").exists():
        return
    with Store(root) as store:
        n_batches = max(0, store.snapshot - 1)
        held = store.sql(
            "select (select count(*) from trees) as trees, (select count(*) from outcomes) as outcomes, "
            "(select count(distinct tree_id) from tokens) as tokens, (select count(*) from shards) as shards"
        ).row(0)
        expected = min(N_TREES, PER_SHARD * n_batches)
        if held != (expected, expected, expected, 2 * n_batches):
            raise AssertionError(f"snapshot {store.snapshot} holds {held}")
        if n_batches:
            X, rows = store.read("select token_id from tokens", store.runs()[0], "embed")
            assert len(X) == len(rows)


def same_store(root: Path, whole: Path) -> None:
    """Every byte of every committed file, and every row of every table."""
    from actstore.upkeep.verify import verify
    from tests.stores import catalog_rows, committed_files

    assert committed_files(root) == committed_files(whole), "bytes differ"
    assert catalog_rows(root / "catalog.duckdb") == catalog_rows(whole / "catalog.duckdb"), "rows differ"
    assert verify(root).findings == [], "verify finds damage"


def until_done(
    work: Callable[[], object], look: Callable[[], object], seconds: float, rng: random.Random, most: int
) -> int:
    """Kill and go on until an attempt finishes; at most so many kills, then it is left to finish. Returns the kills."""
    kills = 0
    while kills < most:
        if attempt(work, rng.uniform(0, seconds), rng.choice(SIGNALS)):
            return kills
        kills += 1
        check(look)
    check(work)
    return kills


def ingest_kills(n: int, folder: Path, rng: random.Random) -> int:
    """Kill ingests of a small store, n times in all."""
    from tests.test_pipeline import small_model

    model = small_model()
    whole = folder / "whole.act"
    started = time.monotonic()
    check(lambda: ingest(whole, model))
    seconds, kills, rounds = time.monotonic() - started, 0, 0
    while kills < n:
        root = folder / f"killed{rounds}.act"
        kills += until_done(
            lambda root=root: ingest(root, model),
            lambda root=root: open_as_reader(root),
            seconds,
            rng,
            min(10, n - kills),  # type: ignore[misc]
        )
        check(lambda root=root: same_store(root, whole))  # type: ignore[misc]
        shutil.rmtree(root)
        rounds += 1
    return kills


def train_kills(n: int, folder: Path, rng: random.Random) -> int:
    """Kill trainings, which must end with the same weights, and the same log but for its seconds."""
    config = folder / "tiny.yaml"
    config.write_text(RECIPE)

    def train(out: Path) -> None:
        from actstore.ingest.training.train import train as train_model

        train_model(str(config), out)

    whole = folder / "whole"
    started = time.monotonic()
    check(lambda: train(whole))
    seconds, kills, rounds = time.monotonic() - started, 0, 0
    while kills < n:
        out = folder / f"trained{rounds}"
        kills += until_done(lambda out=out: train(out), lambda: None, seconds, rng, min(5, n - kills))  # type: ignore[misc]
        if (out / "tiny.safetensors").read_bytes() != (whole / "tiny.safetensors").read_bytes():
            raise SystemExit("a killed training ended with other weights")
        rounds += 1
    return kills


def study_kills(n: int, folder: Path, rng: random.Random) -> int:
    """Kill a study that records its results: each commit holds all its rows, or is not there."""
    root = folder / "whole.act"

    def record() -> None:
        from actstore.queries import study
        from actstore.store import Store
        from actstore.writing.writer import open_writer

        with Store(root) as store:
            results = study.ask(store, "depth").results
        with open_writer(root) as writer:
            writer.record(results)

    def look() -> None:
        from actstore.store import Store

        with Store(root) as store:
            counts = store.sql("select count(*) as n from results group by recorded")["n"]
            assert counts.n_unique() <= 1, "a commit holds some of its rows"

    started = time.monotonic()
    check(record)
    seconds, kills = time.monotonic() - started, 0
    while kills < n:
        kills += until_done(record, look, 1.2 * seconds, rng, n - kills)
    return kills


def repair_kills(n: int, folder: Path, rng: random.Random) -> int:
    """Damage a store, kill its repair, and repair it to the end."""
    from tests.test_pipeline import small_model

    model, whole, root = small_model(), folder / "repair.act", folder / "damaged.act"
    check(lambda: ingest(whole, model))

    def damage() -> None:
        shutil.copytree(whole, root)
        names = sorted(path for path in root.rglob("*") if path.is_file() and path.parts[-2] not in ("log", "models"))
        for path in rng.sample([path for path in names if path.name not in ("store.json", ".lock")], 3):
            flip(path, rng)

    def mend() -> None:
        from actstore.ingest.replay.remake import files_of
        from actstore.upkeep.repair import repair

        assert not repair(root, files_of).left

    kills = 0
    while kills < n:
        damage()
        kills += until_done(mend, lambda: None, 1.0, rng, min(3, n - kills))
        check(lambda: same_store(root, whole))
        shutil.rmtree(root)
    return kills


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit of a file that is read-only."""
    content = bytearray(path.read_bytes())
    if not content:
        return
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    mode = path.stat().st_mode
    path.unlink()
    path.write_bytes(content)
    path.chmod(mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(asked.seed)
    shares = {ingest_kills: 0.7, train_kills: 0.1, study_kills: 0.1, repair_kills: 0.1}
    with tempfile.TemporaryDirectory() as folder:
        for how, share in shares.items():
            n = max(1, round(share * asked.kills))
            print(f"{how.__name__}: {how(n, Path(folder), rng)} kills, 0 differences", flush=True)


if __name__ == "__main__":
    main()
