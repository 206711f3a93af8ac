"""Activations that leave the store: TransformerLens' cache, a dataset as SAELens reads it, Parquet and .npy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.export import hugging_face, selected
from actstore.store import Store
from tests.stores import Fake, fake
from tests.test_sequences import LENGTHS, expected, write

QUERY = "select token_id, role from tokens where role <> 'path' order by token_id"


@pytest.fixture(scope="module")
def made() -> Fake:
    return fake("r", "d", n_trees=5, sites=("resid_post.0", "pattern.0"))


@pytest.fixture(scope="module")
def root(made: Fake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trees whose activations are known, their second batch not ingested by a second run, and text."""
    root = tmp_path_factory.mktemp("export") / "s.act"
    made.store(root)
    fake("half", "d", weights=b"2", sites=("resid_post.0",)).store(root, [0])
    write(root)
    return root


@pytest.fixture
def store(root: Path):
    with Store(root) as store:
        yield store


def test_a_cache_has_the_numbers_of_run_with_cache(demo_store: Store):
    bridge = demo_store.model()
    ids = [5, 3, 30]
    vocabulary = demo_store.sql("select vocabulary from models").item().to_list()
    words = [
        demo_store.sql("select token::varchar as t from tokens where tree_id = $i order by position", {"i": i})["t"]
        for i in ids
    ]
    width = max(map(len, words))
    tokens = torch.zeros((len(ids), width), dtype=torch.long)
    for row, spelled in enumerate(words):
        tokens[row, : len(spelled)] = torch.tensor([vocabulary.index(word) for word in spelled])
    _, wanted = bridge.run_with_cache(tokens)
    cache = demo_store.cache(ids, ["embed", "resid_post"], model=bridge)
    assert cache.has_batch_dim
    assert cache.model is bridge
    assert set(cache.keys()) == set(demo_store.sql("select site from sites")["site"])
    for row, n in enumerate(map(len, words)):
        torch.testing.assert_close(
            cache["resid_post", 3][row, :n], wanted["resid_post", 3][row, :n], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(cache["embed"][row, :n], wanted["hook_embed"][row, :n], rtol=1e-4, atol=1e-4)
        assert (cache["blocks.3.hook_resid_post"][row, n:] == 0).all()
    assert cache["embed"].shape == (3, width, 128)
    assert cache.stack_activation("resid_post").shape == (6, 3, width, 128)  # a method that asks the model


def test_a_cache_pads_patterns_and_rows_of_text_with_zeros(store: Store, made: Fake):
    cache = store.cache([3, 1], run="r")
    n = made.lengths[[3, 1]]
    assert cache["pattern", 0].shape == (2, 2, n.max(), n.max())
    for row, tree in enumerate([3, 1]):
        whole = made.activations["blocks.0.attn.hook_pattern"][tree, :, : n[row], : n[row]]
        np.testing.assert_array_equal(cache["pattern", 0][row, :, : n[row], : n[row]], whole)
        assert not cache["pattern", 0][row, :, n[row] :].any()
        assert not cache["pattern", 0][row, :, :, n[row] :].any()
    listed = store.sql("select sequence_id, first_token_id, n_tokens from listed_sequences order by sequence_id")
    some = listed[[2, 0, 2]]
    cache = store.cache(some["sequence_id"].to_list(), ["z.0", "embed"], run="text")
    assert list(cache.keys()) == ["blocks.0.attn.hook_z", "hook_embed"]
    for row, (_, first, n_tokens) in enumerate(some.rows()):
        of_row = expected(first + np.arange(n_tokens), (2, 5))
        np.testing.assert_array_equal(cache["z", 0][row, :n_tokens], of_row)
        assert not cache["z", 0][row, n_tokens:].any()


@pytest.mark.parametrize(
    ("ids", "sites", "error", "why"),
    [
        ([], None, BadInput, "got sequence_ids"),
        ([[1], [1, 2]], None, BadInput, "got sequence_ids"),
        ([1.5], None, BadInput, "got sequence_ids"),
        ([0, 77, 78], None, NotStored, "2 of 3 sequence_ids, the first being 77"),
        ([0], ["resid_post.7"], NotStored, "no site 'resid_post.7'"),
    ],
)
def test_what_no_cache_can_hold_is_refused(store: Store, ids, sites, error, why):
    with pytest.raises(error, match=why):
        store.cache(ids, sites, run="r")


def test_npy_and_parquet_are_the_rows_that_a_read_gives(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selected, "PIECE_BYTES", 500)  # several pieces
    X, rows = store.read(QUERY, "r", "resid_post.0")
    done = store.export(tmp_path / "x.npy", QUERY, "r", "blocks.0.hook_resid_post")
    np.testing.assert_array_equal(np.load(done.out), X)
    assert (done.n_tokens, done.n_left_out, done.n_not_finite, done.context) == (len(X), 0, 0, None)
    store.export(tmp_path / "x.parquet", QUERY, "r", "resid_post.0", dtype="float16")
    frame = pl.read_parquet(tmp_path / "x.parquet")
    np.testing.assert_array_equal(frame["x"].to_numpy(), X.astype(np.float16))
    assert frame["role"].cast(pl.String).to_list() == rows["role"].cast(pl.String).to_list()
    whole = store.export(tmp_path / "half.npy", run="half")  # every token that the run holds, and no other
    held = store.of("half").sql("select token_id from tokens where tree_id < 3 order by token_id")
    assert whole.n_tokens == len(held)
    np.testing.assert_array_equal(np.load(whole.out), store.read(held, "half")[0])
    done = store.export(tmp_path / "z.npy", run="text", site="z.0")
    assert np.load(done.out).shape == (sum(map(sum, LENGTHS)), 2, 5)


def test_nan_is_said(tmp_path: Path):
    made = fake("r", "d", sites=("resid_post.0",))
    made.activations["blocks.0.hook_resid_post"][[1, 3], 2, 4] = np.nan, np.inf
    made.store(tmp_path / "s.act")
    with Store(tmp_path / "s.act") as store:
        done = store.export(tmp_path / "x.npy")
        assert done.n_not_finite == 2 == (~np.isfinite(np.load(done.out))).any(1).sum()
        assert "2 rows hold a NaN or an infinity" in str(done)
        ends = store.sql("select token_id from tokens where position <> 2")
        assert store.export(tmp_path / "y.npy", ends).n_not_finite == 0


def test_a_dataset_is_what_datasets_loads_and_its_rows_are_the_stores(
    store: Store, made: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    datasets = pytest.importorskip("datasets", reason="the extra `export` is not installed")
    monkeypatch.setattr(selected, "PIECE_BYTES", 1000)
    monkeypatch.setattr(hugging_face, "SHARD_BYTES", 1500)  # several files
    done = store.export(tmp_path / "acts", run="r", site="resid_post.0", context=8)
    loaded = datasets.load_from_disk(str(done.out))
    ids = store.of("r").sql("select token_id from tokens order by token_id")
    assert len(list(done.out.glob("*.arrow"))) == 2
    assert (done.n_tokens, done.n_left_out) == (len(ids) // 8 * 8, len(ids) % 8)
    assert loaded.features["blocks.0.hook_resid_post"] == datasets.Array2D((8, 6), "float32")
    loaded.set_format("numpy")
    read, _ = store.read(ids.head(done.n_tokens), "r", "resid_post.0")
    np.testing.assert_array_equal(np.asarray(loaded["blocks.0.hook_resid_post"][:]).reshape(-1, 6), read)
    assert np.asarray(loaded["store_token_ids"][:]).ravel().tolist() == ids["token_id"].to_list()[: done.n_tokens]


def test_a_dataset_of_text_has_the_numbers_of_its_tokens(store: Store, tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="the extra `export` is not installed")
    longer = "select sequence_id from sequences where n_tokens > 1"
    query = f"select token_id from tokens where position < 2 and sequence_id in ({longer})"
    done = store.export(tmp_path / "acts", f"{query} order by token_id desc", "text", "z.0", dtype="float16")
    assert done.context == 2, "each sequence has two among the rows"
    loaded = datasets.load_from_disk(str(done.out)).with_format("numpy")
    assert loaded["blocks.0.attn.hook_z"][:].shape == (done.n_tokens // 2, 2, 10)
    ids = loaded["store_token_ids"][:].ravel()
    numbers = store.sql("select token_id, number from tokens where number is not null").rows()
    assert loaded["token_ids"][:].ravel().tolist() == [dict(numbers)[token] for token in ids]
    assert (np.diff(ids) < 0).all(), "in the query's order"


def test_an_export_that_fails_leaves_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets", reason="the extra `export` is not installed")

    def fails(*asked: object) -> None:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(hugging_face, "_write_state", fails)
    with pytest.raises(OSError, match="on fire"):
        store.export(tmp_path / "acts", run="r")
    monkeypatch.setattr("actstore.export.export.not_finite", fails)
    for name in ("x.npy", "x.parquet"):
        with pytest.raises(OSError, match="on fire"):
            store.export(tmp_path / name, run="r")
    assert list(tmp_path.iterdir()) == []


def test_without_datasets_the_message_says_how_to_install_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(BadInput, match=r"pip install 'actstore\[export\]'"):
        store.export(tmp_path / "acts", run="r")


def test_the_command_exports_and_refuses_in_one_line(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root, "s.act")
    Path("taken").mkdir()
    Path("taken/file").touch()

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["export", "s.act", *words])
        return done.exit_code, done.output

    code, said = run("x.npy", "--run", "r", "--query", QUERY, "--site", "resid_post.0")
    assert (code, said.split(":")[0]) == (0, "x.npy")
    before = sorted(path for path in Path("s.act").rglob("*") if path.name != ".lock")
    for words, why in (
        (["s.act/x.npy", "--run", "r"], "in the store"),
        (["s.act/x", "--run", "r"], "in the store"),
        (["taken", "--run", "r"], "which is there; name a new folder"),
        (["x.npy", "--run", "r", "--format", "saelens"], "which is a folder; leave out .npy"),
        (["x.csv", "--run", "r", "--format", "parquet"], "a file ends in .parquet"),
        (["x.npy", "--run", "r", "--format", "nyp"], "did you mean 'npy'"),
        (["x.npy", "--run", "r", "--dtype", "int8"], "float32 or float16"),
        (["x.npy", "--run", "r", "--context", "4"], "leave it out (--context)"),
        (["x.npy", "--run", "r", "--query", "select token_id from tokens where false"], "no row to export"),
        (["new", "--run", "r", "--context", "100000"], "got context 100000 for"),
        (["x.npy", "--run", "r", "--site", "resid_post"], "resid_post.0"),
        (["x.parquet", "--run", "r", "--query", "select token_id, 1 as X from tokens"], "rename it (X as other)"),
    ):
        code, said = run(*words)
        assert (code, said.count("\n")) == (2, 1), said
        assert why in said
    assert sorted(path for path in Path("s.act").rglob("*") if path.name != ".lock") == before
    assert sorted(path.name for path in Path().iterdir()) == ["s.act", "taken", "x.npy"]
