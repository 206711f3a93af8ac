"""What to say where a store lacks a run: which there are, and commands that work as they stand, under a run name that is free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from actstore.errors import ActstoreError, BadInput, NotStored, advised

if TYPE_CHECKING:
    import polars as pl


class Held(Protocol):
    """A store, as far as advice asks it."""

    @property
    def path(self) -> Path: ...

    def runs(self) -> list[str]: ...

    def sites(self, run: str) -> list[str]: ...

    def sql(self, query: str, params: Mapping[str, Any] | None = None) -> pl.DataFrame: ...


def ingest_more(store: Held, run: str, name: str, *more: str) -> str:
    """The command, as a message shows it, that stores more of a run's own model over its own trees.

    Args:
        name: of the new run; a number is added where it is taken.
        more: what to store, as `actstore ingest` takes it.
    """
    dataset = store.sql("select dataset from runs where run = $run", {"run": run}).item()
    return ingest_command(store, ("--model-of", run), dataset, name, *more)


def ingest_command(store: Held, model: tuple[str, str], dataset: str, name: str, *more: str) -> str:
    """The command, as a message shows it, that stores a new run over a stored set of trees.

    Args:
        model: the option that names the model, and its value.
        name, more: as of ingest_more.
    """
    taken = store.runs()
    free = next(one for one in chain([name], (f"{name}-{turn}" for turn in count(2))) if one not in taken)
    return advised("ingest", store.path, *model, "--dataset", dataset, "--run", free, *more)


def no_run(store: Held, run: object, held: Sequence[str]) -> ActstoreError:
    """What to raise where a store holds no such run; a misspelt one is not offered to be stored.

    Args:
        run: what was asked for.
        held: names of the runs there are.
    """
    from actstore.named import available

    holds = f"{store.path} holds {', '.join(held) if held else 'no run'}"
    if not isinstance(run, str):
        return BadInput(f"got run {run!r}; {holds}: give the name of one, as text")
    if run in available():
        return NotStored(
            f"no run {run!r}: {holds}; {advised('ingest', store.path, '--model', run)} stores one of that model"
        )
    if near := get_close_matches(run.lower(), held, 1):
        return NotStored(f"no run {run!r} (did you mean {near[0]}?): {holds}")
    if store.sql("from sites where $run in (site, short)", {"run": run}).height:
        return NotStored(f"no run {run!r}, which is a site (site={run!r}, --site {run}): {holds}")
    return NotStored(f"no run {run!r}: {holds}" + ("; name one of them" if held else ""))


def together(commands: Sequence[str]) -> str:
    """Commands that messages show, as one line of a shell: each runs where the one before went well."""
    return f"`{' && '.join(command.strip('`') for command in commands)}`"
