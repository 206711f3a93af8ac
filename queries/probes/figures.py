"""Table, sentence and figure of the study `probes`.

All three need only rows of the table `results`, so a recorded study can be shown again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.intervals import Z_95
from actstore.queries.figures import (
    COLOURS,
    COLUMN,
    GREY,
    MARKERS,
    PAGE,
    by_site,
    entitle,
    heading,
    legend,
    panels,
    percents,
    shades,
    whole_numbers,
)
from actstore.queries.study import LEVEL, Answer, Test, adjustment, p_shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {  # label → words
    "source": "source",
    "target": "target",
    "goal": "tree's goal",
    "on_path": "place on or off the path",
    "edge_depth": "depth of the edge",
    "next_node": "next node on the path",
}
NODE_LABELS = ("source", "target", "goal", "next_node")  # labels whose classes are nodes
PAIR = ["source", "target"]
BASELINE, MAJORITY = "baseline_", "majority"  # metrics of guesses from the tree alone
PLACE, AT = "place_", ", edge "  # prefix of a metric at one place in the list; separator of a label and its place
TOKEN_ROLES = {  # token role → words
    "edge_target": "target token of an edge",
    "edge_source": "source token of an edge",
    "separator": "separator of an edge",
    "next_source": "source token after an edge (that of the next edge)",
    "path": "token of the path from which a step starts",
}

# What the researchers' notebook prints, in percent: (source, target) by site. Model and protocol
# are different: another training of the system; 6,400 trees with goal depths uniform over 1 to 15;
# the first 14 of 15 edges; rows (not trees) split 80/20; a linear layer trained for 5 epochs with
# AdamW at 1e-3. The separator's row was interrupted after layer 1.
NOTEBOOK = {
    "edge_target": {
        "embed": (6.64, 100.00),
        "resid_post.0": (99.92, 100.00),
        "resid_post.1": (94.60, 99.94),
        "resid_post.2": (95.38, 99.21),
        "resid_post.3": (94.30, 95.57),
        "resid_post.4": (93.86, 96.48),
        "resid_post.5": (94.08, 96.36),
    },
    "separator": {"embed": (6.43, 6.25), "resid_post.0": (93.52, 93.35), "resid_post.1": (93.59, 93.48)},
}
NOTEBOOK_NODES = 16

MOST_IN_A_COLUMN = 4  # panels; with more, a column would be longer than a page
ZOOM = 90.0  # percent where the upper panel begins; good probes lie there, squeezed by the whole scale


def notebook_numbers(results: pl.DataFrame, role: str) -> dict[str, dict[str, float]]:
    """Label → site → the notebook's accuracy, percent; empty for other tokens, trees, systems."""
    params = _params(results)
    if params.get("system") != "reproduction" or params["n_nodes"] != NOTEBOOK_NODES:
        return {}
    by_site = NOTEBOOK.get(role, {})
    return {
        label: {site: found[place] for site, found in by_site.items()} for place, label in enumerate(PAIR) if by_site
    }


def labels_in(results: pl.DataFrame) -> list[str]:
    """The labels in the results, in the order of LABELS."""
    return [label for label in LABELS if label in results["label"].to_list()]


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """The table to print, in percent, with the best baseline of each accuracy.

    Results by place have one row per probe and place. Source and target at one kind of token have
    one row per site. Other results have one row per probe. Columns of the notebook's numbers and
    protocol and `stopped early` appear only when they have values.
    """
    if len(by_place(results)):
        return _one_row_a_place(by_place(results))
    if labels_in(results) != PAIR or results["token_role"].n_unique() > 1:
        return one_row_a_probe(results)
    notebook = notebook_numbers(results, results["token_role"][0])
    stopped = results.filter(metric="converged", value=0.0)
    rows = []
    for (site,), of_site in results.group_by("site", maintain_order=True):
        row: dict[str, Any] = {"site": site}
        found = {label: of_site.filter(label=label, metric="accuracy").row(0, named=True) for label in PAIR}
        best = {label: best_baseline(of_site.filter(label=label)) for label in PAIR}
        row |= {f"{label} %": round(100 * found[label]["value"], 2) for label in PAIR}
        row |= {f"{label}, tree alone %": round(best[label][0], 2) for label in PAIR}
        row |= {f"{label} 95 %": _ends(found[label], "") for label in PAIR}
        for label in PAIR:
            row[f"{label}, best baseline"] = best[label][1]
            row |= _own_baseline(of_site.filter(label=label), f"{label}, ")
        for label, numbers in notebook.items():
            row[f"notebook {label} %"] = numbers.get(str(site))
        for metric, name in PROTOCOL.items():
            for label in PAIR:
                own = of_site.filter(label=label, metric=metric)
                if len(own):
                    row[f"{label}, {name} %"] = round(100 * own["value"].item(), 2)
        if len(stopped):
            row["stopped early"] = ", ".join(stopped.filter(site=site)["label"])
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def by_place(results: pl.DataFrame) -> pl.DataFrame:
    """Rows by place, their metrics without `place_`, with columns `asked` (label) and `edge`."""
    rows = results.filter(pl.col("metric").str.starts_with(PLACE))
    label, edge = pl.col("label").str.split(AT).list.get(0), pl.col("label").str.split(AT).list.get(1).cast(pl.Int64)
    return rows.with_columns(asked=label, edge=edge, metric=pl.col("metric").str.strip_prefix(PLACE))


def best_baseline(found: pl.DataFrame) -> tuple[float, str]:
    """The best baseline among one probe's rows: its percent and its name."""
    metric = pl.col("metric")
    guesses = found.filter(metric.str.starts_with(BASELINE) | (metric == MAJORITY))
    best = guesses.sort("value", descending=True, maintain_order=True).row(0, named=True)
    return 100 * best["value"], "most_frequent" if best["metric"] == MAJORITY else best["metric"].removeprefix(BASELINE)


def _own_baseline(found: pl.DataFrame, before: str = "") -> dict[str, float]:
    """The column of a user's baseline, in percent, for one probe's rows; empty without one."""
    name = str(_params(found).get("baseline_name"))
    own = found.filter(metric=name)["value"]
    return {f"{before}{name.removeprefix(BASELINE)} %": round(100 * own.item(), 2)} if len(own) else {}


def _points(found: dict[str, Any]) -> str:
    """A difference and its interval, for the table."""
    return f"{100 * found['value']:+.2f} {_ends(found)}"


def _ends(found: dict[str, Any], sign: str = "+") -> str:
    """`[+1.20, +3.40]`, a row's interval in percent or points."""
    return f"[{100 * found['low']:{sign}.2f}, {100 * found['high']:{sign}.2f}]"


PROTOCOL = {
    "notebook_accuracy": "its protocol here",
    "notebook_by_tree": "its, split by tree",
    "without_last": "ours, last edge left out",
}


def _in_order(results: pl.DataFrame, *keys: str) -> list[tuple[tuple[Any, ...], pl.DataFrame]]:
    """Rows grouped by `keys`, token role and label first, ordered as TOKEN_ROLES and LABELS.

    A user's labels, and tokens without a role, come last.
    """
    order = {name: place for place, name in enumerate((*TOKEN_ROLES, *LABELS))}
    groups = results.filter(pl.col("metric") != "direction").partition_by(*keys, as_dict=True, maintain_order=True)
    return sorted(groups.items(), key=lambda item: [order.get(name, len(order)) for name in item[0][:2]])


def one_row_a_probe(results: pl.DataFrame) -> pl.DataFrame:
    """The table with one row per token role, label and site."""
    rows = []
    for (role, label, site), of_probe in _in_order(results, "token_role", "label", "site"):
        found = {row["metric"]: row for row in of_probe.iter_rows(named=True)}
        row = {"token": role, "label": label, "site": site}
        row |= _beside_baseline(found, best_baseline(of_probe))
        row |= ({"Holm": p_shown(found["p_holm"]["value"])} if "p_holm" in found else {}) | _own_baseline(of_probe)
        row |= _intervals(found, best_baseline(of_probe))
        for metric, name in (("above_shuffled", "above shuffled labels"), ("selectivity", "selectivity")):
            row[f"{name}, points"] = _points(found[metric])
        for metric, name in (("random_directions_accuracy", "random directions"), *PROTOCOL.items()):
            if metric in found:
                row[f"{name} %"] = round(100 * found[metric]["value"], 2)
        numbers = notebook_numbers(of_probe, role)
        if label in numbers:
            row["notebook %"] = numbers[label].get(site)
        if not found["converged"]["value"]:
            row["stopped early"] = "yes"
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _one_row_a_place(places: pl.DataFrame) -> pl.DataFrame:
    rows = []
    for (role, label, site, edge), of_probe in _in_order(places, "token_role", "asked", "site", "edge"):
        found = {row["metric"]: row for row in of_probe.iter_rows(named=True)}
        row = {"token": role, "label": label, "site": site, "edge": edge, "n": found["accuracy"]["n"]}
        row |= _beside_baseline(found, best_baseline(of_probe))
        row["own probe %"] = round(100 * found["own_accuracy"]["value"], 2)
        row |= _intervals(found, best_baseline(of_probe)) | {"own probe 95 %": _ends(found["own_accuracy"], "")}
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _beside_baseline(found: dict[str, dict[str, Any]], best: tuple[float, str]) -> dict[str, Any]:
    """An accuracy, its best baseline and their difference, in percent."""
    numbers = {"accuracy %": 100 * found["accuracy"]["value"], "baseline %": best[0]}
    numbers["above it, points"] = 100 * found["above_baseline"]["value"]
    return {name: round(number, 2) for name, number in numbers.items()}


def _intervals(found: dict[str, dict[str, Any]], best: tuple[float, str]) -> dict[str, Any]:
    """The intervals of `_beside_baseline`, and the name of the baseline."""
    return {
        "95 %": _ends(found["accuracy"], ""),
        "above it 95 %": _ends(found["above_baseline"]),
        "best baseline": best[1],
    }


CAVEAT = (
    "The intervals are over test trees. The fitted probes are held fixed, and the model is one training with one seed."
)


def sentence(results: pl.DataFrame, n_test_trees: int, tests: Sequence[Test]) -> str:
    """Answer: the worst and best site of each label, tests against baselines, and stopped fits."""
    accuracy = results.filter(metric="accuracy")
    parts = [
        _of_role(results.filter(token_role=role), n_test_trees)
        for role in results["token_role"].unique(maintain_order=True)
    ]
    parts.append(adjustment(tests))
    if nothing_read(results):
        parts.append("No probe reads more than the same probe on shuffled labels.")
    if len(results.filter(metric="notebook_accuracy")):
        parts.append(_difference(results))
    stopped = results.filter(metric="converged", value=0.0)
    if len(stopped):
        parts.append(
            f"Of {len(accuracy)} probes, {len(stopped)} stopped at {_params(results)['max_iter']:,} iterations before they "
            "converged, so their accuracies may be too low (the table names these probes). A larger max_iter lets them converge."
        )
    return " ".join([*parts, CAVEAT])


def nothing_read(results: pl.DataFrame) -> bool:
    """Whether no probe is above shuffled labels, at the 5 % level over all probes (Bonferroni)."""
    from scipy.special import ndtri  # imports three times faster than scipy.stats

    found = results.filter(metric="above_shuffled")
    error = (found["high"] - found["low"]).to_numpy() / (2 * Z_95)
    return bool((found["value"].to_numpy() <= -ndtri(0.025 / len(found)) * error).all())


def _difference(results: pl.DataFrame) -> str:
    """The steps between the notebook's protocol and ours, on average over all probes, in words."""
    steps = ("notebook_accuracy", "notebook_by_tree", "without_last", "accuracy")
    mean = [100 * float(results.filter(metric=metric)["value"].to_numpy().mean()) for metric in steps]
    by_tree, fitted, last = np.diff(mean)
    return (
        f"The same probes read {mean[0]:.2f} % on average with the notebook's protocol and {mean[3]:.2f} % with ours. The "
        f"difference of {mean[3] - mean[0]:+.2f} points is the sum of three steps: {by_tree:+.2f} from a split by tree instead "
        f"of by row, {fitted:+.2f} from a fit of whitened rows that converges instead of 5 epochs, and {last:+.2f} from the "
        "last edge, which the notebook leaves out."
    )


def _of_role(results: pl.DataFrame, n_test_trees: int) -> str:
    first, accuracy = results.row(0, named=True), results.filter(metric="accuracy")
    found = " ".join(_of_label(results.filter(label=label), LABELS[label]) for label in labels_in(results))
    chance = " / ".join(f"{100 * value:.2f}" for value in results.filter(metric="chance")["value"].unique().sort())
    shuffled = 100 * results.filter(metric="shuffled_accuracy")["value"].to_numpy()
    n_rows = int(accuracy["n"].to_numpy().max())
    answer = (
        f"Linear probes read the {TOKEN_ROLES[first['token_role']]} in run {first['run']!r} ({n_rows:,} rows of "
        f"{n_test_trees:,} test trees). {found} Chance is {chance} %, and shuffled labels give {shuffled.min():.2f} to "
        f"{shuffled.max():.2f} %."
    )
    places = by_place(results)
    asked = places["asked"].unique(maintain_order=True)
    return " ".join([answer, *(_of_places(places.filter(asked=label), results) for label in asked)])


def _of_label(found: pl.DataFrame, what: str) -> str:
    """The worst and best site of one label, and its distance from the best baseline, in words."""
    above = found.filter(metric="above_baseline")
    value, name = best_baseline(found.filter(site=above["site"][0]))
    claims = []
    for side, way in ((1, "above"), (-1, "below")):
        if len(there := _significant(above, found, side)):
            most = there.row(0, named=True)
            ends = " to ".join(f"{100 * most[end]:+.2f}" for end in ("low", "high"))
            p = p_shown(found.filter(metric="p_holm", site=most["site"])["value"].item())
            claims.append(
                f"{way} this baseline at {len(there)} of {len(above)} sites, most at {most['site']} by "
                f"{100 * most['value']:+.2f} points ({ends}; {p})"
            )
    return (
        f"The {what} is read at {_range(found.filter(metric='accuracy'))}. The tree alone gives {value:.2f} % ({name}), and "
        f"the probe is {' and '.join(claims) or 'above this baseline at no site'}."
    )


def _significant(above: pl.DataFrame, tested: pl.DataFrame, side: int) -> pl.DataFrame:
    """Rows of `above` on one side of 0 with a significant p_holm in `tested`; farthest first."""
    left = tested.filter((pl.col("metric") == "p_holm") & (pl.col("value") < LEVEL))
    there = above.filter(side * pl.col("value") > 0).join(left, on=["token_role", "label", "site"], how="semi")
    return there.sort(side * pl.col("value"), descending=True, maintain_order=True)


def _of_places(places: pl.DataFrame, results: pl.DataFrame) -> str:
    """The best site of a label, by place, in words."""
    label = places["asked"][0]
    ranked = results.filter(label=label, metric="accuracy").sort("value", descending=True, maintain_order=True)
    here = places.filter(site=ranked["site"][0])
    shares = here.filter(metric="accuracy").sort("value", maintain_order=True)
    (least, most), above = (shares.row(i, named=True) for i in (0, -1)), here.filter(metric="above_baseline")
    n_above, n_below = (len(_significant(above, results, side)) for side in (1, -1))
    return (
        f"By place in the list, the accuracy for the {LABELS[label]} at {ranked['site'][0]} runs from "
        f"{100 * least['value']:.2f} % (edge {least['edge']}) to {100 * most['value']:.2f} % (edge {most['edge']}). The "
        f"accuracy is above the baseline of the place at {n_above} of {len(above)} places"
        f"{f' and below the baseline at {n_below}' * bool(n_below)}."
    )


def _range(accuracy: pl.DataFrame) -> str:
    """Worst and best site: `6.11 % (embed) to 100.00 % (resid_post.0)`."""
    ranked = accuracy.sort("value", maintain_order=True)
    worst, best = ranked.row(0, named=True), ranked.filter(value=ranked["value"].max()).row(0, named=True)
    low, high = (f"{100 * row['value']:.2f} %" for row in (worst, best))
    return f"{low} at every site" if low == high else f"{low} ({worst['site']}) to {high} ({best['site']})"


def plot(answer: Answer) -> Figure:
    """Draw the results of one run: a panel per kind of token, or panels by place.

    A second panel after it shows the values above 90 %, if there are any. Panels that would be
    longer than a page stand in two columns, as wide as a page.
    """
    results = answer.results
    if len(by_place(results)):
        return _draw_places(by_place(results))
    roles = results["token_role"].unique(maintain_order=True).to_list()
    drawn: list[tuple[str, bool]] = []
    for role in roles:
        values = results.filter(token_role=role, metric="accuracy")["value"]
        drawn += [(role, False), (role, True)] if bool((100 * values > ZOOM).any()) else [(role, False)]
    columns, width, height = (1, COLUMN, 1.6) if len(drawn) <= MOST_IN_A_COLUMN else (2, PAGE, 1.4)
    figure, axes = panels(len(drawn), height, columns, width, sharex=True)
    for axis, (role, zoomed) in zip(axes, drawn, strict=True):
        of_role = results.filter(token_role=role)
        _panel(axis, of_role, labels_in(results))
        percents(axis, ZOOM if zoomed else 0.0)
        n = of_role.filter(metric="accuracy")["n"][0]
        shown = TOKEN_ROLES[role] if columns > 1 else "the same"
        entitle(axis, f"{shown}, from {ZOOM:.0f} %" if zoomed else f"{TOKEN_ROLES[role]}, {n:,} rows")
        axis.set_ylabel("accuracy (%)")
    by_site(axes[-1], _sites(results), *axes[-columns:-1])
    legend(figure, *axes)
    heading(
        figure,
        "What a linear probe reads, on trees not in training",
        f"run {results['run'][0]}; bars are 95 % intervals over trees, fits held fixed",
    )
    return figure


def _panel(axis: Axes, results: pl.DataFrame, labels: Sequence[str]) -> None:
    """Draw all labels, controls and the notebook's numbers by site.

    Args:
        labels: of all panels, in the order of their colours.
    """
    sites, n_nodes = _sites(results), _params(results)["n_nodes"]
    notebook = notebook_numbers(results, results["token_role"][0])
    for turn, label in enumerate(labels_in(results)):
        place = labels.index(label)
        rows = results.filter(label=label, metric="accuracy")
        value, low, high = (100 * rows[column].to_numpy() for column in ("value", "low", "high"))
        shift = 0.08 * (place - 0.5)
        x = np.arange(len(sites)) + shift
        bars = np.clip([value - low, high - value], 0, None)
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        axis.errorbar(x, value, bars, fmt=f"-{marker}", color=colour, capsize=2, elinewidth=0.8, label=LABELS[label])
        guessed = best_baseline(results.filter(label=label, site=sites[0]))[0]
        alone = "_nolegend_" if turn else "the tree alone (highest)"  # one entry for all labels
        axis.axhline(guessed, color=colour, linestyle=":", linewidth=1, label=alone)
        numbers = notebook.get(label, {})
        there = [i for i, site in enumerate(sites) if site in numbers]
        if there:
            drawn, name = [numbers[sites[i]] for i in there], f"{label}, in the notebook"
            axis.plot(x[there] + 2 * shift, drawn, marker, color=colour, mfc="none", markersize=6, label=name)
    shuffled = (
        results.filter(metric="shuffled_accuracy").group_by("site", maintain_order=True).agg(pl.col("value").max())
    )
    axis.plot(100 * shuffled["value"].to_numpy(), "x", color=GREY, label="shuffled labels (highest)")
    if set(labels_in(results)) & set(NODE_LABELS):
        name = f"chance, 1 of {n_nodes} nodes"
        axis.axhline(100 / n_nodes, color=GREY, linestyle="--", linewidth=1, label=name)


def _sites(results: pl.DataFrame) -> list[str]:
    return results["site"].unique(maintain_order=True).to_list()


def _params(results: pl.DataFrame) -> dict[str, Any]:
    return dict(json.loads(results["params"][0]))


def _draw_places(places: pl.DataFrame) -> Figure:
    """One panel per token and label: accuracy by place, one line per site, the best baseline."""
    asked = _in_order(places, "token_role", "asked")
    figure, axes = panels(len(asked), 1.7, sharex=True)
    for axis, ((role, label), of_label) in zip(axes, asked, strict=True):
        sites = _sites(of_label)
        for place, (site, colour) in enumerate(zip(sites, shades(axis, len(sites)), strict=True)):
            rows = of_label.filter(site=site, metric="accuracy").sort("edge")
            value, low, high = (100 * rows[column].to_numpy() for column in ("value", "low", "high"))
            bars = np.clip([value - low, high - value], 0, None)
            x = rows["edge"].to_numpy() + 0.6 * (place / max(1, len(sites) - 1) - 0.5)
            axis.errorbar(
                x, value, bars, fmt=f"-{MARKERS[place % len(MARKERS)]}", color=colour, elinewidth=0.8, label=site
            )
        first = of_label.filter(site=sites[0])
        edges = first["edge"].unique().sort().to_list()
        drawn = [best_baseline(first.filter(edge=edge))[0] for edge in edges]
        axis.plot(edges, drawn, "--x", color=GREY, linewidth=1, label="the tree alone (highest)")
        entitle(axis, f"{TOKEN_ROLES[role]}: {LABELS[label]}")
        axis.set_ylabel("accuracy (%)")
        percents(axis)
    whole_numbers(axes[-1])
    axes[-1].set_xlabel("place in the list of edges")
    legend(figure, *axes)
    n = float(np.median(places.filter(metric="accuracy")["n"]))
    heading(
        figure,
        "What a linear probe reads, by place in the list",
        f"run {places['run'][0]}; about {n:,.0f} rows per place; bars are 95 % intervals over trees, fits held fixed",
    )
    return figure
