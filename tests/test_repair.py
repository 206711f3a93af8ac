"""What is damaged is made again, to the same bytes, or left and said to be."""

import json
import re
import shutil

import numpy as np
import pytest

from actstore.catalog import tables
from actstore.cli import main
from actstore.commits import log
from actstore.commits.format import part_path
from actstore.commits.manifest import Manifest, manifest_path
from actstore.errors import Damaged
from actstore.ingest.jobs import stored
from actstore.ingest.models import load
from actstore.ingest.replay import definitions
from actstore.ingest.replay.remake import files_of
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from tests.damaged import committed, damage, flip, shorten
from tests.stores import fake, files
from tests.test_pipeline import small_model


def kinds(root):
    """One file of each kind that can be made again."""
    return [
        "activations.zarr/small/blocks.1.hook_resid_post/c/1/0/0",
        "activations.zarr/small/blocks.0.attn.hook_pattern/c/2/0/0/0",
        "activations.zarr/small/hook_embed/zarr.json",
        "activations.zarr/small/zarr.json",
        *(f"parts/{table}/d-swap_last-000001.parquet" for table in ("trees", "edges", "tokens")),
        *(f"parts/{table}/small-000002.parquet" for table in ("predictions", "outcomes")),
        "parts/outcomes/small-swap_last-000000.parquet",
        "parts/generations/small-dreams-000000.parquet",
        "parts/runs/small.parquet",
        "parts/sites/small.parquet",
        "parts/datasets/d-swap_last.parquet",
        next(file.path for file in committed(root) if file.path.startswith("parts/models/")),
        next(file.path for file in committed(root) if file.path.startswith("parts/results/")),
    ]


def without_catalog(root):
    return {path: content for path, content in files(root).items() if not path.startswith("catalog.")}


def test_each_kind_of_file_is_made_again_to_the_same_bytes(store):
    before, names = without_catalog(store), kinds(store)
    for name in names:
        damage(store / name, flip(len(before[name]) // 2))
    done = repair(store, files_of)
    assert set(done.mended) == set(names)
    assert done.left == []
    assert without_catalog(store) == before
    assert verify(store).findings == []


def test_rows_are_computed_anew_where_the_catalog_is_gone_too(store):
    before = without_catalog(store)
    names = [f"parts/{table}/small-000001.parquet" for table in ("predictions", "outcomes")] + [
        "parts/tokens/d-000001.parquet"
    ]
    for name in [*names, tables.CATALOG]:
        damage(store / name, flip(50))
    done = repair(store, files_of)
    assert set(done.mended) == {*names, tables.CATALOG}
    assert without_catalog(store) == before


OF_DEFINITION = ["datasets/d", "datasets/d-swap_last", "runs/small", "runs/small-dreams", "sites/small"]
OF_BATCHES = [
    *("trees/d-000001", "edges/d-swap_last-000000", "tokens/d-000001", "predictions/small-000001"),
    *("outcomes/small-swap_last-000001", "generations/small-dreams-000001"),
]


@pytest.mark.parametrize("name", OF_DEFINITION + OF_BATCHES)
def test_a_part_is_made_again_though_the_catalog_is_damaged_too(store, name):
    path = f"parts/{name}.parquet"
    before = (store / path).read_bytes()
    for damaged in (path, tables.CATALOG):
        damage(store / damaged, flip(50))
    done = repair(store, files_of)
    assert (set(done.mended), done.left) == ({path, tables.CATALOG}, [])
    assert (store / path).read_bytes() == before
    if name in OF_DEFINITION[::3]:
        assert verify(store).findings == []


def test_all_parts_at_once_come_out_of_a_catalog_that_is_whole(store):
    before = without_catalog(store)
    names = {path for path in before if path.startswith("parts/")}
    for name in names:
        damage(store / name, flip(50))
    done = repair(store, files_of)
    assert (set(done.mended), done.left) == (names, [])
    assert without_catalog(store) == before


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("models", "restore it from a copy of the store, or put the model that was run .*actstore models add.*repair"),
        (
            "results",
            "only the catalog, which is damaged, too.*restore it from a copy of the store, or .*actstore study",
        ),
    ],
)
def test_what_nothing_else_tells_is_left_with_the_command_that_makes_it_anew(store, table, said):
    (path,) = [file.path for file in committed(store) if file.path.startswith(f"parts/{table}/")]
    before = files(store)
    for damaged in (path, tables.CATALOG):
        damage(store / damaged, flip(50))
    done = repair(store, files_of)
    assert [(finding.path, "\n" in finding.what) for finding in done.left] == [(path, False)]
    assert re.search(said, done.left[0].what)
    damage(store / path, lambda content: content.__init__(before[path]))
    assert repair(store, files_of).left == []
    assert verify(store).findings == []


def test_a_models_row_comes_from_a_model_that_can_be_named(store, monkeypatch):
    (path,) = [file.path for file in committed(store) if file.path.startswith("parts/models/")]
    (weights,) = [store / file.path for file in committed(store) if file.path.startswith("models/")]
    for damaged in (path, tables.CATALOG):
        damage(store / damaged, flip(50))
    monkeypatch.setattr(stored, "available", lambda: ["small"])
    monkeypatch.setattr(definitions, "by_name", lambda: {"small": weights})
    monkeypatch.setattr(load, "load", lambda name: small_model())
    assert set(repair(store, files_of).mended) == {path, tables.CATALOG}
    assert verify(store).findings == []


def test_a_file_that_is_gone_or_cut_short_comes_back(store):
    before = without_catalog(store)
    shutil.rmtree(store / "activations.zarr/small/hook_embed")
    damage(store / "parts/edges/d-000000.parquet", shorten)
    (store / "activations.zarr/zarr.json").unlink()
    (store / tables.CATALOG).unlink()
    repair(store, files_of)
    assert without_catalog(store) == before


def test_weights_that_no_model_has_are_left_and_said_to_be(store):
    name = next(path for path in files(store) if path.startswith("models/"))
    before = files(store)[name]
    damage(store / name, flip(5))
    done = repair(store, files_of)
    assert [finding.path for finding in done.left] == [name]
    assert "no model 'small' has them" in done.left[0].what
    assert (store / name).read_bytes() != before


def test_what_is_computed_otherwise_is_not_put_in_place(store):
    name = "activations.zarr/small/hook_embed/c/0/0/0"
    damage(store / name, flip(9))
    held = (store / name).read_bytes()
    done = repair(store, lambda *asked: {name: b"something else"})
    assert [finding.path for finding in done.left] == [name]
    assert "other versions or on another machine" in done.left[0].what
    assert (store / name).read_bytes() == held


@pytest.mark.parametrize("change", [shorten, lambda content: content.__init__(content[:20] + b"~~" + content[22:])])
def test_a_manifest_of_which_more_than_a_bit_is_damaged_is_not_guessed_at(store, change):
    damage(store / manifest_path(2), change)
    with pytest.raises(Damaged, match="restore it from a copy"):
        repair(store, files_of)


@pytest.mark.parametrize("name", [manifest_path(2), "store.json", tables.HASHES])
def test_a_bit_of_a_file_that_nothing_else_describes_is_flipped_back(store, name):
    before, rng = files(store), np.random.default_rng(3)
    for _ in range(8):
        size = (
            (store / name).stat().st_size
        )  # a catalog built anew to the same bytes is noted once, so the note is shorter
        damage(store / name, flip(int(rng.integers(size)), int(rng.integers(8))))
        assert [finding.path for finding in verify(store).damage] == [name]
        assert repair(store, files_of).mended == [name]
        assert without_catalog(store) == {k: v for k, v in before.items() if not k.startswith("catalog.")}


def test_the_commands_say_what_is_wrong_and_mend_it(store):
    from click.testing import CliRunner

    name = "activations.zarr/small/hook_embed/c/1/0/0"
    damage(store / name, flip(77))
    found = CliRunner().invoke(main, ["verify", str(store), "--json"])
    assert found.exit_code == 1
    assert json.loads(found.stdout)[0]["path"] == name
    assert "mend it with `actstore repair" in found.stderr
    mended = CliRunner().invoke(main, ["repair", str(store), "--json"])
    assert mended.exit_code == 0
    assert [done["path"] for done in json.loads(mended.stdout)] == [name]
    assert "1 files mended" in mended.stderr
    assert CliRunner().invoke(main, ["verify", str(store)]).exit_code == 0
    assert CliRunner().invoke(main, ["verify", str(store), "--quick"]).exit_code == 0


def keys_of_parts(*names):
    """The body of a manifest whose parts have these keys alone."""
    real = Manifest._body

    def body(manifest):
        found = real(manifest)
        return {**found, "parts": [{key: part[key] for key in names if key in part} for part in found["parts"]]}

    return body


def test_rows_of_older_manifests_which_do_not_say_whose_they_are_come_out_of_the_catalog(tmp_path, monkeypatch):
    root, said = tmp_path / "s.act", {}
    for older in (False, True):
        if older:
            monkeypatch.setattr(Manifest, "_body", keys_of_parts("path", "bytes", "xxh3_128", "table", "rows"))
        shutil.rmtree(root, ignore_errors=True)
        fake("r-1", "d-000001", n_trees=5, trees_per_shard=3).store(root)
        fake("s", "d-000001", n_trees=5, trees_per_shard=3, weights=b"others", sites=()).store(root)
        fake("t", "e", n_trees=5, trees_per_shard=2, seed=1, sites=()).store(root)
        said[older] = [part for manifest in log.manifests(root) for part in manifest.parts]
    assert b"owner" not in (root / manifest_path(2)).read_bytes()
    for new, old in zip(said[False], said[True], strict=True):
        assert new.owner.startswith(old.owner) if new.table == "models" else new.owner == old.owner
        assert (new.path, new.batch) == (old.path, old.batch)
        assert old.first_tree_id in (None, new.first_tree_id)
        assert part_path(old.table, old.owner, old.batch) == part_path(new.table, new.owner, new.batch) == new.path
        damage(root / new.path, shorten)
    assert set(repair(root, lambda *of: {}).mended) == {part.path for part in said[True]}
    assert verify(root).findings == []
