"""Figures of all studies: their text stands inside them, in a size that a column of a paper can hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

import actstore
from actstore.errors import NotStored
from actstore.queries import erase, figures, study
from actstore.queries.attention.page import draw_patterns, save
from actstore.queries.probes.figures import TOKEN_ROLES
from actstore.store import Store
from tests.test_probe import made_up as probes_made_up

STUDIES = ["depth", "last-edge", "swap", "dreams", "attention", "probes"]
SMALLEST = 6  # points


def texts(figure: Figure) -> list[Text]:
    """The texts that are seen."""
    figure.canvas.draw()
    outside = set()  # labels of ticks that lie outside an axis' range are not drawn
    for axis in (one for axes in figure.axes for one in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        outside |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    seen = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    seen = [text for text in seen if text not in outside]
    return [text for text in seen if text.get_window_extent().width]


def assert_legible(figure: Figure) -> None:
    """No text leaves the figure, and none is smaller than SMALLEST."""
    page, words = figure.bbox, texts(figure)
    assert len(words) > 5
    for text in words:
        box = text.get_window_extent()
        assert text.get_fontsize() >= SMALLEST, text.get_text()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
        assert inside, text.get_text()


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that every study over drawn trees can be asked of."""
    path = tmp_path_factory.mktemp("figures") / "s.act"
    sites = ["embed", "resid_post", "pattern"]
    actstore.ingest(path, "reproduction", trees=200, dataset="trees", sites=sites)
    for variant in ("swap_last", "swap_inner"):
        actstore.ingest(path, "reproduction", dataset="trees", variant=variant, sites=[])
    actstore.ingest(path, "reproduction", dataset="trees", prompt="tree")
    with Store(path) as store:
        yield store


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", STUDIES)
def test_a_figure_of_a_study_is_legible_in_one_column(answered: Store, name: str, dark: bool):
    answer = study.ask(answered, name, run="reproduction")
    figure = study.plot(answer, dark)
    assert figure.get_figwidth() == figures.COLUMN
    assert_legible(figure)
    assert "95 % intervals" in " ".join(figure.get_suptitle().split())
    said = study.caption(answer, figure)
    assert answer.sentence in said
    assert "\n" not in said


def test_few_trees_leave_no_panel_empty_and_no_point_unseen(answered: Store):
    swapped = study.plot(study.ask(answered, "swap", run="reproduction"))
    assert all(axis.lines[:-1] for axis in swapped.axes), "a panel with the line at 0 alone"
    depth = study.ask(answered, "depth", run="reproduction")
    few = depth.results.with_columns(
        n=pl.when(pl.col("label") == "depth 5").then(2).otherwise("n"),
        value=pl.when(pl.col("label") == "depth 5").then(0.5).otherwise("value"),
    )
    figure = study.plot(replace(depth, results=few))
    for axis in figure.axes:
        assert [text.get_text() for text in axis.texts] == ["50"]
        assert axis.get_ylim()[0] < axis.texts[0].xy[1], "its mark is in the panel"
    assert "number: a point below it" in " ".join(figure.get_suptitle().split())
    assert_legible(figure)


def test_distances_and_lengths_are_whole_numbers(answered: Store):
    figure = study.plot(study.ask(answered, "attention", run="reproduction", by="ancestor"))
    assert_legible(figure)
    for axis in figure.axes:
        assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_patterns_of_a_whole_tree_name_each_token(answered: Store):
    figure = draw_patterns(answered, "reproduction", 3)
    assert_legible(figure)
    assert len(figure.axes[0].get_xticklabels()) > 40


def test_patterns_of_all_layers_are_pages_of_a_pdf_no_wider_than_a_paper(answered: Store, tmp_path: Path):
    out = tmp_path / "patterns.pdf"
    save(answered, "reproduction", 3, str(out))
    widths = [float(box) for box in re.findall(rb"/MediaBox \[ 0 0 ([\d.]+)", out.read_bytes())]
    assert len(widths) == 6
    assert max(widths) <= 72 * figures.PAGE
    assert b"/Type3" not in out.read_bytes(), "fonts that journals refuse"


def test_a_caption_lies_beside_each_figure(answered: Store, tmp_path: Path):
    out = tmp_path / "depth.pdf"
    (asked,) = actstore.study(answered, "depth", ["reproduction"], plot=out, caption=True, record=False)
    assert asked.answer is not None
    assert asked.answer.sentence in out.with_suffix(".txt").read_text()
    assert b"/Type3" not in out.read_bytes(), "fonts that journals refuse"


def made_up(n: int) -> pl.DataFrame:
    value = np.linspace(0.9, 1.0, n)
    return pl.DataFrame({"value": value, "low": value - 0.05, "high": np.minimum(value + 0.05, 1)})


def test_long_names_are_wrapped_and_make_the_figure_longer():
    with figures.style():
        figure, axes = figures.panels(2, sharex=True)
        before = figure.get_figheight()
        sites = [f"blocks.{layer}.hook_resid_post" for layer in range(12)]
        for axis in axes:
            figures.points(axis, range(12), made_up(12), "a series with a name of many words, some of them long")
            figures.percents(axis, None)
            figures.entitle(axis, "a panel with a title that no column holds in one line, for it goes on and on")
        figures.by_site(axes[-1], sites)
        figures.legend(figure, *axes)
        figures.heading(figure, "A question? " * 12, "run with-a-name-of-many-letters; " * 6)
        figure.draw_without_rendering()
    assert_legible(figure)
    assert figure.get_figheight() > before


def test_a_legend_has_as_many_columns_as_its_names_leave_room_for():
    for names, columns in (
        (["mmmmmmmmmmmmmmmmmmmmmmm"] * 4, 1),
        (["source", "target"], 2),
        (["iiiiiiiiiiiiiiiiiiiiii"] * 4, 3),
    ):
        with figures.style():
            figure, (axis,) = figures.panels(1)
            for turn, name in enumerate(names):
                axis.plot(range(5), label=name + "." * turn)
            figures.legend(figure, axis)
            figure.draw_without_rendering()
        assert figure.legends[0]._ncols == columns
        assert_legible(figure)


def test_percents_end_at_100():
    for low in (0.0, 90.0, 99.893, None):
        with figures.style():
            figure, (axis,) = figures.panels(1)
            figures.points(axis, range(5), made_up(5), "a")
            figures.percents(axis, low)
            figure.canvas.draw()
        assert max(axis.get_yticks()) == 100
        assert axis.get_ylim()[1] < 107
        assert axis.get_ylim()[0] < (low or 90)


def test_layers_in_order_stand_out_on_light_and_dark_paper():
    for dark in (False, True):
        with figures.style(dark):
            figure, (axis,) = figures.panels(1)
            ground = _luminance(figure.get_facecolor())
            shown = [_luminance(colour) for colour in figures.shades(axis, 7)]
        assert all(_contrast(one, ground) > 2 for one in shown)
        assert shown == sorted(shown)
        assert len(set(shown)) == 7


def test_heat_maps_longer_than_a_page_stand_in_two_columns():
    for rows, width in (([6] * 6, figures.COLUMN), ([1, 2, 3, 4, 5, 6], figures.COLUMN), ([12] * 6, figures.PAGE)):
        with figures.style():
            figure, axes = figures.maps(rows)
            for axis, n in zip(axes, rows, strict=True):
                cells = [[0.004] * 8] * n
                image = figures.heat(axis, cells, [[True] * 8] * n, ["edge_source"] * 8, range(n), 1.0)
                figures.entitle(axis, "MLP")
            figures.colour_bar(figure, image, axes, "points")
            figures.heading(figure, "What", f"run r; {figures.FRAMED}")
            figure.draw_without_rendering()
        assert_legible(figure)
        assert figure.get_figwidth() == width
        assert figure.get_figheight() <= figures.TALLEST
        named = [any(label.get_visible() for label in axis.get_xticklabels()) for axis in axes]
        columns = 1 if width == figures.COLUMN else 2
        assert named == [False] * (len(rows) - columns) + [True] * columns, "names stand once"


def test_panels_longer_than_a_page_stand_beside_each_other():
    sites = ("embed", *(f"resid_post.{layer}" for layer in range(6)))
    probed = pl.concat([probes_made_up(16, role, sites) for role in TOKEN_ROLES])
    rows = [
        {"site": site, "token_role": "path", "label": label, "metric": metric, "value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
        for label in ("goal", "next_node")
        for site in sites
        for metric in ("commonest", *erase.READ, *(f"{of}_{cost}" for of in ("accuracy", "loss") for cost in erase.COSTS))
    ]  # fmt: skip
    erased = study.result_rows(rows, study="erase", run="r", query="q", params={}, snapshot=1, seed=0)
    for name, results, n, columns in (("probes", probed, 2 * len(TOKEN_ROLES), 2), ("erase", erased, 6, 3)):
        figure = study.plot(study.Answer(name, pl.DataFrame(), results, ""))
        assert_legible(figure)
        assert figure.get_figwidth() == figures.PAGE
        assert figure.get_figheight() <= figures.TALLEST
        named = [[label.get_text() for label in axis.get_xticklabels() if label.get_visible()] for axis in figure.axes]
        assert named == [[]] * (n - columns) + [list(sites)] * columns, "names stand once, under the lowest panels"
        assert all(label.get_rotation() == 60 for axis in figure.axes[-columns:] for label in axis.get_xticklabels())


def test_a_label_looks_the_same_at_every_token_and_like_no_other():
    path = probes_made_up(16, "path").filter(label="source").with_columns(label=pl.lit("next_node"))
    figure = study.plot(study.Answer("probes", pl.DataFrame(), pl.concat([probes_made_up(16), path]), ""))
    looks: dict[str, set[tuple[str, str]]] = {}
    for axis in figure.axes:
        for bars, name in zip(*axis.get_legend_handles_labels(), strict=True):
            if name in ("source", "target", "next node on the path"):
                looks.setdefault(name, set()).add((bars[0].get_color(), bars[0].get_marker()))
    assert {len(of) for of in looks.values()} == {1}
    assert len(set.union(*looks.values())) == len(looks) == 3


def test_a_dark_figure_has_light_text_that_stands_out():
    for dark in (False, True):
        with figures.style(dark):
            figure, (axis,) = figures.panels(1)
            figures.points(axis, range(5), made_up(5), "a")
            figures.legend(figure, axis)
            figures.heading(figure, "What", "which")
            figure.canvas.draw()
        ground = _luminance(figure.get_facecolor())
        for text in texts(figure):
            assert _contrast(_luminance(text.get_color()), ground) > 7
        for colour in (*figures.COLOURS, figures.GREY):
            assert _contrast(_luminance(colour), ground) > 2.0
    assert mpl.rcParams["figure.facecolor"] == "white", "the style ends with its block"


def _luminance(colour: object) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_a_tree_is_drawn_with_every_node_its_edges_and_the_path(demo_store):
    from actstore.queries.show import plot_tree

    edges = demo_store.sql("select source, target from edges where tree_id = 3").rows()
    (axis,) = plot_tree(demo_store, 3).axes
    at = {int(text.get_text()): tuple(text.get_position()) for text in axis.texts}
    drawn = {tuple(zip(*line.get_data(), strict=True)): line.get_linewidth() for line in axis.lines}
    assert sorted(at) == list(range(16))
    assert len(set(at.values())) == 16
    assert drawn.keys() == {(at[source], at[target]) for source, target in edges}
    assert all(at[source][1] == at[target][1] + 1 for source, target in edges), "a child is one row lower"
    tree = demo_store.sql("select root, path from trees where tree_id = 3").row(0)
    path = [tree[0], *tree[1]]
    steps = {(at[source], at[target]) for source, target in pairwise(path)}
    assert {ends for ends, width in drawn.items() if width == max(drawn.values())} == steps
    with pytest.raises(NotStored, match="no tree 4711"):
        plot_tree(demo_store, 4711)
