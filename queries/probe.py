"""The study `probes`: at which sites can what an edge is, and where it leads, be read off a token by a linear map?

One probe a site, token and label: multinomial logistic regression (scikit-learn, L2 with C = 1, lbfgs, float32) on
whitened rows, fitted on the training trees and scored on the test trees, since rows of one tree share it. Whitening
makes the penalty the same in every basis, and a fit that finds nothing ends after some 10 iterations in place of 100.

Each has its controls: chance; the most frequent label; the same probe on labels shuffled among the rows of each side
of the split, which taken off the accuracy gives its selectivity; and the same probe given as many random directions
as there are classes.

Every fit runs on one BLAS thread, several fits at a time: the numbers then do not depend on how many cores there are,
and a busy machine does not leave BLAS threads waiting for each other.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import xxhash
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from actstore.errors import BadInput, NotStored
from actstore.queries import load, nearest
from actstore.queries.probe_report import LABELS, NODE_LABELS, TOKEN_ROLES, draw, sentence, table
from actstore.queries.study import Progress, Study, result_rows
from actstore.statistics import N_RESAMPLES, share_over_trees

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME, QUERY = "probes", "probe_tokens"

PROTOCOLS = ("ours", "notebook")
C = 1.0  # weight of the data against the L2 penalty, scikit-learn's default
TOL = 1e-4  # largest gradient of a converged fit, scikit-learn's default
MAX_ITER = 300  # a fit takes some 10 iterations
SMALLEST_VARIANCE = 1e-7  # of the largest: what is below is float32's rounding, and whitening would blow it up
ROUNDING = 1e-6  # of the largest number: what float32 makes of a mean of equal rows
MIN_TEST_TREES = 2  # one tree resampled is always itself, so it gives no interval
ENOUGH_TREES = 60  # every label is a source in half of all trees at least, and one tree in five is for testing


@dataclass(frozen=True)
class Fit:
    """One fitted probe, scored.

    Attributes:
        right: bool [n_test], which test rows it gets right.
        n_iter: iterations of lbfgs.
        converged: its gradient is as small as asked for, so more iterations would change little.
        weights: float32 [n_classes, d], the logit of each class by each whitened coordinate.
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
    token_role: str | Sequence[str] = "edge_target",
    labels: str | Sequence[str] | None = None,
    sites: str | Sequence[str] | None = None,
    max_iter: int = MAX_ITER,
    protocol: str = "ours",
) -> Study:
    """Probe sites of a run.

    Memory is two copies of one site's rows: 15 rows of 4 * d_model bytes a tree of 16 nodes.

    Args:
        store: an open store.
        run: which run.
        seed: of the bootstrap, the shuffled labels and the random directions; the fits themselves are deterministic.
        progress: called with (sites done, sites in all, the site just done).
        token_role: where to read: names of TOKEN_ROLES, with commas, or `all`.
        labels: what to ask for: names of LABELS, with commas, or `all`; source and target unless told (at `path`:
            next_node).
        sites: short site names; every residual site of the run unless told.
        max_iter: iterations of lbfgs after which a fit is stopped, and said to have been.
        protocol: `ours`, or `notebook`: the notebook's own beside ours, see probe_protocols.py.

    Raises:
        BadInput: no such token, label or protocol, or too few trees: a label is missing in training, or there are no
            test trees.
        NotStored: a site that the run does not hold.
    """
    if protocol not in PROTOCOLS:
        raise BadInput(f"no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    roles = _chosen(token_role, TOKEN_ROLES, "token_role")
    asked = {role: labels_of(role, labels) for role in roles}
    sites = _sites(store, run, sites)
    query = load(QUERY).sql
    about = store.sql(
        "select n_nodes, weights_sha256, dataset from runs join datasets using (dataset) where run = $run", {"run": run}
    ).row(0, named=True)
    rows: list[dict[str, Any]] = []
    hashes, n_test_trees, done = {}, 0, 0
    for role in roles:
        tokens = store.sql(query, {"run": run, "token_role": role})
        n_test_trees = check_enough(tokens, about["n_nodes"], run, asked[role])
        hashes[role] = data_hash(tokens, asked[role])
        for site in sites:
            X, tokens = store.read(query, run=run, site=site, params={"run": run, "token_role": role})
            at = {"run": run, "site": site, "token_role": role}
            rows += _probe_site(X, tokens, asked[role], at, about["n_nodes"], seed, max_iter)
            if protocol == "notebook":
                from actstore.queries.probe_protocols import notebook_rows

                rows += notebook_rows(X, tokens, asked[role], at, seed)
            done += 1
            progress(done, len(sites) * len(roles), site if len(roles) == 1 else f"{role} {site}")
    used = {"run": run, "token_role": ",".join(roles), "protocol": protocol, "C": C, "tol": TOL, "max_iter": max_iter}
    used |= {"n_resamples": N_RESAMPLES, **about, "data_xxh3": hashes}
    results = result_rows(rows, study=NAME, run=run, query=query, params=used, snapshot=store.snapshot, seed=seed)
    return Study(NAME, table(results), results, sentence(results, n_test_trees))


def labels_of(role: str, wanted: str | Sequence[str] | None) -> list[str]:
    """The labels to ask for at one kind of token.

    Raises:
        BadInput: no such label, or none that this kind of token has.
    """
    there = [label for label in LABELS if (label == "next_node") == (role == "path") or label == "goal"]
    if wanted is None:
        return ["next_node"] if role == "path" else ["source", "target"]
    asked = [label for label in _chosen(wanted, LABELS, "label") if label in there]
    if not asked:
        raise BadInput(f"none of the labels asked for is one of {role}; there are {', '.join(there)}")
    return asked


def _chosen(wanted: str | Sequence[str], known: Iterable[str], what: str) -> list[str]:
    """Names given with commas between or as a list, or `all`, each known."""
    names = [name.strip() for name in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
    if names == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            raise BadInput(f"no {what} {name!r}; there are {', '.join(known)}, and all{nearest(name, known)}")
    return [name for name in known if name in names]


def data_hash(tokens: pl.DataFrame, labels: Sequence[str]) -> str:
    """xxh3-128, hexadecimal, of the rows that probes are fitted to and scored on: token ids, labels, split."""
    digest = xxhash.xxh3_128()
    for column in ("token_id", *labels):
        digest.update(tokens[column].to_numpy().astype(np.int64).tobytes())
    digest.update((tokens["split"] == "train").to_numpy().tobytes())
    return digest.hexdigest()


def fit(X: np.ndarray, y: np.ndarray, train: np.ndarray, max_iter: int = MAX_ITER) -> Fit:
    """Fit a probe to the training rows and score it on the others.

    Args:
        X: float32 [n, d], whitened.
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


def check_enough(tokens: pl.DataFrame, n_nodes: int, run: str, labels: Sequence[str]) -> int:
    """Refuse a run of too few trees to fit and to score a probe.

    Args:
        tokens: rows of the query `probe_tokens`.

    Returns:
        How many test trees there are.

    Raises:
        BadInput: fewer than 2 test trees, or a node that no training row has; says about how many trees are enough.
    """
    train = tokens.filter(pl.col("split") == "train")
    n_train = train["tree_id"].n_unique()
    n_test = tokens["tree_id"].n_unique() - n_train
    of_nodes = [label for label in labels if label in ("source", "target")]
    lacking = {label: sorted(set(range(n_nodes)) - set(train[label].to_list())) for label in of_nodes}
    faults = [f"no training edge has {label} {', '.join(map(str, found))}" for label, found in lacking.items() if found]
    faults += [f"all training rows have one {label}" for label in labels if train[label].n_unique() < 2]
    faults += [f"{MIN_TEST_TREES} test trees are needed"] * (n_test < MIN_TEST_TREES)
    if faults:
        todo = f"ingest a run of {ENOUGH_TREES} trees or more (--trees)"
        if n_nodes == 2:
            todo = "there are but two trees of 2 nodes, both for training, so ingest larger ones (--nodes)"
        raise BadInput(
            f"run {run!r} holds {n_train} training and {n_test} test trees, too few for probes: {'; '.join(faults)}; {todo}"
        )
    return n_test


def _sites(store: Store, run: str, wanted: str | Sequence[str] | None) -> list[str]:
    """Short names of the residual sites to probe, in the order of the forward pass."""
    vectors = store.sql("select short from sites where run = $run and kind = 'resid'", {"run": run})["short"].to_list()
    held = [site for site in store.sites(run) if site in vectors]  # patterns are no vectors of the residual stream
    names = [name.strip() for name in wanted.split(",")] if isinstance(wanted, str) else wanted
    unknown = [site for site in names or [] if site not in held]
    if unknown or not held:
        what = f"no site {unknown[0]!r}{nearest(unknown[0], held)}" if unknown else "no residual site"
        there = ", ".join(store.sites(run)) or "none"
        raise NotStored(
            f"run {run!r} has {what} to probe; it holds {there}: `actstore ingest {store.path} --run NAME --sites "
            "embed,resid_mid,resid_post …` stores a run that has them"
        )
    return [site for site in held if names is None or site in names]


def _probe_site(
    X: np.ndarray,
    tokens: pl.DataFrame,
    labels: Sequence[str],
    where: dict[str, str],
    n_nodes: int,
    seed: int,
    max_iter: int,
) -> list[dict[str, Any]]:
    """Probe one site for each label, with its controls, and give the rows of `results`; `where` names run and site."""
    train = (tokens["split"] == "train").to_numpy()
    whiten = Whitening.of(X[train])
    X = whiten(X)
    order = _shuffle_within(train, seed)
    ys = {label: tokens[label].to_numpy().astype(np.int64) for label in labels}
    jobs = [job for y in ys.values() for job in ((X, y), (X, y[order]), (_random_directions(X, y[train], seed), y))]
    fits = _fit_all(jobs, train, max_iter)
    rows: list[dict[str, Any]] = []
    for label, y in ys.items():
        about = {**where, "label": label}
        true, shuffled, random = next(fits), next(fits), next(fits)
        rows += _scores(true, shuffled, random, y, train, tokens["tree_id"].to_numpy()[~train], about, n_nodes, seed)
        directions = _directions(true, np.unique(y[train]), whiten, about)
        rows += [{**about, "n": int(train.sum()), **row} for row in directions]
    return rows


def _scores(
    true: Fit,
    shuffled: Fit,
    random: Fit,
    y: np.ndarray,
    train: np.ndarray,
    trees: np.ndarray,
    about: dict[str, str],
    n_nodes: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Accuracy and selectivity with their intervals over `trees`, those of the test rows; and the controls."""
    rows = []
    for metric, right in (
        ("accuracy", true.right),
        ("shuffled_accuracy", shuffled.right),
        ("random_directions_accuracy", random.right),
        ("selectivity", true.right.astype(np.float64) - shuffled.right),
    ):
        low, high = share_over_trees(right, trees, seed)
        rows.append(
            {**about, "metric": metric, "value": float(right.mean()), "low": low, "high": high, "n": len(trees)}
        )
    n_classes = n_nodes if about["label"] in NODE_LABELS else len(np.unique(y[train]))
    most_frequent = np.bincount(y[train]).argmax()
    for metric, value, n in (
        ("chance", 1 / n_classes, len(trees)),
        ("majority", (y[~train] == most_frequent).mean(), len(trees)),
        ("iterations", true.n_iter, int(train.sum())),
        ("converged", true.converged, int(train.sum())),
    ):
        rows.append({**about, "metric": metric, "value": float(value), "n": n})
    return rows


@dataclass(frozen=True)
class Whitening:
    """An affine map after which the rows it was made of have mean 0 and no correlation, and variance 1 in every coordinate.

    Attributes:
        mean: float32 [d_model].
        axes: float32 [d_model, d]: columns take a row, less its mean, to its coordinates.
    """

    mean: np.ndarray
    axes: np.ndarray

    @classmethod
    def of(cls, X: np.ndarray) -> Whitening:
        """Of float32 [n, d_model]; d is smaller where rows lie in fewer dimensions.

        Rows that are all the same (a separator's embedding) have one coordinate, which is 0.
        """
        mean = X.mean(axis=0, dtype=np.float64).astype(np.float32)
        centred = X - mean
        if np.abs(centred).max(initial=0) <= ROUNDING * np.abs(X).max(initial=0):
            return cls(mean, np.zeros((X.shape[1], 1), np.float32))
        found = PCA(svd_solver="covariance_eigh").fit(centred)  # which takes off the mean only after squaring
        variance = found.explained_variance_
        kept = variance > SMALLEST_VARIANCE * variance[0]
        axes = found.components_[kept].T / np.sqrt(variance[kept])
        return cls(mean, axes.astype(np.float32))

    def __call__(self, X: np.ndarray) -> np.ndarray:
        return np.asarray((X - self.mean) @ self.axes)


def _random_directions(X: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """float32 [n, n_classes]: rows seen along as many random directions as a probe has of its own."""
    rng = np.random.default_rng(seed)
    n_classes = min(len(np.unique(y)), X.shape[1])
    return X @ np.linalg.qr(rng.standard_normal((X.shape[1], n_classes)))[0].astype(np.float32)


def _directions(made: Fit, classes: np.ndarray, whiten: Whitening, about: dict[str, str]) -> list[dict[str, Any]]:
    """A row a class: the direction whose dot product with an activation as stored, plus `value`, is the class's logit."""
    directions = made.weights @ whiten.axes.T
    offsets = made.intercepts - directions @ whiten.mean
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


def _fit_all(jobs: Sequence[tuple[np.ndarray, np.ndarray]], train: np.ndarray, max_iter: int) -> Iterator[Fit]:
    """One fit for each (X, y), in their order, as many at a time as there are cores."""
    with (
        warnings.catch_warnings(),
        threadpool_limits(1),
        ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)  # Fit.converged says it, for each probe
        return iter(list(pool.map(lambda job: fit(job[0], job[1], train, max_iter), jobs)))


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
