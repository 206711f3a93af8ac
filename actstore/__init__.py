"""An activation-store database for interpretability research.

    store = actstore.Store("demo.act")
    X, rows = store.read("select token_id, source from edge_targets", run="reproduction", site="resid_post.0")

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
    """Import the store, or a subpackage, when first asked for, so that `actstore --help` does not wait for DuckDB and polars."""
    if name == "Store":
        from actstore.store import Store

        return Store
    if name in ("ingest", "queries"):
        return import_module(f"actstore.{name}")
    raise AttributeError(f"module 'actstore' has no attribute {name!r}")
