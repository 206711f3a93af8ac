"""Two nodes of Ray in a network namespace of their own, and a run whose driver, worker and node are killed.

Run as `unshare -n -p -f --mount-proc --kill-child python -m tests.ray_nodes FOLDER`: Ray would replace the address
127.0.0.1 by the machine's own in a namespace that has more than `lo`, and all its processes end with the namespace.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

N_TREES, PER_SHARD = 96, 4
SITES = "embed,resid_post.5"
DERIVED = {"catalog.duckdb", "catalog.json", "store.json"}
HEAD, SECOND, PORT = "127.0.0.1", "127.0.0.2", 6399  # not one of 10002 to 19999, which workers take
ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),  # or ~/.ray/auth_token would be made, and count for others
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_health_check_period_ms": "500",  # a dead node is noticed in a second, and not in 17
    "RAY_health_check_failure_threshold": "2",
    "RAY_health_check_initial_delay_ms": "0",
    "PYTHONPATH": str(Path(__file__).parents[1]),
}


def main(folder: Path) -> None:
    os.environ.update(ENV)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    where = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # the paths of Ray's sockets have 107 bytes at most
    from tests.bucket_server import server

    servers = ExitStack()
    try:
        os.environ.update(servers.enter_context(server(folder / "s3")))  # of every node
        began = time.monotonic()
        start(
            "--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={where}"
        )
        start(f"--address={HEAD}:{PORT}", f"--node-ip-address={SECOND}")
        said(f"two nodes after {time.monotonic() - began:.1f} s")
        in_a_bucket(folder)
        tested(folder)
    finally:
        servers.close()
        shutil.rmtree(where, ignore_errors=True)


def start(*options: str) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--disable-usage-stats", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def said(text: str) -> None:
    print(text, flush=True)


def processes(of: str, node: str = "") -> list[int]:
    """Ids of the processes whose command line holds some words."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if of in line and node in line and int(path.name) != os.getpid():
            found.append(int(path.name))
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def until(what: Callable[[], bool], seconds: float = 100) -> None:
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends, "it never came to that"
        time.sleep(0.005)


def in_a_bucket(folder: Path) -> None:
    """A run into a bucket, of which a worker is killed; its objects are the files of the local run."""
    from actstore import cluster
    from actstore.ingest.jobs.on_ray import execute_on_ray
    from actstore.ingest.jobs.prepare import prepare
    from actstore.storage.at import at
    from actstore.storage.backend import ENDLESS
    from tests.bucket_server import BUCKET
    from tests.test_pipeline import contents
    from tests.test_ray import defined

    root = defined(Path(f"s3://{BUCKET}/ray.act")).store
    options = {"model": "reproduction", "dataset": "d", "run": "r", "sites": SITES}
    calls = 0

    def advance(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            kill(processes("ray::_Worker")[:1])
            said(f"a worker into the bucket killed after {done} trees")

    began = time.monotonic()
    with cluster.connected(f"{HEAD}:{PORT}"):
        execute_on_ray(prepare(root, **options), options, f"{HEAD}:{PORT}", None, advance)
    there = {path: at(root).read(path, ENDLESS) for path in at(root).list("")}
    local = contents(folder / "local.act")
    equal = {path: there.get(path) for path in local} == local and there.keys() - local.keys() <= DERIVED
    said(f"the bucket is {'equal' if equal else 'otherwise'}, {time.monotonic() - began:.1f} s")


def tested(folder: Path) -> None:
    from actstore import cluster, verbs
    from actstore.errors import BadInput, Busy
    from actstore.ingest.jobs.on_ray import execute_on_ray
    from actstore.ingest.jobs.prepare import prepare
    from actstore.storage.at import at

    root, address = folder / "ray.act", f"{HEAD}:{PORT}"
    options = {"model": "reproduction", "dataset": "d", "run": "r", "sites": SITES}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "actstore", "ingest", str(root), *words, "--engine", "ray", "--address", address]
    job = prepare(root, **options, wait=0)
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        until(lambda: len(at(root).list("log/")) >= 4 or driver.poll() is not None)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL, "the driver ended by itself"
    before = len(at(root).list("log/"))
    said(f"driver killed after {before} commits, {time.monotonic() - began:.1f} s")
    with cluster.connected(address):
        with at(root).lease():
            try:
                execute_on_ray(job, options, address)
            except Busy:
                said("a second driver waits for the first")
        try:
            execute_on_ray(job, options | {"checkpoint": 1000}, address, 1)
        except BadInput as error:
            said(f"refused: {error}")
        calls = 0

        def advance(done: int, total: int) -> None:
            nonlocal calls
            calls += done > 0  # the first call says what was there before
            (node,) = processes("raylet/raylet", SECOND) or [0]
            if calls == 2:
                kill([pid for pid in processes("ray::_Worker") if parent(pid) == node])
                said(f"worker killed after {done} trees")
            if calls == 6:
                kill([node])
                said(f"node killed after {done} trees")

        began = time.monotonic()
        execute_on_ray(job, options, address, None, advance)
        said(f"whole after {time.monotonic() - began:.1f} s")
        began = time.monotonic()
        study = {"labels": "goal", "sites": SITES}
        here, there = (
            verbs.study(root, "probes", "r", options=study | engine, record=False)[0].answer
            for engine in ({}, {"engine": "ray", "address": address})
        )
        assert here
        assert there
        said(
            f"probes are {'equal' if here.results.equals(there.results) else 'otherwise'}, {time.monotonic() - began:.1f} s"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
