"""Models of transformers: a folder, a GGUF file, or a name of the hub → a TransformerBridge.

Nothing is fetched unless `fetched` is called: every other loading is offline.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.errors import BadInput, NotStored
from actstore.ingest.models.config import brief
from actstore.ingest.models.weights import check_finite
from actstore.storage.machine import limit_reached

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

CONFIG = "config.json"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt"),
)
WANTED = (CONFIG, "*.safetensors", "*.safetensors.index.json", *TOKENIZER)
CHUNK = 1 << 24  # bytes that are hashed at a time
MOST_LAYERS = 1_000  # a layer takes milliseconds to build, whatever its width
LONGEST_CONFIG = 10_000_000  # bytes; with names of 20,000 classes, a megabyte


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model of transformers.

    Attributes:
        folder: where they lie.
        gguf: name of the GGUF file that holds weights, configuration and tokenizer; else None.
        files: names of all files that are read.
    """

    folder: Path
    gguf: str | None
    files: tuple[str, ...]

    def hashes(self) -> list[dict[str, Any]]:
        """Name, bytes and sha256 of each file."""
        return [hashed(self.folder / name) for name in self.files]


def find_checkpoint(path: Path) -> Checkpoint:
    """Find the files of a model in a folder, or of a .gguf file.

    Raises:
        BadInput: the folder holds no model, or one that is not read here.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise BadInput(
                f"no file {path}; give the path of a .gguf file, or of a folder with {CONFIG} and *.safetensors"
            )
        return Checkpoint(path.parent, path.name, (path.name,))
    held = sorted(file.name for file in path.iterdir() if file.is_file())
    weights = [name for name in held if name.endswith(".safetensors")]
    ggufs = [name for name in held if name.endswith(".gguf")]
    if CONFIG in held and weights:
        index = [name for name in held if name.endswith(".safetensors.index.json")]
        for name in index if "model.safetensors" not in held else ():
            _check_index(path / name, weights)
        return Checkpoint(path, None, (CONFIG, *weights, *index, *(name for name in TOKENIZER if name in held)))
    if len(ggufs) == 1:
        return Checkpoint(path, ggufs[0], (ggufs[0],))
    if ggufs:
        raise BadInput(f"{path} holds {len(ggufs)} GGUF files ({', '.join(ggufs[:3])}); give the path of one")
    if CONFIG in held and any(name.endswith((".bin", ".pt", ".pth")) for name in held):
        raise BadInput(
            f"{path} holds its weights as a pickle, which can run code; save them as safetensors (save_pretrained)"
        )
    missing = "no *.safetensors" if CONFIG in held else f"no {CONFIG}"
    raise BadInput(
        f"{path} is no model: it holds {missing} and no *.gguf; give the folder of a model of transformers "
        f"({CONFIG}, *.safetensors, tokenizer.json)"
    )


def _check_index(index: Path, held: list[str]) -> None:
    """Refuse an index that names shards which do not lie beside it.

    Args:
        held: names of the *.safetensors beside the index.

    Raises:
        BadInput: names the first such shard; or the file is no index.
    """
    try:
        shards = {*json.loads(index.read_bytes())["weight_map"].values()}
    except Exception as error:  # no JSON, many levels, other types
        raise BadInput(f"{index} is no index of shards ({_said(error, str(index))}); get it again") from None
    for shard in sorted(shards - {*held}, key=str):
        raise BadInput(f"{index} names the shard {brief(shard)}, which does not lie beside it; get the missing files")


def find_config(path: Path) -> Checkpoint:
    """As `find_checkpoint`, for random weights: the folder needs no weights.

    Raises:
        BadInput: the folder holds no configuration.
    """
    if path.is_dir() and (path / CONFIG).is_file():
        return Checkpoint(path, None, (CONFIG, *(name for name in TOKENIZER if (path / name).is_file())))
    return find_checkpoint(path)


def fetched(name: str, revision: str | None) -> tuple[Path, str]:
    """Fetch a model from the hub into its cache; the only function that uses the network.

    Returns:
        The folder, and the hash of the commit that the revision means.

    Raises:
        NotStored: the hub has no such model, or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(WANTED)))
    except Exception as error:  # each of the hub's own errors is of several kinds at once
        at = f" at revision {revision}" if revision else ""
        raise NotStored(
            f"the hub gives no model {name!r}{at} ({_said(error, name)}); give the folder of one that is here"
        ) from None
    return folder, folder.name


@dataclass(frozen=True)
class Loaded:
    """A model of transformers in a bridge.

    Attributes:
        tokenizer: as it was published; None if there is none.
        config: the configuration, plain data.
        headless: True if the files hold no weights from the last residual stream to logits, which
            are zeros then.
    """

    bridge: TransformerBridge
    tokenizer: Any
    config: dict[str, Any]
    headless: bool


def load_checkpoint(found: Checkpoint, source: str, seed: int | None = None, tokenizer: str | None = None) -> Loaded:
    """Load a model on the CPU, in float32, with eager attention; offline.

    Args:
        source: what the user named, for error messages.
        seed: random weights of this seed, instead of those in the files.
        tokenizer: folder of a tokenizer; default: the model's own.

    Raises:
        BadInput: the files are damaged or incomplete, a weight is not finite, or TransformerLens
            does not know the architecture.
        LimitReached: there is too little memory for it.
    """
    with offline():
        config = _config(found, source)
        own = found.folder if tokenizer is None else Path(tokenizer)
        read = _tokenizer(own, found.gguf if tokenizer is None else None, tokenizer is not None)
        model, headless = _weights(found, config, source) if seed is None else (_random(config, seed, source), False)
        plain = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
        return Loaded(_bridge(model, read, source), read, plain, headless)


def of_config(config: Mapping[str, Any], source: str) -> TransformerBridge:
    """A bridge of a configuration that was written down, with random weights."""
    from transformers import AutoConfig

    with offline():
        rest = dict(config)
        made = AutoConfig.for_model(rest.pop("model_type"), **rest)
        made.architectures = config.get("architectures")
        return _bridge(_random(made, 0, source), None, source)


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a folder; offline.

    Raises:
        BadInput: the folder holds no tokenizer.
    """
    with offline():
        return _tokenizer(folder, None, True)


@contextmanager
def offline() -> Iterator[None]:
    """No request reaches the hub, and transformers prints nothing, within this context."""
    from huggingface_hub import constants
    from transformers.utils import logging as said

    before = (
        os.environ.get("HF_HUB_OFFLINE"),
        constants.HF_HUB_OFFLINE,
        said.get_verbosity(),
        said.is_progress_bar_enabled(),
    )
    os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE = "1", True
    said.set_verbosity(logging.CRITICAL)
    said.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # a GGUF's bar takes no such setting
            yield
    finally:
        told, constants.HF_HUB_OFFLINE, verbosity, is_shown = before
        if told is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = told
        said.set_verbosity(verbosity)
        if is_shown:
            said.enable_progress_bar()


def versions(gguf: bool) -> dict[str, str]:
    """Versions of the packages that read a model's files."""
    return {name: version(name) for name in ("transformers", "tokenizers", *["gguf"] * gguf)}


def _config(found: Checkpoint, source: str) -> Any:
    from transformers import AutoConfig

    if found.gguf and find_spec("gguf") is None:
        raise BadInput(f"{source} is a GGUF file, which the package gguf reads; install it (pip install gguf)")
    if not found.gguf and (n_bytes := (found.folder / CONFIG).stat().st_size) > LONGEST_CONFIG:
        raise BadInput(f"{found.folder / CONFIG} has {n_bytes:,} bytes, and is no configuration; get it again")
    named = {"gguf_file": found.gguf} if found.gguf else {}
    try:
        config = AutoConfig.from_pretrained(found.folder, local_files_only=True, trust_remote_code=False, **named)
    except Exception as error:  # JSON, keys, code of its own: each fails in its own way
        raise BadInput(f"{source} is no model that transformers reads ({_said(error, source)})") from None
    n_layers = getattr(config, "num_hidden_layers", None)
    if isinstance(n_layers, int) and n_layers > MOST_LAYERS:
        raise BadInput(
            f"{source} has {n_layers:,} layers by its configuration, and a model has {MOST_LAYERS:,} at most"
        )
    config.use_cache = False  # one pass needs no keys and values of the one before
    return config


def _class_of(config: Any, source: str) -> Any:
    """The class of transformers that loads an architecture which a bridge knows."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config
    from transformer_lens.model_bridge.sources.transformers.helpers import get_hf_model_class_for_architecture

    try:
        return get_hf_model_class_for_architecture(determine_architecture_from_hf_config(config))
    except Exception:  # no architecture, or one that is no text
        known = getattr(config, "architectures", None) or getattr(config, "model_type", "none")
        named = (
            ", ".join(known) if isinstance(known, list) and all(isinstance(one, str) for one in known) else str(known)
        )
        raise BadInput(
            f"{source} is of architecture {named}, which TransformerLens does not know; it knows {len(SUPPORTED_ARCHITECTURES)}, "
            "such as GPT2LMHeadModel, LlamaForCausalLM, Qwen2ForCausalLM and BertForMaskedLM"
        ) from None


def _weights(found: Checkpoint, config: Any, source: str) -> tuple[Any, bool]:
    """The model with the weights of its files, and whether these lack the head."""
    import torch

    kind = _class_of(config, source)
    _refuse_complex(found, source)
    named = {"gguf_file": found.gguf} if found.gguf else {"use_safetensors": True}
    try:
        model, about = kind.from_pretrained(
            found.folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **named,
        )
    except Exception as error:  # damaged files, shapes that do not fit
        why = _said(error, source)
        if "ignore_mismatched_sizes" in why:  # transformers refers to a report that it has not printed
            why = "its weights have other shapes than its configuration's"
        raise BadInput(f"{source} cannot be loaded ({why}); get its files again") from None
    for name, parameter in model.named_parameters():
        check_finite(parameter, f"{source}: weight {name!r}")
    missing = sorted(about.get("missing_keys") or ())  # transformers draws them at random, and warns at most
    within = f"{model.base_model_prefix}."
    if type(model).__name__ in (config.architectures or ()) or any(name.startswith(within) for name in missing):
        if missing:
            raise BadInput(
                f"{source} lacks {len(missing)} weights that its configuration needs, the first {missing[0]!r}"
            )
        return model, False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in missing:
                parameter.zero_()
    return model, bool(missing)


def _refuse_complex(found: Checkpoint, source: str) -> None:
    """Refuse complex numbers, of which transformers would take the real part without a word.

    Raises:
        BadInput: names the first such weight.
    """
    from safetensors import SafetensorError, safe_open

    for file in (file for file in found.files if file.endswith(".safetensors")):
        try:
            with safe_open(found.folder / file, framework="numpy") as held:
                kinds = {name: str(held.get_slice(name).get_dtype()) for name in held.keys()}  # noqa: SIM118, no mapping
        except (SafetensorError, OSError):  # transformers says what is wrong with the file
            continue
        if wrong := [name for name, dtype in kinds.items() if dtype.startswith("C")]:
            raise BadInput(
                f"{source} holds {len(wrong)} weights of complex numbers, the first {brief(wrong[0])} in {file}; actstore runs "
                "models of real numbers: save it as float32"
            )


def _random(config: Any, seed: int, source: str) -> Any:
    import torch

    kind = _class_of(config, source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make = kind.from_config if hasattr(kind, "from_config") else kind
        return make(config, dtype=torch.float32, attn_implementation="eager")


def _tokenizer(folder: Path, gguf: str | None, needed: bool) -> Any:
    from transformers import AutoTokenizer

    if not needed and not gguf and not any((folder / name).is_file() for name in TOKENIZER):
        return None
    try:
        if not folder.is_dir():
            raise OSError("no such folder")
        named = {"gguf_file": gguf} if gguf else {}
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **named)
    except BaseException as error:  # a panic of the library is no Exception
        why = _said(error, str(folder))
        raise BadInput(
            f"{folder} holds no tokenizer that transformers reads ({why}); give the folder of one (--tokenizer)"
        ) from None


def _bridge(model: Any, tokenizer: Any, source: str) -> TransformerBridge:
    """Wrap a model, which stays in place; the tokenizer that was read is not changed."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config

    model.eval()
    try:
        if tokenizer is None:
            architecture = determine_architecture_from_hf_config(model.config)
            return build_bridge_from_module(model, architecture, hf_config=model.config, model_name=source)
        return TransformerBridge.boot_transformers(
            source, hf_model=model, tokenizer=copy.deepcopy(tokenizer), device="cpu"
        )
    except Exception as error:
        raise BadInput(f"{source}: TransformerLens builds no bridge to it ({_said(error, source)})") from None


def hashed(path: Path) -> dict[str, Any]:
    """Name, bytes and sha256 of a file."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _said(error: BaseException, source: str) -> str:
    """An error's kind and its first words, on one line.

    An error that is no failure of `source`, such as Ctrl-C, is raised again.

    Raises:
        LimitReached: there is too little memory for `source`.
    """
    if reached := limit_reached(error, f"cannot load {source}"):
        raise reached from None
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"
