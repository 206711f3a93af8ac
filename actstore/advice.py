"""Messages for a missing run: the runs that exist, and commands that work as they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from actstore.errors import ActstoreError, BadInput, NotStored, advised, nearest

if TYPE_CHECKING:
    import polars as pl


class Held(Protocol):
    """What advice asks of a store."""

    @property
    def path(self) -> Path:
        """The store's folder."""
        ...

    def runs(self) -> list[str]:
        """Names of the runs."""
        ...

    def sites(self, run: str) -> list[str]:
        """Short names of a run's sites."""
        ...

    def sql(self, query: str, params: Mapping[str, Any] | None = None) -> pl.DataFrame:
        """Run one SQL query."""
        ...


def ingest_more(store: Held, run: str, name: str, *more: str) -> str:
    """The command that stores more of a run's own model over its own trees.

    Args:
        run: the run whose model and trees are used.
        name: the new run's name; a number is added if the name is taken.
        *more: further arguments of `actstore ingest`.
    """
    dataset = store.sql("select dataset from runs where run = $run", {"run": run}).item()
    return ingest_command(store, ("--model-of", run), dataset, name, *more)


def ingest_sites(store: Held, run: str, *sites: str) -> str:
    """The command that adds sites to a run.

    A run of continuations takes no sites; the command then stores a run of its own. A run with
    edits is continued from its base run.

    Args:
        sites: short names.
    """
    query = "select dataset, coalesce(prompt, 'task') as prompt from runs where run = $run"
    dataset, prompt = store.sql(query, {"run": run}).row(0)
    more = ("--sites", ",".join(sites))
    bases = store.sql("select distinct base_run from store.main.interventions where run = $run", {"run": run})
    if len(bases):
        return advised("ingest", store.path, "--base", bases.item(), "--run", run, *more)
    if prompt != "task":
        return ingest_more(store, run, f"{run}-{sites[0]}", *more)
    return advised("ingest", store.path, "--model-of", run, "--dataset", dataset, "--run", run, *more)


def ingest_command(store: Held, model: tuple[str, str], dataset: str, name: str, *more: str) -> str:
    """The command that stores a new run over a stored dataset.

    Args:
        model: the option that names the model, and its value.
        name: the new run's name; a number is added if the name is taken.
        *more: further arguments of `actstore ingest`.
    """
    taken = store.runs()
    free = next(tried for tried in chain([name], (f"{name}-{turn}" for turn in count(2))) if tried not in taken)
    return advised("ingest", store.path, *model, "--dataset", dataset, "--run", free, *more)


def no_run(store: Held, run: object, held: Sequence[str]) -> ActstoreError:
    """The error for a run that the store does not hold; a misspelt run gets no command to store it.

    Args:
        run: the name that was asked for.
        held: names of the stored runs.
    """
    from actstore.named import available

    holds = f"{store.path} holds {', '.join(held) if held else 'no run'}"
    if not isinstance(run, str):
        return BadInput(f"got run {run!r}; {holds}: give the name of one, as text")
    if run in available():
        return NotStored(
            f"no run {run!r}: {holds}; {advised('ingest', store.path, '--model', run)} stores one of that model"
        )
    if hint := nearest(run.lower(), held):
        return NotStored(f"no run {run!r}{hint}; {holds}")
    if store.sql("from sites where $run in (site, short)", {"run": run}).height:
        return NotStored(f"no run {run!r}, which is a site (site={run!r}, --site {run}): {holds}")
    return NotStored(f"no run {run!r}: {holds}" + ("; name one of them" if held else ""))


def together(commands: Sequence[str]) -> str:
    """Join commands to one line of a shell; each runs if the one before succeeded."""
    return f"`{' && '.join(command.strip('`') for command in commands)}`"
