"""The families of sites that a network has in every layer, and the order of a network's sites."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

FAMILIES = {  # short name → TransformerLens' name within a block
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "pattern": "attn.hook_pattern",
}

MORE_FAMILIES = {  # those that only some networks have; a store of trees holds them when they are asked for
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "rot_q": "attn.hook_rot_q",
    "rot_k": "attn.hook_rot_k",
    "z": "attn.hook_z",
    "attn_scores": "attn.hook_attn_scores",
    "pre": "mlp.hook_pre",
    "post": "mlp.hook_post",
}

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
BEFORE, AFTER = -1, 1 << 30  # in the place of a layer: of sites before all blocks, and after them
EMBEDDINGS = ("embed", "hook_embed", "pos_embed", "hook_pos_embed", "rotary_emb")
WITHIN_BLOCK = (  # in the order of the forward pass; each stands for all names that begin with it
    *("hook_in", "hook_resid_pre", "ln1", "hook_attn_in", "attn.hook_in", "attn.q", "attn.hook_q", "attn.k"),
    *("attn.hook_k", "attn.v", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores"),
    *("attn.hook_pattern", "attn.hook_z", "attn.o", "attn.hook_result", "attn", "hook_attn_out", "hook_resid_mid"),
    *("ln2", "hook_mlp_in", "mlp.hook_in", "mlp.gate", "mlp.hook_pre", "mlp.in", "mlp.hook_pre_linear"),
    *("mlp.hook_post", "mlp.out", "mlp", "hook_mlp_out", "hook_out", "hook_resid_post"),
)
RANK = {name: rank for rank, name in enumerate(WITHIN_BLOCK)}


def in_order(shorts: Mapping[str, str]) -> list[str]:
    """Short names of a run's sites in the order of the forward pass.

    Sites of which the names do not say where they are keep their order, at the end of their block,
    or of all.

    Args:
        shorts: TransformerLens' name → short name, in the order in which they were stored.
    """
    return [shorts[name] for name in sorted(shorts, key=_place)]


def _place(name: str) -> tuple[int, int]:
    """Layer of a site, and its rank within the layer."""
    found = BLOCK.fullmatch(name)
    if found is None:
        module = name.partition(".")[0]
        return (BEFORE, EMBEDDINGS.index(module)) if module in EMBEDDINGS else (AFTER, 0)
    named = RANK.keys() & set(_beginnings(found[2]))
    return int(found[1]), RANK[max(named, key=len)] if named else len(RANK)


def _beginnings(name: str) -> Iterable[str]:
    """`attn`, `attn.q` and `attn.q.hook_in`, of the last."""
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts) + 1))
