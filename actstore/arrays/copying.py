"""Rows copied out of mapped memory, in blocks and by several threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from actstore.arrays.encoding import widened
from actstore.errors import BadInput
from actstore.storage.machine import n_processors

if TYPE_CHECKING:
    from actstore.arrays.layout import Layout

ROWS_AT_ONCE = 512  # rows are copied twice: so few are still in the processor's cache at the second copy
FLOATS_FOR_THREADS = 8 << 20  # 32 MB: below, a thread costs more than it saves
MOST_THREADS = 4  # with more, the memory's bandwidth is the limit


def flat_rows(out: np.ndarray, n_rows: int, layout: Layout) -> np.ndarray:
    """Returns `out` as [n, row_items], sharing its memory.

    Args:
        out: float [n, *layout.row_shape], of any float dtype.
        n_rows: the n that `out` must have.

    Raises:
        ValueError: `out` has another shape, is not of a float dtype, or has a row that is not
            contiguous.
    """
    if out.shape != (n_rows, *layout.row_shape) or out.dtype.kind != "f":
        raise ValueError(f"got out {out.dtype} {list(out.shape)} for {n_rows} rows of {list(layout.row_shape)} floats")
    flat = out.reshape(n_rows, layout.row_items)
    if n_rows and (not np.shares_memory(flat, out) or (layout.row_items > 1 and flat.strides[1] != out.itemsize)):
        raise ValueError("each row of out must lie in one piece, as in a slice of the sites of [n, n_sites, d_model]")
    return flat


def copy_rows(windows: np.ndarray, offsets: np.ndarray, X: np.ndarray, layout: Layout) -> bool:
    """Copy windows[offsets] into X, with several threads when there is much to copy.

    Args:
        windows: V<row bytes> [m], see `mapped.View`.
        offsets: int64 [n], into `windows`.
        X: float [n, row_items]; overwritten.
        layout: says how the numbers in `windows` are stored.

    Returns:
        True if a row begins with NaN.

    Raises:
        BadInput: a number is too large for the dtype of X.
    """

    def copy(start: int) -> bool:
        blank = False
        with np.errstate(over="raise"):
            for first in range(start, min(start + per_thread, len(X)), ROWS_AT_ONCE):
                block = slice(first, min(first + ROWS_AT_ONCE, start + per_thread))
                numbers = layout.decoded(windows[offsets[block]])
                X[block] = widened(numbers) if numbers.dtype == np.float16 and X.dtype == np.float32 else numbers
                blank |= bool(np.isnan(X[block, 0].min(initial=0)))
        return blank

    threads_wanted = n_threads(X.size)
    per_thread = max(-(-len(X) // threads_wanted), 1)
    try:
        if threads_wanted == 1:
            return copy(0)
        with ThreadPoolExecutor(threads_wanted) as threads:
            return any(list(threads.map(copy, range(0, len(X), per_thread))))
    except FloatingPointError:
        raise BadInput(f"an activation is too large for {X.dtype}; read it as float32") from None


def n_threads(n_floats: int) -> int:
    """Number of threads that shall copy n_floats numbers.

    The number is at most that of the processors, and at most OMP_NUM_THREADS.
    """
    if n_floats < FLOATS_FOR_THREADS:
        return 1
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(n_processors(), MOST_THREADS, int(allowed) if allowed.isdecimal() else MOST_THREADS))
