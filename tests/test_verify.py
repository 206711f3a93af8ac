"""A store is held against what was committed: one flipped bit anywhere is found and named."""

import json
import os
import threading
from dataclasses import replace

import duckdb
import numpy as np

from actstore.catalog import build, hash_note, tables
from actstore.commits import log
from actstore.commits.manifest import manifest_path
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.storage import hashing, local
from actstore.upkeep import verify as verifying
from actstore.upkeep import verify_catalog
from actstore.upkeep.verify import verify
from tests.damaged import TREES, committed, damage, flip, shorten
from tests.test_pipeline import small_model


def test_a_store_that_is_whole_has_nothing_wrong(damageable):
    report = verify(damageable)
    assert report.findings == []
    assert report.n_files == len(committed(damageable))
    assert report.n_bytes == sum(os.path.getsize(damageable / file.path) for file in committed(damageable))


def test_a_flipped_bit_in_any_file_is_found_and_named(store):
    rng = np.random.default_rng(0)
    names = [file.path for file in committed(store)] + [tables.CATALOG]
    names += [manifest_path(number) for number in (1, 3, len(log.manifests(store)))]
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
    _edit_catalog(store, "update edges set source = target, target = source where tree_id = 3 and edge = 2")
    whats = [finding.what for finding in verify(store).damage]
    assert whats == ["the parts lack 1 rows of table edges", "it lacks 1 rows of table edges"]


def test_a_role_that_the_catalog_tells_otherwise_is_found(store):
    """Roles are an ENUM there and text in the parts, and are compared as text."""
    _edit_catalog(store, "update tokens set role = 'root' where token_id = (select min(token_id) from tokens)")
    whats = [finding.what for finding in verify(store).damage]
    assert whats == ["the parts lack 1 rows of table tokens", "it lacks 1 rows of table tokens"]


def test_rows_of_a_table_that_no_commit_filled_are_found(store):
    _edit_catalog(store, "insert into vocabularies values ('v', 0, 'a')")
    whats = [finding.what for finding in verify(store).damage]
    assert whats[-1] == "the parts lack 1 rows of table vocabularies"


def test_verify_opens_the_catalog_once(damageable, monkeypatch):
    """Each opening takes 20 ms, as long as hashing 300 MB."""
    opened, connect = [], duckdb.connect
    monkeypatch.setattr(duckdb, "connect", lambda *about, **more: opened.append(about) or connect(*about, **more))
    assert verify(damageable).findings == []
    assert len(opened) == 1


def test_verify_has_as_many_threads_as_there_are_processors(damageable, monkeypatch):
    """Hashing and the catalog's comparison keep each busy: a further thread takes time from both."""
    seen = set[int]()

    def seen_in(call):
        return lambda *about: seen.add(threading.get_ident()) or call(*about)

    monkeypatch.setattr(verifying, "n_processors", lambda: 2)
    monkeypatch.setattr(local, "hash_of", seen_in(hashing.hash_of))
    monkeypatch.setattr(verify_catalog, "wrong_with", seen_in(verify_catalog.wrong_with))
    assert verify(damageable).findings == []
    assert 1 <= len(seen) <= 2
    assert threading.get_ident() not in seen


def _edit_catalog(store, change):
    """Change a catalog, and note the hash that it then has, so that it passes for what was put in place."""
    os.chmod(store / tables.CATALOG, 0o644)
    with duckdb.connect(str(store / tables.CATALOG)) as connection:
        connection.execute(change)
    (store / tables.HASHES).write_text(json.dumps({"xxh3_128": [_hash(store / tables.CATALOG)]}))


def _hash(path):
    import xxhash

    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def test_what_no_commit_names_is_no_damage(store):
    (store / "parts/tokens/left-000009.parquet").write_bytes(b"half")
    report = verify(store)
    assert [finding.kind for finding in report.findings] == ["stray"]
    assert not report.damage


def test_a_manifest_that_is_gone_is_missed_even_where_it_was_the_last(store):
    (store / manifest_path(len(log.manifests(store)))).unlink()
    assert [finding.what for finding in verify(store).damage] == ["is missing"]


def test_what_a_manifest_that_cannot_be_read_may_name_is_no_stray(store):
    """No writer removes it: a store without that manifest refuses every writer."""
    damage(store / manifest_path(len(log.manifests(store))), shorten)
    assert {finding.kind for finding in verify(store).findings} == {"manifest"}


def test_the_group_of_all_arrays_is_looked_at(store):
    damage(store / "activations.zarr/zarr.json", flip(8))
    assert [(found.path, found.kind) for found in verify(store).damage] == [("activations.zarr/zarr.json", "metadata")]


def test_a_manifest_that_leads_outside_the_store_is_damage(store):
    manifest = log.manifests(store)[0]
    elsewhere = replace(manifest, others=[replace(manifest.others[0], path="../elsewhere/zarr.json")])
    (store / manifest_path(1)).unlink()
    (store / manifest_path(1)).write_bytes(elsewhere.to_json())
    assert "no path inside the store" in verify(store).damage[0].what


def test_damage_of_the_catalog_is_not_carried_on_into_the_next_one(store):
    damage(store / tables.CATALOG, flip(os.path.getsize(store / tables.CATALOG) - 1))
    before = verify(store).damage
    execute(Ingest(store, small_model(), TREES, run="again", sites=["embed"]))
    assert [found.path for found in before] == [tables.CATALOG]
    assert verify(store).findings == []


def test_a_catalog_that_a_writer_replaces_meanwhile_is_no_damage(store, monkeypatch):
    hash_of, times = hashing.hash_of, []

    def slowly(descriptor):
        found = hash_of(descriptor)
        for _ in range(2 if not times else 0):  # two later catalogs, so that the one that was opened is noted no more
            os.chmod(store / tables.CATALOG, 0o644)
            build.publish(store, from_nothing=True)
        times.append(found)
        return found

    monkeypatch.setattr(hash_note, "hash_of", slowly)
    assert verify(store).findings == []
    assert len(times) == 2
