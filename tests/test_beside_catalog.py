"""What lies beside the catalog and is no part of the store: DuckDB would add it to every read."""

import os
import re
import shutil
import subprocess
import sys

import duckdb
import pytest

from actstore.catalog import tables
from actstore.commits.manifest import manifest_path
from actstore.errors import Busy, Damaged
from actstore.ingest.replay.remake import files_of
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
from tests.damaged import damage, flip
from tests.stores import catalog_rows, fake, files
from tests.test_advice import advised_commands, run

WAL = f"{tables.CATALOG}.wal"
DIES_WRITING = """
import duckdb, os, sys
os.chmod(sys.argv[1], 0o644)
connection = duckdb.connect(sys.argv[1])
connection.execute(sys.argv[2])
os._exit(0)
"""
REPOINT = "update shards set path = (select max(path) from shards) where batch = 0"


@pytest.fixture
def small(tmp_path):
    """A store of two batches, and its catalog's rows."""
    root = tmp_path / "s.act"
    fake().store(root)
    return root, catalog_rows(root / tables.CATALOG)


def leave_a_log(root, statement=REPOINT):
    """What a client leaves that opened the catalog to write, wrote, and died."""
    subprocess.run([sys.executable, "-c", DIES_WRITING, str(root / tables.CATALOG), statement], check=True)
    os.chmod(root / tables.CATALOG, 0o444)
    assert (root / WAL).stat().st_size


def test_a_log_beside_the_catalog_is_damage_and_is_mended(small):
    root, rows = small
    leave_a_log(root)
    with pytest.raises(Damaged, match=r"catalog\.duckdb\.wal was left by a program .*actstore repair"):
        Store(root)
    for quick in (False, True):
        assert [(found.path, found.kind) for found in verify(root, quick=quick).findings] == [(WAL, "catalog")]
    done = repair(root, files_of)
    assert (done.mended, done.left) == ([WAL], [])
    assert verify(root).findings == []
    assert catalog_rows(root / tables.CATALOG) == rows
    Store(root).close()


def test_a_log_that_came_after_a_store_was_opened_is_told_by_a_query_with_limits(small, tmp_path):
    root, _ = small
    shutil.copytree(root, tmp_path / "copy.act")  # DuckDB opens no file to write that another process reads
    leave_a_log(tmp_path / "copy.act")
    with Store(root) as store:
        before = store.sql("select path from shards order by all")
        shutil.copy(tmp_path / "copy.act" / WAL, root / WAL)
        assert store.sql("select path from shards order by all").equals(before)
        with pytest.raises(Damaged, match=r"catalog\.duckdb\.wal"):
            store.sql("select path from shards", timeout=60)


@pytest.mark.parametrize("ending", [*tables.REPLAYED, ".tmp"])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
def test_a_writer_removes_whatever_lies_beside_the_catalog(small, tmp_path, ending, kind):
    root, rows = small
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    for path in (root / f"{tables.CATALOG}{ending}", root / f".{tables.CATALOG}.{os.getpid()}.tmp{ending}"):
        if kind == "folder":
            path.mkdir()
            (path / "block-0.tmp").write_bytes(b"spilled")
        elif kind == "link":
            path.symlink_to(mine)
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(b"no log of DuckDB's")
    is_damage = ending in tables.REPLAYED
    assert [found.path for found in verify(root).damage] == [f"{tables.CATALOG}{ending}"] * is_damage
    with open_writer(root):
        pass
    assert not [path for path in os.listdir(root) if path.startswith((".catalog.", f"{tables.CATALOG}."))]
    assert verify(root).findings == []
    assert catalog_rows(root / tables.CATALOG) == rows
    assert (mine / "notes").read_text() == "mine"


def test_a_log_that_lowers_the_snapshot_hides_no_lost_manifest(small):
    root, _ = small
    leave_a_log(root, "update snapshot set snapshot = 1")
    (root / manifest_path(3)).unlink()
    before = files(root)
    with pytest.raises(Damaged, match="lacks manifest 3 of 3"), open_writer(root):
        pass
    with pytest.raises(Damaged, match="is missing"):
        repair(root, files_of)
    assert files(root) == before


def test_a_part_is_mended_out_of_the_catalog_and_not_out_of_what_lies_beside_it(small):
    root, _ = small
    name = "parts/sites/r.parquet"
    before = (root / name).read_bytes()
    leave_a_log(root, "update sites set short = 'another'")
    damage(root / name, flip(50))
    assert repair(root, lambda *asked: {}).mended == [name, WAL]
    assert (root / name).read_bytes() == before


def test_a_log_beside_the_file_that_the_catalog_is_a_link_to_is_found(small, tmp_path):
    root, rows = small
    (root / tables.CATALOG).rename(tmp_path / "elsewhere.duckdb")
    (root / tables.CATALOG).symlink_to(tmp_path / "elsewhere.duckdb")
    Store(root).close()
    with duckdb.connect() as connection:  # DuckDB looks there, or the test tests nothing
        os.chmod(tmp_path / "elsewhere.duckdb", 0o644)
        subprocess.run(
            [sys.executable, "-c", DIES_WRITING, str(tmp_path / "elsewhere.duckdb"), "delete from runs"], check=True
        )
        connection.execute(f"attach '{root / tables.CATALOG}' as there (read_only)")
        assert connection.execute("select count(*) from there.runs").fetchall() == [(0,)]
    with pytest.raises(Damaged, match=r"elsewhere\.duckdb\.wal"):
        Store(root)
    assert [found.path for found in verify(root).damage] == [tables.CATALOG]
    repair(root, files_of)
    assert verify(root).findings == []
    assert catalog_rows(root / tables.CATALOG) == rows


def test_a_catalog_that_a_client_has_open_to_write_is_in_use_and_not_damaged(small):
    root, _ = small
    (root / tables.CATALOG).chmod(0o644)
    hold = "import duckdb, sys; held = duckdb.connect(sys.argv[1]); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(root / tables.CATALOG)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        said = rf"process {holder.pid} has .*catalog.duckdb open to write.*`actstore repair "
        for check in (False, True):
            with pytest.raises(Busy, match=said) as refused:
                Store(root, check)
        (found,) = verify(root).findings
        assert re.search(said, found.what)
        (command,) = advised_commands(str(refused.value))
        assert run(*command).exit_code == 0
        Store(root).close()
        assert not verify(root).damage
        holder.stdin.close()
    with duckdb.connect(root / tables.CATALOG), pytest.raises(Busy, match=r"this process has .* open to write; close"):
        Store(root)
