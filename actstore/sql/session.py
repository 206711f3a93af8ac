"""A locked SQL session on a store's catalog: it reads the tables, and reaches nothing else.

The session can neither write nor reach files or the network. The catalog is attached read-only to
the session's own database in memory, and the file system is shut off afterwards. (DuckDB shares one
instance among all that open one path in a process, and would give a new reader an old snapshot.)
Functions and macros live in the database in memory, so the catalog stays readable for any client.
"""

from __future__ import annotations

import copy
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
from duckdb.func import PythonUDFType

from actstore.catalog import tables
from actstore.catalog.tables import CATALOG, ctrl_c, in_use, located, one_line
from actstore.errors import ActstoreError, BadInput, Damaged, LimitReached, advised
from actstore.sql import rows as rows_of
from actstore.sql.refused import refusal
from actstore.storage.at import is_unicode
from actstore.storage.machine import check_process, finalize_here, limit_reached, refuse_forked
from actstore.storage.regular import check_regular, open_regular

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from actstore.sql.rows import Rows

LOCKED = (
    "set temp_directory = ''",  # no temporary files: a query that does not fit in memory fails
    "set enable_external_access = false",
    "set disabled_filesystems = 'LocalFileSystem'",  # or COPY … (use_tmp_file false) would overwrite the catalog itself
    "set lock_configuration = true",
)
SEARCH = (
    "set search_path = 'store.main,memory.main'"  # for each cursor, which inherits neither this nor temporary macros
)
READ_ONLY = "begin transaction read only"  # for each cursor: the database in memory is not to be written, either
T = TypeVar("T")
# the classes as words: `typing` keeps what it is given, and DuckDB would call that a leak at exit
Fetch = Callable[["duckdb.DuckDBPyConnection", "duckdb.DuckDBPyRelation", str, dict[str, Any] | None], T]
Check = Callable[[list[str], list[str]], None]  # takes names and SQL types of a prepared query's columns
KEPT, LONGEST_KEPT = 64, 100_000  # parses that a session keeps, and the characters of each: 6 MB at most
LONGEST = 1_000_000  # characters of a query: DuckDB takes seconds to read more, and cannot be interrupted then
EXPLAIN = re.compile(  # the words before an explained statement, as DuckDB returns them: without a comment
    r"\Aexplain\b\s*(?:analyze\b\s*)?(?:\(\s*(?:analyze|format)\b[^()]*\)\s*)?", re.IGNORECASE
)
RAISED = re.compile(r"while executing the UDF: RuntimeError: actstore (\w+): (.*)", re.DOTALL)  # see add_function
LOOK_UP = 0.1  # seconds between checks for a Ctrl-C while a query runs
READING = (  # any other statement would write, if only to memory, or change the session for later queries
    duckdb.StatementType.SELECT,  # DESCRIBE, SHOW and SUMMARIZE are of this type, too
    duckdb.StatementType.EXPLAIN,
    duckdb.StatementType.MULTI,  # a PIVOT that first queries its columns
)


class Session:
    """One consistent snapshot of a catalog, open for queries from any thread.

    Args:
        catalog: the catalog's file.
        store: whose catalog it is, for messages; default: the folder of the file.
        memory: bytes that DuckDB may hold; default: DuckDB's own limit, 80 % of the machine's
            memory.

    Raises:
        Damaged: the catalog cannot be opened.
        Busy: a client of DuckDB has the catalog open to write.
        LimitReached: this process may have no more files open, or no more memory.
        BadInput: this process was forked from one that had opened a session.
    """

    def __init__(self, catalog: Path, store: Path | None = None, memory: int | None = None) -> None:
        self._process = os.getpid()
        self.schemas: dict[tuple[str, bool], str] = {}  # see reading/scope.py
        self.runs_of: dict[tuple[str, str | None], list[str]] = {}  # see reading/scope.py
        self._parses: dict[str, str] = {}  # by query, see parse
        self.tables: dict[str, pa.Table] = {}  # see beside
        self.has_macros = False  # see macros.py
        self.views: dict[str, str] = {}  # declared views: name → SELECT, see sql
        self.making_schemas = threading.Lock()
        refuse_forked()
        try:
            check_regular(catalog)  # DuckDB 2.0 aborts a process that may open no file more
            with ctrl_c():
                self._connection = duckdb.connect(":memory:")
                # also at the interpreter's end: functions that outlive it print what they leak
                self._close = finalize_here(self, self._connection.close)
                self._file = _attach(self._connection, catalog)
                self._close_file = finalize_here(self, os.close, self._file)
        except (duckdb.Error, OSError, MemoryError) as error:
            self.close()
            store = store or catalog.parent
            raise (
                limit_reached(error, f"cannot open {store / CATALOG}")
                or in_use(error, store)
                or Damaged(
                    f"{store / CATALOG} cannot be opened ({one_line(error)}); rebuild it with {advised('repair', store)}"
                )
            ) from error
        with ctrl_c():
            if memory is not None:
                self._connection.execute(f"set memory_limit = '{memory}B'")
            for statement in LOCKED:
                self._connection.execute(statement)

    def close(self) -> None:
        """Close the connection and the catalog's file, once; do nothing in a forked process."""
        for close in ("_close", "_close_file"):
            if hasattr(self, close):
                getattr(self, close)()

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return not self._close.alive

    def check(self) -> None:
        """Check that the session is open, and in this process.

        Raises:
            BadInput: the session is closed, or this process was forked after it was opened.
        """
        check_process(self._process)
        if self.closed:
            raise BadInput("the store is closed; open it again")

    def fileno(self) -> int:
        """Descriptor of the catalog's file that this session reads; its name may hold a newer file.

        Raises:
            BadInput: the session is closed.
        """
        self.check()
        return self._file

    def add_function(self, name: str, function: Callable[..., Any], takes: Sequence[str], gives: str) -> None:
        """Add a SQL function over Arrow columns.

        DuckDB calls the function from several threads, and returns NULL for NULL.

        Args:
            name: the function's name in SQL.
            function: takes pyarrow.ChunkedArrays of up to 2,048 rows, returns a pyarrow.Array of
                the same length.
            takes: SQL type of each argument.
            gives: SQL type of the result.
        """

        @wraps(function)  # DuckDB counts its parameters
        def passed_on(*columns: Any) -> Any:
            try:
                return function(*columns)
            except ActstoreError as error:  # DuckDB keeps only its text
                raise RuntimeError(f"actstore {error.kind}: {error}") from error

        with suppress(duckdb.Error):  # there is one where Ctrl-C came while the session's functions were added
            self._connection.remove_function(name)
        self._connection.create_function(name, passed_on, list(takes), gives, type=PythonUDFType.ARROW)

    def add_macro(self, signature: str, body: str) -> None:
        """Add a macro to this session alone.

        Args:
            signature: its name and parameters, `dot(a, b)`.
            body: an expression, or `table` and a query. The query names the store's tables in full,
                `store.main.tokens`.
        """
        with ctrl_c():
            self._connection.execute(f"create or replace macro memory.main.{signature} as {body}")

    def add_view(self, name: str, query: str) -> None:
        """Add a view to this session alone.

        Args:
            name: its full name, `main.latest_results`.
            query: a SELECT over the store's tables.
        """
        with ctrl_c(), self._connection.cursor() as cursor:
            cursor.execute(SEARCH)
            cursor.execute(f"create or replace view memory.{name} as {query}")

    def add_schema(self, name: str, views: Mapping[str, str]) -> None:
        """Add a schema of views to this session alone, all or none.

        Args:
            name: the schema's name.
            views: for each view's name, a SELECT that names the store's tables in full.
        """
        self.check()
        with ctrl_c(), self._connection.cursor() as cursor:
            cursor.execute(SEARCH)  # for a view that this session alone has, see add_view
            cursor.execute("begin")
            cursor.execute(f"create schema memory.{name}")
            for view, query in views.items():
                cursor.execute(f'create view memory.{name}."{view}" as {query}')
            cursor.execute("commit")

    def beside(self, tables: Mapping[str, pa.Table]) -> Session:
        """This session with a caller's tables beside the store's, for its own queries alone.

        The tables are views in the temporary schema of each query's cursor, and end with the query.
        What a query may reach stays as it was.

        Args:
            tables: by name; none has the name of a table of the store or of another beside it.
        """
        session = copy.copy(self)
        session.tables = {**self.tables, **tables}
        return session

    def sql(
        self,
        query: str,
        params: Mapping[str, Any] | None = None,
        schema: str | None = None,
        check: Check | None = None,
    ) -> pl.DataFrame:
        """Run one query.

        The declared views that the query names are made for it alone, in the temporary schema of
        its cursor. A view therefore reaches what the query itself could reach, and sees the tables
        of `schema`, but no other declared view that the query does not name. A view that cannot be
        made is none.

        Args:
            query: a SELECT (or FROM …, WITH …, DESCRIBE, SHOW, …); `$name` stands for a parameter.
            params: a value for each `$name`.
            schema: a schema that was added; the query finds its views before the store's tables.
            check: called with the names and SQL types of the query's columns, after the query is
                prepared and before it runs. An error of `check` is raised.

        Returns:
            A polars frame of the rows; FLOAT[n] columns arrive as Array(Float32, n).

        Raises:
            BadInput: the text is not one query, or is longer than a million characters; a parameter
                is missing or not used; DuckDB refuses the query (one line, and the place in the
                query); or the session is closed or belongs to another process.
            LimitReached: the query needs more memory than DuckDB may take.
            ActstoreError: a function of the session raised it.
        """
        return self._ask(query, params, schema, check, _as_frame)

    def rows(
        self,
        query: str,
        params: Mapping[str, Any] | None = None,
        schema: str | None = None,
        check: Check | None = None,
    ) -> Rows:
        """Run one query as `sql` does; a short result of numbers and text needs no polars."""
        return self._ask(query, params, schema, check, _as_rows)

    def _ask(
        self, query: str, params: Mapping[str, Any] | None, schema: str | None, check: Check | None, fetch: Fetch[T]
    ) -> T:
        self.check()
        if len(query) > LONGEST:
            raise BadInput(
                f"got a query of {len(query):,} characters; the longest is {LONGEST:,}: hand lists over as params, "
                "`where tree_id in (select unnest($ids))`"
            )
        if not is_unicode(query):
            raise BadInput("the query holds half of a character (a lone surrogate); write it in Unicode")
        try:
            cursor = self._connection.cursor()  # an open result holds its connection
            try:
                for name, table in self.tables.items():
                    cursor.register(name, table)
                views = self._named_in(query)
                return _interruptible(cursor, lambda: _fetch(cursor, query, params, schema, check, views, fetch))
            finally:
                with suppress(duckdb.Error):  # a second Ctrl-C may have left the query running
                    cursor.close()
        except duckdb.Error as error:
            raise self._told(error, query) from error
        except tables.polars_errors() as error:
            raise BadInput(
                f"the query yields a type that polars does not hold ({one_line(error)}); cast it, to varchar for example"
            ) from error

    def _named_in(self, query: str) -> dict[str, str]:
        """The declared views that a query reads, or may read if its parse cannot be had."""
        found = {name: sql for name, sql in self.views.items() if re.search(rf"\b{name}\b", query, re.IGNORECASE)}
        if not found or (parsed := self.parse(query).lower()).startswith('{"error":true'):
            return found
        return {name: sql for name, sql in found.items() if f'"table_name":"{name}"' in parsed}

    def look_up(self, query: str, params: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Run a short query of the package's own, and return its rows.

        The query runs in this thread, in a third of the time that `sql` takes; Ctrl-C waits for it.

        Args:
            query: a SELECT over the store's tables.
            params: see `sql`.

        Raises:
            BadInput: DuckDB refuses the query; or the session is closed or belongs to another
                process.
            LimitReached: the query needs more memory than DuckDB may take.
        """
        with self._looking_up(query) as cursor:
            rows = cursor.execute(query, dict(params) if params else None).fetchall()
            names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in rows]

    def columns(self, queries: Sequence[str]) -> list[dict[str, str]]:
        """Names and SQL types of the columns of queries, which are not run; ENUM for each enum.

        Raises:
            BadInput: see `look_up`.
        """
        found = []
        with self._looking_up("; ".join(queries)) as cursor:
            for query in queries:
                bound = cursor.sql(query)
                types = [str(dtype).partition("(")[0] for dtype in bound.types]
                found.append(dict(zip(bound.columns, types, strict=True)))
        return found

    @contextmanager
    def _looking_up(self, query: str) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor for a query of the package's own; DuckDB's errors become the package's."""
        self.check()
        try:
            with ctrl_c(), self._connection.cursor() as cursor:
                cursor.execute(SEARCH)
                cursor.execute(READ_ONLY)
                yield cursor
        except duckdb.Error as error:
            raise self._told(error, query) from error

    def _told(self, error: duckdb.Error, query: str) -> ActstoreError:
        """The package's error for an error of DuckDB."""
        if isinstance(error, duckdb.OutOfMemoryException):
            return LimitReached(f"the query needs more memory than there is: {one_line(error)}; ask for less")
        return _raised(error) or BadInput(refusal(error, query, self._tables))

    def parse(self, query: str) -> str:
        """DuckDB's parse of a query, as JSON: `error`, and without an error `statements`.

        The last parses are kept, since one query is often asked for each site, or with many
        parameters.
        """
        self.check()
        if (known := self._parses.get(query)) is not None:
            return known
        if len(query) > LONGEST or not is_unicode(query):
            return '{"error": true}'
        try:
            with self._connection.cursor() as cursor:
                parsing = "select json_serialize_sql(?)"
                found = _interruptible(cursor, lambda: str(cursor.execute(parsing, [query]).fetchall()[0][0]))
        except duckdb.Error:
            return '{"error": true}'
        if len(found) <= LONGEST_KEPT:
            if len(self._parses) >= KEPT:
                self._parses.clear()
            self._parses[query] = found
        return found

    def _tables(self) -> list[str]:
        """Names of the store's tables and views."""
        with self._connection.cursor() as cursor:
            names = cursor.execute("select table_name from information_schema.tables where table_catalog = 'store'")
            return sorted([*(name for (name,) in names.fetchall()), *self.tables, *self.views])


def _attach(connection: duckdb.DuckDBPyConnection, catalog: Path) -> int:
    """Attach a catalog as `store`, and return a descriptor of the attached file.

    Another file may take the catalog's name meanwhile.
    """
    while True:
        file = open_regular(catalog)
        try:
            connection.execute(f"attach {located(catalog)} as store (read_only)")
            if os.path.samestat(os.fstat(file), os.stat(catalog)):  # no other can have been there in between
                return file
            connection.execute("detach store")
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _raised(error: duckdb.Error) -> ActstoreError | None:
    """The package's own error that a function raised, which DuckDB passes on as text."""
    found = RAISED.search(str(error))
    return ActstoreError.of_kind(found[1], " ".join(found[2].split())) if found else None


def _check(cursor: duckdb.DuckDBPyConnection, query: str, given: set[str]) -> duckdb.Statement:
    """Refuse text that is not one query, and parameters that are not the query's own."""
    statements = cursor.extract_statements(query)
    if len(statements) != 1:
        raise BadInput(f"got {len(statements)} statements; ask one query at a time")
    try:
        kind = statements[0].type
    except ValueError:  # the Python client has no name for its type
        raise BadInput("a store is read with SELECT, and cannot do this") from None
    if kind not in READING:
        raise BadInput(f"a store is read with SELECT, and cannot do {kind.name}")
    if kind != duckdb.StatementType.SELECT and not _selects(cursor, EXPLAIN.sub("", statements[0].query, count=1)):
        raise BadInput(
            "a store is read with SELECT, and nothing else can be explained or pivoted; got another statement"
        )
    if kind == duckdb.StatementType.MULTI:  # whose parameters DuckDB does not name
        return statements[0]
    wanted = set(statements[0].named_parameters)
    if wrong := sorted(wanted ^ given):
        what = f"lacks a value for ${wrong[0]}" if wrong[0] in wanted else f"has no ${wrong[0]}"
        takes = ", ".join(f"${name}" for name in sorted(wanted)) or "no parameters"
        raise BadInput(f"the query {what}; it takes {takes}")
    return statements[0]


def _selects(cursor: duckdb.DuckDBPyConnection, query: str) -> bool:
    """True if a query is a SELECT by itself, after an EXPLAIN or as a PIVOT of several steps."""
    try:
        statements = cursor.extract_statements(query)
        if len(statements) == 1 and statements[0].type == duckdb.StatementType.MULTI:  # COPY of a PIVOT is one, too
            return len(cursor.extract_statements(f"from (\n{query}\n)")) == 1
        return len(statements) == 1 and statements[0].type == duckdb.StatementType.SELECT
    except (duckdb.Error, ValueError):  # ValueError: of a type that the Python client knows no name of
        return False


def _fetch(
    cursor: duckdb.DuckDBPyConnection,
    query: str,
    params: Mapping[str, Any] | None,
    schema: str | None,
    check: Check | None,
    views: Mapping[str, str],
    fetch: Fetch[T],
) -> T:
    cursor.execute(SEARCH if schema is None else SEARCH.replace("'", f"'memory.{schema},", 1))
    why = {name: said for name, sql in views.items() if (said := _make_view(cursor, name, sql))}
    cursor.execute(READ_ONLY)
    statement = _check(cursor, query, set(params or {}))
    given = dict(params) if params else None
    try:
        if check and statement.type == duckdb.StatementType.MULTI:  # preparing it runs it
            described = cursor.execute(f"describe {statement.query}", given).fetchall()
            check([row[0] for row in described], [row[1] for row in described])
        prepared = cursor.sql(query, params=given)
        if check and statement.type != duckdb.StatementType.MULTI:
            check(prepared.columns, list(map(str, prepared.types)))
        return fetch(cursor, prepared, query, given)
    except (duckdb.BinderException, duckdb.CatalogException) as error:
        if lacking := next((name for name in why if f"name {name} does not exist" in str(error)), None):
            raise BadInput(f"view {lacking} cannot be read: {why[lacking]}") from error
        if "\nLINE " not in str(error):
            cursor.execute(query, given)  # is refused the same, with the place in the query
        raise


def _as_frame(
    cursor: duckdb.DuckDBPyConnection, prepared: duckdb.DuckDBPyRelation, query: str, given: dict[str, Any] | None
) -> pl.DataFrame:
    return prepared.pl()


def _as_rows(
    cursor: duckdb.DuckDBPyConnection, prepared: duckdb.DuckDBPyRelation, query: str, given: dict[str, Any] | None
) -> Rows:
    columns, types = prepared.columns, list(map(str, prepared.types))
    if not rows_of.are_plain(columns, types):
        return rows_of.of_frame(prepared.pl())
    cursor.execute(query, given)
    return rows_of.fetch(cursor, columns, types)


def _make_view(cursor: duckdb.DuckDBPyConnection, name: str, sql: str) -> str:
    """Make a declared view in the temporary schema of a cursor.

    Args:
        name: an identifier.
        sql: text of anybody's.

    Returns:
        Why the view cannot be made; "" if it was.
    """
    try:
        if _check(cursor, sql, set()).type != duckdb.StatementType.SELECT:
            return "it is no SELECT"
        made = cursor.extract_statements(f'create temp view "{name}" as {sql}')
        if len(made) != 1 or made[0].type != duckdb.StatementType.CREATE:
            return "it is not one SELECT"
        cursor.execute(made[0])
        return ""
    except duckdb.OutOfMemoryException:
        raise
    except (BadInput, duckdb.Error, ValueError) as error:
        return one_line(error)


def _interruptible(cursor: duckdb.DuckDBPyConnection, fetch: Callable[[], T]) -> T:
    """Run a fetch in a thread, since Ctrl-C is not delivered while DuckDB runs in the main thread.

    The main thread wakes up regularly, since polars' signal handler does not wake a thread that
    waits without a timeout. It waits for an event, since Python 3.11 takes a thread whose join was
    interrupted for a finished one.
    """
    outcome: dict[str, Any] = {}
    done = threading.Event()

    def work() -> None:
        try:
            outcome["frame"] = fetch()
        except BaseException as error:
            outcome["error"] = error
        finally:
            done.set()

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        while not done.wait(LOOK_UP):
            pass
    except KeyboardInterrupt:
        # once would not do: an interrupt that comes before the query has begun is forgotten
        while thread.ident and not done.wait(LOOK_UP):
            cursor.interrupt()
        raise
    if "error" in outcome:
        raise outcome["error"]
    return outcome["frame"]
