"""Evaluation: planted answers counted exactly, intervals against scipy, and trees that training saw left out."""

import json
import sys

import click
import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import binomtest

from actstore.cli.tables import print_table
from actstore.errors import BadInput
from actstore.ingest.models import load
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.weights import canonical, state
from actstore.ingest.training import evaluation
from actstore.ingest.training.evaluation import evaluate, seen_hashes
from actstore.ingest.training.recipe import Recipe
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.tokens import COMMA, encode
from actstore.intervals import over_trees

N_NODES, SEED = 6, 11


def untrained(system, n_nodes=N_NODES):
    config = ModelConfig(system, n_nodes, n_layers=1, d_model=8, d_head=8, d_mlp=8)
    bridge = load.build(config, 0)
    return load.from_bytes(canonical(state(bridge, config)), config, "untrained", "test")


def plant(monkeypatch, model, spoil):
    """Make the model answer every tree rightly and stop, but for what `spoil(words)`, uint8 [tree, pos], changes."""

    def planted(model, ids, sites, take):
        words = model.config.vocabulary.decode(ids.numpy())
        said = np.roll(words, -1, axis=1)
        said[:, -1] = COMMA
        spoil(said)
        return torch.nn.functional.one_hot(torch.from_numpy(model.config.vocabulary.encode(said)), model.config.d_vocab)

    monkeypatch.setattr(evaluation, "forward", lambda *arguments: planted(*arguments).float())


def test_a_model_that_is_always_right_has_every_token_path_and_answer(monkeypatch):
    model = untrained("baseline")
    plant(monkeypatch, model, lambda said: None)
    found = evaluate(model, "baseline", n_trees=300, seed=SEED)
    trees = draw("baseline", SEED, 0, 300, N_NODES)
    depths, backward = np.bincount(trees.depth), trees.is_backward()
    overall, *by_edges_and_depth = found.frame.rows(named=True)
    by_depth = [row for row in by_edges_and_depth if row["depth"]]
    assert [(row["edges"], row["n_trees"]) for row in by_edges_and_depth[:2]] == [
        ("backward", backward.sum()),
        ("shuffled", 300 - backward.sum()),
    ]
    assert (overall["depth"], overall["n_trees"], overall["n_tokens"]) == (None, 300, (depths * range(6)).sum())
    assert [(row["depth"], row["n_trees"]) for row in by_depth] == list(enumerate(depths))[1:]
    assert all(row[measure] == 1 for row in found.frame.rows(named=True) for measure in evaluation.MEASURES)
    assert json.loads(json.dumps(found.to_dict()))["table"][0]["greedy"] == 1


def test_one_wrong_last_step_costs_one_token_and_the_whole_path(monkeypatch):
    model = untrained("reproduction")
    trees = draw("reproduction", SEED, 0, 100, N_NODES)
    deep = trees.depth >= 3
    at = 3 * N_NODES - 2 + trees.depth.astype(int)  # what is said there is the last step

    def spoil(said):
        said[deep, at[deep]] = COMMA

    plant(monkeypatch, model, spoil)
    overall, *by_depth = evaluate(model, "reproduction", n_trees=100, seed=SEED).frame.rows(named=True)
    assert overall["token"] == pytest.approx(1 - deep.sum() / trees.depth.sum())
    assert overall["whole_path"] == overall["greedy"] == pytest.approx(1 - deep.mean())
    for row in by_depth:
        assert row["whole_path"] == (row["depth"] < 3)
        assert row["token"] == (1 if row["depth"] < 3 else pytest.approx(1 - 1 / row["depth"]))


def test_the_baseline_must_stop_behind_the_goal_to_have_answered(monkeypatch):
    for system, stopped in (("baseline", 0.0), ("reproduction", 1.0)):
        model = untrained(system)
        arrow = encode(draw(system, SEED, 0, 1, N_NODES))[0, 1]

        def go_on(said, arrow=arrow):
            said[:, 3 * N_NODES - 1 :][said[:, 3 * N_NODES - 1 :] <= COMMA] = arrow

        plant(monkeypatch, model, go_on)
        overall = evaluate(model, n_trees=64, seed=SEED).frame.row(0, named=True)
        assert (overall["token"], overall["whole_path"], overall["greedy"]) == (1, 1, stopped)


def test_trees_that_training_saw_are_left_out_and_others_take_their_place(monkeypatch):
    model = untrained("reproduction", 4)
    recipe = Recipe(steps=3, batch_size=16)
    seen, asked = seen_hashes(recipe, model), []
    grade = evaluation._graded
    monkeypatch.setattr(evaluation, "_graded", lambda model, trees: asked.append(trees.hashes()) or grade(model, trees))
    found = evaluate(model, "reproduction", n_trees=200, seed=SEED, recipe=recipe)
    hashes = np.concatenate(asked)
    assert (len(hashes), found.n_trees) == (200, 200)
    (n_left_out,) = found.n_left_out.values()
    assert n_left_out > 0
    assert not np.isin(hashes, seen).any()
    everything = draw("reproduction", SEED, 0, 200 + n_left_out, 4).hashes()
    assert np.isin(everything, seen).sum() == n_left_out


def test_every_distribution_is_asked_for_the_models_own_first_and_each_has_its_own_trees(monkeypatch):
    model, asked = untrained("baseline"), []
    plant(monkeypatch, model, lambda said: None)
    grade = evaluation._graded
    monkeypatch.setattr(evaluation, "_graded", lambda model, trees: asked.append(trees) or grade(model, trees))
    done = []
    found = evaluate(model, n_trees=150, seed=SEED, progress=done.append)
    assert found.distributions == ("baseline", "reproduction", "deep")
    assert done == [128, 150, 278, 300, 428, 450]
    overall = found.frame.filter(pl.col("depth").is_null(), pl.col("edges").is_null())
    assert overall["distribution"].to_list() == list(found.distributions)
    drawn = [draw(name, SEED, 0, 150, N_NODES) for name in found.distributions]
    assert overall["n_tokens"].to_list() == [trees.depth.sum() for trees in drawn]
    assert np.concatenate([t.hashes() for t in asked]).tolist() == [x for t in drawn for x in t.hashes().tolist()]
    assert found.frame.filter(pl.col("edges").is_not_null())["distribution"].unique().to_list() == ["baseline"]
    assert "150 baseline, reproduction, deep trees each of 6 nodes" in found.sentence()


def test_the_intervals_are_the_exact_ones_over_trees(monkeypatch):
    model = untrained("reproduction")
    trees = draw("reproduction", SEED, 0, 100, N_NODES)
    at = 3 * N_NODES - 2 + trees.depth.astype(int)
    wrong = trees.depth >= 4

    def spoil(said):
        said[wrong, at[wrong]] = COMMA

    plant(monkeypatch, model, spoil)
    row = evaluate(model, "reproduction", n_trees=100, seed=SEED).frame.row(0, named=True)
    exact = binomtest(int(100 - wrong.sum()), 100).proportion_ci()
    assert (row["greedy_low"], row["greedy_high"]) == pytest.approx((exact.low, exact.high))
    weights = trees.depth.astype(float)
    of_tree = (trees.depth - wrong) / trees.depth
    assert (row["token_low"], row["token_high"]) == over_trees(of_tree, np.arange(100), weights)
    assert row["token_low"] < row["token"] < row["token_high"]


def test_a_terminal_of_80_columns_has_a_line_for_each_row_and_the_answers_first(monkeypatch, capsys):
    found = evaluate(untrained("reproduction"), "reproduction", n_trees=20, seed=SEED)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(found.shown(), fold=True)
    lines = [line.rstrip() for line in click.unstyle(capsys.readouterr().out).splitlines()]
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if line.startswith("reproduction")]
    assert len(rows) == len(found.frame)
    row = found.frame.row(0, named=True)
    assert f"[{100 * row['greedy_low']:.2f}, {100 * row['greedy_high']:.2f}]" in rows[0]


def test_what_cannot_be_evaluated_is_refused():
    model, recipe = untrained("reproduction", 2), Recipe(steps=3, batch_size=16)
    with pytest.raises(BadInput, match="nearly all trees of 2 nodes"):
        evaluate(model, n_trees=50, recipe=recipe)
    with pytest.raises(BadInput, match="seed 42 is the training's own"):
        evaluate(model, n_trees=50, recipe=recipe, seed=42)
    with pytest.raises(BadInput, match="0 trees"):
        evaluate(model, n_trees=0)
    with pytest.raises(BadInput, match="vocabulary of 2 nodes"):
        evaluate(model, n_trees=5, n_nodes=3)


def test_the_shipped_model_finds_paths_it_was_never_shown(shipped):
    found = evaluate(shipped, "reproduction", n_trees=128)
    assert found.frame["greedy"][0] > 0.98
