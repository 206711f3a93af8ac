"""Model name, configuration and checkpoint → a TransformerBridge and the hash of its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from actstore.errors import BadInput, NotStored, nearest
from actstore.ingest.models.config import MODEL_FIELDS, ModelConfig, parse_yaml, read_text, there_are
from actstore.ingest.models.weights import SUFFIXES, canonical, check_weights, parse, read_state, replace
from actstore.ingest.trees.tokens import SYSTEMS
from actstore.named import SHIPPED, available, by_name, own_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge


@dataclass
class Model:
    """A model to run, with its configuration and weights.

    Attributes:
        name: the user's name for the model; also the default name of its run.
        bridge: in eval mode, without gradients, float32.
        weights: the canonical safetensors file.
        weights_sha256: sha256 of `weights`, hexadecimal.
        source: name of the file that held the weights.
    """

    name: str
    config: ModelConfig
    bridge: TransformerBridge = field(repr=False)
    weights: bytes = field(repr=False)
    weights_sha256: str
    source: str


def build(config: ModelConfig, seed: int) -> TransformerBridge:
    """Initialise a model in train mode, on the CPU; one seed gives one set of weights."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

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


def as_text(name: str) -> str:
    """A file's name as UTF-8 text, with other bytes as `\\udc…` escapes."""
    return name.encode(errors="backslashreplace").decode()


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


def load(model: str, config: str | None = None, device: str = "cpu", checkpoint: int | None = None) -> Model:
    """Load a model by its name, or by the path of a checkpoint.

    Args:
        model: a name from `available`, or a path to .safetensors or .pt.
        config: path of the YAML; default: the file of the same name beside the weights.
        device: `cpu` or `cuda`.
        checkpoint: a kept step of the training, instead of the trained weights; the model's name is
            then NAME-stepSTEP.

    Raises:
        NotStored: there is no such model, or no such checkpoint of the model.
        BadInput: the configuration is missing, the checkpoint does not fit, or there is no such
            device.
    """
    found = find(model, config, checkpoint)
    check_device(device)
    return _assemble(read_state(found.weights), found.config, found.name, str(found.weights), device)


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
    path = Path(model) if Path(model).suffix in SUFFIXES else by_name().get(model)
    if path is None:
        known = available()
        raise NotStored(
            f"no model {model!r}{nearest(model, known)}; {there_are(known)}: path-finding systems are run, and none of a hub's "
            "models; import a checkpoint of one with `actstore models add NAME FILE`, or give its path "
            f"({', '.join(SUFFIXES)})"
        )
    if not path.is_file() and not checkpoints(path):
        raise BadInput(f"no checkpoint {path}; give the path of a file, or name a model: {there_are(available())}")
    yaml = _yaml(path, config)
    parsed, name = ModelConfig.from_yaml(yaml), as_text(path.stem)
    if checkpoint is not None:
        return Found(f"{name}-step{checkpoint}", parsed, _kept(path, checkpoint), yaml)
    if not path.is_file():  # its training has not ended
        steps = ", ".join(map(str, checkpoints(path)))
        raise BadInput(f"no checkpoint {path} yet; its training has kept the steps {steps}: name one (--checkpoint)")
    return Found(name, parsed, path, yaml)


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
        there = ", ".join(sorted(found.name for found in path.parent.glob("*.yaml"))) or "none"
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
