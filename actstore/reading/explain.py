"""Say what a read will cost before it reads: rows, chunks, shards, bytes wanted and touched."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.arrays.address import POSITION_BITS
from actstore.arrays.foreign import ForeignReader
from actstore.arrays.reader import SiteReader
from actstore.reading.rows import read_ids

if TYPE_CHECKING:
    from actstore.reading.given import Tokens
    from actstore.reading.opened import Opened


@dataclass(frozen=True)
class Explanation:
    """The cost of one read.

    Attributes:
        run: the run to read.
        sites: the sites, by the names asked for.
        rows: number of the query's rows, each of which becomes a row of X.
        tokens: number of distinct tokens.
        chunks: number of chunks that hold them, over all sites.
        shards: number of files that hold them, over all sites.
        bytes_needed: size of the distinct tokens' activations, as stored.
        bytes_read: bytes touched to read them: whole pages of the mapped shards and of their
            indexes, or whole decoded chunks of an array that is read through zarr-python. A disk
            may read ahead more. A store that checks also reads each shard whole, once.
    """

    run: str
    sites: tuple[str, ...]
    rows: int
    tokens: int
    chunks: int
    shards: int
    bytes_needed: int
    bytes_read: int

    @property
    def amplification(self) -> float:
        """bytes_read / bytes_needed; 1 if nothing is read."""
        return self.bytes_read / self.bytes_needed if self.bytes_needed else 1.0

    def to_dict(self) -> dict[str, Any]:
        """All values, by name."""
        return {**vars(self), "sites": list(self.sites), "amplification": self.amplification}

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows of {self.tokens:,} tokens at {', '.join(self.sites)} of run {self.run!r}: "
            f"{self.chunks:,} chunks in {self.shards:,} shards; {_size(self.bytes_read)} to be read for "
            f"{_size(self.bytes_needed)} of activations ({self.amplification:.2f}×)"
        )


@dataclass(frozen=True)
class Cost:
    """One site's chunks, shards and bytes, see Explanation."""

    chunks: int
    shards: int
    bytes_needed: int
    bytes_read: int


def explain(
    store: Opened,
    query: Tokens,
    run: str,
    sites: Sequence[str],
    params: Mapping[str, Any] | None,
    timeout: float | None,
    memory: str | int | None,
) -> Explanation:
    """See Store.explain."""
    readers = [store.reader(run, site) for site in sites]
    token_ids, _ = read_ids(store, run, query, params, timeout, memory)
    tokens = np.unique(token_ids)
    of_sites = [cost(reader, tokens, store.check) for reader in readers]
    totals = {field: sum(getattr(of_site, field) for of_site in of_sites) for field in Cost.__dataclass_fields__}
    return Explanation(run=run, sites=tuple(sites), rows=len(token_ids), tokens=len(tokens), **totals)


def cost(reader: SiteReader, tokens: np.ndarray, check: bool = False) -> Cost:
    """What a site's reader touches for these tokens.

    Args:
        tokens: int64 [n], distinct.
        check: True if each shard is compared with its hash, and so read whole.

    Raises:
        NotStored: a token belongs to no tree of the run or is not ingested yet. Padding is not
            detected here; a read raises for it.
    """
    row, position = reader.places(tokens)
    if isinstance(reader, ForeignReader):
        return _of_chunks(reader, row, position)
    return _of_whole_shards(reader, row, position) if check else _of_pages(reader, row, position)


def _of_chunks(reader: ForeignReader, row: np.ndarray, position: np.ndarray) -> Cost:
    chunks = np.array([chunk for chunk, _ in reader.by_chunk(row, position)], np.int64).reshape(-1, 2)
    shards = np.unique(chunks // reader.chunks_per_shard, axis=0)
    return Cost(
        chunks=len(chunks) * reader.chunks_per_row,
        shards=len(shards) * reader.shards_per_row,
        bytes_needed=len(row) * reader.row_bytes,
        bytes_read=len(chunks) * reader.chunks_per_row * reader.chunk_bytes,
    )


def _of_whole_shards(reader: SiteReader, row: np.ndarray, position: np.ndarray) -> Cost:
    layout, batch = reader.layout, row // reader.layout.trees_per_shard
    n_chunks, n_shards = len(np.unique(batch << POSITION_BITS | position)), len(np.unique(batch))
    n_bytes = len(row) * layout.row_items * layout.item_bytes
    return Cost(n_chunks, n_shards, n_bytes, n_shards * layout.shard_bytes)


def _of_pages(reader: SiteReader, row: np.ndarray, position: np.ndarray) -> Cost:
    layout = reader.layout
    row_bytes = layout.row_items * layout.item_bytes
    batch, slot = np.divmod(row, layout.trees_per_shard)
    batches = np.unique(batch).tolist()
    index_start = np.array([layout.shard_bytes - layout.index_bytes])
    n_chunks = n_pages = 0
    for number in batches:
        of_batch = batch == number
        positions = position[of_batch]
        starts = reader.mapped.chunk_starts(number)[positions] + slot[of_batch] * row_bytes
        pages = np.union1d(_pages(starts, row_bytes), _pages(index_start, layout.index_bytes))
        n_chunks, n_pages = n_chunks + len(np.unique(positions)), n_pages + len(pages)
    return Cost(n_chunks, len(batches), len(row) * row_bytes, n_pages * mmap.PAGESIZE)


def _pages(starts: np.ndarray, n_bytes: int) -> np.ndarray:
    """int64: numbers of the pages that stretches of n_bytes touch, each page once."""
    first, last = starts // mmap.PAGESIZE, (starts + n_bytes - 1) // mmap.PAGESIZE
    most = int((last - first).max(initial=0)) + 1
    return np.unique(np.concatenate([np.minimum(first + step, last) for step in range(most)]))


def _size(n_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes:,} bytes"
