"""What `make bench` measures: ratios within one run, against the physical limit, printed and kept in README.md beside this."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, the figure, the goal if there is one, and whether it was met."""

    what: str
    figure: str
    goal: str
    met: bool | None = None


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)
