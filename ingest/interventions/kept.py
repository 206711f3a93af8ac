"""What a run of edits gives, kept in memory in the place of a shard."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from actstore.arrays.layout import Layout


class Kept:
    """Receives the activations of a site in one batch.

    Args:
        layout: layout of the shard that would hold them.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._held: dict[int, np.ndarray] = {}

    def put(self, first_row: int, activations: Tensor) -> None:
        """See ShardBuffer.put; rows of sequences that are not edited are left out."""
        if not torch.isnan(activations).all():
            self._held[first_row] = activations.cpu().numpy().copy()

    def rows(self, sequence: int, begin: int, n_tokens: int) -> np.ndarray:
        """float32 [token, *row]: what one sequence of the batch was given.

        Args:
            sequence: number of the sequence in the batch.
            begin: number of its first row in the layout `rows`.
        """
        if self.layout.position_axis is None:
            return self._held[begin]
        return np.moveaxis(self._held[sequence][0], self.layout.position_axis - 1, 0)[:n_tokens]
