"""What this process may use of the machine it runs on."""

from __future__ import annotations

import os


def n_processors() -> int:
    """Processors that this process may run on, where the system says; else those that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
