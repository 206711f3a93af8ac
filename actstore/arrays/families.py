"""The families of sites that a network has in every layer."""

from __future__ import annotations

FAMILIES = {  # short name → TransformerLens' name within a block
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "pattern": "attn.hook_pattern",
}
