"""Native models of any TransformerLens configuration, described by a YAML file.

The YAML has one section, `transformer_lens`, whose keys are those of a TransformerBridgeConfig:

    transformer_lens: {n_layers: 2, d_model: 64, n_heads: 4, d_head: 16, n_ctx: 128, d_vocab: 500,
                       act_fn: gelu, attn_only: true}
    tokenizer: my-tokenizer  # a folder, as seen from the YAML; optional
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.errors import BadInput, nearest
from actstore.ingest.models.config import MODEL_FIELDS, ModelConfig, brief, mapping_of, read_text, there_are
from actstore.ingest.models.weights import BUFFERS, check_finite, check_kind, read_state
from actstore.storage.machine import limit_reached

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

SECTION = "transformer_lens"
SIZES = ("n_layers", "d_model", "n_heads", "d_head", "n_ctx", "d_vocab")  # a configuration states all of them
MOST = {"n_layers": 1_000}  # a layer takes a tenth of a second to build, whatever its width
MOST_OF_OTHERS = 10_000_000
FIELDS = (  # those that TransformerLens' native model reads; any other would be ignored without a word
    *SIZES,
    *("act_fn", "attention_dir", "attn_only", "attn_scale", "attn_scores_soft_cap", "d_mlp", "d_vocab_out", "eps"),
    *("final_rms", "gated_mlp", "init_mode", "initializer_range", "n_key_value_heads", "normalization_type"),
    *("output_logits_soft_cap", "positional_embedding_type", "rope_scaling", "rotary_base", "rotary_dim"),
    "use_attn_scale",
)


def build(config: ModelConfig, seed: int) -> TransformerBridge:
    """Initialise a path-finding system in train mode, on the CPU, from a seed."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    sizes = {name: getattr(config, name) for name in MODEL_FIELDS}
    bridge = TransformerBridge.boot_native(
        TransformerBridgeConfig(
            **sizes,
            d_vocab=config.d_vocab,
            normalization_type="LN",
            seed=seed,
            architecture="TransformerLensNative",
        ),
        device="cpu",
    )
    bridge.path_finding_system = config  # see system_of
    return bridge


def system_of(bridge: Any) -> ModelConfig | None:
    """The configuration of a bridge that `build` made; None of any other model."""
    config = getattr(bridge, "path_finding_system", None)
    return config if isinstance(config, ModelConfig) else None


def is_native(yaml: Path) -> bool:
    """True if a YAML describes a native model, and no path-finding system.

    Raises:
        BadInput: the file cannot be read, or is no YAML.
    """
    return SECTION in mapping_of(read_text(yaml), str(yaml))


def described(yaml: Path) -> tuple[dict[str, Any], Path | None]:
    """The fields of a native model's YAML, and the folder of its tokenizer.

    Raises:
        BadInput: a key is missing or unknown.
    """
    whole = mapping_of(read_text(yaml), str(yaml))
    fields = whole.get(SECTION)
    for key in whole:
        if key not in (SECTION, "tokenizer"):
            raise BadInput(f"{yaml}: unknown key {brief(key)}; there are {SECTION} and tokenizer")
    if not isinstance(fields, Mapping):
        raise BadInput(f"{yaml}: {SECTION!r} is {type(fields).__name__}; expected the keys {', '.join(FIELDS)}")
    for key in fields:
        if key not in FIELDS:
            raise BadInput(
                f"{yaml}: unknown key {brief(f'{SECTION}.{key}')}{nearest(str(key), FIELDS)}; {there_are(FIELDS)}"
            )
    for key in SIZES:
        most = MOST.get(key, MOST_OF_OTHERS)
        if type(fields.get(key)) is not int or not 1 <= fields[key] <= most:
            raise BadInput(
                f"{yaml}: {SECTION}.{key} is {brief(fields.get(key))}; it is a whole number from 1 to {most:,}"
            )
    tokenizer = whole.get("tokenizer")
    return dict(fields), None if tokenizer is None else yaml.parent / str(tokenizer)


def boot(fields: Mapping[str, Any], seed: int, source: str) -> TransformerBridge:
    """A native model with random weights; one seed gives one set of weights.

    Raises:
        BadInput: TransformerLens cannot build such a model.
        LimitReached: there is too little memory for it.
    """
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    given = {"act_fn": "gelu", **fields}
    try:
        config = TransformerBridgeConfig(**given, seed=seed, architecture="TransformerLensNative")
        return TransformerBridge.boot_native(config, device="cpu")
    except Exception as error:  # each wrong field fails in its own way
        if reached := limit_reached(error, f"cannot build the model of {source}"):
            raise reached from None
        said = " ".join(str(error).split())[:300]
        raise BadInput(f"{source}: TransformerLens builds no such model ({type(error).__name__}: {said})") from None


def fill(bridge: TransformerBridge, path: Path) -> None:
    """Load a checkpoint into a native model.

    Args:
        path: .safetensors or .pt, in the names of a HookedTransformer ("blocks.0.attn.W_Q") or of a
            bridge ("blocks.0.attn.q.weight").

    Raises:
        BadInput: the checkpoint cannot be read, or does not fit the model.
    """
    put(bridge, read_state(path), str(path))


def put(bridge: TransformerBridge, found: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a bridge; see `fill`."""
    import torch
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

    held = {key: tensor for key, tensor in found.items() if not key.endswith(BUFFERS)}
    for key, tensor in held.items():
        check_kind(tensor, f"{source}: weight {brief(key)}")
    held = {key: tensor.float() for key, tensor in held.items()}
    if "embed.W_E" in held:
        held = convert_tl_checkpoint(held, bridge.cfg)
    expected = bridge.state_dict()
    for key, tensor in expected.items():
        if key not in held:
            if key == "unembed.bias" and not torch.any(tensor):
                continue  # a bridge adds this offset of zeros to a model that has none
            raise BadInput(f"{source}: weight {key!r} is missing; the configuration needs it")
        if held[key].shape != tensor.shape:
            got = f"{list(held[key].shape)}, and the configuration makes it {list(tensor.shape)}"
            raise BadInput(f"{source}: weight {key!r} has the shape {got}; mend one of them")
        check_finite(held[key], f"{source}: weight {key!r}")
    for key in held:
        if key not in expected:
            raise BadInput(
                f"{source}: unknown weight {brief(key)}{nearest(key, expected)}; the configuration has none of it"
            )
    bridge.load_state_dict(held, strict=False)
