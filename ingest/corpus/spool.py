"""Sequences in temporary files, from their documents to their batches.

The files are read through memory maps, so that memory does not grow with the number of sequences.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

FILES = {  # name of a file → dtype of its numbers
    **{"numbers": "<u4", "starts": "<i4", "stops": "<i4"},  # per token
    **{"lengths": "<u4", "ends": "<i8", "documents": "<i8", "hashes": "<u8", "content": "<u8"},  # per sequence
}


class Held(NamedTuple):
    """What was put into a spool: a memory map per file, and the hashes of numbers and lengths."""

    arrays: dict[str, np.ndarray]
    sha256: dict[str, str]
    rows: Rows | None

    def tokens_of(self, start: int, stop: int) -> slice:
        """The tokens of the sequences start…stop-1."""
        ends = self.arrays["ends"]
        return slice(int(ends[start - 1]) if start else 0, int(ends[stop - 1]) if stop else 0)


class Rows:
    """Rows of a frame in an Arrow file, of which a range is read."""

    def __init__(self, path: Path, sizes: list[int]) -> None:
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._ends = np.cumsum(sizes)

    def slice(self, start: int, stop: int) -> pl.DataFrame:
        """Rows start…stop-1."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        batches = [self._reader.get_batch(i) for i in range(first, last + 1)]
        frame = pl.from_arrow(pa.Table.from_batches(batches))
        assert isinstance(frame, pl.DataFrame)
        begins = int(self._ends[first - 1]) if first else 0
        return frame.slice(start - begins, stop - start)


def _remove(folder: Path, files: Sequence[BinaryIO]) -> None:
    for file in files:
        file.close()
    shutil.rmtree(folder, ignore_errors=True)


class Spool:
    """Takes sequences and, if there is a documents' table, a row for each; then holds them.

    The files go when the spool is closed or collected.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="actstore-corpus-"))
        self._files = {name: (self._folder / name).open("wb") for name in FILES}
        self._end = weakref.finalize(self, _remove, self._folder, list(self._files.values()))
        self._sha256 = {name: hashlib.sha256() for name in ("numbers", "lengths")}
        self._writer: Any = None
        self._sizes = list[int]()
        self.n_sequences, self.n_tokens = 0, 0

    def add(self, rows: pl.DataFrame | None, **arrays: np.ndarray) -> None:
        """Add sequences.

        Args:
            rows: a row per sequence, or None; always of the same columns and types.
            arrays: as FILES names them, without `ends`.
        """
        ends = self.n_tokens + np.cumsum(arrays["lengths"])
        for name, values in {**arrays, "ends": ends}.items():
            content = values.astype(FILES[name]).tobytes()
            self._files[name].write(content)
            if name in self._sha256:
                self._sha256[name].update(content)
        self.n_sequences += len(arrays["lengths"])
        self.n_tokens += len(arrays["numbers"])
        if rows is not None:
            table = rows.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()
            if self._writer is None:
                self._writer = pa.ipc.new_file(str(self._rows), table.schema)
            for batch in table.to_batches():
                self._writer.write_batch(batch)
                self._sizes.append(batch.num_rows)

    def hold(self) -> Held:
        """Close the files for writing, and open them for reading; one sequence or more is there."""
        for file in self._files.values():
            file.close()
        arrays: dict[str, np.ndarray] = {
            name: np.memmap(self._folder / name, dtype, "r") for name, dtype in FILES.items()
        }
        rows = None
        if self._writer is not None:
            self._writer.close()
            rows = Rows(self._rows, self._sizes)
        return Held(arrays, {name: digest.hexdigest() for name, digest in self._sha256.items()}, rows)

    def close(self) -> None:
        """Remove the files."""
        self._end()

    @property
    def _rows(self) -> Path:
        return self._folder / "rows.arrow"
