"""Answers against a grader that reads one tree at a time, token by token, out of the network written from its equations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from actstore.arrays.address import Ids
from actstore.catalog.tables import ADDED
from actstore.ingest.answers import tree_paths
from actstore.ingest.answers.tree_paths import FAILURES, Answers, answer, outcome_rows, prediction_rows
from actstore.ingest.jobs.batch import run_batch
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.forward import forward
from actstore.ingest.models.load import Model, from_bytes
from actstore.ingest.models.weights import canonical
from actstore.ingest.trees.draw import Trees, concatenate, draw
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import COMMA, encode, token_rows
from tests.reference import one_thread, random_state, reference, weights  # noqa: F401

SMALL = [
    ModelConfig("reproduction", 8, n_layers=1, n_heads=2, d_model=16, d_head=8, d_mlp=24),
    ModelConfig("baseline", 11, n_layers=2, n_heads=1, d_model=12, d_head=12, d_mlp=24),
]


@cache
def stepping_model(config: ModelConfig) -> Model:
    """An untrained model that mostly answers with steps, so that wrong answers go on; sometimes with anything else."""
    state = random_state(config, seed=3)
    steps = [word[0] in "→>" for word in config.vocabulary.words()]
    state["unembed.b_U"] += torch.tensor(steps)
    return from_bytes(canonical(state), config, "stepping", "stepping.safetensors")


def answers(model: Model, trees: Trees) -> Answers:
    words = encode(trees)
    ids = torch.from_numpy(model.config.vocabulary.encode(words))
    return answer(model, words, forward(model, ids, [], lambda site, activations: None))


# the grader: plain Python over spelled tokens


def spelled_prompt(trees: Trees, tree: int, arrow: str) -> list[str]:
    edges = [[str(source), f"{arrow}{target}", ","] for source, target in trees.edges[tree]]
    edges[-1][2] = "|"
    return [*(word for edge in edges for word in edge), str(trees.goal[tree]), ":", str(trees.root[tree])]


def next_probabilities(model: Model) -> Callable[[list[str]], Tensor]:
    """tokens → the probabilities of the next one; each prefix is run once, by itself."""
    state, vocabulary = weights(model), model.config.vocabulary.words()

    @cache
    def probabilities(*tokens: str) -> Tensor:
        ids = torch.tensor([[vocabulary.index(token) for token in tokens]])
        return torch.softmax(reference(state, ids)["logits"][0, -1], dim=-1)

    return lambda tokens: probabilities(*tokens)


def grade(model: Model, trees: Trees, tree: int) -> tuple[list[dict], dict]:
    """What `predictions` and `outcomes` must say of one tree."""
    vocabulary, probabilities = model.config.vocabulary.words(), next_probabilities(model)
    arrow = ">" if model.config.system == "baseline" else "→"
    prompt = spelled_prompt(trees, tree, arrow)
    path = [int(label) for label in trees.path[tree][: trees.depth[tree]]]
    children: dict[int, set[int]] = {}
    for source, target in trees.edges[tree].tolist():
        children.setdefault(source, set()).add(target)
    predictions, forced = [], list(prompt)
    for step, label in enumerate(path):
        p = probabilities(forced)
        target, said = f"{arrow}{label}", vocabulary[int(p.argmax())]
        predictions.append(
            {
                "step": step,
                "target": in_rows(target),
                "predicted": in_rows(said),
                "p_target": float(p[vocabulary.index(target)]),
                "correct": said == target,
            }
        )
        forced.append(target)
    said_path, tokens, failure, first_wrong = [], list(prompt), None, None
    for step, label in enumerate(path):
        said = vocabulary[int(probabilities(tokens).argmax())]
        if first_wrong is None and said != f"{arrow}{label}":
            stood_on = said_path[-1] if said_path else int(trees.root[tree])
            if said[0] != arrow:
                failure = "not_a_step"
            else:
                failure = "wrong_child" if int(said[1:]) in children.get(stood_on, set()) else "not_a_child"
            first_wrong = step
        if said[0] != arrow:
            break
        said_path.append(int(said[1:]))
        tokens.append(said)
    outcome = {
        "teacher_forced_right": all(row["correct"] for row in predictions),
        "greedy_path": said_path,
        "greedy_right": said_path == path,
        "first_wrong_step": first_wrong,
        "failure": failure,
    }
    return predictions, outcome


def in_rows(word: str) -> str:
    return f"→{word[1:]}" if word[0] == ">" else word


def check(model: Model, trees: Trees) -> pl.DataFrame:
    """Compare every row with the grader's; return the outcomes, for the test to say what they must contain."""
    of_all = answers(model, trees)
    predictions, outcomes = prediction_rows(of_all, "a", 100), outcome_rows(of_all, "a", 100)
    graded = [grade(model, trees, tree) for tree in range(len(trees))]
    for tree, (expected, _) in enumerate(graded):
        found = predictions.filter(pl.col.tree_id == 100 + tree).drop("run", "tree_id", "token_id").to_dicts()
        assert [{**row, "p_target": None} for row in found] == [{**row, "p_target": None} for row in expected]
        p_found, p_expected = ([row["p_target"] for row in rows] for rows in (found, expected))
        assert p_found == pytest.approx(p_expected, rel=1e-3, abs=1e-6)
    assert outcomes.drop("run", "tree_id").to_dicts() == [outcome for _, outcome in graded]
    assert outcomes["tree_id"].to_list() == list(range(100, 100 + len(trees)))
    return outcomes


@pytest.mark.parametrize(("config", "distribution"), list(zip(SMALL, ["baseline", "deep"], strict=True)))
def test_an_untrained_models_answers_are_the_graders(config, distribution):
    trees = draw(distribution, 7, 0, 30, config.n_nodes)
    outcomes = check(stepping_model(config), trees).with_columns(depth=trees.depth)
    n_steps = pl.col.greedy_path.list.len()
    went_on, ended = (
        n_steps > pl.col.first_wrong_step + 1,
        (n_steps < pl.col.depth) & (n_steps > pl.col.first_wrong_step),
    )
    assert set(outcomes["failure"]) >= set(FAILURES)
    assert outcomes.select(a=went_on.any(), b=ended.any()).row(0) == (True, True)


@pytest.mark.parametrize("n_nodes", [2, 3, 5])
@pytest.mark.parametrize("config", SMALL)
def test_trees_smaller_than_the_vocabulary_are_graded_too(config, n_nodes):
    check(stepping_model(config), draw("deep", 7, 0, 8, n_nodes, n_labels=config.n_nodes))


def test_the_shipped_models_answers_are_the_graders_when_its_embeddings_are_blurred_too(shipped):
    trees, state = draw("deep", 7, 0, 8, depths=(2, 4, 6)), weights(shipped)
    assert check(shipped, trees[:2])["greedy_right"].all()
    noise = torch.randn(36, 128, generator=torch.Generator().manual_seed(0))
    state["embed.W_E"] += 1.2 * state["embed.W_E"].std() * noise  # the words are still told apart, but not well
    outcomes = check(from_bytes(canonical(state), shipped.config, "blurred", "blurred"), trees)
    assert not outcomes["greedy_right"].all()


def test_the_shipped_model_finds_nearly_every_path_of_trees_it_never_saw(shipped):
    trees = draw("reproduction", 987_654_321, 0, 400)
    outcomes = outcome_rows(answers(shipped, trees), "a", 0)
    assert outcomes["greedy_right"].mean() >= 0.98


def test_a_greedy_answer_is_right_just_when_every_teacher_forced_step_is():
    outcomes = outcome_rows(answers(lucky_model(), draw("reproduction", 1, 0, 300, 4)), "a", 0)
    assert 0 < outcomes["greedy_right"].sum() < 300
    assert outcomes["greedy_right"].equals(outcomes["teacher_forced_right"])
    assert outcomes["greedy_right"].equals(outcomes["first_wrong_step"].is_null())
    assert outcomes["greedy_right"].equals(outcomes["failure"].is_null())


def lucky_model() -> Model:
    return stepping_model(ModelConfig("reproduction", 4, n_layers=1, n_heads=1, d_model=8, d_head=8, d_mlp=16))


# by hand: 0 → 1, 0 → 2, 2 → 3, goal 3, so the path is →2 →3

BY_HAND = Trees(
    edges=np.array([[[0, 1], [2, 3], [0, 2]]], np.uint8),
    root=np.array([0], np.uint8),
    goal=np.array([3], np.uint8),
    path=np.array([[2, 3, 255]], np.uint8),
    depth=np.array([2], np.uint8),
)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (["→2", "→3"], (True, [2, 3], True, None, None)),
        (["→2", "→1"], (False, [2, 1], False, 1, "not_a_child")),  # a child of the root, where it no longer stands
        (["→2", "→2"], (False, [2, 2], False, 1, "not_a_child")),
        (["→2", "3"], (False, [2], False, 1, "not_a_step")),
        (["→2", "<PAD>"], (False, [2], False, 1, "not_a_step")),
        (["→1", None], (False, [1], False, 0, "wrong_child")),
        (["→3", None], (False, [3], False, 0, "not_a_child")),
        (["→0", None], (False, [0], False, 0, "not_a_child")),
        ([":", None], (False, [], False, 0, "not_a_step")),
    ],
)
def test_each_way_to_fail_is_named(said, outcome):
    """The logits are planted, so a step that follows a wrong one is the model's own, and not looked at here."""
    model = lucky_model()
    vocabulary = model.config.vocabulary.words()
    logits = torch.zeros(1, 15, len(vocabulary))
    for step, word in enumerate(said):
        logits[0, 11 + step, vocabulary.index(word or "→3")] = 5
    (row,) = outcome_rows(answer(model, encode(BY_HAND), logits), "a", 0).rows()
    _, _, forced, greedy, right, first_wrong, failure = row
    greedy = greedy[:1] if said[1] is None else greedy  # a wrong first step goes on with the model's own second
    assert (forced, greedy, right, first_wrong, failure) == outcome


def test_a_baselines_comma_is_padding_to_it_and_a_comma_in_the_rows():
    model = stepping_model(ModelConfig("baseline", 4, n_layers=1, d_model=8, d_head=8, d_mlp=16))
    logits = torch.zeros(1, 15, 11)
    logits[0, 11, 0] = 5  # its first token: the separator that it also pads with
    of_one = answer(model, encode(BY_HAND), logits)
    assert of_one.predicted[0, 0] == COMMA
    assert outcome_rows(of_one, "a", 0)["failure"].to_list() == ["not_a_step"]
    assert prediction_rows(of_one, "a", 0)["predicted"][0] == ","


# rows


def test_a_prediction_stands_on_the_token_before_its_target():
    trees = draw("baseline", 3, 0, 50, 8)
    rows = prediction_rows(answers(stepping_model(SMALL[0]), trees), "a", 40)
    tokens = token_rows(trees, 40)
    stood_on = rows.join(tokens, on="token_id", how="left", suffix="_of_token", maintain_order="left")
    assert stood_on["role"].to_list() == ["root" if step == 0 else "path" for step in rows["step"]]
    assert stood_on["tree_id"].equals(stood_on["tree_id_of_token"], check_names=False)
    behind = rows.with_columns(pl.col.token_id + 1).join(tokens, on="token_id", how="left", maintain_order="left")
    assert behind["token"].cast(pl.String).equals(rows["target"].cast(pl.String), check_names=False)
    assert behind["step"].null_count() == 0
    assert len(rows) == tokens["step"].count()  # and every step of every path is predicted
    assert rows["token_id"].is_sorted()


def test_rows_are_those_of_the_schema():
    trees = draw("reproduction", 3, 0, 20, 8)
    of_all = answers(stepping_model(SMALL[0]), trees)
    with duckdb.connect() as con:
        con.execute(Path("actstore/catalog/schema.sql").read_text()).fetchall()
        for table, rows in (
            ("predictions", prediction_rows(of_all, "a", 0)),
            ("outcomes", outcome_rows(of_all, "a", 0)),
        ):
            con.register("rows", rows.to_arrow())
            con.execute(f"insert into {table} by name from rows").fetchall()
            named = [name for (name, *_) in con.execute(f"describe {table}").fetchall()]
            assert rows.columns == [name for name in named if name not in ADDED.get(table, ())]
            assert con.execute(f"select count(*) from {table}").fetchall() == [(len(rows),)]
        kinds = con.execute("select unnest(enum_range(null::failure_kind))").fetchall()
    assert [kind for (kind,) in kinds] == list(FAILURES)


def test_batches_one_after_another_are_one_large_batch():
    model, trees = stepping_model(SMALL[1]), draw("deep", 3, 0, 30, 11)
    whole = answers(model, trees)
    parts = concatenate([answers(model, trees[start : start + 8]) for start in range(0, 30, 8)])
    for field in fields(Answers):
        one, other = getattr(whole, field.name), getattr(parts, field.name)
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one.astype(float), other.astype(float), rtol=1e-4)
    assert len(parts) == 30


def test_wrong_answers_of_all_passes_of_a_batch_are_continued_at_once_and_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, n_trees, per_pass = stepping_model(SMALL[0]), 20, 8
    sizes: list[int] = []

    def counted(model: Model, ids: Tensor, *rest: object) -> Tensor:
        sizes.append(len(ids))
        return forward(model, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tree_paths, "forward", counted)
    job = Ingest(
        tmp_path / "s.act", model, TreeSet("reproduction", n_trees, n_nodes=8), sites=["embed"], batch_size=per_pass
    )
    made = run_batch(job, 0, Ids(0, 0)).answers
    together = sizes.copy()
    trees = draw("reproduction", 0, 0, n_trees, 8)
    alone = concatenate([answers(model, trees[at : at + per_pass]) for at in range(0, n_trees, per_pass)])
    assert made["outcomes"].equals(outcome_rows(alone, job.plan.run, 0))
    assert made["predictions"].drop("p_target").equals(prediction_rows(alone, job.plan.run, 0).drop("p_target"))
    assert max(together) == per_pass
    assert len(together) < len(sizes) - len(together)
