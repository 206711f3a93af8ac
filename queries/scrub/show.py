"""Table, sentence and figure of the study `scrub`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from actstore.queries.figures import GREY, entitle, heading, legend, panels, points, whole_numbers
from actstore.queries.scrub.donors import CONTRASTS, ELSEWHERE, ITSELF, MATCHED
from actstore.queries.scrub.sums import HYPOTHESES
from actstore.queries.study import Answer, Test, adjustment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH = (
    0.9  # share of the loss from which a hypothesis is said to leave a layer's output as good; the paper's H3 has 0.91
)
MEANS = {
    MATCHED: "donors with the clean tree's node at the layer's distance from the goal",
    CONTRASTS[0]: "donors with another node there",
    ELSEWHERE: "donors with another node there that agree at another distance",
    CONTRASTS[1]: "the same donors, shuffled among the clean trees",
    ITSELF: "the tree itself",
}


def shares(results: pl.DataFrame) -> pl.DataFrame:
    """One row per cell and kind of donor, with the cell's hypothesis, layer and path length."""
    parts = pl.col("label").str.split(", length ")
    return (
        results.filter(pl.col("metric").str.starts_with("recovered, "))
        .select(
            parts.list.get(0).alias("hypothesis"),
            pl.col("site").str.split(".").list.get(1).cast(pl.Int64).alias("layer"),
            parts.list.get(1).cast(pl.Int64).alias("length"),
            pl.col("metric").str.split(", ").list.get(1).alias("kind"),
            *("value", "low", "high", "n"),
        )
        .sort("hypothesis", "layer", "length", maintain_order=True)
    )


def contrast_of(found: pl.DataFrame) -> str:
    """The kind of donor that matched ones are compared with."""
    return next(kind for kind in CONTRASTS if kind in found["kind"].unique())


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """One row per hypothesis and path length: % recovered by matched donors (by the contrast)."""
    found = shares(results)
    contrast = contrast_of(found)
    rows = []
    for (hypothesis, length), cell in found.group_by("hypothesis", "length", maintain_order=True):
        row: dict[str, Any] = {"": hypothesis, "length": length, "n": cell.filter(kind=MATCHED)["n"].max()}
        for (layer,), of_layer in cell.group_by("layer", maintain_order=True):
            value = dict(zip(of_layer["kind"], of_layer["value"], strict=True))
            row[f"layer {layer}"] = f"{_percent(value[MATCHED])} ({_percent(value[contrast])})"
        rows.append(row)
    return pl.DataFrame(rows).sort("", "length")


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.0f}"


def sentence(results: pl.DataFrame, tests: Sequence[Test], n: int, n_wrong: int) -> str:
    """Where a hypothesis leaves a layer as good as it was, and where its control does, too."""
    found = shares(results)
    contrast, matched = contrast_of(found), found.filter(kind=MATCHED)
    itself = found.filter(kind=ITSELF)["value"].drop_nulls()
    counts = matched["n"]
    text = (
        f"Run {results['run'][0]!r}, scrubbed at the root token, one layer at a time, on {_range(counts, '{:,}')} clean trees of "
        "each path length. Recovered is the share of the loss: 100 % is the run's own answer, 0 % an even guess. The tree itself "
        f"as donor gives {_range(100 * itself, '{:.2f}')} %."
    )
    if n_wrong:
        text += f" {n_wrong:,} clean trees whose first step is wrong are left out."
    if short := int((counts < n).sum()):
        text += f" {short:,} of {len(counts):,} cells have fewer than {n:,} trees with a matched donor."
    for hypothesis in found["hypothesis"].unique(maintain_order=True):
        meaning = HYPOTHESES[hypothesis]
        text += f"\n{_of_hypothesis(found.filter(hypothesis=hypothesis), contrast, tests, hypothesis, meaning)}"
    return f"{text}\n{adjustment(tests)}"


def _range(values: pl.Series, shown: str) -> str:
    """`150 to 200`, or the one value that all are."""
    return " to ".join(dict.fromkeys(shown.format(end) for end in (values.min(), values.max())))


def _of_hypothesis(found: pl.DataFrame, contrast: str, tests: Sequence[Test], hypothesis: str, meaning: str) -> str:
    layers, lengths = sorted(found["layer"].unique()), sorted(found["length"].unique())

    def where(kind: str) -> str:
        good = found.filter(pl.col("value") >= ENOUGH, kind=kind)
        return _by_layer({layer: good.filter(layer=layer)["length"].to_list() for layer in layers}, lengths)

    beyond: dict[int, list[int]] = {layer: [] for layer in layers}
    for test in tests:
        if test.found and test.label.startswith(f"{hypothesis},") and test.site:
            beyond[int(test.site.split(".")[1])].append(int(test.label.split()[-1]))
    least = found.filter(kind=MATCHED).sort("value", nulls_last=True).row(0, named=True)
    ends = f"{100 * least['value']:.0f} % ({100 * least['low']:.0f} to {100 * least['high']:.0f})"
    return (
        f"{hypothesis} ({meaning}): matched donors recover {100 * ENOUGH:.0f} % and more {where(MATCHED)}; {contrast} donors "
        f"{where(contrast)}. Matched donors recover significantly more than {contrast} ones {_by_layer(beyond, lengths)}. The "
        f"least that matched donors recover is {ends}, at layer {least['layer']} and length {least['length']}."
    )


def _by_layer(lengths_of: dict[int, list[int]], every: Sequence[int]) -> str:
    """`at layers 0 and 1 at every length, at layer 3 at lengths 1 to 5`; `nowhere`."""
    alike: dict[str, list[int]] = {}
    for layer, lengths in lengths_of.items():
        if lengths:
            alike.setdefault("every length" if lengths == list(every) else _listed("length", lengths), []).append(layer)
    return ", ".join(f"at {_listed('layer', layers)} at {words}" for words, layers in alike.items()) or "nowhere"


def _listed(what: str, numbers: Sequence[int]) -> str:
    """`length 3`, `lengths 1 to 5 and 8`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [word for run in runs for word in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    joined = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{what}{'s' * (len(numbers) > 1)} {joined}"


def plot(answer: Answer) -> Figure:
    """Recovered against path length: a panel per layer, a line per hypothesis, controls in grey."""
    found = shares(answer.results)
    contrast, layers = contrast_of(found), sorted(found["layer"].unique())
    figure, axes = panels(len(layers), 1.2, sharex=True)
    for axis, layer in zip(axes, layers, strict=True):
        for level in (0, 100):
            axis.axhline(level, color=GREY, linewidth=0.5)
        for turn, hypothesis in enumerate(found["hypothesis"].unique(maintain_order=True)):
            of_line = found.filter(layer=layer, hypothesis=hypothesis).drop_nulls("value")
            control = of_line.filter(kind=contrast)
            style = ("-", "--", ":")[turn]
            name = f"{hypothesis}, {contrast} donors"
            axis.plot(control["length"], 100 * control["value"], style, color=GREY, linewidth=1, label=name)
            matched = of_line.filter(kind=MATCHED)
            points(
                axis,
                matched["length"].to_list(),
                matched,
                f"{hypothesis}, matched donors",
                turn,
                shift=0.22 * (turn - 1),
            )
        entitle(axis, f"layer {layer}")
    whole_numbers(axes[-1])
    axes[-1].set_xlabel("path length (steps)")
    figure.supylabel("recovered (%)", fontsize=8)
    legend(figure, axes[0])
    n = found.filter(kind=MATCHED)["n"]
    heading(
        figure,
        "Loss recovered at the root token, with donors' attention",
        f"run {answer.results['run'][0]}; {_range(n, '{:,}')} samples per cell; bars are 95 % intervals",
    )
    return figure
