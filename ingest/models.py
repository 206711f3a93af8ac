"""Model name, configuration and checkpoint → a TransformerBridge in eval mode, and the hash of its weights."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import polars as pl
import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

from actstore.errors import BadInput, NotStored
from actstore.ingest.config import MODEL_FIELDS, ModelConfig, nearest, parse_yaml, read_text, there_are
from actstore.ingest.tokens import SYSTEMS
from actstore.ingest.weights import (
    SUFFIXES,
    canonical,
    checked,
    parse,
    read_state,
    replace,
    save,
    state,
)

__all__ = ["Model", "ModelConfig", "add", "available", "build", "from_bytes", "listing", "load", "save", "state"]

SHIPPED = Path(str(resources.files("actstore.data")))


@dataclass
class Model:
    """A model to run, and what it is.

    Attributes:
        name: what the user calls it, also the name of its run unless told otherwise.
        bridge: in eval mode, without gradients, float32.
        weights: the canonical safetensors file.
        weights_sha256: sha256 of `weights`, hexadecimal.
        source: name of the file that the weights came from.
    """

    name: str
    config: ModelConfig
    bridge: TransformerBridge = field(repr=False)
    weights: bytes = field(repr=False)
    weights_sha256: str
    source: str


def build(config: ModelConfig, seed: int) -> TransformerBridge:
    """A freshly initialised model in train mode, on the CPU; the same seed gives the same weights."""
    sizes = {name: getattr(config, name) for name in MODEL_FIELDS}
    return TransformerBridge.boot_native(
        TransformerBridgeConfig(
            **sizes,
            d_vocab=config.d_vocab,
            normalization_type="LN",
            seed=seed,
            architecture="TransformerLensNative",
        ),
        device="cpu",
    )


def from_bytes(weights: bytes, config: ModelConfig, name: str, source: str, device: str = "cpu") -> Model:
    """A model from the bytes of a safetensors file.

    Raises:
        BadInput: the bytes are no safetensors file, or its tensors are not those of the configuration.
    """
    return _assemble(parse(weights, source), config, name, source, device)


def _assemble(found: Mapping[str, Tensor], config: ModelConfig, name: str, source: str, device: str) -> Model:
    check_device(device)
    held = checked(found, config, source)
    bridge = build(config, seed=0)
    bridge.load_state_dict(convert_tl_checkpoint({key: tensor.float() for key, tensor in held.items()}, bridge.cfg))
    bridge.eval().requires_grad_(False).to(device, print_details=False)
    weights = canonical(held)
    return Model(name, config, bridge, weights, hashlib.sha256(weights).hexdigest(), Path(source).name)


def check_device(device: str) -> None:
    """Refuse a device that there is not.

    Raises:
        BadInput: says which will do.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise BadInput(f"got device {device!r}; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"got device {device!r}, but torch finds no CUDA device here; use cpu")


def folders() -> list[Path]:
    """Where models are looked up by name, first to last."""
    told = os.environ.get("ACTSTORE_MODELS")
    return [*([Path(told)] if told else []), Path("data/checkpoints"), SHIPPED / "checkpoints"]


def _by_name() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("[!.]*.safetensors")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def available() -> list[str]:
    """Names of the models that `load` knows."""
    return list(_by_name())


def listing() -> pl.DataFrame:
    """A row for each model that can be named: model, system, its sizes, the checkpoints of its training, the file."""
    found = [(name, ModelConfig.from_yaml(path.with_suffix(".yaml")), path) for name, path in _by_name().items()]
    columns = ("system", "n_nodes", "n_layers", "n_heads", "d_model", "n_ctx")
    return pl.DataFrame(
        {
            "model": [name for name, _, _ in found],
            **{column: [getattr(config, column) for _, config, _ in found] for column in columns},
            "checkpoints": pl.Series([checkpoints(path) for _, _, path in found], dtype=pl.List(pl.UInt32)),
            "file": [str(path) for _, _, path in found],
        }
    )


def load(model: str, config: str | None = None, device: str = "cpu", checkpoint: int | None = None) -> Model:
    """A model by its name, or by the path of a checkpoint.

    Args:
        model: a name out of `available`, or a path to .safetensors or .pt.
        config: the YAML; the file beside the weights, of the same name, unless told.
        device: `cpu` or `cuda`.
        checkpoint: a step of its training whose weights were kept, instead of the trained ones; the model is then
            called NAME-stepSTEP.

    Raises:
        NotStored: no model of that name, or no such checkpoint of it.
        BadInput: no configuration, a checkpoint that is not what it says, or no such device.
    """
    path, config_path = locate(model, config)
    parsed, name = ModelConfig.from_yaml(config_path), path.stem
    if checkpoint is not None:
        path, name = _kept(path, checkpoint), f"{name}-step{checkpoint}"
    return _assemble(read_state(path), parsed, name, str(path), device)


def locate(model: str, config: str | None = None) -> tuple[Path, Path]:
    """Where a model's weights and its YAML are; see `load`.

    Raises:
        NotStored: no model of that name.
        BadInput: no configuration.
    """
    path = Path(model) if Path(model).suffix in SUFFIXES or os.sep in model else _by_name().get(model)
    if path is None:
        known = available()
        raise NotStored(
            f"no model {model!r}{nearest(model, known)}; {there_are(known)}: "
            "add one with `actstore models add`, or give the path of a checkpoint"
        )
    return path, Path(config) if config else _yaml_beside(path)


def checkpoint_path(weights: Path, step: int) -> Path:
    """Where the weights of one step of a model's training are kept: mine.safetensors → mine/step-00250.safetensors."""
    return weights.with_suffix("") / f"step-{step:05d}.safetensors"


def checkpoints(weights: Path) -> list[int]:
    """The steps of a model's training whose weights are kept beside it, ascending."""
    found = weights.with_suffix("").glob("step-*.safetensors")
    return sorted(int(path.stem.removeprefix("step-")) for path in found if path.stem.removeprefix("step-").isdigit())


def _kept(weights: Path, step: int) -> Path:
    path = checkpoint_path(weights, step)
    if not path.is_file():
        steps = ", ".join(map(str, checkpoints(weights))) or "none"
        raise NotStored(
            f"no checkpoint {step} of {weights.stem}; there are {steps}, and the trained weights without one"
        )
    return path


def _yaml_beside(path: Path) -> Path:
    beside = path.with_suffix(".yaml")
    if not path.is_file() and not (
        beside.is_file() and checkpoints(path)
    ):  # a training that goes on has no weights yet
        raise BadInput(f"no checkpoint {path}; there are the models {', '.join(available()) or 'none'}")
    if not beside.is_file():
        others = ", ".join(sorted(other.name for other in path.parent.glob("*.yaml"))) or "none"
        raise BadInput(f"{path} has no {beside.name} beside it (YAML files there: {others}): name one with --config")
    return beside


def add(name: str, weights_path: str | Path, config_path: str | Path | None, system: str | None, into: Path) -> Model:
    """Import a checkpoint as `into/NAME.safetensors`, with its configuration beside it, word for word.

    Args:
        weights_path: .pt or .safetensors.
        config_path: its YAML; the file beside the weights unless told.
        system: `reproduction` or `baseline`, where the YAML does not say; where there is no YAML, the system's own.

    Raises:
        BadInput: the name is no name or is taken by other weights, or the checkpoint is not what the YAML says.
    """
    if not re.fullmatch(r"\w[\w.=+-]*", name) or Path(name).suffix in SUFFIXES:
        raise BadInput(f"got the name {name!r}; use letters, digits and . _ - = +, without {' or '.join(SUFFIXES)}")
    source = Path(weights_path)
    text, said_by = _configuration(source, config_path, system)
    config = ModelConfig.from_mapping(parse_yaml(text, said_by), said_by)
    model = _assemble(read_state(source), config, name, str(source), "cpu")
    target = Path(into) / f"{name}.safetensors"
    if target.exists() and target.read_bytes() != model.weights:
        raise BadInput(f"{target} holds other weights; choose another name, or remove it first")
    replace(target.with_suffix(".yaml"), text.encode())  # first, so that named weights always have one
    replace(target, model.weights)
    return model


def _configuration(weights: Path, config_path: str | Path | None, system: str | None) -> tuple[str, str]:
    """The YAML text of a checkpoint to be imported, made to say its system, and the file that it comes from."""
    if system is not None and system not in SYSTEMS:
        raise BadInput(f"no system {system!r}; there are {', '.join(SYSTEMS)}")
    if config_path is None and system and not weights.with_suffix(".yaml").is_file():
        path = SHIPPED / "configs" / f"{system}.yaml"
    else:
        path = Path(config_path) if config_path else _yaml_beside(weights)
    text = read_text(path)
    said = parse_yaml(text, str(path)).get("system")
    if system and said and said != system:
        raise BadInput(f"{path} says system {said!r}, and --system {system!r}; leave one out")
    return (f"system: {system}\n{text}" if system and not said else text), str(path)
