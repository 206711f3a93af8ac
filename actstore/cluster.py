"""A Ray cluster: connecting to it, and handing it tasks whose workers may die.

Ray places, restarts and retries. A task is a method of an actor that gives the same bytes whoever
computes it, so that a task which is done twice changes nothing.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Any

from actstore.errors import ActstoreError, BadInput, Unreachable

ENGINES = ("local", "ray")
ANSWERS_WITHIN = 5.0  # seconds, for the head of a cluster
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # of gRPC, with no settings
SETTINGS = b"\x04"  # the type of a server's first frame, after three bytes of its length
HOW = {
    "threads": "set OMP_NUM_THREADS to one number for all",
    "cpu": "take processors of one kind",
}


def check_engine(engine: str | None, address: str | None, workers: int | None) -> bool:
    """Refuse options of an engine that have no meaning; True if the engine is Ray.

    Raises:
        BadInput: there is no such engine, or an option comes without Ray.
    """
    if engine not in (None, *ENGINES):
        raise BadInput(f"got --engine {engine}; there are {', '.join(ENGINES)}")
    for name, value in (("address", address), ("workers", workers)):
        if value is not None and engine != "ray":
            raise BadInput(f"got --{name}, which is of a cluster; add --engine ray, or leave it out")
    if workers is not None and workers < 1:
        raise BadInput(f"got --workers {workers}; a cluster takes 1 or more")
    return engine == "ray"


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages, by name, as this process has them."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def refuse_otherwise(who: str, here: Mapping[str, Any], whose: str, first: Mapping[str, Any], also: str = "") -> None:
    """Refuse a process that has something else than the first one.

    Args:
        who: the process, for the message.
        here: what the process has, by name.
        whose: the first process, for the message.
        first: what the first process has.
        also: what else can be done, for the message.

    Raises:
        BadInput: names the first difference.
    """
    for name, wanted in first.items():
        if here.get(name) != wanted:
            how = HOW.get(name, "use one environment for all")
            raise BadInput(
                f"{who} has {name} {here.get(name)}, and {whose} {wanted}, so that what they compute may differ: {how}{also}"
            )


def worker_here() -> str:
    """This process, as a worker, for a message."""
    return f"the worker on {socket.gethostname()}"


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to a cluster while the context lasts; gives the module `ray`.

    Args:
        address: `auto`, or HOST:PORT of the cluster's head; default: RAY_ADDRESS, or a cluster of
            this machine alone, which ends with the context. A process that is connected already
            stays so.

    Raises:
        BadInput: Ray is not installed, or the address has no meaning.
        Unreachable: there is no cluster at the address, or the cluster refuses this process.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise BadInput("--engine ray needs Ray, which is not installed: pip install 'actstore[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    _look_for(address)
    more: dict[str, Any] = {"num_cpus": os.cpu_count(), "include_dashboard": False} if address is None else {}
    try:
        ray.init(address or "local", logging_level=logging.ERROR, log_to_driver=False, **more)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError, AssertionError) as error:
        raise Unreachable(
            f"cannot connect to a Ray cluster at {address or 'this machine'} ({_first_line(error)}); run the command on a "
            "node of the cluster, with its version of Ray and Python and its token (RAY_AUTH_TOKEN)"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _look_for(address: str | None) -> None:
    """Look whether something answers at an address, since Ray would wait for it for a minute."""
    if address in (None, "auto", "local"):
        return
    host, colon, port = str(address).rpartition(":")
    if not colon or "/" in host or not port.isdecimal():
        raise BadInput(f"got --address {address}; write auto, or HOST:PORT of the cluster's head, and run it on a node")
    try:
        with socket.create_connection((host, int(port)), ANSWERS_WITHIN) as asked:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                asked.sendall(HELLO)
                if asked.recv(4)[3:] != SETTINGS:
                    raise ConnectionError("something else than Ray does")
    except (OSError, OverflowError) as error:
        raise Unreachable(
            f"no Ray cluster answers at {address} ({error}); start one (ray start --head), or name another (--address)"
        ) from error


def n_workers(ray: Any, asked: int | None, threads: int, n_tasks: int, n_gpus: int = 0) -> int:
    """How many workers to start.

    Args:
        asked: as many as the user wants; default: as many as the cluster has room for.
        threads: of each worker.
        n_tasks: more workers than tasks are not started.
        n_gpus: of each worker.

    Raises:
        BadInput: the cluster has no room for so many.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
    if sum(gpus) < n_gpus:
        raise BadInput(
            f"got --device cuda, and the cluster has no GPU ({len(nodes)} nodes): start Ray on nodes with GPUs (ray start "
            "--num-gpus N, where Ray does not find them by itself), or leave out --device"
        )
    rooms = [n // threads for n in cpus]
    room = sum(min(of_cpus, n // n_gpus) for of_cpus, n in zip(rooms, gpus, strict=True)) if n_gpus else sum(rooms)
    if room < (asked or 1):
        with_gpus = " and a GPU" if n_gpus else ""
        raise BadInput(
            f"got {asked or 1} workers of {threads} threads{with_gpus} each, and the cluster has room for {room} ({len(nodes)} "
            f"nodes, {sum(cpus)} processors, {sum(gpus)} GPUs): ask for fewer (--workers), or fewer threads (OMP_NUM_THREADS)"
        )
    return min(asked or room, n_tasks)


def n_processors(ray: Any) -> int:
    """Processors of the smallest node that has any, for workers that take a node each."""
    return min((int(node["Resources"].get("CPU", 0)) or 1 << 20 for node in ray.nodes() if node["Alive"]), default=1)


def spread(
    ray: Any,
    make: Callable[[], Any],
    n: int,
    threads: int,
    tasks: Iterable[tuple[Any, ...]],
    at_once: int = 1,
    n_gpus: int = 0,
) -> Iterator[tuple[int, Any]]:
    """Have workers do tasks; gives (number of a task, what came of it), in the order of ending.

    A worker that dies, alone or with its node, is started again by Ray, and its tasks are done
    again. Workers without a task are ended, which leaves room for those.

    Args:
        ray: see `connected`.
        make: the class of the workers with its arguments, as `partial(Worker, …)`; its method
            `task` does a task.
        n: how many workers.
        threads: of each worker.
        tasks: the arguments of each task.
        at_once: tasks that a worker has at a time, each in a thread of its own.
        n_gpus: of each worker.

    Raises:
        ActstoreError, OSError: as a task raised it.
        Unreachable: Ray gave up.
    """
    # retries without end: while a dead node still counts as alive, three are spent in seconds
    options = {"num_cpus": threads, "num_gpus": n_gpus, "max_restarts": -1, "max_task_retries": -1}
    actor = ray.remote(_Worker).options(max_concurrency=at_once, **options)
    waiting, running = deque(enumerate(tasks)), dict[Any, tuple[int, Any]]()
    workers = [actor.remote(make) for _ in range(n)]
    try:
        for worker in [*workers] * at_once:
            _hand(waiting, running, worker)
        while running:
            for done in ray.wait(list(running), num_returns=1)[0]:
                number, worker = running.pop(done)
                yield number, _result(ray, done)
                _hand(waiting, running, worker)
                if not any(of is worker for _, of in running.values()):
                    ray.kill(worker)
                    workers.remove(worker)
    finally:
        for worker in workers:
            with suppress(ray.exceptions.RayError):
                ray.kill(worker)


class _Worker:
    """Makes a worker where it is to work, and keeps what went wrong for whoever asks."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._error: ActstoreError | None = None
        try:
            self._worker = make()
        except ActstoreError as error:
            self._error = error

    def task(self, *asked: Any) -> Any:
        """Do a task."""
        if self._error:
            raise self._error
        return self._worker.task(*asked)


def _hand(waiting: deque[tuple[int, tuple[Any, ...]]], running: dict[Any, tuple[int, Any]], worker: Any) -> None:
    if waiting:
        number, task = waiting.popleft()
        running[worker.task.remote(*task)] = number, worker


def _result(ray: Any, done: Any) -> Any:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ActstoreError | OSError):  # of a folder that the worker's user may not write, say
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise Unreachable(f"Ray lost its workers ({_first_line(error)}); look at the cluster, then go on") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()[:300]
