"""Names in a store that lead to something else than they should: a pipe, a folder, a link to nowhere, a number beyond all."""

import os
import re
import shutil
import signal
from contextlib import contextmanager

import duckdb
import pytest

from actstore.catalog import tables
from actstore.commits.manifest import manifest_path
from actstore.errors import ActstoreError, Damaged, NotStored
from actstore.ingest.replay.remake import files_of
from actstore.storage import sealed
from actstore.storage.lease import LOCK
from actstore.storage.whole import discard
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
from tests.stores import fake, files

SHARD = "activations.zarr/r/blocks.0.hook_resid_post/c/0/0/0"
PART, MANIFEST = "parts/tokens/d-000001.parquet", manifest_path(2)
FILES = (SHARD, PART, MANIFEST, tables.CATALOG, tables.HASHES, "store.json", "activations.zarr/zarr.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("regular") / "s.act"
    fake(sites=["resid_post.0"]).store(root)
    return root


@pytest.fixture
def root(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "s.act")


@contextmanager
def within(seconds):
    """What waits for ever is stopped: an alarm ends the process."""
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def read(root):
    with Store(root) as store:
        store.read("select token_id from tokens", "r", "resid_post.0")


def write(root):
    with open_writer(root):
        pass


def ends(work, root):
    """The package's error that work ends in, if it does; any other is the test's."""
    try:
        with within(60):
            work(root)
    except ActstoreError as error:
        return error
    return None


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_never_waited_for(root, name, put):
    (root / name).unlink()
    put(root / name)
    before = sorted(path for path in root.rglob("*"))
    failed = ends(read, root)
    assert (failed is None) == (name in (tables.HASHES, "activations.zarr/zarr.json")), (
        "which a plain read leaves alone"
    )
    assert sorted(path for path in root.rglob("*")) == before, "opening changed the store"
    found = {finding.path for finding in verify(root).damage}
    assert name in found
    assert isinstance(failed, Damaged | None)
    ends(write, root)
    ends(lambda path: repair(path, files_of), root)


def test_a_mended_store_has_no_pipe_where_its_catalog_was(root):
    (root / tables.CATALOG).unlink()
    os.mkfifo(root / tables.CATALOG)
    with within(60):
        repair(root, files_of)
    assert verify(root).findings == []


@pytest.mark.parametrize("name", ["99999999.json", f"{'9' * 30}.json", f"1{'0' * 200}.json"])
def test_a_manifest_of_any_number_is_a_gap_that_is_told_at_once(root, name):
    (root / "log" / name).write_bytes(b"{}")
    with within(60), pytest.raises(Damaged, match="lacks manifest 4 of "):
        Store(root)
    with within(60):
        first, *others = verify(root).damage
    assert (first.path, first.what) == (
        manifest_path(4),
        f"is missing, as are all up to {int(name.removesuffix('.json')) - 1} (if no commit of the store wrote "
        f"{root / 'log' / name}, remove that file)",
    )
    assert len(others) == 1
    advice = re.escape(f"(if no commit of the store wrote {root / 'log' / name}, remove that file)")
    for work in (read, write, lambda path: repair(path, files_of)):
        with pytest.raises(Damaged, match=advice):
            work(root)
    (root / "log" / name).unlink()
    read(root)


def test_a_file_after_a_manifest_that_the_catalog_holds_is_not_to_be_removed(root):
    (root / manifest_path(2)).unlink()
    for work in (read, write, lambda path: repair(path, files_of)):
        with pytest.raises(Damaged, match="restore it from a copy") as refused:
            work(root)
        assert "remove that file" not in str(refused.value)


def test_names_that_no_commit_has_are_no_manifests(root):
    for name in ("000000004.json", "٠٠٠٠٠٠٠٤.json", "4.json"):
        (root / "log" / name).write_bytes(b"{}")
    Store(root).close()
    assert {finding.kind for finding in verify(root).findings} == {"stray"}


def test_a_catalog_of_two_thousand_million_commits_is_told_at_once(root):
    (root / tables.CATALOG).chmod(0o644)
    with duckdb.connect(str(root / tables.CATALOG)) as connection:
        connection.execute("update snapshot set snapshot = 2000000000")
    with within(60), pytest.raises(Damaged, match="lacks manifest 4 of 2000000000"):
        Store(root)
    with within(60):
        assert [finding.path for finding in verify(root).damage] == [tables.CATALOG]
        write(root)  # which builds it anew
    assert verify(root).findings == []


def test_a_lease_that_is_no_file_is_refused(root):
    (root / LOCK).unlink()
    for put in (os.mkdir, os.mkfifo):
        put(root / LOCK)
        with within(60), pytest.raises(Damaged, match=r"\.lock .*remove (it|what stands there), then go on"):
            write(root)
        discard(root / LOCK)
    write(root)


def test_a_link_to_nowhere_in_the_place_of_a_folder_is_told_and_kept(tmp_path):
    root = tmp_path / "s.act"
    with open_writer(root, make=True):
        pass
    (root / "parts").rmdir()
    (root / "parts").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Damaged, match="parts is a link "):
        fake().store(root)
    assert (root / "parts").is_symlink()
    Store(root).close()
    (tmp_path / "nowhere").mkdir()
    fake().store(root)  # as the message says: put back what it led to
    assert verify(root).findings == []


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 16_000, b"\xff" + b" " * 10**6])
def test_a_store_json_of_any_length_is_given_up_soon(root, content):
    (root / "store.json").chmod(0o644)
    (root / "store.json").write_bytes(content)
    with within(60):
        for work in (read, write, lambda path: repair(path, files_of)):
            assert isinstance(ends(work, root), Damaged)
    assert [finding.kind for finding in verify(root).findings] == ["store.json"]


def test_a_long_file_is_read_no_further_than_it_can_be(root):
    (root / MANIFEST).chmod(0o644)
    os.truncate(root / MANIFEST, 2**40)  # sparse: it takes no disk
    with pytest.raises(Damaged, match=r"has 1,099,511,627,776 bytes"):
        Store(root)
    assert {finding.path for finding in verify(root).damage} == {MANIFEST}


def test_one_bit_of_a_file_as_long_as_manifests_are_is_still_flipped_back():
    whole = sealed.to_json({"parts": ["x" * 40] * 40})
    bad = bytearray(whole)
    bad[700] ^= 1
    assert sealed.flipped_back(bytes(bad)) == whole


def test_a_folder_without_a_store_is_none(tmp_path):
    with pytest.raises(NotStored):
        Store(tmp_path)
    assert files(tmp_path) == {}
