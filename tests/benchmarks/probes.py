"""The notebook's grid of probes, over a store, against the notebook's way: the model run again for each site and token."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import load
from actstore.ingest.trees.task import TreeSet
from actstore.queries import load as load_query
from actstore.queries import study
from actstore.queries.probes.asked import Asked
from actstore.queries.probes.figures import PAIR
from actstore.queries.probes.fit import MAX_ITER, TOL, C, Sides, fit_all, one_thread
from actstore.queries.probes.study import jobs_of
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
        with Store(Path(folder) / "grid.act") as store:
            fits, theirs = _fits(store)
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
            "≤ 8 s",
            grid <= 8,
        ),
        Row("the grid with check / without", f"{grid_checked / grid:.2f}", "≤ 1.3", grid_checked <= 1.3 * grid),
        Row("of these, reading", f"{reads:.2f} s", ""),
        Row("of these, fits", f"{fits:.1f} s", ""),
        Row("scikit-learn's fits of the same rows and labels / these", f"{theirs / fits:.1f}", ""),
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


def _fits(store: Store) -> tuple[float, float]:
    """Seconds of all fits of the grid, and of scikit-learn's: in turns, site by site, each first at every other site."""
    run, seconds, turn = store.runs()[0], {fit_all: 0.0, _scikit_learn: 0.0}, [fit_all, _scikit_learn]
    for role in ROLES:
        for site in store.sites(run):
            X, tokens = store.read(QUERY, site=site, params={"run": run, "token_role": role})
            train = (tokens["split"] == "train").to_numpy()
            labels = {label: tokens[label].to_numpy().astype(np.int64) for label in PAIR}
            asked = Asked(tokens, tokens["tree_id"].to_numpy(), train, labels, {}, {})
            jobs = jobs_of(Sides.whitened(X, train), asked, seed=0)
            for fits in turn:
                started = time.perf_counter()
                fits(jobs, train)
                seconds[fits] += time.perf_counter() - started
            turn.reverse()
    return seconds[fit_all], seconds[_scikit_learn]


def _scikit_learn(jobs: list[tuple[Sides, np.ndarray]], train: np.ndarray) -> list[np.ndarray]:
    """As `fit_all`, one fit per core and each on one thread of BLAS, by scikit-learn: test rows that are right."""

    def fit(job: tuple[Sides, np.ndarray]) -> np.ndarray:
        (X, X_test), y = (side[:, :-1] for side in (job[0].training, job[0].test)), job[1]
        if (y[train] == y[train][0]).all():
            return y[~train] == y[train][0]
        return LogisticRegression(C=C, tol=TOL, max_iter=MAX_ITER).fit(X, y[train]).predict(X_test) == y[~train]

    with warnings.catch_warnings(), one_thread(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        warnings.simplefilter("ignore", ConvergenceWarning)
        return list(pool.map(fit, jobs))


def _timed(work: Callable[[Path, bool], None], path: Path, check: bool) -> float:
    started = time.perf_counter()
    work(path, check)
    return time.perf_counter() - started
