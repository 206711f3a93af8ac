"""The tokens to export, and their activations piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from actstore.errors import BadInput

if TYPE_CHECKING:
    from actstore.store import Store

PIECE_BYTES = 64 << 20  # of activations that are in memory at once

# every token whose activation the run holds at the site
HELD = """
select token_id, sequence_id from tokens join shards on shards.run = $run and shards.site = $site
    and sequence_id >= shards.first_tree_id and sequence_id < shards.first_tree_id + shards.n_trees
order by token_id
"""


@dataclass(frozen=True)
class Selected:
    """What to export: rows of one site of one run.

    Attributes:
        run: the run.
        site: the site as a caller spells it to read it.
        hook: TransformerLens' name of the site.
        rows: the query's frame of n rows, with a column token_id.
        row_shape: shape of one row of the site.
    """

    store: Store
    run: str
    site: str
    hook: str
    rows: pl.DataFrame
    row_shape: tuple[int, ...]

    @classmethod
    def of(cls, store: Store, run: str, site: str, rows: pl.DataFrame | None) -> Selected:
        """The rows of a query, or, for None, every token that the run holds at the site.

        Raises:
            NotStored: the run holds no such site.
            BadInput: there is no row.
        """
        X, _ = store.read([], run, site)  # raises for a site that is not there
        name = store.whole.sql(
            "select site from sites where run = $run and $site in (site, short)", {"run": run, "site": site}
        ).item()
        if rows is None:
            rows = store.whole.of(run).sql(HELD, {"run": run, "site": name})
        if not len(rows):
            raise BadInput(f"no row to export of {site} of run {run!r}; ask for tokens that it holds")
        return cls(store, run, site, name, rows, X.shape[1:])

    @property
    def token_ids(self) -> np.ndarray:
        """int64 [n]."""
        return self.rows["token_id"].cast(pl.Int64).to_numpy()

    def of_tokens(self, query: str) -> pl.DataFrame:
        """What a query says of the rows' tokens: n rows, in their order.

        Args:
            query: yields a column token_id, once per token; asked in the run's session, of these
                tokens alone.
        """
        ids = pl.DataFrame({"token_id": self.token_ids})
        asked = {"ids": ids["token_id"].unique().to_list()}
        of_ids = f"from ({query}) where token_id in (select unnest($ids::bigint[]))"
        return ids.join(self.store.whole.of(self.run).sql(of_ids, asked), "token_id", "left", maintain_order="left")

    def pieces(self, unit: int = 1, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """The number of the first row, and float32 [k, *row_shape], of each piece of the rows.

        Args:
            unit: k is a multiple of it, except in the last piece.
            first, stop: which rows; default: all.
        """
        row_bytes = 4 * int(np.prod(self.row_shape))
        at_once = max(1, PIECE_BYTES // (row_bytes * unit)) * unit
        ids = self.token_ids[:stop]
        for start in range(first, len(ids), at_once):
            yield start, self.store.read(ids[start : start + at_once], self.run, self.site)[0]


def converted(X: np.ndarray, dtype: str) -> np.ndarray:
    """X in a dtype.

    Raises:
        BadInput: a number is too large for the dtype.
    """
    with np.errstate(over="ignore"):
        made = X.astype(dtype)
    if (np.isinf(made) & np.isfinite(X)).any():
        raise BadInput(f"an activation is too large for {dtype}; export it as float32")
    return made


def not_finite(X: np.ndarray) -> int:
    """Number of rows that hold a NaN or an infinity."""
    return int((~np.isfinite(X.reshape(len(X), -1)).all(1)).sum())
