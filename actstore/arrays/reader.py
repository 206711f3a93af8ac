"""One Zarr array per site: [tree, position, d_model], or [tree, head, query, key].

Sequences of many lengths are one array [row, …] instead, see Layout. A shard holds a batch of
sequences, an inner chunk one position of that batch. Every study reads a few positions (the target
token of each edge, say) of many trees, and no study reads every position of one tree. Chunks are
uncompressed, since residual streams hardly compress, and a crc32c follows each. A reader can
therefore map a shard into memory and copy rows out of it. Numbers that were never written are NaN,
padding too.

Shards follow the Zarr v3 specification
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/): the inner chunks, then
offset and length of each as little-endian u64, then the crc32c of that index.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from actstore.arrays.copying import copy_rows, flat_rows, n_threads
from actstore.arrays.layout import Layout
from actstore.arrays.mapped import Shards, most_maps
from actstore.arrays.plan import Runs, joined, row_pages, whole_pages
from actstore.arrays.site import Cost, IsToken, Placed, not_stored
from actstore.errors import Damaged
from actstore.storage.backend import Reading, Storage

BLOCK = 16 << 20  # bytes of pages that a block of rows may touch
AHEAD = 2  # blocks whose pages are asked for before one is copied


class SiteReader(Placed):
    """The committed shards of one site of one run, mapped into memory.

    Args:
        layout: the array's layout on the disk.
        first_token_id: the first id of the array's span.
        shards: the path of each stored batch's shard.
        where: run and site, for messages.
        place: where the shards are. One that is held with committed hashes reads each shard whole.
        is_token: takes token ids, int64 [n]; returns bool [n], False for padding. It is asked only
            about rows that begin with NaN, to tell an activation that is NaN from padding. By
            default all such rows are padding.
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
        self.files = Shards(layout, shards, where, place)

    def gather(self, token_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Read the activations of the given tokens.

        Each row is copied out of its mapped shard. Ids need no sorting, though sorted ids are read
        faster. Where a sample of the pages is not all in memory, the wanted pages of each block of
        rows are fetched while the blocks before are copied. A few rows of shards that were not read
        before are read by descriptors, all at once.

        Args:
            token_ids: int64 [n], in any order; repeats are allowed.
            out: array to fill, of any float dtype, with the shape of the result; its rows may lie
                apart (`X[:, 0]`). Default: a new float32 array.

        Returns:
            float32 [n, d_model] (patterns: [n, head, key]), in the order of `token_ids` and in the
            model's own units, whatever the stored dtype is; `out` if given.

        Raises:
            NotStored: an id has no activation here (it is another dataset's, padding, or not yet
                ingested).
            Damaged: a shard is missing or is not as committed.
            BadInput: a number is too large for `out`.
        """
        layout, token_ids = self.layout, np.asarray(token_ids).astype(np.int64, casting="safe", copy=False)
        if layout.n_shards > most_maps() // 2 and (groups := self._groups(token_ids)):
            whole = np.empty((len(token_ids), *layout.row_shape), np.float32) if out is None else out
            for group in groups:
                some = np.empty((len(group), *layout.row_shape), whole.dtype)
                whole[group] = self.gather(token_ids[group], some)
            return whole
        windows, offsets, is_read = self._find(token_ids)
        cold = not is_read and self.files.is_cold(windows, offsets)
        if not cold and out is None and layout.dtype == "float32" and n_threads(len(offsets) * layout.row_items) == 1:
            X = windows[offsets].view(np.float32).reshape(-1, layout.row_items)
            blank = bool(np.isnan(X[:, 0].min(initial=0)))
        else:
            whole = np.empty((len(token_ids), *layout.row_shape), np.float32) if out is None else out
            X = flat_rows(whole, len(token_ids), layout)
            blank = (self._copy_cold if cold else copy_rows)(windows, offsets, X, layout)
        if blank:
            self.refuse_padding(token_ids, np.isnan(X[:, 0]))
        return X.reshape(-1, *layout.row_shape) if out is None else out

    def _groups(self, token_ids: np.ndarray) -> list[np.ndarray]:
        """Split ids into groups whose shards can all be mapped at the same time.

        Returns:
            intp [m] each: the places of a group's ids. Empty if all ids are one group.
        """
        shards = self.layout.shard_of(token_ids - self.first_token_id)
        each, at_once = np.unique(shards), most_maps() // 2
        starts = each[at_once::at_once]
        if not len(starts):
            return []
        group = np.searchsorted(starts, shards, "right")
        return np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])

    def _copy_cold(self, windows: np.ndarray, offsets: np.ndarray, X: np.ndarray, layout: Layout) -> bool:
        """See copy_rows. Rows are copied block by block, while the next blocks' pages are read."""
        n_rows = max(BLOCK // max(layout.row_bytes, mmap.PAGESIZE), 1)
        blocks = [slice(first, first + n_rows) for first in range(0, len(offsets), n_rows)]
        fetch, blank = self.files.fetcher(windows), False
        for number in range(-AHEAD, len(blocks)):
            if number + AHEAD < len(blocks):
                fetch(offsets[blocks[number + AHEAD]])
            if number >= 0:
                block = blocks[number]
                blank |= copy_rows(windows, offsets[block], X[block], layout)
        return blank

    def _find(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """See Shards.find.

        A row costs two dozen nanoseconds in all, so each pass over the ids counts.
        """
        local = token_ids - self.first_token_id
        inside = local.min(initial=0) >= 0 and local.max(initial=0) < self.layout.n_ids
        found = self.files.find(*self.layout.split(local)) if inside else None
        if found is None:
            self.places(token_ids)  # raises, with which and why
            if self.layout.position_axis is None and self.is_token and not (there := self.is_token(token_ids)).all():
                raise not_stored(self.where, token_ids, ~there, "past the last token of its batch")
            raise Damaged(
                f"a shard of {self.where} lacks chunks that were committed; restore it from a copy of the store"
            )
        return found

    def cost(self, token_ids: np.ndarray) -> Cost:
        """The pages that a gather reads if none is in memory, and those that are.

        A store that checks reads the whole shards.

        Args:
            token_ids: int64 [n], distinct.

        Raises:
            NotStored: see `places`.
        """
        row, position = self.places(token_ids)
        layout = self.layout
        row_bytes = layout.row_bytes
        batch, slot = np.divmod(row, layout.rows_per_chunk)
        batches = np.unique(batch).tolist()
        n_chunks, n_bytes = len(np.unique(batch << layout.key_bits | position)), len(row) * row_bytes
        if self.files.reads_whole:
            return Cost(n_chunks, len(batches), len(batches), n_bytes, sum(map(self.files.size, batches)), None)
        starts = slot * row_bytes
        for number in batches:
            of_batch = batch == number
            starts[of_batch] += self.files.chunk_starts(number)[position[of_batch]]
        ends = np.array([self.files.size(number) for number in batches], np.int64)
        indexes = whole_pages(Runs(np.array(batches, np.int64), ends - layout.index_bytes, ends), mmap.PAGESIZE)
        wanted = row_pages(layout, batch, starts)
        files, firsts, lasts = (np.concatenate(both) for both in zip(wanted, indexes, strict=True))
        runs = joined(files, firsts, lasts, near=0)
        return Cost(n_chunks, len(batches), len(runs.starts), n_bytes, runs.n_bytes, self.files.n_resident(runs))

    def again(self) -> Callable[[Reading, IsToken], SiteReader]:
        """See site.Reader."""
        return partial(_open_again, self.layout, self.first_token_id, self.shards, self.where)


def _open_again(
    layout: Layout, first_token_id: int, shards: Mapping[int, str], where: str, place: Reading, is_token: IsToken
) -> SiteReader:
    return SiteReader(layout, first_token_id, shards, where, place, is_token)
