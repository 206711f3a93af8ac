"""The command line."""

from actstore.cli.read import main

__all__ = ["main"]
