"""What goes wrong with a bucket: one line each, no credentials in it, and nothing committed is lost."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from time import sleep

import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import ActstoreError, BadInput, Busy, Damaged, NotStored, Unreachable
from actstore.storage import bucket as requests
from actstore.storage import cache
from actstore.storage.at import at, place
from actstore.storage.bucket import Bucket
from actstore.storage.lease_object import LEASE, held_here
from actstore.storage.objects import Objects
from actstore.store import Store
from actstore.upkeep.verify import verify
from actstore.writing.writer import open_writer
from tests.bucket_server import BUCKET, KEY, READER, READER_SECRET, SECRET
from tests.cut_proxy import Cutting, cutting
from tests.stores import Fake, fake
from tests.test_objects import address, copied

pytestmark = pytest.mark.usefixtures("s3")


@pytest.fixture(scope="module")
def run() -> Fake:
    return fake(n_trees=2, trees_per_shard=1, sites=("resid_post.0",))


@pytest.fixture(scope="module")
def kept(s3: dict[str, str], run: Fake) -> Path:
    """A store that is not to be changed."""
    run.store(root := address("kept"))
    return root


@pytest.fixture
def root(kept: Path) -> Path:
    return copied(kept)


@pytest.fixture
def proxy(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cutting]:
    """A proxy that all requests go through, with retries that come at once and give up soon."""
    quick = {"init_backoff": timedelta(seconds=0.001), "max_backoff": timedelta(seconds=0.01), "base": 2}
    monkeypatch.setattr(requests, "RETRIES", {**requests.RETRIES, "max_retries": 1, "backoff": quick})
    monkeypatch.setattr(requests, "PAUSE", 0.001)
    with cutting(s3["AWS_ENDPOINT_URL"]) as (url, server):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield server


def said(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code in (1, 2), result.output
    assert len(result.output.splitlines()) == 1, result.output
    for secret in (KEY, SECRET, READER, READER_SECRET, "no-such-secret", "no-such-key"):
        assert secret not in result.output
    return result.output


def test_a_bucket_that_does_not_exist_is_told() -> None:
    for words in (["info", "s3://no-such-bucket/x"], ["ingest", "s3://no-such-bucket/x", "--model", "reproduction"]):
        assert "there is no bucket 'no-such-bucket'" in said(*words)
    assert "does not exist" in said("info", f"s3://{BUCKET}/no-such-store")


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told_and_never_echoed(
    kept: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "no-such-secret" if "SECRET" in variable else "no-such-key")
    assert "refuses this access to bucket 'tests'" in said("info", kept)
    with pytest.raises(Unreachable) as caught:
        Bucket(kept).put("x", b"")
    assert caught.value.__context__ is None, "a traceback would quote what the server said"


def test_who_may_only_read_reads_and_is_told_when_it_writes(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    with Store(kept) as store:
        assert len(store.read("from tokens", site="resid_post.0")[0])
    assert not verify(kept).damage
    with pytest.raises(Unreachable, match="refuses this access to bucket 'tests'"), open_writer(kept):
        pass
    with pytest.raises(Unreachable, match="refuses this access"):
        at(kept).delete("store.json")
    assert "refuses this access to bucket 'tests'" in said("drop", kept, "--run", "r", "--yes")
    new = address("forbidden")
    assert "refuses this access to bucket 'tests'" in said("copy", kept, new)
    assert not Bucket(new).sizes("")


def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "RETRIES", {**requests.RETRIES, "max_retries": 0})
    for name, what in (("127.0.0.1:9", "refuses connections"), ("nowhere.invalid", "has an unknown name")):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:and@no-such-secret@{name}")
        assert what in said("info", f"s3://{BUCKET}/x")


def test_no_credentials_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "RETRIES", {**requests.RETRIES, "max_retries": 0})
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, which go together" in said("info", f"s3://{BUCKET}/x")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "look at the credentials" in said("info", f"s3://{BUCKET}/x")


def test_a_prefix_that_holds_something_else_is_left_alone(kept: Path) -> None:
    Bucket(root := address("else")).put("letter.txt", b"dear reader")
    assert "holds other objects" in said("ingest", root, "--model", "reproduction", "--trees", "1")
    assert "holds other objects" in said("copy", kept, root)
    assert "a prefix of its own" in said("ingest", f"s3://{BUCKET}", "--model", "reproduction", "--trees", "1")
    assert "name a bucket" in said("info", "s3://")
    assert list(Bucket(root).sizes("")) == ["letter.txt"]


def test_no_store_is_made_within_another(kept: Path, tmp_path: Path) -> None:
    """A writer of the outer store would sweep the inner one's files."""
    fake(n_trees=1, sites=()).store(beside := tmp_path / "s.act")
    before, within = list(Bucket(kept).sizes("")), Path(f"{kept}/activations.zarr/within")
    assert "lies in the store" in said("ingest", within, "--model", "reproduction", "--trees", "1", "--sites", "none")
    assert "lies in the store" in said("copy", beside, within)
    assert list(Bucket(kept).sizes("")) == before


def test_without_obstore_it_is_said_what_to_install(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    assert "pip install 'actstore[s3]'" in said("info", kept)


FAULTS = ("refuse", "lost", "torn", "503", "409")
METHODS = ("GET", "PUT", "HEAD", "POST")
OF_ANOTHER = b'{"holder": "process 7 on another", "process": [], "seconds": 0.5, "held": true}'
FREE = b'{"holder": "", "process": [], "seconds": 30, "held": false}'


@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_request_is_done_again_when_it_fails(
    run: Fake, proxy: Cutting, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fifth request of a kind fails; the store comes out whole."""
    monkeypatch.setattr(requests, "RETRIES", {**requests.RETRIES, "max_retries": 9})
    seen = Counter[str]()

    def choose(asked: str, path: str) -> str:
        seen[asked] += 1
        return fault if seen[asked] % 5 == 0 else ""

    proxy.choose = choose
    run.store(root := address("again"))
    with Store(root) as store:
        X, rows = store.read("select token_id, tree_id from tokens", site="resid_post.0")
        assert (X[:, 0] == rows["tree_id"].to_numpy()).all()
    for number in range(5):
        at(root).publish(name := f"parts/left-{number}", b"of nobody")
        at(root).delete(name)
    proxy.choose = lambda asked, path: ""
    assert set(METHODS) <= {method for method, times in seen.items() if times >= 5}
    assert not verify(root).findings


@pytest.mark.parametrize(("fault", "after"), [("refuse", 11), ("lost", 30), ("torn", 45)])
def test_a_connection_that_ends_is_told_and_the_same_run_goes_on(
    run: Fake, proxy: Cutting, after: int, fault: str
) -> None:
    left = after

    def choose(asked: str, path: str) -> str:
        nonlocal left
        left -= 1
        return fault if left < 0 else ""

    proxy.choose, root = choose, address("ends")
    with pytest.raises(ActstoreError) as caught:
        run.store(root)
    assert isinstance(caught.value, Unreachable | Busy), caught.value
    proxy.choose = lambda asked, path: ""
    Bucket(root).put(LEASE, FREE)  # or the next writer would wait until it ends
    run.store(root)
    assert not verify(root).findings


def test_a_head_whose_put_had_no_answer_leads_to_its_content(run: Fake, proxy: Cutting) -> None:
    run.store(root := address("head"), [0])
    heads = 0

    def choose(asked: str, path: str) -> str:
        nonlocal heads
        heads += asked == "PUT" and path.endswith("/catalog.duckdb")
        return "lost" if heads else ""

    proxy.choose = choose
    with pytest.raises(Unreachable):
        run.store(root)
    proxy.choose = lambda asked, path: ""
    with Store(root) as store:
        assert store.sql("select count(*) from trees").item() == 2
    Bucket(root).put(LEASE, FREE)
    with open_writer(root):
        pass
    assert len(Bucket(root).sizes(".actstore/heads")) == 1


def test_a_reader_is_told_when_the_connection_ends_and_reads_on_later(kept: Path, proxy: Cutting) -> None:
    with Store(kept) as store:
        proxy.choose = lambda asked, path: "refuse"
        with pytest.raises(Unreachable, match="dropped the connection; nothing that was committed is lost"):
            store.read("from tokens", site="resid_post.0")
        with pytest.raises(Unreachable):
            verify(kept)
        proxy.choose = lambda asked, path: ""
        assert len(store.read("from tokens", site="resid_post.0")[0])


def test_a_writer_that_lost_its_lease_changes_nothing(root: Path) -> None:
    before = Bucket(root).sizes("")
    with suppress(Busy), open_writer(root):
        Bucket(root).put(LEASE, OF_ANOTHER)
        held = held_here(Bucket(root))
        assert held is not None
        held.renew()
        for act in (
            lambda: at(root).publish("log/x", b"x"),
            lambda: at(root).swap("x", b"x"),
            lambda: at(root).delete("log/00000001.json"),
        ):
            with pytest.raises(Busy, match="was lost"):
                act()
    assert {path: size for path, size in Bucket(root).sizes("").items() if path != LEASE} == {
        path: size for path, size in before.items() if path != LEASE
    }


@pytest.mark.parametrize("ahead", [-1e5, 1e5])
def test_a_lease_of_another_machine_is_free_when_it_was_not_renewed_whatever_the_clock_here_says(
    root: Path, proxy: Cutting, ahead: float
) -> None:
    proxy.ahead = ahead
    Bucket(root).put(LEASE, OF_ANOTHER)
    told = r"written by process 7 on another.*ends at most 0.5 seconds after it"
    with pytest.raises(Busy, match=told) as busy, at(root).lease():
        pass
    assert "\n" not in str(busy.value)
    with at(root).lease(wait=20) as held:
        held.check()
    assert abs(at(root).age(LEASE)) < 60
    Bucket(root).put(LEASE, b"no lease")
    with pytest.raises(Damaged, match="is no lease of actstore"), at(root).lease():
        pass


def test_a_lease_that_cannot_be_renewed_is_lost_in_time(
    root: Path, proxy: Cutting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Objects, "lease_seconds", 1.0)
    with at(root).lease() as held:
        sleep(1.5)
        held.check()  # it was renewed
        proxy.choose = lambda asked, path: "refuse"
        sleep(1.5)
        with pytest.raises(Busy, match="was lost"):
            held.check()
        proxy.choose = lambda asked, path: ""


KINDS = {"reads": ("head", "list", "get", "get_ranges"), "writes": ("list", "get", "create", "swap", "put", "delete")}


@pytest.mark.parametrize("kind", KINDS["reads"])
def test_a_reader_whose_requests_of_a_kind_are_dropped_is_told_in_one_line(
    kept: Path, proxy: Cutting, kind: str
) -> None:
    def read() -> None:
        with Store(kept) as store:
            store.read("from tokens", site="resid_post.0")
        at(kept).list("log/")

    proxy.failing = {kind: "refuse"}
    with pytest.raises(Unreachable, match=r"dropped the connection; nothing that was committed is lost: try again$"):
        read()
    proxy.failing = {}
    read()


@pytest.mark.parametrize("kind", KINDS["writes"])
def test_a_writer_whose_requests_of_a_kind_are_dropped_is_told_and_loses_nothing(
    root: Path, proxy: Cutting, kind: str
) -> None:
    Bucket(root).put("parts/trees/stray.parquet", b"of a writer that was killed")  # so that something is deleted
    more, failing = fake("s", "e", n_trees=1, seed=1, sites=("resid_post.0",)), kind
    proxy.failing = {failing: "refuse"}
    with pytest.raises((Unreachable, Busy)) as caught:
        more.store(root)
    assert "\n" not in str(caught.value)
    proxy.failing = {}
    with Store(root) as store:
        assert "r" in store.runs()
        assert len(store.read("from tokens where dataset = 'd'", run="r", site="resid_post.0")[0])
    Bucket(root).put(LEASE, FREE)
    more.store(root)
    assert not verify(root).findings


def test_two_that_believe_to_hold_the_lease_cannot_change_what_the_other_committed(run: Fake) -> None:
    run.store(root := address("drivers"))
    one, other = (fake(name, name, n_trees=2, trees_per_shard=1, seed=3, sites=("resid_post.0",)) for name in "ab")
    with open_writer(root) as first:
        Bucket(root).put(LEASE, FREE)  # taken away, and not noticed yet
        other.store(root)
        held = {path: at(root).token(path) for path in at(root).list("")}
        Bucket(root).put(LEASE, FREE)
        with pytest.raises(Damaged, match="another writer is at work") as told:
            one.write(first)
    assert "\n" not in str(told.value)
    assert {path: at(root).token(path) for path in held} == held
    Bucket(root).put(LEASE, FREE)
    one.store(root)
    with Store(root) as store:
        assert store.runs() == ["r", "b", "a"]
    assert not verify(root).findings


@pytest.mark.parametrize(
    ("code", "status", "advice"),
    [
        ("RequestTimeTooSkewed", "403", "this machine's clock differs from the server's: set the clock"),
        ("ExpiredToken", "400", "the credentials have expired: get new ones"),
        ("AccessDenied", "403", "look at the credentials, and at what they allow"),
    ],
)
def test_why_a_server_refuses_is_told(kept: Path, proxy: Cutting, code: str, status: str, advice: str) -> None:
    proxy.told, proxy.choose = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>", lambda *asked: status
    with pytest.raises(Unreachable, match=rf"\({code}\): {advice}"):
        at(kept).read("store.json")


def test_a_put_takes_as_long_as_a_slow_link_needs(proxy: Cutting, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer to a put comes after its last byte, later than an answer to another request may."""
    monkeypatch.setattr(requests, "STALL", 0.3)
    proxy.bytes_per_second = 2e6
    content = bytes(1_200_000)  # 0.6 seconds
    assert Bucket(root := address("slow")).create("x", content)
    proxy.bytes_per_second = 0.0
    assert Bucket(root).get("x").content == content


def test_a_conflict_is_another_thing_than_a_condition_that_does_not_hold(proxy: Cutting) -> None:
    asked = Counter[str]()

    def choose(method: str, path: str) -> str:
        asked[method] += 1
        return "409" if method == "PUT" and asked[method] == 1 else ""

    proxy.choose = choose
    bucket = Bucket(address("conflict"))
    assert bucket.create("x", b"one"), "409: the put is done again"
    assert asked["PUT"] == 2
    assert not bucket.create("x", b"other"), "412: the key is taken"
    assert asked["PUT"] == 3
    proxy.choose = lambda method, path: "409" if method == "PUT" else ""
    with pytest.raises(Unreachable, match="answered 409; nothing that was committed is lost: try again"):
        bucket.create("y", b"")


def test_a_process_that_was_forked_is_refused_and_does_not_wait_for_ever(kept: Path) -> None:
    with Store(kept) as store:
        batches = store.batches("from tokens", site="resid_post.0")
        read, write = os.pipe()
        if not (child := os.fork()):
            try:
                next(iter(batches))
            except BadInput as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.close(write)
        assert b"forked" in os.read(read, 1000)
        os.close(read)
        os.waitpid(child, 0)


def test_the_cache_is_checked_and_shared_and_has_a_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_one(path: Path) -> None:
        with Store(path):
            pass

    kept = cache.folder() / f"{at(root).token('catalog.duckdb')}.duckdb"
    kept.chmod(0o600)
    kept.write_bytes(b"not what it was")
    open_one(root)
    assert kept.stat().st_size > 1000
    monkeypatch.setenv("ACTSTORE_CACHE_SIZE", "0")
    with Store(root):
        fake("another", sites=("resid_post.0",)).store(other := address("other"))
        assert kept.exists(), "a catalog that is open stays"
    open_one(other)
    fake("third", sites=("resid_post.0",)).store(address("other"))
    assert not kept.exists()
    monkeypatch.setenv("ACTSTORE_CACHE_SIZE", "much")
    with pytest.raises(BadInput, match="a number of gigabytes"):
        fake("fourth", sites=("resid_post.0",)).store(address("other"))


def test_the_command_line_names_the_cache(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTSTORE_CACHE", os.environ["ACTSTORE_CACHE"])  # put back after the test
    result = CliRunner().invoke(main, ["--cache", str(tmp_path / "named"), "info", str(kept)])
    assert result.exit_code == 0, result.output
    assert [path.suffix for path in (tmp_path / "named").iterdir()] == [".duckdb"]
    (tmp_path / "file").touch()
    assert "name another folder (`--cache DIR`, ACTSTORE_CACHE)" in said(
        "--cache", tmp_path / "file" / "x", "info", kept
    )
    assert "name another folder" in said("--cache", tmp_path / "file", "info", kept)


def test_an_address_is_shown_as_it_is_typed(kept: Path) -> None:
    typed = f"s3://{str(kept).partition(':')[2].lstrip('/')}"
    for text in (typed, typed.replace("://", ":/"), Path(typed)):
        assert str(place(text)) == str(pickle.loads(pickle.dumps(place(text)))) == typed
        assert str(place(text) / "log/x") == f"{typed}/log/x"
        with Store(text) as store:
            assert f"'{typed}'" in repr(store)
    with Store(typed) as store:
        assert store.sql("select 1 as one", timeout=60)["one"].item() == 1, "a process is given the address"
    assert typed.replace("kept", "none") in said("info", typed.replace("kept", "none"))


def test_what_is_not_stored_is_told_as_in_a_folder(kept: Path) -> None:
    with Store(kept) as store, pytest.raises(NotStored):
        store.read("from tokens", site="resid_post.7")
