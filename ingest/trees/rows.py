"""Trees as rows of the tables `trees` and `edges`."""

from __future__ import annotations

import numpy as np
import polars as pl

from actstore.ingest.task import SPLITS, split_numbers
from actstore.ingest.trees.draw import NO_NODE, Trees, at_label


def tree_rows(trees: Trees, first_tree_id: int, dataset: str) -> pl.DataFrame:
    """The rows of `trees`, in tree order, as in schema.sql; `variant_of` and `change` are null."""
    n_trees, n_edges, _ = trees.edges.shape
    depths, hashes = trees.node_depths(), trees.hashes()
    height = np.where(depths == NO_NODE, 0, depths).max(axis=1)
    sources = np.sort(trees.edges[:, :, 0], axis=1)
    n_inner = 1 + (sources[:, 1:] != sources[:, :-1]).sum(axis=1)
    path = pl.Series(trees.path, dtype=pl.Array(pl.UInt8, n_edges)).arr.to_list()
    return pl.DataFrame(
        {
            "tree_id": np.arange(first_tree_id, first_tree_id + n_trees, dtype=np.int32),
            "dataset": pl.repeat(dataset, n_trees, dtype=pl.String, eager=True),
            "root": trees.root,
            "goal": trees.goal,
            "depth": trees.depth,
            "height": height,
            "n_leaves": (trees.n_nodes - n_inner).astype(np.uint8),
            "path": path.list.head(pl.lit(pl.Series(trees.depth))),
            "backward": trees.is_backward(),
            "tree_hash": hashes,
            "split": enum_series(split_numbers(hashes), SPLITS),
            "variant_of": pl.repeat(None, n_trees, dtype=pl.Int32, eager=True),
            "change": pl.repeat(None, n_trees, dtype=pl.String, eager=True),
        }
    )


def edge_rows(trees: Trees, first_tree_id: int) -> pl.DataFrame:
    """The rows of the `edges` table, in (tree, edge) order; columns as in schema.sql."""
    n_trees, n_edges, _ = trees.edges.shape
    source, target = trees.edges[:, :, 0], trees.edges[:, :, 1]
    on_path = trees.edges_on_path()
    source_depth = at_label(trees.node_depths(), source)
    edge = np.arange(n_edges, dtype=np.uint8)
    return pl.DataFrame(
        {
            "tree_id": np.repeat(np.arange(first_tree_id, first_tree_id + n_trees, dtype=np.int32), n_edges),
            "edge": np.tile(edge, n_trees),
            "source": source.reshape(-1),
            "target": target.reshape(-1),
            "source_depth": source_depth.reshape(-1),
            "on_path": on_path.reshape(-1),
            "step": null_where_no_node(np.where(on_path, source_depth, np.uint8(NO_NODE)).reshape(-1)),
            "is_last": np.tile(edge == n_edges - 1, n_trees),
        }
    )


def enum_series(codes: np.ndarray, names: tuple[str, ...]) -> pl.Series:
    """An Enum series: each of codes [n], integer or boolean, is an index into `names`."""
    return pl.Series(codes.astype(np.uint8)).cat.to(pl.Enum(names))


def null_where_no_node(values: np.ndarray) -> pl.Series:
    """A UInt8 series of values uint8 [n], null where they are NO_NODE."""
    series = pl.Series(values)
    return series.set(series == NO_NODE, None)
