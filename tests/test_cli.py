"""The command line: every command has an example, bad input is one line and an exit code, nothing heavy is imported for help."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result

from actstore.cli import main, progress
from actstore.store import Store
from tests.stores import files


def commands(group: click.Group = main, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found.append((*prefix, name))
        if isinstance(command, click.Group):
            found += commands(command, (*prefix, name))
    return found


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_line(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    said, *place = result.stderr.splitlines()
    assert said.startswith("actstore: ")
    assert not place or (len(place) == 2 and place[0].startswith("LINE ")), "the place in a query that was refused"
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("path", [(), *commands()], ids=" ".join)
def test_every_command_helps_with_an_example_that_names_it(path):
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert " ".join(("actstore", *path)) in result.output.partition("Example:")[2]


def test_every_command_on_a_store_takes_it_first():
    for path in commands():
        command = main
        for name in path:
            command = command.commands[name]
        if path[0] not in ("models", "train", "evaluate"):
            assert command.params[0].name == "store"


def test_help_imports_neither_torch_nor_duckdb():
    script = (
        "import sys; from click.testing import CliRunner; from actstore.cli import main; "
        "assert CliRunner().invoke(main, ['ingest', '--help']).exit_code == 0; "
        "assert not {'torch', 'duckdb', 'polars', 'zarr', 'transformer_lens'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_sql_prints_a_table_csv_json_and_parquet(demo_store, tmp_path):
    query = "select role, count(*) as n from tokens group by all order by role"
    expected = demo_store.sql(query)
    table = run("sql", demo_store.path, query)
    assert table.exit_code == 0
    assert "edge_target" in table.output
    assert run("sql", demo_store.path, query, "--csv").output == expected.write_csv()
    assert json.loads(run("sql", demo_store.path, query, "--json").output) == expected.to_dicts()
    parquet = tmp_path / "roles.parquet"
    assert run("sql", demo_store.path, query, "--parquet", parquet).exit_code == 0
    assert pl.read_parquet(parquet).to_dicts() == expected.to_dicts()


def test_sql_takes_parameters_by_name(demo_store):
    result = run("sql", demo_store.path, "select $a || $b as ab", "-p", "a", "x", "-p", "b", "y", "--csv")
    assert result.output == "ab\nxy\n"


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet"])
def test_read_writes_activations_beside_their_rows(demo_store, tmp_path, suffix):
    query = "select token_id, source, role_text from (select *, 'é' as role_text from edge_targets) where is_last"
    X, rows = demo_store.read(query, site="resid_post.0")
    out = tmp_path / f"x.{suffix}"
    assert run("read", demo_store.path, query, "--site", "resid_post.0", "--out", out).exit_code == 0
    if suffix == "npz":
        with np.load(out) as saved:
            found, ids, texts = saved["X"], saved["token_id"], saved["role_text"].tolist()
    elif suffix == "safetensors":
        from safetensors.torch import load_file

        saved = load_file(out)
        found, ids, codes = saved["X"].numpy(), saved["token_id"], saved["role_text"].tolist()
        vocabulary = json.loads(bytes(saved["role_text.vocabulary"].tolist()))
        texts = [vocabulary[code] for code in codes]
    else:
        saved = pl.read_parquet(out)
        found, ids, texts = saved["x"].to_numpy(), saved["token_id"].to_numpy(), saved["role_text"].to_list()
    np.testing.assert_array_equal(found, X)
    assert ids.tolist() == rows["token_id"].to_list()
    assert set(texts) == {"é"}


def test_show_draws_the_tree_its_prompt_and_the_answers(demo_store):
    result = run("show", demo_store.path, 3)
    assert result.exit_code == 0
    words = demo_store.sql("select token::varchar from tokens where tree_id = 3 order by position").to_series()
    assert " ".join(words) in result.output
    assert "← goal" in result.output
    greedy = demo_store.sql("select greedy_path from outcomes where tree_id = 3").item()
    root = demo_store.sql("select root from trees where tree_id = 3").item()
    assert " →".join(map(str, [root, *greedy])) in result.output


def test_info_names_runs_trees_and_sites(demo_store):
    (row,) = json.loads(run("info", demo_store.path, "--json").output)
    assert (row["run"], row["sequences"], row["planned"]) == ("reproduction", 40, 40)
    assert row["sites"].split() == demo_store.sites("reproduction")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["sql", "STORE", "select foo from tokens"], 2, ["foo", "token"]),
        (["sql", "STORE", "select 1 from tokenz"], 2, ["tokenz", "tokens"]),
        (["sql", "STORE", "create table t (i int)"], 2, []),
        (["sql", "STORE", "select $a"], 2, ["a"]),
        (["sql", "EMPTY", "select 1"], 1, ["no actstore store", "actstore ingest"]),
        (["sql", "MISSING", "select 1"], 1, ["does not exist", "actstore ingest"]),
        (["read", "STORE", "select 1 as one"], 2, ["one", "token_id"]),
        (["read", "STORE", "select null::bigint as token_id"], 2, ["NULL"]),
        (["read", "STORE", "select 'x' as token_id"], 2, ["integer"]),
        (["read", "STORE", "select 999999999 as token_id"], 1, ["999999999"]),
        (["read", "STORE", "select 255::bigint as token_id"], 1, ["255"]),
        (["read", "STORE", "select token_id from tokens", "--run", "nope"], 1, ["nope", "reproduction"]),
        (
            ["read", "STORE", "select token_id from tokens", "--site", "resid_post.9"],
            1,
            ["resid_post.9", "resid_post.5"],
        ),
        (["read", "STORE", "select token_id from tokens", "--out", "x.pickle"], 2, [".npz"]),
        (["show", "STORE", "4711"], 1, ["4711", "40 trees"]),
        (["query", "STORE", "acuracy_by_depth"], 1, ["acuracy_by_depth", "accuracy_by_depth"]),
        (["query", "STORE", "accuracy_by_depth", "-p", "rum", "x"], 2, ["rum", "run"]),
        (["train", "reproductoin", "OUT"], 2, ["reproductoin"]),
        (["train", "reproduction", "OUT", "--device", "abacus"], 2, ["abacus"]),
        (["evaluate", "reproduction", "--checkpoint", "3"], 1, ["checkpoint 3 of reproduction", "250"]),
        (["evaluate", "nope"], 1, ["nope", "reproduction"]),
        (["evaluate", "reproduction", "--trees", "0"], 2, ["0"]),
        (["study", "STORE", "probs"], 1, ["probs", "probes"]),
        (["study", "STORE", "probes", "--plot", "x.foo"], 2, ["x.foo", ".png"]),
        (["ingest", "STORE", "--model", "nope"], 1, ["nope", "reproduction"]),
        (["ingest", "STORE", "--model", "reproduction", "--checkpoint", "3"], 1, ["checkpoint 3", "250"]),
        (["ingest", "STORE", "--model", "reproduction", "--nodes", "17"], 2, ["17", "16"]),
        (["ingest", "STORE", "--model", "reproduction", "--trees", "0"], 2, ["0"]),
        (["ingest", "STORE", "--model", "reproduction", "--distribution", "shallow"], 2, ["shallow", "deep"]),
        (["ingest", "STORE", "--model", "reproduction", "--sites", "resid_pots"], 2, ["resid_pots", "resid_post"]),
        (["ingest", "STORE", "--model", "reproduction", "--depths", "1-3"], 2, ["deep"]),
        (["ingest", "STORE", "--model", "reproduction", "--run", "../up"], 2, ["../up"]),
        (["ingest", "STORE", "--model", "reproduction", "--trees", "41"], 2, ["reproduction", "--run"]),
        (
            ["ingest", "STORE", "--model", "reproduction", "--trees", "40", "--batch-size", "5"],
            2,
            ["batch_size", "--run"],
        ),
        (["ingest", "STORE", "--model", "reproduction", "--device", "abacus"], 2, ["abacus"]),
        (["ingest", "FULL", "--model", "reproduction", "--trees", "2000000000"], 1, ["GB", "free"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_an_exit_code_and_leaves_the_store_as_it_was(
    demo_store, tmp_path, arguments, code, words
):
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {
        "STORE": demo_store.path,
        "EMPTY": empty,
        "MISSING": tmp_path / "missing",
        "FULL": tmp_path / "full.act",
        "OUT": tmp_path / "out",
    }
    before = files(demo_store.path)
    assert_one_line(run(*[places.get(argument, argument) for argument in arguments]), code, *words)
    assert files(demo_store.path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_two_output_formats_are_a_usage_error(demo_store):
    result = run("sql", demo_store.path, "select 1", "--csv", "--json")
    assert result.exit_code == 2


def test_repair_rebuilds_the_catalog(demo_store, tmp_path):
    import shutil

    copy = tmp_path / "copy.act"
    shutil.copytree(demo_store.path, copy)
    (copy / "catalog.duckdb").unlink()
    assert_one_line(run("info", copy), 1, "actstore repair")
    assert run("repair", copy).exit_code == 0
    assert run("info", copy, "--json").output == run("info", demo_store.path, "--json").output


def test_models_are_added_by_name_and_found_by_it(tmp_path):
    shipped = Path(__file__).parents[1] / "data" / "checkpoints" / "reproduction.safetensors"
    added = run("models", "add", "mine", shipped, "--into", tmp_path)
    assert added.exit_code == 0, added.output
    assert (tmp_path / "mine.safetensors").read_bytes() == shipped.read_bytes()
    assert "the name mine is not looked up there; set ACTSTORE_MODELS" in added.stderr
    listed = CliRunner().invoke(main, ["models", "list", "--csv"], env={"ACTSTORE_MODELS": str(tmp_path)})
    assert "mine" in listed.output


@pytest.mark.parametrize("told", ["ACTSTORE_MODELS", "XDG_DATA_HOME", "HOME"])
def test_an_added_model_is_found_from_the_next_folder_and_the_list_says_where_it_is(tmp_path, monkeypatch, told):
    monkeypatch.setenv("XDG_DATA_HOME", "")
    monkeypatch.setenv(told, str(tmp_path / "told"))
    inside = {"ACTSTORE_MODELS": "", "XDG_DATA_HOME": "actstore/models", "HOME": ".local/share/actstore/models"}
    shipped = Path(__file__).parents[1] / "data" / "checkpoints" / "baseline.safetensors"
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    added = run("models", "add", "mine", shipped)
    assert added.exit_code == 0, added.output
    assert not added.stderr
    assert not list((tmp_path / "here").iterdir())
    monkeypatch.chdir(tmp_path / "there")
    rows = {row["model"]: row for row in json.loads(run("models", "list", "--json").output)}
    weights = tmp_path / "told" / inside[told] / "mine.safetensors"
    assert (rows["mine"]["file"], rows["mine"]["weights"]) == (str(weights), rows["baseline"]["weights"])
    assert weights.read_bytes() == shipped.read_bytes()
    assert run("evaluate", "mine", "--trees", "0").stderr.startswith("actstore: got 0 trees")


def test_a_model_added_under_a_name_that_means_another_one_here_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    shipped = Path(__file__).parents[1] / "data" / "checkpoints" / "baseline.safetensors"
    assert run("models", "add", "mine", shipped, "--into", "data/checkpoints").stderr == ""
    assert "here the name mine means data/checkpoints/mine.safetensors" in run("models", "add", "mine", shipped).stderr


def test_a_model_whose_configuration_is_wrong_hides_no_other_from_the_list(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTSTORE_MODELS", str(tmp_path))
    (tmp_path / "broken.safetensors").write_bytes(b"")
    (tmp_path / "broken.yaml").write_text("n_nodes: [")
    rows = {row["model"]: row for row in json.loads(run("models", "list", "--json").output)}
    assert (rows["broken"]["system"], rows["broken"]["n_layers"]) == (None, None)
    assert (rows["reproduction"]["system"], rows["reproduction"]["checkpoints"]) == (
        "reproduction",
        [0, 250, 500, 1000, 2000, 5000],
    )


def test_a_model_is_trained_graded_and_its_moments_stored_as_runs_over_the_same_trees(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_LINE", 0.0)
    monkeypatch.setattr(progress, "LONG", 0.0)
    config, out, store = tiny_config(tmp_path), tmp_path / "runs" / "tiny", tmp_path / "tiny.act"
    trained = run("train", config, out, "--grade", "50")
    assert trained.exit_code == 0, trained.output
    assert "tiny.md is its card" in trained.output
    assert "at this rate the rest takes about" in trained.stderr
    assert "saved every 25 steps" in trained.stderr
    assert pl.read_ndjson(out / "tiny.jsonl")["step"].to_list() == [25, 30]

    weights = out / "tiny.safetensors"
    graded = json.loads(run("evaluate", weights, "--trees", "60", "--json").stdout)
    assert (graded["n_trees"], graded["distributions"]) == (60, ["reproduction", "baseline", "deep"])
    assert [row["n_trees"] for row in graded["table"] if row["depth"] is row["edges"] is None] == [60, 60, 60]
    assert graded["n_left_out"]["reproduction"] > 0  # of the few trees of 5 nodes, its training saw some
    again = run("evaluate", weights, "--trees", "60", "--checkpoint", "0")
    assert "tiny-step0" in again.stderr

    for more in ([], ["--checkpoint", "0"]):
        stored = run("ingest", store, "--model", weights, "--trees", "20", *more)
        assert stored.exit_code == 0, stored.output
    with Store(store) as opened:
        runs = opened.sql("select run, source, dataset from runs join models using (weights_sha256) order by run")
        assert runs["run"].to_list() == ["tiny", "tiny-step0"]
        assert runs["dataset"].n_unique() == 1
        differ = [opened.read("select token_id from edge_targets", run=name, site="embed")[0] for name in runs["run"]]
        assert differ[0].shape == differ[1].shape
        assert not np.array_equal(*differ)


def tiny_config(folder, steps=30):
    config = folder / "tiny.yaml"
    sizes = "d_model: 32, d_head: 16, n_layers: 2, act_fn: gelu, attention_dir: causal"
    config.write_text(
        f"n_nodes: 5\nmodel: {{{sizes}}}\nbatch_size: 8\nmax_iters: {steps}\ntraining: {{curriculum: 0.5}}\n"
    )
    return config


@pytest.mark.parametrize(
    ("stopped_at", "said"),
    [
        (1, "nothing was kept yet (the state is saved every 25 steps), and the same command starts over"),
        (25, "nothing was kept yet"),  # it is learnt, and not yet saved
        (26, "step 25 is kept in OUT, and the same command goes on from there"),
        (70, "step 50 is kept in OUT, and the same command goes on from there"),
    ],
)
def test_a_training_that_is_stopped_says_what_it_kept_and_goes_on_from_that(tmp_path, monkeypatch, stopped_at, said):
    from actstore.ingest.training.learner import Learner

    config, out, learn = tiny_config(tmp_path, 75), tmp_path / "out", Learner.learn

    def stopped(learner, pool):
        tally = learn(learner, pool)
        if learner.step == stopped_at:
            raise KeyboardInterrupt
        return tally

    whole = tmp_path / "whole"
    assert run("train", config, whole, "--grade", "1").exit_code == 0
    monkeypatch.setattr(Learner, "learn", stopped)
    first = run("train", config, out, "--grade", "1")
    assert_one_line(first, 1, "actstore: stopped; " + said.replace("OUT", str(out)))
    begun = []
    monkeypatch.setattr(Learner, "learn", lambda learner, pool: begun.append(learner.step) or learn(learner, pool))
    assert run("train", config, out, "--grade", "1").exit_code == 0
    assert begun[0] == max(0, (stopped_at - 1) // 25 * 25)
    assert (out / "tiny.safetensors").read_bytes() == (whole / "tiny.safetensors").read_bytes()


def test_a_training_that_leaves_no_tree_to_grade_on_is_refused_before_it_begins(tmp_path):
    refused = run("train", "reproduction", tmp_path / "out", "--nodes", "4")
    assert_one_line(refused, 2, "sees nearly all", "trees of 4 nodes", "(--nodes)", "(--steps)")
    assert not (tmp_path / "out").exists()
    done = run("train", tiny_config(tmp_path, 2), tmp_path / "out", "--nodes", "4", "--grade", "1")
    assert done.exit_code == 0, done.output


def test_a_whole_store_is_verified_without_a_table(demo_path):
    assert run("verify", demo_path).stdout == ""
    assert json.loads(run("verify", demo_path, "--json").stdout) == []


def test_an_ingest_that_is_stopped_before_its_first_commit_promises_nothing(tmp_path, monkeypatch):
    from actstore.ingest.jobs.job import Ingest

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Ingest, "answers", stopped)
    first = run("ingest", tmp_path / "s.act", "--model", "reproduction", "--trees", "8", "--sites", "none")
    assert_one_line(first, 1, "stopped; nothing was committed yet, and the same command starts over")


def test_a_ctrl_c_that_python_wraps_while_it_loads_a_class_is_a_ctrl_c(demo_path, monkeypatch):
    from actstore import store

    def stopped(*_):
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()

    monkeypatch.setattr(store, "Store", stopped)
    assert_one_line(run("tables", demo_path), 1, "actstore: stopped")


def test_ctrl_c_keeps_what_was_committed_and_says_how_to_go_on(tmp_path):
    store = tmp_path / "s.act"
    command = [
        sys.executable,
        "-c",
        "from actstore.cli import main; main()",
        "ingest",
        str(store),
        "--model",
        "reproduction",
    ]
    process = subprocess.Popen([*command, "--trees", "20000", "--sites", "embed"], stderr=subprocess.PIPE, text=True)
    while not (store / "log" / "00000002.json").exists():  # the first batch
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(
        r"actstore: stopped; \d+ of 20 batches are committed, and the same command goes on from there",
        errors.splitlines()[-1],
    )
    assert "Traceback" not in errors
    (row,) = json.loads(run("info", store, "--json").output)
    assert 0 < row["sequences"] < row["planned"] == 20_000
    X, rows = Store(store).read("select token_id from tokens where tree_id = 0", site="embed")
    assert len(X) == len(rows) > 0
