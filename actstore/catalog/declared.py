"""Tables that a dataset or a user declares: a name, a key and typed columns, never SQL; and views.

A declaration is a row of `relations`. Its columns are JSON, [[name, type, comment], …], the key
first, and are checked here before a statement is made of them: a store of another's may declare
anything. A view is one SELECT. No catalog holds it: a locked session makes it for the queries that
name it, see Session.sql.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import duckdb
import msgspec

from actstore.catalog.tables import column_comments, ctrl_c, quoted, schema
from actstore.errors import BadInput
from actstore.storage.content import Text, as_a

if TYPE_CHECKING:
    import polars as pl

Grain = Literal["token", "sequence"]
Kind = Literal["documents", "labels"]
NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
BASES = ("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "FLOAT", "DOUBLE", "VARCHAR", "DATE", "TIMESTAMP")
TYPE = re.compile(rf"({'|'.join(BASES)})(\[\])?|FLOAT\[([1-9][0-9]{{0,5}})\]")
KEYS: dict[str, str] = {"token": "token_id", "sequence": "sequence_id"}
OURS = frozenset({"asof", "grant", "main", "memory", "store", "system", "temp"})  # words of DuckDB, or of a session
MOST_COLUMNS = 1000
LONGEST_VIEW = 100_000  # characters


@dataclass(frozen=True)
class Relation:
    """A declared table.

    Attributes:
        name: of the table, an identifier in lower case.
        grain: its key is token_id or sequence_id.
        kind: columns of a dataset's input, or a user's labels.
        owner: name of the dataset, or of the label.
        columns: name, type and comment of each column; the key is the first.

    Raises:
        ValueError: a name or a type is not allowed.
    """

    name: Text
    grain: Grain
    kind: Kind
    owner: Text
    columns: list[tuple[Text, Text, str]]

    def __post_init__(self) -> None:
        if why := not_a_name(self.name):
            raise ValueError(f"a table cannot be named {self.name!r} ({why})")
        names = [name for name, _, _ in self.columns]
        if not names or (names[0], self.columns[0][1]) != (KEYS[self.grain], "BIGINT"):
            raise ValueError(f"table {self.name} does not begin with {KEYS[self.grain]} BIGINT")
        if len({name.lower() for name in names}) < len(names) or len(names) > MOST_COLUMNS:
            raise ValueError(f"table {self.name} has two columns of one name, or more than {MOST_COLUMNS}")
        for name, dtype, _ in self.columns:
            if not TYPE.fullmatch(dtype) or not 0 < len(name) <= 200 or "\x00" in name:
                raise ValueError(f"table {self.name} has a column {name[:60]!r} of type {dtype[:60]!r}")

    @property
    def key(self) -> str:
        """The column by which rows are found."""
        return KEYS[self.grain]

    def row(self) -> dict[str, Any]:
        """The row of `relations`."""
        declared = json.dumps([list(column) for column in self.columns])
        return {"name": self.name, "grain": self.grain, "kind": self.kind, "owner": self.owner, "declared": declared}

    def statements(self) -> list[str]:
        """SQL that makes the empty table, with its comments."""
        columns = ", ".join(f"{identifier(name)} {dtype}" for name, dtype, _ in self.columns)
        comments = [
            f"comment on column {identifier(self.name)}.{identifier(name)} is {quoted(comment)}"
            for name, _, comment in self.columns
            if comment
        ]
        return [f"create table {identifier(self.name)} ({columns})", *comments]

    def fit(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows with the declared columns and types, as their part holds them.

        Raises:
            BadInput: a column is missing or has another type.
        """
        import polars as pl

        try:
            return rows.select(pl.col(name).cast(polars_type(dtype)) for name, dtype, _ in self.columns)
        except pl.exceptions.PolarsError as error:
            raise BadInput(f"the rows do not fit table {self.name}: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class View:
    """A declared view.

    Attributes:
        name: of the view, an identifier in lower case.
        sql: its SELECT, which a session has to check.

    Raises:
        ValueError: the name is not allowed, or the text cannot be SQL.
    """

    name: Text
    sql: str

    def __post_init__(self) -> None:
        if why := not_a_name(self.name):
            raise ValueError(f"a view cannot be named {self.name!r} ({why})")
        if not self.sql.strip() or "\x00" in self.sql or len(self.sql) > LONGEST_VIEW:
            raise ValueError(
                f"view {self.name} has {len(self.sql):,} characters; it is a SELECT of {LONGEST_VIEW:,} at most, without NUL"
            )

    def row(self) -> dict[str, Any]:
        """The row of `relations`."""
        declared = json.dumps({"sql": self.sql})
        return {"name": self.name, "grain": None, "kind": "view", "owner": self.name, "declared": declared}

    def statements(self) -> list[str]:
        """None: a catalog holds no declared view."""
        return []


def parsed_view(row: Mapping[str, Any]) -> View:
    """A view from its row of `relations`.

    Raises:
        ValueError: the row declares what is not allowed.
    """
    try:
        declared = msgspec.json.decode(row["declared"] or "{}")
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"a declared view is no JSON ({error})") from error
    if not isinstance(declared, dict) or row["owner"] != row["name"]:
        raise ValueError("a declared view has no SQL, or another owner than itself")
    return as_a(View, {"name": row["name"], "sql": declared.get("sql")})


def parsed(row: Mapping[str, Any]) -> Relation:
    """A declaration from its row of `relations`.

    Raises:
        ValueError: the row declares what is not allowed.
    """
    try:
        columns = msgspec.json.decode(row["declared"] or "[]")
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"a declared table is no JSON ({error})") from error
    return as_a(Relation, {**{key: row[key] for key in ("name", "grain", "kind", "owner")}, "columns": columns})


def declare(
    name: str, grain: Grain, kind: Kind, owner: str, rows: pl.DataFrame, comments: Mapping[str, str] | None = None
) -> Relation:
    """Declare a table that holds these rows.

    Args:
        rows: has the key as a column; it becomes the first.
        comments: of columns.

    Raises:
        BadInput: the name is taken or no identifier, or a column's type is not allowed.
    """
    if why := not_a_name(name):
        raise BadInput(f"got the name {name!r} for a table ({why}); use lower-case letters, digits and _")
    key = KEYS[grain]
    columns = [(key, "BIGINT", f"{'tokens' if grain == 'token' else 'sequences'}.{key}")]
    for column, dtype in rows.schema.items():
        if column != key:
            columns.append((column, _duckdb_type(column, dtype), (comments or {}).get(column, "")))
    try:
        return Relation(name, grain, kind, owner, columns)
    except ValueError as error:
        raise BadInput(f"{error}; rename it") from error


def not_a_name(name: str) -> str:
    """Why a declared table cannot have this name; "" if it can."""
    if not NAME.fullmatch(name):
        return "no identifier of lower-case letters, digits and _, 63 of them at most"
    if name in OURS | _reserved():
        return "a word of SQL"
    if name in {table for table, _ in column_comments()} or re.search(
        rf"^create (view|type) {name}\b", schema(), re.MULTILINE
    ):
        return "a table or view of every store"
    return ""


@cache
def _reserved() -> frozenset[str]:
    """The words that SQL does not take for a name."""
    with ctrl_c(), duckdb.connect() as connection:
        words = connection.execute("select keyword_name from duckdb_keywords() where keyword_category = 'reserved'")
        return frozenset(word for (word,) in words.fetchall())


def as_name(text: str) -> str:
    """A dataset's name as the name of its table: lower case, other characters as _."""
    name = re.sub(r"[^a-z0-9_]+", "_", text.lower()).strip("_")[:55] or "documents"
    name = name if name[0].isalpha() else f"t_{name}"
    return f"{name}_documents" if not_a_name(name) else name


def identifier(name: str) -> str:
    """A name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def polars_type(dtype: str) -> pl.DataType:
    """The polars type of a declared type."""
    import polars as pl

    found = TYPE.fullmatch(dtype)
    assert found
    if found[3]:
        return pl.Array(pl.Float32, int(found[3]))
    base = _polars()[found[1]]
    return pl.List(base) if found[2] else base


@cache
def _polars() -> dict[str, pl.DataType]:
    """The polars type of each of BASES."""
    import polars as pl

    whole = (pl.Int8(), pl.Int16(), pl.Int32(), pl.Int64())
    others = (pl.Float32(), pl.Float64(), pl.String(), pl.Date(), pl.Datetime("us"))
    return dict(zip(BASES, (pl.Boolean(), *whole, *others), strict=True))


def _duckdb_type(column: str, dtype: pl.DataType) -> str:
    """The declared type of a polars column.

    Raises:
        BadInput: there is none.
    """
    import polars as pl

    if isinstance(dtype, pl.Array) and dtype.inner in (pl.Float32, pl.Float64) and len(dtype.shape) == 1:
        return f"FLOAT[{dtype.shape[0]}]"
    inner, ending = (dtype.inner, "[]") if isinstance(dtype, pl.List) else (dtype, "")
    wider = {pl.UInt8: "SMALLINT", pl.UInt16: "INTEGER", pl.UInt32: "BIGINT", pl.UInt64: "BIGINT"}
    for known, base in _polars().items():
        if inner == base:
            return known + ending
    if type(inner) in wider or inner in wider:
        return wider[type(inner) if type(inner) in wider else inner] + ending  # type: ignore[index]
    if isinstance(inner, (pl.Categorical, pl.Enum)) or inner == pl.Null:
        return "VARCHAR" + ending
    if isinstance(inner, pl.Datetime):
        return "TIMESTAMP" + ending
    raise BadInput(
        f"column {column!r} is {dtype}; a table holds {', '.join(BASES)}, lists of them, and FLOAT[n]: cast or drop it"
    )


def relations(rows: Iterable[Mapping[str, Any]]) -> list[Relation | View]:
    """The declarations of several rows, the last of each name.

    Raises:
        ValueError: a row declares what is not allowed, or two owners one name.
    """
    found: dict[str, Relation | View] = {}
    for row in rows:
        relation = parsed_view(row) if row["kind"] == "view" else parsed(row)
        earlier = found.setdefault(relation.name, relation)
        if earlier != relation:
            raise ValueError(f"table {relation.name} is declared twice")
    return list(found.values())
