"""Tiny stores without a model: trees that are drawn, and activations, predictions and outcomes that are planted."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import torch

from actstore.arrays.layout import Layout
from actstore.arrays.pack import ShardBuffer
from actstore.catalog.tables import CATALOG, HASHES
from actstore.ingest.trees.draw import Trees, draw
from actstore.ingest.trees.rows import edge_rows, tree_rows
from actstore.ingest.trees.tokens import n_positions, token_rows
from actstore.writing.contents import batch_contents
from actstore.writing.plan import RunPlan, SitePlan
from actstore.writing.writer import Writer, open_writer

D_MODEL, N_HEADS = 6, 2
TABLES = (
    *(
        "models",
        "datasets",
        "trees",
        "listed_sequences",
        "vocabularies",
        "relations",
        "edges",
        "tokens",
        "runs",
        "sites",
    ),
    *("shards", "predictions", "outcomes", "interventions", "edits", "generations", "results", "snapshot"),
)


@dataclass(frozen=True)
class Fake:
    """A run whose every activation is known.

    Attributes:
        plan: the run's definition.
        trees: all its trees.
        activations: of each site, by its TransformerLens name: float32 [tree, position, d_model], where d_model 0 and 1
            hold the tree's number in the run and the position, or [tree, head, query, key]; past a tree's end, too.
    """

    plan: RunPlan
    trees: Trees
    activations: dict[str, np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        """intp [n_trees]: tokens of each tree."""
        return (3 * self.trees.n_nodes + self.trees.depth).astype(np.intp)

    @property
    def n_batches(self) -> int:
        return -(-len(self.trees) // int(self.plan.dataset["trees_per_shard"]))

    def as_stored(self, site: str, batches: Collection[int] | None = None) -> np.ndarray:
        """The site's whole array as any reader must see it: NaN past each tree's end and in batches that are not there."""
        values = self.activations[site].copy()
        by_position = np.moveaxis(values, 1 if values.ndim == 3 else 2, 1)
        for tree, length in enumerate(self.lengths):
            by_position[tree, length:] = np.nan
            if batches is not None and tree // int(self.plan.dataset["trees_per_shard"]) not in batches:
                values[tree] = np.nan
        return values

    def store(self, root: Path, batches: Sequence[int] | None = None) -> None:
        """Commit the run to the store at root, made if need be: what is not committed of the batches named, or of all."""
        with open_writer(root, make=True) as writer:
            self.write(writer, batches)

    def write(self, writer: Writer, batches: Sequence[int] | None = None) -> int:
        """Commit to an open store, and return the first tree_id."""
        first_tree_id = writer.define(self.plan).sequence_id
        done = writer.batches(self.plan.run)
        for batch in range(self.n_batches) if batches is None else batches:
            if batch not in done:
                self.commit(writer, first_tree_id, batch)
        return first_tree_id

    def commit(self, writer: Writer, first_tree_id: int, batch: int) -> None:
        """Commit one batch, whether it is committed or not."""
        per_shard = int(self.plan.dataset["trees_per_shard"])
        some = slice(batch * per_shard, min((batch + 1) * per_shard, len(self.trees)))
        first, trees = first_tree_id + some.start, self.trees[some]
        arrays = {}
        for site in self.plan.sites:
            buffer = ShardBuffer(site.layout)
            buffer.put(0, torch.from_numpy(self.activations[site.site][some]))
            arrays[site.site] = buffer.seal(self.lengths[some])
        of_trees = {
            "trees": tree_rows(trees, first, self.plan.dataset["dataset"]),
            "edges": edge_rows(trees, first),
            "tokens": token_rows(trees, first),
        }
        of_run = all_right(self.plan.run, of_trees["trees"], of_trees["tokens"])
        writer.commit_batch(
            self.plan, batch, first, len(trees), batch_contents(self.plan, batch, of_trees, of_run, arrays)
        )


def fake(
    run: str = "r",
    dataset: str = "d",
    n_trees: int = 5,
    trees_per_shard: int = 3,
    n_nodes: int = 4,
    seed: int = 0,
    weights: bytes = b"weights",
    sites: Sequence[str] = ("resid_post.0", "pattern.0"),
    depths: list[int] | None = None,
    config: str = "{}",
) -> Fake:
    """A run over drawn trees; everything follows from the arguments."""
    trees = draw("deep", seed, 0, n_trees, n_nodes, depths=depths)
    width, n_labels = n_positions(n_nodes), n_nodes
    rng = np.random.default_rng([seed, *weights])
    plans, activations = [], {}
    for short in sites:
        name, _, layer = short.partition(".")
        is_pattern = name == "pattern"
        shape = (n_trees, N_HEADS, width, width) if is_pattern else (n_trees, width, D_MODEL)
        axes = ("tree", "head", "query", "key") if is_pattern else ("tree", "position", "d_model")
        site = f"blocks.{layer}.{'attn.' * is_pattern}hook_{name}" if layer else f"hook_{name}"
        layout = Layout(shape, 2 if is_pattern else 1, trees_per_shard)
        plans.append(SitePlan(site, short, "pattern" if is_pattern else "resid", layout, axes))
        values = rng.standard_normal(shape, dtype=np.float32)
        if not is_pattern:
            values[:, :, 0], values[:, :, 1] = np.arange(n_trees)[:, None], np.arange(width)
        activations[site] = values
    plan = RunPlan(
        run=run,
        model={
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "model": run,
            "n_nodes": n_labels,
            "config": config,
        },
        weights=weights,
        dataset={
            "dataset": dataset,
            "distribution": "deep",
            "seed": seed,
            "n_nodes": n_nodes,
            "depths": depths,
            "n_trees": n_trees,
            "n_positions": width,
            "trees_per_shard": trees_per_shard,
        },
        sites=plans,
        facts={"device": "cpu", "versions": "{}"},
    )
    return Fake(plan, trees, activations)


def all_right(run: str, trees: pl.DataFrame, tokens: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Rows of `predictions` and `outcomes` of a model that errs nowhere."""
    predictions = tokens.filter(pl.col("role") == "path").select(
        run=pl.lit(run),
        token_id=pl.col("token_id") - 1,
        tree_id="tree_id",
        step="step",
        target="token",
        predicted="token",
        p_target=pl.lit(0.75, pl.Float32),
        correct=pl.lit(True),
    )
    outcomes = trees.select(
        run=pl.lit(run),
        tree_id="tree_id",
        teacher_forced_right=pl.lit(True),
        greedy_path="path",
        greedy_right=pl.lit(True),
        first_wrong_step=pl.lit(None, pl.UInt8),
        failure=pl.lit(None, pl.String),
    )
    return {"predictions": predictions, "outcomes": outcomes}


def files(root: Path) -> dict[str, bytes]:
    """Every file of a store by its path, but for the lock."""
    paths = [path for path in root.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def folders(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_dir()}


def committed_files(root: Path) -> dict[str, bytes]:
    """Every file that follows from the inputs alone: not the catalog, whose bytes are DuckDB's, nor the date in store.json."""
    return {path: content for path, content in files(root).items() if path not in (CATALOG, HASHES, "store.json")}


def catalog_rows(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """All rows of every table of a catalog, in the order in which they stand, read by DuckDB alone."""
    with duckdb.connect(str(path), read_only=True) as connection:
        return {table: connection.execute(f"select * from {table} order by rowid").fetchall() for table in TABLES}
