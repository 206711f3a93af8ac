"""Rerun random trees of a stored run with its own weights, and compare with what is stored.

Another batch size or another machine rounds sums in another order. Activations and probabilities
therefore need to agree only within a tolerance. Where two words are equally likely, within TIE,
either is right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from actstore.arrays.address import POSITIONS_PER_TREE, Ids, token_ids
from actstore.commits.log import manifests
from actstore.commits.manifest import Manifest
from actstore.errors import NotStored
from actstore.ingest.answers.continuations import Generator, generation_rows
from actstore.ingest.answers.tree_paths import answer, of_trees, outcome_rows, prediction_rows
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.models.forward import activations, forward
from actstore.ingest.models.sites import SiteSpec
from actstore.ingest.replay.asked import planned
from actstore.ingest.replay.compare_edited import compare_edited
from actstore.ingest.replay.compare_text import compare_text
from actstore.ingest.replay.difference import (
    DRAWN_OTHERWISE,
    P_TOLERANCE,
    TIE,
    Difference,
    not_compared,
    of_rows,
    of_site,
)
from actstore.ingest.replay.rehydrate import rehydrate
from actstore.ingest.trees.draw import Trees, concatenate
from actstore.ingest.trees.tokens import PAD, WORDS, arrow_word, encode, path_at, root_at
from actstore.store import Store
from actstore.writing.committed import batches_of, sites_of
from actstore.writing.parts import rows_committed
from actstore.writing.plan import SitePlan

AT_ONCE = 64  # trees per forward pass


def compare(
    path: str | Path, n_trees: int, seed: int = 0, advance: Callable[[int, int, str], None] = lambda *done: None
) -> list[Difference]:
    """Rerun random trees, or sequences of text, of every run, and compare with what is stored.

    Args:
        path: path of the store.
        n_trees: trees or sequences per run, drawn among the committed ones.
        seed: seed of the draw.
        advance: called with (sequences done, sequences in all, the run that is run again).
    """
    root, asked, before = Path(path), planned(path, n_trees), 0
    found: list[Difference] = []
    with Store(root) as store:
        committed = manifests(root)[: store.snapshot]
        datasets = rows_committed(root, committed, "datasets")
        for run, n in asked.n_of.items():
            step = partial(_within, advance, before, n, asked.n, run)
            step(0)
            found += _of_run(store, committed, run, n_trees, seed, datasets, step)
            step(n)
            before += n
    return found


def _within(advance: Callable[[int, int, str], None], before: int, n: int, total: int, run: str, done: int) -> None:
    """Say how many sequences of one run are done, of all that are run again."""
    advance(before + min(done, n), total, run)


def _appended(store: Store, run: str) -> list[Difference]:
    """The sites that were appended to a run: nothing says how to compute them again."""
    sites = store.sql("select short, lineage from sites where run = $run and lineage is not null", {"run": run})
    return [
        not_compared(run, site, f"appended, so it cannot be computed again: {lineage}")
        for site, lineage in sites.iter_rows()
    ]


def _unfinished(job: Ingest, held: Mapping[int, Collection[str]]) -> dict[str, Difference]:
    """The sites that are being added to a run, by TransformerLens' name.

    Args:
        held: see committed.sites_of.
    """
    found = {}
    for site in job.plan.sites:
        n = sum(site.site in sites for sites in held.values())
        if n < len(held):
            why = f"not added to the end: {n} of {len(held)} batches are stored"
            found[site.site] = not_compared(job.plan.run, site.short, why)
    return found


def _of_run(
    store: Store,
    committed: list[Manifest],
    run: str,
    n_sequences: int,
    seed: int,
    datasets: pl.DataFrame,
    step: Callable[[int], None],
) -> list[Difference]:
    """Compare one run; what the store alone cannot make again is said.

    Args:
        step: called with the number of the run's sequences that are done.
    """
    found = _appended(store, run)
    try:
        job, about = rehydrate(store.path, committed, run)
    except NotStored as error:  # the store only refers to the model
        return [*found, not_compared(run, "model", str(error))]
    if job.patch is not None:
        row = datasets.filter(pl.col("dataset") == about["dataset"]).to_dicts()[0]
        batches_held = batches_of(committed, run)
        return found + compare_edited(store, job, Ids.of_dataset(row), batches_held, n_sequences, seed, step)
    unfinished = _unfinished(job, sites_of(committed, run))
    found += unfinished.values()
    job = job.over([site.site for site in job.plan.sites if site.site not in unfinished])
    if job.of_text:
        row = datasets.filter(pl.col("dataset") == about["dataset"]).to_dicts()[0]
        batches = sorted(batches_of(committed, run))
        return found + compare_text(store, job, Ids.of_dataset(row), batches, n_sequences, seed, step)
    held = _tree_ids(store, job, int(about["first_tree_id"]), batches_of(committed, run))
    return found + _compare_run(
        store, job, int(about["first_tree_id"]), held, n_sequences, seed, job.originals(datasets), step
    )


def _tree_ids(store: Store, job: Ingest, first_tree_id: int, batches: Collection[int]) -> np.ndarray:
    """int64 [n], ascending: the trees that a run answered; without answers, those it ran over."""
    if job.asked is None:
        query = "select tree_id from trees where dataset = $dataset order by tree_id"
        ids = store.sql(query, {"dataset": job.plan.dataset["dataset"]})["tree_id"].to_numpy()
        return ids[np.isin((ids - first_tree_id) // int(job.plan.dataset["trees_per_shard"]), list(batches))]
    answers = "generations" if job.generator else "outcomes"
    query = f"select distinct tree_id from {answers} where run = $run order by tree_id"
    return store.sql(query, {"run": job.plan.run})["tree_id"].to_numpy()


def _compare_run(
    store: Store,
    job: Ingest,
    first_tree_id: int,
    held: np.ndarray,
    n_trees: int,
    seed: int,
    originals: int | None,
    step: Callable[[int], None],
) -> list[Difference]:
    """Compare some trees, drawn among those of `held`."""
    run = job.plan.run
    if not len(held):
        return []
    chosen = np.sort(np.random.default_rng(seed).choice(held, min(n_trees, len(held)), replace=False)) - first_tree_id
    drawn = [job.trees.between(i, i + 1) for i in chosen.tolist()]
    trees = concatenate([tree.trees for tree in drawn])
    found = [_vocabulary(store, job)]
    dataset = str(job.plan.dataset["dataset"])
    rows = [tree.rows(_ids(first_tree_id + tree.start), dataset, originals) for tree in drawn]
    for name in ("trees", "edges", "tokens"):
        found.append(_rows(store, run, name, pl.concat([frames[name] for frames in rows]), chosen + first_tree_id))
    if job.generator:
        return [*found, *_generations(store, job, chosen, first_tree_id, step)]
    return found + _answers(store, job, trees, chosen + first_tree_id, step)


def _ids(tree_id: int) -> Ids:
    """The first ids of a tree."""
    return Ids(tree_id * POSITIONS_PER_TREE, tree_id)


def _vocabulary(store: Store, job: Ingest) -> Difference:
    stored = store.sql(
        "select vocabulary from runs join models using (weights_sha256) where run = $run", {"run": job.plan.run}
    ).item(0, 0)
    ours = job.model.config.vocabulary.words()
    wrong = [f"id {i}: {a!r}, not {b!r}" for i, (a, b) in enumerate(zip(list(stored), ours, strict=False)) if a != b]
    share = len(wrong) / len(ours) if len(stored) == len(ours) else 1.0
    return Difference(job.plan.run, "vocabulary", share, 0.0, len(ours), wrong[0] if wrong else "")


def _rows(store: Store, run: str, name: str, expected: pl.DataFrame, tree_ids: np.ndarray) -> Difference:
    """Compare a table's rows of the chosen trees with the rows that the trees' definition gives."""
    order = {"trees": "tree_id", "edges": "tree_id, edge", "tokens": "token_id"}[name]
    held = store.sql(f"from {name} where tree_id in (select unnest($ids)) order by {order}", {"ids": tree_ids.tolist()})
    return of_rows(run, name, held, expected)


@dataclass(frozen=True)
class _Rerun:
    """The results of a rerun of trees.

    Attributes:
        sites: TransformerLens name → float32 [tree, ...], the activations.
        p: float32 [tree, n - 1, d_vocab], probabilities of each step's word.
        predictions, outcomes: empty, as is `p`, if the run stores no answers.
    """

    sites: dict[str, np.ndarray]
    p: np.ndarray = field(default_factory=lambda: np.zeros(0))
    predictions: pl.DataFrame = field(default_factory=pl.DataFrame)
    outcomes: pl.DataFrame = field(default_factory=pl.DataFrame)


def _run(job: Ingest, words: np.ndarray, tree_ids: np.ndarray, step: Callable[[int], None]) -> _Rerun:
    """Run the model over word numbers, uint8 [tree, position]."""
    ids = torch.from_numpy(job.model.config.vocabulary.encode(words)).to(job.device)
    sites: dict[str, list[np.ndarray]] = {spec.name: [] for spec in job.specs}
    answers, p, first_step = [], [], root_at(job.trees.n_nodes)

    def take(spec: SiteSpec, found: Tensor) -> None:
        sites[spec.name].append(found.cpu().numpy().copy())

    for start in range(0, len(words), AT_ONCE):
        batch = slice(start, start + AT_ONCE)
        if job.asked is None:
            activations(job.model, ids[batch], job.specs, take)
        else:
            logits = forward(job.model, ids[batch], job.specs, take)
            answers.append(answer(job.model, words[batch], logits))
            p.append(_probabilities(logits[:, first_step:-1]))
        step(batch.stop)
    rerun = _Rerun({name: np.concatenate(found) for name, found in sites.items()})
    if not answers:
        return rerun
    graded, run = concatenate(answers), job.plan.run
    predictions, outcomes = (of_trees(rows(graded, run, 0), tree_ids) for rows in (prediction_rows, outcome_rows))
    return replace(rerun, p=np.concatenate(p), predictions=predictions, outcomes=outcomes)


def _probabilities(logits: Tensor) -> np.ndarray:
    return torch.softmax(logits, dim=-1).cpu().numpy()


def _answers(
    store: Store, job: Ingest, trees: Trees, tree_ids: np.ndarray, step: Callable[[int], None]
) -> list[Difference]:
    """Compare every site at every token, every prediction and every outcome of the chosen trees."""
    words = encode(trees)
    rerun = _run(job, words, tree_ids, step)
    found = [_site(store, job.plan.run, site, words, tree_ids, rerun) for site in job.plan.sites]
    if job.asked is None:
        return found
    return [*found, _predictions(store, job, rerun, tree_ids), _outcomes(store, job, words, rerun, tree_ids)]


def _site(store: Store, run: str, site: SitePlan, words: np.ndarray, tree_ids: np.ndarray, rerun: _Rerun) -> Difference:
    tree, position = np.nonzero(words != PAD)
    tokens = token_ids(tree_ids[tree], position)
    ours = rerun.sites[site.site]
    ours = (np.moveaxis(ours, 2, 1) if site.kind == "pattern" else ours)[tree, position]
    held, _ = store.read("select unnest($ids)::bigint as token_id", run, site.short, {"ids": tokens.tolist()})
    apart = np.abs(np.nan_to_num(held, nan=np.inf) - ours).reshape(len(ours), -1).max(axis=1)
    largest = float(np.abs(ours).max())
    apart, tolerance = apart / max(largest, 1e-30), of_site(site.layout.dtype, largest)
    worst = int(apart.argmax())
    return Difference(run, site.short, float(apart[worst]), tolerance, len(ours), f"token {tokens[worst]}")


def _stored(store: Store, table: str, run: str, tree_ids: np.ndarray, order: str) -> pl.DataFrame:
    query = f"from {table} where run = $run and tree_id in (select unnest($ids)) order by {order}"
    return store.sql(query, {"run": run, "ids": tree_ids.tolist()})


def _predictions(store: Store, job: Ingest, rerun: _Rerun, tree_ids: np.ndarray) -> Difference:
    run, ours = job.plan.run, rerun.predictions
    held = _stored(store, "predictions", run, tree_ids, "token_id")
    if len(held) != len(ours):
        return Difference(run, "predictions", 1.0, P_TOLERANCE, len(ours), f"{len(held)} rows, not {len(ours)}")
    apart = np.abs(held["p_target"].to_numpy() - ours["p_target"].to_numpy())
    for column in ("token_id", "tree_id", "step", "target"):
        apart[_differ(held, ours, column)] = 1.0
    tree = np.searchsorted(tree_ids, ours["tree_id"].to_numpy())
    p = rerun.p[tree, ours["step"].to_numpy()]
    predicted = p[np.arange(len(p)), _word_ids(job, held["predicted"])]
    right = (held["predicted"].cast(pl.String) == held["target"].cast(pl.String)) == held["correct"]
    apart[(predicted < p.max(axis=1) - TIE) | ~right.to_numpy()] = 1.0
    worst = int(apart.argmax())
    where = f"token {held['token_id'][worst]}"
    return Difference(run, "predictions", float(apart[worst]), P_TOLERANCE, len(ours), where)


def _differ(held: pl.DataFrame, ours: pl.DataFrame, column: str) -> np.ndarray:
    """bool [row]: where two columns differ, after a cast to the catalog's type."""
    return ~held[column].eq_missing(ours[column].cast(held[column].dtype)).to_numpy()


def _word_ids(job: Ingest, words: pl.Series) -> np.ndarray:
    """The model's ids of words in a table."""
    ids = {word: i for i, word in enumerate(WORDS)}
    numbers = np.array([ids[word] for word in words.cast(pl.String)], np.uint8)
    return job.model.config.vocabulary.encode(numbers)


def _outcomes(store: Store, job: Ingest, words: np.ndarray, rerun: _Rerun, tree_ids: np.ndarray) -> Difference:
    """Compare outcomes; those that differ only by a tie count as equal."""
    run, ours = job.plan.run, rerun.outcomes
    held = _stored(store, "outcomes", run, tree_ids, "tree_id")
    if len(held) != len(ours):
        return Difference(run, "outcomes", 1.0, 0.0, len(ours), f"{len(held)} rows, not {len(ours)}")
    wrong = np.zeros(len(ours), bool)
    for column in ours.columns:
        wrong |= _differ(held, ours, column)
    for i in np.flatnonzero(wrong).tolist():
        wrong[i] = held["tree_id"][i] != ours["tree_id"][i] or not _is_greedy(job, words[i], held.row(i, named=True))
    first = f"tree {ours['tree_id'][int(wrong.argmax())]}"
    return Difference(run, "outcomes", float(wrong.mean()), 0.0, len(ours), first)


def _is_greedy(job: Ingest, words: np.ndarray, held: dict[str, Any]) -> bool:
    """Whether a stored answer is greedy within ties, and the rest of its row follows from it."""
    path, first_step = held["greedy_path"], path_at(job.trees.n_nodes)
    target = words[first_step:]
    depth = int((target != PAD).sum())
    given = words.copy()
    given[first_step:] = PAD
    given[first_step : first_step + len(path)] = arrow_word(np.array(path, np.uint8))
    ids = torch.from_numpy(job.model.config.vocabulary.encode(given[None])).to(job.device)
    p = _probabilities(forward(job.model, ids, [], lambda spec, found: None)[0, first_step - 1 : -1])
    at = np.arange(len(path))
    steps = ids[0, first_step : first_step + len(path)].cpu().numpy()
    is_best = bool((p[at, steps] >= p[at].max(axis=1) - TIE).all())
    differs = np.flatnonzero(given[first_step : first_step + depth] != target[:depth])
    first = int(differs[0]) if len(differs) else None
    follows = (first is None, first is None, first, first is None)
    stored = (held["greedy_right"], held["teacher_forced_right"], held["first_wrong_step"], held["failure"] is None)
    return is_best and len(path) <= depth and stored == follows


def _generations(
    store: Store, job: Ingest, chosen: np.ndarray, first_tree_id: int, step: Callable[[int], None]
) -> list[Difference]:
    """Compare every continuation, greedy and sampled."""
    assert isinstance(job.generator, Generator)
    run, frames = job.plan.run, []
    for done, i in enumerate(chosen.tolist(), start=1):  # one at a time, since draws depend on the tree's own index
        generated = job.generator.go_on(job.trees.between(i, i + 1).words, i)
        frames.append(generation_rows(generated, run, first_tree_id + i))
        step(done)
    ours = pl.concat(frames)
    held = _stored(store, "generations", run, chosen + first_tree_id, "tree_id, sample, position").cast(ours.schema)
    of = ["tree_id", "sample"]
    both = [frame.group_by(of, maintain_order=True).agg("position", "token", "p", "p_best") for frame in (held, ours)]
    joined = both[1].join(both[0], on=of, how="left", suffix="_held", maintain_order="left")
    same = [
        row["position"] == row["position_held"] and row["token"] == row["token_held"]
        for row in joined.iter_rows(named=True)
    ]
    otherwise = 1.0 if len(both[0]) != len(both[1]) else 1 - float(np.mean(same))
    first = f"tree {joined['tree_id'][same.index(False)]}" if not all(same) else ""
    agreeing = joined.filter(pl.Series(same))
    apart = 0.0
    for name in ("p", "p_best"):
        ps, held_ps = (agreeing[of_column].explode().to_numpy() for of_column in (name, f"{name}_held"))
        apart = max(apart, float(np.abs(ps - held_ps).max(initial=0.0)))
    return [
        Difference(run, "generations", otherwise, DRAWN_OTHERWISE, len(joined), first),
        Difference(run, "probabilities", apart, P_TOLERANCE, len(agreeing), "of a continuation"),
    ]
