"""Stores of every format there has been, kept for ever: today's version reads them as they are, and brings them up to date.

`tests/fixtures/format-N.tar.xz` is what the first version of format N made of six trees of four nodes: activations that count
0, 1, 2, …, and, from format 2 on, a study's results. `format-2-checksums.tar.xz` is what the last version of format 2 made,
whose store.json and catalog.json carry checksums.
"""

import json
import tarfile
from pathlib import Path

import duckdb
import numpy as np
import pytest

from actstore.catalog.tables import CATALOG
from actstore.commits import log
from actstore.commits.format import FORMAT_VERSION
from actstore.commits.manifest import manifest_path
from actstore.errors import Damaged, TooNew, TooOld
from actstore.ingest.replay.remake import files_of
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
from tests.stores import TABLES, fake, files

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.name.removesuffix(".tar.xz") for path in FIXTURES.glob("format-*.tar.xz"))
OLDER = [name for name in NAMES if int(name.split("-")[1]) < FORMAT_VERSION]
NEWEST = f"format-{FORMAT_VERSION}"


def unpack(name, into):
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(into, filter="data")
    return into / "s.act"


def holds_what_it_held(root):
    with Store(root) as store:
        assert store.runs() == ["r"]
        X, rows = store.read("select token_id, tree_id, position from tokens order by token_id", "r", "resid_post.0")
        np.testing.assert_array_equal(X[:, 0], rows["tree_id"].to_numpy())
        np.testing.assert_array_equal(X[:, 1], rows["position"].to_numpy())
        assert store.sql("select count(*) as n from outcomes where greedy_right")["n"].item() == 6
        assert store.sql("select count(*) as n from generations")["n"].item() == 0
        return store.sql("select root, goal, path from trees order by tree_id").rows()


def test_every_format_has_a_fixture():
    assert {f"format-{version}" for version in range(1, FORMAT_VERSION + 1)} <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_store_of_each_format_is_whole_and_is_read_as_it_is(name, tmp_path):
    root = unpack(name, tmp_path)
    assert verify(root).damage == []
    before = files(root)
    assert len(holds_what_it_held(root)) == 6
    with Store(root) as store:
        held = {table: store.sql(f"from {table}") for table in TABLES if table != "snapshot"}
        assert store.sql("select count(*) as n from tokens", timeout=60)["n"].item() == held["tokens"].height
        assert store.info()["run"].to_list() == ["r"]
    assert files(root) == before, "reading changed the store"
    repair(root, files_of)
    assert json.loads((root / "store.json").read_text())["format"] == FORMAT_VERSION
    assert verify(root).findings == []
    with open_writer(root):
        pass
    with Store(root) as store:
        for table, rows in held.items():
            assert store.sql(f"from {table}").equals(rows), table


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_stand_for_the_catalog_are_checked(name, tmp_path):
    root = unpack(name, tmp_path)
    (part,) = [path for path in root.glob("parts/outcomes/*.parquet") if "000000" in path.name][:1]
    content = part.read_bytes()
    assert content.count(b"Polars") == 1, "the writer's name, which changes no row"
    part.chmod(0o644)
    part.write_bytes(content.replace(b"Polars", b"Pqlars"))
    Store(root).close()
    with pytest.raises(Damaged, match="is not what was committed"):
        Store(root, check=True)


@pytest.mark.parametrize("name", OLDER)
def test_an_older_store_is_not_written_to_before_it_is_up_to_date(name, tmp_path):
    root = unpack(name, tmp_path)
    with pytest.raises(TooOld, match=r"has format \d+, made by actstore .*actstore repair"), open_writer(root):
        pass


@pytest.mark.parametrize("name", OLDER)
def test_what_is_written_to_an_older_store_is_chained_to_its_last_manifest(name, tmp_path):
    root = unpack(name, tmp_path)
    old = files(root)
    repair(root, files_of)
    fake("s", "e", n_trees=5, trees_per_shard=4, seed=1, sites=["resid_post.0"]).store(root)
    committed = log.manifests(root)
    assert [manifest.previous is None for manifest in committed] == [manifest.format < 3 for manifest in committed]
    assert {path: content for path, content in files(root).items() if path in old and path.startswith("log/")} == {
        path: content for path, content in old.items() if path.startswith("log/")
    }
    assert verify(root).findings == []


@pytest.mark.parametrize("name", OLDER)
def test_an_older_store_whose_log_was_cut_short_is_damaged(name, tmp_path):
    root = unpack(name, tmp_path)
    last = len(log.manifests(root))
    (root / manifest_path(last)).unlink()
    with pytest.raises(Damaged, match=f"lacks manifest {last}"):
        Store(root)


def test_a_newer_store_is_refused_with_what_it_needs(tmp_path):
    root = unpack(NEWEST, tmp_path)
    (root / "store.json").chmod(0o644)
    (root / "store.json").write_text(json.dumps({"format": FORMAT_VERSION + 1, "made_by": "actstore 9.0.0"}))
    for opening in (Store, verify, lambda path: repair(path, files_of)):
        with pytest.raises(TooNew, match=r"made by actstore 9\.0\.0.*or a later one"):
            opening(root)


@pytest.mark.parametrize("version", ["two", None, 0, -1, 1.5])
def test_a_format_that_is_none_is_damage(tmp_path, version):
    root = unpack(NEWEST, tmp_path)
    (root / "store.json").chmod(0o644)
    (root / "store.json").write_text(json.dumps({"format": version}))
    with pytest.raises(Damaged, match="names no format"):
        Store(root)


def test_a_catalog_without_latest_results_gets_the_view_while_it_is_read(tmp_path):
    """As formats 1 and 2 have it; the file is DuckDB's, and the store only reads it."""
    root = unpack(NEWEST, tmp_path)
    repair(root, files_of)
    (root / CATALOG).chmod(0o644)
    with duckdb.connect(str(root / CATALOG)) as connection:
        connection.execute("drop view if exists latest_results")
    with Store(root) as store:
        latest, every = (store.sql(f"from {name} order by all") for name in ("latest_results", "results"))
        assert latest.equals(every)
        assert latest.height
