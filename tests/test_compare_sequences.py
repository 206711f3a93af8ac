"""`compare` of runs over sequences that are no trees: what needs no tree, and what is left out."""

import numpy as np
import polars as pl
import pytest

from actstore.errors import BadInput
from actstore.queries import study
from actstore.queries.compare.similarity import cka, cka_interval, cka_interval_of_rows
from actstore.store import Store
from tests.planted_text import lengths, plant_text

N, D = 60, 8
TOTAL = int(lengths(N).sum())


def answers(share, loss):
    """Rows of `predictions` of every token: right in a share of the sequences' tokens, with one loss."""

    def of(tokens):
        return tokens.select(
            "token_id",
            "sequence_id",
            target=pl.lit(","),
            predicted=pl.lit(","),
            p_target=pl.lit(0.5),
            correct=pl.int_range(pl.len()) % 10 < 10 * share,
            loss=loss + pl.col("position") / 100,
            rank=pl.lit(0),
        )

    return of


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Run `one`; `turned` predicts better, with the same at site 0 in another basis and noise at site 1; `apart` shares nothing."""
    root, rng = tmp_path_factory.mktemp("pair") / "s.act", np.random.default_rng(0)
    X, noise = rng.standard_normal((TOTAL, D)).astype(np.float32), rng.standard_normal((2, TOTAL, D)).astype(np.float32)
    turn = np.linalg.qr(rng.standard_normal((D, D)))[0].astype(np.float32)
    plant_text(root, {"resid_post.0": X, "resid_post.1": noise[0]}, "one", n=N, answers=answers(0.3, 2.0))
    plant_text(root, {"resid_post.0": 3 * X @ turn, "resid_post.1": noise[1]}, "turned", n=N, answers=answers(0.6, 1.5))
    plant_text(root, {"embed": X}, "apart", n=N)
    with Store(root) as opened:
        yield opened


def value(answer, **where):
    found = answer.results.filter(**where)
    assert len(found) == 1
    return found.row(0, named=True)


def test_equal_sites_are_alike_where_a_rotation_was_planted_alone(store):
    answer = study.ask(store, "compare", "one", other="turned")
    assert value(answer, metric="cka", site="resid_post.0", label="resid_post.0")["value"] == pytest.approx(1, abs=1e-5)
    for metric, site in (("cka", "resid_post.1"), ("cka_shuffled", "resid_post.0"), ("cka_shuffled", "resid_post.1")):
        assert value(answer, metric=metric, site=site, label=site)["value"] < 0.1
    assert value(answer, metric="cka", site="resid_post.0", label="resid_post.0")["n"] == TOTAL - N, (
        "not the first of each"
    )
    assert study.plot(answer).axes[0].get_xlabel() == "sites of turned"


def test_next_tokens_are_compared_over_sequences(store):
    answer = study.ask(store, "compare", "one", other="turned")
    change = value(answer, metric="other_less_run")
    assert change["value"] == pytest.approx(0.3, abs=0.02)
    assert change["low"] < 0.3 < change["high"]
    assert value(answer, metric="other_loss_less_run")["value"] == pytest.approx(-0.5, abs=1e-5)
    assert [(test.label, test.found) for test in answer.tests] == [("next token", True), ("loss", True)]
    for words in (
        "The second is right more often",
        "That of the second is lower",
        "Left out, since they are about trees",
    ):
        assert words in answer.sentence


def test_what_is_not_shared_is_said_to_be_left_out(store):
    with pytest.raises(BadInput, match=r"share no site \(resid_post.0, resid_post.1; embed\) and no prediction"):
        study.ask(store, "compare", "one", other="apart")


def test_without_a_question_of_pairs_every_other_model_is_taken(store):
    assert [one.of for one in study.questions(store, "compare")] == ["one and turned", "one and apart"]


def test_both_forms_of_the_interval_of_cka_are_one():
    rng = np.random.default_rng(5)
    sequences = np.repeat(np.arange(25), 4)
    X = rng.standard_normal((100, 3)) + rng.standard_normal((25, 3)).repeat(4, axis=0)
    Z = np.concatenate([X + rng.standard_normal((100, 3)), rng.standard_normal((100, 2))], axis=1)
    both = cka_interval_of_rows(X, Z, sequences, 0)
    assert both == pytest.approx(cka_interval(X, Z, sequences, 0), rel=1e-9)
    assert both[0] < cka(X, Z) < both[1]


def test_intervals_are_over_documents(tmp_path):
    """Both sequences of a document are right or wrong throughout: twice as many of them tell no more."""

    def of_pairs(run):
        def rows(tokens):
            made = answers(0.5, 2.0)(tokens)
            right = (pl.col("sequence_id") // 6 * 3 + pl.col("sequence_id") % 3).hash(3) % 10 < (8 if run == "b" else 2)
            return made.with_columns(correct=right)

        return rows

    X, width, said = np.random.default_rng(0).standard_normal((TOTAL, D)).astype(np.float32), {}, {}
    for name, documents in (("lone", None), ("paired", [at // 6 * 3 + at % 3 for at in range(N)])):
        root = tmp_path / name
        for run in ("a", "b"):
            plant_text(root, {"embed": X}, run, n=N, answers=of_pairs(run), documents=documents)
        with Store(root) as opened:
            answer = study.ask(opened, "compare", "a", other="b")
        row = value(answer, metric="other_less_run")
        width[name], said[name] = row["high"] - row["low"], answer.sentence
    assert width["paired"] > 1.2 * width["lone"]
    for words in (
        "next tokens of 30 documents",
        "tokens of 30 documents, equal sites",
        "The intervals are over documents.",
    ):
        assert words in said["paired"]
