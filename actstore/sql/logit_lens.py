"""A model's last layer: from residual streams to logits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actstore.commits.format import WEIGHTS
from actstore.errors import Damaged
from actstore.storage.at import at
from actstore.storage.machine import limit_reached

if TYPE_CHECKING:
    from actstore.sql.snapshot import Snapshot

LAYER_NORM_EPS = 1e-5  # TransformerLens' own, which every model here is built with


@dataclass(frozen=True)
class Unembedding:
    """A model's final LayerNorm and unembedding, which turn a residual stream into logits.

    Attributes:
        w: float32 [d_model], the LayerNorm's scale.
        b: float32 [d_model], the LayerNorm's offset.
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
    """Read a model's last layer from the weights in the store.

    Args:
        weights_sha256: hash of the weights' file.

    Raises:
        Damaged: the file is missing, or is not the committed one.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    place, name = at(store.path), f"{WEIGHTS}/{weights_sha256}.safetensors"
    path = store.path / name
    try:
        content = place.read(name, place.size(name))
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
