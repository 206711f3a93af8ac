"""A store in a bucket: the same verbs, the same rows, the same bytes as in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from actstore import verbs
from actstore.arrays import ranged
from actstore.errors import Busy, Damaged, NotStored
from actstore.storage import cache
from actstore.storage.at import at
from actstore.storage.bucket import Bucket
from actstore.store import Store
from actstore.upkeep.copying import copy
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
from tests.stores import TABLES, Fake, fake, files
from tests.test_objects import address, copied

SITES = ("resid_post.0", "pattern.0")


pytestmark = pytest.mark.usefixtures("s3")


@pytest.fixture(scope="module")
def run() -> Fake:
    return fake(n_trees=8, trees_per_shard=3)


@pytest.fixture(scope="module")
def kept(s3: dict[str, str], run: Fake) -> Path:
    """A store that is not to be changed."""
    run.store(root := address("kept"))
    return root


@pytest.fixture
def root(kept: Path) -> Path:
    """A copy of it."""
    return copied(kept)


@pytest.fixture
def beside(run: Fake, tmp_path: Path) -> Path:
    """The same store as a folder."""
    run.store(tmp_path / "folder" / "s.act")
    return tmp_path / "folder" / "s.act"


def shards(root: Path) -> list[str]:
    return [path for path in at(root).list("activations.zarr/") if "/c/" in path]


def flip(root: Path, path: str, place: int | None = None) -> None:
    content = bytearray(at(root).read(path))
    content[len(content) // 2 if place is None else place] ^= 1
    at(root).swap(path, bytes(content))


def no_model(*asked: object) -> dict[str, bytes]:
    raise Damaged("there is no model here")


@pytest.mark.parametrize("check", [False, True])
def test_a_store_in_a_bucket_reads_as_the_same_store_in_a_folder(kept: Path, beside: Path, check: bool) -> None:
    with Store(str(kept), check) as there, Store(beside, check) as here:
        for table in TABLES:
            asked = f"from {table}" + " where true" * (table == "snapshot")
            if table != "snapshot":
                assert there.sql(asked).equals(here.sql(asked)), table
        assert (there.runs(), there.sites("r"), there.snapshot) == (here.runs(), here.sites("r"), here.snapshot)
        assert there.sql("select count(*) as n from tokens", timeout=60)["n"].item() > 0
        for site in SITES:
            asked = "select token_id from tokens where position % 3 = 0 order by hash(token_id)"
            (X, rows), (wanted, of) = there.read(asked, site=site), here.read(asked, site=site)
            np.testing.assert_array_equal(X, wanted)
            assert rows.equals(of)
            assert there.explain(asked, site=site).chunks == here.explain(asked, site=site).chunks
        vectors = "select token_id, act(token_id, 'r', 'resid_post.0') as v from tokens order by token_id limit 5"
        assert there.sql(vectors).equals(here.sql(vectors))
        batches = [each.batches("from tokens", site="resid_post.0", seed=3) for each in (there, here)]
        for (X, _), (wanted, _) in zip(*batches, strict=True):
            np.testing.assert_array_equal(X, wanted)


def test_every_object_is_the_file_of_the_folder_byte_for_byte(kept: Path, beside: Path) -> None:
    theirs = {path: at(kept).read(path) for path in at(kept).list("")}
    derived = ("catalog.duckdb", "catalog.json", "store.json")
    ours = {path: content for path, content in files(beside).items() if path != ".lock"}
    assert {path: content for path, content in theirs.items() if path not in derived} == {
        path: content for path, content in ours.items() if path not in derived
    }
    assert theirs.keys() == ours.keys()
    assert not verify(kept).damage


@pytest.mark.parametrize("small", [0, 1 << 20])
@pytest.mark.parametrize("near", [0, 300, 1 << 20])
@pytest.mark.parametrize("site", SITES)
def test_rows_are_the_same_whatever_is_read_together(
    kept: Path, run: Fake, site: str, near: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranged, "NEAR", near)
    monkeypatch.setattr(ranged, "SMALL", small)
    with Store(kept) as store:
        wanted = run.activations[next(name for name in run.activations if site.split(".")[0] in name)]
        rows = store.sql("select tree_id, position, token_id from tokens order by hash(token_id) limit 40")
        X, _ = store.read(rows.select("token_id"), site=site)
        trees, positions = rows["tree_id"].to_numpy(), rows["position"].to_numpy()
        by_position = np.moveaxis(wanted, 1 if wanted.ndim == 3 else 2, 1)
        np.testing.assert_array_equal(X, by_position[trees, positions])
        explained = store.explain(rows.select("token_id"), site=site)
        assert explained.bytes_read >= explained.bytes_needed


def test_a_chunk_that_was_flipped_is_refused_where_it_is_read_whole(root: Path) -> None:
    [path] = [path for path in shards(root) if "resid_post" in path][:1]
    flip(root, path, 3)
    with Store(root) as store, pytest.raises(Damaged, match="has a chunk that is not what was committed"):
        store.read("from tokens", site="resid_post.0")


def test_a_store_in_a_bucket_is_written_on_and_leased_and_refused_as_any(root: Path) -> None:
    with open_writer(root), pytest.raises(Busy, match="is being written by process"), open_writer(root):
        pass
    fake("s", "e", seed=1).store(root)
    at(root).publish("parts/trees/stray.parquet", b"left by a writer that was stopped")
    assert [finding.kind for finding in verify(root).findings] == ["stray"]
    with open_writer(root):
        assert not verify(root).findings
    with Store(root) as store:
        assert store.runs() == ["r", "s"]
        store.read("select token_id from tokens where dataset = 'e'", run="s", site="resid_post.0")
    with pytest.raises(NotStored, match="does not exist"):
        Store(address("no"))


def test_only_the_present_catalog_is_kept(root: Path) -> None:
    before = [key for key in Bucket(root).sizes("") if key.startswith(".actstore/heads/")]
    fake("s", "e", seed=1).store(root)
    after = [key for key in Bucket(root).sizes("") if key.startswith(".actstore/heads/")]
    assert len(before) == len(after) == 1 != (before == after)
    assert not (cache.folder() / f"{before[0].rpartition('/')[2].split('-')[0]}.duckdb").exists()
    assert (cache.folder() / f"{after[0].rpartition('/')[2].split('-')[0]}.duckdb").exists()
    Bucket(root).put(".actstore/heads/catalog.duckdb/left-over", b"of a writer that was killed")
    with open_writer(root):
        pass
    assert [key for key in Bucket(root).sizes("") if key.startswith(".actstore/heads/")] == after


@pytest.mark.parametrize("kind", ["part", "catalog", "group"])
def test_what_is_damaged_in_a_bucket_is_found_and_mended(root: Path, kind: str) -> None:
    part = next(path for path in at(root).list("parts/") if "/trees/" in path)
    path = {"part": part, "catalog": "catalog.duckdb", "group": "activations.zarr/zarr.json"}[kind]
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


def test_a_head_whose_object_is_gone_is_told_and_mended(root: Path) -> None:
    [key] = [key for key in Bucket(root).sizes("") if key.startswith(".actstore/heads/")]
    Bucket(root).delete(key)
    shutil.rmtree(cache.folder(), ignore_errors=True)
    with pytest.raises(Damaged, match="leads to an object that is not there; mend it with `actstore repair"):
        Store(root)
    assert "catalog.duckdb" in repair(root, no_model).mended
    with Store(root, check=True) as store:
        assert store.sql("select count(*) from tokens").item()


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_a_catalog_that_is_not_what_its_head_says_is_found_and_mended(root: Path, how: str) -> None:
    bucket = Bucket(root)
    [key] = [key for key in bucket.sizes("") if key.startswith(".actstore/heads/")]
    content = bucket.get(key).content
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    bucket.put(key, {"cut": content[:middle], "flipped": flipped, "empty": b""}[how])
    shutil.rmtree(cache.folder(), ignore_errors=True)
    with pytest.raises(Damaged, match="its content is not what was put in place; mend it with `actstore repair"):
        Store(root)
    assert "catalog.duckdb" in [finding.path for finding in verify(root).damage]
    assert "catalog.duckdb" in repair(root, no_model).mended
    assert not verify(root).damage


def test_a_missing_object_is_told_as_a_missing_file(root: Path) -> None:
    at(root).delete(shards(root)[0])
    with pytest.raises(Damaged, match=r"c/0/0/0.* is missing; commit"):
        Store(root)
    assert [finding.what for finding in verify(root, quick=True).damage] == ["is missing"]


def test_a_store_is_copied_to_a_bucket_and_back_byte_for_byte(beside: Path, tmp_path: Path) -> None:
    copy(beside, there := address("copy"))
    assert not verify(there).damage
    copy(there, tmp_path / "back.act")
    ours, back = files(beside), files(tmp_path / "back.act")
    derived = ("catalog.duckdb", "catalog.json", "store.json", ".lock")
    assert ours.keys() == back.keys()
    assert all(back[path] == ours[path] for path in ours if path not in derived)


def test_labels_sites_results_and_drops_are_as_in_a_folder(root: Path, beside: Path, run: Fake) -> None:
    rows: list[object] = []
    for store in (root, beside):
        with Store(store) as opened:
            ids = opened.sql("select token_id from tokens order by token_id")
        verbs.label(store, "mine", ids.with_columns(label=pl.lit("x")))
        verbs.append(store, "r", "mine.0", ids, np.arange(len(ids) * 2, dtype=np.float32).reshape(-1, 2))
        verbs.view(store, "first_tokens", "select token_id from tokens where position = 0")
        with Store(store) as opened:
            X, _ = opened.read("from first_tokens", site="mine.0")
            rows.append((X.tolist(), opened.sql("from mine order by all").rows(), opened.sites("r")))
        verbs.drop(store, label="mine")
        fake("s", "e", seed=1).store(store)
        verbs.drop(store, run="r")
        rows.append(verify(store).findings)
        with Store(store) as opened:
            rows.append((opened.runs(), opened.sql("from shards order by all").rows()))
    assert rows[:3] == rows[3:]
    assert at(root).list("activations.zarr/") == at(beside).list("activations.zarr/")


def test_stores_of_a_bucket_and_of_a_folder_are_merged_in_a_bucket(root: Path, tmp_path: Path) -> None:
    fake("s", "e", seed=1).store(tmp_path / "other.act")
    verbs.merge([root, tmp_path / "other.act"], out := address("merged"))
    with Store(out) as store:
        assert store.runs() == ["r", "s"]
    assert not verify(out).damage
