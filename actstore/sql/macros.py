"""Macros over vectors and ids, and the declared views, of a session.

The macros live in the session's own database. In the catalog, they would break every other client.
They take arrays and lists alike. Functions in Python are in functions.py, and are added by the
first query that needs one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from actstore.arrays.address import POSITIONS_PER_TREE
from actstore.catalog import declared, tables
from actstore.errors import BadInput, Damaged

if TYPE_CHECKING:
    from actstore.sql.session import Session
    from actstore.sql.snapshot import Snapshot

MACROS = {  # `{vector}` is array where widths agree and list where they do not
    "dot(a, b)": "{vector}_inner_product(a, b)",
    "norm(x)": "sqrt({vector}_inner_product(x, x))",
    "cosine(a, b)": "{vector}_cosine_similarity(a, b)",
    "distance(a, b)": "{vector}_distance(a, b)",
    "project(x, direction)": "{vector}_inner_product(x, direction) / sqrt({vector}_inner_product(direction, direction))",
    "token_at(tree_id, edge, role)": """tree_id::bigint * {positions} + 3 * edge
        + case role when 'edge_source' then 0 when 'edge_target' then 1 when 'separator' then 2 when 'next_source' then 3 end""",
    "position_of(token_id)": "(token_id % {positions})::utinyint",
    "held_trees(of_run)": """table
        select tree_id from (
            select distinct unnest(range(first_tree_id, first_tree_id + n_trees)) as tree_id
            from store.main.shards where run = of_run
        )
        where of_run not in (select run from store.main.interventions) or tree_id in (
            select sequence_id from store.main.edits join store.main.tokens using (token_id) where edits.run = of_run
        )""",
}
NEED_FUNCTIONS = re.compile(
    r"\b(?:act|attention|logit_lens|probe_direction|batches_of|activations|\w*functions|pg_proc|routines)\b",
    re.IGNORECASE,
)  # in a query's text, lists of functions included; what a view names is told by DuckDB, see scope.ask
D_MODELS = "select distinct shape[len(shape)] as d from sites where kind in ('resid', 'vector')"
D_VOCABS = "select distinct d_vocab as d from runs join models using (weights_sha256)"


def add_macros(session: Session, store: Snapshot) -> None:
    """Add the macros and the declared views to a session.

    Args:
        session: the store's own session, on the same snapshot.
        store: for messages.

    Raises:
        Damaged: the store declares a view that no store may have.
    """
    try:
        session.look_up("select 1 from latest_results limit 0")
    except BadInput:  # an older catalog
        session.add_view("main.latest_results", tables.view("latest_results"))
    vector = "array" if shared_width(session, D_MODELS) else "list"
    session.views = _declared_views(session, store)
    for macro, body in MACROS.items():
        session.add_macro(macro, body.format(vector=vector, positions=POSITIONS_PER_TREE))


def shared_width(session: Session, query: str) -> int | None:
    """The one width that a query yields; None if there are several or none."""
    widths: list[int | None] = [row["d"] for row in session.look_up(query)]
    return widths[0] if len(widths) == 1 else None


def _declared_views(session: Session, store: Snapshot) -> dict[str, str]:
    """The SELECT of each declared view, by its name.

    Raises:
        Damaged: the store declares a view that no store may have.
    """
    rows = session.look_up("select name, owner, declared from relations where kind = 'view'")
    try:
        views = [declared.parsed_view(row) for row in rows]
    except ValueError as error:
        raise Damaged(
            f"{store.path} declares what no store may ({error}); restore it from a copy of the store"
        ) from error
    return {view.name: view.sql for view in views}
