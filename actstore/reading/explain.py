"""Say what a read will cost before it reads: rows, chunks, shards, bytes wanted and touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.arrays.site import Cost
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
            indexes, ranges of shards in a bucket, or whole decoded chunks of an array that is read
            through zarr-python. A disk may read ahead more. A store that checks also reads each
            shard whole, once.
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
    of_sites = [reader.cost(tokens) for reader in readers]
    totals = {field: sum(getattr(of_site, field) for of_site in of_sites) for field in Cost.__dataclass_fields__}
    return Explanation(run=run, sites=tuple(sites), rows=len(token_ids), tokens=len(tokens), **totals)


def _size(n_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes:,} bytes"
