"""From the arguments of `actstore ingest` to a job."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from actstore.errors import BadInput
from actstore.ingest.jobs.job import Ingest, check_batch_size, draft
from actstore.ingest.models.config import ModelConfig, there_are
from actstore.ingest.models.load import check_device, find, load
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.variants import vary
from actstore.storage.at import place
from actstore.writing.committed import check_plan, committed_datasets


def prepare(
    store: str | Path,
    model: str | None = None,
    config: str | None = None,
    trees: int | None = None,
    distribution: str | None = None,
    depths: str | None = None,
    nodes: int | None = None,
    seed: int | None = None,
    dataset: str | None = None,
    run: str | None = None,
    sites: str | None = None,
    batch_size: int = 128,
    device: str = "cpu",
    checkpoint: int | None = None,
    variant: str | None = None,
    prompt: str = "task",
    samples: int | None = None,
    wait: float = 10.0,
    model_of: str | None = None,
) -> Ingest:
    """Turn the arguments of `actstore ingest` into a job; nothing is written.

    Args:
        trees, distribution, depths, nodes, seed: default: those of the stored set `dataset`, else
            10,000 trees of seed 0 from the model's own distribution, with as many nodes as the
            model has labels.
        depths: goal depths of `deep` trees, `1-15` or `3,5,7`.
        sites: names separated by commas, see `site_specs`, or `none`.
        checkpoint: a step of the model's training, see `models.load`.
        variant: one of variants.CHANGES; changes the stored set `dataset`.
        prompt, samples, wait: see Ingest.
        model_of: takes the model of this stored run, with the store's own weights; instead of
            `model`.

    Raises:
        BadInput: an argument has no meaning, or the model cannot take these trees.
        NotStored: there is no such model or checkpoint.
    """
    check_batch_size(batch_size)
    for option, name in (("--run", run), ("--dataset", dataset)):
        if name == "":
            raise BadInput(f"got an empty name for {option}; give one, or leave {option} out")
    store = place(store)
    if (model is None) == (model_of is None):
        raise BadInput(
            "name a model, by --model (`actstore models list` names those there are) or as that of a stored run (--model-of), "
            "and not by both"
        )
    if model_of is not None:
        name, shape = _model_of(store, model_of, config, checkpoint)
    else:
        found = find(str(model), config, checkpoint)
        name, shape = found.name, found.config
    defaults = {"distribution": shape.system, "n_trees": 10_000, "seed": 0, "n_nodes": shape.n_nodes}
    there = committed_datasets(store)
    stored = there.get(dataset, {}) if dataset else {}
    given: dict[str, Any] = {
        "distribution": distribution,
        "n_trees": trees,
        "seed": seed,
        "n_nodes": nodes,
        "depths": _parse_depths(depths),
    }
    chosen: dict[str, Any] = {
        key: value if value is not None else stored.get(key, defaults.get(key)) for key, value in given.items()
    }
    if chosen["depths"] is not None:
        chosen["depths"] = tuple(chosen["depths"])
    chosen |= {key: stored.get(key) for key in ("trees_per_shard", "variant_of", "change")}
    chosen_set = TreeSet(**chosen, name=dataset)
    if variant:
        chosen_set = _variant(there, chosen_set, variant)
    if not chosen_set.trees_per_shard:  # a set that is stored keeps its batches
        stored = there.get(chosen_set.row()["dataset"], {})
        chosen_set = replace(chosen_set, trees_per_shard=stored.get("trees_per_shard"))
    names = _parse_sites(sites)
    plan, _ = draft(name, shape, chosen_set, run, names, prompt, samples)
    check_device(device)
    check_plan(store, plan)
    if model_of is not None:
        from actstore.ingest.jobs import stored as jobs_stored

        loaded = jobs_stored.model_of(store, model_of, device)
    else:
        loaded = load(str(model), config, device, checkpoint)
    return Ingest(store, loaded, chosen_set, run, names, batch_size, prompt=prompt, samples=samples, wait=wait)


def _model_of(store: Path, run: str, config: str | None, checkpoint: int | None) -> tuple[str, ModelConfig]:
    """The name and the shape of the model of a stored run."""
    from actstore.ingest.jobs.stored import shape_of

    if config or checkpoint is not None:
        raise BadInput("--model-of takes the model as the store keeps it; leave --config and --checkpoint out")
    return shape_of(store, run)


def _parse_sites(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if "none" in names and len(names) > 1:
        raise BadInput(f"got --sites {text}; none stands alone, for a run without activations")
    return [] if names == ["none"] else names


def _variant(there: Collection[str], original: TreeSet, change: str) -> TreeSet:
    """The variant of a stored set, one of those named.

    Raises:
        BadInput: the set is not stored or is itself a variant, or the change is unknown.
    """
    if original.name is None or original.name not in there:
        named = f"no set {original.name!r} is stored" if original.name else "no set was named"
        raise BadInput(
            f"--variant {change} is made from a stored set of trees, and {named} (--dataset); "
            f"{there_are(list(there))}: name one, or ingest it first, without --variant"
        )
    if original.variant_of:
        raise BadInput(f"{original.name} is a variant of {original.variant_of} already; name the drawn set (--dataset)")
    vary(original.drawn(0, 0).trees, change, original.seed, 0)  # refuses what is no change
    return replace(original, name=f"{original.name}-{change}", variant_of=original.name, change=change)


def _parse_depths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    ranges = [re.fullmatch(r"\s*(\d{1,2})(?:\s*-\s*(\d{1,2}))?\s*", part) for part in text.split(",")]
    ends = [(int(found[1]), int(found[2] or found[1])) for found in ranges if found]
    if len(ends) < len(ranges) or any(low > high for low, high in ends):
        raise BadInput(f"got --depths {text}; write a range (1-15) or a list (3,5,7)")
    return tuple(sorted({depth for low, high in ends for depth in range(low, high + 1)}))
