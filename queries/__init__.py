"""Named queries, one `.sql` file per question, whose header is the contract; and studies on them.

    queries.names()                                            # names of all queries
    queries.load("accuracy_by_depth")                          # summary, SQL, parameters, columns
    queries.select(store, "accuracy_by_depth", run="demo")     # the query's rows

A header is `-- NAME: SUMMARY`, then the sections `grain` (columns that no two rows share), `params`
(each $name, or `none`) and `yields` (each column), then the assumption behind the question.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from actstore.errors import BadInput, NotStored, nearest

SECTIONS = ("grain", "params", "yields")
SECTION = re.compile(r"(grain|params|yields) {2,}(\S.*)")
ENTRY = re.compile(r"(\S+)(?: +(.*))?")


class Readable(Protocol):
    """What a named query needs of a store; `actstore.Store` is one."""

    def sql(self, query: str, params: dict[str, Any] | None = None) -> pl.DataFrame:
        """See Store.sql."""
        ...

    def of(self, run: str) -> Readable:
        """See Store.of."""
        ...

    def runs(self) -> list[str]:
        """See Store.runs."""
        ...

    def resolve_run(self, run: str | None) -> str:
        """See Store.resolve_run."""
        ...


@dataclass(frozen=True)
class Query:
    """One named query, as its header describes it.

    Attributes:
        name: name of the query and of its file, NAME.sql.
        summary: one sentence on what the rows are.
        sql: the whole file, header included.
        grain: columns that no two rows share.
        params: name of each parameter, without the $ → meaning.
        yields: each column, in order → content.
        note: the assumption behind the question.
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
    """Load a query by name.

    Raises:
        NotStored: there is no such query.
        BadInput: the query's header lacks a part.
    """
    known = names()
    if name not in known:
        raise NotStored(f"no query {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return parse(name, files(__name__).joinpath(f"{name}.sql").read_text(encoding="utf-8"))


def listing() -> pl.DataFrame:
    """List all queries: query, params (comma-separated) and summary, all String, by name."""
    queries = [load(name) for name in names()]
    return pl.DataFrame(
        {
            "query": [query.name for query in queries],
            "params": [", ".join(query.params) for query in queries],
            "summary": [query.summary for query in queries],
        }
    )


def select(store: Readable, name: str, /, **params: Any) -> pl.DataFrame:
    """Run a query; a query with $run sees the rows of that run only, see Store.of.

    Args:
        store: an open store.
        name: name of the query, or the path of an .sql file of your own, which needs no header.
        params: a value for each parameter of the query; `run` may be left out if the store holds
            one run.

    Returns:
        A frame with the columns in the header's section `yields`.

    Raises:
        NotStored: there is no such query, or no such run.
        BadInput: a parameter is missing or unknown, the file cannot be read, or DuckDB refuses the
            query or a value.
    """
    if name.endswith(".sql"):
        sql = read_sql(name, "query")
        takes = ["run"] if re.search(r"\$run\b", sql) else []
    else:
        query = load(name)
        sql, takes = query.sql, [*query.params]
    params = _with_the_one_run(store, params, takes)
    to_name = _to_name(store) if "run" in takes and "run" not in params else ""
    if name.endswith(".sql"):
        if to_name:
            raise BadInput(f"query {name!r} lacks run{to_name}")
    else:
        meant = [f"; -p {lacking} …: {query.params[lacking]}" for lacking in takes if lacking not in {*params, "run"}]
        check_names(f"query {name!r}", params, takes, takes, to_name + "".join(meant))
    if "run" in params:
        store = store.of(params["run"])  # refuses an unknown run; SQL would just find no rows
    return store.sql(sql, params or None)


def _with_the_one_run(store: Readable, params: dict[str, Any], takes: Collection[str]) -> dict[str, Any]:
    """The parameters with the store's one run, if a query takes a run and none is given."""
    if "run" in takes and "run" not in params:
        with suppress(BadInput, NotStored):  # there are several, or none
            return {**params, "run": store.resolve_run(None)}
    return params


def _to_name(store: Readable) -> str:
    """The end of a message: the runs to choose from, and how to name one."""
    held = store.runs()
    how = f": name one (-p run {held[0]}, in Python run={held[0]!r})" if held else ""
    return f"; the store holds {', '.join(held) or 'no run'}{how}"


def read_sql(file: str | Path, what: str) -> str:
    """The query in a user's file, without the semicolon at its end.

    Args:
        file: path of an .sql file.
        what: what the query is, for the message.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        return Path(file).read_text(encoding="utf-8").rstrip().rstrip(";")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot read the {what} {str(file)!r} ({getattr(error, 'strerror', None) or error}); give the path of an .sql file"
        ) from None


def check_names(
    what: str, given: Iterable[str], required: Iterable[str], known: Iterable[str], advice: str = ""
) -> None:
    """Refuse missing and unknown names, in one message.

    Args:
        advice: the end of the message.

    Raises:
        BadInput: lists the missing, unknown and known names.
    """
    given, known = list(given), list(known)
    missing = [name for name in required if name not in given]
    unknown = [name for name in given if name not in known]
    if not missing and not unknown:
        return
    faults = [f"lacks {', '.join(missing)}"] * bool(missing)
    faults += [f"takes no {name!r}{nearest(name, known)}" for name in unknown]
    raise BadInput(f"{what} {' and '.join(faults)}; it takes {', '.join(known) if known else 'no parameters'}{advice}")


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
    """The comment lines at the beginning of a query."""
    lines = sql.splitlines()
    return lines[: next((i for i, line in enumerate(lines) if not line.startswith("--")), len(lines))]


def _sections(lines: list[str]) -> tuple[dict[str, dict[str, str]], str]:
    """The entries of each section, and the paragraph after the sections."""
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
