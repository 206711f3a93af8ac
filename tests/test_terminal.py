"""Streams that are closed, narrow or left by their reader, and values that would steer a terminal: in real processes."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import unicodedata

import click
import polars as pl
import pytest
from click.testing import CliRunner

from actstore.cli import main, progress
from actstore.cli.tables import print_table
from actstore.cli.terminal import wrapped
from actstore.outputs import printable

ACTSTORE = [sys.executable, "-c", "from actstore.cli import main; main()"]
COMMANDS = [
    ["sql", "STORE", "select '→' as arrow, 'é' as accent"],
    ["sql", "STORE", "select '→' as arrow", "--csv"],
    ["sql", "STORE", "select '→' as arrow", "--json"],
    ["show", "STORE", "3"],
    ["query", "STORE"],
    ["--help"],
]


def command(arguments, path):
    return [*ACTSTORE, *(str(path) if word == "STORE" else word for word in arguments)]


def run(arguments, path, **options):
    return subprocess.run(
        command(arguments, path), capture_output=True, timeout=120, encoding=options.pop("encoding", None), **options
    )


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_an_ascii_stdout_takes_any_text(demo_path, arguments):
    done = run(arguments, demo_path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout


@pytest.mark.parametrize(
    "arguments", [["sql", "STORE", "select chr(8594) as arrow"], ["show", "STORE", "3"]], ids=" ".join
)
def test_a_c_locale_takes_any_text(demo_path, arguments):
    in_c_locale = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = run(arguments, demo_path, env=in_c_locale)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u21" in done.stdout or b"\\u25" in done.stdout


def test_data_comes_out_whole_where_stdout_is_ascii(demo_path):
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    query = "select '→ 😀' as arrow"
    done = run(["sql", "STORE", query, "--csv"], demo_path, env=ascii_only, encoding="utf-8")
    assert list(csv.reader(io.StringIO(done.stdout))) == [["arrow"], ["→ 😀"]]
    assert json.loads(run(["sql", "STORE", query, "--json"], demo_path, env=ascii_only).stdout) == [{"arrow": "→ 😀"}]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("arguments", [*COMMANDS[:4], ["sql", "STORE", "select 1", "--timeout", "30"]], ids=" ".join)
def test_streams_that_are_closed_are_as_if_they_led_nowhere(demo_path, arguments, closed):
    done = without(closed, command(arguments, demo_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (closed in ("2>&-", "<&-"))


def without(closed, words):
    return subprocess.run(
        ["/bin/bash", "-c", f'exec "$@" {closed}', "bash", *words], capture_output=True, timeout=120, text=True
    )


def test_a_file_never_gets_the_number_of_a_closed_stdout():
    script = "import sys; from actstore.cli import terminal; terminal.prepare(); sys.stderr.write(str(open('/dev/zero').fileno()))"
    assert int(without("<&- >&-", [sys.executable, "-c", script]).stderr) > 2


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "arguments",
    [*COMMANDS, ["sql", "STORE", "from tokens", "--csv"], ["sql", "STORE", "select nope"], ["--version"]],
    ids=" ".join,
)
def test_a_reader_that_has_left_is_no_traceback(demo_path, arguments, stream):
    reading, writing = os.pipe()
    os.close(reading)
    other = "stderr" if stream == "stdout" else "stdout"
    done = subprocess.run(
        command(arguments, demo_path), **{stream: writing, other: subprocess.PIPE}, timeout=120, text=True
    )
    os.close(writing)
    fails = "nope" in arguments[-1]
    assert done.returncode == (2 if fails and stream == "stdout" else 1 if fails or stream == "stdout" else 0)
    assert "Traceback" not in (getattr(done, other) or "")
    if stream == "stdout" and not fails:
        assert done.stderr == ""


@pytest.mark.parametrize("arguments", [COMMANDS[0], COMMANDS[1], ["--help"]], ids=" ".join)
def test_a_stdout_without_room_is_one_line(demo_path, arguments):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(arguments, demo_path), stdout=full, stderr=subprocess.PIPE, timeout=120, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "actstore: stdout: No space left on device\n"


# Values and names that are not what they seem.

STRANGE = ["[/]", "[red]x[/]", "[bold", "a\\[b]", ":smile:", "[link=http://x]y[/link]"]


@pytest.mark.parametrize("text", STRANGE)
def test_a_table_shows_headers_and_values_as_they_are(capsys, text):
    print_table(pl.DataFrame({text: [text], "list": [[text]]}))
    assert capsys.readouterr().out.count(text) == 3
    wide = pl.DataFrame({text: [text + "." * 11_000]})  # shown as a block
    print_table(wide)
    assert capsys.readouterr().out.count(text) == 2


def narrow(monkeypatch):
    """A terminal of 80 columns; called in a test's body, since capsys puts stdout in place between its phases."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)


MANY = pl.DataFrame(
    {
        "name": [f"the_name_of_query_{i}" for i in range(12)],
        "interval": ["[99.05, 100.00]"] * 12,
        "n": [1234567 + i for i in range(12)],
        "text": [f"begins{i} with a step, as if a goal stood there, and goes on to a leaf" for i in range(12)],
    }
)


def test_a_narrow_terminal_cuts_no_number_and_no_text(monkeypatch, capsys):
    narrow(monkeypatch)
    print_table(MANY)
    shown = click.unstyle(capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert all(str(value) in shown for row in MANY.select("name", "interval", "n").rows() for value in row)
    assert {*" ".join(MANY["text"]).split()} <= {*shown.split()}


def test_rows_too_wide_to_be_narrowed_come_in_parts_each_after_the_first_column(monkeypatch, capsys):
    narrow(monkeypatch)
    wide = MANY.select("n", "name", *(pl.col("n").alias(f"number{i}") for i in range(9)))
    print_table(pl.concat([wide] * 6))
    shown = click.unstyle(capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 80
    parts = [part.splitlines() for part in shown.rstrip().split("\n\n")]
    assert parts.pop() == ["… 12 more of 72 rows (--csv, --json and --parquet give all)"]
    headers = [part[0].split() for part in parts]
    assert all(header[0] == "n" for header in headers)
    assert [name for header in headers for name in header[1:]] == wide.columns[1:] * 3, "20 rows of 60 are together"
    rows = [row.split()[0] for part in parts for row in part[2:] if part[0].split()[1] == "name"]
    assert rows == [str(n) for n in [*MANY["n"]] * 5]


def test_parts_begin_with_what_tells_rows_apart_and_empty_columns_are_only_named(monkeypatch, capsys):
    narrow(monkeypatch)
    numbers = {f"number{i}": [12345678901] * 2 for i in range(6)}
    wide = pl.DataFrame({"run": ["r"] * 2, "site": ["a", "b"], "none": [None] * 2, **numbers})
    print_table(wide)
    shown = click.unstyle(capsys.readouterr().out).splitlines()
    headers = [line.split() for line in shown if line.startswith("run")]
    assert headers == [["run", "site", *[*numbers][:5]], ["run", "site", *[*numbers][5:]]]
    assert [line.split()[:2] for line in shown if line.startswith("r ")] == [["r", "a"], ["r", "b"]] * 2
    assert shown[-1] == "Empty in these rows: none."
    print_table(wide.with_columns(site=pl.lit("a")))
    shown = click.unstyle(capsys.readouterr().out).splitlines()
    assert [line.split()[:2] for line in shown if line.startswith("run")] == [["run", "site"], ["run", "number5"]]


def test_a_narrowed_table_keeps_words_whole_and_gives_the_longest_text_the_most_room(monkeypatch, capsys):
    narrow(monkeypatch)
    names = [f"a_name_without_a_blank_{i:02}" for i in range(12)]  # of 25 characters
    print_table(
        pl.DataFrame(
            {
                "name": names,
                "short": ["run, token_role, site, and a label"] * 12,
                "text": [f"{text} and on" for text in MANY["text"]],
            }
        )
    )
    lines = click.unstyle(capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[2:] if line[0] != " "] == names
    header = lines[0]
    assert len(header) - header.index("text") > header.index("text") - header.index("short")


def test_a_row_alone_is_a_block_and_two_are_a_table_in_parts_that_cuts_nothing(monkeypatch, capsys):
    narrow(monkeypatch)
    wide = pl.DataFrame({"id": [1, 2], "x": [[0.123456] * 16] * 2, "text": [" ".join(MANY["text"])] * 2, "n": [7, 8]})
    print_table(wide)
    of_two = click.unstyle(capsys.readouterr().out)
    assert max(map(len, of_two.splitlines())) <= 80
    assert [line.split() for line in of_two.splitlines() if line.startswith("id")] == [
        ["id", "x"],
        ["id", "text"],
        ["id", "n"],
    ]
    assert of_two.count("0.123456") == 2 * 16
    assert "…" not in of_two
    assert of_two.split().count("begins7") == 2
    print_table(wide.head(1))
    assert [
        line.split()[0] for line in click.unstyle(capsys.readouterr().out).splitlines() if line[:1].strip()
    ] == wide.columns


def test_a_long_list_alone_is_cut(monkeypatch, capsys):
    narrow(monkeypatch)
    print_table(MANY.select("n", x=pl.lit([0.123456] * 128)))
    lines = click.unstyle(capsys.readouterr().out).splitlines()
    assert len(lines) == 2 + 12
    assert all(line.rstrip().endswith("…") for line in lines[2:])


def test_a_sentence_is_broken_between_words_at_the_end_of_the_line(monkeypatch):
    narrow(monkeypatch)
    words = " ".join(MANY["text"])
    assert max(map(len, wrapped(words).splitlines())) <= 80
    assert wrapped(words).split() == words.split()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert wrapped(words) == words


def test_an_indented_line_goes_on_indented(monkeypatch):
    narrow(monkeypatch)
    for mark in ("  ", "! "):
        first, *others = wrapped(f"{mark}{' '.join(MANY['text'])}").splitlines()
        assert first.startswith(f"{mark}{MANY['text'][0][:1]}")
        assert others
        assert all(line.startswith("    ") and line[4] != " " and len(line) <= 80 for line in others)


def test_a_command_to_be_copied_and_a_line_under_a_caret_are_not_broken(monkeypatch):
    narrow(monkeypatch)
    command = "`actstore ingest demo.act --model reproduction --trees 2000`"
    assert wrapped(f"run r holds no site embed; it holds resid_post.0: {command}").splitlines()[1] == command
    shown = f"the query was refused\nLINE 1: select {'a, ' * 40}b\n{' ' * 90}^"
    assert wrapped(shown).splitlines()[1] == shown.splitlines()[1]


def test_a_tree_is_as_narrow_as_the_terminal(demo_store, monkeypatch, capsys):
    narrow(monkeypatch)
    main(["show", str(demo_store.path), "3"], standalone_mode=False)
    shown = click.unstyle(capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 80
    prompt = shown.partition("prompt  ")[2].partition("path  ")[0]
    assert not any(line.strip().startswith("→") for line in prompt.splitlines())
    words = demo_store.sql("select token::varchar as t from tokens where tree_id = 3 order by position")["t"]
    assert prompt.split() == " ".join(words).split()


@pytest.mark.parametrize("text", ["\x1b[31m", "\x9b31m", "\x07", "\r", "\x00", "\u202e", "\u2028", "\x7f"])
def test_what_would_steer_a_terminal_is_written_out(demo_path, capsys, text):
    print_table(pl.DataFrame({text: [text], "list": [[text]]}))
    shown = capsys.readouterr().out
    assert not set(shown) & set(text) - set("[31m")
    assert shown.count(repr(text)[1:-1].replace("\\r", "\\r")) == 3
    for message in (
        CliRunner().invoke(
            main, ["sql", str(demo_path), f"select error('{text}x')"] if text != "\x00" else ["sql", "x", "y"]
        ),
        CliRunner().invoke(main, ["study", str(demo_path), text]),
        CliRunner().invoke(main, ["sql", str(demo_path), "select 1", "--parquet", f"/nowhere{text}/x"]),
    ):
        assert message.exit_code in (1, 2)
        assert not {unicodedata.category(character) for character in message.stderr.replace("\n", "")} & {"Cc", "Cf"}


def test_data_keeps_every_character(demo_path):
    query = "select chr(27) || '[31m' || chr(155) as value"
    assert (
        json.loads(CliRunner().invoke(main, ["sql", str(demo_path), query, "--json"]).stdout)[0]["value"]
        == "\x1b[31m\x9b"
    )
    assert CliRunner().invoke(main, ["sql", str(demo_path), query, "--csv"]).stdout == "value\n\x1b[31m\x9b\n"


def test_ordinary_text_of_any_script_is_left_as_it_is():
    for text in ("→ 17", "naïve Straße", "日本語", "שלום", "a\tb\nc", "😀", "\u00a0"):
        assert printable(text) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_shows_a_name_as_it_is(monkeypatch, stream):
    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_LINE", 0.0)
    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_BAR", 0.0)
    monkeypatch.setattr("sys.stderr", said := stream())
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress("train [/] \x07", 2, "steps") as advance:
        advance(1, part="[/b]\x07")
        advance(2, part="[/b]\x07")
    assert "train [/] \\x07" in said.getvalue()
    assert "[/b]\\x07" in said.getvalue()


def test_progress_that_nobody_reads_stops_no_work(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_LINE", 0.0)
    monkeypatch.setattr("sys.stderr", Broken())
    with progress.progress("study", 2, "parts") as advance:
        advance(1)
        advance(2)
