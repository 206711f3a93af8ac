"""Translate parts of a polars predicate to SQL that is true, false or NULL exactly as polars says.

polars passes a predicate whose literals already have the types of the columns next to them. Its
JSON names each node. The translation is an allow-list: a node of another kind, or with an
additional field, stays with polars. So do arithmetic (UInt8 wraps in polars and not in DuckDB), the
order of enums (by place in polars, by spelling in DuckDB), lossy casts, and floats (JSON has no
NaN).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

MOST_VALUES = 10_000  # values of an is_in; parsing more takes longer than polars takes to compare
FIELDS = {  # all that a node of each kind has; one with others is of a later polars, and means who knows what
    "BinaryExpr": {"left", "op", "right"},
    "Function": {"input", "function"},
    "Ternary": {"predicate", "truthy", "falsy"},
    "Cast": {"expr", "dtype", "options"},
    "Literal": {"Scalar"},
}
LOGIC = {"And": "and", "Or": "or"}
EQUALITY = {
    "Eq": "=",
    "NotEq": "<>",
    "EqValidity": "is not distinct from",  # eq_missing: NULL equals NULL
    "NotEqValidity": "is distinct from",
}
ORDER = {"Lt": "<", "LtEq": "<=", "Gt": ">", "GtEq": ">="}
CLOSED = {"Both": (">=", "<="), "Left": (">=", "<"), "Right": (">", "<="), "None": (">", "<")}
INTEGERS: dict[str, pl.DataType] = {
    str(dtype): dtype() for dtype in (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64)
}
IS_IN = {"Boolean": {"IsIn": {"nulls_equal": False}}}
TESTS = {"IsNull": "is null", "IsNotNull": "is not null"}


class _NotTranslated(Exception):
    """A node that polars evaluates itself."""


@dataclass(frozen=True)
class Column:
    """A column of a scan.

    Attributes:
        sql: SQL for the column's value in the catalog.
        dtype: its type in polars.
    """

    sql: str
    dtype: pl.DataType


@dataclass(frozen=True)
class Pushed:
    """A predicate in two parts; rows must satisfy both.

    Attributes:
        where: SQL conditions for the catalog.
        params: a value for each `$name` in them.
        rest: the predicates left to polars.
    """

    where: list[str] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    rest: list[pl.Expr] = field(default_factory=list)


def push(predicate: pl.Expr, columns: Mapping[str, Column]) -> Pushed:
    """Split a predicate on its ANDs, and translate each part that can be translated.

    Args:
        predicate: as polars passes it to a source, literals coerced to the columns' types.
        columns: the catalog's columns; a part that mentions another column is not translated.
    """
    pushed = Pushed()
    for part, node in _conjuncts(predicate):
        translation = _Translation(columns, len(pushed.params))
        try:
            pushed.where.append(translation.boolean(node))
            pushed.params.update(translation.params)
        except _NotTranslated:
            pushed.rest.append(part)
    return pushed


def _conjuncts(predicate: pl.Expr) -> Iterator[tuple[pl.Expr, Any]]:
    """The parts that must all hold, each with its JSON.

    The parts themselves never pass through JSON, which would change floats.
    """
    waiting = [predicate]
    while waiting:
        part = waiting.pop()
        try:
            node = json.loads(part.meta.serialize(format="json"))
        except Exception:  # the expression has no JSON
            node = None
        match node:
            case {"BinaryExpr": {"op": "And"}}:
                waiting += part.meta.pop()
            case _:
                yield part, node


@dataclass
class _Operand:
    """One side of a comparison, as SQL.

    A string literal has no SQL yet, since its type is that of the other side.
    """

    sql: str
    dtype: pl.DataType
    text: str | None = None


@dataclass
class _Translation:
    columns: Mapping[str, Column]
    n_before: int
    params: dict[str, str] = field(default_factory=dict)

    def boolean(self, node: Any) -> str:
        """SQL of a node that is true, false or NULL."""
        match _kind(node):
            case "Alias", [inner, _]:
                return self.boolean(inner)
            case "Column", str(name) if name in self.columns and self.columns[name].dtype == pl.Boolean:
                return self.columns[name].sql
            case "Literal", {"Scalar": {"Boolean": bool(value)}}:
                return str(value).lower()
            case "Literal", {"Scalar": {"Null": "Boolean"}}:
                return "null::boolean"
            case "BinaryExpr", {"left": left, "op": op, "right": right} if op in LOGIC:
                return f"({self.boolean(left)} {LOGIC[op]} {self.boolean(right)})"
            case "BinaryExpr", {"left": left, "op": str(op), "right": right}:
                return self._comparison(left, op, right)
            case "Ternary", {"predicate": when, "truthy": then, "falsy": otherwise}:
                # polars' result if the column's type cannot hold the number
                return f"(case when {self.boolean(when)} then {self.boolean(then)} else {self.boolean(otherwise)} end)"
            case "Function", {"input": list(inputs), "function": function}:
                return self._function(inputs, function)
        raise _NotTranslated

    def _function(self, inputs: list[Any], function: Any) -> str:
        match function, inputs:
            case {"Boolean": "Not"}, [operand]:
                return f"(not {self.boolean(operand)})"
            case {"Boolean": "IsNull" | "IsNotNull" as test}, [operand] if len(function) == 1:
                return f"({self._nullable(operand)} {TESTS[test]})"
            case {"Boolean": {"IsBetween": {"closed": str(closed), **others}}}, [value, low, high] if not others:
                from_low, to_high = CLOSED[closed]
                sql = [self._integer(operand) for operand in (value, low, high)]
                return f"({sql[0]} {from_low} {sql[1]} and {sql[0]} {to_high} {sql[2]})"
            case _, [value, values] if function == IS_IN:
                return self._is_in(self._operand(value), values)
        raise _NotTranslated

    def _nullable(self, node: Any) -> str:
        match _kind(node):
            case "Column", str(name) if name in self.columns:
                return self.columns[name].sql
        return self.boolean(node)

    def _comparison(self, left: Any, op: str, right: Any) -> str:
        if op in ORDER:
            return f"({self._integer(left)} {ORDER[op]} {self._integer(right)})"
        if op not in EQUALITY:
            raise _NotTranslated
        try:
            a, b = self._operand(left), self._operand(right)
        except _NotTranslated:
            return f"({self.boolean(left)} {EQUALITY[op]} {self.boolean(right)})"
        if a.text is not None or b.text is not None:
            a, b = self._spelled(a, b.dtype), self._spelled(b, a.dtype)
        if a.dtype != b.dtype:
            raise _NotTranslated
        return f"({a.sql} {EQUALITY[op]} {b.sql})"

    def _integer(self, node: Any) -> str:
        operand = self._operand(node)
        if not operand.dtype.is_integer():
            raise _NotTranslated
        return operand.sql

    def _operand(self, node: Any) -> _Operand:
        """A column, or a literal of integers or text that is not NULL."""
        match _kind(node):
            case "Alias", [inner, _]:
                return self._operand(inner)
            case "Column", str(name) if name in self.columns:
                column = self.columns[name]
                if column.dtype.is_integer() or column.dtype == pl.String or isinstance(column.dtype, pl.Enum):
                    return _Operand(column.sql, column.dtype)
            case "Cast", {"expr": inner, "dtype": {"Literal": str(name), **others}} if name in INTEGERS and not others:
                operand, wider = self._operand(inner), INTEGERS[name]
                if operand.dtype.is_integer() and _holds(wider, operand.dtype):
                    return _Operand(operand.sql, wider)
            case "Literal", {"Scalar": {"String": str(text)}}:
                return _Operand("", pl.String(), text)
            case "Literal", {"Scalar": {"Enum": _}}:
                literal = _evaluated(node)
                if isinstance(literal.dtype, pl.Enum):
                    return _Operand(self._member(literal[0], literal.dtype), literal.dtype)
            case "Literal", {"Scalar": dict(scalar)} if len(scalar) == 1:
                ((name, value),) = scalar.items()
                if name in INTEGERS and type(value) is int:
                    return _Operand(f"({value})", INTEGERS[name])
        raise _NotTranslated

    def _spelled(self, operand: _Operand, beside: pl.DataType) -> _Operand:
        """Give a string literal the type of the other side; anything else is unchanged."""
        if operand.text is None:
            return operand
        if isinstance(beside, pl.Enum):
            return _Operand(self._member(operand.text, beside), beside)
        return _Operand(self._parameter(operand.text), pl.String())

    def _member(self, text: str, dtype: pl.Enum) -> str:
        if text not in dtype.categories:  # polars has a say in what comes of it
            raise _NotTranslated
        return "'{}'".format(text.replace("'", "''"))

    def _parameter(self, text: str) -> str:
        name = f"p{self.n_before + len(self.params)}"
        self.params[name] = text
        return f"${name}"

    def _is_in(self, operand: _Operand, values: Any) -> str:
        literals = _list(values)
        if operand.text is not None or literals.dtype != operand.dtype:
            raise _NotTranslated
        members = (
            literals.drop_nulls().unique().to_list()
        )  # a NULL in the list equals nothing, and does not make the result unknown
        if not 0 < len(members) <= MOST_VALUES:
            raise _NotTranslated
        if isinstance(operand.dtype, pl.Enum):
            sql = [self._member(member, operand.dtype) for member in members]
        else:
            sql = [self._parameter(member) if operand.dtype == pl.String else f"({member})" for member in members]
        return f"({operand.sql} in ({', '.join(sql)}))"


def _kind(node: Any) -> tuple[str, Any]:
    """A node's kind and its content.

    Raises:
        _NotTranslated: the node has other fields than its kind.
    """
    if not isinstance(node, dict) or len(node) != 1:
        raise _NotTranslated
    ((kind, content),) = node.items()
    if kind in FIELDS and (not isinstance(content, dict) or set(content) != FIELDS[kind]):
        raise _NotTranslated
    return kind, content


def _list(node: Any) -> pl.Series:
    """The values of a literal list, in their own type."""
    match _kind(node):
        case "Alias", [inner, _]:
            return _list(inner)
        case "Literal", {"Scalar": {"List": _}}:
            return _evaluated(node).explode()
    raise _NotTranslated


def _evaluated(literal: Any) -> pl.Series:
    """The value of a literal that JSON holds as Arrow's bytes."""
    return pl.select(pl.Expr.deserialize(io.StringIO(json.dumps(literal)), format="json")).to_series()


def _holds(wider: pl.DataType, narrower: pl.DataType) -> bool:
    """True if the wider integer type holds every number of the narrower."""
    (low, high), (lowest, highest) = _ends(narrower), _ends(wider)
    return lowest <= low and high <= highest


def _ends(dtype: pl.DataType) -> tuple[int, int]:
    bits = int(str(dtype).lstrip("UInt"))
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.is_signed_integer() else (0, 2**bits - 1)
