"""A model to run: a bridge, its weights or their hash, and the facts that a run writes down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from actstore.errors import BadInput
from actstore.ingest.models.config import GeneralConfig, ModelConfig
from actstore.ingest.models.sites import Hooks, SiteSpec, site_specs
from actstore.ingest.models.unembedding import last_layer
from actstore.ingest.models.weights import sha256_of, stream

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

SIZES = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx", "d_vocab")


@dataclass
class Model:
    """A model to run, with its configuration and weights.

    Attributes:
        name: the user's name for the model; also the default name of its run.
        config: a ModelConfig of a path-finding system, or a GeneralConfig of any other model.
        bridge: in eval mode, without gradients.
        weights: the canonical safetensors file; b"" where the weights are only referenced.
        weights_sha256: sha256 of the canonical safetensors file, hexadecimal.
        source: name of the file or folder that held the weights.
        tokenizer: the fast tokenizer of transformers as it was published, or None.
        facts: what was loaded and how, plain data for JSON; empty for a path-finding system.
    """

    name: str
    config: Any
    bridge: TransformerBridge = field(repr=False)
    weights: bytes = field(repr=False)
    weights_sha256: str
    source: str
    tokenizer: Any = field(default=None, repr=False)
    facts: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def task(self) -> str:
        """`trees` for a path-finding system; `tokens` for any other model."""
        return "trees" if isinstance(self.config, ModelConfig) else "tokens"

    @property
    def d_vocab(self) -> int:
        """Number of token ids."""
        return int(self.config.d_vocab)

    @property
    def n_ctx(self) -> int:
        """Most tokens of a sequence."""
        return int(self.config.n_ctx)

    @property
    def causal(self) -> bool:
        """True if a token sees only the tokens before it."""
        return bool(self.facts.get("causal", True))

    @property
    def predicts(self) -> bool:
        """True if the logits are predictions of the next token."""
        return self.causal and not self.facts.get("headless", False)

    @property
    def device(self) -> torch.device:
        """The device that the model lies on."""
        return next(self.bridge.parameters()).device

    @cached_property
    def tokenizer_sha256(self) -> str | None:
        """sha256 of the tokenizer, hexadecimal; None without a tokenizer."""
        return None if self.tokenizer is None else tokenizer_hash(self.tokenizer)

    @cached_property
    def hooks(self) -> Hooks:
        """What each hook gives; the first use runs a forward pass over a few tokens."""
        return Hooks(self.bridge)

    @cached_property
    def unembedding(self) -> bytes:
        """The file of the final norm and the unembedding, see unembedding.py.

        It is b"" for a path-finding system, whose store holds all weights, and for a model whose
        last layer is another one.
        """
        has_none = self.task == "trees" or self.facts.get("headless", False)
        return b"" if has_none else last_layer(self.bridge, self.hooks)

    def sites(self, names: Sequence[str] | None) -> list[SiteSpec]:
        """The sites with the given names, see `site_specs`.

        Raises:
            BadInput: a hook does not exist or gives nothing that can be stored.
        """
        if self.task == "trees":
            return site_specs(names, self.config, lambda: self.hooks)
        return self.hooks.chosen(names)

    def row(self) -> dict[str, Any]:
        """The model's row of `models`."""
        of_trees = self.task == "trees"
        common = {
            "weights_sha256": self.weights_sha256,
            "model": self.name,
            "system": self.config.system if of_trees else None,
            "n_nodes": self.config.n_nodes if of_trees else None,
            **{name: getattr(self.config, name) for name in SIZES},
            "n_params": sum(parameter.numel() for parameter in self.bridge.original_model.parameters()),
            "vocabulary": self.config.vocabulary.words() if of_trees else None,
            "config": json.dumps(self.config.to_mapping()),
            "source": self.source,
        }
        if of_trees:
            return common
        return {
            **common,
            "architecture": self.facts["architecture"],
            "normalization": self.facts["normalization"],
            "tokenizer": self.tokenizer_sha256,
            "facts": json.dumps(self.facts),
            "weights_kept": bool(self.weights),
        }


def from_bridge(
    bridge: TransformerBridge,
    name: str,
    tokenizer: Any = None,
    *,
    keep_weights: bool = False,
    source: str = "",
    facts: dict[str, Any] | None = None,
    described: dict[str, Any] | None = None,
) -> Model:
    """Any TransformerBridge as a model to run.

    The bridge is set to eval mode, and its weights are hashed as they are. Its parameters get no
    gradients afterwards.

    Args:
        name: the model's name, and the default name of its run.
        tokenizer: a fast tokenizer of transformers; default: the bridge's own.
        keep_weights: True if a run keeps the weights in the store; default: their hash alone.
        source: where the weights came from.
        facts: what is known of the loading, added to the facts that the bridge shows.
        described: the configuration, see GeneralConfig; default: the bridge's.

    Raises:
        BadInput: the model reads no token ids, or the tokenizer has ids that the model has not.
    """
    cfg, original = bridge.cfg, bridge.original_model
    check_reads_tokens(cfg, getattr(original, "config", None), name)
    bridge.eval().requires_grad_(False)
    held_by = bridge.tokenizer if tokenizer is None else tokenizer
    d_vocab = int(cfg.d_vocab)
    if held_by is not None:
        check_tokenizer(held_by, d_vocab, name)
    sizes = {size: getattr(cfg, size, None) for size in ("n_heads", "d_head", "d_mlp")}
    sizes["d_mlp"] = None if cfg.attn_only else sizes["d_mlp"]
    is_native = cfg.architecture == "TransformerLensNative"
    if described is None:
        shown = getattr(original, "config", None)
        described = {"bridge": vars(cfg)} if is_native or shown is None else huggingface(shown)
    config = GeneralConfig(
        n_layers=int(cfg.n_layers),
        **{size: value if isinstance(value, int) and value > 0 else None for size, value in sizes.items()},
        d_model=int(cfg.d_model),
        n_ctx=int(cfg.n_ctx),
        d_vocab=d_vocab,
        described=_plain(described),
    )
    state = bridge.state_dict()
    kept = b"".join(stream(state)) if keep_weights else b""
    sha256 = hashlib.sha256(kept).hexdigest() if kept else sha256_of(state)
    norm = str(cfg.normalization_type or "").upper().removesuffix("PRE")
    about = {
        "how": "bridge",
        "architecture": str(cfg.architecture),
        "normalization": norm if norm in ("LN", "RMS") else None,
        "dtype": str(next(bridge.parameters()).dtype).removeprefix("torch."),
        "attention": "native"
        if is_native
        else getattr(getattr(original, "config", None), "_attn_implementation", None),
        "padding": "right",
        "mask": True,
        "causal": _is_causal(bridge),
        "compatibility_mode": bool(getattr(bridge, "compatibility_mode", False)),
        "files": [],
        **(facts or {}),
    }
    return Model(name, config, bridge, kept, sha256, source or about["architecture"], held_by, about)


def huggingface(config: Any) -> dict[str, Any]:
    """A configuration of transformers for GeneralConfig, without the path that it came from."""
    return {"huggingface": {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}}


def check_reads_tokens(cfg: Any, config: Any, name: str) -> None:
    """Refuse a model of sound or images, or one that reads a pair of sequences."""
    kinds = {
        "sound": getattr(cfg, "is_audio_model", False),
        "images": getattr(cfg, "is_visual_model", False),
        "two sequences (an encoder with a decoder)": getattr(config, "is_encoder_decoder", False),
    }
    for what, is_so in kinds.items():
        if is_so:
            raise BadInput(f"{name} reads {what}; actstore runs models that read one sequence of token ids")


def check_tokenizer(tokenizer: Any, d_vocab: int, name: str) -> None:
    """Refuse a tokenizer that has token ids beyond the model's."""
    most = max(tokenizer.get_vocab().values(), default=-1)
    if most >= d_vocab:
        raise BadInput(
            f"the tokenizer has token ids up to {most:,}, and {name} knows {d_vocab:,}: the tokenizer is of another "
            "vocabulary; name the model's own (--tokenizer)"
        )


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of a tokenizer, hexadecimal; the padding and cutting that is set does not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"vocab": tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_causal(bridge: TransformerBridge) -> bool:
    is_causal = str(getattr(bridge.cfg, "attention_dir", "causal")) == "causal"
    return is_causal and bool(getattr(bridge.adapter, "supports_causal_loss", True))


def _plain(value: Any) -> Any:
    """A configuration as plain data for JSON; what is no such data, as text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
