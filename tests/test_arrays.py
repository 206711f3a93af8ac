"""The arrays against zarr-python's own writer, two foreign readers, and numpy indexing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from actstore.arrays.layout import Layout
from actstore.arrays.metadata import metadata
from actstore.arrays.pack import ShardBuffer
from actstore.arrays.reader import SiteReader
from actstore.errors import BadInput, Damaged, NotStored
from actstore.storage.local import Local
from actstore.store import Store
from tests.stores import Fake, fake

RESID, PATTERN = "blocks.0.hook_resid_post", "blocks.0.attn.hook_pattern"


@st.composite
def layouts(pick: st.DrawFn) -> Layout:
    """Arrays of either kind and dtype, from one tree and one position up, the last shard full or not."""
    n_trees, n_positions = pick(st.integers(1, 9)), pick(st.integers(1, 9))
    trees_per_shard, dtype = pick(st.integers(1, 10)), pick(st.sampled_from(["float32", "float16"]))
    if pick(st.booleans()):
        return Layout((n_trees, n_positions, pick(st.integers(1, 7))), 1, trees_per_shard, dtype)
    return Layout((n_trees, pick(st.integers(1, 3)), n_positions, n_positions), 2, trees_per_shard, dtype)


def planted(layout: Layout, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations, of the layout's shape and dtype, and the length of each tree, intp [n_trees]."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, layout.chunks_per_shard, layout.shape[0], dtype=np.intp, endpoint=True)
    return rng.standard_normal(layout.shape, dtype=np.float32).astype(layout.dtype), lengths


def blanked(layout: Layout, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The activations with NaN wherever a tree has no token."""
    is_token = np.arange(layout.chunks_per_shard) < lengths[:, None]
    shape = [size if axis in (0, layout.position_axis) else 1 for axis, size in enumerate(layout.shape)]
    return np.where(is_token.reshape(shape), values, np.asarray(np.nan, layout.dtype))


def pack(layout: Layout, values: np.ndarray, lengths: np.ndarray, buffer: ShardBuffer | None = None) -> list[bytes]:
    """All shards of an array, through one buffer."""
    buffer, per_shard = buffer or ShardBuffer(layout), layout.rows_per_chunk
    shards = []
    for start in range(0, layout.shape[0], per_shard):
        some = values[start : start + per_shard]
        half = len(some) // 2
        buffer.put(0, torch.from_numpy(some[:half]))
        buffer.put(half, torch.from_numpy(some[half:]))
        shards.append(bytes(buffer.seal(lengths[start : start + per_shard])))
    return shards


def shards_of_zarr_python(layout: Layout, values: np.ndarray) -> dict[str, bytes]:
    """What zarr-python's own sharding codec writes for the same numbers, by key."""
    inner = list(layout.shard_shape)
    inner[layout.position_axis] = 1
    written: dict[str, zarr.abc.store.Buffer] = {}
    array = zarr.create_array(
        MemoryStore(written),
        shape=values.shape,
        chunks=(layout.rows_per_chunk, *values.shape[1:]),
        dtype=layout.dtype,
        fill_value=np.nan,
        serializer=ShardingCodec(chunk_shape=tuple(inner), codecs=[BytesCodec(endian="little"), Crc32cCodec()]),
        compressors=None,
        config={"write_empty_chunks": True},
    )
    array[:] = values
    return {key: buffer.to_bytes() for key, buffer in written.items() if key != "zarr.json"}


@given(layouts(), st.integers(0, 2**32))
def test_a_packed_shard_is_byte_for_byte_what_zarr_python_writes(layout: Layout, seed: int) -> None:
    values, lengths = planted(layout, seed)
    ours = {layout.shard_name(batch): shard for batch, shard in enumerate(pack(layout, values, lengths))}
    assert ours == shards_of_zarr_python(layout, blanked(layout, values, lengths))


@given(layouts(), st.integers(0, 2**32))
def test_a_buffer_used_before_packs_the_bytes_of_a_fresh_one(layout: Layout, seed: int) -> None:
    used = ShardBuffer(layout)
    pack(layout, *planted(layout, seed + 1), used)
    values, lengths = planted(layout, seed)
    assert pack(layout, values, lengths, used) == pack(layout, values, lengths)


@pytest.mark.parametrize("shape", [(2, 1, 5), (2, 7, 1), (1, 7, 5, 1), (5, 7, 5)])
def test_activations_of_another_shape_are_refused_and_not_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="got activations"):
        ShardBuffer(Layout((8, 7, 5), 1, 4)).put(0, torch.zeros(shape))


@pytest.mark.parametrize("n_put", [0, 1, 3])
def test_a_shard_is_not_sealed_with_the_activations_of_other_trees(n_put: int) -> None:
    """A site that no activations came for would else be stored with those of the batch before."""
    buffer = ShardBuffer(Layout((8, 7, 5), 1, 4))
    buffer.put(0, torch.ones(4, 7, 5))
    buffer.seal(np.full(4, 7))
    buffer.put(0, torch.zeros(n_put, 7, 5))
    with pytest.raises(ValueError, match=f"got 2 lengths for {n_put} trees"):
        buffer.seal(np.full(2, 7))


@pytest.mark.parametrize("layout", [Layout((10, 63, 8), 1, 4), Layout((8, 2, 7, 7), 2, 3, "float16")])
def test_the_metadata_is_what_zarr_python_writes(layout: Layout) -> None:
    names, store = tuple("abcd"[: len(layout.shape)]), MemoryStore()
    zarr.create_array(
        store,
        shape=layout.shape,
        chunks=layout.shard_shape,
        dtype=layout.dtype,
        fill_value=float("nan"),
        serializer=ShardingCodec(chunk_shape=layout.chunk_shape, codecs=[BytesCodec(endian="little"), Crc32cCodec()]),
        compressors=None,
        dimension_names=names,
        attributes={"run": "é"},
        config={"write_empty_chunks": True},
    )
    written = sync(store.get("zarr.json", default_buffer_prototype()))
    assert written is not None
    assert metadata(layout, names, {"run": "é"}) == written.to_bytes()


# Foreign eyes.

COMMITTED = (0, 2)  # of batches 0, 1 and 2


@pytest.fixture(scope="module")
def run() -> Fake:
    return fake(n_trees=8, trees_per_shard=3, n_nodes=6)


@pytest.fixture(scope="module")
def root(run: Fake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("arrays") / "some.act"
    run.store(root, COMMITTED)
    return root


@pytest.mark.parametrize("site", [RESID, PATTERN])
def test_tensorstore_reads_what_was_stored_and_nan_elsewhere(run: Fake, root: Path, site: str) -> None:
    where = {"driver": "file", "path": str(root / "activations.zarr" / "r" / site)}
    array = tensorstore.open({"driver": "zarr3", "kvstore": where}).result()
    np.testing.assert_array_equal(array.read().result(), run.as_stored(site, COMMITTED))
    assert array.domain.labels[0] == "tree"


@pytest.mark.parametrize("site", [RESID, PATTERN])
def test_zarr_python_reads_what_was_stored_and_nan_elsewhere(run: Fake, root: Path, site: str) -> None:
    array = zarr.open_group(root / "activations.zarr", mode="r")["r"][site]
    np.testing.assert_array_equal(array[:], run.as_stored(site, COMMITTED))
    assert array.attrs["run"] == "r"
    assert array.attrs["weights_sha256"] == run.plan.model["weights_sha256"]


@pytest.mark.parametrize("site", [RESID, PATTERN])
def test_the_store_reads_what_the_foreign_readers_read(run: Fake, root: Path, site: str) -> None:
    with Store(root) as store:
        X, rows = store.read("select * from tokens order by hash(token_id)", site=site)
    expected = run.as_stored(site, COMMITTED)
    by_token = expected if site == RESID else np.moveaxis(expected, 2, 1)
    assert len(rows) == run.lengths[[0, 1, 2, 6, 7]].sum()
    np.testing.assert_array_equal(X, by_token[rows["tree_id"], rows["position"]])


def test_a_flipped_bit_in_a_chunk_is_found_by_a_foreign_reader(run: Fake, tmp_path: Path) -> None:
    run.store(tmp_path / "s.act", [0])
    folder = tmp_path / "s.act" / "activations.zarr" / "r" / RESID
    shard = folder / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    array = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}).result()
    with pytest.raises(ValueError, match=r"[Dd]igest mismatch"):
        array.read().result()


# The gather.


@pytest.fixture(params=["by descriptor", "mapped"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways in which a few rows are read: the first time, and each time after that."""
    if request.param == "mapped":
        monkeypatch.setattr("actstore.arrays.mapped.FEW", 0)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def written(folder: Path, layout: Layout, first: int, seed: int) -> tuple[SiteReader, np.ndarray, np.ndarray]:
    """A reader of planted activations; every token id, in order; and the activation of each."""
    values, lengths = planted(layout, seed)
    paths = {}
    for batch, shard in enumerate(pack(layout, values, lengths)):
        paths[batch] = str(batch)
        (folder / paths[batch]).unlink(missing_ok=True)
        (folder / paths[batch]).write_bytes(shard)
    tree, position = np.nonzero(np.arange(layout.chunks_per_shard) < lengths[:, None])
    by_position = np.moveaxis(values, layout.position_axis, 1)
    return (
        SiteReader(layout, first * 256, paths, "a site", Local(folder)),
        (first + tree) * 256 + position,
        by_position[tree, position],
    )


@given(layouts(), st.integers(0, 10**6), st.integers(0, 2**32), st.data())
@settings(max_examples=150)
def test_gather_is_numpy_indexing(folder: Path, layout: Layout, first: int, seed: int, data: st.DataObject) -> None:
    reader, every, expected = written(folder, layout, first, seed)
    some = np.array(data.draw(st.lists(st.integers(0, len(every) - 1), max_size=30)), np.intp)  # any order, repeats
    X = reader.gather(every[some])
    assert X.dtype == np.float32
    np.testing.assert_array_equal(X, expected[some])
    np.testing.assert_array_equal(reader.gather(every), expected)


@given(layouts(), st.integers(0, 2**32), st.sampled_from(["float16", "float32", "float64"]), st.booleans(), st.data())
@settings(max_examples=50)
def test_gather_into_a_slice_casts_and_touches_nothing_else(
    folder: Path, layout: Layout, seed: int, dtype: str, by_threads: bool, data: st.DataObject
) -> None:
    reader, every, expected = written(folder, layout, 3, seed)
    some = np.array(data.draw(st.lists(st.integers(0, len(every) - 1), max_size=30)), np.intp)
    whole = np.full((len(some), 3, *layout.row_shape), 7, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actstore.arrays.copying.ROWS_AT_ONCE", 4)
        if by_threads:
            patch.setattr("actstore.arrays.copying.FLOATS_FOR_THREADS", 0)
            patch.setattr("actstore.arrays.copying.MOST_THREADS", 3)
            patch.setenv("OMP_NUM_THREADS", "3")
            patch.setattr("os.sched_getaffinity", lambda process: range(3), raising=False)
        out = whole[:, 1]
        assert reader.gather(every[some], out=out) is out
        np.testing.assert_array_equal(reader.gather(every[some]), expected[some])
    np.testing.assert_array_equal(whole[:, 1], expected[some].astype(dtype))
    assert (whole[:, [0, 2]] == 7).all()


@pytest.mark.parametrize(
    "out", [np.empty((2, 5), np.float32), np.empty((1, 6), np.float32), np.empty((2, 6), np.int64), np.empty((6, 2)).T]
)
def test_an_out_that_rows_do_not_fit_is_refused(reader: SiteReader, out: np.ndarray) -> None:
    with pytest.raises(ValueError, match="out"):
        reader.gather(np.array([FIRST * 256, FIRST * 256]), out=out)


def test_ids_of_a_type_that_does_not_fit_are_refused_and_not_cut_down(reader: SiteReader) -> None:
    np.testing.assert_array_equal(
        reader.gather(np.array([FIRST * 256], np.int32)), reader.gather(np.array([FIRST * 256]))
    )
    for wrong in (np.array([FIRST * 256 + 0.5]), np.array([2**63], np.uint64)):
        with pytest.raises(TypeError, match="int64"):
            reader.gather(wrong)


def test_a_number_too_large_for_float16_is_refused_and_not_read_as_infinity(folder: Path) -> None:
    layout = Layout((1, 2, 3), 1, 1)
    values = np.array([[[1, 2, 3], [4, 70_000, np.inf]]], np.float32)
    (folder / "large").write_bytes(pack(layout, values, np.array([2]))[0])
    reader = SiteReader(layout, 0, {0: "large"}, "a site", Local(folder))
    np.testing.assert_array_equal(reader.gather(np.array([0, 1])), values[0])
    reader.gather(np.array([0]), out=np.empty((1, 3), np.float16))
    with pytest.raises(BadInput, match="too large for float16; read it as float32"):
        reader.gather(np.array([0, 1]), out=np.empty((2, 3), np.float16))


def test_nan_that_the_model_computed_is_read_and_padding_is_refused(folder: Path) -> None:
    layout = Layout((1, 3, 2), 1, 1)
    (folder / "nan").write_bytes(pack(layout, np.full((1, 3, 2), np.nan, np.float32), np.array([2]))[0])
    asked = []

    def is_token(ids: np.ndarray) -> np.ndarray:
        asked.append(ids.tolist())
        return ids < 2

    reader = SiteReader(layout, 0, {0: "nan"}, "a site", Local(folder), is_token)
    assert np.isnan(reader.gather(np.array([1, 0]))).all()
    with pytest.raises(NotStored, match=r"1 of 2 token ids, the first being 2 \(padding"):
        reader.gather(np.array([1, 2]))
    assert asked == [[1, 0], [1, 2]]


def test_chunks_in_another_order_are_found_by_the_shards_index(folder: Path, way: None) -> None:
    """Any Zarr writer may put a shard's chunks as it likes."""
    layout = Layout((4, 5, 3), 1, 4)
    values, lengths = planted(layout, 0)[0], np.full(4, 5)
    (shard,) = pack(layout, values, lengths)
    size = layout.chunk_bytes
    chunks = [shard[place * size : (place + 1) * size] for place in range(5)]
    index = np.array([[(4 - place) * size, size] for place in range(5)], "<u8").tobytes()
    crc = google_crc32c.value(index).to_bytes(4, "little")
    (folder / "reversed").write_bytes(b"".join(reversed(chunks)) + index + crc)
    reader = SiteReader(layout, 0, {0: "reversed"}, "a site", Local(folder))
    ids = np.arange(4)[:, None] * 256 + np.arange(5)
    np.testing.assert_array_equal(reader.gather(ids.reshape(-1)).reshape(values.shape), values)


@pytest.mark.parametrize("what", ["flipped", "beyond", "absent"])
def test_a_shard_whose_index_is_not_its_own_is_damaged_and_named(folder: Path, what: str, way: None) -> None:
    layout = Layout((4, 5, 3), 1, 4)
    shard = bytearray(pack(layout, planted(layout, 0)[0], np.full(4, 5))[0])
    start = len(shard) - layout.index_bytes
    if what == "flipped":
        shard[start + 3] ^= 1
    else:
        shard[start : start + 8] = (2**64 - 1 if what == "absent" else 2**40).to_bytes(8, "little")
        shard[-4:] = google_crc32c.value(bytes(shard[start:-4])).to_bytes(4, "little")
    (folder / what).write_bytes(shard)
    with pytest.raises(Damaged, match="lacks chunks" if what == "absent" else f"index of {folder / what}"):
        SiteReader(layout, 0, {0: what}, "a site", Local(folder)).gather(np.array([0]))


def test_an_index_that_leads_past_the_end_of_a_short_shard_is_damaged(folder: Path, way: None) -> None:
    """It is the index of a whole shard; to read by it would end the process."""
    layout = Layout((256 * 2, 3), None, 2)
    whole = ShardBuffer(layout)
    whole.put(0, torch.ones(512, 3))
    content = bytes(whole.seal(np.array([512])))
    (folder / "whole").write_bytes(content)
    (folder / "short").write_bytes(content[layout.chunk_bytes :])
    assert SiteReader(layout, 0, {0: "whole"}, "a site", Local(folder)).gather(np.array([511])).tolist() == [[1] * 3]
    with pytest.raises(Damaged, match=f"index of {folder / 'short'}"):
        SiteReader(layout, 0, {0: "short"}, "a site", Local(folder)).gather(np.array([0]))


def test_readers_in_many_threads_map_shards_while_others_copy(run: Fake, root: Path) -> None:
    layout = run.plan.sites[0].layout
    paths = {b: f"activations.zarr/r/{RESID}/{layout.shard_name(b)}" for b in COMMITTED}
    stored = run.as_stored(RESID, COMMITTED)
    for _ in range(20):
        reader = SiteReader(layout, 0, paths, "the site", Local(root))
        trees = [0, 6, 1, 7, 2] * 4
        with ThreadPoolExecutor(8) as threads:
            rows = list(threads.map(lambda tree, reader=reader: reader.gather(np.array([tree * 256 + 4]))[0], trees))
        np.testing.assert_array_equal(rows, stored[trees, 4])


FIRST = 7  # tree_id of the first tree: none below is this run's


@pytest.fixture(scope="module")
def reader(run: Fake, root: Path) -> SiteReader:
    layout = run.plan.sites[0].layout
    array = root / "activations.zarr" / "r" / RESID
    paths = {batch: layout.shard_name(batch) for batch in COMMITTED}
    return SiteReader(layout, FIRST * 256, paths, "the site", Local(array))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ((FIRST - 1) * 256, "of no tree of this run"),
        ((FIRST + 8) * 256, "of no tree of this run"),
        (-1, "of no tree of this run"),
        (-(2**63), "of no tree of this run"),
        (2**63 - 1, "of no tree of this run"),
        (FIRST * 256 + 23, "of no tree of this run"),  # 4n - 1 positions: 0 to 22
        (FIRST * 256 + 255, "of no tree of this run"),
        ((FIRST + 3) * 256, "not ingested yet"),
        ((FIRST + 5) * 256, "not ingested yet"),
    ],
)
def test_an_id_without_an_activation_is_refused_by_name(reader: SiteReader, wrong: int, why: str) -> None:
    good = FIRST * 256
    assert len(reader.gather(np.array([good, good]))) == 2
    with pytest.raises(NotStored, match=rf"no activation for 1 of 3 token ids, the first being {wrong} \({why}\)"):
        reader.gather(np.array([good, wrong, good]))


def test_padding_is_refused_by_name(run: Fake, reader: SiteReader) -> None:
    for tree in (0, 1, 2, 6, 7):
        last = (FIRST + tree) * 256 + int(run.lengths[tree]) - 1
        assert reader.gather(np.array([last])).tolist() == [
            run.activations[RESID][tree, run.lengths[tree] - 1].tolist()
        ]
        if run.lengths[tree] < 23:
            with pytest.raises(NotStored, match=rf"the first being {last + 1} \(padding"):
                reader.gather(np.array([last, last + 1]))
    assert run.lengths.min() < 23


@pytest.mark.parametrize("n_threads", [1, 3])
def test_padding_is_refused_into_a_slice_too_whichever_thread_meets_it(
    run: Fake, reader: SiteReader, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.arrays.copying.ROWS_AT_ONCE", 2)
    for module in ("copying", "mapped"):
        monkeypatch.setattr(f"actstore.arrays.{module}.n_threads", lambda n_floats: n_threads)
    tree = int(run.lengths[:3].argmin())
    padding = (FIRST + tree) * 256 + int(run.lengths[tree])
    for place in range(9):
        ids = np.full(9, FIRST * 256)
        ids[place] = padding
        with pytest.raises(NotStored, match=rf"1 of 9 token ids, the first being {padding} \(padding"):
            reader.gather(ids, out=np.empty((9, 2, 6), np.float32)[:, 1])


def test_nothing_asked_for_is_an_empty_matrix(reader: SiteReader) -> None:
    assert reader.gather(np.array([], np.int64)).shape == (0, 6)


@pytest.mark.parametrize("keep", [0, 1, 100, -1, None])
def test_a_shard_cut_short_or_gone_is_damaged_and_named(
    run: Fake, root: Path, tmp_path: Path, keep: int | None, way: None
) -> None:
    layout, shard = run.plan.sites[0].layout, tmp_path / "cut"
    if keep is not None:
        shard.write_bytes((root / "activations.zarr" / "r" / RESID / layout.shard_name(0)).read_bytes()[:keep])
    with pytest.raises(Damaged, match=str(shard)):
        SiteReader(layout, 0, {0: "cut"}, "the site", Local(tmp_path)).gather(np.array([0]))
