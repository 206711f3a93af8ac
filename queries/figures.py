"""Shared parts of the studies' figures: panels, colour-blind-safe points and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's
MARKERS = "osD^v"
GREY = "0.45"


def side_by_side(n: int, width: float = 5.2, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure of n panels side by side, each width × height inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n, height), layout="constrained")
    axes = list(figure.subplots(1, n, squeeze=False)[0])
    for axis in axes:
        plain(axis)
    return figure, axes


def plain(axis: Axes) -> None:
    """Show horizontal grid lines, and no frame at the top and right."""
    axis.grid(axis="y", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)


def points(
    axis: Axes,
    x: Sequence[float],
    rows: pl.DataFrame,
    name: str,
    turn: int = 0,
    line: bool = True,
    scale: float = 100.0,
) -> None:
    """Plot points with their intervals.

    Args:
        x: position of each row.
        rows: columns `value`, `low` and `high`; a null end has no bar.
        name: name in the legend.
        turn: number of the series; chooses colour, marker and a shift that keeps equal points
            apart.
        line: whether a line joins the points.
        scale: factor of the values; the default shows percent.
    """
    value, low, high = (scale * rows[column].cast(pl.Float64).to_numpy() for column in ("value", "low", "high"))
    bars = np.clip(np.nan_to_num([value - low, high - value]), 0, None)
    style = f"{'-' if line else ''}{MARKERS[turn % len(MARKERS)]}"
    colour = COLOURS[turn % len(COLOURS)]
    shifted = np.asarray(x, float) + 0.09 * turn
    axis.errorbar(shifted, value, bars, fmt=style, color=colour, capsize=3, markersize=4, label=name)


def heat(
    axis: Axes,
    values: Sequence[Sequence[float | None]],
    marked: Sequence[Sequence[bool]],
    columns: Sequence[str],
    rows: Sequence[object],
    most: float,
    row_name: str = "layer",
) -> AxesImage:
    """A heat map of shares, in percent: red above 0, blue below.

    Args:
        values: share of each cell, row by row, the first at the bottom; None is left blank.
        marked: whether a cell gets a frame.
        columns, rows: names of both axes.
        most: share with the darkest colour.
        row_name: what a row is.
    """
    from matplotlib.patches import Rectangle

    grid = 100 * np.array([[np.nan if value is None else value for value in row] for row in values], float)
    image = axis.imshow(grid, cmap="RdBu_r", vmin=-100 * most, vmax=100 * most, origin="lower", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        if np.isfinite(value):
            colour = "white" if abs(value) > 65 * most else "black"
            text = "0" if abs(value) < 0.05 else f"{value:.0f}" if abs(value) >= 9.95 else f"{value:.1f}"
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
        if marked[y][x]:
            axis.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="black", linewidth=1.2))
    axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
    axis.set_yticks(range(len(rows)), [str(row) for row in rows], fontsize=8)
    axis.set_ylabel(row_name, fontsize=8)
    return image
