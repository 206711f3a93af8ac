"""Write activations and the rows beside them to files for other tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from actstore.cli.output import as_json, flat
from actstore.errors import BadInput
from actstore.outputs import check_ending, replacing

ACTIVATION_FILES = (".npz", ".safetensors", ".parquet")
VOCABULARY = ".vocabulary"  # end of the name of a tensor: the texts that a column's codes mean
ARGUMENTS = ("file", "allow_pickle")  # np.savez takes arrays by keyword beside its own


def save_activations(path: str, X: np.ndarray, rows: pl.DataFrame) -> None:
    """Write activations and their rows into one file, whole or not at all.

    A .npz and a .safetensors file hold X and one array per column. Columns of numbers, of booleans
    and of FLOAT[k] are what they are; DECIMAL and HUGEINT become float64, and a NULL among numbers
    is NaN. Any other column is text: booleans with NULLs, dates and the like as text, lists and
    structs as JSON. A .npz file holds the text itself, and `None` for NULL. A .safetensors file,
    which has no text, holds the column NAME as codes, int64 [n]: places in the sorted list of the
    texts, -1 for NULL. The list is JSON in UTF-8, the uint8 tensor NAME.vocabulary:

        tensors = safetensors.torch.load_file("x.safetensors")
        vocabulary = json.loads(bytes(tensors["role.vocabulary"].tolist()))
        roles = [vocabulary[code] for code in tensors["role"].tolist()]

    A .parquet file holds the rows, and X as a fixed-size list column `x`.

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
            taken = name in ("X", "__metadata__") or (
                name.endswith(VOCABULARY) and name.removesuffix(VOCABULARY) in columns
            )
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
    plain = flat(column.to_frame()).to_series()
    return np.array([str(value) for value in plain.to_list()], dtype=np.str_)


def _numbers(column: pl.Series) -> np.ndarray | None:
    """A column as an array of numbers or booleans; None if no such array holds it.

    Returns:
        [n], or [n, k] of a column FLOAT[k].
    """
    dtype = column.dtype
    if isinstance(dtype, pl.Array):
        values = column
        while isinstance(values.dtype, pl.Array):
            if values.null_count():
                return None
            values = values.explode()
        return None if _numbers(values) is None or values.null_count() else column.to_numpy()
    if dtype == pl.Boolean:
        return None if column.null_count() else column.to_numpy()
    if not dtype.is_numeric():
        return None
    no_array = dtype.is_decimal() or dtype in (pl.Int128, pl.UInt128)  # numpy makes objects of these
    return column.cast(pl.Float64).to_numpy() if no_array else column.to_numpy()


def _save_safetensors(target: Path, X: np.ndarray, rows: pl.DataFrame) -> None:
    from safetensors.numpy import save_file

    tensors = {"X": X}
    for column in rows.iter_columns():
        if (numbers := _numbers(column)) is not None:
            tensors[column.name] = np.ascontiguousarray(numbers)
        else:
            tensors[column.name], tensors[column.name + VOCABULARY] = _codes(column)
    save_file(tensors, target)


def _codes(column: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """A column of text as codes, int64 [n], and the texts that they mean, uint8 [n_bytes]."""
    texts = [None if value is None else str(value) for value in flat(column.to_frame()).to_series().to_list()]
    vocabulary = sorted({text for text in texts if text is not None})
    code = {text: place for place, text in enumerate(vocabulary)} | {None: -1}
    said = np.frombuffer(as_json(vocabulary).encode(), np.uint8)
    return np.array([code[text] for text in texts], np.int64), said
