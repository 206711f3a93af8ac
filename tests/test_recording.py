"""Results on their way into a store that another process writes to: waited for, or kept and recorded later."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import polars as pl
import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.commits import log
from actstore.errors import BadInput, Busy
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.task import TreeSet
from actstore.queries import studies as answers
from actstore.queries import study as studies
from actstore.storage import lease
from actstore.store import Store
from actstore.writing import recording
from actstore.writing.writer import open_writer
from tests.answering import Answering, noise
from tests.stores import files
from tests.test_advice import advised_commands
from tests.test_pipeline import small_model

HOLD = """
import sys
from pathlib import Path
from actstore.storage.lease import lease
with lease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def writing(root):
    """Another process that writes to the store."""
    command = [sys.executable, "-c", HOLD, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trees = TreeSet("reproduction", 60, n_nodes=6, name="d")
    execute(Answering(tmp_path / "s.act", small_model(), trees, sites=[], says=noise, run="small"))
    return tmp_path / "s.act"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def recorded(root):
    with Store(root) as store:
        return store.sql("select * from results order by all")


COMMANDS = {"study": ["study", "s.act", "depth"], "report": ["report", "s.act", "out"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_store_that_is_being_written_is_said_before_anything_is_computed(root, monkeypatch, command):
    monkeypatch.setattr(studies, "ask", lambda *args, **options: pytest.fail("it was computed"))
    with writing(root) as process:
        result = run(*COMMANDS[command], "--wait", "0.2")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"being written by process {process.pid}" in result.stderr
    assert "--wait SECONDS" in result.stderr
    assert not (root.parent / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_recorded_waits_for_no_writer(root, command):
    with writing(root):
        result = run(*COMMANDS[command], "--no-record", "--wait", "0")
    assert result.exit_code == 0, result.output
    assert len(recorded(root)) == 0


MADE = {
    "study": lambda root: ["study", root, "depth"],
    "report": lambda root: ["report", root, "out"],
    "record": lambda root: ["record", root, kept_file(root)],
    "ingest": lambda root: ["ingest", root, "--model", "reproduction", "--trees", "5", "--sites", "none"],
    "repair": lambda root: ["repair", root],
}


def kept_file(root):
    with Store(root) as store:
        return recording._keep([studies.ask(store, "depth").results])


@pytest.mark.parametrize("command", MADE)
def test_a_writer_that_ends_soon_is_waited_for(root, command):
    arguments = MADE[command](root)
    with writing(root) as process:
        threading.Timer(0.5, process.stdin.close).start()
        result = run(*arguments, "--wait", "60")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", MADE)
def test_a_writer_that_does_not_end_is_waited_for_no_longer_than_told(root, command):
    arguments = MADE[command](root)
    with writing(root):
        started = time.monotonic()
        result = run(*arguments, "--wait", "0.3")
    assert result.exit_code == 1
    assert "is being written by process" in result.stderr
    assert "waited 0.3 s" in result.stderr
    assert time.monotonic() - started > 0.3


@contextmanager
def a_writer_comes_while_it_computes(monkeypatch, root):
    """Another process takes the store as soon as the first study is answered, and keeps it."""
    real, others = studies.ask, []

    def answer(*args, **options):
        found = real(*args, **options)
        if not others:
            others.append(writing(root))
            others[0].__enter__()
        return found

    monkeypatch.setattr(studies, "ask", answer)
    try:
        yield
    finally:
        others[0].__exit__(None, None, None)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_answer_that_cannot_be_recorded_is_printed_and_kept_and_the_advised_command_records_it(
    root, monkeypatch, command
):
    with a_writer_comes_while_it_computes(monkeypatch, root):
        result = run(*COMMANDS[command], "--wait", "0.2")
    assert result.exit_code == 1
    assert "is being written by" in result.stderr
    if command == "study":
        assert "whole path 95 %" in result.stdout
        assert "Run 'small' finds" in result.stdout
    else:
        assert "Run &#x27;small&#x27; finds" in (root.parent / "out" / "index.html").read_text()
    (advice,) = advised_commands(result.stderr)
    assert len(recorded(root)) == 0
    done = run(*advice)
    assert done.exit_code == 0, done.output
    found = recorded(root)
    monkeypatch.undo()
    monkeypatch.chdir(root.parent)
    assert run(*COMMANDS[command]).exit_code == 0
    again = recorded(root)
    mine = [name for name in found.columns if name not in ("recorded", "snapshot")]
    assert (
        again.filter(pl.col("recorded") > found["recorded"].max())
        .select(mine)
        .sort(mine[:6])
        .equals(found.select(mine).sort(mine[:6]))
    )
    assert found["recorded"].n_unique() == len(set(found["study"]))


def test_only_what_was_not_recorded_is_kept(root, monkeypatch):
    with Store(root) as store:
        results = [studies.ask(store, "depth", seed=seed).results for seed in (1, 2, 3)]
    real = log.commit

    def full(path, manifest, *previous):
        if manifest.number == first + 2:
            raise OSError(28, "No space left on device")
        return real(path, manifest, *previous)

    first = len(log.manifests(root))
    monkeypatch.setattr(log, "commit", full)
    kept = []
    with pytest.raises(OSError, match="no room"):
        recording.record(root, results, kept=kept.append)
    assert [frame["seed"][0] for file in kept for frame in recording.read_kept(file)] == [2, 3]
    assert recorded(root)["seed"].unique().to_list() == [1]


def test_ctrl_c_while_it_waits_to_record_keeps_the_answer(root, monkeypatch):
    with Store(root) as store:
        results = studies.ask(store, "depth").results
    monkeypatch.setattr(time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    kept = []
    with writing(root), pytest.raises(KeyboardInterrupt):
        recording.record(root, [results], 60, kept.append)
    (frame,) = recording.read_kept(kept[0])
    assert frame["value"].equals(results["value"])


def test_an_answer_is_recorded_though_nobody_reads_the_table(root):
    reading, to = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from actstore.cli import main; main()", "study", str(root), "depth"]
    done = subprocess.run(command, stdout=to, stderr=subprocess.PIPE, timeout=120, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert len(recorded(root)) > 0


def test_answers_are_kept_elsewhere_where_the_working_folder_is_a_store(root, monkeypatch):
    with Store(root) as store:
        results = studies.ask(store, "depth").results
    monkeypatch.chdir(root)
    before = files(root)
    file = recording._keep([results])
    assert file.is_absolute()
    assert len(recording.read_kept(file)) == 1
    assert files(root) == before
    file.unlink()


def test_what_a_store_that_cannot_be_written_answers_is_printed_and_kept(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(root)

    def read_only(*args, **options):
        raise OSError(30, "Read-only file system", str(root / ".lock"))

    with monkeypatch.context() as patched:
        patched.setattr(lease, "lease", read_only)
        answer = run("study", root, "depth", "--no-record")
        assert (answer.exit_code, answer.stderr) == (0, "")
        result = run("study", root, "depth")
    assert (result.exit_code, result.stdout) == (2, answer.stdout)
    first, kept, last = result.stderr.splitlines()
    assert first.endswith("cannot be written (Read-only file system): the answers are printed, and not recorded in it")
    assert "keeps the results" in kept
    assert last.endswith("is not recorded in it; with --no-record that is meant")
    assert files(root) == before
    (file,) = tmp_path.glob("results-*.parquet")
    assert run("record", root, file).exit_code == 0
    assert len(recorded(root)) > 0


@pytest.mark.parametrize("content", [b"", b"PAR1", b"text", None])
def test_what_is_no_file_of_results_is_refused(root, tmp_path, content):
    file = tmp_path / "x.parquet"
    if content is None:
        pl.DataFrame({"a": [1]}).write_parquet(file)
    else:
        file.write_bytes(content)
    for given in (file, tmp_path / "not there", tmp_path):
        result = run("record", root, given)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert len(recorded(root)) == 0


def test_results_of_another_store_are_refused(root, tmp_path):
    file = kept_file(root)
    execute(Ingest(tmp_path / "other.act", small_model(), TreeSet("reproduction", 5, n_nodes=6), sites=[], run="x"))
    result = run("record", tmp_path / "other.act", file)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "of run small" in result.stderr
    with pytest.raises(BadInput, match="of snapshot"):
        recording.check_belongs(root, recording.read_kept(file), ["small"], 1)


def test_a_number_that_is_none_waits_for_nothing(root):
    with writing(root), pytest.raises(Busy), open_writer(root, wait=float("nan")):
        pass


def test_a_warning_says_which_command_records_what_a_notebook_could_not(root):
    with Store(root) as store:
        answer = studies.ask(store, "depth")
        asked = SimpleNamespace(answer=answer, confirmation=None)
        with writing(root), pytest.warns(UserWarning, match="keeps what is not recorded") as told, pytest.raises(Busy):
            answers.record(store, [asked], wait=0)
    ((command,),) = [advised_commands(str(warning.message)) for warning in told]
    assert command[:2] == ["record", str(root)]
    assert recording.read_kept(root.parent / command[2])[0].equals(answer.results)
