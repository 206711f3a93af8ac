"""Table, sentences and figure of the study `probe`, from rows of the table `results` alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from actstore.queries.figures import COLOURS, GREY, by_site, heading, legend, panels, percents, points
from actstore.queries.probes.figures import BASELINE, best_baseline, nothing_read, one_row_a_probe
from actstore.queries.study import Answer, Test, adjustment, p_shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SITES_SAID = 8  # sites that have a sentence each; more are no longer read
EMBED = "embed"  # the site that is a control of the others
CAVEAT = (
    "The intervals are over test {}. The fitted probes are held fixed, and the model is one training with one seed."
)
CONTROLS = {  # metric → words
    "shuffled_accuracy": "shuffled labels",
    "control_accuracy": "control task",
    "random_directions_accuracy": "random directions",
    "embed_accuracy": "the embedding",
}


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """One row per site, in percent: the accuracy, the best baseline, and the controls."""
    table = one_row_a_probe(results).drop("token")
    extra = [_more(results.filter(site=site)) for site in table["site"]]
    table = pl.concat([table, pl.DataFrame(extra, infer_schema_length=None)], how="horizontal")
    first = (
        "label",
        "site",
        "n",
        "accuracy %",
        "baseline %",
        "best baseline",
        "above it, points",
        "Holm",
        "exceeds it",
    )
    return table.select(*first, pl.exclude(first))


def _more(of_site: pl.DataFrame) -> dict[str, Any]:
    """The columns that only this study has, of one site."""
    found = _by_metric(of_site)
    row: dict[str, Any] = {"n": found["accuracy"]["n"], "exceeds it": _verdict(found)[0]}
    above = found.get("above_embed")
    row["above the embedding, points"] = (
        f"{100 * above['value']:+.2f} [{100 * above['low']:+.2f}, {100 * above['high']:+.2f}]" if above else None
    )
    for metric in found:
        if metric.startswith(BASELINE):
            row[f"{metric.removeprefix(BASELINE)} %"] = round(100 * found[metric]["value"], 2)
    return row


def _verdict(found: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """Whether a probe exceeds its best baseline: `yes`, `no` or `below`; and in words."""
    above = found["above_baseline"]["value"]
    if found["p_holm"]["value"] >= 0.05:
        return "no", "does not exceed the baseline"
    return ("yes", "exceeds the baseline") if above > 0 else ("below", "is below the baseline")


def sentence(results: pl.DataFrame, tests: Sequence[Test]) -> str:
    """What was probed; a sentence per site; what the controls give, and what the intervals hold.

    Of more than SITES_SAID sites, a sentence counts the verdicts, and the first, the lowest and the
    highest site have one each.
    """
    first, params = results.row(0, named=True), params_of(results)
    accuracy = results.filter(metric="accuracy")
    head = (
        f"Linear probes read {first['label']!r} ({len(params['classes'])} classes) in run {first['run']!r}, from "
        f"{params['n_train']:,} training rows of {params['n_train_units']:,} {params['units_are']}."
    )
    parts = [head, *_of_sites(results, params)]
    shuffled = 100 * results.filter(metric="shuffled_accuracy")["value"].to_numpy()
    parts.append(f"Shuffled labels give {shuffled.min():.2f} to {shuffled.max():.2f} %.")
    if len(embedding := results.filter(metric="embed_accuracy")):
        parts.append(f"A probe of the embedding gives {100 * embedding['value'][0]:.2f} %.")
    elif EMBED not in accuracy["site"].to_list():
        parts.append("The run does not hold the embedding, so the embedding is no control.")
    parts.append(adjustment(tests))
    if nothing_read(results):
        parts.append("No probe reads more than the same probe on shuffled labels.")
    if stopped := results.filter(metric="converged", value=0.0)["site"].to_list():
        parts.append(
            f"The probes at {', '.join(stopped)} stopped at {params['max_iter']:,} iterations before they converged, so their "
            "accuracies may be too low. A larger max_iter lets them converge."
        )
    return " ".join([*parts, CAVEAT.format(params["units_are"])])


def _of_sites(results: pl.DataFrame, params: dict[str, Any]) -> list[str]:
    accuracy = results.filter(metric="accuracy")
    sites, values = accuracy["site"].to_list(), accuracy["value"].to_list()
    if len(sites) <= SITES_SAID:
        return [_of_site(results.filter(site=site), params) for site in sites]
    verdicts = [_verdict(_by_metric(results.filter(site=site)))[0] for site in sites]
    counted = (
        f"The probe exceeds its best baseline at {verdicts.count('yes')} of {len(sites)} sites, and is below it at "
        f"{verdicts.count('below')}; the sentences that follow are about the first site, the lowest and the highest."
    )
    said = {0, values.index(min(values)), values.index(max(values))}
    return [counted, *(_of_site(results.filter(site=sites[place]), params) for place in sorted(said))]


def _by_metric(of_site: pl.DataFrame) -> dict[str, dict[str, Any]]:
    return {row["metric"]: row for row in of_site.filter(pl.col("metric") != "direction").iter_rows(named=True)}


def _of_site(of_site: pl.DataFrame, params: dict[str, Any]) -> str:
    found = _by_metric(of_site)
    right, above, (value, name) = found["accuracy"], found["above_baseline"], best_baseline(of_site)
    ends = " to ".join(f"{100 * right[end]:.2f}" for end in ("low", "high"))
    around = " to ".join(f"{100 * above[end]:+.2f}" for end in ("low", "high"))
    return (
        f"At {right['site']} the accuracy is {100 * right['value']:.2f} % ({right['n']:,} rows of "
        f"{params['n_test_units']:,} test {params['units_are']}; 95 % interval {ends} %), and the best baseline gives "
        f"{value:.2f} % ({name}): the difference of {100 * above['value']:+.2f} points ({around}; "
        f"{p_shown(found['p_holm']['value'])}) {_verdict(found)[1]}."
    )


def params_of(results: pl.DataFrame) -> dict[str, Any]:
    """The parameters of the study, as recorded."""
    return dict(json.loads(results["params"][0]))


def plot(answer: Answer) -> Figure:
    """Draw the accuracy by site, with its best baseline and its controls."""
    results = answer.results
    units = params_of(results)["units_are"]
    accuracy = results.filter(metric="accuracy")
    sites = accuracy["site"].to_list()
    figure, (axis,) = panels(1, 2.2)
    at = [float(place) for place in range(len(sites))]
    points(axis, at, accuracy, "the probe")
    best = [best_baseline(results.filter(site=site)) for site in sites]
    axis.plot(at, [value for value, _ in best], ":", color=COLOURS[1], label=f"the best baseline ({best[0][1]})")
    for (metric, words), marker in zip(CONTROLS.items(), ("x", "+", "1", "2"), strict=True):
        rows = results.filter(metric=metric)
        where = [sites.index(site) for site in rows["site"]]
        if where:
            axis.plot(where, 100 * rows["value"].to_numpy(), marker, color=GREY, label=words)
    by_site(axis, sites)
    percents(axis)
    axis.set_ylabel(f"accuracy on test {units} (%)")
    legend(figure, axis)
    first = accuracy.row(0, named=True)
    heading(
        figure,
        f"Linear probes of {first['label']!r}",
        f"run {first['run']}; {first['n']:,} rows; bars are 95 % intervals over {units}, fits held fixed",
    )
    return figure
