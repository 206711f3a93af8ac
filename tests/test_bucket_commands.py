"""Every command on a store in a bucket, and how many requests it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.patched import patching
from actstore.ingest.trees.task import TreeSet
from actstore.interventions import Edit
from actstore.store import Store
from tests import tiny_models
from tests.cut_proxy import cutting
from tests.test_interventions import tiny
from tests.test_objects import address

pytestmark = pytest.mark.usefixtures("s3")
SITES = ["embed", "resid_post", "pattern.0"]
N_SHARDS, N_SITES, N_COMMITS = 5, 5, 6


def stored(root: Path) -> Path:
    trees = TreeSet("deep", 4 * N_SHARDS, n_nodes=6, name="d", trees_per_shard=4)
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
    store, used = stored(address("commands")), set()
    for words in commands(store, tmp_path):
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == 0, (words, done.output, done.exception)
        assert done.output, words
        used.add(words[0])
    of_stores = {name for name, command in main.commands.items() if "store" in [each.name for each in command.params]}
    elsewhere = {"open", "record"}  # see test_app.py; what `record` takes is written where a store is leased
    assert of_stores - used == elsewhere


@pytest.fixture
def asked(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts requests by kind, see cut_proxy.kind_of."""
    found: Counter[str] = Counter()

    with cutting(s3["AWS_ENDPOINT_URL"]) as (url, server):
        server.count = lambda kind: found.update([kind])
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield found


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
        batches = store.batches("from tokens", site="resid_post.0")
        assert counted(asked, lambda: list(batches)) == {"get": N_SHARDS}


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
