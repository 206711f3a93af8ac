"""Variants of trees: an edge of the path trades places with another edge in the list.

    swap_last   an edge on the path trades places with the edge listed last. If the last edge is
                itself on the path, it trades places with an edge off the path. In each pair,
                exactly one path therefore runs through the last edge.
    swap_inner  the control: an edge on the path trades places with an edge off the path, and the
                last edge stays.

Tree, goal and path do not change. The choice of edges depends only on the set's seed and the tree's
index.
"""

from __future__ import annotations

import numpy as np

from actstore.errors import BadInput
from actstore.ingest.trees.draw import Trees, pick_true

CHANGES = ("swap_last", "swap_inner")


def vary(trees: Trees, change: str, seed: int, first: int) -> tuple[Trees, list[str | None]]:
    """Apply one change to every tree.

    Args:
        trees: trees first, first + 1, … of the stream of `seed`.
        change: one of CHANGES.

    Returns:
        The changed trees, and the change of each, `edge 3 <-> edge 14`, with the path's edge first;
        None for a tree that has no such pair of edges.

    Raises:
        BadInput: the change is unknown.
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
        on = np.where(ends_there, last, pick_true(on_path, u_on))
        off = np.where(ends_there, pick_true(~on_path, u_off), last)
        can = ~ends_there | ~on_path.all(axis=1)
    else:
        inner = np.arange(n_edges) < last
        on, off = pick_true(on_path & inner, u_on), pick_true(~on_path & inner, u_off)
        can = (on_path & inner).any(axis=1) & (~on_path & inner).any(axis=1)
    off = np.where(can, off, on)
    edges = trees.edges.copy()
    edges[rows, on], edges[rows, off] = trees.edges[rows, off], trees.edges[rows, on]
    swaps = [f"edge {a} <-> edge {b}" if a != b else None for a, b in zip(on.tolist(), off.tolist(), strict=True)]
    return Trees(edges, trees.root, trees.goal, trees.path, trees.depth), swaps
