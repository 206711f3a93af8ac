"""A disk that is full, read-only or gone, and a writer that should be: an error that says so, and no committed byte lost."""

import errno
import os
import shutil
import subprocess
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import polars as pl
import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.commits import log
from actstore.errors import Busy, Damaged, NoRoom, Unsupported
from actstore.ingest.models import weights
from actstore.outputs import replacing
from actstore.storage import lease
from actstore.storage.local import Local
from actstore.store import Store
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
from tests.stores import committed_files, fake, files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole") / "s.act"
    fake().store(root)
    return committed_files(root)


def mount(*options):
    return subprocess.run(["mount", *map(str, options)], capture_output=True, check=False)


@contextmanager
def disk(folder, size):
    """A tmpfs of so many bytes; skips where none can be mounted."""
    folder.mkdir()
    if os.geteuid() or mount("-t", "tmpfs", "-o", f"size={size}", "none", folder).returncode:
        pytest.skip("only root can mount a tmpfs, and not everywhere")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("size", ["64k", "300k", "1m", "2m", "2500k"])
def test_a_disk_that_is_full_loses_nothing_and_goes_on_when_there_is_room(tmp_path, whole, size):
    with disk(tmp_path / "disk", size) as folder:
        root = folder / "s.act"
        with pytest.raises(NoRoom, match=f"no room for .*{folder}.*free some, then go on"):
            fake().store(root)
        if (root / "store.json").exists():
            with Store(root) as store:
                assert store.snapshot <= len(log.manifests(root))
            assert verify(root).damage == []
        assert mount("-o", "remount,size=64m", folder).returncode == 0
        fake().store(root)
        assert committed_files(root) == whole
        assert verify(root).findings == []


def test_a_read_only_disk_is_read_and_not_written(tmp_path, whole):
    with disk(tmp_path / "disk", "64m") as folder:
        root = folder / "s.act"
        fake().store(root, [0])
        before = files(root)
        assert mount("-o", "remount,ro", folder).returncode == 0
        with pytest.raises(OSError, match="Read-only file system") as caught:
            fake().store(root)
        assert caught.value.errno == errno.EROFS
        assert str(root) in str(caught.value.filename)
        with Store(root) as store:
            assert len(store.sql("from trees")) == 3
        assert verify(root).findings == []
        assert files(root) == before
        assert mount("-o", "remount,rw", folder).returncode == 0
        fake().store(root)
        assert committed_files(root) == whole


def moved(root):
    root.rename(root.with_name("elsewhere.act"))


def replaced(root):
    moved(root)
    fake(run="other").store(root)


@pytest.mark.parametrize("vanish", [shutil.rmtree, moved, replaced])
def test_a_store_that_vanishes_while_it_is_written_is_told_and_nothing_is_written_in_its_place(tmp_path, whole, vanish):
    root, run, there = tmp_path / "s.act", fake(), {}

    def write():
        with open_writer(root, make=True) as writer:
            first = writer.define(run.plan).sequence_id
            run.commit(writer, first, 0)
            vanish(root)
            there.update(files(root))
            run.commit(writer, first, 1)

    with pytest.raises(Damaged, match=r"s\.act was moved, removed or replaced while it was written; put it back"):
        write()
    assert files(root) == there
    if vanish is not shutil.rmtree:
        shutil.rmtree(root, ignore_errors=True)
        root.with_name("elsewhere.act").rename(root)
    run.store(root)
    assert committed_files(root) == whole


@pytest.fixture
def zombie(tmp_path, monkeypatch):
    """A writer that opened a store of one batch, and went on after another had taken its place; the lease is ignored."""
    root, run = tmp_path / "s.act", fake()
    run.store(root, [0])
    with monkeypatch.context() as patch:
        patch.setattr(lease.fcntl, "flock", lambda *lock: None)
        with open_writer(root) as writer:
            run.store(root)
            fake(run="q", weights=b"others").store(root)
            yield writer


def results():
    return pl.DataFrame({"study": ["depth"], "run": ["r"], "value": [1.0]})


@pytest.mark.parametrize(
    ("act", "is_denied"),
    [
        (lambda writer: fake().commit(writer, 0, 1), False),
        (lambda writer: fake(seed=7).commit(writer, 0, 1), True),
        (lambda writer: fake(run="z", weights=b"other weights").write(writer), True),
        (lambda writer: writer.record(results()), True),
        (lambda writer: writer.publish(), False),
    ],
    ids=["the same batch", "the same batch otherwise", "another run", "results", "the catalog"],
)
def test_a_zombie_that_ignores_the_lease_changes_no_committed_byte(zombie, act, is_denied):
    denied = pytest.raises(
        Damaged, match="exists with other content, and no commit names it: another writer is at work on this store"
    )
    before = committed_files(zombie.root)
    with denied if is_denied else nullcontext():
        act(zombie)
    after = committed_files(zombie.root)
    assert {path: after.get(path) for path in before} == before
    fake().store(zombie.root)  # the next writer
    assert verify(zombie.root).findings == []
    with Store(zombie.root) as store:
        assert store.runs() == ["r", "q"]
        assert len(store.sql("from trees")) == 5


def test_what_a_second_writer_swept_away_is_not_committed(tmp_path, monkeypatch):
    root, run = tmp_path / "s.act", fake()
    run.store(root, [0])
    commit = log.commit

    def swept(at, manifest):
        raise AssertionError("it was committed")

    with open_writer(root) as writer:
        publish = Local.publish

        def publish_and_lose(place, path, content):
            file = publish(place, path, content)
            if "/c/" in path:
                log.sweep(root, log.manifests(root))
            return file

        monkeypatch.setattr(Local, "publish", publish_and_lose)
        monkeypatch.setattr(log, "commit", swept)
        with pytest.raises(Damaged, match="is missing"):
            run.commit(writer, 0, 1)
        monkeypatch.setattr(Local, "publish", publish)
        monkeypatch.setattr(log, "commit", commit)
    run.store(root)
    assert verify(root).findings == []


def test_of_two_writers_at_once_one_is_told_who_the_other_is(tmp_path):
    root = tmp_path / "s.act"
    with open_writer(root, make=True), pytest.raises(Busy, match=f"written by process {os.getpid()} on "):
        fake().store(root)
    fake().store(root)


LACKING = {
    "hard links": ("os", "link", errno.EPERM),
    "locks (flock)": ("actstore.storage.lease.fcntl", "flock", errno.ENOLCK),
    "fsync": ("os", "fsync", errno.EINVAL),
}


@contextmanager
def lacking(monkeypatch, ability):
    """A file system that refuses what it is not able to do."""
    module, name, reason = LACKING[ability]

    def refuse(*asked, **options):
        raise OSError(reason, os.strerror(reason))

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{name}", refuse)
        yield


class Job:
    """An ingest as `actstore ingest` runs it, of a run without a model."""

    def __init__(self, root):
        self.root, self.plan, self.sequences, self.unit = root, fake().plan, SimpleNamespace(n_sequences=5), "trees"

    def announcement(self):
        return "a run"

    def kept(self):
        return "nothing was committed yet, and the same command starts over"


@pytest.mark.parametrize("ability", LACKING)
@pytest.mark.parametrize("is_there", [False, True])
def test_what_a_file_system_lacks_is_named_and_no_command_promised(tmp_path, monkeypatch, whole, ability, is_there):
    root = tmp_path / "s.act"
    if is_there:
        fake().store(root, [0])
    before = files(tmp_path)
    monkeypatch.setattr("actstore.ingest.jobs.prepare.prepare", lambda store, **options: Job(store))
    monkeypatch.setattr("actstore.ingest.jobs.local.execute", lambda job, advance: fake().store(job.root))
    with lacking(monkeypatch, ability):
        with pytest.raises(Unsupported, match="name a place on another file system"):
            fake().store(root)
        result = CliRunner().invoke(main, ["ingest", str(root)])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert f" has no {ability} " in result.stderr
    assert str(root) in result.stderr or str(tmp_path / ".s.act.new") in result.stderr or str(tmp_path) in result.stderr
    assert "same command" not in result.stderr
    if not is_there:
        assert list(tmp_path.iterdir()) == []
    assert {path: content for path, content in files(tmp_path).items() if path in before} == before
    fake().store(root)
    assert committed_files(root) == whole


def test_a_study_on_a_file_system_without_locks_answers_and_says_what_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake().store(root := tmp_path / "s.act")
    with lacking(monkeypatch, "locks (flock)"):
        result = CliRunner().invoke(main, ["study", str(root), "depth"])
        assert result.exit_code == 1
        assert "has no locks (flock)" in result.stderr
        assert "the answers are printed, and not recorded" in result.stderr
        assert result.stdout.startswith("goal ")
        assert CliRunner().invoke(main, ["study", str(root), "depth", "--no-record"]).exit_code == 0


def test_an_output_is_written_where_fsync_is_lacking(tmp_path, monkeypatch):
    fake().store(root := tmp_path / "s.act")
    with lacking(monkeypatch, "fsync"):
        result = CliRunner().invoke(main, ["sql", str(root), "select 1 as a", "--parquet", str(tmp_path / "x.parquet")])
    assert result.exit_code == 0, result.output
    assert pl.read_parquet(tmp_path / "x.parquet").item() == 1


def test_a_full_disk_that_polars_meets_is_one_of_ours(tmp_path):
    with pytest.raises(NoRoom, match=r"no room for .*x\.parquet: No space left on device; free some, then go on"):
        replacing(tmp_path / "x.parquet", lambda target: pl.DataFrame({"a": [1]}).write_parquet("/dev/full"))
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_under_a_model_is_one_of_ours(tmp_path, monkeypatch):
    def full(*asked, **how):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "write_whole", full)
    with pytest.raises(NoRoom, match=r"no room for .*mine\.safetensors"):
        weights.replace(tmp_path / "mine.safetensors", b"x")
