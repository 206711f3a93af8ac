"""A stored run as the job that stored it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from actstore.commits.manifest import Manifest, Part
from actstore.errors import NotStored
from actstore.ingest.answers.next_token import understood
from actstore.ingest.jobs.job import MOST_AT_ONCE, Ingest
from actstore.ingest.jobs.patched import Base, job_of, stored_patch
from actstore.ingest.jobs.sets import stored_set
from actstore.ingest.jobs.stored import model_of_row, row_where
from actstore.ingest.replay import definitions
from actstore.writing import parts as writing_parts
from actstore.writing.committed import made_by


def rehydrate(
    root: Path, manifests: list[Manifest], run: str, lost: Mapping[Part, dict[str, Any]] | None = None
) -> tuple[Ingest, dict[str, Any]]:
    """The job of a stored run, and the run's row of `runs`.

    Args:
        lost: part → row of the definition that no sound part holds.

    Raises:
        NotStored: there is no such run; or the store only refers to the run's model, and it is no
            longer where it was.
        Damaged: the run's weights are missing or changed, and no named model has the same weights.
    """
    rows = {
        name: writing_parts.rows_committed(root, manifests, name).to_dicts() for name in ("runs", "models", "datasets")
    }
    for part, row in (lost or {}).items():
        rows[part.table].append(row)
    about = next((row for row in rows["runs"] if row["run"] == run), None)
    if about is None:
        raise NotStored(f"{root} holds no run {run!r}")
    model = row_where(rows["models"], "weights_sha256", about["weights_sha256"], "models")
    dataset = row_where(rows["datasets"], "dataset", about["dataset"], "datasets")
    sites = [name for names in definitions.site_names(manifests, run).values() for name in names]
    about_it = json.loads(about["versions"])
    dtype, codec = (made_by(about)[name] for name in ("dtype", "codec"))
    if "edits" in about_it:
        edits = writing_parts.rows_committed(root, manifests, "interventions")
        of_run = edits.filter(pl.col("run") == run).sort("edit").to_dicts() if len(edits) else []
        base = of_run[0]["base_run"] if of_run else run
        origin = Base(root, base, about["device"], manifests)
        patch = stored_patch(origin, run, of_run)
        size = about_it.get("batch_size")
        return job_of(origin, patch, run, sites, size, dtype=dtype, codec=codec, noted=about_it), about
    held = model_of_row(root, model, about["device"])
    return Ingest(
        root,
        held,
        stored_set(root, manifests, dataset),
        run,
        sites,
        about_it.get("batch_size", MOST_AT_ONCE),
        prompt=about.get("prompt") or "task",
        samples=about.get("samples"),
        asked=understood(about_it.get("answers") or "next"),
        dtype=dtype,
        codec=codec,
    ), about
