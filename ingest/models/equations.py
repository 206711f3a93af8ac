"""The network's equations over packed trees: many goals of a tree in one sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, relu, silu

from actstore.ingest.models.config import ModelConfig

PADDING, EDGE_LIST = -1, 0  # segments; suffixes are 1, 2, …
LN_EPS = 1e-5  # TransformerLens' default
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_new": partial(gelu, approximate="tanh"),
    "relu": relu,
    "silu": silu,
}


@dataclass(frozen=True)
class Packed:
    """Packed trees with all their goals, and the tokens to predict.

    Attributes:
        ids: int64 [tree, pos] token ids.
        position: int64 [tree, pos] position of each token in its own prompt; restarts with every
            goal.
        segment: int64 [tree, pos] 0 on the edge list, 1, 2, … on the suffixes, -1 on padding.
        at: int64 [n_targets] index into the flattened [tree * pos] of each predicting position.
        target: int64 [n_targets] the token id to predict there.
        goal: int64 [n_targets] index among the n_goals of the goal of each prediction.
        depth: int64 [n_goals] depth of each goal, edges from the root.
    """

    ids: Tensor
    position: Tensor
    segment: Tensor
    at: Tensor
    target: Tensor
    goal: Tensor
    depth: Tensor

    def to(self, device: str) -> Packed:
        """Move every tensor to a device."""
        return Packed(*(value.to(device) for value in vars(self).values()))


def forward(params: dict[str, Tensor], config: ModelConfig, batch: Packed, dtype: torch.dtype) -> Tensor:
    """Run the forward pass, with logits at the predicting positions only.

    Args:
        params: float32, in HookedTransformer names.

        dtype: dtype of the matrix products; the residual stream stays float32.

    Returns:
        float32 [n_targets, d_vocab].
    """
    w = {name: value.to(dtype) if "ln" not in name else value for name, value in params.items()}
    resid = params["embed.W_E"][batch.ids] + params["pos_embed.W_pos"][batch.position]
    bias = _hidden(batch).to(dtype)
    for layer in range(config.n_layers):
        at = batch.at if layer == config.n_layers - 1 else None
        resid = _block(w, f"blocks.{layer}.", config, resid, bias, at)
    return (norm(w, "ln_final", resid, dtype) @ w["unembed.W_U"] + w["unembed.b_U"]).float()


def _hidden(batch: Packed) -> Tensor:
    """float [tree, query, key]: 0 for a visible key; -inf for a later key or another suffix."""
    n_pos = batch.ids.shape[1]
    segment = batch.segment
    seen = (segment[:, None, :] == EDGE_LIST) | (segment[:, None, :] == segment[:, :, None])
    seen &= torch.ones(n_pos, n_pos, dtype=torch.bool, device=seen.device).tril()
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def _block(
    w: dict[str, Tensor], prefix: str, config: ModelConfig, resid: Tensor, bias: Tensor, at: Tensor | None
) -> Tensor:
    """One layer; with `at`, the output covers those positions only, [n_targets, d_model]."""
    dtype = bias.dtype
    mixed = _attend(w, prefix + "attn.", config, norm(w, prefix + "ln1", resid, dtype), bias)
    if at is not None:
        resid, mixed = resid.flatten(0, 1)[at], mixed.flatten(0, 1)[at]
    w_o = w[prefix + "attn.W_O"].flatten(0, 1)
    resid = resid + linear(mixed, w_o.T, w[prefix + "attn.b_O"])
    return resid + mlp(w, prefix, config, norm(w, prefix + "ln2", resid, dtype))


def mlp(w: dict[str, Tensor], prefix: str, config: ModelConfig, x: Tensor) -> Tensor:
    """The output of one layer's MLP, in the shape of its normalised input [..., d_model]."""
    hidden = ACTIVATIONS[config.act_fn](linear(x, w[prefix + "mlp.W_in"].T, w[prefix + "mlp.b_in"]))
    return linear(hidden, w[prefix + "mlp.W_out"].T, w[prefix + "mlp.b_out"])


def _attend(w: dict[str, Tensor], prefix: str, config: ModelConfig, x: Tensor, bias: Tensor) -> Tensor:
    """The mixed values of each query before W_O, [tree, pos, head * d_head]."""
    n_trees, n_pos, _ = x.shape
    n_heads, d_head = config.n_heads, config.d_head
    weight = torch.cat([w[prefix + f"W_{name}"].transpose(1, 2).flatten(0, 1) for name in "QKV"])
    qkv = linear(x, weight, torch.cat([w[prefix + f"b_{name}"].flatten() for name in "QKV"]))
    qkv = qkv.view(n_trees, n_pos, 3, n_heads, d_head).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.reshape(3, n_trees * n_heads, n_pos, d_head).unbind(0)
    bias = bias.repeat_interleave(n_heads, 0) if n_heads > 1 else bias
    pattern = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d_head**-0.5).softmax(-1)
    return (pattern @ v).view(n_trees, n_heads, n_pos, d_head).transpose(1, 2).flatten(2)


def norm(w: dict[str, Tensor], name: str, resid: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The layer norm of this name, of resid [..., d_model]."""
    return layer_norm(resid, resid.shape[-1:], w[name + ".w"], w[name + ".b"], LN_EPS).to(dtype)
