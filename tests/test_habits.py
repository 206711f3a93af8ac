"""Habits of good tools: forms of output, the default store, --quiet, completion, a pager, exit codes, widths."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import click
import pexpect
import polars as pl
import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.queries import studies
from tests.stores import fake
from tests.test_cli import commands


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("habits") / "some.act"
    fake("one", sites=("embed", "resid_post.0")).store(root)
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("habits") / "two.act"
    fake("one", sites=("embed",)).store(root)
    fake("other", sites=("resid_post.0",)).store(root)
    return root


def run(*arguments, **more):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **more)


# The forms of output.


def test_every_form_of_output_holds_the_rows(root, tmp_path):
    query = "select 'a|b' as t, 1.5 as f, [1, 2] as l union all select null, 2, null order by f"
    lines = run("sql", root, query, "-o", "jsonl").output.splitlines()
    assert [json.loads(line) for line in lines] == json.loads(run("sql", root, query, "-o", "json").output)
    assert (
        run("sql", root, "select 'a|b' as t, 2 as n", "-o", "md").output == "| t | n |\n| --- | ---: |\n| a\\|b | 2 |\n"
    )
    content = run("sql", root, query, "-o", "parquet").stdout_bytes
    assert pl.read_parquet(io.BytesIO(content))["f"].to_list() == [1.5, 2.0]
    assert run("sql", root, query, "-o", "csv").output == run("sql", root, query, "--csv").output
    assert "choose one" in run("sql", root, query, "-o", "csv", "--json").stderr
    assert run("sql", root, query, "-o", "xml").exit_code == 2


def test_a_parquet_file_is_not_for_a_terminal(root):
    child = pexpect.run(f"{sys.executable} -m actstore sql {root} 'select 1' -o parquet", encoding="utf-8", timeout=60)
    assert "not for a terminal" in child


# The default store, and the one run.


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "--csv"],
        ["sql", "select 1 as a", "--csv"],
        ["sql", "-o", "csv", "select 1 as a"],
        ["tables", "-o", "csv"],
        ["schema", "tokens", "-o", "csv"],
        ["read", "select token_id from tokens limit 1", "--site", "embed", "--csv"],
        ["query", "role_counts", "-o", "csv"],
        ["show", "1"],
    ],
    ids=" ".join,
)
def test_the_store_of_the_environment_may_be_left_out(root, arguments):
    named = run(arguments[0], root, *arguments[1:])
    assert named.exit_code == 0, named.output
    told = run(*arguments, env={"ACTSTORE": str(root)})
    assert (told.exit_code, told.output) == (0, named.output)
    # a store that is named comes first
    assert run(arguments[0], root, *arguments[1:], env={"ACTSTORE": "/nowhere.act"}).output == named.output


def test_without_the_environment_the_store_is_asked_for():
    assert "Missing argument 'STORE'" in run("info", env={"ACTSTORE": ""}).stderr
    assert run("info", "--help", env={"ACTSTORE": "x.act"}).exit_code == 0


def test_the_one_run_of_a_store_need_not_be_named(root, two, tmp_path):
    assert (
        run("query", root, "accuracy_by_depth").output
        == run("query", root, "accuracy_by_depth", "-p", "run", "one").output
    )
    (tmp_path / "mine.sql").write_text("select $run as run")
    assert run("query", root, tmp_path / "mine.sql", "--csv").output == "run\none\n"
    assert "run" in run("query", two, "accuracy_by_depth").stderr
    assert run("query", two, "accuracy_by_depth").exit_code == 2


# --quiet, --version, help.


@pytest.mark.parametrize("path", [path for path in commands() if path != ("models",)], ids=" ".join)
def test_every_command_takes_quiet(path):
    assert "--quiet" in run(*path, "--help").output


def test_quiet_leaves_results_and_errors(root, tmp_path):
    out = tmp_path / "x.npz"
    assert run("read", root, "from tokens", "--site", "embed", "--out", out).output
    assert run("read", root, "from tokens", "--site", "embed", "--out", out, "--quiet").output == ""
    assert run("sql", root, "select 1 as a", "-q", "--csv").output == "a\n1\n"
    assert run("sql", root, "select 1", "-q", "--parquet", tmp_path / "x.parquet").output == ""
    assert run("sql", root, "select nope", "-q").stderr.startswith("actstore: ")
    assert run("verify", root, "--quick").stderr  # a later command is not quiet


def test_the_help_says_exit_codes_and_the_environment():
    shown = run("--help").output
    assert re.search(r"0\s+done", shown)
    assert all(name in shown for name in ("ACTSTORE ", "NO_COLOR", "PAGER", "Exit codes"))
    assert re.fullmatch(r"actstore, version \d+\.\d+\.\d+\n", run("--version").output)


@pytest.mark.parametrize("path", [(), *commands()], ids=" ".join)
def test_help_fits_80_columns_but_for_examples(path):
    shown = run(*path, "--help", env={"COLUMNS": "80"}).output.partition("Example:")
    rest = shown[2].partition("\nOptions:")[2]
    assert [line for line in (shown[0] + rest).splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("group", [[], ["models"]], ids=["actstore", "models"])
def test_a_list_of_commands_says_a_whole_sentence_of_each(group):
    listed = run(*group, "--help", env={"COLUMNS": "80"}).output.partition("Commands:")[2].partition("Environment:")[0]
    lines = [line for line in listed.splitlines() if line.strip()]
    assert len(lines) >= 3
    assert [line for line in lines if "..." in line or not line.endswith(".")] == []


def test_info_and_schema_are_short_in_a_table_and_whole_elsewhere(demo_path):
    table, whole = run("info", demo_path).stdout, run("info", demo_path, "-o", "csv").stdout
    assert "embed, resid_post.0 to resid_post.5" in table
    assert "embed resid_post.0 resid_post.1 resid_post.2" in whole
    table, whole = run("schema", demo_path, "tokens").stdout, run("schema", demo_path, "tokens", "-o", "csv").stdout
    assert "ENUM('<PAD>', ',', '|', ':', '0', '→0', '1', '→1', … 132 in all)" in table
    assert "'→63'" not in table
    assert "'→63'" in whole
    assert "'separator', 'bar', 'goal', 'colon', 'root', 'path')" in table, "few values are named"


def test_a_column_of_a_view_is_explained_as_the_column_that_it_is(demo_path):
    said = {
        (row["table"], row["column"]): row["comment"]
        for row in json.loads(run("schema", demo_path, "-o", "json").stdout)
    }
    assert said["edge_targets", "source"] == said["edges", "source"] != ""
    assert said["edge_targets", "depth"] == said["trees", "depth"]
    assert said["latest_results", "value"] == said["results", "value"]
    assert said["edge_targets", "token_id"] == said["tokens", "token_id"]
    assert {key for key, comment in said.items() if not comment and key[0] != "sequences"} == {
        ("answer_tokens", "next_node")
    }


def test_a_study_of_much_says_what_it_asks_before_it_begins(demo_path, monkeypatch):
    asked = ["study", demo_path, "depth", "--no-record", "--csv"]
    small = run(*asked)
    assert "may take minutes" not in small.stderr
    monkeypatch.setattr(studies, "MANY_SEQUENCES", 40)
    large = run(*asked)
    assert large.stderr.startswith("1 question to reproduction, 40 sequences in all: this may take minutes")
    assert large.stdout == small.stdout
    assert "may take minutes" not in run(*asked, "--quiet").stderr
    assert run(*asked, "--run", "nope").stderr.startswith("actstore: ")


# What a terminal gets.


def on_a_terminal(arguments, **environment):
    child = pexpect.spawn(
        sys.executable,
        ["-m", "actstore", *map(str, arguments)],
        env={**os.environ, "TERM": "xterm", **environment},
        encoding="utf-8",
        timeout=60,
        dimensions=(24, 80),
    )
    child.expect(pexpect.EOF)
    return child.before


def test_what_is_longer_than_the_screen_goes_through_the_pager(root):
    pager = f"{sys.executable} -c \"import sys; print(len(sys.stdin.readlines()), 'lines paged')\""
    long = ["sql", root, "select i from range(100) r(i)"]
    assert "102 lines paged" in on_a_terminal(long, PAGER=pager)
    assert "paged" not in on_a_terminal(["sql", root, "select 1"], PAGER=pager)
    assert "paged" not in on_a_terminal([*long, "--csv"], PAGER=pager)
    assert "40 more of 100 rows" in click.unstyle(on_a_terminal(long, PAGER="cat"))


def test_no_color_is_kept(root):
    wide = ["info", root]
    assert "\x1b[" in on_a_terminal(wide, PAGER="cat", NO_COLOR="")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", on_a_terminal(wide, PAGER="cat", NO_COLOR="1"))


@pytest.mark.parametrize(
    "command", [["info"], ["tables"], ["schema"], ["query"], ["sql", "from tokens"], ["show", "1"]], ids=" ".join
)
def test_a_terminal_of_80_columns_is_wide_enough(root, command):
    shown = on_a_terminal([command[0], root, *command[1:]], PAGER="cat")
    assert max(len(click.unstyle(line).rstrip()) for line in shown.splitlines()) <= 80


# Completion, by the protocol of click's shell functions.


def completed(line, shell="bash", **environment):
    words = line.split(" ")
    asked = {"bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}}
    asked["zsh"] = asked["bash"]
    asked["fish"] = {"COMP_WORDS": line, "COMP_CWORD": words[-1]}
    done = subprocess.run(
        [sys.executable, "-c", "from actstore.cli import main; main(prog_name='actstore')"],
        env={**os.environ, "_ACTSTORE_COMPLETE": f"{shell}_complete", **asked[shell], **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("actstore inf", ["info"]),
        ("actstore read STORE --run o", ["one"]),
        ("actstore read STORE --site re", ["resid_post.0"]),
        ("actstore query STORE accuracy_by_d", ["accuracy_by_depth"]),
        ("actstore schema STORE edge_t", ["edge_targets"]),
        ("actstore study STORE dep", ["depth"]),
        ("actstore sql STORE -o js", ["json", "jsonl"]),
        ("actstore drop STORE --dataset ", ["d"]),
        ("actstore read /nowhere.act --run o", []),
    ],
)
def test_a_shell_completes_what_the_store_holds(root, line, words):
    found = [row.partition(",")[2] for row in completed(line.replace("STORE", str(root))).splitlines() if row]
    assert found == words


def test_a_shell_completes_stores_and_the_store_of_the_environment_and_in_zsh_and_fish(root):
    assert f"plain,{root}" in completed(f"actstore info {str(root)[:-5]}").splitlines()
    assert "one" in completed("actstore read --run o", ACTSTORE=str(root))
    assert "one" in completed(f"actstore read {root} --run o", "zsh")
    assert "one" in completed(f"actstore read {root} --run o", "fish")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_that_a_shell_reads_is_printed(shell):
    done = subprocess.run(
        [sys.executable, "-c", "from actstore.cli import main; main(prog_name='actstore')"],
        env={**os.environ, "_ACTSTORE_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "_ACTSTORE_COMPLETE" in done.stdout
