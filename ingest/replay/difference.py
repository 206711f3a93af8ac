"""The difference between stored and recomputed values, and its tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from actstore.errors import Damaged


@dataclass(frozen=True)
class Difference:
    """One comparison of stored with recomputed values; they agree if worst <= tolerance.

    Attributes:
        run: name of the run.
        what: a site, a table, `vocabulary`, or `probabilities` of continuations.
        worst: largest difference of a site (relative to the site's largest number) or of a
            probability; for tables, the share of rows that differ.
        tolerance: largest accepted `worst`.
        n: number of rows compared; 0 for a site that was appended and cannot be computed again.
        first: place of the worst difference, in words.
    """

    run: str
    what: str
    worst: float
    tolerance: float
    n: int
    first: str

    @property
    def agrees(self) -> bool:
        """Whether the difference is within its tolerance."""
        return self.worst <= self.tolerance


def as_frame(found: Sequence[Difference]) -> pl.DataFrame:
    """One row per comparison: run, what, agrees, worst, tolerance, n, where."""
    return pl.DataFrame(
        {
            "run": [each.run for each in found],
            "what": [each.what for each in found],
            "agrees": [each.agrees for each in found],
            "worst": [each.worst for each in found],
            "tolerance": [each.tolerance for each in found],
            "n": [each.n for each in found],
            "where": ["" if each.agrees and each.n else each.first for each in found],
        }
    )


def raise_if_apart(found: Sequence[Difference], path: str | Path) -> None:
    """Refuse a store that differs from what its weights and trees give.

    Raises:
        Damaged: names the first difference.
    """
    apart = [each for each in found if not each.agrees]
    if apart:
        first = apart[0]
        raise Damaged(
            f"{path} is not what its weights and trees give: {len(apart)} of {len(found)} comparisons differ, the first "
            f"{first.what} of run {first.run!r} by {first.worst:.3g} ({first.first}); ingest it again, into another store"
        )
