"""`act` in the outermost SELECT gives what it gives within the query, whatever the rest of the query is."""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import BadInput, NotStored
from actstore.sql import late_act, session
from actstore.sql.asked import Asked
from actstore.store import Store
from tests.stores import D_MODEL, fake

SITES = ("resid_post.0", "resid_post.1", "pattern.0")
EMBED = "act(token_id, 'r', 'resid_post.0')"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("outermost") / "s.act"
    fake(n_trees=9, trees_per_shard=4, sites=SITES).store(root)
    fake("half", "e", n_trees=9, trees_per_shard=4, seed=1, weights=b"half", sites=SITES).store(root, batches=[0])
    with Store(root) as opened:
        yield opened


OURS = "tokens semi join (from trees where dataset = 'd') using (tree_id)"
TAKEN = [
    f"select token_id, {EMBED} as x from {OURS} order by token_id",
    f"select {EMBED} x, role from {OURS} order by hash(token_id) limit 7 offset 2",
    f"from {OURS} select x: ACT (token_id, 'r', 'resid_post.1'), * order by token_id desc",
    f"select é: 1, {EMBED} as \"the vector\", 'ü' as ß from {OURS} order by token_id",
    f"with a as (from {OURS}) select {EMBED} as x, act(a.token_id, 'r', 'resid_post.1') as y from a order by a.token_id",
    f"select {EMBED} as x, row_number() over (order by token_id) as n from {OURS} qualify n < 9 order by n",
    f"select {EMBED} as x from {OURS} where token_id in (select token_id from edge_targets) order by token_id",
    f"select {EMBED} as x from (select unnest([3, null, 1, 3]) as token_id)",
    f"select {EMBED} as x from {OURS} where false",
    f"/* act(token_id, 'no', 'no') */ select {EMBED} /* as y */ as x -- act(\n from {OURS} order by token_id;",
    f"select unnest([1, 2]) as i, {EMBED} as x from {OURS} order by token_id, i",
]
NOT_TAKEN = [
    f"select {EMBED} from {OURS} order by token_id",
    f"select distinct {EMBED} as x from {OURS} order by x",
    f"select token_id, {EMBED} as x from {OURS} order by x[1], token_id",
    f"select {EMBED} as x, x[1] as first from {OURS} order by first, token_id",
    f"select token_id, {EMBED} as x from {OURS} order by 2, 1",
    f"select token_id, {EMBED} as x from {OURS} order by all",
    f"select {EMBED} as x, count(*) as n from {OURS} group by all order by x",
    f"select {EMBED} as token_id from {OURS} order by tokens.token_id",
    f"select {EMBED}[1] as x from {OURS} order by token_id",
    f"select x from (select token_id, {EMBED} as x from {OURS}) order by token_id",
    f"select {EMBED} as x from {OURS} union all select {EMBED} as x from {OURS} order by x",
    f"select token_id.act('r', 'resid_post.0') as x from {OURS} order by token_id",
    f"select act(token_id + 0, 'r', 'resid_post.0') as x from {OURS} order by token_id",
    f"select act(token_id, 'r', 'resid_post.' || 0) as x from {OURS} order by token_id",
    "select 'act(token_id)' as x",
]


def plain(store, query, params=None):
    """What DuckDB itself makes of it."""
    assert store._opened.vectors  # the functions are there
    return store._opened.session.sql(query, params)


def is_taken(store, query, **params):
    opened = store._opened
    return late_act.take_out(Asked(opened.session, query), params, opened.vectors) is not None


@pytest.mark.parametrize("query", TAKEN)
def test_what_is_taken_out_reads_the_same(store, query):
    assert is_taken(store, query)
    found, expected = store.sql(query), plain(store, query)
    assert found.schema == expected.schema
    assert found.equals(expected)


@pytest.mark.parametrize("query", NOT_TAKEN)
def test_what_something_rests_on_is_left(store, query):
    assert not is_taken(store, query)
    assert store.sql(query).equals(plain(store, query))


@pytest.mark.parametrize(
    "items",
    ["{} as x, 1 as X", "1 as x, {} as X", "*, {} as tree_id", "{} as TREE_ID, *", "*, {} as tree_id_1, 1 as tree_id"],
)
def test_a_second_column_of_the_name_is_not_taken_for_it(store, items):
    query = f"select {items.format(EMBED)} from {OURS} order by tokens.token_id"
    assert store.sql(query).equals(plain(store, query))


EXPRESSIONS = st.sampled_from(
    ["token_id", "role", "tree_id + 1 as t", f"{EMBED} as x", f"{EMBED} as y", "x", "1 as x", "*"]
)
ORDERS = st.sampled_from(
    ["", "order by token_id", "order by token_id desc", "order by x, token_id", "order by 1, token_id"]
)
FILTERS = st.sampled_from(["", "where position > 3", "where x[1] > 0", "where token_id % 2 = 0", "group by all"])


def outcome(run, store, query):
    """The frame, or what kind of error it ends in."""
    try:
        return run(store, query)
    except BadInput as error:
        return str(error).split(":")[0]


@given(st.lists(EXPRESSIONS, min_size=1, max_size=4), FILTERS, ORDERS, st.sampled_from(["", "limit 5"]))
def test_any_query_yields_what_it_would(store, items, where, order, limit):
    query = f"select {', '.join(items)} from (from {OURS} order by token_id) {where} {order} {limit if order else ''}"
    expected, found = outcome(plain, store, query), outcome(Store.sql, store, query)
    if isinstance(expected, str):
        assert found == expected
    elif order:
        assert found.equals(expected)
    else:
        assert found.columns == expected.columns
        assert sorted(map(str, found.rows())) == sorted(map(str, expected.rows()))


def test_run_and_site_may_be_parameters(store):
    query = f"select act(token_id, $run, $site) as x from {OURS} where $run = 'r' order by token_id"
    params = {"run": "r", "site": "resid_post.1"}
    assert is_taken(store, query, **params)
    assert store.sql(query, params).equals(plain(store, query, params))
    only = f"select act(token_id, $run, $site) as x from {OURS} order by token_id"
    assert store.sql(only, params).equals(plain(store, only, params))
    for wrong in ({"run": "r"}, {**params, "more": 1}, {"run": "r", "site": 3}):
        with pytest.raises((BadInput, NotStored)) as theirs:
            plain(store, only, wrong)
        with pytest.raises(type(theirs.value)) as ours:
            store.sql(only, wrong)
        assert str(ours.value) == str(theirs.value)


def test_only_the_rows_that_come_out_are_read(store):
    """The last tokens are of no tree of this run: to read all would be refused."""
    query = "select act(token_id, 'r', 'resid_post.0') as x from tokens order by token_id"
    assert store.sql(f"{query} limit 4")["x"].dtype == pl.Array(pl.Float32, D_MODEL)
    with pytest.raises(NotStored, match="of no tree of this run"):
        store.sql(query)


@pytest.mark.parametrize(
    ("run", "site", "error"),
    [("no", "resid_post.0", NotStored), ("r", "no", NotStored), ("r", "pattern.0", BadInput)],
)
def test_what_is_not_there_is_refused_in_the_same_words(store, run, site, error):
    query = f"select act(token_id, '{run}', '{site}') as x from {OURS}"
    with pytest.raises(error) as theirs:
        plain(store, query)
    with pytest.raises(error) as ours:
        store.sql(query)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("query", ["select act(\ud800", "act(", f"select {EMBED} as x; select 1", "select act(x) from"])
def test_a_query_that_is_none_ends_as_it_would(store, query):
    with pytest.raises(BadInput):
        store.sql(query)


def test_a_query_of_many_levels_runs_as_it_would(store):
    query = f"select {'1 + ' * 900} 1 as n, {EMBED} as x from {OURS} order by token_id"
    assert store.sql(query).equals(plain(store, query))


def test_row_i_is_of_row_i(store):
    found = store.sql(f"select tree_id, position, {EMBED} as x from {OURS} order by hash(token_id)")
    np.testing.assert_array_equal(found["x"].to_numpy()[:, 0], found["tree_id"].to_numpy())
    np.testing.assert_array_equal(found["x"].to_numpy()[:, 1], found["position"].to_numpy())


@pytest.mark.parametrize(
    "query", [TAKEN[0], TAKEN[1], f"select act(token_id, $run, 'resid_post.0') as x from {OURS} limit 3"]
)
def test_another_json_of_duckdb_is_counted_and_read_as_nothing_else(store, query):
    """Each name in the part of the JSON that is read is changed in turn, as a later DuckDB may change it."""
    opened, params = store._opened, {"run": "r"} if "$run" in query else {}

    def take(node):
        asked = Asked(opened.session, query)
        asked.tree = [{"node": node}]
        return late_act.take_out(asked, params, opened.vectors)

    node = Asked(opened.session, query).tree[0]["node"]
    expected = take(node)
    read = {"type", "modifiers", "select_list", "class", "function_name", "alias", "arguments", "name", "expression"}
    read |= {"filter", "distinct", "order_bys", "query_location", "query_location_length", "literal", "kind", "text"}
    read |= {"group_expressions", "having", "aggregate_handling", "column_names"}
    read |= {"orders"} if "order by" in query else set()
    read |= {"identifier"} if params else set()
    before = opened.vectors.not_taken["JSON"]
    for name in sorted(read):
        assert take(json.loads(json.dumps(node).replace(f'"{name}":', '"another":'))) is None, name
    assert opened.vectors.not_taken["JSON"] == before + len(read)
    assert take(node) == expected
    assert opened.vectors.not_taken["JSON"] == before + len(read)


@pytest.mark.parametrize(
    ("query", "why"),
    [(NOT_TAKEN[1], "form"), (f"select {EMBED} as x, 1 as X from {OURS}", "column"), (TAKEN[0], None)],
)
def test_what_is_not_taken_is_counted(store, query, why):
    counted = store._opened.vectors.not_taken
    before = counted.copy()
    store.sql(query)
    assert counted - before == ({why: 1} if why else {})


@pytest.mark.parametrize("query", [TAKEN[0], TAKEN[1], NOT_TAKEN[1], f"select {EMBED} as x, 1 as X from {OURS}"])
def test_a_query_runs_once(store, monkeypatch, query):
    """Whatever form it has: a cursor that yields a frame is counted."""
    ran = []
    monkeypatch.setattr(session, "_interruptible", lambda cursor, fetch: ran.append(frame := fetch()) or frame)
    store.sql(query)
    assert sum(isinstance(frame, pl.DataFrame) for frame in ran) == 1


@pytest.mark.parametrize("fault", ["('x' || token_id)::int", "nope", "('é' || token_id)::date"])
def test_an_error_of_a_query_that_ran_shows_its_place_in_the_query_that_was_asked(store, monkeypatch, fault):
    query = f"select 1 as é, {EMBED} as x, {fault} as n\nfrom {OURS}"
    with pytest.raises(BadInput) as theirs:
        plain(store, query)
    ran = []
    sql = store._opened.session.sql
    monkeypatch.setattr(store._opened.session, "sql", lambda query, *rest: ran.append(query) or sql(query, *rest))
    with pytest.raises(BadInput) as ours:
        store.sql(query)
    assert len(ran) == (2 if fault == "nope" else 1)  # one that is refused before it runs is asked for its words
    assert str(ours.value) == str(theirs.value)
