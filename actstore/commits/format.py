"""The format of a store: its number, its folders, and store.json, which names it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from actstore.errors import ActstoreError, BadInput, Damaged, NotStored, TooNew, TooOld, advised
from actstore.storage import sealed
from actstore.storage.at import at, check_path, scheme
from actstore.storage.content import Positive, Text, as_a, json_object
from actstore.storage.machine import within_limits

FORMAT_VERSION = 3  # 1 had no variants, prompts, generations or catalog hash; 2 did not chain its manifests
CHAINED_FROM = 3  # from this format on, a manifest names the one before it
LOG, PARTS, ARRAYS, WEIGHTS = "log", "parts", "activations.zarr", "models"
CHECKPOINT = "log.json"  # of the log; see checkpoint.py
FOLDERS = (LOG, PARTS, ARRAYS, WEIGHTS)
SWAPPED = ("store", "log", "catalog")  # the names of files that are replaced begin so

MOST_BESIDE = 100  # stores that are searched for a similar name


def part_path(table: str, owner: str, batch: int | None = None) -> str:
    """Path of a part, inside the store; see manifest.Part for `owner` and `batch`."""
    name = owner[:16] if table == "models" else owner
    return f"{PARTS}/{table}/{name}.parquet" if batch is None else f"{PARTS}/{table}/{name}-{batch:06d}.parquet"


def weights_path(sha256: str) -> str:
    """Path of a weights file, inside the store."""
    return f"{WEIGHTS}/{sha256}.safetensors"


def unembedding_path(sha256: str) -> str:
    """Path of a model's final norm and unembedding, inside the store; the weights have the hash."""
    return f"{WEIGHTS}/{sha256}.unembed.safetensors"


@dataclass(frozen=True)
class About:
    """The content of store.json, of any format."""

    format: Positive
    made_by: Text = "an unknown version"


WITHOUT_CHECKSUM = {"format", "made_by", "made_at"}  # keys of store.json as a development version wrote it


def check_format(root: Path, older: bool = False, content: bytes | None = None) -> dict[str, Any]:
    """Read a store's store.json, and refuse a format that cannot be used.

    Args:
        older: whether a store of an earlier version is accepted.
        content: the bytes of store.json; default: those of the file.

    Raises:
        BadInput: DuckDB cannot open a path like this one.
        NotStored: the folder is not a store.
        TooNew: a later version of actstore made the store.
        TooOld: an earlier version made the store.
        Damaged: store.json cannot be read.
    """
    check_path(root)
    held = content or b""
    try:
        if content is None:
            with within_limits(f"cannot read {root / 'store.json'}"):
                held = at(root).read("store.json")
        about = json_object(held)
        if "format" not in about:
            raise ValueError("it has no format")
    except (FileNotFoundError, NotADirectoryError):
        raise _no_store(root) from None
    except BadInput:  # a ValueError, too
        raise
    except ValueError as error:
        raise Damaged(f"{root / 'store.json'} cannot be read ({error}); {_mend(root, held)}") from error
    try:
        described = as_a(About, about)
    except ValueError as error:
        raise Damaged(f"{root / 'store.json'} names no format, or no maker ({error}); {_mend(root, held)}") from error
    version, maker = described.format, described.made_by
    if not about.keys() <= WITHOUT_CHECKSUM and not sealed.is_whole(held):
        raise Damaged(
            f"{root / 'store.json'} is not what was written (its checksum does not match); {_mend(root, held)}"
        )
    if version < FORMAT_VERSION and not older:
        raise TooOld(
            f"{root} has format {version}, made by {maker}; this version "
            f"reads it as it is, and writes format {FORMAT_VERSION} alone: bring it up to date with "
            f"{advised('repair', root)}, which keeps all that it holds"
        )
    if version > FORMAT_VERSION:
        raise TooNew(
            f"{root} has format {version}, made by {maker}; this version reads format "
            f"{FORMAT_VERSION}: install the version that made it, or a later one"
        )
    return about


def _no_store(root: Path) -> NotStored:
    """The message that names a store of a similar name, or else how to make one."""
    around = store_around(root)
    if around and around != Path(os.path.realpath(root)):
        return NotStored(f"{root} lies in a store; name the store itself, {around}")
    what = "is no actstore store (it has no store.json)" if root.exists() else "does not exist"
    if around:
        return NotStored(f"{root} {what}, and holds the rest of a store: restore that file from a copy of the store")
    with suppress(OSError):
        beside = [folder.parent.name for folder in islice(root.absolute().parent.glob("*/store.json"), MOST_BESIDE)]
        if near := get_close_matches(root.name, beside, 1, cutoff=0.75):
            return NotStored(f"{root} {what} (did you mean {root.with_name(near[0])}, beside it?)")
        if is_taken(root):
            return NotStored(f"{root} {what}; name the folder of a store, or a new folder to make one")
    return NotStored(f"{root} {what}; make one with {advised('ingest', root, '--model', 'reproduction')}")


def is_taken(root: Path) -> bool:
    """True if something other than an empty folder has a path: no store can be made there."""
    return root.is_symlink() or (root.exists() and (not root.is_dir() or any(root.iterdir())))


def _mend(root: Path, content: bytes) -> str:
    """What to do about a damaged store.json: run repair if it can mend the file, or use a copy."""
    if sealed.flipped_back(content) is None:
        return "it cannot be made again: restore it from a copy of the store"
    return f"mend it with {advised('repair', root)}"


def store_around(path: Path) -> Path | None:
    """The store that a path is, or lies in, after links and `..`; None outside any store.

    A damaged store counts as a store.
    """
    if scheme(path):
        prefixes = [prefix for prefix in (path, *path.parents) if len(prefix.parts) > 2]  # not the bucket itself
        return next((prefix for prefix in prefixes if _has_a_store(prefix)), None)
    place = Path(os.path.realpath(path))
    return next((folder for folder in (place, *place.parents) if _looks_like_a_store(folder)), None)


def _has_a_store(prefix: Path) -> bool:
    with suppress(ActstoreError):  # of a prefix that may not be read
        return at(prefix).has("store.json")
    return False


def _looks_like_a_store(folder: Path) -> bool:
    described = os.path.lexists(folder / "store.json") or os.path.lexists(folder / "catalog.duckdb")
    return described and any((folder / name).is_dir() for name in (LOG, PARTS, ARRAYS))
