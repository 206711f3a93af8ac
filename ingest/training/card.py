"""The model card of a training, in Markdown: recipe, machine, time, and accuracy on unseen trees.

weights, YAML, log → evaluation on trees never seen → NAME.md
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
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
    text = "\n".join(card(model.config, recipe, rows, graded, machine(device))) + "\n"
    replace(weights.with_suffix(".md"), text.encode())
    return graded


def card(config: ModelConfig, recipe: Recipe, rows: list[Row], graded: Evaluation, where: str) -> Iterator[str]:
    """The lines of a model card.

    Args:
        rows: rows of the log.
        graded: the evaluation on unseen trees, of the model's own distribution and others.
        where: the machine, in words.
    """
    name, n_trees = graded.model, recipe.steps * recipe.batch_size
    n_deep = recipe.steps * round(recipe.deep_share * recipe.batch_size)
    sources = f"{n_trees - n_deep:,} of the `{config.system}` distribution" + (f", {n_deep:,} `deep`" if n_deep else "")
    loss = "the path and the padding after it" if config.system == "baseline" else "the path alone"
    yield f"# {name}"
    yield ""
    yield f"Finds the path from the root of a tree of {config.n_nodes} nodes to a leaf. Whole, and left to itself, in % of"
    yield f"{graded.n_trees:,} trees of each distribution that its training never saw:"
    yield ""
    for row in graded.table.filter(pl.col("depth").is_null(), pl.col("edges").is_null()).iter_rows(named=True):
        yield f"- `{row['distribution']}`{', its own' * (row['distribution'] == config.system)}: {_share(row, 'greedy')}"
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| system | {config.system} |"
    heads = f"{config.n_heads} head{'s' * (config.n_heads > 1)} a layer"
    widths = f"d_model {config.d_model}, d_head {config.d_head}, d_mlp {config.d_mlp}"
    sizes = f"{config.n_layers} layers, {heads}, {widths}, {config.act_fn}"
    yield f"| model | {sizes}, n_ctx {config.n_ctx}, d_vocab {config.d_vocab} |"
    yield f"| weights | sha256 `{graded.weights_sha256}` |"
    yield f"| trees | {n_trees:,} fresh ones, {recipe.batch_size} a step, no fixed set: {sources}; seed {recipe.seed} |"
    far = "and every node at depth {} to {} ".format(*recipe.inner_goals) if recipe.inner_goals else ""
    yield f"| goals | every leaf of a tree {far}in one packed sequence; loss on {loss} |"
    yield (
        f"| curriculum | trees grow from 4 nodes to {config.n_nodes} over the first {recipe.curriculum * recipe.steps:,.0f} steps; "
        f"over the first {recipe.shallow * recipe.steps:,.0f} the goals are all nodes near the root |"
    )
    adamw = f"AdamW, lr {recipe.lr:g}, betas {recipe.betas[0]:g} and {recipe.betas[1]:g}, weight decay {recipe.weight_decay:g}"
    decay = f"warmup {recipe.warmup:.0%}, linear decay to 0 over the last {recipe.decay:.0%}"
    yield f"| optimizer | {adamw}, gradients clipped at {recipe.clip:g}; {recipe.steps:,} steps, {decay} |"
    yield "| precision | bfloat16 products, float32 weights |"
    yield f"| wall time | {rows[-1]['seconds'] / 60:.0f} minutes |"
    yield f"| machine | {where} |"
    kept = ", ".join(f"{step:,}" for step in KEPT if step < recipe.steps)
    yield f"| kept along the way | steps {kept}, in float16 |"
    yield ""
    yield "## Accuracy"
    yield ""
    yield f"On {graded.n_trees:,} fresh trees of each distribution, of seed {graded.seed:,}, by depth of the goal, in %, with exact"
    yield "95 % intervals over trees. In `baseline` every other tree lists its edges backward, and the others shuffled."
    left_out = ", ".join(f"{n:,} `{name}`" for name, n in (graded.n_left_out or {}).items())
    yield f"Drawn beyond those and left out, since training had seen them: {left_out} (the"
    yield "canonical hash of a tree tells, which is the same whatever the order of its edges)."
    yield ""
    yield "| trees | depth | n | token | whole path, teacher-forced | whole path, greedy |"
    yield "|---|---|---|---|---|---|"
    for row in graded.table.iter_rows(named=True):
        trees = f"{row['distribution']}, {row['edges']}" if row["edges"] else row["distribution"]
        depth = "all" if row["depth"] is None else row["depth"]
        yield f"| {trees} | {depth} | {row['n_trees']:,} | {' | '.join(_share(row, measure) for measure in MEASURES)} |"
    yield ""
    yield "## Learning"
    yield ""
    yield f"Means over {rows[0]['step']} steps, of every packed goal, read off `{name}.jsonl`:"
    yield ""
    yield "| step | nodes | loss | tokens right % | paths right % |"
    yield "|---|---|---|---|---|"
    for wanted in LEARNT:
        row = min(rows, key=lambda row: abs(row["step"] - wanted * recipe.steps))
        right = f"{100 * row['token_accuracy']:.2f} | {100 * row['path_accuracy']:.2f}"
        yield f"| {row['step']:,} | {row['n_nodes']} | {row['loss']:.4f} | {right} |"


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
