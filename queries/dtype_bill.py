"""The study `dtype-bill`: what do smaller activations cost, and what do they save, against float32?

The base run is stored as float32. It is compared with the runs of its model over its trees that are
stored otherwise (`ingest --dtype`, `--codec`), at the residual sites that all of them hold. Four
things are compared for each of these runs, tree by tree:

    probes       accuracy of the probes of the study `probes`, fitted to what each run reads
    predictions  the model goes on from what the run stored at all tokens of a site: which steps are
                 predicted otherwise, and what accuracy and log-loss change
    outcomes     how far the activation of another tree moves a tree's first step (see `patching`),
                 with donors of this run less with donors of float32
    reads        seconds to read the same rows, in turn with float32

A run whose numbers are float32's own, as those of a codec are, has the bytes and reads alone: all
else is equal. Changes are tested by sign flips of each tree's sum, over all sites together, with
Holm's correction; each site has its interval. No significant change is no proof of none: the
interval says how large a change can be. A change of log-loss or of a moved share below ROUNDING
counts as none. Times are of the machine; everything else is the same on each run of the study.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput, NotStored, advised
from actstore.intervals import change_over_trees, sign_flip
from actstore.interventions import Edit
from actstore.queries import load
from actstore.queries.causes import ENDS, TOKENS, answered, by_tree, log, mean_over_trees, some
from actstore.queries.figures import GREY, by_site, entitle, heading, legend, most, panels, points
from actstore.queries.pairs import BEFORE, Contrast, pairs_of
from actstore.queries.probes.fit import MAX_ITER, Sides, fit_all
from actstore.queries.probes.study import QUERY, check_enough, labels_by_role, sites_to_probe
from actstore.queries.study import (
    Answer,
    Progress,
    Test,
    adjusted,
    adjustment,
    mean_row,
    p_shown,
    result_rows,
    shown,
    test_rows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.interventions import Patching
    from actstore.store import Store

NAME = "dtype-bill"
STORED = """
-- how each run of the base's model over its trees is stored, the base first
select runs.run, coalesce(runs.versions->>'$.dtype', 'float32') as dtype, coalesce(runs.versions->>'$.codec', 'none') as codec
from runs join runs as base using (weights_sha256, dataset)
where base.run = $run and runs.run not in (select run from interventions) and coalesce(runs.prompt, 'task') = 'task'
order by runs.run != $run, runs.rowid
"""
BYTES = (
    "select sum(bytes) from shards join sites using (run, site) where run = $run and short in (select unnest($sites))"
)
ROUNDING = 1e-5  # nats, and share of an answer: float32 sums of the model differ by as much
TESTED = {  # metric → the change in words, and whether it is a share
    "accuracy_change": ("accuracy of probes, less that of float32's", True),
    "predicted_right_change": ("accuracy of predictions from what is stored, less float32's", True),
    "loss_change": ("log-loss in nats of predictions from what is stored, less float32's", False),
    "moved_change": ("share of an answer that donors move, less float32's", True),
}
TITLES = {  # metrics that are drawn
    "accuracy_change": "accuracy of the probe",
    "predicted_right_change": "accuracy of predictions",
    "moved_change": "share of an answer that donors move",
}
SHOWN = {
    "probes, points": "accuracy_change",
    "predictions, points": "predicted_right_change",
    "predicted otherwise %": "predicted_otherwise",
    "loss, millinats": "loss_change",
    "donors move, points": "moved_change",
}


@dataclass(frozen=True)
class Asked:
    """What each run is asked, by the base's own tokens and trees.

    Attributes:
        sites: short names.
        labels: token role → labels that are probed.
        tokens: token role → rows of probe_tokens.
        trees: tree ids whose predictions go on from what is stored.
        role: of the tokens that a donor gives its activation to.
    """

    run: str
    seed: int
    sites: Sequence[str]
    labels: Mapping[str, Sequence[str]]
    tokens: Mapping[str, pl.DataFrame]
    trees: np.ndarray
    role: str
    repeats: int


@dataclass
class Changes:
    """Changes of one run against the base: metric → one array of values and one of trees a cell."""

    label: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    held: dict[str, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)

    def add(self, metric: str, values: np.ndarray, trees: np.ndarray, seed: int, **where: str) -> None:
        """Keep the changes of a cell, and their mean as a row."""
        self.held.setdefault(metric, []).append((values, trees))
        self.rows.append(_row(metric, values, trees, seed, label=self.label, **where))

    def summed_up(self, seed: int) -> list[Test]:
        """Add the mean of each metric over all cells; the tests of those in TESTED."""
        tests = []
        for metric, cells in self.held.items():
            values, trees = (np.concatenate(each) for each in zip(*cells, strict=True))
            row = _row(metric, values, trees, seed, label=self.label)
            self.rows.append(row)
            if metric in TESTED:
                what, points = TESTED[metric]
                label = f"{self.label}, {metric}"
                p = sign_flip(by_tree(values, trees), seed)
                tests.append(Test.of({**row, "label": label}, p, f"{self.label}: {what}", points=points))
        return tests


def study(
    store: Store,
    run: str,
    seed: int,
    progress: Progress,
    patch: Patching,
    sites: str | Sequence[str] | None = None,
    token_role: str | Sequence[str] = "edge_target,path",
    labels: str | Sequence[str] = "source,next_node",
    role: str = "root",
    trees: int = 200,
    repeats: int = 15,
) -> Answer:
    """Compare a run with those of its model over its trees that are stored otherwise.

    Args:
        store: an open store.
        run: a run that is stored as float32, without a codec.
        seed: seed of trees, pairs, sign flips and bootstrap.
        progress: called after each site of each run.
        patch: runs edits.
        sites: names of residual sites or families; default: all that every run holds.
        token_role, labels: what is probed, see `probes`.
        role: tokens to which donors give their activations.
        trees: at most so many trees for predictions, and pairs for outcomes.
        repeats: how often each run is read for its times; 0 leaves times out.

    Raises:
        NotStored: no such run is stored otherwise; the run has no answers, or lacks a site.
        BadInput: the run is not stored as float32, an option has no meaning, or there are too few
            trees.
    """
    others = _others(store, run)
    if role not in BEFORE:
        raise BadInput(f"no role {role!r} of tokens before the path; there are {', '.join(BEFORE)} (-o role)")
    if not isinstance(repeats, int) or repeats < 0:
        raise BadInput(f"got -o repeats {repeats}; give a number of reads, or 0 for no times")
    held = [site for site in sites_to_probe(store, run, sites) if all(site in store.sites(other) for other in others)]
    if not held:
        raise NotStored(f"no residual site is held by all of {', '.join([run, *others])}; ingest one for each of them")
    asked_labels = labels_by_role(token_role, labels)
    n_nodes = store.sql("select n_nodes from runs join datasets using (dataset) where run = $run", {"run": run}).item()
    tokens = {name: store.sql(load(QUERY).sql, {"run": run, "token_role": name}) for name in asked_labels}
    for name, its in asked_labels.items():
        check_enough(tokens[name], n_nodes, run, its)
    rng = np.random.default_rng(seed)
    chosen = some(answered(store, run)["tree_id"].unique().sort().to_numpy(), trees, rng)
    asked = Asked(run, seed, held, asked_labels, tokens, chosen, role, repeats)
    pairs, query = pairs_of(store, run, None, trees, "noise", rng)
    contrast = Contrast(store, run, patch, pairs, held[0])
    rows, tests = _bytes(store, run, {run: "float32", **others}, held), []
    base, done = _Base(store, patch, asked, contrast), 0
    rows += base.control()
    for other, label in others.items():
        found = Changes(label)
        for site in held:
            base.compare(found, other, site)
            done += 1
            progress(done, len(others) * len(held), f"{label} {site}")
        tests += found.summed_up(seed)
        rows += found.rows
    tests = list(adjusted(tests))
    params = {
        **{"run": run, "others": others, "sites": held, "labels": asked_labels, "role": role},
        **{"trees": trees, "repeats": repeats, "left_out": contrast.n_left_out, "max_iter": MAX_ITER},
    }
    results = result_rows(
        [*rows, *test_rows(tests)], study=NAME, run=run, query=query, params=params, snapshot=store.snapshot, seed=seed
    )
    return Answer(NAME, as_frame(results), results, sentence(results, tests), tuple(tests))


def _others(store: Store, run: str) -> dict[str, str]:
    """The runs that are compared: name → how it is stored, in words."""
    found = store.sql(STORED, {"run": run}).rows()
    (_, dtype, codec), *others = found
    if (dtype, codec) != ("float32", "none"):
        plain = [name for name, *how in others if how == ["float32", "none"]]
        todo = (
            f"name {plain[0]} (--run)"
            if plain
            else "ingest a run of its model over its trees without --dtype, and name that"
        )
        raise BadInput(f"run {run!r} is stored as {_said(dtype, codec)}, and the bill is against float32; {todo}")
    compared = [(name, _said(*how)) for name, *how in others if how != ["float32", "none"]]
    if not compared:
        command = advised("ingest", store.path, "--model-of", run, "--run", f"{run}-int8", "--dtype", "int8")
        raise NotStored(
            f"no run of the model of {run!r} over its trees is stored otherwise than as float32; ingest one with {command} and its "
            "--dataset and --sites"
        )
    said = [how for _, how in compared]
    return {name: how if said.count(how) == 1 else f"{how} ({name})" for name, how in compared}


def _said(dtype: str, codec: str) -> str:
    return dtype if codec == "none" else f"{dtype} {codec}"


def _bytes(store: Store, run: str, labels: Mapping[str, str], sites: Sequence[str]) -> list[dict[str, Any]]:
    """Bytes of the shards of each run, and their share of the base's."""
    n_bytes = {name: int(store.sql(BYTES, {"run": name, "sites": list(sites)}).item()) for name in labels}
    rows = [
        {"label": labels[name], "metric": "bytes", "value": float(n), "n": len(sites)} for name, n in n_bytes.items()
    ]
    shares = [(name, n / n_bytes[run]) for name, n in n_bytes.items()]
    return [
        *rows,
        *({"label": labels[of], "metric": "share_of_bytes", "value": s, "n": len(sites)} for of, s in shares),
    ]


def _row(metric: str, values: np.ndarray, trees: np.ndarray, seed: int, **about: str) -> dict[str, Any]:
    """The mean of changes with its interval over trees: of shares, or by bootstrap of any size."""
    if metric in ("loss_change", "moved_change", "relative_error"):
        mean = dict(zip(ENDS, mean_over_trees(values, trees, seed), strict=True))
        return {**about, "metric": metric, **mean, "n": len(values)}
    if metric in TESTED:
        low, high = change_over_trees(values, trees)
        return {**about, "metric": metric, "value": float(values.mean()), "low": low, "high": high, "n": len(values)}
    return mean_row(values, trees, seed, **about, metric=metric)


def _rounded(changes: np.ndarray) -> np.ndarray:
    """Changes without those that the float32 of the model itself can make."""
    return np.where(np.abs(changes) < ROUNDING, 0.0, changes)


class _Base:
    """What the base run gives, site by site, and the comparison of other runs with it."""

    def __init__(self, store: Store, patch: Patching, asked: Asked, contrast: Contrast) -> None:
        self._store, self._patch, self._asked, self._contrast = store, patch, asked, contrast
        self._right: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self._moved: dict[str, np.ndarray] = {}
        self._predicted: dict[str, pl.DataFrame] = {}

    def control(self) -> list[dict[str, Any]]:
        """The base as it goes on from what it stored itself, which must change nothing."""
        stored = answered(self._store, self._asked.run).filter(pl.col("tree_id").is_in(self._asked.trees))
        rows = []
        for site in self._asked.sites:
            both = self._from_stored(self._asked.run, site).join(stored, on="token_id", suffix="_stored")
            worst = float((both["p_target"] - both["p_target_stored"]).abs().max())  # type: ignore[arg-type]
            about = {"site": site, "label": "float32", "metric": "control_largest_change"}
            rows.append({**about, "value": worst, "n": len(both)})
        return rows

    def compare(self, found: Changes, other: str, site: str) -> None:
        """Add what changes at a site if it is read of another run."""
        asked, seed = self._asked, self._asked.seed
        equal, n = True, 0
        for role, tokens in asked.tokens.items():
            base, X = (self._store.read(tokens, run, site)[0] for run in (asked.run, other))
            trees, n = tokens["tree_id"].to_numpy(), n + len(X)
            equal &= bool((base == X).all())
            error = np.linalg.norm(X - base, axis=1) / np.linalg.norm(base, axis=1).clip(min=1e-30)
            found.add("relative_error", np.minimum(error, 1.0), trees, seed, site=site, token_role=role)
            if (base == X).all():
                continue
            train = (tokens["split"] == "train").to_numpy()
            if (role, site) not in self._right:
                self._right[role, site] = self._probed(base, role, train)
            for label, right in self._probed(X, role, train).items():
                change = right.astype(np.float64) - self._right[role, site][label]
                found.add("accuracy_change", change, trees[~train], seed, site=site, token_role=f"{role}, {label}")
        if asked.repeats:
            found.rows.append(self._times(other, site, found.label))
        if not equal:
            self._predictions(found, other, site)
            self._outcomes(found, other, site)

    def _probed(self, X: np.ndarray, role: str, train: np.ndarray) -> dict[str, np.ndarray]:
        """Label → bool [n_test]: which test rows a probe of these rows gets right."""
        whitened, tokens = Sides.whitened(X, train), self._asked.tokens[role]
        jobs = [(whitened, tokens[label].to_numpy().astype(np.int64)) for label in self._asked.labels[role]]
        return {label: fit.right for label, fit in zip(self._asked.labels[role], fit_all(jobs, train), strict=True)}

    def _from_stored(self, run: str, site: str) -> pl.DataFrame:
        """The base's predictions where its activations at a site are what a run stored."""
        rows = self._store.sql(TOKENS, {"trees": self._asked.trees.tolist()}).select(
            "token_id", donor_token_id="token_id"
        )
        edit = Edit("from rows", site, donors=run, tables={"rows": rows})
        return self._patch(self._asked.run, [edit]).sort("token_id")

    def _predictions(self, found: Changes, other: str, site: str) -> None:
        seed = self._asked.seed
        if site not in self._predicted:
            self._predicted[site] = self._from_stored(self._asked.run, site)
        both = self._from_stored(other, site).join(self._predicted[site], on="token_id", suffix="_base")
        trees = both["tree_id"].to_numpy()
        right, before = (both[name].to_numpy().astype(np.float64) for name in ("correct", "correct_base"))
        changed = (both["predicted"].cast(pl.String) != both["predicted_base"].cast(pl.String)).to_numpy()
        found.add("predicted_right_change", right - before, trees, seed, site=site)
        found.add("predicted_otherwise", changed.astype(np.float64), trees, seed, site=site)
        loss = _rounded(log(both["p_target_base"]) - log(both["p_target"]))
        found.add("loss_change", loss, trees, seed, site=site)

    def _outcomes(self, found: Changes, other: str, site: str) -> None:
        tokens = self._contrast.tokens(self._asked.role).select("token_id", donor_token_id="donor")
        edits = {run: Edit("from rows", site, donors=run, tables={"rows": tokens}) for run in (self._asked.run, other)}
        if site not in self._moved:
            self._moved[site] = self._contrast.moved([edits[self._asked.run]])
        change = _rounded(self._contrast.moved([edits[other]]) - self._moved[site])
        trees = self._contrast.pairs["tree_id"].to_numpy()
        found.add("moved_change", change, trees, self._asked.seed, site=site, token_role=self._asked.role)

    def _times(self, other: str, site: str, label: str) -> dict[str, Any]:
        """The base's seconds over the run's, of reads in turn: the medians' ratio."""
        ids = np.concatenate([tokens["token_id"].to_numpy() for tokens in self._asked.tokens.values()])
        seconds = np.zeros((self._asked.repeats, 2))
        for turn in range(self._asked.repeats):
            for which in (0, 1) if turn % 2 else (1, 0):
                begun = time.perf_counter()
                self._store.read(ids, (self._asked.run, other)[which], site)
                seconds[turn, which] = time.perf_counter() - begun
        ratio = seconds[:, 0] / seconds[:, 1]
        rng = np.random.default_rng(self._asked.seed)
        drawn = np.median(ratio[rng.integers(len(ratio), size=(1000, len(ratio)))], axis=1)
        low, high = (float(np.quantile(drawn, end)) for end in (0.025, 0.975))
        about = {"site": site, "label": label, "metric": "read_speed"}
        return {**about, "value": float(np.median(ratio)), "low": low, "high": high, "n": len(ratio)}


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """One row per run: bytes, reads, and the mean change over all sites with its interval."""
    rows = []
    for label in results.filter(metric="share_of_bytes")["label"]:
        if label == "float32":
            continue
        mine = results.filter(pl.col("label") == label)
        whole = {row["metric"]: row for row in mine.filter(pl.col("site").is_null()).iter_rows(named=True)}
        speeds = mine.filter(metric="read_speed")["value"].to_list()
        row = {
            "stored as": label,
            "bytes %": f"{100 * whole['share_of_bytes']['value']:.1f}",
            "reads, times float32": f"{min(speeds):.2f} to {max(speeds):.2f}" if speeds else None,
            "error %": f"{100 * whole['relative_error']['value']:.3f}",
        }
        rows.append(row | {name: _cell(whole.get(metric)) for name, metric in SHOWN.items()})
    return pl.DataFrame(rows)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "equal"
    scale, sign = (
        (1000 if row["metric"] == "loss_change" else 100),
        "" if row["metric"] == "predicted_otherwise" else "+",
    )
    ends = "" if row["low"] is None else f" [{scale * row['low']:{sign}.2f}, {scale * row['high']:{sign}.2f}]"
    return f"{scale * row['value']:{sign}.2f}{ends} (n = {row['n']:,})"


def sentence(results: pl.DataFrame, tests: Sequence[Test]) -> str:
    """What is saved, what changes significantly, and how much more can have changed."""
    run, shares = results["run"][0], results.filter(metric="share_of_bytes").filter(pl.col("label") != "float32")
    saved = ", ".join(f"{100 * share:.1f} % as {label}" for label, share in shares.select("label", "value").iter_rows())
    text = f"Run {run!r} takes in bytes of its float32 {saved}."
    equal = [label for label in shares["label"] if not any(test.label.startswith(f"{label}, ") for test in tests)]
    if equal:
        text += f" What is stored as {', '.join(equal)} reads as float32's own numbers, so that nothing else changes."
    if not tests:
        return text
    found = sorted((test for test in tests if test.found), key=lambda test: test.p_holm)
    text += f" {len(found)} of {len(tests)} changes against float32 are significant"
    said = "; ".join(f"{test.what}: {shown(test)}{' points' * test.points} ({p_shown(test.p_holm)})" for test in found)
    text += f": {said}." if found else "."
    ends = [(test.low, test.high) for test in tests if test.points and not test.found]
    if within := [max(abs(low), abs(high)) for low, high in ends if low is not None and high is not None]:
        open_to = f"the intervals leave changes of up to {100 * max(within):.2f} points open"
        text += f" Of the shares that do not change significantly, {open_to}."
    control = max(results.filter(metric="control_largest_change")["value"].to_list())
    text += f" From float32's own activations the model's probabilities change by at most {control:.1g} (the control)."
    return f"{text} {adjustment(tests)}"


def plot(answer: Answer) -> Figure:
    """The change against float32 at each site with its interval, a panel per probe and measure.

    A run whose numbers are float32's own lies on the grey line at 0.
    """
    results = answer.results.filter(pl.col("site").is_not_null())
    sites = results["site"].unique(maintain_order=True).to_list()
    shares = answer.results.filter(metric="share_of_bytes").filter(pl.col("label") != "float32")
    named = {
        label: f"{label}, {100 * share:.0f} % of the bytes" for label, share in shares.select("label", "value").rows()
    }
    roles = [
        (of, role) for of in TITLES for role in results.filter(metric=of)["token_role"].unique(maintain_order=True)
    ]
    figure, axes = panels(len(roles) or 1, 1.25, sharex=True)
    for axis, (metric, role) in zip(axes, roles, strict=False):
        rows = results.filter(pl.col("token_role").eq_missing(pl.lit(role)), metric=metric)
        for turn, label in enumerate(named):
            mine = rows.filter(label=label)
            if len(mine):
                points(axis, [sites.index(site) for site in mine["site"]], mine, named[label], turn)
        entitle(axis, f"{TITLES[metric]}{f': {role}' * (role is not None)}, n\u00a0=\u00a0{most(rows['n']):,}")
    for axis in axes:
        axis.axhline(0, color=GREY, linewidth=0.8)
    changed = set(results.filter(pl.col("metric").is_in(list(TITLES)))["label"])
    for label in (label for label in named if label not in changed):
        axes[0].plot([], [], color=GREY, linewidth=0.8, label=f"{named[label]}, its numbers equal")
    figure.supylabel("change against float32 (points)", fontsize=8)
    by_site(axes[-1], sites)
    legend(figure, *axes)
    heading(figure, "What smaller activations change", f"run {results['run'][0]}; bars are 95 % intervals over trees")
    return figure
