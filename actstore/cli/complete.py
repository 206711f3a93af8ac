"""Words that a shell completes: stores, and what the store on the line holds.

The shell asks at each press of TAB, so an error completes nothing, and says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from actstore.store import Store

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def is_store(word: str) -> bool:
    """True if a word of a command line names a store, or the place of a new one."""
    return os.path.isdir(os.path.expanduser(word)) or word.endswith(".act") or "://" in word


def _of_the_store(words: Callable[[Store, click.Context], Iterable[str]]) -> Completer:
    """A completer of words that a store knows.

    Args:
        words: takes the store that the line names, or $ACTSTORE, and the line so far.
    """

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        with suppress(Exception):
            from actstore.store import Store

            given = ctx.params.get("store") or next(filter(is_store, ctx.args), None)
            with Store(given or os.environ["ACTSTORE"]) as store:
                return [CompletionItem(word) for word in words(store, ctx) if word.startswith(incomplete)]
        return []

    return complete


def stores(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders that are stores, and folders that may hold some."""
    folder, _, begin = incomplete.rpartition("/")
    found = []
    with suppress(OSError):
        for path in sorted(Path(os.path.expanduser(folder or ("/" if incomplete[:1] == "/" else "."))).iterdir()):
            if path.is_dir() and path.name.startswith(begin) and (begin or path.name[0] != "."):
                word = incomplete[: len(incomplete) - len(begin)] + path.name
                found.append(CompletionItem(word if (path / "store.json").is_file() else f"{word}/"))
    return found


def _sites(store: Store, ctx: click.Context) -> Iterable[str]:
    run = ctx.params.get("run")
    held = [site for name in ([run] if run else store.runs()) for site in store.sites(name)]
    return dict.fromkeys(held)


def _column(query: str) -> Completer:
    def words(store: Store, ctx: click.Context) -> Iterable[str]:
        return [str(row[0]) for row in store.rows(query)]

    return _of_the_store(words)


def queries(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Named queries with what each asks, and .sql files."""
    with suppress(Exception):
        from actstore import queries as named

        asked: list[dict[str, Any]] = named.listing().to_dicts()
        found = [CompletionItem(row["query"], help=str(row["summary"])) for row in asked]
        return [item for item in found if item.value.startswith(incomplete)] or [
            CompletionItem(incomplete, type="file")
        ]
    return []


def studies(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the studies."""
    from actstore.queries.study import STUDIES

    return [CompletionItem(name) for name in STUDIES if name.startswith(incomplete)]


def models(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the models, and files."""
    from actstore.named import available

    found = [CompletionItem(name) for name in available() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


runs = _of_the_store(lambda store, ctx: store.runs())
sites = _of_the_store(_sites)
tables = _of_the_store(lambda store, ctx: store.tables)
datasets = _column("select dataset from datasets")
labels = _column("select name from relations where kind in ('labels', 'view')")
