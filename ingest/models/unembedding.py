"""A model's last layer as a small file: the final norm and the unembedding.

`logit_lens` of SQL reads the file, so that it needs neither the model nor all its weights. The file
is safetensors: ln_final.w [d_model], ln_final.b [d_model], unembed.W_U [d_model, d_vocab] and
unembed.b_U [d_vocab], float32, and metadata (normalization, eps, soft_cap, sha256).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from actstore.ingest.models.weights import stream

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

    from actstore.ingest.models.sites import Hooks

TOLERANCE = 1e-3  # of the largest logit; another equation is off by far more, and float32 by far less


def last_layer(bridge: TransformerBridge, hooks: Hooks) -> bytes:
    """The file of a model's last layer.

    The equation is checked against the logits of the first forward pass. A model whose last layer
    is another one, such as an encoder's, has no file.

    Returns:
        The bytes of the file; b"" if the model has no such last layer.
    """
    import torch

    held, cfg = bridge.state_dict(), bridge.cfg
    norm = str(cfg.normalization_type or "").upper().removesuffix("PRE")
    W_U = held.get("unembed.weight")
    if hooks.last is None or norm not in ("LN", "RMS") or W_U is None:
        return b""
    norm = "RMS" if cfg.final_rms else norm
    resid, logits = (tensor.float() for tensor in hooks.last)
    d_model = resid.shape[-1]
    W_U = W_U.detach().float()
    if W_U.ndim != 2 or d_model not in W_U.shape:
        return b""
    if W_U.shape == (logits.shape[-1], d_model):
        W_U = W_U.T
    zeros = torch.zeros(d_model, device=W_U.device)
    w = held.get("ln_final.weight", zeros + 1).detach().float()
    parts = {
        "ln_final.b": held.get("ln_final.bias", zeros).detach().float(),
        "unembed.W_U": W_U,
        "unembed.b_U": held.get("unembed.bias", torch.zeros(W_U.shape[1], device=W_U.device)).detach().float(),
    }
    soft_cap = max(0.0, float(cfg.output_logits_soft_cap))
    for scale in (w, 1 + w):  # Gemma's norm stores its scale without the 1
        tried = {"ln_final.w": scale, **parts}
        if _agrees(_logits(resid, tried, norm, float(cfg.eps), soft_cap), logits):
            kept = {name: tensor.cpu().clone().contiguous() for name, tensor in sorted(tried.items())}
            digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in kept.values())).hexdigest()
            about = {"normalization": norm, "eps": repr(float(cfg.eps)), "soft_cap": repr(soft_cap), "sha256": digest}
            return b"".join(stream(kept, about))
    return b""


def _agrees(made: Tensor, logits: Tensor) -> bool:
    return made.shape == logits.shape and bool((made - logits).abs().max() <= TOLERANCE * logits.abs().max())


def _logits(X: Tensor, parts: dict[str, Tensor], norm: str, eps: float, soft_cap: float) -> Tensor:
    """The equation that actstore/sql/logit_lens.py applies to stored rows."""
    centred = X - X.mean(-1, keepdim=True) if norm == "LN" else X
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    logits = (centred / scale * parts["ln_final.w"] + parts["ln_final.b"]) @ parts["unembed.W_U"] + parts["unembed.b_U"]
    return (logits / soft_cap).tanh() * soft_cap if soft_cap else logits
