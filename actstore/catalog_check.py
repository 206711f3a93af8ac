"""Is the catalog what was put in place, and what its parts say? Held against the hash that was noted, then row for row."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import duckdb

from actstore import catalog, log
from actstore.errors import Damaged, NoRoom
from actstore.hashing import hash_of
from actstore.log import Manifest

TABLES = "select table_name from duckdb_tables() where database_name = 'there'"


def wrong_with(root: Path, manifests: list[Manifest] | None, is_older: bool) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it).

    Args:
        manifests: all of them, where they and their parts are whole; else rows are not compared.
        is_older: an earlier version made the store, which noted no hash.

    Raises:
        NoRoom: there is none, where temporary files go, for a catalog to compare with.
    """
    if not (root / catalog.NAME).exists():
        yield catalog.NAME, "is missing"
        return
    try:
        is_noted = _is_noted(root)
    except FileNotFoundError:
        if not is_older:
            yield catalog.HASHES, "is missing"
            return
        is_noted = True
    except Damaged as error:
        yield catalog.HASHES, str(error)
        return
    if not is_noted:
        yield catalog.NAME, "its content is not what was put in place"
    elif manifests is not None:
        yield from ((catalog.NAME, what) for what in _rows_that_differ(root, manifests))


def _is_noted(root: Path) -> bool:
    """Whether the catalog has a hash that was noted; one that a writer puts in its place meanwhile is looked at, too."""
    path = root / catalog.NAME
    while True:
        with path.open("rb") as opened:
            found = hash_of(opened.fileno())
            if found in catalog.noted_hashes(root):  # read behind it: a hash is noted before its catalog is there
                return True
            if os.path.samestat(os.fstat(opened.fileno()), path.stat()):
                return False


def _rows_that_differ(root: Path, manifests: list[Manifest]) -> Iterator[str]:
    """Build a catalog from the parts, of as many commits as the one there holds, and compare every row of every table."""
    with tempfile.TemporaryDirectory(prefix="actstore-verify-") as folder, duckdb.connect() as connection:
        connection.execute(f"set temp_directory = {catalog.quoted(folder)}")
        connection.execute(f"attach {catalog.quoted(root / catalog.NAME)} as there (read_only)")  # and keep that one
        held = int(connection.execute("select snapshot from there.snapshot").fetchall()[0][0])
        committed = manifests if held <= len(manifests) else log.manifests(root)  # a writer went on meanwhile
        anew = Path(folder) / "anew.duckdb"
        _build(root, anew, committed[:held])
        connection.execute(f"attach {catalog.quoted(anew)} as anew (read_only)")
        there = {row[0] for row in connection.execute(TABLES).fetchall()}
        for table in [table for table in catalog.tables() if table in there]:  # an older catalog lacks some
            names = [row[0] for row in connection.execute(f"describe there.{table}").fetchall()]
            columns = ", ".join(name for name in names if name != "format_version")  # an older catalog's is its own
            yield from _differences(connection, table, columns)


def _build(root: Path, anew: Path, committed: list[Manifest]) -> None:
    try:
        catalog.build(root, anew, committed)
    except (duckdb.Error, OSError) as error:
        if any(os.strerror(reason) in str(error) for reason in log.DISK_FULL):
            what = f"no room in {anew.parent} for a catalog to compare with; set TMPDIR to a roomier disk"
            raise NoRoom(what) from error
        raise


def _differences(connection: duckdb.DuckDBPyConnection, table: str, columns: str) -> Iterator[str]:
    """How many rows of a table are in one of the two catalogs alone.

    A sum over hashes of the rows, which needs no memory, says whether there are any; then they are counted.
    """
    digest = f"select count(*), sum(hash({columns})::uhugeint), bit_xor(hash(1, {columns})) from"
    one, other = (connection.execute(f"{digest} {where}.{table}").fetchall() for where in ("there", "anew"))
    if one == other:
        return
    for left, right, what in (("there", "anew", "the parts lack"), ("anew", "there", "it lacks")):
        query = f"select {columns} from {left}.{table} except all select {columns} from {right}.{table}"
        n = connection.execute(f"select count(*) from ({query})").fetchall()[0][0]
        if n:
            yield f"{what} {n:,} rows of table {table}"
