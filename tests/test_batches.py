"""Batches of activations against Store.read, in this process and in DataLoader workers."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from actstore.errors import ActstoreError, BadInput, Damaged, NotStored
from actstore.reading import batches as batching
from actstore.reading import batches as reading_batches
from actstore.store import Store
from tests.stores import D_MODEL, fake

QUERY = """
    select token_id, row_number() over (order by hash(token_id)) - 1 as place, role, position, step, tree_id % 2 = 0 as even
    from tokens order by place
"""
KEPT = ("resid_post.0", "resid_post.1", "pattern.0")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("batches") / "s.act"
    fake(n_trees=20, trees_per_shard=3, n_nodes=5, sites=KEPT).store(path)
    return path


@pytest.fixture(scope="module")
def store(path):
    with Store(path) as store:
        yield store


@pytest.fixture(scope="module")
def whole(store):
    """What Store.read gives for QUERY."""
    return store.read(QUERY)


def places(batches) -> list[list[int]]:
    return [columns["place"].tolist() for _, columns in batches]


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(X, Y)
        and columns.keys() == others.keys()
        and all(pl.Series(columns[name]).equals(pl.Series(others[name])) for name in columns)
        for (X, columns), (Y, others) in zip(a, b, strict=True)
    )


def in_workers(batches, n_workers: int) -> list:
    """What a DataLoader makes of a dataset: a turn of each worker after another."""
    streams = []
    for number in range(n_workers):
        with pytest.MonkeyPatch.context() as patch:
            worker = SimpleNamespace(id=number, num_workers=n_workers)
            patch.setattr(reading_batches, "get_worker_info", lambda worker=worker: worker)
            streams.append(list(batches))
    return [stream[turn] for turn in range(len(streams[0])) for stream in streams if turn < len(stream)]


@settings(max_examples=40)
@given(
    batch_size=st.integers(1, 400),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**70),
    epoch=st.integers(0, 5),
    window=st.sampled_from([1, 7, 50, 130, 10_000]),
    drop_last=st.booleans(),
    n_workers=st.integers(1, 4),
    data=st.data(),
)
def test_an_epoch_is_the_querys_rows_with_their_activations_once_each(
    store, whole, batch_size, shuffle, seed, epoch, window, drop_last, n_workers, data
):
    X, rows = whole
    form = {"batch_size": batch_size, "shuffle": shuffle, "seed": seed, "window": window, "drop_last": drop_last}
    batches = store.batches(QUERY, **form)
    batches.set_epoch(epoch)
    read = list(batches)
    n = len(rows) // batch_size if drop_last else -(-len(rows) // batch_size)
    assert len(batches) == len(read) == n
    order = [place for batch in places(read) for place in batch]
    assert len(set(order)) == len(order) == (n * batch_size if drop_last else len(rows))
    assert all(len(batch) == batch_size for batch in places(read)[: n - 1])
    if not shuffle:
        assert order == list(range(len(order)))
    for part, columns in read:
        at = columns["place"].numpy()
        np.testing.assert_array_equal(part.numpy(), X[at])
        expected = rows[at]
        for name in ("token_id", "position", "even"):
            np.testing.assert_array_equal(columns[name].numpy(), expected[name].to_numpy())
        assert columns["role"] == expected["role"].to_list()
        assert columns["step"] == expected["step"].to_list()
    assert same(in_workers(batches, n_workers), read)
    start = data.draw(st.integers(0, n))
    resumed = store.batches(QUERY, **form, start=start)
    assert len(resumed) == n - start
    resumed.set_epoch(epoch, start)
    assert same(in_workers(resumed, n_workers), read[start:])


def test_start_is_of_the_first_epoch_alone(store):
    batches = store.batches(QUERY, batch_size=100, start=2)
    uninterrupted = store.batches(QUERY, batch_size=100)
    assert same(list(batches), list(uninterrupted)[2:])
    for both in (batches, uninterrupted):
        both.set_epoch(1)
    assert same(list(batches), list(uninterrupted))


def test_order_follows_from_ids_seed_and_epoch(store):
    turned = QUERY.replace("order by place", "order by place desc")
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            batches = [store.batches(query, batch_size=50, seed=seed, window=60) for query in (QUERY, turned)]
            for each in batches:
                each.set_epoch(epoch)
            assert same(list(batches[0]), list(batches[1]))
            orders[seed, epoch] = str(places(batches[0]))
    assert len(set(orders.values())) == 4


def test_the_order_is_the_one_it_always_was():
    """A training is resumed by a later version of actstore, numpy or torch."""
    assert batching._permutation(8, 3, 2, 1).tolist() == [5, 7, 1, 6, 2, 4, 3, 0]


def test_a_set_in_one_window_is_shuffled_uniformly(store):
    batches = store.batches("select token_id, tree_id as place from tokens where position = 0 and tree_id < 7")
    n = 2_000
    seen = np.zeros((7, 7))
    for epoch in range(n):
        batches.set_epoch(epoch)
        (order,) = places(batches)
        seen[order, np.arange(7)] += 1
    chi_square = ((seen - n / 7) ** 2 / (n / 7)).sum()
    assert chi_square < 68  # 36 degrees of freedom, 99.9 %


def test_a_window_holds_whole_shards_and_every_epoch_other_ones(store):
    n_a_shard = [len(rows) for _, rows in store.sql("select tree_id // 3 as shard from tokens").group_by("shard")]
    batches = store.batches(
        "select token_id, tree_id // 3 as shard from tokens", batch_size=1, window=2 * max(n_a_shard)
    )
    firsts = set()
    for epoch in range(4):
        batches.set_epoch(epoch)
        shards = [int(columns["shard"][0]) for _, columns in batches]
        at = {shard: np.flatnonzero(np.array(shards) == shard) for shard in set(shards)}
        assert len(at) == len(n_a_shard)
        assert all(np.ptp(of_shard) < 3 * max(n_a_shard) for of_shard in at.values())  # of the whole: seven
        assert any(np.ptp(of_shard) >= len(of_shard) for of_shard in at.values())  # mixed with another
        firsts.add(tuple(shards[:20]))
    assert len(firsts) == 4


def test_repeats_are_kept(store):
    query = "select token_id, i as place from tokens, range(3) t(i) where role = 'goal'"
    read = list(store.batches(query, batch_size=7))
    ids = torch.cat([columns["token_id"] for _, columns in read])
    expected, rows = store.read(query)
    assert sorted(ids.tolist()) == sorted(rows["token_id"].to_list())
    by_id = dict(zip(rows["token_id"].to_list(), expected, strict=True))
    assert np.array_equal(torch.cat([X for X, _ in read]).numpy(), np.stack([by_id[i] for i in ids.tolist()]))


def test_several_sites_come_in_one_tensor_and_patterns_in_their_shape(store):
    sites = ["resid_post.1", "resid_post.0"]
    expected, _ = store.read(QUERY, sites=sites)
    for X, columns in store.batches(QUERY, sites=sites, batch_size=64):
        np.testing.assert_array_equal(X.numpy(), expected[columns["place"].numpy()])
    assert X.shape[1:] == (2, D_MODEL)
    expected, _ = store.read(QUERY, site="pattern.0")
    for X, columns in store.batches(QUERY, site="pattern.0", batch_size=64):
        np.testing.assert_array_equal(X.numpy(), expected[columns["place"].numpy()])
    assert X.shape[1:] == (2, 19)


def test_each_column_comes_in_the_form_of_its_type(store):
    query = """
        select token_id, 300::usmallint as u, (2^63)::ubigint as v, 0.5::float as f, true as b, 3::tinyint as i,
            [1, 2]::float[2] as a, [1, null]::float[2] as holes, [1, 2] as l, 'x' as t, role, null::integer as nothing,
            date '2020-02-01' as day, 7::hugeint as huge, 1.50::decimal(5, 2) as price
        from tokens where token_id = 3
    """
    ((_, columns),) = store.batches(query)
    tensors = {name: (str(v.dtype), v.tolist()) for name, v in columns.items() if isinstance(v, torch.Tensor)}
    assert tensors == {
        "token_id": ("torch.int64", [3]),
        "u": ("torch.int32", [300]),
        "v": ("torch.uint64", [2**63]),
        "f": ("torch.float32", [0.5]),
        "b": ("torch.bool", [True]),
        "i": ("torch.int8", [3]),
        "a": ("torch.float32", [[1, 2]]),
    }
    values = store.sql(query).drop(list(tensors)).row(0, named=True)
    assert {name: v for name, v in columns.items() if name not in tensors} == {name: [v] for name, v in values.items()}


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_data_loaders_workers_yield_the_same_batches_in_the_same_order(path, context):
    with Store(path) as store:
        batches = store.batches(QUERY, sites=["resid_post.0", "resid_post.1"], batch_size=30, window=60)
    loader = DataLoader(
        batches, batch_size=None, num_workers=2, multiprocessing_context=context, persistent_workers=True, timeout=60
    )
    assert len(loader) == len(batches) == 12
    for epoch in range(2):  # the same two workers, which must hear of it
        batches.set_epoch(epoch, start=epoch)
        assert same(list(loader), list(batches))


@pytest.mark.parametrize("form", [{}, {"batch_size": 64}, {"batch_size": 64, "num_workers": 1}, {"drop_last": True}])
def test_a_data_loader_that_would_stack_batches_says_what_to_write(store, form):
    batches = store.batches("select token_id from tokens", batch_size=10)
    with pytest.raises(
        BadInput, match=r"write DataLoader\(batches, batch_size=None\).*store\.batches\(…, batch_size=64"
    ):
        next(iter(DataLoader(batches, timeout=60 if "num_workers" in form else 0, **form)))
    X, columns = next(iter(DataLoader(batches, batch_size=None)))  # what it says to write
    assert X.shape == (10, D_MODEL)
    assert len(columns["token_id"]) == 10
    (one,) = next(iter(DataLoader(batches, batch_size=1, collate_fn=list)))  # one's own collation is one's own affair
    assert one.X.shape == X.shape


def test_batches_outlive_their_store_and_a_pickle(path, whole):
    with Store(path) as store:
        batches = store.batches(QUERY, batch_size=50)
    read = list(batches)
    assert same(list(pickle.loads(pickle.dumps(batches))), read)
    for X, columns in read:
        np.testing.assert_array_equal(X.numpy(), whole[0][columns["place"].numpy()])


def test_a_store_that_grows_changes_nothing_and_one_put_in_its_place_is_refused(tmp_path):
    run = fake(n_trees=9, trees_per_shard=3)
    run.store(tmp_path / "s.act", [0, 1])
    with Store(tmp_path / "s.act") as store:
        batches = store.batches("select token_id from tokens", batch_size=10)
    before = list(batches)
    run.store(tmp_path / "s.act")
    assert same(list(batches), before)
    shutil.move(tmp_path / "s.act", tmp_path / "old.act")
    with pytest.raises(Damaged, match="cannot be opened"):
        next(iter(batches))
    fake(n_trees=9, trees_per_shard=3, seed=7).store(tmp_path / "s.act")
    with pytest.raises(Damaged, match="was replaced"):
        next(iter(batches))


def test_an_array_of_another_tool_gives_the_same_batches(tmp_path):
    run = fake(n_trees=9, trees_per_shard=3, sites=["resid_post.0"])
    run.store(tmp_path / "s.act")
    with Store(tmp_path / "s.act") as store:
        expected = list(store.batches("select token_id from tokens", batch_size=10))
        array = tmp_path / "s.act" / store.sql("select path from sites").item()
        values = zarr.open_array(array, mode="r")[:]
        (array / "zarr.json").unlink()
        foreign = zarr.create_array(array, shape=values.shape, chunks=(2, 4, 3), dtype="float32", fill_value=np.nan)
        foreign[:] = values
        batches = store.batches("select token_id from tokens", batch_size=10)
    assert same(list(batches), expected)
    assert same(list(DataLoader(batches, batch_size=None, num_workers=2, timeout=60)), expected)


def test_no_rows_are_no_batches(store):
    for shuffle in (True, False):
        batches = store.batches("select token_id from tokens where false", shuffle=shuffle)
        assert len(batches) == 0
        assert list(batches) == []


@pytest.mark.parametrize(
    ("query", "options", "error", "says"),
    [
        ("select 255 as token_id", {}, NotStored, "1 of 1 token ids, the first being 255 .*no tree"),
        ("select 18 as token_id", {}, NotStored, "18 .padding"),
        ("select -1 as token_id", {}, NotStored, "-1 .of no tree"),
        ("select 99 * 256 as token_id", {}, NotStored, "of no tree"),
        ("select null::bigint as token_id", {}, BadInput, "NULL"),
        ("select position from tokens", {}, BadInput, "no token_id"),
        ("select token_id from tokens", {"site": "embed"}, NotStored, "no site 'embed'"),
        ("select token_id from tokens", {"run": "s"}, NotStored, "no run 's'"),
        ("select token_id from tokens", {"sites": ["resid_post.0", "pattern.0"]}, BadInput, "one shape"),
        ("select token_id from tokens", {"site": "embed", "sites": ["embed"]}, BadInput, "got site"),
        ("select token_id from tokens", {"batch_size": 0}, BadInput, "batch_size 0; give a whole number from 1"),
        ("select token_id from tokens", {"batch_size": 2.0}, BadInput, "batch_size 2.0"),
        ("select token_id from tokens", {"window": 0}, BadInput, "window 0"),
        ("select token_id from tokens", {"seed": -1}, BadInput, "seed -1"),
        ("select token_id from tokens", {"start": 2}, BadInput, "start 2; an epoch has 1 batches"),
        ("select token_id from tokens where tree_id = $tree", {}, BadInput, "tree"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_batch(store, query, options, error, says):
    with pytest.raises(error, match=says) as caught:
        store.batches(query, **options)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ActstoreError)


def test_trees_that_are_not_ingested_yet_are_refused(tmp_path):
    first, second = (fake(run, n_trees=6, weights=run.encode()) for run in ("a", "b"))
    first.store(tmp_path / "s.act")
    second.store(tmp_path / "s.act", [0])
    with Store(tmp_path / "s.act") as store, pytest.raises(NotStored, match="not ingested yet"):
        store.batches("select token_id from tokens", "b")


@pytest.mark.parametrize("query", [QUERY, QUERY.replace("order by place", "order by token_id")])
def test_ids_are_looked_up_in_blocks_and_the_order_is_that_of_one_block(store, query, monkeypatch):
    whole = list(store.batches(query, batch_size=50, window=60))
    monkeypatch.setattr(batching, "IDS_AT_ONCE", 7)
    assert same(whole, list(store.batches(query, batch_size=50, window=60)))
    for wrong in (99, 199):
        with pytest.raises(
            NotStored, match=f"for 2 of {len(store.sql(query)) + 2:,} token ids, the first being {wrong * 256} "
        ):
            store.batches(f"select token_id from ({query}) union all select {wrong} * 256 union all select 199 * 256")
    with pytest.raises(NotStored, match=r"for 1 of 21 token ids, the first being 18 .*padding"):
        store.batches("select tree_id * 256 as token_id from trees union all select 18")


def test_an_ids_share_of_memory_is_small(store, monkeypatch):
    """A hundred million ids are to fit: before, what is computed of them on the way took 44 bytes each."""
    monkeypatch.setattr(batching, "IDS_AT_ONCE", 2**12)
    ids = np.repeat(store.sql("select token_id from tokens order by token_id")["token_id"].to_numpy(), 1000)
    store.batches(ids[:10])
    tracemalloc.start()
    try:
        store.batches(ids)
        assert tracemalloc.get_traced_memory()[1] / len(ids) < 16
    finally:
        tracemalloc.stop()


MEMORY = """
import json, sys
from pathlib import Path
from actstore.store import Store

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

grown = []
with Store(sys.argv[1]) as store:
    for window in (2_000, 10**6):
        batches = store.batches("select token_id from tokens", batch_size=512, window=window)
        next(iter(batches))  # whatever is imported or allocated once
        before = resident()
        grown.append(max(resident() for _ in batches) - before)
print(json.dumps({"grown": grown, "rows": batches.n_rows}))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the memory in use")
def test_memory_holds_a_window_and_not_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.stores.D_MODEL", 512)
    fake(n_trees=1_200, trees_per_shard=50, n_nodes=8, sites=["resid_post.0"]).store(tmp_path / "s.act")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "s.act")]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    size = found["rows"] * 512 * 4
    assert size > 60e6
    narrow, wide = found["grown"]
    assert narrow < size / 3
    assert wide > size / 2  # so that the other number can be large
