"""Verify the catalog: compare its hash with the noted one, then its rows with the parts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from itertools import islice
from pathlib import Path

import duckdb
import polars as pl

from actstore.catalog import hash_note, part_types, tables, witness
from actstore.catalog.declared import identifier
from actstore.catalog.tables import one_line
from actstore.commits import log
from actstore.commits.manifest import Manifest
from actstore.errors import Damaged, LimitReached
from actstore.storage.at import at
from actstore.storage.machine import limit_reached

COLUMNS = """
select table_name, column_name, if(starts_with(data_type, 'ENUM'), 'VARCHAR', data_type)
from duckdb_columns() where database_name = 'there' and schema_name = 'main' and not internal order by table_name, column_index"""
CATALOG, CONFLICT = (
    "catalog",
    "conflict",
)  # kinds of findings: it is damaged; it is whole, and the manifests say otherwise


def wrong_with(
    root: Path,
    manifests: list[Manifest] | None,
    is_older: bool,
    parts_are_whole: bool,
    connection: duckdb.DuckDBPyConnection | None = None,
) -> Iterator[tuple[str, str, str]]:
    """Look for damage of the catalog.

    Args:
        manifests: all manifests if they are whole; None leaves out the comparison.
        is_older: an earlier version made the store, which noted no hash.
        parts_are_whole: if false, rows are counted and not compared.
        connection: has the catalog attached, see tables.attached; default: one for this call.

    Yields:
        (file, kind of finding, what is wrong with the file).
    """
    yield from ((path, CATALOG, what) for path, what in _added(root))
    try:
        descriptor = at(root).descriptor(tables.CATALOG)
    except (FileNotFoundError, Damaged) as error:
        yield tables.CATALOG, CATALOG, _said(error)
        return
    try:
        is_noted = _is_noted(root, descriptor)
    except FileNotFoundError:
        if not is_older:
            yield tables.HASHES, CATALOG, "is missing"
            return
        is_noted = True
    except Damaged as error:
        yield tables.HASHES, CATALOG, str(error)
        return
    if not is_noted:
        yield tables.CATALOG, CATALOG, "its content is not what was put in place"
    elif manifests is not None:
        yield from ((tables.CATALOG, *found) for found in _differing(root, manifests, parts_are_whole, connection))


def lacking_or_added(root: Path) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) by names alone: a missing catalog, or files that DuckDB would add."""
    yield from _added(root)
    try:
        os.close(at(root).descriptor(tables.CATALOG))
    except (FileNotFoundError, Damaged) as error:
        yield tables.CATALOG, _said(error)


def _said(error: OSError) -> str:
    return str(error) if isinstance(error, Damaged) else "is missing"


def _added(root: Path) -> Iterator[tuple[str, str]]:
    with suppress(FileNotFoundError, Damaged), at(root).local([tables.CATALOG]) as [catalog]:
        for left in tables.replayed(catalog):
            where = left.name if os.path.samefile(left.parent, catalog.parent) else tables.CATALOG
            yield where, f"{left} is no part of the store, and each read would take its changes for committed"


def _is_noted(root: Path, descriptor: int) -> bool:
    """True if the catalog's hash is in catalog.json.

    Retries if a writer replaces the catalog during the check.

    Args:
        descriptor: of the catalog; it is closed.
    """
    while True:
        with os.fdopen(descriptor, "rb") as opened:
            if (is_noted := hash_note.is_noted(root, opened.fileno())) is not None:
                return is_noted
        descriptor = at(root).descriptor(tables.CATALOG)


def _differing(
    root: Path, manifests: list[Manifest], parts_are_whole: bool, given: duckdb.DuckDBPyConnection | None
) -> Iterator[tuple[str, str]]:
    """(kind of finding, difference between catalog and manifests).

    Rows that cannot be compared are damage.
    """
    try:
        with nullcontext(given) if given else tables.attached(root) as connection:
            yield from ((CONFLICT, what) for what in witness.conflicts(root, manifests, connection))
            if parts_are_whole:
                yield from ((CONFLICT, what) for what in _rows_that_differ(root, manifests, connection))
    except (duckdb.Error, Damaged, LookupError, TypeError, ValueError) as error:
        if isinstance(error, duckdb.OutOfMemoryException):
            raise LimitReached(f"to verify the catalog of {root} takes more memory than there is: {error}") from error
        if reached := limit_reached(error, f"cannot verify the catalog of {root}"):
            raise reached from error
        yield CATALOG, f"it cannot be compared with its parts ({tables.in_use(error, root) or one_line(error)})"


def _rows_that_differ(root: Path, manifests: list[Manifest], connection: duckdb.DuckDBPyConnection) -> Iterator[str]:
    """Compare every row of every table with the parts, for as many commits as the catalog holds."""
    with tempfile.TemporaryDirectory(prefix="actstore-verify-") as folder, ExitStack() as copies:
        connection.execute(f"set temp_directory = {tables.quoted(folder)}")  # or DuckDB would use the working folder
        held = int(connection.execute("select snapshot from there.snapshot").fetchall()[0][0])
        committed = (manifests if held <= len(manifests) else log.manifests(root))[:held]  # a writer went on meanwhile
        committed = log.live(committed)
        shards = [vars(shard) for manifest in committed for shard in manifest.shards]
        types, columns = dict(part_types.tables()["shards"]), dict[str, list[tuple[str, str]]]()
        for table, name, dtype in connection.execute(COLUMNS).fetchall():
            columns.setdefault(table, []).append((name, dtype))
        connection.register("shards_committed", pl.DataFrame(shards, schema=types))
        paths: dict[str, list[str]] = {table: [] for table in witness.tables_held(connection)}
        for part in (part for manifest in committed for part in manifest.parts if part.table in paths):
            paths[part.table].append(part.path)
        there = iter(copies.enter_context(at(root).local([path for of_table in paths.values() for path in of_table])))
        for table, of_table in paths.items():
            parts = list(islice(there, len(of_table)))
            if parts or (table == "shards" and shards):
                source = "shards_committed" if table == "shards" else None
                source = source or tables.source(connection, table, parts, "there.datasets")
                yield from _differences(connection, table, columns[table], source)
            elif n := connection.execute(f"select count(*) from there.{identifier(table)}").fetchall()[0][0]:
                yield f"the parts lack {n:,} rows of table {table}"


def _differences(
    connection: duckdb.DuckDBPyConnection, table: str, columns: list[tuple[str, str]], source: str
) -> Iterator[str]:
    """Number of a table's rows that only the catalog or only the parts hold.

    A sum over hashes of the rows, which needs no memory, says whether rows differ. Only then are
    they counted. An ENUM is compared as text, since to find a text's ENUM takes longer.

    Args:
        columns: name and type of each of the catalog's, see COLUMNS.
        source: SQL for the table's rows in the parts.
    """
    there = tables.names_of(connection, source)
    of_parts = [
        f"{identifier(name) if name in there else 'null'}::{dtype} as {identifier(name)}" for name, dtype in columns
    ]
    of_catalog = [f"{identifier(name)}::{dtype} as {identifier(name)}" for name, dtype in columns]
    committed = f"(select {', '.join(of_parts)} from {source})"
    held = f"(select {', '.join(of_catalog)} from there.{identifier(table)})"
    row = f"hash({', '.join(identifier(name) for name, _ in columns)})"
    digest = "select count(*), sum((row >> 1)::bigint), bit_xor(row)"  # integers, so in any order the same
    digest += f" from (select {row} as row from"
    if len({connection.execute(f"{digest} {rows})").fetchall()[0] for rows in (held, committed)}) == 1:
        return
    for left, right, what in ((held, committed, "the parts lack"), (committed, held, "it lacks")):
        n = connection.execute(f"select count(*) from (from {left} except all from {right})").fetchall()[0][0]
        if n:
            yield f"{what} {n:,} rows of table {table}"
