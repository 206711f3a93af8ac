"""A stored run computed again, from the weights and the definition that the store keeps.

A batch is a function of its run's definition and its number, so computed again on the same machine it has the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from actstore.arrays.reader import metadata
from actstore.commits.log import ARRAYS, WEIGHTS, Manifest
from actstore.commits.log import manifests as read_all
from actstore.errors import ActstoreError, Damaged, NotStored
from actstore.ingest.jobs.batch import files as batch_files
from actstore.ingest.jobs.job import Ingest, TreeSet
from actstore.ingest.models import load
from actstore.ingest.models.config import ModelConfig, nearest, there_are
from actstore.ingest.models.load import Model
from actstore.ingest.replay import definitions
from actstore.storage.folder import check_format
from actstore.writing import writer


def rehydrate(
    root: Path, manifests: list[Manifest], run: str, lost: Mapping[str, dict[str, Any]] | None = None
) -> tuple[Ingest, dict[str, Any]]:
    """The ingest that a stored run was, and its row of `runs`.

    Args:
        lost: rows of its definition that no sound part holds, by the path of their part.

    Raises:
        NotStored: no such run.
        Damaged: its weights are not there, or not those it ran, and no model that can be named has them either.
    """
    rows = {name: writer.table(root, manifests, name).to_dicts() for name in ("runs", "models", "datasets", "sites")}
    for path, row in (lost or {}).items():
        rows[path.split("/")[1]].append(row)
    about = next((row for row in rows["runs"] if row["run"] == run), None)
    if about is None:
        raise NotStored(f"{root} holds no run {run!r}")
    model = _row(rows["models"], "weights_sha256", about["weights_sha256"], "models")
    dataset = _row(rows["datasets"], "dataset", about["dataset"], "datasets")
    sites = [row["short"] for row in rows["sites"] if row["run"] == run] or definitions.site_names(root, run)
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
    held = _model(root, model, about["device"])
    return Ingest(root, held, trees, run, sites, batch_size, prompt=prompt, samples=samples), about


def model_of(root: Path, run: str, device: str = "cpu") -> Model:
    """The model of a stored run.

    Raises:
        NotStored: no such run, or no store.
        BadInput: no such device.
        Damaged: its weights are not there, or not those it ran, and no model that can be named has them either.
    """
    load.check_device(device)
    return _model(root, _model_row(root, run), device)


def shape_of(root: Path, run: str) -> tuple[str, ModelConfig]:
    """The name and the configuration of the model of a stored run; quick, since its weights are not read.

    Raises:
        NotStored: no such run, or no store.
    """
    row = _model_row(root, run)
    return row["model"], _config(row)


def _model_row(root: Path, run: str) -> dict[str, Any]:
    """The row of `models` of the model of a stored run."""
    check_format(root)
    manifests = read_all(root)
    runs = writer.table(root, manifests, "runs").to_dicts()
    about = next((row for row in runs if row["run"] == run), None)
    if about is None:
        held = [row["run"] for row in runs]
        raise NotStored(f"{root} holds no run {run!r}{nearest(run, held)}; {there_are(held)}")
    models_there = writer.table(root, manifests, "models").to_dicts()
    return _row(models_there, "weights_sha256", about["weights_sha256"], "models")


def _config(row: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_mapping(json.loads(row["config"]), f"models.config of {row['model']}")


def _row(rows: list[dict[str, Any]], column: str, wanted: object, table: str) -> dict[str, Any]:
    for row in rows:
        if row[column] == wanted:
            return row
    raise Damaged(f"the row of {table} whose {column} is {wanted!r} is damaged, and needed; restore it from a copy")


def _model(root: Path, row: dict[str, Any], device: str) -> Model:
    """A model out of the store's own weights, else out of a named model, or a checkpoint of one, that has the same."""
    wanted, name = row["weights_sha256"], row["model"]
    import torch

    where = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    path = root / WEIGHTS / f"{wanted}.safetensors"
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() == wanted:
        return load.from_bytes(content, _config(row), name, row["source"], where)
    of, _, step = name.rpartition("-step")
    for called, checkpoint in ((name, None), (of, int(step) if step.isdigit() else None)):
        with suppress(ActstoreError):
            if called in load.available():
                found = load.load(called, device=where, checkpoint=checkpoint)
                if found.weights_sha256 == wanted:
                    return replace(found, name=name, source=row["source"])
    raise Damaged(
        f"the weights {path} are not those that were run, and no model {name!r} has them; restore them from a copy"
    )


def files_of(root: Path, manifests: list[Manifest], run: str, batch: int | None) -> dict[str, bytes]:
    """The files of one batch of a run, or of batch None those of its definition, computed again: path → bytes."""
    lost = definitions.lost_rows(root, manifests, run) if batch is None else {}
    parts = {path: definitions.as_part(path.split("/")[1], [row]) for path, row in lost.items()}
    try:
        job, about = rehydrate(root, manifests, run, lost)
    except (ActstoreError, LookupError, ValueError):
        if not parts:
            raise
        return parts  # which do without the model
    first_tree_id = int(about["first_tree_id"])
    if batch is None:
        plan = job.plan
        parts[f"parts/sites/{run}.parquet"] = definitions.as_part("sites", [site.row(run) for site in plan.sites])
        of_run = {"weights_sha256": plan.model["weights_sha256"], "first_tree_id": first_tree_id}
        made = {
            f"{site.path(run)}/zarr.json": metadata(site.layout, site.axes, {"run": run, "site": site.site, **of_run})
            for site in plan.sites
        }
        return {
            **parts,
            **made,
            f"{ARRAYS}/{run}/zarr.json": writer.GROUP,
            f"{WEIGHTS}/{plan.model['weights_sha256']}.safetensors": plan.weights,
        }
    return batch_files(job, batch, first_tree_id, originals_of(root, manifests, job))


def originals_of(root: Path, manifests: list[Manifest], job: Ingest) -> int | None:
    """tree_id of the first tree that a variant set was made from; None for a drawn set."""
    if not job.trees.variant_of:
        return None
    known = {row["dataset"]: row["first_tree_id"] for row in writer.table(root, manifests, "datasets").to_dicts()}
    return int(known[job.trees.variant_of])
