"""Store a run by the workers of a Ray cluster.

A worker makes the same job from the same arguments, computes the files of a batch, and publishes
them into the store itself. The driver alone holds the lease, and commits the batches in the order
of their numbers: the store ends as a local ingest leaves it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actstore import cluster
from actstore.arrays.address import Ids
from actstore.commits import log, pending
from actstore.commits.manifest import Manifest
from actstore.errors import BadInput
from actstore.ingest.jobs.batch import run_batch
from actstore.ingest.jobs.environment import environment
from actstore.ingest.jobs.gpu import buffer_sets, within_memory
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import Advance, Done
from actstore.ingest.jobs.prepare import prepare
from actstore.storage.at import absolute, at, check_room
from actstore.writing.committed import lacking
from actstore.writing.published import Published
from actstore.writing.writer import open_writer

FILES = ("model", "config", "text", "tokens", "trees_from", "tokenizer")  # arguments that may be paths
AT_ONCE = 2  # batches that a worker has: it computes one while it stores the one before


@dataclass(frozen=True)
class Asked:
    """What a worker has to know.

    Attributes:
        store: the store's address, from any folder.
        options: the arguments of `prepare`.
        defined: hash of the commit that defines the run.
        first: the first ids of the set.
        originals: see batch.Batch.
        sites: sites that some batch lacks, by TransformerLens' names.
        alike: see environment.
    """

    store: str
    options: Mapping[str, Any]
    defined: str
    first: Ids
    originals: int | None
    sites: Collection[str]
    alike: Mapping[str, Any]


def execute_on_ray(
    job: Ingest,
    options: Mapping[str, Any],
    address: str | None = None,
    workers: int | None = None,
    advance: Advance = lambda done, total: None,
) -> None:
    """Store what of a run is not stored yet, by the workers of a Ray cluster.

    Args:
        job: the job.
        options: the arguments of `prepare` that gave it; paths that they name are there on each
            node.
        address: see cluster.connected.
        workers: how many; default: as many as the cluster has room for. Each has as many threads
            as this process.
        advance: see `local.execute`.

    Raises:
        BadInput: Ray is not installed, or the cluster has too little room; a worker has other
            versions or weights, or does not see the store; see also `local.execute`.
        Unreachable: there is no cluster at the address.
        NoRoom, Busy: see `local.execute`.
    """
    import torch

    check_room(job.store, job.bytes_left(), f"run {job.plan.run!r}")
    with cluster.connected(address) as ray, open_writer(job.store, make=True, wait=job.wait) as writer:
        run = job.plan.run
        originals = job.originals(writer.rows_of("datasets"))
        first = writer.define(job.plan)
        held = writer.sites_of(run)
        left = lacking(job.plan, held)
        if not left:
            return
        defined = pending.definition(log.live(writer.committed), run)
        assert defined is not None
        threads, n_gpus = torch.get_num_threads(), int(job.device.type == "cuda")
        n = cluster.n_workers(ray, workers, threads, len(left), n_gpus)
        needed = {name for sites in left.values() for name in sites}
        where = str(absolute(job.store))
        given = anywhere(options) | {"device": job.device.type}  # Ray shows a worker its own GPU alone, as the first
        asked = Asked(where, given, defined.xxh3_128, first, originals, needed, environment(job))
        tasks = [(number, sites, number in held) for number, sites in left.items()]
        progress = Done(job, range(job.n_batches), left, advance)
        made, done, published = dict[int, Manifest](), 0, time.monotonic()
        for turn, content in cluster.spread(ray, partial(Worker, asked), n, threads, tasks, AT_ONCE, n_gpus):
            made[turn] = Manifest.from_json(content, job.store)
            progress.whole(tasks[turn][0])
            while done in made:  # in the order of a local ingest
                if time.monotonic() - published > job.publish_every:
                    writer.publish()
                    published = time.monotonic()
                writer.commit_published(made.pop(done))
                done += 1
        log.sweep(job.store, list(writer.committed))  # what killed workers left half-done


def anywhere(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `prepare` that mean the same in any working folder."""
    found = dict(options)
    for name in FILES:
        value = found.get(name)
        if isinstance(value, str | Path) and os.path.exists(value):
            found[name] = os.path.abspath(value)
    return found


class Worker:
    """Computes batches of a run and publishes them.

    Raises:
        BadInput: this process does not see the store, or has other versions or weights.
        LimitReached: the GPU has too little memory.
    """

    def __init__(self, asked: Asked) -> None:
        import torch

        torch.set_num_threads(int(asked.alike["threads"]))
        here = cluster.worker_here()
        self._asked, self._job = asked, prepare(asked.store, **asked.options)
        root, run = self._job.store, self._job.plan.run
        committed = log.manifests(root) if at(root).has("store.json") else []
        defined = pending.definition(log.live(committed), run)
        if defined is None or defined.xxh3_128 != asked.defined:
            raise BadInput(f"{here} does not see this store at {root}; name a folder that all nodes share, or a bucket")
        cluster.refuse_otherwise(here, environment(self._job), "this process", asked.alike)
        self._published = Published(root, committed)
        self._computing, self._free = threading.Lock(), queue.Queue[Any]()
        with within_memory(self._job):
            for buffers in buffer_sets(self._job, set(asked.sites), AT_ONCE):
                self._free.put(buffers)

    def task(self, number: int, sites: Collection[str], is_added: bool) -> bytes:
        """Publish a batch; gives the manifest that would commit it."""
        job = self._job.over(sites, grades=False) if is_added else self._job
        buffers = self._free.get()
        try:
            with self._computing, within_memory(job):
                batch = run_batch(job, number, self._asked.first, self._asked.originals, buffers)
                contents = [*(batch.shards() if is_added else batch.contents())]
            first, kind = batch.first.sequence_id, "site" if is_added else "batch"
            made = self._published.batch(job.plan, number, first, len(batch), contents, kind)  # type: ignore[arg-type]
            return made.to_json()
        finally:
            self._free.put(buffers)
