"""The log's checkpoint: a reader of a long log reads little of it, and a checkpoint that does not fit harms nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actstore.catalog import build
from actstore.commits import checkpoint, log
from actstore.commits.checkpoint import Checkpoint
from actstore.commits.format import CHECKPOINT
from actstore.commits.manifest import Manifest, manifest_path
from actstore.errors import Damaged
from actstore.storage.local import Local
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
from tests.damaged import damage, flip, shorten
from tests.stores import committed_files, fake
from tests.test_writer import killed_at

RUN = fake(n_trees=9, trees_per_shard=2, sites=("resid_post.0",))  # six commits
ALL = "select token_id from tokens"


@pytest.fixture(autouse=True)
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LEAST", 3)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stored") / "s.act"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LEAST", 3)
        RUN.store(root)
    return root


@pytest.fixture
def root(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "s.act"))


def plant(root: Path, n: int) -> Path:
    """A store with n commits, of which all but the first six bring nothing."""
    committed = log.manifests(root)
    while len(committed) < n:
        planted = Manifest(len(committed) + 1, "results", previous=committed[-1].xxh3_128)
        path = root / manifest_path(planted.number)
        path.write_bytes(planted.to_json())
        committed.append(Manifest.from_json(path.read_bytes(), path))
    build.publish(root)
    checkpoint.write(root, committed)
    return root


def read_at_opening(root: Path, monkeypatch: pytest.MonkeyPatch, check: bool = False) -> list[int]:
    """Numbers of the manifests that an opening reads."""
    found: list[int] = []
    with monkeypatch.context() as patch:
        real = log.read_manifest
        patch.setattr(
            log, "read_manifest", lambda root, number, *content: found.append(number) or real(root, number, *content)
        )
        with Store(root, check=check) as store:
            assert store.sql("select count(*) from tokens").item() == RUN.lengths.sum()
    return found


def forged(root: Path, **changes: Any) -> None:
    """A checkpoint whose own checksum is right, and that says something else."""
    Local(root).swap(CHECKPOINT, replace(Checkpoint.of(log.manifests(root)), **changes).to_json())


def test_what_an_opening_reads_does_not_grow_with_the_log(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = plant(Path(shutil.copytree(root, tmp_path / "longer.act")), 200)
    assert read_at_opening(root, monkeypatch) == [5, 6]
    assert read_at_opening(longer, monkeypatch) == [199, 200]
    assert (longer / CHECKPOINT).stat().st_size < (root / CHECKPOINT).stat().st_size + 10
    assert read_at_opening(longer, monkeypatch, check=True) == [*range(1, 201)]


def test_a_short_log_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    RUN.store(tmp_path / "s.act")
    assert not (tmp_path / "s.act" / CHECKPOINT).exists()
    assert read_at_opening(tmp_path / "s.act", monkeypatch) == [*range(1, 7)]


def test_an_older_checkpoint_is_read_with_the_commits_after_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (root / CHECKPOINT).read_bytes()
    plant(root, 9)
    assert (root / CHECKPOINT).read_bytes() != before
    Local(root).swap(CHECKPOINT, before)
    assert read_at_opening(root, monkeypatch) == [5, 6, 7, 8, 9]
    assert verify(root).damage == []
    repair(root, lambda *of: {})
    assert read_at_opening(root, monkeypatch) == [8, 9]


def as_pipe(root: Path) -> None:
    (root / CHECKPOINT).unlink()
    os.mkfifo(root / CHECKPOINT)


def strange_definitions(root: Path) -> None:
    (of_run,) = [manifest for manifest in log.manifests(root) if manifest.kind == "run"]
    forged(root, definitions=[replace(of_run, others=[replace(of_run.others[0], bytes=1)])])


def strange_paths(root: Path) -> None:
    (of_run,) = [manifest for manifest in log.manifests(root) if manifest.kind == "run"]
    forged(root, definitions=[replace(of_run, others=[replace(of_run.others[0], path="a\0b")])])


UNFIT = {
    "a flipped bit": lambda root: damage(root / CHECKPOINT, flip(40)),
    "empty": lambda root: Local(root).swap(CHECKPOINT, b""),
    "a pipe": as_pipe,
    "of more commits": lambda root: forged(root, commits=7),
    "of fewer commits": lambda root: forged(root, commits=4),
    "of another last": lambda root: forged(root, last_xxh3_128="0" * 32),
    "of another log": lambda root: forged(root, log_xxh3_128="0" * 32),
    "of another run": strange_definitions,
    "of paths that no file has": strange_paths,
}


@pytest.mark.parametrize("what", UNFIT)
def test_one_that_does_not_fit_is_ignored_found_and_made_anew(
    root: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (root / CHECKPOINT).read_bytes()
    UNFIT[what](root)
    assert read_at_opening(root, monkeypatch)[-6:] == [*range(1, 7)]
    assert [finding.kind for finding in verify(root, quick=True).damage] == ["checkpoint"]
    with open_writer(root):
        pass
    assert (root / CHECKPOINT).read_bytes() == before
    UNFIT[what](root)
    assert repair(root, lambda *of: {}).mended == [CHECKPOINT]
    assert (root / CHECKPOINT).read_bytes() == before
    assert verify(root).findings == []


def test_a_folder_in_its_place_is_no_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / CHECKPOINT).unlink()
    (root / CHECKPOINT).mkdir()
    assert read_at_opening(root, monkeypatch) == [*range(1, 7)]
    with pytest.raises(Damaged, match=r"log\.json is a folder"):
        repair(root, lambda *of: {})


def test_an_edit_of_the_past_is_found_by_whoever_must_know(root: Path) -> None:
    damage(root / manifest_path(3), flip(40))
    with Store(root):
        pass  # the checkpoint stands for it, and no row or activation comes out of it
    assert manifest_path(3) in {finding.path for finding in verify(root).damage}
    for opening in (lambda: Store(root, check=True), lambda: open_writer(root).__enter__()):
        with pytest.raises(Damaged, match="manifest"):
            opening()


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: damage(path, flip(40))])
def test_the_last_manifest_is_looked_at_each_time(root: Path, change: Callable[[Path], None]) -> None:
    change(root / manifest_path(6))
    with pytest.raises(Damaged, match="manifest"):
        Store(root)


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: damage(path, shorten)])
def test_a_shard_of_another_size_is_never_read(root: Path, change: Callable[[Path], None]) -> None:
    change(root / "activations.zarr/r/blocks.0.hook_resid_post/c/3/0/0")
    with Store(root) as store:
        X, rows = store.read(f"{ALL} where tree_id = 1")
        np.testing.assert_array_equal(X[:, 0], np.ones(len(rows)))
        with pytest.raises(Damaged, match="c/3/0/0"):
            store.read(f"{ALL} where tree_id = 7")
    with pytest.raises(Damaged, match="c/3/0/0"), open_writer(root):
        pass


@pytest.mark.parametrize("name", ["zarr.json", "blocks.0.hook_resid_post/zarr.json"])
def test_what_defines_a_run_is_looked_at_each_time(root: Path, name: str) -> None:
    damage(root / "activations.zarr/r" / name, shorten)
    with pytest.raises(Damaged, match=r"zarr\.json is .* bytes long"):
        Store(root)


def test_killed_while_one_is_written(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tmp_path / "half.act"
    RUN.store(half, range(4))
    whole = Path(shutil.copytree(half, tmp_path / "whole.act"))
    calls = killed_at(monkeypatch, 10**9, lambda: RUN.store(whole))
    old, new = (half / CHECKPOINT).read_bytes(), (stored / CHECKPOINT).read_bytes()
    seen = set()
    for turn in range(calls - 13, calls + 1, 2):
        root = Path(shutil.copytree(half, tmp_path / f"{turn}.act"))
        killed_at(monkeypatch, turn, partial(RUN.store, root))
        seen.add((root / CHECKPOINT).read_bytes())
        with Store(root) as store:
            assert store.sql("select count(distinct tree_id) from tokens").item() in (8, 9)
        assert verify(root).damage == []
        with open_writer(root):
            pass
        assert committed_files(root) == committed_files(stored)
    assert seen == {old, new}
