"""Shards that are packed on a GPU, and copied to the host while the model goes on.

A shard is packed on the device, in the layout and dtype of its file, by the stream that runs the
model. A second stream copies the whole shard into page-locked memory. Whoever reads the shard waits
for the event of that copy alone, and the model does not wait.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actstore.arrays.encoding import TOO_LARGE
from actstore.arrays.layout import CRC_BYTES, Layout
from actstore.arrays.pack import ShardBuffer

if TYPE_CHECKING:
    import torch


class Copied(Protocol):
    """The event of one copy."""

    def synchronize(self) -> None:
        """Wait until the copy is done."""
        ...


class Copies(Protocol):
    """Copies from one device to the host, beside what the device computes."""

    device: torch.device

    def page_locked(self, n_bytes: int) -> torch.Tensor:
        """Host memory that the device can write to by itself: uint8 [n_bytes], page-aligned."""
        ...

    def start(self, source: torch.Tensor, target: torch.Tensor) -> Copied:
        """Copy what the source holds after all work that was given to the device so far.

        The source must not be changed, and the target must not be read, before the event came.

        Args:
            source: uint8 [n], on the device.
            target: uint8 [n], page-locked.
        """
        ...


class CudaCopies:
    """Copies from one CUDA device, on a stream of their own; see Copies."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self._stream = torch.cuda.Stream(device)

    def page_locked(self, n_bytes: int) -> torch.Tensor:
        """See Copies.page_locked."""
        import torch

        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def start(self, source: torch.Tensor, target: torch.Tensor) -> Copied:
        """See Copies.start."""
        import torch

        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._stream)  # or torch gives its memory away during the copy if a run is stopped
        return self._stream.record_event(torch.cuda.Event(blocking=True))


STREAMS: dict[str, Callable[[torch.device], Copies]] = {"cuda": CudaCopies}  # by type of the device


def is_staged(device: torch.device) -> bool:
    """Whether shards of a model on this device are packed there, and copied."""
    return device.type in STREAMS


def buffers(layouts: Mapping[str, Layout], device: torch.device) -> dict[str, ShardBuffer]:
    """A buffer for each site of a model on this device, by the names given.

    On a GPU they take as many bytes of its memory as the shards have.
    """
    if not layouts or not is_staged(device):
        return {name: ShardBuffer(layout) for name, layout in layouts.items()}
    copies = STREAMS[device.type](device)
    sizes = [-(-layout.shard_bytes // mmap.PAGESIZE) * mmap.PAGESIZE for layout in layouts.values()]
    parts = copies.page_locked(sum(sizes)).split(sizes)  # one piece, since torch rounds each up to a power of two
    return {
        name: StagedBuffer(layout, part[: layout.shard_bytes], copies)
        for (name, layout), part in zip(layouts.items(), parts, strict=True)
    }


class StagedBuffer(ShardBuffer):
    """The bytes of one shard, packed on a device; reused for each batch.

    After `hand_over`, nothing can be put before the shard is sealed.

    Args:
        layout: the site's.
        host: uint8 [shard_bytes], page-locked.
        copies: how the shard gets there.
    """

    def __init__(self, layout: Layout, host: torch.Tensor, copies: Copies) -> None:
        import torch

        super().__init__(layout, host.numpy())
        dtype, n_chunks, crc_items = (
            getattr(torch, layout.dtype),
            layout.chunks_per_shard,
            CRC_BYTES // layout.item_bytes,
        )
        packed = torch.empty(n_chunks, layout.chunk_bytes // layout.item_bytes, dtype=dtype, device=copies.device)
        self._host, self._device = host, packed.view(torch.uint8).view(-1)
        self._packed = packed[:, :-crc_items].unflatten(1, (layout.rows_per_chunk, *layout.stored_row_shape))
        self._copies = copies
        self._copied: Copied | None = None
        self._flag = copies.page_locked(1) if layout.dtype in TOO_LARGE else None  # see _overflowed
        self._flagged: Copied | None = None

    def put(self, first_row: int, activations: torch.Tensor) -> None:
        """See ShardBuffer.put; returns before the device has copied them.

        Raises:
            ValueError: see ShardBuffer.put, or a copy of the shard is under way.
        """
        if self._copied is not None:
            raise ValueError("got activations for a shard that is handed over; seal it first")
        super().put(first_row, activations)

    def hand_over(self) -> None:
        """Start to copy what was put to the host."""
        n_bytes = self._n_chunks * self.layout.chunk_bytes
        if self._overflows is not None and self._flag is not None:
            self._flagged = self._copies.start(self._overflows.view(-1).byte(), self._flag)
            self._overflows = None
        self._copied = self._copies.start(self._device[:n_bytes], self._host[:n_bytes])

    def seal(self, lengths: np.ndarray) -> memoryview:
        """See ShardBuffer.seal; waits for the copy."""
        if self._copied is None:
            self.hand_over()
        assert self._copied is not None
        self._copied.synchronize()
        self._copied = None
        return super().seal(lengths)

    def _target(self) -> torch.Tensor:
        return self._packed

    def _overflowed(self) -> bool:
        if self._flagged is None or self._flag is None:
            return False
        self._flagged.synchronize()
        self._flagged = None
        return bool(self._flag.item())
