"""The benchmarks run: each section at a tiny size, since `make bench` takes ten minutes and no test waits for it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.benchmarks import (
    Row,
    cache,
    generate,
    ingest,
    large,
    long_log,
    opening,
    patch,
    probes,
    side_by_side,
    startup,
    text,
    trust,
)

TINY = {
    cache: {"N_TREES": 20, "ROUNDS": 1, "SITES": ("embed", "resid_post.1")},
    generate: {"TREES_PER_BATCH": 16, "BATCHES_PER_ROUND": 1, "ROUNDS": 1},
    opening: {"N_TREES": 40, "N_IDS": 100, "ROUNDS": 2},
    trust: {"N_TREES": 20, "N_VERIFIED": (20,), "ROUNDS": 1},
    probes: {"N_TREES": 60, "BATCH_SIZE": 6, "BATCHES": 2, "ROUNDS": 1, "ROLES": ("edge_target",)},
    patch: {"N_TREES": 20, "ROUNDS": 1, "LAYERS": (4,)},
    startup: {"ROUNDS": 1},
    long_log: {"COMMITS": (3, 200), "ROUNDS": 1},
    large: {"SIZES": (40, 60), "WIDTH": 2, "ROUNDS": 1, "N_SMALL": 4, "N_READ": 50},
}


@pytest.mark.parametrize("module", TINY, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_section_gives_figures(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in TINY[module].items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)

    assert all(isinstance(row, Row) and row.figure for row in module.rows())
    assert not list(tmp_path.iterdir())  # nothing stays behind


def test_ingest_is_timed_and_its_memory_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "SIZES", {20: (0.5, 1), 30: (0.5, 2)})
    monkeypatch.setattr(ingest, "_run", lambda *words: 1.0)  # a process of its own takes five seconds
    monkeypatch.chdir(tmp_path)
    assert len(ingest.speed()) == 6
    monkeypatch.undo()
    assert 1e8 < ingest._run(tmp_path / "s.act", 2) < 4e9


def test_two_ingests_run_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "N_TREES", 20)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    took = side_by_side._took(2, 1, {})
    assert len(took) == 2
    assert min(took) > 0


def test_a_read_of_text_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "N_READ", 4)
    monkeypatch.setattr(text, "N_TOKENS", 100)
    assert text._read(Path(tmp_path)).figure
