"""Check a view that a user declares, as a query of that user's is checked."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from actstore.catalog.declared import View, identifier
from actstore.errors import BadInput
from actstore.reading.given import check_query
from actstore.sql.asked import Asked

if TYPE_CHECKING:
    from actstore.reading.opened import Opened


def checked(store: Opened, name: str, query: str) -> View:
    """A view that can be declared.

    Args:
        name: of the view.
        query: a SELECT over the store's tables, without parameters.

    Raises:
        BadInput: the name or the text cannot be a view's, DuckDB refuses the query, the query uses
            another id as a token_id, or it neither names a run nor yields one over tables that hold
            answers of several.
    """
    check_query(query)
    try:
        view = View(name, query)
    except ValueError as error:
        raise BadInput(f"{error}; take another name, or a shorter SELECT") from error
    _ = store.vectors  # the session's functions
    session = copy.copy(store.session)
    session.views = {name: query}  # a view is made over no other view
    asked = Asked(session, query)
    asked.refuse_other_ids(reads=False)
    columns = session.sql(f"select * from {identifier(name)} limit 0").columns
    if several := asked.without_run(columns):
        raise BadInput(
            f"view {name} reads {', '.join(several.values())}, which hold answers of several runs, and neither names a run nor "
            "yields one; yield the column run, or choose one (`where run = …`)"
        )
    return view
