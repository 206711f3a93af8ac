"""From a tree to its stored activations: trees, models, answers, and jobs that store them."""

import sys
from types import ModuleType
from typing import Any


class _Ingest(ModuleType):
    """The package, which is also the function `actstore.ingest`."""

    def __call__(self, *args: Any, **options: Any) -> str:
        """Store a run, as `actstore ingest` does; see `ingest` in jobs/verb.py."""
        from actstore.ingest.jobs.verb import ingest

        return ingest(*args, **options)

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        from actstore.ingest.jobs.verb import ingest

        return signature(ingest)


sys.modules[
    __name__
].__class__ = _Ingest  # a module's class may be set, see "Customizing module attribute access" of Python
