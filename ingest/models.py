"""Model name, configuration and checkpoint → a TransformerBridge in eval mode, and the hash of its weights.

Weights are kept as one canonical safetensors file, in the names of a `HookedTransformer` ("blocks.0.attn.W_Q", …), so
that every run can say which weights it ran: the sha256 of that file, as `sha256sum` prints it.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import polars as pl
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

from actstore.errors import BadInput, NotStored
from actstore.ingest.tokens import SYSTEMS, Vocabulary
from actstore.log import fsync_folder

ACT_FNS = ("gelu", "gelu_new", "relu", "silu")
CONFIG_KEYS = {  # the notebook's keys, and ours: system, n_heads, d_mlp, n_ctx, betas, training
    "": (
        *("system", "n_nodes", "model", "optimizer", "training", "batch_size", "random_seed", "epoch_len_steps"),
        *("checkpoint_every_epoch", "device", "debug", "use_wandb", "wandb", "max_iters"),
    ),
    "model": ("d_model", "d_head", "n_layers", "act_fn", "attention_dir", "n_heads", "d_mlp", "n_ctx"),
    "optimizer": ("lr", "weight_decay", "betas"),
}
NEEDED_KEYS = {"": ("n_nodes", "model"), "model": CONFIG_KEYS["model"][:5], "optimizer": ()}
MODEL_FIELDS = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx", "act_fn", "attention_dir")
BUFFERS = (".mask", ".IGNORE")  # a HookedTransformer saves its causal mask among the weights
SUFFIXES = (".safetensors", ".pt", ".pth")
SHIPPED = Path(str(resources.files("actstore.data")))


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model: decoder-only, pre-LayerNorm, learned positions, causal.

    Attributes:
        system: `reproduction` or `baseline`, which decides the vocabulary.
        n_nodes: labels of the vocabulary, 2 to 64.
        n_ctx: positions with an embedding; 0 becomes the system's own, 4n+4 (`reproduction`) or 4n+1 (`baseline`).

    Raises:
        BadInput: no such model can be built.
    """

    system: str
    n_nodes: int
    n_layers: int = 6
    n_heads: int = 1
    d_model: int = 128
    d_head: int = 128
    d_mlp: int = 512
    act_fn: str = "gelu"
    attention_dir: str = "causal"
    n_ctx: int = 0

    def __post_init__(self) -> None:
        for name in ("n_nodes", "n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx"):
            size, most = getattr(self, name), 255 if name in ("n_layers", "n_heads") else 65_535
            least = 0 if name == "n_ctx" else 1
            if type(size) is not int or not least <= size <= most:
                raise BadInput(f"got {name} {size!r}; it is a whole number from {least} to {most:,}")
        if self.act_fn not in ACT_FNS:
            raise BadInput(f"got act_fn {self.act_fn!r}; there are {', '.join(ACT_FNS)}")
        if self.attention_dir != "causal":  # any other would see the answer that it is asked for
            raise BadInput(f"got attention_dir {self.attention_dir!r}; there is causal")
        _ = self.vocabulary  # refuses a system or a number of nodes that has none
        if not self.n_ctx:
            object.__setattr__(self, "n_ctx", 4 * self.n_nodes + (4 if self.system == "reproduction" else 1))

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.system, self.n_nodes)

    @property
    def d_vocab(self) -> int:
        return len(self.vocabulary)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str) -> ModelConfig:
        """Read the model's part of a configuration in the notebook's keys.

        What the notebook leaves out is what a HookedTransformerConfig would make of it: `n_heads` is d_model // d_head
        and `d_mlp` 4 * d_model; `system` is `reproduction`.

        Args:
            mapping: nested as in the YAML; training's keys may be there or not.
            source: where it came from, for the message.

        Raises:
            BadInput: a key is missing or unknown, or its value makes no model.
        """
        _check_keys(mapping, "", source)
        model = mapping["model"]
        _check_keys(model, "model", source)
        _check_keys(mapping.get("optimizer") or {}, "optimizer", source)
        try:
            derived = {"n_heads": model["d_model"] // model["d_head"], "d_mlp": 4 * model["d_model"]}
        except (TypeError, ZeroDivisionError):
            derived = {}  # __post_init__ says what is wrong with them
        try:
            return cls(mapping.get("system", "reproduction"), mapping["n_nodes"], **{**derived, **model})
        except BadInput as error:
            raise BadInput(f"{source}: {error}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> ModelConfig:
        """Read a YAML file; see `from_mapping`."""
        return cls.from_mapping(parse_yaml(read_text(path), str(path)), str(path))

    def to_mapping(self) -> dict[str, Any]:
        """The configuration as plain data, for JSON or YAML; `from_mapping` reads it back."""
        sizes = {name: getattr(self, name) for name in MODEL_FIELDS}
        return {"system": self.system, "n_nodes": self.n_nodes, "model": sizes}


def _check_keys(mapping: object, section: str, source: str) -> None:
    known, prefix = CONFIG_KEYS[section], section and f"{section}."
    if not isinstance(mapping, Mapping):
        where = f"{section!r}" if section else "a configuration"
        raise BadInput(f"{source}: {where} is {type(mapping).__name__}; expected the keys {', '.join(known)}")
    for key in mapping:
        if key not in known:
            raise BadInput(
                f"{source}: unknown key {f'{prefix}{key}'!r}{_nearest(str(key), known)}; {_there_are(known)}"
            )
    for key in NEEDED_KEYS[section]:
        if key not in mapping:
            raise BadInput(f"{source}: key {f'{prefix}{key}'!r} is missing; it needs {', '.join(NEEDED_KEYS[section])}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _there_are(known: Iterable[str]) -> str:
    return f"there are {', '.join(known) or 'none'}"


def read_text(path: str | Path) -> str:
    """The text of a configuration file.

    Raises:
        BadInput: there is no such file, or it is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot read a configuration: {getattr(error, 'strerror', None) or error}") from None


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping that a YAML text holds.

    Raises:
        BadInput: it is no YAML, or no mapping.
    """
    try:
        mapping = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"{source}: no YAML: {' '.join(str(error).split())}") from None
    _check_keys(mapping, "", source)
    return mapping


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
    bridge: TransformerBridge
    weights: bytes
    weights_sha256: str
    source: str


def build(config: ModelConfig, seed: int) -> TransformerBridge:
    """A freshly initialised model in train mode, on the CPU; the same seed gives the same weights."""
    sizes = {name: getattr(config, name) for name in MODEL_FIELDS}
    with torch.random.fork_rng(devices=[]):  # making a layer draws from the caller's generator
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


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by its name in a HookedTransformer."""
    d_model, d_head, d_mlp, n_heads = config.d_model, config.d_head, config.d_mlp, config.n_heads
    into_head, bias = (n_heads, d_model, d_head), (n_heads, d_head)
    block: dict[str, tuple[int, ...]] = {
        **{"ln1.w": (d_model,), "ln1.b": (d_model,), "ln2.w": (d_model,), "ln2.b": (d_model,)},
        **{"attn.W_Q": into_head, "attn.W_K": into_head, "attn.W_V": into_head, "attn.W_O": (n_heads, d_head, d_model)},
        **{"attn.b_Q": bias, "attn.b_K": bias, "attn.b_V": bias, "attn.b_O": (d_model,)},
        **{"mlp.W_in": (d_model, d_mlp), "mlp.b_in": (d_mlp,), "mlp.W_out": (d_mlp, d_model), "mlp.b_out": (d_model,)},
    }
    return {
        "embed.W_E": (config.d_vocab, d_model),
        "pos_embed.W_pos": (config.n_ctx, d_model),
        **{f"blocks.{layer}.{key}": shape for layer in range(config.n_layers) for key, shape in block.items()},
        **{"ln_final.w": (d_model,), "ln_final.b": (d_model,)},
        **{"unembed.W_U": (d_model, config.d_vocab), "unembed.b_U": (config.d_vocab,)},
    }


def state(bridge: TransformerBridge, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a bridge in HookedTransformer names and shapes, copied; the inverse of convert_tl_checkpoint."""
    held = bridge.state_dict()
    return {name: _from_linear(held[_bridge_key(name)], name, shape) for name, shape in shapes(config).items()}


def _bridge_key(name: str) -> str:
    """`blocks.0.attn.W_Q` → `blocks.0.attn.q.weight`, where the bridge keeps it."""
    module, _, weight = name.rpartition(".")
    kind, _, part = weight.partition("_")
    inner = f".{part.lower()}" if module.endswith((".attn", ".mlp")) else ""
    return f"{module}{inner}.{'weight' if kind in ('W', 'w') else 'bias'}"


def _from_linear(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """Undo torch.nn.Linear's [out, in] layout and its merged heads; embeddings and vectors are only reshaped."""
    tensor = tensor.detach().clone()
    if name.endswith((".W_Q", ".W_K", ".W_V")):
        n_heads, d_model, d_head = shape
        return tensor.reshape(n_heads, d_head, d_model).transpose(1, 2).contiguous()
    if name.endswith((".W_O", ".W_in", ".W_out", ".W_U")):
        return tensor.T.reshape(shape).contiguous()
    return tensor.reshape(shape)


def canonical(state_dict: Mapping[str, Tensor]) -> bytes:
    """The safetensors file of a state dict, the same bytes whatever the order of its keys; dtypes are kept."""
    return to_safetensors({name: state_dict[name].detach().cpu().contiguous() for name in sorted(state_dict)})


def save(state_dict: Mapping[str, Tensor], path: str | Path) -> str:
    """Write weights to a canonical safetensors file, atomically.

    Args:
        state_dict: in HookedTransformer names, as `state` gives it; halve it first to save half the bytes.

    Returns:
        sha256 of the file, hexadecimal: the model's `weights_sha256`.
    """
    weights = canonical(state_dict)
    _replace(Path(path), weights)
    return hashlib.sha256(weights).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even if the power goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def from_bytes(weights: bytes, config: ModelConfig, name: str, source: str, device: str = "cpu") -> Model:
    """A model from the bytes of a safetensors file.

    Raises:
        BadInput: the bytes are no safetensors file, or its tensors are not those of the configuration.
    """
    return _assemble(_parse(weights, source), config, name, source, device)


def _parse(weights: bytes, source: str) -> dict[str, Tensor]:
    try:
        return parse_safetensors(weights)
    except SafetensorError as error:
        raise BadInput(f"{source} is cut short or no safetensors file ({error}); get it again") from None


def _assemble(found: Mapping[str, Tensor], config: ModelConfig, name: str, source: str, device: str) -> Model:
    held = {key: tensor for key, tensor in found.items() if not key.endswith(BUFFERS)}
    _check_state(held, config, source)
    _check_device(device)
    bridge = build(config, seed=0)
    bridge.load_state_dict(convert_tl_checkpoint({key: tensor.float() for key, tensor in held.items()}, bridge.cfg))
    bridge.eval().requires_grad_(False).to(device, print_details=False)
    weights = canonical(held)
    return Model(name, config, bridge, weights, hashlib.sha256(weights).hexdigest(), Path(source).name)


def _check_state(held: Mapping[str, Tensor], config: ModelConfig, source: str) -> None:
    expected = shapes(config)
    for key in held:
        if key not in expected:
            raise BadInput(f"{source}: unknown weight {key!r}{_nearest(key, expected)}; {_expectation(config)}")
    for key, shape in expected.items():
        if key not in held:
            raise BadInput(f"{source}: weight {key!r} is missing; {_expectation(config)}")
        tensor = held[key]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise BadInput(f"{source}: weight {key!r} is {got}; the configuration makes it float {list(shape)}")
        if not torch.isfinite(tensor).all():
            n_bad = int((~torch.isfinite(tensor)).sum())
            raise BadInput(f"{source}: weight {key!r} holds {n_bad} NaN or infinite numbers; take another checkpoint")


def _expectation(config: ModelConfig) -> str:
    return (
        f"expected the state dict of a HookedTransformer with {config.n_layers} layers "
        "(embed.W_E, pos_embed.W_pos, blocks.N.…, ln_final.w, ln_final.b, unembed.W_U, unembed.b_U)"
    )


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise BadInput(f"got device {device!r}; use cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"got device {device!r}, but torch finds no CUDA device here; use cpu")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: a `HookedTransformer` state dict as .pt, or safetensors.

    A .pt is unpickled with weights_only, so it cannot run code.

    Raises:
        BadInput: no such file, another kind of file, cut short, or a pickle of anything but tensors.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise BadInput(f"{path} is no checkpoint: expected a file in {', '.join(SUFFIXES)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot read a checkpoint: {error.strerror}") from None
    return _parse(content, str(path)) if path.suffix == ".safetensors" else _unpickle(content, path)


def _unpickle(content: bytes, path: Path) -> dict[str, Tensor]:
    wanted = "expected the state dict of a HookedTransformer, as torch.save(model.state_dict(), …) writes it"
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(f"{path} is damaged, or a pickle of code, which was not run; {wanted}") from None
    except Exception as error:  # whatever broken bytes make the unpickler stumble over
        raise BadInput(f"{path} is cut short or no torch.save file ({type(error).__name__}); {wanted}") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        inside = (
            f"a dict of {', '.join(map(str, list(found)[:5]))}" if isinstance(found, dict) else type(found).__name__
        )
        raise BadInput(f"{path} holds {inside}; {wanted}")
    return {str(key): tensor for key, tensor in found.items()}


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
    """A row for each model that can be named: model, system, its sizes, and the file."""
    found = [(name, ModelConfig.from_yaml(path.with_suffix(".yaml")), path) for name, path in _by_name().items()]
    columns = ("system", "n_nodes", "n_layers", "n_heads", "d_model", "n_ctx")
    return pl.DataFrame(
        {
            "model": [name for name, _, _ in found],
            **{column: [getattr(config, column) for _, config, _ in found] for column in columns},
            "file": [str(path) for _, _, path in found],
        }
    )


def load(model: str, config: str | None = None, device: str = "cpu") -> Model:
    """A model by its name, or by the path of a checkpoint.

    Args:
        model: a name out of `available`, or a path to .safetensors or .pt.
        config: the YAML; the file beside the weights, of the same name, unless told.
        device: `cpu` or `cuda`.

    Raises:
        NotStored: no model of that name.
        BadInput: no configuration, a checkpoint that is not what it says, or no such device.
    """
    path = Path(model) if Path(model).suffix in SUFFIXES or os.sep in model else _by_name().get(model)
    if path is None:
        known = available()
        raise NotStored(
            f"no model {model!r}{_nearest(model, known)}; {_there_are(known)}: "
            "add one with `actstore models add`, or give the path of a checkpoint"
        )
    parsed = ModelConfig.from_yaml(config or _yaml_beside(path))
    return _assemble(read_state(path), parsed, path.stem, str(path), device)


def _yaml_beside(path: Path) -> Path:
    beside = path.with_suffix(".yaml")
    if path.is_file() and not beside.is_file():
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
    text = _configuration(source, config_path, system)
    config = ModelConfig.from_mapping(parse_yaml(text, str(config_path or source)), str(config_path or source))
    model = _assemble(read_state(source), config, name, str(source), "cpu")
    target = Path(into) / f"{name}.safetensors"
    if target.exists() and target.read_bytes() != model.weights:
        raise BadInput(f"{target} holds other weights; choose another name, or remove it first")
    _replace(target.with_suffix(".yaml"), text.encode())  # first, so that named weights always have one
    _replace(target, model.weights)
    return model


def _configuration(weights: Path, config_path: str | Path | None, system: str | None) -> str:
    """The YAML text of a checkpoint to be imported, made to say its system."""
    if system is not None and system not in SYSTEMS:
        raise BadInput(f"no system {system!r}; there are {', '.join(SYSTEMS)}")
    if config_path is None and system and not weights.with_suffix(".yaml").is_file():
        return read_text(SHIPPED / "configs" / f"{system}.yaml")
    path = Path(config_path) if config_path else _yaml_beside(weights)
    text = read_text(path)
    said = parse_yaml(text, str(path)).get("system")
    if system and said and said != system:
        raise BadInput(f"{path} says system {said!r}, and --system {system!r}; leave one out")
    return f"system: {system}\n{text}" if system and not said else text
