"""The command `actstore`: each command opens a store, makes one library call and prints.

Heavy imports stay inside the commands, so that `--help` answers at once.
"""

from actstore.cli import ingest, labels, models, read, study, train, upkeep  # noqa: F401 (each adds its commands)
from actstore.cli.group import main

__all__ = ["main"]
