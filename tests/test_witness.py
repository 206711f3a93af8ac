"""Manifests that were edited with a right checksum: the chain, the catalog and what each names are witnesses against them."""

import shutil
from dataclasses import replace

import pytest

from actstore.catalog import tables, witness
from actstore.commits import log
from actstore.commits.manifest import Manifest, manifest_path
from actstore.errors import Damaged
from actstore.ingest.replay.remake import files_of
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
from tests.stores import fake, files
from tests.test_old_stores import unpack


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of five commits: a run and its two batches, another run and its batch."""
    root = tmp_path_factory.mktemp("whole") / "s.act"
    fake(n_trees=3, trees_per_shard=2).store(root)
    fake("s", "e", n_trees=2, seed=1).store(root)
    return root


@pytest.fixture
def root(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s.act")
    return tmp_path / "s.act"


def edit(root, number, chained=False, **changes):
    """Write a manifest anew with a right checksum; chained, also all after it, each with the hash of the one before."""
    manifests, before = log.manifests(root), ""
    for manifest in manifests[number - 1 : None if chained else number]:
        edited = replace(manifest, **changes if manifest.number == number else {})
        if chained and manifest.number > number:
            edited = replace(edited, previous=before)
        path = root / manifest_path(manifest.number)
        path.unlink()
        path.write_bytes(edited.to_json())
        before = Manifest.from_json(path.read_bytes(), path).xxh3_128


def refused(root, kind, said, what):
    """Verify finds it, a writer and repair refuse it, and no file is touched."""
    before = files(root)
    assert {found.kind for found in verify(root).damage} == {kind}
    assert said in " ".join(found.what for found in verify(root).damage)
    assert {found.kind for found in verify(root, quick=True).damage} == {kind}
    with pytest.raises(Damaged):
        Store(root)
    for act in (mend,) if kind == "manifest" else (mend, writer):
        with pytest.raises(Damaged, match=what) as caught:
            act(root)
        assert "\n" not in str(caught.value)
    assert files(root) == before


def writer(root):
    with open_writer(root):
        pass


def mend(root):
    return repair(root, files_of)


def test_a_manifest_that_dropped_files_is_refused_and_they_stay(root):
    last = log.manifests(root)[-1]
    dropped = last.shards[0].path
    edit(root, 5, shards=last.shards[1:])
    refused(root, "conflict", f"holds {dropped} with hash", "disagree, so one of them was edited .*nothing was touched")
    (root / tables.CATALOG).unlink()  # which the message advises where the manifests are right
    repair(root, files_of)
    assert not (root / dropped).exists()
    assert verify(root).findings == []


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (5, lambda of: {"parts": of.parts[1:]}),
        (5, lambda of: {"parts": [replace(of.parts[0], xxh3_128="0" * 32), *of.parts[1:]]}),
        (4, lambda of: {"others": of.others[:-1]}),
    ],
)
def test_a_log_that_was_edited_and_chained_anew_is_not_the_one_the_catalog_was_built_from(root, number, change):
    edit(root, number, chained=True, **change(log.manifests(root)[number - 1]))
    before = files(root)
    assert "conflict" in {found.kind for found in verify(root).damage}
    for act in (mend, lambda root: witness.refuse_conflict(root, log.manifests(root))):
        with pytest.raises(Damaged, match=r"disagree.* the catalog was built from manifests of hash"):
            act(root)
    assert files(root) == before


def test_a_catalog_that_is_damaged_is_no_witness(root):
    edit(root, 5, shards=log.manifests(root)[-1].shards[1:])
    (root / tables.CATALOG).chmod(0o644)
    with (root / tables.CATALOG).open("ab") as file:
        file.write(b"x")
    repair(root, files_of)
    assert verify(root).findings == []


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [
        (5, {"run": "r"}, "it commits batch 0 of run 'r', which manifest 2 commits"),
        (5, {"run": "t"}, "it says that it commits batch 0 of run 't', and names activations.zarr/s/"),
        (5, {"batch": 1}, "it says that it commits batch 1 of run 's', and names activations.zarr/s/"),
        (5, {"run": None, "batch": None, "kind": "results"}, "names activations.zarr/s/"),
        (4, {"run": "t"}, "it says that it commits run 't', and names parts/runs/s.parquet"),
        (1, {"run": "s"}, "it says that it commits run 's', and names parts/runs/r.parquet"),
    ],
)
def test_a_manifest_that_carries_the_name_of_another_run_is_found(root, number, change, said):
    edit(root, number, chained=True, **change)
    (root / tables.CATALOG).unlink()  # the manifests alone tell
    before = files(root)
    assert said in " ".join(found.what for found in verify(root).damage if found.kind == "manifest")
    with pytest.raises(Damaged, match=r"nothing was touched|restore it from a copy"):
        repair(root, files_of)
    assert files(root) == before


@pytest.mark.parametrize("copied", [2, 4])
def test_a_manifest_in_the_place_of_another_is_found(root, copied):
    other = log.manifests(root)[copied - 1]
    copied_fields = {"kind": other.kind, "run": other.run, "batch": other.batch, "parts": other.parts}
    edit(root, 5, **copied_fields, shards=other.shards, others=other.others)
    refused(root, "manifest", f"which manifest {copied} commits", "restore it from a copy")


@pytest.mark.parametrize("number", [1, 4])
def test_an_edit_in_the_past_shows_in_verify_and_nothing_is_mended(root, number):
    of = log.manifests(root)[number - 1]
    edit(root, number, shards=of.shards[:-1], parts=of.parts[:-1])
    refused(root, "manifest", f"not the one that manifest {number + 1} was written after", "restore it from a copy")


@pytest.mark.parametrize("name", ["format-1", "format-2", "format-2-checksums"])
def test_the_catalog_of_an_older_store_is_a_witness_too(tmp_path, name):
    root = unpack(name, tmp_path)
    number = next(of.number for of in log.manifests(root) if of.shards)
    edit(root, number, shards=log.manifests(root)[number - 1].shards[1:])
    before = files(root)
    assert "conflict" in {found.kind for found in verify(root).damage}
    with pytest.raises(Damaged, match=r"disagree.*the catalog holds .* rows of table shards, and the manifests name"):
        repair(root, files_of)
    assert files(root) == before


def test_the_one_number_that_any_edit_of_the_past_changes(root):
    with Store(root) as store:
        assert store.sql("select log_xxh3_128 from snapshot").item() == log.log_hash(log.manifests(root))
