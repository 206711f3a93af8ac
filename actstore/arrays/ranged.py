"""Read a site's rows by ranges of its shards, where nothing can be mapped: in a bucket.

A request takes tens of milliseconds however few bytes it asks for. Small chunks are therefore read
whole, and so are chunks of which half is wanted; each whole chunk is compared with its crc32c. Near
ranges become one. A shard's index is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import google_crc32c
import numpy as np

from actstore.arrays import index
from actstore.arrays.copying import flat_rows
from actstore.arrays.layout import CRC_BYTES, Layout
from actstore.arrays.plan import joined
from actstore.arrays.reader import SiteReader
from actstore.arrays.site import Cost, IsToken, Placed, Reader, not_stored
from actstore.errors import BadInput, Damaged, NotStored
from actstore.storage.backend import Reading, Storage
from actstore.storage.several import several

SMALL = 256 << 10  # bytes of a chunk that comes sooner than the answer to another request
NEAR = 1 << 20  # bytes between two ranges that come sooner than the answer to another request
SHARDS_AT_ONCE = 32  # that are read from at the same time, as far as memory allows; see several.py
SITES_AT_ONCE = 4  # of each, so many shards are read from
DECODED_AT_ONCE = 8  # shards that lie on a disk, and are compressed


@dataclass(frozen=True)
class Plan:
    """What is read of one shard.

    Attributes:
        ranges: (start, length) of each range that is asked for.
        offsets: int64 [n]: the byte of the shard at which each wanted row starts.
        whole: the byte at which each chunk starts that is read whole.
    """

    ranges: list[tuple[int, int]]
    offsets: np.ndarray
    whole: np.ndarray

    @property
    def n_bytes(self) -> int:
        """Bytes of all ranges."""
        return sum(length for _, length in self.ranges)


class RangedReader(Placed):
    """The committed shards of one site of one run, read by ranges.

    Args:
        layout, first_token_id, shards, where, place, is_token: see SiteReader.
    """

    def __init__(
        self,
        layout: Layout,
        first_token_id: int,
        shards: Mapping[int, str],
        where: str,
        place: Storage,
        is_token: IsToken | None = None,
    ) -> None:
        super().__init__(layout, first_token_id, shards, where, is_token)
        self._place = place
        self._indexes: dict[int, np.ndarray] = {}  # of each shard whose index was read
        self.sites_at_once = SITES_AT_ONCE if place.reads_ranges else 1
        self.at_once = SHARDS_AT_ONCE if place.reads_ranges else DECODED_AT_ONCE

    def gather(self, token_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Read rows as SiteReader.gather does.

        Args:
            token_ids, out: see SiteReader.gather.
        """
        token_ids = np.asarray(token_ids).astype(np.int64, casting="safe", copy=False)
        row, position = self.places(token_ids)
        whole = np.empty((len(token_ids), *self.layout.row_shape), np.float32) if out is None else out
        X = flat_rows(whole, len(token_ids), self.layout)

        def read(part: tuple[int, np.ndarray, Any]) -> None:
            batch, of_batch, plan = part
            rows = self._rows(batch, plan, row[of_batch], position[of_batch])
            with np.errstate(over="raise"):
                X[of_batch] = rows

        try:
            parts = self._parts(row, position, token_ids)
            for _ in several(read, parts, self.at_once, lambda part: part[2].n_bytes):
                pass
        except FloatingPointError:
            raise BadInput(f"an activation is too large for {X.dtype}; read it as float32") from None
        self.refuse_padding(token_ids, np.isnan(X[:, 0]))
        return whole

    def _parts(self, row: np.ndarray, position: np.ndarray, token_ids: np.ndarray) -> list[tuple[int, np.ndarray, Any]]:
        """Each shard's number, which of the rows are in it (intp), and what is read of it."""
        of_row, parts = row // self.layout.rows_per_chunk, []
        for batch in self.look_at(of_row):
            which = np.flatnonzero(of_row == batch)
            parts.append((batch, which, self._plan(batch, row[which], position[which], token_ids[which])))
        return parts

    def look_at(self, of_row: np.ndarray) -> list[int]:
        """Read the indexes of shards, several at a time.

        Args:
            of_row: int64 [n], the shards' numbers, with repeats.

        Returns:
            Each number once, in order.
        """
        batches: list[int] = np.unique(of_row).tolist()
        for _ in several(self._chunks, batches, self.at_once):
            pass
        return batches

    def _rows(self, batch: int, plan: Any, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The rows of one shard, [n, row_items], see encoding.decoded."""
        layout, path = self.layout, self.shards[batch]
        starts, lengths = np.array(plan.ranges, np.int64).reshape(-1, 2).T
        parts = self._place.read_ranges(path, plan.ranges)
        if [len(part) for part in parts] != lengths.tolist():
            raise self._damaged(path, "is shorter than it was")
        content = np.frombuffer(b"".join(parts), np.uint8)
        shift = np.cumsum(lengths) - lengths - starts  # from a byte of the shard to one of what was read
        for start in (plan.whole + shift[np.searchsorted(starts, plan.whole, "right") - 1]).tolist():
            chunk = content[start : start + layout.chunk_bytes].tobytes()
            if google_crc32c.value(chunk[:-CRC_BYTES]).to_bytes(CRC_BYTES, "little") != chunk[-CRC_BYTES:]:
                raise self._damaged(path, "has a chunk that is not what was committed")
        row_bytes = layout.row_bytes
        windows = np.lib.stride_tricks.as_strided(
            content[:row_bytes].view(f"V{row_bytes}"),
            ((len(content) - row_bytes) // layout.item_bytes + 1,),
            (layout.item_bytes,),
            writeable=False,
        )
        found = (plan.offsets + shift[np.searchsorted(starts, plan.offsets, "right") - 1]) // layout.item_bytes
        return layout.decoded(windows[found])

    def _plan(self, batch: int, row: np.ndarray, position: np.ndarray, token_ids: np.ndarray) -> Any:
        layout = self.layout
        row_bytes = layout.row_bytes
        begins = self._chunks(batch)[position]
        if (lacking := begins < 0).any():
            raise self._lacking(self.shards[batch], len(np.unique(position[lacking])), token_ids)
        offsets = begins + row % layout.rows_per_chunk * row_bytes
        _, chunk, n_wanted = np.unique(position, return_inverse=True, return_counts=True)
        whole = (layout.chunk_bytes <= SMALL) | (2 * n_wanted[chunk] * row_bytes >= layout.chunk_bytes)
        first = np.where(whole, begins, offsets)
        last = np.where(whole, begins + layout.chunk_bytes, offsets + row_bytes)
        runs = joined(np.full(len(row), batch), first, last, NEAR)
        ranges = list(zip(runs.starts.tolist(), (runs.ends - runs.starts).tolist(), strict=True))
        return Plan(ranges, offsets, np.unique(begins[whole]))

    def _chunks(self, batch: int) -> np.ndarray:
        """int64 [chunks_per_shard]: the byte at which each chunk starts; below 0 if missing."""
        if batch not in self._indexes:
            layout, inside = self.layout, self.shards[batch]
            path = self._place.root / inside
            try:
                size, content = self._place.end(inside, layout.index_bytes)
            except FileNotFoundError:
                raise self._damaged(inside, "is missing") from None
            index.check_size(layout, size, path, self.where)
            self._indexes[batch] = index.chunk_starts(layout, content, size, path, self.where) * layout.item_bytes
        return self._indexes[batch]

    def _lacking(self, path: str, n_chunks: int, token_ids: np.ndarray) -> NotStored | Damaged:
        """Why a shard lacks chunks of some tokens: the tokens are none, or the shard is damaged."""
        layout = self.layout
        if layout.position_axis is None and self.is_token and not (there := self.is_token(token_ids)).all():
            return not_stored(self.where, token_ids, ~there, "past the last token of its batch")
        return self._damaged(path, f"lacks {n_chunks} chunks")

    def _damaged(self, path: str, what: str) -> Damaged:
        return Damaged(f"{self._place.root / path} of {self.where} {what}; restore it from a copy of the store")

    def cost(self, token_ids: np.ndarray) -> Cost:
        """The ranges of a gather, and the indexes of their shards.

        Args:
            token_ids: int64 [n], distinct.

        Raises:
            NotStored: see `places`.
        """
        row, position = self.places(token_ids)
        layout, parts = self.layout, self._parts(row, position, token_ids)
        n_runs = sum(len(plan.ranges) + 1 for _, _, plan in parts)
        n_bytes = sum(plan.n_bytes + layout.index_bytes for _, _, plan in parts)
        n_chunks = len(np.unique(row // layout.rows_per_chunk << layout.key_bits | position))
        n_needed = len(row) * layout.row_bytes
        return Cost(n_chunks, len(parts), n_runs, n_needed, n_bytes, bytes_in_memory=0)

    def again(self) -> Callable[[Reading, IsToken], Reader]:
        """See site.Reader; the site is opened to read all of it, from copies of its shards."""
        return partial(_open_again, self.layout, self.first_token_id, self.shards, self.where)


def _open_again(
    layout: Layout, first_token_id: int, shards: Mapping[int, str], where: str, place: Reading, is_token: IsToken
) -> SiteReader:
    return SiteReader(layout, first_token_id, shards, where, place, is_token)
