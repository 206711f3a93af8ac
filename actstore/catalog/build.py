"""The DuckDB half of a store: `catalog.duckdb`, every table native, built from the committed parts and replaced whole.

Nobody holds it open for writing: a new one is made beside it (a copy of the last one plus what was committed since),
checkpointed, fsynced and put in its place, so a reader keeps the snapshot it opened and never waits for the writer.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.resources import files
from pathlib import Path

import duckdb
import polars as pl

from actstore.commits.log import (
    DISK_FULL,
    FORMAT_VERSION,
    Manifest,
    discard,
    fsync,
    fsync_folder,
    log_hash,
    manifests,
    replace_file,
    say_where,
)
from actstore.errors import Damaged, NoRoom, advised
from actstore.storage import sealed
from actstore.storage.content import Hash, as_a, json_object
from actstore.storage.folder import check_path
from actstore.storage.hashing import hash_of, hash_of_file
from actstore.storage.machine import limit_reached
from actstore.storage.regular import check_regular, read_regular

NAME = "catalog.duckdb"
HASHES = "catalog.json"  # what its bytes hash to
REPLAYED = (".wal", ".wal.checkpoint", ".wal.recovery")  # what DuckDB adds to a database that it opens, if only to read
STORAGE_VERSION = "v1.2.0"  # what DuckDB 1.2 and later clients can open
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
        if reached := limit_reached(error, f"cannot open {root / NAME}"):
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
        path = root / NAME
        check_regular(path)
        if replayed(root):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="actstore-catalog-"))
            path = Path(shutil.copyfile(path, Path(folder) / NAME))
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
    return f"{root / NAME} has a view {name} in the place of the table; rebuild it with {advised('repair', root)}"


def replayed(root: Path) -> list[Path]:
    """What lies beside the catalog and is no part of the store, though DuckDB would read it with the catalog.

    A client that opened the catalog to write, and died, leaves its write-ahead log there. DuckDB looks for one beside the
    file that a link leads to.
    """
    paths = dict.fromkeys((str(root / NAME), os.path.realpath(root / NAME)))
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


def publish(root: Path, *, from_nothing: bool = False) -> int:
    """Bring the catalog up to the last commit.

    Args:
        root: the store.
        from_nothing: do not trust the catalog that is there; read every part again.

    Returns:
        The snapshot's number: how many commits it holds.

    Raises:
        Damaged: a committed part or manifest is missing or unreadable.
        NoRoom: the disk is full; the catalog that was there is unchanged.
    """
    temporary = root / f".{NAME}.{os.getpid()}.tmp"
    try:
        with _building(root):
            discard_beside(temporary)  # of a process that had the same id
            discard_beside(root / NAME)
            held = 0 if from_nothing else _copy_of_last(root, temporary)
            new = manifests(root, after=held, least=held)
            if new or not held:
                temporary.touch()
                _extend(root, temporary, new, create=not held)
                os.chmod(temporary, 0o444)
                _note_hash(root, temporary)
                _replace(temporary, root / NAME)
            return held + len(new)
    finally:
        discard_beside(temporary)
        for left in (temporary, _note_under_way(root)):
            left.unlink(missing_ok=True)


@contextmanager
def of_older(root: Path) -> Iterator[Path]:
    """Today's catalog of a store of an earlier version, which stays as it is: built from its parts, in a folder that is
    removed at the end.

    Raises:
        Damaged: a committed part or manifest is missing or unreadable.
        NoRoom: the disk of temporary files is full.
    """
    with tempfile.TemporaryDirectory(prefix="actstore-catalog-") as folder:
        built = Path(folder) / NAME
        with _building(root):
            _extend(root, built, manifests(root, least=snapshot(root)), create=True)
        yield built


@contextmanager
def _building(root: Path) -> Iterator[None]:
    """Turn what DuckDB and the system say while a catalog is built into the package's errors."""
    try:
        yield
    except (duckdb.Error, RuntimeError) as error:
        if "interrupted" in str(error).lower():  # DuckDB's own words for Ctrl-C
            raise KeyboardInterrupt from error
        if not isinstance(error, duckdb.Error):
            raise
        if any(os.strerror(reason) in str(error) for reason in DISK_FULL):
            raise NoRoom(f"no room for the catalog of {root}; free some, then go on") from error
        for reason in (errno.EIO, errno.EROFS):  # the disk's, not the parts'
            if os.strerror(reason) in str(error):
                raise OSError(reason, os.strerror(reason), str(root / NAME)) from error
        if isinstance(error, duckdb.FatalException) or "fsync failed" in str(error):
            raise OSError(errno.EIO, _first_line(error), str(root / NAME)) from error
        raise limit_reached(error, f"cannot build the catalog of {root}") or Damaged(
            f"the catalog of {root} cannot be built from its parts ({_first_line(error)}); restore them from a copy of it"
        ) from error
    except OSError as error:
        if error.errno in DISK_FULL:
            raise NoRoom(f"no room for the catalog of {root}: {error.strerror}; free some, then go on") from error
        say_where(error, root / NAME)
        raise


def noted_hashes(root: Path) -> list[str]:
    """xxh3-128 of the catalogs that were last put in place; two of them, since noting one and putting it there are two steps.

    Raises:
        Damaged: the note is not what was written.
        FileNotFoundError: there is none; stores of format 1 have none.
    """
    content = read_regular(root / HASHES)
    try:
        noted = json_object(content)
        if noted.keys() != {"xxh3_128"} and not sealed.is_whole(content):  # development versions wrote no checksum
            raise ValueError("its checksum does not match")
        return as_a(list[Hash], noted.get("xxh3_128"))
    except ValueError as error:
        raise Damaged(f"{root / HASHES} cannot be read ({error}); mend it with {advised('repair', root)}") from error


def _note_hash(root: Path, new: Path) -> None:
    """Note the hash of a catalog before it is put in place, beside that of the one there."""
    both = [hash_of_file(new)]
    with suppress(FileNotFoundError, Damaged):  # none is there, or nothing that was ever noted
        both.append(hash_of_file(root / NAME))
    hashes = list(dict.fromkeys(both))
    temporary = _note_under_way(root)
    temporary.write_bytes(sealed.to_json({"xxh3_128": hashes}))
    _replace(temporary, root / HASHES)


def _note_under_way(root: Path) -> Path:
    return root / f".{HASHES}.{os.getpid()}.tmp"


def _copy_of_last(root: Path, temporary: Path) -> int:
    """Copy the catalog that is there, and say how many commits it holds; 0, and no copy, where none can be used."""
    try:
        check_regular(root / NAME)
    except (FileNotFoundError, Damaged):
        return 0
    shutil.copyfile(root / NAME, temporary)
    if not _is_noted(root, temporary):  # damage must not be carried on into the next one
        temporary.unlink()
        return 0
    try:
        with duckdb.connect(temporary.absolute()) as connection:
            version, held = connection.execute("select format_version, snapshot::int from snapshot").fetchall()[0]
            columns = connection.execute("select table_name, column_name from duckdb_columns()").fetchall()
    except (duckdb.Error, IndexError):
        version, held, columns = None, 0, []
    is_of_today = version == FORMAT_VERSION and column_comments().keys() <= set(columns)  # tables may gain columns
    if not is_of_today or held is None:
        temporary.unlink()
        return 0
    return int(held)


def is_noted(root: Path, descriptor: int) -> bool | None:
    """Whether a catalog that is open has a hash that was noted; None where another is in its place by now.

    Raises:
        Damaged, FileNotFoundError: as noted_hashes.
    """
    found = hash_of(descriptor)
    if found in noted_hashes(root):  # read afterwards: a hash is noted before its catalog is put in place
        return True
    return False if os.path.samestat(os.fstat(descriptor), os.stat(root / NAME)) else None


def is_whole(root: Path) -> bool:
    """Whether the catalog that is there is one that was put in place, by the note of its hash."""
    return _is_noted(root, root / NAME)


def _is_noted(root: Path, path: Path) -> bool:
    try:
        return hash_of_file(path) in noted_hashes(root)
    except (FileNotFoundError, Damaged):
        return False


def _extend(root: Path, path: Path, new: list[Manifest], create: bool) -> None:
    """Insert the rows of the given commits into the catalog at path."""
    if create:
        path.unlink(missing_ok=True)
    with duckdb.connect() as connection:
        connection.execute(f"attach {located(path)} as new (storage_version '{STORAGE_VERSION}')")
        connection.execute("use new")
        connection.execute("begin")  # one transaction, comments and all: each commit is an fsync
        if create:
            _create(connection)
        parts: dict[str, list[Path]] = {}
        for manifest in new:
            for part in manifest.parts:
                _check_part(root, part.path)
                parts.setdefault(part.table, []).append(root / part.path)
        for table, paths in parts.items():
            connection.execute(f"insert into {table} by name from {source(connection, table, paths, 'new.datasets')}")
        if shards := [shard for manifest in new for shard in manifest.shards]:
            connection.register("new_shards", pl.DataFrame([vars(shard) for shard in shards]))
            connection.execute("insert into shards by name select * from new_shards")
        before = connection.execute("select log_xxh3_128 from snapshot").fetchall()[0][0]
        now = "update snapshot set snapshot = snapshot + ?, log_xxh3_128 = ?"
        connection.execute(now, [len(new), log_hash(new, before)])
        connection.execute("commit")
        connection.execute("checkpoint new")


def _check_part(root: Path, path: str) -> None:
    try:
        check_regular(root / path)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(
            f"the catalog of {root} cannot be built from its parts ({path} is missing); restore it from a copy of the store"
        ) from None


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


def _create(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute(schema())
    for (table, column), comment in column_comments().items():
        connection.execute(f"comment on column {table}.{column} is {quoted(comment)}")
    connection.execute("insert into snapshot values (?, 0, '')", [FORMAT_VERSION])


def _replace(temporary: Path, final: Path) -> None:
    """Put a finished file in the place of the old one, durably."""
    fsync(temporary)
    replace_file(temporary, final)
    fsync_folder(final.parent)


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


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
