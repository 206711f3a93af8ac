"""Slices of a run share nothing but the store: whichever end, overlap or die, the bytes are those of one local ingest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import actstore
from actstore.cli import main
from actstore.commits import log, pending
from actstore.errors import BadInput, Damaged
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.slices import Slice, execute_slice
from actstore.ingest.models.model import Model
from actstore.storage.at import at
from actstore.store import Store
from actstore.upkeep.verify import verify
from actstore.writing.slices import commit
from actstore.writing.writer import open_writer
from tests.stores import catalog_rows, files
from tests.test_objects import address
from tests.test_pipeline import contents, small_model, trees

N_TREES, N_BATCHES = 22, 6  # four trees a batch
COMMAND = """
import sys
from pathlib import Path
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.slices import Slice, execute_slice
from actstore.ingest.trees.task import TreeSet
from actstore.storage.local import Local
from tests.test_pipeline import small_model, trees
from tests.test_slices import SITES

publish, most = Local.publish, int(sys.argv[3])

def until(place, path, content):
    global most
    most -= "/c/" in path
    if most < 0:
        print("stands", flush=True)
        sys.stdin.read()
    return publish(place, path, content)

Local.publish = until
execute_slice(Ingest(Path(sys.argv[1]), small_model(), trees(22), sites=SITES), Slice.parse(sys.argv[2]))
"""
SITES = ["embed", "resid_post"]  # three arrays


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model()


@pytest.fixture(scope="module")
def local(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one local ingest leaves; not to be changed."""
    root = tmp_path_factory.mktemp("local") / "s.act"
    execute(Ingest(root, model, trees(N_TREES), sites=SITES))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "s.act"


def run(root: Path, model: Model, which: str, **more: Any) -> Any:
    return execute_slice(Ingest(root, model, trees(N_TREES), sites=SITES, **more), Slice.parse(which))


def data(root: Path) -> dict[str, bytes]:
    """Shards and parts."""
    return {path: content for path, content in files(root).items() if path.startswith(("activations", "parts"))}


def shards(root: Path) -> set[str]:
    return {path for path in files(root) if "/c/" in path}


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_last_slice_commits_and_leaves_byte_for_byte_what_a_local_ingest_leaves(
    root: Path, model: Model, local: Path
) -> None:
    left = [run(root, model, which).n_left for which in ("3/3", "1/3")]
    assert left == [4, 2]
    assert Ingest(root, model, trees(N_TREES), sites=SITES).left() == list(range(N_BATCHES))
    done = run(root, model, "2/3")
    assert (done.n_published, done.n_batches, done.n_left, done.is_committed) == (2, 2, 0, True)
    assert contents(root) == contents(local)  # with the log: no trace of the slices is left
    assert catalog_rows(root / "catalog.duckdb") == catalog_rows(local / "catalog.duckdb")
    assert verify(root).findings == []


def test_progress_counts_what_is_there_before_any_work_and_a_slice_its_own_batches(root: Path, model: Model) -> None:
    said: list[tuple[int, int]] = []
    job = Ingest(root, model, trees(N_TREES), sites=SITES, batch_size=2)
    assert execute_slice(job, Slice.parse("2/2"), lambda *done: said.append(done)).n_batches == 3
    assert (said[0], said[-1]) == ((0, 10), (10, 10))  # batches 1, 3 and 5, which has two trees
    said.clear()
    execute_slice(job, Slice.parse("2/2"), lambda *done: said.append(done))
    assert said == [(10, 10)]
    commit(root)
    said.clear()
    execute(job, lambda *done: said.append(done))
    assert said[0] == (10, 22), "what was there, before any work"
    assert said[-1] == (22, 22)
    steps = [after - before for (before, _), (after, _) in pairwise(said)]
    assert max(steps) <= 2, "nothing but what was computed"


def test_slices_that_overlap_or_run_twice_change_nothing(root: Path, model: Model, local: Path) -> None:
    published = [run(root, model, which).n_published for which in ("1/2", "1/2", "1/3", "2/5", "2/2", "1/1")]
    assert published == [3, 0, 1, 1, 1, 0]
    assert contents(root) == contents(local)


def killed(root: Path, which: str, after: int) -> None:
    """Run a slice in a process of its own, and kill it when it has published so many shards."""
    command = [sys.executable, "-c", COMMAND, str(root), which, str(after)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process,
        ExitStack() as end,
    ):
        end.callback(process.kill)
        assert process.stdout
        assert process.stdout.readline() == b"stands\n"
        process.send_signal(signal.SIGKILL)


def test_a_killed_slice_loses_only_its_batch_and_repair_frees_that_once_nobody_works(
    root: Path, model: Model, local: Path
) -> None:
    killed(root, "1/2", 5)  # one batch of three shards, and two shards of the next
    orphans = shards(root)
    assert len(orphans) == 5
    with open_writer(root) as writer:  # any writer sweeps
        assert not writer.batches("small")
    assert shards(root) == orphans
    assert verify(root).findings == []
    other = small_model()
    job = Ingest(root, other, trees(N_TREES), sites=SITES)
    defined = pending.definition(log.live(log.manifests(root)), "small")
    assert defined
    with pending.at_work(root, defined, str(job.plan.dataset["dataset"]), {}):
        assert actstore.repair(root).mended == []  # it takes the whole batch
        assert len(shards(root)) == 5
        (taken,) = commit(root)
        assert (taken.taken, taken.n_committed, taken.n_batches, len(taken.at_work)) == ([], 1, N_BATCHES, 1)
    actstore.repair(root)
    assert len(shards(root)) == 3
    assert not at(root).list("slices/")
    assert [run(root, model, which).n_published for which in ("2/2", "1/2")] == [3, 2]
    assert data(root) == data(local)


def test_what_is_whole_is_committed_and_read_though_a_batch_before_it_is_not(
    root: Path, model: Model, local: Path
) -> None:
    run(root, model, "2/3")
    said = invoke("commit", root)
    assert said.output.splitlines() == [
        f"{root}: run small: 2 batches committed, 2 of 6 in all; run the slices again for the others"
    ]
    assert invoke("commit", root).output == f"{root}: no slice published anything that is not committed\n"
    assert verify(root).findings == []
    with Store(root) as there, Store(local) as whole:
        query = "select token_id from tokens where tree_id between 4 and 7 or tree_id >= 16 and tree_id < 20"
        for site in whole.sites("small"):
            assert (there.read(query, site=site)[0] == whole.read(query, site=site)[0]).all()
        assert there.sql("select count(*) from trees").item() == 8
    execute(Ingest(root, model, trees(N_TREES), sites=SITES))  # a local ingest goes on from there
    assert data(root) == data(local)


def test_sites_are_added_to_a_finished_run_by_slices(root: Path, model: Model, tmp_path: Path) -> None:
    for store in (root, tmp_path / "other.act"):
        execute(Ingest(store, model, trees(N_TREES), sites=["embed"]))
    execute(Ingest(tmp_path / "other.act", model, trees(N_TREES), sites=SITES))
    assert [run(root, model, which).is_committed for which in ("1/2", "1/2", "2/2")] == [False, False, True]
    assert contents(root) == contents(tmp_path / "other.act")


def test_a_batch_of_which_a_file_is_gone_is_not_whole(root: Path, model: Model, local: Path) -> None:
    run(root, model, "1/2")
    (gone, *_) = sorted(shards(root))
    (root / gone).unlink()
    (taken,) = commit(root)
    assert taken.taken == [2, 4]
    run(root, model, "2/2")
    assert run(root, model, "1/2").is_committed
    assert data(root) == data(local)


def test_what_slices_of_a_dropped_run_published_is_never_committed(root: Path, model: Model) -> None:
    run(root, model, "1/2")
    actstore.drop(root, run="small")
    actstore.drop(root, dataset=trees(N_TREES).row()["dataset"])
    assert commit(root) == []
    assert not at(root).list("slices/")
    assert not shards(root)


def test_slices_of_another_definition_or_environment_are_refused(
    root: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, model, "1/2")
    before = files(root)
    with pytest.raises(BadInput, match="name the new run otherwise"):
        execute_slice(Ingest(root, model, trees(N_TREES + 1), sites=SITES), Slice(2, 2))
    with pytest.raises(BadInput, match="batch_size"):
        run(root, model, "2/2", batch_size=3)
    with pytest.raises(BadInput, match="weights_sha256"):
        run(root, small_model(seed=2), "2/2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(BadInput, match="slice 2/2 has threads 77, and the slices of run 'small' began with 1, so that"):
        run(root, model, "2/2")
    assert {path: content for path, content in files(root).items() if path in before} == before
    commit(root)  # as the message advises
    assert run(root, model, "2/2").is_committed


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "-1/2", "1/0"])
def test_what_is_no_slice_is_one_line(root: Path, text: str) -> None:
    said = invoke("ingest", root, "--model", "reproduction", "--slice", text)
    assert said.exit_code == 2
    assert f"got --slice {text}; write i/n" in said.stderr
    assert not root.exists()


def test_a_command_of_each_slice_stores_a_run(root: Path) -> None:
    command = ("ingest", root, "--model", "reproduction", "--trees", 3, "--sites", "none", "--slice")
    first = invoke(*command, "2/2")
    assert "0 of its 0 batches published now; 1 batches of the run are left to the other slices" in first.output
    assert "the run is whole, and committed" in invoke(*command, "1/2").output
    assert actstore.ingest(root, "reproduction", trees=3, sites="none", run="again", slice="1/1") == "again"
    with Store(root) as store:
        assert store.sql("select run, count(*) as n from outcomes group by all order by run").rows() == [
            ("again", 3),
            ("reproduction", 3),
        ]


OF_SEVERAL = {"--slice": "1/2", "--engine": "ray", "--address": "auto", "--workers": 2}


@pytest.mark.parametrize("option", OF_SEVERAL)
def test_edits_and_given_arrays_are_stored_by_one_process_alone(
    root: Path, option: str, model: Model, tmp_path: Path
) -> None:
    execute(Ingest(root, model, trees(2)))
    before = files(root)
    np.savez(tmp_path / "own.npz", token_id=np.arange(3), X=np.ones((3, 2), np.float32))
    edits = ("--base", "small", "--patch", "from tokens where position = 1", "--at", "embed", "--how", "zero")
    arrays = ("--from-arrays", tmp_path / "own.npz", "--run", "small", "--site", "own.0", "--lineage", "ones")
    for words in (edits, arrays):
        refused = invoke("ingest", root, *words, option, OF_SEVERAL[option])
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert f"got {words[0]} with {option}, and one process stores that alone; leave {option} out" in refused.stderr
        assert files(root) == before
    if option == "--slice":  # as the message says
        assert [invoke("ingest", root, *words).exit_code for words in (edits, arrays)] == [0, 0]


def test_a_slice_that_wrote_nothing_for_long_counts_as_dead(
    root: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, model, "1/2")
    defined = pending.definition(log.live(log.manifests(root)), "small")
    assert defined
    monkeypatch.setattr(pending, "process_name", lambda: ["another machine", 1, 2, 3])
    with pending.at_work(root, defined, "d", {}):
        (path,) = at(root).list("slices/small/at-work-")
        assert len(pending.working(root, "small")) == 1
        os.utime(root / path, (time.time() - 200,) * 2)
        assert pending.working(root, "small") == []
    (root / "slices/small/at-work-x.json").write_text("{}")
    with pytest.raises(Damaged, match="is not what a slice wrote; remove that file"):
        commit(root)


def test_slices_share_a_store_in_a_bucket(s3: dict[str, str], model: Model, local: Path) -> None:
    bucket = address("slices")
    assert not run(bucket, model, "2/2").is_committed
    with open_writer(bucket):
        pass  # sweeps nothing of the slice's
    assert pending.working(bucket, "small") == []
    assert run(bucket, model, "1/2").is_committed
    there = at(bucket)
    assert {path: there.read(path) for path in there.list("") if path.startswith(("activations", "parts"))} == data(
        local
    )
    assert not there.list("slices/")
