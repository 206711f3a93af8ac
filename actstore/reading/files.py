"""Files that a caller gives beside a store: tables of rows, and arrays of activations."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from actstore.errors import BadInput

TABLES = (".parquet", ".csv", ".jsonl", ".ndjson")
ARRAYS = (".npz", ".safetensors", ".parquet")


def read_table(file: Path) -> pl.DataFrame:
    """Read a table; the file's ending says the format.

    Args:
        file: .parquet, .csv or .jsonl.

    Raises:
        BadInput: there is no such file, it has another ending, or it holds no table.
    """
    content = _content(file, TABLES, "a table")
    try:
        if file.suffix == ".parquet":
            return pl.read_parquet(content)  # of bytes: polars takes a path for a pattern
        if file.suffix == ".csv":
            return pl.read_csv(content, infer_schema_length=None)
        return pl.read_ndjson(content, infer_schema_length=None)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, UnicodeDecodeError) as error:
        said = (str(error).splitlines() or ["empty"])[0]
        raise BadInput(f"{file} holds no table ({said}); give {', '.join(TABLES)}") from error


def read_arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read token ids and their activations, as `actstore read --out` writes them.

    Args:
        file: .npz or .safetensors with arrays `token_id` [n] and `X` [n, …]; or .parquet with
            columns `token_id` and `x`.

    Raises:
        BadInput: there is no such file, it has another ending, or it lacks an array.
    """
    content = _content(file, ARRAYS, "arrays")
    try:
        if file.suffix == ".parquet":
            rows = pl.read_parquet(content)
            found: dict[str, Any] = {name: rows[name] for name in ("token_id", "x") if name in rows.columns}
            found = {"token_id" if name == "token_id" else "X": _numpy(column) for name, column in found.items()}
        elif file.suffix == ".npz":
            with np.load(BytesIO(content), allow_pickle=False) as held:
                found = {name: held[name] for name in ("token_id", "X") if name in held}
        else:
            from safetensors.numpy import load

            found = load(content)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, zipfile.BadZipFile, ValueError, OSError) as error:
        raise BadInput(f"{file} holds no arrays ({str(error).splitlines()[0]}); give {', '.join(ARRAYS)}") from error
    if lacking := [name for name in ("token_id", "X") if name not in found]:
        raise BadInput(
            f"{file} lacks {lacking[0]}; it must hold token_id [n] and X [n, d], as `actstore read` writes with --out"
        )
    return found["token_id"], found["X"]


def _numpy(column: pl.Series) -> np.ndarray:
    """A column as an array; lists of one length become rows."""
    if isinstance(column.dtype, pl.List):
        width = column.list.len().unique()
        if len(width) != 1:
            raise ValueError("x has lists of several lengths")
        column = column.cast(pl.Array(column.dtype.inner, int(width[0])))
    return column.to_numpy()


def _content(file: Path, endings: tuple[str, ...], what: str) -> bytes:
    if file.suffix not in endings:
        raise BadInput(f"got {file} for {what}; give a file that ends in {', '.join(endings)}")
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"there is no file {file}; name one that is there ({', '.join(endings)})") from None
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror}); name another file") from error
