"""Merged stores: the same activations and rows, ids that never meet, sets held once, and nothing where it is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

import actstore
from actstore import verbs
from actstore.cli import main
from actstore.commits import log
from actstore.errors import BadInput, Damaged, NotStored
from actstore.ingest.corpus import corpus as corpora
from actstore.ingest.corpus.corpus import from_tokens
from actstore.ingest.corpus.tokens import Vocabulary
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.replay import compare
from actstore.ingest.trees.task import TreeSet
from actstore.storage import sealed, whole
from actstore.storage.local import Local
from actstore.store import Store
from actstore.upkeep.verify import verify
from actstore.writing.plan import RunPlan
from actstore.writing.writer import open_writer
from tests.damaged import TREES, damage, flip
from tests.stores import TABLES, committed_files, fake, files
from tests.test_advice import advised_commands
from tests.test_corpus_store import commit
from tests.test_old_stores import unpack
from tests.test_pipeline import small_model

UNTOLD = ("snapshot", "shards")  # tables of numbers of commits, and of what is compared by the activations
TOKENS, SEQUENCES = ("token_id", "first_token_id"), ("sequence_id", "tree_id", "first_tree_id", "first_sequence_id")


def corpus(root: Path, run: str, name: str = "texts", lengths: Sequence[int] = (3, 200, 4, 90)) -> None:
    """A run over sequences of token numbers: in rows, or in a grid if all have one length."""
    numbers = [[(7 * i + at) % 50 for at in range(n)] for i, n in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "IDS_PER_BATCH", 256)
        with from_tokens(numbers, Vocabulary(None, None, 50), n_ctx=256, name=name) as made:
            commit(root, made, run)


def results(root: Path, run: str, value: float = 0.5) -> None:
    with Store(root) as store:
        rows = {"run": run, "metric": "direction", "value": value, "direction": [[value] * 6], "name": f"{run}/embed/x"}
        store.record("mine", pl.DataFrame(rows))


def told(root: Path) -> dict[str, Any]:
    """All that a store tells, by sequence and position and not by id: the rows of every table, and every activation."""
    with Store(root, check=True) as store:
        datasets = store.sql("from datasets").to_dicts()
        spans = [(row["first_sequence_id"], row["n_sequences"], row["dataset"]) for row in datasets]
        sequence = {first + i: f"{name} {i}" for first, n, name in spans for i in range(n)}
        tokens = store.sql("select token_id, sequence_id, position from tokens").rows()
        token = {token_id: f"{sequence[of]} at {at}" for token_id, of, at in tokens}
        begins = {row["first_token_id"]: row["dataset"] for row in datasets}
        names = store.sql("from relations")["name"].to_list()
        found: dict[str, Any] = {}
        for table in {*TABLES, *names} - {*UNTOLD}:
            rows = store.sql(f"from {table}").drop("recorded", "snapshot", strict=False)
            places = {**token, **begins} if table == "datasets" else token
            for column in rows.columns:
                if column in TOKENS:
                    rows = rows.with_columns(pl.col(column).replace_strict(places, return_dtype=pl.String))
                elif column in SEQUENCES or (table, column) == ("trees", "variant_of"):
                    rows = rows.with_columns(pl.col(column).replace_strict(sequence, return_dtype=pl.String))
            found[table] = sorted(map(repr, rows.rows()))
        for run in store.runs():
            stored = store.of(run).sql(
                "select token_id from tokens join shards on run = $run and sequence_id between shards.first_tree_id and "
                "shards.first_tree_id + shards.n_trees - 1 group by all",
                {"run": run},
            )
            for site, lineage in store.sql(
                "select short, lineage from sites where run = $run", {"run": run}
            ).iter_rows():
                ids = stored["token_id"].to_list() if lineage is None else appended_ids(store, run)
                X, rows = store.read(ids, run, site)
                told_of = zip((token[at] for at in rows["token_id"]), X.reshape(len(X), -1).tolist(), strict=True)
                found[f"{run}/{site}"] = sorted(told_of)
    return found


def appended_ids(store: Store, run: str) -> list[int]:
    """The tokens whose activations these tests append: each sequence's first."""
    query = "select s.first_token_id from sequences s join runs using (dataset) where run = $run order by 1"
    return store.sql(query, {"run": run})["first_token_id"].to_list()


def append(root: Path, run: str, site: str = "mine") -> None:
    with Store(root) as store:
        ids = appended_ids(store, run)
        store.append(run, site, ids, np.arange(2.0 * len(ids)).reshape(-1, 2), {"by": "a test"})


def one(root: Path) -> Path:
    fake("first", "d", weights=b"1").store(root)
    corpus(root, "grid", "squares", [4] * 70)
    with Store(root) as store:
        of_tokens = store.sql("select token_id, position % 2 as y from tokens order by hash(token_id) limit 50")
        store.label("odd", of_tokens)
    results(root, "first")
    return root


def two(root: Path) -> Path:
    """The sets of `one` at other ids, a text, and all that can be brought to them."""
    fake("own", "e", seed=3, weights=b"2").store(root)
    corpus(root, "rows")
    fake("second", "d", weights=b"3", sites=("embed", "resid_post.1")).store(root)
    corpus(root, "grid", "squares", [4] * 70)
    append(root, "second")
    append(root, "rows")
    with Store(root) as store:
        long = store.sql("select sequence_id, n_tokens > 5 as y from sequences")
        store.label("long", long[:3], on="sequence_id")
    verbs.label(root, "long", long, "sequence_id", replace=True)
    results(root, "second", 0.25)
    return root


def three(root: Path) -> Path:
    corpus(root, "again")
    fake("first", "d", weights=b"1").store(root)
    append(root, "first")
    results(root, "first")
    return root


@pytest.fixture(scope="module", autouse=True)
def without_fsync():
    """No test here is of a power cut, and a merge waits for the disk once for each file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "sync", lambda descriptor, path: None)
        yield


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("to merge")
    return [one(folder / "1.act"), two(folder / "2.act"), three(folder / "3.act")]


@pytest.fixture
def copies(stores: list[Path], tmp_path: Path) -> list[Path]:
    """The same, to be changed."""
    return [Path(shutil.copytree(root, tmp_path / root.name)) for root in stores]


def together(*parts: dict[str, Any]) -> dict[str, Any]:
    """What stores tell, as one: what several tell is told once."""
    found: dict[str, Any] = {}
    for name, rows in [each for part in parts for each in part.items()]:
        found[name] = sorted({*map(repr, rows)} | {*found.get(name, [])})
    return found


def test_in_any_order_a_merged_store_tells_what_its_stores_told(stores: list[Path], tmp_path: Path) -> None:
    wanted, before = together(*map(told, stores)), [files(root) for root in stores]
    for number, order in enumerate((stores, stores[::-1])):
        done = actstore.merge(order, tmp_path / f"{number}.act")
        assert verify(done.out).findings == []
        got = told(done.out)
        assert together(got) == wanted
        assert {name: len(rows) for name, rows in got.items()} == {name: len(rows) for name, rows in wanted.items()}
        assert {"dataset d", "dataset texts", "dataset squares", "run first", "run grid"} <= {*done.shared}
    assert [files(root) for root in stores] == before
    nested = actstore.merge(
        [actstore.merge(stores[1:], tmp_path / "of two.act").out, stores[0]], tmp_path / "of all.act"
    )
    assert together(told(nested.out)) == wanted
    assert told(actstore.merge([nested.out, *stores], tmp_path / "again.act").out) == told(nested.out)


def test_however_runs_and_batches_are_spread_the_merged_store_is_the_same(tmp_path: Path) -> None:
    """Each store holds some batches of some runs, in some order; stores share sets, runs and batches."""
    sets = [("a", "d", 0), ("b", "d", 0), ("c", "e", 1), ("f", "e", 1)]
    runs = [fake(run, dataset, 4, 2, 3, of, run.encode(), ["embed"]) for run, dataset, of in sets]
    rng, roots = np.random.default_rng(0), [tmp_path / f"{number}.act" for number in range(3)]
    for root in roots:
        with open_writer(root, make=True) as writer:
            for number, batch in rng.integers(0, (len(runs), 2), (4, 2)).tolist():
                if batch not in writer.batches(runs[number].plan.run):
                    runs[number].write(writer, [batch])
    wanted = together(*map(told, roots))
    for order in (roots, roots[::-1]):
        out = actstore.merge(order, tmp_path / f"{order[0].stem} first.act").out
        assert verify(out).findings == []
        merged = told(out)
        assert together(merged) == wanted
        assert {name: len(rows) for name, rows in merged.items()} == {name: len(rows) for name, rows in wanted.items()}


def test_a_merge_writes_what_a_writer_would_have(stores: list[Path], tmp_path: Path) -> None:
    """Runs merged after others are, byte for byte, runs stored after others, manifests and all."""

    def more(root: Path) -> None:
        fake("more", "g", seed=5, weights=b"5", sites=("pattern.0", "embed")).store(root)
        corpus(root, "more-texts", "letters", [3, 200, 9])
        corpus(root, "more-squares", "ones", [1] * 9)

    more(tmp_path / "more.act")
    shutil.copytree(stores[0], tmp_path / "stored.act")
    more(tmp_path / "stored.act")
    done = actstore.merge([stores[0], tmp_path / "more.act"], tmp_path / "merged.act")
    assert committed_files(done.out) == committed_files(tmp_path / "stored.act")


def test_shards_are_the_same_files_on_one_disk_and_copies_elsewhere(
    stores: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = actstore.merge(stores[:2], tmp_path / "linked.act").out
    monkeypatch.setattr(Local, "shares", lambda self, source: False)
    copied = actstore.merge(stores[:2], tmp_path / "copied.act").out
    assert committed_files(linked) == committed_files(copied)
    shards = [shard.path for manifest in log.manifests(linked) for shard in manifest.shards]
    theirs = {path.stat().st_ino for root in stores[:2] for path in root.rglob("*") if path.is_file()}
    assert {(linked / path).stat().st_ino for path in shards} <= theirs
    assert not {(copied / path).stat().st_ino for path in shards} & theirs


def test_a_run_over_a_set_that_is_there_reads_its_ids(stores: list[Path], tmp_path: Path) -> None:
    out = actstore.merge(stores, tmp_path / "m.act").out
    with Store(out) as store, Store(stores[0]) as first, Store(stores[1]) as second:
        rows = "from trees where dataset = 'd' order by tree_id"
        assert store.sql(rows).equals(first.sql(rows)), "the first store keeps its ids"
        assert store.sql("select distinct first_tree_id from runs where dataset = 'd'").height == 1
        assert second.sql("select min(tree_id) from trees where dataset = 'd'").item() > 0
        ids = store.sql("select token_id from tokens where dataset = 'd' order by token_id")
        X, _ = store.read(ids, "second", "embed")
        theirs, _ = second.read("select token_id from tokens where dataset = 'd' order by token_id", "second", "embed")
        np.testing.assert_array_equal(X, theirs)
        spans = store.sql(
            "select first_token_id, n_ids, first_sequence_id, n_sequences from datasets order by all"
        ).rows()
        for (token, n_ids, sequence, n), (token_after, _, sequence_after, _) in pairwise(spans):
            assert token + n_ids <= token_after
            assert sequence + n <= sequence_after
        assert store.sql("select count(*), count(distinct token_id) from tokens").row(0)[0] == len(
            set(store.sql("select token_id from tokens")["token_id"])
        )


def conflicting(folder: Path) -> tuple[Path, Path]:
    """Two stores that hold something else under each name."""
    a, b = folder / "a.act", folder / "b store.act"
    for root, seed in ((a, 0), (b, 1)):
        with open_writer(root, make=True) as writer:
            fake("r", "d", seed=seed, weights=b"1").write(writer)
            fake("s", f"of-{seed}", seed=4, weights=str(seed).encode(), sites=()).write(writer)
        verbs.label(root, "l", pl.DataFrame({"token_id": [0, 1, 2], "y": [seed] * 3}))
        results(root, "r", seed)
    return a, b


def test_names_of_other_things_are_refused_and_the_command_that_is_named_works(tmp_path: Path) -> None:
    a, b = conflicting(tmp_path)
    wanted = told(b)
    before = {path.name for path in tmp_path.iterdir()}
    refused = CliRunner().invoke(main, ["merge", str(a), str(b), str(tmp_path / "m.act")])
    assert refused.exit_code == 2
    assert "holds another dataset 'd' than a store before it (seed 1, not 0)" in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} == before
    (command,) = advised_commands(refused.stderr)
    assert [command[at + 2 : at + 5] for at, word in enumerate(command) if word == "--rename"] == [
        ["dataset", "d", "d-2"],
        ["run", "r", "r-2"],
        ["run", "s", "s-2"],
        ["label", "l", "l_2"],
    ]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert verify(tmp_path / "m.act").findings == []
    with Store(tmp_path / "m.act", check=True) as store, Store(b) as theirs:
        assert store.runs() == ["r", "s", "r-2", "s-2"]
        ids = store.sql("select token_id from tokens where dataset = 'd-2' order by token_id")
        X, _ = store.read(ids, "r-2", "resid_post.0")
        query = "select token_id from tokens where dataset = 'd' order by token_id"
        np.testing.assert_array_equal(X, theirs.read(query, "r", "resid_post.0")[0])
        assert store.sql("select y, dataset from l_2 join tokens using (token_id)").rows() == [(1, "d-2")] * 3
        assert store.sql("select y, dataset from l join tokens using (token_id)").rows() == [(0, "d")] * 3
        assert store.sql("select distinct path like 'activations.zarr/' || run || '/%' from sites").rows() == [(True,)]
        directions = {
            name: store.sql("select probe_direction($n)::float[] as x", {"n": f"{name}/embed/x"})
            for name in ("r", "r-2")
        }
        assert [found.item()[0] for found in directions.values()] == [0, 1], "a direction's name follows its run"
    renamed = told(tmp_path / "m.act")
    assert [rows for _, rows in renamed["r-2/resid_post.0"]] == [rows for _, rows in wanted["r/resid_post.0"]]


@pytest.mark.parametrize(
    ("rename", "error", "said"),
    [
        (("b.act", "run", "nine", "x"), NotStored, "holds no run 'nine'"),
        (("c.act", "run", "r", "x"), BadInput, "name one of the stores"),
        (("b.act", "site", "r", "x"), BadInput, "run, dataset, label"),
        (("b.act", "run", "r", "a/b"), BadInput, "take another"),
        (("b.act", "run", "r", "s"), BadInput, "it holds one of that name"),
        (("b.act", "label", "l", "tokens"), BadInput, "a table or view of every store"),
        (("b.act", "label", "l", "L"), BadInput, "lower-case"),
    ],
)
def test_a_new_name_that_means_nothing_is_refused(alike: Path, rename: tuple[str, ...], error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        verbs.merge([alike / "a.act", alike / "b.act"], alike / "m.act", [(alike / rename[0], *rename[1:])])  # type: ignore[list-item]
    assert not (alike / "m.act").exists()


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two stores that hold the same."""
    folder = tmp_path_factory.mktemp("alike")
    fake("r", "d").store(folder / "a.act")
    fake("s", "d", weights=b"2").store(folder / "a.act")
    verbs.label(folder / "a.act", "l", pl.DataFrame({"token_id": [0], "y": [1]}))
    shutil.copytree(folder / "a.act", folder / "b.act")
    return folder


def test_a_table_of_documents_is_renamed_with_its_dataset(tmp_path: Path) -> None:
    from tests.test_sequences import write

    write(tmp_path / "a.act")
    with Store(tmp_path / "a.act") as store:
        store.label("tales", pl.DataFrame({"sequence_id": [0], "y": [1]}), on="sequence_id")
    write(tmp_path / "b.act", dataset="novels")
    rename = [(tmp_path / "b.act", "run", "text", "other")]
    stores = [tmp_path / "a.act", tmp_path / "b.act"]
    actstore.merge(stores, tmp_path / "m.act", rename)
    rename.append((tmp_path / "b.act", "dataset", "novels", "Tales-2"))
    out = actstore.merge(stores, tmp_path / "n.act", rename).out
    assert verify(out).findings == []
    with Store(out) as store:
        years = store.sql("select dataset, year from tales_2 join sequences using (sequence_id) order by sequence_id")
        assert years.rows() == [("Tales-2", 1900 + at) for at in range(6)]
    rename[-1] = (tmp_path / "b.act", "dataset", "novels", "Tales")  # whose table would be the label's
    with pytest.raises(BadInput, match="its table tales is that of label 'tales'"):
        actstore.merge(stores, tmp_path / "o.act", rename)


@pytest.mark.parametrize(
    ("of", "path"),
    [
        (0, "activations.zarr/first/*resid*/c/1/*/*"),
        (1, "activations.zarr/rows/*/c/0/*"),
        (0, "parts/tokens/d-000001.parquet"),
        (1, "parts/tokens/texts-000000.parquet"),
        (1, "parts/long/long-*.parquet"),
        (0, "activations.zarr/first/blocks.0.hook_resid_post/zarr.json"),
        (1, "activations.zarr/rows/blocks.0.hook_resid_post/zarr.json"),
        (1, "models/*.safetensors"),
    ],
)
def test_a_damaged_file_of_a_source_is_refused(to_damage: list[Path], tmp_path: Path, of: int, path: str) -> None:
    broken = sorted(to_damage[of].glob(path))[0]
    whole_content = broken.read_bytes()
    damage(broken, flip(broken.stat().st_size // 2))
    for change in (lambda: None, broken.unlink):
        change()
        with pytest.raises(Damaged, match=f"{broken.name}.* is missing, or is not what was committed"):
            actstore.merge(to_damage, tmp_path / "m.act")
        assert list(tmp_path.iterdir()) == []
    broken.write_bytes(whole_content)


@pytest.fixture(scope="module")
def to_damage(stores: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("to damage")
    return [Path(shutil.copytree(root, folder / root.name)) for root in stores[:2]]


def test_a_dataset_without_ids_is_damage(alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = RunPlan.dataset_row
    monkeypatch.setattr(RunPlan, "dataset_row", lambda self, first: {**row(self, first), "first_tree_id": None})
    with open_writer(tmp_path / "s.act", make=True) as writer:
        writer.define(fake("t", "t").plan)
    with pytest.raises(Damaged, match="dataset 't' without ids"):
        actstore.merge([alike / "a.act", tmp_path / "s.act"], tmp_path / "m.act")


def test_a_source_whose_log_was_edited_is_refused(alike: Path, tmp_path: Path) -> None:
    edited = Path(shutil.copytree(alike / "a.act", tmp_path / "edited.act"))
    path = max((edited / "log").glob("*.json"))
    body = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    body["parts"][0]["owner"] = "../../outside"
    path.unlink()
    path.write_text(json.dumps({**body, "checksum": sealed.checksum(body)}))
    with pytest.raises(Damaged, match="disagree, so one of them was edited"):
        actstore.merge([alike / "a.act", edited], tmp_path / "m.act")
    (edited / "catalog.duckdb").unlink()
    with pytest.raises(Damaged, match=f"{path.name}: it says that it commits labels"):
        actstore.merge([alike / "a.act", edited], tmp_path / "m.act")
    path.unlink()
    shutil.copy(alike / "a.act" / "catalog.duckdb", edited)
    with pytest.raises(Damaged, match="lacks manifest"):
        actstore.merge([alike / "a.act", edited], tmp_path / "m.act")
    assert [path.name for path in tmp_path.iterdir()] == ["edited.act"]


KILLED = """
import os, sys
from actstore.upkeep.merging import merge

def kill(done, total):
    if done > total / 2:
        os._exit(9)

merge(sys.argv[1:3], sys.argv[3], advance=kill)
"""


def test_a_merge_that_is_stopped_leaves_nothing_and_one_that_is_killed_no_store(
    stores: list[Path], tmp_path: Path
) -> None:
    from actstore.upkeep.merging import merge

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    out = tmp_path / "m.act"
    with pytest.raises(KeyboardInterrupt):
        merge(stores[:2], out, advance=stop)
    assert list(tmp_path.iterdir()) == []
    words = [sys.executable, "-c", KILLED, *map(str, stores[:2]), str(out)]
    assert (
        subprocess.run(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False).returncode == 9
    )
    assert not out.exists()
    assert merge(stores[:2], out).out == out
    assert [path.name for path in tmp_path.iterdir()] == ["m.act"]
    assert verify(out).findings == []


def test_what_was_dropped_is_not_merged(copies: list[Path], tmp_path: Path) -> None:
    first, second, third = copies
    for root in (first, third):
        verbs.drop(root, run="first")
    fake("new", "d", weights=b"9").store(first)
    verbs.drop(first, run="new")
    verbs.drop(third, run="again")
    verbs.drop(second, run="own")
    verbs.drop(second, label="long")
    verbs.drop(second, dataset="e")
    for number, order in enumerate((copies, copies[::-1])):
        out = actstore.merge(order, tmp_path / f"merged {number}.act").out
        assert verify(out).findings == []
        with Store(out, check=True) as store:
            assert {*store.runs()} == {"grid", "rows", "second"}
            assert {*store.sql("from datasets")["dataset"]} == {"d", "squares", "texts"}
            assert store.sql("select name from relations")["name"].to_list() == ["odd"]
            assert store.sql("select count(*) from trees").item() == 5
    fake("new", "d", weights=b"9").store(out)
    assert verify(out).findings == []


def test_ids_that_the_first_store_gave_are_not_given_again(tmp_path: Path) -> None:
    fake("r", "d").store(tmp_path / "a.act")
    fake("gone", "e", seed=1, weights=b"2").store(tmp_path / "a.act")
    verbs.drop(tmp_path / "a.act", run="gone")
    verbs.drop(tmp_path / "a.act", dataset="e")
    fake("s", "f", seed=2, weights=b"3").store(tmp_path / "b.act")
    out = actstore.merge([tmp_path / "a.act", tmp_path / "b.act"], tmp_path / "m.act").out
    with Store(out) as store:
        assert store.sql("select first_tree_id from datasets order by 1")["first_tree_id"].to_list() == [0, 10]


def test_appended_sites_of_one_name_and_other_numbers_are_refused(alike: Path, tmp_path: Path) -> None:
    stores = [Path(shutil.copytree(alike / "a.act", tmp_path / name)) for name in "pqr"]
    for store, value in zip(stores, (1, 2, 1), strict=True):
        verbs.append(store, "r", "mine", [0, 2], np.full((2, 3), value, np.float32))
    verbs.append(stores[2], "r", "more", [1], np.ones((1, 3), np.float32))
    with pytest.raises(BadInput, match=r"another run 'r' .*mine.* differs.*--rename .*q run r r-2"):
        actstore.merge(stores, tmp_path / "m.act")
    out = actstore.merge(stores, tmp_path / "m.act", [(stores[1], "run", "r", "r-2")]).out
    assert verify(out).findings == []
    with Store(out, check=True) as store:
        assert store.sites("r")[-2:] == ["mine", "more"]
        assert [store.read([2], run, "mine")[0][0, 0] for run in ("r", "r-2")] == [1, 2]


def test_results_keep_their_order_and_are_recorded_once(stores: list[Path], tmp_path: Path) -> None:
    copy = actstore.copy(stores[0], tmp_path / "copy.act").out
    results(copy, "first", 0.75)
    results(copy, "first", 0.5)
    out = actstore.merge([stores[0], copy, stores[1]], tmp_path / "m.act").out
    with Store(out) as store:
        rows = store.sql("select run, value, recorded, snapshot from results order by recorded").rows()
        assert [row[:2] for row in rows] == [("first", 0.5), ("first", 0.75), ("second", 0.25)]
        assert all(recorded == snapshot + 1 for *_, recorded, snapshot in rows)
        numbers = {manifest.number for manifest in log.manifests(out) if manifest.kind == "results"}
        assert {recorded for *_, recorded, _ in rows} == numbers


def test_what_cannot_be_merged_is_refused_in_one_line(stores: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="got 1 store"):
        actstore.merge(stores[:1], tmp_path / "m.act")
    with pytest.raises(BadInput, match="give a list"):
        actstore.merge(str(stores[0]), tmp_path / "m.act")
    with pytest.raises(NotStored):
        actstore.merge([stores[0], tmp_path / "none.act"], tmp_path / "m.act")
    with pytest.raises(BadInput, match="is a store already"):
        actstore.merge(stores[:2], stores[2])
    with pytest.raises(BadInput, match="lies in the store"):
        actstore.merge(stores[:2], stores[0] / "m.act")
    for root, config in ((tmp_path / "a.act", "{}"), (tmp_path / "b.act", '{"n": 1}')):
        fake(root.stem, root.stem, config=config).store(root)
    with pytest.raises(BadInput, match=r"another model under one hash, [0-9a-f]{12} \(config"):
        actstore.merge([tmp_path / "a.act", tmp_path / "b.act"], tmp_path / "m.act")
    assert not (tmp_path / "m.act").exists()


def test_weights_that_one_store_keeps_are_kept(tmp_path: Path) -> None:
    kept, referred = fake("kept", "d"), fake("referred", "e", seed=1)
    kept.store(tmp_path / "a.act")
    plan = referred.plan
    object.__setattr__(plan, "weights", b"")
    referred.store(tmp_path / "b.act")
    for order in permutations(["a.act", "b.act"]):
        out = actstore.merge([tmp_path / name for name in order], tmp_path / f"{order[0]} first").out
        assert verify(out).findings == []
        assert [path.read_bytes() for path in out.glob("models/*")] == [b"weights"]


def test_a_merged_store_is_computed_again_and_mended(damageable: Path, tmp_path: Path) -> None:
    """Drawn sets, variants and continuations, at other ids than they were stored with."""
    root = tmp_path / "other.act"
    sets = TreeSet("reproduction", 20, seed=2, n_nodes=6, name="other", trees_per_shard=16)
    execute(Ingest(root, small_model(), sets, sites=["embed"], run="other"))
    execute(Ingest(root, small_model(), TREES, sites=[], run="same-trees"))  # of which the other store has a variant
    out = actstore.merge([root, damageable], tmp_path / "m.act").out
    found = compare.compare(out, 8)
    assert {of.run for of in found} == {"other", "same-trees", "small", "small-swap_last", "small-dreams"}
    assert [of for of in found if not of.agrees] == []
    before, broken = committed_files(out), dict[str, bytes]()
    for pattern in (
        "parts/trees/d-swap_last-000001*",
        "activations.zarr/small/*embed/c/1/0/0",
        "activations.zarr/small/*/zarr.json",
    ):
        path = sorted(out.glob(pattern))[0]
        damage(path, flip(path.stat().st_size // 2))
        broken[path.relative_to(out).as_posix()] = path.read_bytes()
    (out / "catalog.duckdb").unlink()
    assert {*actstore.repair(out).mended} >= broken.keys()
    assert committed_files(out) == before
    assert verify(damageable).findings == [], "what is mended here is no file of a source"


def test_a_store_that_was_brought_up_to_date_is_merged(tmp_path: Path) -> None:
    old = unpack("format-1", tmp_path)
    with pytest.raises(actstore.TooOld, match="actstore repair"):
        actstore.merge([old, old], tmp_path / "m.act")
    actstore.repair(old)
    fake("new", "own", weights=b"9").store(tmp_path / "new.act")
    out = actstore.merge([tmp_path / "new.act", old], tmp_path / "m.act").out
    assert verify(out).findings == []
    wanted = together(told(old), told(tmp_path / "new.act"))
    assert together(told(out)) == wanted
