"""The polars scan, against a frame joined in polars from the tables and the planted activations."""

from __future__ import annotations

import operator

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.arrays.reader import SiteReader
from actstore.errors import BadInput, NotStored
from actstore.reading import scan
from actstore.reading.opened import Opened
from actstore.sql.pushdown import push
from actstore.store import Store
from tests import stores
from tests.stores import D_MODEL, Fake, fake

pytestmark = pytest.mark.filterwarnings("ignore:Comparisons with None")  # polars doubts that they are meant
CHANGES = [None, "swap", "it's", "", 'edge."2" $p0 \\', "→3 \x00"]
KEPT = [0, 2, 3]  # batches of the run that lacks one


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The path of a store of three runs, and the runs: two over one dataset, of which the second lacks batch 1."""
    path = tmp_path_factory.mktemp("scan") / "s.act"
    sites = ("resid_post.0", "pattern.0")
    first = fake("first", n_trees=20, trees_per_shard=6, n_nodes=5, sites=sites)
    second = fake("second", n_trees=20, trees_per_shard=6, n_nodes=5, sites=sites, weights=b"others")
    other = fake("other", "e", n_trees=7, trees_per_shard=4, n_nodes=6, seed=1, sites=sites)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "tree_rows", changed_tree_rows)
        first.store(path)
        second.store(path, KEPT)
        other.store(path)
    return path, {fake.plan.run: fake for fake in (first, second, other)}


def changed_tree_rows(*args):
    rows = tree_rows(*args)
    ids = rows["tree_id"]
    return rows.with_columns(
        change=pl.Series([CHANGES[i % len(CHANGES)] for i in ids], dtype=pl.String),
        variant_of=pl.Series([i - 1 if i % 3 else None for i in ids], dtype=pl.Int32),
    )


tree_rows = stores.tree_rows


@pytest.fixture(scope="module")
def store(planted):
    with Store(planted[0]) as store:
        yield store


@pytest.fixture(scope="module")
def whole(store, planted):
    """The first run's scan, without a scan."""
    return joined(store, planted[1]["first"], 0)


@pytest.fixture(scope="module")
def lazy(store):
    return store.scan("first")


def joined(store: Store, fake: Fake, first_tree_id: int, site: str = "blocks.0.hook_resid_post") -> pl.DataFrame:
    tables = {name: store.sql(f"select * from {name}") for name in ("tokens", "edges", "trees")}
    mine = pl.col("tree_id").is_between(first_tree_id, first_tree_id + len(fake.trees) - 1)
    frame = tables["tokens"].filter(mine).sort("token_id")
    frame = frame.join(tables["edges"].rename({"step": "edge_step"}), on=["tree_id", "edge"], how="left")
    frame = frame.join(tables["trees"].drop("dataset"), on="tree_id", how="left").sort("token_id")
    spelled = {"token": "token_word", "role": "token_role", "split": "tree_split"}
    for name, kind in spelled.items():
        values = store.sql(f"select unnest(enum_range(null::{kind}))").to_series()
        frame = frame.with_columns(pl.col(name).cast(pl.Enum(values)))
    tree, position = frame["tree_id"].to_numpy() - first_tree_id, frame["position"].to_numpy()
    values = fake.activations[site]
    x = values[tree, :, position] if values.ndim == 4 else values[tree, position]
    return frame.with_columns(pl.Series("x", np.ascontiguousarray(x)))


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_a_scan_is_the_joined_tables_with_each_tokens_activation(lazy, whole, engine):
    frame = lazy.collect(engine=engine)
    assert frame.equals(whole)
    assert frame.schema == whole.schema == lazy.collect_schema()
    assert frame.schema["x"] == pl.Array(pl.Float32, D_MODEL)


def test_a_pattern_is_an_array_of_heads_and_keys(store, planted):
    frame = store.scan("other", "pattern.0").collect()
    expected = joined(store, planted[1]["other"], frame["tree_id"][0], "blocks.0.attn.hook_pattern")
    assert frame.equals(expected)
    assert isinstance(frame.schema["x"], pl.Array)
    assert frame.schema["x"].shape == (2, 4 * 6 - 1)


def test_trees_that_the_run_lacks_have_no_rows(store, planted):
    frame = store.scan("second").collect()
    expected = joined(store, planted[1]["second"], 0)
    assert frame.equals(expected.filter((pl.col("tree_id") // 6).is_in(KEPT)))
    assert 0 < len(frame) < len(expected)


def test_the_order_and_rows_are_the_same_whatever_the_pieces(lazy, whole, monkeypatch):
    monkeypatch.setattr(scan, "QUERY_ROWS", 40)  # two trees a query
    monkeypatch.setattr(scan, "BATCH_ROWS", 7)
    assert lazy.collect().equals(whole)
    for n in (0, 1, 16, 17, 100, 349, 350, 351):
        assert lazy.head(n).collect().equals(whole.head(n))
    assert lazy.slice(33, 20).collect().equals(whole.slice(33, 20))
    assert lazy.tail(5).collect().equals(whole.tail(5))


def test_a_join_that_comes_back_in_disorder_is_put_in_order(lazy, whole, monkeypatch):
    asked = Opened.sql
    monkeypatch.setattr(Opened, "sql", lambda self, *args: asked(self, *args).reverse())
    assert lazy.filter(pl.col("position") > 3).collect().equals(whole.filter(pl.col("position") > 3))
    assert lazy.head(20).collect().equals(whole.head(20))


def test_an_unknown_run_or_site_is_refused_at_once(store):
    with pytest.raises(NotStored, match="no run 'fist'"):
        store.scan("fist")
    with pytest.raises(NotStored, match="no site"):
        store.scan("first", "resid_post.9")


def column(name: str) -> pl.Expr:
    return pl.col(name)


# Predicates. Each is well typed, so that polars has an answer.

INTEGERS = (
    *("token_id", "tree_id", "position", "edge", "node", "step", "source", "target", "source_depth", "edge_step"),
    *("root", "goal", "depth", "height", "n_leaves", "tree_hash", "variant_of"),
)
BOOLEANS = ("on_path", "is_last", "backward")
ENUMS = {"token": ["→3", ",", "|", "63", "<PAD>"], "role": ["edge_target", "bar", "path"], "split": ["train", "test"]}
TEXTS = ("dataset", "change")
OTHERS = ("path", "x")
NUMBERS = st.one_of(
    st.integers(0, 6),
    st.integers(-2, 20),
    st.sampled_from([127, 128, 255, 256, 257, 300, 1025, -1, -(2**31), 2**31, 2**63 - 1, -(2**63), 2**64 - 1]),
    st.sampled_from([2.5, 3.0, -0.5, 255.5, 256.0, float("nan"), float("inf"), float("-inf")]),
    st.just(None),
)
SPELLINGS = st.sampled_from(["d", "", "nope", "D", *[change for change in CHANGES if change]])
COMPARE = st.sampled_from([operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge])
EQUAL = st.sampled_from([operator.eq, operator.ne, pl.Expr.eq_missing, pl.Expr.ne_missing])
CLOSED = st.sampled_from(["both", "left", "right", "none"])
integers = st.sampled_from(INTEGERS).map(column)
bounds = st.one_of(NUMBERS, integers)
enum_columns = st.sampled_from(list(ENUMS))


@st.composite
def enum_leaf(draw):
    name = draw(enum_columns)
    text = draw(st.one_of(st.sampled_from(ENUMS[name]), st.just("nope")))
    match draw(st.integers(0, 3)):
        case 0:
            return draw(EQUAL)(pl.col(name), text)
        case 1 if text != "nope":
            return draw(COMPARE)(pl.col(name), text)
        case 2:
            members = draw(st.lists(st.sampled_from([*ENUMS[name], None]), max_size=3))
            return pl.col(name).is_in(members, nulls_equal=draw(st.booleans()))
    return draw(EQUAL)(pl.col(name), pl.col(name))


NARROW = [pl.Int8, pl.UInt8, pl.Int16, pl.Int32, pl.Int64, pl.UInt64, pl.Float32]
whole_numbers = st.one_of(st.integers(-2, 20), st.sampled_from([255, 1025, 4880]), st.none())
leaves = st.one_of(
    st.builds(lambda op, a, b: op(a, b), COMPARE, integers, bounds),
    st.builds(lambda op, a, b: op(a, b), EQUAL, integers, bounds),
    st.builds(lambda op, a, b: op(pl.lit(b), a), COMPARE, integers, st.integers(-2, 260)),
    st.builds(lambda a, b, c, closed: a.is_between(b, c, closed=closed), integers, bounds, bounds, CLOSED),
    st.builds(
        lambda a, b, nulls: a.is_in(b, nulls_equal=nulls), integers, st.lists(whole_numbers, max_size=5), st.booleans()
    ),
    enum_leaf(),
    st.builds(lambda op, a, b: op(pl.col(a), b), COMPARE, st.sampled_from(TEXTS), SPELLINGS),
    st.builds(lambda op, a, b: op(pl.col(a), b), EQUAL, st.sampled_from(TEXTS), st.one_of(SPELLINGS, st.none())),
    st.builds(lambda op: op(pl.col("change"), pl.col("dataset")), EQUAL),
    st.builds(
        lambda a, b, nulls: pl.col(a).is_in(b, nulls_equal=nulls),
        st.sampled_from(TEXTS),
        st.lists(st.one_of(SPELLINGS, st.none()), max_size=4),
        st.booleans(),
    ),
    st.sampled_from(BOOLEANS).map(column),
    st.builds(lambda op, a, b: op(pl.col(a), b), EQUAL, st.sampled_from(BOOLEANS), st.sampled_from([True, False])),
    st.builds(lambda a: pl.col(a).is_null(), st.sampled_from([*INTEGERS, *BOOLEANS, *ENUMS, *TEXTS, *OTHERS])),
    st.builds(lambda a: pl.col(a).is_not_null(), st.sampled_from([*INTEGERS, *BOOLEANS, *ENUMS, *TEXTS, *OTHERS])),
    st.builds(lambda a, b, op: op(a + b, 3), integers, st.sampled_from([1, 253, -1]), COMPARE),
    st.builds(lambda a, b, op: op(a * 100 - pl.col(b), 50), integers, st.sampled_from(["node", "depth"]), COMPARE),
    st.builds(lambda a, op: op(a // 2 % 3, 1), integers, COMPARE),
    st.builds(
        lambda a, to, op, b: op(a.cast(to, strict=False), b), integers, st.sampled_from(NARROW), COMPARE, NUMBERS
    ),
    st.builds(lambda i, v, op: op(pl.col("x").arr.get(i), v), st.integers(0, 5), st.sampled_from([0, 0.5, 3]), COMPARE),
    st.builds(lambda v, op: op(pl.col("x").arr.sum(), v), st.sampled_from([0, 0.5, 30]), COMPARE),
    st.builds(lambda n: pl.col("path").list.len() == n, st.integers(0, 4)),
    st.builds(lambda n: pl.col("path").list.contains(n), st.integers(0, 4)),
    st.builds(lambda text: pl.col("change").str.starts_with(text), st.sampled_from(["s", "it", ""])),
    st.builds(lambda v: pl.lit(v, dtype=pl.Boolean), st.sampled_from([True, False, None])),
    st.builds(lambda a: a > a.mean(), st.sampled_from(["position", "node"]).map(column)),
)
predicates = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(operator.and_, inner, inner),
        st.builds(operator.and_, inner, inner),
        st.builds(operator.or_, inner, inner),
        st.builds(operator.xor, inner, inner),
        st.builds(operator.invert, inner),
        st.builds(lambda op, a, b: op(a, b), EQUAL, inner, inner),
        st.builds(lambda a, b, c: pl.when(a).then(b).otherwise(c), inner, inner, inner),
        inner.map(lambda a: a.is_null()),
        inner.map(lambda a: a.is_not_null()),
    ),
    max_leaves=6,
)
projections = st.one_of(
    st.none(),
    st.lists(st.sampled_from([*INTEGERS, *BOOLEANS, *ENUMS, *TEXTS, *OTHERS]), min_size=1, max_size=3, unique=True),
)


@settings(max_examples=1_100)
@given(predicates, projections, st.one_of(st.none(), st.integers(0, 60)))
def test_pushed_predicates_leave_what_polars_leaves(lazy, whole, predicate, columns, n):
    plans = [lazy, whole.lazy()]
    plans = [plan if n is None or n % 2 else plan.head(5 * n) for plan in plans]
    plans = [plan.filter(predicate) for plan in plans]
    plans = [plan if n is None or n % 2 == 0 else plan.head(n) for plan in plans]
    pushed, oracle = (plan if columns is None else plan.select(columns) for plan in plans)
    assert pushed.collect().equals(oracle.collect())


def coerced(lazy: pl.LazyFrame, predicate: pl.Expr, monkeypatch: pytest.MonkeyPatch):
    """What becomes of a predicate on its way to the source."""
    seen = []
    monkeypatch.setattr(scan, "push", lambda *args: seen.append(push(*args)) or seen[-1])
    lazy.filter(predicate).select("token_id").collect()
    return seen[0]


@pytest.mark.parametrize(
    "predicate",
    [
        pl.col("position") > 200,
        pl.col("position") == 300,
        pl.col("position") == 40_000,  # no Int16
        pl.col("node") != -1,
        pl.col("node") <= pl.col("tree_id"),
        pl.col("edge") == pl.col("variant_of"),
        pl.col("tree_hash") == 2**64 - 1,
        pl.col("role") == "edge_target",
        pl.col("role") != "path",
        pl.col("role").is_in(["edge_target", "edge_source", None]),
        pl.col("split") == pl.lit("test", pl.Enum(["train", "test"])),
        pl.col("change") == "it's",
        pl.col("change").eq_missing(pl.col("dataset")),
        pl.col("change").is_in(["swap", "it's"]),
        pl.col("on_path") & ~pl.col("is_last") | pl.col("path").is_null(),
        pl.col("on_path") == pl.col("is_last"),
        pl.col("step").is_not_null(),
        pl.col("step").eq_missing(None),
        *[pl.col("position").is_between(1, 3, closed=closed) for closed in ("both", "left", "right", "none")],
        pl.col("node").is_in([1, 300, None]),
        pl.col("token_id").is_in(pl.Series([5, 7])),
        pl.when(pl.col("on_path")).then(pl.col("step") == 1).otherwise(False),
        (pl.col("step") == 1).is_null(),
    ],
    ids=str,
)  # fmt: skip
def test_these_reach_the_database(lazy, whole, predicate, monkeypatch):
    pushed = coerced(lazy, predicate, monkeypatch)
    assert len(pushed.where) == 1
    assert not pushed.rest
    assert lazy.filter(predicate).collect().equals(whole.filter(predicate))


@pytest.mark.parametrize(
    "predicate",
    [
        pl.col("role") < "path",
        pl.col("role") == "nope",
        pl.col("change") < "swap",
        pl.col("node") + 1 > 3,
        pl.col("node") < 2.5,
        pl.col("tree_hash").cast(pl.Int64, strict=False) > 3,
        pl.col("node").is_in([1, None], nulls_equal=True),
        pl.col("token_id").is_in(list(range(20_000))),
        pl.col("path").list.len() == 2,
        pl.col("x").arr.get(0) > 3,
        pl.col("x").is_null() | pl.col("on_path"),
        pl.col("node").map_elements(lambda value: int(str(value)) > 1, return_dtype=pl.Boolean),
    ],
    ids=str,
)
def test_these_stay_with_polars(lazy, predicate, monkeypatch):
    pushed = coerced(lazy, predicate, monkeypatch)
    assert not pushed.where
    assert len(pushed.rest) == 1


def test_each_part_of_a_conjunction_goes_its_own_way(lazy, monkeypatch):
    predicate = (
        (pl.col("depth") == 2) & (pl.col("node") + 1 > 3) & (pl.col("x").arr.sum() > 3) & (pl.col("change") == "it's")
    )
    pushed = coerced(lazy, predicate, monkeypatch)
    assert sorted(pushed.where) == ['("trees"."change" = $p0)', '("trees"."depth" = (2))']
    assert pushed.params == {"p0": "it's"}
    assert len(pushed.rest) == 2


# What is read.


@pytest.fixture
def gathered(lazy, monkeypatch):
    """The token ids handed to the arrays, in order."""
    ids = []
    gather = SiteReader.gather

    def counted(self, token_ids, *rest, **more):
        ids.extend(token_ids.tolist())
        return gather(self, token_ids, *rest, **more)

    monkeypatch.setattr(SiteReader, "gather", counted)
    return ids


@pytest.mark.parametrize(
    ("predicate", "judged_first"),
    [
        (pl.col("role") == "edge_target", pl.col("role") == "edge_target"),
        (pl.col("node") + 1 > 3, pl.col("node") + 1 > 3),
        (
            pl.col("on_path") & (pl.col("node") * 2 == 4) & (pl.col("x").arr.get(2, null_on_oob=True) > 0),
            pl.col("on_path") & (pl.col("node") * 2 == 4),
        ),
        ((pl.col("position") > 300), pl.lit(False)),
        (pl.col("x").arr.sum() > 0, pl.lit(True)),
    ],
    ids=str,
)
def test_rows_that_are_filtered_out_are_never_read(lazy, whole, gathered, predicate, judged_first):
    frame = lazy.filter(predicate).select("token_id", "x").collect()
    assert frame.equals(whole.filter(predicate).select("token_id", "x"))
    assert gathered == whole.filter(judged_first)["token_id"].to_list()


def test_x_is_not_read_where_it_is_not_selected(lazy, whole, gathered):
    assert (
        lazy.filter(pl.col("node") + 1 > 3).drop("x").collect().equals(whole.filter(pl.col("node") + 1 > 3).drop("x"))
    )
    assert lazy.select(pl.len()).collect().item() == len(whole)
    assert lazy.group_by("role").len().collect()["len"].sum() == len(whole)
    assert gathered == []


def test_no_more_than_the_head_is_read(lazy, gathered):
    lazy.head(20).collect()
    assert len(gathered) == 20


def test_a_stream_stops_when_it_has_enough(lazy, whole, gathered, monkeypatch):
    monkeypatch.setattr(scan, "BATCH_ROWS", 10)
    kept = pl.col("role") == "edge_source"
    assert lazy.filter(kept).head(3).collect(engine="streaming").equals(whole.filter(kept).head(3))
    assert len(gathered) < len(whole.filter(kept))


def test_tables_that_are_not_needed_are_not_joined(store, lazy, monkeypatch):
    queries = []
    asked = Opened.sql
    monkeypatch.setattr(Opened, "sql", lambda self, query, *rest: queries.append(query) or asked(self, query, *rest))
    lazy.filter(pl.col("role") == "path").select("position").collect()
    lazy.filter(pl.col("on_path")).select("position").collect()
    lazy.select("goal").collect()
    assert ["edges" in query for query in queries] == [False, True, False]
    assert ["trees" in query for query in queries] == [False, False, True]


def test_batches_are_no_longer_than_polars_asks(store, whole, monkeypatch):
    sources = []
    monkeypatch.setattr(scan, "register_io_source", lambda source, **rest: sources.append(source))
    store.scan("first")
    for hint, longest in ((9, 9), (None, 40), (100_000, 40)):
        monkeypatch.setattr(scan, "BATCH_ROWS", 40)
        lengths = [len(frame) for frame in sources[0](["x"], None, None, hint)]
        assert set(lengths[:-1]) == {longest}
        assert sum(lengths) == len(whole)


def test_a_scan_keeps_its_snapshot_while_more_is_ingested(tmp_path):
    run = fake(n_trees=9, trees_per_shard=3)
    run.store(tmp_path / "s.act", [0])
    with Store(tmp_path / "s.act") as store:
        lazy = store.scan()
        before = lazy.collect()
        run.store(tmp_path / "s.act")
        assert lazy.collect().equals(before)
    with Store(tmp_path / "s.act") as store:
        after = store.scan().collect()
    assert before.equals(after.filter(pl.col("tree_id") < 3))
    assert after["tree_id"].n_unique() == 9


MINE = {
    "token_id": {
        "token_id": [3, 0, 2**40],
        "y": ["b", "a", None],
        "when": [1.5, float("nan"), None],
        "Of It": [[1], [], None],
    },
    "sequence_id": {
        "sequence_id": [2, 0],
        "kind": pl.Series(["q", "p"], dtype=pl.Enum(["p", "q"])),
        "left": [True, None],
    },
    "tree_id": {"tree_id": [1, 900], "n": [7, 8]},
}


@pytest.mark.parametrize("key", MINE)
@pytest.mark.parametrize("wanted", [["x", "token_id"], None])
def test_tables_of_the_caller_add_their_columns_by_their_key(store, whole, key, wanted):
    mine = pl.DataFrame(MINE[key])
    lazy = store.scan("first", tables={"left": mine})
    column = mine.columns[1]
    expected = whole.join(mine, on=key, how="left", maintain_order="left")
    found = lazy.collect()
    assert found.columns == [*whole.columns[:-1], *mine.columns[1:], "x"]
    assert found.with_columns(pl.col(pl.Enum, pl.Categorical).cast(pl.String)).equals(
        expected.select(found.columns).with_columns(pl.col(pl.Enum, pl.Categorical).cast(pl.String))
    )
    value = mine[column][0]
    for condition in (pl.col(column) == value, pl.col(column).is_null(), pl.col(column).is_not_null()):
        some = lazy.filter(condition).select(*(wanted or ["token_id"]), column).collect()
        assert some["token_id"].equals(expected.filter(condition)["token_id"])
    assert store.scan("first").collect_schema() == whole.schema


def test_two_tables_of_the_caller_are_joined_together(store):
    tables = {"one": {"token_id": [3], "y": [1]}, "two": {"sequence_id": [0], "z": [2]}}
    found = (
        store.scan("first", tables=tables).filter(pl.col("y") + pl.col("z") == 3).select("token_id", "y", "z").collect()
    )
    assert found.rows() == [(3, 1, 2)]


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        ({"y": [1]}, "joins it by a column token_id, sequence_id, tree_id"),
        ({"token_id": [0, 2, 0], "y": [1, 2, 3]}, "1 of 2 token_ids have more than one row, the first 0"),
        ({"token_id": [0.0]}, "Float64; it must be an integer"),
        ({"token_id": [0, None]}, "1 of 2 rows of table 'mine' have no token_id"),
        ({"token_id": [0], "Depth": [1]}, "a column Depth, as the scan does"),
        ({"token_id": [0], "X": [1]}, "a column X, as the scan does"),
        ({"token_id": [0], "edge_step": [1]}, "a column edge_step"),
    ],
)
def test_a_table_that_a_scan_cannot_join_is_refused(store, mine, said):
    with pytest.raises(BadInput, match=said):
        store.scan("first", tables={"mine": mine})
