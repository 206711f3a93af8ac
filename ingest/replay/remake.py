"""Recompute the files of a stored run from the weights and the definition in the store.

A batch depends only on its run's definition and its number, so the same machine recomputes the same
bytes.
"""

from __future__ import annotations

from pathlib import Path

from actstore.arrays.address import Ids
from actstore.commits.format import part_path
from actstore.commits.manifest import Manifest
from actstore.errors import ActstoreError
from actstore.ingest.jobs.batch import files as batch_files
from actstore.ingest.replay import definitions
from actstore.ingest.replay.rehydrate import rehydrate
from actstore.writing.contents import definition_contents
from actstore.writing.parts import rows_committed


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
    datasets = rows_committed(root, manifests, "datasets")
    first = Ids.of_dataset(
        next(
            row
            for row in [*datasets.to_dicts(), *lost.values()]
            if row.get("dataset") == about["dataset"] and "n_positions" in row
        )
    )
    if batch is None:
        plan = job.plan
        for owner, names in definitions.site_names(manifests, run).items():
            rows = [site.row(run) for site in plan.sites if site.site in names]
            parts[part_path("sites", owner)] = definitions.as_part("sites", rows)
        contents = definition_contents(plan, first)
        return {**parts, **{content.path: bytes(content.content) for content in contents}}
    return batch_files(job, batch, first, job.originals(datasets))
