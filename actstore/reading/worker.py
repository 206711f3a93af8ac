"""The process that runs a query with limits; see sql/process.py."""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from actstore import errors
from actstore.errors import ActstoreError, Damaged, LimitReached
from actstore.reading.opened import Opened
from actstore.sql.parameters import from_json
from actstore.sql.process import COLUMNS, ERROR, HEADROOM, READY, ROWS, of_status, too_much
from actstore.sql.session import Session
from actstore.storage.machine import OUT_OF_MEMORY


class _Inherited(Opened):
    """A store on the catalog file and folder that another process has open, and has checked."""

    def __init__(self, path: Path, identity: tuple[int, int], catalog: int, memory: int | None, check: bool) -> None:
        self._identity, self._inherited, self._memory = identity, Path(f"/dev/fd/{catalog}"), memory
        super().__init__(path, check)

    def _open_session(self, catalog: Path) -> Session:
        if self.folder.identity() != self._identity:
            raise Damaged(f"{self.path} was moved or replaced since it was opened; open the store again")
        return Session(self._inherited, self.path, self._memory)


def main() -> None:
    """Read one request, and write one answer."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # other output must not mix with the answer
    memory = None

    def tell(*columns: list[str]) -> None:
        out.write(COLUMNS + json.dumps(columns).encode() + b"\n")

    try:
        asked, tables = _receive()
        path, memory = Path(asked["path"]), asked["limits"]["memory"]
        params = from_json(asked["params"])
        with closing(_Inherited(path, tuple(asked["identity"]), asked["catalog"], memory, asked["check"])) as store:
            if store.snapshot != asked["snapshot"]:
                raise Damaged(f"{path} is another store by now; open it again")
            if memory is not None:
                _limit_allocations(memory)
            out.write(READY)
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always", errors.SeveralRuns)
                asked_of = store if asked["of"] is None else store.of(asked["of"])
                frame = asked_of.beside(tables).sql(asked["query"], params, reads=asked["reads"], check=tell)
        said = [str(note.message) for note in notes if issubclass(note.category, errors.SeveralRuns)]
        out.write(ROWS + json.dumps(said).encode() + b"\n")
        frame.write_ipc_stream(out)
    except (ActstoreError, MemoryError) as error:
        out.write(ERROR + json.dumps(_as_sent(error, memory)).encode())
    out.close()
    os._exit(0)  # nothing is left to tidy, and threads of the query might still run


def _receive() -> tuple[Any, dict[str, pa.Table]]:
    """The request, and the query's own tables."""
    request = json.loads(sys.stdin.buffer.readline())
    contents = {name: sys.stdin.buffer.read(size) for name, size in request["tables"].items()}
    tables = {name: pa.ipc.open_stream(content).read_all() for name, content in contents.items()}
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return request, tables


def _as_sent(error: ActstoreError | MemoryError, memory: int | None) -> tuple[str, str]:
    lacks = isinstance(error, MemoryError) or OUT_OF_MEMORY.search(
        str(error).partition("\n")[0]
    )  # not in the copy of the query
    if memory is not None and lacks:
        error = too_much(memory)
    elif isinstance(error, MemoryError):
        error = LimitReached("the query needs more memory than there is; ask for less")
    return error.kind, str(error)


def _limit_allocations(memory: int) -> None:
    """Let the system refuse an allocation above the memory left, before its pages are used."""
    import resource

    if held := of_status("self", "VmData"):
        most = held + memory + HEADROOM
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
