"""The study `swap`: the same tree with its edges in another order, and the effect on the answer.

There are three kinds of pairs (see ingest/trees/variants.py). An edge of the path moves to the last
place of the list; the path's last edge moves inward; and, as the control, an edge of the path
trades places with another and the last edge stays. The first two kinds together hold every tree
twice, with its path through the last edge and not: the answer rests on these pairs. The first kind
less the control, on the same trees, is the effect of the last place beyond that of a move. Both
effects are tested, on the answer and on the probability: answers by McNemar's exact test, other
values by sign flips, since a few trees may carry the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.advice import ingest_more
from actstore.errors import NotStored
from actstore.intervals import change_over_trees, paired, sign_flip
from actstore.queries.depth import unanswered
from actstore.queries.figures import FEW, GREY, entitle, heading, legend, most, panels, points
from actstore.queries.last_edge import direction, interval
from actstore.queries.study import Answer, Progress, Test, adjusted, adjustment, p_shown, result_rows, shown, test_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME = "swap"
KINDS = {
    "through": "last, less elsewhere",
    "to_last": "moved to the end",
    "from_last": "moved inward",
    "inner": "control: elsewhere",
}
CHANGES = ("swap_last", "swap_inner")
LEAST_DRAWN = 100  # pairs of a depth; with fewer, an interval would dwarf all others in the figure
COMPANIONS = """
select change, varied.run as run
from runs as base
join datasets on datasets.variant_of = base.dataset
join runs as varied on varied.dataset = datasets.dataset and varied.weights_sha256 = base.weights_sha256
where base.run = $run and coalesce(varied.prompt, 'task') = 'task'
and varied.run not in (select run from interventions)
and coalesce(varied.versions, '') not like '%"answers": "none"%'
order by varied.rowid
"""
DRAWN = """
select run from runs
where dataset = $dataset and coalesce(prompt, 'task') = 'task' and run not in (select run from interventions)
and weights_sha256 = (select weights_sha256 from runs where run = $run)
order by runs.rowid
"""
PAIRS = """
-- one row per pair: the base run on a tree, and the same model on the tree's variant
with pairs as (
    select
        tree_id,
        variant_of,
        depth,
        regexp_extract(change, 'edge (\\d+) <-> edge (\\d+)', 1)::int as moved_from,
        regexp_extract(change, 'edge (\\d+) <-> edge (\\d+)', 2)::int as moved_to
    from trees
    where variant_of is not null and change is not null and dataset = (from runs select dataset where run = $variant)
)
select
    pairs.variant_of as tree_id,
    pairs.depth,
    moved_from,
    moved_to,
    edges.step,
    edges.is_last as was_last,
    before.greedy_right as right_before,
    after.greedy_right as right_after,
    step_before.p_target as p_before,
    step_after.p_target as p_after
from pairs
join edges on edges.tree_id = pairs.variant_of and edges.edge = moved_from
join outcomes as before on before.run = $run and before.tree_id = pairs.variant_of
join outcomes as after on after.run = $variant and after.tree_id = pairs.tree_id
join predictions as step_before
    on step_before.run = $run and step_before.tree_id = pairs.variant_of and step_before.step = edges.step
join predictions as step_after
    on step_after.run = $variant and step_after.tree_id = pairs.tree_id and step_after.step = edges.step
order by pairs.variant_of
"""


def study(store: Store, run: str, seed: int, progress: Progress) -> Answer:
    """Compare a run's answers with the answers to its trees' variants.

    Args:
        store: an open store.
        run: a run over drawn trees; the hash of its weights finds the runs over both variants.
        seed: seed of the sign flips.
        progress: called after the pairs of a variant are read.

    Raises:
        NotStored: a variant is missing; gives the ingest command that adds it.
    """
    found = companions(store, run)
    pairs = {}
    for done, change in enumerate(CHANGES, start=1):
        pairs[change] = store.sql(PAIRS, {"run": run, "variant": found[change]})
        progress(done, len(CHANGES), change)
    if not any(len(frame) for frame in pairs.values()):
        if not len(store.sql("select tree_id from outcomes where run = $run limit 1", {"run": run})):
            raise unanswered(store, run)
        raise NotStored(
            f"no tree of run {run!r} has a variant that was answered; let the ingest of the variants go on, or ingest more trees"
        )
    last = pairs["swap_last"]
    kinds = {
        "through": through_less_not(last),
        "to_last": last.filter(~pl.col("was_last")),
        "from_last": last.filter("was_last"),
        "inner": pairs["swap_inner"],
    }
    rows = [row for kind, frame in kinds.items() for row in _changes(kind, frame)]
    rows += _tally(kinds["through"])
    more, of_more = _beyond_the_control(kinds["to_last"], kinds["inner"], seed)
    tests = adjusted([*_through(kinds["through"], rows, seed), *of_more])
    rows += more + test_rows(tests)
    params = {"run": run, "variants": found}
    results = result_rows(rows, study=NAME, run=run, query=PAIRS, params=params, snapshot=store.snapshot, seed=seed)
    return Answer(NAME, as_frame(results), results, sentence(results, tests), tests)


def companions(store: Store, run: str) -> dict[str, str]:
    """The run over each variant, by change.

    Raises:
        NotStored: a run is missing.
    """
    found = {row["change"]: row["run"] for row in store.sql(COMPANIONS, {"run": run}).reverse().iter_rows(named=True)}
    about = store.sql(
        "select coalesce(variant_of, '') as variant_of from runs join datasets using (dataset) where run = $run",
        {"run": run},
    ).row(0, named=True)
    if about["variant_of"]:
        drawn = store.sql(DRAWN, {"run": run, "dataset": about["variant_of"]})["run"].to_list()
        raise NotStored(
            f"run {run!r} is over variants; name the run of the same model over the drawn trees {about['variant_of']!r} "
            f"(--run): {', '.join(drawn) or 'there is none yet'}"
        )
    if lacking := [change for change in CHANGES if change not in found]:
        commands = " and ".join(
            ingest_more(store, run, f"{run}-{change}", "--variant", change, "--sites", "none") for change in lacking
        )
        raise NotStored(
            f"no run of the model of {run!r} over the variants {', '.join(lacking)} of its trees; {commands} store these runs"
        )
    return found


def through_less_not(pairs: pl.DataFrame) -> pl.DataFrame:
    """swap_last pairs, relabelled: before = path avoids the last edge, after = path takes it."""
    turned = [
        pl.when("was_last").then(f"{what}_{other}").otherwise(f"{what}_{which}").alias(f"{what}_{which}")
        for what in ("right", "p")
        for which, other in (("before", "after"), ("after", "before"))
    ]
    return pairs.with_columns(turned)


def _tally(pairs: pl.DataFrame) -> list[dict[str, Any]]:
    """Counts of trees that are right one way only, and McNemar's exact p."""
    from scipy.stats import binomtest

    if not len(pairs):
        return []
    lost = int((pairs["right_before"] & ~pairs["right_after"]).sum())
    won = int((~pairs["right_before"] & pairs["right_after"]).sum())
    p = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    found = {"right_only_without": lost, "right_only_through": won, "mcnemar_p": p}
    return [{"label": "through", "metric": metric, "value": value, "n": len(pairs)} for metric, value in found.items()]


def _changes(kind: str, pairs: pl.DataFrame) -> list[dict[str, Any]]:
    """Before, after and change of one kind of pairs, over all pairs and by depth."""
    rows = []
    for depth in (None, *sorted(pairs["depth"].unique().to_list())):
        chosen = pairs if depth is None else pairs.filter(depth=depth)
        if not len(chosen):
            continue
        before, after = chosen["right_before"].to_numpy(), chosen["right_after"].to_numpy()
        label, n = kind if depth is None else f"{kind}, depth {depth}", len(chosen)
        change, low, high = paired(before, after)
        p_before, p_after = _p(chosen)
        rows += [
            {"label": label, "metric": "right_before", "value": float(before.mean()), "n": n},
            {"label": label, "metric": "right_after", "value": float(after.mean()), "n": n},
            {"label": label, "metric": "change", "value": change, "low": low, "high": high, "n": n},
            {"label": label, "metric": "p_before", "value": float(p_before.mean()), "n": n},
            {"label": label, "metric": "p_change", **_mean(p_after - p_before), "n": n},
        ]
    return rows


def _p(pairs: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """float64 [n]: the probability of the moved edge's step, before and after."""
    return pairs["p_before"].to_numpy().astype(np.float64), pairs["p_after"].to_numpy().astype(np.float64)


def _mean(changes: np.ndarray, most: float = 1.0) -> dict[str, float]:
    """The mean of the trees' changes, and its interval."""
    low, high = change_over_trees(changes, np.arange(len(changes)), most)
    return {"value": float(changes.mean()), "low": low, "high": high}


def _through(pairs: pl.DataFrame, rows: list[dict[str, Any]], seed: int) -> list[Test]:
    """Test the last edge's effect on the answers and on the probability of its step."""
    if not len(pairs):
        return []
    found = {row["metric"]: row for row in rows if row["label"] == "through"}
    before, after = _p(pairs)
    p = found["mcnemar_p"]["value"], sign_flip(after - before, seed)
    return [
        Test.of(found["change"], p[0], "right whole paths through the last edge, less elsewhere"),
        Test.of(
            found["p_change"] | {"label": "through, p"},
            p[1],
            "the step's probability through the last edge, less elsewhere",
        ),
    ]


def _beyond_the_control(
    to_last: pl.DataFrame, inner: pl.DataFrame, seed: int
) -> tuple[list[dict[str, Any]], list[Test]]:
    """The effect of a move to the end less that of another move, on trees with both variants."""
    both = to_last.join(inner, on="tree_id", suffix="_inner")
    rows: list[dict[str, Any]] = []
    tests: list[Test] = []
    for column, prefix, of in (("right", "", ""), ("p", "p_", " (the step's probability)")) if len(both) else ():
        change, control = (
            both[f"{column}_after{which}"].cast(pl.Float64) - both[f"{column}_before{which}"].cast(pl.Float64)
            for which in ("", "_inner")
        )
        beyond = (change - control).to_numpy()
        row = {"label": "to_last", "metric": f"{prefix}change_beyond_control", **_mean(beyond, most=2.0)}
        rows.append({**row, "n": len(both)})
        label = f"to_last beyond control{', p' if prefix else ''}"
        what = f"change by a move to the end, less that by a move elsewhere{of}"
        tests.append(Test.of(rows[-1] | {"label": label}, sign_flip(beyond, seed), what))
    return rows, tests


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """One row per kind of pairs, in percent and percentage points."""
    rows = []
    for kind, name in KINDS.items():
        by_metric = {row["metric"]: row for row in results.filter(label=kind).iter_rows(named=True)}
        if by_metric:
            rows.append(
                {
                    "pairs": name,
                    "n": by_metric["change"]["n"],
                    "change, points": interval(by_metric["change"]),
                    "Holm": p_shown(by_metric["p_holm"]["value"]) if "p_holm" in by_metric else "",
                    "right before %": round(100 * by_metric["right_before"]["value"], 2),
                    "right after %": round(100 * by_metric["right_after"]["value"], 2),
                    "change of p, points": interval(by_metric["p_change"]),
                    "of p, Holm": _holm(results, f"{kind}, p"),
                }
            )
    return pl.DataFrame(rows)


def _holm(results: pl.DataFrame, label: str) -> str:
    """The adjusted p of a test; empty without such a test."""
    found = results.filter(label=label, metric="p_holm")["value"]
    return p_shown(found.item()) if len(found) else ""


def sentence(results: pl.DataFrame, tests: Sequence[Test]) -> str:
    """Answer: does performance drop where the path takes the last edge?"""
    run = results["run"][0]
    found = {kind: {row["metric"]: row for row in results.filter(label=kind).iter_rows(named=True)} for kind in KINDS}
    both, by_label = found["through"], {test.label: test for test in tests}
    if "change" not in both:
        return f"No path of run {run!r} could be led through the last edge or off the last edge, so the study decides nothing."
    drop, of_p = by_label["through"], by_label["through, p"]
    moves = {"to_last": "moved to the end", "from_last": "moved inward", "inner": "moved elsewhere (the control)"}
    apart = [
        f"{interval(found[kind]['change'])} if an edge of the path is {name} (n = {found[kind]['change']['n']:,})"
        for kind, name in moves.items()
        if found[kind]
    ]
    text = (
        f"Run {run!r} answers the same trees with the path through the edge listed last and with the path elsewhere. Through "
        f"the last edge, the share of right whole paths {direction(drop)}: {shown(drop)} points (n = {drop.n:,} pairs; "
        f"{both['right_only_without']['value']:.0f} right only without the last edge, "
        f"{both['right_only_through']['value']:.0f} only through the last edge, {p_shown(drop.p_holm)}). By kind of move, the "
        f"change in points is {', '.join(apart)}. The probability of the step that takes the moved edge {direction(of_p)}: "
        f"{shown(of_p)} points ({p_shown(of_p.p_holm)})."
    )
    if more := by_label.get("to_last beyond control, p"):
        text += (
            f" The change of this probability by a move to the end, less the change by a move elsewhere on the same "
            f"{more.n:,} trees, is {shown(more)} points ({p_shown(more.p_holm)})."
        )
    return f"{text} {adjustment(tests)}"


def plot(answer: Answer) -> Figure:
    """Draw the change of accuracy and of the moved edge's step probability, by depth and kind."""
    figure, axes = panels(2, 1.9, sharex=True)
    names = {"change": "accuracy, whole path", "p_change": "probability of the moved edge's step"}
    depths: set[int] = set()
    by_depth = answer.results.filter(pl.col("label").str.contains(", depth ") & pl.col("metric").is_in(list(names)))
    least = next((n for n in (LEAST_DRAWN, FEW) if n <= most(by_depth["n"])), 1)
    for axis, (metric, name) in zip(axes, names.items(), strict=True):
        for turn, (kind, kind_name) in enumerate(KINDS.items()):
            rows = by_depth.filter(pl.col("label").str.starts_with(f"{kind}, ") & (pl.col("n") >= least), metric=metric)
            if not len(rows):
                continue
            x = [int(label.split()[-1]) for label in rows["label"]]
            points(axis, x, rows, kind_name, turn, line=False)
            depths.update(x)
        axis.axhline(0, color=GREY, linewidth=1)
        entitle(axis, f"change of the {name}")
        axis.set_ylabel("points")
    axes[-1].set_xticks(sorted(depths))
    axes[-1].set_xlabel("depth of the goal (steps)")
    legend(figure, *axes)
    pairs = most(answer.results.filter(pl.col("label").is_in(list(KINDS)) & (pl.col("metric") == "change"))["n"])
    n = f"up to {pairs:,} pairs; " if pairs else ""
    heading(
        figure,
        "The same trees, two edges swapped",
        f"run {answer.results['run'][0]}; {n}bars are 95 % intervals; depths of {least:,} pairs and more",
    )
    return figure
