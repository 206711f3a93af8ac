"""The commands that list and add models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from actstore.cli.group import ModelCommand, main, note, say
from actstore.cli.options import model_options, output_options

if TYPE_CHECKING:
    from actstore.cli.output import Output


@main.group()
def models() -> None:
    """The models that have a name.

    Example:

    \b
        actstore models list
    """


@models.command(name="list")
@output_options
def models_list(output: Output) -> None:
    """List the named models, and their files.

    Example:

    \b
        actstore models list
    """
    from actstore.ingest.models.load import listing

    output.write(listing())


@models.command(name="add", cls=ModelCommand)
@click.argument("name")
@click.argument("weights", type=click.Path(dir_okay=False))
@click.option(
    "--config", type=click.Path(dir_okay=False), help="The notebook's YAML; default: the file beside the weights."
)
@click.option("--system", help="reproduction or baseline, if there is no YAML.")
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Default: $ACTSTORE_MODELS, or the user's own folder, ~/.local/share/actstore/models.",
)
def models_add(name: str, weights: str, config: str | None, system: str | None, into: Path | None) -> None:
    """Import a checkpoint, .pt or safetensors, under a name.

    It is the state dict of a HookedTransformer. Afterwards the model is found by its name from any folder.

    Example:

    \b
        actstore models add mine checkpoints/6L_step=220000.pt --config conf/6L.yaml
        actstore models add baseline model.pt --system baseline
    """
    from actstore.cli.progress import waiting
    from actstore.ingest.models.load import add
    from actstore.named import by_name, own_folder
    from actstore.outputs import check_folder

    if into:
        check_folder(into, "--into")

    with waiting("add"):
        model = add(name, weights, config, system, into)
    target = (into or own_folder()) / f"{name}.safetensors"
    note(f"{target}: {model.config.system}, weights sha256 {model.weights_sha256}")
    found = by_name().get(name)
    if found is None or not found.samefile(target):
        meant = f"here the name {name} means {found}" if found else f"the name {name} is not looked up there"
        say(f"actstore: {meant}; set ACTSTORE_MODELS to that folder, or give the path of the file", err=True)


@models.command(name="sites", cls=ModelCommand)
@click.argument("model")
@model_options
@output_options
def models_sites(
    model: str,
    config: str | None,
    hub: bool,
    revision: str | None,
    untrained: int | None,
    tokenizer: str | None,
    output: Output,
) -> None:
    """List what can be stored of a model: each hook, and what it gives.

    MODEL is a name, a folder of transformers, a .gguf file, or a checkpoint with its YAML. One
    forward pass over a few tokens tells the shapes. The table names a hook of every layer once,
    with L for the layer; the other formats have a row for each.

    Example:

    \b
        actstore models sites reproduction
        actstore models sites path/to/model-folder
    """
    from actstore.cli.progress import waiting
    from actstore.ingest.models.load import layers_as_one, load, sites

    with waiting("sites"):
        found = sites(load(model, config, hub=hub, revision=revision, untrained=untrained, tokenizer=tokenizer))
    output.write(layers_as_one(found) if output.is_table else found, fold=True)
