"""The commands that make and grade models: train and evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actstore.cli.group import KEPT, ModelCommand, main, note
from actstore.cli.options import checkpoint_option, output_options

if TYPE_CHECKING:
    from actstore.cli.output import Output


@main.command(cls=ModelCommand)
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
def train(name: str, out: Path, **options: Any) -> None:
    """Train a model of paths in trees, into the folder OUT.

    NAME is a system (reproduction, baseline) or a YAML configuration. Every 25 steps the state is
    saved and OUT/NAME.jsonl gets a row. After a kill, the same command continues from there and ends
    with the same weights. OUT/NAME.md, the model card, says how good the model is on trees of each
    distribution.

    Example:

    \b
        actstore train reproduction runs/mine
        actstore train baseline runs/small --nodes 8 --steps 3000
    """
    from actstore import verbs
    from actstore.cli.output import Output
    from actstore.ingest.training.train import kept

    click.get_current_context().meta[KEPT] = lambda: kept(out)
    weights, graded = verbs.train(name, out, **options, progress=_shown)
    Output().write(graded.shown(), fold=True)
    note(f"{weights}: trained; {weights.with_suffix('.md')} is its card")


@contextmanager
def _shown(what: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    """A Work that also says how long a training is likely to take, once that is known."""
    from actstore.cli.progress import foretelling, progress

    goes_on = "Ctrl-C keeps the state that is saved every 25 steps, and the same command goes on"
    with progress(what, total, unit) as advance:
        yield foretelling(advance, lambda left: note(f"at this rate the rest takes about {left}; {goes_on}", err=True))


@main.command(cls=ModelCommand)
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
def evaluate(model: str, output: Output, **options: Any) -> None:
    """Grade a model on fresh trees, by distribution and depth.

    Tokens, whole paths and greedy answers are graded. Intervals are exact, at 95 %. Every
    distribution is tested, since a model that is right on its own trees may fail on others. Baseline
    trees with edges listed backward are graded apart from those with shuffled edges.

    Example:

    \b
        actstore evaluate reproduction --trees 5000
        actstore evaluate reproduction --checkpoint 1000 --distribution deep --json
    """
    from actstore import verbs
    from actstore.cli.progress import progress

    answer = verbs.evaluate(model, **options, progress=progress)
    output.write(answer.shown() if output.is_table else answer.frame, answer.to_dict(), fold=True)
    note(answer.sentence(), err=True)
