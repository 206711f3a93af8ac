"""The arrays against zarr-python's own writer, two foreign readers, and numpy indexing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import MemoryStore

from actstore.arrays import Layout, ShardBuffer, SiteReader, metadata
from actstore.errors import Damaged, NotStored
from actstore.store import Store
from tests.stores import Fake, fake

RESID, PATTERN = "blocks.0.hook_resid_post", "blocks.0.attn.hook_pattern"


@st.composite
def layouts(pick: st.DrawFn) -> Layout:
    """Arrays of either kind, from one tree and one position up, the last shard full or not."""
    n_trees, n_positions = pick(st.integers(1, 9)), pick(st.integers(1, 9))
    trees_per_shard = pick(st.integers(1, 10))
    if pick(st.booleans()):
        return Layout((n_trees, n_positions, pick(st.integers(1, 7))), 1, trees_per_shard)
    return Layout((n_trees, pick(st.integers(1, 3)), n_positions, n_positions), 2, trees_per_shard)


def planted(layout: Layout, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations, float32 of the layout's shape, and the length of each tree, intp [n_trees]."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, layout.n_positions, layout.shape[0], dtype=np.intp, endpoint=True)
    return rng.standard_normal(layout.shape, dtype=np.float32), lengths


def blanked(layout: Layout, values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The activations with NaN wherever a tree has no token."""
    is_token = np.arange(layout.n_positions) < lengths[:, None]
    shape = [size if axis in (0, layout.position_axis) else 1 for axis, size in enumerate(layout.shape)]
    return np.where(is_token.reshape(shape), values, np.float32(np.nan))


def pack(layout: Layout, values: np.ndarray, lengths: np.ndarray, buffer: ShardBuffer | None = None) -> list[bytes]:
    """All shards of an array, through one buffer."""
    buffer, per_shard = buffer or ShardBuffer(layout), layout.trees_per_shard
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
        chunks=(layout.trees_per_shard, *values.shape[1:]),
        dtype="float32",
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


def test_the_metadata_says_how_the_array_lies() -> None:
    about = json.loads(metadata(Layout((10, 63, 8), 1, 4), ("tree", "position", "d_model"), {"run": "r"}))
    codec = about["codecs"][0]["configuration"]
    assert about["shape"] == [10, 63, 8]
    assert about["chunk_grid"]["configuration"]["chunk_shape"] == [4, 63, 8]
    assert about["dimension_names"] == ["tree", "position", "d_model"]
    assert about["fill_value"] == "NaN"
    assert about["attributes"] == {"run": "r"}
    assert codec["chunk_shape"] == [4, 1, 8]
    assert [step["name"] for step in codec["codecs"] + codec["index_codecs"]] == ["bytes", "crc32c"] * 2
    assert [step["name"] for step in about["codecs"]] == ["sharding_indexed"]


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


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@given(layouts(), st.integers(0, 10**6), st.integers(0, 2**32), st.data())
@settings(max_examples=150)
def test_gather_is_numpy_indexing(folder: Path, layout: Layout, first: int, seed: int, data: st.DataObject) -> None:
    values, lengths = planted(layout, seed)
    paths = {}
    for batch, shard in enumerate(pack(layout, values, lengths)):
        paths[batch] = folder / str(batch)
        paths[batch].write_bytes(shard)
    tree, position = np.nonzero(np.arange(layout.n_positions) < lengths[:, None])
    some = np.array(data.draw(st.lists(st.integers(0, len(tree) - 1), max_size=30)), np.intp)  # any order, repeats
    token_ids = (first + tree[some]).astype(np.int64) * 256 + position[some]
    reader = SiteReader(layout, first, paths, "a site")
    X = reader.gather(token_ids)
    assert X.dtype == np.float32
    np.testing.assert_array_equal(X, np.moveaxis(values, layout.position_axis, 1)[tree[some], position[some]])
    every = (first + tree) * 256 + position  # sorted, as the tables have them: the way that copies slices
    np.testing.assert_array_equal(reader.gather(every), np.moveaxis(values, layout.position_axis, 1)[tree, position])


FIRST = 7  # tree_id of the first tree: none below is this run's


@pytest.fixture(scope="module")
def reader(run: Fake, root: Path) -> SiteReader:
    layout = run.plan.sites[0].layout
    array = root / "activations.zarr" / "r" / RESID
    return SiteReader(layout, FIRST, {batch: array / layout.shard_name(batch) for batch in COMMITTED}, "the site")


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


def test_nothing_asked_for_is_an_empty_matrix(reader: SiteReader) -> None:
    assert reader.gather(np.array([], np.int64)).shape == (0, 6)


@pytest.mark.parametrize("keep", [0, 1, 100, -1, None])
def test_a_shard_cut_short_or_gone_is_damaged_and_named(
    run: Fake, root: Path, tmp_path: Path, keep: int | None
) -> None:
    layout, shard = run.plan.sites[0].layout, tmp_path / "cut"
    if keep is not None:
        shard.write_bytes((root / "activations.zarr" / "r" / RESID / layout.shard_name(0)).read_bytes()[:keep])
    with pytest.raises(Damaged, match=str(shard)):
        SiteReader(layout, 0, {0: shard}, "the site").gather(np.array([0]))
