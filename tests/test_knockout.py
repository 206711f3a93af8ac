"""The study `knockout`, of a model that copies its goal: attention to the goal in layer 0 carries every answer."""

import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

import actstore
from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.task import TreeSet
from actstore.queries import study
from actstore.queries.knockout import CLASSES, PAIRS, layer_groups, random_keys
from actstore.store import Store
from actstore.verbs import patching
from tests.copying import copies, copying_model
from tests.reference import one_thread  # noqa: F401
from tests.test_figures import assert_legible
from tests.test_pipeline import small_model

NEEDED = """
select answer_tokens.token_id, goal.token_id as key_token_id
from answer_tokens join tokens as goal using (tree_id)
where goal.role = 'goal'
"""
AT_RANDOM = """
select answer_tokens.token_id, k.token_id as key_token_id
from answer_tokens join tokens as k on k.tree_id = answer_tokens.tree_id and k.token_id <= answer_tokens.token_id
qualify row_number() over (partition by answer_tokens.token_id order by hash(k.token_id + 7)) <= 4
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("knockout") / "s.act"
    copies(path, "a", ["resid_post"], 80)
    copies(path, "b", [], 60, seed=1)
    execute(Ingest(path, small_model(), TreeSet("reproduction", 60, n_nodes=6, name="noise"), "noise", sites=[]))
    return path


def ask(path, run="a", **options):
    with Store(path) as store:
        return study.ask(store, "knockout", run, 0, None, patching(store), **options)


def value(answer, label, metric, site):
    return answer.results.filter(label=label, metric=metric, site=site).row(0, named=True)


@pytest.fixture(scope="module")
def answer(path):
    return ask(path, to="goal,colon,separators,targets on path")


def test_the_one_class_that_carries_the_answer_is_found_where_it_does(answer):
    found = {(test.label, test.site) for test in answer.tests if test.found}
    assert found == {(label, site) for label in ("goal", "goal, loss") for site in ("pattern.0", "pattern")}
    assert value(answer, "goal", "accuracy_change", "pattern.0")["value"] == 1
    assert value(answer, "goal", "accuracy_change", "pattern.1")["value"] == 0
    assert value(answer, "goal", "loss_change", "pattern.0")["value"] > 2
    assert "costs more accuracy than as many random keys: goal (100.00 points" in answer.sentence.replace(
        "cost ", "costs "
    )


def test_the_figure_is_bold_where_something_was_found_and_needs_recorded_rows_alone(answer):
    bold = {True: [], False: []}
    for is_recorded in bold:
        figure = study.plot(replace(answer, tests=()) if is_recorded else answer)
        for axis in figure.axes:
            bold[is_recorded].append([text.get_weight() == "bold" for text in axis.texts])
    found = [test for test in answer.tests if test.found]
    assert len(found) == sum(sum(cells) for cells in bold[True]) > 0
    assert bold[True] == bold[False]
    assert [any(cells) for cells in bold[True]] == [True, False, True, False], "random keys are never found"
    assert_legible(figure)
    said = " ".join(figure.get_suptitle().split())
    (n,) = {row["n"] for row in answer.results.filter(metric="accuracy_change").to_dicts()}
    assert f"; {n:,} steps; " in said
    assert "95 % intervals" in said
    assert not [
        text
        for axis in figure.axes
        for text in axis.texts
        if text.get_text().strip("-0.") == "" and "-" in text.get_text()
    ]


def test_random_keys_that_hold_the_goal_cost_something_and_never_count_as_found(answer):
    control, beyond = (value(answer, "separators", f"accuracy_{what}", "pattern") for what in ("control", "beyond"))
    assert 0.1 < control["value"] < 0.6
    assert beyond["value"] == pytest.approx(-control["value"])
    assert next(test for test in answer.tests if test.key == ("pattern", "root and path", "separators")).below
    assert "separators" in answer.sentence.split("; ")[1]


def test_each_key_is_in_one_class_and_is_no_later_than_its_token(path):
    with Store(path) as store:
        ids = store.sql("select token_id from tokens where tree_id < 5")["token_id"]
        pairs, edges = store.sql(PAIRS, {"ids": ids}), store.sql("from edges where tree_id < 5")
        of_trees = store.sql("select tree_id, count(*) as n from tokens where tree_id < 5 group by tree_id")["n"]
    assert len(pairs) == pairs.select("token_id", "key_token_id").n_unique() == sum(n * (n + 1) // 2 for n in of_trees)
    assert set(pairs["class"]) == set(CLASSES)
    root = pairs.filter(pl.col("token_id") % 256 == 17, pl.col("token_id") < 256)
    by_class = {name: (keys["key_token_id"] % 256).to_list() for (name,), keys in root.group_by("class")}
    edge = edges.filter(pl.col("on_path"), tree_id=0)["edge"].item()
    assert by_class["targets on path"] == [3 * edge + 1]
    assert by_class["sources on path"] == [3 * edge]
    assert by_class["itself"] == [17]
    assert "own edge" not in by_class


def test_the_control_takes_as_many_keys_of_other_classes_from_each_token():
    keys = [
        (1, 10, "a"),
        (1, 11, "a"),
        (1, 12, "b"),
        (1, 13, "b"),
        (1, 14, "b"),
        (2, 20, "a"),
        (2, 21, "b"),
        (3, 30, "b"),
    ]
    pairs = pl.DataFrame(keys, schema=["token_id", "key_token_id", "class"], orient="row")
    drawn = [random_keys(pairs, "a", np.random.default_rng(seed)) for seed in range(20)]
    assert {frame["token_id"].to_list().count(1) for frame in drawn} == {2}
    assert all(
        frame.filter(token_id=2)["key_token_id"].to_list() == [21] and 3 not in frame["token_id"] for frame in drawn
    )
    assert {key for frame in drawn for key in frame["key_token_id"]} == {12, 13, 14, 21}


def test_layers_are_taken_alone_onward_and_together():
    assert layer_groups(1) == {"pattern.0": [0]}
    assert layer_groups(3) == {
        "pattern.0": [0],
        "pattern.1": [1],
        "pattern.2": [2],
        "pattern.1-2": [1, 2],
        "pattern": [0, 1, 2],
    }


def test_other_tokens_carry_nothing(path):
    answer = ask(path, **{"from": "separator", "to": "own edge"})
    assert answer.results["token_role"].unique().to_list() == ["separator"]
    assert not [test for test in answer.tests if test.found]
    assert "no class of keys costs more accuracy than as many random keys; own edge does not" in answer.sentence


def test_pairs_of_ones_own_are_a_class(path, tmp_path):
    file = tmp_path / "needed.sql"
    file.write_text(NEEDED)
    answer = ask(path, pairs=str(file))
    assert {test.label for test in answer.tests if test.found} == {"needed", "needed, loss"}
    assert value(answer, "needed", "accuracy_change", "pattern.0")["value"] == 1


def test_noise_gives_nothing(path, tmp_path):
    """Keys taken at random cost no more than keys taken at random, in a model that rests on all of them."""
    file = tmp_path / "random.sql"
    file.write_text(AT_RANDOM)
    answer = ask(path, "noise", pairs=str(file))
    assert abs(value(answer, "random", "loss_change", "pattern")["value"]) > 1e-4
    assert not [test for test in answer.tests if test.significant]


def test_findings_are_confirmed_on_a_second_set_and_drawn(path, tmp_path):
    options = {"to": "goal,bar", "from": "root", "trees": 60}
    asked = actstore.study(path, "knockout", ["a"], options=options, confirm="b", plot=str(tmp_path / "f.png"))[0]
    assert asked.error is None
    assert [claim.here.key for claim in asked.confirmation.claims if claim.confirmed] == [
        test.key for test in asked.answer.tests if test.found
    ]
    assert "found here" in asked.confirmation.sentence
    assert (tmp_path / "f.png").stat().st_size > 10_000
    with Store(path) as store:
        assert (
            store.sql("from results where study = 'knockout' and metric = 'confirmed'")["value"].to_list() == [1.0] * 4
        )


def test_the_command_takes_from_which_is_a_word_of_python(path):
    done = CliRunner().invoke(main, ["study", str(path), "knockout", "--run", "a", "-o", "from", "rot", "--no-record"])
    assert done.exit_code != 0
    assert "no role 'rot' to take attention from (did you mean 'root'?)" in re.sub(r"\s+", " ", done.output)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "gaol"}, r"no class of keys 'gaol'.*'goal'.*there are itself, own edge, goal"),
        ({"to": "own edge"}, r"no token attends to a key of the class 'own edge'; there are bar"),
        ({"trees": 0}, "got trees 0; it is a number of trees, 1 or more"),
        ({"pairs": "x.sql", "to": "goal"}, "got pairs and from or to"),
        ({"form": "root"}, "takes no 'form'.*from, to, pairs, trees"),
    ],
)
def test_options_without_a_meaning_are_refused(path, options, said):
    with pytest.raises(BadInput, match=said):
        ask(path, **options)


def test_pairs_may_be_read_from_a_table(path, tmp_path):
    (tmp_path / "own.sql").write_text("from pairs")
    with Store(path) as store:
        frame = store.of("a").sql(NEEDED)
    options = {"pairs": str(tmp_path / "own.sql"), "trees": 10}
    asked = actstore.study(path, "knockout", "a", options=options, tables={"pairs": frame}, record=False)
    (tmp_path / "own.sql").write_text(NEEDED)
    assert asked[0].answer.frame.equals(ask(path, pairs=str(tmp_path / "own.sql"), trees=10).frame)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("select token_id from tokens", "yield token_id, and no key_token_id"),
        ("select token_id, token_id + 1 as key_token_id from answer_tokens", "keys that the token does not attend to"),
        ("select token_id + 1e9::bigint as token_id, token_id as key_token_id from tokens", "of no answered tree"),
    ],
)
def test_pairs_that_are_none_are_refused(path, tmp_path, query, said):
    (tmp_path / "own.sql").write_text(query)
    with pytest.raises(BadInput, match=said):
        ask(path, pairs=str(tmp_path / "own.sql"))


def test_a_run_without_answers_is_told_which_ingest_adds_them(tmp_path):
    trees = TreeSet("deep", 4, n_nodes=6, depths=(1,), name="d")
    execute(Ingest(tmp_path / "s.act", copying_model(), trees, "dreams", prompt="tree", samples=0))
    with pytest.raises(NotStored, match=r"no answers to whole tasks.*`actstore ingest .*--model-of dreams"):
        ask(tmp_path / "s.act", "dreams")
