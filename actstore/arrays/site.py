"""What a reader of a site is, and what the readers of any array share: which ids have a place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actstore.arrays.address import POSITIONS_PER_TREE
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
    runs: int
    bytes_needed: int
    bytes_read: int
    bytes_in_memory: int | None


class Reader(Protocol):
    """Reads the activations of one site of one run; see SiteReader for what each method returns."""

    layout: Layout
    first_token_id: int
    shards: dict[int, str]  # see Placed
    where: str
    sites_at_once: int  # that are read beside each other: 1 where no answer takes long

    @property
    def of_what(self) -> str:
        """What a row of tokens is called in messages."""
        ...

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

    Attributes:
        sites_at_once: see Reader.

    Args:
        layout: the array's layout on the disk.
        first_token_id: the first id of the array's span.
        shards: the path of each stored batch, inside the store.
        where: run and site, for messages.
        is_token: see SiteReader.
    """

    def __init__(
        self, layout: Layout, first_token_id: int, shards: Mapping[int, str], where: str, is_token: IsToken | None
    ) -> None:
        self.layout, self.first_token_id, self.shards, self.where = layout, first_token_id, dict(shards), where
        self.is_token = is_token
        self.sites_at_once = 1

    @property
    def of_what(self) -> str:
        """What a row of tokens is called in messages."""
        return "tree" if self.layout.stride == POSITIONS_PER_TREE and self.layout.position_axis else "sequence"

    def places(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each id lies, see Layout.split.

        Args:
            token_ids: int64 [n].

        Raises:
            NotStored: an id lies outside the array, or its batch is not ingested yet.
        """
        layout = self.layout
        local = token_ids - self.first_token_id
        outside = (local < 0) | (local >= layout.n_ids)
        row, position = layout.split(local)
        outside |= position >= layout.chunks_per_shard
        if outside.any():
            raise not_stored(self.where, token_ids, outside, f"of no {self.of_what} of this run")
        missing = ~np.isin(row // layout.rows_per_chunk, list(self.shards))
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
            raise not_stored(self.where, token_ids, suspect, f"padding, past its {self.of_what}'s last token")


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
