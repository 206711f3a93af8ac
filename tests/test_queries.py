"""The named queries: one contract for every .sql file there will ever be, and values by hand on three trees."""

import duckdb
import numpy as np
import polars as pl
import pytest

from actstore import queries
from actstore.catalog.tables import schema
from actstore.errors import BadInput, NotStored
from actstore.ingest.trees.tokens import ROLES, WORDS, decode
from actstore.queries import study
from actstore.store import Store
from tests.planted import plant
from tests.planted_text import lengths, plant_text

PROMPTS = (
    "0 →1 , 1 →2 , 0 →3 | 2 : 0 →1 →2",  # the last edge is off the path
    "3 →0 , 3 →1 , 1 →2 | 2 : 3 →1 →2",  # the last edge is on the path
    "2 →0 , 2 →1 , 0 →3 | 1 : 2 →1",
)
PARAMS = {"run": "tiny", "split": "train", "token_role": "edge_target", "site": "resid_post.0", "token_id": 0, "n": 5}
PARAMS |= {"place": 0, "distance": 0, "backward": False, "second": 0, "seed": 0, "label": "source"}
PARAMS |= {"dataset": "made-up", "model": "tiny"}
OTHER_PARAMS = {  # of queries that have no row for those
    "baseline_source_word": {"token_role": "edge_source"},
    "baseline_target_unlisted": {"token_role": "edge_source"},
    "attention_by_goal_distance": {"token_role": "root", "site": "pattern.0"},
}

OF_TEXT = ("loss_by_position", "accuracy_by_piece")  # queries of sequences that are no trees
OF_MORE = ("attention_by_goal_distance", "two_inner_children", "causal_directions")  # of what the tiny store lacks


def tree_rows_of(prompts):
    words = np.zeros((len(prompts), 15), np.uint8)
    for row, prompt in zip(words, prompts, strict=True):
        row[: len(prompt.split())] = [WORDS.index(word) for word in prompt.split()]
    return decode(words)


def steps(run, rows):
    """Rows of `predictions`: (tree, step, target, predicted), asked at the root (position 11) and after."""
    columns = {name: [row[i] for row in rows] for i, name in enumerate(("tree_id", "step", "target", "predicted"))}
    return pl.DataFrame(columns).with_columns(
        run=pl.lit(run),
        token_id=pl.col("tree_id") * 256 + 11 + pl.col("step"),
        p_target=pl.lit(0.5),
        correct=pl.col("target") == pl.col("predicted"),
    )


def answers(run, rows):
    """Rows of `outcomes`: (tree, right when teacher-forced, greedy path, greedy right, first wrong step, failure)."""
    names = ("tree_id", "teacher_forced_right", "greedy_path", "greedy_right", "first_wrong_step", "failure")
    return pl.DataFrame([dict(zip(names, row, strict=True)) for row in rows]).with_columns(run=pl.lit(run))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Run `tiny` over three trees of four nodes, and run `half`, stopped after the first two of them.

    What `tiny` says is made up so that no two columns of a query agree by chance: a model could not be right when
    teacher-forced and wrong when greedy.
    """
    root, trees = tmp_path_factory.mktemp("tiny") / "tiny.act", tree_rows_of(PROMPTS)
    where = np.arange(3 * 15, dtype=np.float32).reshape(3, 15, 1).repeat(2, axis=2)
    of_tiny = {
        "predictions": steps(
            "tiny", [(0, 0, "→1", "→1"), (0, 1, "→2", "→2"), (1, 0, "→1", "→1"), (1, 1, "→2", "→0"), (2, 0, "→1", ",")]
        ),
        "outcomes": answers(
            "tiny",
            [
                (0, True, [1, 2], True, None, None),
                (1, True, [1, 0], False, 1, "not_a_child"),
                (2, False, [], False, 0, "not_a_step"),
            ],
        ),
    }
    of_half = {
        "predictions": steps("half", [(0, 0, "→1", "→3"), (0, 1, "→2", "→3"), (1, 0, "→1", "→3"), (1, 1, "→2", "→3")]),
        "outcomes": answers("half", [(t, False, [3, 3], False, 0, "wrong_child") for t in (0, 1)]),
    }
    split = ["train", "test", "train"]
    plant(root, trees, {"resid_post.0": where}, "tiny", split, of_tiny, trees_per_shard=2)
    plant(root, trees, {"resid_post.0": where}, "half", split, of_half, trees_per_shard=2, batches=[0])
    with Store(root) as opened:
        yield opened


def next_tokens(tokens):
    """Rows of `predictions`: each token but the last of a sequence predicts, right where the next piece is a comma."""
    here = tokens.with_columns(target=pl.col("token").shift(-1).over("sequence_id")).drop_nulls("target")
    comma = pl.col("target") == ","
    return here.select(
        "token_id",
        "sequence_id",
        "target",
        predicted=pl.lit(","),
        p_target=pl.when(comma).then(0.5).otherwise(0.125),
        correct=comma,
        loss=pl.when(comma).then(np.log(2)).otherwise(np.log(8)) + pl.col("position"),
        rank=pl.when(comma).then(0).otherwise(4),
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    sites = {"embed": np.zeros((int(lengths(9).sum()), 2), np.float32)}
    with Store(
        plant_text(tmp_path_factory.mktemp("text") / "t.act", sites, "tiny", n=9, answers=next_tokens)
    ) as opened:
        yield opened


def test_loss_by_position_averages_over_the_sequences_that_reach_it(text):
    found = queries.select(text, "loss_by_position", run="tiny")
    assert found["position"].to_list() == list(range(8))
    assert (
        found["n_tokens"].to_list()
        == found["n_sequences"].to_list()
        == [int((lengths(9) > at + 1).sum()) for at in range(8)]
    )
    by_hand = (1 - found["accuracy"]) * np.log(8) + found["accuracy"] * np.log(2) + found["position"]
    np.testing.assert_allclose(found["mean_loss"].to_numpy(), by_hand.to_numpy(), rtol=1e-6)


def test_accuracy_by_piece_counts_each_piece_where_it_comes_next(text):
    found = queries.select(text, "accuracy_by_piece", run="tiny")
    counted = text.sql(
        "select token::varchar as piece, count(*) as n from tokens where position > 0 group by all order by all"
    )
    assert found.select("piece", "n_tokens").rows() == counted.rows()
    assert {piece: (share, rank) for piece, _, _, share, _, rank in found.rows()} == {
        piece: (1, 0) if piece == "," else (0, 4) for piece in counted["piece"]
    }


@pytest.fixture(scope="module")
def answered(answered_path):
    with Store(answered_path) as opened:
        yield opened


@pytest.mark.parametrize("name", queries.names())
def test_query_keeps_the_contract_of_its_header(store, text, answered, name):
    query = queries.load(name)
    store = text if name in OF_TEXT else answered if name in OF_MORE else store
    assert query.summary.endswith((".", "?"))
    assert query.note.endswith((".", "?")), "the assumption is a sentence"
    assert all({**query.yields, **query.params}.values()), "every column and parameter is explained"
    assert duckdb.extract_statements(query.sql)[0].named_parameters == set(query.params)
    params = {param: (PARAMS | OTHER_PARAMS.get(name, {}))[param] for param in query.params}
    frame = queries.select(store, name, **params)
    assert len(frame), f"{name} returns nothing on the tiny store, so nothing tests it"
    assert frame.columns == list(query.yields)
    assert frame.select(query.grain).is_duplicated().sum() == 0
    in_order = f"from ({query.sql}) order by {', '.join(query.grain)}"
    assert frame.equals(store.sql(in_order, params)), "rows come in the order of their grain"


@pytest.mark.parametrize("run", ["tiny", "half"])
@pytest.mark.parametrize("role", ["edge_source", "edge_target", "separator", "bar"])
def test_edge_tokens_of_a_run_are_the_tokens_it_holds(store, run, role):
    offset = {"edge_source": 0, "edge_target": 1, "separator": 2, "bar": 2}[role]
    edges = {"separator": [0, 1], "bar": [2]}.get(role, [0, 1, 2])
    trees = [0, 1] if run == "half" else [0, 1, 2]
    X, rows = store.read(queries.load("edge_tokens").sql, run=run, params={"run": run, "token_role": role})
    assert rows["token_id"].to_list() == [256 * tree + 3 * edge + offset for tree in trees for edge in edges]
    assert X[:, 0].tolist() == [15 * tree + 3 * edge + offset for tree in trees for edge in edges]


def test_edge_tokens_labels_each_token_with_its_edge(store):
    found = queries.select(store, "edge_tokens", run="tiny", token_role="edge_target")
    assert found.drop("token_id").rows() == [
        # tree, edge, source, target, on_path, is_last, depth, split
        (0, 0, 0, 1, True, False, 2, "train"),
        (0, 1, 1, 2, True, False, 2, "train"),
        (0, 2, 0, 3, False, True, 2, "train"),
        (1, 0, 3, 0, False, False, 2, "test"),
        (1, 1, 3, 1, True, False, 2, "test"),
        (1, 2, 1, 2, True, True, 2, "test"),
        (2, 0, 2, 0, False, False, 1, "train"),
        (2, 1, 2, 1, True, False, 1, "train"),
        (2, 2, 0, 3, False, True, 1, "train"),
    ]


def test_last_edge_reads_the_last_target_of_each_tree_of_its_split(store):
    assert queries.select(store, "last_edge", run="tiny", split="train").rows() == [
        (0, 7, 0, 3, False),
        (2, 2 * 256 + 7, 0, 3, False),
    ]
    assert queries.select(store, "last_edge", run="tiny", split="test").rows() == [(1, 256 + 7, 1, 2, True)]
    assert queries.select(store, "last_edge", run="half", split="train")["tree_id"].to_list() == [0]


def test_accuracy_by_depth_counts_steps_and_trees_apart(store):
    assert queries.select(store, "accuracy_by_depth", run="tiny").rows() == [
        (1, 1, 1, 0.0, 0.0, 0.0),
        (2, 2, 4, 0.75, 1.0, 0.5),
    ]
    assert queries.select(store, "accuracy_by_depth", run="half").rows() == [(2, 2, 4, 0.0, 0.0, 0.0)]


def test_accuracy_by_edge_place_tells_paths_through_the_last_edge_from_others(store):
    assert queries.select(store, "accuracy_by_edge_place", run="tiny").rows() == [
        (1, False, 1, 0.0, 0.0),
        (2, False, 1, 1.0, 1.0),
        (2, True, 1, 1.0, 0.0),
    ]


def test_wrong_answers_are_the_greedy_ones_beside_the_right_path(store):
    assert queries.select(store, "wrong_answers", run="tiny").rows() == [
        (1, 3, 2, 2, [1, 2], [1, 0], 1, "not_a_child", True),
        (2, 2, 1, 1, [1], [], 0, "not_a_step", False),
    ]


def test_role_counts_count_every_token_once(store):
    counts = (9, 9, 6, 3, 3, 3, 3, 5)
    assert queries.select(store, "role_counts").rows() == [
        ("made-up", role, n, 3) for role, n in zip(ROLES, counts, strict=True)
    ]


def test_a_query_of_a_run_that_is_not_there_names_those_that_are(store):
    with pytest.raises(NotStored, match=r"no run 'tony'.*tiny, half"):
        queries.select(store, "edge_tokens", run="tony", token_role="edge_target")


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, ["lacks run", "holds tiny, half: name one (-p run tiny, in Python run='tiny')"]),
        ({"rum": "tiny"}, ["lacks run", "-p run tiny", "no 'rum'", "did you mean 'run'?"]),
        ({"run": "tiny", "split": "train"}, ["no 'split'", "takes run"]),
    ],
)
def test_parameters_are_checked_by_name_both_ways(store, params, words):
    with pytest.raises(BadInput) as error:
        queries.select(store, "accuracy_by_depth", **params)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_a_query_that_lacks_a_parameter_says_what_the_parameter_is(store):
    with pytest.raises(BadInput, match=r"lacks split; it takes run, split; -p split …: 'train' or 'test'$"):
        queries.select(store, "last_edge", run="tiny")


def test_a_query_of_ones_own_without_its_run_names_those_that_are(store, tmp_path):
    (tmp_path / "own.sql").write_text("select count(*) as n from predictions where run = $run")
    with pytest.raises(BadInput, match=r"own\.sql' lacks run; the store holds tiny, half: name one \(-p run tiny, "):
        queries.select(store, str(tmp_path / "own.sql"))
    assert len(queries.select(store, str(tmp_path / "own.sql"), run="half")) == 1


@pytest.mark.parametrize(("name", "param"), [("last_edge", "split"), ("edge_tokens", "token_role")])
def test_a_value_that_the_schema_does_not_know_is_refused(store, name, param):
    params = {given: PARAMS[given] for given in queries.load(name).params}
    with pytest.raises(BadInput, match="trial"):
        queries.select(store, name, **{**params, param: "trial"})


def test_an_unknown_query_names_the_nearest_and_all_there_are(store):
    with pytest.raises(NotStored) as error:
        queries.select(store, "acuracy_by_dept")
    assert "did you mean 'accuracy_by_depth'?" in str(error.value)
    assert all(name in str(error.value) for name in queries.names())


def test_the_listing_has_every_query_with_its_parameters():
    listing = queries.listing()
    assert listing["query"].to_list() == queries.names()
    assert dict(listing.select("query", "params").rows())["last_edge"] == "run, split"


HEADER = """-- q: what its rows are,
-- said over two lines.
--
-- grain   a, b
-- params  $x  first
--         $y  second
-- yields  a  one
--         b  two words
--
-- Rests on this
-- and that.
-- Not blank.
select 1 -- grain   z
"""


def test_a_header_is_read_part_by_part():
    query = queries.parse("q", HEADER)
    assert query.summary == "what its rows are, said over two lines."
    assert query.grain == ["a", "b"]
    assert query.params == {"x": "first", "y": "second"}
    assert query.yields == {"a": "one", "b": "two words"}
    assert query.note == "Rests on this and that. Not blank."
    assert query.sql == HEADER


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("summary", "-- q: what its rows are,"),
        ("grain", "-- grain   a, b"),
        ("assumption", "-- Rests on this\n-- and that.\n-- Not blank."),
    ],
)
def test_a_header_that_lacks_a_part_is_refused_by_its_name(part, line):
    assert line in HEADER
    with pytest.raises(BadInput, match=f"q.sql .*without .*{part}"):
        queries.parse("q", HEADER.replace(line, "--"))


def test_the_columns_of_a_study_are_those_of_the_results_table():
    with duckdb.connect() as connection:
        connection.execute(schema())
        table = connection.sql("select * exclude recorded from results").pl()
    assert dict(table.schema) == study.RESULTS


def test_an_unknown_study_or_option_is_refused_with_what_there_is(store):
    with pytest.raises(NotStored, match="did you mean 'probes'"):
        study.ask(store, "prbes", run="tiny")
    with pytest.raises(BadInput, match=r"no 'token_rule' \(did you mean 'token_role'"):
        study.ask(store, "probes", run="tiny", token_rule="separator")


def test_a_study_asks_which_run_where_there_are_several(store):
    with pytest.raises(BadInput, match="tiny, half"):
        study.ask(store, "probes")
