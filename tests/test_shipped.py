"""The models that ship: their files agree with one another, and each does the task as its card says."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from actstore.ingest.models import load
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.training.card import card
from actstore.ingest.training.checkpoints import KEPT
from actstore.ingest.training.evaluation import MEASURES, Evaluation, evaluate
from actstore.ingest.training.recipe import read_config, recipe_of
from actstore.ingest.trees.draw import DISTRIBUTIONS

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "data" / "checkpoints"
NAMES = sorted(path.stem for path in CHECKPOINTS.glob("*.safetensors"))


def accuracy(name: str) -> pl.DataFrame:
    """The card's table: trees ('deep', …), depth ('all', '1', …), n, and the share of greedy answers right, in %."""
    row = r"^\| (\w+(?:, \w+)?) \| (all|\d+) \| ([\d,]+) \| .* \| .* \| (\S+) \(.*\) \|$"
    rows = re.findall(row, (CHECKPOINTS / f"{name}.md").read_text(), re.MULTILINE)
    columns = dict(zip(("trees", "depth", "n", "greedy"), zip(*rows, strict=True), strict=True))
    return pl.DataFrame(columns).with_columns(
        pl.col("n").str.replace_all(",", "").cast(int), pl.col("greedy").cast(pl.Float64)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_is_what_its_card_its_configuration_and_its_log_say(name):
    weights = CHECKPOINTS / f"{name}.safetensors"
    assert f"sha256 `{hashlib.sha256(weights.read_bytes()).hexdigest()}`" in weights.with_suffix(".md").read_text()
    _, config, recipe = read_config(name)
    assert ModelConfig.from_yaml(weights.with_suffix(".yaml")) == config
    assert recipe_of(weights.with_suffix(".yaml")) == recipe
    log = pl.read_ndjson(weights.with_suffix(".jsonl"))
    assert log["step"][-1] == recipe.steps
    assert log["step"].is_sorted()


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_card_is_what_the_program_writes_today(name):
    """From the configuration, the log, and the card's own shares and machine."""
    weights = CHECKPOINTS / f"{name}.safetensors"
    written = weights.with_suffix(".md").read_text()
    _, config, recipe = read_config(name)
    shares = [f"{measure}{end}" for measure in MEASURES for end in ("", "_low", "_high")]
    rows = []
    for line in re.findall(r"^\| (\w+(?:, \w+)? \| (?:all|\d+) \| .*\)) \|$", written, re.MULTILINE):
        trees, depth, n, *cells = line.split(" | ")
        distribution, _, edges = trees.partition(", ")
        numbers = [float(number) / 100 for cell in cells for number in re.findall(r"[\d.]+", cell)]
        row = {"distribution": distribution, "edges": edges or None, "depth": None if depth == "all" else int(depth)}
        rows.append(row | {"n_trees": int(n.replace(",", ""))} | dict(zip(shares, numbers, strict=True)))
    own = (name, *(other for other in DISTRIBUTIONS if other != name))
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    table = pl.DataFrame(rows, infer_schema_length=None)
    graded = Evaluation(name, sha256, own, 20_000_000, 16, 20_000, dict.fromkeys(own, 0), table)
    log = [json.loads(line) for line in weights.with_suffix(".jsonl").read_text().splitlines()]
    (machine,) = re.findall(r"^\| machine \| (.*) \|$", written, re.MULTILINE)
    assert card(config, recipe, log, graded, machine) == written


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_answers_as_often_as_its_card_says(name):
    stated = accuracy(name).filter(depth="all")
    assert stated["trees"].to_list()[0] == name
    assert {*stated["trees"]} == {*DISTRIBUTIONS, "baseline, backward", "baseline, shuffled"}
    assert stated.filter(pl.col("trees").is_in(DISTRIBUTIONS))["n"].to_list() == [20_000] * 3
    found = evaluate(load.load(name), n_trees=256, seed=7_000_000).frame.filter(pl.col("depth").is_null())
    for row in found.iter_rows(named=True):
        trees = ", ".join(filter(None, (row["distribution"], row["edges"])))
        greedy = stated.row(by_predicate=pl.col("trees") == trees, named=True)["greedy"]
        assert row["greedy_low"] - 0.01 <= greedy / 100 <= row["greedy_high"] + 0.01


def test_the_reproductions_moments_lead_from_its_start_to_its_end():
    weights = CHECKPOINTS / "reproduction.safetensors"
    assert load.checkpoints(weights) == list(KEPT)
    config = ModelConfig.from_yaml(weights.with_suffix(".yaml"))
    start = load.load("reproduction", checkpoint=0).bridge.state_dict()
    fresh = load.build(config, recipe_of(weights.with_suffix(".yaml")).seed).state_dict()
    for name, value in start.items():
        torch.testing.assert_close(value, fresh[name].half().float())
    steps = [
        evaluate(load.load("reproduction", checkpoint=step), "reproduction", n_trees=128).frame["token"][0]
        for step in KEPT
    ]
    assert np.argmax(steps) == len(steps) - 1
    assert steps[0] < 0.2
    assert steps[-1] > 0.95
    assert sum(path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file()) < 40_000_000
