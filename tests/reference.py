"""The network written from its equations in plain torch, which the bridge's activations are compared with.

Pre-LayerNorm decoder, learned positions, causal attention scaled by √d_head, exact GELU; in float64, so that what
differs is the bridge's rounding. Weights are named and shaped as in a HookedTransformer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.load import Model, from_bytes
from actstore.ingest.models.weights import canonical, parse, shapes

ACTIVATIONS = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for whoever imports this: on networks so small two wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(
    state: dict[str, Tensor],
    ids: Tensor,
    act_fn: str = "gelu",
    edit: Callable[[str, Tensor], Tensor] = lambda site, x: x,
) -> dict[str, Tensor]:
    """Every site of the network by its TransformerLens name, and `logits`; float64.

    Args:
        state: weights in HookedTransformer names; the number of layers and heads follows from them.
        ids: int64 [tree, pos].
        edit: is given each site's activations, [tree, pos, *row] or [tree, head, query, key], and
            gives what goes on in their place.
    """
    W = {name: weight.double() for name, weight in state.items()}
    n_layers = sum(name.endswith(".attn.W_Q") for name in W)
    n_positions = ids.shape[1]
    future = torch.ones(n_positions, n_positions).triu(1).bool()
    sites = dict[str, Tensor]()

    def at(site: str, x: Tensor) -> Tensor:
        sites[site] = edit(site, x.clone())
        return sites[site]

    resid = at("hook_embed", W["embed.W_E"][ids]) + W["pos_embed.W_pos"][:n_positions]
    for layer in range(n_layers):
        b = f"blocks.{layer}."
        B = {name.removeprefix(b): w for name, w in W.items() if name.startswith(b)}
        resid = at(b + "hook_resid_pre", resid)
        x = layer_norm(resid, B["ln1.w"], B["ln1.b"])
        q, k, v = (
            at(
                f"{b}attn.hook_{part.lower()}",
                torch.einsum("tpm,hmd->tphd", x, B[f"attn.W_{part}"]) + B[f"attn.b_{part}"],
            )
            for part in "QKV"
        )
        scores = torch.einsum("tqhd,tkhd->thqk", q, k) / math.sqrt(q.shape[-1])
        sites[f"{b}attn.hook_attn_scores"] = scores
        exponents = torch.exp(scores - scores.amax(-1, keepdim=True)).masked_fill(future, 0)
        pattern = at(f"{b}attn.hook_pattern", exponents / exponents.sum(-1, keepdim=True))
        z = at(f"{b}attn.hook_z", torch.einsum("thqk,tkhd->tqhd", pattern, v))
        out = at(f"{b}hook_attn_out", torch.einsum("tqhd,hdm->tqm", z, B["attn.W_O"]) + B["attn.b_O"])
        resid = at(f"{b}hook_resid_mid", resid + out)
        x = layer_norm(resid, B["ln2.w"], B["ln2.b"])
        hidden = ACTIVATIONS[act_fn](x @ B["mlp.W_in"] + B["mlp.b_in"])
        resid = resid + at(f"{b}hook_mlp_out", hidden @ B["mlp.W_out"] + B["mlp.b_out"])
        resid = at(f"{b}hook_resid_post", resid)
    sites["logits"] = layer_norm(resid, W["ln_final.w"], W["ln_final.b"]) @ W["unembed.W_U"] + W["unembed.b_U"]
    return sites


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * w + b


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights of an untrained model, with no bias zero and no LayerNorm weight one."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(config).items():
        noise = torch.randn(shape, generator=rng)
        if name.endswith((".w", ".b")) or ".b_" in name:
            state[name] = 0.3 * noise + (1 if name.endswith(".w") else 0)
        else:
            state[name] = noise / (1 if name in ("embed.W_E", "pos_embed.W_pos") else math.sqrt(shape[-2]))
    return state


@cache
def random_model(config: ModelConfig, seed: int = 0) -> Model:
    return from_bytes(canonical(random_state(config, seed)), config, "random", "random.safetensors")


def weights(model: Model) -> dict[str, Tensor]:
    return parse(model.weights, model.source)
