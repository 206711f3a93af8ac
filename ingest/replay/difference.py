"""Where what is stored and what is computed anew do not agree: how far they are apart, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from actstore.errors import Damaged


@dataclass(frozen=True)
class Difference:
    """Where what is stored and what is computed do not agree; all is well where `worst` is within `tolerance`.

    Attributes:
        run: whose.
        what: a site, a table, `vocabulary`, or `probabilities` of continuations.
        worst: largest difference, of the site's largest number or of a probability; or the share of rows that differ.
        tolerance: how large it may be.
        n: rows compared.
        first: where it is worst, in words.
    """

    run: str
    what: str
    worst: float
    tolerance: float
    n: int
    first: str

    @property
    def agrees(self) -> bool:
        return self.worst <= self.tolerance


def table(found: list[Difference]) -> pl.DataFrame:
    """A row a comparison."""
    return pl.DataFrame(
        {
            "run": [of.run for of in found],
            "what": [of.what for of in found],
            "agrees": [of.agrees for of in found],
            "worst": [of.worst for of in found],
            "tolerance": [of.tolerance for of in found],
            "n": [of.n for of in found],
            "where": ["" if of.agrees else of.first for of in found],
        }
    )


def raise_if_apart(found: list[Difference], path: str | Path) -> None:
    """Refuse a store that is not what its own weights and trees give.

    Raises:
        Damaged: says what differs first.
    """
    apart = [of for of in found if not of.agrees]
    if apart:
        first = apart[0]
        raise Damaged(
            f"{path} is not what its weights and trees give: {len(apart)} of {len(found)} comparisons differ, the first "
            f"{first.what} of run {first.run!r} by {first.worst:.3g} ({first.first}); ingest it anew, into another store"
        )
