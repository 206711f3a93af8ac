"""The zarr.json of a site's array."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from actstore.arrays.codec import CODECS, compressors
from actstore.arrays.encoding import STORED_AS
from actstore.arrays.layout import CRC_BYTES, Layout

LAYOUT_KEYS = ("zarr_format", "node_type", "shape", "chunk_grid", "chunk_key_encoding", "codecs")  # where numbers lie
SCALED = {
    "int8": "along the last axis: 4 bytes of a little-endian float32 scale, then int8 numbers; number = scale * int8, -128 is NaN"
}


def metadata(layout: Layout, names: tuple[str, ...], attributes: Mapping[str, Any]) -> bytes:
    """Build the array's zarr.json, the same bytes as zarr-python 3 writes.

    An array of int8 says in an attribute `int8` how its numbers are decoded.
    """
    return json.dumps(_content(layout, names, attributes), indent=2).encode()


def _content(layout: Layout, names: Sequence[str], attributes: Mapping[str, Any]) -> dict[str, Any]:
    as_bytes, crc = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    smaller = compressors(layout.codec, layout.item_bytes, layout.chunk_bytes - CRC_BYTES)
    sharding = {
        "chunk_shape": list(layout.chunk_shape),
        "codecs": [as_bytes, *smaller, crc],
        "index_codecs": [as_bytes, crc],
        "index_location": "end",
    }
    return {
        "shape": list(layout.stored_shape),
        "data_type": layout.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(layout.shard_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": -1 if layout.dtype == "int8" else "NaN",
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": dict(attributes) | (SCALED if layout.dtype == "int8" else {}),
        "dimension_names": list(names),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def as_written(about: Mapping[str, Any], layout: Layout) -> Layout | None:
    """Returns the layout with an array's own dtype and codec; None if it is laid out otherwise.

    Args:
        about: the content of the array's zarr.json.
        layout: of any dtype and codec.
    """
    dtype = str(about.get("data_type"))
    if dtype not in STORED_AS or about.get("storage_transformers"):
        return None
    for codec in CODECS:
        found = replace(layout, dtype=dtype, codec=codec)
        expected = _content(found, (), {})
        if all(about.get(key) == expected[key] for key in LAYOUT_KEYS):
            return found
    return None
