"""Copies of a store, and of some of its runs: the same bytes, a valid log, and nothing where it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import actstore
from actstore.cli import main
from actstore.commits.log import manifests
from actstore.errors import BadInput, Damaged, NotStored
from actstore.store import Store
from actstore.upkeep.verify import verify
from tests.stores import CATALOG, TABLES, committed_files, fake, files
from tests.test_sequences import write


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one model over one dataset, of which the first brought the rows; another set of trees; and text."""
    root = tmp_path_factory.mktemp("copy") / "s.act"
    fake("first", "d").store(root)
    fake("second", "d", sites=("embed", "resid_post.0")).store(root)
    fake("other", "e", seed=3, weights=b"2").store(root)
    write(root)
    write(root, run="again", batches=(0, 2))
    return root


def test_a_whole_copy_has_the_same_bytes(root: Path, tmp_path: Path):
    before = files(root)
    done = actstore.copy(root, tmp_path / "copy.act")
    assert committed_files(done.out) == committed_files(root)
    assert verify(done.out).findings == []
    assert done.commits == len(manifests(root))
    assert files(root) == before
    with Store(root) as store, Store(done.out, check=True) as copied:
        assert copied.snapshot == store.snapshot
        for table in TABLES:
            assert copied.sql(f"from {table} order by all").equals(store.sql(f"from {table} order by all")), table


@pytest.mark.parametrize("runs", [["second"], ["other", "again"]])
def test_a_copy_of_some_runs_is_a_store_of_their_own(root: Path, tmp_path: Path, runs: list[str]):
    done = actstore.copy(root, tmp_path / "copy.act", runs)
    assert verify(done.out).findings == []
    with Store(root) as store, Store(done.out, check=True) as copied:
        assert copied.runs() == [run for run in store.runs() if run in runs]
        for run in runs:
            whole, part = store.of(run), copied.of(run)
            for table in TABLES:
                if table not in ("snapshot", "results", "relations", "vocabularies"):
                    held = "where sequence_id in (select sequence_id from sequences where document is null or document not in (3))"
                    order = f"from {table} {held * (table in ('tokens', 'listed_sequences'))} order by all"
                    assert part.sql(order).equals(whole.sql(order)), (run, table)
            for site in store.sites(run):
                ids = part.sql("select token_id from tokens order by token_id")
                assert (part.read(ids, run, site)[0] == whole.read(ids, run, site)[0]).all()
        if "again" in runs:
            documents = store.sql("from stories_documents order by all")
            assert copied.sql("from stories_documents order by all").equals(
                documents[[0, 1, 2, 4, 5]]
            )  # of its batches
        assert copied.sql("select count(distinct dataset) from datasets").item() == len(
            set(copied.sql("from runs")["dataset"])
        )
    of_others = {path for path in files(done.out) if path not in files(root)}
    assert not of_others


def test_a_copy_is_written_to_as_any_store(root: Path, tmp_path: Path):
    done = actstore.copy(root, tmp_path / "copy.act", ["second"])
    fake("first", "d").store(done.out)
    fake("new", "n", seed=9, weights=b"9").store(done.out)
    assert verify(done.out).findings == []
    with Store(root) as store, Store(done.out) as copied:
        query = "select token_id from tokens order by token_id"
        assert (copied.read(query, "first")[0] == store.read(query, "first")[0]).all()


def test_what_cannot_be_copied_leaves_nothing(root: Path, tmp_path: Path):
    def copy(out: Path, *runs: str) -> None:
        actstore.copy(tmp_path / "s.act", out, runs)

    actstore.copy(root, tmp_path / "s.act")
    with pytest.raises(BadInput, match="is a store already"):
        copy(tmp_path / "s.act")
    with pytest.raises(BadInput, match="lies in the store"):
        copy(tmp_path / "s.act" / "inside")
    with pytest.raises(NotStored, match="did you mean 'second'"):
        copy(tmp_path / "out.act", "secnd")
    shard = next((tmp_path / "s.act").glob("activations.zarr/second/**/c/1/*/*"))
    shard.chmod(0o644)
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Damaged, match="is not what was committed"):
        copy(tmp_path / "out.act", "second")
    shard.unlink()
    with pytest.raises(Damaged, match="is missing"):
        copy(tmp_path / "out.act")
    copy(tmp_path / "good.act", "first")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.act", "s.act"]


def test_what_was_dropped_is_not_copied(root: Path, tmp_path: Path):
    actstore.copy(root, tmp_path / "s.act")
    actstore.drop(tmp_path / "s.act", run="first")
    for name, runs in (("whole.act", ()), ("part.act", ["second"])):
        done = actstore.copy(tmp_path / "s.act", tmp_path / name, runs)
        assert verify(done.out).findings == []
        assert not list(done.out.glob("activations.zarr/first"))
        with Store(done.out, check=True) as copied, Store(root) as store:
            assert "first" not in copied.runs()
            rows = "from tokens where dataset = 'd' order by token_id"
            assert copied.of("second").sql(rows).equals(store.of("second").sql(rows)), "which `first` had brought"


def test_the_command_says_what_was_copied(root: Path, tmp_path: Path):
    done = CliRunner().invoke(main, ["copy", str(root), str(tmp_path / "out.act"), "--run", "other"])
    assert done.exit_code == 0, done.output
    assert "out.act: 3 commits" in done.output
    assert (tmp_path / "out.act" / CATALOG).exists()
