"""LEACE by what defines it, and the study `erase` of a model that copies its goal and never reads its root again."""

import re

import numpy as np
import pytest
from click.testing import CliRunner

import actstore
from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.task import TreeSet
from actstore.queries import study
from actstore.queries.erase import verdicts
from actstore.queries.leace import Erasure
from actstore.queries.probes.fit import Whitening, fit
from actstore.store import Store
from actstore.verbs import patching
from tests.copying import copies, copying_model
from tests.reference import one_thread  # noqa: F401
from tests.test_figures import assert_legible

ROOT = "select token_id, root as label from answer_tokens where dataset = $dataset"
NOISE = "select token_id, hash(token_id) % 3 as label from answer_tokens"
SITES = ["resid_post.0", "resid_post.1"]


def rows(n=3000, d=24, n_classes=5, seed=0):
    """Correlated rows whose classes differ in mean, in 4 of 24 dimensions."""
    rng = np.random.default_rng(seed)
    y = rng.choice(n_classes, n, p=np.arange(1, n_classes + 1) / np.arange(1, n_classes + 1).sum())
    X = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3 * rng.standard_normal((n_classes, d))[y] + 5
    return X.astype(np.float32), y


def leace(X, y):
    whiten = Whitening.of(X)
    return Erasure.leace(whiten, whiten(X), y)


def test_after_leace_all_classes_have_one_mean_and_no_probe_beats_the_constant():
    X, y = rows()
    erase = leace(X, y)
    erased = erase(X)
    assert erase.rank == 4
    means = np.array([erased[y == k].mean(axis=0) for k in range(5)])
    np.testing.assert_allclose(means, np.tile(X.mean(axis=0), (5, 1)), atol=1e-4)
    before, whitened = (Whitening.of(Z)(Z) for Z in (X, erased))
    assert fit(before, y, before, y).right.mean() > 0.9
    p = np.bincount(y) / len(y)
    own = fit(whitened, y, whitened, y)
    assert (own.right == (y == 4)).all()
    logits = whitened @ own.weights.T + own.intercepts
    loss = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y])
    assert loss == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)


def test_leace_is_the_smallest_such_change_and_is_made_once():
    X, y = rows()
    erase = leace(X, y)
    erased = erase(X)
    np.testing.assert_allclose(erase(erased), erased, atol=2e-4)
    classes = np.eye(5)[y] - np.eye(5)[y].mean(axis=0)
    orthogonal = np.linalg.svd(X.T.astype(np.float64) @ classes, full_matrices=False)[0][:, :4]
    other = X - (X - X.mean(axis=0)) @ orthogonal @ orthogonal.T  # which erases all linear traces, too
    assert np.ptp([other[y == k].mean(axis=0) for k in range(5)], axis=0).max() < 1e-3
    assert ((erased - X) ** 2).sum() < 0.9 * ((other - X) ** 2).sum()


def test_the_equation_of_the_paper_gives_the_same_map():
    X, y = rows()
    centred, one_hot = X.astype(np.float64) - X.mean(axis=0, dtype=np.float64), np.eye(5)[y]
    variance, axes = np.linalg.eigh(centred.T @ centred / len(X))
    W, back = axes / np.sqrt(variance) @ axes.T, axes * np.sqrt(variance) @ axes.T
    U = np.linalg.svd(W @ centred.T @ (one_hot - one_hot.mean(axis=0)))[0][:, :4]
    np.testing.assert_allclose(leace(X, y)(X), X - centred @ W @ U @ U.T @ back, atol=1e-3)


def test_rows_of_fewer_dimensions_are_erased_too():
    X, y = rows(d=6)
    wide = X @ np.random.default_rng(1).standard_normal((6, 20)).astype(np.float32)
    erased = leace(wide, y)(wide)
    assert np.ptp([erased[y == k].mean(axis=0) for k in range(5)], axis=0).max() < 1e-3


def test_without_its_directions_a_probe_gives_every_row_the_same_logits():
    X, y = rows()
    whiten = Whitening.of(X)
    probe = fit(whiten(X), y, whiten(X), y)
    erase = Erasure.of_probe(whiten, probe.weights)
    assert np.ptp(whiten(erase(X)) @ probe.weights.T, axis=0).max() < 1e-3
    assert erase.rank == 4


def test_random_directions_are_as_many():
    X, _ = rows()
    whiten = Whitening.of(X)
    erased = Erasure.at_random(whiten, 4, np.random.default_rng(0))(X)
    assert np.linalg.matrix_rank(whiten(erased), tol=1) == 24 - 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("erase") / "s.act"
    copies(path, "a", SITES, 400)
    copies(path, "b", SITES, 300, seed=1)
    return path


def ask(path, run="a", **options):
    with Store(path) as store:
        return study.ask(store, "erase", run, 0, None, patching(store), **options)


def value(answer, metric, site="resid_post.0"):
    return answer.results.filter(metric=metric, site=site).row(0, named=True)


def test_what_the_unembedding_reads_is_used(path):
    answer = ask(path, labels="next_node")
    assert verdicts(answer.tests) == {(site, "path", "next_node"): "used" for site in SITES}
    assert value(answer, "read")["value"] == 1
    assert value(answer, "read_after_leace")["value"] == pytest.approx(value(answer, "commonest")["value"], abs=0.02)
    assert value(answer, "accuracy_leace")["value"] > 0.7
    assert value(answer, "accuracy_random")["value"] < 0.1
    assert value(answer, "loss_probe")["value"] > 2
    assert value(answer, "rank")["value"] == 5
    figure = study.plot(answer)
    assert_legible(figure)
    assert f"; {value(answer, 'accuracy_leace')['n']:,} steps; " in " ".join(figure.get_suptitle().split())
    assert (
        "The next node on the path at tokens path is used at resid_post.0 and resid_post.1, most at" in answer.sentence
    )


def test_what_only_a_probe_reads_is_not_used(path, tmp_path):
    options = {"label": "root", "sites": "resid_post"}
    asked = actstore.study(
        path, "erase", ["a"], query=ROOT, options=options, confirm="b", plot=str(tmp_path / "f.png")
    )[0]
    assert asked.error is None
    answer = asked.answer
    assert verdicts(answer.tests) == {(site, None, "root"): "read, not used" for site in SITES}
    assert value(answer, "read")["value"] == 1
    assert value(answer, "read_after_leace")["value"] == pytest.approx(value(answer, "commonest")["value"], abs=0.02)
    assert value(answer, "accuracy_leace")["value"] == 0
    assert "The root is read but not used at resid_post.0 and resid_post.1: a probe reads 100.00" in answer.sentence
    assert answer.frame["verdict"].to_list() == ["read, not used"] * 2
    assert [claim.here.label for claim in asked.confirmation.claims if claim.confirmed] == ["root, read"] * 2
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_noise_gives_nothing(path):
    answer = ask(path, query=NOISE, sites="resid_post.0")
    assert not [test for test in answer.tests if test.found]
    assert "is not read at resid_post.0" in answer.sentence


def test_a_site_that_is_not_held_is_told_with_the_ingest_that_adds_it(path):
    with pytest.raises(NotStored, match=r"no site 'resid_mid.0'.*`actstore ingest .*--sites resid_mid.0"):
        ask(path, sites="resid_mid.0")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draws": 0}, "got draws 0; it is a number, 1 or more"),
        ({"labels": "gaol"}, "no label 'gaol' (did you mean 'goal'"),
        ({"query": ROOT, "label": "my label"}, "got 'my label' for the label's name"),
        ({"label_s": 1}, "takes no 'label_s'"),
    ],
)
def test_options_without_a_meaning_are_refused(path, options, said):
    with pytest.raises(BadInput, match=re.escape(said)):
        ask(path, **options)


def test_a_query_for_a_second_set_takes_the_set(path):
    query = ROOT.partition(" where")[0]
    words = [
        "study",
        str(path),
        "erase",
        "--run",
        "a",
        "--query",
        query,
        "--confirm",
        "b",
        "-o",
        "sites",
        "resid_post.0",
    ]
    done = CliRunner().invoke(main, words)
    assert "only if it takes $dataset" in done.output


def test_a_run_without_answers_is_told_which_ingest_adds_them(tmp_path):
    trees = TreeSet("deep", 4, n_nodes=6, depths=(1,), name="d")
    execute(Ingest(tmp_path / "s.act", copying_model(), trees, "dreams", prompt="tree", samples=0))
    with pytest.raises(NotStored, match=r"`actstore ingest .*--model-of dreams"):
        ask(tmp_path / "s.act", "dreams")
