"""Trees changed in one respect, to see what it does: an edge of the path trades places with another in the list.

    swap_last   an edge on the path trades places with the edge listed last; where that one is on the path itself, it trades
                places with an edge off the path instead. So of a pair one path runs through the last edge, and one does not.
    swap_inner  the control: an edge on the path trades places with one off it, and the edge listed last stays.

Tree, goal and path stay what they were. Which edges trade follows from the set's seed and the tree's number alone.
"""

from __future__ import annotations

import numpy as np

from actstore.errors import BadInput
from actstore.ingest.trees.draw import Trees

CHANGES = ("swap_last", "swap_inner")


def vary(trees: Trees, change: str, seed: int, first: int) -> tuple[Trees, list[str | None]]:
    """Change every tree.

    Args:
        trees: of a stream that `seed` names, the first of them its tree number `first`.
        change: one of CHANGES.

    Returns:
        The changed trees, and what was changed in each, `edge 3 <-> edge 14`: the path's edge before the other; None where
        there was nothing to trade places with.

    Raises:
        BadInput: no such change.
    """
    if change not in CHANGES:
        raise BadInput(f"no variant {change!r}; there are {', '.join(CHANGES)} (--variant)")
    n_trees, n_edges, _ = trees.edges.shape
    last, rows = n_edges - 1, np.arange(n_trees)
    bits = np.random.PCG64DXSM(np.random.SeedSequence([seed, *change.encode()]))
    bits.advance(2 * first)
    u_on, u_off = np.random.Generator(bits).random((n_trees, 2)).T
    on_path = trees.edges_on_path()
    if change == "swap_last":
        ends_there = on_path[:, last]
        on = np.where(ends_there, last, _pick(on_path, u_on))
        off = np.where(ends_there, _pick(~on_path, u_off), last)
        can = ~ends_there | ~on_path.all(axis=1)
    else:
        inner = np.arange(n_edges) < last
        on, off = _pick(on_path & inner, u_on), _pick(~on_path & inner, u_off)
        can = (on_path & inner).any(axis=1) & (~on_path & inner).any(axis=1)
    off = np.where(can, off, on)
    edges = trees.edges.copy()
    edges[rows, on], edges[rows, off] = trees.edges[rows, off], trees.edges[rows, on]
    said = [f"edge {a} <-> edge {b}" if a != b else None for a, b in zip(on.tolist(), off.tolist(), strict=True)]
    return Trees(edges, trees.root, trees.goal, trees.path, trees.depth), said


def _pick(mask: np.ndarray, u: np.ndarray) -> np.ndarray:
    """intp [n]: one true column of each row of a bool [n, m], uniform among them; 0 where a row has none."""
    rank = (u * mask.sum(axis=1)).astype(np.intp)
    return np.argmax(np.cumsum(mask, axis=1) > rank[:, None], axis=1)
