"""A model made by hand: one head carries the goal's label from token to token, and nothing else writes anything.

Over trees whose goal is a child of the root, the right step is the goal, so that the model answers by copying. Which layer
and which tokens carry the answer is therefore known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.load import Model, from_bytes
from actstore.ingest.models.weights import canonical, shapes
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import COMMA, arrow_word, goal_at, node_word, root_at

N_NODES = 6
PLACES = {"goal": goal_at(N_NODES), "colon": goal_at(N_NODES) + 1, "root": root_at(N_NODES)}
TREES = TreeSet("deep", 80, seed=3, n_nodes=N_NODES, depths=(1,), name="d", trees_per_shard=50)


def hops(path: Mapping[int, tuple[str, str]], n_layers: int = 3, name: str = "hops", answers: bool = True) -> Model:
    """A model whose head 0 copies the goal's label along a path.

    Args:
        path: layer → the token that its attention reads, and the token that reads it. The first reads the goal's word, the
            others what the one before wrote; the root's token answers with what the last wrote.
        answers: otherwise an odd label only makes a comma likelier, so that another tree's label does as well as the tree's.
    """
    d_vocab, n_ctx = 4 + 2 * N_NODES, 4 * N_NODES + 4
    place, slot = d_vocab, d_vocab + n_ctx  # the first dimension of positions, and of what the first hop writes
    d_model = slot + N_NODES * len(path)
    config = ModelConfig(
        "reproduction", N_NODES, n_layers=n_layers, n_heads=2, d_model=d_model, d_head=1 + N_NODES, d_mlp=4
    )
    state = {key: torch.zeros(shape) for key, shape in shapes(config).items()}
    for key in state:
        if key.endswith(".w"):
            state[key] += 1
    state["embed.W_E"][:, :d_vocab] = torch.eye(d_vocab)
    state["pos_embed.W_pos"][:, place:slot] = torch.eye(n_ctx)
    labels = torch.arange(N_NODES)
    reads = torch.from_numpy(node_word(labels.numpy())).long()  # dimensions that hold the label at the first token
    for number, (layer, (source, reader)) in enumerate(sorted(path.items())):
        W = {part: state[f"blocks.{layer}.attn.W_{part}"][0] for part in "QKVO"}
        W["Q"][place + PLACES[reader], 0] = W["K"][place + PLACES[source], 0] = 4.0
        W["V"][reads, 1 + labels] = 1.0
        reads = slot + N_NODES * number + labels
        W["O"][1 + labels, reads] = 1.0
    said = torch.from_numpy(arrow_word(labels.numpy())).long()
    state["unembed.W_U"][reads, said if answers else COMMA] = 2.0 if answers else (labels % 2).float()
    return from_bytes(canonical(state), config, name, f"{name}.safetensors")


def stored(root: Path, model: Model, sites: list[str], run: str = "r", trees: TreeSet = TREES) -> Path:
    """Store a run of a model."""
    execute(Ingest(root, model, trees, run, sites=sites))
    return root
