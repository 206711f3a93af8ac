"""Stores of every format there has been, kept for ever: today's version reads them, or says which command brings them up to date.

`tests/fixtures/format-N.tar.xz` is what the first version of format N made of six trees of four nodes: activations that count
0, 1, 2, …, and, from format 2 on, a study's results.
"""

import json
import tarfile
from pathlib import Path

import duckdb
import numpy as np
import pytest

from actstore.catalog import NAME as CATALOG
from actstore.errors import Damaged, TooNew, TooOld
from actstore.ingest.recompute import files_of
from actstore.log import FORMAT_VERSION
from actstore.repair import repair
from actstore.store import Store
from actstore.verify import verify
from actstore.writer import open_writer

FIXTURES = Path(__file__).parent / "fixtures"
FORMATS = sorted(int(path.name.split(".")[0].removeprefix("format-")) for path in FIXTURES.glob("format-*.tar.xz"))


def unpack(version, into):
    with tarfile.open(FIXTURES / f"format-{version}.tar.xz") as archive:
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
    assert [*range(1, FORMAT_VERSION + 1)] == FORMATS


@pytest.mark.parametrize("version", FORMATS)
def test_a_store_of_each_format_is_whole_and_is_read(version, tmp_path):
    root = unpack(version, tmp_path)
    assert verify(root).damage == []
    if version < FORMAT_VERSION:
        with pytest.raises(TooOld, match=r"has format \d+, made by actstore .*actstore repair"):
            Store(root)
        repair(root, files_of)
    assert json.loads((root / "store.json").read_text())["format"] == FORMAT_VERSION
    assert verify(root).findings == []
    trees = holds_what_it_held(root)
    assert len(trees) == 6
    with open_writer(root):
        pass
    assert holds_what_it_held(root) == trees


def test_an_older_store_is_not_written_to_before_it_is_up_to_date(tmp_path):
    root = unpack(1, tmp_path)
    with pytest.raises(TooOld, match="actstore repair"), open_writer(root):
        pass


def test_a_newer_store_is_refused_with_what_it_needs(tmp_path):
    root = unpack(FORMAT_VERSION, tmp_path)
    (root / "store.json").chmod(0o644)
    (root / "store.json").write_text(json.dumps({"format": FORMAT_VERSION + 1, "made_by": "actstore 9.0.0"}))
    for opening in (Store, verify, lambda path: repair(path, files_of)):
        with pytest.raises(TooNew, match=r"made by actstore 9\.0\.0.*or a later one"):
            opening(root)


@pytest.mark.parametrize("version", ["two", None, 0, -1, 1.5])
def test_a_format_that_is_none_is_damage(tmp_path, version):
    root = unpack(FORMAT_VERSION, tmp_path)
    (root / "store.json").chmod(0o644)
    (root / "store.json").write_text(json.dumps({"format": version}))
    with pytest.raises(Damaged, match="names no format"):
        Store(root)


def test_a_catalog_without_latest_results_gets_the_view_while_it_is_read(tmp_path):
    """As formats 1 and 2 have it; the file is DuckDB's, and the store only reads it."""
    root = unpack(max(FORMATS), tmp_path)
    repair(root, files_of)
    (root / CATALOG).chmod(0o644)
    with duckdb.connect(str(root / CATALOG)) as connection:
        connection.execute("drop view if exists latest_results")
    with Store(root) as store:
        latest, every = (store.sql(f"from {name} order by all") for name in ("latest_results", "results"))
        assert latest.equals(every)
        assert latest.height
