"""What the study `probes` says of its results: the table to print, the answer in a sentence, and the figure.

All three are made from rows of the table `results` alone, so a study that was recorded can be told and drawn again.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import norm

from actstore.queries.panels import COLOURS, GREY, MARKERS
from actstore.statistics import Z_95

LABELS = {  # what may be asked for: name, in words
    "source": "source",
    "target": "target",
    "goal": "tree's goal",
    "on_path": "being on the path",
    "edge_depth": "depth",
    "next_node": "next node on the path",
}
NODE_LABELS = ("source", "target", "goal", "next_node")  # their classes are the nodes
PAIR = ["source", "target"]
TOKEN_ROLES = {  # where it may be read: name, in words
    "edge_target": "target token of an edge",
    "edge_source": "source token of an edge",
    "separator": "separator of an edge",
    "next_source": "source token behind an edge (the next one's)",
    "path": "token of the path that a step is taken from",
}

# What the researchers' notebook prints, in percent: (source, target) by site. Another trained model of the same system and
# another protocol: 6,400 trees with goal depths uniform over 1 to 15, the first 14 of 15 edges, rows (not trees) split
# 80/20, a linear layer trained for 5 epochs with AdamW at 1e-3. Its separator row was interrupted after layer 1.
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

ZOOM = 90.0  # percent from which the upper panel shows; whatever works at all lies there, squeezed by the whole scale


def notebook_numbers(results: pl.DataFrame, role: str) -> dict[str, dict[str, float]]:
    """The notebook's accuracy, percent, by label and site; empty where it has none for such a token, tree or system."""
    params = _params(results)
    if params.get("system") != "reproduction" or params["n_nodes"] != NOTEBOOK_NODES:
        return {}
    by_site = NOTEBOOK.get(role, {})
    return {
        label: {site: found[place] for site, found in by_site.items()} for place, label in enumerate(PAIR) if by_site
    }


def labels_in(results: pl.DataFrame) -> list[str]:
    """The labels that were asked for, in the order of LABELS."""
    return [label for label in LABELS if label in results["label"].to_list()]


def table(results: pl.DataFrame) -> pl.DataFrame:
    """What is printed, percent: one row a site where an edge's two nodes were asked for at one kind of token, else one a probe.

    The notebook's columns are there where it has numbers for this token, those of its protocol where that was asked for,
    `stopped early` where a probe was.
    """
    if labels_in(results) != PAIR or results["token_role"].n_unique() > 1:
        return _one_row_a_probe(results)
    notebook = notebook_numbers(results, results["token_role"][0])
    stopped = results.filter(metric="converged", value=0.0)
    rows = []
    for (site,), of_site in results.group_by("site", maintain_order=True):
        row: dict[str, Any] = {"site": site}
        for label in PAIR:
            found = of_site.filter(label=label, metric="accuracy").row(0, named=True)
            row[f"{label} %"], row[f"{label} 95 %"] = _percent(found)
        for label, by_site in notebook.items():
            row[f"notebook {label} %"] = by_site.get(str(site))
        for metric, name in PROTOCOL.items():
            for label in PAIR:
                own = of_site.filter(label=label, metric=metric)
                if len(own):
                    row[f"{label}, {name} %"] = round(100 * own["value"].item(), 2)
        if len(stopped):
            row["stopped early"] = ", ".join(stopped.filter(site=site)["label"])
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


PROTOCOL = {
    "notebook_accuracy": "its protocol here",
    "notebook_by_tree": "its, split by tree",
    "without_last": "ours, last edge left out",
}


def _percent(found: dict[str, Any]) -> tuple[float, str]:
    """A row's value and interval, for the table."""
    return round(100 * found["value"], 2), f"[{100 * found['low']:.2f}, {100 * found['high']:.2f}]"


def _one_row_a_probe(results: pl.DataFrame) -> pl.DataFrame:
    order = {name: place for place, name in enumerate((*TOKEN_ROLES, *LABELS))}
    probes = results.filter(pl.col("metric") != "direction").partition_by(
        "token_role", "label", "site", as_dict=True, maintain_order=True
    )
    rows = []
    for (role, label, site), some in sorted(probes.items(), key=lambda item: [order[name] for name in item[0][:2]]):
        found = {row["metric"]: row for row in some.iter_rows(named=True)}
        row = {"token": role, "label": label, "site": site}
        row["accuracy %"], row["95 %"] = _percent(found["accuracy"])
        row["selectivity, points"] = round(100 * found["selectivity"]["value"], 2)
        for metric, name in (
            ("random_directions_accuracy", "random directions"),
            ("majority", "most frequent"),
            *PROTOCOL.items(),
        ):
            if metric in found:
                row[f"{name} %"] = round(100 * found[metric]["value"], 2)
        numbers = notebook_numbers(some, role)
        if label in numbers:
            row["notebook %"] = numbers[label].get(site)
        if not found["converged"]["value"]:
            row["stopped early"] = "yes"
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def sentence(results: pl.DataFrame, n_test_trees: int) -> str:
    """The answer: where each label is read worst and best, beside what tells nothing; and which fits were cut short."""
    accuracy = results.filter(metric="accuracy")
    answer = " ".join(
        _of_role(results.filter(token_role=role), n_test_trees)
        for role in results["token_role"].unique(maintain_order=True)
    )
    if nothing_read(results):
        answer += " That is no more than shuffled labels give: nothing is read anywhere."
    if len(results.filter(metric="notebook_accuracy")):
        answer += " " + _difference(results)
    stopped = results.filter(metric="converged", value=0.0)
    if len(stopped):
        answer += (
            f" Of {len(accuracy)} probes {len(stopped)} were stopped at {_params(results)['max_iter']:,} iterations, before "
            "they converged, and may be too low (see the table): raise max_iter."
        )
    return answer


def nothing_read(results: pl.DataFrame) -> bool:
    """No probe's selectivity is above 0, at the 5 % level for all of them together (Bonferroni)."""
    found = results.filter(metric="selectivity")
    error = (found["high"] - found["low"]).to_numpy() / (2 * Z_95)
    return bool((found["value"].to_numpy() <= norm.isf(0.025 / len(found)) * error).all())


def _difference(results: pl.DataFrame) -> str:
    """What makes the notebook's protocol and ours differ, on average over all probes."""
    steps = ("notebook_accuracy", "notebook_by_tree", "without_last", "accuracy")
    mean = [100 * float(results.filter(metric=metric)["value"].to_numpy().mean()) for metric in steps]
    by_tree, fitted, last = np.diff(mean)
    return (
        f"By the notebook's protocol the same probes read {mean[0]:.2f} % on average, by ours {mean[3]:.2f} %: of the "
        f"{mean[3] - mean[0]:+.2f} points {by_tree:+.2f} come of the split by tree in place of rows, {fitted:+.2f} of a fit of "
        f"whitened rows that converges in place of 5 epochs, {last:+.2f} of the last edge, which the notebook leaves out."
    )


def _of_role(results: pl.DataFrame, n_test_trees: int) -> str:
    first, accuracy = results.row(0, named=True), results.filter(metric="accuracy")
    found = " and ".join(
        f"its {LABELS[label]} at {_range(accuracy.filter(label=label))}" for label in labels_in(results)
    )
    chance = " / ".join(f"{100 * value:.2f}" for value in results.filter(metric="chance")["value"].unique().sort())
    shuffled = 100 * results.filter(metric="shuffled_accuracy")["value"].to_numpy()
    n_rows = int(accuracy["n"].to_numpy().max())
    return (
        f"From the {TOKEN_ROLES[first['token_role']]} in run {first['run']!r}, linear probes read {found}; chance is {chance} %, "
        f"shuffled labels give {shuffled.min():.2f} to {shuffled.max():.2f} % ({n_rows:,} rows of {n_test_trees:,} test trees)."
    )


def _range(accuracy: pl.DataFrame) -> str:
    """`6.11 % (embed) to 100.00 % (resid_post.0)`, the worst and the best site."""
    ranked = accuracy.sort("value", maintain_order=True)
    worst, best = ranked.row(0, named=True), ranked.filter(value=ranked["value"].max()).row(0, named=True)
    low, high = (f"{100 * row['value']:.2f} %" for row in (worst, best))
    return f"{low} at every site" if low == high else f"{low} ({worst['site']}) to {high} ({best['site']})"


def draw(results: pl.DataFrame) -> Figure:
    """Draw the results of one run: one column a kind of token, two panels where anything is above 90 %.

    Args:
        results: columns as in the table `results`; sites in the order of the forward pass.
    """
    accuracy = results.filter(metric="accuracy")
    roles = results["token_role"].unique(maintain_order=True).to_list()
    zoomed = bool((100 * accuracy["value"] > ZOOM).any())
    figure = Figure(figsize=(8.5 if len(roles) == 1 else 6 * len(roles), 6.5 if zoomed else 4.2), layout="constrained")
    axes = figure.subplots(2 if zoomed else 1, len(roles), sharex=True, sharey="row", squeeze=False)
    for column, role in zip(axes.T, roles, strict=True):
        _column(column, results.filter(token_role=role), zoomed)
    axes[-1, 0].set_ylabel("accuracy on test trees (%)")
    if zoomed:
        axes[0, 0].set_ylabel(f"the same, from {ZOOM:.0f} %")
    first = accuracy.row(0, named=True)
    figure.suptitle(
        f"Linear probes, run {first['run']}, on trees that were not in training; bars are 95 % intervals over trees",
        fontsize=10,
    )
    handles, names = axes[-1, 0].get_legend_handles_labels()
    ours_first = sorted(range(len(names)), key=lambda i: names[i] not in LABELS.values())  # matplotlib puts bars last
    figure.legend(
        [handles[i] for i in ours_first],
        [names[i] for i in ours_first],
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
    )
    return figure


def _column(axes: Any, results: pl.DataFrame, zoomed: bool) -> None:
    """The panels of one kind of token."""
    for axis in axes:
        _panel(axis, results)
    axes[-1].set_ylim(-2, 104)
    if zoomed:
        axes[0].set_ylim(ZOOM, 100.6)
    sites = _sites(results)
    axes[-1].set_xticks(range(len(sites)), sites, rotation=60 if len(sites) > 8 else 0, fontsize=8)
    first = results.filter(metric="accuracy").row(0, named=True)
    axes[0].set_title(f"{TOKEN_ROLES[first['token_role']]}, {first['n']:,} rows", fontsize=10)


def _panel(axis: Axes, results: pl.DataFrame) -> None:
    """All labels, what tells nothing, and the notebook's numbers, over the sites in their order."""
    sites, n_nodes = _sites(results), _params(results)["n_nodes"]
    notebook = notebook_numbers(results, results["token_role"][0])
    for place, label in enumerate(labels_in(results)):
        rows = results.filter(label=label, metric="accuracy")
        value, low, high = (100 * rows[column].to_numpy() for column in ("value", "low", "high"))
        shift = 0.08 * (place - 0.5)
        x = np.arange(len(sites)) + shift
        bars = np.clip([value - low, high - value], 0, None)
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        axis.errorbar(x, value, bars, fmt=f"-{marker}", color=colour, capsize=3, markersize=5, label=LABELS[label])
        numbers = notebook.get(label, {})
        there = [i for i, site in enumerate(sites) if site in numbers]
        if there:
            drawn, name = [numbers[sites[i]] for i in there], f"{label}, the notebook's model"
            axis.plot(x[there] + 2 * shift, drawn, marker, color=colour, mfc="none", markersize=8, label=name)
    shuffled = (
        results.filter(metric="shuffled_accuracy").group_by("site", maintain_order=True).agg(pl.col("value").max())
    )
    axis.plot(100 * shuffled["value"].to_numpy(), "x", color=GREY, label="shuffled labels (the highest)")
    if set(labels_in(results)) & set(NODE_LABELS):
        name = f"chance, 1 of {n_nodes} nodes"
        axis.axhline(100 / n_nodes, color=GREY, linestyle="--", linewidth=1, label=name)
    axis.grid(axis="y", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)


def _sites(results: pl.DataFrame) -> list[str]:
    return results["site"].unique(maintain_order=True).to_list()


def _params(results: pl.DataFrame) -> dict[str, Any]:
    return dict(json.loads(results["params"][0]))
