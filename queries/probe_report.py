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

LABELS = ("source", "target")
TOKEN_ROLES = {"edge_target": "target token", "edge_source": "source token", "separator": "separator"}

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
COLOURS = {"source": "#0072B2", "target": "#D55E00"}  # Okabe and Ito's, which the colour-blind tell apart too
MARKERS = {"source": "o", "target": "s"}
OFFSETS = {"source": -0.08, "target": 0.08}  # in sites, so that equal values do not hide each other


def notebook_numbers(results: pl.DataFrame) -> dict[str, tuple[float, float]]:
    """The notebook's (source, target) accuracy by site, percent; empty where it has none for such a token or tree."""
    return NOTEBOOK.get(results["token_role"][0], {}) if _params(results)["n_nodes"] == NOTEBOOK_NODES else {}


def table(results: pl.DataFrame) -> pl.DataFrame:
    """What is printed: one row a site, percent.

    The notebook's columns are there where it has numbers for this token, `stopped early` where a probe was.
    """
    notebook = notebook_numbers(results)
    stopped = results.filter(metric="converged", value=0.0)
    rows = []
    for (site,), of_site in results.group_by("site", maintain_order=True):
        row: dict[str, Any] = {"site": site}
        for label in LABELS:
            found = of_site.filter(label=label, metric="accuracy").row(0, named=True)
            row[f"{label} %"] = round(100 * found["value"], 2)
            row[f"{label} 95 %"] = f"[{100 * found['low']:.2f}, {100 * found['high']:.2f}]"
        for place, label in enumerate(LABELS if notebook else ()):
            row[f"notebook {label} %"] = notebook[site][place] if site in notebook else None
        if len(stopped):
            row["stopped early"] = ", ".join(stopped.filter(site=site)["label"])
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def sentence(results: pl.DataFrame, n_test_trees: int) -> str:
    """The answer: where each label is read worst and best, beside what tells nothing; and which fits were cut short."""
    first, accuracy = results.row(0, named=True), results.filter(metric="accuracy")
    found = " and ".join(f"its {label} at {_range(accuracy.filter(label=label))}" for label in LABELS)
    chance = 100 / _params(results)["n_nodes"]
    shuffled = 100 * results.filter(metric="shuffled_accuracy")["value"].to_numpy()
    answer = (
        f"From the {TOKEN_ROLES[first['token_role']]} of an edge in run {first['run']!r}, linear probes read {found}; "
        f"chance is {chance:.2f} %, shuffled labels give {shuffled.min():.2f} to {shuffled.max():.2f} % "
        f"({first['n']:,} edges of {n_test_trees:,} test trees)."
    )
    stopped = results.filter(metric="converged", value=0.0)
    if len(stopped):
        answer += (
            f" Of {len(accuracy)} probes {len(stopped)} were stopped at {_params(results)['max_iter']:,} iterations, before "
            "they converged, and may be too low (see the table): raise max_iter."
        )
    return answer


def _range(accuracy: pl.DataFrame) -> str:
    """`6.11 % (embed) to 100.00 % (resid_post.0)`, the worst and the best site."""
    ranked = accuracy.sort("value", maintain_order=True)
    worst, best = ranked.row(0, named=True), ranked.filter(value=ranked["value"].max()).row(0, named=True)
    low, high = (f"{100 * row['value']:.2f} %" for row in (worst, best))
    return f"{low} at every site" if low == high else f"{low} ({worst['site']}) to {high} ({best['site']})"


def draw(results: pl.DataFrame) -> Figure:
    """Draw the results of one run and one kind of token.

    Two panels where anything is above 90 %, the top of the scale over the whole of it; else the whole scale.

    Args:
        results: columns as in the table `results`; sites in the order of the forward pass.
    """
    accuracy = results.filter(metric="accuracy")
    zoomed = bool((100 * accuracy["value"] > ZOOM).any())
    figure = Figure(figsize=(8.5, 6.5 if zoomed else 4.2), layout="constrained")
    axes = figure.subplots(2 if zoomed else 1, sharex=True, squeeze=False)[:, 0]
    for axis in axes:
        _panel(axis, results)
    axes[-1].set_ylim(-2, 104)
    if zoomed:
        axes[0].set_ylim(ZOOM, 100.6)
        axes[0].set_ylabel(f"the same, from {ZOOM:.0f} %")
    axes[-1].set_ylabel("accuracy on test trees (%)")
    sites = _sites(results)
    axes[-1].set_xticks(range(len(sites)), sites, rotation=30 if len(sites) > 8 else 0)
    first = accuracy.row(0, named=True)
    axes[0].set_title(
        f"Linear probes at an edge's {TOKEN_ROLES[first['token_role']]}, run {first['run']}\n"
        f"{first['n']:,} edges of trees that were not in training; bars are 95 % intervals over trees",
        fontsize=10,
    )
    handles, names = axes[-1].get_legend_handles_labels()
    ours_first = sorted(
        range(len(names)), key=lambda i: not names[i].endswith("of the edge")
    )  # matplotlib puts bars last
    figure.legend(
        [handles[i] for i in ours_first],
        [names[i] for i in ours_first],
        loc="outside lower center",
        ncols=3,
        fontsize=9,
        frameon=False,
    )
    return figure


def _panel(axis: Axes, results: pl.DataFrame) -> None:
    """Both labels, what tells nothing, and the notebook's numbers, over the sites in their order."""
    sites, notebook, n_nodes = _sites(results), notebook_numbers(results), _params(results)["n_nodes"]
    for place, label in enumerate(LABELS):
        rows = results.filter(label=label, metric="accuracy")
        value, low, high = (100 * rows[column].to_numpy() for column in ("value", "low", "high"))
        x = np.arange(len(sites)) + OFFSETS[label]
        bars = np.clip([value - low, high - value], 0, None)
        colour, marker = COLOURS[label], MARKERS[label]
        axis.errorbar(
            x, value, bars, fmt=f"-{marker}", color=colour, capsize=3, markersize=5, label=f"{label} of the edge"
        )
        there = [i for i, site in enumerate(sites) if site in notebook]
        if there:
            numbers, name = [notebook[sites[i]][place] for i in there], f"{label}, the notebook's model"
            axis.plot(
                x[there] + 2 * OFFSETS[label], numbers, marker, color=colour, mfc="none", markersize=8, label=name
            )
    shuffled = (
        results.filter(metric="shuffled_accuracy").group_by("site", maintain_order=True).agg(pl.col("value").max())
    )
    axis.plot(100 * shuffled["value"].to_numpy(), "x", color="0.45", label="shuffled labels (the higher)")
    axis.axhline(100 / n_nodes, color="0.45", linestyle="--", linewidth=1, label=f"chance, 1 of {n_nodes} nodes")
    axis.grid(axis="y", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)


def _sites(results: pl.DataFrame) -> list[str]:
    return results["site"].unique(maintain_order=True).to_list()


def _params(results: pl.DataFrame) -> dict[str, Any]:
    return dict(json.loads(results["params"][0]))
