"""A store opened for writing: killed anywhere it ends with the same bytes, and a refusal changes none."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.commits import log
from actstore.commits.format import FORMAT_VERSION
from actstore.errors import ActstoreError, BadInput, Busy, Damaged, NotStored, TooNew
from actstore.named import NAME
from actstore.storage.lease import lease
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.writing.committed import committed_batches
from actstore.writing.create import create
from actstore.writing.plan import RunPlan
from actstore.writing.writer import Writer, open_writer
from tests.stores import Fake, catalog_rows, committed_files, fake, files, folders

SYSTEM_CALLS = ("mkdir", "open", "write", "fchmod", "fsync", "link", "unlink", "chmod", "replace", "rename")


class Killed(BaseException):
    """What stands in for SIGKILL: no handler of errors catches it."""


def killed_at(patch: pytest.MonkeyPatch, turn: int, act: Callable[[], object]) -> int:
    """Let the turn-th system call of an action, and all that follow, not happen; return how many it made."""
    made = 0

    def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal made
            made += 1
            if made >= turn:  # the dead clean nothing up
                raise Killed
            return real(*args, **options)

        return call

    with patch.context() as context:
        for name in SYSTEM_CALLS:
            context.setattr(os, name, mortal(getattr(os, name)))
        try:
            act()
        except Killed:
            assert made >= turn
    return made


@pytest.fixture(scope="module")
def run() -> Fake:
    return fake(n_trees=3, trees_per_shard=2, sites=("resid_post.0",))


@pytest.fixture(scope="module")
def whole(run: Fake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, stored without an interruption."""
    root = tmp_path_factory.mktemp("whole") / "s.act"
    run.store(root)
    return root


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("empty") / "s.act"
    create(root)
    return root


@pytest.fixture(scope="module")
def half(run: Fake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, with the first of its two batches."""
    root = tmp_path_factory.mktemp("half") / "s.act"
    run.store(root, [0])
    return root


def assert_same_store(root: Path, whole: Path) -> None:
    assert committed_files(root) == committed_files(whole)
    assert folders(root) == folders(whole)
    assert catalog_rows(root / "catalog.duckdb") == catalog_rows(whole / "catalog.duckdb")


N_CALLS = 265  # what the run makes on an empty store; asserted below
TURNS = [1, 2, 3, *range(4, N_CALLS, 19), N_CALLS]  # 19 meets each of the 8 calls of a publication in turn


@pytest.mark.parametrize("turn", TURNS)
def test_killed_anywhere_and_run_again_it_is_the_store_it_would_have_been(
    run: Fake, empty: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    root = tmp_path / "s.act"
    shutil.copytree(empty, root)
    killed_at(monkeypatch, turn, lambda: run.store(root))
    with Store(root) as store:  # at any time a reader sees a whole snapshot
        assert store.sql("select count(*) from tokens").item() in (0, run.lengths[:2].sum(), run.lengths.sum())
    run.store(root)
    assert_same_store(root, whole)


def test_the_turns_above_are_all_that_a_run_makes(run: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(tmp_path / "s.act")
    assert killed_at(monkeypatch, 10**9, lambda: run.store(tmp_path / "s.act")) == N_CALLS


def test_killed_again_and_again_it_still_arrives(
    run: Fake, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, turn = tmp_path / "s.act", 60
    create(root)
    while killed_at(monkeypatch, turn, lambda: run.store(root)) >= turn:
        turn += 15
    assert turn > 100
    assert_same_store(root, whole)


@pytest.mark.parametrize("turn", range(1, 60, 7))
def test_killed_while_a_store_is_made_nothing_blocks_the_next(
    run: Fake, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    root = tmp_path / "s.act"
    made = killed_at(monkeypatch, turn, lambda: create(root))
    assert root.exists() == (made < turn or (root / "store.json").exists()), "a store is there whole or not at all"
    create(root)
    assert [path.name for path in tmp_path.iterdir()] == ["s.act"]
    if turn % 14 == 1:
        run.store(root)
        assert_same_store(root, whole)


def test_a_run_is_stored_batch_by_batch_in_any_order(run: Fake, tmp_path: Path) -> None:
    root = tmp_path / "s.act"
    with pytest.raises(NotStored, match="does not exist"):
        committed_batches(root, "r")
    run.store(root, [1])
    assert committed_batches(root, "r") == {1}
    run.store(root, [0])
    assert committed_batches(root, "r") == {0, 1}
    assert committed_batches(root, "other") == set()
    with Store(root) as store:
        X, rows = store.read("select tree_id, position, token_id from tokens order by token_id")
    np.testing.assert_array_equal(X[:, :2], rows["tree_id", "position"].to_numpy())


# A full disk, an error, a Ctrl-C.


def test_an_error_while_writing_publishes_what_was_committed(run: Fake, tmp_path: Path) -> None:
    def interrupted() -> None:
        with open_writer(tmp_path / "s.act", make=True) as opened:
            run.write(opened, [0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with Store(tmp_path / "s.act") as store:
        assert (store.snapshot, store.sql("select count(*) from trees").item()) == (2, 2)


def test_after_a_failed_commit_the_same_writer_goes_on(
    run: Fake, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_writer(tmp_path / "s.act", make=True) as opened:
        for fails in ("write", "link", "fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(os, fails, lambda *_: exec("raise OSError(28, 'No space left on device')"))
                with pytest.raises(OSError, match="No space left"):
                    run.write(opened)
        run.write(opened)
    assert_same_store(tmp_path / "s.act", whole)


# Names taken.


def assert_refused(root: Path, other: Fake, said: str) -> None:
    before, before_folders = files(root), folders(root)
    with pytest.raises(BadInput, match=said) as caught:
        other.store(root)
    assert "\n" not in str(caught.value)
    assert files(root) == before
    assert folders(root) == before_folders


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"weights": b"others"},
            r"run 'r' is stored with weights_sha256 .*, not .*; name the new run otherwise \(--run\)",
        ),
        ({"dataset": "e"}, r"run 'r' is stored with dataset d, not e; name the new run otherwise"),
        ({"seed": 1}, r"dataset 'd' is stored with seed 0, not 1; name the new set otherwise \(--dataset\)"),
        ({"n_trees": 4}, r"dataset 'd' is stored with n_trees 3, not 4"),
        ({"n_nodes": 5}, r"dataset 'd' is stored with n_nodes 4, not 5"),
        ({"depths": [1, 2]}, r"dataset 'd' is stored with depths None, not \[1, 2\]"),
        ({"trees_per_shard": 1}, r"dataset 'd' is stored with trees_per_shard 2, not 1"),
        ({"config": '{"act_fn": "relu"}'}, r"the model of weights .* is stored with config {}, not"),
        ({"config": '{"act_fn": "relu"}', "run": "s"}, r"the model of weights .* is stored with config {}, not"),
        ({"run": "s", "seed": 1}, r"dataset 'd' is stored with seed 0, not 1"),
    ],
)
@pytest.mark.parametrize("state", ["half", "whole"])
def test_a_name_that_means_something_else_is_refused_and_nothing_is_touched(
    half: Path, whole: Path, tmp_path: Path, other: dict[str, Any], said: str, state: str
) -> None:
    shutil.copytree({"half": half, "whole": whole}[state], tmp_path / "s.act")
    wanted = {"n_trees": 3, "trees_per_shard": 2, "sites": ("resid_post.0",)} | other
    assert_refused(tmp_path / "s.act", fake(**wanted), said)


@pytest.mark.parametrize("sites", [("resid_post.1",), ("resid_post.0", "embed"), ()])
def test_a_run_that_is_not_finished_takes_no_other_sites(half: Path, tmp_path: Path, sites: tuple[str, ...]) -> None:
    shutil.copytree(half, tmp_path / "s.act")
    said = r"run 'r' is not finished: 1 of 2 batches are stored, with sites resid_post.0; .* --sites resid_post.0, then"
    assert_refused(tmp_path / "s.act", fake(n_trees=3, trees_per_shard=2, sites=sites), said)


def test_a_batch_committed_twice_must_be_the_same(run: Fake, tmp_path: Path) -> None:
    """Another version could draw other trees from the seed: their activations must not stand beside the tokens stored."""
    root = tmp_path / "s.act"
    run.store(root)
    before = committed_files(root)
    with open_writer(root) as opened:
        run.commit(opened, 0, 0)
    names = set(committed_files(root)) - set(before)
    assert names == {"log/00000004.json"}, "the very same batch brings no file"
    other = fake(n_trees=3, trees_per_shard=2, sites=("resid_post.0",), seed=9)
    as_if = replace(other, plan=replace(other.plan, dataset=run.plan.dataset, run="s"))
    with pytest.raises(
        BadInput, match=r"parts/trees/d-000000\.parquet is committed and what is to be stored .* now differs"
    ):
        as_if.store(root)
    assert committed_batches(root, "s") == set()
    with open_writer(root) as opened, pytest.raises(BadInput, match=r"c/0/0/0 is committed and .* differs"):
        replace(run, activations={site: values + 1 for site, values in run.activations.items()}).commit(opened, 0, 0)
    assert {path: committed_files(root)[path] for path in before} == before


def test_rows_that_do_not_fit_their_table_are_refused_before_they_are_committed(tmp_path: Path) -> None:
    """A part that the catalog cannot take would keep every later commit out of it."""
    root = tmp_path / "s.act"
    create(root)
    before = files(root)
    for wrong, said in (
        ({"value": ["high"]}, "the rows do not fit table results: conversion from `str` to `f64` failed"),
        ({"seed": [2**63]}, "the rows do not fit table results: conversion from .* failed"),
        ({"colour": ["red"]}, "table results has no column colour; it has study, recorded, run"),
    ):
        with open_writer(root) as opened, pytest.raises(BadInput, match=said):
            opened.record(pl.DataFrame({"study": ["s"], **wrong}))
    assert files(root) == before


def test_a_study_is_recorded_with_the_number_of_its_commit(run: Fake, tmp_path: Path) -> None:
    run.store(tmp_path / "s.act")
    with open_writer(tmp_path / "s.act") as opened:
        assert opened.record(pl.DataFrame({"study": ["s", "s"], "value": [0.5, 1]})) == 4
        assert opened.record(pl.DataFrame({"study": ["t"], "value": [0.25]})) == 5
    with Store(tmp_path / "s.act") as store:
        rows = store.sql("select study, recorded, value, low from results").rows()
    assert rows == [("s", 4, 0.5, None), ("s", 4, 1.0, None), ("t", 5, 0.25, None)]


# Several runs.


def test_two_runs_over_one_set_share_its_trees_and_another_set_has_others(tmp_path: Path) -> None:
    root = tmp_path / "s.act"
    one, two = fake("one"), fake("two", weights=b"other", sites=("embed", "resid_post.0"))
    three = fake("three", "e", n_nodes=6, seed=3, sites=("resid_post.0",))
    for run in (one, two, three):
        run.store(root)
    with Store(root) as store:
        assert store.runs() == ["one", "two", "three"]
        assert store.sites("two") == ["embed", "resid_post.0"]
        assert store.sql("select first_tree_id from runs").rows() == [(0,), (0,), (5,)]
        assert store.sql("select tree_id, dataset from trees").rows() == [(i, "d" if i < 5 else "e") for i in range(10)]
        assert store.sql("select count(*), count(distinct token_id) from tokens").row(0) == (
            *[int(one.lengths.sum() + three.lengths.sum())] * 2,
        )
        assert store.sql("select model from models").rows() == [("one",), ("two",)], "three has the weights of one"
        for run, first in ((one, 0), (two, 0), (three, 5)):
            X, rows = store.read(
                "select token_id, tree_id, position from tokens where dataset = $d",
                run=run.plan.run,
                params={"d": run.plan.dataset["dataset"]},
            )
            expected = run.activations["blocks.0.hook_resid_post"]
            np.testing.assert_array_equal(X, expected[rows["tree_id"] - first, rows["position"]])
        assert len(store.read("select token_id from tokens", run="three")[0]) == three.lengths.sum(), "of its own trees"
        with pytest.raises(NotStored, match="of no tree of this run"):
            store.read("select token_id from main.tokens", run="three")
        with pytest.raises(BadInput, match=r"which run\? .* holds one, two, three"):
            store.read("select token_id from tokens")


# Names.


def named(run: str = "r", dataset: str = "d") -> RunPlan:
    return RunPlan(run, {"weights_sha256": "0"}, b"", {"dataset": dataset}, [], {})


BAD_NAMES = [
    *("", ".", "..", "a/b", "/", "a\\b", "x\ny", "x\n", "'", '"', " ", "a b", "é", "🌳", "-x", ".x", "zarr.json"),
    *("a\0", "*", "?", "[x]", "$x", "~", "a" * 101, "a;b", "a:b"),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_name_no_folder_is_refused(name: str) -> None:
    for names in ({"run": name}, {"dataset": name}):
        with pytest.raises(BadInput, match=f"got the name {re.escape(repr(name))}"):
            named(**names)


@given(st.text() | st.from_regex(NAME, fullmatch=True))
def test_every_name_that_is_taken_is_one_plain_folder(name: str) -> None:
    try:
        named(run=name)
    except BadInput:
        return
    assert Path(name).name == name
    assert name not in (".", "..")
    assert name.isascii()
    assert name.isprintable()
    assert not set(name) & set("/\\'\"*?[]{}$~ ")


# Making and opening.


@pytest.mark.parametrize("what", ["a file in it", "a file", "a link to nowhere", "a link to a folder"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path, what: str) -> None:
    root = tmp_path / "s.act"
    if what == "a file in it":
        root.mkdir()
        (root / "thesis.tex").write_text("mine")
    elif what == "a file":
        root.write_text("mine")
    else:
        if what == "a link to a folder":
            (tmp_path / "there").mkdir()
        root.symlink_to(tmp_path / "there")
    before = files(tmp_path), folders(tmp_path)
    for make in (lambda: create(root), lambda: fake().store(root)):
        with pytest.raises(BadInput, match="exists and is no actstore store; name a new folder"):
            make()
    assert (files(tmp_path), folders(tmp_path)) == before


def test_a_store_is_not_made_of_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for root in (Path("."), Path("../here"), tmp_path / "here"):
        with pytest.raises(BadInput, match="a store is a folder of its own"):
            create(root)
    assert folders(tmp_path) == {"here"}
    create(Path("s.act"))
    create(Path("../here/t.act"))
    assert sorted(path.name for path in Path().iterdir()) == ["s.act", "t.act"]


def test_an_empty_folder_becomes_a_store_and_a_store_stays_as_it_is(run: Fake, tmp_path: Path) -> None:
    root = tmp_path / "s.act"
    root.mkdir()
    create(root)
    run.store(root)
    before = files(root)
    create(root)
    with open_writer(root, make=True):
        pass
    assert files(root) == before


def test_what_a_killed_maker_left_is_not_taken_over(tmp_path: Path) -> None:
    root, left = tmp_path / "s.act", tmp_path / ".s.act.new"
    for name in ("store.json", "parts/trees/x.parquet", ".catalog.duckdb.1.tmp"):
        (left / name).parent.mkdir(parents=True, exist_ok=True)
        (left / name).write_text("left of an earlier day")
    create(root)
    assert set(files(tmp_path)) == {
        f"s.act/{name}" for name in ("store.json", "catalog.duckdb", "catalog.json", "activations.zarr/zarr.json")
    }
    assert json.loads((root / "store.json").read_text())["format"] == FORMAT_VERSION


def test_two_that_make_the_same_store_do_not_mix(tmp_path: Path) -> None:
    root = tmp_path / "s.act"
    (tmp_path / ".s.act.new").mkdir()
    with lease(tmp_path / ".s.act.new"), pytest.raises(Busy, match=f"by process {os.getpid()}"):
        create(root)
    assert not root.exists()
    create(root)
    assert [path.name for path in tmp_path.iterdir()] == ["s.act"]


def test_only_one_at_a_time_holds_a_store_for_writing_and_readers_do_not_mind(run: Fake, whole: Path) -> None:
    before = files(whole)
    with open_writer(whole):
        for second in (lambda: run.store(whole), lambda: repair(whole, lambda *of: {})):
            with pytest.raises(Busy, match=f"by process {os.getpid()}"):
                second()
        with Store(whole) as store:
            assert store.runs() == ["r"]
    assert files(whole) == before


def test_a_path_where_no_store_can_be_made_gets_no_command_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for taken in (tmp_path, tmp_path / "file", tmp_path / "gone"):
        with pytest.raises(NotStored, match="name the folder of a store, or a new folder to make one"):
            Store(taken)
        with pytest.raises(BadInput):
            open_writer(taken, make=True).__enter__()
    for free in (tmp_path / "empty", tmp_path / "new"):
        with pytest.raises(NotStored, match="make one with"):
            Store(free)
        with open_writer(free, make=True):
            pass


OPENINGS: dict[str, Callable[[Path], object]] = {
    "Store": lambda root: Store(root).close(),
    "open_writer": lambda root: open_writer(root).__enter__(),
    "committed_batches": lambda root: committed_batches(root, "r"),
}


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize(
    ("about", "error", "said"),
    [
        (None, NotStored, r"\(it has no store.json\), and holds the rest of a store: restore that file from a copy"),
        (
            '{"format": 4, "made_by": "actstore 9.1"}',
            TooNew,
            r"has format 4, made by actstore 9.1; this version reads format 3",
        ),
        ("", Damaged, "store.json cannot be read"),
        ("[]", Damaged, "store.json cannot be read"),
        ("3", Damaged, "store.json cannot be read"),
        ("{}", Damaged, "store.json cannot be read"),
        ('{"format": 1', Damaged, "store.json cannot be read"),
    ],
)
def test_what_is_no_store_of_this_format_is_left_alone(
    whole: Path, tmp_path: Path, opening: str, about: str | None, error: type[ActstoreError], said: str
) -> None:
    root = tmp_path / "s.act"
    shutil.copytree(whole, root)
    (root / "store.json").unlink()
    if about is not None:
        (root / "store.json").write_text(about)
    before = files(root)
    with pytest.raises(error, match=said) as caught:
        OPENINGS[opening](root)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(root) == before


def test_every_committed_file_is_missed_by_name(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "s.act"
    shutil.copytree(whole, root)
    paths = [file.path for manifest in log.manifests(root) for file in manifest.files]
    assert len(paths) == 7 + 2 * 6
    for path in paths:
        content = (root / path).read_bytes()
        (root / path).unlink()
        with pytest.raises(Damaged, match=f"{re.escape(path)} is missing; commit"):
            OPENINGS["Store"](root)
        (root / path).write_bytes(content[:-1])
        with pytest.raises(
            Damaged, match=f"{re.escape(path)} is {len(content) - 1:,} bytes long, not {len(content):,}"
        ):
            OPENINGS["open_writer"](root)
        (root / path).write_bytes(content)
    Store(root).close()


@pytest.mark.parametrize("opening", ["Store", "open_writer"])
@pytest.mark.parametrize("lost", [[3], [2, 3], [1, 2, 3]])
def test_a_log_cut_short_is_damaged_and_what_it_named_is_not_swept(
    whole: Path, tmp_path: Path, opening: str, lost: list[int]
) -> None:
    root = tmp_path / "s.act"
    shutil.copytree(whole, root)
    for number in lost:
        (root / "log" / f"{number:08d}.json").unlink()
    before = files(root)
    with pytest.raises(Damaged, match=f"lacks manifest {lost[0]} of 3"):
        OPENINGS[opening](root)
    assert files(root) == before


def test_store_json_says_the_format_and_who_made_it(whole: Path) -> None:
    about = json.loads((whole / "store.json").read_text())
    assert about["format"] == FORMAT_VERSION
    assert about["made_by"].startswith("actstore ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", about["made_at"])


def test_a_writer_reads_the_small_tables_without_a_catalog(whole: Path) -> None:
    with open_writer(whole) as opened:
        assert isinstance(opened, Writer)
        assert opened.rows_of("runs")["run"].to_list() == ["r"]
        assert opened.rows_of("sites")["short"].to_list() == ["resid_post.0"]
        assert opened.rows_of("results").is_empty()
        assert opened.batches("r") == {0, 1}
