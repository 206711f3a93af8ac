"""From token ids and sites to one array X."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from actstore.errors import BadInput, LimitReached
from actstore.storage.machine import free_memory
from actstore.storage.several import several

if TYPE_CHECKING:
    import numpy as np

    from actstore.arrays.site import Reader

Dtype = Literal["float32", "float16", "float64", "bfloat16"]
Form = Literal["numpy", "torch"]
DTYPES = get_args(Dtype)
ITEM_BYTES = {"float32": 4, "float16": 2, "float64": 8, "bfloat16": 2}
LOOKED_AT = 500_000_000  # bytes of X: below them, nobody asks the system what is free


def check_form(dtype: Any, out: str) -> str:
    """Returns the name of a dtype; refuses a dtype or form of X that does not exist.

    Args:
        dtype: `float16`, np.float16 and torch.float16 mean the same.
        out: "numpy" or "torch".

    Raises:
        BadInput: names the dtypes and forms that exist.
    """
    if out not in ("numpy", "torch"):
        raise BadInput(f"got out {out!r}; X comes as 'numpy' or 'torch'")
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype).removeprefix("torch."))
    if name not in DTYPES:
        raise BadInput(f"got dtype {dtype!r}; X comes as {', '.join(DTYPES)}")
    if name == "bfloat16" and out == "numpy":
        raise BadInput("numpy has no bfloat16; ask for out='torch', or for float16 or float32")
    return str(name)


def read_activations(readers: Sequence[Reader], token_ids: np.ndarray, one_site: bool, dtype: str, out: str) -> Any:
    """Read X: [n, *row] of one site, or [n, n_sites, *row].

    Args:
        readers: one reader per site.
        token_ids: int64 [n].
        one_site: leave out the axis of sites.
        dtype, out: see Store.read.
    """
    shape = (len(token_ids), len(readers), *readers[0].layout.row_shape)
    _check_room(shape, dtype)
    if dtype == "float32" and len(readers) == 1:
        X = readers[0].gather(token_ids)
        X = X if one_site else X[:, None]
        return _as_torch(X) if out == "torch" else X
    if dtype == "bfloat16":
        import torch

        in_torch = torch.empty(shape, dtype=torch.bfloat16)
        for place, reader in enumerate(readers):
            in_torch[:, place] = whole = torch.from_numpy(reader.gather(token_ids))
            infinite = in_torch[:, place].isinf()
            if infinite.any() and whole[infinite].isfinite().any():
                raise BadInput("an activation is too large for bfloat16; read it as float32")
        return in_torch[:, 0] if one_site else in_torch
    import numpy as np

    X = np.empty(shape, dtype)

    def gather(place: int) -> None:
        readers[place].gather(token_ids, out=X[:, place])

    for _ in several(gather, range(len(readers)), max((reader.sites_at_once for reader in readers), default=1)):
        pass
    X = X[:, 0] if one_site else X
    return _as_torch(X) if out == "torch" else X


def _check_room(shape: tuple[int, ...], dtype: str) -> None:
    """Refuse an X that memory cannot hold: the system would end the process, without a word.

    Raises:
        LimitReached: says how much there is.
    """
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    free = free_memory() if wanted > LOOKED_AT else None
    if free is not None and wanted > free:
        raise LimitReached(
            f"X {list(shape)} in {dtype} takes {wanted / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free: read fewer "
            "rows or sites, or float16; Store.batches reads any number in turn, and Store.export writes them to a file"
        )


def _as_torch(X: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(X)


def same_row_shape(readers: Sequence[Reader], sites: Sequence[str]) -> None:
    """Refuse sites whose rows differ in shape, since one X cannot hold them.

    Args:
        readers: one reader per site.

    Raises:
        BadInput: names the first two sites that differ.
    """
    for reader, site in zip(readers, sites, strict=True):
        if reader.layout.row_shape != readers[0].layout.row_shape:
            raise BadInput(
                f"{sites[0]} has rows of {list(readers[0].layout.row_shape)} and {site} of {list(reader.layout.row_shape)}; "
                "read sites of one shape in one call"
            )
