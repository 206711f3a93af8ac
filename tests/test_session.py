"""A session reads one store's tables: it says what is wrong in one line, and writes and reaches nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from actstore.errors import BadInput, NotStored
from actstore.sql import session
from actstore.sql.session import Session
from actstore.store import Store
from tests.stores import fake, files

RUN = fake()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("session") / "s.act"
    RUN.store(root)
    return root


@pytest.fixture(scope="module")
def store(root: Path) -> Iterator[Store]:
    with Store(root) as store:
        yield store


def refusal(store: Store, query: str, params: dict[str, object] | None = None) -> str:
    with pytest.raises(BadInput) as caught:
        store.sql(query, params)
    _, *place = str(caught.value).split("\n")
    assert not place or (len(place) == 2 and place[0].startswith("LINE "))
    return str(caught.value)


# Questions and their answers.


@pytest.mark.parametrize(
    ("query", "params", "expected"),
    [
        ("select $a + $b as x", {"a": 1, "b": 2}, [(3,)]),
        ("select $a + $a", {"a": 2}, [(4,)]),
        ("select count(*) from trees where dataset = $name", {"name": "d"}, [(5,)]),
        ("select '$a' -- $b", None, [("$a",)]),
        ("select 1;", None, [(1,)]),
        ("-- a question\nfrom runs select run", {}, [("r",)]),
        ("with t as (select 2 as x) select x from t", None, [(2,)]),
        ("pivot (select 'y' as y, 2 as v) on y using sum(v)", None, [(2,)]),
        ("select column_name from (describe shards) limit 2", None, [("run",), ("site",)]),
    ],
)
def test_a_query_answers(
    store: Store, query: str, params: dict[str, object] | None, expected: list[tuple[object, ...]]
) -> None:
    assert store.sql(query, params).rows() == expected


@pytest.mark.parametrize("query", ["describe tokens", "show tables", "summarize edges", "explain select 1"])
def test_a_query_about_the_tables_answers(store: Store, query: str) -> None:
    assert len(store.sql(query)) > 0


def test_vectors_arrive_as_arrays(store: Store) -> None:
    frame = store.sql("select array_value(1::float, 2) as x")
    assert frame.schema == {"x": pl.Array(pl.Float32, 2)}


def test_columns_of_one_name_are_told_apart(store: Store) -> None:
    frame = store.sql("select * from trees t join outcomes o on t.tree_id = o.tree_id")
    assert len(set(frame.columns)) == len(frame.columns) == 13 + 7


def test_threads_may_ask_at_the_same_time(store: Store) -> None:
    def ask(tree: int) -> tuple[int, int]:
        X, rows = store.read("select * from tokens where tree_id = $tree", params={"tree": tree})
        assert (X[:, 0] == tree).all()
        return tree, len(rows)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, list(range(5)) * 8))
    assert answers == list(enumerate(RUN.lengths)) * 8


# What is refused, and how it is said.


@pytest.mark.parametrize(
    ("query", "params", "said"),
    [
        ("select $a, $b", {"a": 1}, "the query lacks a value for $b; it takes $a, $b"),
        ("select $a", {"a": 1, "c": 2}, "the query has no $c; it takes $a"),
        ("select 1", {"a": 1}, "the query has no $a; it takes no parameters"),
        ("select ?", None, "the query lacks a value for $1; it takes $1"),
        ("", None, "got 0 statements; ask one query at a time"),
        ("-- nothing", None, "got 0 statements; ask one query at a time"),
        ("select 1; select 2", None, "got 2 statements; ask one query at a time"),
    ],
)
def test_parameters_and_statements_are_counted(
    store: Store, query: str, params: dict[str, object] | None, said: str
) -> None:
    assert refusal(store, query, params) == said


def test_a_query_longer_than_any_is_refused(store: Store) -> None:
    """500,000 brackets take DuckDB's parser seconds, in which no Ctrl-C stops it."""
    said = refusal(store, f"select {'(' * 500_000}1{')' * 500_000}")
    assert said.startswith("got a query of 1,000,008 characters; the longest is 1,000,000: hand lists over as params")
    assert store.sql(f"select length('{'x' * 999_000}')").item() == 999_000


def test_a_query_is_parsed_where_ctrl_c_is_heard(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python hears it in the main thread alone, and there only between two steps of its own."""
    threads, check = [], session._check
    monkeypatch.setattr(session, "_check", lambda *given: threads.append(threading.current_thread()) or check(*given))
    assert store.sql("select 1").item() == 1
    assert threads
    assert threading.main_thread() not in threads


def test_an_unknown_column_is_answered_with_those_there_are(store: Store) -> None:
    said = refusal(store, "select\n  tokn_id\nfrom tokens")
    assert 'column "tokn_id" not found' in said
    assert '"token_id"' in said
    assert said.endswith("\nLINE 2:   tokn_id\n          ^^^^^^^")


def test_an_unknown_table_is_answered_with_those_there_are(store: Store) -> None:
    said = refusal(store, "select * from activations")
    assert "activations does not exist" in said
    assert "It takes a run and a site: from activations('RUN', 'resid_post.0')" in said
    said = refusal(store, "select * from vectors")
    assert "vectors does not exist" in said
    assert said.split("\n")[0].endswith(
        " The store has answer_tokens, datasets, edge_separators, edge_sources, edge_targets, edges, edits, generations, "
        "interventions, latest_results, listed_sequences, models, outcomes, predictions, relations, results, "
        "runs, sequences, shards, sites, snapshot, tokens, trees, vocabularies; "
        "hand a frame of yours over by name: tables={'vectors': frame} (--table vectors=FILE)"
    )


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("selec 1", 'syntax error at or near "selec"'),
        ("select * from tokens where", 'syntax error at or near "where"'),
        ("select error('two\nlines')", "two lines"),
        ("select 300::utinyint", "out of range for the destination type UINT8"),
        ("select * from tokens where role = 3", "Could not convert string 'edge_source' to INT32"),
        ("select interval '1 month' as x", "cast it"),
        ("select union_value(a := 1) as x", "cast it"),
    ],
)
def test_what_duckdb_or_polars_refuses_is_one_line_and_its_place_in_the_query(
    store: Store, query: str, said: str
) -> None:
    message = refusal(store, query)
    assert said in message.split("\n")[0]


def test_python_variables_are_no_tables(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "some_frame", pl.DataFrame({"x": [1]}), raising=False)
    assert "some_frame does not exist" in refusal(store, "select * from some_frame")


FORBIDDEN = [
    "insert into tokens select * from tokens",
    "update trees set depth = 1",
    "delete from tokens",
    "explain analyze delete from tokens",
    "explain analyze create table x as select 1",
    "with gone as (delete from tokens returning *) select * from gone",
    "drop table tokens",
    "drop view edge_targets",
    "alter table tokens add column x int",
    "create table x as select 1",
    "create or replace view edge_targets as select 1",
    "create temp table tokens as select 1",
    "create table memory.main.x as select 1",
    "create macro act(x) as 1",
    "create or replace temp macro act(x) as 1",
    "comment on table tokens is 'mine'",
    "copy tokens to '{out}'",
    "copy (select 1) to '{catalog}' (use_tmp_file false)",
    "copy (select 1) to '{catalog}' (format parquet, use_tmp_file false)",
    "with c as (copy (select 1) to '{catalog}' (use_tmp_file false)) select 1",
    "explain analyze copy (select 1) to '{catalog}' (use_tmp_file false)",
    "copy trees from '{parts}/trees/d-000000.parquet'",
    "export database '{out}'",
    "import database '{out}'",
    "attach '{out}' as other",
    "attach '{catalog}' as other",
    "attach ':memory:' as other",
    "detach store",
    "use memory",
    "use memory; detach store; select 1",
    "begin; drop table tokens; commit",
    "select * from read_csv('/etc/hostname')",
    "select * from '/etc/hostname'",
    "select * from read_text('/etc/hostname')",
    "select * from read_blob('{catalog}')",
    "select * from glob('/*')",
    "select * from '{parts}/trees/d-000000.parquet'",
    "select * from read_parquet('{parts}/trees/d-000000.parquet')",
    "select * from query('from read_text(''/etc/hostname'')')",
    "select * from query_table('/etc/hostname')",
    "select * from 'https://example.com/x.parquet'",
    "select * from read_json('s3://bucket/x.json')",
    "install httpfs",
    "load httpfs",
    "load '{out}'",
    "set enable_external_access = true",
    "set disabled_filesystems = ''",
    "reset disabled_filesystems",
    "set lock_configuration = false",
    "set temp_directory = '{out}'",
    "set profiling_output = '{out}'",
    "pragma enable_profiling = 'json'",
    "call enable_logging(storage = 'file', storage_path = '{out}')",
    "create secret s (type s3)",
    "checkpoint store",
    "vacuum",
    "prepare p as select 1",
]


@pytest.mark.parametrize("statement", FORBIDDEN)
def test_a_statement_that_would_do_more_than_read_the_tables_is_refused(
    root: Path, tmp_path: Path, statement: str
) -> None:
    before = files(root)
    query = statement.format(catalog=root / "catalog.duckdb", parts=root / "parts", out=tmp_path / "out")
    with Store(root) as store:
        refusal(store, query)
        assert store.sql("select count(*) from tokens").item() == RUN.lengths.sum(), "the session still reads the store"
        assert len(store.sql("from edge_targets")) == 15
    assert list(tmp_path.iterdir()) == []
    assert files(root) == before


def test_a_session_that_is_closed_says_so(root: Path) -> None:
    store = Store(root)
    store.close()
    assert "closed" in refusal(store, "select 1")


# Reading.


@pytest.mark.parametrize(
    ("query", "error", "said"),
    [
        ("select tree_id, position from tokens", BadInput, "the query yields tree_id, position and no token_id"),
        ("select token_id::double as token_id from tokens", BadInput, "token_id is Float64; it must be an integer"),
        ("select token_id::varchar as token_id from tokens", BadInput, "token_id is String; it must be an integer"),
        ("select null::bigint as token_id", BadInput, "1 of 1 token_ids are NULL"),
        ("select 18446744073709551615::ubigint as token_id", NotStored, "no token has token_id 18446744073709551615"),
        ("select -1 as token_id", NotStored, "the first being -1"),
    ],
)
def test_a_query_that_names_no_tokens_is_refused(store: Store, query: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        store.read(query)


@pytest.mark.parametrize("dtype", ["uinteger", "integer", "ubigint"])
def test_any_integer_names_a_token(store: Store, dtype: str) -> None:
    X, rows = store.read(f"select token_id::{dtype} as token_id, tree_id, position from tokens order by hash(token_id)")
    np.testing.assert_array_equal(X[:, :2], rows["tree_id", "position"].to_numpy())


def test_a_run_or_site_that_is_not_there_is_answered_with_those_that_are(store: Store) -> None:
    with pytest.raises(NotStored, match=r"no run 'x': .*s\.act holds r; name one of them"):
        store.read("select token_id from tokens", run="x")
    with pytest.raises(NotStored, match=r"run 'r' holds no site 'embed'; it holds pattern\.0, resid_post\.0"):
        store.read("select token_id from tokens", site="embed")


# Ctrl-C.


@pytest.mark.parametrize("turn", [1, 3])
def test_ctrl_c_while_the_functions_are_added_costs_none_of_them(
    root: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    add, turns = Session.add_macro, iter(range(1, 1000))

    def stopped(self: Session, *args: str) -> None:
        if next(turns) == turn:
            raise KeyboardInterrupt
        add(self, *args)

    monkeypatch.setattr(Session, "add_macro", stopped)
    with Store(root) as store:
        with pytest.raises(KeyboardInterrupt):
            store.sql("select 1")
        assert store.sql("select dot([1, 2]::float[2], [3, 4]::float[2])").item() == 11
        assert store.sql("select count(act(token_id, 'r', 'resid_post.0')) from tokens").item() > 0


ENDLESS = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
from actstore.store import Store
store = Store(sys.argv[1])
print("asking", flush=True)
try:
    store.sql("select count(*) from range(10_000_000) a, range(10_000_000) b where (a.range + b.range) % 7 = 8")
except KeyboardInterrupt:
    print("stopped", store.sql("select count(*) from trees").item(), threading.active_count(), flush=True)
"""


@pytest.mark.parametrize("wait", [0.0, 0.5])
def test_ctrl_c_ends_a_query_that_would_never_end(root: Path, wait: float) -> None:
    """At once, too: an interrupt that comes before the query has begun must not be lost."""
    command = [sys.executable, "-c", ENDLESS, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "asking\n"
            time.sleep(wait)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20)[0] == "stopped 5 1\n"
            assert process.returncode == 0
        finally:
            process.kill()


def test_a_session_keeps_few_parses_and_no_long_one(root: Path) -> None:
    texts = [f"select token_id, {number} as n from tokens" for number in range(session.KEPT + 3)]
    long = f"select [{', '.join(['1'] * 2000)}]"
    with Store(root) as store, Store(root) as other:
        kept, fresh = store._opened.session, other._opened.session
        for text in [*texts, long, *texts]:
            fresh._parses.clear()
            assert kept.parse(text) == fresh.parse(text)
            assert len(kept._parses) <= session.KEPT
        assert texts[-1] in kept._parses
        assert len(kept.parse(long)) > session.LONGEST_KEPT
        assert long not in kept._parses
    with pytest.raises(BadInput, match="closed"):
        kept.parse(texts[-1])


def test_a_query_is_parsed_once_and_judged_each_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = session._interruptible, []
    monkeypatch.setattr(session, "_interruptible", lambda *of: asked.append(of) or run(*of))
    query, renamed = "select token_id from tokens where tree_id = $tree", "select tree_id as token_id from tokens"
    with Store(root) as store:
        for tree in (1, 3):
            asked.clear()
            X, rows = store.read(query, params={"tree": tree})
            assert len(X) > 0
            assert (rows["token_id"] // 256).unique().to_list() == [tree]
        assert len(asked) == 1  # the query itself
        for _ in range(2):
            with pytest.raises(BadInput, match="tree_id renamed"):
                store.read(renamed)
            assert len(store.sql(renamed)) > 0
