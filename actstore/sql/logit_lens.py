"""A model's last layer: from residual streams to logits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actstore.commits.format import WEIGHTS
from actstore.errors import Damaged
from actstore.storage.machine import limit_reached
from actstore.storage.regular import read_regular

if TYPE_CHECKING:
    from actstore.sql.snapshot import Snapshot

LAYER_NORM_EPS = 1e-5  # TransformerLens' own, which every model here is built with


@dataclass(frozen=True)
class Unembedding:
    """What makes logits of a residual stream: a model's final LayerNorm and its unembedding.

    Attributes:
        w: float32 [d_model], scale of the LayerNorm.
        b: float32 [d_model], its offset.
        W_U: float32 [d_model, d_vocab].
        b_U: float32 [d_vocab].
    """

    w: np.ndarray
    b: np.ndarray
    W_U: np.ndarray
    b_U: np.ndarray  # noqa: N815

    def logits(self, X: np.ndarray) -> np.ndarray:
        """float32 [n, d_vocab] of float32 [n, d_model]."""
        centred = X - X.mean(axis=1, keepdims=True)
        scale = np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + np.float32(LAYER_NORM_EPS))
        logits: np.ndarray = (centred / scale * self.w + self.b) @ self.W_U + self.b_U
        return logits


def read_unembedding(store: Snapshot, weights_sha256: str) -> Unembedding:
    """The last layer of a model, out of the weights that the store keeps.

    Raises:
        Damaged: the file is not there, or is not the one that the run ran.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = store.path / WEIGHTS / f"{weights_sha256}.safetensors"
    try:
        content = read_regular(path, path.stat().st_size)
        if hashlib.sha256(content).hexdigest() != weights_sha256:
            raise ValueError("its sha256 is another")
        held = load(content)
        parts = [held[name] for name in ("ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U")]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise limit_reached(error, f"cannot read the weights {path}") or Damaged(
            f"the weights {path} cannot be read ({what}); restore them from a copy of the store"
        ) from error
    return Unembedding(*(part.astype(np.float32) for part in parts))
