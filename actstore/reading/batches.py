"""Shuffled batches of activations for training: a torch IterableDataset over a query's rows.

Random rows of a set that is larger than memory cost a disk access each. The order is therefore
drawn in two steps: the shards are shuffled, then the rows of each window of consecutive shards. A
window's shards are read as its batches are yielded, and released after the window. Both draws
depend only on ids, seed and epoch, so a batch is known by its number. A stopped training can
continue at a batch, and each of several workers knows its own batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from actstore.arrays.site import Reader, not_stored
from actstore.errors import BadInput, Damaged, NotStored
from actstore.reading import activations
from actstore.reading.rows import read_ids
from actstore.reading.sites import open_site, shard_hashes
from actstore.storage.at import absolute, at
from actstore.storage.backend import Reading
from actstore.storage.machine import limit_reached

if TYPE_CHECKING:
    from actstore.reading.given import Tokens
    from actstore.reading.opened import Opened

ROWS_AT_ONCE = 2**14
IDS_AT_ONCE = 2**20  # that are looked up: what is computed of them on the way takes 50 bytes each
SIGNED: dict[Any, Any] = {pl.UInt16: pl.Int32, pl.UInt32: pl.Int64}  # torch can hardly compute with these
TENSORS = (pl.Boolean, pl.UInt8, pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt64, pl.Float32, pl.Float64)


class Batch(NamedTuple):
    """What an iteration yields: `for X, columns in batches`.

    Attributes:
        X: float32 [b, …], the activations.
        columns: each column of the query: a tensor [b, …], or a list of b values.
    """

    X: torch.Tensor
    columns: dict[str, Any]


def _refuse_stacking(batches: Sequence[Batch], *, collate_fn_map: object = None) -> NoReturn:
    """Refuse what a DataLoader with a batch_size of its own does: stack batches into [64, b, …].

    torch calls this function, in a worker too, with the batches to stack.

    Raises:
        BadInput: always.
    """
    raise BadInput(
        "a DataLoader with a batch_size stacks whole batches, and these are batches already: write "
        "DataLoader(batches, batch_size=None), and say how many rows a batch has where it is made, "
        "store.batches(…, batch_size=64)"
    )


default_collate_fn_map[Batch] = _refuse_stacking  # torch's documented place for types of one's own


class Batches(IterableDataset):
    """Batches of a query's rows; Store.batches makes this object and says more.

    Attributes:
        n_rows: number of the query's rows.
        n_batches: batches per epoch.
    """

    def __init__(
        self,
        store: Opened,
        query: Tokens,
        run: str,
        sites: Sequence[str],
        params: Mapping[str, Any] | None,
        *,
        one_site: bool,
        batch_size: int,
        shuffle: bool,
        seed: int,
        start: int,
        drop_last: bool,
        window: int,
        timeout: float | None,
        memory: str | int | None,
    ) -> None:
        _check_counts(batch_size=(batch_size, 1), window=(window, 1), seed=(seed, 0), start=(start, 0))
        readers = [open_site(store, run, site) for site in sites]
        activations.same_row_shape(readers, sites)
        ids, rows = read_ids(store, run, query, params, timeout, memory)
        _refuse_what_is_not_there(store, readers, ids)
        _refuse_what_was_not_given(store, run, sites, readers, ids)
        self._ids, self._columns = ids, {name: _column(rows[name]) for name in rows.columns}
        self._again, self._one_site = [reader.again() for reader in readers], one_site
        self._path, self._identity = absolute(store.path), store.folder.identity()
        self._committed = store.folder.committed
        self._kept = shard_hashes(store, run, readers) if store.folder.reads_ranges else None
        store.folder.check()
        self._order = _Shuffled(ids, readers[0], seed, window) if shuffle else _AsAsked(len(ids), window)
        self._batch_size, self.n_rows = batch_size, len(ids)
        self.n_batches = len(ids) // batch_size if drop_last else -(-len(ids) // batch_size)
        self._now = torch.zeros(
            2, dtype=torch.int64
        ).share_memory_()  # epoch, start: workers that persist see it change
        self.set_epoch(0, start)

    def __len__(self) -> int:
        """Number of batches that an iteration begun now yields, over all workers."""
        return self.n_batches - int(self._now[1])

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch of the next iteration; each epoch has its own order.

        A DataLoader's workers see the new epoch, too.

        Args:
            epoch: counted from 0.
            start: number of the first batch to yield.

        Raises:
            BadInput: there is no such epoch or batch.
        """
        _check_counts(epoch=(epoch, 0), start=(start, 0))
        if start > self.n_batches:
            raise BadInput(
                f"got start {start}; an epoch has {self.n_batches:,} batches: start at one of them, from 0 on"
            )
        self._now[0], self._now[1] = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self._now.tolist()
        worker = get_worker_info()
        mine, n_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        order, folder = self._order.epoch(epoch), self._open_folder()
        try:
            window, readers = None, []
            for number in range(start + mine, self.n_batches, n_workers):
                first = number * self._batch_size
                stop = min(first + self._batch_size, self.n_rows)
                if order.window_at(first) != window:  # release the old window's maps, and their pages
                    window, readers = order.window_at(first), [again(folder, _are_tokens) for again in self._again]
                rows = order.rows(first, stop)
                yield Batch(self._read(readers, rows), {name: column[rows] for name, column in self._columns.items()})
        finally:
            folder.close()

    def _read(self, readers: Sequence[Reader], rows: np.ndarray) -> torch.Tensor:
        X: torch.Tensor = activations.read_activations(readers, self._ids[rows], self._one_site, "float32", "torch")
        return X

    def _open_folder(self) -> Reading:
        """Open the store's folder in this process.

        Raises:
            Damaged: another folder is in its place.
        """
        try:
            folder = at(self._path).hold(self._committed, self._kept)
        except OSError as error:
            raise limit_reached(error, f"cannot open {self._path}") or Damaged(
                f"{self._path} cannot be opened ({error}); make the batches again"
            ) from error
        folder.check()
        if folder.identity() != self._identity:
            raise Damaged(f"{self._path} was replaced since these batches were made; make them again")
        return folder


def _are_tokens(token_ids: np.ndarray) -> np.ndarray:
    """True for all ids: they were looked up before, so a NaN is the model's own."""
    return np.ones(len(token_ids), bool)


class _Epoch:
    """The order of one epoch's rows, in windows.

    Args:
        starts: int64 [n_windows]: the place at which each window begins.
        n_rows: number of places.
    """

    def __init__(self, starts: np.ndarray, n_rows: int) -> None:
        self._bounds = np.append(starts, n_rows)
        self._kept: tuple[int, np.ndarray] | None = None

    def window_at(self, place: int) -> int:
        return int(np.searchsorted(self._bounds, place, side="right")) - 1

    def rows(self, first: int, stop: int) -> np.ndarray:
        """int64 [stop - first]: numbers of the query's rows at these places."""
        parts = []
        for window in range(self.window_at(first), self.window_at(stop - 1) + 1):
            start, end = int(self._bounds[window]), int(self._bounds[window + 1])
            if self._kept is None or self._kept[0] != window:
                self._kept = (window, self._window(window, start, end))
            parts.append(self._kept[1][max(first - start, 0) : min(stop, end) - start])
        return np.concatenate(parts)

    def _window(self, window: int, start: int, end: int) -> np.ndarray:
        return np.arange(start, end)


class _AsAsked:
    """The query's own order."""

    def __init__(self, n_rows: int, window: int) -> None:
        self._n_rows, self._window_rows = n_rows, window

    def epoch(self, epoch: int) -> _Epoch:
        return _Epoch(np.arange(0, self._n_rows, self._window_rows), self._n_rows)


class _Shuffled:
    """A random order in which neighbours come from few shards.

    Rows are first sorted by id, so that the query's order does not matter.

    Args:
        ids: int64 [n], token ids.
        site: says which shard holds an id.
        seed: seed of every draw.
        window: rows per window; a window is the shards that begin within so many rows.
    """

    def __init__(self, ids: np.ndarray, site: Reader, seed: int, window: int) -> None:
        self.seed, self.window = seed, window
        self.by_id = None if np.all(ids[:-1] <= ids[1:]) else np.argsort(ids, kind="stable")  # None: in order already
        self.starts = self._starts(ids, site)
        self.lengths = np.diff(self.starts, append=len(ids))

    def _starts(self, ids: np.ndarray, site: Reader) -> np.ndarray:
        """int64 [n_shards]: the place of each shard's first id among the sorted ids."""
        found, last = [np.empty(0, np.int64)], -1
        for start in range(0, len(ids), IDS_AT_ONCE):
            places = slice(start, start + IDS_AT_ONCE)
            shard = site.layout.shard_of(
                ids[places if self.by_id is None else self.by_id[places]] - site.first_token_id
            )
            found.append(start + np.flatnonzero(np.diff(shard, prepend=last)))
            last = int(shard[-1])
        return np.concatenate(found)

    def epoch(self, epoch: int) -> _Epoch:
        return _ShuffledEpoch(self, epoch)


class _ShuffledEpoch(_Epoch):
    def __init__(self, order: _Shuffled, epoch: int) -> None:
        self._order, self._epoch = order, epoch
        self._shards = _permutation(len(order.starts), order.seed, epoch, 0)
        lengths = order.lengths[self._shards]
        begins = np.cumsum(lengths) - lengths
        self._first_shards = np.flatnonzero(np.diff(begins // order.window, prepend=-1))
        super().__init__(begins[self._first_shards], int(lengths.sum()))

    def _window(self, window: int, start: int, end: int) -> np.ndarray:
        shards = self._shards[slice(*np.append(self._first_shards, len(self._shards))[window : window + 2])]
        lengths = self._order.lengths[shards]
        begins = np.cumsum(lengths) - lengths
        places = np.repeat(self._order.starts[shards] - begins, lengths) + np.arange(end - start)
        drawn = places[_permutation(end - start, self._order.seed, self._epoch, 1 + window)]
        return drawn if self._order.by_id is None else self._order.by_id[drawn]


def _permutation(n: int, seed: int, epoch: int, draw: int) -> np.ndarray:
    """Draw a permutation, int64 [n].

    The draw uses a generator's raw bits. numpy keeps these from version to version, unlike its
    shuffles.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, draw)))
    return np.argsort(bits.random_raw(n), kind="stable")


class _Values:
    """A column that becomes a list of Python values; in Arrow, which forked workers can use."""

    def __init__(self, values: pa.Array) -> None:
        self._values = values

    def __getitem__(self, rows: np.ndarray) -> list[Any]:
        return list(self._values.take(pa.array(rows)).to_pylist())


class _Numbers:
    """A column that becomes a tensor."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __getitem__(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._values[rows])


def _column(values: pl.Series) -> _Values | _Numbers:
    if values.dtype in SIGNED:
        values = values.cast(SIGNED[type(values.dtype)])
    dtype = values.dtype.inner if isinstance(values.dtype, pl.Array) else values.dtype
    is_array = isinstance(values.dtype, pl.Array)
    if dtype not in TENSORS or values.has_nulls() or (is_array and values.explode().has_nulls()):
        return _Values(values.to_arrow())
    return _Numbers(values.to_numpy())


def _refuse_what_is_not_there(store: Opened, readers: Sequence[Reader], ids: np.ndarray) -> None:
    """Look up every id before the first epoch begins.

    Raises:
        NotStored: an id has no activation at one of the sites.
    """
    if not len(ids):
        return
    blocks = [slice(start, start + IDS_AT_ONCE) for start in range(0, len(ids), IDS_AT_ONCE)]
    for reader in readers:
        try:
            for block in blocks:
                reader.places(ids[block])
        except NotStored:
            reader.places(ids)  # which counts them all
            raise
    known = store.sql(
        "select first_token_id, first_token_id + n_tokens from sequences where first_token_id + n_tokens > $first "
        "and first_token_id <= $last order by first_token_id",
        {"first": int(ids.min()), "last": int(ids.max())},
    )
    first, stop = (known[:, column].to_numpy() for column in (0, 1))
    padding = np.ones(len(ids), bool)
    for block in blocks if len(first) else []:
        before = np.searchsorted(first, ids[block], "right") - 1
        padding[block] = (before < 0) | (ids[block] >= stop[before])
    if padding.any():
        raise not_stored(readers[0].where, ids, padding, f"padding, past its {readers[0].of_what}'s last token")


def _refuse_what_was_not_given(
    store: Opened, run: str, sites: Sequence[str], readers: Sequence[Reader], ids: np.ndarray
) -> None:
    """Read appended sites once: only their numbers tell which tokens were given.

    Raises:
        NotStored: an id was not given.
    """
    rows = store.sql("select site, short from sites where run = $run and lineage is not null", {"run": run})
    appended = {name for row in rows.rows() for name in row}
    for site, reader in zip(sites, readers, strict=True):
        for start in range(0, len(ids) if site in appended else 0, ROWS_AT_ONCE):
            reader.gather(ids[start : start + ROWS_AT_ONCE])


def _check_counts(**counts: tuple[Any, int]) -> None:
    for name, (count, least) in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < least:
            raise BadInput(f"got {name} {count!r}; give a whole number from {least} on")
