"""Edit the activations of some sequences, in place, during a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from actstore.ingest.interventions.rows import Rows

if TYPE_CHECKING:
    from actstore.store import Store

SAME = 1e-6  # of directions: a singular value below, relative to the largest, is rounding of float32


class Changes:
    """The edits of the sequences of one forward pass, by TransformerLens' name of the site.

    Args:
        edits: all edits of the run.
        chosen: intp [n], numbers in the set of the sequences of the pass, each once.
        store: donors are read from it.
        width: positions of the pass; edits after them are left out. Default: all.
    """

    def __init__(self, edits: Sequence[Rows], chosen: np.ndarray, store: Store, width: int | None = None) -> None:
        order = np.argsort(chosen)
        by_number = chosen[order]
        self.by_site: dict[str, list[_Change]] = {}
        for rows in edits:
            at = np.searchsorted(by_number, rows.sequence).clip(max=len(chosen) - 1)
            here = by_number[at] == rows.sequence
            which = np.flatnonzero(here if width is None else here & (rows.position < width))
            if len(which):
                change = _Change(rows, which, order[at[which]], store)
                self.by_site.setdefault(rows.spec.name, []).append(change)

    @property
    def sites(self) -> Iterable[str]:
        """TransformerLens' names of the edited sites."""
        return self.by_site

    def apply(self, site: str, activations: Tensor, first_position: int = 0) -> Tensor:
        """The activations of a site after its edits, in the order in which they were asked for.

        Args:
            activations: float32 [sequence, pos, *row], or [sequence, head, query, key]; changed in
                place where the site is edited.
            first_position: position of the first token, or query, of `activations`.
        """
        for change in self.by_site.get(site, ()):
            change.apply(activations, first_position)
        return activations


class _Change:
    """The edits at one site of one pass.

    Args:
        which: intp [n], numbers of the edit's rows.
        row: intp [n], the row of the pass that holds each one's sequence.
    """

    def __init__(self, rows: Rows, which: np.ndarray, row: np.ndarray, store: Store) -> None:
        self.how, self.is_pattern = rows.how, rows.spec.kind == "pattern"
        self.row, self.position = torch.from_numpy(row), torch.from_numpy(rows.position[which])
        self.head = None if rows.heads is None else torch.from_numpy(rows.heads[which])
        self.key = None if rows.key is None else torch.from_numpy(rows.key[which])
        self.values: Tensor | None = None
        if rows.donors is not None:
            donated = rows.donated(store, which)
            self.values = torch.from_numpy(np.nan_to_num(donated, copy=True) if self.is_pattern else donated)
        elif rows.vectors is not None:
            self.values = torch.from_numpy(rows.vectors[which])

    def apply(self, x: Tensor, first_position: int) -> None:
        """Edit activations in place; see Changes.apply."""
        position = self.position - first_position
        row, position = self.row.to(x.device), position.to(x.device)
        if self.key is not None:
            self._knock_out(x, row, position)
            return
        place: tuple[Tensor, ...] = (row, position)
        view = x.movedim(1, 2) if self.is_pattern else x  # a pattern as [sequence, query, head, key]
        if self.head is not None:
            place = (*place, self.head.to(x.device))
        if self.how == "zero":
            view[place] = 0.0
            return
        assert self.values is not None
        values = self.values.to(x)
        now = view[place]
        if self.how == "project":
            view[place] = without_directions(now, values)
            return
        if self.is_pattern:  # a donor's row may be longer or shorter, as its sequence is
            values = pad(values, (0, now.shape[-1] - values.shape[-1]))
        values = values.reshape(now.shape)
        view[place] = now + values if self.how == "add" else values

    def _knock_out(self, x: Tensor, row: Tensor, position: Tensor) -> None:
        """Take attention to some keys away, and divide what is left by its sum."""
        assert self.key is not None
        key = self.key.to(x.device)
        heads = torch.arange(x.shape[1], device=x.device) if self.head is None else self.head.to(x.device)[:, None]
        x[row[:, None], heads, position[:, None], key[:, None]] = 0.0
        edited = torch.zeros(x.shape[:3], dtype=torch.bool, device=x.device)  # [sequence, head, query]
        edited[row[:, None], heads, position[:, None]] = True
        left = x[edited]
        x[edited] = left / left.sum(-1, keepdim=True).clamp(min=1e-30)


def without_directions(x: Tensor, vectors: Tensor) -> Tensor:
    """The vectors x [n, *row] without their parts in the span of some directions [n, k * width]."""
    flat = x.reshape(len(x), -1)
    basis, size, _ = torch.linalg.svd(vectors.reshape(len(x), -1, flat.shape[1]).double().mT, full_matrices=False)
    basis = basis * (size > SAME * size[:, :1])[:, None]  # [n, width, k], of vectors that depend on others 0
    inside = (flat.double()[:, None] @ basis) @ basis.mT
    return (flat - inside[:, 0].to(flat)).reshape(x.shape)
