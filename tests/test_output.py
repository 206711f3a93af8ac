"""What leaves the store: any column in CSV, JSON and activation files, and the words beside it on a terminal."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import click
import nbformat
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient
from safetensors import safe_open
from safetensors.numpy import load_file

from actstore.cli import main, progress
from actstore.cli.activation_files import save_activations
from actstore.cli.output import Output
from actstore.cli.tables import print_table
from actstore.errors import BadInput
from actstore.sql.session import Session
from actstore.store import Store
from tests.stores import fake

X = np.arange(6, dtype=np.float32).reshape(2, 3)
# a SQL value, and what JSON says of it
NESTED = [
    ("[[1, 2], [3]]", [[1, 2], [3]]),
    ("[1, null]", [1, None]),
    ("{'a': 1, 'b': ['é']}", {"a": 1, "b": ["é"]}),
    ("[date '2020-01-31']", ["2020-01-31"]),
    ("[[time '10:00'], null]", [["10:00:00"], None]),
    ("[1.50::decimal(5, 2)]", ["1.50"]),
    ("['ab'::blob]", ["6162"]),
    ("[[1.5, 2], [3, 4]]::float[2][2]", [[1.5, 2.0], [3.0, 4.0]]),
    ("['nan'::float, 'inf', 1]", [None, None, 1.0]),
    ("{'x': '-inf'::double}", {"x": None}),
    ("map {date '2020-01-31': 1}", {"2020-01-31": 1}),
]
# a SQL value, and how .npz holds it beside a NULL; .safetensors holds the same numbers, or codes of the texts
PLAIN = [
    ("true", ["True", "None"]),
    ("1.25::decimal(5, 2)", [1.25, math.nan]),
    ("7::hugeint", [7.0, math.nan]),
    ("7::uhugeint", [7.0, math.nan]),
    ("3::smallint", [3.0, math.nan]),
    ("'é'", ["é", "None"]),
    ("date '2020-01-31'", ["2020-01-31", "None"]),
    ("'ab'::blob", ["6162", "None"]),
    ("[[1], null]", ["[[1], null]", "None"]),
    ("[1, 2]::float[2]", ["[1.0, 2.0]", "None"]),
    ("{'a': [date '2020-01-31']}", ['{"a": ["2020-01-31"]}', "None"]),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("output") / "some.act"
    fake(sites=("embed", "pattern.0")).store(root)
    return root


@pytest.fixture(scope="module")
def session(root: Path) -> Session:
    return Session(root / "catalog.duckdb")


def beside_null(session: Session, value: str) -> pl.DataFrame:
    return session.sql(f"select case when i = 0 then {value} end as c from range(2) r(i) order by i")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def strict_json(text: str) -> object:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


# Nested columns and bytes, in CSV and JSON.


@pytest.mark.parametrize(("value", "expected"), NESTED, ids=[value for value, _ in NESTED])
def test_a_nested_column_is_json_in_csv_and_in_json(session, capsys, value, expected):
    frame = beside_null(session, value)
    Output("csv").write(frame)
    (header, (cell,), empty) = csv.reader(io.StringIO(capsys.readouterr().out))
    assert (header, empty) == (["c"], [])
    assert strict_json(cell) == expected
    Output("json").write(frame)
    assert strict_json(capsys.readouterr().out) == [{"c": expected}, {"c": None}]


def test_bytes_are_hexadecimal(session, capsys):
    frame = beside_null(session, "'\\x00a\\xff'::blob")
    Output("csv").write(frame)
    assert capsys.readouterr().out == "c\n0061ff\n\n"
    Output("json").write(frame)
    assert json.loads(capsys.readouterr().out) == [{"c": "0061ff"}, {"c": None}]


@given(values=st.lists(st.lists(st.floats() | st.none()) | st.none(), min_size=1), plain=st.floats() | st.none())
def test_json_keeps_every_finite_number_and_says_null_for_the_others(values, plain):
    def known(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    frame = pl.DataFrame({"c": values, "d": [plain] * len(values)}, schema={"c": pl.List(pl.Float64), "d": pl.Float64})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out := io.StringIO())
        Output("json").write(frame)
    expected = [{"c": v if v is None else [known(x) for x in v], "d": known(plain)} for v in values]
    assert strict_json(out.getvalue()) == expected


# Columns beside activations.


@pytest.mark.parametrize(("value", "expected"), PLAIN, ids=[value for value, _ in PLAIN])
def test_every_type_of_column_is_saved_and_loads_without_pickle(session, tmp_path, value, expected):
    rows = beside_null(session, value)
    save_activations(str(tmp_path / "x.npz"), X, rows)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as saved:
        assert sorted(saved.files) == ["X", "c"]
        np.testing.assert_array_equal(saved["X"], X)
        np.testing.assert_array_equal(saved["c"], expected)
    save_activations(out := str(tmp_path / "x.safetensors"), X, rows)
    tensors = load_file(out)
    np.testing.assert_array_equal(tensors["X"], X)
    if isinstance(expected[0], float):
        np.testing.assert_array_equal(tensors["c"], expected)
    else:
        assert tensors["c"].tolist() == [0, -1]
        assert vocabulary(tensors, "c") == expected[:1]
    with safe_open(out, "numpy") as saved:
        assert not saved.metadata()


def vocabulary(tensors: dict[str, np.ndarray], name: str) -> list[str]:
    return json.loads(bytes(tensors[f"{name}.vocabulary"].tolist()))


def test_text_in_safetensors_is_codes_of_the_sorted_texts_and_vectors_are_a_matrix(session, tmp_path):
    query = "select ['b', 'a', null, 'b'][i + 1] as c, [i, -i]::float[2] as v from range(4) r(i) order by i"
    rows = session.sql(query)
    save_activations(out := str(tmp_path / "x.safetensors"), np.zeros((4, 3), np.float32), rows)
    tensors = load_file(out)
    assert tensors["c"].dtype == np.int64, "what torch's cross_entropy takes"
    known = [*vocabulary(tensors, "c"), None]
    assert [known[code] for code in tensors["c"].tolist()] == rows["c"].to_list() == ["b", "a", None, "b"]
    assert vocabulary(tensors, "c") == ["a", "b"]
    assert tensors["v"].dtype == np.float32
    assert tensors["v"].tolist() == rows["v"].to_list()
    save_activations(out := str(tmp_path / "x.npz"), np.zeros((4, 3), np.float32), rows)
    assert np.load(out)["v"].tolist() == rows["v"].to_list()


def test_a_column_named_as_the_vocabulary_of_another_is_refused(tmp_path):
    taken = pl.DataFrame({"c": ["a", "b"], "c.vocabulary": [1, 2]})
    with pytest.raises(BadInput, match=r"yields a column c\.vocabulary.*rename it"):
        save_activations(str(tmp_path / "x.safetensors"), X, taken)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_booleans_without_null_stay_booleans(session, tmp_path, suffix):
    save_activations(out := str(tmp_path / f"x.{suffix}"), X, session.sql("select i = 0 as c from range(2) r(i)"))
    c = (np.load(out) if suffix == "npz" else load_file(out))["c"]
    assert c.dtype == bool
    assert c.tolist() == [True, False]


def test_read_prints_attention_patterns_as_csv(root):
    query = "select token_id from tokens where position > 0 order by token_id limit 3"
    result = run("read", root, query, "--site", "pattern.0", "--csv")
    assert result.exit_code == 0, result.output
    with Store(root) as store:
        patterns, rows = store.read(query, site="pattern.0")
    printed = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [int(row["token_id"]) for row in printed] == rows["token_id"].to_list()
    found = np.array([strict_json(row["x"]) for row in printed], dtype=object).astype(np.float32)
    np.testing.assert_array_equal(found, patterns)


TAKEN = [
    *[("npz", name) for name in ("X", "file", "allow_pickle", "X.npy")],
    *[("safetensors", name) for name in ("X", "__metadata__")],
    *[("parquet", name) for name in ("x", "X")],
    *[(None, name) for name in ("x", "X")],
]


@pytest.mark.parametrize("query", ["select token_id, 1 as {} from tokens", ";select token_id, 1 as {} from tokens"])
@pytest.mark.parametrize(("suffix", "name"), TAKEN)
def test_a_column_that_the_activations_need_is_refused_and_nothing_written(root, tmp_path, suffix, name, query):
    out = ["--out", tmp_path / f"x.{suffix}"] if suffix else ["--csv"]
    result = run("read", root, query.format(f'"{name}"'), "--site", "embed", *out)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"actstore: the query yields a column {name}, ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_taken_name_is_refused_before_any_activation_is_read(root, monkeypatch):
    monkeypatch.setattr("actstore.reading.activations.read_activations", lambda *_: pytest.fail("it was read"))
    assert run("read", root, "select token_id, 1 as x from tokens", "--site", "embed", "--csv").exit_code == 2


@pytest.mark.parametrize(("suffix", "name"), [taken for taken in TAKEN if taken[0]])
def test_a_name_is_refused_in_python_as_on_the_command_line(tmp_path, suffix, name):
    with pytest.raises(BadInput, match="rename it"):
        save_activations(str(tmp_path / f"x.{suffix}"), X, pl.DataFrame({name: [1, 2]}))


@pytest.mark.parametrize(
    ("suffix", "name"), [("npz", "x"), ("safetensors", "x"), ("safetensors", "file"), ("npz", "a b")]
)
def test_a_name_that_is_free_is_kept(tmp_path, suffix, name):
    save_activations(out := str(tmp_path / f"x.{suffix}"), X, pl.DataFrame({name: [1, 2]}))
    saved = np.load(out) if suffix == "npz" else load_file(out)
    np.testing.assert_array_equal(saved["X"], X)
    assert saved[name].tolist() == [1, 2]


def test_what_no_bfloat16_holds_is_refused_and_what_rounds_down_is_not(tmp_path):
    import torch

    largest = torch.finfo(torch.bfloat16).max
    rounds_down, rounds_up = np.float32(largest * 1.001), np.float32(3.4e38)
    for value, fits in [(rounds_down, True), (np.float32(np.inf), True), (rounds_up, False), (-rounds_up, False)]:
        planted = fake(sites=("embed",))
        planted.activations["hook_embed"][:, :, 3] = value
        planted.store(tmp_path / f"{value}.act")
        with Store(tmp_path / f"{value}.act") as store:
            read = functools.partial(store.read, "from tokens", site="embed", dtype="bfloat16", out="torch")
            if fits:
                expected = torch.tensor(value).to(torch.bfloat16)
                assert (read()[0][:, 3] == expected).all()
            else:
                with pytest.raises(BadInput, match="too large for bfloat16"):
                    read()


# What is said while a command runs, and when it is stopped.


@pytest.mark.parametrize(
    "command",
    [["sql", "select 1"], ["read", "from tokens"], ["read", "from tokens", "--explain"], ["query", "role_counts"]],
)
def test_ctrl_c_in_a_query_promises_nothing_about_going_on(root, monkeypatch, command):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    def opened(store, *args, **options):
        opens(store, *args, **options)
        store.sql = store.rows = store._opened.sql = stopped

    opens = Store.__init__
    monkeypatch.setattr(Store, "__init__", opened)
    result = run(command[0], root, *command[1:])
    assert (result.exit_code, result.stderr) == (1, "actstore: stopped\n")


def test_ctrl_c_in_what_commits_as_it_goes_says_how_to_go_on(tmp_path, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("actstore.ingest.jobs.local.execute", stopped)
    result = run("ingest", tmp_path / "s.act", "--model", "reproduction", "--trees", "10")
    said = "actstore: stopped; nothing was committed yet, and the same command starts over\n"
    assert (result.exit_code, result.stderr) == (1, said)


def test_a_parameter_is_text_which_a_cast_makes_a_number(root):
    printed = [
        run("sql", root, f"select typeof({of}) as t", "-p", "d", "7", "--csv").stdout for of in ("$d", "$d::int")
    ]
    assert printed == ["t\nVARCHAR\n", "t\nINTEGER\n"]
    assert "as text" in " ".join(run("sql", "--help").output.split())


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_LINE", 0.05)
    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_BAR", 0.05)


def until(true: Callable[[], bool]) -> None:
    """Wait for another thread."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("shown", [lambda: progress.waiting("sql"), lambda: progress.progress("ingest", 3, "trees")])
def test_short_work_shows_nothing(monkeypatch, stream, shown):
    monkeypatch.setattr("sys.stderr", said := stream())
    with shown():
        pass
    assert said.getvalue() == ""


def test_long_waiting_is_said_in_plain_lines_ever_further_apart(monkeypatch, quick):
    monkeypatch.setattr("sys.stderr", said := io.StringIO())
    started = time.monotonic()
    with progress.waiting("sql"):
        until(lambda: said.getvalue().count("\n") >= 3)
    assert time.monotonic() - started >= 0.05 * 4  # at 1, 2 and 4 times
    lines = said.getvalue().splitlines()
    assert all(re.fullmatch(r"sql: \d+ s", line) for line in lines)


def test_long_waiting_spins_on_a_terminal_with_the_time_and_leaves_nothing_on_stdout(monkeypatch, quick):
    monkeypatch.setattr("sys.stderr", said := Terminal())
    monkeypatch.setattr("sys.stdout", out := io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    with progress.waiting("sql"):
        until(lambda: "0:00:00" in said.getvalue())
    assert re.search(r"sql\S* \S*0:00:0\d", said.getvalue())
    assert out.getvalue() == ""


def test_the_rest_of_long_work_is_foretold_once_as_soon_as_it_is_known(clock, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_LINE", 5.0)
    said, shown = [], []
    advance = progress.foretelling(lambda *done: shown.append(done), said.append)
    advance(2_000, 20_000)  # were there before
    clock.now += 4
    advance(2_100)
    assert said == [], "four seconds are too few"
    clock.now += 6
    advance(2_200, 20_000, "batch 3")
    assert said == ["15 min"]
    clock.now += 10
    advance(2_300)
    assert said == ["15 min"]
    assert shown == [(2_000, 20_000, None), (2_100, None, None), (2_200, 20_000, "batch 3"), (2_300, None, None)]
    short = progress.foretelling(lambda *done: None, said.append)
    short(0, 100)
    clock.now += 10
    short(50)
    assert said == ["15 min"]


def test_an_ingest_says_how_long_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_LINE", 0.0)
    monkeypatch.setattr(progress, "LONG", 0.0)
    words = [
        "ingest",
        tmp_path / "s.act",
        "--model",
        "reproduction",
        "--trees",
        "20",
        "--batch-size",
        "5",
        "--sites",
        "none",
    ]
    said = run(*words, "--run", "r").stderr
    assert said.count("the rest takes about") == 1
    assert "Ctrl-C keeps" in said
    assert "about" not in run(*words, "--run", "q", "--quiet").stderr


@pytest.mark.parametrize("command", [["label", "mine", "mine.csv"], ["drop", "--label", "mine", "--yes"]], ids=" ".join)
def test_what_may_take_long_says_that_it_waits(tmp_path, monkeypatch, command):
    waited = []

    @contextmanager
    def waiting(what):
        waited.append(what)
        yield

    fake().store(root := tmp_path / "s.act")
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("token_id,y\n0,1\n")
    if command[0] == "drop":
        assert run("label", root, "mine", "mine.csv").exit_code == 0
    monkeypatch.setattr(progress, "waiting", waiting)
    assert run(command[0], root, *command[1:]).exit_code == 0
    assert waited == [command[0]]


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["sql", "select 1 as a"], "sql"),
        (["query"], "query"),
        (["read", "from tokens", "--site", "embed"], "read"),
        (["read", "from tokens", "--site", "embed", "--explain"], "explain"),
    ],
)
def test_every_query_command_says_that_it_waits_and_prints_its_rows_after(root, monkeypatch, command, named):
    waited = []

    @contextmanager
    def waiting(what):
        waited.append((what, sys.stdout.tell()))
        yield
        waited.append(("done", sys.stdout.tell()))

    monkeypatch.setattr(progress, "waiting", waiting)
    result = run(command[0], root, *command[1:])
    assert result.exit_code == 0, result.output
    assert waited == [(named, 0), ("done", 0)]
    assert result.stdout


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_the_rate_of_a_resumed_piece_of_work_is_of_what_is_done_now(clock):
    pace = progress.Pace(20_000, "trees")
    clock.now += 3
    pace.at(15_000, None)  # were there before
    assert (pace.per_second, pace.seconds_left) == (None, None)
    clock.now += 10
    pace.at(16_000, None)
    assert (pace.per_second, pace.seconds_left) == (100, 40)
    assert pace.line("resid_post.0") == "16,000 of 20,000 trees, 100 trees/s, 13 s, 40 s left, resid_post.0"
    for _ in range(10):  # and of the last minute
        clock.now += 10
        pace.at(pace.done + 100, None)
    assert pace.per_second == 10


@pytest.mark.parametrize(
    ("unit", "done", "total", "said"),
    [
        ("bytes", 150_000_000, 4_000_000_000, "0.1 of 4.0 GB, 8 MB/s, 20 s, 9 min left"),
        ("parts", 2, 5, "2 of 5 parts, 6.0 parts/min, 20 s, 30 s left"),
        ("trees", 90, 90, "90 of 90 trees, 4.5 trees/s, 20 s"),
        ("steps", 40, 40_000, "40 of 40,000 steps, 2.0 steps/s, 20 s, 5.5 h left"),
    ],
)
def test_progress_is_said_in_units_that_can_be_read(clock, unit, done, total, said):
    pace = progress.Pace(None, unit)
    pace.at(0, total)
    clock.now += 20
    pace.at(done, None)
    assert pace.line(None) == said


def test_a_log_gets_ever_fewer_lines_and_one_at_the_end(monkeypatch, clock):
    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_LINE", 5.0)
    monkeypatch.setattr("sys.stderr", said := io.StringIO())
    with progress.progress("ingest r", 86_400, "trees") as advance:
        for second in range(86_401):
            clock.now = 1000.0 + second
            advance(second)
        advance(second)
    lines = said.getvalue().splitlines()
    assert 50 < len(lines) < 250
    assert lines[0] == "ingest r: 5 of 86,400 trees, 1.0 trees/s, 5 s, 24.0 h left"
    assert [line.startswith("ingest r: 86,400 of 86,400") for line in lines].count(True) == 1


def test_a_log_shows_that_work_goes_on_before_its_first_part_is_done(monkeypatch, quick):
    monkeypatch.setattr("sys.stderr", said := io.StringIO())
    with progress.progress("study probes r", None, "parts") as advance:
        until(lambda: said.getvalue().count("\n") >= 2)
        advance(1, 3, "embed")
        until(lambda: said.getvalue().count("1 of 3 parts") >= 2)
    lines = said.getvalue().splitlines()
    assert re.fullmatch(r"study probes r: no parts yet, \d+ s", lines[0])
    assert lines[-1].endswith("embed")


def test_a_terminals_bar_says_the_rate_and_what_is_left_in_80_columns(monkeypatch, quick):
    monkeypatch.setattr("sys.stderr", said := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with progress.progress("ingest reproduction", 20_000, "trees") as advance:
        advance(15_000)
        time.sleep(0.01)
        advance(15_001)
        until(lambda: "left" in click.unstyle(said.getvalue()))
    assert re.search(r"15,001 of 20,000 trees, \d+ trees/s", said.getvalue())
    assert max(len(line) for line in click.unstyle(said.getvalue()).splitlines()) <= 80


def test_a_notebook_has_one_line_of_progress_that_changes():
    cell = (
        "import actstore, time\n"
        "from actstore.cli import progress\n"
        "progress.SECONDS_BEFORE_A_BAR = 0\n"
        "with actstore.progress('ingest r', 3, 'trees') as advance:\n"
        "    for done in range(4):\n"
        "        advance(done); time.sleep(0.4)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(notebook, timeout=60).execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    assert output.data["text/plain"].startswith("ingest r: 3 of 3 trees, ")


# A study's table on a terminal of 80 columns.


def lines_at_80(frame: pl.DataFrame, monkeypatch) -> list[str]:
    monkeypatch.setattr("sys.stdout", out := Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    print_table(frame, fold=True)
    return out.getvalue().splitlines()


def test_a_wide_table_folds_its_headers_and_names_the_columns_that_do_not_fit(monkeypatch):
    frame = pl.DataFrame({"site": ["resid_post.0"], "a long header of a short number %": [12.5], "text": ["x" * 60]})
    frame = frame.with_columns(pl.lit("y" * 50).alias("left, out"), pl.lit(7).alias("last"))
    *table, note = lines_at_80(frame, monkeypatch)
    assert {len(line) for line in table} == {78}
    assert table[-1].split() == ["resid_post.0", "12.5", "y" * 50, "7"]
    assert table[0].strip() == "a long"
    assert note == "Too wide for this terminal: text (--csv, --json and --parquet give all columns)."


def test_a_query_in_a_table_of_rows_is_its_first_line_and_alone_it_is_whole(monkeypatch):
    frame = pl.DataFrame(
        {"study": ["depth"] * 2, "query": ["-- by depth\nselect 1\nfrom trees\norder by 1", "a\nb\nc"]}
    )
    shown = [line.split(maxsplit=1) for line in lines_at_80(frame, monkeypatch)[2:]]
    assert [[part.strip() for part in parts] for parts in shown] == [
        ["depth", "-- by depth … (4 lines)"],
        ["depth", "a"],
        ["b"],
        ["c"],
    ]
    assert [line.split()[-1] for line in lines_at_80(frame[:1], monkeypatch)[3:]] == ["1", "trees", "1"]
