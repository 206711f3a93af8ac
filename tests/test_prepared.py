"""A query is prepared once and runs once; with limits, one process does both."""

import subprocess
from functools import partial

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import BadInput
from actstore.sql import process
from actstore.sql.session import Session
from actstore.store import Store
from tests.stores import fake

ENDLESS = "select count(*) from range(10_000_000) a, range(10_000_000) b where (a.range + b.range) % 7 = 8"
LIKE_TWINS = "select token_id, edge as a, node as a_1 from tokens"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared") / "s.act"
    fake(sites=("resid_post.0", "pattern.0")).store(root)
    with Store(root) as opened:
        yield opened


def of_library(method, query):
    return lambda store, **limits: getattr(store, method)(query, **limits)


def of_command(command, *words, code=0):
    def call(store, **limits):
        said = [str(word) for name, value in limits.items() for word in (f"--{name}", value)]
        result = CliRunner().invoke(main, [command, str(store.path), *words, *said])
        assert result.exit_code == code, result.output

    return call


@pytest.mark.parametrize(
    "ask",
    [
        of_library("read", LIKE_TWINS),
        of_library("batches", LIKE_TWINS),
        of_library("sql", "select act(token_id, 'r', 'resid_post.0') as x, 1 as X from tokens"),
        of_command("query", "accuracy_by_depth", "-p", "run", "r"),
        of_command("read", LIKE_TWINS),
        partial(of_command("read", f"select ({ENDLESS}) as token_id", code=1), timeout=1),
    ],
)
def test_a_call_with_limits_has_one_process(store, monkeypatch, ask):
    """A process has one clock: what a call did in a second one, it would do past its limit."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(process.subprocess, "Popen", lambda *args, **how: started.append(args) or popen(*args, **how))
    ask(store, **{"timeout": 60, "memory": "4GB"} | getattr(ask, "keywords", {}))
    assert len(started) == 1


@pytest.mark.parametrize(
    ("columns", "said", "limits"),
    [
        ("token_id, edge, 1 as Edge", "two columns named Edge; rename one", {}),
        ("edge, node", "yields edge, node and no token_id", {}),
        ("token_id, node", "not node", {}),
        ("token_id, node", "not node", {"timeout": 60}),
    ],
)
def test_columns_are_looked_at_before_the_query_runs(store, columns, said, limits):
    """The query would run for ever."""

    def refuse(names):
        raise BadInput(f"not {names[1]}")

    with pytest.raises(BadInput, match=said):
        store.read(f"select {columns} from tokens where ({ENDLESS}) > 0", columns=refuse, **limits)


def test_the_limit_holds_from_the_first_word_to_the_last_row(store, monkeypatch):
    """The clock jumps when the columns are told: the rows come too late, however soon they do."""
    now = [0.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    with pytest.raises(process.LimitReached, match="longer than its limit of 10 s"):
        store.read(
            f"select token_id from tokens where ({ENDLESS}) > 0",
            timeout=10,
            columns=lambda _: now.append(now.pop() + 11),
        )


@pytest.mark.parametrize("given", [list, np.array, pl.Series, lambda ids: pl.DataFrame({"token_id": ids})])
@pytest.mark.parametrize("sites", [{"site": "resid_post.0"}, {"sites": ["resid_post.0"]}])
def test_ids_go_past_sql_from_the_opening_on(store, monkeypatch, given, sites):
    """What a store looks up of its own is asked in short queries, and never of DuckDB's own views, which take 10 ms to make."""
    ids = store.sql("select token_id from tokens")["token_id"].to_list()
    asked, look_up = [], Session.look_up
    monkeypatch.setattr(
        Session, "look_up", lambda self, query, *rest: asked.append(query) or look_up(self, query, *rest)
    )
    monkeypatch.setattr(Session, "sql", lambda *_: pytest.fail("a query was asked"))
    with Store(store.path) as opened:
        X, rows = opened.read(given(ids), **sites)
    assert rows["token_id"].to_list() == ids
    np.testing.assert_array_equal(X.reshape(len(ids), -1)[:, 1], np.array(ids) % 256)
    assert not [query for query in asked if "duckdb_" in query]
    assert len(asked) == 4  # the snapshot; runs; the site and its shards


def test_a_query_without_ids_is_asked_in_no_words(store):
    """A statement that is no SELECT has columns, too, and is refused by them."""
    with pytest.raises(BadInput, match="yields name and no token_id"):
        store.read("show tables")
