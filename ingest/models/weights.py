"""Weights: read from .pt or safetensors, checked, and written as one canonical safetensors file.

Weights have the names and shapes of a `HookedTransformer` ("blocks.0.attn.W_Q", …), so that the
notebook's checkpoints load unchanged. The sha256 of the canonical file identifies the weights of a
run.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from actstore.errors import BadInput, nearest
from actstore.ingest.models.config import ModelConfig, brief
from actstore.storage.machine import limit_reached
from actstore.storage.refused import needing_room
from actstore.storage.whole import write_whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

BUFFERS = (".mask", ".IGNORE")  # a HookedTransformer saves its causal mask among the weights
DTYPES = ("float32", "float64", "float16", "bfloat16")
STORED = (  # the dtypes of a safetensors file, in the order in which it holds them, and their names in torch
    *(("I64", "int64"), ("F64", "float64"), ("F32", "float32"), ("I32", "int32")),
    *(("BF16", "bfloat16"), ("F16", "float16"), ("I16", "int16"), ("I8", "int8"), ("U8", "uint8"), ("BOOL", "bool")),
)
SUFFIXES = (".safetensors", ".pt", ".pth")


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
    """Copy a bridge's weights, in HookedTransformer form; the inverse of convert_tl_checkpoint."""
    held = bridge.state_dict()
    return {name: _from_linear(held[_bridge_key(name)], name, shape) for name, shape in shapes(config).items()}


def _bridge_key(name: str) -> str:
    """The bridge's key of a weight: `blocks.0.attn.W_Q` → `blocks.0.attn.q.weight`."""
    module, _, weight = name.rpartition(".")
    kind, _, part = weight.partition("_")
    inner = f".{part.lower()}" if module.endswith((".attn", ".mlp")) else ""
    return f"{module}{inner}.{'weight' if kind in ('W', 'w') else 'bias'}"


def _from_linear(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """Undo torch.nn.Linear's [out, in] layout and merged heads; reshape embeddings and vectors."""
    tensor = tensor.detach().clone()
    if name.endswith((".W_Q", ".W_K", ".W_V")):
        n_heads, d_model, d_head = shape
        return tensor.reshape(n_heads, d_head, d_model).transpose(1, 2).contiguous()
    if name.endswith((".W_O", ".W_in", ".W_out", ".W_U")):
        return tensor.T.reshape(shape).contiguous()
    return tensor.reshape(shape)


def canonical(state_dict: Mapping[str, Tensor]) -> bytes:
    """Serialise a state dict as safetensors, with sorted keys and unchanged dtypes."""
    from safetensors.torch import save as to_safetensors

    return to_safetensors({name: state_dict[name].detach().cpu().clone().contiguous() for name in sorted(state_dict)})


def stream(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of `canonical`, tensor by tensor, so that no copy of the whole is made.

    Args:
        metadata: put into the header in this order; the library's own order differs at each call.

    Raises:
        BadInput: a tensor has a dtype that safetensors cannot hold.
    """
    ordered = sorted(state_dict, key=lambda name: (_rank(state_dict[name], name), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in ordered:
        tensor = state_dict[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = STORED[_rank(tensor, name)][0]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    import torch

    for name in ordered:
        flat = state_dict[name].detach().cpu().contiguous().reshape(-1)
        yield memoryview(flat.view(torch.uint8).numpy())


def _rank(tensor: Tensor, name: str) -> int:
    """The place of a tensor's dtype in the order of a safetensors file."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    for rank, (_, known) in enumerate(STORED):
        if dtype == known:
            return rank
    raise BadInput(f"weight {name!r} is {dtype}, which cannot be hashed or kept; load the model in float32")


def sha256_of(state_dict: Mapping[str, Tensor]) -> str:
    """sha256 of the canonical safetensors file of a state dict, hexadecimal."""
    digest = hashlib.sha256()
    for piece in stream(state_dict):
        digest.update(piece)
    return digest.hexdigest()


def save(state_dict: Mapping[str, Tensor], path: str | Path) -> str:
    """Write weights to a canonical safetensors file, atomically.

    Args:
        state_dict: in HookedTransformer names, see `state`; float16 tensors take half the bytes.

    Returns:
        sha256 of the file, hexadecimal: the model's `weights_sha256`.
    """
    weights = canonical(state_dict)
    replace(Path(path), weights)
    return hashlib.sha256(weights).hexdigest()


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even across a power cut.

    Raises:
        NoRoom: the disk is full.
        Unsupported: the file system has no fsync.
    """
    with needing_room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda under_way: under_way.write_bytes(content))  # the file stays writable


def check_weights(found: Mapping[str, Tensor], config: ModelConfig, source: str) -> dict[str, Tensor]:
    """Check a state dict against a configuration, and drop a HookedTransformer's buffers.

    Raises:
        BadInput: a weight is missing or unknown, has another shape than the configuration's, is not
            dense, has a dtype outside DTYPES, or is not finite in float32.
    """
    expected = shapes(config)
    held = {key: tensor for key, tensor in found.items() if not key.endswith(BUFFERS)}
    for key in held:
        if key not in expected:
            raise BadInput(f"{source}: unknown weight {brief(key)}{nearest(key, expected)}; {_expectation(config)}")
    for key, shape in expected.items():
        if key not in held:
            raise BadInput(f"{source}: weight {key!r} is missing; {_expectation(config)}")
        _check_tensor(held[key], shape, f"{source}: weight {key!r}")
    return held


def _check_tensor(tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    check_kind(tensor, what)
    if tuple(tensor.shape) != shape:
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise BadInput(f"{what} is {got}, which the configuration makes float {list(shape)}; mend one of them")
    check_finite(tensor, what)


def check_kind(tensor: Tensor, what: str) -> None:
    """Refuse a tensor without numbers, one that is not dense, and a dtype outside DTYPES.

    Raises:
        BadInput: begins with `what`.
    """
    import torch

    if tensor.is_meta:
        raise BadInput(
            f"{what} is a meta tensor, which has a shape and no numbers; save the model once its weights are loaded"
        )
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise BadInput(f"{what} is a {layout} tensor; save a dense one, as its `.to_dense()` is")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise BadInput(f"{what} is {dtype} {list(tensor.shape)}; save it as one of {', '.join(DTYPES)}")


def check_finite(tensor: Tensor, what: str) -> None:
    """Refuse numbers that are NaN or infinite in float32.

    Raises:
        BadInput: begins with `what`.
    """
    import torch

    if n_bad := int((~torch.isfinite(tensor.float())).sum()):
        raise BadInput(
            f"{what} holds {n_bad} NaN or infinite numbers in float32, in which models run; take another checkpoint"
        )


def _expectation(config: ModelConfig) -> str:
    return (
        f"expected the state dict of a HookedTransformer with {config.n_layers} layers "
        "(embed.W_E, pos_embed.W_pos, blocks.N.…, ln_final.w, ln_final.b, unembed.W_U, unembed.b_U)"
    )


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint: a `HookedTransformer` state dict as .pt, or safetensors.

    A .pt is unpickled with weights_only, so it cannot run code.

    Raises:
        BadInput: the file is missing, of another kind, cut short or compressed, or pickles other
            things than tensors.
        LimitReached: there is too little memory for it.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise BadInput(f"{path} is no checkpoint: expected a file in {', '.join(SUFFIXES)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot read a checkpoint: {error.strerror}") from None
    return parse(content, str(path)) if path.suffix == ".safetensors" else _unpickle(content, path)


def _unpickle(content: bytes, path: Path) -> dict[str, Tensor]:
    import torch

    wanted = "expected the state dict of a HookedTransformer, as torch.save(model.state_dict(), …) writes it"
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as packed:
                n_bytes = sum(part.file_size for part in packed.infolist())
            if n_bytes > len(content):
                raise BadInput(f"{path} is compressed, {n_bytes:,} bytes in {len(content):,}; {wanted}")
        with warnings.catch_warnings(action="ignore"):  # the error below says the same in one line
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except BadInput:
        raise
    except pickle.UnpicklingError:
        raise BadInput(f"{path} is damaged, or a pickle of code, which was not run; {wanted}") from None
    except Exception as error:  # broken bytes make the unpickler raise anything
        if reached := limit_reached(error, f"cannot load {path}"):
            raise reached from None
        raise BadInput(f"{path} is cut short or no torch.save file ({type(error).__name__}); {wanted}") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        inside = f"a dict of {brief(list(found)[:3])}, …" if isinstance(found, dict) else type(found).__name__
        raise BadInput(f"{path} holds {inside}; {wanted}")
    for key, tensor in found.items():
        if not isinstance(key, str):
            raise BadInput(f"{path} holds a tensor under {brief(key)}, which is no text; {wanted}")
        dense = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_nested
        if dense and tensor.numel() * tensor.element_size() > len(content):  # one number, seen many times
            raise BadInput(f"{path}: weight {brief(key)} has {tensor.numel():,} numbers, more than its file; {wanted}")
    return dict(found)


def parse(weights: bytes, source: str) -> dict[str, Tensor]:
    """Parse the tensors of a safetensors file; `source` names the file in messages.

    Raises:
        BadInput: the bytes are not a safetensors file.
    """
    from safetensors.torch import load as parse_safetensors

    try:
        return parse_safetensors(weights)
    except SafetensorError as error:
        raise BadInput(f"{source} is cut short or no safetensors file ({error}); get it again") from None
    except KeyError as error:  # a dtype that this torch lacks
        raise BadInput(f"{source} holds numbers of dtype {error}; save them as one of {', '.join(DTYPES)}") from None
