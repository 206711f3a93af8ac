"""Decoding with cached keys and values, for any model of TransformerLens' native form."""

from __future__ import annotations

import torch
from torch import Tensor

from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.equations import mlp, norm


class Cache:
    """Keys and values of a batch of sequences of one length, extended token by token."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.weights, self.n_pos = config, weights, 0
        self._held: list[tuple[Tensor, Tensor]] = []  # per layer, float32 [sequence, head, pos, d_head]

    def repeat(self, times: int) -> None:
        """Repeat every sequence `times` times, with copies adjacent."""
        self._held = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self._held]

    def extend(self, ids: Tensor) -> Tensor:
        """Append ids, int64 [sequence, n_new]; return last logits, float32 [sequence, d_vocab]."""
        w, n_new = self.weights, ids.shape[1]
        resid = w["embed.W_E"][ids] + w["pos_embed.W_pos"][self.n_pos : self.n_pos + n_new]
        mask = torch.ones(n_new, self.n_pos + n_new, dtype=torch.bool, device=ids.device).tril(self.n_pos)
        for layer in range(self.config.n_layers):
            block = f"blocks.{layer}."
            resid = resid + self._attend(layer, norm(w, block + "ln1", resid), mask)
            resid = resid + mlp(w, block, self.config, norm(w, block + "ln2", resid))
        self.n_pos += n_new
        return norm(w, "ln_final", resid[:, -1]) @ w["unembed.W_U"] + w["unembed.b_U"]

    def _attend(self, layer: int, x: Tensor, mask: Tensor) -> Tensor:
        """Cache keys and values; return one layer's output, float32 [sequence, n_new, d_model]."""
        w, block = self.weights, f"blocks.{layer}.attn."
        q, k, v = (
            torch.einsum("spd,hde->shpe", x, w[block + f"W_{name}"]) + w[block + f"b_{name}"][:, None] for name in "QKV"
        )
        if layer < len(self._held):
            k, v = (torch.cat([held, new], 2) for held, new in zip(self._held[layer], (k, v), strict=True))
            self._held[layer] = (k, v)
        else:
            self._held.append((k, v))
        scores = (q @ k.transpose(2, 3)) * self.config.d_head**-0.5
        pattern = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("shpe,hed->spd", pattern @ v, w[block + "W_O"]) + w[block + "b_O"]
