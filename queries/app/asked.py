"""What a store holds, a query that a person typed, and the words that complete it."""

from __future__ import annotations

import io
import re
import shlex
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from actstore import queries
from actstore.errors import ActstoreError, BadInput, advised

if TYPE_CHECKING:
    from actstore.store import Store

MOST_ROWS = 10_000  # rows of an answer that are shown, unless the query has a LIMIT of its own
LIMITED = re.compile(r"\blimit\b", re.IGNORECASE)
TIMEOUT, MEMORY = 60.0, "4GB"  # limits of a typed query: it runs in a process that is killed there
WHOLE = "all runs"  # in the place of a run's name
NAME = re.compile(r"\$([A-Za-z_]\w*)")
VECTOR = (pl.List, pl.Array)
KEYWORDS = """
select from where group by all order limit join using left on and or not in is null as distinct count avg sum min max
between like case when then else end desc asc having with union exists list
"""
FUNCTIONS = (
    "act(token_id, run, site)",
    "attention(token_id, run, site)",
    "logit_lens(token_id, run, site)",
    "probe_direction(name)",
    "activations(run, site)",
    "dot(a, b)",
    "norm(x)",
    "distance(a, b)",
    "cosine(a, b)",
    "project(x, direction)",
)
FIRST = "select role, count(*) as tokens from tokens group by all order by tokens desc"
FIRST_OF_TEXT = "select token, count(*) as tokens from tokens group by all order by tokens desc limit 100"
COUNTS = """
select
    (select count(*) from sequences) as sequences,
    (select sum(n_tokens) from sequences)::bigint as tokens,
    (select count(*) from runs) as runs,
    (select sum(bytes) from shards)::bigint as bytes,
    (select count(distinct (study, run)) from results) as answers
"""


@dataclass(frozen=True)
class Told:
    """The answer to a typed query.

    Attributes:
        frame: the rows; None after an error.
        said: one line: the number of rows, or the error.
        is_whole: whether the query has no further rows.
    """

    frame: pl.DataFrame | None
    said: str
    is_whole: bool = True


def counts(store: Store) -> str:
    """What a store holds, in one sentence."""
    row = store.sql(COUNTS).row(0, named=True)
    return (
        f"{_n(row['sequences'], 'sequence')} of {row['tokens'] or 0:,} tokens; {_n(row['runs'], 'run')}, with "
        f"{(row['bytes'] or 0) / 1e9:.2f} GB of activations; {_n(row['answers'], 'answer')} of studies. Snapshot {store.snapshot}."
    )


def older(store: Store) -> str:
    """What a store is told whose catalog an earlier version made."""
    command = advised("repair", store.path)
    return (
        f"An earlier version made this store's catalog, so each start builds it anew; {command} brings it up to date."
    )


def _n(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def is_text(store: Store) -> bool:
    """Whether a store holds no tree."""
    return not store.sql("select count(*) from trees").item()


def of_text(store: Store) -> list[str]:
    """The runs over sequences that are no trees."""
    query = "select run from runs join datasets using (dataset) where coalesce(task, 'trees') <> 'trees' order by runs.rowid"
    return store.sql(query)["run"].to_list()


def words(store: Store) -> dict[str, Any]:
    """What the SQL box completes: tables with their columns, functions, keywords and named queries.

    Returns:
        tables: name → columns; queries: name → SQL without its header; functions and keywords.
    """
    tables: dict[str, list[str]] = {}
    for table, column in store.schema().select("table", "column").iter_rows():
        tables.setdefault(table, []).append(column)
    for view in store.tables:
        if view not in tables:
            tables[view] = store.sql(f'describe "{view}"')["column_name"].to_list()
    named = {name: _body(queries.load(name).sql) for name in queries.names()}
    return {"tables": tables, "queries": named, "functions": list(FUNCTIONS), "keywords": KEYWORDS.split()}


def _body(sql: str) -> str:
    lines = sql.splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("--"))
    return "\n".join(lines[first:]).strip()


def parameters(text: str, run: str | None, given: str) -> dict[str, str]:
    """The parameters of a query: `$run` is the chosen run, the others are given as `n=20 seed=0`.

    Raises:
        BadInput: a word is not NAME=VALUE.
    """
    values = {} if run is None else {"run": run}
    try:
        listed = shlex.split(given)
    except ValueError as error:
        raise BadInput(f"got the parameters {given!r} ({error}); give NAME=VALUE, such as n=20") from None
    for word in listed:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise BadInput(f"got the parameter {word!r}; give NAME=VALUE, such as n=20")
        values[name.removeprefix("$")] = value
    return {name: values[name] for name in dict.fromkeys(NAME.findall(text)) if name in values}


def ask(store: Store, text: str, run: str | None = None, given: str = "", most: int | None = MOST_ROWS) -> Told:
    """Run a typed query with limits of time and memory; an error becomes one line.

    Args:
        text: one SELECT.
        run: a run, in whose session the query is asked; None for the whole store.
        given: parameters, `n=20 seed=0`.
        most: the most rows of a query without a LIMIT of its own; None for all.
    """
    text = text.strip().rstrip(";")
    if not text:
        return Told(None, "Type a query, and press Ctrl-Enter.")
    try:
        asked = store if run is None else store.of(run)
        values = parameters(text, run, given) or None
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            frame = None
            if most is not None and not LIMITED.search(text):
                with suppress(BadInput):  # what takes no LIMIT (DESCRIBE), or is wrong, which is said below
                    frame = asked.sql(f"{text}\nlimit {most + 1}", values, timeout=TIMEOUT, memory=MEMORY)
            if frame is None:
                notes.clear()
                frame, most = asked.sql(text, values, timeout=TIMEOUT, memory=MEMORY), None
    except ActstoreError as error:
        return Told(None, " ".join(str(error).split()))
    further = most is not None and len(frame) > most
    said = (
        f"the first {most:,} rows, and there are more: the Parquet file has all" if further else _n(len(frame), "row")
    )
    told = ". ".join([said, *(" ".join(str(note.message).split()) for note in notes)])
    return Told(frame[:most] if further else frame, told, not further)


def whole(store: Store, text: str, run: str | None = None, given: str = "") -> bytes:
    """Every row of a typed query, as a Parquet file.

    Raises:
        BadInput: the query cannot be answered; it reaches a limit, say.
    """
    told = ask(store, text, run, given, most=None)
    if told.frame is None:
        raise BadInput(told.said)
    buffer = io.BytesIO()
    told.frame.write_parquet(buffer)
    return buffer.getvalue()


def vectors(frame: pl.DataFrame) -> list[str]:
    """The columns that hold vectors of numbers."""
    return [
        name
        for name, dtype in frame.schema.items()
        if isinstance(dtype, VECTOR) and dtype.inner is not None and dtype.inner.is_numeric()
    ]
