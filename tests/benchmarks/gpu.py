"""Ingest on a GPU against the bare forward pass in the same batches, and against the disk's own sequential write.

As a program, on a machine with a GPU: `python -m tests.benchmarks.gpu FOLDER`, with 20 GB of disk at FOLDER.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
import torch

from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.prepare import prepare
from actstore.ingest.models.load import Model, load
from actstore.ingest.trees.task import TreeSet
from actstore.writing.writer import Writer
from tests.benchmarks import median

ROUNDS = 2
N_TREES, TREES_PER_PASS = 40_960, 1024  # a shard's trees
N_TEXTS, TOKENS_EACH, TEXTS_PER_PASS = 4096, 512, 32  # a shard's tokens
LANGUAGE_MODEL = """transformer_lens: {n_layers: 12, d_model: 768, n_heads: 12, d_head: 64, d_mlp: 3072, n_ctx: 512,
                   d_vocab: 8000, act_fn: gelu}"""  # GPT-2 small, of fewer words
WRITE_AT_ONCE = 32 << 20


def trees(device: str, n_trees: int = N_TREES) -> tuple[Model, torch.Tensor, int, Callable[[Path], Ingest]]:
    """The shipped model, what it reads, sequences per pass, and the job that stores it in a folder."""
    model = load("reproduction", device=device)
    drawn = TreeSet("reproduction", n_trees)
    ids = torch.from_numpy(model.config.vocabulary.encode(drawn.between(0, n_trees).words)).to(device)
    return model, ids, TREES_PER_PASS, lambda store: Ingest(store, model, drawn, batch_size=TREES_PER_PASS)


def text(
    device: str, folder: Path, sites: str, n: int = N_TEXTS
) -> tuple[Model, torch.Tensor, int, Callable[[Path], Ingest]]:
    """A language model with random weights over random tokens; see `trees`."""
    yaml = folder / "language.yaml"
    yaml.write_text(LANGUAGE_MODEL)
    model = load(str(yaml), untrained=0, device=device)
    numbers = np.random.default_rng(0).integers(1, 8000, (n, TOKENS_EACH))
    frame = pl.DataFrame({"tokens": pl.Series(numbers.tolist())})

    def job(store: Path) -> Ingest:
        options = {"sites": sites, "batch_size": TEXTS_PER_PASS, "tokens": frame, "answers": "none", "device": device}
        return prepare(store, model, context=TOKENS_EACH, dataset="random", **options)

    return model, torch.from_numpy(numbers).to(device), TEXTS_PER_PASS, job


def bare(model: Model, ids: torch.Tensor, per_pass: int) -> float:
    """Seconds of the forward passes alone."""
    started = time.perf_counter()
    with torch.no_grad():
        for batch in ids.split(per_pass):
            model.bridge(batch)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def sequential_write(folder: Path, n_bytes: int) -> float:
    """Seconds to write a file of so many bytes past the page cache, and to fsync it."""
    block = mmap.mmap(-1, WRITE_AT_ONCE)
    block.write(os.urandom(WRITE_AT_ONCE))
    started = time.perf_counter()
    descriptor = os.open(folder / "sequential", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
    for _ in range(n_bytes // WRITE_AT_ONCE):
        os.write(descriptor, block)
    os.fsync(descriptor)
    os.close(descriptor)
    seconds = time.perf_counter() - started
    os.unlink(folder / "sequential")
    return seconds


def measured(name: str, folder: Path, made: tuple[Model, torch.Tensor, int, Callable[[Path], Ingest]]) -> str:
    """One line: sequences per second of ingest and of the forward pass, and bytes per second of ingest and disk."""
    model, ids, per_pass, job_in = made
    bare(model, ids[: 2 * per_pass], per_pass)
    alone, stored, disk, n_bytes = [], [], [], 0
    catalog: list[float] = []
    publish = Writer.publish

    def timed(writer: Writer) -> int:
        began = time.perf_counter()
        snapshot = publish(writer)
        catalog.append(time.perf_counter() - began)
        return snapshot

    for _ in range(ROUNDS):
        alone.append(bare(model, ids, per_pass))
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            store = Path(inside) / "bench.act"
            job = job_in(store)
            started = time.perf_counter()
            with mock.patch.object(Writer, "publish", timed):
                execute(job)
            stored.append(time.perf_counter() - started)
            n_bytes = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        disk.append(sequential_write(folder, n_bytes))
    a, s, d, c = median(alone), median(stored), median(disk), median(catalog)
    limit = max(a, d)
    return (
        f"{name}: forward {len(ids) / a:,.0f}/s, ingest {len(ids) / s:,.0f}/s, {a / s:.2f} of it; "
        f"{n_bytes / 1e9:.2f} GB at {n_bytes / s / 1e9:.2f} GB/s, disk {n_bytes / d / 1e9:.2f} GB/s; "
        f"{limit / s:.2f} of the lower, {limit / (s - c):.2f} before the catalog; "
        f"forward {_said(alone)}, ingest {_said(stored)}, catalog {_said(catalog)}, disk {_said(disk)} s"
    )


def _said(seconds: list[float]) -> str:
    return " ".join(f"{each:.2f}" for each in seconds)


def main() -> None:
    folder = Path(sys.argv[1])
    print(torch.cuda.get_device_name(), torch.__version__)
    print(measured("trees, 7 sites", folder, trees("cuda")), flush=True)
    for sites, n in (("resid_post.5", N_TEXTS), ("resid_post.2,resid_post.5,resid_post.8,resid_post.11", N_TEXTS // 2)):
        print(measured(f"language model, {sites}", folder, text("cuda", folder, sites, n)), flush=True)


if __name__ == "__main__":
    main()
