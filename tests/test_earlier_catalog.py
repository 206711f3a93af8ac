"""A large catalog is made of the one before the last, and no file that anybody reads or backed up is changed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import duckdb
import polars as pl
import pytest

from actstore.catalog import build, tables
from actstore.catalog.declared import declare
from actstore.storage import earlier, hashing, local
from actstore.store import Store
from actstore.writing.writer import open_writer
from tests.stores import Fake, catalog_rows, fake

KEPT = ".catalog.duckdb.earlier"
N_BATCHES = 8

pytestmark = pytest.mark.skipif(not earlier.HAS_LEASES, reason="the system has no leases of files (Linux has)")


@pytest.fixture(autouse=True)
def keeps_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier, "KEPT_FROM", 0)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The catalogs that were copied."""
    copied = list[Path]()

    def copyfile(source: Path, to: Path) -> None:
        copied.append(source)
        shutil.copyfile(source, to)

    monkeypatch.setattr(build, "shutil", SimpleNamespace(copyfile=copyfile))
    return copied


def run() -> Fake:
    return fake(n_trees=2 * N_BATCHES, trees_per_shard=2, sites=("embed",))


def commit(root: Path, *batches: int) -> int:
    """Commit batches, with a catalog after each, and return the inode of the last catalog."""
    for batch in batches:
        run().store(root, [batch])
    return os.stat(root / "catalog.duckdb").st_ino


def as_built_from_nothing(root: Path, tmp_path: Path) -> bool:
    held = catalog_rows(root / "catalog.duckdb")
    shutil.copytree(root, tmp_path / "again.act")
    build.publish(tmp_path / "again.act", from_nothing=True)
    return held == catalog_rows(tmp_path / "again.act" / "catalog.duckdb")


def test_two_files_take_turns_and_none_is_copied(tmp_path: Path, copies: list[Path]) -> None:
    root = tmp_path / "s.act"
    inodes = [commit(root, batch) for batch in range(N_BATCHES)]
    assert len(copies) == 1, "the first catalog is copied, and then there are two files"
    assert inodes[2:] == [*inodes[:2] * 3]
    assert as_built_from_nothing(root, tmp_path)
    assert Path(root / "catalog.duckdb").stat().st_mode & 0o777 == 0o444
    with Store(root, check=True) as store:
        assert store.sql("select count(*) from trees").item() == 2 * N_BATCHES


def test_a_commit_hashes_each_of_its_three_catalogs_once_and_attaches_the_present_one_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is there, the one that is kept, and the new one; a writer's opening, and its publish."""
    root = tmp_path / "s.act"
    commit(root, 0, 1, 2)
    hashed, attached = list[int](), list[Path]()

    def hash_of(descriptor: int) -> str:
        hashed.append(os.fstat(descriptor).st_ino)
        return hash_of_all(descriptor)

    def attach(root: Path) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        attached.append(root)
        return attach_there(root)

    hash_of_all, attach_there = hashing.hash_of, tables.attached
    for module in (hashing, local, earlier):
        monkeypatch.setattr(module, "hash_of", hash_of)
    for of_module in (tables, build):
        monkeypatch.setattr(of_module, "attached", attach)
    with open_writer(root) as writer:
        assert attached == [root]
        inodes = {os.stat(root / name).st_ino for name in ("catalog.duckdb", KEPT)}
        numbers = pl.DataFrame({"token_id": [0], "x": [1]})
        relation = declare("marks", "token", "labels", "marks", numbers)
        writer.label(relation, relation.fit(numbers))
    assert attached == [root, root]
    assert sorted(hashed) == sorted([*inodes, os.stat(root / "catalog.duckdb").st_ino])


def test_a_reader_keeps_its_snapshot_while_catalogs_follow_one_another(tmp_path: Path) -> None:
    root = tmp_path / "s.act"
    commit(root, 0, 1, 2)
    with Store(root) as store:
        before = store.sql("from tokens").rows()
        commit(root, *range(3, N_BATCHES))
        assert store.sql("from tokens").rows() == before
    assert as_built_from_nothing(root, tmp_path)


def test_a_file_that_is_open_or_mapped_elsewhere_keeps_its_bytes(tmp_path: Path) -> None:
    """As of a program that copies the store, and locks nothing."""
    root = tmp_path / "s.act"
    commit(root, 0, 1, 2)
    before = (root / "catalog.duckdb").read_bytes()
    with open(root / "catalog.duckdb", "rb") as copied:
        commit(root, 3, 4, 5)
        assert copied.read() == before


def test_a_backup_of_hard_links_keeps_its_bytes(tmp_path: Path) -> None:
    root = tmp_path / "s.act"
    commit(root, 0, 1, 2)
    before = (root / "catalog.duckdb").read_bytes()
    os.link(root / "catalog.duckdb", tmp_path / "backup")
    commit(root, 3, 4, 5)
    assert (tmp_path / "backup").read_bytes() == before


def test_a_writer_that_died_before_its_catalog_was_in_place_leaves_the_present_one_alone(tmp_path: Path) -> None:
    root = tmp_path / "s.act"
    commit(root, 0, 1, 2)
    (root / KEPT).unlink()
    os.link(root / "catalog.duckdb", root / KEPT)  # it is linked, and then renamed over
    before, inode = (root / "catalog.duckdb").read_bytes(), os.stat(root / "catalog.duckdb").st_ino
    os.link(root / "catalog.duckdb", tmp_path / "watched")
    assert commit(root, 3) != inode
    assert (tmp_path / "watched").read_bytes() == before
    assert as_built_from_nothing(root, tmp_path)


@pytest.mark.parametrize("what", ["flipped", "cut", "another's", "a folder", "a link"])
def test_a_kept_file_that_is_not_what_was_put_in_place_is_not_used(
    tmp_path: Path, copies: list[Path], what: str
) -> None:
    root = tmp_path / "s.act"
    commit(root, 0, 1, 2)
    kept = root / KEPT
    content = bytearray(kept.read_bytes())
    kept.unlink()
    if what == "a folder":
        kept.mkdir()
    elif what == "a link":
        (tmp_path / "victim").write_bytes(content)
        kept.symlink_to(tmp_path / "victim")
    elif what == "another's":
        with duckdb.connect(str(kept)) as connection:
            connection.execute("create table snapshot as select 3 as format_version, 1 as snapshot, '' as log_xxh3_128")
    else:
        content[len(content) // 2] ^= 1
        kept.write_bytes(content[: len(content) // (1 if what == "flipped" else 2)])
    copies.clear()
    commit(root, 3)
    assert copies, "the present catalog is copied"
    if what == "a link":
        assert (tmp_path / "victim").read_bytes() == content
    assert as_built_from_nothing(root, tmp_path)


def test_dropped_rows_are_not_kept(tmp_path: Path) -> None:
    root = tmp_path / "s.act"
    commit(root, 0, 1, 2)
    assert (root / KEPT).exists()
    with Store(root) as store:
        rows = store.sql("select token_id, 1 as x from tokens limit 2")
        store.label("marks", rows)
        store.label("marks", rows, replace=True)
    assert not (root / KEPT).exists()
    commit(root, 3, 4)
    assert as_built_from_nothing(root, tmp_path)


def test_nothing_is_kept_where_the_file_system_has_no_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the room of a catalog, and never be used."""

    def no_lease(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return fcntl.fcntl(descriptor, command, argument)

    without = SimpleNamespace(**{**vars(fcntl), "fcntl": no_lease})
    monkeypatch.setattr(earlier, "fcntl", without)
    commit(tmp_path / "s.act", 0, 1, 2)
    assert not (tmp_path / "s.act" / KEPT).exists()


def test_a_small_catalog_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    commit(tmp_path / "s.act", 0, 1, 2)
    assert not (tmp_path / "s.act" / KEPT).exists()


def test_the_writer_of_many_catalogs_needs_one_copy(tmp_path: Path, copies: list[Path]) -> None:
    root = tmp_path / "s.act"
    with open_writer(root, make=True) as writer:
        for batch in range(N_BATCHES):
            run().write(writer, [batch])
            writer.publish()
    assert len(copies) == 1
    assert as_built_from_nothing(root, tmp_path)
