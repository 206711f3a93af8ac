"""The study `depth`: how accuracy falls with the depth of the goal, step by step, whole path, and left to itself.

Steps and whole paths are teacher-forced: each step is predicted behind the right ones. One row a tree gives Wilson's
interval; the steps of one tree hang together, so theirs is bootstrapped over trees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import NotStored
from actstore.queries import load
from actstore.queries.panels import panels, points
from actstore.queries.study import Progress, Study, result_rows
from actstore.statistics import difference, share_over_trees, wilson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME, QUERY = "depth", "tree_outcomes"
MEASURES = {"step": "steps", "whole_path": "whole path", "greedy": "left to itself"}
ENOUGH = 100  # trees of a depth, before it can be named the worst: a share of fewer is known to no better than 4 points


def study(store: Store, run: str, seed: int, progress: Progress) -> Study:
    """Accuracy of a run by goal depth.

    Args:
        store: an open store.
        run: one that was given whole tasks.
        seed: of the bootstrap.
        progress: called once, at the end.

    Raises:
        NotStored: the run has no answers.
    """
    params = {"run": run}
    query = load(QUERY).sql
    trees = outcomes(store, query, run)
    rows = []
    for depth in (None, *sorted(trees["depth"].unique().to_list())):
        some = trees if depth is None else trees.filter(depth=depth)
        rows += _graded(some, "all" if depth is None else f"depth {depth}", seed)
    results = result_rows(rows, study=NAME, run=run, query=query, params=params, snapshot=store.snapshot, seed=seed)
    progress(1, 1, "depths")
    return Study(NAME, table(results), results, sentence(results))


def outcomes(store: Store, query: str, run: str) -> pl.DataFrame:
    """The rows of `tree_outcomes` of a run.

    Raises:
        NotStored: there are none.
    """
    trees = store.sql(query, {"run": run})
    if not len(trees):
        raise NotStored(
            f"run {run!r} has no answers to whole tasks; ingest one that has: "
            f"`actstore ingest {store.path} --model reproduction`"
        )
    return trees


def _graded(trees: pl.DataFrame, label: str, seed: int) -> list[dict[str, Any]]:
    right, n_steps = trees["steps_right"].to_numpy(), trees["n_steps"].to_numpy()
    steps = np.repeat([True, False], [right.sum(), (n_steps - right).sum()])
    of = np.concatenate([np.repeat(np.arange(len(trees)), right), np.repeat(np.arange(len(trees)), n_steps - right)])
    low, high = share_over_trees(steps, of, seed)
    rows = [{"metric": "step", "value": float(steps.mean()), "low": low, "high": high, "n": len(steps)}]
    for measure in ("whole_path", "greedy"):
        n_right = int(trees[measure].sum())
        low, high = wilson(n_right, len(trees))
        rows.append({"metric": measure, "value": n_right / len(trees), "low": low, "high": high, "n": len(trees)})
    return [{"label": label, **row} for row in rows]


def table(results: pl.DataFrame) -> pl.DataFrame:
    """One row a depth, percent."""
    rows = []
    for (label,), some in results.group_by("label", maintain_order=True):
        row: dict[str, Any] = {"goal": label, "trees": some.filter(metric="greedy")["n"].item()}
        for measure, name in MEASURES.items():
            found = some.filter(metric=measure).row(0, named=True)
            row[f"{name} %"] = round(100 * found["value"], 2)
            row[f"{name} 95 %"] = f"[{100 * found['low']:.2f}, {100 * found['high']:.2f}]"
        rows.append(row)
    return pl.DataFrame(rows)


def sentence(results: pl.DataFrame) -> str:
    """Overall, the worst depth that enough trees have, and whether it is worse than the shallowest such."""
    greedy = results.filter(metric="greedy")
    whole = greedy.row(0, named=True)
    answer = (
        f"Run {whole['run']!r} finds {100 * whole['value']:.2f} % of the paths "
        f"({100 * whole['low']:.2f} to {100 * whole['high']:.2f}, n = {whole['n']:,}) when left to itself"
    )
    common = greedy[1:].filter(pl.col("n") >= ENOUGH)
    if len(common) < 2:
        return f"{answer}; fewer than two depths have {ENOUGH} trees, so nothing is said of a fall with depth."
    worst, first = common.sort("value", maintain_order=True).row(0, named=True), common.row(0, named=True)
    if worst["label"] == first["label"]:
        return f"{answer}; of the depths with {ENOUGH} trees or more none is worse than {first['label']}."
    _, low, high = difference(_right(worst), worst["n"], _right(first), first["n"])
    fall = "which is a fall" if high < 0 else "which is no fall that can be told from chance"
    return (
        f"{answer}; of the depths with {ENOUGH} trees or more, worst at {worst['label']}: {100 * worst['value']:.2f} % "
        f"(n = {worst['n']:,}), {100 * (worst['value'] - first['value']):+.2f} points ({100 * low:+.2f} to {100 * high:+.2f}) "
        f"from {first['label']}, {fall}."
    )


def _right(row: dict[str, Any]) -> int:
    return round(row["value"] * row["n"])


def plot(study: Study) -> Figure:
    """Accuracy by goal depth, the three measures, with 95 % intervals."""
    figure, (axis,) = panels(1, width=8)
    by_depth = study.results.filter(pl.col("label") != "all")
    for turn, (measure, name) in enumerate(MEASURES.items()):
        rows = by_depth.filter(metric=measure)
        x = [int(label.split()[1]) for label in rows["label"]]
        points(axis, x, rows, name, turn)
    axis.set_xlabel("depth of the goal (steps of the path)")
    axis.set_ylabel("right (%)")
    axis.set_title(f"Accuracy by goal depth, run {study.results['run'][0]}; bars are 95 % intervals", fontsize=10)
    axis.legend(frameon=False)
    return figure
