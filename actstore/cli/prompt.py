"""The prompt of `actstore sql STORE`: queries until Ctrl-D, with history and completion."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from actstore.cli.group import note, say
from actstore.cli.output import Output
from actstore.errors import ActstoreError, nearest

if TYPE_CHECKING:
    import polars as pl

    from actstore.sql.rows import Rows
    from actstore.store import Store

COMMANDS = {
    ".tables": "tables and views, with their rows and columns",
    ".schema": "columns of every table, or of one: .schema tokens",
    ".runs": "what the store holds, as `actstore info`",
    ".queries": "named queries",
    ".query": "a named query: .query accuracy_by_depth run=reproduction",
    ".output": "the form of answers: .output csv",
    ".help": "this list",
    ".quit": "leave (Ctrl-D, too)",
}
WORD = re.compile(r"[\w.]*$")
FUNCTIONS = (
    *("act", "activations", "attention", "cosine", "distance", "dot", "logit_lens", "norm"),
    *("position_of", "probe_direction", "project", "token_at"),
)
KEYWORDS = (
    *("select", "from", "where", "group by all", "order by", "limit", "join", "using", "having", "with", "as", "on"),
    *("count(*)", "avg(", "sum(", "distinct", "describe", "summarize", "explain", "unnest("),
)


def converse(store: Store, answer: Callable[[str], pl.DataFrame | Rows], output: Output) -> None:
    """Read queries from a terminal and print their answers, until the end of the input.

    Ctrl-C stops a query, or empties the line; the prompt stays.

    Args:
        store: the store, or the store of one run.
        answer: runs a query.
        output: the form of the answers; `.output` changes it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    words = Words(store)
    session: PromptSession[str] = PromptSession(
        history=_history(),
        completer=words,
        multiline=True,
        key_bindings=_keys(),
        prompt_continuation=lambda width, line, wrapped: ". ".rjust(width),
        complete_while_typing=False,
    )
    whose = f"{store.path.name}/{store.only}" if store.only else store.path.name
    note(f"{store.path}, snapshot {store.snapshot}: a query ends with `;`, and .help says more")
    while True:
        try:
            text = session.prompt(f"{whose}> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if text in (".quit", ".exit"):
            return
        try:
            if text.startswith("."):
                output = _command(store, text, output)
            elif text.strip("; \n"):
                output.write(answer(text))
        except ActstoreError as error:
            say(f"actstore: {error}", err=True)
        except KeyboardInterrupt:
            say("actstore: the query was stopped", err=True)


def _command(store: Store, text: str, output: Output) -> Output:
    """Run a command that begins with a dot; returns the output of what follows."""
    from actstore import queries
    from actstore.cli.options import FORMATS

    name, *words = text.rstrip(";").split()
    if name == ".tables":
        output.write(store.tables_rows())
    elif name == ".schema":
        output.write(store.schema_rows(words[0] if words else None))
    elif name == ".runs":
        output.write(store.info_rows())
    elif name == ".queries":
        output.write(queries.listing())
    elif name == ".query" and words:
        pairs = [word.partition("=") for word in words[1:]]
        output.write(queries.select(store, words[0], **{key: value for key, _, value in pairs}))
    elif name == ".output" and words and words[0] in FORMATS and words[0] != "parquet":
        return Output(words[0])
    elif name == ".help":
        say("\n".join(f"{command:<9} {what}" for command, what in COMMANDS.items()))
    else:
        hint = nearest(name, COMMANDS) if name not in COMMANDS else f": {COMMANDS[name]}"
        say(f"actstore: {text} is no command{hint}; .help lists them", err=True)
    return output


def _keys() -> KeyBindings:
    """Enter sends a query that ends with `;`, and a command; otherwise it begins a line."""
    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        text = event.current_buffer.text.strip()
        if not text or text.endswith(";") or text.startswith("."):
            event.current_buffer.validate_and_handle()
        else:
            event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """The history of all prompts of the user; of this prompt alone where no file can be written."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state if os.path.isabs(state) else "~/.local/state").expanduser() / "actstore"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "history", "a", encoding="utf-8"):
            pass
        return FileHistory(str(folder / "history"))
    except OSError:
        return InMemoryHistory()


class Words(Completer):
    """Completes tables, columns, functions, named queries, and commands.

    Args:
        store: looked at once, at the first completion.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._columns: dict[str, list[str]] = {}

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Words that continue the word before the cursor."""
        before = document.text_before_cursor
        found = WORD.search(before)
        word = found[0] if found else ""
        for known in self._words(before, word):
            if known.lower().startswith(word.lower()) and known != word:
                yield Completion(known, start_position=-len(word))

    def _words(self, before: str, word: str) -> Iterable[str]:
        from actstore import queries
        from actstore.cli.options import FORMATS

        begins, columns = before.lstrip(), self._tables()
        if begins.startswith("."):
            arguments: dict[str, Iterable[str]] = {".schema": columns, ".query": queries.names(), ".output": FORMATS}
            return arguments.get(begins.split()[0], ()) if begins != word else COMMANDS
        table, dot, _ = word.rpartition(".")
        if dot:
            return [f"{table}.{column}" for column in columns.get(self._aliased(before, table), ())]
        named = [column for name, held in columns.items() if re.search(rf"\b{name}\b", before) for column in held]
        if re.search(r"\b(?:from|join|describe|summarize)\s+\w*$", before, re.IGNORECASE):
            return columns
        every = named or [column for held in columns.values() for column in held]
        return dict.fromkeys([*every, *columns, *FUNCTIONS, *KEYWORDS])

    def _tables(self) -> dict[str, list[str]]:
        """Names of the columns of each table and view."""
        if not self._columns:
            for row in self._store.schema_rows():
                self._columns.setdefault(row[0], []).append(row[1])
            for table, *_ in self._store.tables_rows():
                self._columns.setdefault(table, [])
        return self._columns

    def _aliased(self, before: str, name: str) -> str:
        """The table that a name stands for: `tokens t`, or `tokens as t`."""
        found: list[Any] = re.findall(rf"(\w+)\s+(?:as\s+)?{re.escape(name)}\b", before, re.IGNORECASE)
        return next((table for table in found if table in self._columns), name)
