"""Every command on a store in a bucket, and how many requests it takes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import Damaged
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.patched import patching
from actstore.ingest.trees.task import TreeSet
from actstore.interventions import Edit
from actstore.storage import cache
from actstore.storage.at import at
from actstore.store import Store
from actstore.upkeep.verify import verify
from tests import tiny_models
from tests.cut_proxy import Cutting, cutting
from tests.stores import fake
from tests.test_bucket_store import flip, shards
from tests.test_interventions import tiny
from tests.test_objects import address

pytestmark = pytest.mark.usefixtures("s3")
SITES = ["embed", "resid_post", "pattern.0"]
N_SHARDS, N_SITES, N_COMMITS = 5, 5, 6


def stored(root: Path, trees_per_shard: int = 4) -> Path:
    trees = TreeSet("deep", 4 * N_SHARDS, n_nodes=6, name="d", trees_per_shard=trees_per_shard)
    execute(Ingest(root, tiny(), trees, "base", SITES))
    return root


@pytest.fixture(scope="module")
def kept(s3: dict[str, str]) -> Path:
    """Run `base` of a tiny model over 20 trees, in five batches; not to be changed."""
    return stored(address("commands-kept"))


def commands(store: Path, folder: Path) -> Iterator[tuple[object, ...]]:
    """Commands in an order in which each finds what it needs."""
    base, last = ("--run", "base"), "select token_id from edge_targets where is_last"
    yield "info", store
    yield "doctor", store
    yield "sql", store, "select role, count(*) from tokens group by all"
    yield "sql", store, "select act(token_id, run, 'embed') as x from predictions order by x[1] limit 2", *base
    yield "sql", store, "select count(*) from tokens", "--timeout", 60
    yield "sql", store, "from tokens limit 1", "--check"
    yield "tables", store
    yield "schema", store, "tokens"
    yield "query", store
    yield "query", store, "accuracy_by_depth", "-p", "run", "base"
    yield "show", store, 3
    yield "attention", store, 3, *base, "--layer", 0, "--out", folder / "a.html"
    yield "read", store, last, *base, "--out", folder / "x.npz"
    yield "read", store, last, *base, "--site", "resid_post", "--no-check", "--out", folder / "y.safetensors"
    yield "read", store, "from edge_targets", *base, "--explain"
    yield "export", store, folder / "x.npy", *base, "--query", last
    (folder / "labels.csv").write_text("token_id,label\n0,a\n1,b\n")
    yield "label", store, "mine", folder / "labels.csv"
    yield "label", store, "mine", folder / "labels.csv", "--replace"
    yield "view", store, "early", "select token_id from tokens where position < 2"
    yield "sql", store, "from early join mine using (token_id)"
    np.savez(folder / "own.npz", token_id=np.arange(3), X=np.ones((3, 4), np.float32))
    yield "ingest", store, "--from-arrays", folder / "own.npz", *base, "--site", "own.0", "--lineage", "ones"
    yield (
        "ingest",
        store,
        "--model-of",
        "base",
        "--dataset",
        "d",
        "--run",
        "again",
        "--sites",
        "embed",
        "--codec",
        "zstd",
    )
    yield "read", store, "from early", "--run", "again", "--site", "embed", "--out", folder / "z.npz"
    yield "ingest", store, "--base", "base", "--patch", last, "--at", "resid_post.0", "--how", "mean", "--run", "edited"
    for number in "12":
        of_slice = ("--model-of", "base", "--dataset", "d", "--run", "sliced", "--sites", "none")
        yield "ingest", store, *of_slice, "--slice", f"{number}/2"
    yield "commit", store
    model = tiny_models.llama(folder / "llama")
    (folder / "notes.txt").write_text("the cat sat on the mat\n\nthe dog ran\n")
    text = ("--text", folder / "notes.txt", "--context", 8, "--sites", "resid_post.0", "--run", "text")
    yield "ingest", store, "--model", model, *text
    yield "study", store, "depth", *base
    yield "study", store, "knockout", *base, "-o", "trees", 2
    labelled = ("--query", "select token_id, source as label from edge_targets", "-o", "sites", "embed")
    yield "study", store, "probe", *base, *labelled, "--no-record"
    yield "report", store, folder / "report", *base
    yield "verify", store
    yield "verify", store, "--quick"
    yield "verify", store, "--recompute", 1
    yield "copy", store, folder / "local.act"
    yield "copy", folder / "local.act", f"{store}-back"
    yield "copy", store, f"{store}-some", "--run", "again"
    yield "merge", folder / "local.act", f"{store}-some", f"{store}-merged"
    yield "verify", f"{store}-merged"
    for kind, name in (("label", "mine"), ("label", "early"), ("run", "edited"), ("run", "text")):
        yield "drop", store, f"--{kind}", name, "--yes"
    yield "repair", store
    yield "verify", store


def test_every_command_works_on_a_store_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store, used = stored(address("commands"), trees_per_shard=16), set()
    for words in commands(store, tmp_path):
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == 0, (words, done.output, done.exception)
        assert done.output, words
        used.add(words[0])
    of_stores = {name for name, command in main.commands.items() if "store" in [each.name for each in command.params]}
    elsewhere = {"open", "record"}  # see test_app.py; what `record` takes is written where a store is leased
    assert of_stores - used == elsewhere


@pytest.fixture
def proxy(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cutting]:
    """A proxy that all requests go through."""
    with cutting(s3["AWS_ENDPOINT_URL"]) as (url, server):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield server


@pytest.fixture
def asked(proxy: Cutting) -> Counter[str]:
    """Counts requests by kind, see cut_proxy.kind_of."""
    found: Counter[str] = Counter()
    proxy.count = lambda kind: found.update([kind])
    return found


def counted(asked: Counter[str], act: Callable[[], object]) -> dict[str, int]:
    asked.clear()
    act()
    return dict(asked)


def test_opening_asks_for_each_manifest_and_lists_the_rest(kept: Path, asked: Counter[str]) -> None:
    Store(kept).close()  # the catalog is in the cache now
    found = counted(asked, lambda: Store(kept).close())
    assert found == {"get": 3 + N_COMMITS, "list": 2}, "store.json, log.json, the catalog's head and the manifests"


def test_a_query_asks_for_nothing_and_a_read_for_two_ranges_of_a_shard(kept: Path, asked: Counter[str]) -> None:
    last = "select token_id from edge_targets where is_last"
    with Store(kept) as store:
        assert store.info()["stored_as"].to_list() == [None]
        assert counted(asked, lambda: store.sql("select count(*) from tokens")) == {}
        one = {"get": 1, "get_ranges": 2 * N_SHARDS}
        assert counted(asked, lambda: store.read(last, site="resid_post.0")) == one, "metadata, then index and rows"
        assert counted(asked, lambda: store.read(last, site="resid_post.0")) == {"get_ranges": N_SHARDS}
        others = {"get": 2, "get_ranges": 2 * 2 * N_SHARDS}
        assert counted(asked, lambda: store.read(last, sites=["resid_post.1", "resid_post.2"])) == others
        explained = counted(asked, lambda: store.explain(last, sites=["embed", "resid_post.0"]))
        assert explained == {"get": 1, "get_ranges": N_SHARDS}, "the indexes that were not read"
        vectors = "select act(token_id, 'base', 'embed') as x from edge_targets where is_last"
        assert counted(asked, lambda: store.sql(vectors)) == {"get_ranges": N_SHARDS}


@pytest.mark.parametrize(("codec", "check"), [("none", False), ("zstd", False), ("zstd", True)])
def test_an_epoch_fetches_each_shard_once_and_later_ones_and_other_processes_none(
    s3: dict[str, str], asked: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, check: bool
) -> None:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    trees = TreeSet("deep", 4 * N_SHARDS, n_nodes=6, name="d", trees_per_shard=4)
    execute(Ingest(root := address("epochs"), tiny(), trees, "r", ["embed"], codec=codec))
    with Store(root, check) as store:
        batches = store.batches("from tokens", site="embed", batch_size=16)
        first = counted(asked, lambda: list(batches))
        assert first == {"get": N_SHARDS}, "whole shards, and nothing twice"
        batches.set_epoch(1)
        assert counted(asked, lambda: list(batches)) == {}
        (changed, gone, *others) = (tmp_path / "cache").glob("*.shard")
        assert len(others) == N_SHARDS - 2
        changed.chmod(0o600)
        changed.write_bytes(changed.read_bytes()[:-1] + b"?")
        gone.unlink()
        assert counted(asked, lambda: list(batches)) == {"get": 2}, "a copy is hashed before its rows are read"
    with Store(root, check) as store:  # another process does the same
        again = store.batches("from tokens", site="embed", batch_size=16)
        assert counted(asked, lambda: list(again)) == {}
        monkeypatch.setenv(cache.LIMIT, "0")
        assert [len(each.X) for each in again] == [len(each.X) for each in batches]
        cache.put(xxhash.xxh3_128_hexdigest(b"x"), lambda path: path.write_bytes(b"x"))
        assert not list((tmp_path / "cache").glob("*.shard")), "what nobody has open gives way"


def test_a_copy_that_is_not_what_was_committed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))
    fake(n_trees=2, trees_per_shard=1, sites=("resid_post.0",)).store(root := address("copies"))
    with Store(root) as store:
        batches = store.batches("from tokens", site="resid_post.0")
        flip(root, path := shards(root)[0])
        with pytest.raises(Damaged, match=rf"{path}: its content is not .*; mend it with `actstore repair") as told:
            list(batches)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob(".*")), "nothing unfinished is left"


def overlapping(proxy: Cutting, act: Callable[[], object]) -> tuple[Counter[str], int]:
    """Paths of the shards that were asked for whole; most of these requests that were under way at the same time.

    Each waits until four are under way.
    """
    paths, lock, met, under_way, most = Counter[str](), threading.Lock(), threading.Event(), 0, 0

    def choose(method: str, path: str) -> str:
        nonlocal under_way, most
        if "/c/" in path:
            with lock:
                paths[path] += 1
                under_way += 1
                most = max(most, under_way)
            if most >= 4 or not met.wait(5):
                met.set()
            time.sleep(0.01)  # so that more would overlap if there were more
            with lock:
                under_way -= 1
        return ""

    proxy.choose = choose
    act()
    proxy.choose = lambda method, path: ""
    return paths, most


def test_verify_reads_several_shards_at_a_time_and_each_once(kept: Path, proxy: Cutting) -> None:
    paths, most = overlapping(proxy, lambda: verify(kept))
    assert len(paths) == N_SHARDS * N_SITES
    assert set(paths.values()) == {1}
    assert 4 <= most <= at(kept).at_once


def test_a_quick_verify_asks_for_the_ends_of_shards_alone(kept: Path, asked: Counter[str]) -> None:
    n_files = verify(kept).n_files
    whole, quick = (counted(asked, lambda quick=quick: verify(kept, quick)) for quick in (False, True))
    assert quick["get_ranges"] == n_files
    assert quick["get"] < n_files < whole["get"]
    assert "get_ranges" not in whole


@pytest.mark.parametrize("quick", [False, True])
def test_verify_reports_of_a_bucket_what_it_reports_of_a_folder(tmp_path: Path, quick: bool) -> None:
    run = fake(n_trees=5, trees_per_shard=1, sites=("resid_post.0",))
    found = []
    for root in (address("report"), tmp_path / "s.act"):
        run.store(root)
        place, (one, two, three, four, _) = at(root), shards(root)
        for path, content in ((one, place.read(one)[:-1]), (two, place.read(two)[:-1] + b"?"), (three, b"")):
            place.swap(path, content)
        place.delete(four)
        part = next(path for path in place.list("parts/trees/"))
        place.swap(part, place.read(part) + b"?")
        found.append([(each.path, each.kind, each.what, each.trees) for each in verify(root, quick).findings])
    assert found[0] == found[1]
    assert len(found[0]) >= 5


def test_a_compressed_site_is_read_by_as_few_requests(asked: Counter[str]) -> None:
    trees = TreeSet("deep", 8, n_nodes=6, name="d", trees_per_shard=4)
    execute(Ingest(root := address("coded"), tiny(), trees, "coded", ["embed"], dtype="float16", codec="zstd"))
    with Store(root) as store:
        assert store.info()["stored_as"].to_list() == ["float16, zstd"]
        read = counted(asked, lambda: store.read("from tokens where position = 3", site="embed"))
    assert read == {"get": 1, "get_ranges": 4}


def test_edits_of_a_study_ask_for_the_base_run_alone(kept: Path, asked: Counter[str]) -> None:
    edit = Edit("select token_id from edge_targets where is_last", "resid_post.1", "zero")
    with Store(kept) as store, patching(store) as patch:
        patch("base", [edit])
        assert counted(asked, lambda: patch("base", [edit])) == {"get_ranges": 5}


def test_a_writer_with_nothing_to_do_asks_for_little(kept: Path, asked: Counter[str]) -> None:
    words = ["ingest", str(kept), "--model-of", "base", "--dataset", "d", "--run", "base"]
    found = counted(asked, lambda: CliRunner().invoke(main, words, catch_exceptions=False))
    assert found.get("delete", 0) == 0, "nothing is removed that is not there"
    assert found["head"] < 20, "sizes are listed, and not asked one by one"
