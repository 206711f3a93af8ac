"""How often a model finds the path: per token, whole path and greedy answer.

A model is graded on trees of every distribution, since accuracy on its own distribution may not
carry over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.forward import forward
from actstore.ingest.training.recipe import Recipe, step_trees
from actstore.ingest.trees.draw import DISTRIBUTIONS, Trees, draw
from actstore.ingest.trees.tokens import PAD, encode, is_arrow, n_positions, root_at
from actstore.intervals import over_trees, share

if TYPE_CHECKING:
    import torch

    from actstore.ingest.models.load import Model

SEED = 20_000_000  # far from the seeds that people train with
SAMPLE = 1000  # trees that tell whether a training leaves some to grade its model on
BATCH = 128  # trees per forward pass; the quickest on a CPU
MEASURES = ("token", "whole_path", "greedy")
SCHEMA: dict[str, pl.DataType] = {
    "distribution": pl.String(),
    "edges": pl.String(),
    "depth": pl.UInt8(),
    "n_trees": pl.Int64(),
    "n_tokens": pl.Int64(),
    **{measure + end: pl.Float64() for measure in MEASURES for end in ("", "_low", "_high")},
}


@dataclass(frozen=True)
class Evaluation:
    """The share of tokens and paths that a model got right.

    Attributes:
        distributions: the evaluated distributions, the model's own first.
        n_trees: trees evaluated per distribution.
        n_left_out: trees per distribution that were drawn but left out, since training had seen
            them; None without a recipe.
        frame: columns distribution, edges, depth, n_trees, n_tokens, and for each of MEASURES the
            share right and its exact 95 % interval over trees: token, token_low, token_high, … Each
            distribution has a row for all its trees (depth null), then a row per depth. `baseline`
            also has a row each for trees with `backward` and `shuffled` edges.
    """

    model: str
    weights_sha256: str
    distributions: tuple[str, ...]
    seed: int
    n_nodes: int
    n_trees: int
    n_left_out: dict[str, int] | None
    frame: pl.DataFrame

    def to_dict(self) -> dict[str, object]:
        """The evaluation as plain data for JSON; the frame becomes `table`, a list of rows."""
        about = vars(self) | {"distributions": list(self.distributions)}
        return about | {"table": about.pop("frame").to_dicts()}

    def shown(self) -> pl.DataFrame:
        """The frame for a reader: shares in percent, the answers first, and intervals as text."""
        columns: list[pl.Expr | pl.Series] = [
            pl.col("distribution"),
            pl.col("edges"),
            pl.col("depth"),
            pl.col("n_trees").alias("trees"),
        ]
        words = {name: name.replace("_", " ") for name in reversed(MEASURES)}
        columns += [(100 * pl.col(name)).round(2).alias(f"{said} %") for name, said in words.items()]
        for name, said in words.items():
            ends = self.frame.select(f"{name}_low", f"{name}_high").rows()
            columns.append(pl.Series(f"{said} 95 %", [f"[{100 * low:.2f}, {100 * high:.2f}]" for low, high in ends]))
        return self.frame.select(columns)

    def sentence(self) -> str:
        """One line: model, trees, and trees left out."""
        left_out = "what its training saw is not known"
        if self.n_left_out is not None:
            left_out = f"{sum(self.n_left_out.values()):,} more, seen in training, were left out"
        each = "" if len(self.distributions) == 1 else " each"
        trees = (
            f"{self.n_trees:,} {', '.join(self.distributions)} trees{each} of {self.n_nodes} nodes, seed {self.seed:,}"
        )
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
    """Grade a model on freshly drawn trees.

    A token is right if it is the next step, given the true steps before it. A whole path is right
    if all its tokens are right. A greedy answer is right if the model writes the path from its own
    tokens and then ends. The reproduction ends at the goal, the baseline with a comma.

    Args:
        distribution: one of trees.DISTRIBUTIONS; default all.
        n_trees: trees to evaluate, per distribution.
        seed: seed of the trees.
        n_nodes: nodes per tree; default the model's own number.
        recipe: the model's training; trees seen in training are then replaced by others.
        progress: called with the number of trees evaluated so far.

    Raises:
        BadInput: see `check`; or training saw nearly every tree of this size.
    """
    config, n_nodes = model.config, model.config.n_nodes if n_nodes is None else n_nodes
    check(config, distribution, n_trees, seed, n_nodes, recipe)
    seen = seen_hashes(recipe, model) if recipe else None
    asked, tables, left_out = distributions(config, distribution), [], dict[str, int]()
    for number, name in enumerate(asked):
        parts, left_out[name] = [], 0
        for trees, n_seen in _fresh(name, seed, n_nodes, n_trees, seen):
            if len(trees):
                parts.append(_graded(model, trees))
            left_out[name] += n_seen
            if progress:
                progress(number * n_trees + sum(map(len, parts)))
        tables.append(_table(pl.concat(parts), name))
    return Evaluation(
        model.name,
        model.weights_sha256,
        asked,
        seed,
        n_nodes,
        n_trees,
        left_out if recipe else None,
        pl.concat(tables),
    )


def distributions(config: ModelConfig, distribution: str | None = None) -> tuple[str, ...]:
    """The named distribution as a tuple; by default all, the model's own first."""
    return (
        (distribution,) if distribution else (config.system, *(name for name in DISTRIBUTIONS if name != config.system))
    )


def check(
    config: ModelConfig,
    distribution: str | None = None,
    n_trees: int = 20_000,
    seed: int = SEED,
    n_nodes: int | None = None,
    recipe: Recipe | None = None,
) -> None:
    """Check the arguments of `evaluate`, without the model's weights.

    Raises:
        BadInput: a distribution, size, number of trees or seed is invalid, or the seed is the
            training's.
    """
    n_nodes = config.n_nodes if n_nodes is None else n_nodes
    for name in distributions(config, distribution):
        draw(name, seed, 0, 0, n_nodes)  # refuses what no tree can be
    if n_trees < 1:
        raise BadInput(f"got {n_trees} trees; evaluate 1 or more (--trees)")
    if n_nodes > config.n_nodes or n_positions(n_nodes) > config.n_ctx:
        most = min(config.n_nodes, (config.n_ctx + 1) // 4)
        raise BadInput(
            f"got {n_nodes} nodes; the model has a vocabulary of {config.n_nodes} nodes and a context of {config.n_ctx} tokens: "
            f"use {most} or fewer (--nodes)"
        )
    if recipe and seed == recipe.seed:
        raise BadInput(f"seed {seed} is the training's own; take another (--seed)")


def check_unseen(config: ModelConfig, recipe: Recipe) -> None:
    """Refuse a training that would see nearly every tree that its model could be graded on.

    A sample of the trees to grade on is compared with the training's trees, until nearly all of the
    sample are seen. Nothing is compared if there are more trees than the training draws.

    Raises:
        BadInput: fewer than one in ten trees of a distribution would be left.
    """
    n_nodes = config.n_nodes
    if recipe.steps * recipe.batch_size < n_nodes ** (n_nodes - 1):  # the number of labelled rooted trees
        return
    unseen = {name: draw(name, SEED, 0, SAMPLE, n_nodes).hashes() for name in distributions(config)}
    for step in (step for step in range(recipe.steps) if recipe.n_nodes_at(step, n_nodes) == n_nodes):
        seen = step_trees(recipe, config, step)[0].hashes()
        for name, sample in unseen.items():
            unseen[name] = sample[~np.isin(sample, seen)]
            if 10 * len(unseen[name]) < SAMPLE:
                raise BadInput(
                    f"a training of {recipe.steps:,} steps sees nearly all {name} trees of {n_nodes} nodes, so none would be "
                    "left to grade the model on; take more nodes (--nodes) or fewer steps (--steps)"
                )


def seen_hashes(recipe: Recipe, model: Model) -> np.ndarray:
    """uint64 [n], sorted: `Trees.hashes` of all trees of a training; 20 s per million trees."""
    return np.unique([step_trees(recipe, model.config, step)[0].hashes() for step in range(recipe.steps)])


def _fresh(
    distribution: str, seed: int, n_nodes: int, n_trees: int, seen: np.ndarray | None
) -> Iterator[tuple[Trees, int]]:
    """Yield batches of n_trees unseen trees in all, each with the number of trees left out."""
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


def _graded(model: Model, trees: Trees) -> pl.DataFrame:
    """One row per tree: depth, backward, n_right, whole_path and greedy."""
    import torch

    from actstore.ingest.answers.tree_paths import answer

    words = encode(trees)
    ids = torch.from_numpy(model.config.vocabulary.encode(words)).to(next(model.bridge.parameters()).device)
    logits = forward(model, ids, [], lambda site, activations: None)
    answers = answer(model, words, logits)
    right = (answers.predicted == answers.target) | (answers.target == PAD)
    return pl.DataFrame(
        {
            "depth": trees.depth,
            "backward": trees.is_backward(),
            "n_right": trees.depth - (~right).sum(axis=1),
            "whole_path": right.all(axis=1),
            "greedy": (answers.greedy == trees.path).all(axis=1) & _ends(model, trees, logits),
        }
    )


def _ends(model: Model, trees: Trees, logits: torch.Tensor) -> np.ndarray:
    """bool [n_trees]: whether an answer ends after the goal; True for the reproduction."""
    if model.config.system == "reproduction":
        return np.ones(len(trees), bool)
    rows, goal_at = np.arange(len(trees)), trees.depth.astype(np.int64) + root_at(trees.n_nodes)
    return ~is_arrow(model.config.vocabulary.decode(logits[rows, goal_at].argmax(-1).cpu().numpy()))


def _table(graded: pl.DataFrame, distribution: str) -> pl.DataFrame:
    orders = {"backward": True, "shuffled": False} if distribution == "baseline" else {}
    rows = [_row(graded)]
    rows += [{"edges": edges, **_row(graded.filter(backward=listed))} for edges, listed in orders.items()]
    rows += [{"depth": depth, **_row(graded.filter(depth=depth))} for depth in sorted(graded["depth"].unique())]
    rows = [{"distribution": distribution, **row} for row in rows if row["n_trees"]]
    return pl.DataFrame(rows, schema=SCHEMA)


def _row(graded: pl.DataFrame) -> dict[str, Any]:
    n_trees, depth = len(graded), graded["depth"].to_numpy().astype(np.float64)
    if not n_trees:
        return {"n_trees": 0}
    n_right = {measure: int(graded[measure].sum()) for measure in MEASURES[1:]}
    of_tokens = graded["n_right"].to_numpy() / depth
    found = {"token": (float(of_tokens @ depth / depth.sum()), over_trees(of_tokens, np.arange(n_trees), depth))}
    found |= {measure: (right / n_trees, share(right, n_trees)) for measure, right in n_right.items()}
    row: dict[str, Any] = {"n_trees": n_trees, "n_tokens": int(depth.sum())}
    for measure, (value, (low, high)) in found.items():
        row |= {measure: value, f"{measure}_low": low, f"{measure}_high": high}
    return row
