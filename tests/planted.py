"""A real store whose activations, predictions and outcomes a test makes up, so that it knows what must come out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch

from actstore.arrays.layout import Layout
from actstore.arrays.pack import ShardBuffer
from actstore.ingest.trees.draw import Trees
from actstore.ingest.trees.rows import edge_rows, tree_rows
from actstore.ingest.trees.tokens import n_positions, token_rows
from actstore.writing.contents import batch_contents
from actstore.writing.plan import RunPlan, SitePlan
from actstore.writing.writer import open_writer


def plant(
    root: Path,
    trees: Trees,
    sites: Mapping[str, np.ndarray],
    run: str = "planted",
    split: Sequence[str] | None = None,
    of_run: Mapping[str, pl.DataFrame] | None = None,
    trees_per_shard: int | None = None,
    batches: Sequence[int] | None = None,
    dataset: str = "made-up",
    seed: int = 0,
    weights: bytes | None = None,
) -> Path:
    """Commit one run over one set of trees to the store at root, and make the store if there is none.

    Args:
        sites: float32 [tree, position, d_model] by short name, or [tree, head, query, key] for a pattern.
        split: of each tree, in place of the hash's.
        of_run: all rows of `predictions` and `outcomes`.
        trees_per_shard: all trees in one unless told.
        batches: which to commit; all unless told.
        dataset, seed: of the set of trees.
        weights: of the model; the run's own unless told.
    """
    per_shard = trees_per_shard or len(trees)
    width = n_positions(trees.n_nodes)
    weights = weights or run.encode()
    about = {
        "dataset": dataset,
        "distribution": "reproduction",
        "seed": seed,
        "n_nodes": trees.n_nodes,
        "depths": None,
    }
    about |= {"n_trees": len(trees), "n_positions": width, "trees_per_shard": per_shard}
    plan = RunPlan(
        run=run,
        model={"weights_sha256": hashlib.sha256(weights).hexdigest(), "model": run, "n_nodes": trees.n_nodes},
        weights=weights,
        dataset=about,
        sites=[_site(short, values.shape, per_shard) for short, values in sites.items()],
        facts={"device": "cpu", "versions": "{}"},
    )
    with open_writer(root, make=True) as writer:
        known = set(writer.rows_of("trees")["tree_id"].to_list()) if writer.rows_of("datasets").height else set()
        first = writer.define(plan).sequence_id
        for batch in range(-(-len(trees) // per_shard)) if batches is None else batches:
            rows = slice(batch * per_shard, min((batch + 1) * per_shard, len(trees)))
            some, start = trees[rows], first + rows.start
            frame = tree_rows(some, start, dataset)
            if split is not None:
                frame = frame.with_columns(pl.Series("split", split[rows]).cast(frame["split"].dtype))
            of_trees = {"trees": frame, "edges": edge_rows(some, start), "tokens": token_rows(some, start)}
            of_some = {
                table: frame.filter(pl.col("tree_id").is_between(start, start + len(some) - 1))
                for table, frame in (of_run or {}).items()
            }
            arrays = {site.site: _shard(site.layout, sites[site.short][rows], some) for site in plan.sites}
            contents = batch_contents(plan, batch, {} if start in known else of_trees, of_some, arrays)
            writer.commit_batch(plan, batch, start, len(some), contents)
    return root


def _site(short: str, shape: tuple[int, ...], trees_per_shard: int) -> SitePlan:
    name, _, layer = short.partition(".")
    site = f"blocks.{layer}.hook_{name}" if layer else f"hook_{name}"
    if name == "pattern":
        site = f"blocks.{layer}.attn.hook_{name}"
        return SitePlan(site, short, "pattern", Layout(shape, 2, trees_per_shard), ("tree", "head", "query", "key"))
    return SitePlan(site, short, "resid", Layout(shape, 1, trees_per_shard), ("tree", "position", "d_model"))


def _shard(layout: Layout, values: np.ndarray, trees: Trees) -> memoryview:
    buffer = ShardBuffer(layout)
    buffer.put(0, torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)))
    return buffer.seal((3 * trees.n_nodes + trees.depth).astype(np.intp))
