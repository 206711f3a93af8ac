"""What is read of files: runs against a set of bytes, and cold gathers against the pages that they bring in."""

from __future__ import annotations

import itertools
import mmap
import os
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actstore.arrays import pages
from actstore.arrays.layout import Layout
from actstore.arrays.pack import ShardBuffer
from actstore.arrays.plan import NEAR, Runs, cut, joined, whole_pages
from actstore.arrays.reader import SiteReader
from actstore.errors import Damaged, NotStored
from actstore.storage.local import Local
from tests.test_explain import drop, resident

PAGE = mmap.PAGESIZE
STRETCHES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300), st.integers(1, 40)), max_size=25)


def as_arrays(stretches: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    files, starts, lengths = np.array(stretches, np.int64).reshape(-1, 3).T
    return files, starts, starts + lengths


def as_bytes(runs: Runs) -> set[tuple[int, int]]:
    return {
        (file, byte)
        for file, start, end in zip(*map(np.ndarray.tolist, runs), strict=True)
        for byte in range(start, end)
    }


@given(STRETCHES, st.integers(0, 30))
def test_runs_cover_what_is_wanted_and_gaps_that_are_near_alone(stretches, near):
    runs = joined(*as_arrays(stretches), near)
    wanted, covered = as_bytes(Runs(*as_arrays(stretches))), as_bytes(runs)
    files = sorted({file for file, _ in wanted})
    gaps = set()
    for file in files:
        there = sorted(byte for of_file, byte in wanted if of_file == file)
        for before, after in itertools.pairwise(there):
            if after - before - 1 <= near:
                gaps |= {(file, byte) for byte in range(before + 1, after)}
    assert covered == wanted | gaps
    assert len(covered) == runs.n_bytes  # no byte twice
    ends = list(zip(runs.files.tolist(), runs.starts.tolist(), runs.ends.tolist(), strict=True))
    assert all(f != g or start - end > near for (f, _, end), (g, start, _) in itertools.pairwise(ends))
    assert ends == sorted(ends)


@given(STRETCHES, st.integers(1, 50))
def test_a_cut_covers_the_same_in_pieces_of_a_length(stretches, longest):
    runs = joined(*as_arrays(stretches), 0)
    pieces = cut(runs, longest)
    assert as_bytes(pieces) == as_bytes(runs)
    assert pieces.n_bytes == runs.n_bytes
    assert ((pieces.ends - pieces.starts) <= longest).all()
    assert len(pieces.files) == sum(-(-int(n) // longest) for n in runs.ends - runs.starts)


def test_pages_of_a_stretch_are_those_it_touches():
    found = whole_pages(Runs(np.array([0, 0, 1]), np.array([5, 10, 20]), np.array([9, 20, 21])), 10)
    assert as_bytes(found) == as_bytes(Runs(np.array([0, 0, 1]), np.array([0, 10, 20]), np.array([10, 20, 30])))


LAYOUT = Layout((600, 4, 512), 1, 300)  # rows of 2 kB, chunks of 150 pages, two shards


@pytest.fixture
def reader(tmp_path: Path) -> SiteReader:
    for batch in range(2):
        buffer = ShardBuffer(LAYOUT)
        numbers = torch.arange(300 * 4, dtype=torch.float32).reshape(300, 4, 1) + 1200 * batch
        buffer.put(0, numbers.expand(300, 4, 512))
        (tmp_path / str(batch)).write_bytes(buffer.seal(np.full(300, 4)))
    return SiteReader(LAYOUT, 0, {0: "0", 1: "1"}, "a site", Local(tmp_path))


IDS = np.array([tree * 256 + position for tree in range(3, 600, 37) for position in (0, 2)])
EXPECTED = IDS // 256 * 4 + IDS % 256


@pytest.fixture(params=["by descriptor", "mapped"])
def way(request, monkeypatch) -> str:
    """The two ways in which a few rows are read: the first time, and each time after that."""
    if request.param == "mapped":
        monkeypatch.setattr("actstore.arrays.mapped.FEW", 0)
    return request.param


def test_a_cold_gather_reads_what_explain_says_and_no_more(reader, tmp_path, way):
    """Linux alone would read around each page, as far as the disk's readahead goes."""
    if not hasattr(os, "posix_fadvise") or any(map(drop, map(tmp_path.joinpath, "01"))):
        pytest.skip("the system keeps these files in memory (tmpfs, say), so what a read touches cannot be seen")
    np.testing.assert_array_equal(reader.gather(IDS)[:, 0], EXPECTED)
    there = sum(map(resident, map(tmp_path.joinpath, "01"))) * PAGE
    said = reader.cost(IDS)
    assert there == said.bytes_read == said.bytes_in_memory
    rows = np.unique(reader.files.chunk_starts(0)[IDS % 256] + IDS // 256 % 300 * 2048 + IDS // 256 // 300 * 2**30)
    assert said.runs == 2 + np.count_nonzero(np.diff(rows // PAGE * PAGE) > NEAR + PAGE) + 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_blocks_of_a_cold_gather_join_to_the_same_rows(reader, monkeypatch, dtype):
    asked, fetched = IDS[::-1].copy(), []
    monkeypatch.setattr("actstore.arrays.reader.BLOCK", 5 * PAGE)
    monkeypatch.setattr("actstore.arrays.mapped.FEW", 0)
    monkeypatch.setattr(pages, "some_missing", lambda *about: True)
    monkeypatch.setattr(pages, "fetch", lambda addresses, lengths: fetched.append(len(addresses)))
    X = reader.gather(asked, out=np.empty((len(asked), 512), dtype))
    np.testing.assert_array_equal(X, reader.gather(asked))
    np.testing.assert_array_equal(X[:, 0], EXPECTED[::-1].astype(dtype))
    assert len(fetched) >= 2 * (len(asked) // 5)


def events_of(reader: SiteReader, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a gather of IDS does, in order, where no page is in memory; its numbers are checked."""
    events, pread = [], os.pread
    monkeypatch.setattr(pages, "some_missing", lambda *about: True)
    monkeypatch.setattr(pages, "fetch", lambda addresses, lengths: events.append(f"fetch {len(addresses)}"))
    monkeypatch.setattr(os, "pread", lambda *about: events.append("pread") or pread(*about))
    if hasattr(os, "posix_fadvise"):
        asks = {os.POSIX_FADV_WILLNEED: ["ask"]}
        monkeypatch.setattr(os, "posix_fadvise", lambda *about: events.extend(asks.get(about[3], [])))
    np.testing.assert_array_equal(reader.gather(IDS)[:, 0], EXPECTED)
    return events


def in_reverse(path: Path) -> None:
    """Put a shard's chunks in the reverse order, as any writer of Zarr may."""
    content = bytearray(path.read_bytes())
    chunks = np.frombuffer(content, np.uint8)[: -LAYOUT.index_bytes].reshape(4, -1)
    index = np.frombuffer(content, "<u8", 8, len(content) - LAYOUT.index_bytes).reshape(4, 2)
    chunks[:], index[:] = chunks[::-1].copy(), index[::-1].copy()
    content[-4:] = google_crc32c.value(bytes(content[-LAYOUT.index_bytes : -4])).to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
def test_few_rows_and_the_indexes_are_asked_for_before_anything_is_read(reader, monkeypatch):
    events = [*events_of(reader, monkeypatch)]
    assert reader.files._view is None
    n_runs = reader.cost(IDS).runs
    assert events == ["ask"] * n_runs + ["pread"] * (2 + len(IDS))


def test_shards_of_which_rows_were_read_are_mapped_at_the_next_read(reader, tmp_path):
    for _ in range(2):
        np.testing.assert_array_equal(reader.gather(IDS[:2])[:, 0], EXPECTED[:2])
    assert reader.files._view.maps.keys() == {0}
    np.testing.assert_array_equal(reader.gather(IDS)[:, 0], EXPECTED)
    assert reader.files._view.maps.keys() == {0}
    np.testing.assert_array_equal(reader.gather(IDS)[:, 0], EXPECTED)
    assert reader.files._view.maps.keys() == {0, 1}


def test_many_rows_are_asked_for_block_by_block_after_the_indexes(reader, monkeypatch):
    monkeypatch.setattr("actstore.arrays.mapped.FEW", len(IDS) - 1)
    monkeypatch.setattr("actstore.arrays.reader.BLOCK", len(IDS) * PAGE)
    n_runs = reader.cost(IDS).runs - 2
    reader.files.let_go()
    assert events_of(reader, monkeypatch) == ["fetch 2", "pread", "pread", f"fetch {n_runs}"]


def test_chunks_in_another_order_are_asked_for_where_they_lie(reader, tmp_path, monkeypatch, way):
    for name in "01":
        in_reverse(tmp_path / name)
    events = events_of(reader, monkeypatch)
    if way == "mapped":
        assert events == ["fetch 2", "pread", "pread", f"fetch {len(IDS)}"]  # each row's pages lie apart
    elif hasattr(os, "posix_fadvise"):
        of_0 = np.count_nonzero(IDS // 256 < 300)
        n_each = [of_0, len(IDS) - of_0]
        then = [event for n in n_each for event in ["pread", *["ask"] * n, *["pread"] * n]]
        assert events == ["ask"] * (2 + len(IDS)) + then


def test_a_file_that_was_cut_while_it_was_open_is_damaged(reader, tmp_path, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, n, start: pread(file, n, start)[: n if n < 2048 else 100])
    with pytest.raises(Damaged, match=f"cannot read {tmp_path / '0'} of a site .it ends before its rows"):
        reader.gather(IDS)


@pytest.mark.parametrize("wrong", [5, 255, 600 * 256, -1])
def test_what_is_not_stored_is_refused_where_nothing_is_in_memory(reader, monkeypatch, way, wrong):
    monkeypatch.setattr(pages, "some_missing", lambda *about: True)
    with pytest.raises(NotStored, match=str(wrong)):
        reader.gather(np.append(IDS, wrong))


def test_a_warm_gather_asks_for_nothing(reader, monkeypatch):
    reader.gather(IDS)
    reader.gather(IDS)
    monkeypatch.setattr(pages, "fetch", None)
    np.testing.assert_array_equal(reader.gather(IDS)[:, 0], EXPECTED)


def test_what_the_system_cannot_say_counts_as_in_memory(reader, tmp_path, monkeypatch):
    any(map(drop, map(tmp_path.joinpath, "01")))
    monkeypatch.setattr("actstore.arrays.mapped.FEW", 0)
    monkeypatch.setattr(pages, "_mincore", lambda: None)
    monkeypatch.setattr(pages, "fetch", None)
    np.testing.assert_array_equal(reader.gather(IDS)[:, 0], EXPECTED)
    assert reader.cost(IDS).bytes_in_memory == reader.cost(IDS).bytes_read


def test_pages_are_fetched_one_by_one_where_the_system_takes_no_list(reader, tmp_path, monkeypatch):
    if not hasattr(os, "posix_fadvise") or any(map(drop, map(tmp_path.joinpath, "01"))):
        pytest.skip("the system keeps these files in memory (tmpfs, say), so what a read touches cannot be seen")
    monkeypatch.setattr("actstore.arrays.mapped.FEW", 0)
    monkeypatch.setattr(pages, "PROCESS_MADVISE", -1)  # no such call
    np.testing.assert_array_equal(reader.gather(IDS)[:, 0], EXPECTED)
    assert sum(map(resident, map(tmp_path.joinpath, "01"))) * PAGE == reader.cost(IDS).bytes_read
