"""Commands that a message advises where a store lacks a run: they work as they stand, under a run name that is free."""

from __future__ import annotations

from itertools import chain, count
from typing import TYPE_CHECKING

from actstore.errors import advised

if TYPE_CHECKING:
    from actstore.store import Store


def ingest_more(store: Store, run: str, name: str, *more: str) -> str:
    """The command, as a message shows it, that stores more of a run's own model over its own trees.

    Args:
        name: of the new run; a number is added where it is taken.
        more: what to store, as `actstore ingest` takes it.
    """
    dataset = store.sql("select dataset from runs where run = $run", {"run": run}).item()
    return ingest_command(store, ("--model-of", run), dataset, name, *more)


def ingest_command(store: Store, model: tuple[str, str], dataset: str, name: str, *more: str) -> str:
    """The command, as a message shows it, that stores a new run over a stored set of trees.

    Args:
        model: the option that names the model, and its value.
        name, more: as of ingest_more.
    """
    taken = store.runs()
    free = next(one for one in chain([name], (f"{name}-{turn}" for turn in count(2))) if one not in taken)
    return advised("ingest", store.path, *model, "--dataset", dataset, "--run", free, *more)
