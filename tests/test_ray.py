"""A run by the workers of a Ray cluster ends with the bytes of a local one, whoever is killed."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from actstore import cluster
from actstore.arrays import staged
from actstore.arrays.address import Ids
from actstore.cli import main
from actstore.commits.manifest import Manifest
from actstore.errors import BadInput, LimitReached, Unreachable
from actstore.ingest.jobs import on_ray
from actstore.ingest.jobs.environment import environment
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.on_ray import Asked, Worker, anywhere, execute_on_ray
from actstore.ingest.models.load import load
from actstore.ingest.trees.task import TreeSet
from actstore.writing.writer import open_writer
from tests import ray_nodes
from tests.stores import files
from tests.test_pipeline import contents
from tests.test_staged import LateCopies

NAMESPACE = ("unshare", "-n", "-p", "-f", "--mount-proc", "--kill-child")


def why_no_namespace() -> str:
    """Why this machine gives no network namespace; "" if it does."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return "no `unshare` and `ip` here (Debian's util-linux and iproute2)"
    asked = subprocess.run([*NAMESPACE, "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    return asked.stderr.strip()


def defined(root: Path, model: object = None) -> Ingest:
    """Define a run over a set of small batches, of which none is stored."""
    job = Ingest(root, model or load("reproduction"), small_set(), "r", ray_nodes.SITES.split(","))  # type: ignore[arg-type]
    with open_writer(root, make=True) as writer:
        writer.define(job.plan)
    return job


def small_set() -> TreeSet:
    return TreeSet("reproduction", ray_nodes.N_TREES, name="d", trees_per_shard=ray_nodes.PER_SHARD)


def test_driver_worker_and_node_are_killed_and_the_store_ends_as_a_local_ingest_leaves_it(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed (make install)")
    if why := why_no_namespace():
        pytest.skip(f"two nodes need a network namespace with only `lo`, which takes root: {why}")
    defined(tmp_path / "ray.act")
    execute(defined(tmp_path / "local.act"))
    done = subprocess.run(
        [*NAMESPACE, sys.executable, "-m", "tests.ray_nodes", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    print(done.stdout)
    assert done.returncode == 0
    assert "worker killed" in done.stdout
    assert "node killed" in done.stdout
    assert "a second driver waits for the first" in done.stdout
    assert "refused: run 'r' is stored with weights_sha256" in done.stdout
    assert "probes are equal" in done.stdout
    assert "a worker into the bucket killed" in done.stdout
    assert "the bucket is equal" in done.stdout
    assert contents(tmp_path / "ray.act") == contents(tmp_path / "local.act")


@pytest.mark.parametrize("name", ["zarr", "weights_sha256", "threads"])
def test_a_worker_that_has_something_else_is_refused_before_it_computes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "s.act"
    job = defined(root, load("reproduction"))
    before = files(root)
    alike = environment(job)
    monkeypatch.setattr(on_ray, "environment", lambda job: environment(job) | {name: "other"})
    from actstore.commits.log import manifests

    options = {"model": "reproduction", "dataset": "d", "run": "r", "sites": ray_nodes.SITES}
    (first,) = manifests(root)
    asked = Asked(str(root), options, first.xxh3_128, None, None, [], alike)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=rf"the worker on {socket.gethostname()} has {name} other, and this process"):
        Worker(asked)
    monkeypatch.undo()
    with pytest.raises(BadInput, match="name a folder that all nodes share, or a bucket"):
        Worker(Asked(str(root), options, "0" * 32, None, None, [], alike))  # type: ignore[arg-type]
    assert files(root) == before


def test_paths_mean_the_same_on_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a")
    given = {"text": "notes.txt", "model": "reproduction", "trees": 3}
    assert anywhere(given) == given | {"text": str(tmp_path / "notes.txt")}


@pytest.mark.parametrize(
    ("options", "exit_code", "what"),
    [
        (("--engine", "dask"), 2, "got --engine dask; there are local, ray"),
        (("--workers", "2"), 2, "got --workers, which is of a cluster; add --engine ray"),
        (("--engine", "ray", "--workers", "0"), 2, "got --workers 0"),
        (("--engine", "ray", "--slice", "1/2"), 2, "got --slice and --engine ray"),
        (
            ("--engine", "ray", "--address", "ray://head:10001"),
            2,
            "got --address ray://head:10001; write auto, or HOST:PORT",
        ),
        (("--engine", "ray", "--address", "127.0.0.1:1"), 1, "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_what_is_no_cluster_is_one_line(tmp_path: Path, options: tuple[str, ...], exit_code: int, what: str) -> None:
    if "--address" in options:
        pytest.importorskip("ray", reason="ray is not installed (make install)")
    command = ("ingest", str(tmp_path / "s.act"), "--model", "reproduction", "--trees", "3", "--sites", "none")
    said = CliRunner().invoke(main, [*command, *options])
    assert (said.exit_code, said.stderr.count("\n")) == (exit_code, 1), said.output
    assert what in said.stderr
    assert not (tmp_path / "s.act").exists()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad request\r\n\r\n"])
def test_a_server_that_is_no_cluster_is_told_of_and_not_waited_for(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="ray is not installed (make install)")
    monkeypatch.setattr(cluster, "ANSWERS_WITHIN", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            asked, _ = server.accept()
            asked.sendall(answer)
            asked.recv(1)  # until the other side closes
            asked.close()

        Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(Unreachable, match=f"no Ray cluster answers at {address}"), cluster.connected(address):
            pass


def test_without_ray_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r"pip install 'actstore\[ray\]'"), cluster.connected(None):
        pass


class Nodes:
    """A cluster of which only the nodes are known."""

    def __init__(self, *cpus: int, gpus: tuple[int, ...] = ()) -> None:
        self.resources = [{"CPU": float(n)} for n in cpus]
        for of, n in zip(self.resources, gpus, strict=False):
            of["GPU"] = float(n)

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": of} for of in self.resources] + [
            {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        ]


def test_as_many_workers_start_as_nodes_have_room_for() -> None:
    nodes = Nodes(4, 3, 1)
    assert cluster.n_workers(nodes, None, 2, 100) == 3
    assert cluster.n_workers(nodes, None, 2, 2) == 2
    assert cluster.n_workers(nodes, 2, 2, 100) == 2
    for asked, threads in ((4, 2), (None, 8)):
        with pytest.raises(BadInput, match="ask for fewer"):
            cluster.n_workers(nodes, asked, threads, 100)
    assert cluster.n_processors(nodes) == 1


def test_workers_with_a_gpu_start_where_a_node_has_one() -> None:
    nodes = Nodes(8, 8, 1, gpus=(2, 0, 4))
    assert cluster.n_workers(nodes, None, 2, 100, n_gpus=1) == 2
    assert cluster.n_workers(nodes, None, 1, 100, n_gpus=1) == 3
    with pytest.raises(
        BadInput, match=r"4 workers of 2 threads and a GPU each, .* room for 2 \(3 nodes, 17 processors, 6 GPUs\)"
    ):
        cluster.n_workers(nodes, 4, 2, 100, n_gpus=1)
    with pytest.raises(BadInput, match=r"the cluster has no GPU \(2 nodes\)"):
        cluster.n_workers(Nodes(8, 8), None, 2, 100, n_gpus=1)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A driver whose model lies on its second GPU; gives what its workers are asked for."""
    asked = list[dict[str, Any]]()

    def spread(ray: object, make: partial[Worker], n: int, threads: int, tasks: list[object], *more: int) -> list[None]:
        asked.append({"device": make.args[0].options["device"], "n": n, "n_gpus": more[-1]})
        return []

    monkeypatch.setattr(Ingest, "device", torch.device("cuda:1"))
    monkeypatch.setattr(on_ray, "environment", lambda job: {"threads": 1})
    monkeypatch.setattr(cluster, "spread", spread)
    return asked


OPTIONS = {"model": "reproduction", "dataset": "d", "run": "r", "sites": ray_nodes.SITES}


def test_each_worker_of_a_run_on_a_gpu_has_one_which_is_its_first(
    tmp_path: Path, on_gpu: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = defined(tmp_path / "s.act")
    monkeypatch.setattr(cluster, "connected", lambda address: nullcontext(Nodes(64, 64, gpus=(1, 2))))
    execute_on_ray(job, OPTIONS | {"device": "cuda:1"})
    assert on_gpu == [{"device": "cuda", "n": 3, "n_gpus": 1}]


def test_a_cluster_without_gpus_is_told_of_and_not_waited_for(
    tmp_path: Path, on_gpu: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = defined(tmp_path / "s.act")
    monkeypatch.setattr(cluster, "connected", lambda address: nullcontext(Nodes(64)))
    with pytest.raises(BadInput, match="got --device cuda, and the cluster has no GPU"):
        execute_on_ray(job, OPTIONS | {"device": "cuda:1"})
    assert not on_gpu


def asked_of(job: Ingest) -> Asked:
    """What a worker of this process is asked for, of a run that is defined and not stored."""
    from actstore.commits.log import manifests

    (first,) = manifests(job.store)
    sites = [site.site for site in job.plan.sites]
    return Asked(str(job.store), OPTIONS, first.xxh3_128, Ids(0, 0), None, sites, environment(job))


def test_a_worker_packs_on_its_device_and_publishes_the_bytes_of_a_local_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(defined(tmp_path / "local.act"))
    job = defined(tmp_path / "s.act")
    monkeypatch.setitem(staged.STREAMS, "cpu", LateCopies)  # the CPU as a device whose copies come late
    monkeypatch.setattr(LateCopies, "started", 0)
    asked = asked_of(job)
    worker = Worker(asked)
    with open_writer(job.store) as writer:
        for number in range(job.n_batches):
            writer.commit_published(Manifest.from_json(worker.task(number, asked.sites, False), job.store))
    assert LateCopies.started
    assert contents(tmp_path / "s.act") == contents(tmp_path / "local.act")


@pytest.mark.parametrize("failing", ["buffer_sets", "run_batch"])
def test_a_worker_whose_gpu_lacks_memory_says_so_in_one_line(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_of(defined(tmp_path / "s.act"))

    def fails(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(on_ray, failing, fails)
    with pytest.raises(LimitReached, match="ran out of memory at 128 sequences per forward pass"):
        Worker(asked).task(0, asked.sites, False)


class OneWorker:
    """A cluster whose only worker does a task when its result is asked for, and tells errors as Ray does."""

    def __init__(self) -> None:
        self.exceptions = pytest.importorskip("ray.exceptions", reason="ray is not installed (make install)")
        self.task = self

    def remote(self, what: Any, *more: object) -> Any:
        if what is cluster._Worker:
            return self  # `.options(…).remote(make)` follows
        self.make = what
        return self

    def options(self, **options: object) -> OneWorker:
        return self

    def wait(self, running: list[object], num_returns: int) -> tuple[list[object]]:
        return (running,)

    def get(self, done: object) -> None:
        error = PermissionError(errno.EACCES, "Permission denied", "/there")
        raise self.exceptions.RayTaskError("task", "Traceback of a worker\n", error).as_instanceof_cause()

    def kill(self, worker: object) -> None:
        pass


def test_an_error_of_the_system_is_told_as_the_worker_met_it() -> None:
    with pytest.raises(PermissionError) as told:
        list(cluster.spread(OneWorker(), dict, 1, 1, [(0,)]))
    assert (told.value.strerror, told.value.filename) == ("Permission denied", "/there")
