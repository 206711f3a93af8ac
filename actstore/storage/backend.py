"""What a place for bytes gives back."""

from __future__ import annotations

from dataclasses import dataclass

from actstore.storage.content import Hash, Size


@dataclass(frozen=True)
class File:
    """A published file: its path inside the store, its size in bytes and the xxh3-128 of its content, hexadecimal."""

    path: str
    bytes: Size
    xxh3_128: Hash
