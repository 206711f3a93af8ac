"""A process that may map too little memory says so, in one line, and calls nothing damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from click.testing import CliRunner

from actstore import verbs
from actstore.cli import main
from actstore.errors import LimitReached
from actstore.storage.machine import limit_reached
from actstore.store import Store
from tests.stores import fake

MEMORY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from actstore.cli import main
main(sys.argv[1:])
"""


def with_memory(n_bytes, *words):
    command = [sys.executable, "-c", MEMORY, str(n_bytes), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


STORES, MODELS = "DuckDB, Arrow and polars need 2 GB", "torch, transformers and polars need 4 GB"


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        (["info", "s.act"], STORES),
        (["verify", "s.act"], STORES),
        (["models", "list"], STORES),
        (["evaluate", "reproduction"], MODELS),
        (["ingest", "s.act", "--model", "reproduction"], MODELS),
        (["models", "add", "mine", "/dev/null"], MODELS),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_too_little_memory_for_the_libraries_is_one_line(words, needs):
    done = with_memory(2**30, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"actstore: this process may map 1.07 GB of memory, and {needs}")
    assert done.stderr.endswith("(`ulimit -v unlimited`)\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["verify", "s.act", "--recompute", "2"], ["study", "s.act", "ablate"]], ids=" ".join)
def test_an_option_or_a_study_that_runs_a_model_needs_more(words):
    done = with_memory(3 * 2**30, *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"actstore: this process may map 3.22 GB of memory, and {MODELS}")


def test_a_repair_that_has_to_run_a_model_needs_memory_for_one(monkeypatch, tmp_path):
    """A repair of rows alone does not."""

    def too_little(models):
        raise LimitReached("too little") if models else AssertionError

    fake(sites=("embed",)).store(tmp_path / "s.act")
    monkeypatch.setattr(verbs, "check_memory", too_little)
    verbs.repair(tmp_path / "s.act")
    next((tmp_path / "s.act").glob("activations.zarr/*/*/c/*/*/*")).unlink()
    with pytest.raises(LimitReached, match="too little"):
        verbs.repair(tmp_path / "s.act")


def test_help_needs_no_more_than_that():
    for words in (["--version"], ["info", "--help"]):
        assert with_memory(2**30, *words).returncode == 0


def test_memory_that_lacks_for_counting_maps_is_said_too(monkeypatch):
    def no_memory(path):
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", no_memory)
    assert "memory" in str(limit_reached(MemoryError(), "cannot read"))


LACKS = {
    "Python": (MemoryError, ""),
    "C++": (MemoryError, "std::bad_alloc"),
    "the linker": (ImportError, "libarrow.so: failed to map segment from shared object"),
    "threads": (RuntimeError, "can't start new thread"),
    "DuckDB": (duckdb.OutOfMemoryException, "Out of Memory Error: failed to pin block of size 1.0 MiB"),
}


def failing(which):
    kind, said = LACKS[which]

    def fail(*asked):
        raise kind(said)

    return fail


@pytest.mark.parametrize("which", LACKS)
def test_whatever_lacks_memory_says_so_in_one_line(monkeypatch, tmp_path, which):
    fake(sites=("embed",)).store(tmp_path / "s.act")
    monkeypatch.setattr(Store, "info_rows", failing(which))
    result = CliRunner().invoke(main, ["info", str(tmp_path / "s.act")])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "memory" in result.stderr


@pytest.mark.parametrize("which", ["Python", "DuckDB"])
def test_a_store_that_cannot_be_opened_for_want_of_memory_is_not_damaged(monkeypatch, tmp_path, which):
    fake(sites=("embed",)).store(tmp_path / "s.act")
    monkeypatch.setattr(duckdb, "connect", failing(which))
    with pytest.raises(LimitReached):
        Store(tmp_path / "s.act")
