"""What a query sees: everything, one run, or one run's set of trees; and the note where answers of several runs mix."""

import re
import shlex
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from click.testing import CliRunner

import actstore
from actstore import queries
from actstore.cli import main
from actstore.errors import BadInput, NotStored, SeveralRuns
from actstore.reading.scope import _views
from actstore.sql.asked import OF_RUNS, Asked
from actstore.sql.session import Session
from actstore.store import Store
from tests.stores import fake

SITES = ("embed", "resid_post.0")
FIRST = fake("r", n_trees=6, trees_per_shard=4, sites=SITES)
OTHERS = [
    fake("model", n_trees=6, trees_per_shard=4, weights=b"model", sites=SITES),
    fake("trees", "e", n_trees=5, trees_per_shard=4, seed=1, sites=SITES),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    root = tmp_path_factory.mktemp("alone") / "s.act"
    FIRST.store(root)
    with Store(root) as store:
        yield store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three runs: `r` and `model` over trees 0 to 5, `trees` over trees 6 to 10."""
    root = tmp_path_factory.mktemp("several") / "s.act"
    for run in (FIRST, *OTHERS):
        run.store(root)
    with Store(root) as store:
        yield store


def notes(ask):
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        answer = ask()
    assert all(note.category is SeveralRuns for note in given)
    return answer, [str(note.message) for note in given]


# one run's session


@pytest.mark.parametrize(
    "query",
    [
        "from outcomes order by tree_id",
        "from predictions order by token_id",
        "select tree_id, path, greedy_path from outcomes join trees using (tree_id) where greedy_right order by all",
        "from tokens order by token_id",
        "select count(*), count(distinct tree_id) from edge_targets join outcomes using (tree_id)",
        "select answer_tokens.*, p_target from answer_tokens join predictions using (token_id) order by token_id",
        "select * exclude (versions) from runs join datasets using (dataset) join models using (weights_sha256)",
        "from shards order by all",
        "select sum(norm(act(token_id, 'r', 'embed'))) from edges join edge_sources using (tree_id, edge)",
        "select count(x) from activations('r', 'resid_post.0') join outcomes using (tree_id)",
    ],
)
def test_a_run_has_the_rows_that_it_has_alone(alone, store, query):
    found, said = notes(lambda: store.of("r").sql(query))
    assert not said
    assert found.equals(alone.sql(query))
    assert len(found)


def test_every_table_of_trees_or_runs_is_the_runs(store):
    whole = "select table_name, list(column_name) from information_schema.columns where table_catalog = 'store' group by all"
    said = {
        table for table, columns in store.sql(whole).iter_rows() if {"run", "tree_id", "sequence_id"} & set(columns)
    }
    assert set(_views(store._opened, "r", answers=True)) == said | {"datasets", "models"}
    empty = {"generations", "interventions", "edits", "results", "latest_results", "listed_sequences"}  # here
    for table in said - empty:
        assert 0 < store.of("trees").sql(f"from {table}").height < store.sql(f"from store.main.{table}").height
        assert store.of("r").sql(f"from store.main.{table}").height == store.sql(f"from {table}").height


def test_a_run_is_the_one_that_is_meant_in_its_session(store):
    of_trees = store.of("trees")
    X, rows = of_trees.read("select token_id, tree_id from edge_targets", site="embed")
    assert X[:, 0].tolist() == (rows["tree_id"] - 6).to_list()
    assert of_trees.resolve_run(None) == "trees"
    assert of_trees.scan().select("tree_id").unique().collect().height == 5
    assert of_trees.explain("from edge_targets").rows == 5 * 3
    assert of_trees.batches("from edge_targets").n_rows == 5 * 3
    assert of_trees.info()["run"].to_list() == ["trees"]
    assert of_trees.whole is store
    assert "of('trees')" in repr(of_trees)
    with pytest.raises(BadInput, match=r"this is run 'trees' .*not run 'r'; ask the whole store"):
        of_trees.read("from edge_targets", run="r")
    with pytest.raises(NotStored, match="no run 'x'"):
        store.of("x")


def test_a_runs_session_outlives_the_name_of_its_store(store):
    of_run = Store(store.path).of("r")
    assert of_run.sql("select act(token_id, 'r', 'embed') as x from tokens limit 1").height == 1
    of_run.close()
    with pytest.raises(BadInput, match="closed"):
        of_run.sql("select 1")


@pytest.mark.parametrize(
    "statement",
    [
        "drop schema memory.of_0 cascade",
        "drop view outcomes",
        "create or replace view outcomes as select 1 as x",
        "create table memory.of_0.more as select 1 as x",
        "insert into outcomes select * from store.main.outcomes",
        "set search_path = 'store.main'",
        "select * from read_text('/etc/passwd')",
    ],
)
def test_a_runs_session_is_as_locked_as_the_stores(store, statement):
    of_run = store.of("r")
    before = of_run.sql("from outcomes").height, store.sql("from outcomes").height
    with pytest.raises(BadInput):
        of_run.sql(statement)
    assert (of_run.sql("from outcomes").height, store.sql("from outcomes").height) == before


def test_sessions_of_runs_can_be_begun_from_several_threads(store):
    with Store(store.path) as fresh, ThreadPoolExecutor(8) as pool:
        asked = [run for run in fresh.runs() for _ in range(8)]
        found = list(pool.map(lambda run: fresh.of(run).sql("select distinct run from outcomes").item(), asked))
    assert found == asked


def test_a_run_of_any_name_has_a_session(tmp_path):
    fake("a+b=c,d.e-1", "d+").store(tmp_path / "s.act")
    with Store(tmp_path / "s.act") as store:
        assert store.of("a+b=c,d.e-1").sql("from outcomes").height == 5


# a read of one run


@pytest.mark.parametrize("run", ["r", "trees"])
@pytest.mark.parametrize("query", ["select token_id, tree_id from edge_targets", "from predictions", "from tokens"])
def test_a_read_of_a_run_sees_that_runs_trees_and_answers(store, run, query):
    (X, rows), said = notes(lambda: store.read(query, run, "embed"))
    assert not said
    first = 0 if run == "r" else 6
    assert X[:, 0].tolist() == (rows["tree_id"] - first).to_list()
    assert rows["token_id"].is_duplicated().sum() == 0
    assert store.explain(query, run, "embed").rows == len(X) == store.batches(query, run, "embed").n_rows


def test_a_read_that_names_a_run_sees_the_answers_of_every_run_over_its_trees(store):
    query = "select token_id from predictions where run = $other"
    X, _ = store.read(query, "r", "embed", {"other": "model"})
    assert len(X) == store.sql("select count(*) from predictions where run = 'r'").item()
    both = (
        "select a.token_id from predictions a join predictions b using (token_id) where a.run = 'r' and b.run = 'model'"
    )
    assert len(store.read(both, "r", "embed")[0]) == len(X)
    mixed = "select a.token_id from predictions a join predictions b using (token_id) where a.run = 'r'"
    (X_of_two, _), said = notes(lambda: store.read(mixed, "r", "embed"))
    assert len(X_of_two) == 2 * len(X)
    assert ["hold the answers of 2 runs (r, model)" in note and "where b.run = 'r'" in note for note in said] == [True]


def test_a_read_with_limits_sees_the_same(store):
    X, rows = store.read("from predictions", "trees", "embed", timeout=60)
    assert X[:, 0].tolist() == (rows["tree_id"] - 6).to_list()
    assert store.of("r").sql("from outcomes", timeout=60).height == 6
    _, said = notes(lambda: store.sql("select count(*) from outcomes", timeout=60))
    assert said == notes(lambda: store.sql("select count(*) from outcomes"))[1]
    assert len(said) == 1


# the note


def test_a_query_is_noted_each_time_and_its_runs_are_asked_for_once(store, monkeypatch):
    rows, asked = Session.rows, []
    monkeypatch.setattr(
        Session, "rows", lambda self, query, *of, **more: asked.append(query) or rows(self, query, *of, **more)
    )
    with Store(store.path) as fresh:
        for n_asked in (1, 0):
            said = notes(lambda: fresh.sql("select count(*) from outcomes"))[1]
            assert ["of 2 runs" in note or "of 3 runs" in note for note in said] == [True]
            assert len([query for query in asked if "distinct run" in query]) == n_asked
            asked.clear()
        assert notes(lambda: fresh.of("r").sql("select count(*) from outcomes"))[1] == []
        alone = notes(
            lambda: fresh.read(
                "select a.token_id from predictions a join predictions b using (token_id) where a.run = 'trees'",
                "trees",
            )
        )
        assert alone[1] == []  # one run has answers to its trees


MIXED = [
    "select count(*) from outcomes",
    "select tree_id, greedy_right from outcomes join trees using (tree_id) where not greedy_right",
    "select depth, avg(correct::int) from predictions join trees using (tree_id) group by depth",
    "select o.run, p.step from outcomes o join predictions p using (tree_id)",
    "select p.step from outcomes o join predictions p using (tree_id) where o.run = 'r'",
    "select p.step from outcomes o, predictions p where o.run = p.run and o.tree_id = p.tree_id",
    "select count(*) from Outcomes join predictions using (RUN, tree_id)",
    "with mine as (select * exclude (run) from outcomes) select tree_id from mine",
    "select tree_id from (from outcomes) where greedy_right",
    "select tree_id from trees where tree_id in (select tree_id from outcomes where greedy_right)",
    "select count(*) from outcomes where tree_id in (select first_tree_id from runs where run = 'r')",
    "from (select tree_id from outcomes union all select tree_id from trees)",
    "select count(*) from store.main.outcomes",
    "select count(*) from query('select tree_id from outcomes')",
    "explain select count(*) from outcomes",
    "-- why\nEXPLAIN ANALYZE select count(*) from outcomes",
    "explain (format json) select tree_id from predictions",
    "explain pivot outcomes on greedy_right using count(*) group by tree_id",
    "explain summarize select greedy_right from outcomes",
    "summarize select greedy_right from outcomes",
    "from (summarize select greedy_right from outcomes)",
    *(
        query.format(values)
        for values in ("", " in (true, false)")  # without IN, DuckDB first queries the values
        for query in (
            "pivot outcomes on greedy_right{} using count(*) group by tree_id",
            "pivot (select tree_id, greedy_right from outcomes) on greedy_right{} using count(*)",
            "pivot (from outcomes o join trees using (tree_id)) on greedy_right{} using count(*) as n, max(depth) group by depth",
            "pivot outcomes o join trees t on o.tree_id = t.tree_id on greedy_right{} using count(*) group by depth",
            "select count(*) from (pivot predictions on correct{} using avg(p_target) group by step)",
            "with p as (pivot outcomes on greedy_right{} using count(*) group by tree_id) from p",
            "with o as (select tree_id, greedy_right from outcomes) pivot o on greedy_right{} using count(*)",
            "(pivot outcomes on greedy_right{0} group by tree_id) union all (pivot outcomes on greedy_right{0} group by tree_id)",
        )
    ),
    "pivot outcomes on 'right ' || greedy_right using count(*) group by tree_id",
    "pivot trees on depth in ((select 1 from outcomes)) using count(*) group by root",
    "select * from outcomes pivot (count(*) for greedy_right in (true, false) group by tree_id)",
    "unpivot (select tree_id, greedy_right, teacher_forced_right from outcomes) on columns(* exclude (tree_id))",
    "unpivot (select tree_id, greedy_right from outcomes) on greedy_right into name n value v",
    "select tree_id from outcomes unpivot (v for n in (greedy_right))",
]
PLAIN = [
    "from outcomes",
    "select * from predictions p join trees using (tree_id)",
    "select run, avg(greedy_right::int) from outcomes group by run",
    "select avg(greedy_right::int) from outcomes where run = 'r'",
    "select avg(greedy_right::int) from outcomes where RUN in ('r')",
    "select o.tree_id from outcomes o join predictions p using (run, tree_id) where p.run = 'r'",
    "select o.tree_id from outcomes o join predictions p on o.run = p.run and o.tree_id = p.tree_id where o.run = 'r'",
    "select o.tree_id from outcomes o join outcomes p using (tree_id) where o.run = 'r' and p.run = 'model'",
    "select avg(greedy_right::int) from outcomes join runs using (run) where dataset = 'e'",
    "select avg(greedy_right::int) from outcomes semi join (select run from runs limit 1) using (run)",
    "with mine as (from outcomes) select tree_id from mine where run = 'r'",
    "with outcomes as (from trees) select tree_id from outcomes",
    "select tree_id from trees where exists (from outcomes o where o.tree_id = trees.tree_id and o.run = 'r')",
    "select count(act(token_id, run, 'embed')) from predictions",
    "select count(*) from trees join edges using (tree_id)",
    "select count(*) from generations",
    "select 'outcomes' as x",
    "describe outcomes",
    "show outcomes",
    "explain from outcomes",
    "explain analyze select * from outcomes join trees using (tree_id)",
    "explain describe outcomes",
    "explain select count(*) from outcomes where run = 'r'",
    "summarize outcomes",
    "summarize select greedy_right from outcomes where run = 'r'",
    "describe pivot outcomes on greedy_right using count(*) group by tree_id",
    *(
        query.format(values)
        for values in ("", " in ('r', 'model')")
        for query in (
            "pivot outcomes on run{} using count(*) group by tree_id",
            "pivot outcomes on run{} using count(*)",
            "explain pivot outcomes on run{} using count(*) group by tree_id",
        )
    ),
    "pivot outcomes on greedy_right",
    "pivot outcomes on greedy_right using count(*) group by tree_id, run",
    "select count(*) from (pivot outcomes on greedy_right using count(*) group by run)",
    "select count(*) from (pivot outcomes on greedy_right in (true) using count(*) group by run)",
    "pivot (from outcomes where run = 'r') on greedy_right using count(*) group by tree_id",
    "pivot trees on depth using count(*) group by root",
    "from outcomes unpivot (v for n in (greedy_right))",
    "from query('from outcomes')",
]


@pytest.mark.parametrize("query", MIXED)
def test_answers_of_several_runs_side_by_side_are_told(store, alone, query):
    _, said = notes(lambda: store.sql(query))
    assert len(said) == 1
    assert re.match(
        r"(outcomes|predictions|outcomes and predictions) hold the answers of 3 runs \(r, model, trees\), and", said[0]
    )
    assert "\n" not in said[0]
    assert not notes(lambda: alone.sql(query))[1], "one run alone cannot be mixed with another"
    of_run, advised = notes(lambda: store.of(re.search(r"store\.of\('(.*?)'\)", said[0])[1]).sql(query))
    if "store.main" not in query:
        assert not advised
        assert of_run.equals(alone.sql(query)) or "order" not in query


@pytest.mark.parametrize("query", PLAIN)
def test_a_query_that_says_which_run_is_told_nothing(store, query):
    assert not notes(lambda: store.sql(query))[1]


def test_what_the_note_advises_does_what_it_says(store, alone):
    (said,) = notes(lambda: store.sql("select count(*) from outcomes"))[1]
    condition = re.search(r"add `(where .*?)`", said)[1]
    assert not notes(lambda: store.sql(f"select count(*) from outcomes {condition}"))[1]
    words = shlex.split(re.search(r"\(`actstore (.*?)`\)", said)[1])
    query = "select count(*) as n from outcomes"
    result = CliRunner().invoke(main, [*(query if word == "…" else word for word in words), "--csv"])
    assert (result.stdout, result.stderr, result.exit_code) == ("n\n6\n", "", 0)


def test_the_command_line_gives_the_note_and_the_rows(store):
    result = CliRunner().invoke(main, ["sql", str(store.path), "select count(*) as n from outcomes", "--csv"])
    assert result.stdout == "n\n17\n"
    assert re.fullmatch(r"actstore: note: outcomes hold the answers of 3 runs .*\n", result.stderr)
    assert result.exit_code == 0


def test_the_warning_is_of_the_line_that_asked_and_can_be_an_error(store):
    with pytest.warns(SeveralRuns) as given:
        store.sql("select count(*) from outcomes")
    assert given[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", actstore.SeveralRuns)
        with pytest.raises(SeveralRuns):
            store.sql("select count(*) from outcomes")


def test_the_tables_that_are_noted_are_those_of_a_row_a_tree_and_run(store):
    both = "select table_name from information_schema.columns where table_catalog = 'store' and column_name = $c"
    held = [set(store.sql(both, {"c": column})["table_name"]) for column in ("run", "tree_id")]
    assert set.intersection(*held) == set(OF_RUNS)


# named queries take a run's rows from its session


@pytest.mark.parametrize("name", ["accuracy_by_depth", "tree_outcomes", "path_steps", "wrong_answers"])
def test_a_named_query_has_the_rows_that_the_run_has_alone(alone, store, name):
    assert queries.select(store, name, run="r").equals(queries.select(alone, name, run="r"))


# ids


REFUSED = [
    ("select act(tree_id, 'r', 'embed') as x from trees", "act", "tree_id"),
    ("select norm(act(t.tree_id, 'r', 'embed')) from trees t", "act", "tree_id"),
    ("select logit_lens(edge, 'r', 'embed') from edges", "logit_lens", "edge"),
    ("select 1 from trees where norm(ACT(Tree_Id, 'r', 'embed')) > 0", "act", "tree_id"),
    ("with a as (select act(position, 'r', 'embed') as x from tokens) select count(x) from a", "act", "position"),
    ("select (select sum(norm(act(root, 'r', 'embed'))) from trees)", "act", "root"),
    ("select tree_id.act('r', 'embed') from trees", "act", "tree_id"),
    ("select trees.tree_id.act('r', 'embed') from trees", "act", "tree_id"),
    ("from trees, (select unnest([1, 2]) as i) order by norm(act(i, 'r', 'embed'))", "act", "i"),
    ("select dot(act(token_id, 'r', 'embed'), act(tree_id, 'r', 'embed')) from tokens", "act", "tree_id"),
    ("explain select act(tree_id, 'r', 'embed') as x from trees", "act", "tree_id"),
    ("explain analyze select logit_lens(edge, 'r', 'embed') as x from edges", "logit_lens", "edge"),
    ("pivot (select depth, norm(act(tree_id, 'r', 'embed')) as n from trees) on depth using sum(n)", "act", "tree_id"),
    ("pivot trees on depth using sum(norm(act(tree_id, 'r', 'embed')))", "act", "tree_id"),
    ("pivot trees on norm(act(tree_id, 'r', 'embed')) > 0 using count(*) group by root", "act", "tree_id"),
    ("pivot trees on depth in (1, 2) using sum(norm(act(tree_id, 'r', 'embed')))", "act", "tree_id"),
    ("select act(tree_id, 'r', 'embed') from (pivot trees on depth using count(*) group by tree_id)", "act", "tree_id"),
    ("unpivot (select norm(act(tree_id, 'r', 'embed')) as n from trees) on n", "act", "tree_id"),
    ("summarize select act(tree_id, 'r', 'embed') as x from trees", "act", "tree_id"),
    ("describe select act(tree_id, 'r', 'embed') as x from trees", "act", "tree_id"),
    ("from query('select act(tree_id, ''r'', ''embed'') as x from trees')", "act", "tree_id"),
]


@pytest.mark.parametrize(("query", "function", "column"), REFUSED)
def test_a_column_that_is_no_token_id_is_refused_with_what_to_write(store, query, function, column):
    with pytest.raises(BadInput) as error:
        store.sql(query)
    said = str(error.value)
    assert said.startswith(f"{function}({column}, …) takes {column} for a token_id")
    assert f"{function}(token_id, …)" in said
    assert f"{function}({column} + 0, …)" in said
    assert "\n" not in said


RENAMED = [
    "select tree_id as token_id from trees",
    "select trees.tree_id token_id from trees",
    "from trees select token_id: tree_id",
    "select token_id from (select edge as token_id from edges)",
    "with t(token_id) as (select tree_id from trees) from t",
    "select token_id from (select tree_id from trees) t(token_id)",
    "select token_id from tokens union all select tree_id from trees",
    "select variant_of as Token_Id from trees",
    "select token_id from (pivot (select tree_id as token_id, depth from trees) on depth using count(*))",
    "pivot (select tree_id as token_id, depth from trees) on depth in (1, 2) using count(*)",
    "from query('select tree_id as token_id from trees')",
]


@pytest.mark.parametrize("query", RENAMED)
def test_another_id_renamed_is_no_token_id_to_read_by(store, query):
    for read in (store.read, store.explain, store.batches):
        with pytest.raises(BadInput, match=r"the query's token_id is \w+ renamed: .*select the token_id of tokens"):
            read(query, "r", "embed")
    if not query.startswith("select token_id from tokens union"):
        with pytest.raises(BadInput, match="renamed"):
            store.sql(f"select act(token_id, 'r', 'embed') from ({query})")
        store.sql(query)  # which reads nothing by it


@pytest.mark.parametrize(
    "query",
    [
        "select act(token_id, 'r', 'embed') as x from tokens where tree_id = 1 order by token_id",
        "select act(t.token_id, 'r', 'embed') as x from tokens t where tree_id = 1 order by token_id",
        "select act(my_token_id, 'r', 'embed') as x from (select token_id as my_token_id from tokens where tree_id = 1)",
        "select act(tree_id * 256 + position, 'r', 'embed') as x from tokens where tree_id = 1",
        "select act(i + 0, 'r', 'embed') as x from (select token_id as i from tokens where tree_id = 1)",
        "select act(\"token_id\", 'r', 'embed') as x from tokens where tree_id = 1",
        "select act(t.s.token_id, 'r', 'embed') as x from (select {'token_id': token_id} as s from tokens where tree_id = 1) t",
        "select tokens.token_id.act('r', 'embed') as x from tokens where tree_id = 1",
        "select unnest(list_transform(list(token_id order by token_id), lambda i: act(i, 'r', 'embed'))) as x "
        "from tokens where tree_id = 1",
    ],
)
def test_a_token_id_and_any_expression_pass(store, query):
    X, _ = store.read("from tokens where tree_id = 1 order by token_id", "r", "embed")
    np.testing.assert_array_equal(store.sql(query)["x"].to_numpy(), X)


@pytest.mark.parametrize(
    "query",
    [
        "select token_id as token_id from tokens",
        "select id as token_id from (select unnest([0, 1]) as id)",
        "select tree_id * 256 + position as token_id, tree_id from tokens",
        "select token_id, tree_id as edge_id from tokens",
    ],
)
def test_what_is_a_token_id_may_be_renamed_to_it(store, query):
    assert len(store.read(query, "r", "embed")[0]) > 1


def test_a_statement_that_the_parser_does_not_hand_out_is_asked_as_it_is(store):
    for query in ("selec 1", "explain", "explain pivot", "pivot (on", "pivot )) on", "from (", "pivot \ud800"):
        asked = Asked(store._opened.session, query)
        asked.refuse_other_ids(True)
        assert asked.without_run([]) == {}
    both = "select * from trees pivot (count(*) for depth in (1, 2)) p join (pivot outcomes on greedy_right) o on true"
    assert Asked(store._opened.session, both).without_run([]) == {"outcomes": "outcomes"}
    assert len(notes(lambda: store.sql(f"select 1 as one from ({both})"))[1]) == 1


def test_a_query_that_takes_no_where_is_advised_none(store):
    for query in ("pivot outcomes on greedy_right group by tree_id", "summarize select greedy_right from outcomes"):
        for kept in ("", "explain "):
            assert "where" not in notes(lambda query=kept + query: store.sql(query))[1][0]
    assert "add `where o.run = 'r'`" in notes(lambda: store.sql("explain select count(*) from outcomes o"))[1][0]
