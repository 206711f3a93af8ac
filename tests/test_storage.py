"""A folder of this machine as a place for bytes; and every file that is replaced, written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from actstore.errors import Busy, Damaged, NoRoom, Unsupported
from actstore.ingest.models.weights import replace
from actstore.outputs import replacing
from actstore.storage.backend import Storage
from actstore.storage.local import Local
from actstore.storage.whole import write_whole
from tests.storage_contract import StorageContract
from tests.stores import fake


class TestLocal(StorageContract):
    def empty(self, tmp_path: Path) -> Storage:
        return Local(tmp_path)

    def put_in_the_way(self, place: Storage, path: str) -> None:
        assert isinstance(place, Local)
        (place.root / path).parent.mkdir()
        os.mkfifo(place.root / path)


def test_a_swap_writes_through_a_link_to_a_folder_and_lists_what_lies_there_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root := tmp_path / "s").mkdir()
    (root / "parts").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(root)
    place = Local(root)
    place.publish("parts/x", b"x")
    place.swap("parts/y", b"y")
    assert (root / "parts").is_symlink()
    assert place.list("parts/") == ["parts/x", "parts/y"]


def test_a_folder_in_the_place_of_a_file_is_damage_and_stays(tmp_path: Path) -> None:
    (tmp_path / "x" / "inner").mkdir(parents=True)
    with pytest.raises(Damaged, match="x is a folder, where a file belongs"):
        Local(tmp_path).swap("x", b"content")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "inner"]


REPLACE: dict[str, Callable[[Path], object]] = {
    "a file of the store": lambda path: Local(path.parent).swap(path.name, b"new"),
    "weights": lambda path: replace(path, b"new"),
    "an output": lambda path: replacing(path, lambda under_way: under_way.write_bytes(b"new")),
}


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("kind", REPLACE)
def test_whoever_replaces_a_file_leaves_the_old_one_where_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, call: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            REPLACE[kind](path)
    assert isinstance(caught.value, NoRoom)
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(path, b"old")]
    REPLACE[kind](path)
    assert path.read_bytes() == b"new"


def test_only_where_that_was_asked_for_a_file_is_written_without_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", lacking)
    with pytest.raises(Unsupported):
        write_whole(tmp_path / "x", lambda path: path.write_bytes(b"x"))
    assert list(tmp_path.iterdir()) == []
    write_whole(tmp_path / "x", lambda path: path.write_bytes(b"x"), surely=False)
    assert (tmp_path / "x").read_bytes() == b"x"


def test_a_catalog_that_another_put_in_place_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actstore.catalog import build

    fake().store(root := tmp_path / "s.act", [0])
    extend = build._extend

    def beaten(*args: object, **options: object) -> None:
        monkeypatch.setattr(build, "_extend", extend)
        build.publish(root, from_nothing=True)
        (root / "catalog.duckdb").chmod(0o644)
        (root / "catalog.duckdb").write_bytes(b"another's")
        extend(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "_extend", beaten)
    with pytest.raises(Busy, match=r"another process changed .*catalog\.duckdb meanwhile"):
        build.publish(root, from_nothing=True)
    assert (root / "catalog.duckdb").read_bytes() == b"another's"
    assert not list(root.glob(".catalog*"))


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    Local(tmp_path).publish("log/x", b"")
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(OSError, match="Too many open files"):
        Local(tmp_path).list("log/")
    monkeypatch.undo()
    assert Local(tmp_path).list("no/such/") == []
