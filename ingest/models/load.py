"""Model name, configuration and checkpoint → a TransformerBridge in eval mode, and the hash of its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from actstore.errors import BadInput, NotStored
from actstore.ingest.models.config import MODEL_FIELDS, ModelConfig, nearest, parse_yaml, read_text, there_are
from actstore.ingest.models.weights import SUFFIXES, canonical, checked, parse, read_state, replace, save, state
from actstore.ingest.trees.tokens import SYSTEMS
from actstore.named import SHIPPED, available, by_name, own_folder, place

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

__all__ = [
    "Model",
    "ModelConfig",
    "add",
    "available",
    "build",
    "find",
    "from_bytes",
    "listing",
    "load",
    "save",
    "state",
]


@dataclass
class Model:
    """A model to run, and what it is.

    Attributes:
        name: what the user calls it, by default also the name of its run.
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
    """A model from the bytes of a safetensors file.

    Raises:
        BadInput: the bytes are no safetensors file, or its tensors are not those of the configuration.
    """
    return _assemble(parse(weights, source), config, name, source, device)


def _assemble(found: Mapping[str, Tensor], config: ModelConfig, name: str, source: str, device: str) -> Model:
    check_device(device)
    held = checked(found, config, source)
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint  # takes seconds

    bridge = build(config, seed=0)
    bridge.load_state_dict(convert_tl_checkpoint({key: tensor.float() for key, tensor in held.items()}, bridge.cfg))
    bridge.eval().requires_grad_(False).to(device, print_details=False)
    weights = canonical(held)
    return Model(name, config, bridge, weights, hashlib.sha256(weights).hexdigest(), as_text(Path(source).name))


def as_text(name: str) -> str:
    """A file's name as a table holds it: bytes that are not UTF-8 are written out."""
    return name.encode(errors="backslashreplace").decode()


def check_device(device: str) -> None:
    """Refuse a device that there is not; torch is asked only about `cuda`.

    Raises:
        BadInput: says which will do.
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
    """A row for each model that can be named, and where it is; nothing but its YAML and its file's bytes are looked at.

    Returns:
        model, system, n_nodes, n_layers, n_heads, d_model, n_ctx (null where the YAML is missing or wrong: `load` says how),
        checkpoints (the steps of its training), weights (the first 12 digits of the file's sha256, as `Store.info` says them of a
        run) and file.
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
    """A model by its name, or by the path of a checkpoint.

    Args:
        model: a name out of `available`, or a path to .safetensors or .pt.
        config: the YAML; by default the file beside the weights, of the same name.
        device: `cpu` or `cuda`.
        checkpoint: a step of its training whose weights were kept, instead of the trained ones; the model is then
            called NAME-stepSTEP.

    Raises:
        NotStored: no model of that name, or no such checkpoint of it.
        BadInput: no configuration, a checkpoint that is not what it says, or no such device.
    """
    found = find(model, config, checkpoint)
    check_device(device)
    return _assemble(read_state(found.weights), found.config, found.name, str(found.weights), device)


@dataclass(frozen=True)
class Found:
    """A model that was asked for, before its weights are read.

    Attributes:
        name: of the model, and by default of its run.
        weights: .safetensors or .pt.
        yaml: its configuration, as a file.
    """

    name: str
    config: ModelConfig
    weights: Path
    yaml: Path


def find(model: str, config: str | None = None, checkpoint: int | None = None) -> Found:
    """Look for a model by what `load` is given, without reading its weights: quick, so that a mistake is told at once.

    Raises:
        NotStored: no model of that name, or no such checkpoint of it.
        BadInput: no configuration.
    """
    path, yaml = locate(model, config)
    parsed, name = ModelConfig.from_yaml(yaml), as_text(path.stem)
    if checkpoint is not None:
        return Found(f"{name}-step{checkpoint}", parsed, _kept(path, checkpoint), yaml)
    if not path.is_file():  # a training that goes on
        steps = ", ".join(map(str, checkpoints(path)))
        raise BadInput(f"no checkpoint {path} yet; its training has kept the steps {steps}: name one (--checkpoint)")
    return Found(name, parsed, path, yaml)


def locate(model: str, config: str | None = None) -> tuple[Path, Path]:
    """Where a model's weights and its YAML are; see `load`.

    Raises:
        NotStored: no model of that name.
        BadInput: no configuration.
    """
    path = Path(model) if Path(model).suffix in SUFFIXES else place(model)
    if path is None:
        known = available()
        raise NotStored(
            f"no model {model!r}{nearest(model, known)}; {there_are(known)}: path-finding systems are run, and none of a hub's "
            "models; import a checkpoint of one with `actstore models add NAME FILE`, or give its path "
            f"({', '.join(SUFFIXES)})"
        )
    if not path.is_file() and not checkpoints(path):
        raise BadInput(f"no checkpoint {path}; give the path of a file, or name a model: {there_are(available())}")
    return path, _yaml(config) if config else _yaml_beside(path)


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
            f"no checkpoint {step} of {weights.stem}; there are {steps}: name one (--checkpoint), or leave it out for the "
            "trained weights"
        )
    return path


def _yaml_beside(path: Path) -> Path:
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        raise BadInput(f"{path} has no {beside.name} beside it ({_yamls_in(path.parent)}): name one with --config")
    return beside


def _yaml(config: str | Path) -> Path:
    """The YAML that was named."""
    path = Path(config)
    if not path.is_file():
        raise BadInput(f"no configuration {path} ({_yamls_in(path.parent)}): name the checkpoint's YAML (--config)")
    return path


def _yamls_in(folder: Path) -> str:
    return f"YAML files there: {', '.join(sorted(path.name for path in folder.glob('*.yaml'))) or 'none'}"


def add(
    name: str,
    weights_path: str | Path,
    config_path: str | Path | None = None,
    system: str | None = None,
    into: str | Path | None = None,
) -> Model:
    """Import a checkpoint as `into/NAME.safetensors`, with its configuration beside it, word for word.

    Args:
        weights_path: .pt or .safetensors.
        config_path: its YAML; by default the file beside the weights.
        system: `reproduction` or `baseline`, where the YAML does not say; where there is no YAML, the system's own.
        into: a folder; by default `own_folder`.

    Raises:
        BadInput: the name is no name or is taken by other weights, or the checkpoint is not what the YAML says.
    """
    if not re.fullmatch(r"\w[\w.=+-]*", name) or Path(name).suffix in SUFFIXES:
        raise BadInput(f"got the name {name!r}; use letters, digits and . _ - = +, without {' or '.join(SUFFIXES)}")
    source = Path(weights_path)
    if not source.is_file():
        raise BadInput(f"no checkpoint {source}; give the path of a file in {', '.join(SUFFIXES)}")
    text, said_by = _configuration(source, config_path, system)
    config = ModelConfig.from_mapping(parse_yaml(text, said_by), said_by)
    model = _assemble(read_state(source), config, name, str(source), "cpu")
    target = (own_folder() if into is None else Path(into)) / f"{name}.safetensors"
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
        path = _yaml(config_path) if config_path else _yaml_beside(weights)
    text = read_text(path)
    said = parse_yaml(text, str(path)).get("system")
    if system and said and said != system:
        raise BadInput(f"{path} says system {said!r}, and --system {system!r}; leave one out")
    return (f"system: {system}\n{text}" if system and not said else text), str(path)
