"""The study `dtype-bill` on a model whose answer rests on one direction: what is lost is found, and rounding finds nothing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from actstore.arrays import encoding
from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.prepare import prepare
from actstore.queries import study
from actstore.queries.study import Answer
from actstore.store import Store
from actstore.verbs import patching
from tests.hops import TREES, hops
from tests.test_figures import assert_legible

MODEL = hops({1: ("goal", "root")})
SITES = ["resid_post.1", "resid_post.2"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32, what rounding leaves as good as it was, what a codec leaves equal, and what lost every number."""
    path = tmp_path_factory.mktemp("bill") / "s.act"
    execute(Ingest(path, MODEL, TREES, "r", SITES))
    execute(Ingest(path, MODEL, TREES, "half", SITES, dtype="float16"))
    execute(Ingest(path, MODEL, TREES, "small", SITES, codec="zstd"))
    with pytest.MonkeyPatch.context() as patch:
        whole = encoding.quantised
        patch.setattr(encoding, "quantised", lambda X: whole(torch.ones_like(X)))
        execute(Ingest(path, MODEL, TREES, "lost", SITES, dtype="int8"))
    return path


def ask(path: Path, run: str = "r", **options: object) -> Answer:
    with Store(path) as store:
        return study.ask(store, "dtype-bill", run, patch=patching(store), **{"repeats": 2, "trees": 60, **options})


@pytest.fixture(scope="module")
def answer(path: Path) -> Answer:
    return ask(path)


def test_what_was_lost_is_found_and_rounding_finds_nothing(answer: Answer) -> None:
    found = {test.label: test.estimate for test in answer.tests if test.found}
    assert {label.partition(", ")[0] for label in found} == {"int8"}
    assert found["int8, moved_change"] == pytest.approx(-0.5)  # a donor without a number moves half way: to no answer
    assert found["int8, predicted_right_change"] < -0.5
    assert found["int8, accuracy_change"] < -0.1
    assert found["int8, loss_change"] > 0.1
    assert {test.label.partition(", ")[0] for test in answer.tests} == {"float16", "int8"}
    assert len(answer.tests) == 8
    assert "8 changes against float32 are significant" in answer.sentence
    assert "stored as float32 zstd reads as float32's own numbers" in answer.sentence


def test_bytes_are_those_of_the_shards(path: Path, answer: Answer) -> None:
    with Store(path) as store:
        n_bytes = dict(store.sql("select run, sum(bytes)::bigint from shards group by run").rows())
    shares = dict(answer.results.filter(metric="share_of_bytes").select("label", "value").rows())
    expected = {"float32": "r", "float16": "half", "float32 zstd": "small", "int8": "lost"}
    assert shares == pytest.approx({label: n_bytes[run] / n_bytes["r"] for label, run in expected.items()})
    assert 0.49 < shares["float16"] < 0.51
    assert 0.25 < shares["int8"] < 0.35


def test_each_number_has_its_interval_and_says_of_how_many(answer: Answer) -> None:
    every = answer.results.filter(label="float16", metric="accuracy_change")
    of_site = every.filter(every["site"].is_not_null())
    whole = every.filter(every["site"].is_null()).row(0, named=True)
    assert whole["n"] == of_site["n"].sum()
    assert whole["low"] < whole["value"] == 0 < whole["high"]  # no change among so few trees excludes neither way
    speeds = answer.results.filter(metric="read_speed")
    assert len(speeds) == 3 * 2
    assert (speeds["low"] <= speeds["value"]).all()
    assert (speeds["value"] <= speeds["high"]).all()


def test_a_run_of_equal_numbers_is_equal_throughout(answer: Answer) -> None:
    row = answer.frame.filter(answer.frame["stored as"] == "float32 zstd").row(0, named=True)
    assert row["error %"] == "0.000"
    assert [value for name, value in row.items() if "points" in name or "loss" in name] == ["equal"] * 4
    errors = answer.results.filter(label="float32 zstd", metric="relative_error")
    assert set(errors["value"]) == {0.0}


def test_the_base_from_its_own_activations_changes_nothing(answer: Answer) -> None:
    control = answer.results.filter(metric="control_largest_change")
    assert set(control["site"]) == set(SITES)
    assert control["value"].max() < 1e-5


def test_the_same_question_has_the_same_answer_without_times(path: Path) -> None:
    one, other = (ask(path, repeats=0, sites="resid_post.2", trees=20) for _ in range(2))
    assert one.results.equals(other.results)
    assert not len(one.results.filter(metric="read_speed"))


def test_bad_input_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is stored as float16, and the bill is against float32; name r"):
        ask(path, "half")
    with pytest.raises(BadInput, match="no role 'stem'"):
        ask(path, role="stem")
    with pytest.raises(BadInput, match="repeats"):
        ask(path, repeats="often")
    execute(Ingest(tmp_path / "one.act", MODEL, TREES, "r", SITES))
    with pytest.raises(NotStored, match=r"no run of the model of 'r' .*--dtype int8"):
        ask(tmp_path / "one.act")
    job = prepare(tmp_path / "one.act", model_of="r", dataset=TREES.row()["dataset"], run="r-int8", dtype="int8")
    assert job.dtype == "int8"


def test_the_command_prints_records_and_draws(path: Path, tmp_path: Path) -> None:
    args = [
        "study",
        str(path),
        "dtype-bill",
        "--plot",
        str(tmp_path / "bill.png"),
        "-o",
        "repeats",
        "0",
        "-o",
        "trees",
        "20",
    ]
    done = subprocess.run([sys.executable, "-m", "actstore", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "int8" in done.stdout
    said = [line for line in done.stderr.splitlines() if not line.startswith(("figure: ", "study dtype-bill"))]
    assert said == [], "DuckDB says at exit what is still held"
    assert (tmp_path / "bill.png").stat().st_size > 10_000
    with Store(path) as store:
        assert store.sql("select count(*) from results where study = 'dtype-bill' and metric = 'p_holm'").item() == 8


def test_what_a_dtype_loses_is_confirmed_on_a_second_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = tmp_path / "s.act", encoding.quantised
    sets = {"": TREES, "2": replace(TREES, seed=77, name="second")}
    for of_set, trees in sets.items():
        execute(Ingest(path, MODEL, trees, f"r{of_set}", SITES))
    words = ["study", str(path), "dtype-bill", "--run", "r", "-o", "repeats", "0", "-o", "trees", "40"]
    words += ["--confirm", "second"]
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "quantised", lambda X: whole(torch.ones_like(X)))
        for of_set, trees in sets.items():
            execute(Ingest(path, MODEL, trees, f"lost{of_set}", SITES, dtype="int8"))
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "4 of 4 are confirmed on 'second'" in done.output


def test_the_figure_has_a_panel_for_each_question(answer: Answer) -> None:
    figure = study.plot(answer)
    assert_legible(figure)
    probes = answer.results.filter(metric="accuracy_change").drop_nulls("site")["token_role"].n_unique()
    assert len(figure.axes) == probes + 2
    assert "95 % intervals" in " ".join(figure.get_suptitle().split())
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(named) == 3
    assert sum("% of the bytes, its numbers equal" in name for name in named) == 1
    alone = answer.results.filter(pl.col("label").is_in(["float32", "float32 zstd"]))
    assert_legible(study.plot(replace(answer, results=alone)))
    assert np.isfinite(answer.results.filter(metric="accuracy_change")["value"].to_numpy()).all()
