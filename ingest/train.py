"""Training the two systems from nothing: a loop that can be killed anywhere, and the checkpoints along the way.

    config (YAML) → Recipe → trees of each step → packed goals → AdamW → OUT/

What one run leaves in its folder:

    NAME.safetensors, NAME.yaml     the trained weights, as `actstore models add` takes them; written last
    checkpoints/step-00250.safetensors, .yaml    weights along the way
    log.jsonl                       one row every LOG_EVERY steps: loss, accuracies, learning rate
    state.safetensors               what it takes to go on: weights, both moments of AdamW, the step and the recipe

A step is computed in the same order of additions however many threads there are, so a run that was killed and started
again ends with the same bytes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

from actstore.errors import BadInput, NoRoom
from actstore.ingest import models
from actstore.ingest.models import ModelConfig
from actstore.ingest.packing import Packed, forward, pack
from actstore.ingest.recipe import Recipe, read_config, step_trees

N_PARTS = 2  # of a step, fixed, since the order of additions decides the last bits of a gradient
LOG_EVERY = 25  # steps
STATE_EVERY = 250  # steps, some two minutes: what a kill can cost
KEPT = (0, 250, 500, 1000, 2000, 5000)  # checkpoints along the way, dense where most is learnt
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's

Row = dict[str, Any]


def train(
    name_or_config: str,
    out: str | Path,
    steps: int | None = None,
    nodes: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    progress: Callable[[Row], None] | None = None,
    state_every: int = STATE_EVERY,
) -> Path:
    """Train a model, or go on with a training that was killed.

    Args:
        name_or_config: a configuration that is shipped (`reproduction`, `baseline`) or the path of a YAML file.
        out: folder of the run; one that holds a started run is gone on with.
        steps, nodes, seed: instead of the configuration's `max_iters`, `n_nodes` and `random_seed`.
        device: `cpu` or `cuda`.
        progress: called with every row of the log.
        state_every: steps between two savings of the state; a multiple of LOG_EVERY.

    Returns:
        The trained weights, OUT/NAME.safetensors.

    Raises:
        BadInput: the configuration contradicts itself or is not the started run's, there is no such device, the
            folder cannot be written, or the loss is no number (the last good state is kept).
        NoRoom: the disk is full; run it again to go on.
    """
    _check_device(device)
    name, config, recipe = read_config(name_or_config, nodes)
    recipe = replace(recipe, steps=recipe.steps if steps is None else steps, seed=recipe.seed if seed is None else seed)
    run = Run(Path(out), name, config, recipe)
    with run.writing(), _threads() as pool:
        learner, rows = run.resume(device)
        _loop(run, learner, rows, pool, progress or (lambda row: None), state_every)
        return run.finish(learner)


def _loop(
    run: Run, learner: Learner, rows: list[Row], pool: Executor, progress: Callable[[Row], None], state_every: int
) -> None:
    """Step to the end; the state is saved only where the log has just been written, so that none is cut in two."""
    seconds_before, started = (rows[-1]["seconds"] if rows else 0.0), time.monotonic()
    tally, since = Tally.empty(run.config.n_nodes), learner.step
    run.keep(learner)
    while learner.step < run.recipe.steps:
        lr, n_nodes = run.recipe.lr_at(learner.step), run.recipe.n_nodes_at(learner.step, run.config.n_nodes)
        try:
            tally += learner.learn(pool)
        except FloatingPointError as error:
            raise BadInput(f"step {learner.step}: {error}; {run.last_good()}: lower optimizer.lr") from None
        if learner.step % LOG_EVERY == 0 or learner.step == run.recipe.steps:
            row = tally.row(learner.step, learner.step - since, lr, n_nodes)
            rows.append({**row, "seconds": round(seconds_before + time.monotonic() - started, 1)})
            run.log(rows[-1])
            progress(rows[-1])
            tally, since = Tally.empty(run.config.n_nodes), learner.step
        if learner.step % state_every == 0 or learner.step == run.recipe.steps:
            run.save_state(learner)
        run.keep(learner)


def _check_device(device: str) -> None:
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise BadInput(f"got device {device!r}; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"got device {device!r}, but torch finds no CUDA device here; use cpu")


@contextmanager
def _threads() -> Iterator[Executor]:
    """A pool of one-threaded workers: parts of a step side by side need no barrier after each of their operations."""
    before = torch.get_num_threads()
    n_workers = min(N_PARTS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_workers) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Run:
    """The folder of one training."""

    out: Path
    name: str
    config: ModelConfig
    recipe: Recipe

    @property
    def state_path(self) -> Path:
        return self.out / "state.safetensors"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the file system refuses into the package's own errors."""
        try:
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoRoom(
                    f"no room in {self.out}: {error.strerror}; free some, then run it again to go on"
                ) from error
            if error.errno is None:
                raise
            raise BadInput(
                f"cannot write {error.filename or self.out}: {error.strerror}; name another folder"
            ) from error

    def mapping(self) -> Row:
        """The configuration and recipe that this run is, as the YAML holds them."""
        said = asdict(self.recipe)
        optimizer = {key: said.pop(key) for key in ("lr", "weight_decay")} | {"betas": list(said.pop("betas"))}
        top = {"random_seed": said.pop("seed"), "batch_size": said.pop("batch_size"), "max_iters": said.pop("steps")}
        return {**self.config.to_mapping(), "optimizer": optimizer, **top, "training": said}

    def resume(self, device: str) -> tuple[Learner, list[Row]]:
        """The learner where the saved state left it, or a new one; and the rows of the log so far.

        Raises:
            BadInput: the folder holds a run of another configuration.
        """
        learner = Learner.new(self.config, self.recipe, device)
        if not self.state_path.exists():
            self._write_log([])
            return learner, []
        saved = models.read_state(self.state_path)
        self._check_same(json.loads(bytes(saved["run"].tolist())))
        learner.restore(saved)
        path = self.out / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        rows = [row for row in rows if row["step"] <= learner.step]
        self._write_log(rows)
        return learner, rows

    def _check_same(self, saved: Row) -> None:
        mine = _flat(self.mapping())
        for key, value in _flat(saved).items():
            if mine.get(key) != value:
                raise BadInput(
                    f"{self.out} holds a training with {key} {value}, and this one has {mine.get(key)}: "
                    "name another folder, or the configuration it was started with"
                )

    def save_state(self, learner: Learner) -> None:
        content = json.dumps(self.mapping()).encode()
        models.save({**learner.state(), "run": torch.tensor(list(content), dtype=torch.uint8)}, self.state_path)

    def keep(self, learner: Learner) -> None:
        """Save the weights, if this is one of the steps whose weights are kept."""
        path = self.out / "checkpoints" / f"step-{learner.step:05d}.safetensors"
        if learner.step in KEPT and learner.step < self.recipe.steps and not path.exists():
            self._save_weights(learner, path)

    def finish(self, learner: Learner) -> Path:
        path = self.out / f"{self.name}.safetensors"
        self._save_weights(learner, path)
        return path

    def _save_weights(self, learner: Learner, path: Path) -> None:
        path.with_suffix(".yaml").write_text(yaml.safe_dump(self.mapping(), sort_keys=False))
        models.save(learner.params, path)

    def log(self, row: Row) -> None:
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def _write_log(self, rows: list[Row]) -> None:
        (self.out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def last_good(self) -> str:
        step = int(models.read_state(self.state_path)["step"]) if self.state_path.exists() else 0
        return f"the last good state is step {step} in {self.out}" if step else f"nothing good is in {self.out} yet"


def _flat(mapping: Row, prefix: str = "") -> Row:
    """Nested keys joined by dots: {'model.d_model': 128, …}."""
    flat: Row = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@dataclass
class Learner:
    """The weights in HookedTransformer names, and their optimizer, between two steps."""

    config: ModelConfig
    recipe: Recipe
    params: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int = 0

    @classmethod
    def new(cls, config: ModelConfig, recipe: Recipe, device: str) -> Learner:
        initial = models.state(models.build(config, recipe.seed), config)
        params = {name: value.to(device).requires_grad_() for name, value in initial.items()}
        optimizer = torch.optim.AdamW(
            params.values(), recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        return cls(config, recipe, params, optimizer)

    def state(self) -> dict[str, Tensor]:
        """Everything that changes from step to step, by name."""
        found = {f"weights/{name}": value for name, value in self.params.items()}
        for name, value in self.params.items():
            moments = self.optimizer.state.get(value)
            for moment in MOMENTS:
                found[f"{moment}/{name}"] = moments[moment] if moments else torch.zeros_like(value)
        return {**found, "step": torch.tensor(self.step)}

    @torch.no_grad()
    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.step = int(saved["step"])
        for name, value in self.params.items():
            value.copy_(saved[f"weights/{name}"])
            moments = {moment: saved[f"{moment}/{name}"].to(value.device) for moment in MOMENTS}
            step = torch.tensor(float(self.step), device=value.device)
            self.optimizer.state[value] = {"step": step, **moments}

    def learn(self, pool: Executor) -> Tally:
        """Take one step.

        Raises:
            FloatingPointError: loss or gradient is not finite; the weights are left as they were.
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
        """The step's trees, packed in N_PARTS parts of like length, so that little is padding."""
        trees, slots = step_trees(self.recipe, self.config, self.step)
        shares = [share for share in np.array_split(np.arange(len(trees)), N_PARTS) if len(share)]
        device = next(iter(self.params.values())).device
        vocabulary, deepest = self.config.vocabulary, self.recipe.deepest_at(self.step)
        return [pack(trees[share], vocabulary, slots[share], deepest).to(device) for share in shares]

    def _gradient(self, part: Packed, n_targets: int) -> tuple[Tally, tuple[Tensor, ...]]:
        logits = forward(self.params, self.config, part, torch.bfloat16)
        loss = cross_entropy(logits, part.target, reduction="sum") / n_targets
        gradient = torch.autograd.grad(loss, list(self.params.values()))
        return Tally.of(loss, logits.detach(), part, self.config.n_nodes), gradient


@dataclass
class Tally:
    """What went right, summed: loss, tokens, and whole paths by depth (index 0 is unused)."""

    loss: float
    n_tokens: int
    n_right: int
    paths: np.ndarray
    paths_right: np.ndarray

    @classmethod
    def empty(cls, n_nodes: int) -> Tally:
        return cls(0.0, 0, 0, np.zeros(n_nodes, np.int64), np.zeros(n_nodes, np.int64))

    @classmethod
    def of(cls, loss: Tensor, logits: Tensor, part: Packed, n_nodes: int) -> Tally:
        right = (logits.argmax(-1) == part.target).cpu().numpy()
        depth, goal = part.depth.cpu().numpy(), part.goal.cpu().numpy()
        whole = np.bincount(goal[~right], minlength=len(depth)) == 0
        counts = [np.bincount(depth[which], minlength=n_nodes) for which in (np.ones_like(whole), whole)]
        return cls(float(loss.detach()), len(right), int(right.sum()), counts[0], counts[1])

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def row(self, step: int, n_steps: int, lr: float, n_nodes: int) -> Row:
        """A row of the log: means since the last one."""
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
