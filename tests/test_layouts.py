"""Layouts beside the trees': sequences of one length with a stride of their own, and tokens in a row."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.arrays.address import CHUNKS_PER_SHARD, stride_of
from actstore.arrays.foreign import ForeignReader
from actstore.arrays.layout import Layout
from actstore.arrays.metadata import as_written, metadata
from actstore.arrays.pack import ShardBuffer
from actstore.arrays.reader import SiteReader
from actstore.errors import Damaged, NotStored
from actstore.storage.local import Local


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@st.composite
def in_rows(pick: st.DrawFn) -> tuple[Layout, list[list[int]]]:
    """An array of rows, and the lengths of each batch's sequences; a batch may fill its shard or end anywhere."""
    rows_per_chunk, row_shape = (
        2 ** pick(st.integers(0, 2)),
        tuple(pick(st.lists(st.integers(1, 3), min_size=1, max_size=2))),
    )
    room = rows_per_chunk * CHUNKS_PER_SHARD
    batches = []
    for _ in range(pick(st.integers(1, 3))):
        total = pick(st.sampled_from([1, rows_per_chunk, rows_per_chunk + 1, room - 1, room]) | st.integers(1, room))
        cuts = sorted({0, total, *pick(st.lists(st.integers(1, total), max_size=4))})
        batches.append(np.diff(cuts).tolist())
    return Layout((len(batches) * room, *row_shape), None, rows_per_chunk), batches


def written(
    folder: Path, layout: Layout, batches: list[list[int]], seed: int
) -> tuple[dict[int, str], np.ndarray, np.ndarray]:
    """Shard files at the places that Zarr gives them; each token's row of the array; the rows' numbers."""
    rng, buffer = np.random.default_rng(seed), ShardBuffer(layout)
    paths, rows, values = {}, [], []
    array = folder / f"array{seed}"
    shutil.rmtree(array, ignore_errors=True)
    for batch, lengths in enumerate(batches):
        X = rng.standard_normal((sum(lengths), *layout.row_shape), dtype=np.float32)
        first = 0
        for length in lengths:
            buffer.put(first, torch.from_numpy(X[first : first + length]))
            first += length
        paths[batch] = layout.shard_name(batch)
        (array / paths[batch]).parent.mkdir(parents=True, exist_ok=True)
        (array / paths[batch]).write_bytes(buffer.seal(np.array(lengths)))
        rows.append(batch * layout.rows_per_shard + np.arange(first))
        values.append(X)
    names = tuple(["row", "head", "d_head"][: len(layout.shape)])
    (array / "zarr.json").write_bytes(metadata(layout, names, {}))
    return paths, np.concatenate(rows), np.concatenate(values)


@given(in_rows(), st.integers(0, 2**40), st.integers(0, 2**32), st.data())
@settings(max_examples=60, deadline=None)
def test_tokens_in_a_row_are_read_as_any_zarr_reader_reads_them(
    folder: Path, array: tuple[Layout, list[list[int]]], first: int, seed: int, data: st.DataObject
) -> None:
    layout, batches = array
    paths, rows, values = written(folder, layout, batches, seed)
    path = folder / f"array{seed}"
    assert as_written(json.loads((path / "zarr.json").read_bytes()), layout) == layout
    foreign = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result()
    whole = foreign.read().result()
    np.testing.assert_array_equal(whole[rows], values)
    elsewhere = np.setdiff1d(np.arange(layout.shape[0]), rows)
    assert np.isnan(whole[elsewhere]).all()
    reader = SiteReader(layout, first, paths, "a site", Local(path), lambda ids: np.isin(ids - first, rows))
    general = ForeignReader(path, layout, first, paths, "a site", lambda ids: np.isin(ids - first, rows))
    some = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=30)), np.intp)
    for each in (reader, general):
        np.testing.assert_array_equal(each.gather(first + rows[some]), values[some])
    np.testing.assert_array_equal(reader.gather(first + rows), values)
    assert reader.cost(first + np.unique(rows[some])).bytes_needed == len(np.unique(some)) * values[0].nbytes
    if len(elsewhere):
        wrong = first + data.draw(st.sampled_from(elsewhere.tolist()))
        for each in (reader, general):
            with pytest.raises(NotStored, match=f"1 of 2 token ids, the first being {wrong}"):
                each.gather(np.array([first + rows[0], wrong]))
    for wrong in (first - 1, first + layout.n_ids):
        with pytest.raises(NotStored, match="of no sequence of this run"):
            reader.gather(np.array([wrong]))


def test_padding_costs_no_byte_but_for_the_last_chunk(folder: Path) -> None:
    layout = Layout((CHUNKS_PER_SHARD * 4, 100), None, 4)
    paths, _, values = written(folder, layout, [[3, 2]], 2**33)
    shard = folder / f"array{2**33}" / paths[0]
    assert shard.stat().st_size == 2 * layout.chunk_bytes + layout.index_bytes
    assert layout.chunk_bytes == 4 * values[0].nbytes + 4


def test_a_shard_cut_off_at_any_byte_is_damaged(folder: Path) -> None:
    layout = Layout((CHUNKS_PER_SHARD * 4, 3), None, 4)
    paths, rows, _ = written(folder, layout, [[9, 30]], 2**34)
    place = Local(folder / f"array{2**34}")
    shard = place.root / paths[0]
    whole = shard.read_bytes()
    for n_bytes in (
        0,
        layout.index_bytes - 1,
        layout.index_bytes,
        len(whole) - layout.chunk_bytes,
        len(whole) - 1,
        len(whole) + 8,
    ):
        shard.unlink()
        shard.write_bytes((whole + bytes(8))[:n_bytes])
        with pytest.raises(Damaged, match="of a site"):
            SiteReader(layout, 0, paths, "a site", place).gather(rows)


@given(st.integers(1, 5), st.integers(1, 600), st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_grid_of_any_length_keeps_position_and_row(
    folder: Path, n: int, n_positions: int, per_shard: int, seed: int
) -> None:
    stride = stride_of(n_positions)
    layout = Layout((n, n_positions, 2), 1, per_shard, stride=stride)
    values = np.random.default_rng(seed).standard_normal(layout.shape, dtype=np.float32)
    lengths = np.random.default_rng(seed).integers(1, n_positions, n, endpoint=True)
    buffer, paths = ShardBuffer(layout), {}
    for batch in range(layout.n_shards):
        span = slice(batch * per_shard, (batch + 1) * per_shard)
        buffer.put(0, torch.from_numpy(values[span]))
        paths[batch] = f"grid{batch}"
        (folder / paths[batch]).unlink(missing_ok=True)
        (folder / paths[batch]).write_bytes(buffer.seal(lengths[span]))
    row, position = np.nonzero(np.arange(n_positions) < lengths[:, None])
    reader = SiteReader(layout, 77 * 256, paths, "a site", Local(folder))
    np.testing.assert_array_equal(reader.gather(77 * 256 + row * stride + position), values[row, position])
    if n_positions < stride:
        with pytest.raises(NotStored):
            reader.gather(np.array([77 * 256 + n_positions]))


@given(st.integers(0, 3), st.lists(st.integers(0, 2**20 - 1), min_size=1, max_size=20), st.integers(0, 12))
def test_split_says_shard_chunk_and_slot(bits: int, local: list[int], stride_bits: int) -> None:
    ids = np.array(local)
    rows = Layout((2**20, 1), None, 2**bits)
    row, chunk = rows.split(ids.copy())
    n, room = 2**bits, 2**bits * CHUNKS_PER_SHARD
    np.testing.assert_array_equal(row // n, ids // room)
    np.testing.assert_array_equal(chunk, ids % room // n)
    np.testing.assert_array_equal(row % n, ids % n)
    np.testing.assert_array_equal(rows.shard_of(ids), ids // room)
    grid = Layout((2**20, 2**stride_bits, 1), 1, 3, stride=2**stride_bits)
    np.testing.assert_array_equal(np.stack(grid.split(ids.copy())), np.divmod(ids, 2**stride_bits))
    np.testing.assert_array_equal(grid.shard_of(ids), ids // 2**stride_bits // 3)


def test_a_shards_memory_is_private_to_the_process() -> None:
    buffer = ShardBuffer(Layout((64, 63, 128), 1, 64))
    at = buffer.bytes.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, rest = line.partition("-")
        last, access, *_ = rest.split()
        if int(first, 16) <= at < int(last, 16):
            break
    assert access == "rw-p"
