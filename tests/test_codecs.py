"""Activations that are compressed without loss: the same numbers to every reader, and the same bytes on every machine."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc

from actstore.arrays.codec import CODECS, compressed
from actstore.arrays.coded import CodedReader
from actstore.arrays.layout import Layout
from actstore.arrays.metadata import as_written, metadata
from actstore.arrays.reader import SiteReader
from actstore.errors import BadInput, Damaged, NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.prepare import prepare
from actstore.ingest.replay.compare import compare
from actstore.ingest.replay.remake import files_of
from actstore.storage.local import Local
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from tests.test_dtypes import decoded, layouts, planted, tokens, write
from tests.test_pipeline import EVERY_SITE, contents, small_model, trees

DTYPES = ["float32", "float16", "bfloat16", "int8"]
SMALLER = CODECS[1:]


def of_codec(layout: Layout, codec: str) -> Layout:
    return Layout(layout.shape, layout.position_axis, layout.rows_per_chunk, layout.dtype, layout.stride, codec)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arrays")


@given(layouts(DTYPES), st.sampled_from(SMALLER), st.integers(0, 2**32), st.data())
@settings(max_examples=25, deadline=None)
def test_a_compressed_array_reads_as_the_mapped_one(
    folder: Path, layout: Layout, codec: str, seed: int, data: st.DataObject
) -> None:
    X, lengths = planted(layout, seed)
    plain, small = folder / "plain", folder / "small"
    paths = write(plain, layout, X, lengths)
    write(small, of_codec(layout, codec), X, lengths)
    ids, _ = tokens(layout, X, lengths)
    mapped = SiteReader(layout, 0, paths, "a site", Local(plain))
    coded = CodedReader(of_codec(layout, codec), 0, paths, "a site", Local(small))
    some = np.array(data.draw(st.lists(st.sampled_from(ids.tolist()), max_size=20)), np.int64)
    for wanted in (ids, some):
        np.testing.assert_array_equal(coded.gather(wanted), mapped.gather(wanted))
    one, other = coded.cost(np.unique(some)), mapped.cost(np.unique(some))
    assert (one.chunks, one.shards, one.bytes_needed) == (other.chunks, other.shards, other.bytes_needed)
    about = json.loads((small / "zarr.json").read_bytes())
    assert as_written(about, layout) == of_codec(layout, codec)
    read = [tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(small)}}).result()]
    if layout.dtype != "bfloat16":
        read.append(zarr.open_array(str(small), mode="r"))
    for array in read:
        values = array[:32] if layout.position_axis is None else array[:]
        values = np.asarray(values.read().result() if hasattr(values, "read") else values)
        values = decoded(values) if layout.dtype == "int8" else values.astype(np.float32)
        _, rows = tokens(layout, values, lengths) if layout.position_axis is not None else (ids, values[:30])
        np.testing.assert_array_equal(rows, mapped.gather(ids))


def test_the_bytes_do_not_depend_on_threads() -> None:
    """blosc of several blocks writes them as they are done."""
    chunk = memoryview(np.random.default_rng(0).standard_normal((1024, 128), np.float32).tobytes())
    before, found = blosc.use_threads, set()
    for codec in SMALLER:
        for threads in (False, True, None):
            blosc.use_threads = threads
            found.add((codec, compressed(codec, 4, chunk)))
        with ThreadPoolExecutor(2) as pool:
            found |= {(codec, made) for made in pool.map(partial(compressed, codec, 4), [chunk] * 4)}
    blosc.use_threads = before
    assert len(found) == len(SMALLER)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model over ten trees: plain, and compressed by each codec."""
    root = tmp_path_factory.mktemp("codecs") / "s.act"
    execute(Ingest(root, small_model(), trees(), "plain", EVERY_SITE, 3))
    execute(Ingest(root, small_model(), trees(), "zstd", EVERY_SITE, 3, codec="zstd"))
    execute(Ingest(root, small_model(), trees(), "blosc", EVERY_SITE, 3, dtype="float16", codec="blosc"))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "s.act")
    return tmp_path / "s.act"


@pytest.mark.parametrize("check", [False, True])
def test_every_way_to_read_gives_the_numbers(made: Path, check: bool) -> None:
    with Store(made, check=check) as store:
        for site in store.sites("plain"):
            exact, _ = store.read("from tokens order by token_id", "plain", site)
            np.testing.assert_array_equal(store.read("from tokens order by token_id", "zstd", site)[0], exact)
            half = exact.astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(store.read("from tokens order by token_id", "blosc", site)[0], half)
        batches = np.concatenate([X for X, *_ in store.batches("from tokens", "zstd", "embed", batch_size=40)])
        X, _ = store.read("from tokens", "plain", "embed")
        np.testing.assert_array_equal(batches[np.lexsort(batches.T)], X[np.lexsort(X.T)])
        with pytest.raises(NotStored, match="padding"):
            store.read([22], "zstd", "embed")
        n_bytes = dict(store.sql("select run, sum(bytes) from shards group by run").rows())
        assert n_bytes["zstd"] < n_bytes["plain"]
        assert n_bytes["blosc"] < n_bytes["plain"] / 2


def test_it_verifies_computes_the_same_again_and_is_repaired(root: Path) -> None:
    assert not verify(root).damage
    assert not verify(root, quick=True).damage
    assert all(each.agrees for each in compare(root, 4))
    for run in SMALLER:
        shard = next(path for path in (root / f"activations.zarr/{run}").rglob("c/0/*/0") if path.is_file())
        before = shard.read_bytes()
        shard.chmod(0o644)
        shard.write_bytes(before[:10] + bytes([before[10] ^ 1]) + before[11:])
        assert [finding.run for finding in verify(root).damage] == [run]
        assert len(repair(root, files_of).mended) == 1
        assert shard.read_bytes() == before


def test_stopped_it_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    def job(root: Path) -> Ingest:
        return Ingest(root, small_model(), trees(), "r", ["resid_post"], 3, dtype="int8", codec="blosc")

    def stop(done: int, total: int) -> None:
        if done > 4:
            raise KeyboardInterrupt

    execute(job(tmp_path / "whole.act"))
    with pytest.raises(KeyboardInterrupt):
        execute(job(tmp_path / "cut.act"), stop)
    execute(job(tmp_path / "cut.act"))
    assert contents(tmp_path / "cut.act") == contents(tmp_path / "whole.act")
    with pytest.raises(BadInput, match="stored with codec blosc, not zstd"):
        prepare(tmp_path / "cut.act", model_of="r", dataset=trees().row()["dataset"], run="r", codec="zstd")
    with pytest.raises(BadInput, match="got codec 'lz4'"):
        prepare(tmp_path / "cut.act", model_of="r", dataset=trees().row()["dataset"], run="r", codec="lz4")


class Copied(Local):
    """A place whose files are compared with their hash only as a whole, as a bucket's are."""

    reads_ranges = True

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.committed = {}

    def read_ranges(self, path: str, ranges: Any) -> list[bytes]:
        raise AssertionError("ranges are not compared")


def test_damage_is_told_and_never_read(folder: Path) -> None:
    layout = Layout((8, 3, 5), 1, 8, "float32", codec="zstd")
    X, lengths = np.random.default_rng(0).standard_normal((8, 3, 5), np.float32), np.full(8, 3)
    place, ids = folder / "damaged", np.arange(8) * 256 + 1
    paths = write(place, layout, X, lengths)
    shard, whole = place / paths[0], (place / paths[0]).read_bytes()
    index = np.frombuffer(whole[-layout.index_bytes : -4], "<u8").reshape(-1, 2)
    np.testing.assert_array_equal(CodedReader(layout, 0, paths, "a site", Copied(place)).gather(ids), X[:, 1])
    flipped = int(index[1, 0]) + 5
    for content, said in (
        (
            whole[:flipped] + bytes([whole[flipped] ^ 1]) + whole[flipped + 1 :],
            "a chunk that is not what was committed",
        ),
        (whole[:-6] + b"\1\1" + whole[-4:], "the index"),
        (whole[1:], "the index"),
        (whole[-20:], "too short"),
        (None, "is missing"),
    ):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(Damaged, match=said):
            CodedReader(layout, 0, paths, "a site", Local(place)).gather(ids)
    assert metadata(layout, ("a", "b", "c"), {}) != metadata(Layout((8, 3, 5), 1, 8), ("a", "b", "c"), {})
