"""Named queries, one `.sql` file a question, whose header is the contract; and the studies made of them.

    queries.names()                                            # what can be asked
    queries.load("accuracy_by_depth")                          # its summary, SQL, grain, parameters, columns
    queries.select(store, "accuracy_by_depth", run="demo")     # its rows

A header reads `-- NAME: SUMMARY`, then the sections `grain` (columns that no two rows share), `params` (each $name, or
`none`) and `yields` (each column), then the assumption that the question rests on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from typing import Any, Protocol

import polars as pl

from actstore.errors import BadInput, NotStored

SECTIONS = ("grain", "params", "yields")
SECTION = re.compile(r"(grain|params|yields) {2,}(\S.*)")
ENTRY = re.compile(r"(\S+)(?: +(.*))?")


class Readable(Protocol):
    """What a named query needs of a store; `actstore.Store` is one."""

    def sql(self, query: str, params: dict[str, Any] | None = None) -> pl.DataFrame: ...

    def of(self, run: str) -> Readable: ...


@dataclass(frozen=True)
class Query:
    """One named query, as its header describes it.

    Attributes:
        name: of the query and of its file, NAME.sql.
        summary: what its rows are, one sentence.
        sql: the whole file, header included.
        grain: the columns that no two rows share.
        params: each `$name` without its $, and what it means.
        yields: each column, in order, and what it holds.
        note: the assumption that the question rests on.
    """

    name: str
    summary: str
    sql: str
    grain: list[str]
    params: dict[str, str]
    yields: dict[str, str]
    note: str


def names() -> list[str]:
    """Names of all queries, in alphabetical order."""
    return sorted(file.name[: -len(".sql")] for file in files(__name__).iterdir() if file.name.endswith(".sql"))


def load(name: str) -> Query:
    """One query by name.

    Raises:
        NotStored: there is no such query.
        BadInput: its header lacks a part.
    """
    known = names()
    if name not in known:
        raise NotStored(f"no query {name!r}; there are {', '.join(known)}{nearest(name, known)}")
    return parse(name, files(__name__).joinpath(f"{name}.sql").read_text(encoding="utf-8"))


def listing() -> pl.DataFrame:
    """All queries: name (String), params (String, comma-separated) and summary (String), by name."""
    queries = [load(name) for name in names()]
    return pl.DataFrame(
        {
            "query": [query.name for query in queries],
            "params": [", ".join(query.params) for query in queries],
            "summary": [query.summary for query in queries],
        }
    )


def select(store: Readable, name: str, /, **params: Any) -> pl.DataFrame:
    """Run one query; one that takes a run in the session of that run, see Store.of.

    Args:
        store: an open store.
        name: which query.
        params: a value for each of its parameters, no more and no fewer.

    Returns:
        A polars frame with the columns that the query's header says it yields.

    Raises:
        NotStored: there is no such query, or no such run.
        BadInput: a parameter is missing or unknown, or DuckDB refuses its value.
    """
    query = load(name)
    check_names(f"query {name!r}", params, query.params, query.params)
    if "run" in params:
        store = store.of(params["run"])  # refuses a run that is not there, where SQL would just find no rows
    return store.sql(query.sql, params or None)


def check_names(what: str, given: Iterable[str], required: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that are missing and names that mean nothing, in one message.

    Raises:
        BadInput: says which, and which there are.
    """
    given, known = list(given), list(known)
    missing = [name for name in required if name not in given]
    unknown = [name for name in given if name not in known]
    if not missing and not unknown:
        return
    faults = [f"lacks {', '.join(missing)}"] * bool(missing)
    faults += [f"has no {name!r}{nearest(name, known)}" for name in unknown]
    raise BadInput(f"{what} {' and '.join(faults)}; it takes {', '.join(known) if known else 'no parameters'}")


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean …?)` where a known name is close to the one given, else nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def parse(name: str, sql: str) -> Query:
    """Read a query's header.

    Raises:
        BadInput: the header lacks its summary, a section or the assumption.
    """
    lines = [line[2:].removeprefix(" ").rstrip() for line in _header(sql)]
    head, _, body = "\n".join(lines).partition("\n\n")
    title, _, summary = " ".join(head.split()).partition(": ")
    sections, note = _sections(body.splitlines())
    lacking = [section for section in SECTIONS if not sections[section]]
    lacking += ["summary"] * (title != name or not summary) + ["assumption"] * (not note)
    if lacking:
        raise BadInput(
            f"{name}.sql has a header without {', '.join(lacking)}; it begins `-- {name}: summary`, see actstore.queries"
        )
    params = {entry: text for entry, text in sections["params"].items() if entry != "none"}
    return Query(
        name=name,
        summary=summary,
        sql=sql,
        grain=[column.rstrip(",") for entry, text in sections["grain"].items() for column in (entry, *text.split())],
        params={entry.removeprefix("$"): text for entry, text in params.items()},
        yields=sections["yields"],
        note=note,
    )


def _header(sql: str) -> list[str]:
    """The comment lines that a query begins with."""
    lines = sql.splitlines()
    return lines[: next((i for i, line in enumerate(lines) if not line.startswith("--")), len(lines))]


def _sections(lines: list[str]) -> tuple[dict[str, dict[str, str]], str]:
    """The entries of each section, and the paragraph behind them."""
    sections: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    current, note = "", []
    for line in lines:
        begins = SECTION.fullmatch(line)
        current = begins[1] if begins else current if line.startswith("  ") else ""
        entry = ENTRY.fullmatch(begins[2] if begins else line.strip()) if current else None
        if entry:
            sections[current][entry[1]] = entry[2] or ""
        else:
            note.append(line)
    return sections, " ".join(" ".join(note).split())
