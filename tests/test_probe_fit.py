"""Fits of probes: scikit-learn's minimum, whatever the rows and classes, in few iterations."""

import numpy as np
import polars as pl
import pytest
from scipy.optimize import approx_fprime
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from actstore.queries.probes import fit, newton
from actstore.queries.probes.asked import Asked


def drawn(n=500, d=12, n_classes=4, strength=1.0, seed=0):
    """Rows around one centre per class, and the class of each row."""
    rng = np.random.default_rng(seed)
    y = rng.integers(n_classes, size=n)
    return (rng.normal(size=(n, d)) + strength * rng.normal(size=(n_classes, d))[y]).astype(np.float32), y


def with_constant_column():
    X, y = drawn()
    X[:, 3] = 1
    return X, y


def with_rare_classes():
    X, y = drawn(n_classes=3)
    y[:4] = [7, 7, 9, 9]  # two classes of two rows, one in training and one in test, and numbers that nothing has
    return X, y


def told_by_types(n=900, d=30, n_types=60, n_classes=8, seed=1, noise=0.2):
    """As of a control task: each type of token has a class and a direction of its own, in some noise."""
    rng = np.random.default_rng(seed)
    kind, centres = rng.integers(n_types, size=n), rng.normal(size=(n_types, d))
    return (centres[kind] + noise * rng.normal(size=(n, d))).astype(np.float32), rng.integers(n_classes, size=n_types)[
        kind
    ]


CASES = {
    "noise": drawn(strength=0),
    "a signal": drawn(),
    "separable": drawn(strength=10),
    "two classes": drawn(n_classes=2, strength=0.3),
    "two separable classes": drawn(n_classes=2, strength=10),
    "a constant column": with_constant_column(),
    "fewer rows than columns": drawn(n=40, d=100, strength=0.5),
    "rare classes": with_rare_classes(),
    "types": told_by_types(),
    "40 classes": drawn(n_classes=40, n=800),
    "float16": (drawn()[0].astype(np.float16), drawn()[1]),
    "float64": (drawn()[0].astype(np.float64), drawn()[1]),
    "negative labels": (drawn()[0], drawn()[1] * 3 - 5),
}


def objective(w, X, y):
    """scikit-learn's objective over C n, in float64: mean log loss and half the squared weights over C n."""
    X, place = np.asarray(X, np.float64), np.unique(y, return_inverse=True)[1]
    weights, intercepts = w[:, :-1], w[:, -1]
    logits = X @ weights.T + intercepts
    squared = ((weights[1] - weights[0]) ** 2).sum() if len(w) == 2 else (weights**2).sum()
    return (logsumexp(logits, axis=1) - logits[np.arange(len(y)), place]).mean() + squared / (2 * fit.C * len(y))


def probabilities(w, X):
    logits = X @ w[:, :-1].T + w[:, -1]
    return np.exp(logits - logsumexp(logits, axis=1)[:, None])


def oracle(X, y, tol=1e-9):
    """scikit-learn's weights with intercepts, [K, d + 1], at a tolerance that leaves nothing."""
    found = LogisticRegression(C=fit.C, tol=tol, max_iter=20000).fit(np.asarray(X, np.float64), y)
    w = np.column_stack([found.coef_, found.intercept_])
    return (np.vstack([-w, w]) / 2 if len(w) == 1 else w), found


def sides(X):
    return np.arange(len(X)) % 2 == 0


def both(X, y, whitened):
    train = sides(X)
    if whitened:
        X = fit.Whitening.of(X[train])(X)
    (made,) = fit.fit_all([(X, y)], train)
    return made, X, train


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_fit_reaches_scikit_learns_minimum_and_is_right_where_it_is(name, whitened):
    X, y = CASES[name]
    made, X, train = both(X, y, whitened)
    expected, probe = oracle(X[train], y[train])
    w = np.column_stack([made.weights, made.intercepts]).astype(np.float64)
    assert made.converged
    assert w.shape == expected.shape
    least = objective(expected, X[train], y[train])
    assert objective(w, X[train], y[train]) == pytest.approx(least, rel=1e-4)
    np.testing.assert_allclose(w[:, :-1].sum(axis=0), 0, atol=1e-5)
    theirs = probe.predict(np.asarray(X[~train], np.float64)) == y[~train]
    assert abs(int(made.right.sum()) - int(theirs.sum())) <= max(1, 0.001 * len(theirs))


def test_the_two_classes_of_a_fit_differ_by_scikit_learns_weights():
    X, y = CASES["two classes"]
    made, X, train = both(X, y, True)
    _, probe = oracle(X[train], y[train])
    np.testing.assert_allclose(made.weights[1] - made.weights[0], probe.coef_[0], atol=0.01)
    np.testing.assert_allclose(made.weights[0], -made.weights[1], atol=1e-6)
    assert made.intercepts[1] - made.intercepts[0] == pytest.approx(probe.intercept_[0], abs=0.01)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_the_gradient_is_that_of_the_objective_of_all_blocks_of_rows(n_classes, monkeypatch):
    """The objective is written out above in float64, and differentiated numerically."""
    monkeypatch.setattr(newton, "AT_ONCE", 16 * n_classes)
    rng = np.random.default_rng(n_classes)
    X, y = rng.normal(size=(40, 3)).astype(np.float32), rng.permutation(np.arange(40) % n_classes)
    w = rng.normal(size=(n_classes, 4))
    w -= w.mean(axis=0)  # of two classes scikit-learn knows the difference alone
    value, gradient, curvature = newton.Objective(fit.with_ones(X), y, n_classes)(w)
    assert value == pytest.approx(objective(w, X, y), rel=1e-6)
    numeric = approx_fprime(w.ravel(), lambda flat: objective(flat.reshape(w.shape), X, y)).reshape(w.shape)
    np.testing.assert_allclose(gradient, numeric, atol=2e-6)
    np.testing.assert_allclose(curvature, 1 - (probabilities(w, X) ** 2).sum(axis=1), atol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_the_start_is_the_objective_at_the_shares_of_the_classes(n_classes, monkeypatch):
    monkeypatch.setattr(newton, "AT_ONCE", 16 * newton.LEAST_COLUMNS)
    X, y = drawn(n=90, n_classes=n_classes)
    whole = newton.Objective(fit.with_ones(X), y, n_classes)
    w, value, gradient = whole.start()
    np.testing.assert_allclose(probabilities(w, X), np.tile(np.bincount(y) / len(y), (len(y), 1)), atol=1e-12)
    expected, slope, _ = whole(w)
    assert value == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    X, y = drawn(n=100, strength=0)
    w = 30 * np.random.default_rng(0).normal(size=(4, 13))
    value, _, _ = newton.Objective(fit.with_ones(X), y, 4)(w)
    assert value == pytest.approx(objective(w, X, y), rel=1e-6)


def at_some_weights(n=24000, n_classes=8):
    """An objective of types, weights at which it is not minimal, and a sample drawn there."""
    X, y = told_by_types(n=n, d=6, n_classes=n_classes)
    w = np.random.default_rng(0).normal(size=(n_classes, 7))
    whole = newton.Objective(fit.with_ones(X), y, n_classes)
    return (
        whole,
        w,
        newton.Sample.of(whole, whole(w)[2], max(newton.FEWEST, n // newton.SAMPLED), np.random.default_rng(0)),
    )


def test_a_sample_is_a_part_of_the_rows_and_stands_for_all():
    whole, w, sample = at_some_weights()
    assert len(sample.X) == len(whole.X) / newton.SAMPLED
    value, gradient, _ = whole(w)
    model, slope, _ = sample.at(w)
    assert model == pytest.approx(value, rel=0.05)
    assert np.abs(slope - gradient).max() < 0.2 * np.abs(gradient).max()
    assert sample.weight.sum() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("n", "tolerance"), [(2000, 1e-3), (24000, 0.15)])
def test_curvature_is_the_second_derivative_of_all_rows_or_about_that_of_a_sample(n, tolerance):
    whole, w, sample = at_some_weights(n)
    v, step = np.random.default_rng(1).normal(size=w.shape), 1e-3
    product = newton.Curvature(sample, sample.at(w)[2]) @ v
    numeric = (whole(w + step * v)[1] - whole(w - step * v)[1]) / (2 * step)
    np.testing.assert_allclose(product, numeric, atol=tolerance * np.abs(numeric).max())


def test_blocks_are_those_of_the_second_derivative():
    whole, w, sample = at_some_weights(2000)
    inverse = newton.Curvature(sample, sample.at(w)[2]).inverse_blocks(np.random.default_rng(0))
    rows = whole.X.astype(np.float64)
    for of_class, found in zip(probabilities(w, rows[:, :-1]).T, inverse, strict=True):
        exact = (rows.T * (of_class * (1 - of_class))) @ rows / len(rows)
        ratios = np.linalg.eigvals(exact @ found).real
        assert 0.3 < ratios.min() < ratios.max() < 3, "of a sample, and with a ridge"


def counted(monkeypatch, owner, name):
    """Count the calls of a method from here on."""
    calls, method = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: calls.append(name) or method(*args))
    return calls


def with_one_row_of_a_class():
    X, y = told_by_types(n=24000, d=30, n_types=300)
    y[0] = 8  # a training row
    return X, y


def copied():
    """Each row twice or more, and each column, too."""
    X, y = told_by_types(n=6000, d=15, n_types=300)
    return np.tile(np.hstack([X, X]), (4, 1)), np.tile(y, 4)


LARGE = {
    "types": told_by_types(n=24000, d=30, n_types=300),
    "one row of a class": with_one_row_of_a_class(),
    "noise": drawn(n=24000, d=30, strength=0),
    "separable": drawn(n=24000, d=30, strength=3),
    "nearly separable": drawn(n=24000, d=30, strength=1, n_classes=8),
    "copies of rows and columns": copied(),
    "two classes": drawn(n=24000, d=30, strength=0.1, n_classes=2),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_sample_of_rows_leads_to_the_minimum_of_all_in_few_passes(name, monkeypatch):
    X, y = LARGE[name]
    passes = counted(monkeypatch, newton.Objective, "__call__")
    made, X, train = both(X, y, True)
    assert len(X[train]) >= newton.PART * newton.FEWEST
    expected, probe = oracle(X[train], y[train], tol=1e-6)
    w = np.column_stack([made.weights, made.intercepts]).astype(np.float64)
    assert made.converged
    assert len(passes) <= 11, "those over the part included; L-BFGS takes 20 to 40 where types are told apart"
    assert objective(w, X[train], y[train]) == pytest.approx(objective(expected, X[train], y[train]), rel=5e-5)
    theirs = probe.predict(X[~train].astype(np.float64)) == y[~train]
    assert abs(int(made.right.sum()) - int(theirs.sum())) <= 0.001 * len(theirs)


def test_steps_before_correct_the_curvature_that_a_sample_missed(monkeypatch):
    X, y = told_by_types(n=24000, d=60, n_types=300, n_classes=16, noise=0.5)
    passes = counted(monkeypatch, newton.Objective, "__call__")
    made, X, train = both(X, y, True)
    n_passes = len(passes)
    monkeypatch.setattr(newton, "KEPT", -np.inf)
    without = both(X, y, False)[0]
    assert made.converged
    assert without.converged
    assert n_passes < 0.8 * (len(passes) - n_passes)
    values = [
        objective(np.column_stack([its.weights, its.intercepts]).astype(np.float64), X[train], y[train])
        for its in (made, without)
    ]
    assert values[0] == pytest.approx(values[1], rel=5e-5)


def test_noise_draws_no_sample(monkeypatch):
    samples = counted(monkeypatch, newton.Models, "step")
    made, _, _ = both(*LARGE["noise"], True)
    assert made.converged
    assert not samples


def test_blocks_save_products_where_columns_differ_and_leave_the_minimum(monkeypatch):
    X, y = LARGE["types"]
    X, train = X * np.geomspace(1, 0.05, X.shape[1]), sides(X)
    products = counted(monkeypatch, newton.Curvature, "__matmul__")
    (with_blocks,) = fit.fit_all([(X, y)], train)
    n_with = len(products)
    monkeypatch.setattr(newton, "MANY_PRODUCTS", newton.MOST_PRODUCTS + 1)
    (without,) = fit.fit_all([(X, y)], train)
    assert n_with < 0.7 * (len(products) - n_with)
    values = [
        objective(np.column_stack([made.weights, made.intercepts]).astype(np.float64), X[train], y[train])
        for made in (with_blocks, without)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_a_fit_that_is_stopped_has_not_converged():
    X, y = CASES["types"]
    made = fit.fit_all([(X, y)], sides(X), max_iter=2)[0]
    assert (made.n_iter, made.converged) == (2, False)


def test_a_fit_is_the_same_alone_and_among_others():
    X, y = LARGE["types"]
    train, other = sides(X), X[:, :5]
    together = fit.fit_all([(X, y), (X, np.roll(y, 1)), (other, y)], train)
    for job, made in zip([(X, y), (X, np.roll(y, 1)), (other, y)], together, strict=True):
        (alone,) = fit.fit_all([job], train)
        assert alone.n_iter == made.n_iter
        np.testing.assert_array_equal(alone.weights, made.weights)
        np.testing.assert_array_equal(alone.right, made.right)


def test_rows_that_fits_share_are_divided_once(monkeypatch):
    divided, with_ones = [], fit.with_ones
    monkeypatch.setattr(fit, "with_ones", lambda *args: divided.append(args) or with_ones(*args))
    X, y = drawn(n=60)
    fit.fit_all([(X, y), (X, np.roll(y, 1)), (X, np.roll(y, 2))], sides(X))
    assert len(divided) == 2, "training rows and test rows"


def test_rows_of_a_side_are_copied_in_blocks_with_a_column_of_ones(monkeypatch):
    X, _ = drawn(n=60)
    monkeypatch.setattr(fit, "AT_ONCE", 7 * X.shape[1])
    np.testing.assert_array_equal(fit.with_ones(X, sides(X)), np.column_stack([X[::2], np.ones(30, np.float32)]))
    np.testing.assert_array_equal(fit.with_ones(X)[:, :-1], X)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_whitened_sides_are_the_rows_whitened_by_those_of_training(dtype):
    X = drawn(n=60)[0].astype(dtype)
    divided, whiten = fit.Sides.whitened(X, sides(X)), fit.Whitening.of(X[sides(X)])
    for rows, side in ((divided.training, sides(X)), (divided.test, ~sides(X))):
        np.testing.assert_allclose(rows, np.column_stack([whiten(X)[side], np.ones(30)]), atol=1e-5)
    directions = fit.random_directions(12, 3, seed=0)
    np.testing.assert_allclose(
        divided.projected(directions).test, np.column_stack([whiten(X)[1::2] @ directions, np.ones(30)]), atol=1e-5
    )


@pytest.mark.parametrize("like", [1.1, 1e-30, 3e4])
def test_equal_rows_have_one_coordinate_of_0(like):
    whiten = fit.Whitening.of(np.full((5000, 3), like, np.float32))
    assert whiten.axes.shape == (3, 1)
    assert not whiten.axes.any()


def test_whitening_in_blocks_of_rows_is_whitening(monkeypatch):
    X = drawn()[0]
    whiten = fit.Whitening.of(X)
    whole = whiten(X)
    monkeypatch.setattr(fit, "AT_ONCE", 7 * X.shape[1])
    np.testing.assert_allclose(whiten(X), whole, atol=1e-6)
    largest = np.take_along_axis(whiten.axes, np.abs(whiten.axes).argmax(axis=0)[None], axis=0)
    assert (largest > 0).all(), "an axis has one sign on every machine"


def test_types_of_tokens_are_words_at_positions_in_their_order():
    tokens = pl.DataFrame({"token": ["b", "a", "b", "a", "b"], "position": [2, 10, 2, 3, 1]})
    asked = Asked(tokens, np.arange(5), np.ones(5, bool), {}, {}, {})
    assert asked.types.tolist() == [3, 1, 3, 0, 2]
