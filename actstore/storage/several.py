"""Do something with several files at a time, where each takes long: in a bucket."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
MOST_BYTES = 256 << 20  # of the files that are under way, since each may lie in memory


def several(
    act: Callable[[T], R], items: Iterable[T], at_once: int, n_bytes: Callable[[T], int] = lambda item: 0
) -> Generator[R, None, None]:
    """Act with each item, several at a time, and give the results in the order of the items.

    When an act fails, no further one begins, and those under way end before the error is raised.

    Args:
        act: called once with each item, by several threads if `at_once` is above 1.
        items: taken as they are needed.
        at_once: number of acts under way; 1 acts as `map` does.
        n_bytes: bytes of memory that an act takes. Acts under way take at most MOST_BYTES together,
            or there is only one.
    """
    if at_once == 1:
        yield from map(act, items)
        return
    under_way = deque[tuple[Future[R], int]]()
    with ThreadPoolExecutor(at_once) as threads:
        try:
            for item in items:
                size = n_bytes(item)
                while under_way and (len(under_way) >= at_once or size + sum(n for _, n in under_way) > MOST_BYTES):
                    yield under_way.popleft()[0].result()
                under_way.append((threads.submit(act, item), size))
            while under_way:
                yield under_way.popleft()[0].result()
        finally:
            for future, _ in under_way:
                future.cancel()
