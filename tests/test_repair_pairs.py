"""Two files damaged at once, of every pair of kinds: repair makes both as they were, or says what to restore."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from shutil import copyfile

import duckdb
import polars as pl
import pytest

from actstore.catalog import build, hash_note, tables
from actstore.commits import checkpoint, log
from actstore.commits.format import CHECKPOINT, part_path
from actstore.commits.manifest import Manifest, manifest_path
from actstore.errors import ActstoreError, Damaged
from actstore.store import Store
from actstore.upkeep import verify_catalog
from actstore.upkeep.repair import Repair, repair
from actstore.upkeep.verify import verify
from actstore.writing.parts import rows_committed
from actstore.writing.writer import open_writer
from tests.damaged import damage, flip, shorten
from tests.stores import fake, files
from tests.test_advice import advised_commands, run

RUN = fake(n_trees=4, trees_per_shard=2, sites=("resid_post.0",))
SHA256 = str(RUN.plan.model["weights_sha256"])
WEIGHTS = f"models/{SHA256}.safetensors"
PARTS = {
    **{table: part_path(table, "r", 1) for table in ("predictions", "outcomes")},
    **{table: part_path(table, "d", 1) for table in ("trees", "edges", "tokens")},
    **{table: part_path(table, "r") for table in ("runs", "sites")},
    **{"datasets": part_path("datasets", "d"), "models": part_path("models", SHA256)},
    "results": part_path("results", "00000004"),
}


def flipped(content: bytearray) -> None:
    """A bit flips to what no JSON of a store holds, which is found without a try of every bit."""
    flip(len(content) // 2, 7)(content)


KINDS: dict[str, tuple[str, Callable[[bytearray], None]]] = {
    **{table: (path, flipped) for table, path in PARTS.items()},
    "catalog": (tables.CATALOG, flip(50)),
    "noted hash": (tables.HASHES, shorten),
    "checkpoint": (CHECKPOINT, flipped),
    "store.json": ("store.json", flipped),
    "store.json cut": ("store.json", shorten),
    "manifest": (manifest_path(1), flipped),
    "manifest cut": (manifest_path(4), shorten),
    "shard": ("activations.zarr/r/blocks.0.hook_resid_post/c/1/0/0", flipped),
    "weights": (WEIGHTS, flip(2)),
}
FOR_THE_RUN = ("runs", "models", "datasets")  # rows that the run's model needs, and that nothing else here tells
STAND_FOR_ALL = (*FOR_THE_RUN, "trees", "predictions")  # tables that are paired with every kind
WHENCE = ("catalog", "weights")  # what rows are made again from, so every table is paired with them
PAIRS = [
    pair
    for pair in combinations(KINDS, 2)
    if KINDS[pair[0]][0] != KINDS[pair[1]][0] and ({*pair} & {*WHENCE} or not {*pair} & PARTS.keys() - {*STAND_FOR_ALL})
]
REFUSED = {pair for pair in PAIRS if {"store.json cut", "manifest cut"} & {*pair}}
LEFT = {pair for pair in PAIRS if "weights" in pair} | {(table, "catalog") for table in (*FOR_THE_RUN, "results")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store of a run, its two batches and a study's results."""
    root = tmp_path_factory.mktemp("pairs") / "s.act"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "LEAST", 3)
        with open_writer(root, make=True) as writer:
            RUN.write(writer)
            writer.record(pl.DataFrame({"study": ["depth"], "run": ["r"], "metric": ["accuracy"], "value": [0.5]}))
        assert verify(root).findings == []
        yield root


@pytest.fixture
def root(whole: Path) -> Iterator[Path]:
    """The same store, which is put back after a test."""
    before = files(whole)
    yield whole
    put_back(whole, before)


def put_back(root: Path, before: dict[str, bytes]) -> None:
    there = files(root)
    for path in {path for path in there.keys() | before.keys() if there.get(path) != before.get(path)}:
        (root / path).unlink(missing_ok=True)
        if path in before:
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_bytes(before[path])


def again(root: Path, before: dict[str, bytes]) -> Callable[[Path, list[Manifest], str, int | None], dict[str, bytes]]:
    """What the run's own model gives: the files as they were, from rows and weights that are whole."""
    manifests = log.manifests(root)

    def recompute(_: Path, sound: list[Manifest], run: str, batch: int | None) -> dict[str, bytes]:
        if (root / WEIGHTS).read_bytes() != before[WEIGHTS] or any(
            rows_committed(root, sound, table).is_empty() for table in FOR_THE_RUN
        ):
            raise Damaged("what it needs is damaged, too")
        of_this = [manifest for manifest in manifests if (manifest.run, manifest.batch) == (run, batch)]
        return {file.path: before[file.path] for manifest in of_this for file in manifest.files}

    return recompute


def check_outcome(root: Path, before: dict[str, bytes], done: Repair) -> None:
    """What is not left is as it was, and what is left is named with what to restore."""
    there, left = files(root), {finding.path for finding in done.left}
    for finding in done.left:
        assert "restore it from a copy of the store" in finding.what
        assert "\n" not in finding.what
    if any(path.startswith("parts/") for path in left):
        left |= {tables.CATALOG}  # without the part, no catalog is built
    else:
        assert hash_note.is_whole(root)
    assert {path for path in before if there[path] != before[path]} - {tables.HASHES} == left


def test_repair_of_each_pair_mends_both_or_names_what_to_restore(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, refused, left = files(root), set(), set()
    recompute, built = again(root, before), root.parent / "built"
    built.write_bytes(before[tables.CATALOG])
    # other tests build catalogs and compare rows; here one of the same bytes stands for one with the same rows
    monkeypatch.setattr(build, "_extend", lambda root, path, *commits: copyfile(built, path))
    monkeypatch.setattr(verify_catalog, "_rows_that_differ", lambda *about: iter(()))
    for pair in PAIRS:
        for kind in pair:
            damage(root / KINDS[kind][0], KINDS[kind][1])
        damaged = files(root)
        try:
            done = repair(root, recompute)
        except ActstoreError as error:
            said = str(error)
            refused |= {pair} if "\n" not in said and said.count("restore it from a copy of the store") == 1 else set()
            assert files(root) == damaged, f"{pair} were refused, and something was changed"
        else:
            left |= {pair} if done.left else set()
            check_outcome(root, before, done)
            for finding in done.left:  # as its advice says
                (root / finding.path).unlink()
                (root / finding.path).write_bytes(before[finding.path])
            assert not done.left or repair(root, recompute).left == []
        put_back(root, before)
    assert (refused, left) == (REFUSED, LEFT - REFUSED)


def with_number(root: Path, commits: int) -> None:
    """A catalog whose number of commits is another than it was."""
    (root / tables.CATALOG).chmod(0o644)
    with duckdb.connect(str(root / tables.CATALOG)) as connection:
        connection.execute("update snapshot set snapshot = ?", [commits])


def test_a_catalog_whose_number_of_commits_is_damaged_is_built_anew(root: Path) -> None:
    before = files(root)
    recompute = again(root, before)
    with_number(root, 4 + 64)
    assert {finding.path for finding in verify(root).damage} == {tables.CATALOG}
    with pytest.raises(Damaged, match=r"lacks manifest 5 of 68; .* if the catalog only says .*actstore repair"):
        Store(root)
    damage(root / manifest_path(2), flipped)  # which is the other witness
    assert set(repair(root, recompute).mended) == {manifest_path(2), tables.CATALOG}
    assert verify(root).findings == []
    with_number(root, 4 + 64)  # the bytes that were there once, and were never noted
    with open_writer(root):
        pass
    with Store(root) as store:
        assert store.snapshot == 4


def test_a_number_that_no_witness_settles_is_refused_with_both_that_may_be_wrong(root: Path) -> None:
    before = files(root)
    recompute = again(root, before)
    (root / manifest_path(4)).unlink()  # a log that was cut short, by a catalog that is whole
    with pytest.raises(Damaged, match=r"00000004\.json: is missing; it cannot be made again: restore it from a copy"):
        repair(root, recompute)
    with_number(root, 68)
    there = files(root)
    with pytest.raises(Damaged, match="never had more than 3 commits") as caught:
        repair(root, recompute)
    assert files(root) == there
    removed = re.search(r"remove (\S+) and run `actstore repair", str(caught.value))
    assert removed
    Path(removed[1]).unlink()
    (command,) = advised_commands(str(caught.value))
    assert run(*command).exit_code == 0
    with Store(root) as store:
        assert store.snapshot == 3
    assert verify(root).findings == []


def test_what_a_killed_writer_left_beside_the_folders_is_swept(root: Path) -> None:
    names = ["store.json", tables.CATALOG, tables.HASHES, CHECKPOINT]
    left = [f".{name}.{'0' * 32}.tmp" for name in names] + [f".{tables.CATALOG}.{'0' * 32}.tmp.wal"]
    mine = [".notes.tmp", ".store.json.swp"]
    for name in left + mine:
        (root / name).write_bytes(b"x")
    repair(root, lambda *of: {})
    assert not {*left} & {*files(root)}
    assert {*mine} <= {*files(root)}
    for name in mine:
        (root / name).unlink()
