"""What a place for bytes gives back."""

from __future__ import annotations

from dataclasses import dataclass

from actstore.storage.content import Hash, Size


@dataclass(frozen=True)
class File:
    """A published file.

    Attributes:
        path: relative to the store, with forward slashes.
        bytes: its size.
        xxh3_128: hash of its content, hexadecimal.
    """

    path: str
    bytes: Size
    xxh3_128: Hash
