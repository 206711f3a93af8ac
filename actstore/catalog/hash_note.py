"""catalog.json: hashes of the catalogs that were put in place."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from actstore.catalog.tables import CATALOG, HASHES
from actstore.errors import Damaged, advised
from actstore.storage import sealed
from actstore.storage.content import Hash, as_a, json_object
from actstore.storage.hashing import hash_of, hash_of_file
from actstore.storage.local import swap
from actstore.storage.regular import read_regular


def noted_hashes(root: Path) -> list[str]:
    """Read the xxh3-128 of the catalogs that were last put in place.

    There are two hashes, since noting one and replacing the catalog are two steps.

    Args:
        root: the store.

    Raises:
        Damaged: the note is not what was written.
        FileNotFoundError: the store has no note, as a store of format 1.
    """
    content = read_regular(root / HASHES)
    try:
        noted = json_object(content)
        if noted.keys() != {"xxh3_128"} and not sealed.is_whole(content):  # development versions wrote no checksum
            raise ValueError("its checksum does not match")
        return as_a(list[Hash], noted.get("xxh3_128"))
    except ValueError as error:
        raise Damaged(f"{root / HASHES} cannot be read ({error}); mend it with {advised('repair', root)}") from error


def note_hash(root: Path, new: Path) -> None:
    """Note a catalog's hash, beside the present catalog's, before the catalog is put in place."""
    both = [hash_of_file(new)]
    with suppress(FileNotFoundError, Damaged):  # there is no catalog, or one that was never noted
        both.append(hash_of_file(root / CATALOG))
    hashes = list(dict.fromkeys(both))
    temporary = note_under_way(root)
    temporary.write_bytes(sealed.to_json({"xxh3_128": hashes}))
    swap(temporary, root / HASHES)


def note_under_way(root: Path) -> Path:
    """Path of this process's unfinished note."""
    return root / f".{HASHES}.{os.getpid()}.tmp"


def is_noted(root: Path, descriptor: int) -> bool | None:
    """Returns whether an open catalog has a noted hash; None if another catalog replaced it.

    Args:
        root: the store.
        descriptor: of the open catalog.

    Raises:
        Damaged: the note is not what was written.
        FileNotFoundError: the store has no note.
    """
    found = hash_of(descriptor)
    if found in noted_hashes(root):  # read afterwards: a hash is noted before its catalog is put in place
        return True
    return False if os.path.samestat(os.fstat(descriptor), os.stat(root / CATALOG)) else None


def is_whole(root: Path) -> bool:
    """True if the present catalog has a noted hash."""
    return holds_noted(root, root / CATALOG)


def holds_noted(root: Path, path: Path) -> bool:
    """True if a copy of the catalog has a noted hash."""
    try:
        return hash_of_file(path) in noted_hashes(root)
    except (FileNotFoundError, Damaged):
        return False
