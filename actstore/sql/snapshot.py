"""The protocol of an open store, for a query's functions, its process and a site's reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import polars as pl

    from actstore.arrays.site import Reader
    from actstore.sql.session import Session
    from actstore.storage.backend import Reading


class Snapshot(Protocol):
    """A store that is open, at one snapshot; reading.opened.Opened is one."""

    path: Path
    check: bool
    folder: Reading
    session: Session
    snapshot: int
    only: str | None

    def sql(self, query: str, params: Mapping[str, Any] | None = None) -> pl.DataFrame:
        """See Store.sql."""
        ...

    @property
    def vectors(self) -> Any:
        """The sql.functions.Vectors, which read through this object."""
        ...

    def with_macros(self) -> Session:
        """The session, with its macros and declared views."""
        ...

    def runs(self) -> list[str]:
        """See Store.runs."""
        ...

    def resolve_run(self, run: str | None) -> str:
        """See Store.resolve_run."""
        ...

    def sites(self, run: str) -> list[str]:
        """See Store.sites."""
        ...

    def local(self, path: str) -> Path:
        """See reading.opened.Opened.local."""
        ...

    def reader(self, run: str, site: str) -> Reader:
        """See reading.opened.Opened.reader."""
        ...
