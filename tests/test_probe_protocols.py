"""The notebook's protocol: it is the notebook's, it leaks what a split by tree does not, and its steps to ours add up."""

import numpy as np
import polars as pl
import pytest
import torch

from actstore.ingest.trees.draw import draw
from actstore.queries import study
from actstore.queries.probes import protocols
from actstore.store import Store
from tests.planted import plant

N_TREES, N_NODES, D_MODEL = 150, 8, 24
N_EDGES = N_NODES - 1
WIDTH = 4 * N_NODES - 1
TREES = draw("reproduction", 3, 0, N_TREES, N_NODES)
IS_TEST = TREES.hashes() % 5 == 0
STEPS = ("notebook_accuracy", "notebook_by_tree", "without_last", "accuracy")


def value(found, label, metric="accuracy", column="value"):
    return found.results.filter(label=label, metric=metric)[column].item()


def ask(folder, embed, **options):
    with Store(plant(folder / "s.act", TREES, {"embed": embed})) as opened:
        return study.ask(opened, "probes", protocol="notebook", **options)


@pytest.fixture(scope="module")
def last_hidden(tmp_path_factory):
    """At each edge's target token its source, but for the edge listed last."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(N_TREES, WIDTH, D_MODEL)).astype(np.float32)
    directions = 4 * rng.normal(size=(N_NODES, D_MODEL)).astype(np.float32)
    values[:, 1 : 3 * (N_EDGES - 1) : 3] += directions[TREES.edges[:, :-1, 0]]
    return ask(tmp_path_factory.mktemp("last"), values)


def test_the_layer_is_trained_as_adamw_is_defined():
    """One batch of 64 rows, so that their order does not matter: five steps, written out in float64."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(64, 5)).astype(np.float32), np.arange(64) % 3
    weight, bias = protocols._train(X, y, seed=7)
    generator = torch.Generator().manual_seed(7)
    start = [torch.empty(shape).uniform_(-(5**-0.5), 5**-0.5, generator=generator).double() for shape in ((3, 5), (3,))]
    w = np.concatenate([start[0].numpy(), start[1].numpy()[:, None]], axis=1)
    rows, first, second = np.concatenate([X, np.ones((64, 1))], axis=1), 0.0, 0.0
    for step in range(1, 6):
        p = np.exp(rows @ w.T)
        p /= p.sum(axis=1, keepdims=True)
        gradient = (p - np.eye(3)[y]).T @ rows / 64
        w = w * (1 - 1e-3 * 0.01)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        w = w - 1e-3 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(np.concatenate([weight, bias[:, None]], axis=1), w, atol=1e-6)
    assert np.abs(w[:, :5] - start[0].numpy()).min() > 4e-3, "five steps of 1e-3 are seen"


def test_a_layer_starts_as_one_of_torchs_own_does():
    starts = torch.cat([torch.nn.Linear(128, 16).weight.flatten() for _ in range(20)])
    assert starts.abs().max().item() == pytest.approx(128**-0.5, rel=1e-3)


def test_how_many_threads_torch_has_is_left_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        protocols.linear_layer(np.eye(4, dtype=np.float32), np.arange(4), np.eye(4, dtype=np.float32), 0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_notebooks_protocol_leaks_what_a_split_by_tree_does_not(tmp_path):
    """Each tree has a vector and a goal of its own, on all its rows: known rows tell unknown ones of the same tree."""
    own = 3 * np.random.default_rng(1).normal(size=(N_TREES, 1, 300)).astype(np.float32)
    answer = ask(tmp_path, np.repeat(own, WIDTH, axis=1), labels="goal")
    n_test, chance = int(IS_TEST.sum()), 1 / N_NODES
    assert value(answer, "goal", "notebook_accuracy") > 0.9
    for metric in ("notebook_by_tree", "without_last", "accuracy"):  # a tree counts once, with one label
        assert value(answer, "goal", metric) < chance + 5 * np.sqrt(chance * (1 - chance) / n_test)
    leak = 100 * (value(answer, "goal", "notebook_by_tree") - value(answer, "goal", "notebook_accuracy"))
    assert f"{leak:+.2f} from a split by tree" in answer.sentence
    assert leak < -50


def test_its_rows_are_those_without_the_last_edge_one_in_five_of_them_for_testing(last_hidden):
    assert value(last_hidden, "source", "notebook_accuracy", "n") == np.ceil(0.2 * N_TREES * (N_EDGES - 1))
    for metric in ("notebook_by_tree", "without_last"):
        assert value(last_hidden, "source", metric, "n") == IS_TEST.sum() * (N_EDGES - 1)
    assert value(last_hidden, "source", "accuracy", "n") == IS_TEST.sum() * N_EDGES


def test_what_the_last_edges_alone_lack_is_said_to_come_of_them(last_hidden):
    assert value(last_hidden, "source", "without_last") > 0.99
    assert value(last_hidden, "source") == pytest.approx((N_EDGES - 1 + 1 / N_NODES) / N_EDGES, abs=0.03)
    last = 100 * np.mean(
        [value(last_hidden, label) - value(last_hidden, label, "without_last") for label in ("source", "target")]
    )
    assert f"{last:+.2f} from the last edge" in last_hidden.sentence


def test_the_steps_to_our_number_add_up(last_hidden):
    mean = [100 * last_hidden.results.filter(metric=metric)["value"].mean() for metric in STEPS]
    words = last_hidden.sentence.partition("with the notebook's protocol")[2].replace(";", " ").split()
    said = [float(word) for word in words if word[0] in "+-"]
    assert said == pytest.approx([mean[3] - mean[0], *np.diff(mean)], abs=0.006)
    assert said[0] == pytest.approx(sum(said[1:]), abs=0.03)


def test_where_no_edge_is_the_last_leaving_it_out_changes_nothing(tmp_path):
    noise = np.random.default_rng(2).normal(size=(N_TREES, WIDTH, D_MODEL)).astype(np.float32)
    answer = ask(tmp_path, noise, token_role="separator")
    for label in ("source", "target"):
        assert value(answer, label, "without_last") == value(answer, label)
    assert "+0.00 from the last edge" in answer.sentence


def test_both_tables_stand_side_by_side(last_hidden):
    row = last_hidden.frame.row(0, named=True)
    for label in ("source", "target"):
        for metric, name in zip(
            STEPS[:3], ("its protocol here", "its, split by tree", "ours, last edge left out"), strict=True
        ):
            assert row[f"{label}, {name} %"] == round(100 * value(last_hidden, label, metric), 2)


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    noise = np.random.default_rng(4).normal(size=(N_TREES, WIDTH, D_MODEL)).astype(np.float32)
    with Store(plant(tmp_path / "s.act", TREES, {"embed": noise})) as opened:
        first, again, other = (study.ask(opened, "probes", protocol="notebook", seed=seed) for seed in (5, 5, 6))
    assert again.results.equals(first.results)
    own = [
        answer.results.filter(pl.col("metric") == "notebook_accuracy")["value"].to_list() for answer in (first, other)
    ]
    assert own[0] != own[1]
