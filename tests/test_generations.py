"""Free continuations: each token is what the model's own forward pass says behind the tokens before it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from actstore.errors import BadInput
from actstore.ingest.answers.continuations import Generator
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import COMMA, PAD, WORDS, encode
from actstore.store import Store
from tests.test_pipeline import small_model


def probabilities(model, ids):
    """float64 [d_vocab]: of the token behind ids, by the model's own forward over all of them."""
    with torch.no_grad():
        return torch.softmax(model.bridge(torch.tensor([ids]))[0, -1].double(), -1).numpy()


@pytest.mark.parametrize("system", ["reproduction", "baseline"])
def test_every_token_is_one_the_models_own_forward_gives(system):
    model, words = small_model(system), encode(draw("deep", 0, 4, 9, 6))
    generator = Generator(model, samples=2, seed=7)
    said, uniforms = generator.go_on(words, 4), generator._uniforms(4, 5, 8).reshape(5, 3, 8)
    vocabulary = model.config.vocabulary
    for tree, sample in np.ndindex(5, 3):
        ids = vocabulary.encode(words[tree, :15]).tolist()
        for place in range(said.length[tree, sample]):
            p, word = probabilities(model, ids), said.words[tree, sample, place]
            chosen = int(np.flatnonzero(vocabulary.word_of_id == word)[0])
            assert said.p[tree, sample, place] == pytest.approx(p[chosen], rel=1e-4)
            assert said.p_best[tree, sample, place] == pytest.approx(p.max(), rel=1e-4)
            if sample == 0:
                assert chosen == p.argmax()
            else:
                below = p[:chosen].sum()
                assert below - 1e-5 <= uniforms[tree, sample, place] <= below + p[chosen] + 1e-5
            ids.append(chosen)
        ended = said.length[tree, sample] == 8 or WORDS[word] in (WORDS[PAD], WORDS[COMMA])
        assert ended


def test_a_sample_is_drawn_from_the_models_distribution():
    model = small_model()
    words = np.repeat(encode(draw("deep", 0, 0, 1, 6)), 400, axis=0)
    said = Generator(model, samples=5, seed=0).go_on(words, 0)
    first = said.words[:, 1:, 0].ravel()
    p = probabilities(model, model.config.vocabulary.encode(words[0, :15]).tolist())
    counts = np.bincount(model.config.vocabulary.id_of_word[first], minlength=len(p))
    expected = p * len(first)
    usual = expected > 5
    assert ((counts - expected) ** 2 / expected)[usual].sum() < usual.sum() + 5 * np.sqrt(2 * usual.sum())


def test_a_tree_goes_on_the_same_whichever_batch_it_comes_in():
    model, words = small_model(), encode(draw("deep", 0, 0, 9, 6))
    generator = Generator(model, 1, 0)
    whole, part = generator.go_on(words, 0), generator.go_on(words[4:7], 4)
    np.testing.assert_array_equal(part.words, whole.words[4:7])
    np.testing.assert_allclose(part.p, whole.p[4:7], rtol=1e-5)


def test_continuations_are_stored_token_by_token(tmp_path):
    model = small_model("baseline")
    trees = TreeSet("deep", 10, n_nodes=6, trees_per_shard=4, name="d")
    execute(Ingest(tmp_path / "s.act", model, trees, sites=["embed"]))
    execute(Ingest(tmp_path / "s.act", model, trees, prompt="tree", samples=2, batch_size=3))
    said = Generator(model, 2, 0).go_on(encode(draw("deep", 0, 0, 10, 6)), 0)
    with Store(tmp_path / "s.act") as store:
        rows = store.sql("from generations order by tree_id, sample, position")
        runs = store.sql("select run, prompt, samples, dataset from runs")
        assert store.sql("select count(*) as n from outcomes where run = 'small-dreams'")["n"].item() == 0
    assert runs.rows() == [("small", "task", None, "d"), ("small-dreams", "tree", 2, "d")]
    assert len(rows) == said.length.sum()
    for row in rows.iter_rows(named=True):
        place = row["position"] - 15
        assert row["token"] == WORDS[said.words[row["tree_id"], row["sample"], place]]
        assert row["p"] == pytest.approx(said.p[row["tree_id"], row["sample"], place], rel=1e-4)


def test_the_shipped_model_goes_on_as_its_forward_says(shipped):
    words = encode(draw("reproduction", 1, 0, 3))
    said = Generator(shipped, 0, 0).go_on(words, 0)
    ids = shipped.config.vocabulary.encode(words[:, :45])
    for place in range(6):
        with torch.no_grad():
            best = shipped.bridge(torch.from_numpy(ids))[:, -1].argmax(-1).numpy()
        np.testing.assert_array_equal(shipped.config.vocabulary.id_of_word[said.words[:, 0, place]], best)
        ids = np.concatenate([ids, best[:, None]], axis=1)


def test_what_cannot_be_asked_for_is_refused(tmp_path):
    model, trees = small_model(), TreeSet("deep", 4, n_nodes=6, name="d")
    with pytest.raises(BadInput, match="there are task, tree"):
        Ingest(tmp_path / "s.act", model, trees, prompt="forest")
    with pytest.raises(BadInput, match="0 to 255"):
        Ingest(tmp_path / "s.act", model, trees, prompt="tree", samples=300)
    with pytest.raises(BadInput, match="--prompt tree"):
        Ingest(tmp_path / "s.act", model, trees, samples=3)
    execute(Ingest(tmp_path / "s.act", model, trees, prompt="tree", samples=1))
    with pytest.raises(BadInput, match="samples 1, not 2"):
        execute(Ingest(tmp_path / "s.act", replace(model), trees, prompt="tree", samples=2))


def test_a_run_of_continuations_has_as_many_trees_as_it_holds(tmp_path):
    trees = TreeSet("reproduction", 10, n_nodes=6, name="d")
    execute(Ingest(tmp_path / "s.act", small_model(), trees, prompt="tree", samples=3))
    with Store(tmp_path / "s.act") as store:
        (row,) = store.info().to_dicts()
    assert (row["sequences"], row["planned"], row["greedy_right_percent"]) == (10, 10, None)
