"""The difference between stored and recomputed values, and its tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from actstore.arrays.encoding import largest_error
from actstore.errors import Damaged

# of a site's largest number: float32 sums of 128 to 512 terms through six layers differ by 1e-6 to
# 1e-5
TOLERANCE = 1e-4
P_TOLERANCE = 1e-3  # of a probability
DRAWN_OTHERWISE = 0.05  # share of continuations: a draw at the border of two words is decided by rounding
TIE = 1e-4  # words whose probabilities are this close may change places: rounding moves a probability by 1e-6


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
        cannot: why nothing could be compared; "" if something was.
    """

    run: str
    what: str
    worst: float
    tolerance: float
    n: int
    first: str
    cannot: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the difference is within its tolerance, or nothing could be compared."""
        return bool(self.cannot) or self.worst <= self.tolerance


def of_site(dtype: str, largest: float) -> float:
    """The tolerance of a site, relative to its largest number.

    What was rounded when it was stored may be as far away as its dtype's rounding takes it.

    Args:
        dtype: as the run is stored.
        largest: size of the site's largest number, as it was computed again.
    """
    return TOLERANCE + largest_error(dtype, largest) / max(largest, 1e-30)


def not_compared(run: str, what: str, why: str) -> Difference:
    """What could not be compared, and why."""
    return Difference(run, what, 0.0, 0.0, 0, why, why)


def of_rows(run: str, what: str, held: pl.DataFrame, expected: pl.DataFrame) -> Difference:
    """Compare a table's stored rows with those that are expected, each in the same order.

    Args:
        held: the stored rows; columns that the catalog derived are not compared.
        expected: the rows computed again; words may have another enum.
    """
    held = held.select(column for column in held.columns if column in expected.columns)
    if len(held) != len(expected):
        return Difference(run, what, 1.0, 0.0, len(expected), f"{len(held)} rows, not {len(expected)}")
    wrong = np.zeros(len(held), bool)
    for column in held.columns:
        ours, theirs = expected[column], held[column]
        if isinstance(theirs.dtype, pl.Enum | pl.Categorical):
            ours, theirs = ours.cast(pl.String), theirs.cast(pl.String)
        wrong |= ~theirs.eq_missing(ours.cast(theirs.dtype)).to_numpy()
    first = str(held.row(int(wrong.argmax()), named=True)) if wrong.any() else ""
    return Difference(run, what, float(wrong.mean()), 0.0, len(held), first)


def as_frame(found: Sequence[Difference]) -> pl.DataFrame:
    """One row per comparison: run, what, agrees, worst, tolerance, n, where.

    `agrees` is null where nothing could be compared, and `where` says why.
    """
    return pl.DataFrame(
        {
            "run": [each.run for each in found],
            "what": [each.what for each in found],
            "agrees": [None if each.cannot else each.agrees for each in found],
            "worst": [each.worst for each in found],
            "tolerance": [each.tolerance for each in found],
            "n": [each.n for each in found],
            "where": [each.cannot or ("" if each.agrees else each.first) for each in found],
        },
        schema_overrides={"agrees": pl.Boolean},
    )


def raise_if_apart(found: Sequence[Difference], path: str | Path) -> None:
    """Refuse a store that differs from what its weights and sequences give.

    Raises:
        Damaged: names the first difference.
    """
    apart = [each for each in found if not each.agrees]
    if apart:
        first = apart[0]
        raise Damaged(
            f"{path} is not what its weights and sequences give: {len(apart)} of {len(found)} comparisons differ, the first "
            f"{first.what} of run {first.run!r} by {first.worst:.3g} ({first.first}); ingest it again, into another store"
        )
