"""Say what a read will cost before it reads: rows, chunks, shards, runs, bytes wanted and read."""

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
        runs: number of stretches of these files, each read in one piece.
        bytes_needed: size of the distinct tokens' activations, as stored.
        bytes_read: size of the runs. They are pages of mapped shards and of their indexes, small
            gaps between pages included; ranges of shards in a bucket; or whole chunks where chunks
            are compressed or an array is read through zarr-python. A store that checks reads whole
            shards.
        in_memory: share of bytes_read that the system holds in memory, [0, 1], and need not read;
            None where that is not known. Linux alone knows, for mapped shards; it claims all of a
            file to which this user may not write.
    """

    run: str
    sites: tuple[str, ...]
    rows: int
    tokens: int
    chunks: int
    shards: int
    runs: int
    bytes_needed: int
    bytes_read: int
    in_memory: float | None

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
            f"{self.chunks:,} chunks in {self.shards:,} shards; {_size(self.bytes_read)} in {self.runs:,} runs to be read "
            f"for {_size(self.bytes_needed)} of activations ({self.amplification:.2f}×)"
            + ("" if self.in_memory is None else f", {self.in_memory:.0%} in memory")
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
    readers = store.readers(run, sites)
    token_ids, _ = read_ids(store, run, query, params, timeout, memory)
    tokens = np.unique(token_ids)
    of_sites = [reader.cost(tokens) for reader in readers]
    counted = [field for field in Cost.__dataclass_fields__ if field != "bytes_in_memory"]
    totals = {field: sum(getattr(of_site, field) for of_site in of_sites) for field in counted}
    held = [of_site.bytes_in_memory for of_site in of_sites]
    share = None if None in held else sum(filter(None, held)) / max(totals["bytes_read"], 1)
    return Explanation(run, tuple(sites), len(token_ids), len(tokens), in_memory=share, **totals)


def _size(n_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes:,} bytes"
