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

from actstore.queries.panels import COLOURS, GREY, MARKERS

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
TOKEN_ROLES = {
    "edge_target": "target token",
    "edge_source": "source token",
    "separator": "separator",
    "next_source": "next edge's source token",
    "path": "path's own tokens",
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


def notebook_numbers(results: pl.DataFrame) -> dict[str, tuple[float, float]]:
    """The notebook's (source, target) accuracy by site, percent; empty where it has none for such a token or tree."""
    if labels_in(results) != PAIR or results["token_role"].n_unique() > 1:
        return {}
    return NOTEBOOK.get(results["token_role"][0], {}) if _params(results)["n_nodes"] == NOTEBOOK_NODES else {}


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
    notebook = notebook_numbers(results)
    stopped = results.filter(metric="converged", value=0.0)
    rows = []
    for (site,), of_site in results.group_by("site", maintain_order=True):
        row: dict[str, Any] = {"site": site}
        for label in PAIR:
            found = of_site.filter(label=label, metric="accuracy").row(0, named=True)
            row[f"{label} %"] = round(100 * found["value"], 2)
            row[f"{label} 95 %"] = f"[{100 * found['low']:.2f}, {100 * found['high']:.2f}]"
        for place, label in enumerate(PAIR if notebook else ()):
            row[f"notebook {label} %"] = notebook[site][place] if site in notebook else None
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
    "notebook_by_tree": "split by tree",
    "notebook_20_epochs": "20 epochs",
}


def _one_row_a_probe(results: pl.DataFrame) -> pl.DataFrame:
    rows = []
    for (role, label, site), some in results.group_by("token_role", "label", "site", maintain_order=True):
        found = {row["metric"]: row for row in some.filter(pl.col("metric") != "direction").iter_rows(named=True)}
        accuracy = found["accuracy"]
        row = {"token": role, "label": label, "site": site, "accuracy %": round(100 * accuracy["value"], 2)}
        row["95 %"] = f"[{100 * accuracy['low']:.2f}, {100 * accuracy['high']:.2f}]"
        for metric, name in (
            ("selectivity", "selectivity, points"),
            ("random_directions_accuracy", "random directions %"),
            ("majority", "most frequent %"),
            *PROTOCOL.items(),
        ):
            if metric in found:
                row[name] = round(100 * found[metric]["value"], 2)
        if not found["converged"]["value"]:
            row["stopped early"] = "yes"
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None).sort("token", "label", maintain_order=True)


def sentence(results: pl.DataFrame, n_test_trees: int) -> str:
    """The answer: where each label is read worst and best, beside what tells nothing; and which fits were cut short."""
    accuracy = results.filter(metric="accuracy")
    parts = [_of_role(results.filter(token_role=role)) for role in results["token_role"].unique(maintain_order=True)]
    answer = "; ".join(parts) + f" ({int(accuracy['n'].to_numpy().max()):,} rows of {n_test_trees:,} test trees)."
    nothing = accuracy.join(
        results.filter(metric="shuffled_accuracy"), on=["site", "token_role", "label"], suffix="_shuffled"
    ).filter(pl.col("low") <= pl.col("high_shuffled"))
    if len(nothing) == len(accuracy):
        answer += " That is no more than shuffled labels give: nothing is read anywhere."
    own = results.filter(metric="notebook_accuracy")
    if len(own):
        leak, more = (
            100 * (results.filter(metric=metric)["value"].to_numpy() - other["value"].to_numpy()).mean()
            for metric, other in (("notebook_by_tree", own), ("notebook_20_epochs", own))
        )
        ours = 100 * (accuracy["value"].to_numpy() - own["value"].to_numpy()).mean()
        answer += (
            f" By the notebook's protocol the same probes read {-ours:+.2f} points on average; split by tree that changes by "
            f"{leak:+.2f}, after 20 epochs by {more:+.2f}."
        )
    stopped = results.filter(metric="converged", value=0.0)
    if len(stopped):
        answer += (
            f" Of {len(accuracy)} probes {len(stopped)} were stopped at {_params(results)['max_iter']:,} iterations, before "
            "they converged, and may be too low (see the table): raise max_iter."
        )
    return answer


def _of_role(results: pl.DataFrame) -> str:
    first, accuracy = results.row(0, named=True), results.filter(metric="accuracy")
    found = " and ".join(
        f"its {LABELS[label]} at {_range(accuracy.filter(label=label))}" for label in labels_in(results)
    )
    chance = " / ".join(f"{100 * value:.2f}" for value in results.filter(metric="chance")["value"].unique().sort())
    shuffled = 100 * results.filter(metric="shuffled_accuracy")["value"].to_numpy()
    of = "the" if first["token_role"] == "path" else "an edge's"
    return (
        f"from the {TOKEN_ROLES[first['token_role']]} of an edge in run {first['run']!r}, linear probes read {found}; "
        if first["token_role"] in ("edge_target", "edge_source", "separator")
        else f"from {of} {TOKEN_ROLES[first['token_role']]} in run {first['run']!r}, linear probes read {found}; "
    ).replace(
        "from", "From", 1
    ) + f"chance is {chance} %, shuffled labels give {shuffled.min():.2f} to {shuffled.max():.2f} %"


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
    sites, notebook, n_nodes = _sites(results), notebook_numbers(results), _params(results)["n_nodes"]
    for place, label in enumerate(labels_in(results)):
        rows = results.filter(label=label, metric="accuracy")
        value, low, high = (100 * rows[column].to_numpy() for column in ("value", "low", "high"))
        shift = 0.08 * (place - 0.5)
        x = np.arange(len(sites)) + shift
        bars = np.clip([value - low, high - value], 0, None)
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        axis.errorbar(x, value, bars, fmt=f"-{marker}", color=colour, capsize=3, markersize=5, label=LABELS[label])
        there = [i for i, site in enumerate(sites) if site in notebook]
        if there:
            numbers, name = [notebook[sites[i]][place] for i in there], f"{label}, the notebook's model"
            axis.plot(x[there] + 2 * shift, numbers, marker, color=colour, mfc="none", markersize=8, label=name)
    shuffled = (
        results.filter(metric="shuffled_accuracy").group_by("site", maintain_order=True).agg(pl.col("value").max())
    )
    axis.plot(100 * shuffled["value"].to_numpy(), "x", color=GREY, label="shuffled labels (the highest)")
    axis.axhline(100 / n_nodes, color=GREY, linestyle="--", linewidth=1, label=f"chance, 1 of {n_nodes} nodes")
    axis.grid(axis="y", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)


def _sites(results: pl.DataFrame) -> list[str]:
    return results["site"].unique(maintain_order=True).to_list()


def _params(results: pl.DataFrame) -> dict[str, Any]:
    return dict(json.loads(results["params"][0]))
