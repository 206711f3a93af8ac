"""Print frames as a table, CSV, JSON or Parquet, and write activations to files for other tools."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.cli.terminal import print_data
from actstore.errors import BadInput
from actstore.outputs import check_ending, printable, replacing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ROWS_SHOWN = 60  # rows of a printed table; the other formats give every row
ACTIVATION_FILES = (".npz", ".safetensors", ".parquet")
ARGUMENTS = ("file", "allow_pickle")  # np.savez takes arrays by keyword beside its own
ROWS_AS_BLOCKS = 10  # more are easier to compare in a table with wrapped cells
LEAST_WIDTH = 16  # of a column that is narrowed: an interval, `[99.05, 100.00]`, stays whole
GAP = 3  # between two columns
FOLDED_GAP = 2  # the same in a folded table


@dataclass(frozen=True)
class Output:
    """The form in which a command prints a frame.

    Attributes:
        format: csv, json or table.
        parquet: a file to write instead.
    """

    format: str = "table"
    parquet: str | None = None

    @property
    def is_for_a_program(self) -> bool:
        """True unless a table is printed; a program expects output for no rows, too."""
        return self.format != "table" or self.parquet is not None

    def write(self, frame: pl.DataFrame, whole: Mapping[str, Any] | None = None, fold: bool = False) -> None:
        """Print a frame.

        Args:
            whole: printed as JSON instead of the rows, if there is more to say than rows hold.
            fold: see `print_table`.
        """
        if self.parquet:
            replacing(self.parquet, frame.write_parquet)
            print(printable(f"{len(frame):,} rows in {self.parquet}"), file=sys.stderr)
        elif self.format == "csv":
            print_data(_flat(frame).write_csv())
        elif self.format == "json":
            print_data(_json(whole or frame.to_dicts()) + "\n")
        else:
            print_table(frame, fold)


def print_table(frame: pl.DataFrame, fold: bool = False) -> None:
    """Print a frame as a table, or as one block of lines per row.

    Few rows that are wider than the terminal become blocks. In more rows, long texts are wrapped
    and long lists cut short; the rows become blocks if that does not suffice. Numbers and short
    texts are always whole. Without a terminal, lines are as long as they need to be.

    Args:
        fold: if the table is too wide, fold the headers and leave out columns that do not fit, the
            first ones first served; a note names the columns that are left out.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console() if sys.stdout.isatty() else Console(width=10_000, color_system=None)
    table, shown = _table(frame), frame.head(ROWS_SHOWN)
    is_wide = Measurement.get(console, console.options.update(width=10_000), table).maximum > console.width
    if is_wide and fold:
        _print_folded(console, frame)
    elif is_wide and (len(frame) <= ROWS_AS_BLOCKS or not _narrowed(table, shown, console.width)):
        for row in shown.iter_rows(named=True):
            console.print(_block(row))
            console.print()
    else:
        console.print(table)
    if len(frame) > ROWS_SHOWN:
        console.print(
            f"… {len(frame) - ROWS_SHOWN:,} more of {len(frame):,} rows (--csv, --json and --parquet give all)"
        )
    elif not len(frame):
        console.print("(no rows)")


def _narrowed(table: Table, frame: pl.DataFrame, width: int) -> bool:
    """Narrow the columns of long texts and lists until a table fits; False if it cannot fit."""
    from rich.cells import cell_len

    cells = [[printable(column.name), *map(_cell, column)] for column in frame.iter_columns()]
    widths = [max(map(cell_len, column)) for column in cells]
    long = [
        place
        for place, dtype in enumerate(frame.dtypes)
        if widths[place] > LEAST_WIDTH and not dtype.is_numeric() and not dtype.is_temporal()
    ]
    room = width - GAP * (len(widths) - 1) - sum(widths) + sum(widths[place] for place in long)
    if room < LEAST_WIDTH * len(long) or not long:
        return False
    for turn, place in enumerate(sorted(long, key=widths.__getitem__)):
        column, given = table.columns[place], min(widths[place], room // (len(long) - turn))
        column.max_width, column.no_wrap = given, frame.dtypes[place].is_nested()
        column.overflow = "ellipsis" if column.no_wrap else "fold"
        room -= given
    return True


def _print_folded(console: Console, frame: pl.DataFrame) -> None:
    """Print the columns that fit, with folded headers, and name the others."""
    room, widths = console.width + FOLDED_GAP, {}
    for name, column in zip(frame.columns, frame.head(ROWS_SHOWN).iter_columns(), strict=True):
        width = max(map(len, [*printable(name).split(), *map(_cell, column.to_list())]))
        if width + FOLDED_GAP <= room:
            room -= width + FOLDED_GAP
            widths[name] = width
    table = _table(frame.select(list(widths)))
    table.collapse_padding = True
    for shown, width in zip(table.columns, widths.values(), strict=True):
        shown.width = width
    console.print(table)
    if left := [printable(name) for name in frame.columns if name not in widths]:
        console.print(f"Too wide for this terminal: {'; '.join(left)} (--csv, --json and --parquet give all columns).")


def _table(frame: pl.DataFrame) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, dtype in frame.schema.items():
        table.add_column(Text(printable(name)), justify="right" if dtype.is_numeric() else "left")
    for row in frame.head(ROWS_SHOWN).iter_rows():
        table.add_row(*[Text(_cell(value)) for value in row])
    return table


def _block(row: Mapping[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    block = Table(box=None, pad_edge=False, show_header=False)
    block.add_column(style="bold", no_wrap=True)
    block.add_column(overflow="fold")
    for name, value in row.items():
        block.add_row(Text(printable(name)), Text(_cell(value)))
    return block


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, np.ndarray, pl.Series)):
        items = list(value)
        shown = [_cell(item) for item in items[:16]]
        return " ".join(shown) + (f" … ({len(items)})" if len(items) > len(shown) else "")
    return printable(str(value))


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """Turn lists into JSON text and bytes into hexadecimal text, since CSV has neither."""
    return frame.with_columns(
        _as_json(column) if column.dtype.is_nested() else column.bin.encode("hex")
        for column in frame.iter_columns()
        if column.dtype.is_nested() or column.dtype == pl.Binary
    )


def _as_json(column: pl.Series) -> pl.Series:
    """The JSON of each value; NULL stays NULL."""
    texts = [None if value is None else _json(value) for value in column.to_list()]
    return pl.Series(column.name, texts, pl.String)


def _json(value: Any) -> str:
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


def save_activations(path: str, X: np.ndarray, rows: pl.DataFrame) -> None:
    """Write activations and their rows into one file, whole or not at all.

    A .npz file holds X and one array per column; booleans with NULLs, dates and the like are text,
    lists and structs JSON text. A .safetensors file holds X, the columns of numbers, and those of
    booleans without NULLs; the other columns are JSON in the metadata. In both, DECIMAL and HUGEINT
    become float64. A .parquet file holds the rows, and X as a fixed-size list column `x`.

    Args:
        path: the file; its ending says the format.
        X: float [n, …].
        rows: n rows.

    Raises:
        BadInput: another ending, or a column whose name the format needs for itself.
    """
    check_ending(path, ACTIVATION_FILES, "--out")
    check_columns(rows.columns, path)
    writers: Mapping[str, Callable[[Path], None]] = {
        ".npz": lambda target: _save_npz(target, X, rows),
        ".safetensors": lambda target: _save_safetensors(target, X, rows),
        ".parquet": lambda target: rows.with_columns(pl.Series("x", X)).write_parquet(target),
    }
    replacing(path, writers[Path(path).suffix])


def check_columns(columns: Sequence[str], path: str | None) -> None:
    """Refuse a column whose name collides with `X` in the output file.

    Args:
        columns: the query's columns.
        path: the file to write, see save_activations; None if rows are printed with a column `x`.

    Raises:
        BadInput: names the column.
    """
    suffix = Path(path).suffix if path else ".parquet"
    for name in columns:
        if suffix == ".parquet":
            taken = name.lower() == "x"  # DuckDB ignores case
        elif suffix == ".npz":
            taken = name in ("X", *ARGUMENTS) or name.endswith(".npy")  # numpy takes `X.npy` for X
        else:
            taken = name in ("X", "__metadata__")
        if taken:
            what = f"{suffix} file" if path else "printed row"
            raise BadInput(
                f"the query yields a column {name}, a name that the {what} has another use for beside the activations; "
                f"rename it (`{name} as other`), or leave it out"
            )


def _save_npz(target: Path, X: np.ndarray, rows: pl.DataFrame) -> None:
    columns = {name: _plain_array(column) for name, column in zip(rows.columns, rows.iter_columns(), strict=True)}
    with target.open("wb") as file:
        np.savez(file, allow_pickle=False, **{"X": X, **columns})


def _plain_array(column: pl.Series) -> np.ndarray:
    """A column as an array that loads without pickle.

    Text becomes fixed-width unicode (NULL becomes None), lists become their JSON.
    """
    if (numbers := _numbers(column)) is not None:
        return numbers
    plain = _flat(column.to_frame()).to_series()
    return np.array([str(value) for value in plain.to_list()], dtype=np.str_)


def _numbers(column: pl.Series) -> np.ndarray | None:
    """A column as an array of numbers or booleans; None if no such array holds it."""
    dtype = column.dtype
    if dtype == pl.Boolean:
        return None if column.null_count() else column.to_numpy()
    if not dtype.is_numeric():
        return None
    no_array = dtype.is_decimal() or dtype in (pl.Int128, pl.UInt128)  # numpy makes objects of these
    return column.cast(pl.Float64).to_numpy() if no_array else column.to_numpy()


def _save_safetensors(target: Path, X: np.ndarray, rows: pl.DataFrame) -> None:
    from safetensors.numpy import save_file

    arrays = {name: _numbers(rows[name]) for name in rows.columns}
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    others = {name: _json(rows[name].to_list()) for name, array in arrays.items() if array is None}
    save_file({"X": X, **tensors}, target, metadata=others or None)
