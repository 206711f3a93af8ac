"""The families of sites that a network has in every layer."""

from __future__ import annotations

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
