"""Rows of the catalog as typed values: another program may have written the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actstore.catalog.tables import CATALOG
from actstore.errors import Damaged, advised
from actstore.storage.content import T, as_a

if TYPE_CHECKING:
    from actstore.sql.snapshot import Snapshot


def catalog_rows(store: Snapshot, kind: type[T], rows: list[Any]) -> list[T]:
    """Convert rows of the catalog to their type.

    Args:
        kind: the type of a row.

    Raises:
        Damaged: a row has another type.
    """
    try:
        return [as_a(kind, row) for row in rows]
    except ValueError as error:
        raise impossible(store, str(error)) from error


def catalog_row(store: Snapshot, kind: type[T], rows: list[Any]) -> T:
    """The first of the rows that the catalog gives about a run.

    Raises:
        Damaged: there is none, since what the run names is not there; or see `catalog_rows`.
    """
    if not rows:
        raise impossible(store, "a run that it holds is over a dataset that it does not hold")
    return catalog_rows(store, kind, rows[:1])[0]


def impossible(store: Snapshot, what: str) -> Damaged:
    """The error for a catalog that says what cannot be."""
    return Damaged(
        f"{store.path / CATALOG} says what cannot be ({what}); rebuild it with {advised('repair', store.path)}"
    )
