"""What a reader of a site is, and what the readers of any array share: which ids have a place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actstore.arrays.address import POSITION_BITS, POSITION_MASK
from actstore.errors import NotStored

if TYPE_CHECKING:
    from actstore.arrays.layout import Layout
    from actstore.storage.backend import Reading

IsToken = Callable[[np.ndarray], np.ndarray]  # token ids, int64 [n] → bool [n], False for padding


@dataclass(frozen=True)
class Cost:
    """What a read at one site touches; reading.explain.Explanation says what each number counts."""

    chunks: int
    shards: int
    bytes_needed: int
    bytes_read: int


class Reader(Protocol):
    """Reads the activations of one site of one run; see SiteReader for what each method returns."""

    layout: Layout
    first_tree_id: int
    where: str

    def gather(self, token_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """See SiteReader.gather."""
        ...

    def places(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Placed.places."""
        ...

    def cost(self, token_ids: np.ndarray) -> Cost:
        """What a gather of distinct ids touches; raises as `places`, and not for padding."""
        ...

    def again(self) -> Callable[[Reading, IsToken], Reader]:
        """A function that opens the site again, in any process that it is pickled to."""
        ...


class Placed:
    """A site's array, and which of its batches are stored.

    Args:
        layout: the array's layout on the disk.
        first_tree_id: tree_id of the array's row 0.
        shards: the path of each stored batch, inside the store.
        where: run and site, for messages.
        is_token: see SiteReader.
    """

    def __init__(
        self, layout: Layout, first_tree_id: int, shards: Mapping[int, str], where: str, is_token: IsToken | None
    ) -> None:
        self.layout, self.first_tree_id, self.shards, self.where = layout, first_tree_id, dict(shards), where
        self.is_token = is_token

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

    def refuse_padding(self, token_ids: np.ndarray, suspect: np.ndarray) -> None:
        """Raise for padding.

        Args:
            token_ids: int64 [n].
            suspect: bool [n], True for ids that may be padding: rows that begin with NaN, as those
                of padding do, and as a token's row may. Overwritten.
        """
        if self.is_token and suspect.any():
            suspect[suspect] = ~self.is_token(token_ids[suspect])
        if suspect.any():
            raise not_stored(self.where, token_ids, suspect, "padding, past its tree's last token")


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
