"""A stored run as the job that stored it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actstore.commits.manifest import Manifest, Part
from actstore.errors import NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.stored import model_of_row, row_where
from actstore.ingest.replay import definitions
from actstore.ingest.trees.task import TreeSet
from actstore.writing import parts as writing_parts


def rehydrate(
    root: Path, manifests: list[Manifest], run: str, lost: Mapping[Part, dict[str, Any]] | None = None
) -> tuple[Ingest, dict[str, Any]]:
    """The job of a stored run, and the run's row of `runs`.

    Args:
        lost: part → row of the definition that no sound part holds.

    Raises:
        NotStored: there is no such run.
        Damaged: the run's weights are missing or changed, and no named model has the same weights.
    """
    rows = {
        name: writing_parts.rows_committed(root, manifests, name).to_dicts()
        for name in ("runs", "models", "datasets", "sites")
    }
    for part, row in (lost or {}).items():
        rows[part.table].append(row)
    about = next((row for row in rows["runs"] if row["run"] == run), None)
    if about is None:
        raise NotStored(f"{root} holds no run {run!r}")
    model = row_where(rows["models"], "weights_sha256", about["weights_sha256"], "models")
    dataset = row_where(rows["datasets"], "dataset", about["dataset"], "datasets")
    ran = [row for row in rows["sites"] if row["run"] == run and row.get("lineage") is None]
    sites = [row["short"] for row in ran] or definitions.site_names(root, run)
    depths = dataset.get("depths")
    trees = TreeSet(
        dataset["distribution"],
        dataset["n_trees"],
        dataset["seed"],
        dataset["n_nodes"],
        None if depths is None else tuple(depths),
        dataset["dataset"],
        dataset["trees_per_shard"],
        dataset.get("variant_of"),
        dataset.get("change"),
    )
    batch_size = json.loads(about["versions"]).get("batch_size", 128)
    prompt, samples = about.get("prompt") or "task", about.get("samples")
    held = model_of_row(root, model, about["device"])
    return Ingest(root, held, trees, run, sites, batch_size, prompt=prompt, samples=samples), about
