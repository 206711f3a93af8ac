"""A prefix of a bucket as a place for bytes, on a real S3 server."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actstore.storage import at as addresses
from actstore.storage.backend import Storage
from actstore.storage.bucket import Bucket
from actstore.storage.objects import Objects
from tests.bucket_server import BUCKET
from tests.storage_contract import StorageContract

numbers = itertools.count()


def copied(root: Path) -> Path:
    """Another address with the same objects, to be changed; a store there is made in a tenth of the time."""
    to = address("copied")
    of, new = Bucket(root), Bucket(to)
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda key: new.put(key, of.get(key).content), of.sizes("")))
    return to


class Short(Objects):
    """With leases that end soon after their process."""

    lease_seconds = 3.0


def address(name: str = "") -> Path:
    """An address that no other test uses."""
    return Path(f"s3://{BUCKET}/{name or 'p'}-{next(numbers)}")


class TestObjects(StorageContract):
    turns = 3  # SeaweedFS lets whoever meets another wait for a second

    @pytest.fixture(autouse=True)
    def short(self, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(addresses.BACKENDS, "s3", Short)

    def empty(self, tmp_path: Path) -> Storage:
        return Short(address())

    def put_in_the_way(self, place: Storage, path: str) -> None:
        pytest.skip("nothing but an object has a key")
