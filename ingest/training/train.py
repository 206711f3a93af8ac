"""Train a system from scratch, in a loop that can be killed at any time and resumed.

    config (YAML) → Recipe → trees of each step → packed goals → AdamW → OUT/

Files of one training:

    NAME.yaml                       the model's configuration and recipe NAME.jsonl
    the log, a row per LOG_EVERY steps: loss, accuracies, learning rate NAME/step-00250.safetensors
    weights of a kept step, in float16 NAME.safetensors                the trained weights, in
    float32; written last state.safetensors               the state to resume from: weights, AdamW's
    moments, step, recipe

A training that was killed and resumed ends with the same bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from actstore.errors import BadInput
from actstore.ingest.models.load import check_device
from actstore.ingest.training.checkpoints import TrainingFolder, kept_step
from actstore.ingest.training.recipe import Row, read_config
from actstore.storage.machine import n_processors

if TYPE_CHECKING:
    from actstore.ingest.training.learner import Learner

LOG_EVERY = 25  # steps, about ten seconds: the most that a kill can cost


def train(
    name_or_config: str,
    out: str | Path,
    steps: int | None = None,
    nodes: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    progress: Callable[[Row], None] | None = None,
) -> Path:
    """Train a model, or resume a training that was killed.

    Args:
        name_or_config: a shipped configuration (`reproduction`, `baseline`) or the path of a YAML
            file.
        out: folder of the training; a training in this folder is resumed.
        steps, nodes, seed: replace the configuration's `max_iters`, `n_nodes` and `random_seed`.
        device: `cpu` or `cuda`.
        progress: called with each row of the log, after the state of its step is saved.

    Returns:
        Path of the trained weights, OUT/NAME.safetensors.

    Raises:
        BadInput: the configuration contradicts itself or the started training, there is no such
            device, the folder cannot be written, or the loss is not finite (the last good state is
            kept).
        NoRoom: the disk is full; the same call resumes.
        Busy: another training writes to the folder.
    """
    name, config, recipe = read_config(name_or_config, nodes, steps, seed)
    check_device(device)
    folder = TrainingFolder(Path(out), name, config, recipe)
    with folder.writing(), _threads(recipe.parts) as pool:
        learner, rows = folder.resume(device)
        _loop(folder, learner, rows, pool, progress or (lambda row: None))
        return folder.finish(learner)


def _loop(
    folder: TrainingFolder,
    learner: Learner,
    rows: list[Row],
    pool: Executor,
    progress: Callable[[Row], None],
) -> None:
    """Step to the end; every row of the log is followed by a save of the state."""
    from actstore.ingest.training.learner import Tally

    seconds_before, started = (rows[-1]["seconds"] if rows else 0.0), time.monotonic()
    recipe, n_nodes = folder.recipe, folder.config.n_nodes
    tally, since = Tally.empty(n_nodes), learner.step
    folder.keep(learner)
    while learner.step < recipe.steps:
        lr, size = recipe.lr_at(learner.step), recipe.n_nodes_at(learner.step, n_nodes)
        try:
            tally += learner.learn(pool)
        except FloatingPointError as error:
            raise BadInput(f"step {learner.step}: {error}; {folder.last_good()}: lower optimizer.lr") from None
        if learner.step % LOG_EVERY == 0 or learner.step == recipe.steps:
            row = tally.row(learner.step, learner.step - since, lr, size)
            rows.append({**row, "seconds": round(seconds_before + time.monotonic() - started, 1)})
            folder.log(rows[-1])
            folder.save_state(learner)
            progress(rows[-1])
            tally, since = Tally.empty(n_nodes), learner.step
        folder.keep(learner)


@contextmanager
def _threads(most: int) -> Iterator[Executor]:
    """A pool of one-threaded workers: parallel parts need no barrier after each operation."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(most, n_processors())) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def kept(out: Path) -> str:
    """One sentence: what a stop keeps now, and what the same command does after it."""
    step = kept_step(out)
    if step is None:
        return f"nothing was kept yet (the state is saved every {LOG_EVERY} steps), and the same command starts over"
    return f"step {step:,} is kept in {out}, and the same command goes on from there"


def summary(row: Row) -> str:
    """A row of the log in one line: `loss 0.0123, tokens 99.81 %, paths 99.12 %, by depth …`."""
    shares = " ".join(f"{each['depth']}: {100 * each['right'] / each['paths']:.1f}" for each in row["by_depth"])
    right = f"tokens {100 * row['token_accuracy']:.2f} %, paths {100 * row['path_accuracy']:.2f} %"
    return f"loss {row['loss']:.4f}, {right}, by depth {shares} ({row['n_nodes']} nodes)"


def to_wandb(project: str, out: Path) -> Callable[[Row], None]:
    """A `progress` that sends each row of the log to Weights & Biases, an optional package.

    Args:
        project: name of the Weights & Biases project.
        out: the training's folder; a resumed training resumes its Weights & Biases run.

    Raises:
        BadInput: wandb is not installed, or not logged in.
    """
    try:
        import wandb
    except ImportError:
        raise BadInput("wandb is not installed; `pip install wandb`, or leave --wandb out") from None
    folder = out.resolve()
    try:
        run = wandb.init(
            project=project, name=folder.name, id=xxhash.xxh3_64_hexdigest(os.fsencode(folder)), resume="allow"
        )
    except wandb.Error as error:
        raise BadInput(f"wandb: {' '.join(str(error).split())}; mend it, or leave --wandb out") from None

    def send(row: Row) -> None:
        by_depth = {f"path_accuracy/{each['depth']}": each["right"] / each["paths"] for each in row["by_depth"]}
        run.log({key: value for key, value in row.items() if key != "by_depth"} | by_depth, step=row["step"])

    return send
