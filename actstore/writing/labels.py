"""Rows that are added to a user's committed labels."""

from __future__ import annotations

import polars as pl

from actstore.catalog.declared import Relation, declare
from actstore.errors import BadInput


def added(held: Relation, there: pl.DataFrame, rows: pl.DataFrame, by_span: bool) -> tuple[Relation, pl.DataFrame]:
    """Labels with further rows: their declaration, and all rows in the order of their key.

    A column takes the type that holds both, such as DOUBLE for whole numbers and fractions.

    Args:
        held: the declaration of the committed labels.
        there: their rows.
        rows: the new rows, as reading.labelled.labelled gives them.
        by_span: number the spans of the new rows after the old ones.

    Raises:
        BadInput: the columns are not those of the labels, or a key has a row already.
    """
    if sorted(there.columns) != sorted(rows.columns):
        raise BadInput(
            f"labels {held.name} have the columns {', '.join(there.columns)}, and the new rows {', '.join(rows.columns)}; give "
            "the same columns, or replace the labels (--replace)"
        )
    twice = rows[held.key].filter(rows[held.key].is_in(there[held.key].implode())).sort()
    if len(twice):
        raise BadInput(
            f"{len(twice):,} of {len(rows):,} {held.key}s have a row in labels {held.name}, the first {twice[0]}; leave them out, "
            "or replace the labels (--replace)"
        )
    if by_span:
        last = there["span"].max()
        rows = rows.with_columns(pl.col("span") + pl.lit(last, pl.Int64) + 1)
    try:
        every = pl.concat([there, rows.select(there.columns)], how="vertical_relaxed").sort(held.key)
    except pl.exceptions.PolarsError as error:
        raise BadInput(
            f"the new rows do not fit labels {held.name} ({str(error).splitlines()[0]}); cast their columns"
        ) from error
    relation = declare(held.name, held.grain, "labels", held.owner, every)
    return relation, relation.fit(every)
