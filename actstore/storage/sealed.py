"""Small JSON files with a checksum of themselves, by which a flipped bit is found and mended."""

from __future__ import annotations

import json
import re
from typing import Any

import xxhash

CHECKSUM = "checksum"
BEGINS, ENDS = b'{\n "', b'"\n}'  # how every file of `to_json` begins and ends
MOST_READ = (
    1 << 27
)  # most bytes hashed in all: every bit of a file of 11 kB; of a longer file, only the place that looks wrong
NOT_WRITTEN = re.compile(rb"[^\n -~]")  # json.dumps writes none of these


def checksum(body: dict[str, Any]) -> str:
    """xxh3-128, hexadecimal, of a body as `json.dumps(body, sort_keys=True)` writes it."""
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def to_json(body: dict[str, Any]) -> bytes:
    """Write a body, followed by its checksum."""
    return json.dumps({**body, CHECKSUM: checksum(body)}, indent=1).encode()


def is_whole(content: bytes) -> bool:
    """True if a file is, byte for byte, as `to_json` wrote it."""
    try:
        body = json.loads(content)
        claimed = body.pop(CHECKSUM)
        return bool(claimed == checksum(body)) and to_json(body) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def flipped_back(content: bytes) -> bytes | None:
    """The file before one of its bits flipped; None if that is not what happened to it.

    Every bit is tried: a file of a few kB takes a second, and a wrong guess would have to match 128
    bits. A file that would take minutes is given up.
    """
    strange = [found.start() for found, _ in zip(NOT_WRITTEN.finditer(content), range(2), strict=False)]
    places = strange or range(len(content))
    is_near = content.startswith(BEGINS) or content.endswith(ENDS)  # a flip leaves one of the two intact
    if len(strange) > 1 or not is_near or len(places) * len(content) > MOST_READ:
        return None
    tried = bytearray(content)
    for place in places:
        for bit in range(8):
            tried[place] ^= 1 << bit
            if not NOT_WRITTEN.match(tried, place) and is_whole(bytes(tried)):
                return bytes(tried)
            tried[place] ^= 1 << bit
    return None
