"""A model in training: weights, optimizer, one step, and the accuracy of a step.

The order of additions in a step does not depend on the number of threads, so the same steps give
the same weights, bit for bit.
"""

from __future__ import annotations

import math
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from actstore.ingest.models import load, weights
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.equations import Packed, forward
from actstore.ingest.training.packing import pack
from actstore.ingest.training.recipe import Recipe, Row, step_trees

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


@dataclass
class Learner:
    """Weights, in HookedTransformer names, and their optimizer."""

    config: ModelConfig
    recipe: Recipe
    params: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int = 0

    @classmethod
    def new(cls, config: ModelConfig, recipe: Recipe, device: str) -> Learner:
        """Initialise weights from the recipe's seed."""
        initial = weights.state(load.build(config, recipe.seed), config)
        params = {name: value.to(device).requires_grad_() for name, value in initial.items()}
        optimizer = torch.optim.AdamW(
            params.values(), recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        return cls(config, recipe, params, optimizer)

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name: weights, AdamW's moments, the step."""
        found = {f"weights/{name}": value for name, value in self.params.items()}
        for name, value in self.params.items():
            moments = self.optimizer.state.get(value)
            for moment in MOMENTS:
                found[f"{moment}/{name}"] = moments[moment] if moments else torch.zeros_like(value)
        return {**found, "step": torch.tensor(self.step)}

    @torch.no_grad()
    def restore(self, saved: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.step = int(saved["step"])
        for name, value in self.params.items():
            value.copy_(saved[f"weights/{name}"])
            moments = {moment: saved[f"{moment}/{name}"].to(value.device) for moment in MOMENTS}
            step = torch.tensor(float(self.step), device=value.device)
            self.optimizer.state[value] = {"step": step, **moments}

    def learn(self, pool: Executor) -> Tally:
        """Take one step.

        Raises:
            FloatingPointError: loss or gradient is not finite; the weights are unchanged.
        """
        parts = self.parts()
        n_targets = sum(len(part.target) for part in parts)
        done = list(pool.map(lambda part: self._gradient(part, n_targets), reversed(parts)))  # the longest first
        for number, value in enumerate(self.params.values()):
            value.grad = torch.stack([gradient[number] for _, gradient in done]).sum(0)
        tally = sum((tally for tally, _ in done), Tally.empty(self.config.n_nodes))
        norm = torch.nn.utils.clip_grad_norm_(self.params.values(), self.recipe.clip)
        if not (math.isfinite(tally.loss) and math.isfinite(norm)):
            raise FloatingPointError(f"the loss is {tally.loss} and its gradient {float(norm)}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(self.step)
        self.optimizer.step()
        self.step += 1
        return tally

    def parts(self) -> list[Packed]:
        """The step's trees, packed in parts of similar length, which keeps padding small."""
        trees, slots = step_trees(self.recipe, self.config, self.step)
        is_goal, device = self.recipe.goals_at(self.step, trees), next(iter(self.params.values())).device
        shares = [share for share in np.array_split(np.arange(len(trees)), self.recipe.parts) if len(share)]
        vocabulary = self.config.vocabulary
        return [pack(trees[share], vocabulary, slots[share], is_goal[share]).to(device) for share in shares]

    def _gradient(self, part: Packed, n_targets: int) -> tuple[Tally, tuple[Tensor, ...]]:
        logits = forward(self.params, self.config, part, torch.bfloat16)
        loss = cross_entropy(logits, part.target, reduction="sum") / n_targets
        gradient = torch.autograd.grad(loss, list(self.params.values()))
        return Tally.of(loss, logits.detach(), part, self.config.n_nodes), gradient


@dataclass
class Tally:
    """Sums over steps: loss, right tokens, and right paths by depth (index 0 is unused)."""

    loss: float
    n_tokens: int
    n_right: int
    paths: np.ndarray
    paths_right: np.ndarray

    @classmethod
    def empty(cls, n_nodes: int) -> Tally:
        """A tally of nothing."""
        return cls(0.0, 0, 0, np.zeros(n_nodes, np.int64), np.zeros(n_nodes, np.int64))

    @classmethod
    def of(cls, loss: Tensor, logits: Tensor, part: Packed, n_nodes: int) -> Tally:
        """The tally of one part of a step; logits float32 [n_targets, d_vocab]."""
        right = (logits.argmax(-1) == part.target).cpu().numpy()
        depth, goal = part.depth.cpu().numpy(), part.goal.cpu().numpy()
        whole = np.bincount(goal[~right], minlength=len(depth)) == 0
        counts = [np.bincount(depth[which], minlength=n_nodes) for which in (np.ones_like(whole), whole)]
        return cls(float(loss.detach()), len(right), int(right.sum()), counts[0], counts[1])

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def row(self, step: int, n_steps: int, lr: float, n_nodes: int) -> Row:
        """A row of the log: means since the last row."""
        found = [depth for depth in range(len(self.paths)) if self.paths[depth]]
        return {
            "step": step,
            "loss": self.loss / n_steps,
            "lr": lr,
            "n_nodes": n_nodes,
            "token_accuracy": self.n_right / self.n_tokens,
            "path_accuracy": int(self.paths_right.sum()) / int(self.paths.sum()),
            "by_depth": [
                {"depth": depth, "paths": int(self.paths[depth]), "right": int(self.paths_right[depth])}
                for depth in found
            ],
        }
