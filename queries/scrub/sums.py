"""What a layer's attention brings to the root token: sums over keys of pattern × v.

`z` is that sum over all keys, and `attn_out` is a linear map of `z`. A donor's `z` in the place of
the clean tree's is therefore the donor's `attn_out`: H1. H2 and H3 leave the terms of some keys as
they are in the clean tree. A sum of terms of two trees may have weights that do not sum to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from actstore.store import Store

HYPOTHESES = {
    "H1": "the whole attention output",
    "H2": "all but the last edges' sources and separators, and the goal",
    "H3": "all but these and the edges' targets",
}
FROM_GOAL = (9, 7, 6, 4, 3, 1, 0)  # keys that H2 keeps, before the goal's token: 36, 38, 39, 41, 42, 44, 45 of 16 nodes
AT_ONCE = 256  # trees: 6 MB of v per key of 128 numbers


def kept_keys(n_nodes: int) -> np.ndarray:
    """bool [3, 3 * n_nodes]: keys whose terms stay the clean tree's, under each of HYPOTHESES."""
    goal = 3 * (n_nodes - 1)
    kept = np.zeros((len(HYPOTHESES), goal + 3), bool)
    kept[1:, [goal - back for back in FROM_GOAL if back <= goal]] = True
    kept[2, 1:goal:3] = True
    return kept


def sums(store: Store, run: str, layer: int, token_ids: np.ndarray, n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The sums over keys of pattern × v at root tokens.

    Args:
        token_ids: int64 [n], root tokens.

    Returns:
        float32 [n, head, d_head], over all keys, and [3, n, head, d_head], over those of
        `kept_keys`.
    """
    root = 3 * n_nodes - 1
    masks = np.concatenate([np.ones((1, root + 1), bool), kept_keys(n_nodes)])
    found = []
    for start in range(0, len(token_ids), AT_ONCE):
        ids = token_ids[start : start + AT_ONCE]
        pattern, _ = store.read(ids, run, f"pattern.{layer}")
        v, _ = store.read(((ids - root)[:, None] + np.arange(root + 1)).ravel(), run, f"v.{layer}")
        v = v.reshape(len(ids), root + 1, *v.shape[1:]).transpose(0, 2, 1, 3)
        weights = pattern[:, :, None, : root + 1] * masks  # tree, head, mask, key
        found.append((weights @ v).transpose(2, 0, 1, 3))
    whole = np.concatenate(found, axis=1)
    return whole[0], whole[1:]


def patched(whole: np.ndarray, kept: np.ndarray, clean: np.ndarray, donor: np.ndarray) -> np.ndarray:
    """z of clean trees under one hypothesis, float32 [n, head * d_head].

    Args:
        whole: float32 [n_trees, head, d_head], over all keys.
        kept: float32 [n_trees, head, d_head], over the keys that stay the clean tree's.
        clean, donor: int64 [n], rows of both.
    """
    return (whole[donor] - kept[donor] + kept[clean]).reshape(len(clean), -1)
