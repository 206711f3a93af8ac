"""What a task gives to be stored: sequences in batches, the tables they fill, and their tokens.

A task is a folder beside this file: `trees` draws trees, `corpus` reads documents. A set of
sequences is a pure function of its definition and a batch's number, so that a batch can be made
again, anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from actstore.arrays.address import Ids

# the stored rows of a set: of a table and a batch, or (None) of its definition; raises NotStored
Read = Callable[[str, "int | None"], "pl.DataFrame"]
SPLITS = ("train", "test")
SEQUENCES_PER_TEST_SEQUENCE = 5  # a fifth is held out: enough to test a probe on, and most are left to fit it


def split_numbers(hashes: np.ndarray) -> np.ndarray:
    """uint8 [n]: the split of each sequence as an index into SPLITS, chosen by a hash alone.

    Sequences of one hash are in one split: exact duplicates, and all that is cut from one document.

    Args:
        hashes: uint64 [n]: of the tree, or of the document that a sequence was cut from.
    """
    return (hashes % SEQUENCES_PER_TEST_SEQUENCE == 0).astype("uint8")


class Drawn(Protocol):
    """One batch of sequences.

    Attributes:
        start: index in the set of the first sequence.
        lengths: intp [n]: tokens per sequence, without padding.
    """

    @property
    def start(self) -> int:
        """See the class."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """See the class."""
        ...

    def __len__(self) -> int:
        """Number of sequences, n."""
        ...

    def rows(self, first: Ids, dataset: str, originals: int | None = None) -> dict[str, pl.DataFrame]:
        """The rows that these sequences bring, by table.

        Args:
            first: ids of the batch's first sequence.
            dataset: name of the set.
            originals: first sequence_id of the set that a variant was made from; else None.
        """
        ...


class Sequences(Protocol):
    """A set of sequences to run a model over.

    Attributes:
        task: 'trees' or 'tokens'.
        n_sequences: sequences of the set.
        n_batches: batches of the set.
        n_tokens: tokens of the set; of trees, an estimate.
    """

    @property
    def task(self) -> str:
        """See the class."""
        ...

    @property
    def n_sequences(self) -> int:
        """See the class."""
        ...

    @property
    def n_batches(self) -> int:
        """See the class."""
        ...

    @property
    def n_tokens(self) -> int:
        """See the class."""
        ...

    def row(self) -> dict[str, Any]:
        """The set's row of `datasets`, without the ids that the store assigns."""
        ...

    def parts(self) -> Mapping[str, pl.DataFrame]:
        """Rows of further tables that come with the set's definition; by table, none for trees."""
        ...

    def drawn(self, batch: int) -> Drawn:
        """Draw one batch, once."""
        ...
