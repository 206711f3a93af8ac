"""Print rows in the form that a command was asked for: table, csv, json, jsonl, md or parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from actstore.cli.tables import cell, print_table
from actstore.cli.terminal import print_bytes, print_data, say_beside
from actstore.outputs import replacing
from actstore.sql.rows import Rows, of_frame

if TYPE_CHECKING:
    import polars as pl

AT_ONCE = 1000  # rows that are printed in one go
FLOATS = ("FLOAT", "DOUBLE")


@dataclass(frozen=True)
class Output:
    """The form in which a command prints rows.

    Attributes:
        format: one of options.FORMATS.
        parquet: a file to write instead.
    """

    format: str = "table"
    parquet: str | None = None

    @property
    def is_table(self) -> bool:
        """True if a person reads the rows as a table."""
        return self.format == "table" and self.parquet is None

    @property
    def is_for_a_program(self) -> bool:
        """True unless a table is printed; a program expects output for no rows, too."""
        return not self.is_table

    @property
    def takes_rows(self) -> bool:
        """True if Python's values suffice; a Parquet file is written from a frame."""
        return self.format != "parquet" and self.parquet is None

    def write(self, frame: pl.DataFrame | Rows, whole: Mapping[str, Any] | None = None, fold: bool = False) -> None:
        """Print rows.

        Args:
            frame: a polars frame or Rows.
            whole: printed as JSON instead of the rows, if there is more to say than rows hold.
            fold: see `print_table`.
        """
        if self.parquet:
            replacing(self.parquet, _frame(frame).write_parquet)
            say_beside(f"{len(frame):,} rows in {self.parquet}")
        elif self.format == "parquet":
            from io import BytesIO

            _frame(frame).write_parquet(content := BytesIO())
            print_bytes(content.getvalue())
        elif self.format == "csv":
            _print_csv(frame)
        elif self.format == "json":
            print_data(as_json(whole or _rows(frame).dicts()) + "\n")
        elif self.format == "jsonl":
            _print_lines(as_json(dict(zip(frame.columns, row, strict=True))) for row in _rows(frame))
        elif self.format == "md":
            _print_lines(_markdown(_rows(frame)))
        else:
            print_table(frame, fold)


def _rows(frame: pl.DataFrame | Rows) -> Rows:
    return frame if isinstance(frame, Rows) else of_frame(frame)


def _frame(frame: pl.DataFrame | Rows) -> pl.DataFrame:
    return frame.frame() if isinstance(frame, Rows) else frame


def _print_lines(lines: Iterator[str]) -> None:
    while some := list(islice(lines, AT_ONCE)):
        print_data("\n".join(some) + "\n")


def _markdown(rows: Rows) -> Iterator[str]:
    """Lines of a table in GitHub's Markdown, with the cells of a printed table."""

    def line(cells: Iterator[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def in_a_cell(text: str) -> str:
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")

    yield line(in_a_cell(cell(name)) for name in rows.columns)
    yield line("---:" if kind == "number" else "---" for kind in rows.kinds)
    for row in rows:
        yield line(in_a_cell(cell(value)) for value in row)


def _print_csv(frame: pl.DataFrame | Rows) -> None:
    if isinstance(frame, Rows) and not any(dtype.startswith(FLOATS) for dtype in frame.types) and frame.is_plain:
        _print_lines(_csv(frame))
    else:
        print_data(flat(_frame(frame)).write_csv())


def _csv(rows: Rows) -> Iterator[str]:
    """Lines of CSV as polars writes them, of rows without floats."""
    yield ",".join(map(_in_csv, rows.columns))
    for row in rows:
        yield ",".join(map(_in_csv, row))


def _in_csv(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    text = as_json(value) if isinstance(value, list) else str(value)
    return '"' + text.replace('"', '""') + '"' if not text or set(text) & set('",\r\n') else text


def flat(frame: pl.DataFrame) -> pl.DataFrame:
    """Turn lists into JSON text and bytes into hexadecimal text, since CSV has neither."""
    import polars as pl

    return frame.with_columns(
        _json_column(column) if column.dtype.is_nested() else column.bin.encode("hex")
        for column in frame.iter_columns()
        if column.dtype.is_nested() or column.dtype == pl.Binary
    )


def _json_column(column: pl.Series) -> pl.Series:
    """The JSON of each value; NULL stays NULL."""
    import polars as pl

    texts = [None if value is None else as_json(value) for value in column.to_list()]
    return pl.Series(column.name, texts, pl.String)


def as_json(value: Any) -> str:
    """Write a value as JSON.

    NaN and the infinities become null, bytes hexadecimal text, and other values that JSON lacks
    text.
    """
    try:
        return json.dumps(value, default=_json_scalar, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError):  # a float is not finite, or a MAP has a key that is not text
        return json.dumps(_in_json(value), default=_json_scalar, ensure_ascii=False, allow_nan=False)


def _json_scalar(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _in_json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else _json_scalar(key): _in_json(item) for key, item in value.items()}
    return [_in_json(item) for item in value] if isinstance(value, (list, tuple)) else value
