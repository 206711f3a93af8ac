"""Store.read in all its forms, the general path to arrays of other writers, and stores that change while they are read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from actstore.arrays.foreign import ForeignReader
from actstore.arrays.layout import Layout
from actstore.arrays.metadata import as_written, metadata
from actstore.arrays.reader import SiteReader
from actstore.errors import BadInput, Damaged, LimitReached, NotStored
from actstore.reading import activations
from actstore.storage.machine import free_memory
from actstore.store import Store
from tests.stores import D_MODEL, Fake, fake

SITES = ("embed", "resid_post.0", "resid_post.1", "pattern.0")
EVERY = "select token_id, tree_id, position from tokens order by hash(token_id)"


@pytest.fixture(scope="module")
def run() -> Fake:
    return fake(n_trees=8, trees_per_shard=3, n_nodes=5, sites=SITES)


@pytest.fixture(scope="module")
def root(run: Fake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("read") / "some.act"
    run.store(root)
    return root


@pytest.fixture
def store(root: Path) -> Iterator[Store]:
    with Store(root) as opened:
        yield opened


def planted(run: Fake, short: str, rows: pl.DataFrame) -> np.ndarray:
    """The activations of a frame's trees and positions, from what was planted."""
    (site,) = (site for site in run.plan.sites if site.short == short)
    by_position = np.moveaxis(run.activations[site.site], site.layout.position_axis, 1)
    return by_position[rows["tree_id"], rows["position"]]


# Sites, dtypes, numpy and torch.


def test_an_x_that_memory_cannot_hold_is_refused_before_it_is_made(store, monkeypatch):
    wanted = store.sql(EVERY).height * 2 * D_MODEL * 4
    for free, fits in [(wanted, True), (wanted - 1, False), (None, True)]:
        monkeypatch.setattr(activations, "LOOKED_AT", 0)
        monkeypatch.setattr(activations, "free_memory", lambda free=free: free)
        if fits:
            assert store.read(EVERY, sites=["embed", "resid_post.0"])[0].nbytes == wanted
        else:
            with pytest.raises(LimitReached, match=r"takes 0\.0 GB, and 0\.0 GB of memory are free.*Store\.batches"):
                store.read(EVERY, sites=["embed", "resid_post.0"])
    assert 1e8 < free_memory() < 1e15


def test_several_sites_come_in_one_array_in_the_order_asked(store: Store, run: Fake) -> None:
    names = ["resid_post.1", "embed", "blocks.0.hook_resid_post", "embed"]
    X, rows = store.read(EVERY, sites=names)
    assert X.dtype == np.float32
    assert X.shape == (len(rows), 4, 6)
    for place, name in enumerate(["resid_post.1", "embed", "resid_post.0", "embed"]):
        np.testing.assert_array_equal(X[:, place], planted(run, name, rows))


def test_order_and_repeats_are_kept_and_ids_are_queried_once(store: Store, run: Fake, monkeypatch) -> None:
    asked, sql = [], store._opened.session.sql
    store.read(EVERY, sites=["embed", "resid_post.1"])  # opens them
    monkeypatch.setattr(store._opened.session, "sql", lambda query, *rest: asked.append(query) or sql(query, *rest))
    twice = f"from ({EVERY}) union all from ({EVERY})"
    X, rows = store.read(twice, sites=["embed", "resid_post.1"])
    assert asked.count(twice) == 1
    assert len(rows) == 2 * run.lengths.sum()
    np.testing.assert_array_equal(X[:, 1], planted(run, "resid_post.1", rows))


def test_a_list_of_one_site_keeps_the_axis_and_patterns_their_shape(store: Store, run: Fake) -> None:
    X, rows = store.read(EVERY, sites=["pattern.0"])
    np.testing.assert_array_equal(X[:, 0], planted(run, "pattern.0", rows))
    np.testing.assert_array_equal(store.read(EVERY)[0], planted(run, "resid_post.0", rows))  # where none is named


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("several", [False, True])
def test_a_dtype_is_that_of_numpy_and_torch_alike(store: Store, run: Fake, dtype: str, several: bool) -> None:
    where = {"sites": ["embed", "resid_post.0"]} if several else {"site": "embed"}
    X, rows = store.read(EVERY, dtype=dtype, **where)
    assert X.dtype == dtype
    np.testing.assert_array_equal(X[:, 0] if several else X, planted(run, "embed", rows).astype(dtype))
    tensor, _ = store.read(EVERY, dtype=dtype, out="torch", **where)
    assert tensor.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(tensor.numpy(), X)


@pytest.mark.parametrize("several", [False, True])
def test_bfloat16_is_torchs_rounding(store: Store, run: Fake, several: bool) -> None:
    where = {"sites": ["embed", "resid_post.0"]} if several else {"site": "embed"}
    tensor, rows = store.read(EVERY, dtype="bfloat16", out="torch", **where)
    expected = torch.from_numpy(planted(run, "embed", rows)).to(torch.bfloat16)
    assert torch.equal(tensor[:, 0] if several else tensor, expected)


def test_a_tensor_shares_the_memory_that_the_gather_filled(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    gather = SiteReader.gather
    monkeypatch.setattr(SiteReader, "gather", lambda *args: filled.append(gather(*args)) or filled[-1])
    tensor, _ = store.read(EVERY, out="torch")
    assert np.shares_memory(tensor.numpy(), filled[0])


@pytest.mark.parametrize(("form", "shape"), [({}, (0, 6)), ({"sites": ["embed", "resid_post.0"]}, (0, 2, 6))])
@pytest.mark.parametrize("out", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_rows_are_an_empty_array_of_the_same_form(store: Store, form: dict, shape: tuple, out, dtype) -> None:
    X, rows = store.read("select token_id, edge from tokens where false", out=out, dtype=dtype, **form)
    assert tuple(X.shape) == shape
    assert str(X.dtype).endswith(dtype)
    assert rows.columns == ["token_id", "edge"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"site": "embed", "sites": ["embed"]}, "give site for X"),
        ({"sites": []}, "give a list of sites"),
        ({"sites": "embed"}, "give a list of sites"),
        ({"sites": ["embed", "pattern.0"]}, r"embed has rows of \[6\] and pattern.0 of \[2, 19\]"),
        ({"dtype": "int8"}, "got dtype 'int8'; X comes as float32"),
        ({"dtype": "bfloat16"}, "numpy has no bfloat16"),
        ({"out": "jax"}, "got out 'jax'; X comes as 'numpy' or 'torch'"),
    ],
)
def test_a_form_that_cannot_be_is_refused_in_one_line(store: Store, form: dict, message: str) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        store.read(EVERY, **form)
    assert "\n" not in str(refused.value)


def test_an_unknown_one_of_several_sites_is_named(store: Store) -> None:
    with pytest.raises(NotStored, match=r"holds no site 'resid_post.9'; it holds embed, pattern.0, resid_post.0"):
        store.read(EVERY, sites=["embed", "resid_post.9"])


# Columns of one name.


@pytest.mark.parametrize(
    "query",
    [
        "select token_id, token_id + 1 as token_id from tokens",
        "select token_id, edge, node as edge from tokens",
        "select token_id, edge, node as EDGE from tokens",
        "from tokens a join edge_targets b on a.token_id = b.token_id",
        "with t as (from tokens) select t.*, t.edge from t where position < $most",
        "select token_id, edge as a_1, node as a, step as a from tokens",
        ";select token_id, edge, node as edge from tokens",
        " -- a question\n; /* ; */ ;; select token_id, edge, node as edge from tokens;",
        "select token_id, 1 as edge, 2 as edge from (pivot (from tokens) on role using count(*) group by token_id)",
    ],
)
def test_two_columns_of_one_name_are_refused_by_name(store: Store, query: str) -> None:
    params = {"most": 3} if "$most" in query else None
    with pytest.raises(BadInput, match=r"two columns named (token_id|edge|EDGE|tree_id|a); rename one"):
        store.read(query, params=params)


def test_a_column_that_is_only_named_as_if_it_were_a_second_one_is_read(store: Store, run: Fake) -> None:
    X, rows = store.read("select token_id, token_id as token_id_1, edge as x_2, tree_id, position from tokens")
    assert rows.columns == ["token_id", "token_id_1", "x_2", "tree_id", "position"]
    np.testing.assert_array_equal(X, planted(run, "resid_post.0", rows))


# Arrays of other writers.

CODECS = {"plain": None, "zstd": ZstdCodec(level=1), "gzip": GzipCodec(level=1), "blosc": BloscCodec(cname="lz4")}


@st.composite
def foreign_arrays(pick: st.DrawFn) -> tuple[Layout, str, dict]:
    """A layout's shape, a dtype, and how another tool might lay it out."""
    n_trees, n_positions = pick(st.integers(1, 9)), pick(st.integers(1, 9))
    if pick(st.booleans()):
        layout = Layout((n_trees, n_positions, pick(st.integers(1, 7))), 1, 4)
    else:
        layout = Layout((n_trees, pick(st.integers(1, 3)), n_positions, n_positions), 2, 4)
    chunks = tuple(pick(st.integers(1, size)) for size in layout.shape)
    form = {"chunks": chunks, "zarr_format": pick(st.sampled_from([2, 3]))}
    if form["zarr_format"] == 3:
        form["compressors"] = CODECS[pick(st.sampled_from(sorted(CODECS)))]
        if pick(st.booleans()):
            form["shards"] = tuple(size * pick(st.integers(1, 3)) for size in chunks)
    return layout, pick(st.sampled_from(["float16", "float32", "float64", ">f4"])), form


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def write_array(path: Path, layout: Layout, dtype: str, form: dict, seed: int, fill: float) -> tuple[np.ndarray, ...]:
    """Write a foreign array; return every token id, each id's activation as stored, and a pad id where there is one."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, layout.chunks_per_shard, layout.shape[0], endpoint=True)
    values = rng.standard_normal(layout.shape).astype(np.dtype(dtype).newbyteorder("="))
    by_position = np.moveaxis(values, layout.position_axis, 1)
    for tree, length in enumerate(lengths):
        by_position[tree, length:] = fill
    shutil.rmtree(path, ignore_errors=True)
    config = {"write_empty_chunks": True}
    array = zarr.create_array(path, shape=layout.shape, dtype=dtype, fill_value=fill, config=config, **form)
    array[:] = values
    tree, position = np.nonzero(np.arange(layout.chunks_per_shard) < lengths[:, None])
    padded, past = np.nonzero(np.arange(layout.chunks_per_shard) >= lengths[:, None])
    return tree * 256 + position, by_position[tree, position], padded * 256 + past


@given(foreign_arrays(), st.integers(0, 10**6), st.integers(0, 2**32), st.sampled_from([np.nan, 0.0]), st.data())
@settings(max_examples=60)
def test_any_zarr_array_gives_the_numbers_that_were_written(
    folder: Path, array: tuple[Layout, str, dict], first: int, seed: int, fill: float, data: st.DataObject
) -> None:
    layout, dtype, form = array
    every, expected, padding = write_array(folder / "array", layout, dtype, form, seed, fill)
    every, padding = every + first * 256, padding + first * 256
    reader = ForeignReader(folder / "array", layout, first * 256, None, "a site", lambda ids: np.isin(ids, every))
    some = np.array(data.draw(st.lists(st.integers(0, len(every) - 1), max_size=30)), np.intp)
    X = reader.gather(every[some])
    assert X.dtype == np.float32
    np.testing.assert_array_equal(X, expected[some].astype(np.float32))
    out = np.empty((len(some), 2, *layout.row_shape), np.float64)
    np.testing.assert_array_equal(reader.gather(every[some], out=out[:, 1]), expected[some])  # nothing is rounded
    if len(padding):
        with pytest.raises(NotStored, match=rf"1 of 2 token ids, the first being {padding[-1]} \(padding"):
            reader.gather(np.array([every[0], padding[-1]]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", [Layout((8, 7, 5), 1, 3), Layout((8, 2, 7, 7), 2, 3)])
def test_what_actstore_writes_is_mapped_and_what_differs_in_anything_is_not(layout: Layout, dtype: str) -> None:
    layout = Layout(layout.shape, layout.position_axis, 3, dtype)
    about = json.loads(metadata(layout, tuple("abcd"[: len(layout.shape)]), {"run": "r"}))
    plain = Layout(layout.shape, layout.position_axis, 3)
    assert as_written(about, plain) == layout
    assert as_written({}, plain) is None
    assert as_written(about, Layout(layout.shape, layout.position_axis, 4)) is None
    sharding = about["codecs"][0]["configuration"]
    for change in (
        {"data_type": "float64"},
        {"zarr_format": 2},
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}}},
        {"codecs": [*about["codecs"], {"name": "zstd", "configuration": {"level": 0}}]},
        {"codecs": [{"name": "sharding_indexed", "configuration": {**sharding, "index_location": "start"}}]},
        {"codecs": [{"name": "sharding_indexed", "configuration": {**sharding, "codecs": sharding["codecs"][:1]}}]},
    ):
        assert as_written({**about, **change}, plain) is None, change


def test_errors_of_the_general_path_are_those_of_the_mapped_one(folder: Path) -> None:
    layout = Layout((8, 7, 5), 1, 3)
    write_array(folder / "e", layout, "float32", {"chunks": (4, 2, 5)}, 0, np.nan)
    reader = ForeignReader(folder / "e", layout, 7 * 256, {0: folder, 2: folder}, "the site")
    for wrong, why in (
        (6 * 256, "of no tree of this run"),
        (-1, "of no"),
        (7 * 256 + 7, "of no"),
        (10 * 256, "not ing"),
    ):
        with pytest.raises(NotStored, match=rf"for 1 of 2 token ids, the first being {wrong} \({why}"):
            reader.gather(np.array([7 * 256, wrong]))
    assert reader.gather(np.array([], np.int64)).shape == (0, 5)
    shutil.rmtree(folder / "e" / "c" / "1")
    with pytest.raises(NotStored, match=r"the first being 3328 \(not ingested yet"):
        reader.gather(np.array([7 * 256, 13 * 256]))
    chunk = folder / "e" / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:9])
    with pytest.raises(Damaged, match=f"a chunk of {folder / 'e'}"):
        reader.gather(np.array([7 * 256]))
    with pytest.raises(Damaged, match="has shape"):
        ForeignReader(folder / "e", Layout((8, 7, 6), 1, 3), 7 * 256, None, "the site")
    with pytest.raises(Damaged, match="cannot be opened"):
        ForeignReader(folder / "nothing", layout, 7 * 256, None, "the site")
    zarr.create_array(folder / "ints", shape=layout.shape, chunks=(4, 2, 5), dtype="int8")
    with pytest.raises(BadInput, match="holds int8; activations are floats"):
        ForeignReader(folder / "ints", layout, 7 * 256, None, "the site")


def test_a_number_too_large_for_float32_is_refused_by_the_general_path(folder: Path) -> None:
    array = zarr.create_array(folder / "l", shape=(1, 1, 2), chunks=(1, 1, 2), dtype="float64", fill_value=np.nan)
    array[:] = [[[1, 1e300]]]
    reader = ForeignReader(folder / "l", Layout((1, 1, 2), 1, 1), 0, None, "a site")
    with pytest.raises(BadInput, match="too large for float32; read it as float64"):
        reader.gather(np.array([0]))
    assert reader.gather(np.array([0]), out=np.empty((1, 2))).tolist() == [[1, 1e300]]


def test_a_store_whose_arrays_are_compressed_reads_the_same(run: Fake, tmp_path: Path, monkeypatch) -> None:
    """Committed as ever, with the metadata and the shards of another writer."""
    layout, site = run.plan.sites[0].layout, run.plan.sites[0].site
    array = zarr.create_array(
        tmp_path / "z",
        shape=layout.shape,
        chunks=(1, 4, 5),
        shards=(3, 20, 10),
        dtype="float32",
        compressors=ZstdCodec(),
    )
    array[:] = run.as_stored(site)
    monkeypatch.setattr("actstore.writing.contents.metadata", lambda *_: (tmp_path / "z" / "zarr.json").read_bytes())
    shards = iter([(tmp_path / "z" / layout.shard_name(batch)).read_bytes() for batch in range(3)])
    monkeypatch.setattr("actstore.arrays.pack.ShardBuffer.seal", lambda *_: memoryview(next(shards)))
    only = Fake(type(run.plan)(**{**vars(run.plan), "sites": run.plan.sites[:1]}), run.trees, run.activations)
    only.store(tmp_path / "z.act")
    with Store(tmp_path / "z.act") as store:
        assert isinstance(store._opened.reader("r", "embed"), ForeignReader)
        X, rows = store.read(EVERY, site="embed")
        np.testing.assert_array_equal(X, planted(run, "embed", rows))
        padding = int(run.lengths.argmin()) * 256 + int(run.lengths.min())
        with pytest.raises(NotStored, match=rf"first being {padding} \(padding"):
            store.read(f"select {padding} as token_id", site="embed")


# A store that changes while it is read.


def test_a_reader_keeps_its_snapshot_while_more_is_ingested(run: Fake, tmp_path: Path) -> None:
    run.store(tmp_path / "s.act", [0])
    with Store(tmp_path / "s.act") as before:
        first, _ = before.read(EVERY)
        run.store(tmp_path / "s.act")
        again, rows = before.read(EVERY)
        np.testing.assert_array_equal(first, again)
        assert len(rows) == run.lengths[:3].sum()
        with pytest.raises(NotStored, match="not ingested yet"):
            before.read(f"select {3 * 256} as token_id")
    with Store(tmp_path / "s.act") as after:
        assert len(after.read(EVERY)[0]) == run.lengths.sum()


@pytest.mark.parametrize("removed", [False, True])
def test_another_store_in_its_place_is_never_read_for_it(run: Fake, tmp_path: Path, removed: bool) -> None:
    path, other = tmp_path / "s.act", fake(n_trees=8, trees_per_shard=3, n_nodes=5, sites=SITES, seed=1)
    run.store(path)
    other.store(tmp_path / "other.act")
    with Store(path) as store:
        for _ in range(2):  # the second maps the shard
            X, rows = store.read("select token_id, tree_id, position from tokens where tree_id < 3")
        os.rename(path, tmp_path / "gone.act")
        os.rename(tmp_path / "other.act", path)
        if removed:
            shutil.rmtree(tmp_path / "gone.act")
            with pytest.raises(Damaged, match=r"cannot (map|read|be read)"):
                store.read(EVERY)
        else:
            np.testing.assert_array_equal(store.read(EVERY)[0], planted(run, "resid_post.0", store.read(EVERY)[1]))
        again, _ = store.read("select token_id, tree_id, position from tokens where tree_id < 3")
        np.testing.assert_array_equal(again, X)
        np.testing.assert_array_equal(again, planted(run, "resid_post.0", rows))
    with Store(path) as store:
        X, rows = store.read(EVERY)
        np.testing.assert_array_equal(X, planted(other, "resid_post.0", rows))


def test_the_general_path_refuses_a_store_in_anothers_place(folder: Path, root: Path) -> None:
    write_array(folder / "g", layout := Layout((8, 7, 5), 1, 3), "float32", {"chunks": (4, 2, 5)}, 0, np.nan)
    shutil.copytree(root, folder / "g.act")
    with Store(folder / "g.act") as store:
        reader = ForeignReader(folder / "g", layout, 0, None, "a site", check=store._opened.folder.check)
        assert reader.gather(np.array([0])).shape == (1, 5)
        os.rename(folder / "g.act", folder / "moved.act")
        with pytest.raises(Damaged, match=r"g\.act was moved or replaced since it was opened; open the store again"):
            reader.gather(np.array([0]))


def test_a_closed_store_leaves_no_descriptor_behind(root: Path) -> None:
    def opened() -> set[str]:
        return {
            os.readlink(f"/proc/self/fd/{name}")
            for name in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{name}")
        }

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to look into")
    store = Store(root)
    store.read(EVERY)
    assert str(root) in opened()
    store.close()
    assert str(root) not in opened()
