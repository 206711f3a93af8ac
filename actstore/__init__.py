"""An activation-store database for interpretability research.

    store = actstore.Store("demo.act")
    query = "select token_id, source from edge_targets"
    X, rows = store.read(query, run="reproduction", site="resid_post.0")

Row i of X is the activation of row i of rows, always. Each command has a function of its name:

    actstore.ingest("demo.act", model="reproduction", trees=2000, progress=actstore.progress)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from actstore.errors import (
    ActstoreError,
    BadInput,
    Busy,
    ComputedOtherwise,
    Damaged,
    HalvedBatch,
    LimitReached,
    NoRoom,
    NotStored,
    SeveralRuns,
    TooNew,
    TooOld,
    Unreachable,
    Unsupported,
)
from actstore.version import __version__

if TYPE_CHECKING:
    from actstore.checkup import doctor
    from actstore.cli.progress import progress
    from actstore.ingest.jobs.verb import ingest as ingest
    from actstore.interventions import Edit
    from actstore.store import Store
    from actstore.verbs import (
        commit,
        copy,
        drop,
        evaluate,
        label,
        merge,
        patch,
        record,
        repair,
        report,
        study,
        train,
        verify,
        view,
    )

_LATER = {
    "Store": "actstore.store",
    "Edit": "actstore.interventions",
    "progress": "actstore.cli.progress",
    "doctor": "actstore.checkup",
}
_VERBS = (
    "commit",
    "copy",
    "drop",
    "evaluate",
    "label",
    "merge",
    "patch",
    "record",
    "repair",
    "report",
    "study",
    "train",
    "verify",
    "view",
)
_LATER |= dict.fromkeys(_VERBS, "actstore.verbs")

__all__ = [
    "ActstoreError",
    "BadInput",
    "Busy",
    "ComputedOtherwise",
    "Damaged",
    "Edit",
    "HalvedBatch",
    "LimitReached",
    "NoRoom",
    "NotStored",
    "SeveralRuns",
    "Store",
    "TooNew",
    "TooOld",
    "Unreachable",
    "Unsupported",
    "__version__",
    "commit",
    "copy",
    "doctor",
    "drop",
    "evaluate",
    "ingest",
    "label",
    "merge",
    "patch",
    "progress",
    "record",
    "repair",
    "report",
    "study",
    "train",
    "verify",
    "view",
]


def __getattr__(name: str) -> Any:
    """Import a name at first use; `--help` needs neither DuckDB nor polars."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in ("ingest", "queries"):  # packages, of which `ingest` can be called
        return import_module(f"actstore.{name}")
    raise AttributeError(f"module 'actstore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "queries"})
