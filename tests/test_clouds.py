"""gs:// and az://: conditional puts, swaps, the lease and a whole store.

Google's side is a stand-in of the tests. Azure's is Azurite, and is skipped where npm's `azurite` is not installed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actstore import verbs
from actstore.errors import Busy, Damaged, NotStored, Unreachable
from actstore.storage.at import at
from actstore.storage.backend import File, Storage
from actstore.storage.bucket import Bucket
from actstore.storage.lease_object import LEASE
from actstore.storage.objects import Objects
from actstore.store import Store
from actstore.upkeep.copying import copy
from actstore.upkeep.verify import verify
from tests import azurite_server, gcs_stand_in
from tests.storage_contract import RACERS, StorageContract, at_once
from tests.stores import fake

NUMBERS = itertools.count()
OF_ANOTHER = b'{"holder": "process 7 on another", "process": [], "seconds": 0, "held": true}'


@pytest.fixture(scope="module", params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The scheme of a cloud whose server is in the environment."""
    if request.param == "az" and not azurite_server.program():
        pytest.skip("Azurite is not installed; `npm install -g azurite` does it")
    folder = tmp_path_factory.mktemp("cloud")
    server = (
        gcs_stand_in.stand_in(folder / "account.json")
        if request.param == "gs"
        else azurite_server.server(folder / "azurite")
    )
    with server as env, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_"))]:
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setenv("ACTSTORE_CACHE", str(folder / "cache"))
        yield request.param


@pytest.fixture
def root(cloud: str) -> Path:
    return Path(f"{cloud}://tests/p-{next(NUMBERS)}")


def test_what_is_published_is_never_replaced(root: Path) -> None:
    place, first = at(root), at(root).publish("a/x", b"first")
    assert place.publish("a/x", b"first") == first
    with pytest.raises(Damaged, match="exists with other content"):
        place.publish("a/x", b"other")
    said = at_once(place.publish, "race", [f"{racer} ".encode() * 100 for racer in range(RACERS)])
    assert sum(isinstance(answer, File) for answer in said) == 1
    assert place.read("race").split()[0] in [str(racer).encode() for racer in range(RACERS)]
    assert place.list("") == ["a/x", "race"]


def test_a_swap_replaces_what_was_read_and_nothing_else(root: Path) -> None:
    bucket = Bucket(root)
    assert bucket.create("x", b"one")
    one = bucket.get("x").version
    assert bucket.replace("x", b"two", one)
    assert not bucket.replace("x", b"late", one)
    two = bucket.get("x").version
    said = at_once(lambda path, content: bucket.replace(path, content, two), "x", [b"a", b"b", b"c"])
    assert sorted(said) == [False, False, True]
    bucket.delete("x")
    bucket.delete("x")
    assert not bucket.replace("x", b"late", two)
    with pytest.raises(FileNotFoundError):
        bucket.get("x")


def test_one_writer_holds_the_lease_and_an_old_one_is_free(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with at(root).lease(), pytest.raises(Busy), at(root).lease():
        pass
    monkeypatch.setattr("actstore.storage.lease_object.SLACK", -1.0)
    Bucket(root).put(LEASE, OF_ANOTHER)
    with at(root).lease() as held:
        held.check()


def test_a_store_is_written_read_copied_and_dropped_from(root: Path, tmp_path: Path) -> None:
    run = fake(n_trees=4, trees_per_shard=2, sites=("resid_post.0",))
    run.store(root)
    fake("s", "e", n_trees=2, seed=1, sites=("resid_post.0",)).store(root)
    with Store(root) as store:
        X, rows = store.read("select token_id, tree_id from tokens where dataset = 'd'", run="r", site="resid_post.0")
        np.testing.assert_array_equal(X[:, 0], rows["tree_id"].to_numpy())
    assert not verify(root).findings
    copy(root, tmp_path / "here.act")
    verbs.drop(root, run="s")
    with Store(root) as store, Store(tmp_path / "here.act") as here:
        assert (store.runs(), here.runs()) == (["r"], ["r", "s"])


def test_a_bucket_that_is_not_there_is_told(cloud: str) -> None:
    with pytest.raises(NotStored, match="there is no bucket 'no-such-bucket'"):
        Bucket(Path(f"{cloud}://no-such-bucket/x")).create("x", b"")


def test_a_wrong_key_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if root.parts[0] != "az:":
        pytest.skip("the stand-in asks for no key")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "bm8gc3VjaCBrZXk=")
    with pytest.raises(Unreachable, match=r"refuses this access.*AZURE_STORAGE_ACCOUNT_NAME and") as caught:
        Bucket(root).get("x")
    assert "bm8gc3VjaCBrZXk" not in str(caught.value)


@pytest.mark.parametrize("cloud", ["az"], indirect=True)  # the stand-in is one process, whose races show nothing
@pytest.mark.usefixtures("cloud")
class TestAzurite(StorageContract):
    turns = 5

    def empty(self, tmp_path: Path) -> Storage:
        return Objects(Path(f"az://tests/p-{next(NUMBERS)}"))

    def put_in_the_way(self, place: Storage, path: str) -> None:
        pytest.skip("nothing but an object has a key")
