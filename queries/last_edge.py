"""The study `last-edge`: is a model worse where its path takes the edge that is listed last?

The last edge has no separator: a bar follows it. A longer path is harder and also likelier to take
the last edge. Paths are therefore compared at equal depth, and steps at equal depth and place in
the path (Mantel-Haenszel weights), with intervals over trees. Each of the three differences is
tested by shuffling, among the trees of one depth, which path and which step takes the last edge. A
model near 100 % makes few mistakes, so the probability of the right step is compared, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput
from actstore.intervals import difference, over_trees, share, shuffled_within, stratified_difference
from actstore.queries import load
from actstore.queries.depth import outcomes
from actstore.queries.figures import GREY, entitle, heading, panels, percents, points, whole_numbers
from actstore.queries.study import Answer, Progress, Test, adjusted, adjustment, p_shown, result_rows, shown, test_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME, TREES, STEPS = "last-edge", "tree_outcomes", "path_steps"
MAX_STEPS = 256  # more than a path has
LEAST = 10  # trees of each kind; with fewer, an interval would span most of the scale


def study(store: Store, run: str, seed: int, progress: Progress) -> Answer:
    """Compare paths and steps that take the last edge with others.

    Args:
        store: an open store.
        run: a run over whole tasks.
        seed: seed of the shuffles.
        progress: called after the paths and after the steps.

    Raises:
        NotStored: the run has no answers.
        BadInput: there are too few trees of one kind.
    """
    trees = outcomes(store, load(TREES).sql, run)
    last = trees["last_on_path"].to_numpy()
    if min(last.sum(), (~last).sum()) < LEAST:
        wanted = -(-LEAST * len(trees) // max(1, int(min(last.sum(), (~last).sum()))))
        raise BadInput(
            f"run {run!r} has {last.sum()} trees whose path takes the last edge, of {len(trees)}; {LEAST} of each kind are "
            f"needed for an interval: ingest about {max(wanted, 4 * LEAST):,} trees (--trees)"
        )
    rows, path = _paths(trees, last, seed)
    progress(1, 2, "paths")
    of_steps, steps = _steps(store.sql(load(STEPS).sql, {"run": run}), seed)
    progress(2, 2, "steps")
    tests = adjusted([*path, *steps])
    rows += of_steps + test_rows(tests)
    query = f"{load(TREES).sql}\n;\n{load(STEPS).sql}"
    results = result_rows(
        rows, study=NAME, run=run, query=query, params={"run": run}, snapshot=store.snapshot, seed=seed
    )
    return Answer(NAME, as_frame(results), results, sentence(results, tests), tests)


def _paths(trees: pl.DataFrame, last: np.ndarray, seed: int) -> tuple[list[dict[str, Any]], list[Test]]:
    """Greedy accuracy of both kinds of paths, and their difference, also at equal depth."""
    right, depth, ids = trees["greedy"].to_numpy(), trees["depth"].to_numpy(), trees["tree_id"].to_numpy()
    n, n_right = (int(last.sum()), int((~last).sum())), (int(right[last].sum()), int(right[~last].sum()))
    rows = [
        _row("path", kind, right_of / of, *share(right_of, of), of)
        for kind, right_of, of in zip(("last", "others"), n_right, n, strict=True)
    ]
    rows.append(_row("path", "difference", *difference(n_right[0], n[0], n_right[1], n[1]), len(trees)))
    row, tests = _at_equal_depth("path", right, last, depth, ids, seed)
    return [*rows, row], tests


def _at_equal_depth(
    label: str, values: np.ndarray, last: np.ndarray, strata: np.ndarray, ids: np.ndarray, seed: int
) -> tuple[dict[str, Any], list[Test]]:
    """The difference within strata, and its test; no test if no stratum has both kinds."""
    found = stratified_difference(values, last, strata, ids)
    row, tests = _row(label, "difference_at_equal_depth", *found, len(values)), []
    if row["value"] is not None:
        p = shuffled_within(values, last, strata, ids, seed)
        tests.append(Test.of(row, p, NAMES[label]))
    return row, tests


def _steps(steps: pl.DataFrame, seed: int) -> tuple[list[dict[str, Any]], list[Test]]:
    """Accuracy and probability of steps through the last edge and others; both also per place."""
    last, ids = steps["is_last"].to_numpy(), steps["tree_id"].to_numpy()
    strata = steps["depth"].to_numpy().astype(np.int64) * MAX_STEPS + steps["step"].to_numpy()
    rows, tests = [], []
    for label, column in (("step", "correct"), ("p_target", "p_target")):
        values = steps[column].to_numpy().astype(np.float64)
        for kind, which in (("last", last), ("others", ~last)):
            rows.append(_row(label, kind, values[which].mean(), *over_trees(values[which], ids[which]), which.sum()))
        row, found = _at_equal_depth(label, values, last, strata, ids, seed)
        rows.append(row)
        tests += found
        for place in sorted(steps["edge"].unique().to_list()):
            here = (steps["edge"] == place).to_numpy()
            rows.append(
                _row(label, f"place {place}", values[here].mean(), *over_trees(values[here], ids[here]), here.sum())
            )
    return rows, tests


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


NAMES = {
    "path": "share of right whole paths",
    "step": "share of right steps",
    "p_target": "probability of the right step",
}
ROWS = {"path": "whole paths", "step": "steps", "p_target": "p of the step"}  # names in the table


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """One row per measure, in percent: last edge, others, difference at equal depth, and p_holm."""
    rows = []
    for label, name in ROWS.items():
        by_metric = {row["metric"]: row for row in results.filter(label=label).iter_rows(named=True)}
        row: dict[str, Any] = {"measure": name}
        row |= {f"{kind} %": round(100 * by_metric[kind]["value"], 3) for kind in ("last", "others")}
        row["at equal depth, points"] = interval(by_metric["difference_at_equal_depth"])
        row["Holm"] = p_shown(by_metric["p_holm"]["value"]) if "p_holm" in by_metric else ""
        row |= {f"n {kind}": by_metric[kind]["n"] for kind in ("last", "others")}
        rows.append(row)
    return pl.DataFrame(rows)


def interval(row: dict[str, Any]) -> str:
    """`-0.12 [-0.40, +0.15]`, percentage points."""
    if row["value"] is None or row["low"] is None:
        return "no depth has both"
    return f"{100 * row['value']:+.3f} [{100 * row['low']:+.3f}, {100 * row['high']:+.3f}]"


def direction(test: Test) -> str:
    """The direction of a change in words, or how large a drop the interval leaves possible."""
    if test.found:
        return "drops" if test.estimate < 0 else "rises"
    largest = (
        test.low is not None
        and test.low < 0
        and f" (its interval leaves out a drop of more than {-100 * test.low:.2f} points)"
    )
    return f"does not change significantly{largest or ''}"


def sentence(results: pl.DataFrame, tests: Sequence[Test]) -> str:
    """Answer the notebook's "what if our path goes through last edge? Will performance drop?"."""
    by_label, parts = {test.label: test for test in tests}, []
    for label, name in NAMES.items():
        n = results.filter(label=label, metric="last")["n"].item()
        if test := by_label.get(label):
            parts.append(
                f"The {name} {direction(test)}: {shown(test)} points, n = {n:,} through the last edge, {p_shown(test.p_holm)}."
            )
        else:
            parts.append(f"The {name} cannot be compared, because no depth has both kinds of paths.")
    asked = (
        f"Paths of run {results['run'][0]!r} through the edge listed last are compared with other paths of equal depth."
    )
    return " ".join([asked, *parts, *([adjustment(tests)] if tests else [])])


def plot(answer: Answer) -> Figure:
    """Draw, by place of the step's edge, the share right and the probability of the right step."""
    figure, axes = panels(2, 1.7, sharex=True)
    for axis, label in zip(axes, ("step", "p_target"), strict=True):
        rows = answer.results.filter((pl.col("label") == label) & pl.col("metric").str.starts_with("place"))
        x = [int(metric.split()[1]) for metric in rows["metric"]]
        points(axis, x, rows, NAMES[label])
        axis.axvline(max(x), color=GREY, linestyle="--", linewidth=1)
        percents(axis, None)
        entitle(axis, NAMES[label])
        axis.set_ylabel("%")
    whole_numbers(axes[-1])
    axes[-1].set_xlabel("place of the step's edge in the list (dashed: the last)")
    n = answer.results.filter((pl.col("label") == "step") & pl.col("metric").str.starts_with("place"))["n"].sum()
    heading(
        figure,
        "Does the last edge matter?",
        f"run {answer.results['run'][0]}; {n:,} steps; bars are 95 % intervals",
    )
    return figure
