"""The study `probes`: at which sites can what an edge is, and where it leads, be read off a token by a linear map?

One probe a site, token and label: multinomial logistic regression (scikit-learn, L2 with C = 1, lbfgs, float32) on
whitened rows, fitted on the training trees and scored on the test trees, since rows of one tree share it. See fit.py.

Each has what it is held against. Baselines, which guess from the tree alone (see baselines.py): the most frequent label is one,
and the highest taken off the accuracy gives `above_baseline`, what the network has added. The same probe on labels shuffled
among the rows of each side of the split, which taken off gives `above_shuffled`. The same probe on Hewitt and Liang's control
task (see probe_fit.control_labels), which taken off gives its `selectivity`. And the same probe given as many random
directions as there are classes. No row is left out of a fit, a control's neither.

What each probe is above the highest baseline is tested by sign flips of each test tree's sum, and all that a study asks is adjusted
for each other (Holm): the sentence claims what is left standing.

Intervals are over the test trees. The fitted probes are held fixed, and so are the trees they were fitted to; the model is one,
of one training and seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import xxhash

from actstore.advice import ingest_more
from actstore.errors import BadInput, NotStored
from actstore.intervals import N_RESAMPLES, share_over_trees
from actstore.queries import load, nearest
from actstore.queries.probes import baselines
from actstore.queries.probes.asked import Asked, above_test
from actstore.queries.probes.figures import LABELS, NODE_LABELS, TOKEN_ROLES, draw, sentence, table
from actstore.queries.probes.fit import (
    MAX_ITER,
    TOL,
    C,
    Fit,
    Whitening,
    control_labels,
    fit_all,
    random_directions,
    shuffle_within,
)
from actstore.queries.study import Answer, Progress, Test, adjusted, result_rows, test_rows
from actstore.sites import not_held
from actstore.sites import wanted as meant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
where base.run = $run
group by runs.run, runs.rowid
order by runs.rowid
"""
PROTOCOLS = ("ours", "notebook")
BY = "place"
MIN_TEST_TREES = 2  # one tree resampled is always itself, so it gives no interval
ENOUGH_TREES = 60  # every label is a source in half of all trees at least, and one tree in five is for testing


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
) -> Answer:
    """Probe sites of a run.

    Memory is two copies of one site's rows: 15 rows of 4 * d_model bytes a tree of 16 nodes.

    Args:
        store: an open store.
        run: which run.
        seed: of the bootstrap, the shuffled labels, the control task's labels and the random directions; the fits
            themselves are deterministic.
        progress: called with (sites done, sites in all, the site just done).
        token_role: where to read: names of TOKEN_ROLES, with commas, or `all`.
        labels: what to ask for: names of LABELS, with commas, or `all`; source and target unless told (at `path`:
            next_node). Tokens of the path have goal and next_node, the others all but next_node.
        sites: names of sites, or of a family (`resid_post`) for its every layer; every residual site of the run by default.
        max_iter: iterations of lbfgs after which a fit is stopped, and said to have been.
        protocol: `ours`, or `notebook`: the notebook's own beside ours, see protocols.py.
        by: `place`: the accuracy at each place in the list of edges, too, see places.py.
        baseline: the path of an .sql file, a baseline of one's own beside the stored ones, see baselines.py.

    Raises:
        BadInput: no such token, label, protocol, max_iter or by; none of the labels at these tokens; a baseline that is none, or
            that guesses nothing of what is asked; or too few trees: a label is missing in training, or there are no test trees.
        NotStored: a site that the run does not hold.
    """
    if protocol not in PROTOCOLS:
        raise BadInput(f"no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if not isinstance(max_iter, int) or max_iter < 1:
        raise BadInput(f"got max_iter {max_iter!r}; it is a number of iterations, 1 or more ({MAX_ITER} unless told)")
    if by not in (None, BY):
        raise BadInput(f"got by {by!r}; probes are told by {BY}")
    asked = _asked(token_role, labels)
    sites = _sites(store, run, sites)
    guessers = baselines.stored()
    if baseline is not None:
        guessers.append(baselines.from_file(store, baseline, {"run": run, "token_role": next(iter(asked))}))
    query, about = load(QUERY).sql, store.sql(RUN, {"run": run}).row(0, named=True)
    shared = {"run": run, **about, "trees_xxh3": _trees_hash(store, run), "protocol": protocol}
    shared |= {"C": C, "tol": TOL, "max_iter": max_iter, "n_resamples": N_RESAMPLES, "by": by}
    shared |= {"baseline": guessers[-1].sql, "baseline_name": guessers[-1].name} if baseline is not None else {}
    recorded: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
    tests: list[Test] = []
    n_test_trees, done, own_is_used = 0, 0, baseline is None
    for role, its_labels in asked.items():
        used = {"run": run, "token_role": role}
        tokens = store.sql(query, used)
        n_test_trees = check_enough(tokens, about["n_nodes"], run, its_labels)
        params = {**shared, **used, "labels": its_labels, "data_xxh3": data_hash(tokens, its_labels)}
        guessed = baselines.scores(store, guessers, its_labels, query, used)
        own_is_used |= any(guessers[-1].name in names for names in guessed.values())
        rows: list[dict[str, Any]] = []
        for site in sites:
            X, tokens = store.read(query, run=run, site=site, params=used)
            at = {"run": run, "site": site, "token_role": role}
            its = _of_tokens(tokens, its_labels, guessed, about["n_nodes"])
            found, tested = _probe_site(X, its, at, seed, max_iter, by)
            rows += found
            tests += tested
            if protocol == "notebook":
                from actstore.queries.probes.protocols import notebook_rows

                rows += notebook_rows(X, tokens, its_labels, at, seed, max_iter)
            done += 1
            progress(done, len(sites) * len(asked), site if len(asked) == 1 else f"{role} {site}")
        recorded.append((rows, params))
    if not own_is_used:
        raise BadInput(
            f"the baseline {str(baseline)!r} guesses the {LABELS[guessers[-1].label]} of none of the tokens that were asked "
            f"({', '.join(asked)})"
        )
    held, snapshot = adjusted(tests), store.snapshot
    results = pl.concat(
        result_rows(
            [*rows, *test_rows(test for test in held if test.token_role == params["token_role"])],
            study=NAME,
            run=run,
            query=query,
            params=params,
            snapshot=snapshot,
            seed=seed,
        )
        for rows, params in recorded
    )
    return Answer(NAME, table(results), results, sentence(results, n_test_trees, held), held)


def _asked(token_role: str | Sequence[str], labels: str | Sequence[str] | None) -> dict[str, list[str]]:
    """The labels to ask for at each kind of token; of several kinds those that have none of the labels are left out.

    Raises:
        BadInput: no such token or label, or no token that has it.
    """
    roles = _chosen(token_role, TOKEN_ROLES, "token_role")
    if labels is None:
        return {role: ["next_node"] if role == "path" else ["source", "target"] for role in roles}
    wanted = _chosen(labels, LABELS, "label")
    there = {role: [label for label in LABELS if _has(role, label)] for role in roles}
    asked = {role: [label for label in its if label in wanted] for role, its in there.items()}
    if not any(asked.values()):
        known = sorted({label for its in there.values() for label in its}, key=list(LABELS).index)
        raise BadInput(f"none of the labels asked for is one of {', '.join(roles)}; there are {', '.join(known)}")
    return {role: its for role, its in asked.items() if its}


def _has(role: str, label: str) -> bool:
    """A token of the path is asked where it goes next, an edge's token what the edge is; both for the goal."""
    return label == "goal" or (label == "next_node") == (role == "path")


def _chosen(wanted: str | Sequence[str], known: Iterable[str], what: str) -> list[str]:
    """Names as `_names` takes them, or `all`, each known and once, in the order of what is known.

    Raises:
        BadInput: one is not known, or there is none.
    """
    names = _names(wanted)
    if names == ["all"]:
        return list(known)
    for name in names or [""]:
        if name not in known:
            raise BadInput(f"no {what} {name!r}; there are {', '.join(known)}, and all{nearest(name, known)}")
    return [name for name in known if name in names]


def _names(wanted: str | Sequence[str]) -> list[str]:
    """Names given with commas between, or as a list; a number, which the command line makes of digits, is a name."""
    return (
        [str(name) for name in wanted]
        if isinstance(wanted, list | tuple)
        else [n.strip() for n in str(wanted).split(",")]
    )


def data_hash(tokens: pl.DataFrame, labels: Sequence[str]) -> str:
    """xxh3-128, hexadecimal, of the rows that probes are fitted to and scored on: token ids, labels, split."""
    digest = xxhash.xxh3_128()
    for column in ("token_id", *labels):
        digest.update(tokens[column].to_numpy().astype(np.int64).tobytes())
    digest.update((tokens["split"] == "train").to_numpy().tobytes())
    return digest.hexdigest()


def _trees_hash(store: Store, run: str) -> str:
    """xxh3-128, hexadecimal, of the run's set of trees: tree_hash and goal of each, in their order."""
    trees = store.sql(TREES, {"run": run})
    digest = xxhash.xxh3_128(trees["tree_hash"].to_numpy().astype(np.uint64).tobytes())
    digest.update(trees["goal"].to_numpy().astype(np.uint8).tobytes())
    return digest.hexdigest()


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
    names = held if wanted is None else meant(store, run, None, _names(wanted) or [""])
    unknown = [site for site in names if site not in held]
    if unknown or not held:
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
    return Asked(tokens, (tokens["split"] == "train").to_numpy(), ys, guessed, n_nodes)


def _where(store: Store, run: str, lacking: list[str]) -> str:
    """What to do for sites that a run lacks, or for any where none is named; nothing where its model has no such site."""
    n_layers = store.sql(LAYERS, {"run": run}).item() or 0
    possible = {"embed", *(f"resid_{place}.{layer}" for place in ("pre", "mid", "post") for layer in range(n_layers))}
    if not possible.issuperset(lacking):
        return ""
    others = store.sql(HOLDING, {"run": run})
    have = [name for name, sites in others.rows() if set(lacking) <= set(sites)]
    if have:
        return f"; a run of its model over its trees has (--run): {', '.join(have)}"
    command = ingest_more(store, run, f"{run}-sites", "--sites", ",".join(lacking) or "embed,resid_mid,resid_post")
    return f"; {command} stores a run that has, to be named (--run)"


def _probe_site(
    X: np.ndarray, asked: Asked, where: dict[str, str], seed: int, max_iter: int, by: str | None
) -> tuple[list[dict[str, Any]], list[Test]]:
    """Probe one site for each label, with its controls: rows of `results`, and what is tested; `where` names run and site."""
    train = asked.train
    whiten = Whitening.of(X[train])
    whitened = whiten(X)
    order = shuffle_within(train, seed)
    words, positions = asked.tokens["token"].to_numpy(), asked.tokens["position"].to_numpy()
    controls = {label: control_labels(words, positions, y, train, seed) for label, y in asked.labels.items()}
    jobs: list[tuple[np.ndarray, np.ndarray]] = []
    for label, y in asked.labels.items():
        jobs += [(whitened, y), (whitened, y[order]), (whitened, controls[label])]
        jobs.append((random_directions(whitened, y[train], seed), y))
    fits = iter(fit_all(jobs, train, max_iter))
    rows: list[dict[str, Any]] = []
    tests: list[Test] = []
    for label, y in asked.labels.items():
        about = {**where, "label": label}
        made = dict(zip(("accuracy", *CONTROLS), fits, strict=False))
        scores, test = _scores(made, asked, about, seed)
        rows += scores
        tests.append(test)
        directions = _directions(made["accuracy"], np.unique(y[train]), whiten, about)
        rows += [{**about, "n": int(train.sum()), **row} for row in directions]
        if by == BY:
            from actstore.queries.probes.places import place_rows

            its_rows, its_tests = place_rows(X, made["accuracy"].right, asked, about, seed, max_iter)
            rows += its_rows
            tests += its_tests
    return rows, tests


CONTROLS = ("shuffled_accuracy", "control_accuracy", "random_directions_accuracy")


def _scores(made: dict[str, Fit], asked: Asked, about: dict[str, str], seed: int) -> tuple[list[dict[str, Any]], Test]:
    """The accuracy, the controls' and the baselines', and what the accuracy is above them, with intervals over test trees; its
    test against the highest baseline.
    """
    label, trees, train = about["label"], asked.test_trees, asked.train
    y, accuracy = asked.labels[label], made["accuracy"].right.astype(np.float64)
    guessed = baselines.with_majority(asked.guessed[label], y[train], y[~train])
    measured = {name: fit.right for name, fit in made.items()} | guessed
    measured |= {
        "above_baseline": accuracy - baselines.highest(guessed),
        "above_shuffled": accuracy - made["shuffled_accuracy"].right,
        "selectivity": accuracy - made["control_accuracy"].right,
    }
    rows = []
    for metric, values in measured.items():
        low, high = share_over_trees(values, trees, seed)
        rows.append(
            {**about, "metric": metric, "value": float(values.mean()), "low": low, "high": high, "n": len(trees)}
        )
    n_classes = asked.n_nodes if label in NODE_LABELS else len(np.unique(y[train]))
    for metric, value, n in (
        ("chance", 1 / n_classes, len(trees)),
        ("iterations", made["accuracy"].n_iter, int(train.sum())),
        ("converged", made["accuracy"].converged, int(train.sum())),
    ):
        rows.append({**about, "metric": metric, "value": float(value), "n": n})
    above = next(row for row in rows if row["metric"] == "above_baseline")
    return rows, above_test(about, measured["above_baseline"], trees, above, seed)


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


def plot(answer: Answer) -> Figure:
    """Accuracy by site of both labels with 95 % intervals, the notebook's numbers hollow, chance as a line."""
    return draw(answer.results)
