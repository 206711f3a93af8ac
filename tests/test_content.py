"""Well-formed and strange: manifests with a right checksum, rows of a catalog whose hash is noted, parts of another schema."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import duckdb
import polars as pl
import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import actstore.reading.opened
from actstore.catalog import hash_note, part_types, tables
from actstore.commits.format import About, check_format
from actstore.commits.manifest import Manifest, TableOfParts, manifest_path
from actstore.errors import ActstoreError, Damaged, NotStored
from actstore.ingest.replay.remake import files_of
from actstore.storage import sealed
from actstore.storage import sealed as storage_sealed
from actstore.storage.content import as_a, check_inside
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.committed import committed_datasets
from actstore.writing.writer import open_writer
from tests.stores import fake, files
from tests.test_fuzz import NESTED

FEW = settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
ALL = "select token_id, tree_id from tokens"
LAST = manifest_path(3)
TEXTS = ["", "x", "a\0b", "/etc/hostname", "../up", "a//b", "a" * 5000, "\ud800", "1", "0" * 32]
NUMBERS = [-1, 0, 1, 2**31, 2**63, 10**400, 1.5, float("nan"), float("inf")]
STRANGE = st.sampled_from([*TEXTS, *NUMBERS, None, True, [], {}, [[]], [None], [{}]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("content") / "s.act"
    fake(n_trees=4, trees_per_shard=2, n_nodes=3, sites=["resid_post.0"]).store(root)
    return root


@pytest.fixture
def root(whole, tmp_path):
    return copy(whole, tmp_path / "s.act")


def copy(whole, root):
    shutil.rmtree(root, ignore_errors=True)
    return shutil.copytree(whole, root)


def put(path, content):
    path.unlink()
    path.write_bytes(content)


def with_checksum(body):
    body = {key: value for key, value in body.items() if key != "checksum"}
    return json.dumps({**body, "checksum": storage_sealed.checksum(body)}, indent=1).encode()


def paths_in(value, at=()):
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from ([at] if at else [])
    for key, inner in items:
        yield from paths_in(inner, (*at, key))


def put_in(body, at, value):
    *outer, last = at
    for key in outer:
        body = body[key]
    body[last] = value


def read(root):
    with Store(root) as store:
        for run in store.runs():
            store.of(run).sql("select 1 from outcomes, latest_results")
            for site in store.sites(run):
                X, rows = store.read(ALL, run, site)
                store.scan(run, site).select("token_id", "x").collect()
                store.sql("select sum(norm(act(token_id, $run, $site))) from tokens", {"run": run, "site": site})
                assert len(X) == len(rows)


def write(root):
    with open_writer(root):
        pass


def every_way_ends_well(root, and_mended=False):
    """Opening, reading, verifying, writing and repairing each end, or in one of the package's errors; opening changes nothing."""
    before = files(root)
    with suppress(ActstoreError):
        read(root)
    with suppress(ActstoreError):
        verify(root)
    assert files(root) == before
    with suppress(ActstoreError):
        committed_datasets(root)
    if and_mended:
        rebuild(root)
        return
    with suppress(ActstoreError):
        repair(root, files_of)
    with suppress(ActstoreError):
        write(root)


def rebuild(root):
    """Mend a catalog as repair advises where it is whole and says otherwise than the manifests."""
    with suppress(Damaged):
        repair(root, files_of)
    (root / tables.CATALOG).unlink(missing_ok=True)
    repair(root, files_of)
    assert verify(root).findings == []
    read(root)


# ---- manifests


@MANY
@given(st.data())
def test_a_manifest_with_a_right_checksum_is_one_or_damage(whole, data):
    content = (whole / LAST).read_bytes()
    body = json.loads(content)
    at = data.draw(st.sampled_from(sorted(paths_in(body), key=str)))
    put_in(body, at, data.draw(STRANGE | NESTED))
    try:
        changed = with_checksum(body)
    except (TypeError, UnicodeEncodeError):
        return
    manifest, said = None, ""
    try:
        manifest = Manifest.from_json(changed, Path("m"))
    except Damaged as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 400
    if manifest is None:
        return
    assert json.loads(manifest.to_json()) == json.loads(changed)
    for file in manifest.files:
        check_inside(file.path)
        assert 0 <= file.bytes < 2**62


HARM = {
    "bytes as text": (("parts", 0, "bytes"), "12"),
    "bytes below 0": (("shards", 0, "bytes"), -1),
    "bytes beyond all": (("shards", 0, "bytes"), 10**400),
    "bytes of a truth": (("shards", 0, "bytes"), True),
    "no path": (("parts", 0, "path"), None),
    "a path with NUL": (("parts", 0, "path"), "parts/a\0b"),
    "a long path": (("parts", 0, "path"), "parts/" + "a" * 5000),
    "a long way": (("parts", 0, "path"), "/".join(["parts"] * 900)),
    "a path outside": (("parts", 0, "path"), "parts/../../x"),
    "half a character": (("parts", 0, "path"), "parts/\ud800"),
    "another table": (("parts", 0, "table"), "trees; drop table trees"),
    "a batch of text": (("batch",), "0"),
    "a key too many": (("why",), "not"),
    "no list": (("shards",), None),
    "a format of text": (("format",), "3"),
    "deep": (("run",), "DEEP"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_strange_manifest_is_damage_wherever_it_is_read(root, harm):
    body = json.loads((root / LAST).read_bytes())
    put_in(body, *HARM[harm])
    put(root / LAST, with_checksum(body).replace(b'"DEEP"', b"[" * 100_000))
    before = files(root)
    for work in (Store, write):
        with pytest.raises(Damaged, match=r"manifest .*00000003\.json cannot be read \("):
            work(root)
    assert {(found.path, found.kind) for found in verify(root).damage} >= {(LAST, "manifest")}
    with pytest.raises(Damaged, match="it cannot be made again"):
        repair(root, files_of)
    assert files(root) == before


@FEW
@given(st.data())
def test_a_store_of_a_strange_manifest_ends_well_though_the_catalog_agrees(whole, tmp_path, data):
    """As far as a manifest may say what it likes: names and numbers that are some, and no more."""
    root = copy(whole, tmp_path / "s.act")
    body = json.loads((root / LAST).read_bytes())
    at = data.draw(st.sampled_from([at for at in paths_in(body) if at[-1] not in ("number", "format", "previous")]))
    put_in(
        body, at, data.draw(st.sampled_from(["parts/trees/d.parquet", "r", "trees", "0" * 32, 0, 7, 2**31 - 1, None]))
    )
    put(root / LAST, with_checksum(body))
    with pytest.MonkeyPatch.context() as patch:
        with Store(whole) as store:
            noted = store.sql("select log_xxh3_128 from snapshot").item()
        patch.setattr(actstore.reading.opened, "log_hash", lambda committed: noted)
        every_way_ends_well(root)


def test_the_types_of_a_manifest_name_the_tables_that_have_parts():
    for table in part_types.tables():
        assert as_a(TableOfParts, table) == table
    for strange in ("Trees", "", "a/b", "1a", "a" * 64):
        with pytest.raises(ValueError, match="matching regex"):
            as_a(TableOfParts, strange)
    assert {field.name for field in fields(About)} == {"format", "made_by"}


# ---- the catalog's rows


def change_catalog(root, *statements):
    """Change rows, and note the hash of what comes of it, as if it had been put in place."""
    (root / tables.CATALOG).chmod(0o644)
    with duckdb.connect(str(root / tables.CATALOG)) as connection:
        for statement in statements:
            connection.execute(statement)
    noted = xxhash.xxh3_128_hexdigest((root / tables.CATALOG).read_bytes())
    put(root / tables.HASHES, sealed.to_json({"xxh3_128": [noted]}))


VALUES = (
    "null",
    "''",
    "'x'",
    "'../../up'",
    "'/etc/hostname'",
    "-1",
    "0",
    "1",
    "2000000000",
    "[]",
    "[1, 2, 3]",
    "[0, 5, 6]",
)
PLACES = [
    (table, column) for table, column in tables.column_comments() if table not in ("results", "generations", "edges")
]


@settings(FEW, max_examples=3)
@given(place=st.sampled_from(PLACES), value=st.sampled_from(VALUES))
@example(place=("sites", "shape"), value="[]")
@example(place=("sites", "shape"), value="[2000000000, 2000000000, 2000000000]")
@example(place=("datasets", "trees_per_shard"), value="0")
@example(place=("shards", "batch"), value="2000000000")
@example(place=("snapshot", "snapshot"), value="null")
@example(place=("sites", "short"), value="null")
@example(place=("runs", "run"), value="null")
@example(place=("runs", "first_tree_id"), value="null")
def test_a_catalog_of_strange_rows_is_damage_and_is_built_anew(whole, tmp_path, place, value):
    root, (table, column) = copy(whole, tmp_path / "s.act"), place
    try:
        change_catalog(root, f"update {table} set {column} = {value}")
    except duckdb.Error:  # no value of the column's
        return
    every_way_ends_well(root, and_mended=True)


@pytest.mark.parametrize(
    "shape", ["[]", "[4]", "null", "[-1, 8, 6]", "[4, 8, null]", "[2000000000, 8, 6]", "[4, 300, 6]"]
)
def test_a_shape_that_no_array_has_is_damage_when_it_is_read(root, shape):
    change_catalog(root, f"update sites set shape = {shape}")
    with Store(root) as store, pytest.raises(Damaged, match=r"says what cannot be|and the catalog says"):
        store.read(ALL, "r", "resid_post.0")


def test_a_run_asks_though_the_catalog_lacks_a_view(root):
    change_catalog(root, "drop view latest_results")
    with Store(root) as store:
        assert store.of("r").sql("from latest_results").is_empty()
        assert len(store.of("r").read(ALL, site="resid_post.0")[1])


def test_a_path_of_the_catalog_leads_to_no_file_outside(root, tmp_path):
    shard = next(path for path in root.glob("activations.zarr/r/*/c/0/0/0"))
    shutil.copy(shard, tmp_path / "outside")
    change_catalog(root, "update shards set path = '../outside'")
    with Store(root) as store, pytest.raises(Damaged, match="no path inside the store"):
        store.read(ALL, "r", "resid_post.0")


@pytest.mark.parametrize("table", ["tokens", "snapshot", "sites", "trees"])
def test_a_view_in_the_place_of_a_table_is_damage_and_reads_no_file(root, tmp_path, table):
    secret = tmp_path / "secret"
    secret.write_text("7")
    with duckdb.connect(str(root / tables.CATALOG), read_only=True) as connection:
        columns = [row[0] for row in connection.execute(f"describe {table}").fetchall()]
    selected = ", ".join(f"content as {column}" for column in columns)
    views = ("edge_sources", "edge_targets", "edge_separators", "answer_tokens", "latest_results")
    change_catalog(
        root,
        *(f"drop view if exists {view}" for view in views),
        f"drop table {table}",
        f"create view {table} as select {selected} from read_text('{secret}')",
    )
    with pytest.raises(Damaged, match=rf"no catalog of a store \(it has no table {table} .*actstore repair"):
        Store(root)
    assert tables.snapshot(root) in (0, 3)
    assert {found.path for found in verify(root).damage} == {tables.CATALOG}
    rebuild(root)


# ---- parts, zarr.json, store.json


def forge(root, path, content):
    """Put other bytes in a part's place, and have every manifest say that they are right, checksums and chain."""
    put(root / path, content)
    before = None
    for number in range(1, 4):
        body = json.loads((root / manifest_path(number)).read_bytes())
        for part in body["parts"]:
            if part["path"] == path:
                part |= {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        forged = with_checksum({**body, "previous": before})
        put(root / manifest_path(number), forged)
        before = xxhash.xxh3_128_hexdigest(forged)


def as_bytes(frame):
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"part-{os.getpid()}.parquet"
    frame.write_parquet(path)
    try:
        return path.read_bytes()
    finally:
        path.unlink()


PARTS = {
    "no parquet": lambda rows: b"PAR1 no parquet PAR1",
    "another schema": lambda rows: as_bytes(pl.DataFrame({"why": ["not"]})),
    "other types": lambda rows: as_bytes(rows.with_columns(pl.lit("x").alias(rows.columns[-1]), tree_id=pl.lit("y"))),
    "nulls": lambda rows: as_bytes(
        rows.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in rows.schema.items())
    ),
    "ids below 0": lambda rows: as_bytes(
        rows.with_columns(pl.lit(-5, pl.Int64).alias(name) for name in rows.columns if name.endswith("_id"))
    ),
    "no rows": lambda rows: as_bytes(rows.head(0)),
}


@pytest.mark.parametrize("what", PARTS)
@pytest.mark.parametrize("path", ["parts/datasets/d.parquet", "parts/tokens/d-000000.parquet"])
def test_a_part_of_strange_rows_ends_in_the_packages_errors(root, path, what):
    forge(root, path, PARTS[what](pl.read_parquet(root / path)))
    with pytest.raises(Damaged, match="are not those that its catalog was built from"):
        Store(root)
    every_way_ends_well(root)


ZARR = {
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "empty": b"",
    "a text": b'"x"',
    "no types": b'{"zarr_format": 3, "node_type": "array", "shape": "x", "chunk_grid": [], "codecs": {}, "data_type": []}',
}


@pytest.mark.parametrize("what", [*ZARR, "chunks of nothing", "chunks beyond memory", "no codec of any"])
def test_metadata_of_strange_content_is_damage(root, what, monkeypatch):
    monkeypatch.setattr(
        actstore.reading.opened, "check_sizes", lambda root, committed: None
    )  # as if it had the right length
    path = next(root.glob("activations.zarr/r/*/zarr.json"))
    about = json.loads(path.read_bytes())
    if what == "chunks of nothing":
        about["chunk_grid"]["configuration"]["chunk_shape"] = [0, 0, 0]
    elif what == "chunks beyond memory":
        about["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        about["chunk_grid"]["configuration"]["chunk_shape"] = [2**20] * 3
    elif what == "no codec of any":
        about["codecs"] = [{"name": "no such codec", "configuration": {}}]
    put(path, ZARR.get(what) or (b"" if what == "empty" else json.dumps(about).encode()))
    with Store(root) as store, pytest.raises(Damaged):
        store.read(ALL, "r", "resid_post.0")
    verify(root, quick=True)


@settings(MANY, max_examples=25)
@given(NESTED | STRANGE, NESTED | STRANGE)
def test_a_store_json_of_strange_facts_is_damage_or_another_version(tmp_path, version, maker):
    try:
        content = sealed.to_json({"format": version, "made_by": maker, "made_at": ""})
    except (TypeError, UnicodeEncodeError):
        return
    (tmp_path / "store.json").write_bytes(content)
    with suppress(ActstoreError):
        about = check_format(tmp_path, older=True)
        assert isinstance(about["format"], int)


@MANY
@given(NESTED | STRANGE)
def test_a_note_of_the_catalogs_hash_is_one_or_damage(tmp_path, noted):
    try:
        (tmp_path / tables.HASHES).write_bytes(sealed.to_json({"xxh3_128": noted}))
    except (TypeError, UnicodeEncodeError):
        return
    with suppress(Damaged):
        assert all(len(one) == 32 for one in hash_note.noted_hashes(tmp_path))


def test_a_catalog_without_what_a_run_needs_holds_no_site(root):
    change_catalog(root, "delete from datasets")
    with Store(root) as store, pytest.raises(NotStored):
        store.read(ALL, "r", "resid_post.0")
    assert {found.path for found in verify(root).damage} == {tables.CATALOG}
