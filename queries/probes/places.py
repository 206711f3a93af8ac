"""Probes by place in the list of edges, which a mean over all places hides.

Each place has two accuracies. The first is that of the common probe, fitted to all places; its mean
over places, weighted by rows, is the whole accuracy. The second is that of a place's own probe,
fitted to the rows of that place alone. The own probe finds directions that no other place shares,
but has fewer rows. Baselines are computed on the rows of the place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from actstore.queries.probes.asked import Asked, above_test
from actstore.queries.probes.baselines import highest, with_majority
from actstore.queries.probes.figures import AT, PLACE
from actstore.queries.probes.fit import Sides, fit_all
from actstore.queries.study import Test, mean_row


def place_rows(
    X: np.ndarray, right: np.ndarray, asked: Asked, about: dict[str, str], seed: int, max_iter: int
) -> tuple[list[dict[str, Any]], list[Test]]:
    """Rows of `results`, labels like `source, edge 3`; per place, a test against its best baseline.

    Metrics are `place_accuracy`, `place_own_accuracy`, `place_above_baseline`, and `place_` with
    the name of each baseline. Places without a test row are left out.

    Args:
        X: float32 [n, d_model], as stored.
        right: bool [n_test], test rows that the common probe gets right.
        asked: the n rows.
        about: run, site, token_role and label.
        seed: seed of the intervals.
        max_iter: largest number of iterations of a fit.
    """
    places, train, y = asked.tokens["edge"].to_numpy(), asked.train, asked.labels[about["label"]]
    rows: list[dict[str, Any]] = []
    tests: list[Test] = []
    for place in np.unique(places):
        here = places == place
        in_test = here[~train]
        if not (here & train).any() or not in_test.any():
            continue
        measured = {"accuracy": right[in_test].astype(np.float64)}
        measured["own_accuracy"] = _own(X[here], y[here], train[here], max_iter)
        guessed = {name: p[in_test] for name, p in asked.guessed[about["label"]].items()}
        guessed = with_majority(guessed, y[here & train], y[here & ~train])
        measured |= {"above_baseline": measured["accuracy"] - highest(guessed), **guessed}
        trees, at = asked.test_sequences[in_test], {**about, "label": f"{about['label']}{AT}{place}"}
        for metric, values in measured.items():
            rows.append(mean_row(values, trees, seed, **at, metric=f"{PLACE}{metric}"))
            if metric == "above_baseline":
                tests.append(above_test(values, trees, rows[-1], seed, asked.baseline))
    return rows, tests


def _own(X: np.ndarray, y: np.ndarray, train: np.ndarray, max_iter: int) -> np.ndarray:
    """bool [n_test]: test rows of a place that its own probe gets right."""
    whitened = Sides.whitened(X, train)
    return fit_all([(whitened, y)], train, max_iter)[0].right
