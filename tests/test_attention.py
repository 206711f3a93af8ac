"""The study `attention` on patterns that are planted, and its drawings."""

import json
import re

import numpy as np
import polars as pl
import pytest

from actstore.errors import BadInput, NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.task import TreeSet
from actstore.queries import studies, study
from actstore.queries.attention.page import draw_patterns, page, save
from actstore.store import Store
from tests.planted import plant
from tests.test_pipeline import small_model

N, WIDTH = 60, 23  # trees of 6 nodes, positions
TREES = draw("deep", 0, 0, N, 6)


def even():
    """float32 [tree, 1, query, key]: every token looks at all up to itself alike."""
    pattern = np.tril(np.ones((WIDTH, WIDTH), np.float32)) / np.arange(1, WIDTH + 1, dtype=np.float32)[:, None]
    return np.broadcast_to(pattern, (N, 1, WIDTH, WIDTH)).copy()


def looking():
    """Targets of all edges but the last give 3/4 to their source and the rest to themselves; the last edge's gives 1/4."""
    pattern = even()
    for edge in range(5):
        share = 0.25 if edge == 4 else 0.75
        pattern[:, 0, 3 * edge + 1] = 0
        pattern[:, 0, 3 * edge + 1, 3 * edge] = share
        pattern[:, 0, 3 * edge + 1, 3 * edge + 1] = 1 - share
    for tree in range(N):  # the root and the path look at the edge to take next, half at its source, half at its target
        targets = TREES.edges[tree, :, 1].tolist()
        for step, node in enumerate(TREES.path[tree][: TREES.depth[tree]].tolist()):
            edge = targets.index(node)
            pattern[tree, 0, 17 + step] = 0
            pattern[tree, 0, 17 + step, 3 * edge : 3 * edge + 2] = 0.5
    return pattern


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = plant(
        tmp_path_factory.mktemp("attention") / "s.act",
        TREES,
        {"pattern.0": looking(), "pattern.1": even()},
        trees_per_shard=25,
    )
    with Store(path) as opened:
        yield opened


def value(answer, **where):
    found = answer.results.filter(**where)
    assert len(found) == 1
    return found["value"].item()


def test_planted_shares_come_out_exactly(store):
    answer = study.ask(store, "attention")
    at = {"site": "pattern.0", "token_role": "edge_target"}
    assert value(answer, **at, metric="own source", label="others") == 0.75
    assert value(answer, **at, metric="own source", label="last") == 0.25
    assert value(answer, **at, metric="itself", label="others") == 0.25
    assert value(answer, **at, metric="before", label="others") == pytest.approx(0, abs=1e-6)
    assert value(answer, **at, metric="own source", label="last less the one before") == pytest.approx(
        (0.25 - 1 / 14) - (0.75 - 1 / 11)
    )
    for kind in ("others", "last"):
        assert value(answer, site="pattern.0", token_role="path", metric="next edge", label=kind) == 1
    assert "relative to even attention, the last edge's target gives its own edge -48.052" in answer.sentence
    assert "75.00 %" in answer.sentence


def test_even_attention_is_chance(store):
    answer = study.ask(store, "attention")
    for role, metric in (
        ("edge_target", "own source"),
        ("separator", "own edge"),
        ("bar", "own edge"),
        ("path", "next edge"),
    ):
        for kind in ("others", "last"):
            found = answer.results.filter(site="pattern.1", token_role=role, label=kind)
            if len(found):
                first, chance = (found.filter(metric=name)["value"].item() for name in (metric, "even"))
                assert first == pytest.approx(chance, rel=1e-5)
    for role in ("edge_target", "bar"):
        metric = "own source" if role == "edge_target" else "own edge"
        at = {"site": "pattern.1", "token_role": role}
        assert value(answer, **at, label="last less the one before", metric=metric) == pytest.approx(0, abs=1e-6)
        assert value(answer, **at, label="last less the one before", metric="as_far") == 4, (
            "all alike, but for rounding"
        )
    mean = np.mean([1 / (3 * edge + 2) for edge in range(4)])
    assert value(answer, site="pattern.1", token_role="edge_target", metric="even", label="others") == pytest.approx(
        mean
    )


def test_it_says_so_where_nothing_is_looked_at_more_than_by_chance(tmp_path):
    with Store(plant(tmp_path / "s.act", TREES, {"pattern.0": even()})) as opened:
        assert "This share is no more than even attention gives" in study.ask(opened, "attention").sentence


def test_all_that_a_token_looks_at_sums_to_one(store):
    results = study.ask(store, "attention").results
    for where, some in results.filter(label="others").group_by("site", "token_role"):
        parts = [row["value"] for row in some.iter_rows(named=True) if row["metric"] != "even"]
        assert sum(parts) == pytest.approx(1, abs=1e-5), where


# The last pair of neighbours against all others.


def looked_at(trees, shares):
    """Targets give shares[edge] beyond even attention to their own source, separators and the bar to their own edge's target."""
    width = 4 * trees.n_nodes - 1
    pattern = np.zeros((len(trees), 1, width, width), np.float32)
    pattern[:, 0, np.arange(width), np.arange(width)] = 1  # themselves
    for edge, share in enumerate(shares):
        for query, key, n_first in ((3 * edge + 1, 3 * edge, 1), (3 * edge + 2, 3 * edge + 1, 2)):
            pattern[:, 0, query, key] = share + n_first / (query + 1)
            pattern[:, 0, query, query] = 1 - pattern[:, 0, query, key]
    return pattern


def asked(path, n_nodes, shares):
    trees = draw("deep", 0, 0, 30, n_nodes)
    with Store(plant(path, trees, {"pattern.0": looked_at(trees, shares)})) as opened:
        return study.ask(opened, "attention")


def test_a_last_edge_within_the_spread_of_neighbours_is_not_called_another(tmp_path):
    shares = np.tile([0.3, 0.2, 0.25], 5)  # neighbours differ by -0.1, 0.05 and 0.05
    answer = asked(tmp_path / "s.act", 16, shares)
    last = answer.results.filter(token_role="edge_target", label="last less the one before", metric="own source")
    assert last["value"].item() == pytest.approx(0.05, abs=1e-6)
    pairs = answer.results.filter(
        pl.col("label").str.starts_with("edge "), token_role="edge_target", metric="own source"
    )
    assert pairs["label"].to_list() == [f"edge {edge} less {edge - 1}" for edge in range(1, 14)]
    np.testing.assert_allclose(pairs["value"], np.diff(shares)[:-1], atol=1e-6)
    at = {"token_role": "edge_target", "label": "last less the one before"}
    assert value(answer, **at, metric="as_far") == 14, (
        "each of the other pairs lies as far from their median, or farther"
    )
    assert value(answer, **at, metric="p") == 1
    assert (
        "other 13 pairs of neighbours differ by -10.000 to +5.000 points, half of them by -10.000 to +5.000."
        in answer.sentence
    )
    assert answer.sentence.count("the last pair does not stand out from other neighbours") == 2
    assert answer.frame["pairs as far from their median"].to_list() == ["14 of 14"]
    assert answer.frame["other neighbours (half of them), points"].item() == "-10.000 to +5.000 (-10.000 to +5.000)"


def test_the_farthest_of_14_pairs_is_told_as_that_and_no_more(tmp_path):
    shares = 0.3 + 0.01 * np.random.default_rng(0).random(15)
    shares[-1] -= 0.2
    answer = asked(tmp_path / "s.act", 16, shares)
    assert [test.p for test in answer.tests] == [1 / 14, 1 / 14]
    assert [test.p_holm for test in answer.tests] == [2 / 14, 2 / 14]
    assert (
        answer.sentence.count("Of all 14 pairs, 1 lies as far from their median as the last (p = 0.143 by rank)") == 2
    )
    assert answer.sentence.count("14 pairs are too few to exclude chance") == 2
    assert "Holm's correction covers all 2 comparisons" in answer.sentence


def test_a_last_edge_that_stands_out_of_many_neighbours_is_found(tmp_path):
    shares = 0.3 + 0.01 * np.random.default_rng(0).random(63)
    shares[-1] -= 0.2
    answer = asked(tmp_path / "s.act", 64, shares)
    assert all(test.found for test in answer.tests)
    assert answer.sentence.count("so the difference of the last pair is lower than usual") == 2


def test_where_there_is_one_pair_nothing_is_tested(tmp_path):
    answer = asked(tmp_path / "s.act", 3, [0.3, 0.1])
    assert answer.tests == ()
    assert answer.sentence.count("The list has no other pair of neighbours to compare with.") == 2
    assert "Holm" not in answer.sentence


# The root token and the ancestors of the goal (-o by ancestor).


def at_the_root(key_of):
    """The root gives half of its attention to a target, where `key_of` a tree names its edge, and half to itself."""
    pattern = even()
    for tree in range(N):
        if (edge := key_of(tree)) is not None:
            pattern[tree, 0, 17] = 0
            pattern[tree, 0, 17, [3 * edge + 1, 17]] = 0.5
    return pattern


def to_parent(trees):
    """Of each tree the edge that leads to the goal's parent, if the parent is not the root."""

    def edge(tree):
        place = int(trees.depth[tree]) - 2
        return trees.edges[tree, :, 1].tolist().index(trees.path[tree][place]) if place >= 0 else None

    return edge


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """In two sets the root looks at the goal's parent in layer 0, evenly in layer 1, and at edge 4 in layer 2."""
    path = tmp_path_factory.mktemp("parents") / "s.act"
    for run, dataset, seed in (("r", "d", 0), ("s", "fresh", 1)):
        trees = draw("deep", seed, 0, N, 6)
        sites = {
            "pattern.0": at_the_root(to_parent(trees)),
            "pattern.1": even(),
            "pattern.2": at_the_root(lambda tree: 4),
        }
        plant(path, trees, sites, run, dataset=dataset, seed=seed, weights=b"of both")
    with Store(path) as opened:
        yield opened


def test_an_ancestor_that_the_root_looks_at_is_found_and_a_place_in_the_list_is_not(parents):
    answer = study.ask(parents, "attention", "r", by="ancestor")
    assert [(test.site, test.label) for test in answer.tests if test.found] == [("pattern.0", "distance 1")]
    at = {"site": "pattern.0", "token_role": "root", "label": "distance 1"}
    assert value(answer, **at, metric="attention") == 0.5
    assert value(answer, **at, metric="others") < 0.03  # even attention, of trees whose goal's parent is the root
    assert "At pattern.0 more goes to distance 1, the excess is largest at distance 1: 50.00 %" in answer.sentence
    assert answer.sentence.count("no distance gets significantly more") == 2
    assert answer.frame["ancestor"].to_list() == [f"distance {steps}" for steps in range(5)]
    for row in answer.results.filter(site="pattern.2", metric="beyond").iter_rows(named=True):
        assert row["value"] == pytest.approx(0, abs=1e-6), row["label"]  # that place gets as much off the path
    assert len(study.plot(answer).axes) == 3


def test_an_ancestor_that_the_root_looks_at_is_confirmed_on_a_second_set(parents):
    (asked,) = studies.answer(parents, "attention", ["r"], options={"by": "ancestor"}, confirm="fresh")
    assert asked.confirmation is not None
    (claim,) = (claim for claim in asked.confirmation.claims if claim.here.found)  # others are below their comparison
    assert (claim.here.label, claim.confirmed) == ("distance 1", True)


def test_another_by_is_refused(parents):
    with pytest.raises(BadInput, match="got by 'ancestors'; write ancestor"):
        study.ask(parents, "attention", "r", by="ancestors")


def test_a_run_without_patterns_says_what_adds_them(demo_store):
    with pytest.raises(NotStored, match="--run reproduction --sites pattern"):
        study.ask(demo_store, "attention")


@pytest.fixture(scope="module")
def sisters(tmp_path_factory):
    """Two runs of one model over the same trees, the second with its patterns, and one of another model with its own."""
    root = tmp_path_factory.mktemp("sisters") / "s.act"
    trees = TreeSet("reproduction", 60, n_nodes=6, name="d")
    execute(Ingest(root, small_model(), trees, run="small"))
    execute(Ingest(root, small_model(), trees, run="small-patterns", sites=["pattern"]))
    execute(Ingest(root, small_model(seed=5), trees, run="other-patterns", sites=["pattern"]))
    with Store(root) as opened:
        yield opened


def test_a_run_finds_its_models_patterns_in_another_run(sisters):
    asked, holding = (study.ask(sisters, "attention", run=run) for run in ("small", "small-patterns"))
    assert asked.results["run"].unique().to_list() == ["small"]
    assert json.loads(asked.results["params"][0]) == {"run": "small-patterns"}
    assert asked.results["value"].equals(holding.results["value"])
    assert page(sisters, "small", 3).replace("run small", "") == page(sisters, "small-patterns", 3).replace(
        "run small-patterns", ""
    )


def test_runs_of_one_model_over_the_same_trees_are_asked_once(sisters):
    asked = study.questions(sisters, "attention")
    assert [question.run for question in asked] == ["small", "other-patterns"]
    named = study.questions(sisters, "attention", ["small-patterns", "small"])
    assert [question.run for question in named] == ["small-patterns"]


def test_the_study_gives_the_same_again_and_a_figure(store):
    first, again = study.ask(store, "attention", seed=3), study.ask(store, "attention", seed=3)
    assert first.results.equals(again.results)
    assert len(study.plot(first).axes) == 3


def test_the_page_holds_the_patterns_as_stored_and_needs_nothing_else(store):
    text = page(store, "planted", 7)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    X, rows = store.read(
        "select token_id, token from tokens where tree_id = 7 order by position", "planted", "pattern.0"
    )
    assert data["tokens"] == rows["token"].to_list()
    for query, weights in enumerate(data["patterns"]["pattern.0, head 0"]):
        np.testing.assert_allclose(weights, X[query, 0, : query + 1], atol=1e-4)
    assert not re.search(r"https?://|@import|<link|src=", text)


def test_a_figure_shows_every_token_on_both_axes(store, tmp_path):
    n = 18 + int(TREES.depth[7])
    axis = draw_patterns(store, "planted", 7, layer=0).axes[0]
    assert [len(axis.get_xticklabels()), len(axis.get_yticklabels())] == [n, n]
    save(store, "planted", 7, str(tmp_path / "all.png"))
    save(store, "planted", 7, str(tmp_path / "all.html"))
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "all.html").read_text().startswith("<!doctype html>")


def test_what_is_not_there_is_named(store):
    said = rf"'planted' has no tree 999; it has {len(TREES)} trees of the dataset 'made-up', numbered 0 to {len(TREES) - 1}:"
    with pytest.raises(NotStored, match=said):
        page(store, "planted", 999)
    with pytest.raises(NotStored, match=r"no pattern.5; it holds pattern.0, pattern.1"):
        draw_patterns(store, "planted", 7, layer=5)
    with pytest.raises(BadInput, match="got head 3; there are 1"):
        draw_patterns(store, "planted", 7, head=3)
