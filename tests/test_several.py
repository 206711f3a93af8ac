"""Files that are published several at a time: in order, bounded, and no further one after an error."""

from __future__ import annotations

import threading
import time

import pytest

from actstore.storage import several as module
from actstore.storage.several import several


@pytest.mark.parametrize("at_once", [1, 4])
def test_results_come_in_the_order_of_the_items(at_once: int) -> None:
    def act(item: int) -> int:
        time.sleep(0.01 if item % 3 == 0 else 0)
        return item * 2

    assert list(several(act, range(20), at_once)) == [item * 2 for item in range(20)]


@pytest.mark.parametrize(("size", "at_most"), [(0, 4), (100, 2), (1000, 1)])
def test_so_many_acts_are_under_way_and_so_many_bytes(size: int, at_most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 250)
    now, most, lock = 0, 0, threading.Lock()

    def act(item: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1

    assert len(list(several(act, range(12), 4, lambda item: size))) == 12
    assert most == at_most


def test_after_an_error_no_further_act_begins_and_none_goes_on() -> None:
    begun, ended = [], []

    def act(item: int) -> None:
        begun.append(item)
        if item == 1:
            raise OSError("of the disk")
        time.sleep(0.02)
        ended.append(item)

    with pytest.raises(OSError, match="of the disk"):
        list(several(act, range(100), 2))
    assert len(begun) < 10
    assert sorted(ended) == [item for item in sorted(begun) if item != 1]
