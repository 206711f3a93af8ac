"""Runs whose answers a test makes up, over trees and variants that are really drawn, so that it knows what a study must say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

from actstore.ingest.answers import tree_paths
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.trees.draw import NO_NODE, Trees
from actstore.ingest.trees.tokens import COMMA, PAD, encode

Says = Callable[[Trees, int], tuple[np.ndarray, np.ndarray]]  # trees, number of the first → right, p of the right step


@dataclass
class Answering(Ingest):
    """An ingest whose model says what `says` says: bool and float [n_trees, n_nodes - 1], read up to each depth."""

    says: Says | None = None

    def answers(self, drawn, ids, into, advance, *_):
        trees, first = drawn.trees, drawn.start
        right, p = self.says(trees, first)
        graded = graded_as(trees, right, p)
        advance(first + len(trees))
        return lambda: {
            "predictions": tree_paths.prediction_rows(graded, self.plan.run, ids.sequence_id),
            "outcomes": tree_paths.outcome_rows(graded, self.plan.run, ids.sequence_id),
        }


@dataclass
class Dreaming(Ingest):
    """An ingest of free continuations that `dreams` makes up: (trees, number of the first) → a list of words a tree."""

    dreams: Callable[[Trees, int], list[list[str]]] | None = None

    def answers(self, drawn, ids, into, advance, *_):
        trees = drawn.trees
        rows = [
            (self.plan.run, ids.sequence_id + tree, 0, 3 * trees.n_nodes - 3 + place, word, 0.5, 0.5)
            for tree, words in enumerate(self.dreams(trees, drawn.start))
            for place, word in enumerate(words)
        ]
        names = ["run", "tree_id", "sample", "position", "token", "p", "p_best"]
        return lambda: {"generations": pl.DataFrame(rows, schema=names, orient="row")}


def graded_as(trees: Trees, right: np.ndarray, p: np.ndarray) -> tree_paths.Answers:
    """Answers of which each step is right or wrong as told; a wrong one is a comma."""
    target = encode(trees)[:, 3 * trees.n_nodes :]
    there = target != PAD
    right = right | ~there
    failed = ~right.all(axis=1)
    first = np.where(failed, (~right).argmax(axis=1), NO_NODE).astype(np.uint8)
    greedy = np.where(np.arange(target.shape[1]) < first[:, None], trees.path, NO_NODE).astype(np.uint8)
    return tree_paths.Answers(
        target=target,
        predicted=np.where(right, target, COMMA).astype(np.uint8),
        p_target=np.where(there, p, np.nan).astype(np.float32),
        greedy=greedy,
        first_wrong_step=first,
        failure=np.where(failed, tree_paths.FAILURES.index("not_a_step"), NO_NODE).astype(np.uint8),
    )


def last_step(trees: Trees) -> np.ndarray:
    """bool [n_trees, n_nodes - 1]: the step that takes the edge listed last."""
    return np.asarray(trees.path == trees.edges[:, -1, 1][:, None])


def noise(trees: Trees, first: int, share: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Each step right or wrong by chance, whatever the tree; the same for tree i however it is drawn."""
    u = np.random.default_rng(first + 7).random((len(trees), trees.n_nodes - 1))
    return u < share, 0.5 + u / 4
