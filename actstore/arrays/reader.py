"""One Zarr array per site: float32 [tree, position, d_model], or [tree, head, query, key].

A shard holds a batch of trees, an inner chunk one position of that batch. Every study reads a few
positions (the target token of each edge, say) of many trees, and no study reads every position of
one tree. Chunks are uncompressed, since residual streams hardly compress, and a crc32c follows
each. A reader can therefore map a shard into memory and copy rows out of it. Numbers that were
never written are NaN, padding too.

Shards follow the Zarr v3 specification
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/): the inner chunks, then
offset and length of each as little-endian u64, then the crc32c of that index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from actstore.arrays.address import POSITION_BITS, POSITION_MASK, POSITIONS_PER_TREE
from actstore.arrays.copying import copy_rows, flat_rows, n_threads
from actstore.arrays.layout import Layout
from actstore.arrays.mapped import Shards
from actstore.errors import Damaged, NotStored
from actstore.storage.regular import open_regular


class SiteReader:
    """The committed shards of one site of one run, mapped into memory.

    Args:
        layout: the array's layout on the disk.
        first_tree_id: tree_id of the array's row 0.
        shards: the shard file of each stored batch.
        where: run and site, for messages.
        is_token: takes token ids, int64 [n]; returns bool [n], False for padding. It is asked only
            about rows that begin with NaN, to tell an activation that is NaN from padding. By
            default all such rows are padding.
        opener: opens a shard's path and returns its descriptor.
        opener_reads: True if the opener reads the whole shard, to check it.
    """

    def __init__(
        self,
        layout: Layout,
        first_tree_id: int,
        shards: Mapping[int, Path],
        where: str,
        is_token: Callable[[np.ndarray], np.ndarray] | None = None,
        opener: Callable[[Path], int] = open_regular,
        opener_reads: bool = False,
    ) -> None:
        self.layout, self.first_tree_id, self.shards, self.where = layout, first_tree_id, dict(shards), where
        self._is_token, self.mapped = is_token, Shards(layout, shards, where, opener, opener_reads)

    def gather(self, token_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Read the activations of the given tokens.

        Each row is copied out of its mapped shard. Ids need no sorting, though sorted ids are read
        faster.

        Args:
            token_ids: int64 [n], in any order; repeats are allowed.
            out: array to fill, of any float dtype, with the shape of the result; its rows may lie
                apart (`X[:, 0]`). Default: a new float32 array.

        Returns:
            float32 [n, d_model] (patterns: [n, head, key]), in the order of `token_ids` and in the
            model's own units; `out` if given.

        Raises:
            NotStored: an id has no activation here (it is another dataset's, padding, or not yet
                ingested).
            Damaged: a shard is missing or is not as committed.
            BadInput: a number is too large for `out`.
        """
        layout, token_ids = self.layout, np.asarray(token_ids).astype(np.int64, casting="safe", copy=False)
        windows, offsets = self._find(token_ids)
        if out is None and layout.dtype == "float32" and n_threads(len(offsets) * layout.row_items) == 1:
            X = windows[offsets].view(np.float32).reshape(-1, layout.row_items)
            blank = bool(np.isnan(X[:, 0].min(initial=0)))
        else:
            whole = np.empty((len(token_ids), *layout.row_shape), np.float32) if out is None else out
            X = flat_rows(whole, len(token_ids), layout)
            blank = copy_rows(windows, offsets, X, layout.dtype)
        if blank:
            self._refuse_padding(token_ids, X)
        return X.reshape(-1, *layout.row_shape) if out is None else out

    def _find(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Windows and offsets, see Shards.find.

        A row costs two dozen nanoseconds in all, so each pass over the ids counts.
        """
        row = token_ids - self.first_tree_id * POSITIONS_PER_TREE
        inside = row.min(initial=0) >= 0 and row.max(initial=0) < self.layout.shape[0] * POSITIONS_PER_TREE
        position = row & POSITION_MASK
        row >>= POSITION_BITS
        found = self.mapped.find(row, position) if inside else None
        if found is None:
            self.places(token_ids)  # raises, with which and why
            raise Damaged(
                f"a shard of {self.where} lacks chunks that were committed; restore it from a copy of the store"
            )
        return found

    def places(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row of the array and position of each id, int64 [n] each.

        Args:
            token_ids: int64 [n].

        Raises:
            NotStored: an id lies outside the array, or its batch is not ingested yet.
        """
        layout = self.layout
        row, position = (token_ids >> POSITION_BITS) - self.first_tree_id, token_ids & POSITION_MASK
        outside = (row < 0) | (row >= layout.shape[0]) | (position >= layout.n_positions)
        if outside.any():
            raise not_stored(self.where, token_ids, outside, "of no tree of this run")
        missing = ~np.isin(row // layout.trees_per_shard, list(self.shards))
        if missing.any():
            raise not_stored(self.where, token_ids, missing, "not ingested yet")
        return row, position

    def _refuse_padding(self, token_ids: np.ndarray, X: np.ndarray) -> None:
        """Raise for padding, which reads as NaN throughout; a token's row may hold computed NaN."""
        padding = np.isnan(X[:, 0])
        if self._is_token:
            padding[padding] = ~self._is_token(token_ids[padding])
        if padding.any():
            raise not_stored(self.where, token_ids, padding, "padding, past its tree's last token")


def not_stored(where: str, token_ids: np.ndarray, bad: np.ndarray, why: str) -> NotStored:
    """Build the error that counts the bad ids and names the first.

    Args:
        where: run and site.
        token_ids: int64 [n].
        bad: bool [n].
        why: what is wrong with the bad ids.
    """
    return NotStored(
        f"{where} has no activation for {int(bad.sum()):,} of {len(token_ids):,} token ids, the first being "
        f"{int(token_ids[np.argmax(bad)])} ({why}); choose tokens of the run's own dataset (where dataset = …)"
    )
