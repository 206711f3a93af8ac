"""What runs beside a model: threads that sleep while they wait, and memory that is used again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from actstore.catalog import build
from actstore.cli import main
from actstore.errors import BadInput
from actstore.ingest.jobs import job as jobs
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models import forward
from actstore.ingest.models.model import Model
from actstore.ingest.models.passes import side_by_side, twin
from actstore.ingest.trees.task import TreeSet
from actstore.storage.backend import File
from actstore.storage.local import Local
from actstore.storage.machine import n_processors, share_processors
from actstore.store import Store
from actstore.writing.writer import Writer
from tests.stores import files
from tests.test_pipeline import small_model

OURS = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}


@pytest.fixture
def n_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("asked", "said"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_torch_is_loaded_with_threads_that_sleep_unless_the_user_wants_others(
    tmp_path: Path, asked: str | None, said: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {"OMP_DISPLAY_ENV": "true", **({"OMP_WAIT_POLICY": asked} if asked else {})}
    words = [
        "ingest",
        str(tmp_path / "s.act"),
        "--model",
        "reproduction",
        "--device",
        "cuda:99",
    ]  # torch is asked for it
    done = subprocess.run([sys.executable, "-m", "actstore", *words], env=environment, capture_output=True, text=True)
    assert "cuda:99" in done.stderr
    if "OPENMP DISPLAY ENVIRONMENT BEGIN" not in done.stderr:
        pytest.skip("torch's OpenMP here does not show its settings")
    assert f"OMP_WAIT_POLICY = '{said}'" in done.stderr


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_setting_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for each in OURS:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "1")
    share_processors()
    assert {each: os.environ[each] for each in OURS & os.environ.keys()} == {name: "1"}


def test_threads_are_as_many_as_asked_for(tmp_path: Path, n_threads: None) -> None:
    torch.set_num_threads(3)
    words = ["ingest", str(tmp_path / "s.act"), "--model", "no-such-model", "--threads", "1"]
    assert "no model 'no-such-model'" in CliRunner().invoke(main, words).output
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("n", [0, -1, n_processors() + 1])
def test_more_threads_than_processors_are_refused_in_one_line(tmp_path: Path, n_threads: None, n: int) -> None:
    done = CliRunner().invoke(main, ["ingest", str(tmp_path / "s.act"), "--model", "reproduction", "--threads", str(n)])
    assert done.exit_code == BadInput.exit_code
    [line] = done.output.splitlines()
    assert line.startswith(f"actstore: got {n} threads; this process may run on {n_processors()} processors")
    assert not (tmp_path / "s.act").exists()


def test_the_last_batch_publishes_its_shards_several_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, by = Local.publish, dict[str, str]()

    def noted(self: Local, path: str, content: Any) -> File:
        by[path] = threading.current_thread().name.partition("_")[0]
        return publish(self, path, content)

    monkeypatch.setattr(Local, "publish", noted)
    trees = TreeSet("reproduction", 10, n_nodes=6, trees_per_shard=4)
    job = Ingest(tmp_path / "s.act", small_model(), trees, sites=["embed", "resid_post"])
    execute(job)
    for batch in range(3):
        shards = [f"{site.path(job.plan.run)}/{site.layout.shard_name(batch)}" for site in job.plan.sites]
        assert {by[shard] for shard in shards} == {"last" if batch == 2 else "commit"}


@pytest.fixture
def two_at_once(monkeypatch: pytest.MonkeyPatch, n_threads: None) -> None:
    """As in a command on two processors."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    torch.set_num_threads(2)


def stored(root: Path) -> dict[str, bytes]:
    """The files of a store that depend on nothing but its runs; the names of all others."""
    by_chance = ("catalog.duckdb", "catalog.json", "store.json")
    return {name: b"" if name in by_chance else content for name, content in files(root).items()}


def job(root: Path, **more: Any) -> Ingest:
    trees = TreeSet("reproduction", 22, n_nodes=6, trees_per_shard=10)
    return Ingest(root, small_model(), trees, sites=["embed", "resid_post"], batch_size=3, **more)


@pytest.mark.parametrize("more", [{}, {"dtype": "float16"}, {"asked": None}])
def test_two_passes_at_once_store_what_one_after_another_stores(
    tmp_path: Path, two_at_once: None, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    both, of = threading.Barrier(2, timeout=30), dict[int, set[int]]()

    def met(model: Model, ids: Any, specs: Any, take: Any, *rest: Any) -> Any:
        if len(ids) == 3 and ids.shape[1] == 23:  # of the 8 whole passes, two by two
            both.wait()
        of.setdefault(threading.get_ident(), set()).add(id(model.bridge))
        return forward.forward(model, ids, specs, take, *rest)

    monkeypatch.setattr(jobs, "forward", met)
    monkeypatch.setattr(jobs, "activations_of", partial(activations_after, met))
    execute(job(tmp_path / "two.act", **more))
    monkeypatch.undo()
    bridges = list(of.values())
    assert len(bridges) == 2
    assert bridges[0].isdisjoint(bridges[1])
    torch.set_num_threads(1)
    execute(job(tmp_path / "one.act", **more))
    assert stored(tmp_path / "two.act") == stored(tmp_path / "one.act")
    with Store(tmp_path / "two.act") as two, Store(tmp_path / "one.act") as one:
        assert two.snapshot == one.snapshot == 4
        for table in ("trees", "tokens", "predictions", "outcomes", "shards"):
            rows = f"from {table} order by all"
            assert two.sql(rows).equals(one.sql(rows))


def activations_after(met: Any, model: Model, ids: Any, specs: Any, take: Any) -> None:
    met(model, ids, [], None)
    forward.activations(model, ids, specs, take)


def test_a_twin_has_the_same_weights_and_no_hook_of_the_other(n_threads: None) -> None:
    model, fired = small_model(), list[str]()
    other = twin(model)
    assert all(
        ours is theirs for ours, theirs in zip(model.bridge.parameters(), other.bridge.parameters(), strict=True)
    )
    names = [site.name for site in model.hooks.listed()]
    ids = torch.zeros(2, 5, dtype=torch.long)
    hooks: Any = [(name, lambda x, hook: fired.append(hook.name)) for name in names]
    with model.bridge.hooks(fwd_hooks=hooks):
        other.bridge(ids)
    assert fired == []
    with other.bridge.hooks(fwd_hooks=hooks):
        other.bridge(ids)
    assert len(fired) == len(names)


def test_passes_run_one_after_another_where_threads_spin_or_hooks_are_set(
    two_at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    assert side_by_side(model) == 2
    with model.bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: None)]):
        assert side_by_side(model) == 1
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert side_by_side(model) == 1
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    torch.set_num_threads(1)
    assert side_by_side(model) == 1


@pytest.mark.parametrize("n_published", [0, 9, 17, 24, 30])
def test_stopped_while_two_passes_run_the_same_command_ends_with_the_same_bytes(
    tmp_path: Path, two_at_once: None, monkeypatch: pytest.MonkeyPatch, n_published: int
) -> None:
    publish, published = Local.publish, list[str]()

    def cut(self: Local, path: str, content: Any) -> File:
        published.append(path)
        if len(published) > n_published:
            raise KeyboardInterrupt
        return publish(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Local, "publish", cut)
        with pytest.raises(KeyboardInterrupt):
            execute(job(tmp_path / "cut.act"))
    execute(job(tmp_path / "cut.act"))
    torch.set_num_threads(1)
    execute(job(tmp_path / "one.act"))
    assert stored(tmp_path / "cut.act") == stored(tmp_path / "one.act")
    assert not [name for name in os.listdir(tmp_path / "cut.act") if name.endswith(".tmp")]


def test_where_no_store_can_be_made_the_passes_that_began_store_nothing(tmp_path: Path, two_at_once: None) -> None:
    (tmp_path / "s.act").mkdir()
    (tmp_path / "s.act" / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="is no actstore store"):
        execute(job(tmp_path / "s.act"))
    assert os.listdir(tmp_path / "s.act") == ["mine.txt"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("pass", "commit", "catalog"))]


def test_the_last_catalog_is_begun_before_the_last_commit_and_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert, commit, order = build._insert, Writer.commit_batch, list[str]()

    def noted(*args: Any, **more: Any) -> None:
        order.append("rows")
        insert(*args, **more)

    def waiting(self: Writer, plan: Any, batch: int, *rest: Any) -> None:
        while batch == 2 and order.count("rows") < 2:  # the empty catalog's, and those of the batches before
            time.sleep(0.01)
        commit(self, plan, batch, *rest)
        order.append(f"batch {batch}")

    monkeypatch.setattr(build, "_insert", noted)
    monkeypatch.setattr(Writer, "commit_batch", waiting)
    execute(job(tmp_path / "s.act"))
    assert order[-1] == "rows"
    assert order.index("batch 2") == len(order) - 2
    assert order.count("rows") == 3
    with Store(tmp_path / "s.act") as store:
        assert store.snapshot == 4
        assert store.sql("select count(*) from trees").item() == 22


KEEPS = """
import sys
from resource import RUSAGE_SELF, getrusage

import numpy as np
from click.testing import CliRunner

from actstore.cli import main

assert CliRunner().invoke(main, ["models", "list"]).exit_code == 0
for _ in range(2):
    before = getrusage(RUSAGE_SELF).ru_minflt
    held = [np.ones(1 << 20) for _ in range(12)]  # 100 MB in pieces of 8
    print(getrusage(RUSAGE_SELF).ru_minflt - before)
    del held
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries take no such setting")
@pytest.mark.parametrize("own", [{}, {"MALLOC_TRIM_THRESHOLD_": "100000"}])
def test_a_command_uses_freed_memory_again_unless_the_user_set_the_allocator(own: dict[str, str]) -> None:
    of_user = ("GLIBC_TUNABLES", "MALLOC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_user)}
    environment |= {"NUMPY_MADVISE_HUGEPAGE": "0", **own}  # small pages, as torch's, so that the first use counts
    done = subprocess.run([sys.executable, "-c", KEEPS], env=environment, capture_output=True, text=True, check=True)
    first, again = map(int, done.stdout.split())
    assert first > 20_000  # pages
    assert (again < 1000) == (not own)
