"""What people would pick instead of a store: the same rows in other formats, each read by the quickest of its own ways.

Every peer is given row numbers, sorted and at hand, and must return float32 [n, d_model] in their order. What a format
was tried with and found slower with is said where it is chosen.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # datasets is to read files here, and ask nobody

import datasets
import duckdb
import h5py
import lance
import numpy as np
import polars as pl
import pyarrow as pa
import torch
import zarr

from actstore.ingest.models.load import load
from actstore.ingest.models.sites import site_specs
from actstore.ingest.trees.tokens import n_positions
from actstore.store import Store

ROWS_PER_CHUNK = 1_024  # zarr: of 256, 1,024, 4,096 and 16,384 the quickest on every selection
ROWS_PER_GROUP = 2_048  # Parquet: small groups are skipped more often, and cost a full read nothing
ROWS_PER_BLOCK = 4_096  # h5py: rows read in one slice where the wanted lie close
TREES_PER_PASS = 128  # the quickest batch of the model on a CPU


@dataclass(frozen=True)
class Peer:
    """One way to read rows.

    Attributes:
        name: what is used, and how.
        take: int64 [n] sorted row numbers → float32 [n, d_model].
        atol: how far its numbers may be from the stored ones; 0 for what only copies them.
    """

    name: str
    take: Callable[[np.ndarray], np.ndarray]
    atol: float = 0.0


def write_all(X: np.ndarray, folder: Path) -> list[Peer]:
    """Write float32 [n_tokens, d_model] in every format into a folder, and open each for reading."""
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(X.reshape(-1)), X.shape[1])})
    parquet = folder / "rows.parquet"
    frame = pl.DataFrame({"row": np.arange(len(X)), "x": pl.Series(X)})
    frame.write_parquet(parquet, compression="uncompressed", row_group_size=ROWS_PER_GROUP)
    return [
        _zarr(X, folder / "rows.zarr"),
        _h5py(X, folder / "rows.h5"),
        _duckdb_parquet(parquet, X.shape[1]),
        _duckdb_table(frame, folder / "rows.duckdb", X.shape[1]),
        _polars(parquet),
        _lance(table, folder / "rows.lance"),
        _hf_datasets(table, folder / "rows.hf"),
    ]


def _zarr(X: np.ndarray, path: Path) -> Peer:
    """A plain uncompressed array; shards make oindex several times slower still."""
    written = zarr.create_array(path, shape=X.shape, chunks=(ROWS_PER_CHUNK, X.shape[1]), dtype="f4", compressors=None)
    written[:] = X
    array = zarr.open_array(path, mode="r")
    return Peer("zarr, oindex", lambda rows: array.oindex[rows])


def _h5py(X: np.ndarray, path: Path) -> Peer:
    """A contiguous dataset: rows by their numbers where few are wanted, else in slices, thinned out in memory."""
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=X)
    stored = h5py.File(path)["x"]

    def take(rows: np.ndarray) -> np.ndarray:
        if len(rows) < (rows[-1] - rows[0]) / 20:
            return stored[rows]
        taken = np.empty((len(rows), stored.shape[1]), np.float32)
        cuts = np.searchsorted(rows, np.arange(rows[0], rows[-1] + 1 + ROWS_PER_BLOCK, ROWS_PER_BLOCK)).tolist()
        for start, stop in pairwise(cuts):
            if start < stop:
                first, last = rows[start], rows[stop - 1]
                np.take(stored[first : last + 1], rows[start:stop] - first, axis=0, out=taken[start:stop])
        return taken

    return Peer("h5py, by row numbers or in slices", take)


def _duckdb_parquet(path: Path, d_model: int) -> Peer:
    """A semi join, which skips the row groups that hold none."""
    connection = duckdb.connect()
    query = f"select x::float[{d_model}] as x from '{path}' semi join wanted using (row) order by row"
    return Peer("Parquet through DuckDB, FLOAT[d_model]", lambda rows: _sql(connection, query, rows))


def _duckdb_table(frame: pl.DataFrame, path: Path, d_model: int) -> Peer:
    """DuckDB's own table, by rowid."""
    with duckdb.connect(path) as connection:
        connection.register("frame", frame)
        connection.execute(f"create table rows as select x::float[{d_model}] as x from frame order by row")
    connection = duckdb.connect(path, read_only=True)
    query = "select x from rows where rowid in (select row from wanted) order by rowid"
    return Peer("a DuckDB table, FLOAT[d_model]", lambda rows: _sql(connection, query, rows))


def _sql(connection: duckdb.DuckDBPyConnection, query: str, rows: np.ndarray) -> np.ndarray:
    connection.register("wanted", pa.table({"row": rows}))
    return _matrix(connection.sql(query).to_arrow_table())


def _polars(path: Path) -> Peer:
    """A slice where the rows lie close, else a filter, which skips no row group but those outside the first and last."""
    scan = pl.scan_parquet(path)

    def take(rows: np.ndarray) -> np.ndarray:
        first, last = int(rows[0]), int(rows[-1])
        if last - first < 16 * ROWS_PER_GROUP:
            wanted = scan.slice(first, last - first + 1).select(pl.col("x").gather(rows - first))
        else:
            row = pl.col("row")
            wanted = scan.filter(row.is_between(first, last) & row.is_in(pl.Series(rows).implode())).select("x")
        return wanted.collect()["x"].to_numpy()

    return Peer("Parquet through polars", take)


def _lance(table: pa.Table, path: Path) -> Peer:
    """One file, in the format that Lance writes unless told otherwise."""
    stored = lance.write_dataset(table, str(path), max_rows_per_file=len(table))
    return Peer("Lance, take", lambda rows: _matrix(stored.take(rows, columns=["x"])))


def _hf_datasets(table: pa.Table, path: Path) -> Peer:
    """Memory-mapped Arrow, one token a row; its Arrow format is twice as quick as its numpy format."""
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(str(path))
    stored = datasets.load_from_disk(str(path)).with_format("arrow")
    return Peer("HF datasets, by row numbers", lambda rows: _matrix(stored[rows]))


def _matrix(table: pa.Table) -> np.ndarray:
    """float32 [n, d_model] of a table's fixed-size list column x; copies only where it arrives in several chunks."""
    x = table["x"].combine_chunks()
    if isinstance(x, pa.ChunkedArray):
        x = pa.concat_arrays(x.chunks)
    return x.flatten().to_numpy().reshape(len(table), -1)


def running_again(store: Store, site: str) -> Peer:
    """The model itself, run over the trees that the rows are of, tokens at hand, and stopped behind the layer asked for."""
    model = load(store.sql("select model from models").item())
    (spec,) = site_specs([site], model.config)
    tokens = store.sql("select tree_id, position, enum_code(token) as word from tokens order by token_id")
    tree = (tokens["tree_id"] - tokens["tree_id"].min()).to_numpy()
    position = tokens["position"].to_numpy().astype(np.intp)
    words = np.zeros((tree.max() + 1, n_positions(model.config.n_nodes)), np.uint8)
    words[tree, position] = tokens["word"].to_numpy()
    ids = torch.from_numpy(model.config.vocabulary.encode(words))

    def take(rows: np.ndarray) -> np.ndarray:
        trees, tree_of_row = np.unique(tree[rows], return_inverse=True)
        X = np.empty((len(rows), model.config.d_model), np.float32)
        for first in range(0, len(trees), TREES_PER_PASS):
            some = slice(*np.searchsorted(tree_of_row, [first, first + TREES_PER_PASS]).tolist())

            def keep(resid: torch.Tensor, hook: object, some: slice = some, first: int = first) -> None:
                X[some] = resid.numpy()[tree_of_row[some] - first, position[rows[some]]]

            with torch.no_grad():
                batch = ids[trees[first : first + TREES_PER_PASS]]
                layer = int(spec.short.partition(".")[2])
                model.bridge.run_with_hooks(batch, stop_at_layer=layer + 1, fwd_hooks=[(spec.name, keep)])
        return X

    return Peer("running the model again", take, atol=1e-4)
