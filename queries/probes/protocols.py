"""The notebook's protocol for a probe, and the steps that separate its numbers from ours.

The notebook trains a linear layer (torch's default start) on unscaled activations with
cross-entropy, AdamW at 1e-3 with torch's default weight decay (0.01), batches of 64 in random
order, and 5 epochs. It leaves the last edge out and splits rows, not trees, 80 to 20. Our protocol
differs in three steps: a split by tree, our fit, and the last edge. The first two steps are also
measured alone, so that the three differences sum to the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from actstore.queries.probes.fit import MAX_ITER, Sides, fit_all
from actstore.queries.study import mean_row

LR, BATCH_SIZE, EPOCHS, TEST_SHARE = 1e-3, 64, 5, 0.2  # the notebook's


def notebook_rows(
    X: np.ndarray,
    tokens: pl.DataFrame,
    labels: Sequence[str],
    where: dict[str, str],
    seed: int,
    max_iter: int = MAX_ITER,
) -> list[dict[str, Any]]:
    """Rows of `results`, metrics `notebook_accuracy`, `notebook_by_tree` and `without_last`.

    `notebook_by_tree` splits by tree; `without_last` is our fit.

    Args:
        X: float32 [n, d_model], as stored.
        tokens: rows of `probe_tokens`.
        labels: the wanted label columns.
        where: run, site and token_role.
        seed: seed of split, start and order.
        max_iter: largest number of iterations of our fit.
    """
    from sklearn.model_selection import train_test_split

    kept = ~tokens["is_last"].to_numpy()
    X, tokens = X[kept], tokens.filter(kept)
    trees = tokens["tree_id"].to_numpy()
    by_row = np.ones(len(X), bool)
    by_row[train_test_split(np.arange(len(X)), test_size=TEST_SHARE, random_state=seed)[1]] = False
    by_tree = (tokens["split"] == "train").to_numpy()
    ys = [tokens[label].to_numpy().astype(np.int64) for label in labels]
    whitened = Sides.whitened(X, by_tree)
    fits = fit_all([(whitened, y) for y in ys], by_tree, max_iter)
    rows = []
    for label, y, ours in zip(labels, ys, fits, strict=True):
        for metric, train, right in (
            ("notebook_accuracy", by_row, linear_layer(X[by_row], y[by_row], X[~by_row], seed) == y[~by_row]),
            ("notebook_by_tree", by_tree, linear_layer(X[by_tree], y[by_tree], X[~by_tree], seed) == y[~by_tree]),
            ("without_last", by_tree, ours.right),
        ):
            rows.append(mean_row(right, trees[~train], seed, **where, label=label, metric=metric))
    return rows


def linear_layer(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, seed: int) -> np.ndarray:
    """int64 [n_test]: labels that a linear layer, trained like the notebook's, gives test rows.

    Args:
        X: float32 [n, d_model].
        y: int64 [n], labels from 0.
        X_test: float32 [n_test, d_model].
        seed: seed of the start and of the order of rows.
    """
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for such small products, a second thread costs more than it saves
    try:
        weight, bias = _train(X, y, seed)
    finally:
        torch.set_num_threads(n_threads)
    return np.asarray((X_test @ weight.T + bias).argmax(axis=1))


def _train(X: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n_classes, d_model] and [n_classes]: the trained layer."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    n_classes, width = int(y.max()) + 1, X.shape[1]
    bound = width**-0.5  # nn.Linear's start, drawn here so that the seed affects this layer alone
    weight = torch.empty(n_classes, width).uniform_(-bound, bound, generator=generator).requires_grad_()
    bias = torch.empty(n_classes).uniform_(-bound, bound, generator=generator).requires_grad_()
    optimizer = torch.optim.AdamW([weight, bias], lr=LR, fused=True)
    rows, labels = torch.from_numpy(np.ascontiguousarray(X)), torch.from_numpy(y)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(rows), generator=generator).split(BATCH_SIZE):
            loss = torch.nn.functional.cross_entropy(rows[batch] @ weight.T + bias, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weight.detach().numpy(), bias.detach().numpy()
