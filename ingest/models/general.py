"""Models that are no path-finding system: of transformers, and native ones of any configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actstore.errors import BadInput
from actstore.ingest.models.config import as_text
from actstore.ingest.models.model import Model, from_bridge
from actstore.ingest.models.native import FIELDS, SECTION, boot, described, fill, put
from actstore.ingest.models.pretrained import (
    find_checkpoint,
    find_config,
    hashed,
    load_checkpoint,
    load_tokenizer,
    of_config,
    versions,
)
from actstore.ingest.models.weights import parse


def transformers_model(path: Path, name: str, asked: dict[str, Any], keep_weights: bool) -> Model:
    """A model of transformers, from a folder or a .gguf file.

    Args:
        asked: the arguments of `load`, which go into the facts.

    Raises:
        BadInput: see `load`.
    """
    seed = asked["untrained"]
    found = find_checkpoint(path) if seed is None else find_config(path)
    files = found.hashes()
    loaded = load_checkpoint(found, asked["model"], seed, asked["tokenizer"])
    how = "untrained" if seed is not None else "hub" if asked["hub"] else "gguf" if found.gguf else "folder"
    about: dict[str, Any] = {"how": how, "asked": asked, "files": files, "versions": versions(found.gguf is not None)}
    about |= {"headless": True} if loaded.headless else {}
    stem = name.removesuffix(".gguf")
    model = from_bridge(
        loaded.bridge,
        named(stem, seed),
        loaded.tokenizer,
        keep_weights=keep_weights,
        source=as_text(found.gguf or name),
        facts=about,
        described={"huggingface": loaded.config},
    )
    model.tokenizer = loaded.tokenizer  # and not the bridge's copy, which may have got a token for padding
    return model


def native_model(weights: Path | None, yaml: Path, asked: dict[str, Any], keep_weights: bool) -> Model:
    """A native model of any TransformerLens configuration.

    Args:
        weights: the checkpoint; None for random weights of the seed asked["untrained"].
        asked: the arguments of `load`, which go into the facts.

    Raises:
        BadInput: see `load`.
    """
    seed = asked["untrained"]
    fields, beside = described(yaml)
    bridge = boot(fields, seed or 0, str(yaml))
    if weights is not None:
        fill(bridge, weights)
    folder = Path(asked["tokenizer"]) if asked["tokenizer"] else beside
    read = load_tokenizer(folder) if folder else None
    files = [hashed(path) for path in (yaml, *filter(None, [weights]))]
    about = {"how": "untrained" if weights is None else "native", "asked": asked, "files": files}
    held = weights or yaml
    return from_bridge(
        bridge,
        named(held.stem, seed),
        read,
        keep_weights=keep_weights,
        source=as_text(held.name),
        facts=about,
        described={SECTION: fields},
    )


def from_kept(row: Mapping[str, Any], weights: bytes, device: str = "cpu") -> Model:
    """Build a model from its row of `models` and the weights that a store kept.

    Args:
        weights: the bytes of models/SHA256.safetensors.

    Raises:
        BadInput: the weights do not fit the row's configuration; or the bridge was in compatibility
            mode, which a row does not describe fully.
    """
    facts, name = json.loads(row["facts"]), row["model"]
    if facts["compatibility_mode"]:
        raise BadInput(f"{name} was a bridge in compatibility mode, which cannot be built again from its weights")
    shape = json.loads(row["config"])
    if "huggingface" in shape:
        bridge = of_config(shape["huggingface"], name)
    else:
        told = shape.get(SECTION) or shape["bridge"]
        fields = {key: value for key, value in told.items() if key in FIELDS}
        bridge = boot(fields, 0, name)
    put(bridge, parse(weights, f"the weights of {name}"), f"the weights of {name}")
    model = from_bridge(bridge, name, keep_weights=True, source=row["source"], facts=facts, described=shape)
    model.bridge.to(device, print_details=False)
    return model


def named(name: str, untrained: int | None) -> str:
    """A model's name as a run's: letters, digits and . _ = , + -."""
    plain = re.sub(r"[^A-Za-z0-9._=,+-]", "-", as_text(name)).lstrip("._=,+-") or "model"
    return plain if untrained is None else f"{plain}-untrained{untrained or ''}"
