"""A process that may map too little memory says so, in one line, and calls nothing damaged."""

from __future__ import annotations

import subprocess
import sys

import duckdb
import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import LimitReached
from actstore.store import Store
from tests.stores import fake

MEMORY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.RLIM_INFINITY))
from actstore.cli import main
main(sys.argv[1:])
"""


def with_a_gigabyte(*words):
    return subprocess.run([sys.executable, "-c", MEMORY, *words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [["info", "s.act"], ["verify", "s.act"], ["evaluate", "reproduction"]], ids=" ".join)
def test_too_little_memory_for_the_libraries_is_one_line(words):
    done = with_a_gigabyte(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "actstore: this process may map 1.07 GB of memory, and DuckDB, Arrow and polars need 2 GB"
    )
    assert done.stderr.endswith("(`ulimit -v unlimited`)\n")
    assert done.stderr.count("\n") == 1


def test_help_needs_no_more_than_that():
    for words in (["--version"], ["info", "--help"]):
        assert with_a_gigabyte(*words).returncode == 0


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
    monkeypatch.setattr(Store, "info", failing(which))
    result = CliRunner().invoke(main, ["info", str(tmp_path / "s.act")])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "memory" in result.stderr


@pytest.mark.parametrize("which", ["Python", "DuckDB"])
def test_a_store_that_cannot_be_opened_for_want_of_memory_is_not_damaged(monkeypatch, tmp_path, which):
    fake(sites=("embed",)).store(tmp_path / "s.act")
    monkeypatch.setattr(duckdb, "connect", failing(which))
    with pytest.raises(LimitReached):
        Store(tmp_path / "s.act")
