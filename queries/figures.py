"""Shared parts of the studies' figures: one style, panels, colour-blind-safe points and intervals.

A figure is as wide as one column of a paper, and its text is 6 to 8 points there. More panels make
a figure longer, and never smaller; panels that would be longer than a page stand beside each other,
as wide as a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

COLUMN, PAGE = 3.5, 7.2  # inches: one column of a paper, and the width of its page
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's
MARKERS = "osD^v"
GREY = "0.45"
ROW, HEAD, FOOT = 0.155, 0.27, 1.4  # inches: a row of a heat map, what stands over a map, and all around the maps
TALLEST = 9.0  # inches of text on a page: longer columns of heat maps stand in two columns, page-wide
MARGIN = 0.06  # of an axis of percents, beyond its ends: room for the marks there
VIEWED = {False: (0.0, 0.75), True: (0.3, 1.0)}  # the part of viridis that stands out, on light and on dark paper
FEW = 30  # rows; a share of fewer is drawn hollow, and does not stretch its axis
PER_INCH = 16  # characters of 8 points
SHORT = 14  # characters of a site that is turned half
LINE = 0.145  # inches, of 8 points
MARK = 0.47  # inches of a name's mark in a legend, with the room around it
STYLE: dict[str, Any] = {
    **{"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "figure.titlesize": 8},
    **{"xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "legend.frameon": False},
    **{"axes.linewidth": 0.6, "grid.linewidth": 0.5, "lines.linewidth": 1.1, "lines.markersize": 3.5},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "text.parse_math": False},
    **{"figure.dpi": 200, "savefig.dpi": 300, "pdf.fonttype": 42, "ps.fonttype": 42, "svg.hashsalt": "actstore"},
}
FRAMED = "framed: significant (Holm); 95 % intervals: in the table"  # what a heat map says of its cells
DARK, LIGHT = "#16181d", "#e8e8e8"  # background and text of a figure on a dark page


def style(dark: bool = False) -> AbstractContextManager[None]:
    """The style of all figures, in a with block; `dark` is light text on a dark background."""
    from matplotlib import rc_context

    paper, ink, line = (DARK, LIGHT, "#3a3d44") if dark else ("white", "black", "0.9")
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    ground = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return rc_context({**STYLE, "grid.color": line} | dict.fromkeys(inked, ink) | dict.fromkeys(ground, paper))


def panels(
    n: int, height: float = 1.6, columns: int = 1, width: float = COLUMN, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of n panels in reading order, each `height` inches.

    Args:
        columns: panels beside each other.
        width: of the whole figure, in inches.
        shared: sharex and sharey of matplotlib's `subplots`.
    """
    from matplotlib.figure import Figure

    n_rows, columns = -(-n // columns), min(n, columns)
    figure = Figure(figsize=(width, height * n_rows + 0.3), layout="constrained")
    axes = list(figure.subplots(n_rows, columns, squeeze=False, **shared).ravel())
    for axis in axes[n:]:
        axis.remove()
    for axis in axes[max(0, n - columns) : n]:
        axis.tick_params(labelbottom=True)
    for axis in axes[:n]:
        plain(axis)
    return figure, axes[:n]


def maps(rows: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """A figure of heat maps over the same columns, whose names stand once, under the lowest maps.

    Args:
        rows: of each map.
    """
    heights = [HEAD + ROW * max(n, 2) for n in rows]
    columns, width = (1, COLUMN) if FOOT + sum(heights) <= TALLEST else (2, PAGE)
    heights = [max(heights[first : first + columns]) for first in range(0, len(heights), columns)]
    figure, axes = panels(len(rows), sum(heights) / len(heights), columns, width, sharex=True, height_ratios=heights)
    _lengthen(figure, (FOOT - 0.9) / LINE)
    return figure, axes


def heading(figure: Figure, what: str, said: str) -> None:
    """Two lines over a figure: what it shows; of which run, how many, and what its marks are."""
    wide = int(PER_INCH * figure.get_figwidth())
    text = f"{fill(what, wide)}\n{fill(said, wide)}"
    _lengthen(figure, text.count("\n") + 1)
    figure.suptitle(text, x=0.02, ha="left")


def legend(figure: Figure, *axes: Axes) -> None:
    """One legend of several panels under the figure, each name once."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    room = figure.get_figwidth() - 0.15
    columns = max(n for n in range(1, len(handles) + 1) if n == 1 or _across(list(handles), n) <= room)
    _lengthen(figure, -(-len(handles) // columns) + 0.5)
    figure.legend(list(handles.values()), list(handles), loc="outside lower left", ncols=columns)


def _across(names: Sequence[str], columns: int) -> float:
    """Inches of a legend in columns."""
    from matplotlib import rcParams
    from matplotlib.textpath import TextPath

    size = rcParams["legend.fontsize"]
    inches = [TextPath((0, 0), name, size=size).get_extents().width / 72 for name in names]
    return sum(max(part) + MARK for part in np.array_split(inches, columns))


def _lengthen(figure: Figure, n_lines: float) -> None:
    """Make room for lines of text, so that panels keep their size."""
    figure.set_figheight(figure.get_figheight() + LINE * n_lines)


def entitle(axis: Axes, text: str) -> None:
    """A panel's title, in as many lines as it needs."""
    columns = axis.get_subplotspec().get_gridspec().ncols  # type: ignore[union-attr]
    lines = fill(text, int(PER_INCH * _width(axis) / columns) - 9)
    _lengthen(axis.figure, lines.count("\n") / columns)  # type: ignore[arg-type]
    axis.set_title(lines, loc="left")


def _width(axis: Axes) -> float:
    """Inches of the axis' figure."""
    return float(axis.figure.get_figwidth())  # type: ignore[union-attr]


def most(counts: pl.Series) -> int:
    """The largest of some counts; 0 without any."""
    return int(counts.cast(pl.Int64).to_numpy().max(initial=0))


def percents(axis: Axes, low: float | None = 0.0) -> None:
    """An axis of percents, which ends at 100; it begins at `low`, or where its marks begin."""
    from matplotlib.ticker import MaxNLocator

    low = max(0.0, axis.get_ylim()[0]) if low is None else low
    axis.set_ylim(low - MARGIN * (100 - low), 100 + MARGIN * (100 - low))
    ticks = np.round(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, 100), 9)  # 100.00000000000001 is 100
    axis.set_yticks([tick for tick in ticks if low <= tick <= 100])


def below(axis: Axes, x: Sequence[float], values: Sequence[float], low: float, turn: int = 0) -> bool:
    """Mark points below an axis of percents: a hollow mark at its lower end, with its number.

    Args:
        x, values: of every point, values in percent; points from `low` on stay as they are.
        low: percent where the axis begins.
        turn: see `points`.

    Returns:
        Whether there is such a point.
    """
    there = [(at, value) for at, value in zip(x, values, strict=True) if value < low]
    look: dict[str, Any] = {"color": COLOURS[turn % len(COLOURS)], "mfc": axis.get_facecolor(), "zorder": 3}
    beside: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "center", "fontsize": 6}
    for at, value in there:
        axis.plot([at], [low], "v", **look)
        axis.annotate(f"{value:.0f}", (at, low), (-4, 0), **beside)
    return bool(there)


def shades(axis: Axes, n: int) -> list[tuple[float, ...]]:
    """Colours of n series in an order, such as layers, that stand out on the axis' ground."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    low, high = VIEWED[sum(to_rgb(axis.get_facecolor())) < 1.5]
    return [colormaps["viridis"](share) for share in np.linspace(low, high, n)]


def whole_numbers(axis: Axes) -> None:
    """Ticks of the x axis at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))


def by_site(axis: Axes, sites: Sequence[str], *beside: Axes) -> None:
    """Name the sites on the x axis, turned where they would not fit.

    Args:
        sites: names, in order.
        beside: lowest panels of further columns, which get the same names.
    """
    room = 0.85 * PER_INCH * _width(axis) / (1 + len(beside))
    turned: dict[str, Any] = {}
    if sum(map(len, sites)) > room:
        longest = max(map(len, sites))
        turned = {"rotation": 60 if longest <= SHORT else 90, "ha": "right", "va": "center", "rotation_mode": "anchor"}
        _lengthen(axis.figure, 0.37 * longest)  # type: ignore[arg-type]
    for one in (axis, *beside):
        one.set_xticks(range(len(sites)), sites, **turned)


def side_by_side(n: int, width: float = 5.2, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure of n panels side by side, each width × height inches."""
    return panels(n, height, n, width * n)


def plain(axis: Axes) -> None:
    """Show horizontal grid lines, and no frame at the top and right."""
    axis.grid(axis="y")
    axis.spines[["top", "right"]].set_visible(False)


def points(
    axis: Axes,
    x: Sequence[float],
    rows: pl.DataFrame,
    name: str,
    turn: int = 0,
    line: bool = True,
    scale: float = 100.0,
    few: Sequence[bool] = (),
    shift: float | None = None,
) -> None:
    """Plot points with their intervals.

    Args:
        x: position of each row.
        rows: columns `value`, `low` and `high`; a null end has no bar.
        name: name in the legend.
        turn: number of the series; chooses colour, marker and shift.
        line: whether a line joins the points.
        scale: factor of the values; the default shows percent.
        few: rows whose points are hollow.
        shift: along x, which keeps equal points of several series apart; default: 0.09 per turn.
    """
    value, low, high = (scale * rows[column].cast(pl.Float64).to_numpy() for column in ("value", "low", "high"))
    bars = np.clip(np.nan_to_num([value - low, high - value]), 0, None)
    style = f"{'-' if line else ''}{MARKERS[turn % len(MARKERS)]}"
    colour = COLOURS[turn % len(COLOURS)]
    shifted = np.asarray(x, float) + (0.09 * turn if shift is None else shift)
    axis.errorbar(shifted, value, bars, fmt=style, color=colour, capsize=2, elinewidth=0.8, label=name)
    if any(few):
        there = np.asarray(few, bool)
        marker = MARKERS[turn % len(MARKERS)]
        axis.plot(shifted[there], value[there], marker, color=colour, mfc=axis.get_facecolor(), zorder=3)


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
            axis.text(x, y, text, ha="center", va="center", fontsize=6, color=colour)
        if marked[y][x]:
            axis.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="black", linewidth=1.0))
    axis.grid(False)
    axis.tick_params(length=0)
    axis.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), [str(row) for row in rows])
    axis.set_ylabel(row_name)
    return image


def colour_bar(figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str) -> None:
    """The colours' scale, flat under the panels."""
    bar = figure.colorbar(image, ax=list(axes), label=label, location="bottom", shrink=0.8, aspect=40, pad=0.02)
    bar.outline.set_visible(False)
