"""The study `probes`: at which sites can the two nodes of an edge be read off one of its tokens by a linear map?

One probe a site and label: multinomial logistic regression (scikit-learn, L2 with C = 1, lbfgs, float32) on standardised
rows, fitted on the training trees and scored on the test trees, since edges of one tree share it. Each has two references:
chance, and the same probe fitted and scored on labels shuffled among the rows of each side of the split.

Every fit runs on one BLAS thread, several fits at a time: the numbers then do not depend on how many cores there are, and
a busy machine does not leave BLAS threads waiting for each other.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from actstore.errors import BadInput, NotStored
from actstore.queries import load, nearest
from actstore.queries.probe_report import LABELS, TOKEN_ROLES, draw, sentence, table
from actstore.queries.study import Progress, Study, result_rows
from actstore.statistics import N_RESAMPLES, share_over_trees

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME, QUERY = "probes", "edge_tokens"

C = 1.0  # weight of the data against the L2 penalty, scikit-learn's default
TOL = 1e-4  # largest gradient of a converged fit, scikit-learn's default
MAX_ITER = 300  # a fit that finds its answer takes some 10 iterations, one that finds nothing some 100
MIN_TEST_TREES = 2  # one tree resampled is always itself, so it gives no interval
ENOUGH_TREES = 60  # every label is a source in half of all trees at least, and one tree in five is for testing


@dataclass(frozen=True)
class Fit:
    """One fitted probe, scored.

    Attributes:
        right: bool [n_test], which test rows it gets right.
        n_iter: iterations of lbfgs.
        converged: its gradient is as small as asked for, so more iterations would change little.
        weights: float32 [n_classes, d_model], the logit of each class by each standardised coordinate.
        intercepts: float32 [n_classes].
    """

    right: np.ndarray
    n_iter: int
    converged: bool
    weights: np.ndarray
    intercepts: np.ndarray


def study(
    store: Store,
    run: str,
    seed: int,
    progress: Progress,
    token_role: str = "edge_target",
    sites: Sequence[str] | None = None,
    max_iter: int = MAX_ITER,
) -> Study:
    """Probe every site of a run for the source and target of each edge.

    Memory is two copies of one site's rows: 15 rows of 4 * d_model bytes a tree of 16 nodes.

    Args:
        store: an open store.
        run: which run.
        seed: of the bootstrap and of the shuffled labels; the fits themselves are deterministic.
        progress: called with (sites done, sites in all, the site just done).
        token_role: where to read: `edge_target`, `edge_source` or `separator`.
        sites: short site names; every residual site of the run unless told.
        max_iter: iterations of lbfgs after which a fit is stopped, and said to have been.

    Raises:
        BadInput: an unknown token_role, or too few trees: a label is missing in training, or there are no test trees.
        NotStored: a site that the run does not hold.
    """
    check_role(token_role)
    sites = _sites(store, run, sites)
    params = {"run": run, "token_role": token_role}
    query = load(QUERY).sql
    n_nodes = store.sql("from runs join datasets using (dataset) where run = $run", {"run": run})["n_nodes"].item()
    n_test_trees = check_enough(store.sql(query, params), n_nodes, run)
    rows: list[dict[str, Any]] = []
    for done, site in enumerate(sites, start=1):
        X, tokens = store.read(query, run=run, site=site, params=params)
        about = {"run": run, "site": site, "token_role": token_role}
        rows += _probe_site(X, tokens, about, n_nodes, seed, max_iter)
        progress(done, len(sites), site)
    used = {**params, "C": C, "tol": TOL, "max_iter": max_iter, "n_resamples": N_RESAMPLES, "n_nodes": n_nodes}
    results = result_rows(rows, study=NAME, run=run, query=query, params=used, snapshot=store.snapshot, seed=seed)
    return Study(NAME, table(results), results, sentence(results, n_test_trees))


def fit(X: np.ndarray, y: np.ndarray, train: np.ndarray, max_iter: int = MAX_ITER) -> Fit:
    """Fit a probe to the training rows and score it on the others.

    Args:
        X: float32 [n, d_model], standardised.
        y: int64 [n] labels.
        train: bool [n]; the rows of one tree must all be on one side.
        max_iter: iterations of lbfgs.
    """
    probe = LogisticRegression(C=C, tol=TOL, max_iter=max_iter).fit(X[train], y[train])
    # A fit ends at the cap, or where float32 can step no further; the gradient tells both from a converged one.
    converged = _largest_gradient(probe, X[train], y[train]) <= 2 * TOL  # 2: this and the fit round differently
    weights, intercepts = probe.coef_, probe.intercept_
    if len(weights) == 1:  # of two classes scikit-learn keeps the difference
        weights, intercepts = np.vstack([-weights, weights]) / 2, np.concatenate([-intercepts, intercepts]) / 2
    right = probe.predict(X[~train]) == y[~train]
    return Fit(right, int(probe.n_iter_[0]), converged, weights, intercepts)


def check_role(token_role: str) -> None:
    """Refuse a token_role that no edge has."""
    if token_role not in TOKEN_ROLES:
        raise BadInput(
            f"no token_role {token_role!r}; an edge is read at {', '.join(TOKEN_ROLES)}{nearest(token_role, TOKEN_ROLES)}"
        )


def check_enough(tokens: pl.DataFrame, n_nodes: int, run: str) -> int:
    """Refuse a run of too few trees to fit and to score a probe.

    Args:
        tokens: rows of the query `edge_tokens`.

    Returns:
        How many test trees there are.

    Raises:
        BadInput: fewer than 2 test trees, or a label that no training tree has; says about how many trees are enough.
    """
    train = tokens.filter(pl.col("split") == "train")
    n_train = train["tree_id"].n_unique()
    n_test = tokens["tree_id"].n_unique() - n_train
    lacking = {label: sorted(set(range(n_nodes)) - set(train[label].to_list())) for label in LABELS}
    faults = [f"no training edge has {label} {', '.join(map(str, found))}" for label, found in lacking.items() if found]
    faults += [f"{MIN_TEST_TREES} test trees are needed"] * (n_test < MIN_TEST_TREES)
    if faults:
        todo = f"ingest a run of {ENOUGH_TREES} trees or more (--trees)"
        if n_nodes == 2:
            todo = "there are but two trees of 2 nodes, both for training, so ingest larger ones (--nodes)"
        raise BadInput(
            f"run {run!r} holds {n_train} training and {n_test} test trees, too few for probes: {'; '.join(faults)}; {todo}"
        )
    return n_test


def _sites(store: Store, run: str, wanted: Sequence[str] | None) -> list[str]:
    """Short names of the residual sites to probe, in the order of the forward pass."""
    vectors = store.sql("select short from sites where run = $run and kind = 'resid'", {"run": run})["short"].to_list()
    held = [site for site in store.sites(run) if site in vectors]  # patterns are no vectors of the residual stream
    unknown = [site for site in wanted or [] if site not in held]
    if unknown or not held:
        what = f"no site {unknown[0]!r}{nearest(unknown[0], held)}" if unknown else "no residual site"
        raise NotStored(f"run {run!r} has {what} to probe; it holds {', '.join(store.sites(run))}")
    return [site for site in held if wanted is None or site in wanted]


def _probe_site(
    X: np.ndarray, tokens: pl.DataFrame, where: dict[str, str], n_nodes: int, seed: int, max_iter: int
) -> list[dict[str, Any]]:
    """Probe one site for both labels, true and shuffled, and give the rows of `results`; `where` names run and site."""
    train = (tokens["split"] == "train").to_numpy()
    trees = tokens["tree_id"].to_numpy()[~train]
    scaler = StandardScaler(copy=False).fit(X[train])
    X = scaler.transform(X)
    order = _shuffle_within(train, seed)
    labels = {label: tokens[label].to_numpy().astype(np.int64) for label in LABELS}
    fits = _fit_all(X, [y[rows] for y in labels.values() for rows in (slice(None), order)], train, max_iter)
    rows: list[dict[str, Any]] = []
    for label, y in labels.items():
        true, shuffled = next(fits), next(fits)
        about = {**where, "label": label}
        for metric, made in (("accuracy", true), ("shuffled_accuracy", shuffled)):
            low, high = share_over_trees(made.right, trees, seed)
            rows.append(
                {**about, "metric": metric, "value": made.right.mean(), "low": low, "high": high, "n": len(trees)}
            )
        most_frequent = np.bincount(y[train]).argmax()
        for metric, value, n in (
            ("chance", 1 / n_nodes, len(trees)),
            ("majority", (y[~train] == most_frequent).mean(), len(trees)),
            ("iterations", true.n_iter, int(train.sum())),
            ("converged", true.converged, int(train.sum())),
        ):
            rows.append({**about, "metric": metric, "value": float(value), "n": n})
        rows += [
            {**about, "n": int(train.sum()), **row} for row in _directions(true, np.unique(y[train]), scaler, about)
        ]
    return rows


def _directions(made: Fit, classes: np.ndarray, scaler: StandardScaler, about: dict[str, str]) -> list[dict[str, Any]]:
    """A row a class: the direction whose dot product with an activation as stored, plus `value`, is the class's logit."""
    directions = made.weights / scaler.scale_
    offsets = made.intercepts - directions @ scaler.mean_
    path = "/".join(about.values())
    return [
        {
            "metric": "direction",
            "value": float(offset),
            "name": f"{path}={label}",
            "direction": direction.astype(np.float32).tolist(),
        }
        for label, direction, offset in zip(classes.tolist(), directions, offsets, strict=True)
    ]


def _shuffle_within(train: np.ndarray, seed: int) -> np.ndarray:
    """intp [n] that shuffles rows, each side of the split among itself, so that no label gets lost in training."""
    rng = np.random.default_rng(seed)
    order = np.arange(len(train))
    for side in (train, ~train):
        order[side] = rng.permutation(order[side])
    return order


def _fit_all(X: np.ndarray, labellings: Sequence[np.ndarray], train: np.ndarray, max_iter: int) -> Iterator[Fit]:
    """One fit a labelling, in their order, as many at a time as there are cores."""
    with (
        warnings.catch_warnings(),
        threadpool_limits(1),
        ThreadPoolExecutor(min(len(labellings), os.cpu_count() or 1)) as pool,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)  # Fit.converged says it, for each probe
        return iter(list(pool.map(lambda y: fit(X, y, train, max_iter), labellings)))


def _largest_gradient(probe: LogisticRegression, X: np.ndarray, y: np.ndarray) -> float:
    """Of the mean log loss and its penalty, over all weights: what lbfgs brings down to TOL."""
    residual = probe.predict_proba(X).astype(np.float64)
    residual[np.arange(len(y)), np.searchsorted(probe.classes_, y)] -= 1
    residual = residual[:, -len(probe.coef_) :]  # two classes share one row of weights, the second's
    by_weight = (X.T @ residual + probe.coef_.T / C) / len(y)
    return float(max(np.abs(by_weight).max(), np.abs(residual.mean(axis=0)).max()))


def plot(study: Study) -> Figure:
    """Accuracy by site of both labels with 95 % intervals, the notebook's numbers hollow, chance as a line."""
    return draw(study.results)
