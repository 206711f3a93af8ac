"""What is dropped is no row and no damage; its bytes are freed, its name is free, and its ids are not given again."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from actstore import verbs
from actstore.catalog import build, part_types, tables
from actstore.cli import main
from actstore.commits import checkpoint, log
from actstore.errors import BadInput, NotStored
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.dropping import plan
from actstore.writing.writer import open_writer
from tests.stores import Fake, fake, files


def none(*asked: object) -> dict[str, bytes]:
    raise AssertionError("nothing is to be computed again")


def two_runs(root: Path) -> tuple[Fake, Fake]:
    one, two = fake("one", "d"), fake("two", "d", weights=b"others")
    one.store(root)
    two.store(root)
    return one, two


def rows_of(root: Path, table: str, run: str) -> int:
    with Store(root) as store:
        return store.sql(f"select count(*) from {table} where run = $run", {"run": run}).item()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "s"


def test_a_dropped_run_is_in_no_table_and_missed_by_nobody(root: Path) -> None:
    _, two = two_runs(root)
    before = files(root)
    assert verbs.drop(root, run="one")
    with Store(root, check=True) as store:
        assert store.runs() == ["two"]
        for table in ("sites", "shards", "predictions", "outcomes"):
            assert store.sql(f"select count(*) from {table} where run = 'one'").item() == 0
        assert store.sql("select model from models")["model"].to_list() == ["two"]
        assert store.sql("select count(*) from trees").item() == 5
        X, rows = store.read("select token_id, tree_id, position from tokens", "two", "resid_post.0")
        assert np.array_equal(X, two.activations["blocks.0.hook_resid_post"][rows["tree_id"], rows["position"]])
    report = verify(root)
    assert not report.damage
    gone = {finding.path for finding in report.findings}
    assert gone == {path for path in before if "/one/" in path or Path(path).stem.startswith("one")} | {
        path for path in before if path.startswith(("models/", "parts/models/")) and path not in gone_not(before, "two")
    }
    assert repair(root, none).mended == []
    assert not gone & files(root).keys()
    assert not verify(root).findings


def gone_not(before: dict[str, bytes], run: str) -> set[str]:
    """Files of the one model that the run left is of."""
    sha = fake(run, "d", weights=b"others").plan.model["weights_sha256"]
    return {path for path in before if sha[:16] in path}


def test_the_name_of_a_dropped_run_is_free_and_holds_what_is_ingested_then(root: Path) -> None:
    two_runs(root)
    verbs.drop(root, run="one")
    again = fake("one", "d", weights=b"third")
    again.store(root)
    assert not verify(root).damage
    with Store(root, check=True) as store:
        X, rows = store.read("select token_id, tree_id, position from tokens", "one", "resid_post.0")
        assert np.array_equal(X, again.activations["blocks.0.hook_resid_post"][rows["tree_id"], rows["position"]])
    verbs.drop(root, run="one")
    assert rows_of(root, "shards", "one") == 0
    assert not verify(root).damage


def test_a_run_that_was_dropped_half_way_is_ingested_from_its_first_batch(root: Path) -> None:
    one = fake("one", "d")
    one.store(root, [0])
    verbs.drop(root, run="one")
    with open_writer(root) as writer:
        assert writer.batches("one") == set()
        one.write(writer)
    with Store(root) as store:
        assert store.sql("select count(*) from shards where run = 'one'").item() == 2 * len(one.plan.sites)


def test_a_model_stays_while_another_run_is_of_it(root: Path) -> None:
    fake("one", "d").store(root)
    fake("two", "e", seed=1).store(root)
    verbs.drop(root, run="one")
    with open_writer(root):
        pass
    with Store(root) as store:
        assert store.sql("select count(*) from models").item() == 1
    assert [path for path in files(root) if path.startswith("models/")]
    assert not verify(root).findings


def test_recorded_results_go_with_their_run(root: Path) -> None:
    two_runs(root)
    for run in ("one", "two"):
        with Store(root) as store:
            store.record("mine", pl.DataFrame({"metric": ["m"], "value": [1.0], "run": [run]}))
    verbs.drop(root, run="one")
    assert (rows_of(root, "results", "one"), rows_of(root, "results", "two")) == (0, 1)


def test_a_dataset_goes_only_after_its_runs_and_its_ids_are_never_given_again(root: Path) -> None:
    fake("zero", "first", seed=3).store(root)
    two_runs(root)
    with pytest.raises(BadInput, match="run one, run two; drop those first"):
        verbs.drop(root, dataset="d")
    for run in ("one", "two"):
        verbs.drop(root, run=run)
    verbs.drop(root, dataset="d")
    with Store(root) as store:
        assert store.sql("select dataset from datasets")["dataset"].to_list() == ["first"]
        assert store.sql("select count(*), max(tree_id) from tokens").row(0)[1] == 4
    fake("new", "d", seed=9).store(root)
    with Store(root) as store:
        assert store.sql("select first_tree_id from datasets where dataset = 'd'").item() == 10
    verbs.drop(root, run="new")
    verbs.drop(root, dataset="d")
    with open_writer(root) as writer:
        assert fake("last", "other", seed=5).write(writer) == 15


def test_a_dataset_that_labels_lie_on_is_dropped_after_them(root: Path) -> None:
    fake("zero", "first", seed=3).store(root)
    fake("one", "d").store(root)
    verbs.label(root, "before", {"token_id": [0, 4 * 256]})
    verbs.label(root, "across", {"token_id": [4 * 256, 5 * 256, 6 * 256]})
    verbs.label(root, "topics", {"sequence_id": [4, 9]}, "sequence_id")
    verbs.drop(root, run="one")
    with pytest.raises(BadInput, match=r"across \(2 rows\), topics \(1 rows\); drop them first") as refused:
        verbs.drop(root, dataset="d")
    commands = [shlex.split(command)[1:] for command in re.findall("`([^`]*)`", str(refused.value))]
    assert len(commands) == 2
    verbs.label(root, "across", {"token_id": [4 * 256]}, replace=True)
    assert CliRunner().invoke(main, [*commands[1], "--yes"]).exit_code == 0
    verbs.drop(root, dataset="d")
    with Store(root) as store:
        assert store.sql("select token_id from across semi join tokens using (token_id)").height == 1
        assert store.sql("select name from relations order by name")["name"].to_list() == ["across", "before"]
    assert not verify(root).damage


def test_a_catalog_built_anew_holds_no_dropped_rows(root: Path) -> None:
    two_runs(root)
    verbs.drop(root, run="one")
    with Store(root) as store:
        held = {table: store.sql(f"from {table} order by all") for table in part_types.tables() if table != "snapshot"}
    (root / tables.CATALOG).chmod(0o644)
    build.publish(root, from_nothing=True)
    with Store(root) as store:
        assert all(store.sql(f"from {table} order by all").equals(frame) for table, frame in held.items())
        assert store.snapshot == len(log.manifests(root))


def test_a_drop_that_no_catalog_holds_yet_is_in_the_catalog_before_a_byte_is_freed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_runs(root)
    dropped, _ = plan(root, "run", "one")
    with monkeypatch.context() as killed, open_writer(root) as writer:
        writer.drop(dropped)
        killed.setattr(writer, "publish", lambda: 0)  # as if the process had ended here
    assert Store(root).runs() == ["one", "two"]
    assert not verify(root).damage
    swept = log.sweep

    def sweep(root: Path, committed: list[object]) -> list[str]:
        assert Store(root).runs() == ["two"]
        return swept(root, committed)  # type: ignore[arg-type]

    monkeypatch.setattr(log, "sweep", sweep)
    with open_writer(root):
        pass
    assert not verify(root).findings


def test_a_checkpoint_knows_what_was_dropped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LEAST", 1)
    two_runs(root)
    verbs.drop(root, run="one")
    with open_writer(root):
        pass
    assert not verify(root).findings
    summed = checkpoint.parsed(checkpoint.content(root))
    assert summed
    assert [manifest.run for manifest in summed.definitions] == [
        None,
        "two",
    ]
    assert Store(root).runs() == ["two"]


def test_a_manifest_that_drops_what_nobody_brought_is_found(root: Path) -> None:
    fake("one", "d").store(root)
    with open_writer(root) as writer:
        dropped, _ = plan(root, "run", "one")
        dropped.files.append("parts/no.parquet")
        writer._published.files["parts/no.parquet"] = next(iter(writer._published.files.values()))
        writer.drop(dropped)
    assert "drops parts/no.parquet, which no commit before it brought" in verify(root).damage[0].what


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        ({"run": "onne"}, NotStored, "did you mean 'one'"),
        ({"dataset": "x"}, NotStored, "holds d"),
        ({"label": "x"}, NotStored, "holds no label"),
        ({}, BadInput, "give one"),
        ({"run": "one", "dataset": "d"}, BadInput, "give one"),
    ],
)
def test_what_cannot_be_dropped_is_said(root: Path, names: dict[str, str], error: type[Exception], said: str) -> None:
    fake("one", "d").store(root)
    with pytest.raises(error, match=said):
        verbs.drop(root, **names)


def test_the_command_asks_and_does_what_is_answered(root: Path) -> None:
    two_runs(root)
    asked = CliRunner().invoke(main, ["drop", str(root), "--run", "one"], input="n\n")
    assert asked.exit_code == 1
    assert "Drop run one" in asked.output
    assert Store(root).runs() == ["one", "two"]
    assert CliRunner().invoke(main, ["drop", str(root), "--run", "one", "--yes"]).exit_code == 0
    assert Store(root).runs() == ["two"]
