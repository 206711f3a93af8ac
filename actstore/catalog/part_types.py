"""Types of rows in parts, where small numbers are unsigned; the catalog's numbers are signed."""

from __future__ import annotations

from functools import cache

import duckdb
import polars as pl

from actstore.catalog.tables import ADDED, DERIVED, OF_TREES, column_comments, ctrl_c, schema

NOT_OF_TREES: dict[str, dict[str, pl.DataType]] = {  # types in parts of other sequences
    "datasets": {"n_positions": pl.Int32()},
    "tokens": {"position": pl.Int32(), "token": pl.String()},
    "predictions": {"target": pl.String(), "predicted": pl.String()},
    "generations": {"position": pl.Int32(), "token": pl.String()},
}
UNSIGNED: dict[str, dict[str, pl.DataType]] = {  # columns that parts hold unsigned, besides every smallint (uint8)
    "models": {
        **dict.fromkeys(("d_model", "d_head", "d_mlp", "n_ctx", "d_vocab"), pl.UInt16()),
        "n_params": pl.UInt64(),
    },
    "sites": {"shape": pl.List(pl.UInt32())},
    "datasets": {"n_positions": pl.UInt8()},
    "tokens": {"position": pl.UInt8()},
    "generations": {"position": pl.UInt8()},
}


def tables() -> dict[str, dict[str, pl.DataType]]:
    """The columns of every table, with the polars type of each in a part of trees.

    The catalog's numbers are signed. Parts hold small numbers unsigned, as format 1 did, so that a
    row has the same bytes in every format. Columns that the catalog derives, and those that only
    other sequences have (ADDED), are left out.
    """
    return {
        table: {name: dtype for name, dtype in columns.items() if name not in ADDED.get(table, ())}
        for table, columns in every_column().items()
    }


@cache
def every_column() -> dict[str, dict[str, pl.DataType]]:
    """As `tables`, with the columns ADDED."""
    with ctrl_c(), duckdb.connect() as connection:
        connection.execute(schema())
        names = dict.fromkeys(table for table, _ in column_comments())
        types = {table: dict(connection.sql(f"from {table} limit 0").pl().schema) for table in names}
        for table, columns in types.items():
            columns.pop(DERIVED.get(table, ""), None)
            for column, dtype in columns.items():
                if dtype == pl.Categorical:
                    found = connection.execute(f"select enum_range(any_value({column})) from {table}").fetchall()
                    columns[column] = pl.Enum(found[0][0])
                elif dtype in (pl.Int16, pl.List(pl.Int16)):
                    columns[column] = pl.UInt8() if dtype == pl.Int16 else pl.List(pl.UInt8())
            columns.update(UNSIGNED.get(table, {}))
    return types


def as_in_parts(table: str, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of the catalog without what the catalog derived: the rows of their parts."""
    rows = rows.drop(DERIVED.get(table, ""), strict=False)
    if table not in OF_TREES:
        return rows
    of_trees = pl.col(OF_TREES[table]).is_not_null()
    added = [
        name for name in ADDED[table] if name in rows.columns and name != "recipe"
    ]  # trees that were given have one
    return rows.with_columns(pl.when(~of_trees).then(pl.col(name)).alias(name) for name in added)
