"""The zarr.json of a site's array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actstore.arrays.layout import Layout


def metadata(layout: Layout, names: tuple[str, ...], attributes: Mapping[str, Any]) -> bytes:
    """Build the array's zarr.json, as zarr-python writes it."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync
    from zarr.storage import MemoryStore

    store = MemoryStore()
    zarr.create_array(
        store,
        shape=layout.shape,
        chunks=layout.shard_shape,
        dtype=layout.dtype,
        fill_value=float("nan"),
        serializer=ShardingCodec(chunk_shape=layout.chunk_shape, codecs=[BytesCodec(endian="little"), Crc32cCodec()]),
        compressors=None,
        dimension_names=names,
        attributes=dict(attributes),
        config={"write_empty_chunks": True},
    )
    buffer = sync(store.get("zarr.json", default_buffer_prototype()))
    assert buffer is not None
    return buffer.to_bytes()


def mapped_dtype(about: Mapping[str, Any], layout: Layout) -> str | None:
    """Returns the dtype of an array that has the given layout; None if it is laid out otherwise.

    Only shards of an array with this layout can be mapped.

    Args:
        about: the content of the array's zarr.json.
    """
    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(layout.shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(layout.shard_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": list(layout.chunk_shape),
                    "codecs": checked,
                    "index_codecs": checked,
                    "index_location": "end",
                },
            }
        ],
    }
    same = all(about.get(key) == value for key, value in expected.items()) and not about.get("storage_transformers")
    return about["data_type"] if same and about.get("data_type") in ("float32", "float16") else None
