"""The model of a stored run, built from the weights that the store keeps."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from actstore.commits.format import check_format, weights_path
from actstore.commits.log import manifests as read_all
from actstore.errors import ActstoreError, Damaged, NotStored, nearest
from actstore.ingest.models import load
from actstore.ingest.models.config import ModelConfig, there_are
from actstore.ingest.models.general import from_kept
from actstore.ingest.models.load import Model
from actstore.named import available
from actstore.storage.at import at
from actstore.storage.backend import ENDLESS
from actstore.writing import parts as writing_parts


def model_of(root: Path, run: str, device: str = "cpu") -> Model:
    """Load the model of a stored run.

    Raises:
        NotStored: there is no such run, or no store; or the store only refers to the weights, and
            they are no longer where they were.
        BadInput: there is no such device.
        Damaged: the run's weights are missing or changed, and no named model has the same weights.
    """
    load.check_device(device)
    return model_of_row(root, model_row_of(root, run), device)


def model_row_of(root: Path, run: str) -> dict[str, Any]:
    """The row of `models` of the model of a stored run; its weights are not read.

    Raises:
        NotStored: there is no such run, or no store.
    """
    check_format(root)
    manifests = read_all(root)
    runs = writing_parts.rows_committed(root, manifests, "runs").to_dicts()
    about = next((row for row in runs if row["run"] == run), None)
    if about is None:
        held = [row["run"] for row in runs]
        raise NotStored(f"{root} holds no run {run!r}{nearest(run, held)}; {there_are(held)}")
    models_there = writing_parts.rows_committed(root, manifests, "models").to_dicts()
    return row_where(models_there, "weights_sha256", about["weights_sha256"], "models")


def shape_of_row(row: dict[str, Any]) -> ModelConfig | None:
    """The configuration of a path-finding system, from its row of `models`; None for others."""
    if row.get("facts") is not None:
        return None
    return ModelConfig.from_mapping(json.loads(row["config"]), f"models.config of {row['model']}")


def row_where(rows: list[dict[str, Any]], column: str, wanted: object, table: str) -> dict[str, Any]:
    """The first row with a value in a column.

    Raises:
        Damaged: no row has this value.
    """
    for row in rows:
        if row[column] == wanted:
            return row
    raise Damaged(f"the row of {table} whose {column} is {wanted!r} is damaged, and needed; restore it from a copy")


def model_of_row(root: Path, row: dict[str, Any], device: str) -> Model:
    """Load a model from the store's weights, else from where a model with the same hash is found.

    Raises:
        NotStored: the store only refers to the weights, and they are no longer where they were.
        Damaged: the weights are missing or changed, and no named model has the same weights.
    """
    wanted, name = row["weights_sha256"], row["model"]
    import torch

    where = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    path, content = weights_path(wanted), b""
    with suppress(FileNotFoundError, Damaged):
        content = at(root).read(path, ENDLESS)
    shape, is_whole = shape_of_row(row), hashlib.sha256(content).hexdigest() == wanted
    if shape is None:
        return from_kept(row, content, where) if is_whole else load.again(row, where)
    if is_whole:
        return load.from_bytes(content, shape, name, row["source"], where)
    of, _, step = name.rpartition("-step")
    for called, checkpoint in ((name, None), (of, int(step) if step.isdigit() else None)):
        with suppress(ActstoreError):
            if called in available():
                found = load.load(called, device=where, checkpoint=checkpoint)
                if found.weights_sha256 == wanted:
                    return replace(found, name=name, source=row["source"])
    raise Damaged(
        f"the weights {root / path} are not those that were run, and no model {name!r} has them; restore them from a copy"
    )
