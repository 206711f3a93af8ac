"""The model that was asked for: by name or path, as that of a stored run, or as an object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.errors import BadInput
from actstore.ingest.jobs.stored import model_of, model_row_of, shape_of_row
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.general import named
from actstore.ingest.models.load import check_device, find, load, of_system, task_of
from actstore.ingest.models.model import Model, from_bridge, tokenizer_hash
from actstore.ingest.models.native import system_of
from actstore.ingest.models.pretrained import load_tokenizer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Loading:
    """How a model is loaded; see `models.load`."""

    config: str | None = None
    checkpoint: int | None = None
    hub: bool = False
    revision: str | None = None
    untrained: int | None = None
    keep_weights: bool = False
    tokenizer: Any = None

    def refuse(self, source: str, *allowed: str) -> None:
        """Refuse the options that have no meaning for this source of a model."""
        for name, value in vars(self).items():
            if name not in allowed and value not in (None, False):
                raise BadInput(f"got --{name.replace('_', '-')}, and {source}; leave it out")


@dataclass(frozen=True)
class Chosen:
    """A model, before its weights are read.

    Attributes:
        task: `trees` for a path-finding system, `tokens` for any other model.
        name: the model's name.
        shape: a path-finding system's configuration; None for any other model.
        load: reads the weights.
        tokenizer_sha256: hash of a stored model's tokenizer; None where the model itself tells it.
    """

    task: str
    name: str
    shape: ModelConfig | None
    load: Callable[[], Model]
    tokenizer_sha256: str | None = None


def choose(
    store: Path,
    model: str | Path | Model | TransformerBridge | None,
    model_of_run: str | None,
    device: str,
    how: Loading,
) -> Chosen:
    """Find the model that was asked for.

    Args:
        model: a name, a path, a Model, or a TransformerBridge.
        model_of_run: a run of the store, whose model is taken instead.

    Raises:
        NotStored: there is no such model, checkpoint or run.
        BadInput: no model was named, or two were, or an option has no meaning for it.
    """
    if (model is None) == (model_of_run is None):
        raise BadInput(
            "name a model, by --model (`actstore models list` names those there are) or as that of a stored run (--model-of), "
            "and not by both"
        )
    check_device(device)
    if model_of_run is not None:
        return _of_run(store, model_of_run, device, how)
    if isinstance(model, str | Path):
        options = vars(how)
        if task_of(str(model), how.config, hub=how.hub) == "tokens" or how.untrained is not None:
            loaded = load(str(model), device=device, **options)
            return _of(loaded)
        found = find(str(model), how.config, how.checkpoint)
        return Chosen("trees", found.name, found.config, partial(load, str(model), device=device, **options))
    if isinstance(model, Model):
        how.refuse("the model is loaded already")
        return _of(model)
    how.refuse("the model is a bridge", "keep_weights", "tokenizer")
    name = getattr(getattr(model, "cfg", None), "model_name", None)
    if not hasattr(model, "run_with_hooks") or name is None:
        raise BadInput(f"got a model of type {type(model).__name__}; give a name, a path or a TransformerBridge")
    if (config := system_of(model)) is not None:
        how.refuse("the model is a path-finding system in a bridge")
        return _of(of_system(model, config))
    plain = named(Path(str(name)).name, None)
    return _of(from_bridge(model, plain, _tokenizer(how.tokenizer), keep_weights=how.keep_weights))


def _of_run(store: Path, run: str, device: str, how: Loading) -> Chosen:
    """The model of a stored run."""
    how.refuse("--model-of takes the model as the store keeps it", "tokenizer")
    row = model_row_of(store, run)
    shape = shape_of_row(row)
    if shape is not None:
        how.refuse("a path-finding system has its own vocabulary")
        return Chosen("trees", row["model"], shape, partial(model_of, store, run, device))

    def read() -> Model:
        held = model_of(store, run, device)
        if how.tokenizer is None:
            return held
        tokenizer = _tokenizer(how.tokenizer)
        if tokenizer_hash(tokenizer) != row["tokenizer"]:
            raise BadInput(f"the tokenizer is another one than that of run {run!r}; name the model's own (--tokenizer)")
        return replace(held, tokenizer=tokenizer)

    return Chosen("tokens", row["model"], None, read, row["tokenizer"])


def _tokenizer(given: Any) -> Any:
    """A tokenizer from its folder; an object as it is."""
    return load_tokenizer(Path(given)) if isinstance(given, str | Path) else given


def _of(model: Model) -> Chosen:
    """A model that is loaded already."""
    return Chosen(model.task, model.name, model.config if model.task == "trees" else None, lambda: model)
