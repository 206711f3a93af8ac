"""What a new user tries first: it is taken as it is meant, or told in words what was got, what there is, and what to do."""

from __future__ import annotations

import subprocess
import sys
from datetime import date, datetime
from enum import Enum
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import ActstoreError, BadInput, NotStored
from actstore.ingest.models.load import load
from actstore.queries import select
from actstore.storage.at import place
from actstore.store import Store
from tests.stores import fake, files

SOME = "select token_id, role, position from tokens where tree_id = 3"
HOLDS = "embed, resid_post.0 to resid_post.5"
PARTS = [f"resid_post.{layer}" for layer in range(6)]


class Split(Enum):
    TRAIN = "train"


@pytest.fixture(scope="module")
def store(demo_path):
    with Store(demo_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The path of a store of two runs."""
    root = tmp_path_factory.mktemp("two") / "two.act"
    fake("first", sites=["embed"]).store(root)
    fake("second", sites=["embed"], weights=b"others").store(root)
    return root


# What is taken as it is meant.

SITES = [
    ("resid_post.2", "resid_post.2"),
    ("blocks.2.hook_resid_post", "resid_post.2"),
    (("resid_post", 2), "resid_post.2"),
    (("resid_post", np.int64(2)), "resid_post.2"),
    (("resid_post", "2"), "resid_post.2"),
    (("resid_post", -1), "resid_post.5"),
    ("hook_embed", "embed"),
]


@pytest.mark.parametrize(("spelled", "short"), SITES, ids=str)
def test_a_site_may_be_spelled_as_transformer_lens_spells_it(store, spelled, short):
    expected, _ = store.read(SOME, site=short)
    np.testing.assert_array_equal(store.read(SOME, site=spelled)[0], expected)
    np.testing.assert_array_equal(store.read(SOME, sites=[spelled])[0][:, 0], expected)
    assert store.explain(SOME, site=spelled).sites == store.explain(SOME, sites=[spelled]).sites
    x = store.scan(site=spelled).filter(pl.col("tree_id") == 3).select("x").collect()["x"].to_numpy()
    np.testing.assert_array_equal(x, expected)
    X, _ = next(iter(store.batches(SOME, site=spelled, shuffle=False)))
    np.testing.assert_array_equal(X.numpy(), expected)


def test_a_family_is_every_layer_of_it_that_the_run_holds(store, tmp_path):
    expected, _ = store.read(SOME, sites=PARTS)
    np.testing.assert_array_equal(store.read(SOME, sites=["resid_post"])[0], expected)
    np.testing.assert_array_equal(store.read(SOME, sites=["embed", "resid_post"])[0][:, 1:], expected)
    for number, family in enumerate(("resid_post", "resid_post,embed")):
        out = tmp_path / f"{number}.npz"
        done = CliRunner().invoke(main, ["read", str(store.path), SOME, "--site", family, "--out", str(out)])
        assert done.exit_code == 0, done.output
        np.testing.assert_array_equal(np.load(out)["X"][:, :6], expected)


IDS = [3 * 256 + 7, 5, 3 * 256 + 7, 0]  # in no order, one of them twice
GIVEN = [
    *(
        list(IDS),
        tuple(IDS),
        np.array(IDS),
        np.array(IDS, np.uint16),
        torch.tensor(IDS),
        pl.Series(IDS),
        pl.Series(IDS).to_pandas(),
    ),
    *(pl.Series("any name", IDS), pl.Series(IDS, dtype=pl.UInt32), dict.fromkeys(IDS[:2]).keys()),
]
FRAME = pl.DataFrame({"label": ["a", "b", "c", "d"], "token_id": IDS, "weight": [0.1, 0.2, 0.3, 0.4]})
FRAMES = [FRAME, FRAME.lazy(), FRAME.to_arrow(), FRAME.to_dict(), FRAME.to_pandas()]


@pytest.mark.parametrize("ids", GIVEN, ids=lambda ids: type(ids).__module__ + "." + type(ids).__name__)
def test_ids_are_read_in_their_order_repeats_kept(store, ids):
    known, all_rows = store.read("select token_id from tokens where tree_id in (0, 3)", site="embed")
    place = {token: row for row, token in enumerate(all_rows["token_id"])}
    X, rows = store.read(ids, site="embed")
    assert rows.columns == ["token_id"]
    assert rows["token_id"].to_list() == list(ids)
    np.testing.assert_array_equal(X, known[[place[int(token)] for token in ids]])
    assert store.explain(ids, site="embed").rows == len(ids)


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__module__ + "." + type(frame).__name__)
def test_a_frame_is_read_row_for_row_and_comes_back_as_it_is(store, frame):
    expected, _ = store.read(IDS, site="embed")
    X, rows = store.read(frame, site="embed")
    np.testing.assert_array_equal(X, expected)
    assert rows.equals(FRAME)
    X, columns = next(iter(store.batches(frame, site="embed", shuffle=False)))
    np.testing.assert_array_equal(X.numpy(), expected)
    assert columns["label"] == ["a", "b", "c", "d"]


def test_what_a_query_yields_is_read_again(store):
    X, rows = store.read(SOME, site="embed")
    mine = rows.sample(fraction=1, shuffle=True, seed=1).with_columns(mine=pl.col("position") * 2)
    again, kept = store.read(mine, site="embed")
    assert kept.equals(mine)
    np.testing.assert_array_equal(again, X[mine["position"].to_numpy()])


def test_no_ids_are_no_rows(store):
    X, rows = store.read([], site="embed")
    assert X.shape == (0, 128)
    assert rows.schema == {"token_id": pl.Int64}


MANY = [
    [1, 3],
    (1, 3),
    range(1, 4, 2),
    np.array([1, 3]),
    pl.Series([1, 3]),
    pl.Series([1, 3]).to_pandas(),
    torch.tensor([1, 3]),
]
ONE = [
    *((np.int16(3), 3), (np.float32(0.5), 0.5), (torch.tensor(3), 3), (np.array(3), 3), (Split.TRAIN, "train")),
    (np.datetime64("2000-01-02T03:04:05.000006789", "ns"), datetime(2000, 1, 2, 3, 4, 5, 6)),
    *((Path("a/b"), "a/b"), (date(2000, 1, 2), date(2000, 1, 2)), (None, None)),
]


@pytest.mark.parametrize("value", [*MANY, {1: 0, 3: 0}.keys(), {1, 3}], ids=lambda value: type(value).__name__)
def test_a_parameter_of_several_values_may_be_of_any_library(store, value):
    query = "select tree_id from trees where tree_id in (select unnest($ids)) order by tree_id"
    assert store.sql(query, {"ids": value})["tree_id"].to_list() == [1, 3]


@pytest.mark.parametrize(("value", "expected"), ONE, ids=lambda value: repr(value))
def test_a_parameter_of_one_value_is_pythons_own(store, value, expected):
    assert store.sql("select $x as x, $of[1] as first", {"x": value, "of": [value]}).row(0) == (expected, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.dtype("float16"), torch.float16, "float16"], ids=repr)
def test_a_dtype_may_be_that_of_a_library(store, dtype):
    assert store.read(SOME, dtype=dtype)[0].dtype == np.float16


def test_the_home_folder_is_found(store, monkeypatch):
    monkeypatch.setenv("HOME", str(store.path.parent))
    for path in (f"~/{store.path.name}", Path("~") / store.path.name):
        with Store(path) as opened:
            assert opened.path == store.path
    assert CliRunner().invoke(main, ["info", f"~/{store.path.name}"]).exit_code == 0


@pytest.mark.parametrize("name", ["~/s.act", "s3:/s.act"])
def test_a_folder_of_such_a_name_here_comes_before_the_home_folder_or_an_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    assert place(name) == Path(name)


def test_queries_are_there_without_an_import():
    script = "import actstore, sys; print(len(actstore.queries.names()), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"


# What is told.

REFUSED = {
    # sites
    "site=['embed']": (lambda s: s.read(SOME, site=["embed"]), BadInput, "got site ['embed']", "give sites=['embed']"),
    "site=two": (lambda s: s.scan(site=("embed", "resid_post.0")), BadInput, "give sites=['embed', 'resid_post.0']"),
    "site=0": (lambda s: s.read(SOME, site=0), BadInput, "got site 0", "('resid_post', 0)", f"holds {HOLDS}"),
    "site=True": (lambda s: s.read(SOME, site=("resid_post", True)), BadInput, "('resid_post', True)"),
    "site=3.5": (lambda s: s.batches(SOME, site=3.5), BadInput, "got site 3.5", "'blocks.0.hook_resid_post'"),
    "site=family": (
        lambda s: s.read(SOME, site="resid_post"),
        *(
            BadInput,
            "got site 'resid_post', a family",
            "holds resid_post.0 to resid_post.5",
            "sites=['resid_post'] for X [n, 6",
        ),
    ),
    "site=a,b": (
        lambda s: s.read(SOME, site="embed, resid_post.0"),
        *(NotStored, f"it holds {HOLDS}", "give sites=['embed', 'resid_post.0']"),
    ),
    "site=a run": (lambda s: s.read(SOME, site="reproduction"), NotStored, "which is a run", f"it holds {HOLDS}"),
    "sites=0": (lambda s: s.read(SOME, sites=0), BadInput, "got sites 0", "give a list of sites"),
    "sites=[0]": (lambda s: s.explain(SOME, sites=[0]), BadInput, "got site 0", f"holds {HOLDS}"),
    "sites=a set": (lambda s: s.read(SOME, sites={"embed", "resid_post.0"}), BadInput, "give a list of sites"),
    "sites=text": (lambda s: s.read(SOME, sites="embed"), BadInput, "got sites 'embed'", "give a list of sites"),
    "resid_post.9": (
        lambda s: s.read(SOME, site="resid_post.9"),
        *(NotStored, "no site 'resid_post.9'", "its model has layers 0 to 5", f"it holds {HOLDS}"),
    ),
    "blocks.9": (lambda s: s.scan(site="blocks.9.hook_resid_post"), NotStored, "layers 0 to 5", f"it holds {HOLDS}"),
    "key 9": (lambda s: s.batches(SOME, site=("pattern", 9)), NotStored, "'pattern.9'", "layers 0 to 5"),
    "in SQL": (
        lambda s: s.sql("select act(token_id, 'reproduction', 'resid_post.9') as x from tokens"),
        *(NotStored, "layers 0 to 5"),
    ),
    "resid_mid.0": (
        lambda s: s.read(SOME, site="resid_mid.0"),
        *(
            NotStored,
            f"it holds {HOLDS}",
            "--model-of reproduction",
            "--run reproduction --sites resid_mid.0`",
        ),
    ),
    "resid_pots.0": (
        lambda s: s.read(SOME, site="resid_pots.0"),
        *(NotStored, "did you mean 'resid_post.0'?", f"it holds {HOLDS}"),
    ),
    "Resid_Post.0": (lambda s: s.read(SOME, site="Resid_Post.0"), NotStored, "did you mean 'resid_post.0'?"),
    # runs
    "run misspelt": (
        lambda s: s.read(SOME, run="reproductoin"),
        *(NotStored, "no run 'reproductoin' (did you mean 'reproduction'?); ", "holds reproduction"),
    ),
    "run in capitals": (lambda s: s.sites("Reproduction"), NotStored, "did you mean 'reproduction'?"),
    "run in SQL": (
        lambda s: s.sql("select act(token_id, 'reproductoin', 'embed') as x from tokens"),
        *(NotStored, "did you mean 'reproduction'?"),
    ),
    "run of a query": (
        lambda s: select(s, "accuracy_by_depth", run="reproductoin"),
        NotStored,
        "did you mean 'reproduction'?",
    ),
    "run unknown": (
        lambda s: s.read(SOME, run="zzz"),
        NotStored,
        "no run 'zzz'",
        "holds reproduction; name one of them",
    ),
    "run a model": (lambda s: s.read(SOME, run="baseline"), NotStored, "holds reproduction", "--model baseline`"),
    "run=site": (lambda s: s.read(SOME, "resid_post.0"), NotStored, "which is a site (site='resid_post.0'"),
    "run=3": (lambda s: s.read(SOME, run=3), BadInput, "got run 3", "holds reproduction", "the name of one"),
    "run=list": (lambda s: s.scan(run=["reproduction"]), BadInput, "got run ['reproduction']", "the name of one"),
    # parameters
    "params=list": (lambda s: s.read(SOME, params=["a"]), BadInput, "got ['a'] (list) for params", "{'name': value}"),
    "params=text": (lambda s: s.sql("select $x", "x"), BadInput, "got 'x' (str) for params", "{'name': value}"),
    "params={1:}": (lambda s: s.sql("select $x", {1: 3}), BadInput, "got the name 1 for params", "{'name': value}"),
    "params=frame": (lambda s: s.sql("select $x", {"x": FRAME}), BadInput, "got a frame for $x", "frame['token_id']"),
    "params=object": (
        lambda s: s.sql("select $x", {"x": 1j}),
        BadInput,
        "type complex for $x",
        "give a number, a text",
    ),
    "params beside ids": (
        lambda s: s.read([1], params={"a": 1}),
        BadInput,
        "got params, and [1] (list)",
        "leave one out",
    ),
    # tokens
    "read(3)": (lambda s: s.read(3), BadInput, "got 3 (int)", "SQL, token ids", "a frame with a column token_id"),
    "read(None)": (lambda s: s.read(None), BadInput, "got None", "SQL, token ids"),
    "read(floats)": (lambda s: s.read([0.5]), BadInput, "got ids of type float, the first [0.5]", "integers"),
    "read(texts)": (lambda s: s.read(["a"]), BadInput, "got ids of type str", "SQL, token ids"),
    "read(truths)": (lambda s: s.read([True]), BadInput, "got ids of type bool", "integers"),
    "read(2-d)": (lambda s: s.read(np.ones((2, 2), int)), BadInput, "got ids of shape [2, 2]", "SQL, token ids"),
    "read(ragged)": (lambda s: s.batches([[1], [1, 2]]), BadInput, "got ids of shape", "SQL, token ids"),
    "read(set)": (lambda s: s.read({1, 2}), BadInput, "got a set of ids, which has no order", "give a list"),
    "read(frame without)": (
        lambda s: s.read(FRAME.drop("token_id")),
        BadInput,
        "the frame yields label, weight",
        "token_id",
    ),
    "read(frame of text)": (
        lambda s: s.read(pl.DataFrame({"token_id": ["a"]})),
        BadInput,
        "the frame's token_id is String",
    ),
    "read(NULL)": (lambda s: s.read(pl.Series([1, None])), BadInput, "1 of 2 token_ids are NULL"),
    "read(no frame)": (lambda s: s.read({"token_id": [1], "a": [1, 2, 3]}), BadInput, "which is no frame"),
    "read(unknown)": (lambda s: s.read([10**9]), NotStored, "1000000000"),
    "read(huge)": (lambda s: s.read([2**70]), BadInput, "got ids of type int"),
    # SQL
    "sql(3)": (lambda s: s.sql(3), BadInput, "got 3 (int) for a query", "give SQL as text"),
    "sql(bytes)": (lambda s: s.sql(b"select 1"), BadInput, "type bytes for a query", "give SQL as text"),
    "sql(ids)": (lambda s: s.sql([1, 2]), BadInput, "got [1, 2] (list) for a query", "Store.read takes ids"),
    "sql(table)": (
        lambda s: s.sql("tokens"),
        BadInput,
        "to read the table write: from tokens",
        "LINE 1: tokens\n        ^",
    ),
    "sql(word)": (lambda s: s.read("tokns"), BadInput, "a query is SQL, such as: from tokens", "LINE 1: tokns\n"),
    "sql(named query)": (
        lambda s: s.sql("accuracy_by_depth"),
        *(BadInput, "accuracy_by_depth is a named query", "actstore query STORE accuracy_by_depth"),
    ),
    **{
        f"file {number}": (
            lambda s, source=source: s.sql(f"select * from {source}"),
            *(BadInput, "the query was refused", "reads the store's tables and no files", "with polars", "params"),
        )
        for number, source in enumerate(
            ("read_parquet('x')", "read_csv('https://x/y')", "'x.parquet'", "'/x/y'", "glob('*')")
        )
    },
    "double quotes": (
        lambda s: s.sql('select * from tokens where role = "path"'),
        *(BadInput, 'column "path" not found', "text stands in single quotes, 'path': double quotes name a column"),
        'LINE 1: select * from tokens where role = "path"\n                                          ^^^^^^',
    ),
    "no quotes": (
        lambda s: s.sql("select * from tokens where role = path"),
        *(BadInput, "where a text is meant, it stands in single quotes, 'path'", "role = path\n" + 42 * " " + "^^^^"),
    ),
    "names unquoted": (
        lambda s: s.sql("select act(token_id, reproduction, embed) as x from tokens"),
        *(BadInput, "single quotes, 'reproduction'", "LINE 1: select act(token_id, reproduction, embed) as x from"),
    ),
    "column misspelt": (
        lambda s: s.sql("select token_id, act(token_id, 'reproduction', 'embed') as x,\n rol from tokens"),
        *(
            BadInput,
            'Candidate bindings: "role"',
            "LINE 2:  rol from tokens\n         ^^^",
        ),  # of the query as it was asked
    ),
    "table misspelt": (
        lambda s: s.sql("select *\nfrom token"),
        *(BadInput, 'Did you mean "tokens"? The store has answer_tokens', "LINE 2: from token\n             ^^^^^"),
    ),
    "frame as a table": (
        lambda s: s.sql("from my_frame"),
        BadInput,
        "hand a frame of yours over by name: tables={'my_frame': frame}",
        "--table my_frame=FILE",
        "LINE 1",
    ),
    "with limits": (
        lambda s: s.sql("select rol from tokens", timeout=60),
        BadInput,
        "LINE 1: select rol from tokens\n   ",
    ),
    "act of two": (
        lambda s: s.sql("select act(token_id, 'reproduction') from tokens"),
        *(BadInput, "it takes act(token_id, 'RUN', 'resid_post.0')", "LINE 1: select act("),
    ),
    "act of a layer": (
        lambda s: s.sql("select act(token_id, 'reproduction', 0) from tokens"),
        BadInput,
        "it takes act(",
    ),
    "activations": (
        lambda s: s.sql("from activations"),
        *(BadInput, "It takes a run and a site: from activations('RUN', 'resid_post.0')", "LINE 1"),
    ),
    "activations of one": (lambda s: s.sql("from activations('reproduction')"), BadInput, "from activations('RUN', "),
    "dot of a list": (
        lambda s: s.sql("select dot(act(token_id, 'reproduction', 'embed'), [1, 2]) from tokens"),
        *(BadInput, "vectors of one width", "::float[128]"),
    ),
    # other arguments
    "out": (lambda s: s.read(SOME, out="pandas"), BadInput, "got out 'pandas'", "'numpy' or 'torch'"),
    "dtype": (lambda s: s.read(SOME, dtype=int), BadInput, "got dtype <class 'int'>", "float32, float16"),
    # stores and models
    "Store(hdfs)": (
        lambda s: Store("hdfs://bucket/x"),
        BadInput,
        "got hdfs://bucket/x",
        "a folder of this machine",
        "copy it here",
    ),
    "Store(https)": (lambda s: Store("https://x/y.act"), BadInput, "got https://x/y.act", "copy it here"),
    "Store(file)": (lambda s: Store("file:///tmp/x.act"), BadInput, "got file:///tmp/x.act", "write it as /tmp/x.act"),
    "Store(3)": (lambda s: Store(3), BadInput, "got 3 for a store", "name its folder"),
    "Store(None)": (lambda s: Store(None), BadInput, "got None for a store", "name its folder"),
    "Store()": (lambda s: Store(""), BadInput, "got '' for a store", "name its folder"),
    "Store(NUL)": (lambda s: Store("a\0b"), BadInput, "name its folder"),
    "Store(catalog)": (
        lambda s: Store(s.path / "catalog.duckdb"),
        NotStored,
        "lies in a store",
        "name the store itself",
    ),
    "Store(part)": (
        lambda s: Store(s.path / "parts" / "tokens"),
        NotStored,
        "lies in a store",
        "name the store itself",
    ),
    "Store(near)": (lambda s: Store(s.path.with_name("demo.atc")), NotStored, "did you mean", "demo.act"),
    "load(gpt2)": (lambda s: load("gpt2"), NotStored, "'gpt2'", "baseline, reproduction", "actstore models add"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_in_python_is_told(store, mistake):
    call, kind, *words = REFUSED[mistake]
    with pytest.raises(ActstoreError) as caught:
        call(store)
    assert type(caught.value) is kind, caught.value
    said, *place = str(caught.value).split("\n")
    assert not place or (len(place) == 2 and place[0].startswith("LINE ")), "the place in a query, and nothing else"
    for word in words:
        assert word in str(caught.value)
    assert "reproductoin --model" not in said, "a misspelling is not offered to be stored"


def test_of_several_runs_one_is_to_be_named(two):
    with (
        Store(two) as store,
        pytest.raises(BadInput, match=r"holds first, second: name one \(run='first', --run first\)"),
    ):
        store.read("from tokens", site="embed")


TYPED = [
    (["read", "STORE", SOME, "--site", "0"], 1, ("no site '0'", f"it holds {HOLDS}", "name one")),
    (["read", "STORE", SOME, "--site", "resid_post.9"], 1, ("layers 0 to 5", f"it holds {HOLDS}")),
    (["read", "STORE", SOME, "--site", "resid_post,resid_post.9"], 1, ("'resid_post.9'", "layers 0 to 5")),
    (["read", "STORE", SOME, "--site", "pattern"], 1, ("no site 'pattern'", "--sites pattern`")),
    (["read", "STORE", SOME, "--run", "reproductoin"], 1, ("did you mean 'reproduction'?",)),
    (["read", "STORE", SOME, "--run", "baseline"], 1, ("holds reproduction", "--model baseline`")),
    (["read", "STORE", "0,1,256"], 2, ('near "0"', "LINE 1: 0,1,256\n        ^")),
    (["read", "STORE", "tokens"], 2, ("from tokens",)),
    (["study", "STORE", "depth", "--run", "reproductoin"], 1, ("did you mean 'reproduction'?",)),
    (["report", "STORE", "OUT", "--run", "reproductoin"], 1, ("did you mean 'reproduction'?",)),
    (["attention", "STORE", "3", "--run", "reproductoin", "--out", "x.html"], 1, ("did you mean 'reproduction'?",)),
    (["query", "STORE", "accuracy_by_depth", "-p", "run", "reproductoin"], 1, ("did you mean 'reproduction'?",)),
    (["sql", "STORE", "accuracy_by_depth"], 2, ("is a named query", "LINE 1")),
    (
        ["sql", "STORE", 'select * from tokens where role = "path"'],
        2,
        ("single quotes, 'path'", 'role = "path"\n', "^^^^^^"),
    ),
    (["sql", "STORE", "select * from tokens where role = path"], 2, ("single quotes, 'path'", "^^^^")),
    (["sql", "STORE", "from read_parquet('x.parquet')"], 2, ("no files", "with polars")),
    (
        ["sql", "STORE", "select rol from tokens", "--timeout", "60"],
        2,
        ("LINE 1: select rol from tokens\n               ^^^",),
    ),
    (["sql", "STORE", "query.sql"], 2, ("no file that holds it", 'actstore sql STORE "$(cat query.sql)"')),
    (["study", "STORE", "probes", "-o", "sites", "resid_post.9"], 1, ("layers 0 to 5", f"it holds {HOLDS}")),
    (
        ["study", "STORE", "probes", "-o", "sites", "resid_pots.1"],
        1,
        ("did you mean 'resid_post.1'?", f"it holds {HOLDS}"),
    ),
    (
        ["study", "STORE", "probes", "-o", "baseline", "no.sql"],
        2,
        ("'no.sql' (No such file or directory)", "path of an .sql"),
    ),
    (["ingest", "NEW", "--model", "reproduction", "--run", ""], 2, ("empty name for --run", "leave --run out")),
    (["ingest", "NEW", "--model", "reproduction", "--dataset", ""], 2, ("empty name for --dataset",)),
    (["sql", "STORE", "select $a", "-p", "a"], 2, ("'-p' requires 2 arguments", "`actstore sql --help`")),
    (["sql", "hdfs://bucket/x", "select 1"], 2, ("got hdfs://bucket/x", "a folder of this machine", "copy it here")),
    (["ingest", "hdfs://bucket/x", "--model", "reproduction"], 2, ("got hdfs://bucket/x", "copy it here")),
    (["verify", "https://x/y"], 2, ("got https://x/y", "copy it here")),
    (["info", "STORE/catalog.duckdb"], 1, ("lies in a store", "name the store itself")),
    (["info", "~/nowhere.act"], 1, ("nowhere.act does not exist", "actstore ingest")),
    (["info", ""], 2, ("got '' for a store", "name its folder")),
    (["ingest", "NEW", "--model", "gpt2"], 1, ("'gpt2'", "baseline, reproduction", "actstore models add")),
    (["evaluate", "gpt2"], 1, ("'gpt2'", "baseline, reproduction")),
]


@pytest.mark.parametrize(("typed", "code", "words"), TYPED, ids=[" ".join(typed) for typed, *_ in TYPED])
def test_a_mistake_on_the_command_line_is_told(store, tmp_path, monkeypatch, typed, code, words):
    monkeypatch.chdir(tmp_path)
    before = files(store.path)
    places = {"NEW": "new.act", "OUT": "out"}
    result = CliRunner().invoke(main, [places.get(word, word.replace("STORE", str(store.path))) for word in typed])
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    said, *place = result.stderr.splitlines()
    assert said.startswith("actstore: ")
    assert not place or (len(place) == 2 and place[0].startswith("LINE ")), result.stderr
    for word in words:
        assert word in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert files(store.path) == before


# After close.

AFTER = {
    "read": lambda s, made: s.read(SOME),
    "read ids": lambda s, made: s.read([1]),
    "explain": lambda s, made: s.explain(SOME),
    "sql": lambda s, made: s.sql("select 1"),
    "sql with limits": lambda s, made: s.sql("select 1", timeout=60),
    "info": lambda s, made: s.info(),
    "runs": lambda s, made: s.runs(),
    "sites": lambda s, made: s.sites("reproduction"),
    "scan": lambda s, made: s.scan(),
    "a frame": lambda s, made: made.collect(),
    "a frame's x": lambda s, made: made.select("x").head(3).collect(engine="streaming"),
    "batches": lambda s, made: s.batches(SOME),
    "with": lambda s, made: s.__enter__(),
    "a named query": lambda s, made: select(s, "role_counts"),
    "the session": lambda s, made: s._opened.session.sql("select 1"),
}


@pytest.fixture(scope="module")
def closed(demo_path):
    """A store that was used and then closed, a scan and batches of it."""
    store = Store(demo_path)
    made, batches = store.scan(), store.batches(SOME, shuffle=False)
    store.read(SOME)
    store.runs()
    store.close()
    store.close()
    return store, made, batches


@pytest.mark.parametrize("use", AFTER)
def test_after_close_everything_says_so(closed, use):
    store, made, _ = closed
    with pytest.raises(BadInput, match=r"^the store is closed; open it again$"):
        AFTER[use](store, made)


def test_after_close_a_store_has_a_name_and_batches_read_on(closed, store):
    opened, _, batches = closed
    assert repr(opened) == f"Store({str(opened.path)!r}, closed)"
    X, _ = next(iter(batches))
    np.testing.assert_array_equal(X.numpy(), store.read(SOME)[0])


# A store that nobody can write to: tests/test_recording.py; every command that a message advises: tests/test_advice.py.


def test_a_study_on_a_read_only_mount_is_printed_and_kept(demo_path, tmp_path, monkeypatch):
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "--bind", "-o", "ro", demo_path, mount], capture_output=True, check=False).returncode:
        pytest.skip("only root can mount, and not everywhere")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", mount], check=True)
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(main, ["study", str(mount), "depth"])
        assert result.exit_code == 2, result.output
        assert "by greedy decoding" in result.stdout
        first, kept, last = result.stderr.splitlines()
        assert "cannot be written (Read-only file system)" in first
        assert "keeps the results" in kept
        assert "not recorded" in last
        assert len(list(tmp_path.glob("results-*.parquet"))) == 1
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)
