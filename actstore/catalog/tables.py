"""The tables of a catalog, as schema.sql declares them, and the catalog's file."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path

import duckdb

from actstore.arrays.address import POSITIONS_PER_TREE
from actstore.errors import BadInput, Busy, Damaged, advised
from actstore.storage.at import at, check_path
from actstore.storage.backend import Storage
from actstore.storage.machine import limit_reached, refuse_forked
from actstore.storage.regular import check_regular
from actstore.storage.several import several


def in_parts(error: Exception) -> tuple[str, list[str]]:
    """Split DuckDB's message: its text as one line, and the lines that show the place in the query.

    The second part is empty if the message shows no place.
    """
    lines = str(error).splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("LINE ")), len(lines))
    said = " ".join(line.strip() for line in lines[:first] if line.strip())
    return said, [line.rstrip() for line in lines[first : first + 2]]


def one_line(error: Exception) -> str:
    """DuckDB's message, without the copy of the query at its end."""
    return in_parts(error)[0]


def polars_errors() -> type[Exception]:
    """The root of polars' errors, imported only when an error is looked at."""
    import polars as pl

    return pl.exceptions.PolarsError


def in_use(error: Exception, root: Path) -> Busy | None:
    """The error for a catalog that somebody has open to write; None for another error of DuckDB."""
    if "is already attached" in str(error):
        return Busy(f"this process has {root / CATALOG} open to write; close that connection of DuckDB first")
    if found := re.search(r"Conflicting lock is held in .*\(PID (\d+)", str(error)):
        return Busy(
            f"process {found[1]} has {root / CATALOG} open to write, and DuckDB lets no other read it meanwhile; end that "
            f"process, or put a new catalog in the place of its own with {advised('repair', root)}"
        )
    return None


CATALOG = "catalog.duckdb"
HASHES = "catalog.json"  # hashes of the catalog's bytes
REPLAYED = (".wal", ".wal.checkpoint", ".wal.recovery")  # DuckDB adds these to a database, even to read it
NO_CATALOG = (duckdb.Error, FileNotFoundError, Damaged, IndexError, KeyError, TypeError, ValueError)
COLUMN = re.compile(r"^    (\w+) ([^-]*), -- (.+)$")
TABLE = re.compile(r"^create table (\w+)")
TABLES_ATTACHED = "select table_name from duckdb_tables() where database_name = 'there'"  # see attached
DERIVED = {"tokens": "dataset"}  # columns that parts do not hold; see source
ADDED: dict[str, tuple[str, ...]] = {  # columns that parts of trees do not hold
    "models": ("architecture", "normalization", "tokenizer", "weights_kept", "facts"),
    "datasets": (
        *("task", "layout", "first_token_id", "n_ids", "stride", "first_sequence_id", "n_sequences"),
        *("n_tokens", "rows_per_shard", "rows_per_chunk", "vocabulary", "recipe"),
    ),
    "tokens": ("sequence_id", "number", "start", "stop"),
    "sites": ("axes", "lineage"),
    "predictions": ("sequence_id", "loss", "rank", "top"),
    "generations": ("sequence_id",),
}
OF_TREES = {  # columns that are null for other sequences
    "datasets": "first_tree_id",
    **dict.fromkeys(("tokens", "predictions", "generations"), "tree_id"),
}


@cache
def schema() -> str:
    """The SQL that makes an empty catalog."""
    return files("actstore.catalog").joinpath("schema.sql").read_text(encoding="utf-8")


def view(name: str) -> str:
    """The SELECT of a view, from schema.sql."""
    found = re.search(rf"^create view {name} as  -- [^\n]*\n(.*?);$", schema(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


@cache
def columns() -> dict[tuple[str, str], tuple[str, str]]:
    """(table, column) → the column's type, ENUM for each enum, and its comment in schema.sql."""
    found, table = {}, ""
    for line in schema().splitlines():
        if begins := TABLE.match(line):
            table = begins[1]
        elif column := COLUMN.match(line):
            dtype = "ENUM" if f"create type {column[2]} " in schema() else column[2].upper()
            found[table, column[1]] = dtype, column[3]
    return found


def column_comments() -> dict[tuple[str, str], str]:
    """(table, column) → the column's comment in schema.sql."""
    return {column: comment for column, (_, comment) in columns().items()}


TABLE_NAMES = list(dict.fromkeys(table for table, _ in columns()))
ROWS = "select *, rowid from store.main.{}"  # of a table; DuckDB refuses it of a view, which has no rowid
TABLES_THERE = """
select table_name, column_name, case when data_type like 'ENUM%' then 'ENUM' else data_type end as type
from duckdb_columns() join duckdb_tables() using (database_name, schema_name, table_name)
where database_name = 'store' and schema_name = 'main'"""


def check_tables(there: Iterable[Mapping[str, str]]) -> None:
    """Check that a catalog has today's tables, columns and types; a view does not count as a table.

    Args:
        there: rows of TABLES_THERE.

    Raises:
        ValueError: a column is missing.
    """
    held = {tuple(row.values()) for row in there}
    for (table, column), (dtype, _) in columns().items():
        if (table, column, dtype) not in held:
            raise ValueError(f"it has no table {table} with a column {column} of type {dtype.lower()}")


def snapshot(root: Path) -> int:
    """Number of commits in the present catalog; 0 if no catalog can be read."""
    return built_from(root)[0]


def built_from(root: Path) -> tuple[int, str | None]:
    """Number of commits in the present catalog, and the hash of their manifests (see log_hash).

    If no catalog can be read, the number is 0 and the hash None. The hash of a catalog of an
    earlier format is None, too.

    Raises:
        BadInput: DuckDB cannot open the store's path, or this process was forked from one that had
            opened a store.
    """
    with attached_if_whole(root) as connection:
        return snapshot_if_whole(root, connection)


def snapshot_if_whole(root: Path, connection: duckdb.DuckDBPyConnection | None) -> tuple[int, str | None]:
    """Read what built_from returns from a connection of attached_if_whole."""
    try:
        return snapshot_of(connection) if connection else (0, None)
    except NO_CATALOG as error:
        _raise_if_asked_wrongly(root, error)
        return 0, None


def snapshot_of(connection: duckdb.DuckDBPyConnection) -> tuple[int, str | None]:
    """Read what built_from returns from a connection that has the catalog attached."""
    rows = connection.execute("from there.snapshot")
    row = dict(zip([column for column, *_ in rows.description], rows.fetchall()[0], strict=True))
    hash_of_log = row.get("log_xxh3_128")
    return int(row["snapshot"]), None if hash_of_log is None else str(hash_of_log)


@contextmanager
def ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt for the errors that DuckDB tells a Ctrl-C by, in the main thread.

    DuckDB names it in three ways: an interrupted query, a RuntimeError, and, where the Ctrl-C came
    while Python handed rows over, the text of the exception that Python raised there.
    """
    try:
        yield
    except (duckdb.Error, RuntimeError) as error:
        if any(word in str(error).lower() for word in ("interrupted", "keyboardinterrupt")):
            raise KeyboardInterrupt from error
        raise


@contextmanager
def attached(root: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Attach the catalog's file for reading, as the database `there`, without a log beside it.

    Raises:
        BadInput: this process was forked from one that had opened a store.
        Damaged: the catalog is not a regular file, or has a view in the place of a table. Such a
            view's query would run, and may read any file.
        FileNotFoundError: there is no catalog.
        duckdb.Error: the file is not a database.
    """
    refuse_forked()
    with ctrl_c(), ExitStack() as stack:
        [path] = stack.enter_context(at(root).local([CATALOG]))
        check_regular(path)
        if replayed(path):
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


@contextmanager
def attached_if_whole(root: Path) -> Iterator[duckdb.DuckDBPyConnection | None]:
    """See attached; gives None where the catalog is missing or damaged.

    Raises:
        BadInput: see built_from.
        LimitReached: the system allows this process no more.
    """
    with ExitStack() as stack:
        try:
            connection = stack.enter_context(attached(root))
        except NO_CATALOG as error:
            _raise_if_asked_wrongly(root, error)
            connection = None
        yield connection


def _raise_if_asked_wrongly(root: Path, error: Exception) -> None:
    """Raise unless an error says that there is no catalog that can be read."""
    if isinstance(error, BadInput):  # a ValueError, too
        raise error
    if reached := limit_reached(error, f"cannot open {root / CATALOG}"):
        raise reached from error


def not_a_table(root: Path, name: str) -> str:
    """The message for a catalog that has something else in the place of a table."""
    return f"{root / CATALOG} has a view {name} in the place of the table; rebuild it with {advised('repair', root)}"


def replayed(catalog: Path) -> list[Path]:
    """Files beside a catalog's file that DuckDB would read with it; they are not part of the store.

    A client that opened the catalog to write, and died, leaves its write-ahead log there. DuckDB
    looks for a log beside the file that a link leads to.
    """
    paths = dict.fromkeys((str(catalog), os.path.realpath(catalog)))
    return [Path(path + ending) for path in paths for ending in REPLAYED if os.path.lexists(path + ending)]


def refuse_replayed(root: Path, catalog: Path) -> None:
    """Check that a read of the catalog reads the catalog alone.

    Args:
        catalog: the file that is opened.

    Raises:
        Damaged: DuckDB would add a file beside the catalog.
    """
    if found := replayed(catalog):
        raise Damaged(
            f"{found[0]} was left by a program that wrote to the catalog, and is no part of the store: each read would take "
            f"its changes for committed; remove it with {advised('repair', root)}"
        )


def discard_beside(place: Storage, path: str) -> None:
    """Remove what DuckDB may have left beside a database: logs, and its temporary folder."""
    for _ in several(place.delete, [path + ending for ending in (*REPLAYED, ".tmp")], place.at_once):
        pass


def rows_of(parts: list[Path]) -> str:
    """SQL for the rows of several parts of one table."""
    listed = ", ".join(_without_wildcards(located(path)) for path in parts)
    # by name, since older parts may lack a column; no hive partitioning, which would fill column
    # `seed` from a folder `seed=7`
    return f"read_parquet([{listed}], union_by_name = true, hive_partitioning = false)"


def source(connection: duckdb.DuckDBPyConnection, table: str, parts: list[Path], datasets: str) -> str:
    """SQL for the rows of several parts of one table, with the columns that the catalog derives.

    Args:
        connection: a connection to the catalog that holds the datasets.
        parts: paths of the parts.
        datasets: the full name of the table `datasets`.
    """
    if table not in OF_TREES:
        return rows_of(parts)
    held = names_of(connection, rows_of(parts))
    named = [*ADDED[table], *([DERIVED[table]] if table in DERIVED else [])]
    lacking = [f"null::{columns()[table, name][0]} as {name}" for name in named if name not in held]
    rows = f"(select {', '.join(['*', *lacking])} from {rows_of(parts)})"
    if table == "datasets":
        derived = (
            "coalesce(task, 'trees') as task, coalesce(layout, 'grid') as layout, "
            f"coalesce(first_token_id, first_tree_id::bigint * {POSITIONS_PER_TREE}) as first_token_id, "
            f"coalesce(n_ids, n_trees::bigint * {POSITIONS_PER_TREE}) as n_ids, "
            f"if(task is null, {POSITIONS_PER_TREE}, stride) as stride, "
            "coalesce(first_sequence_id, first_tree_id) as first_sequence_id, coalesce(n_sequences, n_trees) as n_sequences"
        )
    else:
        derived = "coalesce(sequence_id, tree_id) as sequence_id"
    if table == "tokens":
        end = "first_token_id + n_ids"
        if "n_ids" not in names_of(connection, datasets):  # the catalog of an earlier version
            end = f"(first_tree_id + n_trees)::bigint * {POSITIONS_PER_TREE}"
        sets = connection.execute(f"select dataset, {end} as stop from {datasets} order by stop")
        cases = " ".join(f"when token_id < {stop} then {quoted(name)}" for name, stop in sets.fetchall())
        derived += f", {f'case {cases} end' if cases else 'null'} as dataset"
    return f"(select * replace ({derived}) from {rows})"


def names_of(connection: duckdb.DuckDBPyConnection, rows: str) -> set[str]:
    """Names of the columns of a table, or of a table function."""
    return {row[0] for row in connection.execute(f"describe from {rows}").fetchall()}


def _without_wildcards(path: str) -> str:
    """Escape `*` and `[`, so that DuckDB reads the path as it stands."""
    return re.sub(r"([*\[])", r"[\1]", path)


def located(path: Path) -> str:
    """Write a path as a SQL string.

    The path is made absolute: DuckDB takes `~x` for a home folder, and `s3:x` for a place in the
    network.

    Raises:
        BadInput: DuckDB cannot open a path with these characters.
    """
    check_path(path)
    return quoted(path.absolute())


def quoted(text: object) -> str:
    """Write a text as a SQL string."""
    return "'" + str(text).replace("'", "''") + "'"
