"""A prefix of a bucket as the place of a store's bytes: `s3://bucket/prefix`, gs:// or az://.

A file is an object under its own path. What is published is created under a free key
(`If-None-Match: *`). What is replaced is compared by its ETag (`If-Match`). A file that a function
writes, as the catalog, is an object of its own that never changes, under `.actstore/heads`; a small
object under the file's path, its head, says which. The head has a nonce, since an ETag is often the
hash of the content. Readers keep such files in a cache of this machine, by their hash. A large
catalog is stored as pieces (see pieces.py), and its own object lists them. Another file that is too
large for one put has a head as well, which is created under a free key.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import xxhash

from actstore.errors import BadInput, Busy, Damaged, advised
from actstore.storage import cache, lease_object, pieces
from actstore.storage.backend import ANY, ENDLESS, Content, File, Reading, Storage
from actstore.storage.bucket import Bucket, Object, TooLong
from actstore.storage.hashing import hash_of, hash_of_file
from actstore.storage.lease_object import OWN, LeaseObject, refuse_lost
from actstore.storage.pieces import Pieces
from actstore.storage.refused import needing_room
from actstore.storage.regular import LONGEST
from actstore.storage.several import several

HEADS = f"{OWN}/heads"
HEAD = re.compile(rb"actstore head 1\n([0-9a-f]{32}) (\d{1,19})\n([0-9a-f]{32})(?: (\d{1,19}))?\n *\n")
HEAD_BYTES = 128  # of every head, so that an object of another size is none
ONE_PUT = 5_000_000_000  # bytes that S3 and Azure take by one put; more go in parts, which no condition covers
AT_ONCE = 32  # requests for small objects that are under way at the same time
SUFFIXES = ("s3",)  # schemes whose servers give an object's last bytes and its size by one request


@dataclass(frozen=True)
class Head:
    """What a head says of the file under its path.

    Attributes:
        xxh3_128: hash of the content.
        size: its bytes.
        nonce: of the swap that put it in place.
        number: of the catalog's snapshot; None for another file.
    """

    xxh3_128: str
    size: int
    nonce: str
    number: int | None = None

    @classmethod
    def of(cls, content: bytes) -> Head | None:
        """The head that an object is; None if it is a file's content."""
        found = HEAD.fullmatch(content) if len(content) == HEAD_BYTES else None
        if not found:
            return None
        return cls(found[1].decode(), int(found[2]), found[3].decode(), int(found[4]) if found[4] else None)

    def to_bytes(self) -> bytes:
        """The head's object."""
        number = "" if self.number is None else f" {self.number}"
        text = f"actstore head 1\n{self.xxh3_128} {self.size}\n{self.nonce}{number}\n"
        return text.encode().ljust(HEAD_BYTES - 1) + b"\n"

    def key(self, path: str) -> str:
        """Path of the object with the content."""
        return f"{HEADS}/{path}/{self.xxh3_128}-{self.nonce}"


def _piece(path: str, name: str) -> str:
    """Path of the object that holds a piece of a file, by the piece's hash."""
    return f"{HEADS}/{path}/piece-{name}"


class Objects(Storage):
    """A prefix of a bucket. Storage says what each method takes, gives and raises.

    Attributes:
        lease_seconds: after which the lease of a process that died is free.
    """

    lease_seconds = 30.0
    at_once = 8  # each holds a file in memory

    def __init__(self, root: Path) -> None:
        self.root = root
        self._bucket = Bucket(root)
        cache.limit()  # refused before any work begins

    def publish(self, path: str, content: bytes | memoryview) -> File:
        """See Storage.publish."""
        refuse_lost(self._bucket)
        file = File(path, len(content), xxhash.xxh3_128_hexdigest(content))
        put = self._put_large if len(content) > ONE_PUT else self._bucket.create
        if not put(path, content) and not self._is(file):
            raise Damaged(
                f"{self.root / path} exists with other content, and no commit names it: another writer is at work on this store; "
                "if none is, remove that object"
            )
        return file

    def _put_large(self, path: str, content: bytes | memoryview) -> bool:
        """Put a file in parts under a key that no other file has, and create its head.

        Returns:
            False if the path is taken.
        """
        if self.has(path):
            return False
        head = Head(xxhash.xxh3_128_hexdigest(content), len(content), uuid4().hex)
        self._bucket.put(head.key(path), content)
        if self._created(path, head.to_bytes()):
            return True
        self._bucket.delete(head.key(path))
        return False

    def _is(self, file: File) -> bool:
        try:
            return self.size(file.path) == file.bytes and self.token(file.path) == file.xxh3_128
        except FileNotFoundError:
            return False

    def swap(self, path: str, content: Content, expected: str | None = ANY, number: int | None = None) -> None:
        """See Storage.swap."""
        with tempfile.TemporaryDirectory(prefix="actstore-") as folder:
            if not callable(content):
                self._swap(path, content, expected)
                return
            written = Path(folder) / path.rpartition("/")[2]
            with needing_room(written):
                content(written)
                head = Head(hash_of_file(written), written.stat().st_size, uuid4().hex, number)
            refuse_lost(self._bucket)
            self._put(path, head, written)
            try:
                self._swap(path, head.to_bytes(), expected)
            except Busy:  # after any other error the head may be in place; `tidy` removes what no head leads to
                with suppress(OSError):
                    self._bucket.delete(head.key(path))
                raise
            with suppress(OSError, BadInput):  # or it is fetched when it is read
                cache.put(head.xxh3_128, partial(shutil.copyfile, written))

    def _put(self, path: str, head: Head, written: Path) -> None:
        """Put a file as what its head leads to; of a large one, the pieces that are new."""
        if head.size < pieces.FROM:
            return self._bucket.put(head.key(path), written)
        listed = Pieces.of_file(written)
        there = self._listed(path, self._head(path))
        listed.put(
            written, there.hashes if there else [], lambda name, part: self._bucket.put(_piece(path, name), part)
        )
        return self._bucket.put(head.key(path), listed.to_bytes())

    def _listed(self, path: str, head: Head | None) -> Pieces | None:
        """The pieces of the file that a head leads to; None if it is one object, or not there."""
        if head is None or head.size < pieces.FROM:
            return None
        with suppress(FileNotFoundError, TooLong):
            return Pieces.of(self._bucket.get(head.key(path), pieces.LONGEST).content)
        return None

    def _discard(self, path: str, head: Head, now: Head | None = None) -> None:
        """Remove what a head leads to, but for the pieces of the present file."""
        listed, kept = self._listed(path, head), self._listed(path, now)
        self._bucket.delete(head.key(path))
        for name in set(listed.hashes if listed else []).difference(kept.hashes if kept else []):
            self._bucket.delete(_piece(path, name))

    def _swap(self, path: str, content: bytes | memoryview, expected: str | None) -> None:
        """Put an object in the place of the expected one; remove what an earlier head led to."""
        refuse_lost(self._bucket)
        there = self._there(path)
        before = Head.of(there.content) if there else None
        if expected == ANY:
            self._bucket.put(path, content)
        else:
            token = None
            if there:
                token = before.xxh3_128 if before else xxhash.xxh3_128_hexdigest(there.content)
            replaced = token == expected and (
                self._bucket.replace(path, content, there.version) if there else self._created(path, content)
            )
            if not replaced:
                now = self._head(path)
                by_now = "" if now is None or now.number is None else f" (to snapshot {now.number})"
                raise Busy(
                    f"another process changed {self.root / path} meanwhile{by_now}; wait for it or stop it, then go on"
                )
        if before:
            self._discard(path, before, Head.of(bytes(content)))
            cache.drop(before.xxh3_128)

    def _created(self, path: str, content: bytes | memoryview) -> bool:
        if self._bucket.create(path, content):
            return True
        there = self._there(path)  # the answer may have been lost
        return there is not None and there.content == content

    def _there(self, path: str) -> Object | None:
        try:
            return self._bucket.get(path)
        except FileNotFoundError:
            return None

    def token(self, path: str) -> str | None:
        """See Storage.token; of a file with a head, what the head says."""
        there = self._there(path)
        if there is None:
            return None
        head = Head.of(there.content)
        return head.xxh3_128 if head else xxhash.xxh3_128_hexdigest(there.content)

    def read(self, path: str, longest: int = LONGEST) -> bytes:
        """See Storage.read."""
        head, content = self._content(path, longest)
        while head:
            if head.size > longest:
                raise self._too_long(path, head.size, longest)
            try:
                listed = self._listed(path, head)
                content = self._joined(path, listed) if listed else self._bucket.get(head.key(path)).content
                break
            except FileNotFoundError:
                head = self._newer(path, head)
        self._compare(path, xxhash.xxh3_128_hexdigest(content) if self.committed is not None else "")
        return content

    def _joined(self, path: str, listed: Pieces) -> bytes:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return b"".join(threads.map(lambda name: self._bucket.get(_piece(path, name)).content, listed.hashes))

    def _content(self, path: str, longest: int) -> tuple[Head | None, bytes]:
        """A file's head, or else its content."""
        try:
            content = self._bucket.get(path, max(longest, HEAD_BYTES)).content
        except TooLong as error:
            raise self._too_long(path, error.args[0], longest) from None
        if (head := Head.of(content)) is None and len(content) > longest:
            raise self._too_long(path, len(content), longest)
        return head, content

    def _too_long(self, path: str, size: int, longest: int) -> Damaged:
        return Damaged(
            f"{self.root / path} has {size:,} bytes, and at most {longest:,} were written; restore it from a copy"
        )

    def _newer(self, path: str, head: Head) -> Head:
        """The head that took a head's place, since the earlier content is gone.

        Raises:
            Damaged: there is no newer head.
        """
        now = self._head(path)
        if now is None or now == head:
            raise Damaged(
                f"{self.root / path} leads to an object that is not there; mend it with {advised('repair', self.root)}"
            )
        return now

    def _compare(self, path: str, found: str) -> None:
        if self.committed is not None and self.committed.get(path) != found:
            raise Damaged(
                f"{self.root / path} is not what was committed (its hash is another): look with "
                f"{advised('verify', self.root)}, then mend it with {advised('repair', self.root)}"
            )

    def read_ranges(self, path: str, ranges: Iterable[tuple[int, int]]) -> Sequence[bytes]:
        """See Storage.read_ranges."""
        (size, head), asked = self.looked_at(path), list(ranges)
        kept = [(start, min(length, size - start)) for start, length in asked if start < size and length > 0]
        if head and self._listed(path, head):
            content = self.read(path, size)
            return [content[start : start + length] for start, length in asked]
        starts, lengths = [start for start, _ in kept], [length for _, length in kept]
        try:
            parts = iter(self._bucket.get_ranges(head.key(path) if head else path, starts, lengths) if kept else [])
        except FileNotFoundError:
            if head is None:
                raise
            self._newer(path, head)  # raises if there is none
            return self.read_ranges(path, asked)
        return [bytes(next(parts)) if start < size and length > 0 else b"" for start, length in asked]

    def end(self, path: str, n_bytes: int) -> tuple[int, bytes]:
        """See Storage.end."""
        if self._bucket.scheme in SUFFIXES:
            size, content = self._bucket.end(path, n_bytes)
            if size != HEAD_BYTES:
                self._saw_no_head(path, size)
                return size, content
        return super().end(path, n_bytes)  # what is asked of a head is of its file

    def _saw_no_head(self, path: str, size: int) -> None:
        """A file has this size, in bytes, and no head."""

    def hashed(self, path: str) -> tuple[int, str]:
        """See Storage.hashed; a file without a head is hashed as it comes, and is not kept."""
        size, found = self._bucket.hashed(path)
        is_file = size != HEAD_BYTES or self._head(path) is None
        return (size, found) if is_file else super().hashed(path)

    def size(self, path: str) -> int:
        """See Storage.size."""
        return self.looked_at(path)[0]

    def looked_at(self, path: str) -> tuple[int, Head | None]:
        """A file's size, in bytes, and its head if it has one."""
        size = self._bucket.size(path)
        head = Head.of(self._bucket.get(path).content) if size == HEAD_BYTES else None
        return (head.size if head else size), head

    def _head(self, path: str) -> Head | None:
        """A file's head; None if the file has none, or is not there."""
        try:
            return self.looked_at(path)[1]
        except FileNotFoundError:
            return None

    def sizes(self, paths: Sequence[str]) -> Mapping[str, int]:
        """See Storage.sizes; they are listed, as far as that takes no more turns than to ask."""
        there: dict[str, int] = {}
        if (turns := -(-len(paths) // AT_ONCE)) > 1:
            there = self._bucket.sizes("", turns)
            paths = [path for path in paths if there.get(path, HEAD_BYTES) == HEAD_BYTES]  # its file may be longer

        def size(path: str) -> int | None:
            try:
                return self.size(path)
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(AT_ONCE) as threads:
            found = zip(paths, threads.map(size, paths), strict=True)
            return {**there, **{path: size for path, size in found if size is not None}}

    def ahead(self, paths: Sequence[str]) -> Mapping[str, bytes]:
        """See Storage.ahead."""

        def read(path: str) -> bytes | None:
            with suppress(FileNotFoundError, Damaged):  # told when the file is read itself
                return self.read(path)
            return None

        with ThreadPoolExecutor(AT_ONCE) as threads:
            found = zip(paths, threads.map(read, paths), strict=True)
            return {path: content for path, content in found if content is not None}

    def has(self, path: str) -> bool:
        """See Storage.has."""
        try:
            self._bucket.size(path)
        except FileNotFoundError:
            return False
        return True

    def age(self, path: str) -> float:
        """See Storage.age; in whole seconds."""
        return lease_object.age(self._bucket, path)

    def list(self, prefix: str) -> Sequence[str]:
        """See Storage.list."""
        found = self._bucket.sizes(prefix.rpartition("/")[0])
        return sorted(path for path in found if path.startswith(prefix) and not path.startswith(f"{OWN}/"))

    def delete(self, path: str) -> None:
        """See Storage.delete."""
        refuse_lost(self._bucket)
        try:
            _, head = self.looked_at(path)
        except FileNotFoundError:
            return
        self._bucket.delete(path)
        if head:
            self._discard(path, head)

    def lease(self, wait: float = 0.0) -> AbstractContextManager[LeaseObject]:
        """See Storage.lease."""
        return lease_object.lease(self._bucket, self.lease_seconds, wait)

    def free_room(self) -> int:
        """See Storage.free_room; a bucket has no end."""
        return ENDLESS

    def open_for_map(self, path: str) -> None:
        """See Storage.open_for_map; an object cannot be mapped."""
        self.size(path)

    def local(self, paths: Iterable[str]) -> AbstractContextManager[Sequence[Path]]:
        """See Storage.local; a file with a head comes from the cache."""
        return self._local(list(paths))

    @contextmanager
    def _local(self, paths: Sequence[str]) -> Iterator[Sequence[Path]]:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="actstore-")))

            def copy(path: str) -> Path | None:
                """Fetch a file; None if the path is none of a file."""
                (to := folder / path).parent.mkdir(parents=True, exist_ok=True)
                try:
                    with needing_room(to):
                        self._bucket.fetch(path, to)
                except FileNotFoundError:
                    return None
                return to

            with ThreadPoolExecutor(AT_ONCE) as threads:
                copies = list(threads.map(copy, paths))
            found = []
            for path, to in zip(paths, copies, strict=True):
                if to is None:
                    to = stack.enter_context(super().local([path]))[0]  # a folder, or nothing
                elif to.stat().st_size == HEAD_BYTES and (head := Head.of(to.read_bytes())):
                    to = self._cached(stack, path, head)
                found.append(to)
            yield found

    def _cached(self, stack: ExitStack, path: str, head: Head) -> Path:
        """The content of a file with a head, in the cache while the stack is open."""
        while True:
            try:
                fetch = partial(self._fetch_content, path, head, near=cache.recent())
                with self._mending(path):
                    return stack.enter_context(cache.cached(head.xxh3_128, fetch))
            except FileNotFoundError:
                head = self._newer(path, head)

    @contextmanager
    def _mending(self, path: str) -> Iterator[None]:
        """Say which file the cache found to be damaged, and what to do."""
        try:
            yield
        except Damaged as error:
            raise Damaged(f"{self.root / path}: {error}; mend it with {advised('repair', self.root)}") from None

    def descriptor(self, path: str) -> int:
        """See Storage.descriptor; the bytes are those in the bucket, and never the cache's."""
        with tempfile.TemporaryDirectory(prefix="actstore-") as folder:
            to = Path(folder) / "copy"
            with needing_room(to):
                head = self._fetch(path, to)
            descriptor = os.open(to, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = hash_of(descriptor) if head or self.committed is not None else ""
            if head and found != head.xxh3_128:
                with self._mending(path):
                    raise Damaged(cache.OTHERWISE)
            self._compare(path, found)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _fetch(self, path: str, to: Path) -> Head | None:
        """Write a file's content to a file here; gives the head that led there, if any."""
        self._bucket.fetch(path, to)
        head = Head.of(to.read_bytes()) if to.stat().st_size == HEAD_BYTES else None
        while head:
            try:
                self._fetch_content(path, head, to)
                return head
            except FileNotFoundError:
                head = self._newer(path, head)
        return None

    def _fetch_content(self, path: str, head: Head, to: Path, near: Iterable[Path] = ()) -> None:
        """Write what a head leads to; pieces that near files of this machine have are copied."""
        if listed := self._listed(path, head):
            listed.write(to, near, lambda name: self._bucket.get(_piece(path, name)).content)
        else:
            self._bucket.fetch(head.key(path), to)

    def hold(self, committed: Mapping[str, str] | None = None, kept: Mapping[str, str] | None = None) -> HeldObjects:
        """See Storage.hold; copies are kept in the cache."""
        return HeldObjects(self.root, committed, kept or {})

    def unusable(self) -> str:
        """See Storage.unusable."""
        if not self._bucket.prefix:
            return f"a store takes a prefix of its own in a bucket, and got {self.root}; name one, such as {self.root}/demo.act"
        if lease_object.was_leased(self._bucket) or not self._bucket.sizes(""):
            return ""
        return f"{self.root} holds other objects and is no actstore store; name a new prefix"

    def unnamed(self, folders: Iterable[str], named: Iterable[str]) -> Sequence[str]:
        """See Storage.unnamed; the folders are listed beside each other."""
        listed = several(self.list, [f"{folder}/" for folder in folders], self.at_once)
        return sorted({path for found in listed for path in found}.difference(named))

    def tidy(self, names: Iterable[str], folders: Iterable[str]) -> None:
        """See Storage.tidy; what interrupted swaps and publishes put under heads."""
        refuse_lost(self._bucket)
        begins = (*(f"{HEADS}/{name}" for name in names), *(f"{HEADS}/{folder}/" for folder in folders))
        used: dict[str, set[str]] = {}
        for key in self._bucket.sizes(HEADS):
            if key.startswith(begins):
                path = key[len(HEADS) + 1 :].rpartition("/")[0]
                if path not in used:
                    used[path] = self._used(path)
                if key not in used[path]:
                    self._bucket.delete(key)

    def _used(self, path: str) -> set[str]:
        """Keys of the objects that hold a file with a head."""
        if (head := self._head(path)) is None:
            return set()
        listed = self._listed(path, head)
        return {head.key(path), *(_piece(path, name) for name in (listed.hashes if listed else []))}


_copying = threading.BoundedSemaphore(Objects.at_once)  # files that this process copies at the same time


class HeldObjects(Objects, Reading):
    """A prefix that is read from; nothing is held, since committed objects do not change.

    Args:
        root: the address.
        committed, kept: see Storage.hold.
    """

    reads_ranges = True

    def __init__(self, root: Path, committed: Mapping[str, str] | None, kept: Mapping[str, str]) -> None:
        super().__init__(root)
        self.committed, self._kept = committed, kept
        self._hashed: set[str] = set()  # paths of kept files whose copies were hashed
        self._known: dict[str, tuple[int, Head | None]] = {}
        self._ahead: dict[str, bytes] = {}  # of committed files, until they are read

    def looked_at(self, path: str) -> tuple[int, Head | None]:
        """Each file is asked about once; a head may change."""
        if path not in self._known:
            found = super().looked_at(path)
            if found[1]:
                return found
            self._known[path] = found
        return self._known[path]

    def _saw_no_head(self, path: str, size: int) -> None:
        """The size is not asked for again."""
        self._known[path] = size, None

    def ahead(self, paths: Sequence[str]) -> Mapping[str, bytes]:
        """See Storage.ahead; the next `read` of each file gives what was read here."""
        self._ahead |= (found := super().ahead(paths))
        return found

    def read(self, path: str, longest: int = LONGEST) -> bytes:
        """See Storage.read."""
        content = self._ahead.pop(path, None)
        return super().read(path, longest) if content is None else content

    def descriptor(self, path: str) -> int:
        """See Storage.descriptor; of a file that is kept, its copy."""
        return self._copy(path) if path in self._kept else super().descriptor(path)

    def read_ranges(self, path: str, ranges: Iterable[tuple[int, int]]) -> Sequence[bytes]:
        """See Storage.read_ranges, and descriptor."""
        if path not in self._kept:
            return super().read_ranges(path, ranges)
        with os.fdopen(self._copy(path), "rb") as copy:
            return [os.pread(copy.fileno(), length, start) for start, length in ranges]

    def end(self, path: str, n_bytes: int) -> tuple[int, bytes]:
        """See Storage.end, and descriptor."""
        return Storage.end(self, path, n_bytes) if path in self._kept else super().end(path, n_bytes)

    def size(self, path: str) -> int:
        """See Storage.size, and descriptor."""
        if path not in self._kept:
            return super().size(path)
        with os.fdopen(self._copy(path), "rb") as copy:
            return os.fstat(copy.fileno()).st_size

    def _copy(self, path: str) -> int:
        """A descriptor of a file's copy in the cache, which is hashed when it is first read."""

        def fetch(to: Path) -> None:
            with _copying:
                self._fetch(path, to)

        with self._mending(path):
            copy = cache.opened(self._kept[path], fetch, cache.SHARD, path not in self._hashed)
        self._hashed.add(path)
        return copy

    def close(self) -> None:
        """See Reading.close."""

    def identity(self) -> tuple[str, ...]:
        """See Reading.identity."""
        return self._bucket.identity

    def check(self) -> None:
        """See Reading.check; a store is not moved in a bucket."""
