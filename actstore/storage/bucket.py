"""A bucket of an object store, through obstore: single requests, and their errors as the package's.

Credentials and the endpoint come from the environment, see credentials.py. No message quotes what a
server or obstore said, since a server's answer may name an access key, and no error has such an
answer as its context.
"""

from __future__ import annotations

import errno
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from actstore.errors import BadInput, NotStored, Unreachable
from actstore.storage import credentials

T = TypeVar("T")
CLASSES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}  # of obstore, by scheme
STATUS = re.compile(r"status code: (\d{3})")
CODE = re.compile(r"<Code>(\w{1,60})</Code>")  # a word of S3's own, such as NoSuchBucket
LOST = re.compile(r"timed? ?out|connect|connection|reset|closed|incomplete|error sending request|dns", re.IGNORECASE)
METADATA = re.compile(
    r"169\.254\.169\.254|metadata\.google\.internal|/latest/(api/token|meta-data)"
)  # of a cloud's machines: asked for credentials last
CONFLICT = "409"  # S3: another request for the key was under way, and this one is to be sent again
NO_SUCH_RANGE = "416"
TAKEN = ("BlobAlreadyExists",)  # codes by which Azure says with a 409 what S3 says with a 412
WHY = {  # a server refuses, by its code: what to do
    "RequestTimeTooSkewed": "this machine's clock differs from the server's: set the clock",
    "ExpiredToken": "the credentials have expired: get new ones",
    "InvalidToken": "the session token is of no use: get new credentials",
}
CONFLICTS, LOSSES = 7, 2  # times that a request is done again which met another, or whose answer was lost
PAUSE = 0.05  # seconds before a request that met another is done again; doubled each time
STALL = 30.0  # seconds without a byte of an answer after which a request failed
SLOWEST = 250e3  # bytes per second of the slowest link; an answer to a put comes after all of its bytes
PART = 16 << 20  # bytes of a part of a large put
MOST_PARTS = 9000  # S3 takes 10,000
RETRIES: dict[str, Any] = {  # of obstore itself: 5xx and connections that fail
    "max_retries": 7,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2},
}


@dataclass(frozen=True)
class Object:
    """An object as it was read.

    Attributes:
        content: its bytes.
        version: what `Bucket.replace` compares.
        modified: when it was put, by the server's clock.
    """

    content: bytes
    version: dict[str, str]
    modified: datetime


class Bucket:
    """The objects whose keys begin with an address's prefix.

    Attributes:
        root: the address.
        prefix: what all keys begin with.
        identity: of the place, however its address is written.

    Args:
        root: the address, such as `s3://bucket/prefix`.

    Raises:
        BadInput: the address names no bucket, obstore is not installed, or the environment holds a
            setting that obstore does not know.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        scheme, _, rest = str(root).partition(":")
        self.scheme = scheme.lower()
        self.name, _, prefix = rest.lstrip("/").partition("/")
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.identity = (self.scheme, self.name, self.prefix)
        if not self.name:
            raise BadInput(f"got {root}; name a bucket and a prefix in it, such as {scheme}://bucket/demo.act")

    def get(self, path: str, most: int | None = None) -> Object:
        """Read an object.

        Args:
            path: inside the prefix.
            most: bytes; a longer object is not read, and its size raises TooLong.

        Raises:
            FileNotFoundError: nothing has the key.
        """

        def read() -> Object:
            found = self._obstore.get(self._client, self.prefix + path)
            meta = found.meta
            if most is not None and meta["size"] > most:
                raise TooLong(meta["size"])
            return Object(bytes(found.bytes()), _version(meta), meta["last_modified"])

        return self._ask(path, read)

    def fetch(self, path: str, to: Path) -> None:
        """Write an object to a file of this machine, without holding all of it in memory."""

        def write() -> None:
            found = self._obstore.get(self._client, self.prefix + path)
            with open(to, "wb") as file:
                for block in found:
                    file.write(block)

        self._ask(path, write)

    def hashed(self, path: str) -> tuple[int, str]:
        """Size of an object, in bytes, and its xxh3-128, hexadecimal; it is read piece by piece."""

        def read() -> tuple[int, str]:
            size, digest = 0, xxhash.xxh3_128()
            for block in self._obstore.get(self._client, self.prefix + path):
                size += len(block)
                digest.update(block)
            return size, digest.hexdigest()

        return self._ask(path, read)

    def get_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[memoryview]:
        """Bytes of an object; near ranges are fetched by one request, and several requests at once.

        Args:
            path: inside the prefix.
            starts, lengths: of each range, which lies inside the object and is not empty.
        """
        key = self.prefix + path
        found = self._ask(path, lambda: self._obstore.get_ranges(self._client, key, starts=starts, lengths=lengths))
        return [memoryview(part) for part in found]

    def end(self, path: str, n_bytes: int) -> tuple[int, bytes]:
        """The size of an object, and its last bytes, by one request; raises as `size`."""

        def read() -> tuple[int, bytes]:
            try:
                found = self._obstore.get(self._client, self.prefix + path, options={"range": {"suffix": n_bytes}})
            except self._obstore.exceptions.BaseError as error:
                if _status(error) == NO_SUCH_RANGE:  # an empty object has no last byte
                    return 0, b""
                raise
            return int(found.meta["size"]), bytes(found.bytes())

        return self._ask(path, read)

    def size(self, path: str) -> int:
        """Size of an object, in bytes.

        Raises:
            FileNotFoundError: nothing has the key.
        """
        return int(self._about(path)["size"])

    def modified(self, path: str) -> datetime:
        """When an object was put, by the server's clock; raises as `size`."""
        found: datetime = self._about(path)["last_modified"]
        return found

    def _about(self, path: str) -> Any:
        return self._ask(path, lambda: self._obstore.head(self._client, self.prefix + path))

    def sizes(self, folder: str, most_requests: int | None = None) -> dict[str, int]:
        """Path inside the prefix → size of every object under a folder; "" for all.

        Args:
            folder: inside the prefix.
            most_requests: after which the rest is left out; each lists 1,000. Default: none is.
        """
        inside = (self.prefix + folder).rstrip("/")

        def listed() -> dict[str, int]:
            some = self._obstore.list(self._client, prefix=inside or None, chunk_size=1000)
            every = ((meta["path"], int(meta["size"])) for part in islice(some, most_requests) for meta in part)
            return {key[len(self.prefix) :]: size for key, size in every if key.startswith(self.prefix)}

        return self._ask(folder, listed)

    def put(self, path: str, content: bytes | memoryview | Path) -> None:
        """Put an object, whatever its key holds; a file is sent in pieces."""
        n_bytes = content.stat().st_size if isinstance(content, Path) else len(content)
        part = max(PART, -(-n_bytes // MOST_PARTS))
        client, key = self._client_for(min(n_bytes, part)), self.prefix + path
        self._ask(path, lambda: self._obstore.put(client, key, content, mode="overwrite", chunk_size=part))

    def create(self, path: str, content: bytes | memoryview) -> bool:
        """Put an object under a key that is free (If-None-Match: *).

        Returns:
            False if the key is taken. If the answer to a request was lost, the object under the key
            may be this one.
        """
        return self._conditionally(path, content, "create")

    def replace(self, path: str, content: bytes | memoryview, version: dict[str, str]) -> bool:
        """Put an object in the place of one that was read (If-Match).

        Args:
            path: inside the prefix.
            content: that no earlier object had, or the version may be that of an earlier one: an
                ETag is often the hash of the content.
            version: see Object.

        Returns:
            False if the present object is another one; that object stays.
        """
        if self._conditionally(path, content, version):
            return True
        try:
            return self.get(path, len(content)).content == content  # an answer was lost, and the request done again
        except (FileNotFoundError, TooLong):
            return False

    def _conditionally(self, path: str, content: bytes | memoryview, mode: Any) -> bool:
        """Put an object on a condition; False if the condition does not hold (412)."""
        told = self._obstore.exceptions

        def put() -> bool:
            try:
                self._obstore.put(self._client_for(len(content)), self.prefix + path, content, mode=mode)
            except told.PreconditionError:
                return False
            except told.AlreadyExistsError as error:
                if _is_conflict(error):
                    raise
                return False
            except FileNotFoundError as error:  # what was to be replaced is gone
                if mode == "create" or "NoSuchBucket" in str(error):
                    raise
                return False
            return True

        return self._ask(path, put)

    def delete(self, path: str) -> None:
        """Remove an object; do nothing if there is none."""
        with suppress(FileNotFoundError):
            self._ask(path, lambda: self._obstore.delete(self._client, self.prefix + path))

    def _ask(self, path: str, request: Callable[[], T]) -> T:
        """Do a request, which may be done twice, again after a conflict or a lost answer.

        Raises:
            FileNotFoundError, NotStored, Unreachable: see _told.
        """
        conflicts, losses = CONFLICTS, LOSSES
        while True:
            told = None
            try:
                return request()
            except (TooLong, BadInput, Unreachable):
                raise
            except Exception as error:
                if _is_conflict(error) and conflicts:
                    conflicts -= 1
                    time.sleep(PAUSE * 2 ** (CONFLICTS - conflicts))
                elif _is_lost(error) and losses and not METADATA.search(str(error)):
                    losses -= 1
                elif (told := self._told(path, error)) is error:
                    raise
            if told is not None:  # raised here, since the error above may quote a key
                raise told

    @property
    def _obstore(self) -> Any:
        return _library(self.root)

    @property
    def _client(self) -> Any:
        return self._client_for(0)

    def _client_for(self, n_bytes: int) -> Any:
        """A client that waits as long as a slow link takes to send so many bytes."""
        longer = max(0, math.ceil(math.log2(max(n_bytes, 1) / SLOWEST / STALL)))
        return _client_of(self.scheme, self.name, credentials.fingerprint(self.scheme), STALL * 2**longer, os.getpid())

    def _told(self, path: str, error: Exception) -> Exception:
        """obstore's error as the system's or the package's own; another error as it is."""
        said, told = str(error), self._obstore.exceptions
        if isinstance(error, OSError) and error.errno is not None:  # of this machine's files
            return error
        if "NoSuchBucket" in said or "ContainerNotFound" in said:
            return self.no_bucket()
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root / path))
        if METADATA.search(said):
            return self._refused("there are no credentials")
        code = CODE.search(said)
        if code and code[1] in WHY:
            return Unreachable(
                f"{self._where()} refuses this access to bucket {self.name!r} ({code[1]}): {WHY[code[1]]}"
            )
        if _status(error) in ("401", "403") or "AccessDenied" in said:
            return self._refused(code[1] if code else "")
        return self._unreachable(path, error) if isinstance(error, (told.BaseError, OSError)) else error

    def no_bucket(self) -> NotStored:
        """The error for a bucket that does not exist."""
        return NotStored(f"there is no bucket {self.name!r} at {self._where()}; make it, or name another one")

    def _refused(self, why: str) -> Unreachable:
        return Unreachable(
            f"{self._where()} refuses this access to bucket {self.name!r}{f' ({why})' if why else ''}: look at the credentials, "
            f"and at what they allow (in the environment, {credentials.TO_SET[self.scheme]})"
        )

    def _unreachable(self, path: str, error: Exception) -> Unreachable:
        status, code, said = _status(error), CODE.search(str(error)), str(error).replace("retry_timeout", "").lower()
        if status:
            what = f"answered {status}" + (f" ({code[1]})" if code else "")
        elif "refused" in said:
            what = "refuses connections"
        elif "dns" in said:
            what = "has an unknown name"
        elif "timed out" in said or "timedout" in said or "timeout" in said:
            what = "did not answer in time"
        else:
            what = "dropped the connection" if _is_lost(error) else f"could not be asked ({type(error).__name__})"
        where = (
            "the service that gives tokens for a web identity (STS)" if "POST REDACTED" in str(error) else self._where()
        )
        return Unreachable(f"{self.root / path}: {where} {what}; nothing that was committed is lost: try again")

    def _where(self) -> str:
        """The server, without what its address may say of a user."""
        if address := credentials.endpoint(self.scheme):
            return re.sub(r"//.*@", "//", address).split("?")[0]
        return {"s3": "S3", "gs": "Google Cloud Storage", "az": "Azure"}[self.scheme]


class TooLong(Exception):
    """An object is longer than was asked for; `args[0]` is its size."""


def _version(meta: Any) -> dict[str, str]:
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name) is not None}


def _status(error: BaseException) -> str:
    found = STATUS.search(str(error))
    return found[1] if found else ""


def _is_conflict(error: BaseException) -> bool:
    """True if another request for the key was under way; Azure says 409 of a taken key, too."""
    code = CODE.search(str(error))
    return _status(error) == CONFLICT and not (code and code[1] in TAKEN)


def _is_lost(error: BaseException) -> bool:
    """True if a request may have been done, and its answer was lost."""
    return not _status(error) and bool(LOST.search(str(error)))


def _library(root: Path) -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise BadInput(
            f"got {root}; a store in a bucket takes the library obstore: install it with `pip install 'actstore[s3]'`"
        ) from None
    return obstore


@lru_cache(maxsize=32)
def _client_of(scheme: str, bucket: str, fingerprint: str, stall: float, process: int) -> Any:
    """obstore's client; another one if the environment changed, or the process was forked.

    Args:
        fingerprint: of the environment, see credentials.
        stall: seconds that an answer may take.
    """
    if _first_process() != process:
        raise BadInput(
            f"process {_first_process()} has asked {scheme}://{bucket}, and this process ({process}) was forked from it: the "
            "threads of obstore do not survive a fork; start workers afresh (`multiprocessing_context='spawn'`)"
        )
    from obstore import store

    credentials.check(scheme)
    if not credentials.there_are(scheme):
        raise Unreachable(
            f"there are no credentials for {scheme}://{bucket}: look at the credentials in the environment "
            f"({credentials.TO_SET[scheme]})"
        )
    make, settings = getattr(store, CLASSES[scheme]), credentials.of_profile() if scheme == "s3" else None
    options: dict[str, Any] = {
        "timeout": timedelta(days=1),  # of a whole answer, however long; `read_timeout` ends one that stalls
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(seconds=stall),
        **({"allow_http": True} if credentials.endpoint(scheme).startswith("http://") else {}),
    }
    retries = {**RETRIES, "retry_timeout": RETRIES["retry_timeout"] + timedelta(seconds=2 * stall - 2 * STALL)}
    try:
        return make(bucket, client_options=options, retry_config=retries, config=settings or None)
    except Exception:  # its message may quote a setting
        pass
    raise BadInput(
        f"got {scheme}://{bucket}, and obstore refuses the settings in the environment ({credentials.PREFIX[scheme]}…): set "
        f"{credentials.TO_SET[scheme]}"
    )


@lru_cache(maxsize=1)
def _first_process() -> int:
    return os.getpid()
