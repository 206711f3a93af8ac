"""Small JSON files that carry a checksum of themselves, so that a flipped bit shows, and can be flipped back."""

from __future__ import annotations

import json
import re
from typing import Any

import xxhash

CHECKSUM = "checksum"
NOT_WRITTEN = re.compile(rb"[^\n -~]")  # json.dumps writes none of these


def checksum(body: dict[str, Any]) -> str:
    """xxh3-128, hexadecimal, of a body as `json.dumps(body, sort_keys=True)` writes it."""
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def to_json(body: dict[str, Any]) -> bytes:
    """A body, and its checksum behind it."""
    return json.dumps({**body, CHECKSUM: checksum(body)}, indent=1).encode()


def is_whole(content: bytes) -> bool:
    """Whether a file is as `to_json` wrote it, to the byte."""
    try:
        body = json.loads(content)
        claimed = body.pop(CHECKSUM)
        return bool(claimed == checksum(body)) and to_json(body) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def flipped_back(content: bytes) -> bytes | None:
    """The file that it was before one bit of it flipped; None where that is not what happened to it.

    Every bit is tried: a file of a few kB takes a second, and a wrong guess would have to match 128 bits.
    """
    strange = [found.start() for found in NOT_WRITTEN.finditer(content)]
    if len(strange) > 1:
        return None
    tried = bytearray(content)
    for place in strange or range(len(tried)):
        for bit in range(8):
            tried[place] ^= 1 << bit
            if not NOT_WRITTEN.match(tried, place) and is_whole(bytes(tried)):
                return bytes(tried)
            tried[place] ^= 1 << bit
    return None
