"""The study `compare`: CKA against its equation, and planted pairs of models that hold the same, turned, or nothing alike."""

import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.rows import tree_rows
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import encode, token_rows
from actstore.queries import study
from actstore.queries.compare import study as compare
from actstore.queries.compare.controls import random_features
from actstore.queries.compare.study import cka, cka_interval
from actstore.queries.report import report
from actstore.store import Store
from tests.planted import plant
from tests.stores import all_right
from tests.test_pipeline import small_model

N, D = 120, 24
TREES = draw("deep", 3, 0, N, 6)


def by_the_equation(X, Z):
    """Kornblith et al. 2019: HSIC of linear kernels, centred by the matrix H, normalised."""
    n = len(X)
    centre = np.eye(n) - np.ones((n, n)) / n

    def hsic(K, L):
        return np.trace(K @ centre @ L @ centre)

    K, L = X @ X.T, Z @ Z.T
    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


def test_cka_is_that_of_the_equation():
    rng = np.random.default_rng(0)
    X, Z = rng.standard_normal((40, 5)) + 3, rng.standard_normal((40, 7))
    Z[:, 0] += 2 * X[:, 1]
    assert cka(X, Z) == pytest.approx(by_the_equation(X, Z))
    assert cka(X, X) == pytest.approx(1)


def test_cka_sees_through_rotation_and_scale_and_not_through_more():
    rng = np.random.default_rng(1)
    X = rng.standard_normal((300, 6)) * [9, 3, 1, 1, 1, 1]
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    assert cka(X, 5 * X @ turn + 2) == pytest.approx(1)
    assert cka(X, X * [1, 1, 1, 1, 1, 40]) < 0.5
    assert cka(X, np.zeros_like(X)) == 0


def test_an_interval_of_cka_resamples_whole_trees():
    rng = np.random.default_rng(5)
    trees = np.repeat(np.arange(30), 4)
    X = rng.standard_normal((120, 3)) + rng.standard_normal((30, 3)).repeat(4, axis=0)
    Z = X + rng.standard_normal((120, 3))
    low, high = cka_interval(X, Z, trees, 0)
    drawn = np.random.default_rng(0)
    by_hand = []
    for _ in range(1000):
        rows = (4 * drawn.integers(30, size=30)[:, None] + np.arange(4)).ravel()
        by_hand.append(by_the_equation(X[rows], Z[rows]))
    assert (low, high) == pytest.approx(tuple(np.quantile(by_hand, (0.025, 0.975))), abs=0.02)


def encoded():
    """float32 [tree, position, D]: each edge's source and target, written in directions of their own, and a little noise."""
    rng = np.random.default_rng(2)
    words = encode(TREES)
    values = 0.1 * rng.standard_normal((*words.shape, D))
    directions = rng.standard_normal((12, D))
    for edge in range(5):
        source, target = TREES.edges[:, edge].T
        values[:, 3 * edge + 1] += directions[source] + directions[6 + target]
    return values.astype(np.float32)


def outcomes(run, right):
    trees = tree_rows(TREES, 0, "made-up")
    frames = all_right(run, trees, token_rows(TREES, 0))
    frames["outcomes"] = frames["outcomes"].with_columns(greedy_right=np.asarray(right))
    return frames


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Run `one`; `turned` holds the same in another basis at site 0; both hold noise of their own at site 1."""
    path, rng = tmp_path_factory.mktemp("compare") / "s.act", np.random.default_rng(4)
    turn = np.linalg.qr(rng.standard_normal((D, D)))[0].astype(np.float32)
    numbers = np.arange(N)
    one = {"resid_post.0": encoded(), "resid_post.1": rng.standard_normal((N, 23, D)).astype(np.float32)}
    two = {"resid_post.0": encoded() @ turn, "resid_post.1": rng.standard_normal((N, 23, D)).astype(np.float32)}
    split = ["test" if number % 3 == 0 else "train" for number in numbers]
    plant(path, TREES, one, "one", split, outcomes("one", numbers >= 30))
    plant(path, TREES, two, "turned", split, outcomes("turned", numbers >= 10))
    with Store(path) as opened:
        yield opened


def value(answer, **where):
    found = answer.results.filter(**where)
    assert len(found) == 1
    return found.row(0, named=True)


def test_the_answer_says_which_errors_its_intervals_do_not_know_of(store):
    assert "The fitted probes are held fixed" in study.ask(store, "compare", run="one").sentence


def test_who_fails_where_is_counted(store):
    answer = study.ask(store, "compare", run="one")
    counts = {
        metric: value(answer, label="all", metric=metric)["value"]
        for metric in ("both_right", "only_run", "only_other")
    }
    assert counts == {"both_right": 90, "only_run": 0, "only_other": 20}
    assert value(answer, label="all", metric="both_wrong")["value"] == 10
    assert value(answer, label="all", metric="mcnemar_p")["value"] == pytest.approx(2 * 0.5**20)
    less = value(answer, label="all", metric="other_less_run")
    assert less["value"] == pytest.approx(20 / 120)
    assert less["low"] > 0
    by_depth = answer.results.filter(metric="only_other").filter(label="all")["value"].item()
    assert by_depth == answer.results.filter(metric="only_other")["value"].sum() - by_depth


def test_the_same_in_another_basis_is_alike_and_a_probe_needs_a_map(store):
    answer = study.ask(store, "compare", run="one")
    assert value(answer, site="resid_post.0", label="resid_post.0", metric="cka")["value"] == pytest.approx(1, abs=1e-4)
    probes = {
        row["metric"]: row["value"]
        for row in answer.results.filter(site="resid_post.0", label="source, run to other").to_dicts()
    }
    assert probes["own"] > 0.99
    assert probes["mapped"] > 0.99
    assert probes["as_it_is"] < 0.5
    assert probes["mapped_shuffled"] < 0.5


# The controls of the linear map.


def planted_pair(path, one, two):
    split = ["test" if number % 3 == 0 else "train" for number in range(N)]
    plant(path, TREES, one, "one", split, outcomes("one", np.ones(N, bool)))
    plant(path, TREES, two, "two", split, outcomes("two", np.ones(N, bool)))
    with Store(path) as opened:
        return study.ask(opened, "compare", run="one")


def untrained(seed):
    """float32 [tree, position, D]: random features, drawn with a seed, of every token of the list."""
    words = encode(TREES)[:, :15]
    at = (256 * np.arange(N)[:, None] + np.arange(15)).ravel()
    found = np.zeros((N, 23, D), np.float32)
    found[:, :15] = random_features((words.astype(np.intp), np.arange(len(words))), at, D, seed).reshape(N, 15, D)
    return found


def test_what_two_untrained_networks_share_by_a_map_is_not_claimed(tmp_path):
    answer = planted_pair(tmp_path / "s.act", {"resid_post.0": untrained(11)}, {"resid_post.0": untrained(12)})
    for way in ("run to other", "other to run"):
        found = {row["metric"]: row["value"] for row in answer.results.filter(label=f"source, {way}").to_dicts()}
        assert found["mapped"] > found["mapped_shuffled"] + 0.1, "the map makes something of nothing learned"
        assert found["mapped_random"] == pytest.approx(found["mapped"], abs=0.12)
    assert "(the map's controls) at 0 of 2 sites and directions" in answer.sentence


def test_what_the_embedding_holds_already_is_not_claimed_of_a_later_site(tmp_path):
    turn = np.linalg.qr(np.random.default_rng(8).standard_normal((D, D)))[0].astype(np.float32)
    one, two = encoded(), encoded() @ turn
    answer = planted_pair(
        tmp_path / "s.act", {"embed": one, "resid_post.0": one}, {"embed": two @ turn, "resid_post.0": two}
    )
    found = {
        row["metric"]: row
        for row in answer.results.filter(label="source, run to other", site="resid_post.0").to_dicts()
    }
    assert found["mapped"]["value"] > 0.99
    assert found["mapped_embed"]["value"] > 0.99
    assert found["mapped_above_controls"]["value"] == pytest.approx(0, abs=0.01)
    assert answer.frame["best control of the map"].str.ends_with("the embedding").all()
    assert "(the map's controls) at 0 of 4 sites and directions" in answer.sentence


def test_a_map_is_claimed_where_it_reads_more_than_its_controls_do(store):
    answer = study.ask(store, "compare", run="one")
    asked = {(test.site, test.label): test for test in answer.tests}
    assert len(asked) == 5, "two sites both ways, and McNemar's"
    for way in ("run to other", "other to run"):
        assert asked["resid_post.0", f"source, {way}"].found
        assert asked["resid_post.1", f"source, {way}"].estimate <= 0, "noise"
    assert "(the map's controls) at 2 of 4 sites and directions" in answer.sentence
    assert "Holm's correction covers all 5 comparisons" in answer.sentence
    found = {row["metric"]: row["value"] for row in answer.results.filter(label="source, run to other").to_dicts()}
    assert not [metric for metric in found if metric == "mapped_embed"], "neither run holds its embedding"


def test_a_map_that_reads_less_than_its_controls_is_not_called_found(store):
    answer = study.ask(store, "compare", run="one")
    turned = [replace(test, estimate=-test.estimate) if test.site == "resid_post.0" else test for test in answer.tests]
    assert [test.found for test in turned if test.site == "resid_post.0"] == [False, False]
    said = compare._mapped(answer.results, turned)
    assert "at 0 of 4 sites and directions, and less than after the best control at 4." in said


def test_fits_do_not_wait_for_threads_of_each_other(store, monkeypatch):
    limited, real = [], compare._transfer

    @contextmanager
    def counted():
        limited.append(True)
        yield
        limited.pop()

    def transfer(*args):
        assert limited
        return real(*args)

    monkeypatch.setattr(compare, "one_thread", counted)
    monkeypatch.setattr(compare, "_transfer", transfer)
    assert study.ask(store, "compare", run="one").results["site"].count()


def test_random_features_are_of_the_words_up_to_the_token_and_by_their_distance():
    words = np.random.default_rng(0).integers(6, size=(50, 15))
    at = 256 * np.arange(50) + 7
    first = random_features((words, np.arange(len(words))), at, D, 1)
    later = words.copy()
    later[:, 8:] = 5 - later[:, 8:]
    np.testing.assert_array_equal(first, random_features((later, np.arange(len(later))), at, D, 1))
    other = words.copy()
    other[:, [5, 6]] = other[:, [6, 5]]
    changed = (first != random_features((other, np.arange(len(other))), at, D, 1)).any(axis=1)
    np.testing.assert_array_equal(changed, words[:, 5] != words[:, 6])
    assert not np.array_equal(first, random_features((words, np.arange(len(words))), at, D, 2))


def test_noise_is_as_alike_as_shuffled_rows_and_no_probe_reads_it(store):
    answer = study.ask(store, "compare", run="one")
    found = value(answer, site="resid_post.1", label="resid_post.1", metric="cka")
    control = value(answer, site="resid_post.1", label="resid_post.1", metric="cka_shuffled")
    assert abs(found["value"] - control["value"]) < 0.05
    for row in answer.results.filter(site="resid_post.1").to_dicts():
        if row["label"].startswith("source") and row["low"] is not None:
            assert row["low"] < 0.3


def test_a_comparison_is_the_same_again_and_draws(store):
    first, again = study.ask(store, "compare", run="one"), study.ask(store, "compare", run="one", other="turned")
    assert first.results.equals(again.results)
    assert [len(axis.texts) for axis in study.plot(first).axes] == [len(first.frame) ** 2, 0], (
        "each cell has its number"
    )


def test_what_cannot_be_compared_is_said(store, demo_store):
    with pytest.raises(BadInput, match="over the trees of 'one' are: turned"):
        study.ask(store, "compare", run="one", other="one")
    with pytest.raises(NotStored, match="--model baseline --dataset reproduction"):
        study.ask(demo_store, "compare")


# Pairs.


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three models over the same trees, one of them in two runs, of which the second shares the sites of the others."""
    path = tmp_path_factory.mktemp("three") / "s.act"
    trees = TreeSet("reproduction", 100, n_nodes=6, name="d")
    for run, seed, sites in (
        ("a", 1, ["resid_post"]),
        ("b", 2, ["pattern.0"]),
        ("b-sites", 2, ["resid_post"]),
        ("c", 3, ["pattern.0"]),
    ):
        model = small_model(seed=seed)
        execute(Ingest(path, model, trees, run=run, sites=sites))
    with Store(path) as opened:
        yield opened


def pairs(questions):
    return [(question.run, question.options.get("other")) for question in questions]


def test_by_default_the_first_run_is_compared_with_every_other_model_where_they_share_most(three):
    assert pairs(study.questions(three, "compare")) == [("a", "b-sites"), ("a", "c")]


def test_of_one_run_every_pair_that_it_is_in_and_of_several_every_pair(three):
    assert pairs(study.questions(three, "compare", ["c"])) == [("c", "a"), ("c", "b")]
    assert pairs(study.questions(three, "compare", ["c", "b", "a"])) == [("c", "b"), ("c", "a"), ("b", "a")]
    assert pairs(study.questions(three, "compare", ["b", "b-sites", "a"])) == [("b", "a")]
    assert pairs(study.questions(three, "compare", ["a"], other="c")) == [("a", "c")]
    assert pairs(study.questions(three, "compare", ["b", "b-sites"])) == [("b", None)]


def test_the_report_compares_the_runs_that_it_is_given(three, tmp_path):
    made = report(three, tmp_path / "out", ["a", "c"])
    compared = [answer.question.of for answer in made.asked if answer.question.study == "compare"]
    assert compared == ["a and c"]
    assert made.faults == []


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_runs_that_share_no_residual_site_are_compared_by_their_answers_alone(three, tmp_path):
    result = run(
        "study", three.path, "compare", "--run", "a", "--run", "c", "--plot", tmp_path / "x.png", "--no-record"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert "share no residual site" in result.stdout
    header, _, first = result.stdout.splitlines()[:3]
    assert header.split("  ")[-1] == " by neither"
    counts = first.split()
    assert counts[:2] == ["all", "100"]
    assert sum(map(int, counts[2:])) == 100


def test_several_pairs_stand_in_one_table_and_each_has_its_figure(three, tmp_path):
    result = run("study", three.path, "compare", "--run", "a", "--plot", tmp_path / "x.png", "--csv", "--no-record")
    assert result.exit_code == 0, result.output
    table = pl.read_csv(result.stdout.encode())
    assert set(table.select("run", "other").rows()) == {("a", "b-sites"), ("a", "c")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-a-b-sites.png", "x-a-c.png"]


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        (
            120,
            0,
            r"The second is right less often \(100.00 points, 95 % interval \d+.\d\d to 100.00, McNemar's p < 0.001\)",
        ),
        (
            0,
            120,
            r"The second is right more often \(100.00 points, 95 % interval \d+.\d\d to 100.00, McNemar's p < 0.001\)",
        ),
        (
            60,
            60,
            r"do not differ significantly \(0.00 points, 95 % interval -\d+.\d\d to \d+.\d\d, McNemar's p = 1.000\)",
        ),
    ],
)
def test_a_difference_is_said_in_the_direction_that_it_has(tmp_path, mine, theirs, said):
    numbers = np.arange(N)
    for name, n_right in (("one", mine), ("two", theirs)):
        right = numbers < n_right if name == "one" or mine != theirs else numbers >= N - n_right
        plant(tmp_path / "s.act", TREES, {}, name, of_run=outcomes(name, right))
    with Store(tmp_path / "s.act") as opened:
        assert re.search(said, study.ask(opened, "compare", run="one").sentence)
