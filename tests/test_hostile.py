"""Untrusted SQL: whatever is asked, the store's bytes stay, no file is read or made, no setting changes, queries go on.

`{secret}` is a file that no query may read, `{out}` one that none may make, `{csv}` a table that none may load.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest
from click.testing import CliRunner

from actstore.catalog.declared import View
from actstore.catalog.hash_note import note_hash
from actstore.cli import main
from actstore.cli.read import Asking
from actstore.errors import ActstoreError, BadInput, Damaged, LimitReached
from actstore.reading.worker import _as_sent
from actstore.sql.process import Limits
from actstore.store import Store
from actstore.writing.writer import open_writer
from tests.stores import fake, files

RUN = fake(sites=("resid_post.0", "pattern.0"))
SECRET = "xyzzy-nobody-reads-this"

WRITES = [
    # the catalog and the store's files, in every disguise of COPY
    "copy (select 1) to '{catalog}'",
    "copy (select 1) to '{catalog}' (use_tmp_file false)",
    "copy (select 1) to '{catalog}' (format parquet, use_tmp_file false)",
    "copy (select 1) to '{catalog}' (format json)",
    "copy (select 1) to '{catalog}' (format blob)",
    "copy (select 1 as a) to '{parts}' (partition_by a, overwrite_or_ignore true)",
    "copy (select 1 as a) to '{parts}' (format csv, per_thread_output true, overwrite true)",
    "copy (select 1 as a) to '{out}' (format csv, append true)",
    "copy tokens to '{out}'",
    "copy tokens (token_id) to '{out}' with (header false)",
    "copy (select 1) to '/dev/stdout'",
    "copy (select 1) to '{catalog}.wal' (use_tmp_file false)",
    "copy (select 1) to 'file://{out}'",
    "copy (select 1) to '{out}' (format arrow)",
    "copy trees from '{trees}'",
    "copy trees from '{trees}' (format parquet)",
    "copy database store to memory",
    "copy from database store to memory (schema)",
    "explain analyze copy (select 1) to '{out}' (use_tmp_file false)",
    "explain copy (select 1) to '{out}'",
    "with c as (copy (select 1) to '{out}' (use_tmp_file false)) select 1",
    "with recursive c as (copy (select 1) to '{out}') select * from c",
    "select * from (copy (select 1) to '{out}')",
    "export database '{out}'",
    "export database '{out}' (format parquet)",
    "import database '{out}'",
    # rows and definitions
    "insert into tokens select * from tokens",
    "insert or replace into snapshot values (1, 99)",
    "insert into memory.main.t values (1)",
    "merge into snapshot using (select 1 as snapshot) s using (snapshot) when matched then delete",
    "with gone as (delete from tokens returning *) select * from gone",
    "with more as (insert into snapshot values (1, 2) returning *) select * from more",
    "with set_ as (update trees set depth = 1 returning *) select * from set_",
    "truncate tokens",
    "drop schema main cascade",
    "drop macro dot",
    "drop macro table activations",
    "drop function act",
    "alter view edge_targets rename to x",
    "create table x as from tokens",
    "create temp table tokens as select 1 as token_id",
    "create temp view runs as select 'mine' as run",
    "create or replace table memory.main.tokens as select 1",
    "create schema memory.s",
    "create sequence memory.main.s",
    "create type mood as enum ('a')",
    "create index i on tokens (token_id)",
    "create trigger t after insert on tokens for each row select 1",
    "explain analyze create table memory.main.x as select 1",
    "explain analyze create temp table tokens as select 1",
    "explain analyze create view memory.main.v as select 1",
    "explain analyze create schema memory.s",
    "explain analyze create type memory.main.mood as enum ('a')",
    "explain analyze create sequence memory.main.s",
    "explain analyze insert into memory.main.t values (1)",
    "explain (analyze) create table memory.main.x as select 1",
    "explain (analyze, format json) create table memory.main.x as select 1",
    "explain /* it */ analyze create table memory.main.x as select 1",
    "/* it */ explain analyze -- it\n create table memory.main.x as select 1",
    "explain create table memory.main.x as select 1",
    "create table memory.main.x as pivot edges on source using count(*)",
    "explain analyze create table memory.main.x as pivot edges on source using count(*)",
    "set variable x = (select count(*) from (pivot edges on source using count(*)))",
    # functions and macros
    "explain analyze create macro memory.main.enum_code(x) as 0::utinyint",
    "explain analyze create or replace macro memory.main.dot(a, b) as 0",
    "explain analyze create temp macro cosine(a, b) as 0",
    "explain analyze drop macro memory.main.dot",
    "create function act(a, b, c) as 1",
    "create or replace macro memory.main.dot(a, b) as 0",
    "create or replace temp macro cosine(a, b) as 0",
    "create macro memory.main.activations(a, b) as table select 1",
    # other databases
    "attach '{out}' as other",
    "attach '{catalog}' as other (read_only)",
    "attach ':memory:' as other",
    "attach or replace '{out}' as store",
    "attach 'https://example.com/x.duckdb' as other",
    "attach 'host=localhost' as other (type postgres)",
    "detach store",
    "detach memory",
    "use memory",
    "use temp.main",
]

READS = [
    "select * from read_csv('{csv}')",
    "select * from read_csv_auto('{csv}')",
    "select * from sniff_csv('{csv}')",
    "select * from read_text('{secret}')",
    "select * from read_blob('{secret}')",
    "select * from read_json('{secret}')",
    "select * from read_ndjson_objects('{secret}')",
    "select * from read_json_objects('{secret}')",
    "select * from read_parquet('{trees}')",
    "select * from parquet_scan('{trees}')",
    "select * from parquet_metadata('{trees}')",
    "select * from parquet_schema('{trees}')",
    "select * from parquet_file_metadata('{trees}')",
    "select * from parquet_kv_metadata('{trees}')",
    "select * from parquet_bloom_probe('{trees}', 'depth', 1)",
    "select * from read_duckdb('{catalog}')",
    "select * from glob('{folder}/*')",
    "select * from glob(['/etc/*', '/*'])",
    "select * from '{csv}'",
    "select * from '{trees}'",
    'select * from "{csv}"',
    "from '{folder}/*.csv'",
    "describe table '{csv}'",
    "describe select * from '{csv}'",
    "summarize '{csv}'",
    "select * from query('from read_text(''{secret}'')')",
    "select * from query_table('{csv}')",
    "select * from query_table(['{csv}'], false)",
    "select (select content from read_text('{secret}'))",
    "select count(*) from tokens where exists (from read_text('{secret}'))",
    "pivot (from read_csv('{csv}')) on a using count(*)",
    "explain analyze select * from read_text('{secret}')",
    "select * from read_text('/proc/self/environ')",
    "select * from read_blob('/dev/zero')",
    "select * from read_csv('/dev/stdin')",
    # the network
    "install httpfs",
    "install httpfs from 'https://example.com'",
    "force install json",
    "load httpfs",
    "load '{out}'",
    "update extensions",
    "select * from 'https://example.com/x.parquet'",
    "select * from read_parquet('s3://bucket/x.parquet')",
    "select * from read_csv('gcs://bucket/x.csv')",
    "select * from read_text('hf://datasets/a/b')",
    "from sqlite_scan('{out}', 't')",
    "from postgres_scan('host=localhost', 'public', 't')",
    # what is around
    "select getenv('PATH')",
    "select * from frame",
    "select * from store_frame",
    "from rows",
    "select * from python_map_function(tokens)",
    "select * from arrow_scan(1, 2, 3)",
    "select * from pandas_scan(1)",
    "select * from seq_scan('tokens')",
    # secrets
    "create secret s (type s3, key_id 'a')",
    "create persistent secret s (type http)",
    "drop secret s",
    "explain analyze create secret s (type http)",
]

SETTINGS = [
    "set enable_external_access = true",
    "set global enable_external_access = true",
    "set lock_configuration = false",
    "set disabled_filesystems = ''",
    "reset disabled_filesystems",
    "reset global enable_external_access",
    "set session search_path = 'memory'",
    "set schema = 'memory.main'",
    "set variable x = (select 1)",
    "reset variable x",
    "pragma enable_profiling = 'json'",
    "pragma profiling_output = '{out}'",
    "pragma enable_logging",
    "pragma threads = 64",
    "pragma database_list; select 1",
    "pragma disable_verification",
    "pragma force_checkpoint",
    "call enable_logging(storage = 'file', storage_path = '{out}')",
    "call set_config('threads', 1)",
    "checkpoint store",
    "force checkpoint",
    "vacuum",
    "analyze",
    "prepare p as select 1",
    "explain analyze load json",
    "explain analyze checkpoint",
    "explain analyze set threads = 1",
    "explain analyze pragma threads = 1",
    "explain analyze commit",
    "explain analyze call pragma_version()",
    "execute p",
    "deallocate p",
    "begin transaction",
    "commit",
    "rollback",
    "select 1; set threads = 1",
    "load json; select 1",
    "select set_config('threads', '1', false)",
    "select * from enable_profiling()",
    "select * from enable_logging()",
    "select * from force_checkpoint('store')",
]

FUNCTIONS = [
    "select act(-1, 'r', 'resid_post.0')",
    "select act(255, 'r', 'resid_post.0')",
    "select act(-9223372036854775808, 'r', 'resid_post.0')",
    "select act(9223372036854775807, 'r', 'resid_post.0')",
    "select act(9223372036854775808, 'r', 'resid_post.0')",
    "select act(1::hugeint << 100, 'r', 'resid_post.0')",
    "select act(1.5e300, 'r', 'resid_post.0')",
    "select act('nan'::double, 'r', 'resid_post.0')",
    "select act('one', 'r', 'resid_post.0')",
    "select act(true, 'r', 'resid_post.0')",
    "select act([1, 2], 'r', 'resid_post.0')",
    "select act(1, 'r')",
    "select act()",
    "select act(1, '../../etc', 'passwd')",
    "select act(1, 'r', '../../../etc/passwd')",
    "select act(1, 'r', 'resid_post.0'' or ''1''=''1')",
    "select act(1, '', '')",
    "select act(1, repeat('r', 100000), 'resid_post.0')",
    "select act(1, 'r', chr(0) || 'x')",
    "select act(token_id * 1000, 'r', 'resid_post.0') from tokens",
    "select sum(act(token_id, 'r', 'resid_post.0')) from tokens",
    "select act(1, 'r', 'pattern.0')",
    "select logit_lens(-1, 'r', 'resid_post.0')",
    "select logit_lens(1, 'r', 'resid_post.0')",  # the weights of a fake are none
    "select logit_lens(9223372036854775807, 'r', 'pattern.0')",
    "select probe_direction('../../x')",
    "select probe_direction(repeat('x', 1000000))",
    "select probe_direction(1, 2)",
    "from activations('r', 'nope')",
    "from activations(act(1, 'r', 'resid_post.0'), 'x')",
    "select dot([1, 2]::float[2], [1]::float[1])",
    "select norm('x')",
    "select batches_of('nope', 'nope')",
]

HARMLESS = [  # they answer, and touch nothing
    "select act(null, 'r', 'resid_post.0')",
    "select act(1, null, 'resid_post.0')",
    "select act(null, null, null)",
    "select try(act(-1, 'r', 'resid_post.0'))",
    "select logit_lens(null, 'r', 'resid_post.0')",
    "from activations(null, null)",
    "select count(*) from tokens where act(token_id, 'r', 'resid_post.0') is null",
    "select * from duckdb_secrets()",
    "select * from duckdb_temporary_files()",
    "select current_setting('lock_configuration')",
    "select getvariable('x')",
    "select count(*) from duckdb_functions()",
    "select error('x') from tokens where false",
    "select * from pragma_version()",
    "from activations('nope', null)",
    "select * from which_secret('s3://x', 's3')",
    "select * from checkpoint('store')",  # of a file that is open for reading: nothing to do
    "select * from truncate_duckdb_logs()",
    "select write_log('x')",  # into memory, and logging is off
    "explain analyze select * from tokens",
    "explain (format json) select 1",
    "explain (analyze, format json) (select 1)",
    "explain /* it */ ((select 1) union (select 2)) -- and no more",
    "explain with t as (select 1) from t",
    "explain values (1)",
    "explain summarize tokens",
    "explain pivot edges on source using count(*)",
    "explain analyze pivot edges on source using count(*)",
    "with p as (pivot edges on source using count(*)) from p -- all",
    "with recursive n(i) as (select 1 union all select i + 1 from n where i < 1000) select max(i) from n",
    "select length(repeat('x', 10000000))",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    RUN.store(folder / "s.act")
    (folder / "secret").write_text(SECRET)
    (folder / "t.csv").write_text(f"a,b\n1,{SECRET}\n")
    return folder


@pytest.fixture(scope="module")
def store(place: Path) -> Iterator[Store]:
    with Store(place / "s.act") as store:
        yield store


def filled(statement: str, place: Path) -> str:
    root = place / "s.act"
    return statement.format(
        catalog=root / "catalog.duckdb",
        parts=root / "parts",
        trees=root / "parts/trees/d-000000.parquet",
        folder=place,
        secret=place / "secret",
        csv=place / "t.csv",
        out=place / "out",
    )


def settings(store: Store) -> list[tuple[object, ...]]:
    return store.sql("select name, value from duckdb_settings() order by name").rows()


def definitions(store: Store) -> list[tuple[object, ...]]:
    """All that the session has beside the catalog's tables: its macros, and whatever a query might have made."""
    return store.sql("""
        select database_name, function_name as name, macro_definition as made_by from duckdb_functions() where not internal
        union all select database_name, table_name, sql from duckdb_tables()
        union all select database_name, view_name, sql from duckdb_views() where not internal
        union all select database_name, sequence_name, sql from duckdb_sequences()
        union all select database_name, schema_name, sql from duckdb_schemas() where not internal
        union all select database_name, type_name, labels::varchar from duckdb_types() where not internal
        union all select null, name, type from duckdb_secrets()
        order by all
    """).rows()


@pytest.fixture(scope="module")
def before(place: Path, store: Store) -> tuple[object, ...]:
    return files(place), settings(store), definitions(store)


def test_there_are_a_hundred_and_more() -> None:
    everything = [*WRITES, *READS, *SETTINGS, *FUNCTIONS, *HARMLESS]
    assert len(set(everything)) == len(everything) > 200


@pytest.mark.parametrize("statement", [*WRITES, *READS, *SETTINGS, *FUNCTIONS])
def test_it_is_refused_and_leaves_no_trace(
    place: Path, store: Store, before: tuple[object, ...], statement: str
) -> None:
    frame = pl.DataFrame({"x": [SECRET]})  # which a query in this very function must not see
    with pytest.raises(ActstoreError) as caught:
        store.sql(filled(statement, place))
    assert len(frame) == 1
    _, *shown = str(caught.value).split("\n")
    assert not shown or (len(shown) == 2 and shown[0].startswith("LINE ")), "its place in the statement"
    assert SECRET not in str(caught.value)
    unharmed(place, store, before)


@pytest.mark.parametrize("statement", HARMLESS)
def test_it_answers_and_leaves_no_trace(place: Path, store: Store, before: tuple[object, ...], statement: str) -> None:
    store.sql(filled(statement, place))
    unharmed(place, store, before)


def unharmed(place: Path, store: Store, before: tuple[object, ...]) -> None:
    assert (files(place), settings(store), definitions(store)) == before
    assert store.sql("select count(*) from tokens").item() == RUN.lengths.sum()
    assert store.sql("select database_name from duckdb_databases() where not internal order by 1")[
        "database_name"
    ].to_list() == ["memory", "store"]
    X = store.sql("select act(token_id, 'r', 'resid_post.0') as x from tokens where tree_id = 4 order by position")["x"]
    assert X.to_numpy()[:, 0].tolist() == [4.0] * int(RUN.lengths[4])


# Declared views of a store of another's, whose catalog may declare anything.

HOSTILE = [*WRITES, *READS, *SETTINGS, *FUNCTIONS]
MORE_VIEWS = {
    "itself": "from itself",
    "over_itself": "with recursive over_itself as (from over_itself) from over_itself",
    "over_another": "from itself",
    "a_param": "select $x as x",
    "two": "select 1 as one; select 2 as two",
    "a_macro": "create macro memory.main.dot(a, b) as 0",
    "closing": "select 1) union all (select 2",
    "a_comment": "select 1 /* ",
    "a_temp": "select 1; create temp view tokens as select 1 as token_id",
    "depth": "select * from read_text('{secret}')",  # the name of a column
    "no_sql": " -- nothing",
}


def declare_views(root: Path, rows: list[tuple[Any, ...]]) -> None:
    """Add rows to `relations` in the catalog, as the maker of a store could."""
    catalog = root / "catalog.duckdb"
    catalog.chmod(0o644)
    with duckdb.connect(str(catalog)) as connection:
        connection.executemany("insert into relations values (?, null, 'view', ?, ?)", rows)
    note_hash(root, catalog, None)


@pytest.fixture(scope="module")
def foreign(place: Path) -> Iterator[Store]:
    root = place / "s.act"
    shutil.copytree(root, kept := place.parent / f"{place.name}-foreign.act")
    views = {f"h{i}": statement for i, statement in enumerate(HOSTILE)} | MORE_VIEWS
    rows = [(name, name, json.dumps({"sql": filled(sql, place)})) for name, sql in views.items()]
    declare_views(kept, rows)
    with Store(kept, check=True) as store:
        yield store


@pytest.mark.parametrize("kind", [WRITES, READS, SETTINGS, FUNCTIONS, MORE_VIEWS], ids=range(5))
def test_a_hostile_view_is_no_more_than_a_query(
    place: Path, foreign: Store, before: tuple[object, ...], kind: list[str] | dict[str, str]
) -> None:
    known = settings(foreign), definitions(foreign), files(foreign.path)
    for name in kind if isinstance(kind, dict) else [f"h{HOSTILE.index(statement)}" for statement in kind]:
        with pytest.raises(ActstoreError) as caught:
            foreign.sql(f"from {name}")
        assert SECRET not in str(caught.value)
        assert not (place / "out").exists(), name
        assert definitions(foreign) == known[1], name
    assert (settings(foreign), definitions(foreign), files(foreign.path)) == known
    assert files(place) == before[0]
    others = "select count(*) as n, max(depth) as depth from tokens join trees using (tree_id)"
    assert foreign.sql(others)["n"].item() == RUN.lengths.sum()


def test_a_hostile_view_is_refused_with_limits_and_in_the_session_of_a_run(foreign: Store) -> None:
    number = HOSTILE.index("select * from read_text('{secret}')")
    for ask in (lambda query: foreign.sql(query, timeout=60), foreign.of("r").sql, lambda query: foreign.read(query)):
        with pytest.raises(BadInput, match="disabled by configuration"):
            ask(f"from h{number}")


DECLARED_WRONG = [
    ("tokens", "tokens", json.dumps({"sql": "select 1 as token_id"})),
    ("edge_targets", "edge_targets", json.dumps({"sql": "select 1 as token_id"})),
    ("main", "main", json.dumps({"sql": "select 1"})),
    ('v" as select 1; --', 'v" as select 1; --', json.dumps({"sql": "select 1"})),
    ("v", "w", json.dumps({"sql": "select 1"})),
    ("v", "v", json.dumps({"sql": f"select '{'x' * 1_000_000}'"})),
    ("v", "v", json.dumps({"sql": 1})),
    ("v", "v", json.dumps({"sql": "select 1\x00"})),
    ("v", "v", json.dumps(["select 1"])),
    ("v", "v", "[" * 100_000),
    ("v", "v", None),
    (None, None, json.dumps({"sql": "select 1"})),
]


@pytest.mark.parametrize("row", DECLARED_WRONG, ids=range(len(DECLARED_WRONG)))
def test_a_declaration_that_no_store_makes_is_damage(place: Path, tmp_path: Path, row: tuple[Any, ...]) -> None:
    shutil.copytree(place / "s.act", root := tmp_path / "s.act")
    declare_views(root, [row])
    with Store(root) as store, pytest.raises(Damaged, match="declares what no store may"):
        store.sql("select 1")


@pytest.mark.parametrize("row", DECLARED_WRONG[:7], ids=range(7))
def test_no_catalog_is_built_of_such_a_declaration(place: Path, tmp_path: Path, row: tuple[Any, ...]) -> None:
    shutil.copytree(place / "s.act", root := tmp_path / "s.act")
    view, (name, owner, declared) = View("v", "select 1 as one"), row
    forged = {"name": name, "grain": None, "kind": "view", "owner": owner, "declared": declared}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(View, "row", lambda self: forged)
        with pytest.raises(Damaged, match="cannot be built"), open_writer(root) as writer:
            writer.view(view)
    with Store(root) as store:
        assert store.sql("from relations").is_empty()


# What one vector of rows can hold or take, which only a process that is killed can bound.

ENDLESS = "select count(*) from range(10_000_000) a, range(10_000_000) b where (a.range + b.range) % 7 = 8"


@pytest.mark.parametrize(
    "query",
    [
        ENDLESS,
        "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n",
        "select sum(len(list_sort(list_transform(range(100_000_000), lambda i: hash(i)))))",
        "select act(token_id, 'r', 'resid_post.0') as x from tokens, range(100_000_000) order by hash(range)",
    ],
)
def test_a_query_is_stopped_at_its_time(store: Store, query: str) -> None:
    """Within a second of it: the processor's time goes on, but the wait does not (starting takes most of what is seen)."""
    began = time.monotonic()
    with pytest.raises(LimitReached, match=r"took longer than its limit of 0\.3 s .*--timeout") as caught:
        store.sql(query, timeout=0.3, memory="2GB")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 60
    assert store.sql("select count(*) from trees").item() == 5


@pytest.mark.parametrize(
    "query",
    [
        "select length(repeat('x', 3_000_000_000))",
        "select len(range(1_000_000_000))",
        "select list(range) from range(100_000_000)",
        "select string_agg(range::varchar, repeat(' ', 100)) from range(10_000_000)",
        "select a.token_id, b.token_id, c.token_id from tokens a, tokens b, tokens c, range(1000) "
        "order by hash(a.token_id * b.token_id + c.token_id)",
        "select act(token_id, 'r', 'resid_post.0') as x from tokens, range(10_000_000)",
    ],
)
def test_a_query_is_stopped_at_its_memory(store: Store, query: str) -> None:
    with pytest.raises(LimitReached, match=r"needed more than its limit of 100 MB of memory .*--memory"):
        store.sql(query, memory="100MB", timeout=60)


def test_a_query_within_its_limits_answers_as_without(store: Store) -> None:
    query = """
        select t.*, act(token_id, 'r', 'resid_post.0') as x, [1, null] as l, {'a': 1.5::decimal(4, 1)} as s, null as n,
            timestamp '2001-02-03 04:05:06' as at, $what as what
        from tokens t order by token_id
    """
    params = {"what": "é'; drop table tokens"}
    plain, limited = store.sql(query, params), store.sql(query, params, timeout=60, memory="1GB")
    assert limited.equals(plain)
    assert limited.schema == plain.schema
    assert store.sql("from trees where false", timeout=60).schema == store.sql("from trees where false").schema


@pytest.mark.parametrize(
    "query", ["select act(-1, 'r', 'resid_post.0')", "selec 1", "select * from read_text('/etc/hosts')"]
)
def test_an_error_is_the_same_with_limits(store: Store, query: str) -> None:
    with pytest.raises(ActstoreError) as plain:
        store.sql(query)
    with pytest.raises(type(plain.value)) as limited:
        store.sql(query, timeout=60, memory="1GB")
    assert str(limited.value) == str(plain.value)


READS_OF_A_STORE: dict[str, Callable[..., Any]] = {
    "read": lambda store, query, **limits: store.read(query, **limits)[0].tolist(),
    "explain": lambda store, query, **limits: store.explain(query, **limits),
    "batches": lambda store, query, **limits: next(iter(store.batches(query, **limits)))[0].tolist(),
    "a named query": lambda store, query, **limits: Asking(store, limits).sql(query).rows(),
}


@pytest.mark.parametrize("read", READS_OF_A_STORE.values(), ids=READS_OF_A_STORE)
def test_whatever_takes_a_query_takes_its_limits(store: Store, read: Callable[..., Any]) -> None:
    query = "select token_id, role from tokens where tree_id = 4 order by token_id"
    assert read(store, query, timeout=60, memory="1GB") == read(store, query)
    with pytest.raises(LimitReached, match=r"took longer than its limit of 0\.2 s"):
        read(store, f"select ({ENDLESS})::bigint as token_id", timeout=0.2)
    with pytest.raises(LimitReached, match="needed more than its limit of 50 MB"):
        read(store, "select length(repeat('x', 3_000_000_000)) as token_id", memory="50MB", timeout=60)


def test_limits_read_the_snapshot_that_is_open(tmp_path: Path) -> None:
    one, two = fake(), fake(run="two", dataset="e", seed=1)
    one.store(tmp_path / "s.act")
    with Store(tmp_path / "s.act") as store:
        two.store(tmp_path / "s.act")
        assert store.sql("select run from runs", timeout=60)["run"].to_list() == ["r"]
    with Store(tmp_path / "s.act") as store:
        assert store.sql("select run from runs", timeout=60)["run"].to_list() == ["r", "two"]


@pytest.mark.parametrize("at_once", [False, True])
def test_limits_never_read_another_store_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """As many commits, the same run and the same ids; `at_once`: it is put there when the process begins."""
    ours, other = tmp_path / "s.act", tmp_path / "other.act"
    fake().store(ours)
    fake(seed=1).store(other)
    with Store(ours) as store:
        ours.rename(tmp_path / "gone.act")
        other.rename(ours)
        if at_once:
            monkeypatch.setattr(store._opened.folder, "check", lambda: None)
        with pytest.raises(Damaged, match=r"s\.act was moved or replaced since it was opened; open the store again"):
            store.sql("select act(token_id, 'r', 'resid_post.0') as x from tokens", timeout=60)


def test_an_error_before_the_query_begins_is_told(tmp_path: Path) -> None:
    fake().store(tmp_path / "s.act")
    with Store(tmp_path / "s.act") as store:
        shard = max((tmp_path / "s.act").rglob("c/0/*/*"), key=lambda path: path.is_file())
        shard.unlink()
        with pytest.raises(Damaged, match="c/0/0"):
            store.sql("select 1", timeout=60)


@pytest.mark.parametrize("value", [lambda: 1, object(), threading.Lock(), [{"x": 1j}]])
def test_a_parameter_that_no_other_process_takes_is_refused(store: Store, value: object) -> None:
    with pytest.raises(BadInput, match=r"got .* for \$x; give a number, a text") as caught:
        store.sql("select $x", {"x": value}, timeout=60)
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_told_whatever_the_limits() -> None:
    kind, said = _as_sent(MemoryError(), None)
    assert kind == "limit_reached"
    assert said == "the query needs more memory than there is; ask for less"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"timeout": 0}, "got timeout 0; it is a number of seconds above 0"),
        ({"timeout": -1.5}, "got timeout -1.5; "),
        ({"timeout": float("nan")}, "got timeout nan; "),
        ({"timeout": float("inf")}, "got timeout inf; "),
        ({"timeout": "1"}, "got timeout '1'; "),
        ({"memory": "two"}, "got memory 'two'; it is a size such as 2GB, 512MB or 1.5GiB"),
        ({"memory": "-2GB"}, "got memory '-2GB'; "),
        ({"memory": "0GB"}, "got memory '0GB'; "),
        ({"memory": 0}, "got memory 0; "),
        ({"memory": True}, "got memory True; "),
    ],
)
def test_what_is_no_limit_is_refused(store: Store, limits: dict[str, float], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        store.sql("select 1", **limits)


@pytest.mark.parametrize(
    ("size", "n_bytes"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("512mb", 512 * 10**6), ("64KiB", 64 << 10), ("100B", 100), (77, 77)],
)
def test_sizes_are_read_as_they_are_written(size: str | int, n_bytes: int) -> None:
    assert Limits.of(None, size) == Limits(None, n_bytes)


def test_a_closed_store_starts_no_process(place: Path) -> None:
    store = Store(place / "s.act")
    store.close()
    with pytest.raises(BadInput, match="closed"):
        store.sql("select 1", timeout=1)


def test_the_command_takes_limits(place: Path) -> None:
    runner, root = CliRunner(), str(place / "s.act")
    answered = runner.invoke(main, ["sql", root, "select 1 as one", "--timeout", "60", "--memory", "1GB", "--csv"])
    assert (answered.exit_code, answered.stdout) == (0, "one\n1\n")
    stopped = runner.invoke(main, ["sql", root, ENDLESS, "--timeout", "0.2"])
    assert (stopped.exit_code, stopped.stdout) == (1, "")
    assert stopped.stderr.startswith("actstore: the query took longer than its limit of 0.2 s")
    for command in (["sql", root, "select 1"], ["read", root, "from tokens"], ["query", root, "accuracy_by_depth"]):
        some = ["-p", "run", "r"] if command[0] == "query" else []
        refused = runner.invoke(main, [*command, *some, "--memory", "lots"])
        assert (refused.exit_code, refused.stderr[:28]) == (2, "actstore: got memory 'lots';")
    read = ["read", root, f"select ({ENDLESS}) as token_id", "--timeout", "0.2"]
    for how in ([], ["--explain"]):
        assert "longer than its limit of 0.2 s" in runner.invoke(main, [*read, *how]).stderr
    asked = ["query", root, "accuracy_by_depth", "-p", "run", "r", "--csv"]
    within = runner.invoke(main, [*asked, "--timeout", "60", "--memory", "1GB"])
    assert (within.exit_code, within.stdout) == (0, runner.invoke(main, asked).stdout)


INTERRUPTED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from actstore.store import Store
store = Store(sys.argv[1])
print("asking", flush=True)
try:
    store.sql(sys.argv[2], timeout=600)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_process_ends_with_the_one_that_asked(place: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(place / "s.act"), ENDLESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "asking\n"
            child = wait_for(lambda: children(process.pid))[0]
            process.send_signal(how)
            assert process.communicate(timeout=20)[0] == ("stopped\n" if how == signal.SIGINT else "")
            wait_for(lambda: not Path(f"/proc/{child}").exists() or state(child) == "Z")
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(path.parent.name))
    return found


def state(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def wait_for(happens: Callable[[], Any]) -> Any:
    until = time.monotonic() + 30
    while not (found := happens()):
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.02)
    return found
