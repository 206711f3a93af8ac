"""A model's configuration: the notebook's YAML keys, and the model's shape that follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml

from actstore.errors import BadInput, nearest
from actstore.ingest.trees.tokens import Vocabulary

LONGEST = 100_000  # characters of a configuration; those of trained models have 1,000
MOST_KEYS = 200  # of a mapping, with those merged into it: merges of merges make a few lines into gigabytes
_shortened = Repr()
_shortened.maxstring = 100
brief = _shortened.repr  # for messages: aliases of aliases make a few lines into gigabytes, too
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


@dataclass(frozen=True)
class GeneralConfig:
    """The shape of a model of any architecture.

    Attributes:
        d_head, d_mlp: None where the architecture has none, or layers differ.
        n_ctx: most tokens of a sequence.
        d_vocab: number of token ids.
        described: the configuration that the shape was read from: {"huggingface": …} or
            {"transformer_lens": …}.
    """

    n_layers: int
    n_heads: int | None
    d_model: int
    d_head: int | None
    d_mlp: int | None
    n_ctx: int
    d_vocab: int
    described: dict[str, Any]

    def to_mapping(self) -> dict[str, Any]:
        """The configuration as plain data for JSON."""
        return self.described


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model: decoder-only, pre-LayerNorm, learned positions, causal.

    Attributes:
        system: `reproduction` or `baseline`, which decides the vocabulary.
        n_nodes: labels of the vocabulary, 2 to 64.
        n_ctx: positions with an embedding; 0 is replaced by 4n+4 (`reproduction`) or 4n+1
            (`baseline`).

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
        for name in ("n_nodes", "n_layers", "d_model", "d_head", "n_heads", "d_mlp", "n_ctx"):
            size, most = getattr(self, name), 255 if name in ("n_layers", "n_heads") else 65_535
            least = 0 if name == "n_ctx" else 1
            if type(size) is not int or not least <= size <= most:
                raise BadInput(f"got {name} {brief(size)}; it is a whole number from {least} to {most:,}")
        if self.act_fn not in ACT_FNS:
            raise BadInput(f"got act_fn {brief(self.act_fn)}; there are {', '.join(ACT_FNS)}")
        if self.attention_dir != "causal":  # any other would see the answer that it is asked for
            raise BadInput(f"got attention_dir {brief(self.attention_dir)}; there is causal")
        _ = self.vocabulary  # refuses a system or a number of nodes that has none
        if not self.n_ctx:
            object.__setattr__(self, "n_ctx", 4 * self.n_nodes + (4 if self.system == "reproduction" else 1))

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the system at this number of nodes."""
        return Vocabulary(self.system, self.n_nodes)

    @property
    def d_vocab(self) -> int:
        """Number of token ids."""
        return len(self.vocabulary)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str) -> ModelConfig:
        """Read the model's part of a configuration in the notebook's keys.

        Missing keys get the defaults of a HookedTransformerConfig: `n_heads` is d_model // d_head,
        `d_mlp` is 4 * d_model. `system` is `reproduction` by default.

        Args:
            mapping: nested as in the YAML; training's keys are optional.
            source: name of the file, for error messages.

        Raises:
            BadInput: a key is missing or unknown, or has an invalid value.
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
        """The configuration as plain data for JSON or YAML; the inverse of `from_mapping`."""
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
                f"{source}: unknown key {brief(f'{prefix}{key}')}{nearest(str(key), known)}; {there_are(known)}"
            )
    for key in NEEDED_KEYS[section]:
        if key not in mapping:
            raise BadInput(f"{source}: key {f'{prefix}{key}'!r} is missing; it needs {', '.join(NEEDED_KEYS[section])}")


def as_text(name: str) -> str:
    """A file's name as UTF-8 text, with other bytes as `\\udc…` escapes."""
    return name.encode(errors="backslashreplace").decode()


def there_are(known: Iterable[str]) -> str:
    """The end of a message: `there are a, b`, or `there are none`."""
    return f"there are {', '.join(known) or 'none'}"


def read_text(path: str | Path) -> str:
    """The text of a configuration file.

    Raises:
        BadInput: the file is missing, is not UTF-8 text, or is longer than LONGEST.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise BadInput(f"{path} has more than {LONGEST:,} characters, and is no configuration; name another file")
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot read a configuration: {getattr(error, 'strerror', None) or error}") from None


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Parse the mapping of a YAML text.

    Raises:
        BadInput: the text is not YAML, or not a mapping with the keys of a configuration.
    """
    mapping = _parsed(text, source)
    _check_keys(mapping, "", source)
    return mapping


def mapping_of(text: str, source: str) -> dict[str, Any]:
    """Parse a YAML text with any keys; what is no mapping has none.

    Raises:
        BadInput: the text is not YAML.
    """
    parsed = _parsed(text, source)
    return parsed if isinstance(parsed, dict) else {}


class _Loader(yaml.SafeLoader):
    """A loader of plain data, which merges (`<<`) no more than MOST_KEYS into a mapping."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_KEYS:
            raise yaml.YAMLError(f"a mapping has more than {MOST_KEYS} keys")


def _parsed(text: str, source: str) -> Any:
    try:
        return _Loader(text).get_single_data()  # as safe_load does, with the limits above
    except Exception as error:  # PyYAML fails in many ways: values that do not fit their tag, deep nesting
        cause = "too many levels" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise BadInput(f"{source}: no YAML: {cause or type(error).__name__}") from None
