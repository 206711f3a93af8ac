"""An ingest of one site without answers, against a cache of the same activations as SAELens 6 writes one."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # datasets is to write files here, and ask nobody

import datasets
import torch

from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import load
from actstore.ingest.models.model import Model
from actstore.ingest.models.sites import SiteSpec
from actstore.ingest.trees.task import TreeSet
from tests.benchmarks import Row, median

N_TREES = 4096
BATCH_SIZE = 128
ROUNDS = 3
SITES = ("embed", *(f"resid_post.{layer}" for layer in range(6)))


def rows() -> list[Row]:
    """Trees per second of both, site by site, in turns in one process."""
    datasets.disable_progress_bars()
    model, trees = load("reproduction"), TreeSet("reproduction", N_TREES)
    ids = torch.from_numpy(model.config.vocabulary.encode(trees.between(0, N_TREES).words))
    found = []
    for site in model.sites(SITES):
        cached, stored = [], []
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory(dir=".") as folder:
                started = time.perf_counter()
                write_cache(model, ids, site, Path(folder) / "cache")
                cached.append(time.perf_counter() - started)
                started = time.perf_counter()
                execute(Ingest(Path(folder) / "s.act", model, trees, sites=[site.short], asked=None))
                stored.append(time.perf_counter() - started)
        ratio = median(cached) / median(stored)
        figure = f"{ratio:.2f} ({N_TREES / median(stored):,.0f} / {N_TREES / median(cached):,.0f} trees/s)"
        found.append(Row(f"{site.short}: ingest / cache", figure, "≥ 1", ratio >= 1))
    return found


def write_cache(model: Model, ids: torch.Tensor, site: SiteSpec, path: Path) -> None:
    """Cache one site as the CacheActivationsRunner of SAELens 6.54 does, without shuffling.

    The passes end after the site's layer. One shard holds all sequences, since its default buffer
    has 2 GB: float32 [sequence, position, d_model] as Array2D, with the token ids.

    Args:
        ids: int64 [sequence, position].
    """
    layer = int(site.name.split(".")[1]) + 1 if site.name.startswith("blocks.") else 0
    found = []
    with torch.no_grad():
        for batch in ids.split(BATCH_SIZE):
            cache = model.bridge.run_with_cache(batch, names_filter=[site.name], stop_at_layer=layer)[1]
            found.append(cache[site.name])
    activations = torch.cat(found)
    n_positions, d_model = activations.shape[1:]
    features = datasets.Features(
        {
            site.name: datasets.Array2D(shape=(n_positions, d_model), dtype="float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=n_positions),
        }
    )
    shard = datasets.Dataset.from_dict({site.name: activations, "token_ids": ids.to(torch.int32)}, features=features)
    shard.save_to_disk(str(path), num_shards=1)
