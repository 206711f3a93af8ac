"""Edits of one position, against the notebook's three hooked forward passes: clean, donor and patched."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import load
from actstore.ingest.models.model import Model
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import root_at
from actstore.interventions import Edit
from actstore.store import Store
from actstore.verbs import patch as store_patch
from actstore.verbs import patching
from tests.benchmarks import Row, median

N_TREES, ROUNDS = 1000, 3
LAYERS = (3, 4, 5)
BATCH_SIZE = 128  # trees of a forward pass, of both sides
SITES = ("embed", "resid_post", "attn_out")
DONATED = """
    select token_id, lag(token_id, 1, (select max(token_id) from tokens where role = 'root')) over (order by token_id)
        as donor_token_id
    from tokens where role = 'root'
"""
GOAL, TOLERANCE = 10, 1e-3


def rows() -> list[Row]:
    """At the root token, what attention adds in a layer becomes what it adds in the tree before.

    Both sides give the probability of each right step of the edited pass, and must agree. Edits go
    first in every other round.
    """
    model, trees = load("reproduction"), TreeSet("reproduction", N_TREES, seed=3)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder) / "s.act"
        execute(Ingest(root, model, trees, "base", SITES, batch_size=BATCH_SIZE))
        with Store(root) as store, patching(store) as patch:
            steps = store.sql("select tree_id, step, target from predictions order by token_id")
            words = trees.between(0, N_TREES).words

            def ours(layer: int) -> np.ndarray:
                return patch("base", [Edit(DONATED, f"attn_out.{layer}")])["p_target"].to_numpy()

            def theirs(layer: int) -> np.ndarray:
                return _notebook(model, words, layer)[steps["tree_id"].to_numpy(), steps["step"].to_numpy()]

            for layer in LAYERS:
                apart = np.abs(ours(layer) - theirs(layer)).max()
                assert apart <= TOLERANCE, f"layer {layer}: {apart} apart"
            seconds = {(side, layer): list[float]() for side in (ours, theirs) for layer in LAYERS}
            for turn in range(ROUNDS):
                for layer in LAYERS:
                    for side in (ours, theirs)[:: 1 if turn % 2 else -1]:
                        started = time.perf_counter()
                        side(layer)
                        seconds[side, layer].append(time.perf_counter() - started)
        started = time.perf_counter()
        store_patch(root, "base", DONATED, at=f"attn_out.{LAYERS[0]}", run="patched", answers="next")
        stored = time.perf_counter() - started
    found = []
    for layer in LAYERS:
        ratio = median([b / a for a, b in zip(seconds[ours, layer], seconds[theirs, layer], strict=True)])
        times = f"{median(seconds[theirs, layer]):.2f} / {median(seconds[ours, layer]):.3f} s"
        what = f"layer {layer}: three hooked forward passes of {N_TREES:,} trees / edits of them"
        found.append(Row(what, f"{ratio:.1f} ({times})", f"≥ {GOAL}", ratio >= GOAL))
    three = median(seconds[theirs, LAYERS[0]])
    what = f"layer {LAYERS[0]}: three hooked forward passes / actstore.patch, which stores the run"
    return [*found, Row(what, f"{three / stored:.1f} ({three:.2f} / {stored:.2f} s)", "")]


def _notebook(model: Model, words: np.ndarray, layer: int) -> np.ndarray:
    """The probability of each right step, float32 [tree, step], by hooks of TransformerLens; NaN past the path."""
    bridge, vocabulary, name = model.bridge, model.config.vocabulary, f"blocks.{layer}.hook_attn_out"
    root = root_at(model.config.n_nodes)
    ids, donor_ids = (torch.from_numpy(vocabulary.encode(some)) for some in (words, np.roll(words, 1, axis=0)))
    found: list[torch.Tensor] = []
    caught: dict[str, torch.Tensor] = {}

    def catch(out: torch.Tensor, hook: object) -> None:
        caught["donor"] = out[:, root].clone()

    def put(out: torch.Tensor, hook: object) -> torch.Tensor:
        out[:, root] = caught["donor"]
        return out

    with torch.no_grad():
        for clean, donor in zip(ids.split(BATCH_SIZE), donor_ids.split(BATCH_SIZE), strict=True):
            bridge(clean)[:, root:-1].log_softmax(-1)
            bridge.run_with_hooks(donor, fwd_hooks=[(name, catch)])[:, root:-1].log_softmax(-1)
            patched = bridge.run_with_hooks(clean, fwd_hooks=[(name, put)])[:, root:-1].log_softmax(-1)
            found.append(patched.gather(2, clean[:, root + 1 :, None])[:, :, 0].exp())
    return torch.cat(found).numpy()
