"""catalog.json: hashes of the catalogs that were put in place."""

from __future__ import annotations

from pathlib import Path

from actstore.catalog.tables import CATALOG, HASHES
from actstore.errors import Damaged, advised
from actstore.storage import sealed
from actstore.storage.at import at
from actstore.storage.content import Hash, as_a, json_object
from actstore.storage.hashing import hash_of, hash_of_file


def noted_hashes(root: Path) -> list[str]:
    """Read the xxh3-128 of the catalogs that were last put in place.

    There are two hashes, since noting one and replacing the catalog are two steps.

    Raises:
        Damaged: the note is not what was written.
        FileNotFoundError: the store has no note, as a store of format 1.
    """
    content = at(root).read(HASHES)
    try:
        noted = json_object(content)
        if noted.keys() != {"xxh3_128"} and not sealed.is_whole(content):  # development versions wrote no checksum
            raise ValueError("its checksum does not match")
        return as_a(list[Hash], noted.get("xxh3_128"))
    except ValueError as error:
        raise Damaged(f"{root / HASHES} cannot be read ({error}); mend it with {advised('repair', root)}") from error


def note_hash(root: Path, new: Path, there: str | None) -> None:
    """Note a catalog's hash, beside the present catalog's, before the catalog is put in place.

    Args:
        new: the finished catalog, still under another name.
        there: hash of the present catalog; None if there is none, or if the catalog is damaged.
    """
    hashes = list(dict.fromkeys([hash_of_file(new), *[there] * (there is not None)]))
    at(root).swap(HASHES, sealed.to_json({"xxh3_128": hashes}))


def is_noted(root: Path, descriptor: int) -> bool | None:
    """Returns whether an open catalog has a noted hash; None if another catalog replaced it.

    Args:
        descriptor: of the open catalog.

    Raises:
        Damaged: the note is not what was written.
        FileNotFoundError: the store has no note.
    """
    found = hash_of(descriptor)
    if found in noted_hashes(root):  # read afterwards: a hash is noted before its catalog is put in place
        return True
    return False if at(root).token(CATALOG) == found else None


def is_whole(root: Path) -> bool:
    """True if the present catalog has a noted hash."""
    try:
        return at(root).token(CATALOG) in noted_hashes(root)
    except (FileNotFoundError, Damaged):
        return False
