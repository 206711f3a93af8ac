"""The index at the end of a shard: where each chunk lies, checked before anything is read by it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from actstore.arrays.layout import CRC_BYTES, NO_CHUNK
from actstore.errors import Damaged

if TYPE_CHECKING:
    from actstore.arrays.layout import Layout


def check_size(layout: Layout, size: int, path: Path, where: str) -> None:
    """Raise Damaged if no shard of a layout has this size, in bytes.

    Args:
        path, where: the shard's, and its run and site, for the message.
    """
    if size != layout.shard_bytes and not _is_short(layout, size):
        raise Damaged(f"{path} of {where} is {size:,} bytes long; it was {layout.shard_bytes:,} when committed")


def _is_short(layout: Layout, size: int) -> bool:
    """Whether a file of a size can be a shard of the layout `rows` that is not full."""
    whole = layout.index_bytes <= size < layout.shard_bytes and (size - layout.index_bytes) % layout.chunk_bytes == 0
    return layout.position_axis is None and whole


def chunks(layout: Layout, index: bytes, size: int, path: Path, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each chunk of a shard lies whose chunks have lengths of their own.

    Args:
        layout, index, size, path, where: see chunk_starts.

    Returns:
        (offsets, lengths): int64 [chunks_per_shard] each, in bytes; -1 if the chunk is missing.

    Raises:
        Damaged: the index is not what was written.
    """
    offset, length = np.frombuffer(index[:-4], "<u8").reshape(-1, 2).T
    there, end = offset != NO_CHUNK, np.uint64(size - layout.index_bytes)
    inside = (length > 4) & (length <= end) & (offset <= end - np.minimum(length, end))
    _check(index, bool((inside | ~there).all()), path, where)
    found = (np.where(there, of_each, np.uint64(0)).astype(np.int64) for of_each in (offset, length))
    offsets, lengths = (np.where(there, of_each, -1) for of_each in found)
    return offsets, lengths


def _check(index: bytes, fits: bool, path: Path, where: str) -> None:
    if google_crc32c.value(index[:-4]).to_bytes(4, "little") != index[-4:] or not fits:
        raise Damaged(f"the index of {path} of {where} is not what was committed; restore it from a copy of the store")


@lru_cache(maxsize=64)
def packed(layout: Layout) -> tuple[bytes, np.ndarray]:
    """The index of a whole shard that actstore packed, and where its chunks start.

    Returns:
        The last layout.index_bytes bytes of the shard, and int64 [chunks_per_shard], see
        chunk_starts.
    """
    starts = np.arange(layout.chunks_per_shard) * layout.chunk_bytes
    index = np.stack([starts, np.full(len(starts), layout.chunk_bytes)], axis=1).astype("<u8").tobytes()
    return index + google_crc32c.value(index).to_bytes(CRC_BYTES, "little"), starts // layout.item_bytes


def chunk_starts(layout: Layout, index: bytes, size: int, path: Path, where: str) -> np.ndarray:
    """Where each chunk of a shard starts.

    Args:
        layout: of the array.
        index: the last layout.index_bytes bytes of the shard.
        size: of the shard, in bytes.
        path, where: see check_size.

    Returns:
        int64 [chunks_per_shard]: the number of the shard's at which each chunk starts; -1 if the
        chunk is missing.

    Raises:
        Damaged: the index is not what was written.
    """
    offset, length = np.frombuffer(index[:-4], "<u8").reshape(-1, 2).T
    there = offset != NO_CHUNK
    whole = (
        (length == layout.chunk_bytes)
        & (offset <= max(size - layout.index_bytes - layout.chunk_bytes, 0))
        & (offset % layout.item_bytes == 0)
    )
    _check(index, bool((whole | ~there).all()), path, where)
    return np.where(there, (offset // layout.item_bytes).astype(np.int64), -1)
