"""Stores under names that a shell, a URL, a pattern or DuckDB reads otherwise: they work and lie there, or nothing is made."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from actstore import errors
from actstore.cli import main
from actstore.errors import BadInput
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from tests.stores import fake, files

WORK = [
    *("~tilde", "http:x", "s3:x", "md:x", "duckdb:x", "**", "[!ab]{a,b}", "-dash"),
    *(" a'b\"c`id`;$HOME%41%00#& ", "new\nline\t\x1b[31m\r", "seed=7.parquet"),
]
REFUSED = ["wh?t", "back\\slash", "\udcff\udcfe"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of two runs, to be copied."""
    root = tmp_path_factory.mktemp("whole") / "s.act"
    fake(sites=("embed",)).store(root)
    return root


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def works(root):
    fake(sites=("embed",)).store(root, [0])
    fake(sites=("embed",)).store(root)  # which reads what is there
    with Store(root, check=True) as store:
        assert store.sql("select count(*) as n from trees").item() == 5
        X, rows = store.read("select token_id from tokens order by token_id limit 3", "r", "embed")
        assert X.shape == (len(rows), 6)
    part = root / "parts" / "trees" / "d-000000.parquet"
    os.chmod(part, 0o644)
    part.write_bytes(b"damage")
    assert [str(damage.path) for damage in verify(root).damage] == ["parts/trees/d-000000.parquet"]
    assert repair(root, lambda *asked: {}).left == []
    assert verify(root).findings == []


@pytest.mark.parametrize("name", WORK)
def test_a_store_of_any_name_works_and_lies_there(here, name):
    works(Path(name) if name.startswith("-") else Path(f"./{name}"))
    assert os.listdir() == [name]
    assert os.listdir(here) == ["here"]


@pytest.mark.parametrize("name", ["~tilde", "s3:x", "[ab]", "-dash", "new\nline"])
@pytest.mark.parametrize(
    "words",
    [
        ["info"],
        ["sql", "--json", "select 1 as a"],
        ["read", "--site", "embed", "from tokens"],
        ["verify"],
        ["show", "1"],
    ],
    ids=lambda words: words[0],
)
def test_commands_take_such_names(here, whole, name, words):
    shutil.copytree(whole, name)
    options = [word for word in words[1:] if word.startswith("--") or word == "embed"]
    asked = [word for word in words[1:] if word not in options]
    result = CliRunner().invoke(main, [words[0], *options, "--", name, *asked])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("inside", [False, True])
def test_what_duckdb_cannot_open_is_refused_and_nothing_is_made(here, name, inside):
    root = Path(name)
    if inside:
        root.mkdir()
        root /= "s.act"
    before = sorted(Path().rglob("*"))
    with pytest.raises(BadInput, match="DuckDB cannot open a path"):
        fake(sites=("embed",)).store(root)
    words = ["--model", "reproduction", "--trees", "5", "--sites", "none"]
    result = CliRunner().invoke(main, ["ingest", str(root), *words])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "DuckDB cannot open a path" in result.stderr
    assert sorted(Path().rglob("*")) == before
    assert os.listdir(here) == ["here"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_store_that_was_moved_to_such_a_name_is_not_called_damaged(here, whole, name):
    shutil.copytree(whole, name)
    before = files(Path(name))
    for words in (["info"], ["sql", "select 1"], ["verify"], ["repair"], ["show", "1"], ["study", "depth"]):
        result = CliRunner().invoke(main, [words[0], name, *words[1:]])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert "give the store another name" in result.stderr
    assert files(Path(name)) == before
    Path("good").symlink_to(name)  # what a link leads to is the system's to find
    with Store("good") as store:
        assert store.runs() == ["r"]


@pytest.mark.parametrize("ending", ["npz", "safetensors", "parquet"])
@pytest.mark.parametrize("name", ["~x", "s3:x", "[a]*?\\\n"])
def test_outputs_of_any_name_lie_there(here, whole, name, ending):
    Path(name).mkdir()
    out = f"{name}/{name}.{ending}"
    result = CliRunner().invoke(
        main, ["read", str(whole), "select token_id from tokens limit 3", "--site", "embed", "--out", out]
    )
    assert result.exit_code == 0, result.output
    assert [str(path) for path in Path().rglob("*") if path.is_file()] == [out]


@pytest.mark.parametrize(
    "words",
    [
        ["sql", "STORE", "select 1 as a", "--parquet", "FILE"],
        ["read", "STORE", "select token_id from tokens limit 3", "--site", "embed", "--out", "FILE.safetensors"],
        ["study", "STORE", "depth", "--plot", "FILE.png"],
        ["attention", "STORE", "0", "--out", "FILE.png"],
        ["report", "STORE", "FILE"],
        ["train", "reproduction", "FILE", "--steps", "1"],
    ],
    ids=lambda words: words[0],
)
def test_an_output_whose_name_is_no_text_is_refused_before_anything_is_made(here, whole, words):
    named = [{"STORE": str(whole)}.get(word, word.replace("FILE", "\udcff")) for word in words]
    result = CliRunner().invoke(main, named)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert "not UTF-8" in result.stderr
    assert list(Path().iterdir()) == []


def test_results_that_were_kept_are_recorded_from_a_file_of_any_name(here, whole):
    shutil.copytree(whole, "s.act")
    with Store("s.act") as store:
        snapshot = store.snapshot
    row = {"study": "depth", "run": "r", "value": 1.0, "snapshot": snapshot, "answer": 0}
    from actstore.catalog import part_types

    types = {name: kind for name, kind in part_types.tables()["results"].items() if name != "recorded"}
    frame = pl.DataFrame([{**dict.fromkeys(types), **row}], schema={**types, "answer": pl.Int32})
    for name in ("~x.parquet", "[a]*.parquet", "s3:x.parquet", "\udcff.parquet"):
        with open(name, "wb") as file:
            frame.write_parquet(file)
        result = CliRunner().invoke(main, ["record", "s.act", name])
        assert result.exit_code == 0, result.output


def test_a_query_with_limits_opens_a_store_of_such_a_name(here, whole):
    shutil.copytree(whole, "~s3:[x]")
    with Store("~s3:[x]") as store:
        assert store.sql("select count(*) from trees", timeout=60).item() == 5


def test_models_whose_files_are_not_text_are_listed(here, monkeypatch):
    monkeypatch.setenv("ACTSTORE_MODELS", ".")
    Path("\udcff.safetensors").write_bytes(b"")
    result = CliRunner().invoke(main, ["models", "list"])
    assert result.exit_code == 0, result.output
    assert "\\udcff" in result.stdout


def test_a_command_that_is_advised_takes_a_path_for_a_path():
    assert shlex.split(errors.advised("info", Path("-dash")).strip("`")) == ["actstore", "info", "./-dash"]
    assert shlex.split(errors.advised("info", Path("a b"), "--run", "x").strip("`")) == [
        *("actstore", "info", "a b", "--run", "x")
    ]
