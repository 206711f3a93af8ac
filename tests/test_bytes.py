"""The bytes of shards and parts: a store written long ago and one written today hold the same ones.

Only what does not depend on how a model's sums are rounded is held against committed hashes, so that they hold on every
machine: activations are drawn, and trees are. The hashes of parts rest on the pinned polars, which encodes them.
"""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import xxhash

from actstore.commits.format import ARRAYS, PARTS
from actstore.writing.writer import open_writer
from tests.stores import committed_files, fake

HASHES = json.loads((Path(__file__).parent / "fixtures" / "bytes.json").read_text())


def hashes(root: Path) -> dict[str, str]:
    """xxh3-128 of every shard, part and zarr.json of a store."""
    kept = {path: content for path, content in committed_files(root).items() if path.startswith((ARRAYS, PARTS))}
    return {path: xxhash.xxh3_128_hexdigest(content) for path, content in sorted(kept.items())}


def planted(root: Path) -> Path:
    """Two runs over one set, one over another, and a study's results."""
    sites = ("embed", "resid_post.0", "pattern.0")
    fake("r", "d", n_trees=7, trees_per_shard=3, n_nodes=5, sites=sites).store(root)
    fake("r-2", "d", n_trees=7, trees_per_shard=3, n_nodes=5, weights=b"others", sites=("resid_post.1",)).store(root)
    fake("s", "e-000001", n_trees=4, trees_per_shard=4, seed=1, sites=("resid_mid.0",)).store(root)
    with open_writer(root) as writer:
        writer.record(pl.DataFrame({"study": ["probes"], "run": ["r"], "metric": ["accuracy"], "value": [0.5]}))
    return root


def test_a_store_has_the_bytes_that_it_always_had(tmp_path: Path) -> None:
    assert hashes(planted(tmp_path / "s.act")) == HASHES["planted"]


def test_an_ingest_draws_the_trees_that_it_always_drew(damageable: Path) -> None:
    """Of the tiny model's store: the rows that do not come out of the model."""
    drawn = {path: found for path, found in hashes(damageable).items() if path.split("/")[1] in HASHES["tables"]}
    assert drawn == HASHES["ingested"]
