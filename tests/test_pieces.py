"""A large catalog in a bucket is kept in pieces: a new snapshot brings, and fetches, only what is new."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import Damaged
from actstore.storage import cache, pieces
from actstore.storage.bucket import Bucket
from actstore.storage.pieces import Pieces
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
from tests.stores import fake
from tests.test_bucket_store import no_model
from tests.test_objects import address

HEADS = ".actstore/heads/catalog.duckdb/"


@pytest.fixture
def root(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pieces, "FROM", 1 << 20)
    fake(n_trees=8, trees_per_shard=2, sites=("embed",)).store(root := address("store"), [0, 1])
    return root


def held(root: Path) -> set[str]:
    return {key[len(HEADS) :] for key in Bucket(root).sizes(HEADS)}


def of_pieces(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("piece-")}


def fetched(root: Path, monkeypatch: pytest.MonkeyPatch, n_trees: int) -> set[str]:
    """Open the store, and return the pieces that were asked for."""
    asked, real = set[str](), Bucket.get

    def get(bucket: Bucket, path: str, most: int | None = None) -> object:
        asked.add(path.rpartition("/")[2])
        return real(bucket, path, most)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "get", get)
        with Store(root) as store:
            assert store.sql("select count(*) from trees").item() == n_trees
    return of_pieces(asked)


def test_a_new_snapshot_brings_and_fetches_only_new_pieces(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = cache.folder()
    monkeypatch.setenv(cache.FOLDER, str(elsewhere.with_name("another-machine")))
    before = held(root)
    assert len(of_pieces(before)) > 5
    assert len(before - of_pieces(before)) == 1
    assert fetched(root, monkeypatch, 4) == of_pieces(before), "a machine without a cache fetches all"
    assert not fetched(root, monkeypatch, 4), "and then none"

    monkeypatch.setenv(cache.FOLDER, str(elsewhere))
    fake(n_trees=8, trees_per_shard=2, sites=("embed",)).store(root, [2])
    after = held(root)
    assert len(after - of_pieces(after)) == 1, "the list of the snapshot before is gone, and its own pieces"
    new = of_pieces(after - before)
    assert new < of_pieces(after), "a catalog shares pieces with the one before"
    monkeypatch.setenv(cache.FOLDER, str(elsewhere.with_name("another-machine")))
    assert fetched(root, monkeypatch, 6) == new
    shutil.rmtree(cache.folder())
    assert fetched(root, monkeypatch, 6) == of_pieces(after)


def test_a_writer_keeps_the_pieces_and_removes_those_that_nobody_lists(root: Path) -> None:
    before = held(root)
    Bucket(root).put(f"{HEADS}piece-{'0' * 32}", b"of a writer that was killed")
    with open_writer(root):
        pass
    assert held(root) == before
    assert not verify(root).findings


@pytest.mark.parametrize("how", ["gone", "flipped"])
def test_a_piece_that_is_damaged_is_told_and_mended(root: Path, how: str) -> None:
    piece = max(of_pieces(held(root)))
    if how == "gone":
        Bucket(root).delete(HEADS + piece)
    else:
        content = Bucket(root).get(HEADS + piece).content
        Bucket(root).put(HEADS + piece, bytes([content[0] ^ 1]) + content[1:])
    shutil.rmtree(cache.folder(), ignore_errors=True)
    with pytest.raises(Damaged, match="mend it with `actstore repair"):
        Store(root)
    assert "catalog.duckdb" in repair(root, no_model).mended
    with Store(root, check=True) as store:
        assert store.sql("select count(*) from trees").item() == 4


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(1, 40))
def test_pieces_make_the_file_whatever_is_near(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, near: bytes, length: int
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "file").write_bytes(content)
    (folder / "near").write_bytes(near)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "HEADER", 16)
        listed = Pieces.of_file(folder / "file", length)
        assert Pieces.of(listed.to_bytes()) == listed
        held: dict[str, bytes] = {}
        listed.put(folder / "file", [], held.__setitem__)
        listed.write(folder / "again", [folder / "near", folder / "none"], held.__getitem__)
    assert (folder / "again").read_bytes() == content


def test_an_object_that_is_no_list_is_none() -> None:
    listed = Pieces(100, 10, ["0" * 32] * 11)
    for content in (b"", b"DUCK", listed.to_bytes(), listed.to_bytes()[:-1], b"actstore pieces 1\n1 0\n"):
        assert Pieces.of(content) is None
