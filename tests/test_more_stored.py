"""What is stored later changes no number: the pages' Python, the tour and every named query, on a store before and after."""

import json
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib import rc_context

import actstore
from actstore import queries
from actstore.errors import SeveralRuns
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import load
from actstore.ingest.trees.task import TreeSet
from actstore.queries import study
from actstore.store import Store

ROOT = Path(__file__).parents[1]
RUN = "reproduction"
PARAMS = {"run": RUN, "split": "train", "token_role": "edge_target", "site": "resid_post.0", "token_id": 1, "n": 5}
PARAMS |= {"place": 0, "distance": 1, "backward": False, "second": 0, "seed": 0, "label": "source"}
PARAMS |= {"dataset": TreeSet(RUN, 40).row()["dataset"], "model": RUN}
ELSEWHERE = ("attention_by_goal_distance", "causal_directions")  # of what this store lacks: in test_ten_queries.py


@pytest.fixture(scope="module")
def more_path(demo_path, shipped, tmp_path_factory):
    """The demo store, with all beside its run that the README's commands add."""
    path = tmp_path_factory.mktemp("more") / "demo.act"
    shutil.copytree(demo_path, path)
    trees, sites = TreeSet(RUN, 40, trees_per_shard=16), ["embed"]
    drawn = trees.row()["dataset"]
    execute(Ingest(path, shipped, TreeSet("deep", 12, seed=3), "other-trees", sites=sites))
    execute(Ingest(path, shipped, replace(trees, variant_of=drawn, change="swap_last", name="varied"), sites=[]))
    execute(Ingest(path, load(RUN, checkpoint=1000), trees, sites=sites))
    execute(Ingest(path, shipped, trees, "patterns", sites=["pattern.0"]))
    execute(Ingest(path, shipped, trees, prompt="tree"))
    edits = "select token_id from tokens where role = 'root' and tree_id < 20"
    actstore.patch(path, RUN, edits, at="resid_post.0", how="zero", run="edited")
    return path


@pytest.fixture
def both(demo_path, more_path):
    with Store(demo_path) as fresh, Store(more_path) as more:
        assert len(more.runs()) == 7
        assert len(more.sql("from datasets")) == 3
        yield fresh, more


@pytest.mark.parametrize("name", [name for name in queries.names() if name not in ELSEWHERE])
def test_a_named_query_gives_the_same_rows(both, name):
    query = queries.load(name)
    params = {param: PARAMS[param] for param in query.params}
    expected, found = (queries.select(store.of(RUN), name, **params) for store in both)
    assert found.equals(expected)
    for ask in (queries.select, lambda store, name, **params: store.sql(query.sql, params or None)):
        of_all = ask(both[1], name, **params)
        if "run" not in params:  # of every set of trees, or of every checkpoint
            of_all = of_all.filter(**{key: expected[key][0] for key in ("dataset", "run") if key in expected.columns})
        assert of_all.equals(expected)


def test_a_study_of_a_run_answers_the_same(both):
    expected, found = (study.ask(store, "depth", run=RUN) for store in both)
    assert study.ask(both[1].of(RUN), "depth").frame.equals(expected.frame), (
        "it sees other runs from a run's session, too"
    )
    assert found.frame.equals(expected.frame)
    assert found.sentence == expected.sentence


def answers(code, folder, monkeypatch):
    """What every query and read of some Python gives, in turn."""
    given = []

    def record(method):
        def recorded(*args, **options):
            answer = method(*args, **options)
            if sys._getframe(1).f_code.co_filename == "the page":
                given.append(answer)
            return answer

        return recorded

    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MPLBACKEND", "agg")
        for method in ("sql", "read", "info", "sites"):
            patch.setattr(Store, method, record(getattr(Store, method)))
        patch.setattr("sklearn.linear_model.LogisticRegression", Untrained)
        with warnings.catch_warnings():
            warnings.simplefilter("error", SeveralRuns)
            scope = {}
            with rc_context():
                exec(compile(code, "the page", "exec"), scope)
    return [*given, *(value for value in scope.values() if isinstance(value, (pl.DataFrame, np.ndarray)))]


class Untrained:
    """In the place of what takes a page its time."""

    def __init__(self, **options):
        pass

    def fit(self, X, y):
        return self

    def predict(self, X):
        return X.sum(axis=1)

    def score(self, X, y):
        return float(X.sum())


def pages():
    tour = json.loads((ROOT / "queries/notebooks/tour.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in tour["cells"] if cell["cell_type"] == "code"]
    code = "\n".join(cell for cell in cells if not cell.startswith("%"))
    yield pytest.param(code, 20, id="tour")
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/how-to/patch.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    yield pytest.param("\n".join(blocks), 5, id="README")  # each goes on where the one before it ended


@pytest.mark.parametrize(("code", "least"), list(pages()))
def test_a_pages_python_gives_the_same_numbers(demo_path, more_path, tmp_path, monkeypatch, capsys, code, least):
    for name, path in {"fresh": demo_path, "more": more_path}.items():  # a page may store a run
        shutil.copytree(path, tmp_path / name / "demo.act")
    expected = answers(code, tmp_path / "fresh", monkeypatch)
    printed = capsys.readouterr().out
    found = answers(code, tmp_path / "more", monkeypatch)
    assert len(expected) == len(found) >= least
    for one, other in zip(found, expected, strict=True):
        assert same(one, other)
    assert capsys.readouterr().out == printed


def same(one, other):
    if isinstance(one, tuple):
        return all(map(same, one, other))
    if isinstance(one, (pl.DataFrame, pl.Series)):
        return one.equals(other)
    if isinstance(one, (str, list)):
        return one == other
    one, other = np.asarray(one), np.asarray(other)
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
