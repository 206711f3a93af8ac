"""The controls of `compare`'s linear map: the same map, from inputs that no training made.

A map of d_model × d_model numbers, followed by a probe on its output, can read whatever its input
holds in any linear basis. The controls measure how much untrained inputs give. There are three, and
the best counts:

- the other model's embedding of the token: only the token and its place;
- random features: an untrained network of the same width, see `random_features`;
- the site itself with shuffled rows: a map without any relation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from actstore.arrays.address import positions, tree_ids

if TYPE_CHECKING:
    from actstore.store import Store

CONTROLS = {  # metric → words
    "mapped_embed": "the embedding",
    "mapped_random": "random features",
    "mapped_shuffled": "shuffled rows",
}
WORDS = """
-- the words of each tree's list of edges, the first tokens of the tree
select tree_id, token
from tokens
join datasets using (dataset)
where dataset = $dataset
    and tree_id < (select min(tree_id) + $max_trees from trees where dataset = $dataset)
    and position < 3 * n_nodes - 3
order by token_id
"""
WIDTH = "select 3 * n_nodes - 3 as width from datasets where dataset = $dataset"


def words_of(store: Store, dataset: str, max_trees: int) -> tuple[np.ndarray, np.ndarray]:
    """Word numbers of a set's first trees, intp [n_trees, 3 * n_edges], and tree_id [n_trees]."""
    width = store.sql(WIDTH, {"dataset": dataset}).item()
    words = store.sql(WORDS, {"dataset": dataset, "max_trees": max_trees})
    numbers = np.unique(words["token"].to_numpy(), return_inverse=True)[1]
    return numbers.reshape(-1, width), words["tree_id"].to_numpy()[::width]


def random_features(words: tuple[np.ndarray, np.ndarray], token_ids: np.ndarray, d_model: int, seed: int) -> np.ndarray:
    """float32 [n, d_model]: random features of each token and of all tokens before it.

    Each word has a random direction per distance from the token. The sum of the directions, divided
    by the square root of their number, goes through one random ReLU layer. The features hold more
    than an untrained transformer, whose even attention forgets the order of words. Part of the
    source, one word back, can be read from the features, although nothing was learned: all words
    share d_model directions. A linear map of learned activations must read more.

    Args:
        words: see `words_of`.
        token_ids: int64 [n].
        d_model: width of the features.
        seed: seed of the directions and of the layer.
    """
    table, trees = words
    tree, position = np.searchsorted(trees, tree_ids(token_ids)), positions(token_ids)
    rng = np.random.default_rng(seed)
    mixed = np.zeros((len(token_ids), d_model), np.float32)
    for back in range(position.max() + 1):
        directions = rng.standard_normal((table.max() + 1, d_model), dtype=np.float32)
        there = position >= back
        mixed[there] += directions[table[tree[there], position[there] - back]]
    mixed /= np.sqrt(position + 1, dtype=np.float32)[:, None]
    return np.maximum(mixed @ rng.standard_normal((d_model, d_model), dtype=np.float32) / np.sqrt(d_model), 0)


def map_controls(
    X: np.ndarray, Z: np.ndarray, sources: Mapping[str, np.ndarray | None], train: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Map each source to X by least squares on training rows: metric → float [n, d_model].

    Args:
        X: float [n, d_model], output of the map.
        Z: float [n, d_model], the mapped site; fitted to shuffled rows of X, Z is the third
            control.
        sources: `embed` and `random`, float32 [n, d]; None leaves the control out.
        train: bool [n], training rows.
        seed: seed of the shuffle.
    """
    from sklearn.linear_model import LinearRegression

    made = {
        f"mapped_{name}": LinearRegression().fit(source[train], X[train]).predict(source)
        for name, source in sources.items()
        if source is not None
    }
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(train))
    return made | {"mapped_shuffled": LinearRegression().fit(Z[train], X[shuffled]).predict(Z)}


def best_control(values: Mapping[str, float]) -> str:
    """The control with the highest value; the first among equals."""
    return max((metric for metric in CONTROLS if metric in values), key=lambda metric: values[metric])
