"""Verify the catalog: compare its hash with the noted one, then its rows with the parts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
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

CATALOG, CONFLICT = (
    "catalog",
    "conflict",
)  # kinds of findings: it is damaged; it is whole, and the manifests say otherwise


def wrong_with(
    root: Path, manifests: list[Manifest] | None, is_older: bool, parts_are_whole: bool
) -> Iterator[tuple[str, str, str]]:
    """Look for damage of the catalog.

    Args:
        manifests: all manifests if they are whole; None leaves out the comparison.
        is_older: an earlier version made the store, which noted no hash.
        parts_are_whole: if false, rows are counted and not compared.

    Yields:
        (file, kind of finding, what is wrong with the file).
    """
    yield from ((path, CATALOG, what) for path, what in lacking_or_added(root))
    if _lacking(root):
        return
    try:
        is_noted = _is_noted(root)
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
        yield from ((tables.CATALOG, *found) for found in _differing(root, manifests, parts_are_whole))


def lacking_or_added(root: Path) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) by names alone: a missing catalog, or files that DuckDB would add."""
    with suppress(FileNotFoundError, Damaged), at(root).local([tables.CATALOG]) as [catalog]:
        for left in tables.replayed(catalog):
            where = left.name if os.path.samefile(left.parent, catalog.parent) else tables.CATALOG
            yield where, f"{left} is no part of the store, and each read would take its changes for committed"
    if what := _lacking(root):
        yield tables.CATALOG, what


def _lacking(root: Path) -> str:
    """What is wrong if no file has the catalog's name; "" if one has."""
    try:
        os.close(at(root).descriptor(tables.CATALOG))
    except FileNotFoundError:
        return "is missing"
    except Damaged as error:
        return str(error)
    return ""


def _is_noted(root: Path) -> bool:
    """True if the catalog's hash is in catalog.json.

    Retries if a writer replaces the catalog during the check.
    """
    while True:
        with os.fdopen(at(root).descriptor(tables.CATALOG), "rb") as opened:
            if (is_noted := hash_note.is_noted(root, opened.fileno())) is not None:
                return is_noted


def _differing(root: Path, manifests: list[Manifest], parts_are_whole: bool) -> Iterator[tuple[str, str]]:
    """(kind of finding, difference between catalog and manifests).

    Rows that cannot be compared are damage.
    """
    try:
        yield from ((CONFLICT, what) for what in witness.conflicts(root, manifests))
        if parts_are_whole:
            yield from ((CONFLICT, what) for what in _rows_that_differ(root, manifests))
    except (duckdb.Error, Damaged, LookupError, TypeError, ValueError) as error:
        if isinstance(error, duckdb.OutOfMemoryException):
            raise LimitReached(f"to verify the catalog of {root} takes more memory than there is: {error}") from error
        if reached := limit_reached(error, f"cannot verify the catalog of {root}"):
            raise reached from error
        yield CATALOG, f"it cannot be compared with its parts ({tables.in_use(error, root) or one_line(error)})"


def _rows_that_differ(root: Path, manifests: list[Manifest]) -> Iterator[str]:
    """Compare every row of every table with the parts, for as many commits as the catalog holds."""
    with (
        tempfile.TemporaryDirectory(prefix="actstore-verify-") as folder,
        tables.attached(root) as connection,
        ExitStack() as copies,
    ):
        connection.execute(f"set temp_directory = {tables.quoted(folder)}")  # or DuckDB would use the working folder
        held = int(connection.execute("select snapshot from there.snapshot").fetchall()[0][0])
        committed = (manifests if held <= len(manifests) else log.manifests(root))[:held]  # a writer went on meanwhile
        committed = log.live(committed)
        shards = [vars(shard) for manifest in committed for shard in manifest.shards]
        types = dict(part_types.tables()["shards"])
        connection.register("shards_committed", pl.DataFrame(shards, schema=types))
        for table in witness.tables_held(connection):
            yield from _differences(connection, table, _committed_rows(root, connection, table, committed, copies))


def _committed_rows(
    root: Path, connection: duckdb.DuckDBPyConnection, table: str, committed: list[Manifest], copies: ExitStack
) -> str:
    """SQL for a table's rows in the parts, with the catalog's columns and types."""
    paths = [part.path for manifest in committed for part in manifest.parts if part.table == table]
    parts = list(copies.enter_context(at(root).local(paths)))
    if table == "shards":
        source = "shards_committed"
    elif parts:
        source = tables.source(connection, table, parts, "there.datasets")
    else:
        return f"(from there.{identifier(table)} limit 0)"
    held = tables.names_of(connection, source)
    columns = [(name, identifier(name), dtype) for name, dtype in _columns(connection, table)]
    selected = ", ".join(
        f"{as_sql if name in held else 'null'}::{dtype} as {as_sql}" for name, as_sql, dtype in columns
    )
    return f"(select {selected} from {source})"


def _columns(connection: duckdb.DuckDBPyConnection, table: str) -> list[tuple[str, str]]:
    """Name and SQL type of each column of a table of the catalog."""
    described = connection.execute(f"describe there.{identifier(table)}").fetchall()
    return [(name, dtype) for name, dtype, *_ in described]


def _differences(connection: duckdb.DuckDBPyConnection, table: str, committed: str) -> Iterator[str]:
    """Number of a table's rows that only the catalog or only the parts hold.

    A sum over hashes of the rows, which needs no memory, says whether rows differ. Only then are
    they counted.
    """
    columns = ", ".join(identifier(name) for name, _ in _columns(connection, table))
    row = f"hash({columns})"
    digest = f"select count(*), sum(({row} >> 1)::bigint), bit_xor({row}) from"  # integers, so in any order the same
    held = f"there.{identifier(table)}"
    of_catalog, of_parts = (connection.execute(f"{digest} {rows}").fetchall() for rows in (held, committed))
    if of_catalog == of_parts:
        return
    for left, right, what in ((held, committed, "the parts lack"), (committed, held, "it lacks")):
        n = connection.execute(f"select count(*) from (from {left} except all from {right})").fetchall()[0][0]
        if n:
            yield f"{what} {n:,} rows of table {table}"
