"""Edits that mean harm, and donors that are gone: one line, and nothing is written."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import actstore
from actstore.cli import main
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.task import TreeSet
from actstore.upkeep.verify import verify
from tests.stores import committed_files
from tests.test_interventions import tiny

ROOTS = "select token_id from tokens where role = 'root'"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `base` and `other` of a tiny model, in batches of four trees; not to be changed."""
    root = tmp_path_factory.mktemp("hostile") / "s.act"
    for run, seed in (("base", 0), ("other", 9)):
        trees = TreeSet("deep", 24, seed, n_nodes=6, name=f"d{seed}", trees_per_shard=4)
        execute(Ingest(root, tiny(), trees, run, ["embed", "resid_post"]))
    return root


def patched(store: Path, query: str, *more: str, how: str = "zero") -> Result:
    words = ["ingest", str(store), "--base", "base", "--patch", query, "--at", "embed", "--how", how, *more]
    return CliRunner().invoke(main, words)


VECTOR = "select token_id, list_resize([{}], 16, 0.0) as vector from tokens where role = 'root'"
HOSTILE = {  # a query → how it edits
    "create table a as select 1 as token_id": "zero",
    "insert into trees select * from trees": "zero",
    "attach '/tmp/of-another.db'": "zero",
    "copy (select 1) to '/tmp/of-another'": "zero",
    "select token_id from read_csv('/etc/passwd')": "zero",
    "pragma database_list": "zero",
    "install httpfs": "zero",
    "set memory_limit = '1GB'": "zero",
    "select getenv('HOME') as token_id": "zero",
    "select 1 as token_id; select 2 as token_id": "zero",
    "no-such-file.sql": "zero",
    "select -5 as token_id": "zero",
    "select 1::hugeint << 70 as token_id": "zero",
    "select token_id, null as donor_token_id from tokens where role = 'root'": "replace",
    "select token_id, if(tree_id = 3, null, token_id) as donor_token_id from tokens where role = 'root'": "replace",
    VECTOR.format("1e300::double"): "replace",  # no float32 holds it
    VECTOR.format("'-inf'::float"): "add",
    VECTOR.format("'nan'::double"): "project",
}


@pytest.mark.parametrize("query", HOSTILE)
def test_a_query_that_means_harm_is_refused_in_one_line(store: Path, query: str) -> None:
    before = committed_files(store)
    done = patched(store, query, how=HOSTILE[query])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("actstore: ")
    assert len(done.stderr.splitlines()) == 1 or "LINE 1: " in done.stderr, "a line, or where the SQL is wrong"
    assert committed_files(store) == before


def test_vectors_of_other_number_types_are_stored_as_float32(store: Path, tmp_path: Path) -> None:
    copied = actstore.copy(store, tmp_path / "s.act").out
    assert patched(copied, VECTOR.format("0.1::double"), "--run", "x", how="replace").exit_code == 0
    with actstore.Store(copied) as opened:
        assert opened.sql("select distinct vector[1] as x from edits where run = 'x'")["x"].to_list() == [
            pytest.approx(0.1, abs=1e-8)
        ]
    assert not verify(copied).findings


def test_donors_and_bases_that_were_dropped_are_told(store: Path, tmp_path: Path) -> None:
    copied = actstore.copy(store, tmp_path / "s.act").out
    actstore.drop(copied, run="other")
    donated = "select token_id, token_id as donor_token_id from tokens where role = 'root'"
    for done in (
        patched(copied, donated, "--donors", "other", how="replace"),
        CliRunner().invoke(main, ["ingest", str(copied), "--base", "other", "--patch", ROOTS, "--at", "embed"]),
    ):
        assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1), done.output
        assert "no run 'other'" in done.stderr


def test_edits_share_a_token_and_leave_batches_without_any(store: Path, tmp_path: Path) -> None:
    copied = actstore.copy(store, tmp_path / "s.act").out
    few = f"{ROOTS} and tree_id in (0, 21)"
    words = (few, "--patch", few, "--at", "embed", "--how", "mean", "--run", "x", "--sites", "resid_post")
    assert patched(copied, *words).exit_code == 0
    before = committed_files(copied)
    assert patched(copied, *words).exit_code == 0
    assert committed_files(copied) == before
    assert not verify(copied).findings


CUT = """
import os, resource, signal, sys
from actstore.cli import main
from actstore.storage.local import Local

blow, left, publish = int(sys.argv[1]), int(sys.argv[2]), Local.publish

def cut(self, *args, **more):
    global left
    left -= 1
    if left == 0:
        if blow:
            os.kill(os.getpid(), blow)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    return publish(self, *args, **more)

Local.publish = cut
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
main(sys.argv[3:])
"""
STOPPED = {signal.SIGINT: (1, "stopped"), signal.SIGTERM: (-signal.SIGTERM, ""), 0: (1, "no room")}


@pytest.mark.parametrize("blow", STOPPED)
def test_edits_that_are_stopped_or_find_no_room_go_on_to_the_same_bytes(store: Path, tmp_path: Path, blow: int) -> None:
    cut, whole = (actstore.copy(store, tmp_path / name).out for name in ("cut.act", "whole.act"))
    more = ("--run", "x", "--sites", "resid_post")
    words = ["ingest", str(cut), "--base", "base", "--patch", ROOTS, "--at", "embed", "--how", "zero", *more]
    command = [sys.executable, "-c", CUT, str(int(blow)), "12", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    code, said = STOPPED[blow]
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert {finding.kind for finding in verify(cut).findings} <= {"stray"}, "files that no commit names yet"
    for each in (cut, whole):
        assert patched(each, ROOTS, *more).exit_code == 0
    assert committed_files(cut) == committed_files(whole)
    assert not verify(cut).findings
