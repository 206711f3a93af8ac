"""The notebook's grid of probes, over a store, against the notebook's way: the model run again for each site and token."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import load
from actstore.ingest.trees.task import TreeSet
from actstore.queries import load as load_query
from actstore.queries import study
from actstore.store import Store
from tests.benchmarks import Row, median

N_TREES, ROLES = 6400, ("edge_target", "separator", "next_source")  # 100 batches of 64, and its three tokens
QUERY = load_query("probe_tokens").sql
ROUNDS = 5  # of the reads
BATCH_SIZE, BATCHES = 64, 10  # of 100, timed for one site and token, and multiplied


def rows() -> list[Row]:
    """The whole grid, 7 sites × 3 tokens × 2 labels, reads, fits and controls included; and how long the activations alone take.

    The grid is timed without check and with it, each on a store that was just opened and whose pages are in memory; so are
    the reads alone.
    """
    model = load("reproduction")
    trees = TreeSet("deep", N_TREES, seed=1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        execute(Ingest(Path(folder) / "grid.act", model, trees))
        with Store(Path(folder) / "grid.act") as store:
            n_sites = len(store.sites(store.runs()[0]))
        _reads(Path(folder) / "grid.act", False)  # so that each finds every page in memory
        pairs = [[_timed(_reads, Path(folder) / "grid.act", check) for check in (False, True)] for _ in range(ROUNDS)]
        reads, reads_checked = (median(seconds) for seconds in zip(*pairs, strict=True))
        grid, grid_checked = (_timed(_grid, Path(folder) / "grid.act", check) for check in (False, True))
    ids = torch.from_numpy(model.config.vocabulary.encode(trees.between(0, BATCH_SIZE * BATCHES).words))
    started = time.perf_counter()
    with torch.no_grad():
        for batch in ids.split(BATCH_SIZE):
            _, cache = model.bridge.run_with_cache(batch)
            cache["blocks.0.hook_resid_post"][:, 1:42:3].reshape(-1, model.config.d_model)
    again = (time.perf_counter() - started) * (N_TREES // BATCH_SIZE // BATCHES) * n_sites * len(ROLES)
    return [
        Row(
            f"the grid, {n_sites} sites × {len(ROLES)} tokens × 2 labels, {N_TREES:,} trees",
            f"{grid:.0f} s",
            "≤ 180 s",
            grid <= 180,
        ),
        Row("the grid with check / without", f"{grid_checked / grid:.2f}", "≤ 1.3", grid_checked <= 1.3 * grid),
        Row("of these, reading", f"{reads:.2f} s", ""),
        Row("reading with check / without", f"{reads_checked / reads:.2f}", ""),
        Row("the model run again for each site and token, 10 of 100 batches timed", f"{again:.0f} s", ""),
        Row("the model run again / reading", f"{again / reads:,.0f}", ""),
        Row("(the model run again + the same fits) / the grid", f"{(again + grid - reads) / grid:.1f}", ""),
    ]


def _grid(path: Path, check: bool) -> None:
    with Store(path, check) as store:
        study.ask(store, "probes", token_role=ROLES)


def _reads(path: Path, check: bool) -> None:
    with Store(path, check) as store:
        run = store.runs()[0]
        for role in ROLES:
            for site in store.sites(run):
                store.read(QUERY, site=site, params={"run": run, "token_role": role})


def _timed(work: Callable[[Path, bool], None], path: Path, check: bool) -> float:
    started = time.perf_counter()
    work(path, check)
    return time.perf_counter() - started
