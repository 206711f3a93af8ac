"""A store of sequences of many lengths, whose activations and predictions a test makes up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch

from actstore.arrays.address import CHUNKS_PER_SHARD
from actstore.arrays.layout import Layout
from actstore.arrays.pack import ShardBuffer
from actstore.writing.contents import batch_contents
from actstore.writing.plan import RunPlan, SitePlan
from actstore.writing.writer import open_writer

PER_CHUNK = 4
PER_SHARD = PER_CHUNK * CHUNKS_PER_SHARD
PIECES = ["<s>", "Ġthe", ",", "Ġcat", "ĠSat", "'s"]


def lengths(n: int) -> np.ndarray:
    """Tokens of each of n sequences: 3 to 9, all different from one to the next."""
    return 3 + np.arange(n) * 5 % 7


def plant_text(
    root: Path,
    sites: Mapping[str, np.ndarray],
    run: str = "text",
    dataset: str = "stories",
    n: int = 90,
    hashes: Sequence[int] | None = None,
    answers: Callable[[pl.DataFrame], pl.DataFrame] | None = None,
    weights: str | None = None,
    kinds: Mapping[str, str] | None = None,
    documents: Sequence[int] | None = None,
) -> Path:
    """Commit one run over n sequences to the store at root, in one batch; every third sequence is for testing.

    Args:
        sites: float32 [n_tokens, d] by short name.
        hashes: of the sequences, in place of their numbers.
        answers: makes rows of `predictions` of the tokens (columns token_id, sequence_id, position, token).
        weights: of the model; the run's own unless told.
        kinds: of sites that are no vectors of the residual stream.
        documents: of the sequences; each its own unless told. All sequences of one are on one side of the split.
    """
    long = lengths(n)
    total, kinds = int(long.sum()), kinds or {}
    plan = RunPlan(
        run=run,
        model={
            "weights_sha256": weights or run,
            "model": run,
            "architecture": "Made",
            "weights_kept": False,
        },
        weights=b"",
        dataset={
            "dataset": dataset,
            "n_positions": int(long.max()),
            "task": "tokens",
            "layout": "rows",
            "n_ids": PER_SHARD,
            "n_sequences": n,
            "n_tokens": total,
            "rows_per_shard": PER_SHARD,
            "rows_per_chunk": PER_CHUNK,
            "vocabulary": "v",
            "recipe": "{}",
        },
        sites=[
            SitePlan(
                f"hook_{short}",
                short,
                kinds.get(short, "resid"),
                Layout((PER_SHARD, *values.shape[1:]), None, PER_CHUNK),
                ("row", "head", "d_head") if values.ndim == 3 else ("row", "d_model"),
            )
            for short, values in sites.items()
        ],
        facts={"prompt": "task", "samples": None, "device": "cpu", "versions": "{}"},
        parts={"vocabularies": pl.DataFrame({"vocabulary": "v", "number": range(len(PIECES)), "token": PIECES})},
    )
    with open_writer(root, make=True) as writer:
        held = writer.rows_of("datasets")
        known = bool(held.height) and dataset in held["dataset"].to_list()
        here = writer.define(plan)
        begins = here.token_id + np.cumsum(long) - long
        sequence = np.repeat(np.arange(n), long)
        token_ids = here.token_id + np.arange(total)
        number = token_ids * 7 % len(PIECES)
        tokens = pl.DataFrame(
            {
                "token_id": token_ids,
                "sequence_id": here.sequence_id + sequence,
                "position": token_ids - begins[sequence],
                "token": [PIECES[at] for at in number],
                "number": number,
            }
        )
        listed = pl.DataFrame(
            {
                "sequence_id": here.sequence_id + np.arange(n),
                "dataset": dataset,
                "first_token_id": begins,
                "n_tokens": long,
                "hash": np.array(range(n) if hashes is None else hashes, np.uint64),
                "split": ["test" if at % 3 == 0 else "train" for at in range(n)],
                "document": np.arange(n) if documents is None else documents,
            }
        )
        arrays = {}
        for site in plan.sites:
            buffer = ShardBuffer(site.layout)
            buffer.put(0, torch.from_numpy(sites[site.short]))
            arrays[site.site] = buffer.seal(long)
        made = {} if answers is None else {"predictions": answers(tokens).with_columns(run=pl.lit(run))}
        of_set = {} if known else {"listed_sequences": listed, "tokens": tokens}
        writer.commit_batch(plan, 0, here.sequence_id, n, batch_contents(plan, 0, of_set, made, arrays))
    return root
