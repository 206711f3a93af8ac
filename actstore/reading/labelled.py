"""Check a user's labels against a store: which tokens or sequences they are of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import polars as pl

from actstore.catalog.declared import KEYS, Grain, Relation, declare, identifier, parsed
from actstore.errors import BadInput, NotStored, nearest

if TYPE_CHECKING:
    from actstore.reading.opened import Opened

On = Literal["token_id", "sequence_id", "span"]
SPAN = ("dataset", "row", "start", "end")
RANGES = "from sequences join tokens using (sequence_id)"


def labelled(store: Opened, name: str, frame: pl.DataFrame, on: On) -> tuple[Relation, pl.DataFrame]:
    """The declared table of some labels, and its rows in the order of their key.

    Args:
        name: name of the table.
        frame: see Store.label.
        on: see Store.label.

    Raises:
        BadInput: see Store.label.
        NotStored: an id or a dataset is not stored.
    """
    if on not in get_args(On):
        raise BadInput(f"got on {on!r}; labels lie on {', '.join(get_args(On))}")
    if lacking := [column for column in (SPAN if on == "span" else (on,)) if column not in frame.columns]:
        raise BadInput(f"the labels lack the column {lacking[0]}; they have {', '.join(frame.columns)} (--on {on})")
    if not len(frame):
        raise BadInput("the labels have no rows; give at least one")
    rows = _landed(store, frame) if on == "span" else frame
    key = "sequence_id" if on == "sequence_id" else "token_id"
    grain: Grain = "sequence" if key == KEYS["sequence"] else "token"
    _refuse_ours(store, [column for column in rows.columns if column != key])
    rows = rows.with_columns(whole_keys(rows[key], "the labels"))
    if on != "span":
        _refuse_unknown(store, rows[key])
    refuse_twice(
        rows[key], "two spans cover one token: shorten one, or leave it out" if on == "span" else "give each one row"
    )
    relation = declare(name, grain, "labels", name, rows)
    return relation, relation.fit(rows).sort(key)


def whole_keys(keys: pl.Series, of: str) -> pl.Series:
    """The keys as Int64; one that is too large for it becomes -1, which no row has.

    Args:
        of: whose keys they are, for messages.

    Raises:
        BadInput: they are no integers, or one is NULL.
    """
    if not keys.dtype.is_integer():
        raise BadInput(f"the {keys.name} of {of} is {keys.dtype}; it must be an integer, as in the tables")
    if keys.null_count():
        raise BadInput(f"{keys.null_count():,} of {len(keys):,} rows of {of} have no {keys.name}; leave them out")
    return keys.cast(pl.Int64, strict=False).fill_null(-1)


def refuse_twice(keys: pl.Series, todo: str) -> None:
    """Refuse a key of two rows.

    Args:
        todo: what to do, for the message.

    Raises:
        BadInput: counts the keys that have several rows, and names the first.
    """
    twice = keys.filter(keys.is_duplicated())
    if len(twice):
        raise BadInput(
            f"{twice.n_unique():,} of {keys.n_unique():,} {keys.name}s have more than one row, the first {twice.sort()[0]}; {todo}"
        )


def _refuse_ours(store: Opened, columns: Sequence[str]) -> None:
    """Refuse columns that a join with the store's own tables would have twice."""
    ours = store.sql("from tokens limit 0").columns + store.sql("from sequences limit 0").columns
    if taken := [column for column in columns if column.lower() in ours]:
        raise BadInput(
            f"the labels have a column {taken[0]}, as tokens or sequences do, so that a join would have two; rename or drop it"
        )


def _refuse_unknown(store: Opened, keys: pl.Series) -> None:
    key = keys.name
    table = {"token_id": "tokens", "sequence_id": "sequences"}[key]
    asked = store.beside({"given_labels": keys.to_frame()})
    known = f"select {key} from {table} where {key} between $first and $last"  # or DuckDB would scan the whole table
    unknown = asked.sql(
        f"select {key} from given_labels anti join ({known}) using ({key}) order by {key}",
        {"first": keys.min(), "last": keys.max()},
    )[key]
    if len(unknown):
        raise NotStored(
            f"{len(unknown):,} of {len(keys):,} rows of the labels have a {key} of no {table[:-1]} of {store.path}, the first "
            f"{unknown[0]}; are they of another store?"
        )


def _landed(store: Opened, frame: pl.DataFrame) -> pl.DataFrame:
    """A row for each token that a span overlaps: token_id, span (its row), other columns."""
    if "span" in frame.columns:
        raise BadInput("the labels have a column span, which numbers their spans; rename or drop it")
    spans = frame.with_row_index("span").with_columns(pl.col("span").cast(pl.Int64))
    for column in SPAN[1:]:
        if not spans[column].dtype.is_integer() or spans[column].null_count():
            raise BadInput(f"the labels' {column} must be an integer in each row; it is {spans[column].dtype}")
    datasets = spans["dataset"].unique(maintain_order=True).cast(pl.String).to_list()
    found = [_of_dataset(store, name, spans.filter(pl.col("dataset").cast(pl.String) == name)) for name in datasets]
    places = pl.concat(found) if found else pl.DataFrame()
    if len(missed := spans.filter(~pl.col("span").is_in(places["span"].implode()))):
        raise BadInput(f"{_counted(missed, spans)} on no token of the text; move it to some, or leave it out")
    return places.join(spans.drop(SPAN), on="span", how="left", maintain_order="left")


def _of_dataset(store: Opened, dataset: str | None, spans: pl.DataFrame) -> pl.DataFrame:
    """token_id and span of the tokens that spans of one dataset overlap."""
    texts = _texts(store, dataset, spans["row"].unique().to_list())
    if len(unknown := spans.filter(~pl.col("row").is_in(list(texts)))):
        raise NotStored(
            f"{_counted(unknown, spans)} in row {unknown['row'][0]}, of which dataset {dataset!r} holds no text"
        )
    ends = {row: _ends(text) for row, text in texts.items()}
    n_characters = spans["row"].replace_strict(
        {row: len(of_row) - 1 for row, of_row in ends.items()}, return_dtype=pl.Int64
    )
    outside = (spans["start"] < 0) | (spans["end"] <= spans["start"]) | (spans["end"] > n_characters)
    if len(wrong := spans.filter(outside)):
        at, row = f"{wrong['start'][0]} to {wrong['end'][0]}", wrong["row"][0]
        n = len(ends[row]) - 1
        raise BadInput(
            f"{_counted(wrong, spans)} at characters {at} of row {row}, whose stored text has {n:,}; start counts from 0, and end "
            "is the character after the last"
        )
    in_bytes = [
        [int(ends[row][place]) for row, place in zip(spans["row"], spans[column], strict=True)]
        for column in ("start", "end")
    ]
    given = spans.select("span", document="row").with_columns(
        pl.Series("first", in_bytes[0]), pl.Series("after", in_bytes[1])
    )
    return store.beside({"given_spans": given}).sql(
        "select tokens.token_id, given_spans.span from given_spans join sequences using (document) join tokens using "
        "(sequence_id) where sequences.dataset = $dataset and tokens.start < given_spans.after "
        "and tokens.stop > given_spans.first and tokens.stop > tokens.start order by all",
        {"dataset": dataset},
    )


def _texts(store: Opened, dataset: str | None, rows: list[int]) -> dict[int, bytes]:
    """The stored text of each of these rows of a dataset's input, in UTF-8.

    Raises:
        NotStored: there is no such dataset, or it has no text.
    """
    held = store.sql("select dataset, recipe from datasets")
    names = held["dataset"].to_list()
    if dataset not in names:
        raise NotStored(f"no dataset {dataset!r}{nearest(str(dataset), names)}; {store.path} holds {', '.join(names)}")
    recipe = json.loads(held.filter(dataset=dataset)["recipe"][0] or "{}")
    declared = store.sql(
        "from relations where kind = 'documents' and owner = $dataset", {"dataset": dataset}
    ).to_dicts()
    column = recipe.get("column") or "text"
    documents = [relation for relation in map(parsed, declared) if {column, "text_start"} <= _columns(relation)]
    if not documents:
        raise NotStored(
            f"dataset {dataset!r} holds no text, so characters name none of its tokens; label its token_ids"
        )
    parts = store.sql(
        f"select document, text_start, {identifier(column)} as part from sequences join {identifier(documents[0].name)} "
        "using (sequence_id) where dataset = $dataset and document in (select unnest($rows::bigint[])) order by all",
        {"dataset": dataset, "rows": rows},
    )
    texts: dict[int, bytes] = {}
    for row, start, part in parts.iter_rows():
        texts[row] = texts.get(row, b"")[:start] + part.encode()
    return texts


def _columns(relation: Relation) -> set[str]:
    return {name for name, _, _ in relation.columns}


def _ends(text: bytes) -> np.ndarray:
    """int64 [n_characters + 1]: the byte where each character begins, and the number of bytes."""
    begins = (np.frombuffer(text, np.uint8) & 0xC0) != 0x80  # a byte of UTF-8 that continues no character
    return np.append(np.flatnonzero(begins), len(text))


def _counted(some: pl.DataFrame, spans: pl.DataFrame) -> str:
    first: Any = some["span"][0]
    return f"{len(some):,} of {len(spans):,} spans of the labels, the first in row {first} of the file, lie"
