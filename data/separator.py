"""Why a separator knows its edge's source: train variations of one recipe, and probe each of them.

    python -m actstore.data.separator factors OUT --device cuda
    python -m actstore.data.separator notebook OUT --device cuda --steps 220000 --every 5000

`factors` trains the shipped reproduction's recipe with every combination of packed goals or one goal
per tree, curriculum or none, and a decayed or a constant learning rate; two of the combinations also
with loss on every token. `notebook` trains the notebook's own recipe for as long as it is given: one
leaf per tree, trees of the `reproduction` distribution alone, no curriculum, a constant rate. Three
seeds each. Models of one seed begin with the same weights, and see the same trees wherever their
recipes draw the same.

OUT/separator-NAME.csv gets a row per model and probed step: the mean loss since the last row, the share of
paths that are right, and the accuracy of a linear probe of the source at the separators after layer
0 (one probe for all places; over all places, and by place), in %. No weights are kept.

Models of one shape are trained together, as slices of one tensor: a GPU hardly notices one model of
this size. The equations are those of ingest/models/equations.py, and a test compares the two.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm

from actstore.ingest.models import load, weights
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.equations import EDGE_LIST, LN_EPS
from actstore.ingest.training.packing import pack
from actstore.ingest.training.recipe import Recipe, read_config, step_trees
from actstore.ingest.trees.draw import draw, leaves, pick_true

SEEDS = (42, 43, 44)
NOTHING = 255  # no target to predict; and the segment of padding
PROBED = 4096  # trees, a quarter of them for the test
PROBED_SEED = 15_000_000  # of no training
CHUNK = 50  # steps whose trees are drawn and copied at once
IDS, POSITION, SEGMENT, TARGET = range(4)
Shapes = dict[str, tuple[int, ...]]  # of every weight of one model, by name
PACKED_PARTS = ((0.75, 7.0), (1.0, 10.0))  # share of the trees up to here, shortest first; tokens per node
ONE_PART = ((1.0, 4.0),)


@dataclass(frozen=True)
class Arm:
    """One model: how it differs from the shipped recipe, and its seed."""

    packed: bool = True
    curriculum: bool = True
    decayed: bool = True
    every_token: bool = False
    notebook: bool = False
    seed: int = SEEDS[0]

    def recipe(self, base: Recipe, steps: int) -> Recipe:
        """The arm's recipe."""
        changed: dict[str, Any] = {"seed": self.seed, "steps": steps}
        changed["warmup"] = base.warmup * min(1.0, base.steps / steps)
        if not self.curriculum:
            changed |= {"curriculum": 0.0, "shallow": 0.0}
        if not self.decayed:
            changed |= {"decay": 0.0}
        if self.notebook:
            changed |= {"deep_share": 0.0, "inner_goals": None}
        return replace(base, **changed)

    def row(self) -> dict[str, Any]:
        """The arm in the columns of the results."""
        return {
            "goals": "packed" if self.packed else "one",
            "trees": "notebook" if self.notebook else "curriculum" if self.curriculum else "full",
            "rate": "decayed" if self.decayed else "constant",
            "loss_on": "every token" if self.every_token else "path",
            "seed": self.seed,
        }


def factors() -> list[Arm]:
    """The combinations of all factors, and two with loss on every token."""
    every = product((True, False), (True, False), (True, False), SEEDS)
    arms = [Arm(packed, curriculum, decayed, seed=seed) for packed, curriculum, decayed, seed in every]
    ends = [Arm(every_token=True), Arm(False, False, False, every_token=True)]
    return arms + [replace(arm, seed=seed) for arm in ends for seed in SEEDS]


def notebook() -> list[Arm]:
    """The notebook's own recipe."""
    return [Arm(False, False, False, notebook=True, seed=seed) for seed in SEEDS]


# --- batches ---


def batch(recipe: Recipe, config: ModelConfig, step: int, packed: bool) -> np.ndarray:
    """The sequences of a step: uint8 [IDS … TARGET, batch_size, pos], shortest first.

    With one goal per tree, the goal is drawn evenly from those that packing would use.
    """
    trees, slots = step_trees(recipe, config, step)
    is_goal = recipe.goals_at(step, trees)
    if not packed:
        chosen = pick_true(is_goal, np.random.default_rng([recipe.seed, step, 1]).random(len(trees)))
        is_goal = np.zeros_like(is_goal)
        is_goal[np.arange(len(trees)), chosen] = True
    found = pack(trees, config.vocabulary, slots, is_goal)
    target = np.full(found.ids.numel(), NOTHING, np.uint8)
    target[found.at.numpy()] = found.target.numpy()
    planes = [found.ids.numpy(), found.position.numpy(), found.segment.numpy() & NOTHING]
    return np.stack([*planes, target.reshape(found.ids.shape)]).astype(np.uint8)


def parts_of(size: int, n_nodes: int, packed: bool) -> list[tuple[slice, int]]:
    """The parts of a batch and their positions; a longer sequence is cut, which one in 10,000 is."""
    parts, start = [], 0
    for share, per_node in PACKED_PARTS if packed else ONE_PART:
        stop = round(share * size)
        parts.append((slice(start, stop), round(per_node * n_nodes)))
        start = stop
    return parts


def chunk(task: tuple[Sequence[Recipe], ModelConfig, bool, int]) -> list[np.ndarray]:
    """CHUNK steps of several recipes: per part, uint8 [step, recipe, plane, tree, pos]."""
    recipes, config, packed, first = task
    parts = parts_of(recipes[0].batch_size, config.n_nodes, packed)
    shapes = [(CHUNK, len(recipes), 4, part.stop - part.start, width) for part, width in parts]
    out = [np.zeros(shape, np.uint8) for shape in shapes]
    for one in out:
        one[:, :, SEGMENT:] = NOTHING
    for within, (number, recipe) in product(range(CHUNK), enumerate(recipes)):
        drawn = batch(recipe, config, first + within, packed)
        for one, (part, width) in zip(out, parts, strict=True):
            cut = drawn[:, part, :width]
            one[within, number, :, :, : cut.shape[-1]] = cut
    return out


# --- the network, for many models at once ---


def views(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Weights [model, ...] by their names in a HookedTransformer, from flat [model, n_weights]."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    pieces = flat.split([*sizes, flat.shape[1] - sum(sizes)], dim=1)
    named = zip(shapes.items(), pieces[:-1], strict=True)
    return {name: piece.view(len(flat), *shape) for (name, shape), piece in named}


def flattened(states: Sequence[dict[str, Tensor]], shapes: Shapes) -> Tensor:
    """The inverse of `views`, rows padded to a multiple of 64 weights."""
    rows = torch.stack([torch.cat([state[name].flatten() for name in shapes]) for state in states])
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 64))


def forward(flat: Tensor, shapes: Shapes, planes: Tensor, dtype: torch.dtype, n_layers: int) -> Tensor:
    """The residual stream after n_layers.

    Args:
        flat: float32 [model, n_weights]; see `views`.
        shapes: the shape of every weight of a model with one head.
        planes: int64 [model, 3 or more, tree, pos]: IDS, POSITION, SEGMENT.
        dtype: dtype of the matrix products; the residual stream stays float32.

    Returns:
        float32 [model, tree * pos, d_model].
    """
    n_heads, _, d_head = shapes["blocks.0.attn.W_Q"]
    if n_heads != 1:
        raise ValueError(f"got {n_heads} heads; these equations are of one")
    n_models, _, n_trees, n_pos = planes.shape
    exact, w = views(flat, shapes), views(flat.to(dtype), shapes)
    ids, position, segment = planes[:, IDS], planes[:, POSITION], planes[:, SEGMENT]
    resid = _rows(w["embed.W_E"], ids) + _rows(w["pos_embed.W_pos"], position)
    seen = (segment[..., None, :] == EDGE_LIST) | (segment[..., None, :] == segment[..., :, None])
    seen = seen & torch.ones(n_pos, n_pos, dtype=torch.bool, device=flat.device).tril()
    bias = torch.zeros(seen.shape, dtype=dtype, device=flat.device).masked_fill(~seen, -torch.inf).flatten(0, 1)
    for layer in range(n_layers):
        at = f"blocks.{layer}."
        qkv = _linear(
            _norm(exact, at + "ln1", resid, dtype),
            torch.cat([w[f"{at}attn.W_{name}"][:, 0] for name in "QKV"], -1),
            torch.cat([w[f"{at}attn.b_{name}"][:, 0] for name in "QKV"], -1),
        )
        q, k, v = qkv.view(n_models * n_trees, n_pos, 3, d_head).unbind(2)
        pattern = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d_head**-0.5).softmax(-1)
        mixed = torch.bmm(pattern, v).view(n_models, n_trees * n_pos, d_head)
        resid = resid + _linear(mixed, w[at + "attn.W_O"][:, 0], w[at + "attn.b_O"])
        hidden = _linear(_norm(exact, at + "ln2", resid, dtype), w[at + "mlp.W_in"], w[at + "mlp.b_in"])
        resid = resid + _linear(gelu(hidden), w[at + "mlp.W_out"], w[at + "mlp.b_out"])
    return resid


def logits(flat: Tensor, shapes: Shapes, planes: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [model, tree * pos, d_vocab]; arguments as for `forward`."""
    n_layers = sum(name.endswith("attn.W_Q") for name in shapes)
    resid = forward(flat, shapes, planes, dtype, n_layers)
    w = views(flat, shapes)
    final = _norm(w, "ln_final", resid, dtype)
    return _linear(final, w["unembed.W_U"].to(dtype), w["unembed.b_U"].to(dtype)).float()


def _rows(table: Tensor, numbers: Tensor) -> Tensor:
    """Rows of a table per model as a product, whose gradient is a product, too."""
    which = numbers.flatten(1)[..., None] == torch.arange(table.shape[1], device=table.device)
    return torch.bmm(which.to(table.dtype), table).float()


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x, weight)


def _norm(w: dict[str, Tensor], name: str, resid: Tensor, dtype: torch.dtype) -> Tensor:
    plain = layer_norm(resid, resid.shape[-1:], eps=LN_EPS)
    return (plain * w[name + ".w"][:, None] + w[name + ".b"][:, None]).to(dtype)


def loss_of(flat: Tensor, shapes: Shapes, every: Tensor, stream: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Mean loss of each model, float32 [model].

    Args:
        every: bool [model]: loss on every token of a segment after its first, not on the path alone.
        stream: int64 [model]: which of the recipes' batches a model is given.
        parts: per part uint8 [recipe, plane, tree, pos].
    """
    total: Tensor | float = 0.0
    n: Tensor | float = 0.0
    for part in parts:
        planes = part[stream].long()
        after = torch.roll(planes, -1, dims=-1)
        goes_on = (after[:, SEGMENT] == planes[:, SEGMENT]) & (planes[:, SEGMENT] != NOTHING)
        goes_on = goes_on & (torch.arange(planes.shape[-1], device=flat.device) < planes.shape[-1] - 1)
        whole = torch.where(goes_on, after[:, IDS], NOTHING)
        target = torch.where(every[:, None, None], whole, planes[:, TARGET])
        dtype = torch.bfloat16 if flat.is_cuda else torch.float32
        each = cross_entropy(
            logits(flat, shapes, planes, dtype).flatten(0, 1),
            target.flatten(),
            ignore_index=NOTHING,
            reduction="none",
        )
        total = total + each.view(len(flat), -1).sum(1)
        n = n + (target != NOTHING).flatten(1).sum(1)
    return torch.as_tensor(total / n)


def adamw(
    flat: Tensor, gradient: Tensor, first: Tensor, second: Tensor, lr: Tensor, step: Tensor, recipe: Recipe
) -> None:
    """One step of AdamW in place, with each model's gradient clipped on its own.

    Args:
        lr: float32 [model, 1].
        step: float32 [1], steps taken before this one.
    """
    norm = gradient.norm(dim=1, keepdim=True)
    gradient = gradient * (recipe.clip / (norm + 1e-6)).clamp(max=1.0)
    one, two = recipe.betas
    first.mul_(one).add_(gradient, alpha=1 - one)
    second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
    mean = first / (1 - one ** (step + 1))
    scale = (second / (1 - two ** (step + 1))).sqrt() + 1e-8
    flat.mul_(1 - lr * recipe.weight_decay).sub_(lr * mean / scale)


class Stack:
    """Models of one shape in training.

    Attributes:
        flat: float32 [model, n_weights]; see `views`.
        recipes: the recipes whose batches differ; `stream` says which is whose.
    """

    def __init__(self, arms: Sequence[Arm], base: Recipe, config: ModelConfig, steps: int, device: str) -> None:
        self.arms, self.config, self.base, self.packed = arms, config, base, arms[0].packed
        self.steps, self.device, self.taken = steps, device, 0
        self.shapes = weights.shapes(config)
        every = [arm.recipe(base, steps) for arm in arms]
        drawn = [replace(recipe, decay=0.0) for recipe in every]  # the rate does not change the trees
        self.recipes = list(dict.fromkeys(drawn))
        self.stream = torch.tensor([self.recipes.index(recipe) for recipe in drawn], device=device)
        self.every = torch.tensor([arm.every_token for arm in arms], device=device)
        rates = [[recipe.lr_at(step) for recipe in every] for step in range(steps)]
        self.lr = torch.tensor(rates, device=device)[..., None]
        initial = {seed: weights.state(load.build(config, seed), config) for seed in {arm.seed for arm in arms}}
        self.flat = flattened([initial[arm.seed] for arm in arms], self.shapes).to(device).requires_grad_()
        self.first, self.second = torch.zeros_like(self.flat.data), torch.zeros_like(self.flat.data)
        self.step, self.within = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.loss = torch.zeros(len(arms), device=device)
        parts = parts_of(base.batch_size, config.n_nodes, self.packed)
        self.chunk = [
            torch.zeros(CHUNK, len(self.recipes), 4, part.stop - part.start, width, dtype=torch.uint8, device=device)
            for part, width in parts
        ]
        self.replay: Callable[[], None] | None = None

    def tasks(self) -> Iterator[tuple[Sequence[Recipe], ModelConfig, bool, int]]:
        """What `chunk` is asked for, in order."""
        return ((self.recipes, self.config, self.packed, first) for first in range(0, self.steps, CHUNK))

    def learn(self, chunk: Sequence[np.ndarray]) -> None:
        """Take the steps of a chunk."""
        for held, given in zip(self.chunk, chunk, strict=True):
            held.copy_(torch.from_numpy(given))
        self.within.zero_()
        if self.device == "cuda" and self.replay is None:
            self.replay = self._captured()
        for _ in range(CHUNK):
            (self.replay or self._step)()
        self.taken += CHUNK

    def _step(self) -> None:
        loss, update = operations(self.device)
        parts = [chunk.index_select(0, self.within)[0] for chunk in self.chunk]
        losses = loss(self.flat, self.shapes, self.every, self.stream, parts)
        (gradient,) = torch.autograd.grad(losses.sum(), self.flat)
        with torch.no_grad():
            lr = self.lr.index_select(0, self.step)[0]
            update(self.flat.data, gradient, self.first, self.second, lr, self.step.float(), self.base)
            self.loss += losses.detach()
            self.step += 1
            self.within += 1

    def _captured(self) -> Callable[[], None]:
        """The step as a CUDA graph; the steps that warm up are undone."""
        changed = (self.flat.data, self.first, self.second, self.step, self.within, self.loss)
        before = [value.clone() for value in changed]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        for value, was in zip(changed, before, strict=True):
            value.copy_(was)
        return graph.replay

    @torch.no_grad()
    def rows(self, probed: Probed, since: int) -> list[dict[str, Any]]:
        """A row of the results per model."""
        loss = (self.loss / max(1, self.taken - since)).tolist()
        self.loss.zero_()
        paths, places = probed.paths(self.flat, self.shapes), probed.places(self.flat, self.shapes, 1)
        control = probed.places(self.flat, self.shapes, 0).mean(1) if self.taken == self.steps else None
        rows = []
        for number, arm in enumerate(self.arms):
            row = arm.row() | {"step": self.taken, "loss": f"{loss[number]:.4f}"}
            row |= {"paths": percent(paths[number]), "all": percent(places[number].mean())}
            row |= {f"edge {edge}": percent(share) for edge, share in enumerate(places[number])}
            rows.append(row | {"embed": "" if control is None else percent(control[number])})
        return rows


@cache
def operations(device: str) -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """`loss_of` and `adamw`, compiled for a GPU."""
    if device == "cpu":
        return loss_of, adamw
    return torch.compile(loss_of, dynamic=False), torch.compile(adamw, dynamic=False)


def percent(share: float) -> str:
    """A share in %, with one decimal."""
    return f"{100 * share:.1f}"


# --- what is asked of the models ---


class Probed:
    """Trees of the reproduction's distribution that no training saw."""

    def __init__(self, config: ModelConfig, device: str, n_trees: int = PROBED) -> None:
        trees = draw(config.system, PROBED_SEED, 0, n_trees, config.n_nodes)
        goal = np.zeros(leaves(trees).shape, bool)
        goal[np.arange(n_trees), trees.goal] = True
        packed = pack(trees, config.vocabulary, None, goal)
        self.planes = torch.stack([packed.ids, packed.position, packed.segment & NOTHING]).to(device)
        self.target = torch.full((n_trees, packed.ids.shape[1]), NOTHING, device=device)
        self.target.view(-1)[packed.at.to(device)] = packed.target.to(device)
        self.source = torch.from_numpy(trees.edges[:, :-1, 0].astype(np.int64)).to(device)  # [tree, place]
        self.n_train, self.n_nodes = n_trees * 3 // 4, config.n_nodes

    def paths(self, flat: Tensor, shapes: Shapes) -> np.ndarray:
        """float [model]: share of trees of whose path every step is right."""
        dtype = torch.bfloat16 if flat.is_cuda else torch.float32
        right = []
        for start in range(0, self.planes.shape[1], 512):
            planes, target = self.planes[:, start : start + 512], self.target[start : start + 512]
            said = logits(flat, shapes, planes.expand(len(flat), -1, -1, -1), dtype).argmax(-1)
            said = said.view(len(flat), *target.shape)
            right.append(((said == target) | (target == NOTHING)).all(-1))
        return torch.cat(right, 1).float().mean(1).cpu().numpy()

    def places(self, flat: Tensor, shapes: Shapes, n_layers: int) -> np.ndarray:
        """float [model, place]: accuracy of one probe for all separators, on test trees."""
        found = []
        n_places = self.source.shape[1]
        for start in range(0, self.planes.shape[1], 512):
            planes = self.planes[:, start : start + 512, : 3 * n_places]
            resid = forward(flat, shapes, planes.expand(len(flat), -1, -1, -1), torch.float32, n_layers)
            found.append(resid.view(len(flat), planes.shape[1], n_places, 3, -1)[:, :, :, 2])
        X, train = torch.cat(found, 1), self.n_train
        said = fit_and_predict(
            X[:, :train].flatten(1, 2), self.source[:train].flatten(), X[:, train:].flatten(1, 2), self.n_nodes
        )
        return (said.view(len(flat), -1, n_places) == self.source[train:]).float().mean(1).cpu().numpy()


def fit_and_predict(X: Tensor, y: Tensor, others: Tensor, n_classes: int, iterations: int = 500) -> Tensor:
    """Fit a multinomial logistic regression per model, and predict the classes of other rows.

    The objective is that of the study `probes`: standardised columns, and a penalty of
    |weights|² / 2n. In the rows' own axes, scaled by 1 / sqrt(variance + 2/n), no curvature of the
    objective exceeds 1/2, so that Nesterov's method takes steps of 2.

    Args:
        X: float32 [model, n, d]; y: int64 [n]; others: float32 [model, m, d].

    Returns:
        int64 [model, m].
    """
    n, mean, spread = X.shape[1], X.double().mean(1, keepdim=True), X.double().std(1, keepdim=True)
    spread = torch.where(spread > 1e-6 * spread.amax(2, keepdim=True), spread, 1.0)
    standard = (X.double() - mean) / spread
    variance, axes = torch.linalg.eigh(torch.bmm(standard.transpose(1, 2), standard) / n)
    scale = (variance.clamp(min=0) + 2 / n).rsqrt()

    def rows(of: Tensor) -> Tensor:
        scaled = torch.bmm((of.double() - mean) / spread, axes * scale[:, None])
        return torch.nn.functional.pad(scaled, (0, 1), value=1.0).float()

    penalty = torch.nn.functional.pad(scale**2 / n, (0, 1))[..., None].float()  # none of the intercept
    white, truth = rows(X), torch.nn.functional.one_hot(y, n_classes).float()
    weight = torch.zeros(len(X), white.shape[2], n_classes, device=X.device)
    ahead, momentum = weight, 1.0
    for _ in range(iterations):
        wrong = torch.bmm(white, ahead).softmax(-1) - truth
        new = ahead - 2.0 * (torch.bmm(white.transpose(1, 2), wrong) / n + penalty * ahead)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead, weight = new + (momentum - 1) / following * (new - weight), new
        momentum = following
    return torch.bmm(rows(others), weight).argmax(-1)


# --- a run ---


def run(
    arms: Sequence[Arm],
    out: Path,
    config: ModelConfig,
    base: Recipe,
    steps: int,
    every: int = 500,
    device: str = "cpu",
    workers: int = 1,
    seconds: float = float("inf"),
    probed_trees: int = PROBED,
) -> None:
    """Train arms, and write a row per arm every so many steps.

    Args:
        out: the CSV file to write.
        base: the recipe that arms differ from.
        steps, every: steps to train, and between probes; multiples of CHUNK.
        seconds: stop after this time, at the next chunk; schedules are those of `steps`.
    """
    if steps % CHUNK or every % CHUNK:
        raise ValueError(f"got {steps} steps, probed every {every}; both are multiples of {CHUNK}")
    kinds = [[arm for arm in arms if arm.packed == packed] for packed in (True, False)]
    stacks = [Stack(kind, base, config, steps, device) for kind in kinds if kind]
    probed = Probed(config, device, probed_trees)
    started, since = time.monotonic(), 0
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool, out.open("w") as file:
        chunks = pool.imap(chunk, (task for tasks in zip(*(s.tasks() for s in stacks), strict=True) for task in tasks))
        writer: csv.DictWriter[str] | None = None
        while True:
            taken, over = stacks[0].taken, time.monotonic() - started > seconds
            if taken % every == 0 or over:
                rows = [row for stack in stacks for row in stack.rows(probed, since)]
                if writer is None:
                    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                    writer.writeheader()
                writer.writerows(rows)
                file.flush()
                since = taken
                print(f"step {taken}, {time.monotonic() - started:.0f} s", *(row["all"] for row in rows), flush=True)
            if taken == steps or over:
                return
            for stack in stacks:
                stack.learn(next(chunks))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["factors", "notebook"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw trees")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    arms = {"factors": factors, "notebook": notebook}[told.name]()
    _, config, base = read_config("reproduction", told.nodes)
    target = told.out / f"separator-{told.name}.csv"
    run(arms, target, config, base, told.steps, told.every, told.device, told.workers, told.seconds)


if __name__ == "__main__":
    main()
