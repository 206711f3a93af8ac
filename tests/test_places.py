"""Where a command's files may go: never into a store, and whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.cli.activation_files import save_activations
from actstore.errors import BadInput, NoRoom
from actstore.outputs import replacing, save_figure, write_text
from actstore.queries.attention import page
from actstore.storage import whole
from actstore.store import Store
from tests.stores import fake, files

CASES = {
    "--parquet": ["sql", "STORE", "select 1", "--parquet", "FILE"],
    "--out": ["read", "STORE", "select token_id from tokens limit 3", "--out", "FILE.npz"],
    "--plot": ["study", "STORE", "depth", "--plot", "FILE.png"],
    "--out of attention": ["attention", "STORE", "0", "--out", "FILE.html"],
    "OUT of report": ["report", "STORE", "FILE"],
    "OUT of train": ["train", "reproduction", "FILE", "--steps", "1"],
    "--into": ["models", "add", "mine", "WEIGHTS", "--into", "FILE"],
    "a store": ["ingest", "FILE", "--model", "reproduction", "--trees", "5", "--sites", "none"],
    "--parquet of info": ["info", "STORE", "--parquet", "FILE"],
    "--parquet of study": ["study", "STORE", "depth", "--parquet", "FILE"],
}
WEIGHTS = Path(__file__).parents[1] / "data" / "checkpoints" / "reproduction.safetensors"


@pytest.fixture
def stores(tmp_path):
    """Two stores side by side, and links that lead into the second."""
    for name in ("one", "two"):
        fake(sites=("embed",)).store(tmp_path / f"{name}.act")
    (tmp_path / "folder").symlink_to(tmp_path / "two.act" / "parts")
    for ending in ("", ".npz", ".png", ".html"):
        (tmp_path / f"file{ending}").symlink_to(tmp_path / "two.act" / "catalog.duckdb")
    (tmp_path / "two.act" / "out").symlink_to(tmp_path)
    return tmp_path


PLACES = [
    "one.act/new",
    "two.act/new",
    "two.act/parts/tokens/new",
    "two.act/nothing/../catalog.duckdb",
    "one.act/../two.act/new",
    "folder/new",
    "two.act/log/new",
    "file",
]


FOLDERS = ("OUT of report", "OUT of train", "--into", "a store")


@pytest.mark.parametrize(
    ("case", "place"),
    [(case, place) for case in CASES for place in PLACES if place != "file" or case not in FOLDERS],
)
def test_no_output_goes_into_a_store_and_nothing_is_computed_for_it(stores, monkeypatch, case, place):
    monkeypatch.chdir(stores)
    before = [files(stores / name) for name in ("one.act", "two.act")]
    for name in ("sql", "read"):
        monkeypatch.setattr(Store, name, lambda *args, **options: pytest.fail("it was asked"))
    words = {"STORE": "one.act", "WEIGHTS": str(WEIGHTS)}
    result = CliRunner().invoke(main, [words.get(word, word.replace("FILE", place)) for word in CASES[case]])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert f" the store {stores}/" in result.stderr
    assert [files(stores / name) for name in ("one.act", "two.act")] == before


@pytest.mark.parametrize("place", ["two.act", "./two.act/", "one.act/../two.act"])
@pytest.mark.parametrize("case", ["--parquet", "OUT of report", "OUT of train", "--into"])
def test_a_store_itself_is_no_place_for_an_output(stores, monkeypatch, case, place):
    monkeypatch.chdir(stores)
    before = files(stores / "two.act")
    words = {"STORE": "one.act", "WEIGHTS": str(WEIGHTS), "FILE": place}
    result = CliRunner().invoke(main, [words.get(word, word) for word in CASES[case]])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "the store" in result.stderr
    assert files(stores / "two.act") == before


@pytest.mark.parametrize("lost", ["store.json", "catalog.duckdb", "log", "parts"])
def test_a_damaged_store_is_no_place_either(stores, lost):
    path = stores / "two.act" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(BadInput, match="lies in the store"):
        write_text(stores / "two.act" / "new", "text")


def test_a_folder_that_only_looks_like_a_store_by_one_name_is_a_place(tmp_path):
    (tmp_path / "store.json").write_text("of a web application")
    write_text(tmp_path / "x.txt", "text")
    assert (tmp_path / "x.txt").read_text() == "text"


@pytest.mark.parametrize("links", ["hard", "soft out of the store"])
def test_a_link_never_gives_a_stores_file_other_bytes(stores, links):
    before = files(stores / "two.act")
    if links == "hard":
        os.link(stores / "two.act" / "catalog.duckdb", place := stores / "catalog.parquet")
    else:
        place = stores / "two.act" / "out" / "x.parquet"  # through a link in the store to a folder outside
    result = CliRunner().invoke(main, ["sql", str(stores / "one.act"), "select 1 as a", "--parquet", str(place)])
    assert result.exit_code == 0, result.output
    assert pl.read_parquet(place).to_dicts() == [{"a": 1}]
    assert files(stores / "two.act") == before


# What stands in the way is said before anything is computed.


@pytest.mark.parametrize("case", ["--parquet", "--out", "--plot", "--out of attention", "--parquet of study"])
@pytest.mark.parametrize(
    ("place", "said"),
    [("nowhere/x", "is not there"), ("plain/x", "is no folder"), ("d", "a folder"), ("fifo", "no plain")],
)
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, case, place, said):
    fake(sites=("embed",)).store(tmp_path / "one.act")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Store, "sql", lambda *args, **options: pytest.fail("it was asked"))
    Path("plain").write_text("")
    arguments = [{"STORE": "one.act"}.get(word, word.replace("FILE", place)) for word in CASES[case]]
    ending = Path(arguments[-1]).suffix
    Path(f"d{ending}").mkdir()
    os.mkfifo(f"fifo{ending}")
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert said in result.stderr
    assert arguments[-1] in result.stderr


# Whole or not at all.


def drawing():
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2])
    return figure


WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "png": lambda path: save_figure(path.with_suffix(".png"), drawing()),
    "npz": lambda path: save_activations(
        str(path.with_suffix(".npz")), pl.Series([1.0]).to_numpy(), pl.DataFrame({"a": [1]})
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, kind, fault):
    WRITERS[kind](tmp_path / "x")
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"old")

    def failing(*args):
        raise fault

    monkeypatch.setattr("actstore.storage.whole.fsync", failing)
    with pytest.raises((NoRoom, KeyboardInterrupt)):
        WRITERS[kind](tmp_path / "x")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == b"old"


def test_a_file_is_on_the_disk_before_it_is_in_its_place(tmp_path, monkeypatch):
    calls = []
    for module, name in ((whole, "fsync"), (whole, "fsync_folder"), (os, "replace")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    write_text(tmp_path / "x", "text")
    assert calls == ["fsync", "replace", "fsync_folder"]


def test_a_link_still_leads_to_the_file_it_names(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "d" / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "d" / "file").read_text() == "text"
    assert stat.S_IMODE((tmp_path / "d" / "file").stat().st_mode) == 0o666 & ~umask()


def umask():
    os.umask(mask := os.umask(0))
    return mask


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path):
    replacing(tmp_path / ("x" * 255), lambda target: target.write_text("text"))
    assert (tmp_path / ("x" * 255)).read_text() == "text"
    with pytest.raises(BadInput, match="File name too long"):
        replacing(tmp_path / ("x" * 256), lambda target: pytest.fail("it was written"))


def test_a_page_of_attention_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "page", lambda *args: "a page \udcff that UTF-8 cannot hold")
    with pytest.raises(UnicodeEncodeError):
        page.save(None, "r", 0, str(tmp_path / "x.html"))
    assert not list(tmp_path.iterdir())


def test_json_in_a_script_holds_nothing_that_html_could_take_for_its_own():
    import json

    data = {"a": "</script><script>alert(1)</script><!--", "b": "&amp;\u2028\u2029→"}
    text = page.script_json(data)
    assert not set(text) & set("<>&\u2028\u2029")
    assert "\\u003c/script\\u003e" in text
    assert json.loads(text) == data
