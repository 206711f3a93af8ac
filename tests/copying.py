"""A model written by hand that copies its goal: where the goal is a child of the root, the copy is the right step.

Head 0 of layer 0 attends to the goal's position alone, from every token, and writes the goal's node where the unembedding
reads. All other heads have random weights, and write where nothing reads. The word of each token stays in the residual
stream, in coordinates that the unembedding does not read either.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.load import Model, from_bytes
from actstore.ingest.models.weights import canonical, shapes
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import goal_at

N_NODES = 6
CONFIG = ModelConfig("reproduction", N_NODES, n_layers=2, n_heads=4, d_model=64, d_head=16, d_mlp=4)
N_WORDS = CONFIG.d_vocab
FLAG, ANSWER, NOISE = N_WORDS, N_WORDS + 1, 2 * N_WORDS + 1  # coordinates after those of the words


@cache
def copying_model() -> Model:
    """The model; its answers have probability 1."""
    rng = torch.Generator().manual_seed(0)
    state = {name: torch.zeros(shape) for name, shape in shapes(CONFIG).items()}
    state |= {name: torch.ones_like(weight) for name, weight in state.items() if name.endswith(".w")}
    state["embed.W_E"][:, :N_WORDS] = 3 * torch.eye(N_WORDS)
    state["pos_embed.W_pos"][goal_at(N_NODES), FLAG] = 3.0
    state["pos_embed.W_pos"][:, NOISE:] = 0.5 * torch.randn(CONFIG.n_ctx, CONFIG.d_model - NOISE, generator=rng)
    for layer in range(CONFIG.n_layers):
        heads = {part: state[f"blocks.{layer}.attn.{part}"] for part in ("W_Q", "W_K", "W_V")}
        for weight in heads.values():
            weight[:] = 0.5 * torch.randn(weight.shape, generator=rng)
        out = state[f"blocks.{layer}.attn.W_O"]
        out[:, :, NOISE:] = 0.5 * torch.randn(out[:, :, NOISE:].shape, generator=rng)
    copies = {part: state[f"blocks.0.attn.{part}"] for part in ("W_Q", "W_K", "W_V", "W_O")}
    for weight in copies.values():
        weight[0] = 0
    copies["W_K"][0, FLAG, 0] = 1.0
    state["blocks.0.attn.b_Q"][0, 0] = 100.0
    for node in range(N_NODES):
        word, arrow = 4 + 2 * node, 5 + 2 * node
        copies["W_V"][0, word, node] = 1.0
        copies["W_O"][0, node, ANSWER + arrow] = 2.0
    state["unembed.W_U"][ANSWER:NOISE] = 100 * torch.eye(N_WORDS)
    return from_bytes(canonical(state), CONFIG, "copying", "copying.safetensors")


def copies(
    root: Path, run: str, sites: list[str], n_trees: int = 150, seed: int = 0, model: Model | None = None
) -> Path:
    """Store a run of the model over trees whose goal is a child of the root; the dataset has the run's name."""
    trees = TreeSet("deep", n_trees, seed=seed, n_nodes=N_NODES, depths=(1,), name=run)
    execute(Ingest(root, model or copying_model(), trees, run, sites=sites))
    return root
