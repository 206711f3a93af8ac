"""What this process may use of its machine, what to do if that is too little, and forks."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from actstore.errors import BadInput, LimitReached

MAPS = Path("/proc/sys/vm/max_map_count")
MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # of this process, in a container
FREE = re.compile(r"^(MemAvailable|SwapFree):\s+(\d+) kB", re.MULTILINE)
LEAST_MEMORY = 2_000_000_000  # bytes of addresses: 1.5e9 are too few with two cores, and each thread takes more
LEAST_FOR_MODELS = 4_000_000_000  # with less, torch and transformers end the process or wait for ever
OUT_OF_MEMORY = re.compile(  # in the words of Python, DuckDB, Arrow, the C++ library and the dynamic linker
    r"out of memory|more memory|MemoryError|bad_alloc|bad allocation|could not allocate|malloc of size"
    r"|failed to map segment|can't start new thread|could not spawn threads",
    re.IGNORECASE,
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt, see malloc.h
KEPT = 1 << 30  # bytes of freed memory that a process keeps; a forward pass frees some 0.1e9
FROM_HEAP = 32 << 20  # larger pieces come from the system each time: the most that glibc allows here
LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors of a limit, and not of the file


def n_processors() -> int:
    """Number of processors that this process may run on, or else of those that exist."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(n: int) -> None:
    """Refuse a number of threads that this process has no processors for.

    Raises:
        BadInput: n is below 1, or above the number of processors.
    """
    most = n_processors()
    if not 1 <= n <= most:
        raise BadInput(f"got {n} threads; this process may run on {most} processors: give 1 to {most} (--threads)")


def share_processors() -> None:
    """Have the threads of OpenMP, torch's among them, sleep while they wait for each other.

    They would otherwise spin, which takes the processors from any other process: two ingests side
    by side on two processors then run at a fifth of their speed alone, and at half of it if they
    sleep. No number changes. For the owner of a process to call, before torch is imported. A user's
    own OMP_WAIT_POLICY or GOMP_SPINCOUNT is kept.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["OMP_WAIT_POLICY"] = "passive"  # read by libgomp, which torch's wheel brings, as it is loaded


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for what is allocated next.

    A forward pass allocates and frees its activations. Where the library returns them to the system
    each time, the system makes and clears their pages anew, which takes up to a fifth of the pass.
    No number changes. For the owner of a process to call. Nothing is done where the library is
    another than glibc, or where the user has set glibc's allocator.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_THRESHOLD, FROM_HEAP)
        mallopt(M_ARENA_MAX, 1)  # or each thread that runs passes frees into an arena of its own, which keeps less


def raise_descriptors() -> None:
    """Let this process open as many files as its hard limit allows; for its owner to call."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems have a lower limit than they report
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def free_memory(swap: bool = True) -> int | None:
    """Bytes of memory that this process may take; None if the system does not say.

    Args:
        swap: count swap, too, which holds what memory does not, and is slow.
    """
    with suppress(OSError, ValueError):
        free = sum(int(kB) * 1024 for kind, kB in FREE.findall(MEMORY.read_text()) if swap or kind != "SwapFree")
        with suppress(OSError, ValueError):  # what a control group leaves; files that it holds in memory can go
            held = re.search(r"^anon (\d+)$", (GROUP / "memory.stat").read_text(), re.MULTILINE)
            free = min(free, int((GROUP / "memory.max").read_text()) - (int(held[1]) if held else 0))
        return free
    return None


def check_memory(models: bool = False) -> None:
    """Refuse to work with too little memory, since the libraries would end the process silently.

    Args:
        models: True if a model is run.

    Raises:
        LimitReached: this process may map less than LEAST_MEMORY, or LEAST_FOR_MODELS.
    """
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    least = LEAST_FOR_MODELS if models else LEAST_MEMORY
    if most != resource.RLIM_INFINITY and most < least:
        libraries = "torch, transformers" if models else "DuckDB, Arrow"
        raise LimitReached(
            f"this process may map {most / 1e9:.2f} GB of memory, and {libraries} and polars need {least / 1e9:g} GB to start: "
            "allow it more (`ulimit -v unlimited`)"
        )


def limit_reached(error: BaseException, doing: str) -> LimitReached | None:
    """The package's error if a limit of the system was reached, which is no damage to a store.

    Args:
        error: an OSError, a MemoryError, or another library's error that quotes the system's words,
            as DuckDB's do.
        doing: what could not be done, for the message: "cannot map s.act/…".

    Returns:
        A LimitReached; None if the error is of another kind.
    """
    reason = error.errno if isinstance(error, OSError) and error.errno else _quoted(error)
    return LimitReached(f"{doing}: {_advice(reason)}") if reason in LIMITS else None


@contextmanager
def within_limits(doing: str) -> Iterator[None]:
    """Turn a refused open file or refused memory into the package's error.

    Args:
        doing: what could not be done, for the message.

    Raises:
        LimitReached: see `limit_reached`.
    """
    try:
        yield
    except (OSError, MemoryError, ImportError) as error:
        if reached := limit_reached(error, doing):
            raise reached from error
        raise


def _quoted(error: BaseException) -> int | None:
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return errno.ENOMEM
    return next((reason for reason in LIMITS if os.strerror(reason) in str(error)), None)


def _advice(reason: int) -> str:
    if reason == errno.EMFILE:
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"this process has {most:,} files open, and may have no more: close some, or start it with a higher limit "
            f"(`ulimit -n {4 * most}`)"
        )
    if reason == errno.ENFILE:
        return "the machine has as many files open as it allows: close some, or allow more (`sysctl fs.file-max`)"
    most, there = _maps()
    if most and there > 0.99 * most:
        return (
            f"this process has {there:,} maps of memory and may have {most:,}: read fewer batches or sites with one open "
            f"store, or allow more (`sysctl -w vm.max_map_count={4 * most}`)"
        )
    return f"{_memory()} for it: ask for less, or allow this process more (`ulimit -v unlimited`)"


def _memory() -> str:
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return "the system has no more memory"
    return f"this process may map {most / 1e9:.2f} GB of memory, which are too few"


def check_process(opened_in: int) -> None:
    """Refuse to continue in a process that was forked from one that had opened a store.

    Args:
        opened_in: id of the process that opened the store.

    Raises:
        BadInput: this is another process.
    """
    if os.getpid() != opened_in:
        raise BadInput(
            f"process {opened_in} opened a store, and this process ({os.getpid()}) was forked from it: the threads of "
            "DuckDB and polars do not survive a fork; open the store in a fresh process "
            "(`multiprocessing.get_context('spawn')`), or read `Store.batches` in a DataLoader"
        )


def process_name() -> list[str | int]:
    """What tells this process from any other, of this machine or of another; [] if nothing does.

    Returns:
        The machine's start, the namespace of process ids, the id, and when the process began.
    """
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [started, os.stat("/proc/self/ns/pid").st_ino, os.getpid(), _began(os.getpid())]
    except (OSError, ValueError, IndexError):
        return []  # no Linux


def signature() -> str:
    """Who this process is, on one line, for whoever waits for its lease."""
    command = " ".join(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]).split())
    return f"process {os.getpid()} on {socket.gethostname()}: {command}"


def is_known_dead(name: list[str | int]) -> bool:
    """True if a process ran on this machine, and has ended; False if that cannot be known.

    Args:
        name: see process_name.
    """
    here = process_name()
    if not here or len(name) != len(here) or name[:2] != here[:2] or not isinstance(name[2], int):
        return False
    try:
        return _began(name[2]) != name[3]
    except FileNotFoundError:
        return True
    except (OSError, ValueError, IndexError):
        return False


def _began(process: int) -> int:
    """When a process began, in ticks after the machine's start; -1 if it ended, and lingers."""
    state, *about = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return -1 if state in "ZX" else int(about[18])


@cache
def _first_process() -> int:
    """Id of the process that first opened a store, in whatever way."""
    return os.getpid()


def refuse_forked() -> None:
    """Refuse to open a store, in whatever way, in a process forked from one that had opened one.

    A call of DuckDB or polars would wait there for ever.

    Raises:
        BadInput: this process was forked from one that had opened a store.
    """
    check_process(_first_process())


def finalize_here(owner: object, close: Callable[..., object], *args: Any) -> weakref.finalize[Any, Any]:
    """Call `close` when `owner` is freed, as weakref.finalize, but in this process only.

    A process forked later never calls `close`, and never frees what `close` holds.
    """
    return weakref.finalize(owner, _close_in, os.getpid(), close, args)


def _close_in(opened_in: int, close: Callable[..., object], args: tuple[Any, ...]) -> None:
    if os.getpid() == opened_in:
        close(*args)
    else:  # freeing a connection waits for its threads, which are not in this process: a segmentation fault
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(close))


@cache
def allowed_maps() -> int:
    """Memory maps that the system allows a process; 65,530 if it does not say."""
    with suppress(OSError, ValueError):
        return int(MAPS.read_text())
    return 65_530


def _maps() -> tuple[int, int]:
    """Numbers of memory maps: (allowed per process, in use); 0 if the system does not say."""
    with suppress(OSError, ValueError, MemoryError):
        return int(MAPS.read_text()), Path("/proc/self/maps").read_bytes().count(b"\n")
    return 0, 0
