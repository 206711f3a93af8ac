"""The rows of a query that names tokens, and their token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from actstore.errors import BadInput, NotStored
from actstore.reading.given import frame_of

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from actstore.reading.given import Tokens
    from actstore.reading.opened import Opened


def read_ids(
    store: Opened,
    run: str,
    query: Tokens,
    params: Mapping[str, Any] | None,
    timeout: float | None = None,
    memory: str | int | None = None,
    columns: Callable[[list[str]], None] | None = None,
) -> tuple[np.ndarray, pl.DataFrame]:
    """The token ids that a query yields, int64 [n], and its frame.

    Args:
        query: SQL, token ids or a frame.
        params, timeout, memory: see Store.sql.
        columns: called with the names of the query's columns before the query runs.

    Raises:
        NotStored: an id is too large for any token.
        BadInput: the query is refused, has two columns of one name, yields no integer token_id
            without NULLs, or renames another id to token_id.
        LimitReached: the query reached a limit.
    """
    if not isinstance(query, str):
        rows, called = frame_of(query, params)
        return token_ids(rows, called), rows

    def check(names: list[str], types: list[str]) -> None:
        _refuse_twins(names)
        _refuse_without_ids(names, "the query")
        if columns:
            columns(names)

    rows = store.sql(query, params, timeout, memory, run, check)
    return token_ids(rows), rows


def token_ids(rows: pl.DataFrame, called: str = "the query") -> np.ndarray:
    """int64 [n] from a frame's column token_id; raises as read_ids.

    Args:
        called: the frame's name in messages.
    """
    import polars as pl

    _refuse_without_ids(rows.columns, called)
    ids = rows["token_id"]
    if not ids.dtype.is_integer():
        raise BadInput(f"{called}'s token_id is {ids.dtype}; it must be an integer, as in the tables")
    if ids.null_count():
        raise BadInput(
            f"{ids.null_count():,} of {len(ids):,} token_ids are NULL; add `where token_id is not null`, or join the tokens"
        )
    as_stored = ids.cast(pl.Int64, strict=False)  # NULL where an id does not fit
    if as_stored.null_count():
        raise NotStored(f"no token has token_id {ids.filter(as_stored.is_null())[0]}; select token_id from the tables")
    return as_stored.to_numpy()


def _refuse_without_ids(columns: list[str], called: str) -> None:
    if "token_id" not in columns:
        raise BadInput(
            f"{called} yields {', '.join(columns) or 'nothing'} and no token_id; select token_id to say which tokens to read"
        )


def _refuse_twins(columns: list[str]) -> None:
    """Refuse two columns of one name, which DuckDB would return as `a` and `a_1`."""
    names = [name.lower() for name in columns]
    if twins := [name for place, name in enumerate(columns) if name.lower() in names[:place]]:
        raise BadInput(f"the query yields two columns named {twins[0]}; rename one (`… as other`), or leave it out")
