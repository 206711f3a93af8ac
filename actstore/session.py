"""A SQL session over a store's catalog: it reads the store's tables, and can neither write nor reach files or the network.

The catalog is attached read-only to a database in memory of the session's own (DuckDB shares one instance among all that
open one path in a process, and would hand an old snapshot to a new reader), and the file system is shut off behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import polars as pl

from actstore.errors import BadInput, Damaged

LOCKED = (
    "set enable_external_access = false",
    "set disabled_filesystems = 'LocalFileSystem'",  # else COPY … (use_tmp_file false) overwrites the catalog itself
    "set lock_configuration = true",
)


class Session:
    """One consistent snapshot of a catalog, open for queries from any thread.

    Raises:
        Damaged: the catalog cannot be opened.
    """

    def __init__(self, catalog: Path) -> None:
        self._connection = duckdb.connect(":memory:")
        try:
            self._connection.execute("attach '{}' as store (read_only)".format(str(catalog).replace("'", "''")))
        except duckdb.Error as error:
            self._connection.close()
            raise Damaged(
                f"{catalog} cannot be opened ({one_line(error)}); rebuild it with `actstore repair {catalog.parent}`"
            ) from error
        for statement in LOCKED:
            self._connection.execute(statement)

    def close(self) -> None:
        self._connection.close()

    def sql(self, query: str, params: Mapping[str, Any] | None = None) -> pl.DataFrame:
        """Run one query.

        Args:
            query: a SELECT (or FROM …, WITH …, DESCRIBE, SHOW, …); `$name` stands for a parameter.
            params: a value for each `$name`.

        Returns:
            A polars frame of its rows; FLOAT[n] columns arrive as Array(Float32, n).

        Raises:
            BadInput: DuckDB refuses the query; the message is its own first line.
        """
        cursor = self._connection.cursor()  # an open result holds its connection
        try:
            cursor.execute("use store")  # cursors do not inherit it
            return _interruptible(cursor, lambda: _fetch(cursor, query, params))
        except duckdb.Error as error:
            raise BadInput(f"the query was refused: {one_line(error)}") from error
        finally:
            cursor.close()


def _fetch(cursor: duckdb.DuckDBPyConnection, query: str, params: Mapping[str, Any] | None) -> pl.DataFrame:
    relation = cursor.sql(query, params=dict(params) if params else None)
    if relation is None:
        raise BadInput("the statement returns no rows; a store is read with SELECT")
    return relation.pl()


def _interruptible(cursor: duckdb.DuckDBPyConnection, fetch: Any) -> pl.DataFrame:
    """Run a fetch in a thread of its own, since Ctrl-C is not delivered while DuckDB runs in the main one."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["frame"] = fetch()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        cursor.interrupt()
        thread.join()
        raise
    if "error" in outcome:
        raise outcome["error"]
    return outcome["frame"]


def one_line(error: Exception) -> str:
    """DuckDB's message without the copy of the query that follows it."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = lines[: next((i for i, line in enumerate(lines) if line.startswith("LINE ")), len(lines))]
    return " ".join(line for line in kept if line)
