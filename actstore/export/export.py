"""Export activations: a Hugging Face dataset for SAELens, a Parquet file or a .npy file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput, nearest
from actstore.export import hugging_face
from actstore.export.selected import Selected, converted, not_finite
from actstore.outputs import Exported, Work, check_file, check_new_folder, making_folder, replacing

if TYPE_CHECKING:
    from pyarrow import Table

    from actstore.store import Store

FORMATS = {".npy": "npy", ".parquet": "parquet", "": "saelens"}  # by the ending of OUT
DTYPES = ("float32", "float16")


def check_out(out: str | Path, format: str | None) -> str:
    """Refuse what cannot be written, before anything is read; returns the format.

    Args:
        out: a file, or a folder for the format saelens.
        format: default: as the ending of `out` says.

    Raises:
        BadInput: there is no such format, `out` lies in a store or cannot be written, the folder
            exists, or the library `datasets` is not installed.
    """
    suffix = Path(out).suffix
    found = FORMATS.get(suffix, "saelens") if format is None else format
    if found not in FORMATS.values():
        raise BadInput(
            f"got format {format!r}{nearest(str(format), FORMATS.values())}; there are {', '.join(FORMATS.values())}"
        )
    if found == "saelens":
        if suffix in FORMATS and suffix:
            raise BadInput(f"got OUT {out} for a dataset, which is a folder; leave out {suffix}, or --format")
        check_new_folder(out, "OUT")
        hugging_face.check_installed()
    else:
        check_file(out, "OUT", [ending for ending, name in FORMATS.items() if name == found])
    return found


def export(
    store: Store,
    out: str | Path,
    rows: pl.DataFrame | None,
    run: str,
    site: str,
    format: str | None,
    context: int | None,
    dtype: str,
    progress: Work,
) -> Exported:
    """See Store.export.

    Args:
        rows: the query's frame; None for every token that the run holds at the site.
        run: a run of the store.
        site: a site, as it is spelled to read it.
    """
    found = check_out(out, format)
    if dtype not in DTYPES:
        raise BadInput(f"got dtype {dtype!r}; activations are exported as {' or '.join(DTYPES)}")
    if context is not None and found != "saelens":
        raise BadInput(f"got context {context} for a {found} file, which has a row per token; leave it out (--context)")
    selected = Selected.of(store, run, site, rows)
    n, shape = len(selected.rows), selected.row_shape
    if found == "saelens":
        per_row = hugging_face.context_of(selected, context)
        with making_folder(out) as folder, progress("export", n, "tokens") as advance:
            bad = hugging_face.save(selected, folder, per_row, dtype, advance)
        return Exported(Path(out), found, n // per_row * per_row, n % per_row, (int(np.prod(shape)),), per_row, bad)
    write = {"npy": _save_npy, "parquet": _save_parquet}[found]
    bad = 0
    with progress("export", n, "tokens") as advance:

        def fill(target: Path) -> None:
            nonlocal bad
            bad = write(selected, target, dtype, advance)

        replacing(out, fill)
    return Exported(Path(out), found, n, 0, shape, None, bad)


def _save_npy(selected: Selected, target: Path, dtype: str, advance: Callable[[int], None]) -> int:
    """X alone, [n, *row], in the query's order."""
    made = np.lib.format.open_memmap(target, "w+", np.dtype(dtype), (len(selected.rows), *selected.row_shape))
    bad = 0
    for start, X in selected.pieces():
        made[start : start + len(X)] = converted(X, dtype)
        bad += not_finite(X)
        advance(start + len(X))
    made.flush()
    return bad


def _save_parquet(selected: Selected, target: Path, dtype: str, advance: Callable[[int], None]) -> int:
    """The query's rows, with a column x: a fixed-size list."""
    import pyarrow.parquet as pq

    if taken := [name for name in selected.rows.columns if name.lower() == "x"]:
        raise BadInput(
            f"the query yields a column {taken[0]}, the name of the activations; rename it ({taken[0]} as other)"
        )
    bad, writer = 0, None
    try:
        for start, X in selected.pieces():
            table = _table(selected.rows[start : start + len(X)], converted(X, dtype))
            writer = writer or pq.ParquetWriter(target, table.schema)
            writer.write_table(table)
            bad += not_finite(X)
            advance(start + len(X))
    finally:
        if writer:
            writer.close()
    return bad


def _table(rows: pl.DataFrame, X: np.ndarray) -> Table:
    import pyarrow as pa

    column: Any = pa.array(X.reshape(-1))
    for size in reversed(X.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return rows.to_arrow().append_column("x", column)
