"""The study `compare`: failures, similarity of layers and probe transfer of two models.

Both models ran over the same sequences. Of sequences that are no trees, next tokens and similarity
are compared, see sequences.py. All that follows is about trees.

Similarity is linear CKA (see similarity.py) of the residual stream at the edges' target tokens of
test trees.
Its control pairs each row with another row. A probe for the edge's source is fitted on one model's
training trees and scored on the other model's test trees, directly and after the best linear map
from the other model's activations to the probe's (least squares, training trees). The map shows
whether the probed information is there in another basis.

A map with d_model × d_model numbers may find information that the other model has not computed. The
controls are the same map, with the same output and probe, from untrained inputs: the other model's
embedding of the token, random features of all tokens so far (see controls.py), and the site itself
with shuffled rows. The map's accuracy above the best control is tested per site and direction.
Holm's correction covers these tests and McNemar's test of the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.advice import ingest_command
from actstore.errors import BadInput, NotStored
from actstore.intervals import paired, sign_flip
from actstore.queries import load
from actstore.queries.compare.controls import CONTROLS, best_control, map_controls, random_features, words_of
from actstore.queries.compare.sequences import compare_sequences, draw_cka, is_of_sequences, plot_sequences
from actstore.queries.compare.similarity import cka, cka_interval
from actstore.queries.figures import (
    GREY,
    by_site,
    entitle,
    heading,
    legend,
    most,
    panels,
    percents,
    points,
    whole_numbers,
)
from actstore.queries.probes.figures import CAVEAT
from actstore.queries.probes.fit import one_thread
from actstore.queries.study import (
    RUNS,
    Answer,
    Progress,
    Row,
    Test,
    adjusted,
    adjustment,
    mean_row,
    most_alike,
    p_shown,
    result_rows,
    test_rows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME, QUERY = "compare", "edge_tokens"
MAX_TREES = 2000  # compared by activations: intervals of a point, and the heat map of all layers in seconds
MAX_ITER = 300  # of a probe's fit; a fit that converges takes about 10
LEAST = 10  # test trees
SYSTEM = "select system from runs join models using (weights_sha256) where run = $run"
BOTH = """
-- one row per tree that both runs answered
select trees.tree_id, depth, mine.greedy_right as right, theirs.greedy_right as other_right
from trees
join outcomes as mine on mine.run = $run and mine.tree_id = trees.tree_id
join outcomes as theirs on theirs.run = $other and theirs.tree_id = trees.tree_id
order by trees.tree_id
"""


@dataclass(frozen=True)
class Pair:
    """Both runs' activations of the same tokens at one site.

    Attributes:
        mine: float32 [n, d_model], activations of the first run.
        theirs: float32 [n, d_model], activations of the second run.
        tokens: rows of the tokens, as the query yields them.
    """

    mine: np.ndarray
    theirs: np.ndarray
    tokens: pl.DataFrame


def study(
    store: Store, run: str, seed: int, progress: Progress, other: str | None = None, max_trees: int = MAX_TREES
) -> Answer:
    """Compare two runs over the same sequences.

    Args:
        store: an open store.
        run: name of the first run.
        seed: seed of the bootstrap and the shuffles.
        progress: called after each site.
        other: name of the second run; default: of the first other model over the same sequences,
            the run that shares most sites.
        max_trees: number of trees, first of the set, whose activations are compared; of no meaning
            for other sequences.

    Raises:
        NotStored: there is no second run; gives the ingest command that adds one.
        BadInput: `other` is over other sequences, or there are too few.
    """
    import sklearn.linear_model
    import sklearn.preprocessing  # noqa: F401, imported here: one_thread covers only libraries loaded before

    other = _other(store, run, other)
    with one_thread():
        if _runs(store)[run]["task"] != "trees":
            return compare_sequences(store, run, other, seed, progress)
        return _compared(store, run, seed, progress, other, max_trees)


def _compared(store: Store, run: str, seed: int, progress: Progress, other: str, max_trees: int) -> Answer:
    rows, tests = _failures(store.sql(BOTH, {"run": run, "other": other}))
    sites = [site for site in _vectors(store, run) if site in _vectors(store, other)]
    read = f"from ({load(QUERY).sql.rstrip()}) where tree_id < (select min(tree_id) + $max_trees from trees where dataset = $d)"
    dataset = store.sql("select dataset from runs where run = $run", {"run": run}).item()
    params = {"run": run, "token_role": "edge_target", "max_trees": max_trees, "d": dataset}
    words = words_of(store, dataset, max_trees)
    embedded = [
        store.read(read, name, "embed", params)[0] if sites and "embed" in _vectors(store, name) else None
        for name in (run, other)
    ]
    made: dict[str, list[np.ndarray | None]] = {"embed": embedded}
    held: dict[str, Pair] = {}
    for done, site in enumerate(sites, start=1):
        pair = _read(store, run, other, site, read, params)
        if "random" not in made:  # the tokens are the same at every site
            ids = pair.tokens["token_id"].to_numpy()
            made["random"] = [random_features(words, ids, X.shape[1], seed) for X in (pair.mine, pair.theirs)]
        found, tested = _transfer(pair, site, made, seed)
        rows += found
        tests += tested
        test = (pair.tokens["split"] == "test").to_numpy()
        held[site] = Pair(pair.mine[test], pair.theirs[test], pair.tokens.filter(test))
        progress(done, len(sites) + 1, site)
    rows += _similarities(held, seed)
    progress(len(sites) + 1, len(sites) + 1, "similarity")
    used = {**params, "other": other}
    tests = list(adjusted(tests))
    rows += test_rows(tests)
    results = result_rows(
        rows, study=NAME, run=run, query=f"{BOTH};\n{read}", params=used, snapshot=store.snapshot, seed=seed
    )
    return Answer(NAME, as_frame(results), results, sentence(results, other, tests), tuple(tests))


def _other(store: Store, run: str, other: str | None) -> str:
    runs = list(_runs(store).values())
    base = _runs(store)[run]
    what = "trees" if base["task"] == "trees" else "sequences"
    if other is not None:
        theirs = _runs(store)[store.resolve_run(other)]
        if most_alike(base, [theirs]):
            return other
        found = [row["run"] for row in runs if most_alike(base, [row])]
        raise BadInput(
            f"runs {run!r} and {other!r} are not two models over the same {what}; runs of other models over the {what} of "
            f"{run!r} are: {', '.join(found) if found else 'none'}"
        )
    found = most_alike(base, runs)
    if not found and what != "trees":
        raise NotStored(
            f"no other model ran over the sequences of {run!r}; ingest one with the same tokenizer over dataset "
            f"{base['dataset']!r} (--dataset)"
        )
    if not found:
        system = store.sql(SYSTEM, {"run": run}).item()
        model = "reproduction" if system == "baseline" else "baseline"
        command = ingest_command(store, ("--model", model), base["dataset"], model)
        raise NotStored(f"no other model ran over the trees of {run!r}; {command} adds one")
    return str(found[0]["run"])


def _runs(store: Store) -> dict[str, Row]:
    """Rows of RUNS, by run."""
    return {row["run"]: row for row in store.sql(RUNS).iter_rows(named=True)}


def _vectors(store: Store, run: str) -> list[str]:
    held = store.sql("select short from sites where run = $run and kind = 'resid'", {"run": run})["short"].to_list()
    return [site for site in store.sites(run) if site in held]


def _read(store: Store, run: str, other: str, site: str, query: str, params: dict[str, Any]) -> Pair:
    mine, tokens = store.read(query, run, site, params)
    theirs, their_tokens = store.read(query, other, site, params)
    n_test = tokens.filter(split="test")["tree_id"].n_unique()
    if n_test < LEAST:
        raise BadInput(
            f"runs {run!r} and {other!r} share {n_test} test trees; {LEAST} are needed: ingest about {10 * LEAST} trees or more"
        )
    if not their_tokens["token_id"].equals(tokens["token_id"]):
        raise BadInput(f"run {other!r} does not hold all trees of {run!r} yet; let the ingest of this run go on")
    return Pair(mine, theirs, tokens)


def _failures(both: pl.DataFrame) -> tuple[list[dict[str, Any]], list[Test]]:
    """Joint outcomes and McNemar's exact p, over all trees and by depth; a test over all trees."""
    from scipy.stats import binomtest

    rows: list[dict[str, Any]] = []
    tests: list[Test] = []
    for depth in (None, *sorted(both["depth"].unique().to_list())):
        of_depth = both if depth is None else both.filter(depth=depth)
        mine, theirs = of_depth["right"].to_numpy(), of_depth["other_right"].to_numpy()
        label, n = "all" if depth is None else f"depth {depth}", len(of_depth)
        lost, won = int((mine & ~theirs).sum()), int((~mine & theirs).sum())
        change, low, high = paired(mine, theirs)
        counts = {"both_right": int((mine & theirs).sum()), "only_run": lost, "only_other": won}
        counts["both_wrong"] = n - sum(counts.values())
        rows += [{"label": label, "metric": metric, "value": float(count), "n": n} for metric, count in counts.items()]
        rows.append({"label": label, "metric": "other_less_run", "value": change, "low": low, "high": high, "n": n})
        p = binomtest(lost, lost + won).pvalue if lost + won else 1.0
        rows.append({"label": label, "metric": "mcnemar_p", "value": float(p), "n": n})
        if depth is None:
            tests.append(
                Test(
                    label, change, float(p), n, low, high, "right answers of the second model, less those of the first"
                )
            )
    return rows, tests


def _transfer(
    pair: Pair, site: str, made: dict[str, list[np.ndarray | None]], seed: int
) -> tuple[list[dict[str, Any]], list[Test]]:
    """Fit probes for an edge's source on one model and score them on the other, in both directions.

    Args:
        made: control → float32 [n, d] of `run` and of `other`, the input of the map instead of the
            site; None if a run does not hold it.
    """
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train = (pair.tokens["split"] == "train").to_numpy()
    y, trees = pair.tokens["source"].to_numpy(), pair.tokens["tree_id"].to_numpy()[~train]
    rows: list[dict[str, Any]] = []
    tests: list[Test] = []
    for direction, fitted, scored, its_place in (
        ("run to other", pair.mine, pair.theirs, 1),
        ("other to run", pair.theirs, pair.mine, 0),
    ):
        ours, its = StandardScaler().fit(fitted[train]), StandardScaler().fit(scored[train])
        X, Z = ours.transform(fitted), its.transform(scored)
        probe = LogisticRegression(max_iter=MAX_ITER).fit(X[train], y[train])
        sources = {name: of_both[its_place] for name, of_both in made.items()}
        at = {
            "own": X,
            "as_it_is": Z,
            "mapped": LinearRegression().fit(Z[train], X[train]).predict(Z),
            **map_controls(X, Z, sources, train, seed),
        }
        right = {
            metric: (probe.predict(rows_at[~train]) == y[~train]).astype(np.float64) for metric, rows_at in at.items()
        }
        above = right["mapped"] - right[best_control({name: float(of.mean()) for name, of in right.items()})]
        about = {"site": site, "token_role": "edge_target", "label": f"source, {direction}"}
        for metric, values in {**right, "mapped_above_controls": above}.items():
            rows.append(mean_row(values, trees, seed, **about, metric=metric))
        by_tree = np.bincount(np.unique(trees, return_inverse=True)[1], weights=above)
        what = f"{about['label']}, read after a linear map, less the map's best control"
        tests.append(Test.of(rows[-1], sign_flip(by_tree, seed), what, exceeds="the map's controls"))  # the last metric
    return rows, tests


def _similarities(held: dict[str, Pair], seed: int) -> list[dict[str, Any]]:
    """CKA of every pair of sites; equal sites have an interval and the shuffled control."""
    rows: list[dict[str, Any]] = []
    order = np.random.default_rng(seed).permutation
    for site, mine in held.items():
        n, trees = len(mine.mine), mine.tokens["tree_id"].to_numpy()
        for other_site, theirs in held.items():
            row = {"site": site, "token_role": "edge_target", "label": other_site, "metric": "cka", "n": n}
            row["value"] = cka(mine.mine, theirs.theirs)
            if site == other_site:
                row["low"], row["high"] = cka_interval(mine.mine, theirs.theirs, trees, seed)
                value = cka(mine.mine, theirs.theirs[order(n)])
                rows.append({**row, "metric": "cka_shuffled", "value": value, "low": None, "high": None})
            rows.append(row)
    return rows


COUNTS = {
    "both_right": "right by both",
    "only_run": "by the first alone",
    "only_other": "by the second alone",
    "both_wrong": "by neither",
}
PROBED = {"own": "probe: own model", "as_it_is": "probe: other, unmapped", "mapped": "probe: other, mapped"}


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """One row per site: CKA, and probe transfer in percent; without sites, outcomes per depth."""
    if not results["site"].count():
        return _outcomes(results)
    rows = []
    for site in results.drop_nulls("site")["site"].unique(maintain_order=True):
        of_site = results.filter(site=site)
        same = of_site.filter(metric="cka", label=site).row(0, named=True)
        row: dict[str, Any] = {"site": site, "CKA": round(same["value"], 3)}
        row["CKA, rows shuffled"] = round(of_site.filter(metric="cka_shuffled")["value"].item(), 3)
        probes = of_site.filter(label="source, run to other")
        for metric, name in PROBED.items():
            row[f"{name} %"] = round(100 * probes.filter(metric=metric)["value"].item(), 2)
        value, control = _best(probes)
        row["best control %"] = round(value, 2)
        row["Holm"] = p_shown(probes.filter(metric="p_holm")["value"].item())
        row["CKA 95 %"] = f"[{same['low']:.3f}, {same['high']:.3f}]"
        row["best control of the map"] = control
        above = probes.filter(metric="mapped_above_controls").row(0, named=True)
        row["mapped above it, points"] = (
            f"{100 * above['value']:+.2f} [{100 * above['low']:+.2f}, {100 * above['high']:+.2f}]"
        )
        rows.append(row)
    return pl.DataFrame(rows)


def _best(probes: pl.DataFrame) -> tuple[float, str]:
    """The best control of the map at one site and direction: its percent, and its name in words."""
    values = dict(probes.select("metric", "value").rows())
    best = best_control(values)
    return 100 * values[best], CONTROLS[best]


def _outcomes(results: pl.DataFrame) -> pl.DataFrame:
    counted = results.filter(pl.col("metric").is_in(COUNTS))
    rows = [
        {
            "trees": label,
            "n": of_label["n"][0],
            **{COUNTS[row["metric"]]: int(row["value"]) for row in of_label.to_dicts()},
        }
        for (label,), of_label in counted.group_by("label", maintain_order=True)
    ]
    return pl.DataFrame(rows)


def sentence(results: pl.DataFrame, other: str, tests: Sequence[Test]) -> str:
    """Which model is right more often, how similar the layers are, and what the map reads."""
    run = results["run"][0]
    found = {row["metric"]: row for row in results.filter(label="all").iter_rows(named=True)}
    count = {metric: f"{int(found[metric]['value']):,}" for metric in COUNTS}
    answer = (
        f"Of {found['both_right']['n']:,} trees, {count['both_right']} are right by both {run!r} and {other!r}, "
        f"{count['only_run']} by the first alone, {count['only_other']} by the second alone, and {count['both_wrong']} by "
        f"neither. {_more_often(next(test for test in tests if test.site is None))}"
    )
    same = results.filter((pl.col("metric") == "cka") & (pl.col("label") == pl.col("site")))
    if not len(same):
        return f"{answer} The runs share no residual site, so their layers are not compared."
    most, least = same.sort("value")[-1].row(0, named=True), same.sort("value")[0].row(0, named=True)
    shuffled = results.filter(metric="cka_shuffled")["value"].to_numpy().max()
    as_it_is = results.filter(label="source, run to other", metric="as_it_is")["value"].to_numpy().max()
    return (
        f"{answer} At the target tokens of edges, equal layers are most alike at {most['site']} (CKA {most['value']:.3f}) and "
        f"least alike at {least['site']} ({least['value']:.3f}); shuffled rows give at most {shuffled:.3f}. A probe for the "
        f"source that was fitted on the first model reads at most {100 * as_it_is:.2f} % in the second without a map. "
        f"{_mapped(results, tests)} {adjustment(tests)} {CAVEAT}"
    )


def _mapped(results: pl.DataFrame, tests: Sequence[Test]) -> str:
    """What a probe reads after the linear map, beside its controls, over sites and directions."""
    asked = [test for test in tests if test.site is not None]
    below = sum(test.below for test in asked)
    text = (
        f"After a linear map, the probe reads more than after the same map from the embedding, random features or shuffled "
        f"rows (the map's controls) at {sum(test.found for test in asked)} of {len(asked)} sites and directions"
    )
    text += f", and less than after the best control at {below}" * bool(below)
    if not any(test.found for test in asked):
        return f"{text}."
    best = max((test for test in asked if test.found), key=lambda test: test.estimate)
    probes = results.filter(site=best.site, label=best.label)
    mapped, (value, control) = probes.filter(metric="mapped")["value"].item(), _best(probes)
    return (
        f"{text}. The largest difference is at {best.site}, {best.label.removeprefix('source, ')}: {100 * mapped:.2f} % from "
        f"the site and {value:.2f} % from {control} ({p_shown(best.p_holm)})."
    )


def _more_often(less: Test) -> str:
    """McNemar's test in words, as a difference with its interval."""
    sign = -1 if less.estimate < 0 else 1
    low, high = sorted(100 * sign * end for end in (less.low or 0.0, less.high or 0.0))
    numbers = f"{100 * abs(less.estimate):.2f} points, 95 % interval {low:.2f} to {high:.2f}, McNemar's {p_shown(less.p_holm)}"
    if less.found:
        return f"The second is right {'more' if sign > 0 else 'less'} often ({numbers})."
    return f"The shares of right answers do not differ significantly ({numbers})."


def plot(answer: Answer) -> Figure:
    """Draw CKA of all pairs of sites and probe transfer; or, without sites, outcomes by depth."""
    results = answer.results
    if is_of_sequences(results):
        return plot_sequences(results)
    if not results["site"].count():
        return _plot_outcomes(results)
    sites = results.drop_nulls("site")["site"].unique(maintain_order=True).to_list()
    run, other = results["run"][0], str(results["params"].str.json_path_match("$.other")[0])
    figure, (above, below) = panels(2, 2.7)
    grid = [[results.filter(site=site, label=of, metric="cka")["value"].item() for of in sites] for site in sites]
    draw_cka(above, grid, sites, run, other)
    entitle(above, "linear CKA at edges' target tokens")
    for turn, metric in enumerate(("own", "as_it_is", "mapped")):
        rows = results.filter(metric=metric, label="source, run to other")
        points(below, list(range(len(rows))), rows, PROBED[metric], turn)
    for (metric, name), marker in zip(CONTROLS.items(), "+x1", strict=True):
        rows = results.filter(metric=metric, label="source, run to other")
        at = [sites.index(site) for site in rows["site"]]
        below.plot(at, 100 * rows["value"].to_numpy(), marker, color=GREY, label=f"map from {name}")
    by_site(below, sites)
    percents(below)
    below.set_ylabel("accuracy for the edge's source (%)")
    entitle(below, f"probe fitted on {run}, scored on {other}")
    legend(figure, below)
    n = most(results.filter(label="source, run to other", metric="own")["n"])
    heading(
        figure,
        "How alike are two models' layers?",
        f"runs {run} and {other}; {n:,} rows of test trees; bars are 95 % intervals over trees, fits held fixed",
    )
    return figure


def _plot_outcomes(results: pl.DataFrame) -> Figure:
    """Draw the second run's share of right answers less the first's, by depth."""
    figure, (axis,) = panels(1, 2.2)
    rows = results.filter((pl.col("metric") == "other_less_run") & (pl.col("label") != "all"))
    points(axis, [int(label.split()[1]) for label in rows["label"]], rows, "the second less the first", line=False)
    axis.axhline(0, color=GREY, linewidth=1)
    whole_numbers(axis)
    axis.set_xlabel("depth of the goal (steps of the path)")
    axis.set_ylabel("right answers, second less first (points)")
    other = str(results["params"].str.json_path_match("$.other")[0])
    n = results.filter(metric="both_right", label="all")["n"][0]
    heading(
        figure,
        "Which model is right more often?",
        f"{results['run'][0]} (first) and {other} (second); {n:,} trees; bars are 95 % intervals",
    )
    return figure
