"""What processes that share a run must have alike, so that each batch has the same bytes."""

from __future__ import annotations

from typing import Any

from actstore import cluster
from actstore.ingest.jobs.job import Ingest

PACKAGES = ("actstore", "torch", "transformer_lens", "numpy", "zarr", "polars")


def environment(job: Ingest) -> dict[str, Any]:
    """What this process has: versions, weights, threads, device and the processor's kind."""
    import torch

    device = job.device
    return {
        **cluster.versions(*PACKAGES),
        "weights_sha256": job.plan.model["weights_sha256"],
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
