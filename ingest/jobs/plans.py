"""The arrays of a run: a layout and named axes for each kind of site, in a grid and in rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actstore.arrays.address import POSITIONS_PER_TREE
from actstore.arrays.layout import Layout
from actstore.ingest.models.sites import SiteSpec
from actstore.writing.plan import SitePlan


def site_plan(spec: SiteSpec, dataset: Mapping[str, Any]) -> SitePlan:
    """The array of one site over one set of sequences.

    A grid has [sequence, position, *row], and [sequence, head, query, key] for a pattern. In rows
    the array is [row, *row_shape]. The key axis of a pattern is as long as the longest sequence.

    Args:
        dataset: the set's row of `datasets`, without the ids that the store assigns.
    """
    n_positions = int(dataset["n_positions"])
    row = spec.row(n_positions)
    if dataset.get("layout") == "rows":
        layout = Layout((int(dataset["n_ids"]), *row), None, int(dataset["rows_per_chunk"]))
        return SitePlan(spec.name, spec.short, spec.kind, layout, ("row", *spec.axes))
    of_trees = dataset.get("task") in (None, "trees")
    n = int(dataset["n_trees"] if of_trees else dataset["n_sequences"])
    per_batch = int(dataset["trees_per_shard"] if of_trees else dataset["rows_per_chunk"])
    stride = int(dataset.get("stride") or POSITIONS_PER_TREE)
    sequence = "tree" if of_trees else "sequence"
    if spec.kind == "pattern":
        layout = Layout((n, *spec.row_shape, n_positions, n_positions), 2, per_batch, stride=stride)
        return SitePlan(spec.name, spec.short, spec.kind, layout, (sequence, "head", "query", "key"))
    layout = Layout((n, n_positions, *row), 1, per_batch, stride=stride)
    return SitePlan(spec.name, spec.short, spec.kind, layout, (sequence, "position", *spec.axes))


def bytes_per_batch(layout: Layout, n_tokens: int) -> int:
    """Bytes of the shard of a batch with so many tokens."""
    if layout.position_axis is not None:
        return layout.shard_bytes
    return layout.bytes_of(min(layout.chunks_per_shard, -(-n_tokens // layout.rows_per_chunk)))
