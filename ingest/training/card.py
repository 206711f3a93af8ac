"""The model card of a training, in Markdown: recipe, machine, time, and accuracy on unseen trees.

weights, YAML, log → evaluation on trees never seen → NAME.md
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import polars as pl

from actstore.errors import BadInput, advised
from actstore.ingest.models import load
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.weights import replace
from actstore.ingest.training.checkpoints import KEPT
from actstore.ingest.training.evaluation import MEASURES, Evaluation, evaluate
from actstore.ingest.training.recipe import Recipe, Row, recipe_of
from actstore.storage.machine import n_processors

LEARNT = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of the training at which a card shows the log


def write_card(
    weights: Path, n_trees: int = 20_000, device: str = "cpu", progress: Callable[[int], None] | None = None
) -> Evaluation:
    """Grade a trained model on unseen trees of every distribution; write NAME.md beside it.

    Args:
        weights: OUT/NAME.safetensors, beside the YAML and the log that `train` writes.
        n_trees: trees to grade, per distribution.
        progress: called with the number of trees graded so far.

    Raises:
        BadInput: the folder does not hold a finished training.
    """
    model = load.load(str(weights), device=device)
    recipe = recipe_of(weights.with_suffix(".yaml"))
    if recipe is None:
        raise BadInput(f"{weights.with_suffix('.yaml')} names no recipe; grade it with {advised('evaluate', weights)}")
    rows = [json.loads(line) for line in weights.with_suffix(".jsonl").read_text().splitlines()]
    graded = evaluate(model, n_trees=n_trees, recipe=recipe, progress=progress)
    text = card(model.config, recipe, rows, graded, machine(device))
    replace(weights.with_suffix(".md"), text.encode())
    return graded


def card(config: ModelConfig, recipe: Recipe, rows: list[Row], graded: Evaluation, where: str) -> str:
    """The text of a model card: card.md, filled in.

    Args:
        rows: rows of the log.
        graded: the evaluation on unseen trees, of the model's own distribution and others.
        where: the machine, in words.
    """
    n_trees = recipe.steps * recipe.batch_size
    n_deep = recipe.steps * round(recipe.deep_share * recipe.batch_size)
    whole = graded.frame.filter(pl.col("depth").is_null(), pl.col("edges").is_null())
    return (
        files(__package__)
        .joinpath("card.md")
        .read_text(encoding="utf-8")
        .format(
            config=config,
            recipe=recipe,
            graded=graded,
            machine=where,
            greedy="\n".join(_of_distribution(row, config.system) for row in whole.iter_rows(named=True)),
            heads=f"{config.n_heads} head{'s' * (config.n_heads > 1)}",
            n_trees=n_trees,
            sources=f"{n_trees - n_deep:,} of the `{config.system}` distribution"
            + (f", {n_deep:,} `deep`" if n_deep else ""),
            far="and every node at depth {} to {} ".format(*recipe.inner_goals) if recipe.inner_goals else "",
            loss="the path and the padding after it" if config.system == "baseline" else "the path alone",
            growing=recipe.curriculum * recipe.steps,
            shallow=recipe.shallow * recipe.steps,
            minutes=rows[-1]["seconds"] / 60,
            kept=", ".join(f"{step:,}" for step in KEPT if step < recipe.steps),
            left_out=", ".join(f"{n:,} `{name}`" for name, n in (graded.n_left_out or {}).items()),
            accuracy="\n".join(map(_accuracy, graded.frame.iter_rows(named=True))),
            log_every=rows[0]["step"],
            learning="\n".join(
                _learnt(min(rows, key=lambda row: abs(row["step"] - share * recipe.steps))) for share in LEARNT
            ),
        )
    )


def _of_distribution(row: Row, own: str) -> str:
    return f"- `{row['distribution']}`{', its own' * (row['distribution'] == own)}: {_share(row, 'greedy')}"


def _accuracy(row: Row) -> str:
    trees = f"{row['distribution']}, {row['edges']}" if row["edges"] else row["distribution"]
    depth = "all" if row["depth"] is None else row["depth"]
    return f"| {trees} | {depth} | {row['n_trees']:,} | {' | '.join(_share(row, measure) for measure in MEASURES)} |"


def _learnt(row: Row) -> str:
    right = f"{100 * row['token_accuracy']:.2f} | {100 * row['path_accuracy']:.2f}"
    return f"| {row['step']:,} | {row['n_nodes']} | {row['loss']:.4f} | {right} |"


def _share(row: Row, measure: str) -> str:
    share, low, high = (_percent(row[name]) for name in (measure, f"{measure}_low", f"{measure}_high"))
    return f"{share} ({low} to {high})"


def _percent(share: float) -> str:
    """Two decimals, or four where a share below 1 would read 100.00."""
    text = f"{100 * share:.2f}"
    return f"{min(100 * share, 99.9999):.4f}" if share < 1 and text == "100.00" else text


def machine(device: str) -> str:
    """This machine in words: processor or GPU, usable cores, and torch version."""
    found = f"{n_processors()} cores of {_processor()}"
    if device.startswith("cuda"):
        import torch

        found = f"{torch.cuda.get_device_name(device)}, {found}"
    return f"{found}; torch {version('torch')}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
