"""Vectors inside SQL are the stored ones, row for row, and what is computed of them is what numpy and the model compute."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from actstore import queries
from actstore.catalog import tables
from actstore.errors import BadInput, Damaged, NotStored
from actstore.ingest.trees.draw import draw
from actstore.queries import study
from actstore.store import Store
from actstore.writing.writer import open_writer
from tests.planted import plant
from tests.stores import D_MODEL, Fake, fake, files

SITES = ("resid_post.0", "resid_post.1", "pattern.0")
ONE = fake(n_trees=400, trees_per_shard=128, sites=SITES)  # tokens for several of the 2,048 rows that come at a time
TWO = fake("two", "e", n_trees=10, seed=1, weights=b"two", sites=SITES)  # its last trees are not ingested
RUNS = {"r": (ONE, 0), "two": (TWO, 400)}  # and tree_id of their first trees


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("functions") / "s.act"
    ONE.store(root)
    TWO.store(root, batches=[0, 1])
    return root


@pytest.fixture(scope="module")
def store(root: Path) -> Iterator[Store]:
    with Store(root) as store:
        yield store


def stored(run: Fake, first: int, token_ids: list[int], layer: int = 0) -> np.ndarray:
    """What was given to the store."""
    tree, position = np.divmod(np.array(token_ids, np.int64), 256)
    return run.activations[f"blocks.{layer}.hook_resid_post"][tree - first, position]


def tokens_of(run: str) -> list[int]:
    fake_run, first = RUNS[run]
    n_trees = 6 if run == "two" else len(fake_run.trees)
    return [256 * (first + t) + p for t in range(n_trees) for p in range(fake_run.lengths[t])]


# act


@given(ids=st.lists(st.none() | st.sampled_from(tokens_of("r")), max_size=40))
def test_act_gives_each_row_its_own_activation(store: Store, ids: list[int | None]) -> None:
    """In any order, with repeats, and NULL for NULL."""
    found = store.sql(
        "select act(token_id, 'r', 'resid_post.0') as x from (select unnest($ids::bigint[]) as token_id)", {"ids": ids}
    )
    assert found.schema == {"x": pl.Array(pl.Float32, D_MODEL)}
    assert [row is None for row in found["x"].to_list()] == [one is None for one in ids]
    known = [one for one in ids if one is not None]
    np.testing.assert_array_equal(
        found["x"].drop_nulls().to_numpy().reshape(-1, D_MODEL), stored(ONE, 0, known).reshape(-1, D_MODEL)
    )


@pytest.mark.parametrize("order", ["token_id", "hash(token_id)", "token_id desc"])
def test_act_reads_what_read_reads(store: Store, order: str) -> None:
    query = f"select token_id from tokens semi join (from trees where dataset = 'd') using (tree_id) order by {order}"
    X, rows = store.read(query, run="r", site="resid_post.1")
    assert len(X) > 2 * 2048
    found = store.sql(f"select token_id, act(token_id, 'r', 'resid_post.1') as x from ({query})")
    assert found["token_id"].equals(rows["token_id"])
    np.testing.assert_array_equal(found["x"].to_numpy(), X)


def test_run_and_site_may_differ_from_row_to_row(store: Store) -> None:
    rng = np.random.default_rng(0)
    asked = [
        (int(rng.choice(tokens_of(run))), run, int(layer))
        for run, layer in zip(rng.choice(["r", "two"], 5000), rng.integers(2, size=5000), strict=True)
    ]
    params = {
        "ids": [one[0] for one in asked],
        "runs": [str(one[1]) for one in asked],
        "layers": [one[2] for one in asked],
    }
    found = store.sql(
        "select act(token_id, run, 'resid_post.' || layer) as x from "
        "(select unnest($ids::bigint[]) as token_id, unnest($runs::varchar[]) as run, unnest($layers::int[]) as layer)",
        params,
    )
    expected = [stored(*RUNS[str(run)], [token], layer)[0] for token, run, layer in asked]
    np.testing.assert_array_equal(found["x"].to_numpy(), np.array(expected))


def test_the_long_name_of_a_site_means_the_same(store: Store) -> None:
    query = "select act(5, 'r', 'resid_post.0') = act(5, 'r', 'blocks.0.hook_resid_post') as same"
    assert store.sql(query).item() is True


def test_only_rows_that_are_left_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    reader = store._opened.reader("r", "resid_post.0")
    gather = type(reader).gather
    monkeypatch.setattr(
        type(reader), "gather", lambda self, ids, *a, **k: (read.extend(ids), gather(self, ids, *a, **k))[1]
    )
    store.sql(
        "select x[1] from (select act(token_id, 'r', 'resid_post.0') as x, tree_id from tokens) where tree_id = 3"
    )
    assert sorted(read) == [256 * 3 + p for p in range(ONE.lengths[3])]
    read.clear()
    store.sql("select token_id from (select token_id, act(token_id, 'r', 'resid_post.0') as x from tokens)")
    assert read == [], "a column that is not used costs nothing"


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ("act(1, 'x', 'resid_post.0')", NotStored, r"no run 'x': .*s\.act holds r, two; name one of them"),
        (
            "act(1, 'r', 'embed')",
            NotStored,
            r"run 'r' holds no site 'embed'; it holds pattern\.0, resid_post\.0, resid_post\.1",
        ),
        ("act(1, 'r', 'pattern.0')", BadInput, r"site 'pattern.0' of run 'r' is an attention pattern, .*Store\.read"),
        ("act(-1, 'r', 'resid_post.0')", NotStored, "the first being -1 "),
        ("act(-9223372036854775808, 'r', 'resid_post.0')", NotStored, "the first being -9223372036854775808 "),
        ("act(9223372036854775807, 'r', 'resid_post.0')", NotStored, "the first being 9223372036854775807 "),
        ("act(14, 'r', 'resid_post.0')", NotStored, "the first being 14 .*padding"),
        ("act(255, 'r', 'resid_post.0')", NotStored, "the first being 255 "),
        (f"act({400 * 256}, 'r', 'resid_post.0')", NotStored, "the first being 102400 "),
        (f"act({406 * 256}, 'two', 'resid_post.0')", NotStored, "the first being 103936 .*not ingested yet"),
        ("logit_lens(1, 'r', 'resid_post.0')", Damaged, r"the weights .*\.safetensors cannot be read"),
        ("probe_direction('x')", NotStored, r"no probe direction 'x': .*`actstore study .*s\.act probes` records them"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(store: Store, call: str, error: type[Exception], said: str) -> None:
    if "(14" in call:
        assert ONE.lengths[0] <= 14 < 15, "tree 0 ends before its array does"
    with pytest.raises(error, match=said) as caught:
        store.sql(f"select {call}")
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert store.sql(f"select try({call}) is null").item() is True, (
        "a query may ask for NULL instead, and the session goes on"
    )


# activations


def test_activations_are_the_tokens_that_a_run_holds(store: Store) -> None:
    found = store.sql("from activations('two', 'resid_post.1') order by token_id")
    assert found["token_id"].to_list() == tokens_of("two")
    np.testing.assert_array_equal(found["x"].to_numpy(), stored(TWO, 400, tokens_of("two"), 1))
    tokens = store.sql("from tokens where tree_id between 400 and 405 order by token_id")
    assert found.drop("x").equals(tokens)


@pytest.mark.parametrize(("run", "site"), [("x", "resid_post.0"), ("r", "x"), ("r", "pattern.0")])
def test_activations_of_nothing_are_an_error_and_not_an_empty_table(store: Store, run: str, site: str) -> None:
    with pytest.raises((NotStored, BadInput), match=repr(run) if run == "x" else repr(site)):
        store.sql("select count(*) from activations($run, $site)", {"run": run, "site": site})


# Macros.


vectors = arrays(np.float32, 5, elements=st.floats(-8, 8, width=16).filter(lambda x: x == 0 or abs(x) > 0.01))


@given(a=vectors, b=vectors)
def test_macros_are_the_mathematics(store: Store, a: np.ndarray, b: np.ndarray) -> None:
    query = "select dot(a, b), norm(a), distance(a, b), cosine(a, b), project(a, b) from (select $a::float[5] a, $b::float[5] b)"
    found = np.array(store.sql(query, {"a": a.tolist(), "b": b.tolist()}).row(0), np.float64)
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        length = np.linalg.norm(a), np.linalg.norm(b)
        expected = a @ b, length[0], np.linalg.norm(a - b), a @ b / (length[0] * length[1]), a @ b / length[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_nothing_of_it_is_in_the_catalog(root: Path) -> None:
    """Any other client opens it and finds its tables, and no macro that it could not run."""
    before = files(root)
    with Store(root) as store:
        store.sql("select norm(act(1, 'r', 'resid_post.0'))")
    assert files(root) == before
    with duckdb.connect(str(root / tables.CATALOG), read_only=True) as other:
        made = other.execute("select function_name from duckdb_functions() where not internal").fetchall()
        assert made == []
        with pytest.raises(duckdb.CatalogException):
            other.execute("select dot([1]::float[1], [1]::float[1])")


# Runs of several widths.


@pytest.fixture(scope="module")
def wide_and_narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, dict[str, np.ndarray]]]:
    """Two runs over the same three trees, of d_model 4 and 7."""
    root, trees = tmp_path_factory.mktemp("widths") / "w.act", draw("reproduction", 0, 0, 3, 4)
    rng = np.random.default_rng(0)
    values = {run: rng.standard_normal((3, 15, d), dtype=np.float32) for run, d in (("narrow", 4), ("wide", 7))}
    for run, X in values.items():
        plant(root, trees, {"embed": X}, run)
    with Store(root) as store:
        yield store, values


def test_where_widths_differ_act_gives_lists(wide_and_narrow: tuple[Store, dict[str, np.ndarray]]) -> None:
    store, values = wide_and_narrow
    found = store.sql("select run, position, act(position + 0, run, 'embed') as x from tokens, runs where tree_id = 0")
    assert found.schema["x"] == pl.List(pl.Float32)
    for run, position, x in found.iter_rows():
        np.testing.assert_array_equal(x, values[run][0, position])
    cast = store.sql("select act(3, 'wide', 'embed')::float[7] as x")
    assert cast.schema["x"] == pl.Array(pl.Float32, 7)


def test_macros_work_on_lists_too(wide_and_narrow: tuple[Store, dict[str, np.ndarray]]) -> None:
    store, values = wide_and_narrow
    a, b = (values["wide"][0, position].astype(np.float64) for position in (1, 2))
    found = store.sql("""
        select dot(a, b), norm(a), distance(a, b), cosine(a, b), project(a, b)
        from (select act(1, 'wide', 'embed') as a, act(2, 'wide', 'embed') as b)
    """)
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    expected = a @ b, lengths[0], np.linalg.norm(a - b), a @ b / lengths[0] / lengths[1], a @ b / lengths[1]
    np.testing.assert_allclose(found.row(0), expected, rtol=1e-5)
    near = queries.select(store, "nearest", run="wide", site="embed", token_id=1, n=3)
    X, rows = store.read("select token_id from tokens where token_id != 1", run="wide", site="embed")
    order = np.argsort(np.linalg.norm(X - values["wide"][0, 1], axis=1))[:3]
    assert near["token_id"].to_list() == rows["token_id"].gather(order).to_list()


# logit_lens


def test_logit_lens_at_the_last_layer_is_the_model(demo_store: Store, shipped: Any) -> None:
    """To 1e-4, of logits of some 20: float32, and the stored residual is the model's own."""
    import torch

    rows = demo_store.sql(
        "select tree_id, list(token::varchar order by position) as words from tokens group by all"
    ).rows()
    ids = {word: i for i, word in enumerate(demo_store.sql("select vocabulary from models").item().to_list())}
    for tree, words in sorted(rows)[:5]:
        with torch.no_grad():
            logits = shipped.bridge(torch.tensor([[ids[word] for word in words]]))[0].numpy()
        found = demo_store.sql(
            "select logit_lens(token_id, 'reproduction', 'resid_post.5') as x from tokens where tree_id = $tree order by position",
            {"tree": tree},
        )
        assert found.schema == {"x": pl.Array(pl.Float32, len(ids))}
        np.testing.assert_allclose(found["x"].to_numpy(), logits, atol=1e-4)
    assert np.abs(logits).max() > 1
    with pytest.raises(NotStored, match="the first being -1 "):
        demo_store.sql("select logit_lens(-1, 'reproduction', 'resid_post.5')")


def test_logit_lens_at_any_site_is_the_final_norm_and_the_unembedding(demo_store: Store, shipped: Any) -> None:
    import torch

    X, rows = demo_store.read("select token_id from answer_tokens order by token_id", site="resid_post.2")
    with torch.no_grad():
        bridge = shipped.bridge
        logits = bridge.unembed(bridge.ln_final(torch.from_numpy(X)[None]))[0].numpy()
    found = demo_store.sql(
        "select token_id, logit_lens(token_id, 'reproduction', 'resid_post.2') as x from answer_tokens order by token_id"
    )
    assert found["token_id"].equals(rows["token_id"])
    np.testing.assert_allclose(found["x"].to_numpy(), logits, atol=1e-4)


# probe_direction


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, pl.DataFrame]]:
    """A store whose probes are recorded: both nodes of an edge are planted at its target token."""
    trees, rng = draw("reproduction", 3, 0, 120, 5), np.random.default_rng(0)
    X = rng.normal(3, 1, size=(120, 19, 8)).astype(np.float32) * np.arange(1, 9, dtype=np.float32)
    meaning = rng.normal(size=(2, 5, 8)).astype(np.float32) * np.arange(1, 9, dtype=np.float32)
    X[:, 1:12:3] += meaning[0, trees.edges[:, :, 0]] + meaning[1, trees.edges[:, :, 1]]
    root = plant(tmp_path_factory.mktemp("probed") / "p.act", trees, {"resid_post.0": X})
    with Store(root) as store:
        results = study.ask(store, "probes").results
    with open_writer(root) as writer:
        writer.record(results)
    with Store(root) as store:
        yield store, results


@pytest.mark.parametrize("label", ["source", "target"])
def test_directions_are_the_probe(probed: tuple[Store, pl.DataFrame], label: str) -> None:
    """The class of the largest logit, dot(x, direction) + value, is right exactly as often as the study says."""
    store, results = probed
    found = store.sql(f"""
        with logits as (
            select a.token_id, t.{label} as y, t.split, r.name.split('=')[2]::int as class,
                dot(a.x, probe_direction(r.name)) + r.value as logit
            from activations('planted', 'resid_post.0') a join edge_targets t using (token_id), results r
            where r.metric = 'direction' and r.label = '{label}'
        )
        select avg((guess = y)::int) from (
            select token_id, any_value(y) as y, arg_max(class, logit) as guess from logits where split = 'test' group by all
        )
    """)
    accuracy = results.filter(label=label, metric="accuracy")["value"].item()
    assert found.item() == pytest.approx(accuracy, abs=1e-12)
    assert accuracy > 0.4, "twice chance, or this would tell nothing"


def test_a_direction_has_a_readable_name_and_a_wrong_one_is_answered(probed: tuple[Store, pl.DataFrame]) -> None:
    store, results = probed
    name = "planted/resid_post.0/edge_target/source=3"
    row = results.filter(name=name).row(0, named=True)
    found = store.sql("select probe_direction($name) as d", {"name": name})
    assert found.schema == {"d": pl.Array(pl.Float32, 8)}
    assert found["d"].to_list() == [row["direction"]]
    with pytest.raises(NotStored, match=r"no probe direction '.*source=9'; the nearest of 10 is planted/.*/source="):
        store.sql("select probe_direction('planted/resid_post.0/edge_target/source=9')")


def test_the_latest_direction_of_a_name_counts(probed: tuple[Store, pl.DataFrame]) -> None:
    store, results = probed
    name = "planted/resid_post.0/edge_target/target=0"
    newer = results.filter(name=name).with_columns(pl.Series("direction", [[1.0] * 8], pl.List(pl.Float32)))
    with open_writer(store.path) as writer:
        writer.record(newer)
    with Store(store.path) as again:
        assert again.sql("select probe_direction($name) as d", {"name": name})["d"].to_list() == [[1.0] * 8]


# How it ends.


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


LEFT_OPEN = """
import sys
from actstore.store import Store
store = Store(sys.argv[1])
print(store.sql("select norm(act(1, 'r', 'resid_post.0')) as x").height)
if sys.argv[2] == "dropped":
    del store
elif sys.argv[2] == "failed":
    sys.exit("failed")
"""


@pytest.mark.parametrize("how", ["open", "dropped", "failed"])
def test_a_store_that_is_not_closed_leaks_nothing(root: Path, how: str) -> None:
    ended = run_python(LEFT_OPEN, str(root), how)
    assert (ended.stdout, ended.stderr) == ("1\n", "failed\n" if how == "failed" else "")


def test_a_store_is_let_go_of_when_nobody_holds_it(root: Path) -> None:
    """Its functions are out of the garbage collector's sight, so they must not hold it."""
    import gc
    import weakref

    store = Store(root)
    store.sql("select act(1, 'r', 'resid_post.0')")
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is None


ENDLESS = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from actstore.store import Store
store = Store(sys.argv[1])
print("asking", flush=True)
try:
    store.sql("select sum(norm(act((i * 7) % 12, 'r', 'resid_post.0'))) from range(10_000_000_000) t(i)")
except KeyboardInterrupt:
    print("stopped", store.sql("select count(*) from trees").item(), threading.active_count(), flush=True)
"""


def test_ctrl_c_ends_a_query_that_reads_vectors(root: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ENDLESS, str(root)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "asking\n"
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20)[0] == "stopped 406 1\n"
        finally:
            process.kill()
