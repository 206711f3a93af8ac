"""The function `actstore.ingest`: from the arguments of the command to a stored run."""

from __future__ import annotations

import inspect
from typing import Any

from actstore import cluster
from actstore.errors import BadInput
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.on_ray import execute_on_ray
from actstore.ingest.jobs.prepare import prepare
from actstore.ingest.jobs.slices import Slice, execute_slice
from actstore.outputs import Work, silent


def ingest(
    *args: Any,
    slice: str | None = None,
    engine: str | None = None,
    address: str | None = None,
    workers: int | None = None,
    progress: Work = silent,
    **options: Any,
) -> str:
    """Store a run, as `actstore ingest` does, and return its name.

    Args:
        slice: `i/n`: publish the i-th of n parts of the batches alone, without the lease; see
            `actstore commit`.
        engine: `ray`: the batches are computed by a Ray cluster; default: by this process.
        address, workers: of the cluster, see on_ray.execute_on_ray.
        progress: shows how far it is: `actstore.progress`.
    """
    which, of_ray = asked(slice, engine, address, workers)
    job = prepare(*args, **options)
    with progress(f"ingest {job.plan.run}", job.sequences.n_sequences, job.unit) as advance:
        if which is not None:
            execute_slice(job, which, advance)
        elif of_ray:
            given = inspect.signature(prepare).bind(*args, **options).arguments
            execute_on_ray(job, {name: given[name] for name in given if name != "store"}, address, workers, advance)
        else:
            execute(job, advance)
    return job.plan.run


def asked(slice: str | None, engine: str | None, address: str | None, workers: int | None) -> tuple[Slice | None, bool]:
    """The slice that was asked for, if any, and whether Ray was.

    Raises:
        BadInput: both were, or there is no such slice or engine.
    """
    of_ray = cluster.check_engine(engine, address, workers)
    if of_ray and slice is not None:
        raise BadInput("got --slice and --engine ray; slices need no engine: leave one out")
    return None if slice is None else Slice.parse(slice), of_ray


def _described() -> None:
    """Give `ingest` the arguments and the description of `prepare`, besides its own."""
    own = [of for of in inspect.signature(ingest).parameters.values() if of.kind is of.KEYWORD_ONLY]
    given = inspect.signature(prepare)
    ingest.__signature__ = given.replace(  # type: ignore[attr-defined]
        parameters=[*given.parameters.values(), *own], return_annotation="str"
    )
    ingest.__doc__ = f"{ingest.__doc__}\n    prepare: {prepare.__doc__}"


_described()
