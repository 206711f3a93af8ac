"""What runs beside a model: threads that sleep while they wait, and memory that is used again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import BadInput
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.task import TreeSet
from actstore.storage.backend import File
from actstore.storage.local import Local
from actstore.storage.machine import n_processors, share_processors
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
