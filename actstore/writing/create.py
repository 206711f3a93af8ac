"""Make a store, at once or not at all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from actstore.catalog import build
from actstore.commits.format import ARRAYS, FOLDERS, FORMAT_VERSION, store_around
from actstore.errors import BadInput
from actstore.storage import sealed
from actstore.storage.at import at, check_path
from actstore.version import __version__
from actstore.writing.parts import GROUP


def create(root: Path, wait: float = 0.0, fill: Callable[[Path], object] | None = None) -> None:
    """Make a store, at once or not at all; an existing store stays as it is.

    Args:
        root: the store's folder.
        wait: seconds to wait for another process that is making the store.
        fill: puts commits into the store that is being made; default: the store is empty.

    Raises:
        BadInput: the folder holds something that is not a store.
        Busy: another process is making the store.
        NoRoom: the disk is full.
        Unsupported: the file system lacks hard links, locks or fsync; nothing is left there.
    """
    if not is_store(root):
        at(root).make("store.json", FOLDERS, lambda new: _fill(new, fill), wait)


def is_store(root: Path) -> bool:
    """True if a store is there, False if one can be made there.

    Raises:
        BadInput: the folder can become no store.
    """
    check_path(root)
    if at(root).has("store.json"):
        return True
    if why := at(root).unusable():
        raise BadInput(why)
    if around := store_around(root):
        raise BadInput(f"{root} lies in the store {around}; name a folder outside it")
    return False


def _fill(root: Path, fill: Callable[[Path], object] | None) -> None:
    """Publish every file that a store without commits has, and the commits that `fill` brings."""
    at(root).publish(f"{ARRAYS}/zarr.json", GROUP)
    if fill:
        fill(root)
    build.publish(root)
    about = {
        "format": FORMAT_VERSION,
        "made_by": f"actstore {__version__}",
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    at(root).publish("store.json", sealed.to_json(about))
