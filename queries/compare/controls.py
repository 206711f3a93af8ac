"""What the linear map of `compare` is held against: the same map, from what no training made.

A map of d_model × d_model numbers, before a probe that was fitted to what it maps to, can read whatever its input holds in any
linear basis. So one asks how much an input reads that no training made. Three are taken, and the best counts:

- the other model's embedding of the token: the token and its place alone;
- random features: what an untrained network of the same width could hold at the token, see `random_features`;
- the site itself with its rows shuffled, which reads what a map without any relation does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from actstore.arrays.address import POSITION_BITS, POSITION_MASK

if TYPE_CHECKING:
    from actstore.store import Store

CONTROLS = {  # metric: in words
    "mapped_embed": "the embedding",
    "mapped_random": "random features",
    "mapped_shuffled": "shuffled rows",
}
WORDS = """
-- the words of each tree's list of edges, which the tokens of every tree begin with
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
    """Numbers of words, intp [n_trees, 3 * n_edges], of the first trees of a set, and the tree_id of each, [n_trees]."""
    width = store.sql(WIDTH, {"dataset": dataset}).item()
    words = store.sql(WORDS, {"dataset": dataset, "max_trees": max_trees})
    numbers = np.unique(words["token"].to_numpy(), return_inverse=True)[1]
    return numbers.reshape(-1, width), words["tree_id"].to_numpy()[::width]


def random_features(words: tuple[np.ndarray, np.ndarray], token_ids: np.ndarray, d_model: int, seed: int) -> np.ndarray:
    """float32 [n, d_model]: random features of each token and of all before it.

    Each word has a random direction for each distance that it can stand back from the token. Their sum, over the square root of how
    many they are, goes through one random layer of ReLUs. It is more than an untrained transformer holds, whose even attention
    forgets in which order the words stood. Nothing was learned, yet the source, one word back, can be read from it in part:
    all words share d_model directions. So a linear map of something learned must read more.

    Args:
        words: as of `words_of`.
        token_ids: int64 [n].
        d_model: width of what they stand for.
        seed: of the directions and of the layer.
    """
    table, trees = words
    tree, position = np.searchsorted(trees, token_ids >> POSITION_BITS), token_ids & POSITION_MASK
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
    """What the best linear maps (least squares, training rows) make of each source, by metric: float [n, d_model].

    Args:
        X: float [n, d_model], what is mapped to.
        Z: float [n, d_model], the site that is mapped; with the rows of X shuffled it is the third control.
        sources: `embed` and `random`, float32 [n, d]; None where there is none, and then no control.
        train: bool [n].
        seed: of the shuffle.
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
    """Of the controls among metrics the one with the highest value; the first of equals."""
    return max((metric for metric in CONTROLS if metric in values), key=lambda metric: values[metric])
