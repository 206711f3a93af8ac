"""The commands that make and grade models: train and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from actstore.cli.group import KEPT, main, say
from actstore.cli.options import checkpoint_option, output_options
from actstore.errors import BadInput

if TYPE_CHECKING:
    from actstore.cli.output import Output


@main.command()
@click.argument("name")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", type=int, help="Optimizer steps; default: the configuration's.")
@click.option("--nodes", type=int, help="Nodes per tree; default: the configuration's.")
@click.option("--seed", type=int, help="Seed of weights and trees; default: the configuration's.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--grade",
    default=20_000,
    show_default=True,
    metavar="TREES",
    help="Fresh trees per distribution that the model is graded on at the end.",
)
@click.option("--wandb", metavar="PROJECT", help="Also send the log to this project of Weights & Biases.")
def train(
    name: str,
    out: Path,
    steps: int | None,
    nodes: int | None,
    seed: int | None,
    device: str,
    grade: int,
    wandb: str | None,
) -> None:
    """Train a system (reproduction, baseline) or a YAML configuration, into the folder OUT.

    Every 25 steps the state is saved and OUT/NAME.jsonl gets a row. After a kill, the same command
    continues from there and ends with the same weights. OUT/NAME.md, the model card, says how good
    the model is on trees of each distribution.

    Example:

    \b
        actstore train reproduction runs/mine
        actstore train baseline runs/small --nodes 8 --steps 3000
    """
    from actstore.cli.output import Output
    from actstore.cli.progress import progress
    from actstore.ingest.training import evaluation
    from actstore.ingest.training.card import write_card
    from actstore.ingest.training.recipe import Row, read_config
    from actstore.ingest.training.train import kept, summary, to_wandb
    from actstore.ingest.training.train import train as train_model
    from actstore.outputs import check_folder

    check_folder(out, "OUT")
    _, shape, recipe = read_config(name, nodes, steps, seed)
    if grade < 1:
        raise BadInput(f"got {grade} trees to grade it on; take 1 or more (--grade)")
    evaluation.check(shape, recipe=recipe)  # refuses what could not be graded at the end
    click.get_current_context().meta[KEPT] = lambda: kept(out)
    total = recipe.steps
    send = to_wandb(wandb, out) if wandb else None
    with progress(f"train {Path(name).stem}", total, "steps") as advance:

        def show(row: Row) -> None:
            advance(row["step"], total, summary(row))
            if send:
                send(row)

        weights = train_model(name, out, steps, nodes, seed, device, show)
    with progress(f"grade {weights.stem}", grade * len(evaluation.distributions(shape)), "trees") as advance:
        graded = write_card(weights, grade, device, advance)
    Output().write(graded.table)
    say(f"{weights}: trained; {weights.with_suffix('.md')} is its card")


@main.command()
@click.argument("model")
@click.option("--config", type=click.Path(), help="The checkpoint's YAML, if not beside it.")
@checkpoint_option
@click.option("--distribution", help="reproduction, baseline or deep; default: each of them.")
@click.option("--trees", default=20_000, show_default=True, help="Number of fresh trees per distribution.")
@click.option(
    "--seed", default=20_000_000, show_default=True, help="Seed of the stream of trees; far from those trained on."
)
@click.option("--nodes", type=int, help="Nodes per tree; default: the model's own.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@output_options
def evaluate(
    model: str,
    config: str | None,
    distribution: str | None,
    trees: int,
    seed: int,
    nodes: int | None,
    device: str,
    checkpoint: int | None,
    output: Output,
) -> None:
    """Grade a model on fresh trees: tokens, whole paths, greedy answers; by distribution and depth.

    Intervals are exact, at 95 %. Every distribution is tested, since a model that is right on its
    own trees may fail on others. Baseline trees with edges listed backward are graded apart from
    those with shuffled edges.

    Example:

    \b
        actstore evaluate reproduction --trees 5000
        actstore evaluate reproduction --checkpoint 1000 --distribution deep --json
    """
    from actstore.cli.progress import progress
    from actstore.ingest.models.load import check_device, find, load
    from actstore.ingest.training import evaluation
    from actstore.ingest.training.recipe import recipe_of

    found = find(model, config, checkpoint)
    recipe = recipe_of(found.yaml)
    evaluation.check(found.config, distribution, trees, seed, nodes, recipe)
    check_device(device)
    loaded, total = (
        load(model, config, device, checkpoint),
        trees * len(evaluation.distributions(found.config, distribution)),
    )
    with progress(f"evaluate {found.name}", total, "trees") as advance:
        answer = evaluation.evaluate(loaded, distribution, trees, seed, nodes, recipe, advance)
    output.write(answer.table, answer.to_dict())
    say(answer.sentence(), err=True)
