"""The tables of a catalog, as schema.sql declares them, and the file that holds them."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path

import duckdb
import polars as pl

from actstore.errors import Damaged, advised
from actstore.storage.folder import check_path
from actstore.storage.local import discard
from actstore.storage.machine import limit_reached
from actstore.storage.regular import check_regular


def in_parts(error: Exception) -> tuple[str, list[str]]:
    """DuckDB's message as one line, and the lines that show the place in the query; none where it names no place."""
    lines = str(error).splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("LINE ")), len(lines))
    said = " ".join(line.strip() for line in lines[:first] if line.strip())
    return said, [line.rstrip() for line in lines[first : first + 2]]


def one_line(error: Exception) -> str:
    """DuckDB's message without the copy of the query that follows it."""
    return in_parts(error)[0]


CATALOG = "catalog.duckdb"
HASHES = "catalog.json"  # what its bytes hash to
REPLAYED = (".wal", ".wal.checkpoint", ".wal.recovery")  # what DuckDB adds to a database that it opens, if only to read
COLUMN = re.compile(r"^    (\w+) ([^-]*), -- (.+)$")
TABLE = re.compile(r"^create table (\w+)")
TABLES_ATTACHED = "select table_name from duckdb_tables() where database_name = 'there'"  # see attached
DERIVED = {"tokens": "dataset"}  # the column of a table that no part holds; see source
UNSIGNED: dict[
    str, dict[str, pl.DataType]
] = {  # what parts hold unsigned, beside every smallint, which they hold as uint8
    "models": {
        **dict.fromkeys(("d_model", "d_head", "d_mlp", "n_ctx", "d_vocab"), pl.UInt16()),
        "n_params": pl.UInt64(),
    },
    "sites": {"shape": pl.List(pl.UInt32())},
}


@cache
def schema() -> str:
    """The SQL that makes an empty catalog."""
    return files("actstore.catalog").joinpath("schema.sql").read_text(encoding="utf-8")


def view(name: str) -> str:
    """The SELECT of one of the views, from schema.sql."""
    found = re.search(rf"^create view {name} as  -- [^\n]*\n(.*?);$", schema(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def column_comments() -> dict[tuple[str, str], str]:
    """(table, column) → what it holds, from schema.sql."""
    comments, table = {}, ""
    for line in schema().splitlines():
        if begins := TABLE.match(line):
            table = begins[1]
        elif column := COLUMN.match(line):
            comments[table, column[1]] = column[3]
    return comments


TABLES_THERE = """
select table_name, column_name, case when data_type like 'ENUM%' then 'ENUM' else data_type end as type
from duckdb_columns() join duckdb_tables() using (database_name, schema_name, table_name)
where database_name = 'store' and schema_name = 'main'"""


def check_tables(there: Iterable[Sequence[str]]) -> None:
    """Look whether a catalog has the tables of today, with the columns and their types; a view is no table.

    Args:
        there: rows of TABLES_THERE.

    Raises:
        ValueError: a column is not there.
    """
    held, table, wanted = {tuple(row) for row in there}, "", schema()
    for line in wanted.splitlines():
        if begins := TABLE.match(line):
            table = begins[1]
        elif column := COLUMN.match(line):
            dtype = "ENUM" if f"create type {column[2]} " in wanted else column[2].upper()
            if (table, column[1], dtype) not in held:
                raise ValueError(f"it has no table {table} with a column {column[1]} of type {column[2]}")


@cache
def tables() -> dict[str, dict[str, pl.DataType]]:
    """The columns of every table, and the polars type each is written to its parts with.

    The catalog's numbers are signed. Parts hold the small ones unsigned, as the first format did, so that a row has the
    same bytes in every format; they lack the columns that the catalog derives.
    """
    with duckdb.connect() as connection:
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


def snapshot(root: Path) -> int:
    """How many commits the catalog that is there holds; 0 where there is none that can be read."""
    return built_from(root)[0]


def built_from(root: Path) -> tuple[int, str | None]:
    """How many commits the catalog that is there holds, and the hash of their manifests (see log_hash).

    The number is 0 where no catalog can be read; the hash is None there too, and where an earlier format noted none.
    """
    try:
        with attached(root) as connection:
            return snapshot_of(connection)
    except (duckdb.Error, FileNotFoundError, Damaged, IndexError, KeyError, TypeError, ValueError) as error:
        if reached := limit_reached(error, f"cannot open {root / CATALOG}"):
            raise reached from error
        return 0, None


def snapshot_of(connection: duckdb.DuckDBPyConnection) -> tuple[int, str | None]:
    """As built_from, of a connection that has the catalog attached."""
    rows = connection.execute("from there.snapshot")
    row = dict(zip([column for column, *_ in rows.description], rows.fetchall()[0], strict=True))
    hash_of_log = row.get("log_xxh3_128")
    return int(row["snapshot"]), None if hash_of_log is None else str(hash_of_log)


@contextmanager
def attached(root: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The catalog's own file as the database `there`, to be read, without what a log beside it would add.

    Raises:
        Damaged: no regular file stands there, or a view in the place of a table: its query would be run, and may read any
            file.
        FileNotFoundError: there is none.
        duckdb.Error: it is no database.
    """
    with ExitStack() as stack:
        path = root / CATALOG
        check_regular(path)
        if replayed(root):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="actstore-catalog-"))
            path = Path(shutil.copyfile(path, Path(folder) / CATALOG))
        connection = stack.enter_context(duckdb.connect())
        connection.execute(f"attach {located(path)} as there (read_only)")
        views = connection.execute(
            "select view_name from duckdb_views() where database_name = 'there' and not internal"
        )
        if wrong := {name for (name,) in views.fetchall()} & {table for table, _ in column_comments()}:
            raise Damaged(not_a_table(root, min(wrong)))
        yield connection


def not_a_table(root: Path, name: str) -> str:
    """What is wrong with a catalog that has something else in the place of a table."""
    return f"{root / CATALOG} has a view {name} in the place of the table; rebuild it with {advised('repair', root)}"


def replayed(root: Path) -> list[Path]:
    """What lies beside the catalog and is no part of the store, though DuckDB would read it with the catalog.

    A client that opened the catalog to write, and died, leaves its write-ahead log there. DuckDB looks for one beside the
    file that a link leads to.
    """
    paths = dict.fromkeys((str(root / CATALOG), os.path.realpath(root / CATALOG)))
    return [Path(path + ending) for path in paths for ending in REPLAYED if os.path.lexists(path + ending)]


def refuse_replayed(root: Path) -> None:
    """Look whether a read of the catalog would be of the catalog alone.

    Raises:
        Damaged: something lies beside it that DuckDB would add to it.
    """
    if found := replayed(root):
        raise Damaged(
            f"{found[0]} was left by a program that wrote to the catalog, and is no part of the store: each read would take "
            f"its changes for committed; remove it with {advised('repair', root)}"
        )


def discard_beside(path: Path) -> None:
    """Remove what DuckDB may have left beside a database: logs, and the folder it spills to."""
    for ending in (*REPLAYED, ".tmp"):
        discard(path.with_name(path.name + ending))


def rows_of(parts: list[Path]) -> str:
    """SQL for the rows of some parts of one table."""
    listed = ", ".join(_without_wildcards(located(path)) for path in parts)
    # by name, since older parts may lack a column; else a folder `seed=7` fills column seed
    return f"read_parquet([{listed}], union_by_name = true, hive_partitioning = false)"


def source(connection: duckdb.DuckDBPyConnection, table: str, parts: list[Path], datasets: str) -> str:
    """SQL for the rows of some parts of one table, with the columns that the catalog derives.

    Args:
        connection: of the catalog that holds the sets of trees.
        datasets: name of that table, in full.
    """
    if table != "tokens":
        return rows_of(parts)
    sets = connection.execute(f"select dataset, first_tree_id + n_trees from {datasets} order by first_tree_id")
    cases = " ".join(f"when tree_id < {stop} then {quoted(name)}" for name, stop in sets.fetchall())
    return f"(select *, {f'case {cases} end' if cases else 'null'} as dataset from {rows_of(parts)})"


def _without_wildcards(path: str) -> str:
    """A path that DuckDB reads as itself, though `*` and `[` stand in it."""
    return re.sub(r"([*\[])", r"[\1]", path)


def located(path: Path) -> str:
    """A path as SQL writes it: absolute, since DuckDB takes `~x` for a home folder, and `s3:x` for a place in the network.

    Raises:
        BadInput: DuckDB cannot open it.
    """
    check_path(path)
    return quoted(path.absolute())


def quoted(text: object) -> str:
    """A text as SQL writes it."""
    return "'" + str(text).replace("'", "''") + "'"
