"""A store whose bytes are no files of this machine: the same verbs, the same rows, the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actstore.errors import BadInput, Busy, Damaged, NotStored
from actstore.storage import at as addresses
from actstore.storage.at import at, place
from actstore.storage.backend import Storage
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.committed import check_plan, committed_batches, committed_datasets
from actstore.writing.recording import wait_until_free
from actstore.writing.writer import open_writer
from tests.elsewhere import SCHEME, Elsewhere, address, calls
from tests.storage_contract import StorageContract
from tests.stores import TABLES, Fake, fake, files

SITES = ("resid_post.0", "pattern.0")


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(addresses.BACKENDS, SCHEME, Elsewhere)
        yield


class TestElsewhere(StorageContract):
    def empty(self, tmp_path: Path) -> Storage:
        (tmp_path / "objects").mkdir()
        return Elsewhere(address(tmp_path))

    def put_in_the_way(self, place: Storage, path: str) -> None:
        pytest.skip("nothing but an object has a name there")


@pytest.fixture(scope="module")
def run() -> Fake:
    return fake(n_trees=8, trees_per_shard=3)


@pytest.fixture
def root(run: Fake, tmp_path: Path) -> Path:
    """The address of the run's store, elsewhere; its files lie in tmp_path/s.act/objects."""
    run.store(root := address(tmp_path / "s.act"))
    return root


@pytest.fixture
def beside(run: Fake, tmp_path: Path) -> Path:
    """The same store as a folder."""
    run.store(tmp_path / "folder" / "s.act")
    return tmp_path / "folder" / "s.act"


def shards(root: Path) -> list[str]:
    return [path for path in at(root).list("activations.zarr/") if "/c/" in path]


def flip(root: Path, path: str) -> None:
    content = bytearray(at(root).read(path))
    content[len(content) // 2] ^= 1
    at(root).swap(path, bytes(content))


def no_model(*asked: object) -> dict[str, bytes]:
    raise Damaged("there is no model here")


@pytest.mark.parametrize("check", [False, True])
def test_a_store_elsewhere_reads_as_the_same_store_in_a_folder(root: Path, beside: Path, check: bool) -> None:
    with Store(str(root), check) as there, Store(beside, check) as here:
        for table in TABLES:
            asked = f"from {table}" + " where true" * (table == "snapshot")
            if table != "snapshot":  # the hash of the log is that of the same manifests, too
                assert there.sql(asked).equals(here.sql(asked)), table
        assert (there.runs(), there.sites("r"), there.snapshot) == (here.runs(), here.sites("r"), here.snapshot)
        for site in SITES:
            asked = "select token_id from tokens where position % 3 = 0"
            (X, rows), (wanted, of) = there.read(asked, site=site), here.read(asked, site=site)
            np.testing.assert_array_equal(X, wanted)
            assert rows.equals(of)
            assert there.explain(asked, site=site) == here.explain(asked, site=site)
        batches = [
            there.batches("from tokens", site="resid_post.0", seed=3),
            here.batches("from tokens", site="resid_post.0", seed=3),
        ]
        for (X, _), (wanted, _) in zip(*batches, strict=True):
            np.testing.assert_array_equal(X, wanted)


def test_every_file_is_the_same_byte_for_byte_and_came_through_the_verbs(root: Path, beside: Path) -> None:
    theirs = files(Path(str(root).removeprefix(f"{SCHEME}:")) / "objects")
    derived = ("catalog.duckdb", "catalog.json", "store.json")
    assert {path: content for path, content in theirs.items() if path not in derived} == {
        path: content for path, content in files(beside).items() if path not in derived
    }
    assert theirs.keys() == files(beside).keys()
    before = calls.copy()
    assert not verify(root).damage
    assert (calls - before)["read"] >= len(theirs)
    assert (calls - before)["publish"] == 0


def test_a_store_elsewhere_is_written_on_and_leased_and_refused_as_any(root: Path, run: Fake, tmp_path: Path) -> None:
    assert committed_batches(root, "r") == {0, 1, 2}
    assert committed_datasets(root)["d"]
    check_plan(root, run.plan)
    with open_writer(root), pytest.raises(Busy), open_writer(root):
        pass
    assert wait_until_free(root, 0) == ""
    fake("s", "e", seed=1).store(root)
    at(root).publish("parts/trees/stray.parquet", b"left by a writer that was stopped")
    assert [finding.kind for finding in verify(root).findings] == ["stray"]
    with open_writer(root):
        assert not verify(root).findings
    with Store(root) as store:
        assert store.runs() == ["r", "s"]
    with pytest.raises(NotStored, match="does not exist"):
        Store(address(tmp_path / "no.act"))
    with pytest.raises(BadInput, match="leads to none"):
        place("hdfs://bucket/s.act")


@pytest.mark.parametrize("kind", ["part", "catalog", "group"])
def test_what_is_damaged_elsewhere_is_found_and_mended(root: Path, kind: str) -> None:
    part = next(path for path in at(root).list("parts/") if "/trees/" in path)
    path = {
        "part": part,
        "catalog": "catalog.duckdb",
        "group": "activations.zarr/zarr.json",
    }[kind]
    before, content = at(root).token(path), at(root).read(path)
    flip(root, path)
    assert path in [finding.path for finding in verify(root).damage]
    assert path in repair(root, no_model).mended
    assert not verify(root).damage
    assert kind == "catalog" or (at(root).token(path), at(root).read(path)) == (before, content)


def test_a_shard_that_was_flipped_is_found_and_refused_with_check_and_mended_by_who_computes_it(root: Path) -> None:
    path = shards(root)[0]
    content = at(root).read(path)
    flip(root, path)
    assert [finding.path for finding in verify(root).damage] == [path]
    site = next(site for site in SITES if site.split(".")[0] in path)
    with Store(root, check=True) as store, pytest.raises(Damaged, match="not what was committed"):
        store.read("from tokens", site=site)
    assert [finding.path for finding in repair(root, no_model).left] == [path]
    assert repair(root, lambda *asked: {path: content}).mended[:1] == [path]
    assert not verify(root).damage


def test_a_missing_file_is_told_as_in_a_folder(root: Path) -> None:
    at(root).delete(shards(root)[0])
    with pytest.raises(Damaged, match=r"c/0/0/0.* is missing; commit"):
        Store(root)
    assert [finding.what for finding in verify(root, quick=True).damage] == ["is missing"]


def test_nothing_is_written_under_the_address_as_if_it_were_a_path(
    run: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run.store(root := address(tmp_path / "s.act"))
    with Store(root) as store:
        store.read("from tokens", site="resid_post.0")
    assert os.listdir(tmp_path) == ["s.act"]
