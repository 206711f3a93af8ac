"""The notebook's own protocol for a probe, so that its table and ours can stand side by side.

A linear layer (torch's default start) on the activations as they are, cross-entropy, AdamW at 1e-3 with torch's
default weight decay, batches of 64 in random order, 5 epochs; the edge listed last is left out; rows, not trees, are
split 80 to 20. Three things differ from ours, so two more numbers are given: the same training split by tree, which
shows what the split by row leaks, and the same after 20 epochs, which shows what 5 are too few for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from actstore.statistics import share_over_trees

LR, BATCH_SIZE, EPOCHS, TEST_SHARE = 1e-3, 64, 5, 0.2  # the notebook's
MANY_EPOCHS = 20  # four times as many
MAX_MANY = 10_000  # rows that are trained on so long: a minute a site would else go by


def notebook_rows(
    X: np.ndarray, tokens: pl.DataFrame, labels: Sequence[str], where: dict[str, str], seed: int
) -> list[dict[str, Any]]:
    """Rows of `results`: accuracy by the notebook's protocol, split by tree in place of rows, and after 20 epochs.

    Args:
        X: float32 [n, d_model], as stored.
        tokens: rows of `probe_tokens`.
        labels: which of its columns are asked for.
        where: run, site and token_role.
        seed: of split, start and order.
    """
    kept = ~tokens["is_last"].to_numpy()
    X, tokens = X[kept], tokens.filter(kept)
    trees = tokens["tree_id"].to_numpy()
    by_row = np.random.default_rng(seed).random(len(X)) >= TEST_SHARE
    by_tree = (tokens["split"] == "train").to_numpy()
    few = by_row & (np.cumsum(by_row) <= MAX_MANY)
    rows = []
    for label in labels:
        y = tokens[label].to_numpy().astype(np.int64)
        for metric, train, test, epochs in (
            ("notebook_accuracy", by_row, ~by_row, EPOCHS),
            ("notebook_by_tree", by_tree, ~by_tree, EPOCHS),
            ("notebook_20_epochs", few, ~by_row, MANY_EPOCHS),
        ):
            right = _linear_layer(X[train], y[train], X[test], epochs, seed) == y[test]
            low, high = share_over_trees(right, trees[test], seed)
            rows.append(
                {
                    **where,
                    "label": label,
                    "metric": metric,
                    "value": float(right.mean()),
                    "low": low,
                    "high": high,
                    "n": len(right),
                }
            )
    return rows


def _linear_layer(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, epochs: int, seed: int) -> np.ndarray:
    """int64 [n_test]: what a linear layer, trained as the notebook trains it, says of the test rows."""
    import torch

    torch.set_num_threads(1)  # of products as small as these a second thread costs more than it saves
    generator = torch.Generator().manual_seed(seed)
    n_classes, width = int(y.max()) + 1, X.shape[1]
    bound = width**-0.5  # nn.Linear's own start
    weight = torch.empty(n_classes, width).uniform_(-bound, bound, generator=generator).requires_grad_()
    bias = torch.empty(n_classes).uniform_(-bound, bound, generator=generator).requires_grad_()
    optimizer = torch.optim.AdamW([weight, bias], lr=LR, fused=True)
    rows, labels = torch.from_numpy(np.ascontiguousarray(X)), torch.from_numpy(y)
    for _ in range(epochs):
        for batch in torch.randperm(len(rows), generator=generator).split(BATCH_SIZE):
            loss = torch.nn.functional.cross_entropy(rows[batch] @ weight.T + bias, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        said = torch.from_numpy(np.ascontiguousarray(X_test)) @ weight.T + bias
    return np.asarray(said.argmax(dim=1).numpy())
