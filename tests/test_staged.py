"""Shards that are packed on a GPU: byte for byte those of a synchronous run, however late the copies come.

Without a GPU the copies are stubbed: they happen when somebody waits for them, and no sooner.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actstore.arrays import staged
from actstore.arrays.layout import Layout
from actstore.arrays.pack import ShardBuffer
from actstore.arrays.staged import buffers
from actstore.errors import HalvedBatch, LimitReached
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.forward import forward
from actstore.storage.local import Local
from actstore.store import Store
from tests.stores import files
from tests.test_arrays import layouts, pack, planted
from tests.test_pipeline import EVERY_SITE, contents, small_model, trees

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class LateCopies:
    """Copies that read their source as late as they may: when somebody waits."""

    started = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def page_locked(self, n_bytes: int) -> torch.Tensor:
        return torch.full((n_bytes,), 0xAB, dtype=torch.uint8)

    def start(self, source: torch.Tensor, target: torch.Tensor) -> Late:
        LateCopies.started += 1
        return Late(source, target)


class Late:
    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.source, self.target = source, target

    def synchronize(self) -> None:
        self.target.copy_(self.source)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as a device whose copies come late."""
    monkeypatch.setitem(staged.STREAMS, "cpu", LateCopies)
    monkeypatch.setattr(LateCopies, "started", 0)
    yield
    assert LateCopies.started


def staged_buffer(layout: Layout) -> ShardBuffer:
    with pytest.MonkeyPatch.context() as context:
        context.setitem(staged.STREAMS, "cpu", LateCopies)
        return buffers({"it": layout}, CPU)["it"]


@given(layouts(), st.integers(0, 2**32))
def test_a_shard_of_either_layout_is_that_of_a_buffer_on_the_host(layout: Layout, seed: int) -> None:
    values, lengths = planted(layout, seed)
    buffer = staged_buffer(layout)
    assert pack(layout, values, lengths, buffer) == pack(layout, values, lengths)
    assert pack(layout, values, lengths, buffer) == pack(layout, values, lengths)  # a second time


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("lengths", [(3, 5), (64,), (64, 64, 1), (100, 27)])
def test_rows_are_copied_as_far_as_they_go(lengths: tuple[int, ...], dtype: str) -> None:
    layout = Layout((64 * 256, 5), None, 64, dtype)
    values = torch.randn(sum(lengths), 5)
    sealed = []
    for buffer in (ShardBuffer(layout), staged_buffer(layout)):
        for begin, n in zip(np.cumsum((0, *lengths)), lengths, strict=False):
            buffer.put(int(begin), values[begin : begin + n])
        buffer.hand_over()
        sealed.append(bytes(buffer.seal(np.array(lengths))))
    assert sealed[0] == sealed[1]


def test_nothing_is_put_into_a_shard_that_is_being_copied() -> None:
    """The copy would read what belongs to the batch after."""
    buffer = staged_buffer(Layout((8, 7, 5), 1, 4))
    buffer.put(0, torch.ones(4, 7, 5))
    buffer.hand_over()
    with pytest.raises(ValueError, match="handed over"):
        buffer.put(0, torch.zeros(4, 7, 5))
    assert np.frombuffer(buffer.seal(np.full(4, 7)), "<f4", 5).tolist() == [1] * 5
    buffer.put(0, torch.zeros(4, 7, 5))


def shards(store: Path) -> dict[str, bytes]:
    return {path: content for path, content in files(store).items() if "/c/" in path}


def test_a_store_is_byte_for_byte_that_of_a_synchronous_run(tmp_path: Path, late: None) -> None:
    model = small_model()
    execute(Ingest(tmp_path / "late.act", model, trees(), sites=EVERY_SITE, batch_size=3))
    staged.STREAMS.pop("cpu")
    execute(Ingest(tmp_path / "plain.act", model, trees(), sites=EVERY_SITE, batch_size=3))
    staged.STREAMS["cpu"] = LateCopies
    assert len(shards(tmp_path / "late.act")) == 3 * Ingest(tmp_path, model, trees(), sites=EVERY_SITE).n_batches * 3
    assert contents(tmp_path / "late.act") == contents(tmp_path / "plain.act")


def test_sites_are_added_late_too(tmp_path: Path, late: None) -> None:
    model = small_model()
    execute(Ingest(tmp_path / "s.act", model, trees(), sites=["embed"]))
    execute(Ingest(tmp_path / "s.act", model, trees(), sites=["embed", "resid_post"]))
    staged.STREAMS.pop("cpu")
    execute(Ingest(tmp_path / "whole.act", model, trees(), sites=["embed", "resid_post"]))
    staged.STREAMS["cpu"] = LateCopies
    assert shards(tmp_path / "s.act") == shards(tmp_path / "whole.act")


def test_answers_alone_need_no_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(staged.STREAMS, "cpu", LateCopies)
    execute(Ingest(tmp_path / "s.act", small_model(), trees(), sites=[]))
    with Store(tmp_path / "s.act") as store:
        assert store.sql("select count(*) from outcomes").item() == 10


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device with memory for so many sequences per pass; the list holds the number, to be changed."""
    monkeypatch.setitem(staged.STREAMS, "cpu", LateCopies)
    most = [3]

    def limited(model, ids, sites, take, lengths=None, changes=None):
        if len(ids) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(model, ids, sites, take, lengths, changes)

    monkeypatch.setattr("actstore.ingest.jobs.job.forward", limited)
    return most


def test_a_new_run_halves_its_batch_once_and_says_so(tmp_path: Path, small_gpu: list[int]) -> None:
    model = small_model()
    with pytest.warns(HalvedBatch, match=r"4 sequences per forward pass: run 'small' takes 2 \(--batch-size 2\)"):
        execute(Ingest(tmp_path / "s.act", model, trees(), sites=["embed"], batch_size=4))
    execute(Ingest(tmp_path / "two.act", model, trees(), sites=["embed"], batch_size=2))
    assert contents(tmp_path / "s.act") == contents(tmp_path / "two.act")
    with Store(tmp_path / "s.act") as store:
        assert store.sql("select versions->>'batch_size' from runs").item() == "2"


@pytest.mark.parametrize(
    ("size", "said"), [(4, "lacks memory for 2 .*take fewer"), (1, "lacks memory for 1 .*use another device")]
)
def test_twice_too_little_memory_is_one_line_and_stores_nothing(
    tmp_path: Path, small_gpu: list[int], size: int, said: str
) -> None:
    small_gpu[0] = 0
    with pytest.raises(LimitReached, match=said):
        execute(Ingest(tmp_path / "s.act", small_model(), trees(), sites=["embed"], batch_size=size))
    assert not (tmp_path / "s.act").exists()


def test_memory_that_runs_out_later_keeps_what_is_committed(
    tmp_path: Path, small_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, model, publish = tmp_path / "s.act", small_model(), Local.publish

    def filling(place, path, content):
        if "/c/1/" in path:
            small_gpu[0] = 0
        return publish(place, path, content)

    job = Ingest(store, model, trees(20), sites=["embed"], batch_size=2)
    with monkeypatch.context() as context:
        context.setattr(Local, "publish", filling)
        with pytest.raises(LimitReached, match=r"ran out of memory at 2 .* [1-4] of 5 batches are committed") as told:
            execute(job)
    assert "\n" not in str(told.value)
    with pytest.raises(LimitReached, match="ran out of memory"):  # a stored run keeps its batch size
        execute(Ingest(store, model, trees(20), sites=["embed"], batch_size=2))
    small_gpu[0] = 2
    execute(Ingest(store, model, trees(20), sites=["embed"], batch_size=2))
    execute(Ingest(tmp_path / "whole.act", model, trees(20), sites=["embed"], batch_size=2))
    assert contents(store) == contents(tmp_path / "whole.act")


@needs_gpu
def test_on_a_gpu_each_shard_is_that_of_a_synchronous_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    model.bridge.to("cuda", print_details=False)
    execute(Ingest(tmp_path / "staged.act", model, trees(40), sites=EVERY_SITE, batch_size=3))
    monkeypatch.delitem(staged.STREAMS, "cuda")
    execute(Ingest(tmp_path / "plain.act", model, trees(40), sites=EVERY_SITE, batch_size=3))
    assert shards(tmp_path / "staged.act") == shards(tmp_path / "plain.act")
    assert contents(tmp_path / "staged.act") == contents(tmp_path / "plain.act")


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_a_gpu_a_copy_that_is_slow_is_waited_for(dtype: str) -> None:
    layout = Layout((64, 63, 128), 1, 64, dtype)
    (buffer,) = buffers({"it": layout}, torch.device("cuda")).values()
    plain, lengths = ShardBuffer(layout), np.full(64, 60)
    for _ in range(3):
        x = torch.randn(64, 63, 128, device="cuda")
        torch.cuda._sleep(50_000_000)  # the kernels before it are late
        x += 1
        buffer.put(0, x)
        buffer.hand_over()
        plain.put(0, x.cpu())
        del x
        assert bytes(buffer.seal(lengths)) == bytes(plain.seal(lengths))
