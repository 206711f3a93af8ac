"""What callers pass besides SQL: parameters, token ids and frames, of several libraries."""

from __future__ import annotations

import os
from collections.abc import Collection, KeysView, Mapping, Sequence, ValuesView
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from actstore.catalog.declared import not_a_name
from actstore.errors import BadInput
from actstore.sql.parameters import PLAIN, TAGGED

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import pyarrow as pa

    Tokens = str | Sequence[int] | np.ndarray | pl.Series | pl.DataFrame  # what Store.read takes: SQL, ids, a frame
    Table = pl.DataFrame | pl.LazyFrame | Mapping[str, Any] | str | os.PathLike[str]  # and frames of other libraries

TAKEN = (*PLAIN, bytearray, memoryview, duckdb.Value, *(kind for kind, _, _ in TAGGED.values()))
MANY = (list, tuple, set, frozenset, range, KeysView, ValuesView)
TOKENS = "SQL, token ids (integers, in a list, an array or a Series), or a frame with a column token_id"


def check_query(query: object) -> None:
    """Refuse a query that is not text.

    Raises:
        BadInput: says what was passed.
    """
    if not isinstance(query, str):
        import numpy as np
        import polars as pl

        hint = (
            "; Store.read takes ids and frames"
            if isinstance(query, (*MANY, np.ndarray, pl.Series, pl.DataFrame))
            else ""
        )
        raise BadInput(f"got {_of(query)} for a query; give SQL as text, such as 'select token_id from tokens'{hint}")


def parameters(params: Any) -> dict[str, Any]:
    """Convert a query's parameters to values that DuckDB takes: lists, and Python's own numbers.

    Args:
        params: a value for each name.

    Raises:
        BadInput: `params` is not a mapping from names, or a value has a type that no query takes.
    """
    if params is None:
        return {}
    if not isinstance(params, Mapping) or not all(isinstance(name, str) for name in params):
        got = (
            _of(params)
            if not isinstance(params, Mapping)
            else f"the name {next(n for n in params if type(n) is not str)!r}"
        )
        raise BadInput(
            f"got {got} for params; give a dict from each $name to its value, {{'name': value}} (-p NAME VALUE)"
        )
    return {name.removeprefix("$"): _plain(name, value) for name, value in params.items()}


def _plain(name: str, value: Any) -> Any:
    if type(value) in PLAIN:
        return value
    import numpy as np
    import polars as pl

    if isinstance(value, (pl.DataFrame, pl.LazyFrame)) or hasattr(value, "columns"):
        raise BadInput(f"got a frame for ${name}; hand over one of its columns, such as frame['token_id']")
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.datetime64):
        return value.astype("datetime64[us]").item()  # datetime64[ns] would become a bare number
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        return value.item()
    if isinstance(value, (*TAKEN, np.ndarray)):
        return value
    if isinstance(value, MANY):
        items = list(value)
        return items if set(map(type, items)) <= set(PLAIN) else [_plain(name, item) for item in items]
    if isinstance(value, Mapping):
        return {key: _plain(name, item) for key, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, pl.Series):
        return value.to_list()
    if hasattr(value, "tolist"):  # a tensor, a Series of pandas
        return _plain(name, value.tolist())
    raise BadInput(f"got {_of(value)} for ${name}; give a number, a text, a date, or a list or dict of them")


def frame_of(tokens: Any, params: Any) -> tuple[pl.DataFrame, str]:
    """Convert token ids or a frame to a polars frame, row for row, and name it for messages.

    Args:
        tokens: token ids, or a frame of polars, pandas, Arrow or DuckDB.
        params: parameters of a query; there must be none.

    Raises:
        BadInput: `tokens` is neither, or comes with parameters.
    """
    import numpy as np
    import polars as pl

    if params:
        raise BadInput(f"got params, and {_of(tokens)} in the place of the query that takes them; leave one out")
    try:
        if isinstance(tokens, pl.LazyFrame):
            return tokens.collect(), "the frame"
        if isinstance(tokens, (pl.DataFrame, Mapping)) or hasattr(tokens, "columns"):  # pandas, Arrow, DuckDB
            return pl.DataFrame(tokens), "the frame"
        if isinstance(tokens, pl.Series):
            return tokens.alias("token_id").to_frame(), "the list"
    except (pl.exceptions.PolarsError, ValueError, TypeError) as error:
        raise BadInput(f"got {_of(tokens)}, which is no frame ({str(error).splitlines()[0]}); give {TOKENS}") from error
    if isinstance(tokens, (set, frozenset)):
        raise BadInput(f"got a {type(tokens).__name__} of ids, which has no order; give a list: row i of X is its id i")
    if not isinstance(tokens, (*MANY, np.ndarray)) and not hasattr(tokens, "tolist"):
        raise BadInput(f"got {_of(tokens)}; give {TOKENS}")
    return pl.Series("token_id", _ids(tokens)).to_frame(), "the list"


def table(given: Any, called: str) -> pl.DataFrame:
    """Convert a table to a polars frame.

    Args:
        given: a frame of polars, pandas, Arrow or DuckDB, a mapping from names to columns, or a
            path of a file, see files.read_table.
        called: the table's name in messages.

    Raises:
        BadInput: it is no table, or has no column.
    """
    import polars as pl

    from actstore.reading.files import read_table

    if isinstance(given, (str, os.PathLike)):
        return read_table(Path(given))
    try:
        if isinstance(given, pl.LazyFrame):
            frame = given.collect()
        else:
            is_frame = isinstance(given, (pl.DataFrame, Mapping)) or hasattr(given, "columns")
            frame = pl.DataFrame(given if is_frame else None)
    except (pl.exceptions.PolarsError, ValueError, TypeError) as error:
        raise BadInput(
            f"got {_of(given)} for {called}, which is no table ({str(error).splitlines()[0]}); give a frame"
        ) from error
    if not frame.columns:
        raise BadInput(f"got {_of(given)} for {called}; give a frame with columns, or a file's path")
    return frame


def tables(given: Any, taken: Collection[str]) -> dict[str, pa.Table]:
    """Convert the tables of one query to Arrow, by name.

    Args:
        given: a mapping from names to tables, see `table`.
        taken: names of the store's own tables and views.

    Raises:
        BadInput: a name is no identifier or the store's own, or a table cannot be asked by SQL.
    """
    import polars as pl
    import pyarrow as pa

    if not isinstance(given, Mapping):
        raise BadInput(f"got {_of(given)} for tables; give a dict from each name to its frame, {{'mine': frame}}")
    found = {}
    for name, value in given.items():
        if why := not_a_name(name) if isinstance(name, str) else "no text":
            raise BadInput(
                f"got the name {name!r} for a table ({why}); take another, of lower-case letters, digits and _"
            )
        if name in taken:
            raise BadInput(f"got the name {name!r} for a table, which the store holds; take another name")
        frame = table(value, f"table {name!r}")
        lower = [column.lower() for column in frame.columns]
        if twins := [column for column in lower if lower.count(column) > 1]:
            raise BadInput(f"table {name!r} has two columns named {twins[0]}, to SQL; rename one")
        try:
            found[name] = frame.to_arrow()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, TypeError) as error:
            raise BadInput(
                f"table {name!r} cannot be asked by SQL ({str(error).splitlines()[0]}); cast its columns"
            ) from error
    return found


def _ids(tokens: Any) -> np.ndarray:
    """int [n] from a list, an array, or an object with `tolist`."""
    import numpy as np

    if not isinstance(tokens, np.ndarray):
        tokens = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
    try:
        ids = np.asarray(tokens)
    except ValueError:  # lists of several lengths
        ids = np.empty((0, 0))
    if ids.shape == (0,):
        return np.empty(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        what = f"shape {list(ids.shape)}" if ids.ndim != 1 else f"type {type(tokens[0]).__name__}"
        raise BadInput(f"got ids of {what}, the first {' '.join(str(tokens)[:40].split())}; give {TOKENS}")
    return ids


def _of(value: Any) -> str:
    """A value for a message, short: `3 (int)`."""
    shown = repr(value) if isinstance(value, (*PLAIN, *MANY, Mapping)) else ""
    kind = type(value).__name__
    return f"{shown if len(shown) < 60 else shown[:60] + '…'} ({kind})" if shown else f"a value of type {kind}"
