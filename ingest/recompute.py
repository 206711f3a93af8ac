"""A stored run computed again, from the weights and the definition that the store keeps: to mend it, and to hold it against.

A batch is a function of its run's definition and its number, so computed again on the same machine it has the same bytes.
Elsewhere, or in batches of another size, additions round in another order: what is stored must then agree to TOLERANCE.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from actstore import writer
from actstore.arrays import ShardBuffer, metadata
from actstore.errors import Damaged, NotStored
from actstore.ingest import models
from actstore.ingest.activations import forward
from actstore.ingest.config import ModelConfig
from actstore.ingest.models import Model
from actstore.ingest.pipeline import Ingest, TreeSet
from actstore.ingest.predictions import answer, prediction_rows
from actstore.ingest.tokens import encode
from actstore.ingest.trees import Trees
from actstore.log import ARRAYS, WEIGHTS, Manifest
from actstore.store import Store

TOLERANCE = (
    1e-4  # of a site's largest number: float32 sums of 128 to 512 terms through six layers differ by 1e-6 to 1e-5
)
P_TOLERANCE = 1e-3  # of a probability
AT_ONCE = 64  # trees a forward pass


def rehydrate(root: Path, manifests: list[Manifest], run: str) -> tuple[Ingest, dict[str, Any]]:
    """The ingest that a stored run was, and its row of `runs`.

    Raises:
        NotStored: no such run.
        Damaged: its weights are not there, or not those it ran, and no model that can be named has them either.
    """
    rows = {name: writer.table(root, manifests, name).to_dicts() for name in ("runs", "models", "datasets", "sites")}
    about = next((row for row in rows["runs"] if row["run"] == run), None)
    if about is None:
        raise NotStored(f"{root} holds no run {run!r}")
    model = next(row for row in rows["models"] if row["weights_sha256"] == about["weights_sha256"])
    dataset = next(row for row in rows["datasets"] if row["dataset"] == about["dataset"])
    sites = [row["short"] for row in rows["sites"] if row["run"] == run]
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


def _model(root: Path, row: dict[str, Any], device: str) -> Model:
    """A model out of the store's own weights, else out of a named model that has the same."""
    wanted = row["weights_sha256"]
    where = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    path = root / WEIGHTS / f"{wanted}.safetensors"
    candidates = [path, *(folder / f"{row['model']}.safetensors" for folder in models.folders())]
    for candidate in candidates:
        try:
            content = candidate.read_bytes()
        except OSError:
            continue
        if hashlib.sha256(content).hexdigest() == wanted:
            config = ModelConfig.from_mapping(json.loads(row["config"]), f"models.config of {row['model']}")
            return models.from_bytes(content, config, row["model"], row["source"], where)
    raise Damaged(
        f"the weights {path} are not those that were run, and no model {row['model']!r} has them; restore them from a copy"
    )


def files_of(root: Path, manifests: list[Manifest], run: str, batch: int | None) -> dict[str, bytes]:
    """The files of one batch of a run, or of batch None those of its definition, computed again: path → bytes."""
    job, about = rehydrate(root, manifests, run)
    first_tree_id = int(about["first_tree_id"])
    if batch is None:
        plan = job.plan
        of_run = {"weights_sha256": plan.model["weights_sha256"], "first_tree_id": first_tree_id}
        made = {
            f"{site.path(run)}/zarr.json": metadata(site.layout, site.axes, {"run": run, "site": site.site, **of_run})
            for site in plan.sites
        }
        return {
            **made,
            f"{ARRAYS}/{run}/zarr.json": writer.GROUP,
            f"{WEIGHTS}/{plan.model['weights_sha256']}.safetensors": plan.weights,
        }
    per_shard = int(job.plan.dataset["trees_per_shard"])
    start, stop = batch * per_shard, min((batch + 1) * per_shard, job.trees.n_trees)
    buffers = {site.site: ShardBuffer(site.layout) for site in job.plan.sites}
    of_run_rows = job._run_model(job.trees.slice(start, stop), buffers, start, first_tree_id, lambda done: None)
    originals = _originals(root, manifests, job)
    of_trees = job.trees.rows(start, stop, first_tree_id, originals)
    lengths = (3 * job.trees.n_nodes + of_trees["trees"]["depth"].to_numpy()).astype(np.intp)
    made = {}
    for owner, tables in ((job.plan.dataset["dataset"], of_trees), (run, of_run_rows)):
        for name, frame in tables.items():
            made[f"parts/{name}/{owner}-{batch:06d}.parquet"] = writer.as_parquet(name, frame)
    for site in job.plan.sites:
        made[f"{site.path(run)}/{site.layout.shard_name(batch)}"] = bytes(buffers[site.site].seal(lengths))
    return made


def _originals(root: Path, manifests: list[Manifest], job: Ingest) -> int | None:
    if not job.trees.variant_of:
        return None
    known = {row["dataset"]: row["first_tree_id"] for row in writer.table(root, manifests, "datasets").to_dicts()}
    return int(known[job.trees.variant_of])


@dataclass(frozen=True)
class Difference:
    """Where what is stored and what is computed do not agree; all is well where `worst` is within `tolerance`.

    Attributes:
        run: whose.
        what: a site, a table, or `vocabulary`.
        worst: largest difference, of the site's largest number or of a probability; or the share of rows that differ.
        tolerance: how large it may be.
        n: rows compared.
        first: where it is worst, in words.
    """

    run: str
    what: str
    worst: float
    tolerance: float
    n: int
    first: str

    @property
    def agrees(self) -> bool:
        return self.worst <= self.tolerance


def compare(
    path: str | Path, n_trees: int, seed: int = 0, advance: Callable[[int, int, str], None] = lambda *done: None
) -> list[Difference]:
    """Run random trees of every run anew, and hold what is stored against it.

    Args:
        path: the store.
        n_trees: of each run, drawn among those that are committed.
        seed: of the draw.
        advance: called with (runs done, runs in all, the run just done).
    """
    root = Path(path)
    found: list[Difference] = []
    with Store(root) as store:
        from actstore.log import manifests

        committed = manifests(root)[: store.snapshot]
        runs = store.runs()
        for done, run in enumerate(runs, start=1):
            job, about = rehydrate(root, committed, run)
            found += _compare_run(
                store, job, int(about["first_tree_id"]), n_trees, seed, _originals(root, committed, job)
            )
            advance(done, len(runs), run)
    return found


def _compare_run(
    store: Store, job: Ingest, first_tree_id: int, n_trees: int, seed: int, originals: int | None
) -> list[Difference]:
    run, answers = job.plan.run, "generations" if job.generator else "outcomes"
    answered = store.sql(f"select distinct tree_id from {answers} where run = $run order by tree_id", {"run": run})
    held = answered["tree_id"].to_numpy()
    if not len(held):
        return []
    chosen = np.sort(np.random.default_rng(seed).choice(held, min(n_trees, len(held)), replace=False)) - first_tree_id
    trees = _concatenate([job.trees.slice(i, i + 1) for i in chosen.tolist()])
    found = [_vocabulary(store, job)]
    for name in ("trees", "edges", "tokens"):
        frames = [job.trees.rows(i, i + 1, first_tree_id, originals)[name] for i in chosen.tolist()]
        found.append(_rows(store, run, name, pl.concat(frames), chosen + first_tree_id))
    if job.generator:
        return [*found, _generations(store, job, trees, chosen, first_tree_id)]
    return found + _activations(store, job, trees, chosen + first_tree_id)


def _concatenate(trees: list[Trees]) -> Trees:
    return Trees(*(np.concatenate(columns) for columns in zip(*(vars(some).values() for some in trees), strict=True)))


def _vocabulary(store: Store, job: Ingest) -> Difference:
    stored = store.sql(
        "select vocabulary from runs join models using (weights_sha256) where run = $run", {"run": job.plan.run}
    ).item(0, 0)
    ours = job.model.config.vocabulary.words()
    wrong = [f"id {i}: {a!r}, not {b!r}" for i, (a, b) in enumerate(zip(list(stored), ours, strict=False)) if a != b]
    share = len(wrong) / len(ours) if len(stored) == len(ours) else 1.0
    return Difference(job.plan.run, "vocabulary", share, 0.0, len(ours), wrong[0] if wrong else "")


def _rows(store: Store, run: str, name: str, expected: pl.DataFrame, tree_ids: np.ndarray) -> Difference:
    """The share of a table's rows, of the trees chosen, that are not what the trees' own definition gives."""
    order = {"trees": "tree_id", "edges": "tree_id, edge", "tokens": "token_id"}[name]
    held = store.sql(f"from {name} where tree_id in (select unnest($ids)) order by {order}", {"ids": tree_ids.tolist()})
    expected = expected.select(held.columns).cast(held.schema)
    if len(held) != len(expected):
        return Difference(run, name, 1.0, 0.0, len(expected), f"{len(held)} rows, not {len(expected)}")
    wrong = np.zeros(len(held), bool)
    for column in held.columns:
        wrong |= ~held[column].eq_missing(expected[column]).to_numpy()
    first = str(held.row(int(wrong.argmax()), named=True)) if wrong.any() else ""
    return Difference(run, name, float(wrong.mean()), 0.0, len(held), first)


def _activations(store: Store, job: Ingest, trees: Trees, tree_ids: np.ndarray) -> list[Difference]:
    """Every site at every token, and every prediction, of the trees chosen."""
    run, words = job.plan.run, encode(trees)
    ids = torch.from_numpy(job.model.config.vocabulary.encode(words)).to(job.device)
    computed: dict[str, list[np.ndarray]] = {spec.name: [] for spec in job.specs}
    graded = []
    for start in range(0, len(trees), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        logits = forward(
            job.model, ids[some], job.specs, lambda spec, found: computed[spec.name].append(found.cpu().numpy().copy())
        )
        graded.append(prediction_rows(answer(job.model, words[some], logits), run, 0))
    tree, position = np.nonzero(words)
    token_ids = tree_ids[tree].astype(np.int64) * 256 + position
    found = []
    for site in job.plan.sites:
        ours = np.concatenate(computed[site.site])
        ours = ours[tree, position] if site.kind == "resid" else np.moveaxis(ours, 2, 1)[tree, position]
        held, _ = store.read("select unnest($ids)::bigint as token_id", run, site.short, {"ids": token_ids.tolist()})
        apart = np.abs(np.nan_to_num(held, nan=np.inf) - ours).reshape(len(ours), -1).max(axis=1)
        apart = apart / max(float(np.abs(ours).max()), 1e-30)
        worst = int(apart.argmax())
        where = f"token {token_ids[worst]}"
        found.append(Difference(run, site.short, float(apart[worst]), TOLERANCE, len(ours), where))
    return [*found, _predictions(store, run, pl.concat(graded), tree_ids)]


def _predictions(store: Store, run: str, ours: pl.DataFrame, tree_ids: np.ndarray) -> Difference:
    held = store.sql(
        "select token_id, target, predicted, p_target from predictions where run = $run and tree_id in (select unnest($ids)) "
        "order by token_id",
        {"run": run, "ids": tree_ids.tolist()},
    )
    if len(held) != len(ours):
        return Difference(run, "predictions", 1.0, P_TOLERANCE, len(ours), f"{len(held)} rows, not {len(ours)}")
    apart = np.abs(held["p_target"].to_numpy() - ours["p_target"].to_numpy())
    apart[(held["target"].cast(pl.String) != ours["target"].cast(pl.String)).to_numpy()] = 1.0
    worst = int(apart.argmax())
    return Difference(
        run, "predictions", float(apart[worst]), P_TOLERANCE, len(ours), f"token {held['token_id'][worst]}"
    )


def _generations(store: Store, job: Ingest, trees: Trees, chosen: np.ndarray, first_tree_id: int) -> Difference:
    """The greedy continuations, up to where two words are as likely as one another."""
    assert job.generator is not None
    said = job.generator.go_on(encode(trees), 0)  # sample 0 draws nothing, so where it starts does not matter
    held = store.sql(
        "select tree_id, position, token::varchar as token, p from generations where run = $run and sample = 0 "
        "and tree_id in (select unnest($ids)) order by tree_id, position",
        {"run": job.plan.run, "ids": (chosen + first_tree_id).tolist()},
    )
    apart, where = 0.0, ""
    for row, (_, of_tree) in enumerate(held.group_by("tree_id", maintain_order=True)):
        p = said.p[row, 0, 0]
        if abs(of_tree["p"][0] - p) > apart:
            apart, where = float(abs(of_tree["p"][0] - p)), f"tree {of_tree['tree_id'][0]}"
    return Difference(job.plan.run, "generations", apart, P_TOLERANCE, len(chosen), where)


def table(found: list[Difference]) -> pl.DataFrame:
    """A row a comparison."""
    return pl.DataFrame(
        {
            "run": [of.run for of in found],
            "what": [of.what for of in found],
            "agrees": [of.agrees for of in found],
            "worst": [of.worst for of in found],
            "tolerance": [of.tolerance for of in found],
            "n": [of.n for of in found],
            "where": ["" if of.agrees else of.first for of in found],
        }
    )


def raise_if_apart(found: list[Difference], path: str | Path) -> None:
    """Refuse a store that is not what its own weights and trees give.

    Raises:
        Damaged: says what differs first.
    """
    apart = [of for of in found if not of.agrees]
    if apart:
        first = apart[0]
        raise Damaged(
            f"{path} is not what its weights and trees give: {len(apart)} of {len(found)} comparisons differ, the first "
            f"{first.what} of run {first.run!r} by {first.worst:.3g} ({first.first}); ingest it anew, into another store"
        )
