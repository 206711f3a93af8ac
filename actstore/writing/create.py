"""Make an empty store, at once or not at all."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from actstore.catalog import build
from actstore.commits.format import ARRAYS, FORMAT_VERSION, LOG, PARTS, WEIGHTS, is_taken, store_around
from actstore.errors import BadInput, Unsupported
from actstore.storage import sealed
from actstore.storage.folder import check_path
from actstore.storage.lease import LOCK
from actstore.storage.local import Local, fsync_folder, make_folder
from actstore.storage.refused import needing_room
from actstore.version import __version__
from actstore.writing.parts import GROUP


def create(root: Path, wait: float = 0.0) -> None:
    """Make an empty store, at once or not at all; an existing store stays as it is.

    Args:
        root: the store's folder.
        wait: seconds to wait for another process that is making the store.

    Raises:
        BadInput: the folder holds something that is not a store.
        Busy: another process is making the store.
        NoRoom: the disk is full.
        Unsupported: the file system lacks hard links, locks or fsync; nothing is left there.
    """
    if is_store(root):
        return
    under_way = root.parent / f".{root.name}.new"
    with needing_room(root):
        make_folder(under_way)
        try:
            _make(root, under_way, wait)
        except Unsupported:  # so no other process can be at work there
            shutil.rmtree(under_way, ignore_errors=True)
            raise


def _make(root: Path, under_way: Path, wait: float) -> None:
    with Local(under_way).lease(wait):  # the lease moves with the folder
        if is_store(root):  # another process made it since
            shutil.rmtree(under_way, ignore_errors=True)
            return
        for left in under_way.iterdir():  # left by a process that was killed
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        _fill(under_way)
        under_way.rename(root)
        fsync_folder(root.parent)


def is_store(root: Path) -> bool:
    """True if a store is there, False if one can be made there.

    Raises:
        BadInput: the folder can become no store.
    """
    check_path(root)
    if (root / "store.json").exists():
        return True
    if is_taken(root):
        raise BadInput(f"{root} exists and is no actstore store; name a new folder, or an empty one")
    if around := store_around(root):
        raise BadInput(f"{root} lies in the store {around}; name a folder outside it")
    if root.name in ("", "..") or (root.exists() and root.samefile(Path.cwd())):
        raise BadInput(f"a store is a folder of its own and cannot be made of {str(root)!r}; name a new folder")
    return False


def _fill(root: Path) -> None:
    """Put everything into a folder that a store without commits has."""
    for folder in (LOG, PARTS, WEIGHTS, ARRAYS):
        make_folder(root / folder)
    Local(root).publish(f"{ARRAYS}/zarr.json", GROUP)
    build.publish(root)
    about = {
        "format": FORMAT_VERSION,
        "made_by": f"actstore {__version__}",
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    Local(root).publish("store.json", sealed.to_json(about))
