"""Folders of a store that lie elsewhere, with a link in their place: the store goes on being read and written through them."""

import os
import shutil

import pytest

from actstore.catalog import tables
from actstore.commits.manifest import manifest_path
from actstore.errors import Damaged
from actstore.ingest.replay.remake import files_of
from actstore.storage import links
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
from tests.damaged import damage, flip
from tests.stores import fake, files

SITE = "activations.zarr/r/blocks.0.hook_resid_post"
FIRST, SECOND = fake(n_trees=3, trees_per_shard=2), fake("s", "e", n_trees=2, seed=1)
MOVED = ["log", "parts", "parts/trees", "activations.zarr/r", f"{SITE}/c", f"{SITE}/c/0/0/0", manifest_path(2)]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    root = tmp_path_factory.mktemp("first") / "s.act"
    FIRST.store(root)
    return root


@pytest.fixture
def root(first, tmp_path):
    shutil.copytree(first, tmp_path / "s.act")
    return tmp_path / "s.act"


def move(path, to):
    """Put a link to where a folder was moved into its place."""
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
    path.symlink_to(to)


def read(root):
    with Store(root, check=True) as store:
        X, rows = store.read("select token_id from tokens where tree_id < 3 order by all", "r", "resid_post.0")
        return X.tobytes(), rows.rows(), store.sql("from trees where dataset = 'd' order by all").rows()


@pytest.mark.parametrize("path", MOVED)
def test_what_was_moved_to_another_disk_is_read_and_written_through_its_link(root, tmp_path, path):
    before, elsewhere = read(root), tmp_path / "disk" / "moved"
    move(root / path, elsewhere)
    if elsewhere.is_dir():
        (elsewhere / "notes").write_text("mine")
    assert verify(root).findings == []
    SECOND.store(root)
    assert (root / path).is_symlink()
    assert verify(root).findings == []
    assert read(root) == before
    assert not elsewhere.is_dir() or (elsewhere / "notes").read_text() == "mine"


@pytest.mark.parametrize("beside", ["moved", "activations.zarr/moved"])
def test_a_link_to_a_folder_of_the_store_itself_keeps_it(root, beside):
    before = read(root)
    move(root / "activations.zarr/r", root / beside)
    (root / "activations.zarr/r").unlink()
    (root / "activations.zarr/r").symlink_to("between")  # which the writer would remove, were it on no way
    (root / "activations.zarr/between").symlink_to(os.path.relpath(root / beside, root / "activations.zarr"))
    (root / "activations.zarr/moved-not").write_text("a stray")
    SECOND.store(root)
    assert not (root / "activations.zarr/moved-not").exists()
    assert verify(root).findings == []
    assert read(root) == before


def test_a_name_of_another_folder_may_lead_to_a_file_of_this_one(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("kept", "stray"):
        (tmp_path / "a" / name).write_text("")
    (tmp_path / "b").symlink_to("a")
    assert links.unnamed(tmp_path, ["a"], ["b/kept"]) == ["a/stray"]


def test_named_files_are_not_looked_at_one_by_one_for_links(root, monkeypatch):
    looked = []
    monkeypatch.setattr(
        links.os.path, "islink", lambda path, islink=os.path.islink: looked.append(path) or islink(path)
    )
    named = [path for path in files(root) if path.startswith("parts/")]
    assert links.unnamed(root, ["parts"], named) == []
    assert looked == [f"{os.path.realpath(root)}/parts"], "the scan of a folder says what is a link"


def test_a_store_that_a_link_leads_to(root, tmp_path):
    before, link = read(root), tmp_path / "link.act"
    link.symlink_to(root)
    (root / "parts/tokens/left.parquet").write_bytes(b"half")
    assert [found.path for found in verify(link).findings] == ["parts/tokens/left.parquet"]
    SECOND.store(link)
    assert verify(link).findings == verify(root).findings == []
    assert read(link) == read(root) == before
    assert link.is_symlink()


@pytest.mark.parametrize("path", MOVED)
def test_a_link_that_leads_nowhere_is_refused_and_nothing_is_touched(root, tmp_path, path):
    move(root / path, tmp_path / "disk" / "moved")
    (root / "models/left").write_bytes(b"what a sweep would remove")
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    before = files(root), files(tmp_path / "unmounted")
    said = "is a link to .*moved, which is not there"
    for act in (Store, SECOND.store, lambda root: repair(root, files_of)):
        with pytest.raises(Damaged, match=said):
            act(root)
    if path.startswith("log/"):
        assert "which is not there" in verify(root, quick=True).damage[0].what
    else:
        assert all("which is not there" in found.what for found in verify(root).damage if path in found.path)
    assert (files(root), files(tmp_path / "unmounted")) == before
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    SECOND.store(root)
    assert verify(root).findings == []


def test_a_link_into_another_store_is_refused(root, tmp_path):
    other = tmp_path / "other.act"
    FIRST.store(other)
    shutil.rmtree(root / "activations.zarr/r")
    (root / "activations.zarr/r").symlink_to(other / "activations.zarr/r")
    before = files(root), files(other)
    assert [(found.path, found.kind) for found in verify(root).damage] == [("activations.zarr/r", "link")]
    for act in (SECOND.store, lambda root: repair(root, files_of)):
        with pytest.raises(Damaged, match=r"leads into another store, .*other\.act"):
            act(root)
    assert (files(root), files(other)) == before


def test_what_would_be_mended_in_the_place_of_another_file_is_refused(root):
    SECOND.store(root)
    shutil.rmtree(root / "activations.zarr/r")
    (root / "activations.zarr/r").symlink_to("s")
    before = files(root)
    assert verify(root).damage
    with pytest.raises(Damaged, match=r"lead to one file; remove the link, then run .actstore repair"):
        repair(root, files_of)
    assert files(root) == before


def test_a_link_that_leads_to_no_named_file_is_a_stray_and_what_is_behind_it_is_not(root, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    for path in ("activations.zarr/other", "parts/trees/mine", "log/mine"):
        (root / path).symlink_to(tmp_path / "mine")
    (root / "models/gone").symlink_to(tmp_path / "nowhere")
    found = verify(root).findings
    assert {(of.path, of.kind) for of in found} == {
        (path, "stray") for path in ("activations.zarr/other", "parts/trees/mine", "log/mine", "models/gone")
    }
    with open_writer(root):
        pass
    assert verify(root).findings == []
    assert (tmp_path / "mine" / "notes").read_text() == "mine"


def test_a_part_is_mended_behind_its_link(root, tmp_path):
    before = (root / "parts/trees/d-000000.parquet").read_bytes()
    move(root / "parts", tmp_path / "disk" / "moved")
    damage(root / "parts/trees/d-000000.parquet", flip(40))
    assert repair(root, files_of).mended == ["parts/trees/d-000000.parquet"]
    assert (tmp_path / "disk/moved/trees/d-000000.parquet").read_bytes() == before
    assert (root / "parts").is_symlink()
    assert verify(root).findings == []


def test_a_catalog_that_is_a_link_is_replaced_and_the_store_is_whole(root, tmp_path):
    move(root / tables.CATALOG, tmp_path / "disk" / "elsewhere.duckdb")
    SECOND.store(root)
    assert verify(root).findings == []
