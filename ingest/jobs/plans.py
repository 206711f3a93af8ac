"""The arrays of a run: one for each site of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actstore.arrays.layout import Layout
from actstore.ingest.models.sites import SiteSpec
from actstore.writing.plan import SitePlan


def site_plan(spec: SiteSpec, dataset: Mapping[str, Any], dtype: str = "float32", codec: str = "none") -> SitePlan:
    """The array of one site of a model over one set of sequences; see SitePlan.over."""
    row_shape = spec.row(int(dataset["n_positions"]))
    return SitePlan.over(dataset, spec.name, spec.short, spec.kind, row_shape, spec.axes, dtype=dtype, codec=codec)


def bytes_per_batch(layout: Layout, n_tokens: int) -> int:
    """Bytes of the shard of a batch with so many tokens."""
    if layout.position_axis is not None:
        return layout.shard_bytes
    return layout.bytes_of(min(layout.chunks_per_shard, -(-n_tokens // layout.rows_per_chunk)))
