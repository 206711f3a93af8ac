"""A store that was opened before a fork, in the process that was forked: it refuses, and harms nothing."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from actstore.store import Store
from tests.stores import fake

BEGIN = """
import gc, os, sys
import numpy as np
from actstore.errors import BadInput
from actstore.store import Store
store = Store(sys.argv[1])
X, _ = store.read(ALL := "select token_id from tokens")
scan, batches = store.scan(), store.batches(ALL)
if child := os.fork():
    status = os.waitpid(child, 0)[1]
    assert np.array_equal(store.read(ALL)[0], X)
    print("status", status)
    sys.exit()
"""
REFUSES = """
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
for use in (
    lambda: store.sql("select 1"),
    lambda: store.sql("select 1", timeout=10),
    lambda: store.read(ALL),
    lambda: store.explain(ALL),
    lambda: store.scan(),
    lambda: scan.collect(),
    lambda: store.batches(ALL),
    lambda: store.sites("r"),
    lambda: store.info(),
    lambda: Store(sys.argv[1]),
    lambda: verify(sys.argv[1]),
    lambda: repair(sys.argv[1], None),
    lambda: open_writer(sys.argv[1]).__enter__(),
):
    try:
        use()
    except BadInput as error:
        assert "open the store in a fresh process" in str(error), error
    else:
        raise AssertionError("it was used")
"""
ENDS = {
    "close": "store.close(); store.close()",
    "repr": "assert 'opened by another process' in repr(store); store.close(); assert 'closed' in repr(store)",
    "with": "store.__exit__(None, None, None)",
    "garbage": "del store, scan, batches; gc.collect()",
    "exit": "",
    "refuses": REFUSES,
    "batches": "assert sum(len(X) for X, _ in batches) == len(X)",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    fake(sites=["resid_post.0"]).store(root := tmp_path_factory.mktemp("fork") / "s.act")
    return root


@pytest.mark.parametrize("end", ENDS)
def test_a_forked_process_harms_neither_itself_nor_the_one_that_opened_the_store(path, end):
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + ENDS[end], path], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "status 0\n", done.stderr


def reads(path: Path) -> None:
    with Store(path) as store:
        assert len(store.scan().collect()) == len(store.read("select token_id from tokens")[0])


def test_a_process_that_is_started_anew_reads_as_the_message_says(path):
    reads(path)
    process = multiprocessing.get_context("spawn").Process(target=reads, args=(path,))
    process.start()
    process.join(100)
    assert process.exitcode == 0


HASHES = """
import os, sys
from actstore.storage.hashing import hash_of

def hashes(path):
    with open(path, "rb") as file:
        return {hash_of(file.fileno()) for _ in range(200)}

paths = sys.argv[1:]
expected = [hashes(path) for path in paths]
children = []
for path, one in zip(paths, expected):
    if not (child := os.fork()):
        os._exit(hashes(path) != one)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_forked_processes_hash_in_memory_of_their_own(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 3_000_000)
    done = subprocess.run(
        [sys.executable, "-c", HASHES, *paths], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout == "[0, 0]\n"


WRITES = """
import os, sys
import polars as pl
from actstore.errors import BadInput
from actstore.writing.writer import open_writer
rows = pl.DataFrame({"study": ["s"]})
code, lock = 0, os.path.join(sys.argv[1], ".lock")
with open_writer(sys.argv[1]) as writer:
    if child := os.fork():
        code = os.waitpid(child, 0)[1]
        assert f"process {os.getpid()} " in open(lock).read()
        writer.record(rows)
    else:
        try:
            writer.publish()
        except BadInput as error:
            assert "was forked from it" in str(error)
            code = 7
        sys.exit(code)
print("status", os.waitstatus_to_exitcode(code))
"""


def test_a_forked_process_does_not_write_by_the_lease_of_another(path, tmp_path):
    shutil.copytree(path, tmp_path / "s.act")
    done = subprocess.run(
        [sys.executable, "-c", WRITES, tmp_path / "s.act"], capture_output=True, text=True, timeout=100, check=False
    )
    assert "status 1" in done.stdout, done.stderr  # leaving the block would publish, and refuses
    assert "was forked from it" in done.stderr
    with Store(tmp_path / "s.act") as store:
        assert store.sql("select count(*) from results").item() == 1
