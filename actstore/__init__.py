"""An activation-store database for interpretability research.

    store = actstore.Store("demo.act")
    query = "select token_id, source from edge_targets"
    X, rows = store.read(query, run="reproduction", site="resid_post.0")

Row i of X is the activation of row i of rows, always.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from actstore.errors import (
    ActstoreError,
    BadInput,
    Busy,
    Damaged,
    LimitReached,
    NoRoom,
    NotStored,
    SeveralRuns,
    TooNew,
    TooOld,
    Unsupported,
)
from actstore.version import __version__

if TYPE_CHECKING:
    from actstore.store import Store

__all__ = [
    "ActstoreError",
    "BadInput",
    "Busy",
    "Damaged",
    "LimitReached",
    "NoRoom",
    "NotStored",
    "SeveralRuns",
    "Store",
    "TooNew",
    "TooOld",
    "Unsupported",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import the store or a subpackage at first use; `--help` needs neither DuckDB nor polars."""
    if name == "Store":
        from actstore.store import Store

        return Store
    if name in ("ingest", "queries"):
        return import_module(f"actstore.{name}")
    raise AttributeError(f"module 'actstore' has no attribute {name!r}")
