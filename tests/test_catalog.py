"""The catalog: derived from the parts alone, a snapshot for its readers, and plain DuckDB to everyone else."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pytest

from actstore.catalog import build, declared, part_types, tables
from actstore.commits import log
from actstore.commits.format import FORMAT_VERSION
from actstore.errors import BadInput, Damaged, NoRoom
from actstore.ingest.task import SPLITS
from actstore.ingest.trees import tokens
from actstore.sql.session import Session
from actstore.store import Store
from actstore.writing.create import create
from actstore.writing.parts import as_parquet
from actstore.writing.writer import open_writer
from tests.stores import TABLES, Fake, catalog_rows, fake, files

SIGNED = {
    **{"UInt8": pl.Int16, "UInt16": pl.Int32, "UInt64": pl.Int64},
    **{"List(UInt8)": pl.List(pl.Int16), "List(UInt32)": pl.List(pl.Int64)},
}
RESULT = pl.DataFrame({"study": ["s"], "metric": ["accuracy"], "value": [0.5], "n": [3], "snapshot": [1]})
RUNS = (  # three models, two sets of trees of other sizes; the first draws its own depths, the last is told them
    fake("one", "small", seed=1),
    fake("two", "small", seed=1, weights=b"other"),
    fake("three", "deep", n_nodes=7, seed=2, depths=[2, 4], weights=b"third", sites=("embed",)),
)


def write_all(root: Path, publish_after_each: bool) -> None:
    """Three runs and two studies' results, batch by batch."""
    with open_writer(root, make=True) as writer:
        for run in RUNS:
            for batch in range(run.n_batches):
                run.write(writer, [batch])
                if publish_after_each:
                    assert writer.publish() == len(log.manifests(root))
            writer.record(RESULT)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("catalog") / "s.act"
    write_all(root, publish_after_each=True)
    return root


# Derived.


def test_a_catalog_extended_step_by_step_is_the_one_built_from_nothing(root: Path, tmp_path: Path) -> None:
    stepwise = catalog_rows(root / "catalog.duckdb")
    copy = tmp_path / "copy.act"
    shutil.copytree(root, copy)
    assert build.publish(copy, from_nothing=True) == len(log.manifests(root)) == 12
    assert catalog_rows(copy / "catalog.duckdb") == stepwise
    (copy / "catalog.duckdb").unlink()
    with open_writer(copy):
        pass
    assert catalog_rows(copy / "catalog.duckdb") == stepwise
    write_all(tmp_path / "at once.act", publish_after_each=False)
    assert catalog_rows(tmp_path / "at once.act" / "catalog.duckdb") == stepwise
    empty = [table for table, rows in stepwise.items() if not rows]
    elsewhere = ["listed_sequences", "vocabularies", "relations", "interventions", "edits", "generations"]
    assert empty == elsewhere, "a table is empty, so nothing is tested of it"  # test_generations.py fills the last


def test_a_catalog_holds_the_rows_that_were_committed(root: Path) -> None:
    rows = catalog_rows(root / "catalog.duckdb")
    n_tokens = [int(run.lengths.sum()) for run in RUNS]
    assert len(rows["tokens"]) == n_tokens[0] + n_tokens[2]
    assert len(rows["trees"]) == 10
    assert len(rows["edges"]) == 5 * 3 + 5 * 6
    assert len(rows["predictions"]) == sum(int(run.trees.depth.sum()) for run in RUNS)
    assert len(rows["shards"]) == (2 + 2 + 1) * 2
    assert rows["snapshot"] == [(FORMAT_VERSION, 12, log.log_hash(log.manifests(root)))]
    with Store(root) as store:
        found = store.sql("select dataset, depths, first_tree_id from datasets").rows()
    assert found == [("small", None, 0), ("deep", [2, 4], 5)]


def test_a_catalog_that_is_damaged_is_built_again(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.act"
    shutil.copytree(root, copy)
    (copy / "catalog.duckdb").chmod(0o644)
    (copy / "catalog.duckdb").write_bytes(b"no catalog")
    with pytest.raises(Damaged, match=r"catalog\.duckdb cannot be opened .* rebuild it with `actstore repair"):
        Store(copy)
    assert build.publish(copy, from_nothing=True) == 12
    assert catalog_rows(copy / "catalog.duckdb") == catalog_rows(root / "catalog.duckdb")


def test_another_duckdb_file_in_the_place_of_the_catalog_is_damaged(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.act"
    shutil.copytree(root, copy)
    (copy / "catalog.duckdb").unlink()
    with duckdb.connect(str(copy / "catalog.duckdb")) as connection:
        connection.execute("create table x as select 1")
    with pytest.raises(Damaged, match=r"catalog\.duckdb is no catalog of a store"):
        Store(copy)


@pytest.mark.parametrize(
    ("folder", "other"), [("seed=77", ""), ("a*b", "acb"), ("we'ird [x]; \"ö →", "we'ird x; \"ö →")]
)
def test_the_folder_that_a_store_lies_in_changes_no_row(root: Path, tmp_path: Path, folder: str, other: str) -> None:
    """DuckDB would read `seed=77` as a column of every part below it, and the parts of acb for those of a*b."""
    copy = tmp_path / folder / "copy.act"
    shutil.copytree(root, copy)
    if other:
        shutil.copytree(root / "parts", tmp_path / other / "copy.act" / "parts")
    assert build.publish(copy, from_nothing=True) == 12
    assert catalog_rows(copy / "catalog.duckdb") == catalog_rows(root / "catalog.duckdb")
    with Store(copy) as store:
        assert store.read("select token_id from tokens where tree_id < 5", run="one")[0].shape[1] == 6


def test_a_store_is_not_made_where_duckdb_could_not_write_its_catalog(tmp_path: Path) -> None:
    """DuckDB takes `?` for the end of a path, and would put its log elsewhere."""
    with pytest.raises(BadInput, match=r"DuckDB cannot open a path with `\?` in it, and got .*what\?"):
        create(tmp_path / "what?" / "s.act")
    assert list(tmp_path.iterdir()) == []


# A snapshot for each reader.


def test_a_reader_keeps_the_snapshot_it_opened_and_a_later_one_sees_what_is_new(tmp_path: Path) -> None:
    run, root, count = fake(), tmp_path / "s.act", "select count(*) from trees"
    run.store(root, [0])
    before = Store(root)
    run.store(root, [1])
    after = Store(root)
    assert (before.sql(count).item(), after.sql(count).item(), before.sql(count).item()) == (3, 5, 3)
    assert (before.snapshot, after.snapshot) == (2, 3)
    assert before.read("select token_id from tokens")[0].shape[0] == run.lengths[:3].sum()
    before.close()
    assert after.sql(count).item() == 5
    after.close()


def test_readers_in_other_processes_do_not_lock_each_other_out(root: Path) -> None:
    code = "import sys; from actstore.store import Store; print(Store(sys.argv[1]).snapshot)"
    with Store(root) as store:
        there = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True)
        assert int(there.stdout) == store.snapshot == 12


def test_a_reader_is_not_disturbed_while_a_writer_is_at_work(tmp_path: Path) -> None:
    run, root = fake(), tmp_path / "s.act"
    with open_writer(root, make=True) as writer:
        run.write(writer, [0])
        with Store(root) as store:
            assert store.sql("select count(*) from trees").item() == 0, "committed, and not published yet"
        writer.publish()
        with Store(root) as store:
            assert store.sql("select count(*) from trees").item() == 3


def test_a_crash_before_the_new_catalog_is_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, root = fake(), tmp_path / "s.act"
    run.store(root, [0])
    before = files(root)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            run.store(root, [1])
    assert files(root)["catalog.duckdb"] == before["catalog.duckdb"]
    assert not [path for path in files(root) if path.startswith(".catalog")]
    with Store(root) as store:
        assert store.snapshot == 2
    with open_writer(root):
        pass
    with Store(root) as store:
        assert store.snapshot == 3


# What cannot be done.


def test_a_committed_part_that_is_gone_is_damaged_and_named(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a workspace" / "copy.act"  # "space" in a path is no full disk
    shutil.copytree(root, copy)
    part = next((copy / "parts" / "tokens").iterdir())
    part.unlink()
    with pytest.raises(Damaged, match=f"cannot be built from its parts .*{part.name}"):
        build.publish(copy, from_nothing=True)
    part.write_bytes(b"no parquet")
    with pytest.raises(Damaged, match=f"cannot be built from its parts .*{part.name}"):
        build.publish(copy, from_nothing=True)


@pytest.mark.parametrize(("reason", "error"), [(errno.ENOSPC, NoRoom), (errno.EDQUOT, NoRoom), (errno.EIO, OSError)])
def test_a_full_disk_leaves_the_catalog_as_it_was(
    root: Path, monkeypatch: pytest.MonkeyPatch, reason: int, error: type[Exception]
) -> None:
    before = files(root)

    def full(*_: object, **__: object) -> None:
        raise OSError(reason, os.strerror(reason))

    with monkeypatch.context() as patch:
        patch.setattr(build, "_extend", full)
        with pytest.raises(error, match=os.strerror(reason)) as caught:
            build.publish(root, from_nothing=True)
    assert isinstance(caught.value, NoRoom) == (error is NoRoom)
    assert files(root) == before


def test_a_catalog_that_duckdb_has_no_room_for_is_no_room(root: Path, tmp_path: Path) -> None:
    """The kernel refuses to let DuckDB write more than 50 kB."""
    copy = tmp_path / "copy.act"
    shutil.copytree(root, copy)
    before = files(copy)
    code = """
import resource, sys
from pathlib import Path
from actstore.catalog import build
from actstore.errors import NoRoom
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    build.publish(Path(sys.argv[1]), from_nothing=True)
except NoRoom as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(copy)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"no room for the catalog of {copy}; free some, then go on"
    assert files(copy) == before


def test_a_catalog_is_built_without_duckdbs_bar_on_stdout(root: Path, tmp_path: Path) -> None:
    """DuckDB draws one for `python -c` if a query takes two seconds, also into a pipe."""
    copy = shutil.copytree(root, tmp_path / "copy.act")
    code = """
import sys
from pathlib import Path
from actstore.catalog import build
insert = build._insert
def inserted(root, connection, *others, **named):
    print(connection.execute("select current_setting('enable_progress_bar')").fetchall())
    insert(root, connection, *others, **named)
build._insert = inserted
build.publish(Path(sys.argv[1]), from_nothing=True)
"""
    done = subprocess.run([sys.executable, "-c", code, str(copy)], capture_output=True, text=True, check=True)
    assert done.stdout == "[(False,)]\n"


# Plain DuckDB.


def test_plain_duckdb_reads_what_the_store_reads(root: Path) -> None:
    with Store(root) as store, duckdb.connect(str(root / "catalog.duckdb"), read_only=True) as plain:
        for table in [*TABLES, "edge_sources", "edge_targets", "edge_separators", "answer_tokens"]:
            query = f"select * from {table} order by all"
            assert plain.sql(query).pl().equals(store.sql(query)), table


def test_every_column_of_every_table_has_its_comment(root: Path) -> None:
    with duckdb.connect(str(root / "catalog.duckdb"), read_only=True) as plain:
        found = plain.execute(
            "select table_name, column_name, comment from duckdb_columns() where not internal"
        ).fetchall()
    comments = {(table, column): comment for table, column, comment in found if table in TABLES}
    assert {table for table, _ in comments} == set(TABLES)
    assert [name for name, comment in comments.items() if not comment] == []
    text = tables.schema()
    for (_, column), comment in comments.items():
        assert re.search(rf"^    {column} .*, -- {re.escape(comment)}$", text, re.MULTILINE)
    assert comments["tokens", "position"] == "place in the sequence, from 0; of a tree: 0 to 4 * n_nodes - 2"


def test_clients_of_duckdb_1_2_can_open_the_file(root: Path, tmp_path: Path) -> None:
    create(tmp_path / "empty.act")
    for made in (root, tmp_path / "empty.act"):
        with duckdb.connect(str(made / "catalog.duckdb"), read_only=True) as plain:
            tags = plain.execute("select tags from duckdb_databases() where not internal").fetchall()
        assert tags == [({"storage_version": "v1.2.0+"},)]


def test_words_roles_and_splits_of_the_schema_are_those_of_the_tokens(root: Path) -> None:
    with Store(root) as store:
        enums = store.sql(
            "select enum_range(null::token_word) as words, enum_range(null::token_role) as roles, "
            "enum_range(null::tree_split) as splits"
        ).row(0)
    assert [tuple(names) for names in enums] == [tokens.WORDS, tokens.ROLES, SPLITS]


def test_parts_have_the_columns_of_the_catalog_and_hold_small_numbers_unsigned(root: Path) -> None:
    types = part_types.tables()
    assert set(types) == set(TABLES)
    with Store(root) as store:
        for table, columns in types.items():
            schema = store.sql(f"from {table}").schema
            others = (tables.DERIVED.get(table), *tables.ADDED.get(table, ()))
            assert [*columns] == [name for name in schema if name not in others]
            for column, dtype in columns.items():
                signed = pl.Categorical if isinstance(dtype, pl.Enum) else SIGNED.get(str(dtype), dtype)
                if column in ("position", "n_positions"):  # of text it is larger
                    signed = pl.Int32
                assert schema[column] == (pl.UInt64 if column in ("tree_hash", "hash") else signed), (table, column)
    assert types["tokens"]["token"] == pl.Enum(tokens.WORDS)
    for part in root.glob("parts/*/*.parquet"):
        assert pl.read_parquet_schema(part) == types[part.parent.name], part


def test_parts_have_the_types_of_every_format_before(tmp_path: Path) -> None:
    """A part's bytes follow from its rows, and repair makes an old store's parts again."""
    with tarfile.open(Path(__file__).parent / "fixtures" / "format-2.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    seen = set()
    for part in tmp_path.glob("s.act/parts/*/*.parquet"):
        types = part_types.tables()[part.parent.name]
        assert pl.read_parquet_schema(part) == types, part
        assert as_parquet(part.parent.name, pl.read_parquet(part)) == part.read_bytes(), part
        seen.add(part.parent.name)
    assert seen >= {"models", "datasets", "trees", "edges", "tokens", "runs", "sites", "predictions", "outcomes"}


def test_no_number_of_the_catalog_overflows_where_it_is_subtracted(root: Path) -> None:
    with Store(root) as store:
        unsigned = store.sql(
            "select table_name, column_name from duckdb_columns() where not internal and data_type like 'U%INT%'"
        )
        hashes = {("trees", "tree_hash"), ("sequences", "hash"), ("listed_sequences", "hash")}
        assert {*unsigned.rows()} == hashes, "a hash is no quantity"
        assert store.sql("select min(depth - 20) as d, min(path[1] - 200) as p from trees").row(0) < (0, 0)
        assert store.sql("select min(edge - position) as e, min(step - position) as s from tokens").row(0) < (0, 0)
        assert store.sql("select min(step - 20) as s from answer_tokens").item() < 0


def test_a_token_knows_its_set_of_trees(root: Path) -> None:
    with Store(root) as store:
        query = "select count(*) as n, count(distinct a.dataset) as sets from tokens a join trees b using (tree_id)"
        n, sets = store.sql(query + " where a.dataset = b.dataset").row(0)
        assert (n, sets) == (store.sql("select count(*) from tokens").item(), 2)


def test_a_number_recorded_again_is_in_latest_results_once(tmp_path: Path) -> None:
    root, run = tmp_path / "s.act", fake()
    run.store(root)
    about = {"study": "s", "metric": "accuracy", "n": 3, "snapshot": 1}
    kinds = [{"label": "a"}, {"label": "b"}, {"label": "a", "params": "{}"}, {"label": "a", "run": "r"}]
    with open_writer(root) as writer:
        for value in (0.1, 0.2):
            writer.record(pl.DataFrame([{**about, **kind, "value": value} for kind in kinds]))
        writer.record(pl.DataFrame([{**about, **kinds[0], "value": 0.3}]))
    with Store(root) as store:
        assert store.sql("select count(*) from results").item() == 9
        found = store.sql("select label, params, run, value from latest_results order by all")
        assert found.rows() == [
            ("a", "{}", None, 0.2),
            ("a", None, "r", 0.2),
            ("a", None, None, 0.3),
            ("b", None, None, 0.2),
        ]


@pytest.mark.parametrize("n_nodes", [2, 64])
def test_the_views_name_the_tokens_they_say(tmp_path: Path, n_nodes: int) -> None:
    """At the largest trees too, where 3 * edge would not fit the edge's own type by much."""
    run: Fake = fake(n_trees=3, n_nodes=n_nodes, sites=("embed",))
    run.store(tmp_path / "s.act")
    roles = {"edge_sources": ["edge_source"], "edge_targets": ["edge_target"], "edge_separators": ["separator", "bar"]}
    with Store(tmp_path / "s.act") as store:
        for view, expected in roles.items():
            query = f"select v.*, t.role, t.edge as of_token, t.node from {view} v join tokens t using (token_id)"
            rows = store.sql(query)
            assert len(rows) == 3 * (n_nodes - 1)
            assert set(rows["role"]) <= set(expected)
            assert (rows["of_token"] == rows["edge"]).all()
            if view != "edge_separators":
                assert (rows["node"] == rows["source" if view == "edge_sources" else "target"]).all()
        answers = store.sql(
            "select a.step, a.next_node, here.role, next.node, next.step as next_step from answer_tokens a "
            "join tokens here using (token_id) join tokens next on next.token_id = a.token_id + 1"
        )
    assert len(answers) == run.trees.depth.sum()
    assert (answers["next_node"] == answers["node"]).all()
    assert (answers["step"] == answers["next_step"]).all()
    assert set(answers["role"]) <= {"root", "path"}


def test_a_ctrl_c_while_rows_are_handed_to_duckdb_is_a_ctrl_c() -> None:
    def rows() -> Iterator[pa.RecordBatch]:
        raise KeyboardInterrupt
        yield

    with duckdb.connect() as connection:
        connection.register("new_rows", pa.RecordBatchReader.from_batches(pa.schema([("a", pa.int64())]), rows()))
        with pytest.raises(KeyboardInterrupt), tables.ctrl_c():
            connection.execute("from new_rows")


class Stopped:
    """A connection of DuckDB that a Ctrl-C meets in its first statement."""

    def __enter__(self) -> Stopped:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def close(self) -> None:
        pass

    def execute(self, statement: str) -> None:
        raise RuntimeError("Query interrupted")  # as DuckDB 2.0 tells it


@pytest.mark.parametrize("of", ["columns", "words", "session"])
def test_a_ctrl_c_in_any_statement_of_duckdb_is_a_ctrl_c(of: str, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duckdb, "connect", lambda *path: Stopped())
    asks = {
        "columns": part_types.every_column.__wrapped__,  # what they found before is kept
        "words": declared._reserved.__wrapped__,
        "session": lambda: Session(store / "catalog.duckdb"),
    }
    with pytest.raises(KeyboardInterrupt):
        asks[of]()
