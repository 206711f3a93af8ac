"""The study `probes`: at which sites can a linear probe read an edge or the path from a token?

There is one probe per site, token and label: multinomial logistic regression (L2 with C = 1,
float32) on whitened rows, see newton.py. A probe is fitted on training trees and scored
on test trees, since rows of one tree are dependent.

Each probe has four comparisons. Baselines guess from the tree alone (see baselines.py); the
commonest label is one of them. The accuracy less that of the best baseline is `above_baseline`, the
network's contribution. The same probe on labels shuffled within each side of the split gives
`above_shuffled`. The same probe on Hewitt and Liang's control task (see fit.control_labels) gives
`selectivity`. The last comparison is the same probe on random directions, one per class. Every fit
uses all rows.

Sign flips of each test tree's sum test whether a probe is above the best baseline. Holm's
correction covers all tests of a study, and the sentence claims only significant tests.

Intervals are over the test trees. Fitted probes and training trees are held fixed, and the model is
one training of one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import xxhash

from actstore import cluster
from actstore.advice import ingest_sites
from actstore.errors import BadInput, NotStored, nearest
from actstore.intervals import N_RESAMPLES
from actstore.queries import load
from actstore.queries.probes import baselines
from actstore.queries.probes.asked import Asked, above_test
from actstore.queries.probes.figures import LABELS, NODE_LABELS, TOKEN_ROLES, as_frame, sentence
from actstore.queries.probes.figures import plot as plot
from actstore.queries.probes.fit import (
    MAX_ITER,
    TOL,
    C,
    Fit,
    Job,
    Sides,
    Whitening,
    control_labels,
    fitting,
    random_directions,
    shuffle_within,
    start_all,
)
from actstore.queries.probes.places import place_rows
from actstore.queries.probes.protocols import notebook_rows
from actstore.queries.study import Answer, Progress, Test, adjusted, chosen, mean_row, names_in, result_rows, test_rows
from actstore.sites import not_held
from actstore.sites import wanted as meant

if TYPE_CHECKING:
    from actstore.store import Store

NAME, QUERY = "probes", "probe_tokens"
RUN = """
select datasets.n_nodes, models.system, weights_sha256, dataset
from runs join datasets using (dataset) join models using (weights_sha256) where run = $run
"""
TREES = "select tree_hash, goal from trees join runs using (dataset) where run = $run order by trees.tree_id"

LAYERS = "select n_layers from runs join models using (weights_sha256) where run = $run"
HOLDING = """
select runs.run, list(short) as sites
from runs as base join runs using (weights_sha256, dataset) join sites on sites.run = runs.run and kind = 'resid'
where base.run = $run and (runs.run = $run or runs.run not in (select run from interventions))
group by runs.run, runs.rowid
order by runs.rowid
"""
PROTOCOLS = ("ours", "notebook")
USUAL = ("embed", "resid_mid", "resid_post")  # sites that are advised where a run holds none
BY = "place"
PACKAGES = ("actstore", "numpy", "scipy", "polars")  # which results rest on
MIN_TEST_TREES = 2  # one tree gives no interval: every resample is the tree itself
ENOUGH_TREES = 60  # a label is a source in at least half of all trees, and one tree in five is for testing


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
    by: str | None = None,
    baseline: str | Path | None = None,
    engine: str | None = None,
    address: str | None = None,
    workers: int | None = None,
) -> Answer:
    """Probe sites of a run.

    Memory is four copies of one site's rows: per tree of 16 nodes, 15 rows of 4 * d_model bytes. A
    site is read and whitened while the previous site's probes are fitted.

    Args:
        store: an open store.
        run: name of the run.
        seed: seed of the bootstrap, shuffled labels, control labels and random directions; fits are
            deterministic.
        progress: called with (sites done, sites in all, the site just done).
        token_role: tokens to read: names of TOKEN_ROLES, separated by commas, or `all`.
        labels: names of LABELS, separated by commas, or `all`; default source and target, at `path`
            next_node. Tokens of the path have goal and next_node; other tokens have all labels but
            next_node.
        sites: names of sites, or of a family (`resid_post`) for all its layers; default: every
            residual site.
        max_iter: largest number of iterations; a fit stopped there is reported.
        protocol: `ours`, or `notebook`, which adds the notebook's protocol, see protocols.py.
        by: `place` adds the accuracy at each place in the list of edges, see places.py.
        baseline: path of an .sql file with an additional baseline, see baselines.py.
        engine: `ray`: workers of a Ray cluster probe a site each, and find the same; default: this
            process does.
        address, workers: of the cluster, see cluster.py; default: one worker per node.

    Raises:
        BadInput: an argument is unknown, no label fits the tokens, the baseline is invalid or
            guesses no wanted label, or there are too few trees (a label is missing in training, or
            test trees are missing).
        NotStored: the run does not hold a site.
    """
    _check(protocol, max_iter, by)
    cluster.check_engine(engine, address, workers)
    asked, sites = labels_by_role(token_role, labels), sites_to_probe(store, run, sites)
    guessers, own = baselines.stored(), None
    if baseline is not None:
        own = baselines.from_file(store, baseline, {"run": run, "token_role": next(iter(asked))})
        guessers.append(own)
    query, about = load(QUERY).sql, store.sql(RUN, {"run": run}).row(0, named=True)
    shared = {"run": run, **about, "trees_xxh3": _trees_hash(store, run), "protocol": protocol}
    shared |= {"C": C, "tol": TOL, "max_iter": max_iter, "n_resamples": N_RESAMPLES, "by": by}
    shared |= {"baseline": own.sql, "baseline_name": own.name} if own else {}
    recorded: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
    n_test_trees, guessed_by, its = 0, set(), dict[str, Asked]()
    for role, its_labels in asked.items():
        used = {"run": run, "token_role": role}
        tokens = store.sql(query, used)
        n_test_trees = check_enough(tokens, about["n_nodes"], run, its_labels)
        recorded.append(([], {**shared, **used, "labels": its_labels, "data_xxh3": data_hash(tokens, its_labels)}))
        guessed = baselines.scores(store, guessers, its_labels, query, used)
        guessed_by |= {name for by_name in guessed.values() for name in by_name}
        its[role] = _of_tokens(tokens, its_labels, guessed, about["n_nodes"])
    prober = Prober(its, run, seed, max_iter, by, protocol)
    tasks = [(role, site) for role in its for site in sites]
    found = dict[int, Found]()
    for done, (task, outcome) in enumerate(_outcomes(store, prober, tasks, engine, address, workers), 1):
        found[task], (role, site) = outcome, tasks[task]
        progress(done, len(tasks), site if len(asked) == 1 else f"{role} {site}")
    tests = [test for task in sorted(found) for test in found[task][1]]
    for rows, params in recorded:
        rows += [row for at, (role, _) in enumerate(tasks) if role == params["token_role"] for row in found[at][0]]
    if own and own.name not in guessed_by:
        raise BadInput(
            f"the baseline {str(baseline)!r} guesses the {LABELS[own.label]} of none of the tokens {', '.join(asked)}; "
            "ask for tokens and labels that it guesses (token_role, labels)"
        )
    return _answer(store, run, seed, query, recorded, adjusted(tests), n_test_trees)


Found = tuple[list[dict[str, Any]], list[Test]]  # rows of `results`, and tests


@dataclass(frozen=True)
class Prober:
    """Probes one site at a time.

    Attributes:
        asked: token role → its rows.
        run, seed, max_iter, by, protocol: see `study`.
    """

    asked: Mapping[str, Asked]
    run: str
    seed: int
    max_iter: int
    by: str | None
    protocol: str

    def probe(self, store: Store, role: str, site: str) -> Found:
        """Rows of `results` and tests of a site at the tokens of a role."""
        with fitting() as pool:
            return self.start(pool, store, role, site)()

    def start(self, pool: Executor, store: Store, role: str, site: str) -> Callable[[], Found]:
        """Begin `probe`; the function returned waits for the fits, and ends it."""
        its, at = self.asked[role], {"run": self.run, "site": site, "token_role": role}
        X, _ = store.read(its.tokens, run=self.run, site=site)
        finish = start_site(pool, X, its, at, self.seed, self.max_iter, self.by)
        if self.protocol != "notebook":
            return finish

        def finish_both() -> Found:
            rows, tests = finish()
            return rows + notebook_rows(X, its.tokens, list(its.labels), at, self.seed, self.max_iter), tests

        return finish_both


class Worker:
    """Probes sites on a node of a cluster.

    Args:
        store: the store, opened here when it came from the driver.
        prober: what to probe.
        alike: versions that the worker must have.

    Raises:
        BadInput: this process has other versions.
        NotStored: it does not see the store; raised when it is opened.
    """

    def __init__(self, store: Store, prober: Prober, alike: Mapping[str, str]) -> None:
        cluster.refuse_otherwise(cluster.worker_here(), cluster.versions(*PACKAGES), "this process", alike)
        self._prober, self._store = prober, store

    def task(self, role: str, site: str) -> Found:
        """See Prober.probe."""
        return self._prober.probe(self._store, role, site)


def _outcomes(
    store: Store,
    prober: Prober,
    tasks: Sequence[tuple[str, str]],
    engine: str | None,
    address: str | None,
    workers: int | None,
) -> Iterator[tuple[int, Found]]:
    """Number of each task with what was found, as they end."""
    if engine != "ray":
        with fitting() as pool:
            begun: Callable[[], Found] | None = None
            for number, (role, site) in enumerate(tasks):
                ended, begun = begun, prober.start(pool, store, role, site)
                if ended:
                    yield number - 1, ended()
            if begun:
                yield len(tasks) - 1, begun()
        return
    with cluster.connected(address) as ray:
        threads = cluster.n_processors(ray)
        n = cluster.n_workers(ray, workers, threads, len(tasks))
        make = partial(Worker, store, prober, cluster.versions(*PACKAGES))
        yield from cluster.spread(ray, make, n, threads, tasks)


def _check(protocol: str, max_iter: int, by: str | None) -> None:
    """Refuse unknown values of options."""
    if protocol not in PROTOCOLS:
        raise BadInput(f"no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if not isinstance(max_iter, int) or max_iter < 1:
        raise BadInput(f"got max_iter {max_iter!r}; it is a number of iterations, 1 or more (default {MAX_ITER})")
    if by not in (None, BY):
        raise BadInput(f"got by {by!r}; write {BY}, for the accuracy at each place in the list")


def _answer(
    store: Store, run: str, seed: int, query: str, recorded: Sequence[Any], tests: tuple[Test, ...], n_test_trees: int
) -> Answer:
    """The answer from rows and params of each kind of token."""
    shared: dict[str, Any] = {"study": NAME, "run": run, "query": query, "snapshot": store.snapshot, "seed": seed}
    results = pl.concat(
        result_rows(
            [*rows, *test_rows(test for test in tests if test.token_role == params["token_role"])],
            params=params,
            **shared,
        )
        for rows, params in recorded
    )
    return Answer(NAME, as_frame(results), results, sentence(results, n_test_trees, tests), tests)


def labels_by_role(token_role: str | Sequence[str], labels: str | Sequence[str] | None) -> dict[str, list[str]]:
    """Token role → its wanted labels; roles without a wanted label are left out.

    Raises:
        BadInput: a token or label is unknown, or no token has the labels.
    """
    roles = chosen(token_role, TOKEN_ROLES, "token_role")
    if labels is None:
        return {role: ["next_node"] if role == "path" else ["source", "target"] for role in roles}
    wanted = chosen(labels, LABELS, "label")
    there = {role: [label for label in LABELS if _has(role, label)] for role in roles}
    asked = {role: [label for label in its if label in wanted] for role, its in there.items()}
    if not any(asked.values()):
        known = sorted({label for its in there.values() for label in its}, key=list(LABELS).index)
        raise BadInput(f"none of the labels asked for is one of {', '.join(roles)}; there are {', '.join(known)}")
    return {role: its for role, its in asked.items() if its}


def _has(role: str, label: str) -> bool:
    """Whether tokens of a role have a label: goal, at `path` next_node, else the edge's labels."""
    return label == "goal" or (label == "next_node") == (role == "path")


def data_hash(tokens: pl.DataFrame, labels: Sequence[str]) -> str:
    """xxh3-128, hexadecimal, of the probes' rows: token ids, labels, split."""
    digest = xxhash.xxh3_128()
    for column in ("token_id", *labels):
        digest.update(tokens[column].to_numpy().astype(np.int64).tobytes())
    digest.update((tokens["split"] == "train").to_numpy().tobytes())
    return digest.hexdigest()


def _trees_hash(store: Store, run: str) -> str:
    """xxh3-128, hexadecimal, of the run's trees: tree_hash and goal of each, in order."""
    trees = store.sql(TREES, {"run": run})
    digest = xxhash.xxh3_128(trees["tree_hash"].to_numpy().astype(np.uint64).tobytes())
    digest.update(trees["goal"].to_numpy().astype(np.uint8).tobytes())
    return digest.hexdigest()


def check_enough(tokens: pl.DataFrame, n_nodes: int, run: str, labels: Sequence[str]) -> int:
    """Refuse a run with too few trees for probes.

    Args:
        tokens: rows of the query `probe_tokens`.
        n_nodes: nodes per tree.
        run: name of the run, for messages.
        labels: the wanted labels.

    Returns:
        The number of test trees.

    Raises:
        BadInput: there are fewer than 2 test trees, or no training row has some node; suggests a
            number of trees.
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
            todo = "both trees of 2 nodes that exist are for training, so ingest larger ones (--nodes)"
        raise BadInput(
            f"run {run!r} holds {n_train} training and {n_test} test trees, too few for probes: {'; '.join(faults)}; {todo}"
        )
    return n_test


def sites_to_probe(
    store: Store,
    run: str,
    wanted: str | Sequence[str] | None,
    kinds: Sequence[str] = ("resid",),
    more: Sequence[str] = (),
) -> list[str]:
    """Short names of the sites to probe, in the order of the forward pass.

    Args:
        store: an open store.
        run: name of the run.
        wanted: names of sites or families; default: every site of `kinds`.
        kinds: kinds of sites that are probed.
        more: kinds of sites that are probed only if they are named.

    Raises:
        NotStored: the run does not hold a site, or no site of `kinds`.
    """
    kind = dict(store.sql("select short, kind from sites where run = $run", {"run": run}).iter_rows())
    held = [site for site in store.sites(run) if kind[site] in (*kinds, *more)]  # without patterns
    of_kinds = [site for site in held if kind[site] in kinds]
    names = of_kinds if wanted is None else meant(store, run, None, names_in(wanted) or [""])
    unknown = [site for site in names if site not in held]
    if unknown or not names:
        todo = _where(store, run, unknown)
        if unknown and not todo and not unknown[0].startswith("pattern"):
            raise not_held(store, run, unknown[0])
        what = f"no site {unknown[0]!r}{nearest(unknown[0], held)}" if unknown else "no residual site"
        there = ", ".join(store.sites(run)) or "none"
        raise NotStored(f"run {run!r} has {what} to probe; it holds {there}{todo}")
    return [site for site in held if site in names]


def _of_tokens(
    tokens: pl.DataFrame, labels: Sequence[str], guessed: dict[str, dict[str, np.ndarray]], n_nodes: int
) -> Asked:
    ys = {label: tokens[label].to_numpy().astype(np.int64) for label in labels}
    train = (tokens["split"] == "train").to_numpy()
    n_classes = {label: n_nodes if label in NODE_LABELS else len(np.unique(y[train])) for label, y in ys.items()}
    return Asked(tokens, tokens["tree_id"].to_numpy(), train, ys, guessed, n_classes)


def _where(store: Store, run: str, lacking: list[str]) -> str:
    """Advice for sites that a run lacks, or for any site; empty if the model has no such site."""
    n_layers = store.sql(LAYERS, {"run": run}).item() or 0
    possible = {"embed", *(f"resid_{place}.{layer}" for place in ("pre", "mid", "post") for layer in range(n_layers))}
    if not possible.issuperset(lacking):
        return ""
    others = store.sql(HOLDING, {"run": run})
    have = [name for name, sites in others.rows() if set(lacking) <= set(sites)]
    if have:
        return f"; name a run of its model over its trees that holds more (--run): {', '.join(have)}"
    return f"; {ingest_sites(store, run, *(lacking or USUAL))} adds what is missing"


def probe_site(
    X: np.ndarray, asked: Asked, where: dict[str, str], seed: int, max_iter: int, by: str | None = None
) -> Found:
    """Probe one site for each label, with controls; for the arguments see start_site."""
    with fitting() as pool:
        return start_site(pool, X, asked, where, seed, max_iter, by)()


def start_site(
    pool: Executor,
    X: np.ndarray,
    asked: Asked,
    where: dict[str, str],
    seed: int,
    max_iter: int,
    by: str | None = None,
) -> Callable[[], Found]:
    """Begin to probe one site for each label, with controls.

    The function returned waits for the fits, and returns rows of `results` and tests.

    Args:
        pool: threads for fits, see fit.fitting.
        X: float32 [n, d_model], as stored.
        asked: the n rows.
        where: run, site and, where tokens have roles, token_role.
        seed: see `study`.
        max_iter: see `study`.
        by: see `study`.
    """
    whiten = Whitening.of(X, asked.train)
    fits = start_all(pool, jobs_of(Sides.of(X, asked.train, whiten), asked, seed), asked.train, max_iter)
    by_place = X if by == BY else None  # other rows need not be kept
    return lambda: _site((fitted.result() for fitted in fits), whiten, by_place, asked, where, seed, max_iter)


def _site(
    fits: Iterator[Fit],
    whiten: Whitening,
    X: np.ndarray | None,
    asked: Asked,
    where: dict[str, str],
    seed: int,
    max_iter: int,
) -> Found:
    """Rows of `results` and tests of one site, from its fits; by place if there are rows X."""
    train = asked.train
    rows: list[dict[str, Any]] = []
    tests: list[Test] = []
    for label, y in asked.labels.items():
        about = {**where, "label": label}
        made = dict(zip(FITTED, fits, strict=False))
        scores, test = _scores(made, asked, about, seed)
        rows += scores
        tests.append(test)
        classes = np.unique(y[train])
        named = asked.names[label][classes] if label in asked.names else classes
        directions = _directions(made["accuracy"], named, whiten, about)
        rows += [{**about, "n": int(train.sum()), **row} for row in directions]
        if X is not None:
            its_rows, its_tests = place_rows(X, made["accuracy"].right, asked, about, seed, max_iter)
            rows += its_rows
            tests += its_tests
    return rows, tests


CONTROLS = ("shuffled_accuracy", "control_accuracy", "random_directions_accuracy")
FITTED = ("control_accuracy", "accuracy", "shuffled_accuracy", "random_directions_accuracy")  # longest first


def jobs_of(whitened: Sides, asked: Asked, seed: int) -> list[Job]:
    """What `fit_all` fits for one site, for each label in the order of FITTED.

    Args:
        whitened: the rows.
        asked: the n rows.
        seed: see `study`.
    """
    jobs, d = list[Job](), whitened.training.shape[1] - 1
    order = shuffle_within(asked.train, seed)
    n_classes = {label: len(np.unique(y[asked.train])) for label, y in asked.labels.items()}
    projected = {k: whitened.projected(random_directions(d, k, seed)) for k in set(n_classes.values())}
    for label, y in asked.labels.items():
        control = control_labels(asked.types, y, asked.train, seed)
        jobs += [(whitened, control), (whitened, y), (whitened, y[order]), (projected[n_classes[label]], y)]
    return jobs


def _scores(made: dict[str, Fit], asked: Asked, about: dict[str, str], seed: int) -> tuple[list[dict[str, Any]], Test]:
    """Rows of accuracy, controls, baselines and differences, and a test.

    Intervals are over test sequences. The test compares the accuracy with the best baseline.
    """
    label, trees, train = about["label"], asked.test_sequences, asked.train
    y, accuracy = asked.labels[label], made["accuracy"].right.astype(np.float64)
    guessed = baselines.with_majority(asked.guessed[label], y[train], y[~train])
    measured = {"accuracy": accuracy, **{name: made[name].right for name in CONTROLS}, **guessed}
    measured |= {
        "above_baseline": accuracy - baselines.highest(guessed),
        "above_shuffled": accuracy - made["shuffled_accuracy"].right,
        "selectivity": accuracy - made["control_accuracy"].right,
    }
    if asked.embedding is not None:
        measured |= {"embed_accuracy": asked.embedding, "above_embed": accuracy - asked.embedding}
    rows = [mean_row(values, trees, seed, **about, metric=metric) for metric, values in measured.items()]
    above = next(row for row in rows if row["metric"] == "above_baseline")
    for metric, value, n in (
        ("chance", 1 / asked.n_classes[label], len(trees)),
        ("iterations", made["accuracy"].n_iter, int(train.sum())),
        ("converged", made["accuracy"].converged, int(train.sum())),
    ):
        rows.append({**about, "metric": metric, "value": float(value), "n": n})
    return rows, above_test(measured["above_baseline"], trees, above, seed, asked.baseline)


def _directions(made: Fit, classes: np.ndarray, whiten: Whitening, about: dict[str, str]) -> list[dict[str, Any]]:
    """One row per class; logit of the class = dot(stored activation, direction) + value."""
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
