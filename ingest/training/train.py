"""Training the two systems from nothing: a loop that can be killed anywhere, and the checkpoints along the way.

    config (YAML) → Recipe → trees of each step → packed goals → AdamW → OUT/

What one run leaves in its folder:

    NAME.yaml                       the model's configuration and its recipe, whole
    NAME.jsonl                      the log, a row every LOG_EVERY steps: loss, accuracies, learning rate
    NAME/step-00250.safetensors     weights along the way, in float16
    NAME.safetensors                the trained weights, in float32; written last
    state.safetensors               what it takes to go on: weights, both moments of AdamW, the step and the recipe

A training that was killed and started again ends with the same bytes.
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

LOG_EVERY = 25  # steps, some ten seconds: what a kill can cost


def train(
    name_or_config: str,
    out: str | Path,
    steps: int | None = None,
    nodes: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    progress: Callable[[Row], None] | None = None,
) -> Path:
    """Train a model, or go on with a training that was killed.

    Args:
        name_or_config: a configuration that is shipped (`reproduction`, `baseline`) or the path of a YAML file.
        out: folder of the run; one that holds a started run is gone on with.
        steps, nodes, seed: instead of the configuration's `max_iters`, `n_nodes` and `random_seed`.
        device: `cpu` or `cuda`.
        progress: called with every row of the log, once the state of its step is saved.

    Returns:
        The trained weights, OUT/NAME.safetensors.

    Raises:
        BadInput: the configuration contradicts itself or is not the started run's, there is no such device, the
            folder cannot be written, or the loss is no number (the last good state is kept).
        NoRoom: the disk is full; run it again to go on.
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
    """Step to the end; the state is saved whenever the log has just been written, so that none is cut in two."""
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
    """A pool of one-threaded workers: parts of a step side by side need no barrier after each of their operations."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(most, n_processors())) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def kept(out: Path) -> str:
    """What a training that is stopped now has kept, and what the same command does then, in words."""
    step = kept_step(out)
    if step is None:
        return f"nothing was kept yet (the state is saved every {LOG_EVERY} steps), and the same command begins anew"
    return f"step {step:,} is kept in {out}, and the same command goes on from there"


def summary(row: Row) -> str:
    """A row of the log in a line: `loss 0.0123, tokens 99.81 %, paths 99.12 %, by depth 1: 100.0 2: 99.9 …`."""
    shares = " ".join(f"{each['depth']}: {100 * each['right'] / each['paths']:.1f}" for each in row["by_depth"])
    right = f"tokens {100 * row['token_accuracy']:.2f} %, paths {100 * row['path_accuracy']:.2f} %"
    return f"loss {row['loss']:.4f}, {right}, by depth {shares} ({row['n_nodes']} nodes)"


def to_wandb(project: str, out: Path) -> Callable[[Row], None]:
    """A `progress` that sends every row of the log to Weights & Biases, which is not installed with actstore.

    Args:
        project: of Weights & Biases.
        out: the training's folder; one that is gone on with goes on there too.

    Raises:
        BadInput: wandb is not installed, or knows nobody here.
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
