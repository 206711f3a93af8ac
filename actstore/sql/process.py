"""A query in a process that can be killed: its limits of time and memory hold in all cases.

DuckDB stops a query between two vectors of rows, and counts the memory of its own operators. One
function call on one vector can run for minutes or hold gigabytes meanwhile (`repeat('x', 2^33)`, a
list of 10^10 numbers, a regular expression). A query with a limit therefore runs in a new process,
`python -m actstore.reading.worker`, on the catalog file that its store has open.

The request is one line of JSON (see parameters.py), then the query's own tables, each an Arrow IPC
stream. The answer is a byte when the query is about to
begin, a line with the query's columns when the query is prepared, then a byte that says what
follows: a line of notes and the rows as an Arrow IPC stream, or an error as JSON. A call has one
process, which prepares the query once and runs it once; the limits hold over both. When the parent
ends, the standard input ends, and the process with it.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import polars as pl
import pyarrow as pa

from actstore import errors
from actstore.errors import ActstoreError, BadInput, LimitReached
from actstore.sql.parameters import to_json
from actstore.sql.session import Check
from actstore.sql.snapshot import Snapshot
from actstore.storage.machine import OUT_OF_MEMORY, within_limits

READY, COLUMNS, ROWS, ERROR = b"!", b"=", b"+", b"-"
LOOK_UP = 0.02  # seconds between checks of clock and memory: a process fills some 50 MB in it
START = 120.0  # seconds a process may take to start; a busy machine needs 5
HEADROOM = 256 << 20  # bytes above the limit that threads and allocators may reserve without use
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """Limits of one query.

    Attributes:
        timeout: seconds from when the process is ready; None for no limit.
        memory: bytes beyond the process's own at its start; None for no limit.
    """

    timeout: float | None
    memory: int | None

    @classmethod
    def of(cls, timeout: float | None, memory: str | int | None) -> Limits:
        """Limits from a user's values.

        Args:
            timeout: seconds.
            memory: bytes, or text such as `2GB`, `512MB` or `1.5GiB`.

        Raises:
            BadInput: a value is not a limit.
        """
        if timeout is not None and not (
            isinstance(timeout, (int, float)) and math.isfinite(timeout) and 0 < timeout <= threading.TIMEOUT_MAX
        ):
            raise BadInput(f"got timeout {timeout!r}; it is a number of seconds above 0")
        return cls(timeout, None if memory is None else _bytes(memory))


def _bytes(memory: str | int) -> int:
    found = SIZE.fullmatch(memory.strip()) if isinstance(memory, str) else None
    if found:
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))
    else:
        size = memory if isinstance(memory, int) and not isinstance(memory, bool) else 0
    if not 0 < size < 1 << 62:
        raise BadInput(f"got memory {memory!r}; it is a size such as 2GB, 512MB or 1.5GiB")
    return size


def run_in_process(
    store: Snapshot,
    query: str,
    params: Mapping[str, Any] | None,
    limits: Limits,
    reads: str | None = None,
    check: Check | None = None,
) -> pl.DataFrame:
    """Run one query in its own process, on the store's snapshot even if a newer one exists.

    Args:
        store: the whole store, or the store of one run. The process refuses another folder in its
            place, and checks files if the store does.
        query, params: see Store.sql.
        limits: the query's limits.
        reads: the run whose activations are read at the query's token_id, see scope.ask.
        check: see Session.sql; if it raises, the process is killed.

    Raises:
        LimitReached: the query reached a limit; its process was killed.
        BadInput: a parameter has a type that no query takes.
        Damaged: the folder was moved or replaced after it was opened.
        ActstoreError: any error of Store.sql.
    """
    catalog, folder = store.session.fileno(), store.folder
    tables = {name: _as_stream(table) for name, table in store.session.tables.items()}
    folder.check()
    request = {
        "path": os.fspath(folder.root),
        "identity": folder.identity(),
        "catalog": catalog,
        "query": query,
        "params": to_json(params),
        "limits": asdict(limits),
        "snapshot": store.snapshot,
        "check": store.check,
        "of": store.only,
        "reads": reads,
        "tables": {name: len(content) for name, content in tables.items()},
    }
    with within_limits("cannot start the query's process"), tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "actstore.reading.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            pass_fds=(catalog,),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
            start_new_session=True,  # Ctrl-C comes to this process, which kills that one
        )
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # the process died; the code below reports it
                process.stdin.write(json.dumps(request).encode() + b"\n")
                for content in tables.values():
                    process.stdin.write(content)
                process.stdin.flush()
            answer = _wait(process, limits, check)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()
        if answer[:1] == ROWS:
            notes, rows = bytes(answer[1:]).split(b"\n", 1)
            for note in json.loads(notes):
                warnings.warn(note, errors.SeveralRuns, stacklevel=errors.outside())
            return pl.read_ipc_stream(BytesIO(rows))
        if answer[:1] == ERROR:
            kind, message = json.loads(answer[1:])
            raise ActstoreError.of_kind(kind, message)
        raise _died(process.returncode, limits, complaints)


def _as_stream(table: pa.Table) -> memoryview:
    """A table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def _wait(process: subprocess.Popen[bytes], limits: Limits, check: Check | None) -> bytes:
    """Read the process's whole answer after the columns, or the part before it died.

    Raises:
        LimitReached: the query reached a limit.
    """
    assert process.stdout is not None
    output = select.poll()  # select() takes no descriptor above 1,023
    output.register(process.stdout, select.POLLIN)
    if not output.poll(1e3 * START):
        raise LimitReached(f"the query's process did not start in {START:g} s; try again when the machine is less busy")
    first = os.read(process.stdout.fileno(), 1)
    if first != READY:  # an error before the query began, or the process died
        return first + process.stdout.read()
    started, before, answer = time.monotonic(), _resident(process.pid), bytearray()
    while True:
        if limits.timeout is not None and time.monotonic() - started > limits.timeout:
            raise LimitReached(
                f"the query took longer than its limit of {limits.timeout:g} s and was stopped; raise it (timeout=…, "
                "--timeout) or ask for less"
            )
        if limits.memory is not None and _resident(process.pid) - before > limits.memory:
            raise too_much(limits.memory)
        if output.poll(1e3 * LOOK_UP):
            more = os.read(process.stdout.fileno(), 1 << 20)
            if not more:
                process.wait()
                return bytes(answer)
            answer += more
            if answer[:1] == COLUMNS and b"\n" in answer:
                columns, answer = answer.split(b"\n", 1)
                if check:
                    check(*json.loads(columns[1:]))


def too_much(memory: int) -> LimitReached:
    """The error for a query that exceeded its memory."""
    return LimitReached(
        f"the query needed more than its limit of {memory / 1e6:,.0f} MB of memory and was stopped; raise it (memory=…, "
        "--memory) or ask for less"
    )


def _died(code: int, limits: Limits, complaints: IO[bytes]) -> ActstoreError:
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines()
    if limits.memory is not None and (code < 0 or any(OUT_OF_MEMORY.search(line) for line in lines)):
        return too_much(limits.memory)  # an allocation failed where nobody expected one to
    why = f"signal {-code}" if code < 0 else f"exit code {code}"
    said = f", saying {lines[-1].strip()!r}" if lines else ""
    return LimitReached(
        f"the query's process died ({why}{said}); the machine may lack the memory it needs: ask for less"
    )


def _resident(pid: int | str) -> int:
    """Bytes of memory that only this process uses; 0 if the system does not say.

    In that case DuckDB's own limit still holds.
    """
    return of_status(pid, "RssAnon")


def of_status(pid: int | str, what: str) -> int:
    """A value of a process's /proc status file, in bytes."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    return 0
