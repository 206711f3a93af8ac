"""A run's tokens as a polars LazyFrame, with tree, edge and activation; it reads what is asked.

    tokens ⟕ edges ⟗ trees ⟕ your tables → rows that a filter keeps → x of these rows

polars says which columns and rows it wants. DuckDB applies what it can of a filter (see
sql/pushdown.py), polars the rest, and activations are copied last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source

from actstore.arrays.site import Reader
from actstore.catalog.declared import identifier
from actstore.errors import BadInput
from actstore.reading.catalog_rows import catalog_row, catalog_rows
from actstore.reading.labelled import refuse_twice, whole_keys
from actstore.sql.pushdown import Column, Pushed, push
from actstore.storage.content import Count, Positive

if TYPE_CHECKING:
    from actstore.reading.opened import Opened

X = "x"
BATCH_ROWS = 16_384  # handed to polars at once: at d_model 128, 8 MiB of activations
QUERY_ROWS = 2**20  # tokens one query looks at, so that the columns of a large run are not all in memory at once
KEYS = ("token_id", "sequence_id", "tree_id")  # by the first that a caller's table has, its rows are found
RENAMED = {("edges", "step"): "edge_step"}  # the edge's step along the path; `step` is the token's own


def scan(store: Opened, run: str, site: str) -> pl.LazyFrame:
    """See Store.scan.

    Args:
        store: holds the caller's tables, see Opened.beside.
    """
    reader = store.reader(run, site)
    x = pl.Series(X, reader.gather(np.empty(0, np.int64)))
    tables = _tables(store, run)
    given = {name: _key(store, name) for name in store.session.tables}
    columns = _columns(store, tables)
    for name, key in given.items():
        columns |= _given_columns(store, name, key, columns)
    source = _Source(store, reader, columns, tables, given, *_extent(store, run, site))
    schema = {**{name: column.dtype for name, column in source.columns.items()}, X: x.dtype}
    return register_io_source(source.batches, schema=schema, validate_schema=True, explain_name=f"{run} {site}")


@dataclass(frozen=True)
class _Source:
    """What polars calls when a scan is collected.

    Attributes:
        columns: the catalog's columns, all but x.
        tables: the store's tables that hold them, tokens first.
        given: the caller's tables, and the key of each.
        spans: [first, stop) of the site's sequence_ids, in order.
        n_positions: tokens of the longest sequence.
        fewest: tokens of the shortest sequence.
    """

    store: Opened
    reader: Reader
    columns: dict[str, Column]
    tables: list[str]
    given: dict[str, str]
    spans: list[tuple[int, int]]
    n_positions: int
    fewest: int

    def batches(
        self, with_columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        """Frames of the columns wanted, in the order of token_id, of the rows that pass the filter.

        With `n_rows`, polars limits first and filters second, so the filter must not be pushed
        down.
        """
        wanted = [*self.columns, X] if with_columns is None else with_columns
        if predicate is None:
            pushed = Pushed()
        else:
            pushed = push(predicate, self.columns) if n_rows is None else Pushed(rest=[predicate])
        of_x = [part for part in pushed.rest if X in part.meta.root_names()]
        of_rows = [part for part in pushed.rest if X not in part.meta.root_names()]
        judged = {name for part in pushed.rest for name in part.meta.root_names()}
        needed = [name for name in self.columns if name in judged or name in wanted]
        for rows in self._rows(needed, pushed, n_rows):
            for frame in rows.filter(*of_rows).iter_slices(min(batch_size or BATCH_ROWS, BATCH_ROWS)):
                if of_x or X in wanted:
                    frame = frame.with_columns(pl.Series(X, self.reader.gather(frame["token_id"].to_numpy())))
                yield frame.filter(*of_x).select(wanted)

    def _rows(self, needed: list[str], pushed: Pushed, n_rows: int | None) -> Iterator[pl.DataFrame]:
        """Frames of the catalog's columns, in order, of the first n_rows or of all rows."""
        for first, stop in self._pieces(n_rows):
            rows = self.store.sql(self._query(needed, pushed, first, stop), pushed.params)
            if not rows["token_id"].is_sorted():  # they lie in order, but a join may shuffle them
                rows = rows.sort("token_id")
            if n_rows is not None:
                rows = rows.head(n_rows)
                n_rows -= len(rows)
            enums = {name: self.columns[name].dtype for name in needed if isinstance(self.columns[name].dtype, pl.Enum)}
            yield rows.with_columns(pl.col(name).cat.to(dtype) for name, dtype in enums.items())
            if n_rows == 0:
                return

    def _pieces(self, n_rows: int | None) -> Iterator[tuple[int, int]]:
        """[first, stop) of each query's sequences."""
        n_sequences = max(1, QUERY_ROWS // self.n_positions)
        if n_rows is not None:
            n_sequences = min(n_sequences, n_rows // self.fewest + 1)
        for first, stop in self.spans:
            for start in range(first, stop, n_sequences):
                yield start, min(start + n_sequences, stop)

    def _query(self, needed: list[str], pushed: Pushed, first: int, stop: int) -> str:
        select = ["tokens.token_id", *[self._selected(name) for name in needed if name != "token_id"]]
        conditions = " and ".join(pushed.where) or "true"
        mentioned = " ".join([*select, conditions])
        in_span = f"where {{0}} >= {first} and {{0}} < {stop}".format
        joins = {
            "edges": f"left join (select * from edges {in_span('tree_id')}) as edges using (tree_id, edge)",
            "trees": f"join (select * from trees {in_span('tree_id')}) as trees using (tree_id)",
        }
        for table in self.tables[1:]:
            if table not in joins:
                joins[table] = (
                    f"left join (select * from {table} {in_span('sequence_id')}) as {table} using (sequence_id)"
                )
        for table, key in self.given.items():
            joins[table] = f"left join {identifier(table)} using ({key})"
        joined = " ".join(join for table, join in joins.items() if f"{identifier(table)}." in mentioned)
        tokens = f"(select * from tokens {in_span('sequence_id')}) as tokens"
        return f"select {', '.join(select)} from {tokens} {joined} where {conditions}"

    def _selected(self, name: str) -> str:
        column = self.columns[name]
        return f'{f"enum_code({column.sql})" if isinstance(column.dtype, pl.Enum) else column.sql} as "{name}"'


def _tables(store: Opened, run: str) -> list[str]:
    """tokens, and the tables that add columns: edges and trees, or those of the run's text."""
    of_run = store.sql("select dataset, task from runs join datasets using (dataset) where run = $run", {"run": run})
    if of_run["task"][0] == "trees":
        return ["tokens", "edges", "trees"]
    of_documents = "select name from relations where owner = $dataset and kind = 'documents'"
    return ["tokens", "sequences", *store.sql(of_documents, {"dataset": of_run["dataset"][0]})["name"]]


def _columns(store: Opened, tables: list[str]) -> dict[str, Column]:
    """The columns of tokens, then those that each further table adds."""
    columns: dict[str, Column] = {}
    enums: dict[str, str] = {}  # the queries for their values
    for table in tables:
        for name, dtype in store.sql(f"select * from {identifier(table)} limit 0").schema.items():
            name_here = RENAMED.get((table, name), name)
            if name_here not in columns:  # not a key of the joins
                columns[name_here] = Column(f"{identifier(table)}.{identifier(name)}", dtype)
                if dtype == pl.Categorical:  # DuckDB returns an enum without its values
                    enums[name_here] = f"enum_range((select {identifier(name)} from {identifier(table)} limit 0))"
    if enums:
        values = store.sql(f"select {', '.join(enums.values())}").row(0)
        for name, words in zip(enums, values, strict=True):
            columns[name] = replace(columns[name], dtype=pl.Enum(words))
    return columns


def _key(store: Opened, table: str) -> str:
    """The column by which the rows of a caller's table are found.

    Raises:
        BadInput: there is none, it holds no integers, or two rows have one key.
    """
    names = store.sql(f"select * from {identifier(table)} limit 0").columns
    key = next((key for key in KEYS if key in names), None)
    if key is None:
        raise BadInput(
            f"table {table!r} has {', '.join(names)}; a scan joins it by a column {', '.join(KEYS)}: give one"
        )
    refuse_twice(
        whole_keys(store.sql(f"select {key} from {identifier(table)}")[key], f"table {table!r}"), "give each one row"
    )
    return key


def _given_columns(store: Opened, table: str, key: str, known: dict[str, Column]) -> dict[str, Column]:
    """The columns that a caller's table adds.

    Raises:
        BadInput: the scan has a column of that name.
    """
    found = _columns(store, [table])
    del found[key]
    there = {name.lower() for name in (*known, X)}
    if taken := [name for name in found if name.lower() in there]:
        raise BadInput(f"table {table!r} has a column {taken[0]}, as the scan does; rename or drop it")
    return found


def _extent(store: Opened, run: str, site: str) -> tuple[list[tuple[int, int]], int, int]:
    """Spans of the site's sequences, the most tokens of a sequence, and the fewest."""
    shards = store.sql(
        "select shards.first_tree_id, shards.first_tree_id + shards.n_trees from shards join sites using (run, site) "
        "where run = $run and $site in (site, short) order by all",
        {"run": run, "site": site},
    )
    spans: list[tuple[int, int]] = []
    for first, stop in catalog_rows(store, tuple[Count, Positive], shards.rows()):
        if spans and spans[-1][1] == first:
            first, _ = spans.pop()
        spans.append((first, stop))
    sizes = store.sql(
        "select n_positions, coalesce(3 * n_nodes, 1) from runs join datasets using (dataset) where run = $run",
        {"run": run},
    )
    n_positions, fewest = catalog_row(store, tuple[Positive, Positive], sizes.rows())
    return spans, n_positions, fewest
