"""Actions timed in turns, so that all see the same machine; and pages dropped, so that a read is of the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 1.5  # spent on one action at one selection
ROUNDS = range(3, 31)  # at least and at most, however long one takes …
ONCE = 10.0  # … but what takes longer than this is timed once, the first time


@dataclass(frozen=True)
class Action:
    """Something to time.

    Attributes:
        call: the whole of it.
        X: the activations in what it returns, to be compared with the limit's; None where it reads none.
        atol: how far they may be from them.
    """

    call: Callable[[], Any]
    X: Callable[[Any], np.ndarray] | None = None
    atol: float = 0.0


def alternate(actions: Mapping[str, Action], X: np.ndarray) -> dict[str, list[float]]:
    """Seconds of each action in every round; the slow ones take part in the first few rounds only.

    Args:
        X: what every action that reads activations must return; compared once, untimed, which also warms up.
    """
    firsts = {name: _first(name, action, X) for name, action in actions.items()}
    rounds = {name: min(max(int(SECONDS / first), ROUNDS.start), ROUNDS.stop) for name, first in firsts.items()}
    rounds = {name: 0 if firsts[name] > ONCE else n for name, n in rounds.items()}
    seconds: dict[str, list[float]] = {name: [first] * (first > ONCE) for name, first in firsts.items()}
    names = list(actions)
    for round_ in range(max(rounds.values())):
        turn = round_ % len(names)  # each goes first at times: what runs behind a large read finds the caches cold
        for name in [*names[turn:], *names[:turn]]:
            if round_ < rounds[name]:
                seconds[name].append(timed(actions[name].call)[0])
    return seconds


def _first(name: str, action: Action, X: np.ndarray) -> float:
    seconds, result = timed(action.call)
    if action.X is not None:
        found = action.X(result)
        same = np.array_equal(found, X) or (action.atol > 0 and np.allclose(found, X, rtol=0, atol=action.atol))
        assert same, f"{name} returns other numbers than the limit"
    return seconds


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds it took, and what it returned: which is freed by the caller, outside the time."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios within one round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=False))


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, three digits of it."""
    return f"{statistics.median(seconds) * 1e3:#.3g}".rstrip(".")


def plus(*parts: Sequence[float]) -> list[float]:
    """Round by round, the sum."""
    return [sum(seconds) for seconds in zip(*parts, strict=False)]


def drop_pages(files: Iterable[Path]) -> None:
    """Put files out of the page cache; nobody may have their pages mapped.

    Raises:
        AssertionError: pages stayed, so a read would not be of the disk.
    """
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # a page that is not written yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        assert (stayed := cached(path)) < 0.01, f"{stayed:.0%} of {path} stayed in the page cache"


def cached(path: Path) -> float:
    """Share of a file's pages that are in the page cache, [0, 1]."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        n_pages = -(-len(mapped) // mmap.PAGESIZE)
        resident = np.zeros(n_pages, np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped)), ctypes.c_void_p(resident.ctypes.data)
        )
        del view  # else the mapping cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
        return float((resident & 1).mean())
