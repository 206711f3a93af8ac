"""The right to write to a place in a bucket: an object with an expiry, renewed while it is held.

Only the server's clock counts: its time is that of an object which is put for the purpose. A holder
that ran on this machine and has ended is known at once.

The lease keeps writers from each other's way. What was committed does not rest on it: files are
created once, and what is replaced is compared first.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any
from uuid import uuid4

from actstore.errors import ActstoreError, Busy, Damaged
from actstore.storage.bucket import Bucket, Object, TooLong
from actstore.storage.lease import LOOK_AGAIN
from actstore.storage.machine import check_process, is_known_dead, process_name, refuse_forked, signature

OWN = ".actstore"  # the folder of objects that are no files of the place
LEASE, CLOCK = f"{OWN}/lease", f"{OWN}/clock"
MOST = 1 << 16  # bytes of a lease
SLACK = 2.0  # seconds: the server's times are whole seconds
_held: dict[tuple[str, ...], LeaseObject] = {}


class LeaseObject:
    """A lease that is held; see `lease`."""

    def __init__(self, bucket: Bucket, seconds: float) -> None:
        self.process, self._bucket, self._seconds = os.getpid(), bucket, seconds
        self._until = 0.0
        self._taken_by_another = False
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True, name="actstore-lease")
        self.content = b""

    def check(self) -> None:
        """Check that the lease still holds.

        Raises:
            Busy: another process took it, or it could not be renewed in time.
            BadInput: this process was forked from the one that holds the lease.
        """
        check_process(self.process)
        if self._taken_by_another or time.monotonic() > self._until:
            raise Busy(
                f"the lease of {self._bucket.root} was lost: it was not renewed for {self._seconds:g} seconds, and another "
                "process may write by now; run the same command again: what was committed is there, and it goes on from there"
            )

    def take(self, found: Object | None) -> bool:
        """Take the lease from what was found in its place; False if another process was first."""
        began, self.content = time.monotonic(), _lease(signature(), self._seconds, True)
        if found is None:
            taken = self._bucket.create(LEASE, self.content) or self._is_ours()
        else:
            taken = self._bucket.replace(LEASE, self.content, found.version)
        if taken:
            self._until = began + self._seconds * 2 / 3  # the rest is for requests that are under way
        return taken

    def begin(self) -> None:
        """Renew the lease from now on."""
        self._renewing.start()

    def end(self) -> None:
        """Give the lease back."""
        self._ended.set()
        if os.getpid() != self.process:
            return
        self._renewing.join()
        with suppress(ActstoreError, OSError):
            if (found := _found(self._bucket)) and found.content == self.content:
                self._bucket.replace(LEASE, _lease(signature(), self._seconds, False), found.version)

    def _renew(self) -> None:
        while not self._taken_by_another and not self._ended.wait(self._seconds / 4):
            with suppress(ActstoreError, OSError):  # tried again until it is too late
                self.renew()

    def renew(self) -> None:
        """Put the lease anew, unless another process took it."""
        found = _found(self._bucket)
        self._taken_by_another = found is None or found.content != self.content or not self.take(found)

    def _is_ours(self) -> bool:
        found = _found(self._bucket)
        return found is not None and found.content == self.content


@contextmanager
def lease(bucket: Bucket, seconds: float, wait: float = 0.0) -> Iterator[LeaseObject]:
    """Hold a place for writing.

    Args:
        bucket: the place.
        seconds: after which the lease of a process that died is free.
        wait: seconds to wait for another process.

    Raises:
        Busy: another process held the place for all that time.
        BadInput: this process was forked from one that had opened a store.
    """
    refuse_forked()
    held, deadline = LeaseObject(bucket, seconds), time.monotonic() + wait
    while True:
        found = _found(bucket)
        about = _parsed(bucket, found)
        is_free = about is None or not about["held"] or is_known_dead(about["process"])
        if (is_free or _expired(bucket, found, about)) and held.take(found):
            break
        if not time.monotonic() < deadline:
            waited = f" (waited {wait:g} s; --wait SECONDS sets how long)" if wait else ""
            holder = about["holder"] if about else "another process"
            raise Busy(
                f"{bucket.root} is being written by {holder}; wait for it or stop it, then go on: its lease ends at most "
                f"{about['seconds'] if about else seconds:g} seconds after it{waited}"
            )
        time.sleep(LOOK_AGAIN)
    name = bucket.identity
    _held[name] = held
    held.begin()
    try:
        yield held
    finally:
        if _held.get(name) is held:
            del _held[name]
        held.end()


def refuse_lost(bucket: Bucket) -> None:
    """Raise Busy if this process held the place's lease and lost it; called before each change."""
    if held := held_here(bucket):
        held.check()


def held_here(bucket: Bucket) -> LeaseObject | None:
    """The lease of the place that this process holds."""
    return _held.get(bucket.identity)


def was_leased(bucket: Bucket) -> bool:
    """True if the place was ever leased: what lies there is a store, or the rest of one."""
    return _found(bucket) is not None


def _found(bucket: Bucket) -> Object | None:
    try:
        return bucket.get(LEASE, MOST)
    except FileNotFoundError:
        return None
    except TooLong:
        raise _no_lease(bucket) from None


def _parsed(bucket: Bucket, found: Object | None) -> dict[str, Any] | None:
    if found is None:
        return None
    try:
        about = json.loads(found.content)
        named = {"holder": str(about["holder"]), "process": list(about.get("process") or [])}
        return {**named, "seconds": float(about["seconds"]), "held": bool(about["held"])}
    except (ValueError, KeyError, TypeError):
        raise _no_lease(bucket) from None


def _no_lease(bucket: Bucket) -> Damaged:
    return Damaged(f"{bucket.root / LEASE} is no lease of actstore; if no writer is at work, remove that object")


def _lease(holder: str, seconds: float, held: bool) -> bytes:
    """The nonce tells this lease from any other: an ETag is often the hash of the content."""
    about = {"holder": holder, "process": process_name(), "seconds": seconds, "held": held, "nonce": uuid4().hex}
    return json.dumps(about).encode()


def _expired(bucket: Bucket, found: Object | None, about: dict[str, Any] | None) -> bool:
    return bool(found and about and _since(bucket, found.modified) > about["seconds"] + SLACK)


def age(bucket: Bucket, path: str) -> float:
    """Seconds since an object was put, by the server's clock; raises as Bucket.size."""
    return _since(bucket, bucket.modified(path))


def _since(bucket: Bucket, then: datetime) -> float:
    bucket.put(CLOCK, uuid4().hex.encode())
    return (bucket.modified(CLOCK) - then).total_seconds()
