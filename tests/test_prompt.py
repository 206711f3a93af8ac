"""The prompt of `actstore sql STORE`, without a terminal and on one; queries from files; tables and schema."""

from __future__ import annotations

import json
import os
import sys

import pexpect
import pytest
from click.testing import CliRunner
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from actstore.cli import main, prompt
from actstore.cli.output import Output
from actstore.store import Store
from tests.stores import fake


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("prompt") / "some.act"
    fake(sites=("embed",)).store(root)
    with Store(root) as store:
        store.view("late", "select * from tokens where position > 3")
    return root


@pytest.fixture
def store(root):
    with Store(root) as store:
        yield store


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def run(*arguments, **more):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **more)


def typed(store, capsys, text, answer=None):
    """What a prompt prints where a text is typed, and then Ctrl-D."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text(text + "\x04")
        prompt.converse(store, answer or store.rows, Output("csv"))
    return capsys.readouterr()


def test_queries_are_answered_one_after_another_over_several_lines(store, capsys):
    said = typed(store, capsys, "select 1 as a;\nselect 2\n  as b;\n;\n")
    assert said.out.endswith("a\n1\nb\n2\n")


def test_a_mistake_is_said_and_the_prompt_goes_on(store, capsys):
    said = typed(store, capsys, "select foo from tokens;\nselect 3 as c;\n.nothing\n.tabels\n")
    assert "foo" in said.err
    assert "did you mean '.tables'" in said.err
    assert said.out.endswith("c\n3\n")


def test_ctrl_c_stops_a_query_and_not_the_prompt(store, capsys):
    asked = []

    def answer(text):
        asked.append(text)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return store.rows(text)

    said = typed(store, capsys, "select 1;\nselect 4\x03select 5 as e;\n", answer)
    assert asked == ["select 1;", "select 5 as e;"]
    assert "was stopped" in said.err
    assert said.out.endswith("e\n5\n")


def test_commands_show_tables_columns_runs_and_queries(store, capsys):
    said = typed(
        store, capsys, ".tables\n.schema late\n.runs\n.query role_counts\n.output json\nselect 1 as a;\n.quit\n"
    )
    assert "tokens,table," in said.out
    assert "late,own view,," in said.out
    assert "late,token_id,BIGINT," in said.out
    assert "separator" in said.out
    assert said.out.endswith('[{"a": 1}]\n')
    assert all(command in typed(store, capsys, ".help\n").out for command in prompt.COMMANDS)


def test_the_history_is_kept_and_a_home_that_cannot_be_written_is_none(store, capsys, state, monkeypatch):
    typed(store, capsys, "select 6 as f;\n")
    assert "select 6 as f;" in (state / "actstore" / "history").read_text()
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    assert typed(store, capsys, "select 7 as g;\n").out.endswith("g\n7\n")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (".ta", ".tables"),
        (".schema tok", "tokens"),
        (".query accuracy_by_d", "accuracy_by_depth"),
        ("select * from lat", "late"),
        ("select tokens.pos", "tokens.position"),
        ("select t.pos", None),
        ("from tokens t where t.pos", "t.position"),
        ("select logit_", "logit_lens"),
        ("from trees where dep", "depth"),
    ],
)
def test_tab_completes_tables_columns_functions_queries_and_commands(store, text, word):
    found = [item.text for item in prompt.Words(store).get_completions(Document(text), CompleteEvent())]
    assert word in found if word else not found


def test_a_terminal_opens_the_prompt_in_which_ctrl_c_stops_a_query(root):
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "PAGER": "cat", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(
        sys.executable, ["-m", "actstore", "sql", str(root)], env=environment, encoding="utf-8", timeout=60
    )
    child.expect("some.act>")
    child.send("select count(*) from range(100000000000) a, range(1000) b;\r")
    for second in (3, 4):  # the time beside a spinner, which turns only while the query runs
        child.expect(f"sql.*0:00:0{second}")
    child.sendintr()
    child.expect("was stopped")
    child.expect("some.act>")  # what is typed before a prompt stands there may be lost
    child.send("select 'forty-' || 'two' as answer;\r")
    child.expect("forty-two")
    child.expect("some.act>")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_query_comes_from_a_file_from_standard_input_or_from_a_pipe(root, tmp_path):
    (tmp_path / "q.sql").write_text("select $a as a -- é\n;\n")
    expected = "a\nx\n"
    assert run("sql", root, "-f", tmp_path / "q.sql", "-p", "a", "x", "--csv").output == expected
    for arguments in (["-"], ["-f", "-"], []):
        done = run("sql", root, *arguments, "--csv", input="select 'x' as a")
        assert (done.exit_code, done.output) == (0, expected), (arguments, done.exception, done.stderr)
    assert run("sql", root, "-f", tmp_path / "none.sql").exit_code == 2
    assert "leave one out" in run("sql", root, "select 1", "-f", tmp_path / "q.sql").stderr


def test_tables_and_schema_list_what_there_is(root):
    rows = {row["table"]: row for row in json.loads(run("tables", root, "--json").output)}
    with Store(root) as store:
        assert len(rows) > 5
        assert set(rows) == set(store.tables)
        assert rows["tokens"]["rows"] == store.sql("select count(*) from tokens").item()
    assert (rows["edge_targets"]["kind"], rows["late"]["kind"], rows["tokens"]["kind"]) == ("view", "own view", "table")
    columns = json.loads(run("schema", root, "tokens", "--json").output)
    assert [column["column"] for column in columns][:2] == ["token_id", "tree_id"]
    assert len(json.loads(run("schema", root, "--json").output)) > len(columns)
    assert "did you mean 'tokens'" in run("schema", root, "tokenz").stderr
