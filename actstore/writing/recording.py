"""Record results in a store, or keep them in a file if the store cannot take them now."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import uuid4

import polars as pl

from actstore.catalog import part_types
from actstore.commits.format import check_format, store_around
from actstore.errors import BadInput, Unsupported
from actstore.outputs import replacing
from actstore.storage.at import at
from actstore.writing.writer import open_writer

NO_WRITING = (errno.EROFS, errno.EACCES, errno.EPERM)


def wait_until_free(root: Path, wait: float) -> str:
    """Wait until results can be recorded; called before long work begins.

    Args:
        wait: seconds to wait for another process that writes to the store.

    Returns:
        Why nobody can write to the store (a read-only disk); "" if it can be written.

    Raises:
        Busy: another process wrote to the store all that time.
        TooOld: the store has an earlier format, which can only be read.
    """
    check_format(root)
    try:
        with at(root).lease(wait):
            pass
    except OSError as error:
        if error.errno not in NO_WRITING and not isinstance(error, Unsupported):
            raise
        return str(error.strerror or error)
    return ""


def record(
    root: Path, results: Sequence[pl.DataFrame], wait: float = 0.0, kept: Callable[[Path], None] = lambda file: None
) -> None:
    """Record results, one commit each; on failure, keep what is not recorded in a file.

    Args:
        results: frames with the columns of the table `results` except `recorded`.
        wait: seconds to wait for another process that writes to the store.
        kept: called with the file's path, before the error is raised.

    Raises:
        Busy, NoRoom, Damaged, OSError: the store cannot take the results.
        BadInput: nobody can write to the store (a read-only disk).
    """
    left = list(results)
    try:
        with open_writer(root, wait=wait) as writer:
            while left:
                writer.record(left[0])
                del left[0]
    except BaseException as error:  # Ctrl-C while it waits too
        if left:
            kept(_keep(left))
        if isinstance(error, OSError) and error.errno in NO_WRITING:
            raise BadInput(
                f"{root} cannot be written ({error.strerror}), so what was computed is not recorded in it; with --no-record "
                "that is meant"
            ) from error
        raise


def _keep(results: Sequence[pl.DataFrame]) -> Path:
    """Write results to a new file in the working folder, or else in the temporary folder."""
    here = Path.cwd()
    folder = here if os.access(here, os.W_OK) and not store_around(here) else Path(tempfile.gettempdir())
    file = folder / f"results-{uuid4().hex[:12]}.parquet"
    numbered = [frame.with_columns(pl.lit(number, pl.Int32).alias(ANSWER)) for number, frame in enumerate(results)]
    replacing(file, pl.concat(numbered).write_parquet)
    return file.relative_to(here) if folder == here else file


ANSWER = "answer"  # the column that says which of the file's answers a row belongs to


def read_kept(file: Path) -> list[pl.DataFrame]:
    """Read the results that a file keeps.

    Args:
        file: a file that `record` wrote.

    Raises:
        BadInput: the file holds no results.
    """
    types = {name: dtype for name, dtype in part_types.tables()["results"].items() if name != "recorded"}
    try:
        frame = pl.read_parquet(file.read_bytes())  # polars takes a path for a pattern
        answers = frame.partition_by(ANSWER, maintain_order=True, include_key=False)
        if not answers or set(frame.columns) != {*types, ANSWER}:
            raise BadInput(f"{file} holds no results; name a file that a study has kept (results-….parquet)")
        return [answer.select(pl.col(name).cast(dtype) for name, dtype in types.items()) for answer in answers]
    except FileNotFoundError:
        raise BadInput(f"there is no file {file}; name one that a study has kept (results-….parquet)") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        said = str(error).splitlines()[0]
        raise BadInput(f"{file} holds no results ({said}); name a file that a study has kept") from error


def check_belongs(root: Path, results: Sequence[pl.DataFrame], runs: Sequence[str], snapshot: int) -> None:
    """Refuse results that come from another store.

    Args:
        results: frames of results.
        runs: names of the store's runs.
        snapshot: number of the store's commits.

    Raises:
        BadInput: the store has no such run, or the results are of a later snapshot.
    """
    for frame in results:
        strangers = [str(run) for run in frame["run"].unique() if run not in runs]
        latest = frame["snapshot"].max()
        if strangers or not isinstance(latest, int) or latest > snapshot:
            what = f"of run {', '.join(strangers)}" if strangers else f"of snapshot {latest!r}"
            raise BadInput(
                f"the results are {what}, and {root} is at snapshot {snapshot} and holds {', '.join(runs) or 'no run'}: record "
                "them in the store that gave them"
            )
