"""Messages for queries that DuckDB refuses: its own words, advice, and its line with the caret."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from importlib.resources import files

import duckdb

from actstore.catalog.tables import in_parts

SHUT = "has been disabled by configuration"  # DuckDB's words for the file system that a session shuts off
COLUMN = re.compile(r'Referenced column "(.+?)" (?:was )?not found')
TABLE = re.compile(r'Table with name "?(.+?)"? does not exist')
FOREIGN = re.compile(r' Did you mean "(?:pg_|duckdb_|information_schema)[^"]*"\?')  # tables that are DuckDB's own
FILE = re.compile(r"[/\\]|\.(parquet|csv|tsv|json|jsonl|ndjson|txt|db|duckdb|npz)$", re.IGNORECASE)
SQL_FILE = re.compile(r"@?\S+\.sql", re.IGNORECASE)
NO_FILES = (
    "a query reads the store's tables and no files or addresses: read a file with polars, and hand its values over as "
    "params (where tree_id in (select unnest($ids)))"
)
FUNCTION = re.compile(r"(?:argument types '|Macro )(\w+)\(")
TAKES = {  # arguments of a store's functions, which DuckDB names only by type
    "act": "act(token_id, 'RUN', 'resid_post.0')",
    "attention": "attention(token_id, 'RUN', 'pattern.0')",
    "logit_lens": "logit_lens(token_id, 'RUN', 'resid_post.0')",
    "probe_direction": "probe_direction('NAME')",
    "activations": "from activations('RUN', 'resid_post.0')",
    "array_inner_product": "vectors of one width: a list is cast to one, [1, 2, …]::float[128]",
}
COMPARED = r"(?:[=<>]|\b(?:i?like|in\s*\(|act\s*\()[^()]*?)\s*\b{}\b"  # places where text is likelier than a column


def refusal(error: duckdb.Error, query: str, tables: Callable[[], list[str]]) -> str:
    """The message of a BadInput for a query that DuckDB refused.

    Args:
        error: DuckDB's error.
        tables: returns the names of the store's tables and views; called only if the message needs
            them.

    Returns:
        One line. If DuckDB names a place in the query, `LINE 1: …` and the caret follow.
    """
    said, place = in_parts(error)
    said = FOREIGN.sub("", said)
    if advice := _advice(said, query.strip().rstrip(";"), tables):
        said += f" {advice[0].upper()}{advice[1:]}" if said[-1] in ".!?" else f"; {advice}"
    return "\n".join([f"the query was refused: {said}", *place])


def _advice(said: str, query: str, tables: Callable[[], list[str]]) -> str:
    """What to do about the error; "" if DuckDB's own words say so."""
    if SHUT in said:
        return NO_FILES
    if SQL_FILE.fullmatch(query):
        return f'a query is SQL, and no file that holds it: actstore sql STORE "$(cat {query.removeprefix("@")})"'
    if query.isidentifier():
        return _of_a_word(query, tables())
    if (function := FUNCTION.search(said)) and function[1] in TAKES:
        return f"it takes {TAKES[function[1]]}"
    if table := TABLE.search(said):
        return NO_FILES if FILE.search(table[1]) else _of_a_table(table[1], tables())
    column = COLUMN.search(said)
    if column and f'"{column[1]}"' in query:
        return f"text stands in single quotes, {_text(column[1])}: double quotes name a column"
    if column and re.search(COMPARED.format(re.escape(column[1])), query, re.IGNORECASE):
        return f"where a text is meant, it stands in single quotes, {_text(column[1])}"
    return ""


def _of_a_word(word: str, tables: list[str]) -> str:
    if word in tables:
        return f"to read the table write: from {word}"
    if files("actstore.queries").joinpath(f"{word}.sql").is_file():
        return f"{word} is a named query: actstore query STORE {word}, or queries.select(store, {word!r}, …)"
    return f"a query is SQL, such as: from {(get_close_matches(word, tables, 1) or ['tokens'])[0]}"


def _of_a_table(name: str, tables: list[str]) -> str:
    if name in TAKES:
        return f"it takes a run and a site: {TAKES[name]}"
    by_name = f"; hand a frame of yours over by name: tables={{'{name}': frame}} (--table {name}=FILE)"
    frames = "" if get_close_matches(name, tables, 1) else by_name
    return f"the store has {', '.join(tables)}{frames}"


def _text(name: str) -> str:
    return "'" + name.replace("'", "''") + "'"
