"""How often a model finds the path: token by token, whole paths teacher-forced and greedy, by depth, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from actstore.errors import BadInput
from actstore.ingest.activations import forward
from actstore.ingest.models import Model
from actstore.ingest.predictions import answer
from actstore.ingest.recipe import Recipe, step_trees
from actstore.ingest.tokens import PAD, encode, is_arrow
from actstore.ingest.trees import Trees, draw
from actstore.statistics import wilson

SEED = 20_000_000  # far from the seeds that people train with
BATCH = 128  # trees a forward pass, the quickest on a CPU
MEASURES = ("token", "whole_path", "greedy")


@dataclass(frozen=True)
class Evaluation:
    """What a model got right on trees of one distribution.

    Attributes:
        n_trees: trees evaluated.
        n_left_out: trees drawn that training had seen, and not evaluated; None where nobody said what it saw.
        table: a row for all depths (depth null) and one for each: depth, n_trees, n_tokens, and for each of MEASURES
            the share right and its 95 % interval (Wilson's): token, token_low, token_high, …
    """

    model: str
    weights_sha256: str
    distribution: str
    seed: int
    n_nodes: int
    n_trees: int
    n_left_out: int | None
    table: pl.DataFrame

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON; the table as a list of rows."""
        return {**vars(self), "table": self.table.to_dicts()}

    def sentence(self) -> str:
        """What was graded on what, in a line."""
        left_out = "what its training saw is not known"
        if self.n_left_out is not None:
            left_out = f"{self.n_left_out:,} more, seen in training, were left out"
        trees = f"{self.n_trees:,} {self.distribution} trees of {self.n_nodes} nodes, seed {self.seed:,}"
        return f"{self.model} (weights {self.weights_sha256[:12]}) on {trees}; {left_out}"


def evaluate(
    model: Model,
    distribution: str | None = None,
    n_trees: int = 20_000,
    seed: int = SEED,
    n_nodes: int | None = None,
    recipe: Recipe | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Let a model answer freshly drawn trees.

    A token is right if it is the next step given the true ones before it; a whole path, if all its tokens are; a greedy
    answer, if the model left to itself writes the path and then ends: the reproduction's ends at the goal, the
    baseline's with a comma.

    Args:
        distribution: one of trees.DISTRIBUTIONS; the system's own unless told.
        n_trees: how many to evaluate.
        seed: of the trees.
        n_nodes: of the trees; the model's own unless told.
        recipe: what the model was trained with; trees that it saw are then left out, and others drawn instead.
        progress: called with the trees evaluated so far.

    Raises:
        BadInput: training is seeded alike, or saw nearly every tree there is; or the trees cannot be drawn.
    """
    config = model.config
    distribution, n_nodes = distribution or config.system, n_nodes or config.n_nodes
    if n_trees < 1:
        raise BadInput(f"got {n_trees} trees; evaluate 1 or more")
    if recipe and seed == recipe.seed:
        raise BadInput(f"seed {seed} is the training's own; take another")
    seen = seen_hashes(recipe, model) if recipe else None
    done, left_out, counts = 0, 0, np.zeros((n_nodes, 5), np.int64)
    for trees, n_seen in _fresh(distribution, seed, n_nodes, n_trees, seen):
        counts += _count(model, trees) if len(trees) else 0
        done, left_out = done + len(trees), left_out + n_seen
        if progress:
            progress(done)
    return Evaluation(
        model.name,
        model.weights_sha256,
        distribution,
        seed,
        n_nodes,
        done,
        left_out if recipe else None,
        _table(counts),
    )


def seen_hashes(recipe: Recipe, model: Model) -> np.ndarray:
    """uint64 [n], sorted: the canonical hashes of all trees that a training draws; some 20 s a million."""
    return np.unique([step_trees(recipe, model.config, step)[0].hashes() for step in range(recipe.steps)])


def _fresh(
    distribution: str, seed: int, n_nodes: int, n_trees: int, seen: np.ndarray | None
) -> Iterator[tuple[Trees, int]]:
    """Batches of n_trees trees in all that are not among those seen, and how many were left out of each."""
    start, missing = 0, n_trees
    while missing:
        trees = draw(distribution, seed, start, start + min(BATCH, missing), n_nodes)
        start += len(trees)
        fresh = np.ones(len(trees), bool) if seen is None else ~np.isin(trees.hashes(), seen)
        missing -= int(fresh.sum())
        if start > 10 * n_trees:
            raise BadInput(
                f"training saw nearly all trees of {n_nodes} nodes, so none is left to evaluate; use larger ones"
            )
        yield trees[fresh], int((~fresh).sum())


def _count(model: Model, trees: Trees) -> np.ndarray:
    """int64 [depth, 5]: trees, tokens, tokens right, whole paths right and greedy answers right."""
    words = encode(trees)
    ids = torch.from_numpy(model.config.vocabulary.encode(words)).to(next(model.bridge.parameters()).device)
    logits = forward(model, ids, [], lambda site, activations: None)
    answers = answer(model, words, logits)
    right = (answers.predicted == answers.target) | (answers.target == PAD)
    greedy = (answers.greedy == trees.path).all(axis=1) & _ends(model, trees, logits)
    n_right = trees.depth - (~right).sum(axis=1)
    columns = np.ones(len(trees), np.int64), trees.depth, n_right, right.all(axis=1), greedy
    counts = np.zeros((trees.n_nodes, 5), np.int64)
    np.add.at(counts, trees.depth, np.stack(columns, axis=1))
    return counts


def _ends(model: Model, trees: Trees, logits: torch.Tensor) -> np.ndarray:
    """bool [n_trees]: whether an answer ends behind the goal, which the reproduction was never taught to say."""
    if model.config.system == "reproduction":
        return np.ones(len(trees), bool)
    rows, goal_at = torch.arange(len(trees)), torch.from_numpy(trees.depth.astype(np.int64)) + 3 * trees.n_nodes - 1
    return ~is_arrow(model.config.vocabulary.decode(logits[rows, goal_at].argmax(-1).cpu().numpy()))


def _table(counts: np.ndarray) -> pl.DataFrame:
    depths = [depth for depth in range(len(counts)) if counts[depth, 0]]
    return pl.DataFrame(
        [_row(None, counts.sum(axis=0)), *(_row(depth, counts[depth]) for depth in depths)],
        schema_overrides={"depth": pl.UInt8},
    )


def _row(depth: int | None, counts: np.ndarray) -> dict[str, float | int | None]:
    n_trees, n_tokens = int(counts[0]), int(counts[1])
    row: dict[str, float | int | None] = {"depth": depth, "n_trees": n_trees, "n_tokens": n_tokens}
    for measure, n, n_right in zip(MEASURES, (n_tokens, n_trees, n_trees), counts[2:].tolist(), strict=True):
        low, high = wilson(n_right, n)
        row |= {measure: n_right / n, f"{measure}_low": low, f"{measure}_high": high}
    return row
