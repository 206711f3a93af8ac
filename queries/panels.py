"""What the studies' figures share: points with their intervals, in colours that the colour-blind tell apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's
MARKERS = "osD^v"
GREY = "0.45"


def panels(n: int, width: float = 5.2, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure of n panels side by side."""
    figure = Figure(figsize=(width * n, height), layout="constrained")
    axes = list(figure.subplots(1, n, squeeze=False)[0])
    for axis in axes:
        axis.grid(axis="y", color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def points(
    axis: Axes,
    x: Sequence[float],
    value: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    name: str,
    turn: int = 0,
    line: bool = True,
) -> None:
    """Points with bars from low to high; `turn` gives their colour, marker and a shift, so that equal ones are both seen."""
    middle = np.asarray(value, float)
    bars = np.clip([middle - np.asarray(low, float), np.asarray(high, float) - middle], 0, None)
    style = f"{'-' if line else ''}{MARKERS[turn % len(MARKERS)]}"
    shifted = np.asarray(x, float) + 0.09 * turn
    axis.errorbar(shifted, middle, bars, fmt=style, color=COLOURS[turn % 5], capsize=3, markersize=4, label=name)
