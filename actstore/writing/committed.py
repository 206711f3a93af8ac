"""Read what a store holds, and check that a planned run agrees with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actstore.arrays.address import Ids
from actstore.commits import log
from actstore.commits.format import check_format
from actstore.commits.manifest import Manifest
from actstore.errors import BadInput
from actstore.storage.at import at
from actstore.writing.create import is_store
from actstore.writing.parts import rows_committed
from actstore.writing.plan import RunPlan

Rows = list[dict[str, Any]]  # a table's rows


def check_plan(root: Path, plan: RunPlan) -> None:
    """Refuse a plan that `Writer.define` would refuse, without taking the lease.

    Args:
        root: the store's folder; it need not exist yet.
        plan: the planned run. If its `model` is empty, the run's weights are not compared.

    Raises:
        BadInput: the folder can become no store, or cannot be written, or the run's or dataset's
            name is taken.
    """
    if is_store(root):
        check_format(root)
        committed = log.manifests(root)
        datasets, runs, sites, relations = (
            rows_committed(root, committed, table).to_dicts() for table in ("datasets", "runs", "sites", "relations")
        )
        stored_dataset(datasets, plan.dataset)
        stored_run(runs, sites, plan)
        check_tables(relations, plan)
    if why := at(root).unwritable():
        raise BadInput(f"{root} cannot be written, since {why}; name another folder")


def stored_dataset(datasets: Rows, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The stored row of a dataset; None if the name is free.

    Args:
        datasets: rows of `datasets`.
        wanted: the planned row; the stored row must agree with it.

    Raises:
        BadInput: the stored row differs.
    """
    row = next((row for row in datasets if row["dataset"] == wanted["dataset"]), None)
    if row:
        must_agree(f"dataset {row['dataset']!r}", row, wanted, "name the new set otherwise (--dataset)")
    return row


def stored_run(runs: Rows, sites: Rows, plan: RunPlan) -> dict[str, Any] | None:
    """The stored row of a run; None if the name is free.

    Args:
        runs: rows of `runs`.
        sites: rows of `sites`.
        plan: the planned run; the stored row must agree with it.

    Raises:
        BadInput: the stored row differs.
    """
    row = next((row for row in runs if row["run"] == plan.run), None)
    if row:
        wanted = {
            "weights_sha256": plan.model.get("weights_sha256", row["weights_sha256"]),
            "dataset": plan.dataset["dataset"],
            "sites": ", ".join(site.short for site in plan.sites) or "none",
            "prompt": plan.facts.get("prompt", "task"),
            "samples": plan.facts.get("samples"),
        }
        if "versions" in plan.facts:
            wanted["answers"], row = _answers(plan.facts), {**row, "answers": _answers(row)}
        ran = (site["short"] for site in sites if site["run"] == plan.run and site.get("lineage") is None)
        shorts = ", ".join(ran)
        stored = {**row, "sites": shorts or "none", "prompt": row.get("prompt") or "task"}
        must_agree(f"run {plan.run!r}", stored, wanted, "name the new run otherwise (--run)")
    return row


def check_tables(relations: Rows, plan: RunPlan) -> None:
    """Refuse a declared table whose name another dataset or label has.

    Args:
        relations: rows of `relations`.
        plan: the planned run.

    Raises:
        BadInput: a table's name is taken.
    """
    owners = {row["name"]: (row["kind"], row["owner"]) for row in relations}
    for row in plan.parts["relations"].to_dicts() if "relations" in plan.parts else []:
        kind, owner = owners.get(row["name"], (row["kind"], row["owner"]))
        if (kind, owner) != (row["kind"], row["owner"]):
            whose = f"dataset {owner!r}" if kind == "documents" else f"label {owner!r}"
            raise BadInput(
                f"the columns of dataset {row['owner']!r} would be table {row['name']}, which is the table of {whose}; name the "
                "new set otherwise (--dataset)"
            )


def _answers(about: Mapping[str, Any]) -> Any:
    """Which answers a run over text stores, noted beside the versions; None for trees."""
    return json.loads(about.get("versions") or "{}").get("answers")


def committed_batches(root: Path, run: str) -> set[int]:
    """Numbers of a run's committed batches, read without the lease.

    Raises:
        NotStored: there is no store.
    """
    check_format(root)
    return batches_of(log.manifests(root), run)


def committed_datasets(root: Path) -> dict[str, dict[str, Any]]:
    """Name → row of the stored datasets, read without the lease; empty if there is no store."""
    if not at(root).has("store.json"):
        return {}
    check_format(root)
    rows = rows_committed(root, log.manifests(root), "datasets").to_dicts()
    return {row["dataset"]: row for row in rows}


def batches_of(committed: Sequence[Manifest], run: str) -> set[int]:
    """Numbers of a run's batches in these manifests."""
    return {m.batch for m in log.live(committed) if m.kind == "batch" and m.run == run and m.batch is not None}


def dropped_ids(committed: Sequence[Manifest]) -> Ids:
    """Ids beyond those of all datasets that were dropped; (0, 0) if none was."""
    last = next((manifest.dropped for manifest in reversed(committed) if manifest.dropped), None)
    return Ids(last.token_id, last.sequence_id) if last else Ids(0, 0)


def must_agree(what: str, stored: Mapping[str, Any], wanted: Mapping[str, Any], advice: str) -> None:
    """Raise BadInput if a stored row differs from a wanted one.

    Args:
        what: what the row describes, for the message.
        stored: the stored row.
        wanted: the values to compare.
        advice: what to do otherwise, for the message.
    """
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise BadInput(
                f"{what} is stored with {key} {stored.get(key)}, not {value}; {advice}, or ask for what is stored"
            )
