"""The study `compare`: CKA against its equation, and planted pairs of models that hold the same, turned, or nothing alike."""

import numpy as np
import pytest

from actstore.errors import BadInput, NotStored
from actstore.ingest.tokens import encode, token_rows
from actstore.ingest.trees import draw, tree_rows
from actstore.queries import study
from actstore.queries.compare import cka, cka_interval
from actstore.store import Store
from tests.planted import plant
from tests.stores import all_right

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


def test_who_fails_where_is_counted(store):
    answer = study.run(store, "compare", run="one")
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
    answer = study.run(store, "compare", run="one")
    assert value(answer, site="resid_post.0", label="resid_post.0", metric="cka")["value"] == pytest.approx(1, abs=1e-4)
    probes = {
        row["metric"]: row["value"]
        for row in answer.results.filter(site="resid_post.0", label="source, run to other").to_dicts()
    }
    assert probes["own"] > 0.99
    assert probes["mapped"] > 0.99
    assert probes["as_it_is"] < 0.5
    assert probes["mapped_shuffled"] < 0.5


def test_noise_is_as_alike_as_shuffled_rows_and_no_probe_reads_it(store):
    answer = study.run(store, "compare", run="one")
    found = value(answer, site="resid_post.1", label="resid_post.1", metric="cka")
    control = value(answer, site="resid_post.1", label="resid_post.1", metric="cka_shuffled")
    assert abs(found["value"] - control["value"]) < 0.05
    for row in answer.results.filter(site="resid_post.1").to_dicts():
        if row["label"].startswith("source"):
            assert row["low"] < 0.3


def test_a_comparison_is_the_same_again_and_draws(store):
    first, again = study.run(store, "compare", run="one"), study.run(store, "compare", run="one", other="turned")
    assert first.results.equals(again.results)
    assert len(study.plot(first).axes) == 3


def test_what_cannot_be_compared_is_said(store, demo_store):
    with pytest.raises(BadInput, match="beside 'one' there are: turned"):
        study.run(store, "compare", run="one", other="one")
    with pytest.raises(NotStored, match="--model baseline --dataset reproduction"):
        study.run(demo_store, "compare")
