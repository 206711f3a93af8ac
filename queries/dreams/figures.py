"""Table, sentence and figure of the study `dreams`, made from its rows of `results`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from actstore.queries.figures import GREY, entitle, heading, legend, panels, percents, points, whole_numbers
from actstore.queries.study import Answer, Test, adjustment, p_shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST = 20  # leaf goals, from which the study tests their distribution

SHARES = {
    "well_formed": "begins `goal : root`",
    "stopped": "stops at once",
    "first_step": "begins with a step",
    "first_word": "begins with",
    "from_root": "first step is root's child",
    "from_root_elsewhere": "control: other tree's root",
    "to_leaf": "follows edges to a leaf",
    "to_leaf_elsewhere": "control: on another tree",
    "root_right": "names the tree's root",
    "leaf": "goal is a leaf",
    "leaf_if_even": "control: node drawn evenly",
    "not_root": "goal is not the root",
    "way_found": "finds the way to the goal",
    "place 0": "goal's edge listed first",
    "place last": "goal's edge listed last",
}
WALK = "to_leaf"  # the test that steps follow their own tree more often than another
EXPLANATIONS = {
    "depth_p_as_given": "depths as given",
    "depth_p_even_leaves": "depths as even leaves",
    "place_p_as_given": "places as given",
    "place_p_even_leaves": "places as even leaves",
    "place_p_even_list": "places as even in list",
}


def as_frame(results: pl.DataFrame, tests: Sequence[Test]) -> pl.DataFrame:
    """One row per question: percent of n, or the p of an explanation, and p_holm of a test."""
    rows, by_label = [], {test.label: test for test in tests}
    for kind in results["label"].unique(maintain_order=True):
        by_metric = _by_metric(results, kind)
        if not by_metric:
            continue
        for metric, name in (SHARES | {metric: f"{name}: p" for metric, name in EXPLANATIONS.items()}).items():
            row = by_metric.get(metric)
            if row is None or row["value"] is None:
                continue
            name = f"{name} {row['metric'].split()[1]}" if metric == "first_word" else name
            interval = "" if row["low"] is None else f"[{100 * row['low']:.2f}, {100 * row['high']:.2f}]"
            shown = f"{row['value']:.3f}" if metric in EXPLANATIONS else f"{100 * row['value']:.2f} %"
            test = by_label.get(f"{kind}, {metric}")
            rows.append(
                {
                    "kind": kind,
                    "question": name,
                    "answer": shown,
                    "95 %": interval,
                    "n": row["n"],
                    "Holm": p_shown(test.p_holm) if test else "",
                }
            )
    return pl.DataFrame(rows)


def _by_metric(results: pl.DataFrame, kind: str) -> dict[str, dict[str, Any]]:
    """Metric → row of one kind; `first_word` is the commonest word, `place last` the last place."""
    by_metric = {row["metric"]: row for row in results.filter(label=kind).iter_rows(named=True)}
    places = [metric for metric in by_metric if metric.startswith("place ") and metric.count(" ") == 1]
    if places:
        by_metric["place last"] = by_metric[places[-1]]
    if "well_formed" not in by_metric:  # rows of a test
        return {}
    by_metric["first_word"] = next(row for metric, row in by_metric.items() if metric.startswith("first_word "))
    return by_metric


def sentence(results: pl.DataFrame, tests: Sequence[Test], given: str) -> str:
    """Answer: does the model make up goals, does it reach them, and how are they distributed?

    Args:
        given: name of the trees' own goals.
    """
    kinds = {kind: _by_metric(results, kind) for kind in results["label"].unique(maintain_order=True)}
    run, by_label = results["run"][0], {test.label: test for test in tests}
    text = " ".join(_of_kind(run, kind, by_metric, by_label, given) for kind, by_metric in kinds.items() if by_metric)
    return f"{text} {adjustment(tests)}" if tests else text


def _of_kind(run: str, kind: str, by_metric: dict[str, dict[str, Any]], tests: dict[str, Test], given: str) -> str:
    formed, found, word = by_metric["well_formed"], by_metric["way_found"], by_metric["first_word"]
    parts = [
        f"Given a tree alone ({kind}), run {run!r} makes up a well-formed goal in {percent(formed)} of {formed['n']:,} "
        "continuations"
    ]
    if found["value"] is not None:
        parts[0] += f", and then finds the way in {percent(found)} of {found['n']:,}"
    if formed["value"] < word["value"]:
        stops = by_metric["stopped"]["value"] == word["value"]
        begins = "stops at once" if stops else f"begins with `{word['metric'][11:]}`"
        parts += [f"The run {begins} in {percent(word)}", walks(by_metric, tests.get(f"{kind}, {WALK}"))]
    of_kind = {name: tests[f"{kind}, {name}"] for name in EXPLANATIONS if f"{kind}, {name}" in tests}
    parts.append(origin(of_kind, given) if formed["value"] else "")
    return " ".join(f"{part}." for part in parts if part)


def percent(row: dict[str, Any]) -> str:
    """`99.80 % (99.72 to 99.85)`."""
    return f"{100 * row['value']:.2f} % ({100 * row['low']:.2f} to {100 * row['high']:.2f})"


def walks(by_metric: dict[str, dict[str, Any]], test: Test | None) -> str:
    """Whether steps without a goal follow the tree, in words."""
    walk, chance = by_metric["to_leaf"], by_metric["to_leaf_elsewhere"]
    if walk["value"] is None or chance["value"] is None or test is None:
        return ""
    verdict = (
        "more often than" if test.found else "less often than" if test.below else "not significantly more often than"
    )
    return (
        f"If the first step goes to a node with children, the next steps follow edges down to a leaf in {percent(walk)} of "
        f"{walk['n']:,}, {verdict} on another tree ({100 * chance['value']:.2f} %, {p_shown(test.p_holm)})"
    )


def origin(tests: dict[str, Test], given: str) -> str:
    """The explanations that the depths of the goals do not contradict, in words."""
    if not tests:
        return f"Fewer than {LEAST} of these goals are leaves, so the study does not ask where goals come from"
    as_given, even = tests["depth_p_as_given"], tests["depth_p_even_leaves"]
    verdicts = {
        (True, True): f"contradict neither {given} nor leaves drawn evenly",
        (True, False): f"fit {given}, and contradict leaves drawn evenly",
        (False, True): f"fit leaves drawn evenly, and contradict {given}",
        (False, False): f"contradict both {given} and leaves drawn evenly",
    }
    return (
        f"The depths of the {as_given.n:,} leaf goals {verdicts[not as_given.found, not even.found]} (total variation "
        f"{as_given.estimate:.3f} from the given goals, {p_shown(as_given.p_holm)}; {even.estimate:.3f} from even leaves, "
        f"{p_shown(even.p_holm)})"
    )


BARS = {
    "well_formed": "begins\n`goal : root`",
    "stopped": "stops\nat once",
    "first_step": "begins with\na step",
    "to_leaf": "walks down\nto a leaf",
    "to_leaf_elsewhere": "control:\nother tree",
}


def plot(answer: Answer) -> Figure:
    """Draw the beginnings of continuations; with goals, also depths, places and explanations."""
    results = answer.results
    drawn = [kind for kind in ("depth", "place") if results["metric"].str.starts_with(f"{kind} ").any()]
    figure, axes = panels(1 + len(drawn), 1.9)
    kinds = results.filter(metric="well_formed")["label"].to_list()
    for turn, kind in enumerate(kinds):
        by_metric = _by_metric(results, kind)
        there = [(x, by_metric[metric]) for x, metric in enumerate(BARS) if by_metric[metric]["value"] is not None]
        points(axes[0], [x for x, _ in there], pl.DataFrame([row for _, row in there]), kind, turn, line=False)
    axes[0].set_xticks(range(len(BARS)), list(BARS.values()), fontsize=6.5)
    axes[0].set_title("share of the continuations", loc="left")
    for axis, what in zip(axes[1:], drawn, strict=True):
        _goals(axis, results, what)
    percents(axes[0])
    for axis in axes:
        axis.set_ylabel("%")
    legend(figure, *axes)
    n = ", ".join(f"{row['n']:,} {row['label']}" for row in results.filter(metric="well_formed").iter_rows(named=True))
    heading(
        figure,
        "Given the tree alone: what does the model continue with?",
        f"run {results['run'][0]}; continuations: {n}; bars are 95 % intervals",
    )
    return figure


def _goals(axis: Axes, results: pl.DataFrame, what: str) -> None:
    """Draw the made-up goals' depths or places, and the expectations of the explanations."""
    for turn, kind in enumerate(results.filter(metric="well_formed")["label"]):
        rows = results.filter((pl.col("label") == kind) & pl.col("metric").str.contains(f"^{what} \\d+$"))
        if not len(rows):  # too few of this kind
            continue
        points(axis, [int(metric.split()[1]) for metric in rows["metric"]], rows, f"made up, {kind}", turn)
    first = results.filter(pl.col("metric").str.starts_with(f"{what} "))["label"][0]
    expected = {"as_given": ("--", "given goals"), "even_leaves": (":", "leaves drawn evenly")}
    for name, (style, shown) in expected.items():
        rows = results.filter((pl.col("label") == first) & pl.col("metric").str.contains(f"^{what} \\d+ {name}$"))
        x = [int(metric.split()[1]) for metric in rows["metric"]]
        axis.plot(x, 100 * rows["value"].to_numpy(), style, color=GREY, label=shown)
    whole_numbers(axis)
    axis.set_xlabel("depth of the goal (steps)" if what == "depth" else "place in the list of the edge to the goal")
    entitle(axis, "share of the made-up goals")
