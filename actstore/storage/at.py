"""Where a store is: its address, and the backend that keeps its bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PosixPath

from actstore.errors import BadInput, NoRoom
from actstore.storage.backend import Storage
from actstore.storage.local import Local

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # `s3://`, or what pathlib makes of it


def _objects(root: Path) -> Storage:
    from actstore.storage.objects import Objects  # which takes a tenth of a command's start

    return Objects(root)


BACKENDS: dict[str, Callable[[Path], Storage]] = dict.fromkeys(
    ("s3", "gs", "az"), _objects
)  # by the scheme of an address; a folder's path has none


class Address(PosixPath):
    """A place that is no folder, such as `s3://bucket/prefix`; pathlib alone would drop a slash."""

    def __str__(self) -> str:
        """The address, as it is typed."""
        return super().__str__().replace(":/", "://", 1)


def at(root: Path) -> Storage:
    """The place of a store's bytes: a folder, unless BACKENDS has the address's scheme."""
    return BACKENDS.get(scheme(root), Local)(root)


def scheme(root: Path) -> str:
    """The scheme of an address, such as `s3`; "" for a path of this machine."""
    address = _address(str(root))
    return address[1] if address else ""


def absolute(root: Path) -> Path:
    """A store's address as it reads from any working folder."""
    return root if scheme(root) else root.absolute()


def _address(text: str) -> re.Match[str] | None:
    address = ADDRESS.match(text)
    return None if address and os.path.lexists(text) else address


def place(path: str | os.PathLike[str]) -> Path:
    """The folder that a caller names for a store; `~` is the home folder.

    Args:
        path: the caller's text or path.

    Raises:
        BadInput: the argument is not a path, or it addresses another machine.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or not text or "\0" in text:
        raise BadInput(f"got {path!r} for a store; name its folder, such as 'demo.act'")
    if (address := _address(text)) and address[1] not in BACKENDS:
        here = f"write it as /{text[address.end() :]}" if address[1] == "file" else "copy it here, and name that folder"
        raise BadInput(
            f"got {text}; a store is a folder of this machine, or a prefix of a bucket (s3://, gs://, az://), and {address[1]}: "
            f"leads to none: {here}"
        )
    if address and not text[address.end() :]:
        raise BadInput(f"got {text}; name a bucket and a prefix in it, such as {address[1]}://bucket/demo.act")
    if address:
        return Address(text)
    return Path(text if os.path.lexists(text) else os.path.expanduser(text))


def check_path(root: Path) -> None:
    """Refuse a path that DuckDB would misread or not find; links to such a path are allowed.

    Raises:
        BadInput: the absolute path holds a `?` (DuckDB ends the path there) or a backslash (DuckDB
            reads a slash), or is not UTF-8.
    """
    path = str(root.absolute())
    wrong = next((f"a path with `{character}` in it" for character in "?\\" if character in path), None)
    if not is_unicode(path):
        wrong = "a path that is not UTF-8"
    if wrong:
        raise BadInput(f"DuckDB cannot open {wrong}, and got {path}; give the store another name, or another folder")


def check_room(root: Path, wanted: int, what: str) -> int:
    """Returns the bytes free on the disk where the store is (or will be).

    Args:
        wanted: bytes needed.
        what: what needs them, for the message.

    Raises:
        NoRoom: fewer than `wanted` bytes are free.
    """
    free = at(root).free_room()
    if free < wanted:
        raise NoRoom(
            f"{what} needs {wanted / 1e9:.2f} GB and the disk of {root} has {free / 1e9:.2f} GB free; free some or ask for less"
        )
    return free


def is_unicode(text: str) -> bool:
    """False if a text holds a surrogate, as arguments and paths that are not UTF-8 do."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
