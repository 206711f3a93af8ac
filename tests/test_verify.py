"""A store is held against what was committed: one flipped bit anywhere is found and named, and made again to the same bytes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actstore import catalog, log
from actstore.cli import main
from actstore.errors import Damaged
from actstore.ingest import recheck
from actstore.ingest.models import Model
from actstore.ingest.pipeline import Ingest, TreeSet
from actstore.ingest.recompute import files_of
from actstore.queries import study
from actstore.repair import repair
from actstore.store import Store
from actstore.verify import verify
from actstore.writer import open_writer
from tests.stores import files
from tests.test_pipeline import small_model

TREES = TreeSet("reproduction", 40, seed=1, n_nodes=6, name="d", trees_per_shard=16)


def make(root, model=None):
    """A run with sites, one over variants without, continuations, and a study's results."""
    model = model or small_model()
    Ingest(root, model, TREES, sites=["embed", "resid_post.1", "pattern.0"]).execute()
    varied = replace(TREES, name="d-swap_last", variant_of="d", change="swap_last")
    Ingest(root, model, varied, sites=[]).execute()
    Ingest(root, model, TREES, prompt="tree").execute()
    with Store(root) as store:
        results = study.run(store, "depth", run="small").results
    with open_writer(root) as writer:
        writer.record(results)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("verify") / "s.act")


@pytest.fixture
def store(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s.act")
    return tmp_path / "s.act"


def damage(path: Path, change):
    """Change a file that is read-only."""
    content = bytearray(path.read_bytes())
    change(content)
    mode = path.stat().st_mode
    path.unlink()
    path.write_bytes(content)
    path.chmod(mode)


def flip(offset, bit=0):
    def change(content):
        content[offset] ^= 1 << bit

    return change


def shorten(content):
    del content[-1]


def committed(root):
    return [file for manifest in log.manifests(root) for file in manifest.files]


def test_a_store_that_is_whole_has_nothing_wrong(whole):
    report = verify(whole)
    assert report.findings == []
    assert report.n_files == len(committed(whole))
    assert report.n_bytes == sum(os.path.getsize(whole / file.path) for file in committed(whole))


def test_a_flipped_bit_in_any_file_is_found_and_named(store):
    rng = np.random.default_rng(0)
    names = [file.path for file in committed(store)] + [catalog.NAME]
    names += [log.manifest_path(number) for number in (1, 3, len(log.manifests(store)))]
    for name in names:
        before = (store / name).read_bytes()
        damage(store / name, flip(int(rng.integers(len(before))), int(rng.integers(8))))
        found = verify(store).damage
        assert [finding.path for finding in found][:1] == [name], name
        damage(store / name, lambda content, before=before: content.__init__(before))
    assert verify(store).findings == []


def test_a_finding_says_which_run_site_batch_and_trees(store):
    name = "activations.zarr/small/blocks.1.hook_resid_post/c/2/0/0"
    damage(store / name, flip(100))
    (found,) = verify(store).damage
    assert (found.kind, found.run, found.site, found.batch) == ("shard", "small", "blocks.1.hook_resid_post", 2)
    assert found.trees == "32 to 39"


def test_quick_finds_what_is_shorter_or_gone_and_indices_that_are_not_their_own(store):
    shard = "activations.zarr/small/hook_embed/c/0/0/0"
    damage(store / shard, flip(-10))
    assert [finding.path for finding in verify(store, quick=True).damage] == [shard]
    damage(store / shard, flip(-10))
    damage(store / "parts/tokens/d-000001.parquet", shorten)
    (store / "parts/edges/d-000000.parquet").unlink()
    whats = {finding.path: finding.what for finding in verify(store, quick=True).damage}
    assert whats.keys() == {"parts/tokens/d-000001.parquet", "parts/edges/d-000000.parquet"}
    assert "bytes long" in whats["parts/tokens/d-000001.parquet"]
    assert whats["parts/edges/d-000000.parquet"] == "is missing"


def test_quick_does_not_read_what_chunks_hold(store):
    damage(store / "activations.zarr/small/hook_embed/c/0/0/0", flip(10))
    assert not verify(store, quick=True).damage


def test_a_catalog_that_was_put_in_place_and_is_not_what_its_parts_say_is_found(store):
    import duckdb

    os.chmod(store / catalog.NAME, 0o644)
    with duckdb.connect(str(store / catalog.NAME)) as connection:
        connection.execute("update edges set source = target, target = source where tree_id = 3 and edge = 2")
    (store / catalog.HASHES).write_text(json.dumps({"xxh3_128": [_hash(store / catalog.NAME)]}))
    whats = [finding.what for finding in verify(store).damage]
    assert whats == ["the parts lack 1 rows of table edges", "it lacks 1 rows of table edges"]


def _hash(path):
    import xxhash

    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def test_what_no_commit_names_is_no_damage(store):
    (store / "parts/tokens/left-000009.parquet").write_bytes(b"half")
    report = verify(store)
    assert [finding.kind for finding in report.findings] == ["stray"]
    assert not report.damage


def test_a_manifest_that_is_gone_is_missed_even_where_it_was_the_last(store):
    (store / log.manifest_path(len(log.manifests(store)))).unlink()
    assert [finding.what for finding in verify(store).damage] == ["is missing"]


# Repair.


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
    for name in [*names, catalog.NAME]:
        damage(store / name, flip(50))
    done = repair(store, files_of)
    assert set(done.mended) == {*names, catalog.NAME}
    assert without_catalog(store) == before


def test_a_file_that_is_gone_or_cut_short_comes_back(store):
    before = without_catalog(store)
    shutil.rmtree(store / "activations.zarr/small/hook_embed")
    damage(store / "parts/edges/d-000000.parquet", shorten)
    (store / "activations.zarr/zarr.json").unlink()
    (store / catalog.NAME).unlink()
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
    damage(store / log.manifest_path(2), change)
    with pytest.raises(Damaged, match="restore it from a copy"):
        repair(store, files_of)


@pytest.mark.parametrize("name", [log.manifest_path(2), "store.json", catalog.HASHES])
def test_a_bit_of_a_file_that_nothing_else_describes_is_flipped_back(store, name):
    before, rng = files(store), np.random.default_rng(3)
    for _ in range(8):
        damage(store / name, flip(int(rng.integers(len(before[name]))), int(rng.integers(8))))
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
    mended = CliRunner().invoke(main, ["repair", str(store)])
    assert mended.exit_code == 0
    assert "1 files mended" in mended.stdout
    assert CliRunner().invoke(main, ["verify", str(store)]).exit_code == 0
    assert CliRunner().invoke(main, ["verify", str(store), "--quick"]).exit_code == 0


# Silently wrong.


def differing(root, n=12):
    return {(of.run, of.what) for of in recheck.compare(root, n) if not of.agrees}


def test_a_store_of_what_its_weights_give_agrees(whole):
    found = recheck.compare(whole, 12)
    assert all(of.agrees for of in found)
    assert {of.what for of in found if of.run == "small"} == {
        *("vocabulary", "trees", "edges", "tokens", "embed", "pattern.0", "resid_post.1", "predictions", "outcomes"),
    }
    assert {"generations", "probabilities"} <= {of.what for of in found}


def planted(root, monkeypatch, change):
    """A store whose activations are what `change` makes of a batch's, and all its checksums right."""
    from actstore.arrays import ShardBuffer

    seal = ShardBuffer.seal

    def changed(self, lengths):
        if len(self.rows.shape) == 3:
            change(self.rows)
        return seal(self, lengths)

    monkeypatch.setattr(ShardBuffer, "seal", changed)
    Ingest(root, small_model(), TREES, sites=["embed", "resid_post.1"]).execute()
    monkeypatch.undo()
    assert verify(root).findings == []
    return root


def test_shuffled_rows_are_caught(tmp_path, monkeypatch):
    def shuffle(rows):
        rows[:, :8] = rows[:, :8][:, ::-1].copy()

    assert ("small", "resid_post.1") in differing(planted(tmp_path / "s.act", monkeypatch, shuffle))


def test_a_shifted_position_is_caught(tmp_path, monkeypatch):
    def shift(rows):
        rows[1:] = rows[:-1].copy()

    assert ("small", "resid_post.1") in differing(planted(tmp_path / "s.act", monkeypatch, shift))


def test_a_small_error_in_one_number_in_a_hundred_is_caught(tmp_path, monkeypatch):
    def nudge(rows):
        rows[..., 0] += 0.01 * np.abs(rows).max()

    assert ("small", "embed") in differing(planted(tmp_path / "s.act", monkeypatch, nudge))


def test_other_weights_than_those_written_down_are_caught(tmp_path):
    ours, theirs = small_model(seed=1), small_model(seed=2)
    liar = Model("small", theirs.config, theirs.bridge, ours.weights, ours.weights_sha256, "small")
    Ingest(tmp_path / "s.act", liar, TREES, sites=["embed", "resid_post.1"]).execute()
    assert verify(tmp_path / "s.act").findings == []
    assert {("small", "embed"), ("small", "resid_post.1"), ("small", "predictions")} <= differing(tmp_path / "s.act")


def test_another_vocabulary_is_caught(tmp_path, monkeypatch):
    from actstore.ingest.tokens import Vocabulary

    words = Vocabulary.words
    monkeypatch.setattr(Vocabulary, "words", lambda self: words(self)[::-1])
    Ingest(tmp_path / "s.act", small_model(), TREES, sites=["embed"]).execute()
    monkeypatch.undo()
    assert differing(tmp_path / "s.act") == {("small", "vocabulary")}


def test_rows_that_belong_to_another_tree_are_caught(tmp_path, monkeypatch):
    from actstore.ingest import pipeline

    rows = pipeline.token_rows
    monkeypatch.setattr(pipeline, "token_rows", lambda trees, first: rows(trees[::-1], first))
    Ingest(tmp_path / "s.act", small_model(), TREES, sites=["embed"]).execute()
    monkeypatch.undo()
    assert ("small", "tokens") in differing(tmp_path / "s.act")


def test_the_command_refuses_what_its_weights_do_not_give(tmp_path, monkeypatch):
    from click.testing import CliRunner

    def shift(rows):
        rows[1:] = rows[:-1].copy()

    root = planted(tmp_path / "s.act", monkeypatch, shift)
    found = CliRunner().invoke(main, ["verify", str(root), "--recompute", "5"])
    assert found.exit_code == 1
    assert "not what its weights and trees give" in found.stderr
