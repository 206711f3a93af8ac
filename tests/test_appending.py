"""A site appended to a stored run: aligned, hashed, verified and dropped like the run's own sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from actstore import verbs
from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.ingest.replay import compare
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from tests.damaged import damage, flip
from tests.stores import fake
from tests.test_labels import text_store

IDS = np.array([3 * 256 + 2, 0, 2, 256])  # of trees in both batches, not in order
X = np.arange(12, dtype=np.float32).reshape(4, 3) + 1


def none(*asked: object) -> dict[str, bytes]:
    raise AssertionError("nothing is to be computed again")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fake("other", "e", seed=7).store(tmp_path / "s")  # so that the ids of the run do not begin at 0
    fake("r", "d").store(tmp_path / "s")
    return tmp_path / "s"


FIRST = 5 * 256


def test_an_appended_site_is_read_as_the_others(root: Path) -> None:
    before = verify(root).n_files
    with Store(root) as store:
        store.append("r", "mine.3", IDS + FIRST, X, {"of": "resid_post.3", "by": "a test"})
    with Store(root, check=True) as store:
        assert store.sites("r") == ["pattern.0", "resid_post.0", "mine.3"]
        got, rows = store.read((IDS + FIRST)[::-1], "r", "mine.3")
        assert np.array_equal(got, X[::-1])
        assert rows["token_id"].to_list() == (IDS + FIRST)[::-1].tolist()
        assert json.loads(store.sql("select lineage from sites where site = 'mine.3'").item())["by"] == "a test"
        ((batch, _),) = store.batches(IDS + FIRST, "r", "mine.3", shuffle=False)
        assert torch.equal(batch, torch.from_numpy(X))
        vectors = store.sql("select act(1280, 'r', 'mine.3')::float[] as x")["x"]
        assert vectors.to_list() == [X[1].tolist()]
    report = verify(root)
    assert not report.findings
    assert report.n_files == before + 4  # two shards, the array's metadata, and the row of sites


def test_a_token_that_was_not_given_is_not_stored(root: Path) -> None:
    verbs.append(root, "r", "mine", IDS + FIRST, X)
    with Store(root) as store:
        for ids in ([FIRST + 1], [FIRST, FIRST + 1]):
            with pytest.raises(NotStored, match="not given when the site was appended"):
                store.read(ids, "r", "mine")
            with pytest.raises(NotStored, match="not given when the site was appended"):
                store.batches(ids, "r", "mine")
        store.read([FIRST + 1], "r", "resid_post.0")


def test_a_site_of_a_text_lies_in_rows(tmp_path: Path) -> None:
    fake("r", "d").store(tmp_path / "s")
    text_store(tmp_path / "s")
    heads = np.random.default_rng(0).standard_normal((5, 2, 4)).astype(np.float32)
    with Store(tmp_path / "s") as store:
        ids = store.sql("select token_id from tokens where dataset = 'stories' order by token_id")[
            "token_id"
        ].to_numpy()
        assert len(ids) > 6
        chosen = ids[[5, 0, 1, 3, 6]]
        store.append("text", "z.0", pl.DataFrame({"token_id": chosen}), torch.from_numpy(heads).to(torch.bfloat16))
    with Store(tmp_path / "s", check=True) as store:
        got, _ = store.read(chosen, "text", "z.0")
        assert np.array_equal(got, torch.from_numpy(heads).bfloat16().float().numpy())
        with pytest.raises(NotStored, match="not given"):
            store.read(ids[2:3], "text", "z.0")
    assert not verify(tmp_path / "s").findings


def test_the_row_of_an_appended_site_is_mended_and_its_numbers_are_not(root: Path) -> None:
    verbs.append(root, "r", "mine", IDS + FIRST, X)
    part = root / "parts/sites/r/mine.parquet"
    committed = part.read_bytes()
    damage(part, flip(9))
    assert repair(root, none).mended == ["parts/sites/r/mine.parquet"]
    assert part.read_bytes() == committed
    damage(root / "activations.zarr/r/mine/c/0/0/0", flip(9))
    (left,) = repair(root, none).left
    assert "--from-arrays" in left.what


def test_a_run_goes_on_after_a_site_was_appended_and_goes_with_it(root: Path) -> None:
    half = fake("half", "d")
    half.store(root, [0])
    verbs.append(root, "half", "mine", [FIRST], X[:1])
    half.store(root)
    with Store(root) as store:
        assert store.sql("select count(*) from shards where run = 'half'").item() == 5
    verbs.append(root, "r", "mine", [FIRST], X[:1])
    verbs.drop(root, run="half")
    with Store(root) as store:
        assert "half" not in store.sql("select run from sites")["run"]
        assert store.sites("r") == ["pattern.0", "resid_post.0", "mine"]
    half.store(root)
    verbs.append(root, "half", "mine", [FIRST], X[:1])
    assert not verify(root).damage


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"run": "q"}, NotStored, "no run 'q'"),
        ({"site": "resid_post.0"}, BadInput, "holds a site"),
        ({"site": "a/b"}, BadInput, "for a site"),
        ({"token_ids": [FIRST, 0, FIRST + 255]}, NotStored, "2 of 3 token ids .* dataset 'd', .* the first 0"),
        ({"token_ids": [FIRST, FIRST + 1, FIRST]}, BadInput, "1 token ids are given twice, the first 1280"),
        ({"X": np.zeros((2, 3))}, BadInput, "for 3 token ids"),
        ({"X": np.zeros(3)}, BadInput, r"give floats \[3, width\]"),
        ({"X": [["a"]] * 3}, BadInput, "give floats"),
        ({"X": np.zeros((3, 1, 1, 1))}, BadInput, r"\[n, width\] or \[n, head, width\]"),
        ({"X": [[0.0], [np.nan], [np.inf]]}, BadInput, "2 of 3 rows of X .* is NaN or infinite, the first row 1"),
        ({"X": [[0.0], [1e300], [0.0]]}, BadInput, "too large for float32"),
        (
            {"X": [[0.0], [np.nan], [np.nan]], "allow_nan": True},
            BadInput,
            "2 of 3 rows of X begin with NaN, the first row 1",
        ),
        ({"X": [[0.0], [1e300], [0.0]], "allow_nan": True}, BadInput, "too large for float32"),
        ({"lineage": {"by": object()}}, BadInput, "no JSON"),
        ({"token_ids": [], "X": np.zeros((0, 3))}, BadInput, "no token ids"),
    ],
)
def test_what_cannot_be_appended_is_refused(
    root: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    asked = {"run": "r", "site": "mine", "token_ids": [FIRST, FIRST + 1, FIRST + 2], "X": np.ones((3, 3)), **change}
    before = verify(root).n_files
    with pytest.raises(error, match=said):
        verbs.append(root, **asked)
    assert verify(root).n_files == before


def test_nan_and_infinity_are_stored_where_they_are_allowed(root: Path) -> None:
    given = np.array([[1, np.nan], [-np.inf, 2]], np.float32)
    verbs.append(root, "r", "mine", [FIRST, FIRST + 1], given, allow_nan=True)
    with Store(root) as store:
        assert np.array_equal(store.read([FIRST, FIRST + 1], "r", "mine")[0], given, equal_nan=True)


@pytest.mark.parametrize("ending", ["npz", "safetensors", "parquet"])
def test_the_command_stores_what_read_has_written(root: Path, tmp_path: Path, ending: str) -> None:
    file = str(tmp_path / f"x.{ending}")
    query = "select token_id from tokens where dataset = 'd' and position in (0, 2)"
    read = ["read", str(root), query, "--run", "r", "--site", "resid_post.0", "--out", file]
    assert CliRunner().invoke(main, read).exit_code == 0
    append = ["ingest", str(root), "--from-arrays", file, "--run", "r", "--site", "copy", "--lineage", "a copy"]
    done = CliRunner().invoke(main, append)
    assert done.exit_code == 0, done.output
    with Store(root) as store:
        assert np.array_equal(store.read(query, "r", "copy")[0], store.read(query, "r", "resid_post.0")[0])


def test_a_command_line_that_lacks_something_is_told(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, token_id=[1])
    for words, said in (
        (["--from-arrays", str(file), "--run", "r"], "the name of the new --site"),
        (["--from-arrays", str(file), "--run", "r", "--site", "s"], "lacks X"),
        (["--model", "reproduction", "--site", "s"], "come with --from-arrays"),
        (["--from-arrays", "no.npz", "--run", "r", "--site", "s"], "no file no.npz"),
    ):
        done = CliRunner().invoke(main, ["ingest", str(root), *words])
        assert done.exit_code == 2
        assert said in done.output


def test_a_recompute_says_that_it_cannot_compute_an_appended_site(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Job:
        of_text, patch, asked, generator = False, None, object(), None
        plan = fake("r").plan

        def over(self, sites: list[str]) -> Job:
            return self

        def originals(self, datasets: pl.DataFrame) -> None:
            return None

    verbs.append(root, "r", "mine", [FIRST], X[:1], {"of": "resid_post.3"})
    monkeypatch.setattr(compare, "rehydrate", lambda *asked: (Job(), {"first_tree_id": 5}))
    monkeypatch.setattr(compare, "_compare_run", lambda *asked: [])
    (found,) = compare.compare(root, 1)
    assert (found.run, found.what, found.n, found.agrees) == ("r", "mine", 0, True)
    assert "cannot be computed again" in found.first
    assert "resid_post.3" in found.first
