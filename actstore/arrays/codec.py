"""How the chunks of an array are compressed: not at all, by zstd, or by blosc.

blosc puts the first bytes of all numbers together, then the second ones and so on, and compresses
them by zstd. It compresses a chunk as one block: of several blocks it writes whichever is done
first, so that the same numbers would not always give the same bytes.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

Codec = Literal["none", "zstd", "blosc"]
CODECS = get_args(Codec)
LEVEL = 1  # level 5 of blosc takes six times as long, for no fewer bytes


def compressors(codec: str, item_bytes: int, chunk_bytes: int) -> list[dict[str, Any]]:
    """The codec in zarr.json; [] for none.

    Args:
        item_bytes: bytes of a number.
        chunk_bytes: bytes of a chunk that is not compressed.
    """
    if codec == "zstd":
        return [{"name": "zstd", "configuration": {"level": LEVEL, "checksum": False}}]
    if codec == "blosc":
        how = {"cname": "zstd", "clevel": LEVEL, "shuffle": "shuffle", "blocksize": chunk_bytes}
        return [{"name": "blosc", "configuration": {"typesize": item_bytes, **how}}]
    return []


def compressed(codec: str, item_bytes: int, chunk: memoryview) -> bytes:
    """The bytes of a chunk, compressed; the same on every call.

    Args:
        item_bytes: bytes of a number.
    """
    numbers = np.frombuffer(chunk, f"u{item_bytes}")  # blosc shuffles by the size of an item
    if codec == "zstd":
        from numcodecs.zstd import Zstd

        return bytes(Zstd(level=LEVEL).encode(numbers))
    from numcodecs.blosc import SHUFFLE, Blosc

    return bytes(Blosc("zstd", LEVEL, SHUFFLE, chunk.nbytes).encode(numbers))


def decompressed(codec: str, chunk: bytes | memoryview) -> bytes:
    """The bytes of a chunk.

    Raises:
        RuntimeError, ValueError: the bytes are none of the codec.
    """
    if codec == "zstd":
        from numcodecs.zstd import Zstd

        return bytes(Zstd().decode(chunk))
    from numcodecs.blosc import Blosc

    return bytes(Blosc().decode(chunk))
