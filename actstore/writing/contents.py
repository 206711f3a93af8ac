"""The files of a run's definition and of a batch: path, bytes, and facts for a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from actstore.arrays.address import Ids
from actstore.arrays.metadata import metadata
from actstore.commits.format import ARRAYS, part_path, unembedding_path, weights_path
from actstore.writing.parts import GROUP, as_parquet
from actstore.writing.plan import RunPlan, SitePlan


@dataclass(frozen=True)
class Content:
    """A file to commit: its path in the store, its bytes, and facts for its manifest.

    Attributes:
        path: relative to the store.
        content: the file's bytes.
        table: a part's table.
        rows: a part's number of rows.
        owner: whose rows a part holds; see manifest.Part.
        batch: which batch of the owner's trees a part holds; None for no batch.
        site: a shard's site, TransformerLens' name.
    """

    path: str
    content: bytes | memoryview
    table: str = ""
    rows: int = 0
    owner: str = ""
    batch: int | None = None
    site: str = ""


def set_contents(plan: RunPlan) -> list[Content]:
    """The parts that come with a dataset's definition, besides its row."""
    owners = {"vocabularies": plan.dataset.get("vocabulary")}
    return [
        part_content(table, str(owners.get(table, plan.dataset["dataset"])), rows) for table, rows in plan.parts.items()
    ]


def definition_contents(plan: RunPlan, first: Ids) -> list[Content]:
    """The files of a run's definition other than its parts: weights, and metadata of its arrays.

    Args:
        first: the first ids of the run's dataset.
    """
    arrays = array_contents(plan, plan.sites, first)
    held = {weights_path: plan.weights, unembedding_path: plan.unembedding}
    weights = [Content(path(plan.model["weights_sha256"]), content) for path, content in held.items() if content]
    return [*weights, Content(f"{ARRAYS}/{plan.run}/zarr.json", GROUP), *arrays]


def array_contents(plan: RunPlan, sites: Sequence[SitePlan], first: Ids) -> list[Content]:
    """The metadata of some arrays of a run.

    Args:
        first: the first ids of the run's dataset.
    """
    begins = {"first_tree_id": first.sequence_id} if plan.of_trees else {"first_token_id": first.token_id}
    of_run = {"weights_sha256": plan.model["weights_sha256"], **begins}
    return [
        Content(
            f"{site.path(plan.run)}/zarr.json",
            metadata(site.layout, site.axes, {"run": plan.run, "site": site.site, **of_run}),
        )
        for site in sites
    ]


def batch_contents(
    plan: RunPlan,
    batch: int,
    of_trees: Mapping[str, pl.DataFrame],
    of_run: Mapping[str, pl.DataFrame],
    arrays: Mapping[str, memoryview],
) -> list[Content]:
    """The files of one batch of a run.

    Args:
        of_trees: rows of `trees`, `edges`, `tokens`; empty if another run over the dataset brought
            them.
        of_run: rows of `predictions` and `outcomes`, or of `generations`.
        arrays: the packed shards of sites, by TransformerLens' name.

    Raises:
        BadInput: the rows do not fit their tables.
    """
    owners = ((str(plan.dataset["dataset"]), of_trees), (plan.run, of_run))
    parts = [part_content(table, owner, frame, batch) for owner, tables in owners for table, frame in tables.items()]
    names = {site.site: f"{site.path(plan.run)}/{site.layout.shard_name(batch)}" for site in plan.sites}
    return [*parts, *(Content(path, arrays[site], site=site) for site, path in names.items() if site in arrays)]


def part_content(
    table: str, owner: str, rows: pl.DataFrame | Sequence[Mapping[str, Any]], batch: int | None = None
) -> Content:
    """A part of a table.

    Args:
        owner: whose rows they are; see manifest.Part.
        batch: the batch of the owner's trees; None for no batch.
    """
    frame = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(rows, infer_schema_length=None)
    return Content(part_path(table, owner, batch), as_parquet(table, frame), table, len(frame), owner, batch)
