"""The study `probes`: it finds what was planted, finds chance in noise, and lets no tree stand on both sides."""

import hashlib
import json

import numpy as np
import polars as pl
import pytest
import xxhash

from actstore import queries
from actstore.errors import BadInput, NotStored
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.tokens import n_positions
from actstore.queries import study
from actstore.queries.probes import figures, fit
from actstore.queries.probes import study as probes_study
from actstore.queries.probes.figures import TOKEN_ROLES
from actstore.store import Store
from actstore.writing.writer import open_writer
from tests.planted import plant
from tests.test_output import lines_at_80

N_TREES, N_NODES, D_MODEL = 150, 8, 24
N_EDGES = N_NODES - 1
TREES = draw("reproduction", 3, 0, N_TREES, N_NODES)
IS_TEST = TREES.hashes() % 5 == 0  # as the schema says: one tree in five


def planted_sites(trees, d_model=D_MODEL):
    """Noise everywhere, and at each edge's target token: in `resid_post.0` its source, in `resid_post.1` both nodes."""
    rng = np.random.default_rng(0)
    n_trees, n_nodes = len(trees), trees.n_nodes
    noise = rng.normal(size=(3, n_trees, 4 * n_nodes - 1, d_model)).astype(np.float32)
    direction = 4 * rng.normal(size=(2, n_nodes, d_model)).astype(np.float32)
    at_target = slice(1, 3 * (n_nodes - 1), 3)
    noise[1, :, at_target] += direction[0, trees.edges[:, :, 0]]
    noise[2, :, at_target] += direction[0, trees.edges[:, :, 0]] + direction[1, trees.edges[:, :, 1]]
    pattern = np.zeros((n_trees, 1, 4 * n_nodes - 1, 4 * n_nodes - 1), np.float32)
    return {"embed": noise[0], "pattern.0": pattern, "resid_post.0": noise[1], "resid_post.1": noise[2]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with Store(
        plant(tmp_path_factory.mktemp("probe") / "p.act", TREES, planted_sites(TREES), trees_per_shard=64)
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def found(store):
    return study.ask(store, "probes")


def value(found, site, label, metric="accuracy", column="value"):
    return found.results.filter(site=site, label=label, metric=metric)[column].item()


def at_chance(share, n_rows, n_classes=N_NODES):
    """Within five standard errors of one in n_classes."""
    chance = 1 / n_classes
    return abs(share - chance) < 5 * np.sqrt(chance * (1 - chance) / n_rows)


def test_a_probe_finds_what_was_planted_and_only_chance_in_noise(found):
    n = int(IS_TEST.sum()) * N_EDGES
    assert value(found, "resid_post.0", "source") > 0.99
    assert value(found, "resid_post.1", "source") > 0.99
    assert value(found, "resid_post.1", "target") > 0.99
    assert at_chance(value(found, "embed", "source"), n)
    assert at_chance(value(found, "embed", "target"), n)
    assert at_chance(value(found, "resid_post.0", "target"), n)


def test_shuffled_labels_give_chance_even_where_the_answer_is_planted(found):
    shuffled = found.results.filter(metric="shuffled_accuracy")
    assert len(shuffled) == 6
    assert all(at_chance(share, int(IS_TEST.sum()) * N_EDGES) for share in shuffled["value"])


def test_the_token_role_says_where_to_read(store):
    at_source = study.ask(store, "probes", token_role="edge_source", sites=["resid_post.1"])
    assert value(at_source, "resid_post.1", "source") < 0.5, "the source is planted at the target token alone"
    behind = study.ask(store, "probes", token_role="separator", sites=["resid_post.1"])
    assert value(behind, "resid_post.1", "target") < 0.5
    assert value(behind, "resid_post.1", "target", column="n") == IS_TEST.sum() * (N_EDGES - 1), (
        "the bar is no separator"
    )


def test_rows_of_one_tree_leak_across_a_split_by_row_and_not_by_tree():
    """Every row of a tree carries the tree's own vector and label: there is nothing to learn but which tree it is."""
    rng = np.random.default_rng(1)
    tree = np.arange(40).repeat(15)
    X = rng.normal(size=(40, 128)).astype(np.float32)[tree]
    y = rng.integers(4, size=40)[tree]
    (by_row,), (by_tree,) = (fit.fit_all([(X, y)], train) for train in (rng.random(len(tree)) < 0.8, tree < 32))
    assert by_row.right.mean() == 1.0
    assert by_tree.right.mean() < 0.7


def test_the_study_splits_by_tree(tmp_path):
    """Siblings share a vector that is their parent's in this tree alone, so a split by row would find sources."""
    rng = np.random.default_rng(2)
    own = rng.normal(size=(N_TREES, N_NODES, 512)).astype(np.float32)
    vectors = rng.normal(size=(N_TREES, 4 * N_NODES - 1, 512)).astype(np.float32)
    vectors[:, 1 : 3 * N_EDGES : 3] = own[np.arange(N_TREES)[:, None], TREES.edges[:, :, 0]]
    with Store(plant(tmp_path / "s.act", TREES, {"embed": vectors})) as opened:
        by_tree = value(study.ask(opened, "probes"), "embed", "source")
    X, y = vectors[:, 1 : 3 * N_EDGES : 3].reshape(-1, 512), TREES.edges[:, :, 0].reshape(-1).astype(np.int64)
    by_row = fit.fit_all([(X, y)], rng.random(len(y)) < 0.8)[0].right.mean()
    assert at_chance(by_tree, int(IS_TEST.sum()) * N_EDGES)
    assert by_row > 0.3, "the plant does leak"


def test_references_are_those_computed_by_hand(found):
    sources = TREES.edges[:, :, 0]
    labels, counts = np.unique(sources[~IS_TEST], return_counts=True)
    assert value(found, "embed", "source", "majority") == (sources[IS_TEST] == labels[counts.argmax()]).mean()
    assert value(found, "embed", "source", "chance") == 1 / N_NODES
    assert value(found, "embed", "source", column="n") == IS_TEST.sum() * N_EDGES
    assert value(found, "embed", "source", "iterations", column="n") == (~IS_TEST).sum() * N_EDGES


def test_patterns_are_not_probed_and_sites_keep_the_order_of_the_forward_pass(store, found):
    assert found.frame["site"].to_list() == ["embed", "resid_post.0", "resid_post.1"]
    some = study.ask(store, "probes", sites=["resid_post.1", "embed"])
    assert some.frame["site"].to_list() == ["embed", "resid_post.1"]


def test_twice_the_same_numbers_and_another_seed_moves_no_accuracy(store, found):
    again = study.ask(store, "probes", seed=0)
    other = study.ask(store, "probes", seed=1)
    assert again.results.equals(found.results)
    assert again.sentence == found.sentence
    accuracies = [answer.results.filter(metric="accuracy") for answer in (found, other)]
    assert accuracies[0]["value"].equals(accuracies[1]["value"])
    assert accuracies[0]["low"].equals(accuracies[1]["low"])


@pytest.mark.parametrize("n_cores", [1, 8])
def test_the_numbers_do_not_depend_on_how_many_cores_there_are(store, found, monkeypatch, n_cores):
    monkeypatch.setattr(fit.os, "cpu_count", lambda: n_cores)
    assert study.ask(store, "probes").results.equals(found.results)


def test_a_probe_that_is_stopped_is_said_to_be(store, found):
    assert found.results.filter(metric="converged")["value"].to_list() == [1.0] * 6
    assert "stopped" not in found.sentence
    assert "stopped early" not in found.frame.columns
    cut = study.ask(store, "probes", max_iter=2)
    assert value(cut, "resid_post.0", "target", "converged") == 0.0
    assert "stopped at 2 iterations" in cut.sentence
    assert "target" in dict(cut.frame.select("site", "stopped early").rows())["resid_post.0"]


def test_labels_are_shuffled_on_each_side_of_the_split():
    train = np.random.default_rng(0).random(1000) < 0.8
    order = fit.shuffle_within(train, seed=5)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(train[order], train)
    assert (order != np.arange(1000)).mean() > 0.95


def test_results_are_recorded_and_read_back(tmp_path):
    root = plant(tmp_path / "r.act", TREES, planted_sites(TREES))
    with Store(root) as opened:
        answer = study.ask(opened, "probes", seed=4)
        snapshot = opened.snapshot
    with open_writer(root) as writer:
        writer.record(answer.results)
    with Store(root) as opened:
        kept = opened.sql("select * exclude recorded from results")
        assert kept.equals(answer.results)
        first = kept.row(0, named=True)
        X, rows = opened.read(first["query"], site="embed", params=used(first["params"]))
    assert (first["study"], first["run"], first["seed"], first["snapshot"]) == ("probes", "planted", 4, snapshot)
    assert X.shape == (len(rows), D_MODEL) == (N_TREES * N_EDGES, D_MODEL), "a result says what to read to get it again"


def used(params):
    return {name: json.loads(params)[name] for name in ("run", "token_role")}


def test_the_table_and_the_sentence_say_what_the_results_hold(found):
    row = found.frame.row(by_predicate=pl.col("site") == "embed", named=True)
    low, high = (100 * value(found, "embed", "target", column=end) for end in ("low", "high"))
    assert row["target %"] == round(100 * value(found, "embed", "target"), 2)
    assert row["target 95 %"] == f"[{low:.2f}, {high:.2f}]"
    assert low < row["target %"] < high
    assert f"{100 * value(found, 'embed', 'target'):.2f} % (embed)" in found.sentence
    assert f"{IS_TEST.sum()} test trees" in found.sentence
    assert "12.50 %" in found.sentence, "chance among 8 nodes"
    assert figures.CAVEAT in found.sentence, "which errors the intervals do not know of"


def made_up(n_nodes, token_role="edge_target", sites=("embed", "resid_post.0"), share=0.95, system="reproduction"):
    metrics = (
        "accuracy",
        "shuffled_accuracy",
        "above_shuffled",
        "control_accuracy",
        "selectivity",
        "majority",
        "above_baseline",
    )
    rows = [
        {"site": site, "token_role": token_role, "label": label, "metric": metric, "value": share, "low": share - 0.01,
         "high": share + 0.01, "n": 100}
        for site in sites for label in figures.PAIR for metric in (*metrics, "converged")
    ]  # fmt: skip
    params = {"n_nodes": n_nodes, "max_iter": 300, "system": system}
    return study.result_rows(rows, study="probes", run="r", query="q", params=params, snapshot=1, seed=0)


def test_the_notebooks_numbers_stand_beside_what_they_can_be_compared_with():
    table = figures.as_frame(made_up(16, sites=("embed", "resid_post.3", "resid_mid.3")))
    notebook = table.select("notebook source %", "notebook target %").rows()
    assert notebook == [(6.64, 100.0), (94.30, 95.57), (None, None)]
    assert figures.as_frame(made_up(16, "separator"))["notebook source %"].to_list() == [6.43, 93.52]
    for other in (made_up(8), made_up(16, "edge_source"), made_up(16, system="baseline")):
        assert not [column for column in figures.as_frame(other).columns if "notebook" in column]


def test_of_several_tokens_each_has_the_notebooks_numbers_that_it_has():
    several = pl.concat([made_up(16, role) for role in ("separator", "edge_source", "edge_target")])
    rows = figures.as_frame(several).rows(named=True)
    assert [(row["token"], row["label"]) for row in rows[::2]] == [
        (role, label) for role in ("edge_target", "edge_source", "separator") for label in figures.PAIR
    ]
    numbers = [row["notebook %"] for row in rows]
    assert numbers == [6.64, 99.92, 100.0, 100.0, None, None, None, None, 6.43, 93.52, 6.25, 93.35]


def test_nothing_is_said_to_be_read_only_where_no_probe_is_above_what_so_many_probes_reach_by_chance():
    def found(*above):
        rows = [
            {"metric": "above_shuffled", "value": value, "low": value - 0.0196, "high": value + 0.0196}
            for value in above
        ]
        return study.result_rows(rows, study="probes", run="r", query="q", params={}, snapshot=1, seed=0)

    # standard error 0.01, so 1.96 of them are the limit of one probe, and 3.02 that of 20: 0.05 / 20 lies beyond, both sides
    assert figures.nothing_read(found(0.019))
    assert not figures.nothing_read(found(0.020))
    assert figures.nothing_read(found(*[0.0] * 19, 0.030))
    assert not figures.nothing_read(found(*[0.0] * 19, 0.031))


def test_the_figure_shows_the_results_with_chance_and_the_notebook(tmp_path):
    results = made_up(16)
    figure = study.plot(study.Answer("probes", pl.DataFrame(), results, ""))
    whole, zoomed = figure.axes
    for axis in (whole, zoomed):
        drawn = [line.get_ydata() for line in axis.get_lines()]
        assert sum(np.allclose(y, [95.0, 95.0]) for y in drawn if len(y) == 2) >= 2
        assert any(np.allclose(y, [6.64, 99.92]) for y in drawn), "the notebook's source"
        assert any(np.allclose(y, 6.25) for y in drawn), "chance"
    assert [text.get_text() for text in zoomed.get_xticklabels()] == ["embed", "resid_post.0"]
    assert whole.get_ylim()[0] < 0 < zoomed.get_ylim()[0] < figures.ZOOM
    assert all(figures.ZOOM <= tick <= 100 for tick in zoomed.get_yticks())
    figure.savefig(tmp_path / "probes.png")
    assert (tmp_path / "probes.png").read_bytes().startswith(b"\x89PNG")
    low = study.plot(study.Answer("probes", pl.DataFrame(), made_up(16, share=0.3), ""))
    assert len(low.axes) == 1, "nothing to show from 90 %"


def test_progress_names_each_site_once_it_is_done(store):
    said = []
    study.ask(store, "probes", sites=["embed", "resid_post.1"], progress=lambda *said_now: said.append(said_now))
    assert said == [(1, 2, "embed"), (2, 2, "resid_post.1")]


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (["train", "train", "train"], ["3 training and 0 test trees", "2 test trees are needed"]),
        (["train", "train", "test"], ["2 training and 1 test trees", "2 test trees are needed"]),
        (["test", "test", "train"], ["1 training and 2 test trees", "no training edge has source"]),
    ],
)
def test_too_few_trees_are_refused_with_how_many_are_enough(tmp_path, split, words):
    few = draw("reproduction", 0, 0, 3, N_NODES)
    path = plant(tmp_path / "few.act", few, planted_sites(few), split=split)
    with Store(path) as opened, pytest.raises(BadInput) as error:
        study.ask(opened, "probes")
    assert all(word in str(error.value) for word in [*words, f"{probes_study.ENOUGH_TREES} trees or more"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("n_nodes", [3, 4, 16, 64])
def test_as_many_trees_as_the_message_asks_for_are_enough(n_nodes):
    for seed in range(20):
        trees = draw("reproduction", seed, 0, probes_study.ENOUGH_TREES, n_nodes)
        is_test = trees.hashes() % 5 == 0
        assert is_test.sum() >= probes_study.MIN_TEST_TREES
        assert len(np.unique(trees.edges[~is_test, :, 0])) == n_nodes
        assert len(np.unique(trees.edges[~is_test, :, 1])) == n_nodes


def test_of_trees_of_two_nodes_none_is_for_testing_and_the_message_says_so(tmp_path):
    smallest = draw("reproduction", 0, 0, 60, 2)
    path = plant(tmp_path / "2.act", smallest, planted_sites(smallest))
    with Store(path) as opened, pytest.raises(BadInput, match="ingest larger ones"):
        study.ask(opened, "probes")


def test_a_run_that_was_defined_and_not_ingested_is_refused(tmp_path):
    path = plant(tmp_path / "none.act", TREES, planted_sites(TREES), batches=[])
    with Store(path) as opened, pytest.raises(BadInput, match="0 training and 0 test trees"):
        study.ask(opened, "probes")


def test_unknown_sites_and_roles_are_refused_with_what_there_is(store):
    with pytest.raises(NotStored, match=r"no site 'resid_pst.0' \(did you mean 'resid_post.0'\?.*embed"):
        study.ask(store, "probes", sites=["resid_pst.0"])
    with pytest.raises(NotStored, match=r"no site 'pattern\.0' to probe"):
        study.ask(store, "probes", sites=["pattern.0"])
    with pytest.raises(BadInput, match=r"edge_targt.*did you mean 'edge_target'"):
        study.ask(store, "probes", token_role="edge_targt")


def test_a_run_without_residual_sites_is_refused(tmp_path):
    patterns = {"pattern.0": np.zeros((len(TREES), 1, n_positions(N_NODES), n_positions(N_NODES)), np.float32)}
    path = plant(tmp_path / "patterns.act", TREES, patterns)
    with Store(path) as opened, pytest.raises(NotStored, match=r"no residual site to probe; it holds pattern.0"):
        study.ask(opened, "probes", labels="source")


# Other tokens, other labels, other protocols.


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Noise, and in `resid_post.0`: at the source token of the next edge this edge's target, and at the root and each step of
    the path the node to go to next; at a target token whether its edge is on the path."""
    rng = np.random.default_rng(9)
    width = 4 * N_NODES - 1
    noise = rng.normal(size=(N_TREES, width, D_MODEL)).astype(np.float32)
    directions = 4 * rng.normal(size=(3, N_NODES, D_MODEL)).astype(np.float32)
    planted = noise.copy()
    planted[:, 3 : 3 * N_EDGES : 3] += directions[0, TREES.edges[:, :-1, 1]]
    planted[:, 1 : 3 * N_EDGES : 3] += directions[1, TREES.edges_on_path().astype(int)]
    for tree in range(N_TREES):
        for step in range(TREES.depth[tree]):
            planted[tree, 3 * N_NODES - 1 + step] += directions[2, TREES.path[tree, step]]
    path = plant(tmp_path_factory.mktemp("elsewhere") / "p.act", TREES, {"embed": noise, "resid_post.0": planted})
    with Store(path) as opened:
        yield opened


def test_each_label_is_found_at_the_token_it_was_planted_at_and_nowhere_else(elsewhere):
    answer = study.ask(elsewhere, "probes", token_role="all", labels="source,target,on_path,next_node")
    read = {
        (row["token_role"], row["label"])
        for row in answer.results.filter(metric="above_shuffled", site="resid_post.0").to_dicts()
        if row["value"] > 0.2
    }
    assert {("next_source", "target"), ("edge_target", "on_path"), ("path", "next_node")} <= read
    assert not [where for where in read if where[1] == "source"]
    assert ("edge_target", "target") not in read
    nothing = answer.results.filter(metric="above_shuffled", site="embed")
    assert all(row["low"] < 0.06 for row in nothing.to_dicts())
    assert set(answer.frame["token"]) == set(TOKEN_ROLES)
    assert study.plot(answer).axes


def test_the_path_is_asked_for_the_node_to_go_to(elsewhere):
    answer = study.ask(elsewhere, "probes", token_role="path", sites="resid_post.0")
    assert value(answer, "resid_post.0", "next_node") > 0.95
    assert value(answer, "resid_post.0", "next_node", column="n") == int(TREES.depth[IS_TEST].sum())


def test_as_many_random_directions_read_less_than_the_probes_own(found):
    assert value(found, "resid_post.1", "source", "random_directions_accuracy") < value(found, "resid_post.1", "source")
    assert at_chance(value(found, "embed", "source", "random_directions_accuracy"), int(IS_TEST.sum()) * N_EDGES)


def test_what_a_probe_is_above_is_what_its_control_leaves(found):
    for site in ("embed", "resid_post.1"):
        for metric, control in (("above_shuffled", "shuffled_accuracy"), ("selectivity", "control_accuracy")):
            expected = value(found, site, "source") - value(found, site, "source", control)
            assert value(found, site, "source", metric) == pytest.approx(expected)
    low, high = (value(found, "embed", "source", "above_shuffled", end) for end in ("low", "high"))
    assert low < 0 < high


# Hewitt and Liang's control task.


def test_the_table_shows_selectivity_of_each_label_with_its_interval(elsewhere):
    answer = study.ask(elsewhere, "probes", labels="goal,on_path", sites="resid_post.0")
    assert answer.frame["label"].to_list() == ["goal", "on_path"]
    for label, shown in answer.frame.select("label", "selectivity, points").rows():
        ends = [100 * value(answer, "resid_post.0", label, "selectivity", end) for end in ("value", "low", "high")]
        assert shown == f"{ends[0]:+.2f} [{ends[1]:+.2f}, {ends[2]:+.2f}]"


def words_and_positions(n_trees=400, n_words=12, n_positions=12):
    rng = np.random.default_rng(6)
    shape = (n_trees, 10)
    return rng.integers(n_words, size=shape).ravel(), rng.integers(n_positions, size=shape).ravel()


def test_the_control_tasks_labels_are_of_types_alone_and_as_frequent_as_the_labels():
    words, positions = words_and_positions()
    y = np.random.default_rng(1).choice(4, p=(0.7, 0.1, 0.1, 0.1), size=len(words))
    train = np.arange(len(words)) < 3000
    types = 12 * words + positions
    labels = fit.control_labels(types, y, train, seed=0)
    by_type = {}
    for word, position, label in zip(words, positions, labels, strict=True):
        by_type.setdefault((word, position), set()).add(label)
    assert len(by_type) == 144
    assert all(len(given) == 1 for given in by_type.values()), "a type has one label wherever it stands, test trees too"
    drawn = [given.pop() for given in by_type.values()]
    assert np.mean([label == 0 for label in drawn]) == pytest.approx(0.7, abs=0.13)
    assert len({by_type_label for (word, _), by_type_label in zip(by_type, drawn, strict=True) if word == 3}) > 1, (
        "the position is part of the type"
    )
    assert not np.array_equal(labels, fit.control_labels(types, y, train, seed=1))


def test_a_probe_that_can_memorise_has_low_selectivity_and_a_planted_direction_has_high():
    words, positions = words_and_positions()
    rng = np.random.default_rng(7)
    train, label_of = np.arange(len(words)) < 3000, rng.integers(4, size=(12, 12))
    kinds = np.eye(144, dtype=np.float32)[12 * words + positions]  # a direction for each type: any list can be kept
    memorised, noise = label_of[words, positions], rng.normal(size=(len(words), 20)).astype(np.float32)
    meant = rng.integers(4, size=len(words))  # a label that no type tells
    planted = noise + 5 * np.eye(20, dtype=np.float32)[meant]
    selectivity = {}
    for name, X, y in (("memorised", kinds, memorised), ("planted", planted, meant)):
        control = fit.control_labels(12 * words + positions, y, train, seed=0)
        own, other = fit.fit_all([(X, y), (X, control)], train)
        assert own.right.mean() > 0.98
        selectivity[name] = own.right.mean() - other.right.mean()
    assert selectivity["memorised"] < 0.05
    assert selectivity["planted"] > 0.6


def test_a_control_whose_types_all_have_one_label_is_fitted_too():
    (made,) = fit.fit_all([(np.eye(4, dtype=np.float32), np.full(4, 3))], np.array([True, True, False, False]))
    assert made.right.tolist() == [True, True]
    assert made.converged
    assert (made.weights.shape, made.intercepts.shape) == ((1, 4), (1,))


def test_selectivity_tells_planted_directions_from_what_stands_at_the_token(tmp_path):
    """`embed` keeps each word and position in a direction of its own; `resid_post.0` the edge's source in noise."""
    types = np.zeros((N_TREES, 4 * N_NODES - 1, N_NODES * N_EDGES), np.float32)
    tree, edge = np.ogrid[:N_TREES, :N_EDGES]
    types[tree, 3 * edge + 1, TREES.edges[:, :, 1] * N_EDGES + edge] = 1
    sites = {"embed": types, "resid_post.0": planted_sites(TREES, types.shape[2])["resid_post.0"]}
    with Store(plant(tmp_path / "s.act", TREES, sites)) as opened:
        answer = study.ask(opened, "probes")
    assert value(answer, "embed", "target") > 0.99
    assert value(answer, "embed", "target", "control_accuracy") > 0.9
    assert value(answer, "embed", "target", "selectivity") < 0.1
    assert value(answer, "resid_post.0", "source", "selectivity") > 0.5


def test_noise_alone_is_said_to_tell_nothing(tmp_path):
    noise = np.random.default_rng(3).normal(size=(N_TREES, 4 * N_NODES - 1, D_MODEL)).astype(np.float32)
    with Store(plant(tmp_path / "s.act", TREES, {"embed": noise})) as opened:
        assert "No probe reads more than the same probe on shuffled labels." in study.ask(opened, "probes").sentence


def test_whitened_rows_have_no_correlation_and_drop_what_is_no_dimension():
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(500, 4)) @ rng.normal(size=(4, 7)) + 3).astype(np.float32)
    whiten = fit.Whitening.of(X)
    Z = whiten(X)
    assert Z.shape == (500, 4)
    np.testing.assert_allclose(np.cov(Z.T), np.eye(4), atol=1e-3)


def test_rows_that_are_all_the_same_tell_no_more_than_the_most_frequent_label(tmp_path):
    """As a separator's embedding is: the same vector wherever it stands."""
    same = np.broadcast_to(
        np.float32(1) / np.arange(3, D_MODEL + 3, dtype=np.float32), (N_TREES, 4 * N_NODES - 1, D_MODEL)
    )
    with Store(plant(tmp_path / "s.act", TREES, {"embed": same})) as opened:
        answer = study.ask(opened, "probes", token_role="separator", protocol="notebook")
    for label in ("source", "target"):
        assert value(answer, "embed", label) == value(answer, "embed", label, "majority")
        assert value(answer, "embed", label, "converged") == 1
    assert "No probe reads more than the same probe on shuffled labels." in answer.sentence


def test_a_result_names_its_data_by_a_hash_of_ids_labels_and_split(store, found):
    tokens = store.sql(queries.load("probe_tokens").sql, {"run": "planted", "token_role": "edge_target"})
    digest = xxhash.xxh3_128()
    for column in ("token_id", "source", "target"):
        digest.update(np.array(tokens[column].to_list(), np.int64).tobytes())
    digest.update(np.array([split == "train" for split in tokens["split"]]).tobytes())
    assert json.loads(found.results["params"][0])["data_xxh3"] == digest.hexdigest()


def test_each_result_of_several_tokens_says_what_to_read_to_get_it_again(store):
    answer = study.ask(store, "probes", token_role="edge_source,separator", sites="embed")
    for role in ("edge_source", "separator"):
        first = answer.results.filter(token_role=role, metric="accuracy").row(0, named=True)
        _, rows = store.read(first["query"], site="embed", params=used(first["params"]))
        assert first["n"] == len(rows.filter(split="test"))
    assert (
        f"The source is read at {100 * first['value']:.2f} % at every site" in answer.sentence.split("Linear probes")[2]
    )


def test_a_result_names_its_trees_by_a_hash_and_its_models_weights(store, found):
    params = json.loads(found.results["params"][0])
    digest = xxhash.xxh3_128(np.array(TREES.hashes(), np.uint64).tobytes())
    digest.update(np.array(TREES.goal, np.uint8).tobytes())
    assert params["trees_xxh3"] == digest.hexdigest()
    assert params["weights_sha256"] == hashlib.sha256(b"planted").hexdigest()


def test_of_several_tokens_those_without_the_label_are_left_out(elsewhere):
    answer = study.ask(elsewhere, "probes", token_role="edge_target,path", labels="next_node", sites="embed")
    assert answer.results["token_role"].unique().to_list() == ["path"]
    assert answer.results["label"].unique().to_list() == ["next_node"]


def test_what_no_probe_can_be_asked_is_refused(store):
    with pytest.raises(BadInput, match=r"no label 'sourc'.*did you mean 'source'"):
        study.ask(store, "probes", labels="sourc")
    with pytest.raises(BadInput, match="none of the labels asked for is one of path; there are goal, next_node"):
        study.ask(store, "probes", token_role="path", labels="source")
    with pytest.raises(BadInput, match="there are ours, notebook"):
        study.ask(store, "probes", protocol="theirs")
    with pytest.raises(BadInput, match="no token_role ''; there are edge_target"):
        study.ask(store, "probes", token_role=[])
    with pytest.raises(BadInput, match="no label '3'"):
        study.ask(store, "probes", labels=3)  # what the command line makes of digits
    with pytest.raises(NotStored, match="no site '5'"):
        study.ask(store, "probes", sites=5)
    with pytest.raises(NotStored, match="no site ''"):
        study.ask(store, "probes", sites=[])
    for max_iter in (0, "many"):
        with pytest.raises(BadInput, match=f"got max_iter {max_iter!r}"):
            study.ask(store, "probes", max_iter=max_iter)


def test_the_table_fits_a_terminal_of_80_columns(found, monkeypatch):
    lines = lines_at_80(found.frame, monkeypatch)
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert not any("…" in line for line in lines)
    assert " 100" in "".join(lines)
