"""A store whose checksums are right and whose content is wrong: caught when its trees are run anew."""

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import Model
from actstore.ingest.replay import compare
from actstore.ingest.replay.asked import planned
from actstore.ingest.trees.tokens import PAD, word_label
from actstore.store import Store
from actstore.upkeep.verify import verify
from actstore.writing import contents
from tests.damaged import TREES
from tests.test_pipeline import small_model


def differing(root, n=12):
    return {(of.run, of.what) for of in compare.compare(root, n) if not of.agrees}


def test_a_store_of_what_its_weights_give_agrees(damageable):
    found = compare.compare(damageable, 12)
    assert all(of.agrees for of in found)
    assert {of.what for of in found if of.run == "small"} == {
        *("vocabulary", "trees", "edges", "tokens", "embed", "pattern.0", "resid_post.1", "predictions", "outcomes"),
    }
    assert {"generations", "probabilities"} <= {of.what for of in found}


def test_a_rerun_says_what_it_will_run_and_how_far_it_is(damageable, monkeypatch):
    asked, told = planned(damageable, 12), []
    with Store(damageable) as store:
        runs = store.runs()
    assert list(asked.n_of) == runs
    assert (asked.unit, set(asked.n_of.values())) == ("trees", {12})
    assert planned(damageable, 10_000).n_of.keys() == asked.n_of.keys()
    assert max(planned(damageable, 10_000).n_of.values()) < 10_000
    compare.compare(damageable, 12, advance=lambda *done: told.append(done))
    done = [n for n, _, _ in told]
    assert done == sorted(done)
    assert (done[0], done[-1], {total for _, total, _ in told}) == (0, asked.n, {asked.n})
    assert len(set(done)) > len(runs) + 1, "a run is not one step"
    assert list(dict.fromkeys(run for _, _, run in told)) == runs


def test_a_rerun_is_announced_before_it_begins(damageable, monkeypatch):
    monkeypatch.setattr("actstore.verbs.verify", lambda *asked: exit(7))
    said = CliRunner().invoke(main, ["verify", str(damageable), "--recompute", "3"]).stderr
    n = len(planned(damageable, 3).n_of)
    assert said.startswith(f"recompute: if the files are whole, {3 * n} trees of {n} runs go through the model")
    assert "small" in said
    quiet = CliRunner().invoke(main, ["verify", str(damageable), "--recompute", "3", "--quiet"])
    assert "recompute" not in quiet.stderr


def planted(root, monkeypatch, change):
    """A store whose activations are what `change` makes of a batch's, and all its checksums right."""
    from actstore.arrays.pack import ShardBuffer

    seal = ShardBuffer.seal

    def changed(self, lengths):
        if len(self.rows.shape) == 3:
            change(self.rows)
        return seal(self, lengths)

    monkeypatch.setattr(ShardBuffer, "seal", changed)
    execute(Ingest(root, small_model(), TREES, sites=["embed", "resid_post.1"]))
    monkeypatch.undo()
    assert verify(root).findings == []
    return root


def test_shuffled_rows_are_caught(tmp_path, monkeypatch):
    def shuffle(rows):
        rows[:, :8] = rows[:, :8][:, ::-1].copy()

    assert ("small", "resid_post.1") in differing(planted(tmp_path / "s.act", monkeypatch, shuffle))


def test_a_shifted_position_is_caught(tmp_path, monkeypatch):
    def shift(rows):
        rows[1:] = rows[:-1].copy()

    assert ("small", "resid_post.1") in differing(planted(tmp_path / "s.act", monkeypatch, shift))


def test_a_small_error_in_one_number_in_a_hundred_is_caught(tmp_path, monkeypatch):
    def nudge(rows):
        rows[..., 0] += 0.01 * np.abs(rows).max()

    assert ("small", "embed") in differing(planted(tmp_path / "s.act", monkeypatch, nudge))


def test_other_weights_than_those_written_down_are_caught(tmp_path):
    ours, theirs = small_model(seed=1), small_model(seed=2)
    liar = Model("small", theirs.config, theirs.bridge, ours.weights, ours.weights_sha256, "small")
    execute(Ingest(tmp_path / "s.act", liar, TREES, sites=["embed", "resid_post.1"]))
    assert verify(tmp_path / "s.act").findings == []
    assert {("small", "embed"), ("small", "resid_post.1"), ("small", "predictions")} <= differing(tmp_path / "s.act")


def test_another_vocabulary_is_caught(tmp_path, monkeypatch):
    from actstore.ingest.trees.tokens import Vocabulary

    words = Vocabulary.words
    monkeypatch.setattr(Vocabulary, "words", lambda self: words(self)[::-1])
    execute(Ingest(tmp_path / "s.act", small_model(), TREES, sites=["embed"]))
    monkeypatch.undo()
    assert differing(tmp_path / "s.act") == {("small", "vocabulary")}


def test_rows_that_belong_to_another_tree_are_caught(tmp_path, monkeypatch):
    from actstore.ingest.trees import tokens

    rows = tokens.word_rows
    monkeypatch.setattr(tokens, "word_rows", lambda words, first: rows(words[::-1], first))
    execute(Ingest(tmp_path / "s.act", small_model(), TREES, sites=["embed"]))
    monkeypatch.undo()
    assert ("small", "tokens") in differing(tmp_path / "s.act")


def test_the_command_refuses_what_its_weights_do_not_give(tmp_path, monkeypatch):
    from click.testing import CliRunner

    def shift(rows):
        rows[1:] = rows[:-1].copy()

    root = planted(tmp_path / "s.act", monkeypatch, shift)
    found = CliRunner().invoke(main, ["verify", str(root), "--recompute", "5"])
    assert found.exit_code == 1
    assert "not what its weights and sequences give" in found.stderr


def changed_rows(root, monkeypatch, table, change, **options):
    """A store of which one table's rows are what `change` makes of them, and all its checksums right."""
    part = contents.part_content
    monkeypatch.setattr(
        contents,
        "part_content",
        lambda name, owner, rows, batch=None: part(name, owner, change(rows) if name == table else rows, batch),
    )
    execute(Ingest(root, small_model(), TREES, sites=None if options else ["embed"], **options))
    monkeypatch.undo()
    assert verify(root).findings == []
    return root


@pytest.mark.parametrize(
    ("table", "column"),
    [
        *(("predictions", column) for column in ("p_target", "predicted", "target", "correct")),
        *(
            ("outcomes", column)
            for column in ("greedy_path", "greedy_right", "first_wrong_step", "teacher_forced_right")
        ),
    ],
)
def test_answers_of_another_tree_are_caught(tmp_path, monkeypatch, table, column):
    def shift(frame):
        if frame[column].dtype == pl.Boolean:
            return frame.with_columns(~pl.col(column))
        if column == "first_wrong_step":  # 0 of nearly every tree, since the model is untrained
            return frame.with_columns(pl.col(column) + 1)
        return frame.with_columns(pl.concat([frame[column].tail(1), frame[column].head(-1)]))

    assert differing(changed_rows(tmp_path / "s.act", monkeypatch, table, shift)) == {("small", table)}


@pytest.mark.parametrize(("column", "what"), [("token", "generations"), ("p", "probabilities")])
def test_continuations_of_another_tree_are_caught(tmp_path, monkeypatch, column, what):
    def shift(frame):
        return frame.with_columns(pl.concat([frame[column].tail(1), frame[column].head(-1)]))

    root = changed_rows(tmp_path / "s.act", monkeypatch, "generations", shift, prompt="tree")
    assert ("small-dreams", what) in differing(root)


def test_a_tie_is_no_difference(monkeypatch):
    """Two words as likely as one another: the model that says either stores an answer that agrees."""
    job, words = Ingest("unused.act", small_model(), TREES, sites=[]), TREES.between(0, 12).words
    right = [{"greedy_path": word_label(said[said != PAD]).tolist(), **RIGHT} for said in words[:, 3 * TREES.n_nodes :]]
    assert not all(compare._is_greedy(job, words[i], held) for i, held in enumerate(right)), (
        "an untrained model is right"
    )
    monkeypatch.setattr(compare, "_probabilities", lambda logits: np.ones(logits.shape))  # every word is as likely
    for i, held in enumerate(right):
        assert compare._is_greedy(job, words[i], held)
        assert not compare._is_greedy(job, words[i], {**held, "greedy_right": False}), "not what follows from its path"


RIGHT = {"greedy_right": True, "teacher_forced_right": True, "first_wrong_step": None, "failure": None}
