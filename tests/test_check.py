"""A store that is opened with `check=True` reads nothing that is not what was committed, on any road; one without does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
import zarr
from torch.utils.data import DataLoader

from actstore.arrays.foreign import ForeignReader
from actstore.catalog import hash_note, tables
from actstore.catalog.tables import CATALOG
from actstore.errors import Damaged
from actstore.reading import sites
from actstore.storage import local
from actstore.storage.hashing import hash_of
from actstore.storage.local import CheckedFolder
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
from tests.damaged import damage, flip
from tests.stores import fake
from tests.test_cli import assert_one_line, run
from tests.test_old_stores import OLDER, holds_what_it_held, unpack

ALL = "select token_id from tokens order by token_id"
SITES = ("embed", "resid_post.0", "pattern.0")
SHARD = "activations.zarr/r/hook_embed/c/1/0/0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two runs over the same nine trees, in three batches."""
    root = tmp_path_factory.mktemp("check") / "s.act"
    for name in ("r", "other"):
        fake(name, n_trees=9, weights=name.encode(), sites=SITES).store(root)
    return root


@pytest.fixture
def path(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "s.act")
    return tmp_path / "s.act"


def of_batches(store: Store, **form: int) -> np.ndarray:
    batches = store.batches(ALL, "r", "embed", shuffle=False, batch_size=50)
    return np.concatenate([X.numpy() for X, _ in DataLoader(batches, batch_size=None, **form)])


ROADS = {
    "read": lambda store: store.read(ALL, "r", "embed")[0],
    "read sites": lambda store: store.read(ALL, "r", sites=["resid_post.0", "embed"])[0][:, 1],
    "act in the outermost select": lambda store: store.sql("select act(token_id, 'r', 'embed') as x from tokens")["x"],
    "act within": lambda store: store.sql(f"select x from (select act(token_id, 'r', 'embed') as x from ({ALL}))")["x"],
    "activations": lambda store: store.sql("select x from activations('r', 'embed') order by token_id")["x"],
    "a query with limits": lambda store: store.sql("select act(token_id, 'r', 'embed') as x from tokens", timeout=60)[
        "x"
    ],
    "scan": lambda store: store.scan("r", "embed").select("x").collect()["x"],
    "batches": of_batches,
    "batches in workers": lambda store: of_batches(store, num_workers=1),
}


def numbers(of: np.ndarray | pl.Series) -> np.ndarray:
    return of.to_numpy() if isinstance(of, pl.Series) else of


def swap(root: Path, one: str, other: str) -> None:
    for_now = root / "for now"
    (root / one).rename(for_now)
    (root / other).rename(root / one)
    for_now.rename(root / other)


RESID_SHARD, OTHERS_SHARD = SHARD.replace("hook_embed", "blocks.0.hook_resid_post"), SHARD.replace("/r/", "/other/")
HARM = {  # what nobody but a hash of the whole file sees
    "a bit flips": lambda root: damage(root / SHARD, flip(1_000)),
    "a site's shard in the place of another's": lambda root: swap(root, SHARD, RESID_SHARD),
    "a run's in the place of another's": lambda root: swap(root, SHARD, OTHERS_SHARD),
    "a batch's in the place of another's": lambda root: swap(root, SHARD, SHARD.replace("c/1", "c/0")),
}
CASES = [  # torch takes 5 s to end a worker that raised: one such case
    (road, harm) for road in ROADS for harm in HARM if road != "batches in workers" or harm == "a bit flips"
]


@pytest.mark.parametrize("road", ROADS)
def test_a_whole_store_reads_the_same_with_check_as_without(whole, road):
    with Store(whole) as plain, Store(whole, check=True) as checked:
        np.testing.assert_array_equal(numbers(ROADS[road](checked)), numbers(ROADS[road](plain)))


@pytest.mark.parametrize(("road", "harm"), CASES)
def test_what_is_not_as_committed_is_read_without_check_and_refused_with_it(whole, path, road, harm):
    HARM[harm](path)
    with Store(whole) as sound, Store(path) as plain:
        expected, found = numbers(ROADS[road](sound)), numbers(ROADS[road](plain))
    assert not np.array_equal(found, expected), "nothing was harmed"
    with Store(path, check=True) as checked:
        with pytest.raises(Damaged) as caught:
            ROADS[road](checked)
        said = str(caught.value)
        assert said.count("actstore verify") == said.count("actstore repair") == 1
        assert said.index("actstore verify") < said.index("actstore repair")
        assert "c/1/0/0 is not what was committed" in said or ("batch's" in harm and "c/0/0/0" in said)
        sound_batch = "select token_id from tokens where tree_id >= 6"
        assert len(checked.read(sound_batch, "r", "embed")[0])  # what was not harmed is read
    assert {finding.path for finding in verify(path).damage} >= {SHARD}


def test_patterns_are_checked_as_well(path):
    damage(path / "activations.zarr/r/blocks.0.attn.hook_pattern/c/0/0/0/0", flip(300))
    with (
        Store(path, check=True) as store,
        pytest.raises(Damaged, match="hook_pattern/c/0/0/0/0 is not what was committed"),
    ):
        store.read(ALL, "r", "pattern.0")


def test_metadata_is_checked_before_it_says_how_an_array_lies(path):
    damage(path / "activations.zarr/r/hook_embed/zarr.json", flip(100))
    with Store(path, check=True) as store, pytest.raises(Damaged, match=r"zarr\.json is not what was committed"):
        store.read(ALL, "r", "embed")


def test_each_file_is_hashed_once_an_open(whole, monkeypatch):
    hashed: list[str] = []
    real = hash_of
    monkeypatch.setattr(
        local, "hash_of", lambda file: hashed.append(os.readlink(f"/proc/self/fd/{file}")) or real(file)
    )
    with Store(whole, check=True) as store:
        for _ in range(2):
            store.read(ALL, "r", "embed")
            store.sql("select norm(act(token_id, 'r', 'embed')) from tokens")
        assert len(hashed) == len(set(hashed)) == 4  # three shards and their array's zarr.json
        store.read("select token_id from tokens where tree_id = 0", "r", "resid_post.0")
    assert len(hashed) == len(set(hashed)) == 6
    hashed.clear()
    with Store(whole) as store:
        store.read(ALL, "r", "embed")
    assert not hashed


def test_explain_counts_whole_shards_and_reads_none(whole, path):
    query = "select token_id from tokens where tree_id in (0, 1, 8)"
    damage(path / SHARD.replace("c/1", "c/0"), flip(1_000))
    with Store(whole) as plain, Store(path, check=True) as checked:
        less, said = plain.explain(query, "r", "embed"), checked.explain(query, "r", "embed")
        size = (path / SHARD).stat().st_size
    assert (said.shards, said.bytes_read) == (2, 2 * size)
    assert (said.chunks, said.bytes_needed, said.rows) == (less.chunks, less.bytes_needed, less.rows)


def test_batches_check_again_in_every_epoch(path):
    with Store(path, check=True) as store:
        batches = store.batches(ALL, "r", "embed", batch_size=20, window=1)
    for _ in batches:
        pass
    damage(path / SHARD, flip(1_000))
    with pytest.raises(Damaged, match="c/1/0/0 is not what was committed"):
        list(batches)


def test_a_file_that_another_replaces_is_hashed_again(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    opened = CheckedFolder(tmp_path, {"a": "a96faf705af16834e6c632b61e964e1f"})
    assert opened.read("a") == b"a"
    (tmp_path / "b").write_bytes(b"b")
    (tmp_path / "b").replace(tmp_path / "a")
    with pytest.raises(Damaged, match="a is not what was committed"):
        opened.read("a")
    with pytest.raises(FileNotFoundError):
        opened.read("c")
    (tmp_path / "c").write_bytes(b"")
    with pytest.raises(Damaged, match="c is not what was committed"):
        opened.read("c")


# The catalog, which says which shard is whose.


def repoint(root: Path) -> None:
    """Have the catalog name another site's shard, as any client can."""
    (root / CATALOG).chmod(0o644)
    with duckdb.connect(str(root / CATALOG)) as connection:
        connection.execute("update shards set path = replace(path, 'hook_embed', 'blocks.0.hook_resid_post')")


def test_a_catalog_that_was_edited_is_refused_with_check(path):
    repoint(path)
    with Store(path) as store:  # silent
        np.testing.assert_array_equal(store.read(ALL, "r", "embed")[0], store.read(ALL, "r", "resid_post.0")[0])
    with pytest.raises(
        Damaged, match=r"catalog\.duckdb is not what was put in place .*actstore verify.*actstore repair"
    ):
        Store(path, check=True)
    repair(path, lambda *_: {})
    with Store(path, check=True) as store:
        store.read(ALL, "r", "embed")


def test_a_catalog_whose_hash_nobody_noted_is_refused_with_check(path):
    (path / tables.HASHES).unlink()
    with pytest.raises(Damaged, match=r"catalog\.duckdb is not what was put in place"):
        Store(path, check=True)


def test_a_catalog_that_writers_replace_meanwhile_is_opened_anew(path, monkeypatch):
    """Two publications later the first catalog's hash is no longer noted, and it is not damaged."""
    real, seen = hash_note.is_noted, []

    def is_noted(root, descriptor):
        if not seen:
            for number in range(2):
                with open_writer(root) as writer:
                    writer.record(pl.DataFrame({"study": [str(number)]}))
        seen.append(real(root, descriptor))
        return seen[-1]

    monkeypatch.setattr(hash_note, "is_noted", is_noted)
    with Store(path, check=True) as store:
        assert store.sql("select count(*) from results").item() == 2
    assert seen == [None, True]


@pytest.mark.parametrize("name", OLDER)
def test_a_store_of_an_older_format_is_checked_by_its_parts(name, tmp_path, monkeypatch):
    root = unpack(name, tmp_path)
    with Store(root, check=True) as store:
        expected, _ = store.read("select token_id from tokens", "r", "resid_post.0")
        assert (
            len(expected)
            == store.sql("select count(act(token_id, 'r', 'resid_post.0')) from tokens", timeout=60).item()
        )
    assert len(holds_what_it_held(root)) == 6
    part = next((root / "parts/trees").iterdir())
    damage(part, flip(100))
    with pytest.raises(Damaged):
        Store(root, check=True)


# Arrays of another tool.


def test_an_array_that_another_tool_wrote_is_read_without_check_alone(path, monkeypatch):
    with Store(path) as store:
        expected = store.read(ALL, "r", "embed")[0]
    monkeypatch.setattr(sites, "as_written", lambda *_: None)  # as if it lay otherwise
    with Store(path) as store:
        assert isinstance(store._opened.reader("r", "embed"), ForeignReader)
        np.testing.assert_array_equal(store.read(ALL, "r", "embed")[0], expected)
    with (
        Store(path, check=True) as store,
        pytest.raises(Damaged, match=r"does not lie as actstore writes .*--no-check"),
    ):
        store.read(ALL, "r", "embed")


def test_an_array_that_is_rewritten_while_a_store_is_open_is_refused(path):
    with Store(path, check=True) as store:
        array = path / "activations.zarr/r/hook_embed"
        values = zarr.open_array(array, mode="r")[:]
        (array / "zarr.json").unlink()
        zarr.create_array(array, shape=values.shape, chunks=(2, 4, 3), dtype="float32")[:] = values
        with pytest.raises(Damaged, match=r"zarr\.json is not what was committed"):
            store.read(ALL, "r", "embed")


# The command line.


@pytest.mark.parametrize(
    ("command", "checks"),
    [
        (("sql", "select sum(norm(act(token_id, 'r', 'embed'))) from tokens"), False),
        (("sql", "select sum(norm(act(token_id, 'r', 'embed'))) from tokens", "--check"), True),
        (("sql", "select sum(norm(act(token_id, 'r', 'embed'))) from tokens", "--check", "--timeout", "60"), True),
        (("read", ALL, "--run", "r", "--site", "embed", "--csv"), False),
        (("read", ALL, "--run", "r", "--site", "embed", "--csv", "--check"), True),
        (("read", ALL, "--run", "r", "--site", "embed", "--out", "x.npz"), True),
        (("read", ALL, "--run", "r", "--site", "embed", "--out", "x.npz", "--no-check"), False),
    ],
)
def test_commands_that_read_activations_check_where_they_are_told_to_or_write_a_file(
    path, tmp_path, monkeypatch, command, checks
):
    monkeypatch.chdir(tmp_path)
    assert run(command[0], path, *command[1:]).exit_code == 0
    damage(path / SHARD, flip(1_000))
    result = run(command[0], path, *command[1:])
    if checks:
        assert_one_line(result, 1, "c/1/0/0 is not what was committed", "actstore verify", "actstore repair")
    else:
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "command",
    [
        ("study", "depth", "--run", "r", "--no-record"),
        ("report", "report", "--run", "r", "--no-record"),
        ("attention", "0", "--run", "r", "--out", "a.png"),
        ("query", "accuracy_by_depth", "-p", "run", "r", "--check"),
    ],
)
def test_what_is_published_rests_on_a_checked_store(path, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    repoint(path)
    command = (command[0], path, *command[1:])
    assert_one_line(run(*command), 1, "catalog.duckdb is not what was put in place")
    plain = [word for word in command if word != "--check"] + ["--no-check"] * ("--check" not in command)
    assert run(*plain).exit_code == 0
