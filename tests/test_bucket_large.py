"""Heads: of a catalog, with the snapshot's number and a nonce, and of a file that is too large for one put; many files at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actstore.commits import log
from actstore.commits.manifest import manifest_path
from actstore.errors import Busy, Damaged
from actstore.storage import bucket as requests
from actstore.storage import objects
from actstore.storage.at import at
from actstore.storage.backend import File
from actstore.storage.bucket import Bucket
from actstore.storage.objects import HEAD_BYTES, Head
from actstore.store import Store
from actstore.upkeep.copying import copy
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.verbs import merge
from actstore.writing.writer import open_writer
from tests.storage_contract import RACERS, at_once, described
from tests.stores import fake
from tests.test_bucket_store import no_model, shards
from tests.test_objects import address

pytestmark = pytest.mark.usefixtures("s3")
RUN = fake(n_trees=6, trees_per_shard=2)


def head(root: Path, path: str = "catalog.duckdb") -> Head | None:
    return Head.of(Bucket(root).get(path).content)


def test_the_head_of_a_catalog_holds_its_snapshot_and_a_nonce() -> None:
    RUN.store(root := address("number"), [0])
    first = head(root)
    RUN.store(root)
    second = head(root)
    assert first is not None
    assert second is not None
    with Store(root) as store:
        assert (first.number, second.number) == (2, store.snapshot) == (2, 4)
    with pytest.raises(Busy, match=r"changed .*catalog.duckdb meanwhile \(to snapshot 4\)"):
        at(root).swap("catalog.duckdb", lambda path: path.write_bytes(b"late"), first.xxh3_128, 3)
    assert head(root) == second


def test_the_same_content_put_twice_is_told_apart_by_its_nonce() -> None:
    place, bucket = at(root := address("nonce")), Bucket(root)
    place.swap("x", lambda path: path.write_bytes(b"one"))
    first, token = bucket.get("x"), place.token("x")
    place.swap("x", lambda path: path.write_bytes(b"two"))
    place.swap("x", lambda path: path.write_bytes(b"one"))
    assert place.token("x") == token
    assert not bucket.replace("x", first.content, first.version), "it is not the one that was read"


def test_heads_of_earlier_stores_are_read() -> None:
    for content in (b"actstore head 1\n%032d 7\n%032d\n", b"actstore head 1\n%032d 7\n%032d 3\n"):
        found = Head.of((content % (1, 2)).ljust(HEAD_BYTES - 1) + b"\n")
        assert found is not None
        assert found.to_bytes().startswith(content % (1, 2))


@pytest.fixture
def root() -> Path:
    return address("large")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files above 1,000 bytes count as too large for one put."""
    monkeypatch.setattr(objects, "ONE_PUT", 1000)
    monkeypatch.setattr(requests, "PART", 5 << 20)


@pytest.mark.usefixtures("large")
def test_a_file_too_large_for_one_put_is_put_in_parts_and_published_once(root: Path) -> None:
    place, content = at(root), np.random.default_rng(0).bytes(11 << 20)
    assert place.publish("parts/x", content) == place.publish("parts/x", content) == described("parts/x", content)
    assert (place.size("parts/x"), place.read("parts/x", 1 << 30), place.list("")) == (11 << 20, content, ["parts/x"])
    asked = [(0, 3), (6 << 20, 5), ((11 << 20) - 2, 9)]
    assert place.read_ranges("parts/x", asked) == [content[start : start + length] for start, length in asked]
    for other in (bytes(2000), b"small"):
        with pytest.raises(Damaged, match="exists with other content"):
            place.publish("parts/x", other)
    place.publish("parts/small", b"small")
    with pytest.raises(Damaged, match="exists with other content"):
        place.publish("parts/small", content)
    place.delete("parts/x")
    assert list(Bucket(root).sizes("")) == ["parts/small"], "nothing is left of what was refused or deleted"


@pytest.mark.usefixtures("large")
def test_of_eight_that_publish_a_large_file_one_wins_and_the_rest_is_swept(root: Path) -> None:
    place = at(root)
    contents = [f"{racer} ".encode() * 1000 for racer in range(RACERS)]
    said = at_once(place.publish, "parts/x", contents)
    assert [place.read("parts/x")] == [
        content for content, answer in zip(contents, said, strict=True) if isinstance(answer, File)
    ]
    Bucket(root).put(".actstore/heads/parts/y/left", b"of a writer that was killed")
    assert place.list("") == ["parts/x"]
    place.tidy([], ["parts"])
    assert len(Bucket(root).sizes("")) == 2


@pytest.mark.parametrize("at_a_time", [1, 32])
def test_a_store_of_large_files_is_like_any_other(
    large: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at_a_time: int
) -> None:
    """Sizes are listed, or asked for one by one."""
    monkeypatch.setattr(objects, "AT_ONCE", at_a_time)
    RUN.store(root := address("large"))
    assert head(root, shards(root)[0])
    RUN.store(beside := tmp_path / "beside.act")
    for check in (False, True):
        with Store(root, check) as there, Store(beside) as here:
            asked = "select token_id from tokens order by hash(token_id)"
            X, wanted = (store.read(asked, site="pattern.0")[0] for store in (there, here))
            np.testing.assert_array_equal(X, wanted)
    assert not verify(root).findings
    copy(root, tmp_path / "back.act")
    assert at(tmp_path / "back.act").list("activations.zarr/") == at(root).list("activations.zarr/")
    content, path = at(root).read(shards(root)[0]), shards(root)[0]
    at(root).delete(path)
    assert repair(root, lambda *asked: {path: content}).mended == [path]
    with open_writer(root):
        assert not verify(root).findings


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """(path, `begins` or `ends`) of every object that is put or swapped, in their order; each takes a moment."""
    found, lock = list[tuple[str, str]](), threading.Lock()
    for name in ("create", "replace"):
        put = getattr(Bucket, name)

        def noted(self: Bucket, path: str, *more: object, put: object = put) -> object:
            with lock:
                found.append((path, "begins"))
            time.sleep(0.01)
            done = put(self, path, *more)  # type: ignore[operator]
            with lock:
                found.append((path, "ends"))
            return done

        monkeypatch.setattr(Bucket, name, noted)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("way", ["ingest", "copy", "merge"])
def test_several_files_are_put_at_once_and_all_before_the_commit_that_names_them(
    puts: list[tuple[str, str]], way: str, tmp_path: Path
) -> None:
    if way != "ingest":
        RUN.store(tmp_path / "s.act")
        fake("s", "e", n_trees=2, seed=1).store(tmp_path / "t.act")
    root = address("order")
    {
        "ingest": lambda: RUN.store(root),
        "copy": lambda: copy(tmp_path / "s.act", root),
        "merge": lambda: merge([tmp_path / "s.act", tmp_path / "t.act"], root),
    }[way]()
    at_once, most = 0, 0
    for path, what in puts:
        if not path.startswith(".actstore"):
            at_once += 1 if what == "begins" else -1
            most = max(most, at_once)
    assert 2 <= most <= at(root).at_once
    committed = log.manifests(root)
    for manifest in committed:
        begins = puts.index((manifest_path(manifest.number), "begins"))
        assert all(puts.index((file.path, "ends")) < begins for file in manifest.files)
    last = max(puts.index((manifest_path(manifest.number), "ends")) for manifest in committed)
    catalog = max(index for index, (path, what) in enumerate(puts) if (path, what) == ("catalog.duckdb", "begins"))
    assert catalog > last
    assert not verify(root).findings
    assert repair(root, no_model).mended == []
