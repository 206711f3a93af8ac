"""Build the catalog anew from the committed parts alone."""

from __future__ import annotations

from pathlib import Path

from actstore.catalog import build, witness
from actstore.catalog import tables as catalog_tables
from actstore.commits import checkpoint, log
from actstore.commits.format import check_format
from actstore.storage.folder import place
from actstore.storage.local import Local


def rebuild(path: str | Path) -> int:
    """Build the catalog anew from the committed parts alone, and return its number of commits.

    Raises:
        Damaged: a part or a manifest is missing or unreadable, or the present catalog was built
            from other manifests.
        Busy: another process writes to the store.
    """
    root = place(path)
    check_format(root)
    with Local(root).lease():
        # a shorter log than the old catalog knows is refused
        committed = log.manifests(root, least=catalog_tables.snapshot(root))
        witness.refuse_conflict(root, committed)
        snapshot = build.publish(root, from_nothing=True)
        checkpoint.write(root, committed)
        return snapshot
