"""Parts: the rows that one commit brings to one table, as Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import polars as pl

from actstore.catalog import part_types
from actstore.catalog import tables as catalog_tables
from actstore.commits.log import live
from actstore.commits.manifest import Manifest
from actstore.errors import ActstoreError, BadInput, Damaged, advised
from actstore.storage.at import at
from actstore.storage.backend import ENDLESS
from actstore.storage.machine import limit_reached
from actstore.storage.several import several

GROUP = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}, indent=2).encode()
NEVER_NULL = {  # columns by which rows are found and counted
    "models": ("weights_sha256",),
    "datasets": ("dataset", "n_positions"),
    "runs": ("run", "weights_sha256", "dataset"),
    "sites": ("run", "site", "short", "shape", "path"),
}


def rows_committed(root: Path, committed: Sequence[Manifest], table: str) -> pl.DataFrame:
    """All rows that the given commits brought to one of the small tables.

    Args:
        committed: the commits' manifests.
        table: models, datasets, runs or sites.

    Raises:
        Damaged: a part does not hold rows of the table, or a row lacks its key.
    """
    parts = [part.path for manifest in live(committed) for part in manifest.parts if part.table == table]
    if not parts:
        return pl.DataFrame()
    try:
        rows = as_stored(
            table, pl.concat(several(partial(read_part, root), parts, at(root).at_once), how="diagonal_relaxed")
        )
    except (BadInput, pl.exceptions.PolarsError) as error:
        raise Damaged(
            f"the parts of {table} in {root} hold no rows of it ({error}); see {advised('verify', root)}"
        ) from error
    for column in NEVER_NULL.get(table, ()):
        if rows[column].null_count() or (rows[column].dtype.is_integer() and (rows[column] < 0).any()):
            raise Damaged(
                f"a part of {table} in {root} has a row whose {column} is none; see {advised('verify', root)}"
            )
    return rows


def read_part(root: Path, path: str) -> pl.DataFrame:
    """Read the rows of a part.

    Raises:
        Damaged: the file is not Parquet.
    """
    try:
        return pl.read_parquet(at(root).read(path, ENDLESS))
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        if isinstance(error, ActstoreError):
            raise
        raise (isinstance(error, OSError) and limit_reached(error, f"cannot read {root / path}")) or Damaged(
            f"part {root / path} cannot be read ({str(error).splitlines()[0]}); restore it from a copy of the store"
        ) from error


def as_parquet(table: str, rows: pl.DataFrame) -> bytes:
    """The bytes of a part, with all columns of its table."""
    buffer = io.BytesIO()
    as_stored(table, rows).write_parquet(buffer, compression="zstd", statistics=False)
    return buffer.getvalue()


def as_stored(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Give rows all columns and types of their table, so that the catalog can take every part.

    Args:
        table: a table of every store; rows of a declared table are returned as they are, see
            Relation.fit.
        frame: the rows; a column may be missing, and is then NULL.

    Raises:
        BadInput: the table has no such column, or a value does not fit its type.
    """
    if table not in part_types.every_column():  # a declared table, whose Relation gave the rows their types
        return frame
    types = _types(table, frame)
    every = part_types.every_column()[table]
    if unknown := [name for name in frame.columns if name not in every]:
        raise BadInput(f"table {table} has no column {', '.join(unknown)}; it has {', '.join(every)}")
    lacking = [pl.lit(None, dtype).alias(name) for name, dtype in types.items() if name not in frame.columns]
    try:
        return frame.with_columns(lacking).select(pl.col(name).cast(dtype) for name, dtype in types.items())
    except pl.exceptions.PolarsError as error:
        raise BadInput(f"the rows do not fit table {table}: {str(error).splitlines()[0]}") from error


def _types(table: str, frame: pl.DataFrame) -> dict[str, pl.DataType]:
    """The columns of a part of a table that holds these rows, and their types.

    A column that only other sequences than trees have is left out where it is null throughout.
    """
    types, added = part_types.every_column()[table], catalog_tables.ADDED.get(table, ())
    key = catalog_tables.OF_TREES.get(table)
    if key and (key not in frame.columns or frame[key].null_count()):
        types = {**types, **part_types.NOT_OF_TREES[table]}
    return {
        name: dtype
        for name, dtype in types.items()
        if name not in added or (name in frame.columns and frame[name].null_count() < len(frame))
    }
