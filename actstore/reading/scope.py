"""What a query sees: the whole store, one run's rows, or the trees of one run's dataset.

    store.sql(…)               every run and dataset; a warning if answers of several runs may mix
    store.of(run).sql(…)       tables hold only the run's rows, and the trees of its dataset
    store.read(…, run=run)     the trees of the run's dataset; only this run's answers, unless
                               the query names a run

Each scope is a schema of views in the session's own database, which a query finds before the
store's. `store.main.outcomes` names the whole table in every scope.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb

from actstore.errors import BadInput, SeveralRuns, advised, outside
from actstore.reading.catalog_rows import catalog_row
from actstore.sql import rows as rows_of
from actstore.sql.asked import MATTERS, NAMES_ACT, Asked
from actstore.sql.macros import NEED_FUNCTIONS
from actstore.storage.content import Count, Size, Text

if TYPE_CHECKING:
    import polars as pl

    from actstore.sql.rows import Rows
    from actstore.sql.session import Check, Session
    from actstore.sql.snapshot import Snapshot

Answer = TypeVar("Answer", "pl.DataFrame", "Rows")


def ask(
    store: Snapshot, query: str, params: Mapping[str, Any] | None, reads: str | None, check: Check | None = None
) -> pl.DataFrame:
    """Run a query in its scope.

    Args:
        store: the whole store, or the store of one run.
        query, params: see Store.sql.
        reads: the run whose activations are read at the query's token_id; None if none are read.
        check: see Session.sql.

    Raises:
        BadInput: DuckDB refuses the query, or the query uses another id as a token_id.
        NotStored: a function is asked for something that is not stored.
    """
    return _ask(store, query, params, reads, check, lambda session: session.sql, lambda frame: frame)


def rows(store: Snapshot, query: str, params: Mapping[str, Any] | None) -> Rows:
    """Run a query in its scope as `ask` does, for its rows as Python's own values."""
    return _ask(store, query, params, None, None, lambda session: session.rows, rows_of.of_frame)


def _ask(
    store: Snapshot,
    query: str,
    params: Mapping[str, Any] | None,
    reads: str | None,
    check: Check | None,
    how: Callable[[Session], Callable[..., Answer]],
    of_frame: Callable[[pl.DataFrame], Answer],
) -> Answer:
    """Run a query in its scope.

    Args:
        how: the method of the session that runs the query.
        of_frame: makes of a frame what that method returns.
    """
    session, schema, asked = store.with_macros(), None, None
    if NEED_FUNCTIONS.search(query):
        _ = store.vectors
    if reads is not None or MATTERS.search(query):
        session.check()
        asked = Asked(session, query)
        asked.refuse_other_ids(reads is not None)
    of_run = store.only or (reads if reads is not None and asked and not asked.names_a_run else None)
    if of_run is not None:
        schema = _schema(store, of_run, answers=True)
    elif reads is not None:
        schema = _schema(store, reads, answers=False)
    if asked and NAMES_ACT.search(query):
        from actstore.sql import late_act

        rows = of_frame(late_act.sql(session, store.vectors, asked, params, schema, check))
    else:
        try:
            rows = how(session)(query, params, schema, check)
        except BadInput as error:
            if not isinstance(error.__cause__, (duckdb.BinderException, duckdb.CatalogException)):
                raise
            _ = store.vectors  # a view may have named one of the functions
            rows = how(session)(query, params, schema, check)
    if asked and of_run is None:
        columns = rows.columns
        if asked.explained is not None:
            columns = [row[0] for row in session.rows(f"describe {asked.explained}", params, schema)]
        _note(store, asked.without_run(columns), schema, asked.takes_where)
    return rows


def _note(store: Snapshot, tables: Mapping[str, str], schema: str | None, takes_where: bool) -> None:
    """Warn about tables that hold answers of several runs while the query names no run."""
    found = store.session.runs_of  # a snapshot's never change
    for table in set(tables.values()):
        if (table, schema) not in found:
            rows = store.session.rows(f"select distinct run from {table}", schema=schema)
            found[table, schema] = [run for (run,) in rows]
    mixed = {alias: table for alias, table in tables.items() if len(found[table, schema]) > 1}
    if not mixed:
        return
    runs = [run for run in store.runs() if any(run in found[table, schema] for table in mixed.values())]
    condition = " and ".join(f"{alias}.run = '{runs[0]}'" for alias in mixed)
    add = f"add `where {condition}`, or ask" if takes_where else "ask"
    warnings.warn(
        f"{' and '.join(dict.fromkeys(mixed.values()))} hold the answers of {len(runs)} runs ({', '.join(runs)}), and the query "
        f"does not say whose it wants, so rows of several may stand side by side: {add} one run alone, "
        f"store.of('{runs[0]}').sql(…) ({advised('sql', store.path, '…', '--run', runs[0])})",
        SeveralRuns,
        stacklevel=outside(),
    )


def _schema(store: Snapshot, run: str, answers: bool) -> str:
    """The schema of a run's views, made when it is first needed.

    Args:
        store: the whole store, or the store of one run.
        run: a run of the store.
        answers: restrict every table to the run, and not only to the run's trees.
    """
    session = store.session
    with session.making_schemas:
        if (run, answers) not in session.schemas:
            name = f"of_{len(session.schemas)}"
            session.add_schema(name, _views(store, run, answers))
            session.schemas[run, answers] = name
    return session.schemas[run, answers]


def _views(store: Snapshot, run: str, answers: bool) -> dict[str, str]:
    """A SELECT for each table and view about a tree; with `answers`, also for those about a run."""
    rows = store.session.look_up(
        "select dataset, first_sequence_id, n_sequences, task = 'trees' as of_trees, weights_sha256, "
        "datasets.first_token_id, n_ids from runs join datasets using (dataset) where run = $run",
        {"run": run},
    )
    about = catalog_row(store, RunRow, rows)
    span = f"{{0}} >= {about.first_sequence_id} and {{0}} < {about.first_sequence_id + about.n_sequences}"
    of_set = {
        "sequence_id": span.format("sequence_id"),
        "tree_id": span.format("tree_id") if about.of_trees else "false",
        "token_id": f"token_id >= {about.first_token_id} and token_id < {about.first_token_id + about.n_ids}",  # labels
    }
    of_run = {"run": _equal("run", run)} if answers else {}
    others = {"datasets": _equal("dataset", about.dataset), "models": _equal("weights_sha256", about.weights_sha256)}
    held = store.session.rows(
        "select database_name, table_name, list(column_name) from duckdb_columns() "
        "where schema_name = 'main' and database_name in ('memory', 'store') and not internal group by all order by all"
    )
    found = {}
    for database, table, columns in held:  # if both have a table of the name, the store's comes last
        wanted = [condition for column, condition in {**of_run, **of_set}.items() if column in columns]
        if condition := (others.get(table) if answers else None) or next(iter(wanted), None):
            found[table] = f'select * from {database}.main."{table}" where {condition}'
    return found


@dataclass(frozen=True)
class RunRow:
    """A run's row in the catalog."""

    dataset: Text
    first_sequence_id: Count
    n_sequences: Count
    of_trees: bool
    weights_sha256: Text
    first_token_id: Size
    n_ids: Size


def _equal(column: str, value: str) -> str:
    return "{} = '{}'".format(column, value.replace("'", "''"))
