"""From what a user names to a model: a path-finding system, a folder, a file, a name of the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from actstore.errors import ActstoreError, BadInput, NotStored, nearest
from actstore.ingest.models.config import ModelConfig, as_text, parse_yaml, read_text, there_are
from actstore.ingest.models.general import named, native_model, transformers_model
from actstore.ingest.models.model import Model
from actstore.ingest.models.native import SECTION, build, is_native
from actstore.ingest.models.pretrained import fetched, offline
from actstore.ingest.models.weights import SUFFIXES, canonical, check_weights, parse, read_state, replace, state
from actstore.ingest.trees.tokens import SYSTEMS
from actstore.named import SHIPPED, available, by_name, own_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

YAMLS = (".yaml", ".yml")
MOST_NAMED = 10  # files that a message names


def from_bytes(weights: bytes, config: ModelConfig, name: str, source: str, device: str = "cpu") -> Model:
    """Build a model from the bytes of a safetensors file.

    Raises:
        BadInput: the bytes are not a safetensors file, or the tensors do not fit the configuration.
    """
    return _assemble(parse(weights, source), config, name, source, device)


def _assemble(found: Mapping[str, Tensor], config: ModelConfig, name: str, source: str, device: str) -> Model:
    check_device(device)
    held = check_weights(found, config, source)
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint  # takes seconds

    bridge = build(config, seed=0)
    bridge.load_state_dict(convert_tl_checkpoint({key: tensor.float() for key, tensor in held.items()}, bridge.cfg))
    bridge.eval().requires_grad_(False).to(device, print_details=False)
    weights = canonical(held)
    return Model(name, config, bridge, weights, hashlib.sha256(weights).hexdigest(), as_text(Path(source).name))


def of_system(bridge: TransformerBridge, config: ModelConfig) -> Model:
    """A path-finding system in a bridge as a model to run, with the bridge's present weights.

    Raises:
        BadInput: a weight is not finite.
    """
    held = check_weights(state(bridge, config), config, "the bridge")
    bridge.eval().requires_grad_(False)
    weights = canonical(held)
    return Model(config.system, config, bridge, weights, hashlib.sha256(weights).hexdigest(), "a bridge")


def sites(model: Model) -> pl.DataFrame:
    """List the hooks of a model that can be stored, in the network's order.

    Returns:
        site, short, kind; axes and shape of one row, without the length of a pattern's key axis,
        which is that of the longest sequence; and same_as, other names of the hook.
    """
    return pl.DataFrame(
        [
            {
                "site": site.name,
                "short": site.short,
                "kind": site.kind,
                "axes": list(site.axes),
                "shape": list(site.row_shape),
                "same_as": model.hooks.same[site.name],
            }
            for site in model.hooks.listed()
        ],
        schema={
            **dict.fromkeys(("site", "short", "kind"), pl.String),
            **{"axes": pl.List(pl.String), "shape": pl.List(pl.Int64), "same_as": pl.List(pl.String)},
        },
    )


def layers_as_one(found: pl.DataFrame) -> pl.DataFrame:
    """Fold the layers of a list of hooks: a row for those that differ in the layer's number alone.

    Args:
        found: see `sites`.

    Returns:
        short, with L for the layer; layers, `0-5` or a list, empty without one; kind, axes, shape.
    """
    layers: dict[tuple[Any, ...], list[int]] = {}
    for row in found.iter_rows(named=True):
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "L", row["short"], count=1)
        numbers = layers.setdefault((name, row["kind"], tuple(row["axes"]), tuple(row["shape"])), [])
        numbers += map(int, re.findall(r"(?<=\.)\d+(?=\.|$)", row["short"])[:1])
    rows = [
        {"short": name, "layers": _span(numbers), "kind": kind, "axes": list(axes), "shape": list(shape)}
        for (name, kind, axes, shape), numbers in layers.items()
    ]
    return pl.DataFrame(
        rows, schema={"short": pl.String, "layers": pl.String, **found.select("kind", "axes", "shape").schema}
    )


def _span(numbers: list[int]) -> str:
    whole = numbers == list(range(numbers[0], numbers[-1] + 1)) if numbers else False
    return f"{numbers[0]}-{numbers[-1]}" if whole and len(numbers) > 1 else ",".join(map(str, numbers))


def check_device(device: str) -> None:
    """Refuse a device that does not exist; torch is imported only for `cuda`.

    Raises:
        BadInput: names the devices that exist.
    """
    asked = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", device)
    if not asked:
        raise BadInput(f"got device {device!r}; use cpu or cuda")
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise BadInput(f"got device {device!r}, but torch finds no CUDA device here; use cpu")
    if asked[1] and int(asked[1]) >= torch.cuda.device_count():
        raise BadInput(f"got device {device!r}; there are cpu and cuda:0 to cuda:{torch.cuda.device_count() - 1}")


def listing() -> pl.DataFrame:
    """List the models that can be named, one row per model; reads only YAML and bytes of files.

    Returns:
        model, system, n_nodes, n_layers, n_heads, d_model, n_ctx (null where the YAML is missing or
        invalid; `load` raises the reason), checkpoints (steps of its training), weights (first 12
        digits of the file's sha256, as in `Store.info`) and file.
    """
    found = [(name, _config_or_none(path.with_suffix(".yaml")), path) for name, path in by_name().items()]
    sizes = dict.fromkeys(("n_nodes", "n_layers", "n_heads", "d_model", "n_ctx"), pl.Int64)
    return pl.DataFrame(
        [
            {
                "model": as_text(name),
                **{column: getattr(config, column, None) for column in ("system", *sizes)},
                "checkpoints": checkpoints(path),
                "weights": hashlib.sha256(path.read_bytes()).hexdigest()[:12],
                "file": as_text(str(path)),
            }
            for name, config, path in found
        ],
        schema={
            **{"model": pl.String, "system": pl.String, **sizes, "checkpoints": pl.List(pl.UInt32)},
            **{"weights": pl.String, "file": pl.String},
        },
    )


def _config_or_none(path: Path) -> ModelConfig | None:
    try:
        return ModelConfig.from_yaml(path)
    except BadInput:
        return None


def load(
    model: str,
    config: str | None = None,
    device: str = "cpu",
    checkpoint: int | None = None,
    *,
    hub: bool = False,
    revision: str | None = None,
    untrained: int | None = None,
    keep_weights: bool = False,
    tokenizer: str | None = None,
) -> Model:
    """Load a model by its name, or by the path of its files.

    A path-finding system has a name from `available`, or is a .safetensors or .pt with a YAML. Any
    other model is a folder of transformers (config.json, *.safetensors, tokenizer.json), a .gguf
    file, a name of the hub, or a .safetensors or .pt whose YAML has the section `transformer_lens`
    (see native.py). It is loaded in float32, with eager attention, and without the network.

    Args:
        model: the name or path; for random weights a .yaml, too.
        config: path of the YAML; default: the file of the same name beside the weights.
        device: `cpu` or `cuda`.
        checkpoint: a kept step of the training, instead of the trained weights; the model's name is
            then NAME-stepSTEP.
        hub: True if `model` is a name of the Hugging Face hub, to be fetched.
        revision: branch, tag or commit of the hub; default: its main branch.
        untrained: seed of random weights, which replace those of the files; the model's name is
            then NAME-untrained, and for a seed other than 0 NAME-untrainedSEED.
        keep_weights: True if a run keeps the weights in the store; those of a path-finding system
            always are.
        tokenizer: folder of a tokenizer; default: the model's own.

    Raises:
        NotStored: there is no such model, or no such checkpoint of the model.
        BadInput: the configuration is missing, the files do not fit or hold no model,
            TransformerLens does not know the architecture, or there is no such device.
    """
    if revision is not None and not hub:
        raise BadInput(f"got --revision {revision}, which is of a hub's model; add --hub, or leave it out")
    if not hub and task_of(model, config) == "trees":
        return _system(model, config, device, checkpoint, untrained, tokenizer)
    check_device(device)
    if checkpoint is not None:
        raise BadInput(
            f"got --checkpoint {checkpoint}, which is a step of a path-finding system's training; leave it out"
        )
    asked = {
        "model": model,
        "config": config,
        "hub": hub,
        "revision": revision,
        "untrained": untrained,
        "tokenizer": tokenizer,
    }
    if hub:
        folder, commit = fetched(model, revision)
        asked = {**asked, "revision": commit}
        loaded = transformers_model(folder, Path(model).name, asked, keep_weights)
    elif Path(model).is_dir() or Path(model).suffix == ".gguf":
        if config:
            raise BadInput(f"got --config {config}, and {model} brings its own configuration; leave --config out")
        loaded = transformers_model(Path(model), Path(os.path.abspath(model)).name, asked, keep_weights)
    else:
        loaded = native_model(*_native_files(model, config, untrained), asked, keep_weights)
    loaded.bridge.to(device, print_details=False)
    return loaded


def task_of(model: str, config: str | None = None, *, hub: bool = False) -> str:
    """`trees` if `load` would load a path-finding system, `tokens` for any other model.

    Only names and a YAML are read.

    Raises:
        NotStored: there is no such model.
        BadInput: the configuration is missing.
    """
    if hub or (model not in by_name() and (Path(model).is_dir() or Path(model).suffix == ".gguf")):
        return "tokens"
    if Path(model).suffix in YAMLS:
        return "tokens" if is_native(_yaml(Path(model), model)) else "trees"
    _, yaml = locate(model, config)
    return "tokens" if is_native(yaml) else "trees"


def again(row: Mapping[str, Any], device: str = "cpu") -> Model:
    """Load a model whose weights a store only refers to, from where they were loaded before.

    Args:
        row: the model's row of `models`.

    Raises:
        NotStored: the model is no longer there, was given as a bridge, or has other weights now.
    """
    facts, name = json.loads(row["facts"]), row["model"]
    asked = facts.get("asked")
    if asked is None:
        raise NotStored(
            f"the store refers to the weights of {name}, which was given as a bridge; to run the model again, ingest the bridge "
            "with the weights kept (keep_weights=True), as another run over the same dataset"
        )
    try:
        if asked["hub"]:
            with offline():
                found = load(**asked, device=device)
        else:
            found = load(**asked, device=device)
    except ActstoreError as error:
        why = error if asked["hub"] or Path(asked["model"]).exists() else "there is nothing"
        raise NotStored(
            f"the weights of {name} are not in the store, and not where they were, at {asked['model']} ({why}); put them back, or "
            "ingest the model from where it is, as another run over the same dataset, with --keep-weights"
        ) from None
    if found.weights_sha256 != row["weights_sha256"]:
        raise NotStored(
            f"{asked['model']} holds other weights than the run's ({found.weights_sha256[:12]} instead of "
            f"{row['weights_sha256'][:12]}); put the run's back"
        )
    return found


def _native_files(model: str, config: str | None, untrained: int | None) -> tuple[Path | None, Path]:
    """The weights and the YAML of a native model; None for random weights."""
    if Path(model).suffix not in YAMLS:
        weights, yaml = locate(model, config)
        return (weights if untrained is None else None), yaml
    if untrained is None:
        raise BadInput(
            f"{model} is a configuration; give the weights and --config {model}, or ask for random ones (--untrained)"
        )
    return None, Path(model)


def _system(
    model: str, config: str | None, device: str, checkpoint: int | None, untrained: int | None, tokenizer: str | None
) -> Model:
    """A path-finding system."""
    if tokenizer is not None:
        raise BadInput(f"got --tokenizer {tokenizer}, and a path-finding system has its own vocabulary; leave it out")
    if untrained is None:
        found = find(model, config, checkpoint)
        return _assemble(read_state(found.weights), found.config, found.name, str(found.weights), device)
    if checkpoint is not None:
        raise BadInput("--untrained takes random weights, and --checkpoint those of a training; leave one out")
    yaml = _yaml(Path(model), model) if Path(model).suffix in YAMLS else locate(model, config)[1]
    shape = ModelConfig.from_yaml(yaml)
    return _assemble(
        state(build(shape, untrained), shape), shape, named(Path(model).stem, untrained), str(yaml), device
    )


@dataclass(frozen=True)
class Found:
    """A model whose files were found, before its weights are read.

    Attributes:
        name: name of the model, and default name of its run.
        weights: path of the .safetensors or .pt.
        yaml: path of the configuration.
    """

    name: str
    config: ModelConfig
    weights: Path
    yaml: Path


def find(model: str, config: str | None = None, checkpoint: int | None = None) -> Found:
    """Find a model by the arguments of `load`, without reading its weights.

    Raises:
        NotStored: there is no such model, or no such checkpoint of the model.
        BadInput: the configuration is missing.
    """
    path, yaml = locate(model, config)
    if is_native(yaml):
        raise BadInput(
            f"{model} is no path-finding system ({yaml} has the section {SECTION}); name one: {there_are(available())}"
        )
    parsed, name = ModelConfig.from_yaml(yaml), as_text(path.stem)
    if checkpoint is not None:
        return Found(f"{name}-step{checkpoint}", parsed, _kept(path, checkpoint), yaml)
    if not path.is_file():  # its training has not ended
        steps = ", ".join(map(str, checkpoints(path)))
        raise BadInput(f"no checkpoint {path} yet; its training has kept the steps {steps}: name one (--checkpoint)")
    return Found(name, parsed, path, yaml)


def locate(model: str, config: str | None = None) -> tuple[Path, Path]:
    """The paths of a model's weights and YAML; see `load` for the arguments.

    Raises:
        NotStored: there is no such model.
        BadInput: the configuration is missing.
    """
    path = Path(model) if Path(model).suffix in SUFFIXES else by_name().get(model)
    if path is None:
        known = available()
        raise NotStored(
            f"no model {model!r}{nearest(model, known)}; {there_are(known)}: import a checkpoint with `actstore models add "
            f"NAME FILE`, or give its path ({', '.join(SUFFIXES)}); any other model is a folder, a .gguf file, or a name of "
            "the hub (--hub)"
        )
    if not path.is_file() and not checkpoints(path):
        raise BadInput(f"no checkpoint {path}; give the path of a file, or name a model: {there_are(available())}")
    return path, _yaml(path, config)


def checkpoint_path(weights: Path, step: int) -> Path:
    """The path of a kept training step: mine.safetensors → mine/step-00250.safetensors."""
    return weights.with_suffix("") / f"step-{step:05d}.safetensors"


def checkpoints(weights: Path) -> list[int]:
    """The kept steps of a model's training, ascending."""
    found = weights.with_suffix("").glob("step-*.safetensors")
    return sorted(int(path.stem.removeprefix("step-")) for path in found if path.stem.removeprefix("step-").isdigit())


def _kept(weights: Path, step: int) -> Path:
    path = checkpoint_path(weights, step)
    if not path.is_file():
        steps = ", ".join(map(str, checkpoints(weights))) or "none"
        raise NotStored(
            f"no checkpoint {step} of {weights.stem}; there are {steps}: name one (--checkpoint), or leave it out for the "
            "trained weights"
        )
    return path


def _yaml(weights: Path, config: str | Path | None) -> Path:
    """The path of a checkpoint's YAML: the one that is named, else the one beside the weights."""
    path = Path(config) if config else weights.with_suffix(".yaml")
    if not path.is_file():
        found = sorted(file.name for file in path.parent.glob("*.yaml"))
        there = ", ".join(found[:MOST_NAMED]) + (f" and {len(found) - MOST_NAMED} more" if found[MOST_NAMED:] else "")
        there = there or "none"
        lacking = f"no configuration {path}" if config else f"{weights} has no {path.name} beside it"
        raise BadInput(f"{lacking} (YAML files there: {there}): name one with --config")
    return path


def add(
    name: str,
    weights_path: str | Path,
    config_path: str | Path | None = None,
    system: str | None = None,
    into: str | Path | None = None,
) -> Model:
    """Import a checkpoint as `into/NAME.safetensors`, with an unchanged copy of its configuration.

    Args:
        weights_path: .pt or .safetensors.
        config_path: path of the YAML; default: the file beside the weights.
        system: `reproduction` or `baseline`, if the YAML has no system. Without a YAML, the
            system's shipped configuration is used.
        into: folder; default `own_folder`.

    Raises:
        BadInput: the name is invalid or belongs to other weights, or the checkpoint does not fit
            the YAML.
    """
    if not re.fullmatch(r"\w[\w.=+-]*", name) or Path(name).suffix in SUFFIXES:
        raise BadInput(f"got the name {name!r}; use letters, digits and . _ - = +, without {' or '.join(SUFFIXES)}")
    source = Path(weights_path)
    if not source.is_file():
        raise BadInput(f"no checkpoint {source}; give the path of a file in {', '.join(SUFFIXES)}")
    text, yaml = _configuration(source, config_path, system)
    config = ModelConfig.from_mapping(parse_yaml(text, yaml), yaml)
    model = _assemble(read_state(source), config, name, str(source), "cpu")
    target = (own_folder() if into is None else Path(into)) / f"{name}.safetensors"
    if target.exists() and target.read_bytes() != model.weights:
        raise BadInput(f"{target} holds other weights; choose another name, or remove it first")
    replace(target.with_suffix(".yaml"), text.encode())  # first, so that named weights always have a YAML
    replace(target, model.weights)
    return model


def _configuration(weights: Path, config_path: str | Path | None, system: str | None) -> tuple[str, str]:
    """The YAML text of a checkpoint to import, with its system, and the path of the YAML."""
    if system is not None and system not in SYSTEMS:
        raise BadInput(f"no system {system!r}; there are {', '.join(SYSTEMS)}")
    if config_path is None and system and not weights.with_suffix(".yaml").is_file():
        path = SHIPPED / "configs" / f"{system}.yaml"
    else:
        path = _yaml(weights, config_path)
    text = read_text(path)
    stated = parse_yaml(text, str(path)).get("system")
    if system and stated and stated != system:
        raise BadInput(f"{path} says system {stated!r}, and --system {system!r}; leave one out")
    return (f"system: {system}\n{text}" if system and not stated else text), str(path)
