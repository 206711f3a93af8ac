"""Build `catalog.duckdb` from the committed parts; every table is native, the file replaced whole.

Nobody holds a catalog open for writing. A writer makes a new file beside it: an earlier catalog (a
large one that nobody reads any more, or else a copy of the last), plus what was committed since.
The new file is checkpointed, fsynced and renamed into place. A reader therefore keeps the snapshot
that it opened, and never waits for the writer.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import duckdb
import polars as pl

from actstore.catalog.declared import relations
from actstore.catalog.hash_note import note_hash, noted_hashes
from actstore.catalog.part_types import every_column
from actstore.catalog.tables import (
    CATALOG,
    attached,
    column_comments,
    ctrl_c,
    discard_beside,
    located,
    quoted,
    rows_of,
    schema,
    snapshot,
    source,
)
from actstore.commits.format import FORMAT_VERSION
from actstore.commits.log import live, log_hash, manifests
from actstore.commits.manifest import Manifest
from actstore.errors import Damaged, NoRoom
from actstore.storage.at import at
from actstore.storage.backend import ANY
from actstore.storage.machine import limit_reached
from actstore.storage.refused import DISK_FULL, say_where
from actstore.storage.regular import check_regular

TOKEN_WORD = re.compile(r"^create type token_word as enum \((.*?)^\);$", re.MULTILINE | re.DOTALL)
STORAGE_VERSION = "v1.2.0"  # readable by DuckDB 1.2 and later


def publish(root: Path, *, from_nothing: bool = False, wait: Callable[[], None] | None = None) -> int:
    """Bring the catalog up to the last commit.

    Args:
        from_nothing: read every part again, and do not trust the present catalog.
        wait: called when the new catalog has the rows of the commits so far; those that are there
            when it returns are added, and must only add batches. Not for a place that notes the
            number of commits.

    Returns:
        The snapshot's number: how many commits the catalog holds.

    Raises:
        Damaged: a committed part or manifest is missing or unreadable.
        NoRoom: the disk is full; the present catalog is unchanged.
        Busy: another process replaced the catalog meanwhile; its catalog stays.
    """
    place = at(root)
    with _building(root), ExitStack() as stack:
        discard_beside(place, CATALOG)
        try:
            there = place.token(CATALOG)
            expected = there
        except Damaged:  # not a regular file
            there, expected = None, ANY
        usable = None if there is None else _held(root, there, stack)
        held = 0 if from_nothing else usable or 0
        new = manifests(root, after=held, least=held)
        if held and any(_changes_what_is_held(manifest) for manifest in new):
            held, new = 0, manifests(root, least=held)

        later: list[Manifest] = []

        def further() -> list[Manifest]:
            if wait is not None:
                wait()
                later.extend(manifests(root, after=held + len(new), least=held + len(new)))
            return later

        def write(temporary: Path) -> None:
            try:
                since = _taken(root, temporary, held) if held else None
                if held and since is None:
                    with place.local([CATALOG]) as [catalog]:
                        shutil.copyfile(catalog, temporary)
                temporary.touch()
                _extend(root, temporary, new if since is None else since, not held, further)
                os.chmod(temporary, 0o444)
                note_hash(root, temporary, None if usable is None else there)  # none that is damaged
                (place.keep_earlier if held else place.forget_earlier)(CATALOG)  # or dropped rows would be kept
            finally:
                discard_beside(at(temporary.parent), temporary.name)

        if place.at_once > 1:  # a bucket's cache drops the catalog that is replaced, unless it is open
            stack.close()
        if new or not held or wait:
            place.swap(CATALOG, write, expected, held + len(new))
        return held + len(new) + len(later)


@contextmanager
def of_older(root: Path) -> Iterator[Path]:
    """Build today's catalog of a store of an earlier version, which is not changed.

    The catalog is built from the store's parts, in a folder that is removed at the end.

    Raises:
        Damaged: a committed part or manifest is missing or unreadable.
        NoRoom: the disk of temporary files is full.
    """
    with tempfile.TemporaryDirectory(prefix="actstore-catalog-") as folder:
        built = Path(folder) / CATALOG
        with _building(root):
            _extend(root, built, manifests(root, least=snapshot(root)), create=True)
        yield built


@contextmanager
def _building(root: Path) -> Iterator[None]:
    """Turn errors of DuckDB and the system into the package's own while a catalog is built."""
    try:
        with ctrl_c():
            yield
    except duckdb.Error as error:
        if any(os.strerror(reason) in str(error) for reason in DISK_FULL):
            raise NoRoom(f"no room for the catalog of {root}; free some, then go on") from error
        for reason in (errno.EIO, errno.EROFS):  # errors of the disk, not of the parts
            if os.strerror(reason) in str(error):
                raise OSError(reason, os.strerror(reason), str(root / CATALOG)) from error
        if isinstance(error, duckdb.FatalException) or "fsync failed" in str(error):
            raise OSError(errno.EIO, _first_line(error), str(root / CATALOG)) from error
        raise limit_reached(error, f"cannot build the catalog of {root}") or Damaged(
            f"the catalog of {root} cannot be built from its parts ({_first_line(error)}); restore them from a copy of it"
        ) from error
    except ValueError as error:  # of a declared table
        raise Damaged(f"the catalog of {root} cannot be built ({error}); restore the store from a copy") from error
    except OSError as error:
        if error.errno in DISK_FULL:
            raise NoRoom(f"no room for the catalog of {root}: {error.strerror}; free some, then go on") from error
        say_where(error, root / CATALOG)
        raise


def _held(root: Path, there: str, stack: ExitStack) -> int | None:
    """The present catalog's number of commits, given its hash.

    The catalog stays open as long as the stack: at its end, DuckDB returns all freed memory of the
    process to the system, and a forward pass may run.

    Returns:
        None if the catalog is damaged, 0 if it has other tables than today's.
    """
    try:
        if there not in noted_hashes(root):  # damage must not spread to the next catalog
            return None
        return _commits_in(stack.enter_context(attached(root)))
    except (duckdb.Error, IndexError, FileNotFoundError, Damaged):
        return None


def _commits_in(connection: duckdb.DuckDBPyConnection) -> int:
    """Commits in the catalog that is attached as `there`; 0 if it has other tables than today's."""
    version, held = connection.execute("select format_version, snapshot::int from there.snapshot").fetchall()[0]
    columns = connection.execute("select table_name, column_name from duckdb_columns()").fetchall()
    is_of_today = version == FORMAT_VERSION and column_comments().keys() <= set(columns)  # tables may gain columns
    return int(held or 0) if is_of_today else 0


def _taken(root: Path, temporary: Path, held: int) -> list[Manifest] | None:
    """Put the catalog before the present one at a path, if it was kept.

    Args:
        held: commits in the present catalog.

    Returns:
        The commits that it lacks. None if there is no such catalog, or they cannot be added to it.
    """
    try:
        if not at(root).take_earlier(CATALOG, temporary, noted_hashes(root)):
            return None
        with duckdb.connect() as connection:
            connection.execute(f"attach {located(temporary)} as there (read_only)")
            there = _commits_in(connection)
        since = manifests(root, after=there, least=held)
        if there and not any(_changes_what_is_held(manifest) for manifest in since):
            return since
    except (duckdb.Error, IndexError):
        pass
    temporary.unlink(missing_ok=True)
    return None


def _changes_what_is_held(manifest: Manifest) -> bool:
    """True if the rows of a commit cannot be added to a catalog of the commits before it.

    A drop takes rows out. A vocabulary's words belong to the type of a column.
    """
    return manifest.dropped is not None or any(part.table == "vocabularies" for part in manifest.parts)


def _extend(
    root: Path, path: Path, new: list[Manifest], create: bool, further: Callable[[], list[Manifest]] = list
) -> None:
    """Insert the rows of commits into the catalog at path, and then those of further commits."""
    if create:
        path.unlink(missing_ok=True)
    with duckdb.connect() as connection:
        connection.execute("set enable_progress_bar = false")  # `python -c` would have it on stdout, even of a pipe
        connection.execute(f"attach {located(path)} as new (storage_version '{STORAGE_VERSION}')")
        connection.execute("use new")
        connection.execute("begin")  # one transaction, comments and all: each commit is an fsync
        _insert(root, connection, new, create)
        if later := further():
            _insert(root, connection, later, create=False)
        new = [*new, *later]
        before = connection.execute("select log_xxh3_128 from snapshot").fetchall()[0][0]
        now = "update snapshot set snapshot = snapshot + ?, log_xxh3_128 = ?"
        connection.execute(now, [len(new), log_hash(new, before)])
        connection.execute("commit")
        connection.execute("checkpoint new")


def _insert(root: Path, connection: duckdb.DuckDBPyConnection, new: list[Manifest], create: bool) -> None:
    """Insert the rows of the given commits into the catalog that is attached as `new`."""
    with ExitStack() as stack:
        parts: dict[str, list[Path]] = {}
        listed = [part for manifest in live(new) for part in manifest.parts]
        for part, file in zip(listed, _parts(root, [part.path for part in listed], stack), strict=True):
            parts.setdefault(part.table, []).append(file)
        if create:
            _create(connection, parts.get("vocabularies", []))
        known = _declare(connection, parts.get("relations", [])) | every_column().keys()
        for table, paths in parts.items():
            if table not in known:
                raise Damaged(
                    f"the catalog of {root} cannot be built: {paths[0]} is of table {table!r}, which nobody declared; restore the "
                    "store from a copy"
                )
            rows = source(connection, table, paths, "new.datasets")
            connection.execute(f'insert into "{table}" by name from {rows}')
        if shards := [shard for manifest in live(new) for shard in manifest.shards]:
            connection.register("new_shards", pl.DataFrame([vars(shard) for shard in shards]))
            connection.execute("insert into shards by name select * from new_shards")


def _parts(root: Path, paths: Sequence[str], stack: ExitStack) -> Sequence[Path]:
    """The files of parts, for DuckDB, as long as the stack is open."""
    files: Sequence[Path] = []
    try:
        files = stack.enter_context(at(root).local(paths))
        for file in files:
            check_regular(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = next((path for path in paths if str(error.filename).endswith(path)), "one")
        raise Damaged(
            f"the catalog of {root} cannot be built from its parts ({missing} is missing); restore it from a copy of the store"
        ) from None
    return files


def _declare(connection: duckdb.DuckDBPyConnection, parts: list[Path]) -> set[str]:
    """Make the tables that new rows of `relations` declare; returns all declared names."""
    there = {name for (name,) in connection.execute("select name from new.relations").fetchall()}
    rows = connection.sql(f"from {rows_of(parts)}").pl().to_dicts() if parts else []
    for relation in relations(rows):
        if relation.name in there:
            raise ValueError(f"table {relation.name} is declared twice")
        for statement in relation.statements():
            connection.execute(statement)
        there.add(relation.name)
    return there


def _create(connection: duckdb.DuckDBPyConnection, vocabularies: list[Path]) -> None:
    of_words, rest = TOKEN_WORD.search(schema()), TOKEN_WORD.sub("", schema())
    assert of_words
    words = re.findall(r"'([^']+)'", re.sub(r"--.*", "", of_words[1]))
    if vocabularies:
        pieces = connection.execute(f"select token from {rows_of(vocabularies)} order by number").fetchall()
        words = list(dict.fromkeys([*words, *(piece for (piece,) in pieces)]))
    connection.register("words", pl.DataFrame({"word": words}))
    connection.execute("create type token_word as enum (select word from words)")
    connection.execute(rest)
    for (table, column), comment in column_comments().items():
        connection.execute(f"comment on column {table}.{column} is {quoted(comment)}")
    connection.execute("insert into snapshot values (?, 0, '')", [FORMAT_VERSION])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
