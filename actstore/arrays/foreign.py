"""Read a site's array through zarr-python: any chunks, shards, codecs and float dtype.

A gather reads and decodes each inner chunk once. `oindex` is not used, since it decodes a chunk
once per row. This reader is much slower than the mapped shards that actstore writes, with the same
numbers and errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actstore.arrays.copying import flat_rows
from actstore.arrays.layout import Layout
from actstore.arrays.site import Cost, IsToken, Placed, not_stored
from actstore.errors import BadInput, Damaged, NotStored
from actstore.storage.backend import Reading
from actstore.storage.machine import limit_reached

MOST_BYTES = 1 << 34  # the largest decoded chunk that is read


class ForeignReader(Placed):
    """A site's array, read through zarr-python.

    Args:
        path: the array's folder, Zarr v3 or v2.
        layout: the shape that the array must have. Its shards say which batch of `shards` an id
            belongs to.
        first_token_id: see SiteReader.
        shards: the batches that are stored; None means all.
        where: see SiteReader.
        is_token: see SiteReader. It is asked about every id if unwritten numbers do not read as
            NaN.
        check: called after each read; raises if the folder may have been another store's.

    Raises:
        Damaged: zarr-python cannot open the array, or the array has another shape.
        BadInput: the array does not hold floats.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        first_token_id: int,
        shards: Mapping[int, str] | None,
        where: str,
        is_token: IsToken | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.layout, self.where, self._check = path, layout, where, check
        self._array = self._open()  # before anything is made as large as the layout says
        shards = dict.fromkeys(range(layout.n_shards), str(path)) if shards is None else shards
        super().__init__(layout, first_token_id, shards, where, is_token)
        chunks = self._array.chunks  # the inner chunks, if the array is sharded
        self.trees_per_chunk = int(chunks[0])
        self.positions_per_chunk = 1 if layout.position_axis is None else int(chunks[layout.position_axis])

    def _open(self) -> Any:
        import zarr

        try:
            array = zarr.open_array(str(self.path), mode="r")
        except Exception as error:  # zarr's own classes and whatever strange metadata makes it meet
            raise limit_reached(error, f"cannot open {self.path} of {self.where}") or Damaged(
                f"{self.path} of {self.where} cannot be opened ({_one_line(error)}); restore it from a copy of the store"
            ) from error
        self._check()
        if tuple(array.shape) != self.layout.shape:
            raise Damaged(
                f"{self.path} of {self.where} has shape {list(array.shape)}, and the catalog says {list(self.layout.shape)}"
            )
        if min(array.chunks) < 1 or math.prod(array.chunks) * array.dtype.itemsize > MOST_BYTES:
            raise Damaged(f"{self.path} of {self.where} has chunks of {list(array.chunks)}, which no memory holds")
        if array.dtype.kind != "f":
            raise BadInput(f"{self.where} holds {array.dtype}; activations are floats (float16, float32 or float64)")
        return array

    def cost(self, token_ids: np.ndarray) -> Cost:
        """The decoded chunks of a gather.

        Args:
            token_ids: int64 [n], distinct.

        Raises:
            NotStored: see `places`.
        """
        row, position = self._indices(token_ids)
        inner, item_bytes = self._array.chunks, int(self._array.dtype.itemsize)
        stored, axis = self._array.shards or inner, self.layout.position_axis
        chunks = np.array([chunk for chunk, _ in self.by_chunk(row, position)], np.int64).reshape(-1, 2)
        along = 1 if axis is None else int(stored[axis]) // self.positions_per_chunk
        per_shard = int(stored[0]) // self.trees_per_chunk, along
        n_chunks = len(chunks) * self._pieces_per_row(inner)
        return Cost(
            chunks=n_chunks,
            shards=len(np.unique(chunks // per_shard, axis=0)) * self._pieces_per_row(stored),
            runs=n_chunks,
            bytes_needed=len(row) * self.layout.row_items * item_bytes,
            bytes_read=n_chunks * math.prod(inner) * item_bytes,
            bytes_in_memory=None,
        )

    def again(self) -> Callable[[Reading, IsToken], ForeignReader]:
        """See site.Reader."""
        return partial(
            _open_again,
            self.path.absolute(),
            self.layout,
            self.first_token_id,
            self.shards,
            self.where,
        )

    def _indices(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices of each id along the first axis, and along that of positions (else 0)."""
        row, position = self.places(token_ids)
        if self.layout.position_axis is None:
            return token_ids - self.first_token_id, np.zeros_like(position)
        return row, position

    def _pieces_per_row(self, size: Sequence[int]) -> int:
        counts = [-(-n // int(length)) for n, length in zip(self.layout.shape, size, strict=True)]
        return math.prod(n for axis, n in enumerate(counts) if axis not in (0, self.layout.position_axis))

    def gather(self, token_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Read rows as SiteReader.gather does, from one or several chunks per row.

        Args:
            token_ids, out: see SiteReader.gather.
        """
        token_ids = np.asarray(token_ids).astype(np.int64, casting="safe", copy=False)
        row, position = self._indices(token_ids)
        whole = np.empty((len(token_ids), *self.layout.row_shape), np.float32) if out is None else out
        X = flat_rows(whole, len(token_ids), self.layout)
        try:
            with np.errstate(over="raise"):
                for chunk, places in self.by_chunk(row, position):
                    block = self._block(chunk, token_ids[places])
                    X[places] = block[
                        row[places] - chunk[0] * self.trees_per_chunk,
                        position[places] - chunk[1] * self.positions_per_chunk,
                    ]
        except FloatingPointError:
            raise BadInput(f"an activation is too large for {X.dtype}; read it as {self._array.dtype}") from None
        self._check()
        fill = self._array.fill_value
        tells_nothing = self.is_token is not None and not (fill is not None and np.isnan(fill))  # padding is no NaN
        self.refuse_padding(token_ids, np.isnan(X[:, 0]) | tells_nothing)
        return whole

    def by_chunk(self, row: np.ndarray, position: np.ndarray) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """Group rows by the chunk that holds them.

        Args:
            row: int64 [n], rows of the array.
            position: int64 [n].

        Yields:
            (chunk's number along trees, along positions), and intp [m]: which of the n lie in the
            chunk.
        """
        n_positions = 1 if self.layout.position_axis is None else self.layout.chunks_per_shard
        n_along_positions = -(-n_positions // self.positions_per_chunk)
        key = row // self.trees_per_chunk * n_along_positions + position // self.positions_per_chunk
        order = np.argsort(key, kind="stable")
        starts = np.flatnonzero(np.diff(key[order], prepend=-1))
        for places in np.split(order, starts[1:]) if len(order) else ():
            number = int(key[places[0]])
            yield (number // n_along_positions, number % n_along_positions), places

    def _block(self, chunk: tuple[int, int], token_ids: np.ndarray) -> np.ndarray:
        """All rows of a chunk, [tree, position, row_items]."""
        axis = self.layout.position_axis
        span = [slice(None)] * len(self.layout.shape)
        span[0] = slice(chunk[0] * self.trees_per_chunk, (chunk[0] + 1) * self.trees_per_chunk)
        if axis is not None:
            span[axis] = slice(chunk[1] * self.positions_per_chunk, (chunk[1] + 1) * self.positions_per_chunk)
        try:
            if not self._is_written(span):
                raise not_stored(self.where, token_ids, np.ones(len(token_ids), bool), "not ingested yet")
            block = np.asarray(self._array[tuple(span)])
            block = block[:, None] if axis is None else np.moveaxis(block, axis, 1)
        except NotStored:
            raise
        except Exception as error:  # for the reasons given in _open
            raise limit_reached(error, f"cannot read a chunk of {self.path} of {self.where}") or Damaged(
                f"a chunk of {self.path} of {self.where} cannot be read ({_one_line(error)}); restore it from a copy"
            ) from error
        return block.reshape(*block.shape[:2], -1)

    def _is_written(self, span: list[slice]) -> bool:
        """False if the object in which a chunk begins is missing; zarr reads fill values for it."""
        from zarr.core.sync import sync

        stored = self._array.shards or self._array.chunks
        number = tuple((part.start or 0) // int(size) for part, size in zip(span, stored, strict=True))
        key = self._array.metadata.encode_chunk_key(number)
        return bool(sync((self._array.store_path / key).exists()))


def _open_again(
    path: Path,
    layout: Layout,
    first_token_id: int,
    shards: Mapping[int, str],
    where: str,
    folder: Reading,
    is_token: IsToken,
) -> ForeignReader:
    return ForeignReader(path, layout, first_token_id, shards, where, is_token, folder.check)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
