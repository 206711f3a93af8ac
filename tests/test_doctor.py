"""`actstore doctor`: facts of the machine, of a folder, and of a store, whatever state that is in."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
from click.testing import CliRunner

import actstore
from actstore import checkup
from actstore.cli import main
from actstore.storage import machine
from tests.stores import fake, files
from tests.test_old_stores import unpack

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def root(tmp_path):
    fake().store(tmp_path / "some.act")
    return tmp_path / "some.act"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def found(facts, about, what):
    (fact,) = [fact for fact in facts if (fact.about, fact.what) == (about, what)]
    return fact


def test_every_fact_is_a_line_and_advice_is_marked_and_counted(root, monkeypatch):
    monkeypatch.setattr(checkup, "LITTLE_MEMORY", 1e18)
    done = run("doctor", root)
    assert done.exit_code == 0
    facts = actstore.doctor(root)
    assert [*dict.fromkeys(fact.about for fact in facts)] == ["versions", "extras", "machine", "folder", "store"]
    lines = [line for line in done.stdout.splitlines() if line[:2] in ("  ", "! ")]
    assert len(lines) == len(facts)
    marked = [line for line in lines if line.startswith("!")]
    assert any("memory" in line and "smaller --batch-size" in line for line in marked)
    assert done.stdout.splitlines()[-1] == f"{len(marked)} to look at, marked with !"


def test_other_forms_hold_the_same_facts(root):
    rows = json.loads(run("doctor", root, "-o", "json").stdout)
    assert {row["about"] for row in rows} == {"versions", "extras", "machine", "folder", "store"}
    (duckdb,) = [row for row in rows if row["what"] == "duckdb"]
    assert duckdb == {"about": "versions", "what": "duckdb", "found": version("duckdb"), "advice": None}
    assert run("doctor", "-o", "csv").stdout.startswith("about,what,found,advice\n")


def test_a_store_is_described_and_stays_as_it_was(root):
    before, beside = files(root), sorted(os.listdir(root.parent))
    facts = actstore.doctor(root)
    assert files(root) == before
    assert sorted(os.listdir(root.parent)) == beside
    assert found(facts, "store", "opens").advice is None
    assert found(facts, "store", "catalog").found == "up to date"
    assert found(facts, "store", "runs").found == "r"
    n_commits = len(list((root / "log").glob("*.json")))
    assert found(facts, "store", "size").found.endswith(f"{n_commits} commits")


def test_what_is_unfinished_is_said(tmp_path):
    fake(n_trees=9, trees_per_shard=3).store(tmp_path / "s.act", [0, 1])
    assert "not finished: r 6 of 9" in found(actstore.doctor(tmp_path / "s.act"), "store", "runs").advice


def test_a_store_larger_than_the_memory_is_said_to_be(root, monkeypatch):
    monkeypatch.setattr(checkup, "_memory", lambda: 1000)
    assert "larger than the memory" in found(actstore.doctor(root), "store", "size").advice


def test_free_memory_is_what_a_group_leaves_and_swap_is_said_apart(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\nSwapFree: 1000000 kB\n")
    for module in (checkup, machine):
        monkeypatch.setattr(module, "MEMORY", tmp_path / "meminfo")
        monkeypatch.setattr(module, "GROUP", tmp_path)
    of_machine = found(actstore.doctor(), "machine", "memory")
    assert of_machine.found == "16.4 GB, 8.2 GB free, 9.2 GB with swap"
    assert of_machine.advice is None
    (tmp_path / "memory.max").write_text("6000000000\n")
    (tmp_path / "memory.stat").write_text("anon 5000000000\nfile 3\n")
    of_group = found(actstore.doctor(), "machine", "memory")
    assert of_group.found == "6.0 GB, 1.0 GB free"
    assert "may not fit" in of_group.advice
    assert machine.free_memory() == 1_000_000_000


@pytest.mark.parametrize("harm", ["shard", "store.json", "folder"])
def test_a_store_that_cannot_be_opened_is_a_fact_and_no_error(root, harm):
    if harm == "folder":
        root = root.with_name("nothing.act")
    else:
        shards = [path for path in (root / "activations.zarr").rglob("*") if path.is_file() and "/c/" in str(path)]
        path = root / harm if harm == "store.json" else shards[0]
        path.chmod(0o600)
        path.write_bytes(b"")
    done = run("doctor", root)
    assert done.exit_code == 0, done.output
    assert re.search(r"^! opens: no; .*some\.act|^! opens: no; .*nothing\.act", done.stdout, re.MULTILINE)


def test_too_little_memory_for_the_libraries_is_a_fact(root):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (1_000_000_000, 1_000_000_000))

    command = [sys.executable, "-m", "actstore", "doctor", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "! addresses: 1.0 GB" in done.stdout
    assert "! opens: no; this process may map 1.00 GB" in done.stdout


@pytest.mark.parametrize(
    ("kind", "advice"),
    [("nfs4", "over the network"), ("fuse.sshfs", "over the network"), ("tmpfs", "memory"), ("ext4", None)],
)
def test_the_kind_of_file_system_says_what_is_slow(root, monkeypatch, kind, advice):
    monkeypatch.setattr(checkup, "_file_system", lambda folder: (kind, "server:/export"))
    fact = found(actstore.doctor(root), "folder", "file system")
    assert fact.found.startswith(f"{kind} of server:/export")
    assert advice in fact.advice if advice else fact.advice is None


def test_a_file_system_without_links_or_locks_takes_no_store(root, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(checkup.os, "link", refuse)
    monkeypatch.setattr(checkup.fcntl, "flock", refuse)
    fact = found(checkup._folder(root.parent), "folder", "writing")
    assert fact.found == "works; no hard links, locks"
    assert "no store can be written here without hard links, locks" in fact.advice


def test_a_share_of_the_processors_and_too_many_threads_are_said(monkeypatch):
    monkeypatch.setattr(checkup, "_share_of_processors", lambda: 0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "5000")
    facts = actstore.doctor()
    assert "OMP_NUM_THREADS=1" in found(facts, "machine", "processors").advice
    assert "or fewer" in found(facts, "machine", "threads").advice


def test_an_extra_that_is_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(checkup, "version", lambda name: (_ for _ in ()).throw(checkup.PackageNotFoundError(name)))
    facts = actstore.doctor()
    extras = {fact.what: fact for fact in facts if fact.about == "extras"}
    assert {*extras, "dev", "bench"} == set(metadata("actstore").get_all("Provides-Extra"))
    assert extras["s3"].found == "not installed (obstore); pip install 'actstore[s3]'"
    assert extras["s3"].advice is None, "nobody needs every extra"
    assert "pip install duckdb" in found(facts, "versions", "duckdb").advice


def test_a_store_of_an_older_format_is_brought_up_to_date_as_it_is_said(tmp_path):
    root = unpack("format-1", tmp_path)
    assert f"`actstore repair {root}`" in found(actstore.doctor(root), "store", "format").advice
    assert run("repair", root).exit_code == 0
    facts = actstore.doctor(root)
    assert [fact for fact in facts if fact.about == "store" and fact.advice and fact.what != "health"] == []


def test_slices_that_are_not_committed_are_told_with_the_command_that_commits_them(tmp_path):
    words = (
        "ingest",
        root := tmp_path / "s.act",
        "--model",
        "reproduction",
        "--trees",
        3,
        "--sites",
        "none",
        "--slice",
    )
    assert run(*words, "2/2").exit_code == 0
    assert f"`actstore commit {root}`" in found(actstore.doctor(root), "store", "slices").advice
    assert run("commit", root).exit_code == 0
    assert not [fact for fact in actstore.doctor(root) if fact.what == "slices"]


def test_an_older_catalog_is_said_to_be_built_anew_at_each_opening(root, monkeypatch):
    monkeypatch.setattr(actstore.Store, "catalog_is_older", property(lambda store: True))
    assert "actstore repair" in found(actstore.doctor(root), "store", "catalog").advice
