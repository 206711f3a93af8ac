"""How the numbers of an array are stored: as floats, or as int8 with a scale for each vector.

float16 and bfloat16 are the nearest such numbers. In int8, a vector is the numbers along the
array's last axis: a token's d_model numbers, or those of one head. It is stored as its scale, a
little-endian float32 in SCALE_BYTES items, and then one int8 per number:

    scale = max(abs(vector)) / 127        number = scale * int8, from -127 to 127; -128 is NaN

so that a number is at most scale / 2 away from what was stored. The fill value -1 makes a scale of
NaN, since four bytes of 0xFF are one.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    import torch

StoredAs = Literal["float32", "float16", "bfloat16", "int8"]
STORED_AS = get_args(StoredAs)
SCALE_BYTES = 4
MOST = 127  # the largest int8; -128 is left for NaN, and the numbers are as many on both sides of 0
NAN = -128
LEAST_SCALE = float(np.finfo(np.float32).tiny)  # below, a float32 has fewer digits, and 0 would divide
MOST_SCALE = float(
    np.nextafter(np.finfo(np.float32).max / np.float32(MOST), np.float32(0))
)  # above, MOST of it is infinite
TOO_LARGE = {  # the least number whose nearest is infinity: half a step above the largest
    "float16": (2 - 2**-11) * 2.0**15,
    "bfloat16": (2 - 2**-8) * 2.0**127,
}


def numpy_dtype(dtype: str) -> np.dtype:
    """What numpy sees of the stored numbers: uint16 of bfloat16, which numpy lacks."""
    return np.dtype({"bfloat16": "<u2"}.get(dtype, dtype)).newbyteorder("<")


def blank(dtype: str) -> float:
    """The stored number of padding; it decodes as NaN."""
    return {"bfloat16": 0x7FC0, "int8": -1}.get(dtype, np.nan)


def quantised(activations: torch.Tensor) -> torch.Tensor:
    """Vectors as int8 with their scales.

    Args:
        activations: float [..., width], on any device.

    Returns:
        int8 [..., SCALE_BYTES + width]. The scale of a vector with an infinite number is infinite.
    """
    import torch

    X = activations.float()
    scale = X.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=-1, keepdim=True).div_(MOST).clamp_(min=LEAST_SCALE)
    scale.masked_fill_((scale > MOST_SCALE) & (scale < torch.inf), MOST_SCALE)
    numbers = (X / scale).round_().nan_to_num_(nan=NAN).to(torch.int8)
    return torch.cat([scale.contiguous().view(torch.int8), numbers], dim=-1)


def overflows(activations: torch.Tensor, dtype: str) -> torch.Tensor:
    """bool []: whether a finite number would become infinite in a dtype; on the same device."""
    import torch

    size = activations.abs()
    return ((size >= TOO_LARGE[dtype]) & (size < torch.inf)).any()


def has_infinite(stored: np.ndarray, dtype: str) -> bool:
    """Whether a stored number, or a vector's scale, is infinite.

    Args:
        stored: [..., items of a vector], of numpy_dtype(dtype).
    """
    if dtype == "bfloat16":
        return bool(((stored & 0x7FFF) == 0x7F80).any())
    return bool(np.isinf(_scales(stored) if dtype == "int8" else stored).any())


def decoded(stored: np.ndarray, dtype: str, width: int) -> np.ndarray:
    """The numbers of some rows.

    Args:
        stored: [n, numbers of a row], of numpy_dtype(dtype).
        width: numbers of a vector, without its scale.

    Returns:
        float32 [n, numbers of a row, without scales]; float16 as it is stored.
    """
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype != "int8":
        return stored
    vectors = stored.reshape(-1, width + SCALE_BYTES)
    numbers = vectors[:, SCALE_BYTES:]
    X = numbers * _scales(vectors)
    X[numbers == NAN] = np.nan
    return X.reshape(len(stored), stored.shape[1] // (width + SCALE_BYTES) * width)


@cache
def _halves() -> np.ndarray:
    """float32 [65536]: the number of each pattern of 16 bits."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


def widened(stored: np.ndarray) -> np.ndarray:
    """float16 as float32, by a table: twice as fast as numpy's conversion."""
    return np.take(_halves(), stored.view(np.uint16))


def _scales(stored: np.ndarray) -> np.ndarray:
    """float32 [..., 1]: the scale of each vector of int8 [..., items]."""
    return np.ascontiguousarray(stored[..., :SCALE_BYTES]).view("<f4")


def largest_error(dtype: str, largest: float) -> float:
    """How far a stored number may be from what was given, where no number of its vector is larger.

    Args:
        largest: size of the largest number of the vector.
    """
    return {
        "float32": 0.0,
        "float16": max(largest * 2.0**-11, 2.0**-25),  # half a step; below 2**-14 all steps are alike
        "bfloat16": largest * 2.0**-8,
        "int8": max(largest / MOST, LEAST_SCALE) / 2,
    }[dtype]
