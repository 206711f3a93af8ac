"""A model's last layer: from residual streams to logits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.commits.format import unembedding_path, weights_path
from actstore.errors import Damaged, NotStored, Unreachable
from actstore.storage.at import at
from actstore.storage.backend import ENDLESS
from actstore.storage.machine import limit_reached

if TYPE_CHECKING:
    from actstore.sql.snapshot import Snapshot

LAYER_NORM_EPS = 1e-5  # TransformerLens' own, which every path-finding system is built with


@dataclass(frozen=True)
class Unembedding:
    """A model's final norm and unembedding, which turn a residual stream into logits.

    Attributes:
        w: float32 [d_model], the norm's scale.
        b: float32 [d_model], the norm's offset.
        W_U: float32 [d_model, d_vocab].
        b_U: float32 [d_vocab].
        normalization: `LN`, LayerNorm, which centres; or `RMS`, RMSNorm, which does not.
        eps: added to the variance, or to the mean square.
        soft_cap: logits x become soft_cap * tanh(x / soft_cap); 0 for logits as they are.
    """

    w: np.ndarray
    b: np.ndarray
    W_U: np.ndarray
    b_U: np.ndarray  # noqa: N815
    normalization: str = "LN"
    eps: float = LAYER_NORM_EPS
    soft_cap: float = 0.0

    def logits(self, X: np.ndarray) -> np.ndarray:
        """float32 [n, d_vocab] of float32 [n, d_model]."""
        centred = X - X.mean(axis=1, keepdims=True) if self.normalization == "LN" else X
        scale = np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + np.float32(self.eps))
        logits: np.ndarray = (centred / scale * self.w + self.b) @ self.W_U + self.b_U
        return np.tanh(logits / np.float32(self.soft_cap)) * np.float32(self.soft_cap) if self.soft_cap else logits


def read_unembedding(store: Snapshot, weights_sha256: str) -> Unembedding:
    """Read a model's last layer: from its own small file, or else from the weights in the store.

    Args:
        weights_sha256: hash of the weights' file.

    Raises:
        NotStored: the model's last layer is another one.
        Damaged: the file is missing, or is not the committed one.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    place, name = at(store.path), unembedding_path(weights_sha256)
    is_small = place.has(name)
    name = name if is_small else weights_path(weights_sha256)
    path = store.path / name
    if not is_small and not _is_of_trees(store, weights_sha256):
        raise NotStored(
            f"the store holds no last layer of the model of weights {weights_sha256[:12]}, which is no norm and "
            "unembedding; read the site itself with act()"
        )
    try:
        content = place.read(name, ENDLESS)
        about = _metadata(content) if is_small else {}
        held = load(content)
        digest = hashlib.sha256(
            b"".join(held[key].tobytes() for key in sorted(held)) if is_small else content
        ).hexdigest()
        if digest != (about["sha256"] if is_small else weights_sha256):
            raise ValueError("its sha256 is another")
        w, b, W_U, b_U = (
            held[name].astype(np.float32) for name in ("ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U")
        )
        settings: dict[str, Any] = {}
        if is_small:
            settings = {
                "normalization": about["normalization"],
                **{key: float(about[key]) for key in ("eps", "soft_cap")},
            }
    except Unreachable:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise limit_reached(error, f"cannot read the weights {path}") or Damaged(
            f"the weights {path} cannot be read ({what}); restore them from a copy of the store"
        ) from error
    return Unembedding(w, b, W_U, b_U, **settings)


def _metadata(content: bytes) -> dict[str, str]:
    """The text that the header of a safetensors file holds beside its tensors."""
    length = int.from_bytes(content[:8], "little")
    return dict(json.loads(content[8 : 8 + length])["__metadata__"])


def _is_of_trees(store: Snapshot, weights_sha256: str) -> bool:
    """True for a path-finding system, all of whose weights are in the store."""
    found = store.sql("from models where weights_sha256 = $weights", {"weights": weights_sha256})
    return all(row.get("architecture") is None for row in found.to_dicts())  # an older catalog has no such column
