"""How a model is trained: the recipe in a configuration, and the trees of each step.

The trees of a step depend only on the recipe's seed and the step's number. A resumed training
therefore sees the same trees, and an evaluation can tell which trees a model has seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np

from actstore.errors import BadInput, nearest
from actstore.ingest.models.config import ModelConfig, parse_yaml, read_text, there_are
from actstore.ingest.trees.draw import Trees, concatenate, draw, leaves
from actstore.named import SHIPPED

SHARES = ("warmup", "decay", "curriculum", "shallow", "deep_share")
SHALLOW = (2, 3, 4, 5)  # depths of the deepest goals, in equal times
Row = dict[str, Any]  # a row of a training's log
SMALLEST_TREE = 4  # the curriculum's first: two leaves that differ, and paths of more than one step


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; shares are fractions of `steps`.

    Attributes:
        steps: steps of the optimizer.
        batch_size: trees per step, each with all its leaves as goals.
        warmup: share over which the learning rate rises to `lr`.
        decay: final share over which the learning rate falls linearly to 0.
        curriculum: share over which trees grow to their full size.
        shallow: share over which every node near the root is a goal, inner nodes included; the
            greatest depth runs through SHALLOW. A model takes longest to learn which child leads to
            a goal two steps away, and few leaves ask for that.
        deep_share: fraction of the trees drawn from `deep`, since long paths are rare elsewhere.
        inner_goals: least and greatest depth of inner nodes that are goals after `shallow`; None
            for no such goals. Far goals are rare among leaves, and inner goals add some at little
            cost.
        clip: largest norm of a gradient.
        parts: parallel parts of a step; the order of additions decides the last bits of the
            gradient.
        seed: seed of the weights and the trees.
    """

    steps: int = 10_000
    batch_size: int = 64
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup: float = 0.01
    decay: float = 0.5
    curriculum: float = 0.25
    shallow: float = 0.0
    deep_share: float = 0.25
    inner_goals: tuple[int, int] | None = None
    clip: float = 1.0
    parts: int = 4
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "parts", "seed"):
            least = 0 if name == "seed" else 1
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise BadInput(f"got {name} {brief(getattr(self, name))}; it is a whole number, {least} or more")
        for name in ("lr", "weight_decay", "clip", *SHARES):
            if type(getattr(self, name)) not in (int, float):  # YAML reads 1e-3 as text
                raise BadInput(f"got {name} {brief(getattr(self, name))}; it is a number, such as 0.001")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"got {name} {brief(getattr(self, name))}; it is a share, 0 to 1")
        if not (0 < self.lr < math.inf and self.clip > 0 and self.weight_decay >= 0):
            raise BadInput(
                f"got lr {self.lr}, clip {self.clip}, weight_decay {self.weight_decay}; the first two are above 0"
            )
        numbers = isinstance(self.betas, tuple) and all(type(beta) in (int, float) for beta in self.betas)
        if not (numbers and len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise BadInput(f"got betas {brief(self.betas)}; they are two numbers, 0 to 1, such as [0.9, 0.99]")
        if self.inner_goals is not None and not (
            isinstance(self.inner_goals, tuple)
            and [type(depth) for depth in self.inner_goals] == [int, int]
            and 0 < self.inner_goals[0] <= self.inner_goals[1]
        ):
            raise BadInput(f"got inner_goals {brief(self.inner_goals)}; they are two depths, such as [6, 11]")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str) -> Recipe:
        """Read the training's part of a configuration: the notebook's keys, and `training`.

        Raises:
            BadInput: a key is unknown, or its value is invalid.
        """
        for section in ("optimizer", "training"):
            if not isinstance(mapping.get(section) or {}, Mapping):
                raise BadInput(
                    f"{source}: {section} is {brief(mapping[section])}; it is a mapping, such as `lr: 0.001`"
                )
        values = {"seed": mapping.get("random_seed"), "batch_size": mapping.get("batch_size")}
        values |= {"steps": mapping.get("max_iters")}
        values |= {**(mapping.get("optimizer") or {}), **(mapping.get("training") or {})}
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                key_text = brief(f"training.{key}")
                raise BadInput(f"{source}: unknown key {key_text}{nearest(key, known)}; {there_are(known)}")
        given = {key: value for key, value in values.items() if value is not None}
        given |= {key: tuple(given[key]) for key in ("betas", "inner_goals") if isinstance(given.get(key), list)}
        try:
            return cls(**given)
        except BadInput as error:
            raise BadInput(f"{source}: {error}") from None

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: rises over warmup, stays at `lr`, falls to 0 over decay."""
        up = (step + 1) / max(1, self.warmup * self.steps)
        down = (self.steps - step) / max(1, self.decay * self.steps)
        return self.lr * min(1.0, up, down)

    def n_nodes_at(self, step: int, n_nodes: int) -> int:
        """Nodes per tree of a step: from SMALLEST_TREE to n_nodes over the curriculum, linearly."""
        smallest = min(SMALLEST_TREE, n_nodes)
        if step >= self.curriculum * self.steps:
            return n_nodes
        return smallest + int((n_nodes - smallest) * step / (self.curriculum * self.steps))

    def deepest_at(self, step: int) -> int | None:
        """Depth of the deepest goals of a step; None after `shallow`."""
        share = step / (self.shallow * self.steps) if self.shallow else 1.0
        return SHALLOW[int(share * len(SHALLOW))] if share < 1 else None

    def goals_at(self, step: int, trees: Trees) -> np.ndarray:
        """bool [n_trees, MAX_NODES]: the labels of a step's trees that are goals."""
        depths, deepest = trees.node_depths(), self.deepest_at(step)
        if deepest is not None:
            return (depths > 0) & (depths <= deepest)
        low, high = self.inner_goals or (1, 0)
        return leaves(trees) | (depths >= low) & (depths <= high)


def read_config(
    name_or_path: str, n_nodes: int | None = None, steps: int | None = None, seed: int | None = None
) -> tuple[str, ModelConfig, Recipe]:
    """Read a configuration by the name of a shipped one, or by its path.

    Args:
        n_nodes: replaces the configuration's; n_ctx is then derived from `n_nodes`.
        steps, seed: replace the configuration's `max_iters` and `random_seed`.

    Returns:
        The name of the model (the file's stem), its configuration and its recipe.

    Raises:
        BadInput: the configuration is missing or contradicts itself.
    """
    shipped = sorted((SHIPPED / "configs").glob("*.yaml"))
    path = {path.stem: path for path in shipped}.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        names = [path.stem for path in shipped]
        raise BadInput(
            f"no configuration {name_or_path!r}{nearest(name_or_path, names)}; {there_are(names)}, or give the "
            "path of a YAML file"
        )
    mapping = parse_yaml(read_text(path), str(path))
    config, recipe = ModelConfig.from_mapping(mapping, str(path)), Recipe.from_mapping(mapping, str(path))
    recipe = replace(recipe, steps=recipe.steps if steps is None else steps, seed=recipe.seed if seed is None else seed)
    if n_nodes is not None:
        config = replace(config, n_nodes=n_nodes, n_ctx=0)
    n_read = 4 * config.n_nodes + (1 if config.system == "baseline" else -2)  # the baseline reads its padding too
    if config.n_ctx < n_read:
        raise BadInput(
            f"{path}: n_ctx is {config.n_ctx}, and trees of {config.n_nodes} nodes need {n_read}; leave it out"
        )
    return path.stem, config, recipe


def recipe_of(path: Path) -> Recipe | None:
    """The recipe in a trained model's YAML; None if the YAML has no `training`.

    Raises:
        BadInput: the file is missing or contradicts itself.
    """
    mapping = parse_yaml(read_text(path), str(path))
    return Recipe.from_mapping(mapping, str(path)) if mapping.get("training") else None


def step_trees(recipe: Recipe, config: ModelConfig, step: int) -> tuple[Trees, np.ndarray]:
    """The trees of a step, which depend only on recipe, configuration and step.

    Returns:
        trees: batch_size trees, sorted by the length of their packed sequence.
        slots: intp [batch_size, n_edges], places of each tree's edges; see `pack`.
    """
    n_nodes = recipe.n_nodes_at(step, config.n_nodes)
    n_deep = round(recipe.deep_share * recipe.batch_size)
    drawn = [
        draw(name, recipe.seed, step * n, (step + 1) * n, n_nodes, config.n_nodes)
        for name, n in ((config.system, recipe.batch_size - n_deep), ("deep", n_deep))
    ]
    trees = concatenate(drawn)
    rng = np.random.default_rng([recipe.seed, step])
    among = rng.random((len(trees), config.n_nodes - 2)).argsort(axis=1)[:, : n_nodes - 2]
    slots = np.pad(np.sort(among, axis=1), ((0, 0), (0, 1)), constant_values=config.n_nodes - 2)
    by_length = np.argsort(_packed_lengths(trees, recipe.goals_at(step, trees)), kind="stable")
    return trees[by_length], slots[by_length]


def _packed_lengths(trees: Trees, is_goal: np.ndarray) -> np.ndarray:
    """int64 [n_trees]: tokens of each tree's suffixes, without the baseline's padding."""
    return np.where(is_goal, trees.node_depths().astype(np.int64) + 2, 0).sum(axis=1)
