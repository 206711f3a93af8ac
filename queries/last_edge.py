"""The study `last-edge`: is a model worse where its path runs through the edge that is listed last?

That edge has no separator of its own: the bar stands behind it. A longer path is harder and also likelier to take it,
so paths are compared at equal depth, steps at equal depth and place in the path (Mantel-Haenszel weights), with
intervals bootstrapped over trees. Near 100 % right there are few mistakes to compare, so the probability of the right
step is compared, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput
from actstore.queries import load
from actstore.queries.depth import outcomes
from actstore.queries.panels import GREY, panels, points
from actstore.queries.study import Progress, Study, result_rows
from actstore.statistics import difference, share_over_trees, stratified_difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME, TREES, STEPS = "last-edge", "tree_outcomes", "path_steps"
LEAST = 10  # trees of each kind; with fewer an interval would span most of the scale


def study(store: Store, run: str, seed: int, progress: Progress) -> Study:
    """Compare paths, and steps, that take the last edge with others.

    Args:
        store: an open store.
        run: one that was given whole tasks.
        seed: of the bootstrap.
        progress: called when the paths and when the steps are done.

    Raises:
        NotStored: the run has no answers.
        BadInput: too few trees of either kind.
    """
    trees = outcomes(store, load(TREES).sql, run)
    last = trees["last_on_path"].to_numpy()
    if min(last.sum(), (~last).sum()) < LEAST:
        wanted = -(-LEAST * len(trees) // max(1, int(min(last.sum(), (~last).sum()))))
        raise BadInput(
            f"run {run!r} has {last.sum()} trees whose path takes the last edge, of {len(trees)}; {LEAST} of each kind are "
            f"needed for an interval: ingest about {max(wanted, 4 * LEAST):,} trees (--trees)"
        )
    rows = _paths(trees, last, seed)
    progress(1, 2, "paths")
    rows += _steps(store.sql(load(STEPS).sql, {"run": run}), seed)
    progress(2, 2, "steps")
    query = f"{load(TREES).sql}\n;\n{load(STEPS).sql}"
    results = result_rows(
        rows, study=NAME, run=run, query=query, params={"run": run}, snapshot=store.snapshot, seed=seed
    )
    return Study(NAME, table(results), results, sentence(results))


def _paths(trees: pl.DataFrame, last: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Whole paths left to the model: both kinds, their difference, and that at equal depth."""
    right, depth, ids = trees["greedy"].to_numpy(), trees["depth"].to_numpy(), trees["tree_id"].to_numpy()
    n, n_right = (last.sum(), (~last).sum()), (right[last].sum(), right[~last].sum())
    _, low, high = difference(int(n_right[0]), int(n[0]), int(n_right[1]), int(n[1]))
    rows = [
        _row("path", "last", n_right[0] / n[0], n=n[0]),
        _row("path", "others", n_right[1] / n[1], n=n[1]),
        _row("path", "difference", n_right[0] / n[0] - n_right[1] / n[1], low, high, len(trees)),
    ]
    found = stratified_difference(right, last, depth, ids)
    return [*rows, _row("path", "difference_at_equal_depth", *found, len(trees))]


def _steps(steps: pl.DataFrame, seed: int) -> list[dict[str, Any]]:
    """The step that takes the last edge against others: right, probability; and all of it by place in the list."""
    last, ids = steps["is_last"].to_numpy(), steps["tree_id"].to_numpy()
    strata = steps["depth"].to_numpy().astype(np.int64) * 256 + steps["step"].to_numpy()
    rows = []
    for label, column in (("step", "correct"), ("p_target", "p_target")):
        values = steps[column].to_numpy().astype(np.float64)
        for kind, which in (("last", last), ("others", ~last)):
            rows.append(
                _row(label, kind, values[which].mean(), *share_over_trees(values[which], ids[which], seed), which.sum())
            )
        found = stratified_difference(values, last, strata, ids)
        rows.append(_row(label, "difference_at_equal_depth", *found, len(steps)))
        for place in sorted(steps["edge"].unique().to_list()):
            here = (steps["edge"] == place).to_numpy()
            low, high = share_over_trees(values[here], ids[here], seed)
            rows.append(_row(label, f"place {place}", values[here].mean(), low, high, here.sum()))
    return rows


def _row(
    label: str, metric: str, value: float, low: float | None = None, high: float | None = None, n: int = 0
) -> dict[str, Any]:
    numbers = {"value": value, "low": low, "high": high}
    return {
        "label": label,
        "metric": metric,
        **{name: None if number is None or np.isnan(number) else float(number) for name, number in numbers.items()},
        "n": int(n),
    }


NAMES = {"path": "whole path right", "step": "step right", "p_target": "probability of the right step"}


def table(results: pl.DataFrame) -> pl.DataFrame:
    """One row a measure, percent: last edge, others, the difference at equal depth."""
    rows = []
    for label, name in NAMES.items():
        some = {row["metric"]: row for row in results.filter(label=label).iter_rows(named=True)}
        row: dict[str, Any] = {"measure": name}
        for kind in ("last", "others"):
            row |= {f"{kind} %": round(100 * some[kind]["value"], 3), f"n {kind}": some[kind]["n"]}
        row["at equal depth, points"] = interval(some["difference_at_equal_depth"])
        rows.append(row)
    return pl.DataFrame(rows)


def interval(row: dict[str, Any]) -> str:
    """`-0.12 [-0.40, +0.15]`, percentage points."""
    if row["value"] is None or row["low"] is None:
        return "no depth has both"
    return f"{100 * row['value']:+.3f} [{100 * row['low']:+.3f}, {100 * row['high']:+.3f}]"


def verdict(row: dict[str, Any], what: str) -> str:
    """What an interval of a difference decides."""
    if row["value"] is None:
        return f"{what}: not decidable here, no depth has both kinds"
    if row["low"] == row["high"] == 0:
        return f"{what}: not decidable here, nothing differs among {row['n']:,}"
    if row["high"] < 0:
        return f"{what}: yes, it drops"
    if row["low"] > 0:
        return f"{what}: no, it rises"
    return (
        f"{what}: no drop that can be told from chance, and none of more than {max(0.0, -100 * row['low']):.2f} points"
    )


def sentence(results: pl.DataFrame) -> str:
    """The notebook's question, "what if our path goes through last edge? Will performance drop?", answered."""
    parts = []
    for label, name in NAMES.items():
        found = results.filter(label=label, metric="difference_at_equal_depth").row(0, named=True)
        n = results.filter(label=label, metric="last")["n"].item()
        parts.append(f"{verdict(found, name)} ({interval(found)} points at equal depth, n = {n:,} through it)")
    return f"Does run {results['run'][0]!r} do worse through the edge listed last? {'; '.join(parts)}."


def plot(study: Study) -> Figure:
    """Steps by the place of their edge in the list: share right, and probability of the right step."""
    figure, axes = panels(2)
    for axis, label in zip(axes, ("step", "p_target"), strict=True):
        rows = study.results.filter((pl.col("label") == label) & pl.col("metric").str.starts_with("place"))
        x = [int(metric.split()[1]) for metric in rows["metric"]]
        points(axis, x, rows, NAMES[label])
        axis.axvline(max(x), color=GREY, linestyle="--", linewidth=1)
        axis.set_xlabel("place of the step's edge in the list (dashed: the last)")
        axis.set_ylabel(f"{NAMES[label]} (%)")
    figure.suptitle(f"Does the last edge matter? Run {study.results['run'][0]}; bars are 95 % intervals", fontsize=10)
    return figure
