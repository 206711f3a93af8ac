"""Texts as token numbers with their places in the text, and sequences cut to a context.

A place is counted in bytes of the text's UTF-8. Tokenizers count characters, see `byte_places`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from actstore.errors import BadInput, nearest

CUTS = ("split", "truncate", "error")
NO_PLACE = -1  # of a token that the tokenizer adds, and of one without a text
CHARACTERS_AT_ONCE = 500_000  # of texts given to the tokenizer; its answer takes some hundred bytes per token


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        tokenizer: a fast tokenizer of transformers; None if the tokens come as numbers.
        sha256: the tokenizer's hash.
        d_vocab: number of token numbers that the model takes.
    """

    tokenizer: Any
    sha256: str | None
    d_vocab: int

    @cached_property
    def n_listed(self) -> int:
        """Numbers that `frame` lists.

        Models of one tokenizer pad their embeddings to different sizes. The rows depend on the
        tokenizer alone where they can, so that such models share them.
        """
        return max(self.d_vocab, self._n_padded)

    @cached_property
    def _n_padded(self) -> int:
        """The tokenizer's size, rounded up as models round it; 0 without a tokenizer."""
        if self.tokenizer is None:
            return 0
        n_known = 1 + max(self.tokenizer.get_vocab().values())
        unit = 1024 if n_known >= 4096 else 64
        return -(-n_known // unit) * unit

    @cached_property
    def name(self) -> str:
        """The tokenizer's hash; `numbers-50257` without one.

        A model that pads its embeddings beyond the next thousand adds its size, `HASH-151936`.
        """
        if self.sha256 is None:
            return f"numbers-{self.d_vocab}"
        return self.sha256 if self.d_vocab <= self._n_padded else f"{self.sha256}-{self.d_vocab}"

    @cached_property
    def pieces(self) -> list[str]:
        """Each listed number's token as the tokenizer spells it; `<7>` where it has none."""
        if self.tokenizer is None:
            return [f"<{number}>" for number in range(self.n_listed)]
        spelled = self.tokenizer.convert_ids_to_tokens(list(range(self.n_listed)))
        return [f"<{number}>" if piece is None else piece for number, piece in enumerate(spelled)]

    def frame(self) -> pl.DataFrame:
        """The rows of `vocabularies`."""
        return pl.DataFrame(
            {
                "vocabulary": pl.repeat(self.name, self.n_listed, dtype=pl.String, eager=True),
                "number": np.arange(self.n_listed, dtype=np.int32),
                "token": self.pieces,
            }
        )


@dataclass(frozen=True)
class Encoded:
    """One document as tokens.

    Attributes:
        numbers: int64 [n].
        starts, stops: int32 [n]: first byte of each token in the text and the byte after its last;
            NO_PLACE where there is none.
        n_before, n_after: tokens that the tokenizer adds at the beginning and at the end.
        is_cut_short: the rest of the document is left out.
    """

    numbers: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    n_before: int = 0
    n_after: int = 0
    is_cut_short: bool = False

    def __len__(self) -> int:
        return len(self.numbers)

    def cut(self, context: int, how: str) -> list[Encoded]:
        """Cut the document into sequences of at most `context` tokens.

        Each has the tokens that the tokenizer adds. `truncate` keeps the first sequence alone.
        """
        if len(self) <= context:
            return [self]
        room, end = context - self.n_before - self.n_after, len(self) - self.n_after
        starts = range(self.n_before, end, room)
        kept = starts[:1] if how == "truncate" else starts
        before, after = np.arange(self.n_before), np.arange(end, len(self))
        return [
            self._at(np.concatenate([before, np.arange(i, min(i + room, end)), after]), len(kept) < len(starts))
            for i in kept
        ]

    def _at(self, which: np.ndarray, is_cut_short: bool) -> Encoded:
        places = self.starts[which], self.stops[which]
        return Encoded(self.numbers[which], *places, self.n_before, self.n_after, is_cut_short)


def check_cut(cut: str, context: int | None, n_ctx: int) -> int:
    """The context to cut to.

    Raises:
        BadInput: there is no such cut, or the context is longer than the model's.
    """
    if cut not in CUTS:
        raise BadInput(f"got --cut {cut!r}{nearest(cut, CUTS)}; there are {', '.join(CUTS)}")
    if context is not None and not 1 <= context <= n_ctx:
        raise BadInput(f"got a context of {context} tokens; this model takes 1 to {n_ctx} (--context)")
    return n_ctx if context is None else context


def encode(texts: Sequence[str], vocabulary: Vocabulary) -> Iterator[Encoded]:
    """Write texts as tokens, with the special tokens that the tokenizer adds by default.

    Raises:
        BadInput: there is no fast tokenizer.
    """
    tokenizer = vocabulary.tokenizer
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise BadInput(
            "the model has no fast tokenizer, which text needs for the tokens' places; give token ids (--tokens) or --tokenizer"
        )
    at = 0
    while at < len(texts):
        stop, size = at, 0
        while stop < len(texts) and (stop == at or size + len(texts[stop]) <= CHARACTERS_AT_ONCE):
            size += len(texts[stop])
            stop += 1
        some = list(texts[at:stop])
        found = tokenizer(some, padding=False, truncation=False, verbose=False)
        for text, encoding in zip(some, found.encodings, strict=True):
            yield _encoded(text, encoding)
        at = stop


def _encoded(text: str, encoding: Any) -> Encoded:
    numbers = np.array(encoding.ids, np.int64)
    added = np.array(encoding.special_tokens_mask, bool)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    places = np.where(added[:, None], NO_PLACE, byte_places(text)[offsets]).astype(np.int32)
    own = np.flatnonzero(~added)
    if not len(own):
        return Encoded(numbers[:0], places[:0, 0], places[:0, 1])  # the text has no token
    return Encoded(numbers, places[:, 0], places[:, 1], int(own[0]), len(numbers) - 1 - int(own[-1]))


def byte_places(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: the byte of the text's UTF-8 at which each character begins."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    lengths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000).astype(np.int64)
    return np.concatenate([[0], np.cumsum(lengths)])
