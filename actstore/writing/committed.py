"""Read what a store holds, and check that a planned run agrees with it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from actstore.arrays.address import Ids
from actstore.commits import log
from actstore.commits.format import check_format
from actstore.commits.manifest import Manifest
from actstore.errors import BadInput, NotStored
from actstore.storage.at import at
from actstore.writing.create import is_store
from actstore.writing.parts import rows_committed
from actstore.writing.plan import RunPlan, SitePlan

Rows = list[dict[str, Any]]  # a table's rows
HOW = ("dtype", "attention", "padding", "mask", "compatibility_mode")  # facts of a model that activations depend on


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
        datasets, runs, sites, models, relations = (
            rows_committed(root, committed, table).to_dicts()
            for table in ("datasets", "runs", "sites", "models", "relations")
        )
        stored_dataset(datasets, plan.dataset)
        if stored_run(runs, plan):
            new_sites(models, sites, plan, sites_of(committed, plan.run))
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


def stored_run(runs: Rows, plan: RunPlan) -> dict[str, Any] | None:
    """The stored row of a run; None if the name is free. Its sites are not compared.

    Args:
        runs: rows of `runs`.
        plan: the planned run; the stored row must agree with it.

    Raises:
        BadInput: the stored row differs.
    """
    row = next((row for row in runs if row["run"] == plan.run), None)
    if row:
        wanted = {
            "weights_sha256": plan.model.get("weights_sha256", row["weights_sha256"]),
            "dataset": plan.dataset["dataset"],
            "prompt": plan.facts.get("prompt", "task"),
            "samples": plan.facts.get("samples"),
        }
        stored = {**row, "prompt": row.get("prompt") or "task"}
        if "versions" in plan.facts:
            wanted, stored = wanted | made_by(plan.facts), stored | made_by(row)
            if plan.of_trees:  # which note answers only if there are none
                wanted["answers"], stored["answers"] = (about["answers"] or "all" for about in (wanted, stored))
            if stored["batch_size"] is None:  # an early version did not note it
                del wanted["batch_size"]
        must_agree(f"run {plan.run!r}", stored, wanted, "name the new run otherwise (--run)")
    return row


def new_sites(models: Rows, sites: Rows, plan: RunPlan, held: Mapping[int, Collection[str]]) -> list[SitePlan]:
    """The sites of a plan that its stored run does not name yet.

    Args:
        models: rows of `models`.
        sites: rows of `sites`.
        plan: the plan of a run that is stored. If its `model` is empty, the model is not compared.
        held: see sites_of.

    Raises:
        BadInput: the run is not finished, and the plan has other sites; the model was loaded
            otherwise; or a site that was appended to the run has the name of a new one.
    """
    rows = [row for row in sites if row["run"] == plan.run]
    own = {row["site"]: row["short"] for row in rows if row.get("lineage") is None}
    is_finished = len(held) == plan.n_batches
    if own.keys() != {site.site for site in plan.sites} and not is_finished:
        raise BadInput(
            f"run {plan.run!r} is not finished: {len(held)} of {plan.n_batches} batches are stored, with sites "
            f"{', '.join(own.values()) or 'none'}; finish it first, by the same command with --sites "
            f"{','.join(own.values()) or 'none'}, then add sites"
        )
    if is_finished and lacking(plan, held):
        for row in [row for row in models if row["weights_sha256"] == plan.model.get("weights_sha256")]:
            stored, wanted = (json.loads(about.get("facts") or "{}") for about in (row, plan.model))
            what = f"the model of run {plan.run!r}"
            must_agree(what, stored, {key: wanted.get(key) for key in HOW}, "name the new run otherwise (--run)")
    new = [site for site in plan.sites if site.site not in own]
    appended = {name for row in rows if row.get("lineage") is not None for name in (row["site"], row["short"])}
    for site in new:
        if not appended.isdisjoint((site.site, site.short)):
            raise BadInput(
                f"run {plan.run!r} holds a site {site.short!r} that was appended to it; leave it out (--sites), or name a "
                "new run (--run)"
            )
    return new


def lacking(plan: RunPlan, held: Mapping[int, Collection[str]]) -> dict[int, list[str]]:
    """What of a planned run is not stored yet.

    Args:
        plan: the planned run.
        held: see sites_of.

    Returns:
        Number of a batch → TransformerLens' names of the plan's sites that it lacks. A batch that
        is not in `held` lacks its rows, too; it is there with [] if the run has no sites.
    """
    found = {}
    for batch in range(plan.n_batches):
        sites = [site.site for site in plan.sites if site.site not in held.get(batch, ())]
        if sites or batch not in held:
            found[batch] = sites
    return found


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


def made_by(about: Mapping[str, Any]) -> dict[str, Any]:
    """What is noted beside the versions in a row of `runs`.

    Returns:
        batch_size: sequences per forward pass; answers: which answers a run over text stores, or
        `none`; edits: hash of the edits of a run with edits. None where nothing is noted.
        dtype, codec: how activations are stored.
    """
    noted = json.loads(about.get("versions") or "{}")
    found = {name: noted.get(name) for name in ("batch_size", "answers", "edits")}
    return found | {"dtype": noted.get("dtype", "float32"), "codec": noted.get("codec", "none")}


def committed_batches(root: Path, run: str) -> set[int]:
    """Numbers of a run's committed batches, read without the lease.

    Raises:
        NotStored: there is no store.
    """
    return set(committed_sites(root, run))


def committed_sites(root: Path, run: str) -> dict[int, set[str]]:
    """Which sites each committed batch of a run has, see sites_of; read without the lease.

    Raises:
        NotStored: there is no store.
    """
    check_format(root)
    return sites_of(log.manifests(root), run)


def committed_run(root: Path, run: str) -> tuple[dict[str, Any], list[str]] | None:
    """A run's row of `runs`, and TransformerLens' names of its sites; read without the lease.

    Sites that were appended are left out.

    Returns:
        None if there is no such run, or no store.
    """
    try:
        check_format(root)
    except NotStored:
        return None
    committed = log.manifests(root)
    runs, sites = (rows_committed(root, committed, table).to_dicts() for table in ("runs", "sites"))
    row = next((row for row in runs if row["run"] == run), None)
    if row is None:
        return None
    return row, [site["site"] for site in sites if site["run"] == run and site.get("lineage") is None]


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


def sites_of(committed: Sequence[Manifest], run: str) -> dict[int, set[str]]:
    """Number of each batch of a run in these manifests → TransformerLens' names of its sites."""
    found = {batch: set[str]() for batch in batches_of(committed, run)}
    for shard in (shard for manifest in log.live(committed) if manifest.run == run for shard in manifest.shards):
        if shard.batch in found:  # a site may be appended to tokens that the run does not have yet
            found[shard.batch].add(shard.site)
    return found


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
