"""Forward passes of one model, two at once where threads of torch would otherwise wait.

The threads of one operation wait for the last of them, and all wait while Python starts the next
operation. A second pass uses the processors meanwhile. Each operation has as many threads as it has
alone, so that no number changes. Each thread that runs passes has a bridge of its own, with the
same weights: a bridge notes the hooks and the size of the pass that runs.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from actstore.ingest.models.model import Model

Item = TypeVar("Item")
Result = TypeVar("Result")


class Passes:
    """Runs forward passes of one model; a context manager.

    Args:
        model: the model.
        at_once: 2 runs two passes at a time, in threads of their own. 1 runs each pass in the
            thread that asks for its result.
    """

    def __init__(self, model: Model, at_once: int = 1) -> None:
        import torch

        self.at_once, self._model = at_once, model
        self._of_thread = threading.local()
        # what torch takes in a new thread depends on the libraries that it was built with
        threads = (torch.get_num_threads(),)
        self._pool = ThreadPoolExecutor(at_once, "pass", torch.set_num_threads, threads) if at_once > 1 else None

    def __enter__(self) -> Passes:
        """Nothing is to be done."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Wait for the passes that run, and begin no other."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, run: Callable[[Model, Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """What `run` gives for each item, in their order; all are queued now if two run at once.

        Args:
            run: makes one pass over an item, with the model that it is given.
        """
        if self._pool is None:
            return (run(self._model, item) for item in items)
        queued = [self._pool.submit(self._run, run, item) for item in items]
        return (each.result() for each in queued)

    def _run(self, run: Callable[[Model, Item], Result], item: Item) -> Result:
        return run(self.model, item)

    @property
    def model(self) -> Model:
        """The model, for passes of the calling thread alone."""
        if self._pool is None:
            return self._model
        if not hasattr(self._of_thread, "model"):
            self._of_thread.model = twin(self._model)  # which no thread runs: a copy would have the hooks of its pass
        return self._of_thread.model


def twin(model: Model) -> Model:
    """A model with a bridge of its own and the same weights in memory."""
    bridge = model.bridge
    shared = {id(tensor): tensor for tensor in (*bridge.parameters(), *bridge.buffers())}
    return replace(model, bridge=copy.deepcopy(bridge, shared))


def side_by_side(model: Model) -> int:
    """How many passes of a model run best at once: 2 for a path-finding system, or 1.

    1 where each operation has one thread, where threads spin while they wait, on a GPU, and where
    someone has put hooks on the bridge, which may count on one pass after another. A pass over text
    has operations that are long enough.
    """
    import torch

    sleeps = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if model.task != "trees" or model.device.type != "cpu" or torch.get_num_threads() == 1 or not sleeps:
        return 1
    return 1 if any(point.has_hooks() for point in model.bridge.hook_dict.values()) else 2
