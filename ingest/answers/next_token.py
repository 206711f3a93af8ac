"""Next-token predictions of text, graded: the likeliest token, and what the target was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from actstore.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

NUMBERS_AT_ONCE = 2**24  # logits that are worked on at a time: 64 MB, and copies of them
MOST_TOP = 1000
MOST_NEW = 10_000


@dataclass(frozen=True)
class Asked:
    """Which predictions to store.

    Attributes:
        top: how many of the likeliest tokens to name in `top`; 0 for none.
    """

    top: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.top <= MOST_TOP:
            raise BadInput(f"got --top {self.top}; there are 0 to {MOST_TOP} (0 stores no column top)")


@dataclass(frozen=True)
class Continued:
    """Continuations in the place of predictions.

    Attributes:
        n_new: most tokens of a continuation.
    """

    n_new: int

    def __post_init__(self) -> None:
        if not 1 <= self.n_new <= MOST_NEW:
            raise BadInput(f"got --continue {self.n_new}; a continuation has 1 to {MOST_NEW} tokens")


def said(asked: Asked | Continued | None) -> str:
    """What was asked for, in words that `understood` reads.

    Such as `none`, `next`, `next, top 5` or `continue 32`.
    """
    if asked is None:
        return "none"
    if isinstance(asked, Continued):
        return f"continue {asked.n_new}"
    return f"next, top {asked.top}" if asked.top else "next"


def understood(text: str) -> Asked | Continued | None:
    """What `said` wrote down."""
    if text.startswith("continue "):
        return Continued(int(text.removeprefix("continue ")))
    return None if text == "none" else Asked(int(text.partition(", top ")[2] or 0))


class Grades:
    """Grades of a batch's predictions, filled by one forward pass after another.

    A token's prediction is of the token after it. The last token of a sequence has none.

    Args:
        n_tokens: tokens of the batch.
        top: see Asked.
    """

    def __init__(self, n_tokens: int, top: int) -> None:
        self.target, self.predicted, self.rank = np.full((3, n_tokens), -1, np.int64)
        self.loss = np.full(n_tokens, np.nan, np.float32)
        self.top = np.full((n_tokens, top), -1, np.int64)

    def add(self, logits: Tensor, ids: Tensor, lengths: np.ndarray, begins: np.ndarray) -> None:
        """Grade the predictions of one forward pass.

        Args:
            logits: float32 [sequence, pos, d_vocab], padded on the right.
            ids: int64 [sequence, pos], what the model read.
            lengths, begins: intp [sequence]: tokens of each sequence, and its first row in the
                batch.
        """
        import torch  # takes seconds

        n_positions, d_vocab = logits.shape[1:]
        sequence, position = np.nonzero(np.arange(n_positions) < lengths[:, None] - 1)
        at_once = max(1, NUMBERS_AT_ONCE // d_vocab)
        for start in range(0, len(sequence), at_once):
            s, p = sequence[start : start + at_once], position[start : start + at_once]
            rows = begins[s] + p
            i, j = torch.from_numpy(s).to(ids.device), torch.from_numpy(p).to(ids.device)
            given, target = logits[i, j], ids[i, j + 1]
            of_target = given.gather(1, target[:, None])
            self.loss[rows] = (given.logsumexp(1) - of_target[:, 0]).clamp(min=0).cpu().numpy()
            self.target[rows] = target.cpu().numpy()
            self.rank[rows] = (given > of_target).sum(1).cpu().numpy()
            self.predicted[rows] = given.argmax(1).cpu().numpy()
            if n_top := min(self.top.shape[1], d_vocab):
                self.top[rows, :n_top] = given.topk(n_top).indices.cpu().numpy()

    def rows(self, run: str, token_ids: np.ndarray, sequence_ids: np.ndarray, pieces: Sequence[str]) -> pl.DataFrame:
        """The rows of `predictions`, one per token but each sequence's last, as in schema.sql.

        Args:
            token_ids, sequence_ids: int64 [n_tokens], of each token of the batch.
            pieces: spelling of each token number.
        """
        at = np.flatnonzero(self.target >= 0)
        spelled = pl.Series("pieces", pieces, dtype=pl.String)
        target, predicted, loss = self.target[at], self.predicted[at], self.loss[at]
        frame = pl.DataFrame(
            {
                "run": pl.repeat(run, len(at), dtype=pl.String, eager=True),
                "token_id": token_ids[at],
                "target": spelled.gather(target),
                "predicted": spelled.gather(predicted),
                "p_target": np.exp(-loss),
                "correct": predicted == target,
                "sequence_id": sequence_ids[at],
                "loss": loss,
                "rank": self.rank[at].astype(np.int32),
            }
        )
        n_top = min(self.top.shape[1], len(spelled))
        if not n_top:
            return frame
        named = spelled.gather(self.top[at, :n_top].reshape(-1)).reshape((len(at), n_top))
        return frame.with_columns(named.arr.to_list().alias("top"))
