"""One batch of a corpus: its sequences, and the rows that they bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import xxhash

from actstore.arrays.address import Ids
from actstore.ingest.corpus.tokens import NO_PLACE
from actstore.ingest.task import SPLITS

EVERY = slice(None)


@dataclass(frozen=True)
class Drawn:
    """A batch of sequences, without padding.

    Attributes:
        start: index in the set of the first sequence.
        lengths: intp [n]: tokens per sequence.
        numbers: uint32 [sum(lengths)]: the tokens' numbers, one sequence after another.
        starts, stops: int32 [sum(lengths)]: bytes in the document's text, NO_PLACE where there is
            none; None without a text.
        documents: int64 [n]: row of the input; None if the store lost it.
        split: Enum(SPLITS) [n]: by the hash of the document; None if the store lost it.
        pieces: each number's token, as the tokenizer spells it.
        stride: ids from one sequence to the next in a grid; None in the layout `rows`.
        table: name of the documents' table; "" without one.
        others: rows of the documents' table, sequence_id counted in the set; None without one.
    """

    start: int
    lengths: np.ndarray
    numbers: np.ndarray
    starts: np.ndarray | None
    stops: np.ndarray | None
    documents: np.ndarray | None
    split: pl.Series | None
    pieces: Sequence[str]
    stride: int | None
    table: str = ""
    others: pl.DataFrame | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 [n + 1]: where each sequence begins in `numbers`, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def positions(self) -> np.ndarray:
        """int32 [sum(lengths)]: place of each token in its sequence."""
        return (np.arange(len(self.numbers)) - np.repeat(self.ends[:-1], self.lengths)).astype(np.int32)

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 [n]: xxh3-64 of each sequence's numbers, little-endian 32-bit."""
        return hashes(self.numbers, self.lengths)

    def ids(self, which: slice = EVERY, width: int | None = None) -> np.ndarray:
        """int64 [n, width]: token numbers of some sequences, padded with 0 at the right.

        Args:
            which: sequences of the batch.
            width: default: the longest of these sequences.
        """
        chosen = np.arange(len(self))[which]
        lengths = self.lengths[chosen]
        width = int(lengths.max(initial=0)) if width is None else width
        padded = np.zeros((len(chosen), width), np.int64)
        for row, sequence in enumerate(chosen):
            padded[row, : lengths[row]] = self.numbers[self.ends[sequence] : self.ends[sequence + 1]]
        return padded

    def sequence_ids(self, first: Ids) -> np.ndarray:
        """int64 [n]: ids of the sequences, given the batch's first ids."""
        return first.sequence_id + np.arange(len(self))

    def token_ids(self, first: Ids) -> np.ndarray:
        """int64 [sum(lengths)]: ids of the tokens, given the batch's first ids."""
        if self.stride is None:
            return first.token_id + np.arange(len(self.numbers))
        return first.token_id + np.repeat(np.arange(len(self)) * self.stride, self.lengths) + self.positions

    def _none(self, dtype: pl.DataType) -> pl.Series:
        return pl.repeat(None, len(self), dtype=dtype, eager=True)

    def rows(self, first: Ids, dataset: str, originals: int | None = None) -> dict[str, pl.DataFrame]:
        """The rows of `listed_sequences`, `tokens` and the documents' table, by table.

        Args:
            first: ids of the batch's first sequence.
            dataset: name of the set.
            originals: text has no variants; ignored.
        """
        sequences, tokens = self.sequence_ids(first), self.token_ids(first)
        listed = pl.DataFrame(
            {
                "sequence_id": sequences,
                "dataset": pl.repeat(dataset, len(self), dtype=pl.String, eager=True),
                "first_token_id": tokens[self.ends[:-1]],
                "n_tokens": self.lengths.astype(np.int32),
                "hash": self.hashes,
                "split": self._none(pl.Enum(SPLITS)) if self.split is None else self.split,
                "document": self._none(pl.Int64())
                if self.documents is None
                else pl.Series(self.documents, dtype=pl.Int64),
            }
        )
        frame = pl.DataFrame(
            {
                "token_id": tokens,
                "position": self.positions,
                "token": pl.Series(self.pieces, dtype=pl.String).gather(self.numbers),
                "sequence_id": np.repeat(sequences, self.lengths),
                "number": self.numbers.astype(np.int32),
            }
        )
        if self.starts is not None:
            places = {"start": pl.Series(self.starts), "stop": pl.Series(self.stops)}
            frame = frame.with_columns(**{name: place.replace(NO_PLACE, None) for name, place in places.items()})
        found = {"listed_sequences": listed, "tokens": frame}
        if self.others is not None:
            found[self.table] = self.others.with_columns(pl.col("sequence_id") + (first.sequence_id - self.start))
        return found


def hashes(numbers: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """uint64 [n]: xxh3-64 of each sequence's numbers, little-endian 32-bit.

    Args:
        numbers: integers [sum(lengths)], one sequence after another.
    """
    content, ends = memoryview(numbers.astype("<u4").tobytes()), 4 * np.concatenate([[0], np.cumsum(lengths)])
    places = zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    return np.fromiter((xxhash.xxh3_64_intdigest(content[a:b]) for a, b in places), np.uint64, len(lengths))
