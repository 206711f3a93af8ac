"""Rows of a query as Python's own values; a long or nested result is a polars frame within.

A short result of numbers and text needs neither polars nor pyarrow, whose imports take longer than
most queries.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import duckdb
    import polars as pl

MOST = 1000  # rows that are fetched as Python's values; more are faster as a frame
WHOLE = r"U?(?:TINY|SMALL|BIG)INT|U?INTEGER"
NUMBER = re.compile(rf"{WHOLE}|HUGEINT|FLOAT|DOUBLE")
PLAIN = re.compile(rf"(?:BOOLEAN|{WHOLE}|FLOAT|DOUBLE|VARCHAR)(?:\[\])?|HUGEINT|ENUM.*|\"?NULL\"?", re.DOTALL)
Kind = Literal["number", "list", "time", "text"]  # what a column holds, for those who print it


class Rows:
    """Rows of a query, each a tuple of Python's own values.

    Attributes:
        columns: names of the columns.
        types: of each column the SQL type; of a result that is a frame within, the polars type.
        kinds: what each column holds: "number", "list", "time" or "text".
    """

    def __init__(
        self,
        columns: Sequence[str],
        types: Sequence[str],
        kinds: Sequence[Kind],
        first: Sequence[tuple[Any, ...]],
        rest: pl.DataFrame | None = None,
    ) -> None:
        self.columns, self.types, self.kinds = list(columns), list(types), list(kinds)
        self._first, self._rest = list(first), rest

    def __len__(self) -> int:
        return len(self._first) + (0 if self._rest is None else len(self._rest))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return chain(self._first, () if self._rest is None else self._rest.iter_rows())

    def __repr__(self) -> str:
        return f"Rows({', '.join(map(' '.join, zip(self.columns, self.types, strict=True)))}: {len(self):,} rows)"

    @property
    def is_plain(self) -> bool:
        """True if the values are DuckDB's own, and `types` are types of SQL."""
        return self._rest is None or bool(self._first)

    def head(self, n: int) -> list[tuple[Any, ...]]:
        """The first n rows, or all if they are fewer."""
        return list(islice(self, n))

    def dicts(self) -> list[dict[str, Any]]:
        """Each row as a dict, by the columns' names."""
        return [dict(zip(self.columns, row, strict=True)) for row in self]

    def with_column(self, name: str, values: Sequence[Any]) -> Rows:
        """The rows with other values in a column.

        Args:
            name: of the column.
            values: one per row.
        """
        place = self.columns.index(name)
        rows = [(*row[:place], value, *row[place + 1 :]) for row, value in zip(self, values, strict=True)]
        return Rows(self.columns, self.types, self.kinds, rows)

    def where(self, name: str, value: object) -> Rows:
        """The rows that hold a value in a column."""
        place = self.columns.index(name)
        return Rows(self.columns, self.types, self.kinds, [row for row in self if row[place] == value])

    def frame(self) -> pl.DataFrame:
        """The rows as a polars frame, with the types that DuckDB gives its frames."""
        import polars as pl

        if self._rest is not None and not self._first:
            return self._rest  # whose types are polars'
        schema: Any = {name: _polars_type(dtype) for name, dtype in zip(self.columns, self.types, strict=True)}
        first = pl.DataFrame(self._first, schema=schema, orient="row")
        return first if self._rest is None else pl.concat([first, self._rest.cast(schema)])


def of_frame(frame: pl.DataFrame) -> Rows:
    """The rows of a frame."""
    kinds = [_kind_of(dtype) for dtype in frame.dtypes]
    return Rows(frame.columns, [str(dtype) for dtype in frame.dtypes], kinds, [], frame)


def _kind_of(dtype: pl.DataType) -> Kind:
    if dtype.is_numeric():
        return "number"
    return "list" if dtype.is_nested() else "time" if dtype.is_temporal() else "text"


def are_plain(columns: Sequence[str], types: Sequence[str]) -> bool:
    """True if a result holds numbers and text alone, and no two columns of one name."""
    return all(map(PLAIN.fullmatch, types)) and len({name.lower() for name in columns}) == len(columns)


def fetch(cursor: duckdb.DuckDBPyConnection, columns: Sequence[str], types: Sequence[str]) -> Rows:
    """The rows of a plain result that a cursor has open."""
    types = ["ENUM" if dtype.startswith("ENUM") else dtype for dtype in types]  # without its hundreds of words
    first = cursor.fetchmany(MOST)
    if large := [place for place, dtype in enumerate(types) if dtype == "HUGEINT"]:  # a sum of whole numbers
        first = [
            tuple(_as_decimal(value) if place in large else value for place, value in enumerate(row)) for row in first
        ]
    kinds: list[Kind] = [
        "number" if NUMBER.fullmatch(dtype) else "list" if dtype.endswith("]") else "text" for dtype in types
    ]
    if len(first) < MOST:
        return Rows(columns, types, kinds, first)
    import polars as pl

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Arrow output on a DB-API result")  # copies the rows, a MOST of them less
        rest = pl.from_arrow(cursor.to_arrow_table())
    assert isinstance(rest, pl.DataFrame)
    return Rows(columns, types, kinds, first, rest)


def _as_decimal(value: int | None) -> Decimal | None:
    """A HUGEINT as a frame holds it."""
    return None if value is None else Decimal(value)


def _polars_type(dtype: str) -> Any:
    """The polars type of a plain SQL type."""
    import polars as pl

    if dtype.endswith("[]"):
        return pl.List(_polars_type(dtype[:-2]))
    if dtype.startswith("ENUM"):
        return pl.Categorical()
    whole = {"TINY": 8, "SMALL": 16, "": 32, "BIG": 64}
    if found := re.fullmatch(r"(U?)(TINY|SMALL|BIG|)INT(?:EGER)?", dtype):
        return getattr(pl, f"{'U' * bool(found[1])}Int{whole[found[2]]}")()
    if dtype == "HUGEINT":
        return pl.Decimal(38, 0)
    other = {"BOOLEAN": pl.Boolean(), "FLOAT": pl.Float32(), "DOUBLE": pl.Float64(), "VARCHAR": pl.String()}
    return other.get(dtype, pl.Null())
