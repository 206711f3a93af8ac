"""What a short command loads, and rows as Python's own values, which need neither polars nor pyarrow."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.cli.output import Output
from actstore.errors import BadInput
from actstore.sql import rows as rows_of
from actstore.sql.rows import MOST, Rows
from actstore.store import Store
from tests.stores import fake

HEAVY = {"numpy", "polars", "pyarrow", "pandas", "torch", "zarr", "scipy", "matplotlib", "prompt_toolkit"}
HEAVY |= {"configparser", "http", "ssl"}  # what a bucket needs
SCRIPT = """
import json, sys
from actstore.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print(json.dumps([ended.code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("startup") / "some.act"
    fake(sites=("embed",)).store(root)
    with Store(root) as store:
        store.view("lengths", "select token_id, norm(act(token_id, 'r', 'embed')) as length from tokens")
    return root


@pytest.fixture(scope="module")
def store(root):
    with Store(root) as store:
        yield store


@pytest.mark.parametrize(
    "arguments",
    [
        ["sql", "STORE", "select 1"],
        ["sql", "STORE", "select role, count(*) as n, avg(position) as p from tokens group by all"],
        ["sql", "STORE", "select tree_id, path from trees"],
        ["sql", "STORE", "select run, avg(greedy_right::int) as right from outcomes group by run", "--json"],
        ["sql", "STORE", "select count(*) from outcomes", "--run", "r", "--csv"],
        ["sql", "STORE", "select $a as a", "-p", "a", "b"],
        ["info", "STORE"],
        ["doctor", "STORE"],
    ],
    ids=" ".join,
)
def test_a_short_command_loads_no_library_that_its_answer_does_not_need(root, arguments):
    words = [str(root) if word == "STORE" else word for word in arguments]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, timeout=120)
    code, modules = json.loads(done.stderr)
    assert code == 0
    assert done.stdout
    assert not HEAVY & set(modules)


def test_a_view_that_names_a_function_is_read_by_a_session_without_functions(root):
    with Store(root) as store:
        assert len(store.rows("from lengths")) == len(store.sql("from tokens"))
    with Store(root) as store:
        assert store.sql("select min(length) > 0 as positive from lengths").item()


def test_an_error_says_the_same_before_and_after_the_functions_are_there(root):
    def said(store, query):
        with pytest.raises(BadInput) as told:
            store.sql(query)
        return str(told.value)

    queries = ["select actt(1)", "select foo from tokens", "from nowhere", "select 'x'::int"]
    with Store(root) as store:
        before = [said(store, query) for query in queries]
        store.sql("select act(token_id, 'r', 'embed') as x from tokens limit 1")
        assert [said(store, query) for query in queries] == before


TYPES = [
    *("true", "7::tinyint", "7::usmallint", "-7", "7::ubigint", "7::hugeint", "1.5::float", "0.1::float", "1e300"),
    *("'é'", "''", "null", "[1, null]", "['a', null]", "[0.5::float]", "'a'::enum('a', 'b')", "1.50::decimal(5, 2)"),
    *(
        "date '2020-01-31'",
        "timestamp '2020-01-31 10:00:00.5'",
        "[[1], [2]]",
        "{'a': 1}",
        "[1, 2]::float[2]",
        "'ab'::blob",
    ),
]


@pytest.mark.parametrize("value", TYPES)
def test_rows_hold_what_a_frame_holds(store, value):
    query = f"select {value} as a, i as b from range(3) r(i)"
    frame, rows = store.sql(query), store.rows(query)
    assert rows.columns == frame.columns
    assert [list(map(as_list, row)) for row in rows] == [list(map(as_list, row)) for row in frame.iter_rows()]
    made = rows.frame()
    assert made.equals(frame)
    assert [dtype for dtype in made.dtypes if dtype != pl.Categorical] == [
        dtype for dtype in frame.dtypes if dtype != pl.Categorical
    ]


def as_list(value):
    return value.tolist() if hasattr(value, "tolist") else value


@pytest.mark.parametrize("n", [0, 1, MOST - 1, MOST, MOST + 1, 3 * MOST + 5])
def test_a_long_result_loses_no_row_where_the_frame_begins(store, n):
    query = f"select i, i::varchar as t, if(i % 3 = 0, null, i / 4) as f from range({n}) r(i)"
    rows, frame = store.rows(query), store.sql(query)
    assert len(rows) == n
    assert list(rows) == frame.rows()
    assert rows.frame().equals(frame)
    assert rows.head(5) == frame.head(5).rows()


def test_two_columns_of_one_name_are_told_apart_as_in_a_frame(store):
    assert store.rows("select 1 as a, 2 as a").dicts() == store.sql("select 1 as a, 2 as a").to_dicts()


def test_rows_warn_of_several_runs_and_keep_the_limits_as_sql_does(store):
    assert store.rows("select 1 as a", timeout=60).dicts() == [{"a": 1}]
    with pytest.raises(BadInput, match="renamed"):
        store.rows("select act(token_id, 'r', 'embed') from (select tree_id as token_id from tokens)")


def printed(output: Output, rows: Rows | pl.DataFrame) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out := io.StringIO())
        output.write(rows)
    return out.getvalue()


@given(rows=st.lists(st.tuples(st.text() | st.none(), st.integers(-9, 9) | st.none(), st.booleans() | st.none())))
def test_csv_of_rows_is_csv_of_their_frame(rows):
    columns, types = ["a,b", "n", "yes"], ["VARCHAR", "BIGINT", "BOOLEAN"]
    plain = Rows(columns, types, ["text", "number", "text"], rows)
    assert printed(Output("csv"), plain) == plain.frame().write_csv()


@pytest.mark.parametrize("output", [Output("csv"), Output("json"), Output("jsonl"), Output("md"), Output()], ids=str)
@pytest.mark.parametrize("value", TYPES)
def test_rows_are_printed_as_their_frame_is(store, output, value):
    query = f"select {value} as a, i as b from range(2) r(i)"
    assert printed(output, store.rows(query)) == printed(output, rows_of.of_frame(store.sql(query)))
