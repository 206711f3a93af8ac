"""Explanations against arithmetic by hand, and against the pages and chunks that a read really touches."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.arrays import pages
from actstore.arrays.foreign import ForeignReader
from actstore.arrays.layout import Layout
from actstore.arrays.pack import ShardBuffer
from actstore.arrays.reader import SiteReader
from actstore.arrays.site import Cost
from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.reading.explain import Explanation
from actstore.storage.local import Folder, Local
from actstore.store import Store
from tests.stores import Fake, fake

PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module")
def run() -> Fake:
    return fake(n_trees=8, trees_per_shard=3, n_nodes=5, sites=("embed", "resid_post.0", "pattern.0"))


@pytest.fixture(scope="module")
def root(run: Fake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("explain") / "some.act"
    run.store(root)
    return root


# What is said.


def test_rows_tokens_chunks_shards_and_bytes_are_counted(root: Path) -> None:
    """Trees 0, 1 (shard 0) and 3 (shard 1), positions 1 and 4: two chunks of each shard; a shard is less than a page."""
    query = "from (select unnest([1, 4, 257, 769, 772]) as token_id) union all select 1"
    with Store(root) as store:
        one = store.explain(query, site="embed")
        two = store.explain(query, sites=["embed", "pattern.0"])
    shard_bytes = 19 * (3 * 6 * 4 + 4 + 16) + 4
    assert shard_bytes < PAGE
    assert one == Explanation("r", ("embed",), 6, 5, 4, 2, 2, bytes_needed=5 * 24, bytes_read=2 * PAGE, in_memory=1)
    assert one.amplification == 2 * PAGE / 120
    assert (two.rows, two.tokens, two.chunks, two.shards) == (6, 5, 8, 4)
    assert two.bytes_needed == 5 * 24 + 5 * 2 * 19 * 4
    assert str(one) == (
        "6 rows of 5 tokens at embed of run 'r': 4 chunks in 2 shards; "
        f"{2 * PAGE / 1000:.1f} kB in 2 runs to be read for 120 bytes of activations ({2 * PAGE / 120:.2f}×), 100% in memory"
    )


def test_nothing_to_read_costs_nothing(root: Path) -> None:
    with Store(root) as store:
        nothing = store.explain("select token_id from tokens where false")
    assert (nothing.rows, nothing.chunks, nothing.shards, nothing.bytes_read, nothing.amplification) == (0, 0, 0, 0, 1)


def test_no_activation_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiteReader, "gather", None)
    with Store(root) as store:
        assert store.explain("from tokens").rows


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ("select 8 * 256 as token_id", NotStored, "of no tree of this run"),
        ("select 1 as n", BadInput, "no token_id"),
        ("select token_id, token_id from tokens", BadInput, "two columns named token_id"),
    ],
)
def test_what_a_read_would_refuse_is_refused(root: Path, query: str, error: type[Exception], message: str) -> None:
    with Store(root) as store, pytest.raises(error, match=message):
        store.explain(query)


def test_the_command_prints_it_as_text_and_json_and_reads_nothing(root: Path, monkeypatch) -> None:
    monkeypatch.setattr(SiteReader, "gather", None)
    query = "select token_id from tokens where tree_id = $tree"
    arguments = ["read", str(root), query, "-p", "tree", "1", "--site", "embed,pattern.0", "--explain"]
    with Store(root) as store:
        said = store.explain(query, sites=["embed", "pattern.0"], params={"tree": 1})
    assert CliRunner().invoke(main, arguments).output == f"{said}\n"
    assert json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output) == said.to_dict()
    assert said.to_dict()["amplification"] == said.bytes_read / said.bytes_needed


def test_the_command_reads_several_sites_in_a_dtype(root: Path, tmp_path: Path) -> None:
    query, out = "select token_id from tokens", tmp_path / "x.npz"
    sites = ["--site", "embed", "--site", "resid_post.0", "--dtype", "float16", "--out", str(out)]
    done = CliRunner().invoke(main, ["read", str(root), query, *sites])
    assert done.output == f"{out}: X float16 [{len(np.load(out)['X'])}, 2, 6] and token_id\n"
    with Store(root) as store:
        X, _ = store.read(query, sites=["embed", "resid_post.0"], dtype="float16")
    np.testing.assert_array_equal(np.load(out)["X"], X)


# What is really touched.

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def resident(path: Path) -> int:
    """Pages of a file that are in memory."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        there = np.zeros(-(-len(mapped) // PAGE), np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        failed = LIBC.mincore(view.ctypes.data, len(mapped), there.ctypes.data)
        del view
    assert not failed, os.strerror(ctypes.get_errno())
    return int((there & 1).sum())


def drop(path: Path) -> int:
    """Take a file that nobody has mapped out of memory, and return how many of its pages stay."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return resident(path)


class WithoutReadahead(Local):
    def open_for_map(self, path: str) -> int:
        descriptor = super().open_for_map(path)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor


def cold_reader(shards: dict[int, Path], batches: set[int]) -> SiteReader:
    """A reader that has mapped some shards, and tells the system to read no more of them than is touched."""
    reader = SiteReader(
        LAYOUT, 0, {batch: path.name for batch, path in shards.items()}, "a site", WithoutReadahead(shards[0].parent)
    )
    for batch in batches:
        reader.files.chunk_starts(batch)
        mapped = reader.files._view.maps[batch][0]
        assert not LIBC.madvise(mapped.ctypes.data, len(mapped), mmap.MADV_RANDOM)
    return reader


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


LAYOUT = Layout((200, 9, 300), 1, 80)  # rows of 1,200 bytes, chunks of 24 pages, three shards


@pytest.fixture(scope="module")
def shards(folder: Path) -> dict[int, Path]:
    paths = {}
    for batch in range(3):
        n_trees = min(80, 200 - batch * 80)
        buffer = ShardBuffer(LAYOUT)
        buffer.put(0, torch.full((n_trees, 9, 300), float(batch)))
        paths[batch] = folder / str(batch)
        paths[batch].write_bytes(buffer.seal(np.full(n_trees, 9)))
    if not hasattr(os, "posix_fadvise") or any(map(drop, paths.values())):
        pytest.skip("the system keeps these files in memory (tmpfs, say), so what a read touches cannot be seen")
    return paths


@given(st.sets(st.tuples(st.integers(0, 199), st.integers(0, 8)), min_size=1, max_size=60))
@settings(max_examples=25)
def test_the_bytes_said_are_the_pages_touched(shards: dict[int, Path], places: set[tuple[int, int]]) -> None:
    token_ids = np.array([tree * 256 + position for tree, position in sorted(places)])
    assert not any(map(drop, shards.values()))
    said = cold_reader(shards, {tree // 80 for tree, _ in places}).cost(token_ids)
    assert sum(map(resident, shards.values())) <= 2 * said.shards  # the indexes alone
    assert said.bytes_in_memory == sum(map(resident, shards.values())) * PAGE
    assert not any(map(drop, shards.values()))
    with pytest.MonkeyPatch.context() as patch:  # those looked at may all lie beside an index, which was read
        patch.setattr(pages, "some_missing", lambda *about: True)
        X = cold_reader(shards, {tree // 80 for tree, _ in places}).gather(token_ids)
    np.testing.assert_array_equal(X[:, 0], token_ids // 256 // 80)
    assert sum(map(resident, shards.values())) * PAGE == said.bytes_read
    assert said.shards == len({tree // 80 for tree, _ in places})
    assert said.chunks == len({(tree // 80, position) for tree, position in places})
    assert said.bytes_needed == len(places) * 1200


@pytest.mark.parametrize("shards", [None, (20, 6, 8)])
def test_the_chunks_said_are_those_that_the_general_path_decodes(
    folder: Path, shards: tuple | None, monkeypatch
) -> None:
    layout = Layout((50, 7, 8), 1, 10)
    path = folder / f"array-{shards is None}"
    array = zarr.create_array(
        path, shape=layout.shape, chunks=(10, 3, 4), shards=shards, dtype="float64", compressors=None, fill_value=np.nan
    )
    array[:] = 1.0
    token_ids = np.array([0, 1, 4, 9 * 256 + 2, 11 * 256 + 6, 49 * 256])  # chunks (0,0) (0,1) (1,2) (4,0)
    reader = ForeignReader(path, layout, 0, None, "a site")
    said = reader.cost(token_ids)
    assert said == Cost(
        chunks=4 * 2,  # each row lies in two
        shards=3 if shards else 4 * 2,
        runs=4 * 2,
        bytes_needed=6 * 8 * 8,
        bytes_read=4 * 2 * 10 * 3 * 4 * 8,
        bytes_in_memory=None,
    )
    decoded = []
    block = ForeignReader._block
    monkeypatch.setattr(
        ForeignReader, "_block", lambda self, chunk, ids: decoded.append(chunk) or block(self, chunk, ids)
    )
    reader.gather(token_ids)
    assert len(decoded) * 2 == said.chunks
    assert len(set(decoded)) == len(decoded)


def test_a_reader_opens_again_wherever_it_is_pickled_to(folder: Path, monkeypatch) -> None:
    """The general path's reader is none of mapped shards: it maps nothing."""
    layout, every = Layout((5, 4, 3), 1, 5), np.arange(5) * 256
    buffer = ShardBuffer(layout)
    buffer.put(0, torch.arange(60, dtype=torch.float32).reshape(5, 4, 3))
    (folder / "shard").write_bytes(buffer.seal(np.full(5, 4)))
    array = zarr.create_array(
        folder / "pickled", shape=layout.shape, chunks=(2, 2, 3), dtype="float32", fill_value=np.nan
    )
    array[:] = np.arange(60).reshape(5, 4, 3)
    monkeypatch.chdir(folder)
    readers = (
        SiteReader(layout, 0, {0: "shard"}, "a site", Local(Path())),
        ForeignReader(Path("pickled"), layout, 0, None, "a site"),
    )
    pickled = [pickle.dumps(reader.again()) for reader in readers]
    monkeypatch.chdir(folder.parent)
    assert not isinstance(readers[1], SiteReader)
    root = Folder(folder)
    for opens in map(pickle.loads, pickled):
        again = opens(root, lambda ids: np.ones(len(ids), bool))
        np.testing.assert_array_equal(again.gather(every)[:, 0], np.arange(5) * 12)
        np.testing.assert_array_equal(again.places(every)[0], np.arange(5))
        assert again.cost(every).bytes_needed == 5 * 3 * 4
    root.close()
