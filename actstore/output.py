"""Frames and activations on their way out: a table for eyes, CSV, JSON or Parquet for programs, files for other tools."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput

if TYPE_CHECKING:
    from rich.table import Table

ROWS_SHOWN = 60  # of a table; the other formats give every row
ACTIVATION_FILES = (".npz", ".safetensors", ".parquet")
FIGURES = (".png", ".svg", ".pdf")
ROWS_AS_BLOCKS = 10  # more are easier to compare in a table with cells cut short


@dataclass(frozen=True)
class Output:
    """Where and how a command prints a frame; a table unless told otherwise."""

    format: str = "table"
    parquet: str | None = None

    def write(self, frame: pl.DataFrame, whole: Mapping[str, Any] | None = None) -> None:
        """Print a frame; as JSON, `whole` in its place, where there is more to say than rows hold."""
        if self.parquet:
            _replacing(Path(self.parquet), frame.write_parquet)
            print(f"{len(frame):,} rows in {self.parquet}", file=sys.stderr)
        elif self.format == "csv":
            sys.stdout.write(_flat(frame).write_csv())
        elif self.format == "json":
            print(json.dumps(whole or frame.to_dicts(), default=str, ensure_ascii=False))
        else:
            print_table(frame)


def print_table(frame: pl.DataFrame) -> None:
    """Print a frame as a table; where a few rows are wider than the terminal, as one block of lines a row.

    Where there is no terminal, lines are as long as they need to be.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console() if sys.stdout.isatty() else Console(width=10_000, color_system=None)
    table = _table(frame)
    if Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width:
        console.print(table)
    elif len(frame) <= ROWS_AS_BLOCKS:
        for row in frame.iter_rows(named=True):
            console.print(_block(row))
            console.print()
    else:
        for column in table.columns:
            column.no_wrap, column.overflow = True, "ellipsis"
        console.print(table)
    if len(frame) > ROWS_SHOWN:
        console.print(
            f"… {len(frame) - ROWS_SHOWN:,} more of {len(frame):,} rows (--csv, --json and --parquet give all)"
        )
    elif not len(frame):
        console.print("(no rows)")


def _table(frame: pl.DataFrame) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, dtype in frame.schema.items():
        table.add_column(name, justify="right" if dtype.is_numeric() else "left")
    for row in frame.head(ROWS_SHOWN).iter_rows():
        table.add_row(*[_cell(value) for value in row])
    return table


def _block(row: Mapping[str, Any]) -> Table:
    from rich.table import Table

    block = Table(box=None, pad_edge=False, show_header=False)
    block.add_column(style="bold", no_wrap=True)
    block.add_column(overflow="fold")
    for name, value in row.items():
        block.add_row(name, _cell(value))
    return block


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, np.ndarray, pl.Series)):
        items = list(value)
        shown = [_cell(item) for item in items[:16]]
        return escape(" ".join(shown) + (f" … ({len(items)})" if len(items) > len(shown) else ""))
    return escape(str(value))


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """CSV has no lists: they become JSON text."""
    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
    return frame.with_columns(pl.col(name).map_elements(_json_list, pl.String) for name in nested)


def _json_list(value: Any) -> str:
    return json.dumps(list(value))


def save_activations(path: str, X: np.ndarray, rows: pl.DataFrame) -> None:
    """Write activations and the rows they belong to into one file, whole or not at all.

    Args:
        path: ends in .npz (X and a column an array), .safetensors (X and the numeric columns; the others as JSON in the
            metadata), or .parquet (the rows, and X as a fixed-size list column `x`).

    Raises:
        BadInput: another ending.
    """
    check_ending(path, ACTIVATION_FILES, "--out")
    writers: Mapping[str, Callable[[Path], None]] = {
        ".npz": lambda target: _save_npz(target, X, rows),
        ".safetensors": lambda target: _save_safetensors(target, X, rows),
        ".parquet": lambda target: rows.with_columns(pl.Series("x", X)).write_parquet(target),
    }
    _replacing(Path(path), writers[Path(path).suffix])


def check_ending(path: str | None, endings: Sequence[str], option: str) -> None:
    """Refuse a file whose ending says no format, before any work is done for it.

    Raises:
        BadInput: says which endings there are.
    """
    if path and Path(path).suffix not in endings:
        raise BadInput(f"got {option} {path}; a file ends in {', '.join(endings)}")


def _save_npz(target: Path, X: np.ndarray, rows: pl.DataFrame) -> None:
    columns = {name: _plain_array(column) for name, column in zip(rows.columns, rows.iter_columns(), strict=True)}
    with target.open("wb") as file:
        np.savez(file, allow_pickle=False, **{"X": X, **columns})


def _plain_array(column: pl.Series) -> np.ndarray:
    """An array that loads without pickle: text as fixed-width unicode, lists as their JSON."""
    if column.dtype.is_numeric() or column.dtype == pl.Boolean:
        return column.to_numpy()
    texts = [_json_list(value) if column.dtype.is_nested() else str(value) for value in column.to_list()]
    return np.array(texts, dtype=np.str_)


def _save_safetensors(target: Path, X: np.ndarray, rows: pl.DataFrame) -> None:
    from safetensors.numpy import save_file

    numeric = [name for name, dtype in rows.schema.items() if dtype.is_numeric() or dtype == pl.Boolean]
    others = {name: json.dumps(rows[name].to_list(), default=str) for name in rows.columns if name not in numeric}
    tensors = {"X": X, **{name: np.ascontiguousarray(rows[name].to_numpy()) for name in numeric}}
    save_file(tensors, target, metadata=others or None)


def _replacing(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there, so that a stopped run leaves no half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
