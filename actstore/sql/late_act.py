"""Gather `act` of a query's top SELECT for all rows at once, after the query.

DuckDB calls a function for up to 2,048 rows at a time, and for every row that an ORDER BY or a join
looks at. If the rest of a query does not depend on the result of `act`, the query can yield token
ids instead. Activations are then gathered in one call, only for the rows that the query returns.
The query's text is rewritten, `act(token_id, 'run', 'site') as x` to `token_id as x`, at the place
that DuckDB's own parser names. Any other query runs unchanged. The choice is made when the query is
prepared, so no query runs twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from actstore.errors import BadInput
from actstore.sql.asked import NAMES_ACT, Asked, Node, nodes
from actstore.sql.functions import Vectors
from actstore.sql.session import Check, Session

AS_BIGINT = (
    "TINYINT",
    "SMALLINT",
    "INTEGER",
    "BIGINT",
    "UTINYINT",
    "USMALLINT",
    "UINTEGER",
)  # types that DuckDB converts to BIGINT
PLACE = re.compile(r"(.*\nLINE \d+: (?:\.{3})?)(.*?)((?:\.{3})?\n *\^)", re.DOTALL)


class _NotPlain(Exception):
    """The columns of a rewritten query are not what was taken out."""


@dataclass(frozen=True)
class Taken:
    """A query whose `act` calls in the top SELECT are taken out.

    Attributes:
        query: yields token ids instead of activations.
        columns: (run, site) of each column to gather, by the column's name.
        params: the parameters that the query still takes.
    """

    query: str
    columns: dict[str, tuple[str, str]]
    params: dict[str, Any]


class Call(NamedTuple):
    """One `act` in a query's top SELECT."""

    alias: str
    is_plain: bool  # it takes a column, a run and a site, and nothing else
    span: tuple[int, int]  # its place in the query, in bytes
    column: tuple[int, int]  # the place of its first argument
    where: list[tuple[Any, str]]  # run and site, each as (text of a constant, name of a parameter)


class Form(NamedTuple):
    """The facts about a query that decide whether its `act` can be taken out."""

    is_row_for_row: bool  # it yields one row per input row, and ORDER BY names no column by its place
    calls: list[Call]
    names: set[str]  # all columns and tables that it mentions, in lower case
    params: list[str]  # with repeats
    params_of_calls: list[str]


def sql(
    session: Session,
    vectors: Vectors,
    asked: Asked,
    params: Mapping[str, Any] | None,
    schema: str | None = None,
    check: Check | None = None,
) -> pl.DataFrame:
    """Run a query as Session.sql does, gathering `act` afterwards if possible; raises the same."""
    taken = take_out(asked, dict(params or {}), vectors) if vectors.d_model and NAMES_ACT.search(asked.query) else None
    if not taken:
        return session.sql(asked.query, params, schema, check)
    places: dict[int, tuple[str, str]] = {}

    def check_taken(names: list[str], types: list[str]) -> None:
        lower = [name.lower() for name in names]
        for name, where in taken.columns.items():
            if lower.count(name.lower()) != 1 or types[place := lower.index(name.lower())] not in AS_BIGINT:
                raise _NotPlain
            places[place] = where
        if check:
            check(names, types)

    try:
        rows = session.sql(taken.query, taken.params, schema, check_taken)
    except _NotPlain:
        vectors.not_taken["column"] += 1
    except BadInput as error:
        if places:  # the query was prepared
            raise BadInput(_as_asked(str(error), taken.query, asked.query)) from error
    else:
        return rows.with_columns(
            _gather(vectors, rows.to_series(place), *where).alias(rows.columns[place])
            for place, where in places.items()
        )
    return session.sql(asked.query, params, schema, check)


def take_out(asked: Asked, params: dict[str, Any], vectors: Vectors) -> Taken | None:
    """Take `act` out of a query's top SELECT.

    Args:
        params: its parameters.

    Returns:
        None if there is no `act`, or another part of the query depends on it. `vectors.not_taken`
        then counts the reason: "form" for the query's own, "JSON" if DuckDB's parser uses names
        unknown to this module.
    """
    try:
        form = _read(asked.tree) if asked.is_as_written else None
    except (KeyError, TypeError):
        vectors.not_taken["JSON"] += 1
        return None
    found = _taken(form, asked.query, params) if form else None
    vectors.not_taken["form"] += found is None
    return found


def _read(tree: list[Node]) -> Form | None:
    """The form of a query; None if the query is not one SELECT.

    Raises:
        KeyError, TypeError: DuckDB's JSON has other names.
    """
    if len(tree) != 1 or tree[0]["node"]["type"] != "SELECT_NODE":
        return None
    node, modifiers = tree[0]["node"], tree[0]["node"]["modifiers"]
    calls = [item for item in node["select_list"] if item["class"] == "FUNCTION" and item["function_name"] == "act"]
    kinds = {modifier["type"] for modifier in modifiers}
    sorts = [modifier for modifier in modifiers if modifier["type"] == "ORDER_MODIFIER"]
    orders = {order["expression"]["class"] for modifier in sorts for order in modifier["orders"]}
    grouped = node["group_expressions"] or node["having"] or node["aggregate_handling"] != "STANDARD_HANDLING"
    by_place = orders & {"CONSTANT", "STAR", "PARAMETER"}
    return Form(
        is_row_for_row=not grouped and not by_place and kinds <= {"ORDER_MODIFIER", "LIMIT_MODIFIER"},
        calls=[_read_call(call) for call in calls],
        names={name.lower() for found in nodes(node, "COLUMN_REF") for name in found["column_names"]},
        params=[found["identifier"] for found in nodes(node, "PARAMETER")],
        params_of_calls=[found["identifier"] for call in calls for found in nodes(call, "PARAMETER")],
    )


def _read_call(call: Node) -> Call:
    given = [argument["expression"] for argument in call["arguments"]]
    more = (
        call["filter"] or call["distinct"] or call["order_bys"]["orders"] or any(a["name"] for a in call["arguments"])
    )
    is_plain = len(given) == 3 and given[0]["class"] == "COLUMN_REF" and not more
    spans = [
        (node["query_location"], node["query_location"] + node["query_location_length"]) for node in (call, *given)
    ]
    where = [_read_name(expression) for expression in given[1:]] if is_plain else []
    return Call(call["alias"], is_plain, spans[0], spans[1] if is_plain else (0, 0), where)


def _read_name(node: Node) -> tuple[Any, str]:
    if node["class"] == "PARAMETER":
        return None, node["identifier"]
    return node["literal"]["text"] if node["class"] == "CONSTANT" and node["literal"]["kind"] == "STRING" else None, ""


def _taken(form: Form, query: str, params: dict[str, Any]) -> Taken | None:
    """The query without its calls; None if there are none, or another part depends on one."""
    calls, aliases = form.calls, [call.alias.lower() for call in form.calls]
    of_its_own = all(aliases) and len(set(aliases)) == len(aliases) and not form.names & set(aliases)
    plain = form.is_row_for_row and all(call.is_plain for call in calls)
    if not (calls and plain and of_its_own and set(form.params) == params.keys()):
        return None
    where = {call.alias: [params[name] if name else text for text, name in call.where] for call in calls}
    columns = {
        name: (run, site) for name, (run, site) in where.items() if isinstance(run, str) and isinstance(site, str)
    }
    text = _without(query, calls)
    left = {name: it for name, it in params.items() if form.params.count(name) > form.params_of_calls.count(name)}
    return Taken(text, columns, left) if text and len(columns) == len(calls) else None


def _without(query: str, calls: list[Call]) -> str | None:
    """The text with each call, except for its first argument, replaced by blanks.

    Every place in the text (in bytes) stays the same. None if a call is written in another form,
    such as token_id.act('run', 'site').
    """
    content = bytearray(query.encode())
    for call in calls:
        (start, stop), (first, last) = call.span, call.column
        if not (start < first < last < stop <= len(content) and content[start : start + 3].lower() == b"act"):
            return None
        for begin, end in ((start, first), (last, stop)):
            content[begin:end] = re.sub(rb"[^\n]", b" ", content[begin:end])
    return content.decode()


def _as_asked(said: str, ran: str, asked: str) -> str:
    """DuckDB's message about the query that ran, with the line of the query that was asked."""
    if (found := PLACE.match(said)) and (at := ran.encode().find(found[2].encode())) >= 0:
        line = asked.encode()[at : at + len(found[2].encode())].decode(errors="replace")
        return found[1] + line + said[found.start(3) :]
    return said


def _gather(vectors: Vectors, ids: pl.Series, run: str, site: str) -> pl.Series:
    """Array(Float32, d_model) of token ids; NULL for NULL."""
    known = ids.drop_nulls().cast(pl.Int64).to_numpy()
    reader = vectors.reader(run, site) if len(known) else None
    X = reader.gather(known) if reader else np.empty((0, vectors.d_model or 0), np.float32)
    if len(known) < len(ids):
        whole = np.zeros((len(ids), X.shape[1]), np.float32)
        whole[ids.is_not_null().to_numpy()] = X
        X = whole
    mask = pa.array(ids.is_null().to_numpy()) if len(known) < len(ids) else None
    values = pa.array(X.reshape(-1))
    found = pl.from_arrow(pa.FixedSizeListArray.from_arrays(values, vectors.d_model, mask=mask))
    assert isinstance(found, pl.Series)
    return found
