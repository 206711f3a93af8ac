"""Recompute the files of a stored run from the weights and the definition in the store.

A batch depends only on its run's definition and its number, so the same machine recomputes the same
bytes.
"""

from __future__ import annotations

from pathlib import Path

from actstore.arrays.metadata import metadata
from actstore.commits.format import ARRAYS, part_path, weights_path
from actstore.commits.manifest import Manifest
from actstore.errors import ActstoreError
from actstore.ingest.jobs.batch import files as batch_files
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.replay import definitions
from actstore.ingest.replay.rehydrate import rehydrate
from actstore.writing import parts as writing_parts
from actstore.writing.parts import GROUP


def files_of(root: Path, manifests: list[Manifest], run: str, batch: int | None) -> dict[str, bytes]:
    """Recompute the files of one batch, or of the run's definition (batch None): path → bytes."""
    lost = definitions.lost_rows(root, manifests, run) if batch is None else {}
    parts = {part.path: definitions.as_part(part.table, [row]) for part, row in lost.items()}
    try:
        job, about = rehydrate(root, manifests, run, lost)
    except (ActstoreError, LookupError, ValueError):
        if not parts:
            raise
        return parts  # these need no model
    first_tree_id = int(about["first_tree_id"])
    if batch is None:
        plan = job.plan
        parts[part_path("sites", run)] = definitions.as_part("sites", [site.row(run) for site in plan.sites])
        of_run = {"weights_sha256": plan.model["weights_sha256"], "first_tree_id": first_tree_id}
        made = {
            f"{site.path(run)}/zarr.json": metadata(site.layout, site.axes, {"run": run, "site": site.site, **of_run})
            for site in plan.sites
        }
        return {
            **parts,
            **made,
            f"{ARRAYS}/{run}/zarr.json": GROUP,
            weights_path(plan.model["weights_sha256"]): plan.weights,
        }
    return batch_files(job, batch, first_tree_id, originals_of(root, manifests, job))


def originals_of(root: Path, manifests: list[Manifest], job: Ingest) -> int | None:
    """tree_id of the first tree of the set that a variant was made from; None for a drawn set."""
    if not job.trees.variant_of:
        return None
    known = {
        row["dataset"]: row["first_tree_id"]
        for row in writing_parts.rows_committed(root, manifests, "datasets").to_dicts()
    }
    return int(known[job.trees.variant_of])
