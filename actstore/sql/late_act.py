"""`act` in a query's outermost SELECT, read for all rows at once behind the query instead of within it.

DuckDB calls a function for up to 2,048 rows at a time, and for every row that an ORDER BY or a join behind it looks at. Where
the rest of a query does not depend on what `act` gives, the query can yield the token ids in its place, and the activations
are gathered for the rows that come out: in one go, and for none that a LIMIT leaves out. What is rewritten is the query's own
text, `act(token_id, 'run', 'site') as x` becoming `token_id as x`, at the place that DuckDB's own parser names; a query of any
other form runs as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from actstore.errors import BadInput
from actstore.sql.asked import Node, nodes
from actstore.sql.functions import Vectors
from actstore.sql.session import Session

NAMED = re.compile(r"\bact\s*\(", re.IGNORECASE)
AS_BIGINT = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32)  # what DuckDB takes for one unasked


@dataclass(frozen=True)
class Taken:
    """A query without its outermost `act`.

    Attributes:
        query: yields the token ids in the place of their activations.
        columns: run and site of each column that is to be gathered, by its name.
        params: those that are left.
    """

    query: str
    columns: dict[str, tuple[str, str]]
    params: dict[str, Any]


def sql(
    session: Session,
    vectors: Vectors | None,
    query: str,
    params: Mapping[str, Any] | None,
    schema: str | None = None,
) -> pl.DataFrame:
    """As Session.sql; raises what it and the gather raise."""
    taken = (
        take_out(session, query, dict(params or {})) if vectors and vectors.d_model and NAMED.search(query) else None
    )
    if vectors and taken:
        try:
            rows = session.sql(taken.query, taken.params, schema)
        except BadInput:  # which shows a place in the query: below, in the one that was asked
            return session.sql(query, params, schema)
        if _is_plain(rows, taken):
            return rows.with_columns(
                _gather(vectors, rows[name], *where).alias(name) for name, where in taken.columns.items()
            )
    return session.sql(query, params, schema)


def take_out(session: Session, query: str, params: dict[str, Any]) -> Taken | None:
    """A query's outermost `act` taken out of it; None where it has none, or something rests on it."""
    try:
        parsed = json.loads(session.parse(query))
        if parsed["error"] or len(parsed["statements"]) != 1:
            return None
        node = parsed["statements"][0]["node"]
        calls = [item for item in node.get("select_list", ()) if item.get("function_name") == "act"]
        known = {found["identifier"] for found in nodes(node, "PARAMETER")}
        if not calls or known != params.keys() or not _is_row_for_row(node) or not _are_independent(node, calls):
            return None
        columns = {call["alias"]: _where(call, params) for call in calls}
        return Taken(_without(query, calls), columns, _left(node, calls, params))
    except (ValueError, KeyError, TypeError, RecursionError):  # of a form that nobody thought of
        return None


def _is_row_for_row(node: Node) -> bool:
    """Whether a SELECT yields one row for each that it looks at, in an order that names no column by its place."""
    modifiers = node["modifiers"]
    plain = node["type"] == "SELECT_NODE" and not node["group_expressions"] and not node["having"]
    kinds = {modifier["type"] for modifier in modifiers} <= {"ORDER_MODIFIER", "LIMIT_MODIFIER"}
    orders = [order["expression"]["class"] for modifier in modifiers for order in modifier.get("orders", ())]
    by_place = {"CONSTANT", "STAR", "PARAMETER"} & set(orders)
    return plain and node["aggregate_handling"] == "STANDARD_HANDLING" and kinds and not by_place


def _are_independent(node: Node, calls: list[Node]) -> bool:
    """Whether each call is of a column, under a name that is its own and stands nowhere else in the query."""
    names = [call["alias"].lower() for call in calls]
    of_columns = all(
        len(call["arguments"]) == 3
        and call["arguments"][0]["expression"]["class"] == "COLUMN_REF"
        and not any(argument["name"] for argument in call["arguments"])
        and not (call["filter"] or call["distinct"] or call["order_bys"]["orders"])
        for call in calls
    )
    said = {name.lower() for found in nodes(node, "COLUMN_REF") for name in found["column_names"]}
    return of_columns and all(names) and len(set(names)) == len(names) and not said & set(names)


def _where(call: Node, params: dict[str, Any]) -> tuple[str, str]:
    """Run and site of a call: constants, or parameters that are text."""
    found = []
    for argument in call["arguments"][1:]:
        expression = argument["expression"]
        value = expression["literal"]["text"] if "literal" in expression else params[expression["identifier"]]
        if not isinstance(value, str):
            raise TypeError
        found.append(value)
    run, site = found
    return run, site


def _without(query: str, calls: list[Node]) -> str:
    """The text, each call replaced by its first argument's; places are of bytes."""
    content = query.encode()
    for call in sorted(calls, key=lambda call: -int(call["query_location"])):
        start, stop = _span(call)
        first, last = _span(call["arguments"][0]["expression"])
        if not (start < first < last < stop and content[start : start + 3].lower() == b"act"):
            raise ValueError  # as in token_id.act('run', 'site')
        content = content[:start] + content[first:last] + content[stop:]
    return content.decode()


def _span(node: Node) -> tuple[int, int]:
    return node["query_location"], node["query_location"] + node["query_location_length"]


def _left(node: Node, calls: list[Node], params: dict[str, Any]) -> dict[str, Any]:
    """The parameters without those that the calls alone took."""
    of_calls = [found["identifier"] for call in calls for found in nodes(call, "PARAMETER")]
    everywhere = [found["identifier"] for found in nodes(node, "PARAMETER")]
    return {name: value for name, value in params.items() if everywhere.count(name) > of_calls.count(name)}


def _is_plain(rows: pl.DataFrame, taken: Taken) -> bool:
    """Whether the columns are what was taken out: token ids, and no second column of such a name."""
    for name in taken.columns:
        twin = re.compile(re.escape(name) + r"_\d+", re.IGNORECASE)
        if name not in rows.columns or any(map(twin.fullmatch, rows.columns)) or rows[name].dtype not in AS_BIGINT:
            return False
    return True


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
