"""The notebook's own protocol for a probe, so that its table and ours can stand side by side, and what makes the difference.

A linear layer (torch's default start) on the activations as they are, cross-entropy, AdamW at 1e-3 with torch's default
weight decay (0.01), batches of 64 in random order, 5 epochs; the edge listed last is left out; rows, not trees, are split
80 to 20. Ours differs in three things, which are undone one after the other: the same training split by tree, and our own
fit split by tree without the last edges. The three steps from the notebook's number to ours add up to the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from actstore.intervals import share_over_trees
from actstore.queries.probes.fit import MAX_ITER, Whitening, fit_all

LR, BATCH_SIZE, EPOCHS, TEST_SHARE = 1e-3, 64, 5, 0.2  # the notebook's


def notebook_rows(
    X: np.ndarray,
    tokens: pl.DataFrame,
    labels: Sequence[str],
    where: dict[str, str],
    seed: int,
    max_iter: int = MAX_ITER,
) -> list[dict[str, Any]]:
    """Rows of `results`: `notebook_accuracy`, `notebook_by_tree` (split by tree in place of rows), `without_last` (our fit).

    Args:
        X: float32 [n, d_model], as stored.
        tokens: rows of `probe_tokens`.
        labels: which of its columns are asked for.
        where: run, site and token_role.
        seed: of split, start and order.
        max_iter: of our fit.
    """
    from sklearn.model_selection import train_test_split

    kept = ~tokens["is_last"].to_numpy()
    X, tokens = X[kept], tokens.filter(kept)
    trees = tokens["tree_id"].to_numpy()
    by_row = np.ones(len(X), bool)
    by_row[train_test_split(np.arange(len(X)), test_size=TEST_SHARE, random_state=seed)[1]] = False
    by_tree = (tokens["split"] == "train").to_numpy()
    ys = [tokens[label].to_numpy().astype(np.int64) for label in labels]
    whitened = Whitening.of(X[by_tree])(X)
    fits = fit_all([(whitened, y) for y in ys], by_tree, max_iter)
    rows = []
    for label, y, ours in zip(labels, ys, fits, strict=True):
        for metric, train, right in (
            ("notebook_accuracy", by_row, linear_layer(X[by_row], y[by_row], X[~by_row], seed) == y[~by_row]),
            ("notebook_by_tree", by_tree, linear_layer(X[by_tree], y[by_tree], X[~by_tree], seed) == y[~by_tree]),
            ("without_last", by_tree, ours.right),
        ):
            low, high = share_over_trees(right, trees[~train], seed)
            found = {"metric": metric, "value": float(right.mean()), "low": low, "high": high, "n": len(right)}
            rows.append({**where, "label": label, **found})
    return rows


def linear_layer(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, seed: int) -> np.ndarray:
    """int64 [n_test]: what a linear layer, trained as the notebook trains it, says of the test rows.

    Args:
        X: float32 [n, d_model].
        y: int64 [n], labels from 0 on.
        X_test: float32 [n_test, d_model].
        seed: of its start and of the order of rows.
    """
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of products as small as these a second thread costs more than it saves
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
    bound = width**-0.5  # nn.Linear's own start, drawn here so that the seed is of this layer alone
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
