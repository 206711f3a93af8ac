"""The part of a forward pass that edits can change: tokens and layers from the first edit on.

A path-finding system is causal, and its blocks add to the residual stream. Before the first edited
layer, and at tokens before the first edited one, an edited pass equals the base run. The keys and
values of those tokens follow from the residual stream that the base run stored.

Source: the equations of ingest/models/equations.py, over a window of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.equations import mlp, norm

OF_A_BLOCK = (
    *("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post"),
    *("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern", "attn.hook_z"),
)
Touch = Callable[[str, Tensor], Tensor]  # TransformerLens' name, activations of the window → those that go on


def first_layer(site: str) -> int | None:
    """The first block to run again after an edit at a site; None if no window shows the site.

    Args:
        site: TransformerLens' name.
    """
    if site in ("hook_embed", "hook_pos_embed"):
        return 0
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", site)
    if not found or found[2] not in OF_A_BLOCK:
        return None
    return int(found[1]) + (found[2] == "hook_resid_post")


def embedded(w: dict[str, Tensor], ids: Tensor, begin: int, touch: Touch) -> Tensor:
    """What enters the first block, float32 [n, pos, d_model].

    Args:
        ids: int64 [n, pos], of the tokens from position `begin` on.
    """
    places = w["pos_embed.W_pos"][begin : begin + ids.shape[1]].expand(len(ids), -1, -1)
    return touch("hook_embed", w["embed.W_E"][ids]) + touch("hook_pos_embed", places.clone())


def run(
    w: dict[str, Tensor], config: ModelConfig, layer: int, resid: Tensor, before: Sequence[Tensor], touch: Touch
) -> Tensor:
    """Run the blocks from `layer` on over a window of tokens.

    Args:
        w: float32, in HookedTransformer names.
        layer: the first block; as many as there are blocks runs none.
        resid: float32 [n, window, d_model], what enters that block.
        before: for each of these blocks float32 [n, begin, d_model]: what enters it at the tokens
            before the window.
        touch: is given each activation of OF_A_BLOCK, and gives what goes on in its place.

    Returns:
        The logits, float32 [n, window, d_vocab].
    """
    for context in before:
        resid = _block(w, f"blocks.{layer}.", config, resid, context, touch)
        layer += 1
    return norm(w, "ln_final", resid) @ w["unembed.W_U"] + w["unembed.b_U"]


def _block(
    w: dict[str, Tensor], prefix: str, config: ModelConfig, resid: Tensor, context: Tensor, touch: Touch
) -> Tensor:
    n, window, begin = len(resid), resid.shape[1], context.shape[1]
    resid = touch(prefix + "hook_resid_pre", resid)
    x = norm(w, prefix + "ln1", torch.cat([context, resid], 1))

    def project(name: str, x: Tensor) -> Tensor:
        weight = w[f"{prefix}attn.W_{name}"].transpose(1, 2).flatten(0, 1)
        bias = w[f"{prefix}attn.b_{name}"].flatten()
        return linear(x, weight, bias).view(n, x.shape[1], config.n_heads, config.d_head)

    q = touch(prefix + "attn.hook_q", project("Q", x[:, begin:]))
    k, v = project("K", x), project("V", x)
    k[:, begin:] = touch(prefix + "attn.hook_k", k[:, begin:])
    v[:, begin:] = touch(prefix + "attn.hook_v", v[:, begin:])
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * config.d_head**-0.5
    later = torch.ones(window, begin + window, dtype=torch.bool, device=x.device).triu(begin + 1)
    pattern = touch(prefix + "attn.hook_pattern", scores.masked_fill(later, -torch.inf).softmax(-1))
    z = touch(prefix + "attn.hook_z", (pattern @ v.transpose(1, 2)).transpose(1, 2).contiguous())
    w_o = w[prefix + "attn.W_O"].flatten(0, 1)
    attn_out = touch(prefix + "hook_attn_out", linear(z.flatten(2), w_o.T, w[prefix + "attn.b_O"]))
    resid = touch(prefix + "hook_resid_mid", resid + attn_out)
    mlp_out = touch(prefix + "hook_mlp_out", mlp(w, prefix, config, norm(w, prefix + "ln2", resid)))
    return touch(prefix + "hook_resid_post", resid + mlp_out)
