"""The study `depth`: accuracy by the depth of the goal, per step, per whole path, and greedy.

Steps and whole paths are teacher-forced: each step is predicted after the right steps. The steps of
one tree are dependent, so their interval is over trees. The greedy accuracy of each depth is tested
against that of all other depths together (Fisher's exact test).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.advice import ingest_more
from actstore.errors import NotStored
from actstore.intervals import difference, over_trees, share
from actstore.queries import load
from actstore.queries.figures import FEW, below, entitle, heading, panels, percents, points
from actstore.queries.study import Answer, Progress, Test, adjusted, adjustment, p_shown, result_rows, shown, test_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME, QUERY = "depth", "tree_outcomes"
ANSWERING = """
select runs.run from runs as base join runs using (weights_sha256, dataset)
where base.run = $run and coalesce(runs.prompt, 'task') = 'task'
and (runs.run = $run or runs.run not in (select run from interventions))
and coalesce(runs.versions, '') not like '%"answers": "none"%'
order by runs.rowid
"""
MEASURES = {"step": "steps", "whole_path": "whole path", "greedy": "greedy"}


def study(store: Store, run: str, seed: int, progress: Progress) -> Answer:
    """Accuracy of a run by goal depth.

    Args:
        store: an open store.
        run: a run over whole tasks.
        seed: recorded with the results; nothing here is random.
        progress: called once, at the end.

    Raises:
        NotStored: the run has no answers.
    """
    params = {"run": run}
    query = load(QUERY).sql
    trees = outcomes(store, query, run)
    rows = []
    for depth in (None, *sorted(trees["depth"].unique().to_list())):
        of_depth = trees if depth is None else trees.filter(depth=depth)
        rows += _graded(of_depth, "all" if depth is None else f"depth {depth}")
    tests = against_the_others(trees)
    rows += [_less_others(test) for test in tests] + test_rows(tests)
    results = result_rows(rows, study=NAME, run=run, query=query, params=params, snapshot=store.snapshot, seed=seed)
    progress(1, 1, "depths")
    return Answer(NAME, as_frame(results), results, sentence(results, tests), tests)


def outcomes(store: Store, query: str, run: str) -> pl.DataFrame:
    """The rows of `tree_outcomes` of a run.

    Raises:
        NotStored: there are no rows, see `unanswered`.
    """
    trees = store.sql(query, {"run": run})
    if len(trees):
        return trees
    raise unanswered(store, run)


def unanswered(store: Store, run: str) -> NotStored:
    """The error for a run without answers.

    It names a run of the same model and trees with answers, or a command that adds one.
    """
    answering = store.sql(ANSWERING, {"run": run})["run"].to_list()
    if run in answering:
        return NotStored(f"run {run!r} has no answers yet; let the ingest of this run go on")
    if answering:
        return NotStored(
            f"run {run!r} has no answers to whole tasks; name one that has (--run): {', '.join(answering)}"
        )
    command = ingest_more(store, run, f"{run}-tasks", "--sites", "none")
    return NotStored(f"run {run!r} has no answers to whole tasks; {command} adds a run that has, to be named (--run)")


def against_the_others(trees: pl.DataFrame) -> tuple[Test, ...]:
    """Test each depth's greedy accuracy against all others together; none for a single depth."""
    from scipy.stats import fisher_exact

    right, depth = trees["greedy"].to_numpy(), trees["depth"].to_numpy()
    tests = []
    for value in np.unique(depth).tolist():
        mine, others = right[depth == value], right[depth != value]
        if not len(others):
            return ()
        counts = int(mine.sum()), len(mine), int(others.sum()), len(others)
        less, low, high = difference(*counts)
        p = fisher_exact([[counts[0], counts[1] - counts[0]], [counts[2], counts[3] - counts[2]]]).pvalue
        what = f"depth {value} less all others"
        tests.append(Test(f"depth {value}", less, float(p), len(mine), low, high, what))
    return adjusted(tests)


def _less_others(test: Test) -> dict[str, Any]:
    found = {"label": test.label, "metric": "greedy_less_others", "value": test.estimate, "low": test.low}
    return {**found, "high": test.high, "n": test.n}


def _graded(trees: pl.DataFrame, label: str) -> list[dict[str, Any]]:
    right, n_steps = trees["steps_right"].to_numpy(), trees["n_steps"].to_numpy()
    low, high = over_trees(right / n_steps, np.arange(len(trees)), n_steps)
    step = float(right.sum() / n_steps.sum())
    rows = [{"metric": "step", "value": step, "low": low, "high": high, "n": int(n_steps.sum())}]
    for measure in ("whole_path", "greedy"):
        n_right = int(trees[measure].sum())
        low, high = share(n_right, len(trees))
        rows.append({"metric": measure, "value": n_right / len(trees), "low": low, "high": high, "n": len(trees)})
    return [{"label": label, **row} for row in rows]


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """One row per depth, in percent, with the p_holm of its test against the others."""
    rows = []
    for (label,), of_depth in results.group_by("label", maintain_order=True):
        row: dict[str, Any] = {"goal": label, "trees": of_depth.filter(metric="greedy")["n"].item()}
        ends: dict[str, str] = {}
        for measure, name in MEASURES.items():
            found = of_depth.filter(metric=measure).row(0, named=True)
            row[f"{name} %"] = round(100 * found["value"], 2)
            ends[f"{name} 95 %"] = f"[{100 * found['low']:.2f}, {100 * found['high']:.2f}]"
        p = of_depth.filter(metric="p_holm")["value"]
        row["against the others, Holm"] = p_shown(p.item()) if len(p) else ""
        rows.append(row | dict(reversed(ends.items())))
    return pl.DataFrame(rows)


def sentence(results: pl.DataFrame, tests: Sequence[Test]) -> str:
    """The accuracy overall, and the depths that differ from all others."""
    whole = results.filter(metric="greedy").row(0, named=True)
    answer = (
        f"Run {whole['run']!r} finds {100 * whole['value']:.2f} % of the paths "
        f"({100 * whole['low']:.2f} to {100 * whole['high']:.2f}, n = {whole['n']:,}) by greedy decoding"
    )
    if not tests:
        return f"{answer}. All goals have one depth, so the study cannot compare depths."
    lower = _apart("lower", [test for test in tests if test.found and test.estimate < 0], results)
    higher = _apart("higher", [test for test in tests if test.found and test.estimate > 0], results)
    lower = lower or "The accuracy is significantly lower than at all other depths together at no depth."
    return " ".join(filter(None, [f"{answer}.", lower, higher, adjustment(tests)]))


def _apart(way: str, tests: Sequence[Test], results: pl.DataFrame) -> str:
    """The depths that differ from all others in one direction; empty without any."""
    if not tests:
        return ""
    most = max(tests, key=lambda test: abs(test.estimate))
    there = results.filter(label=most.label, metric="greedy")["value"].item()
    return (
        f"The accuracy is significantly {way} than at all other depths together at {_listed(tests)}, most at {most.label}: "
        f"{100 * there:.2f} % (n = {most.n:,}), {shown(most)} points, {p_shown(most.p_holm)}."
    )


def _listed(tests: Sequence[Test]) -> str:
    """`depth 3`, `depths 3, 4 and 5`."""
    names = [test.label.split()[1] for test in tests]
    return f"depth {names[0]}" if len(names) == 1 else f"depths {', '.join(names[:-1])} and {names[-1]}"


def _short(count: int) -> str:
    """`370`, `4.3k`: a dozen of them stand beside each other in a column."""
    return str(count) if count < 1000 else f"{count / 1000:.1f}k"


def plot(answer: Answer) -> Figure:
    """Accuracy by goal depth, a panel per measure; depths of few trees are hollow."""
    by_depth = answer.results.filter(pl.col("label") != "all")
    trees = by_depth.filter(metric="greedy")
    depths, n = [int(label.split()[1]) for label in trees["label"]], trees["n"].to_list()
    figure, axes = panels(len(MEASURES), 1.3, sharex=True)
    under = False
    for turn, (axis, (measure, name)) in enumerate(zip(axes, MEASURES.items(), strict=True)):
        rows = by_depth.filter(metric=measure)
        few = [count < FEW for count in n]
        points(axis, depths, rows, name, turn, few=few, shift=0)
        many = rows.filter(pl.Series(few, dtype=pl.Boolean).not_()) if not all(few) else rows
        low = max(0.0, 100 * float(many["low"].cast(pl.Float64).to_numpy().min()) - 1)
        percents(axis, low)
        under |= below(axis, depths, (100 * rows["value"].cast(pl.Float64).to_numpy()).tolist(), low, turn)
        entitle(axis, name)
    axes[1].set_ylabel("right (%)")
    axes[-1].set_xticks(depths, [f"{depth}\n{_short(count)}" for depth, count in zip(depths, n, strict=True)])
    axes[-1].set_xlabel("goal's depth in steps; below, trees (k: 1,000)")
    said = f"run {answer.results['run'][0]}; bars are 95 % intervals"
    hollow = f"; hollow: fewer than {FEW} trees, whose bars may leave the panel" if any(few) else ""
    heading(figure, "Accuracy by the goal's depth", f"{said}{hollow}{' (number: a point below it)' * under}")
    return figure
