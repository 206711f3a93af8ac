"""The commit: each file is published once, a manifest that names them is the commit, and a lease keeps a second writer out.

A file is written to a temporary name, fsynced, `link()`ed to its own name (which fails where that name exists: the first
writer wins) and its folder is fsynced. Last comes the manifest, published the same way, which lists every file of the
commit with its size and xxh3-128 hash. A file that no manifest names does not exist.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from actstore.errors import Busy, Damaged, NoRoom, Unsupported
from actstore.storage import links
from actstore.storage.content import Count, Hash, Positive, Size, Text, as_a, check_inside, json_object
from actstore.storage.machine import check_process, limit_reached
from actstore.storage.regular import irregular, read_regular

FORMAT_VERSION = 3  # 1 had no variants, prompts, generations and hash of its catalog; 2 did not chain its manifests
CHAINED_FROM = 3  # the format from which on a manifest names the one before it
LOG, PARTS, ARRAYS, WEIGHTS, LOCK = "log", "parts", "activations.zarr", "models", ".lock"
FOLDERS = (LOG, PARTS, ARRAYS, WEIGHTS)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_SUCH_CALL = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
ABILITIES = {  # what a file system may lack, and what it then answers
    "hard links": (*NO_SUCH_CALL, errno.EPERM, errno.EMLINK),
    "locks (flock)": (*NO_SUCH_CALL, errno.ENOLCK, errno.EINVAL),
    "fsync": (*NO_SUCH_CALL, errno.EINVAL),
}
DIRECT_FROM = 1 << 20  # bytes; below, a copy through the page cache costs nothing
LOOK_AGAIN = 0.1  # seconds between looks at a lease that another holds
BLOCK = mmap.PAGESIZE  # what O_DIRECT wants memory, offsets and lengths aligned to, on any disk of today
TableOfParts = Literal[
    "models",
    "datasets",
    "runs",
    "sites",
    "trees",
    "edges",
    "tokens",
    "predictions",
    "outcomes",
    "generations",
    "results",
]
MANIFEST = re.compile(r"[0-9]{8,}\.json")


@dataclass(frozen=True)
class File:
    """A published file: its path inside the store, its size in bytes and the xxh3-128 of its content, hexadecimal."""

    path: str
    bytes: Size
    xxh3_128: Hash


@dataclass(frozen=True)
class Part(File):
    """The rows that one commit brought to one table, as Parquet."""

    table: TableOfParts
    rows: Size


@dataclass(frozen=True)
class Shard(File):
    """One batch of trees of one site of a run."""

    run: Text
    site: Text
    batch: Count
    first_tree_id: Count
    n_trees: Positive


@dataclass(frozen=True)
class Manifest:
    """One commit: what it is, and every file it brought. Numbers run from 1 without a gap.

    `run` and `batch` say which batch of which run it committed; a run's definition has no batch, a study's results neither.
    `previous` is the xxh3-128 of the manifest before it, so that an edit of a past one shows; the first has none, and those
    of formats 1 and 2 have none either. `xxh3_128` is that of its own bytes, once they are written or read; it is no part
    of them.
    """

    number: Positive
    kind: Literal["run", "batch", "results"]
    run: Text | None = None
    batch: Count | None = None
    parts: list[Part] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    others: list[File] = field(default_factory=list)
    previous: Hash | None = None
    format: Positive = FORMAT_VERSION
    xxh3_128: str = field(default="", compare=False)

    @property
    def files(self) -> list[File]:
        return [*self.parts, *self.shards, *self.others]

    def to_json(self) -> bytes:
        """The manifest's bytes; its checksum is over everything else in it, so that a flipped bit shows."""
        body = self._body()
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1).encode()

    def _body(self) -> dict[str, Any]:
        body = {"format": self.format, **asdict(self)}
        del body["xxh3_128"]
        if self.format < CHAINED_FROM:
            del body["previous"]
        return body

    @classmethod
    def from_json(cls, content: bytes, path: Path) -> Manifest:
        try:
            body = json_object(content)
            if body.pop("checksum", None) != _checksum(body):
                raise ValueError("its checksum does not match")
            manifest = as_a(cls, {**body, "xxh3_128": xxhash.xxh3_128_hexdigest(content)})
            named = {key.name for key in fields(cls)} - {
                "xxh3_128",
                "previous" if manifest.format < CHAINED_FROM else "",
            }
            listed = [*body["parts"], *body["shards"], *body["others"]] if body.keys() == named else None
            if listed != [vars(file) for file in manifest.files]:
                raise ValueError("it has other keys than a manifest")
            for file in manifest.files:
                check_inside(file.path)
            return manifest
        except ValueError as error:
            raise Damaged(f"manifest {path} cannot be read ({error}); restore it from a copy of the store") from error


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def manifests(root: Path, after: int = 0, least: int = 0) -> list[Manifest]:
    """The commits numbered after+1 and later, in order.

    Args:
        root: the store.
        after: commits that the caller knows already.
        least: commits that there must be, since the catalog holds them; a log cut short would else pass for a young one.

    Raises:
        Damaged: a manifest is missing, cannot be read, is not the one its name says, or not the one that the next was
            written after.
    """
    there = numbers(root)
    last = max([*there[-1:], least])
    if (gap := first_gap(there)) <= last:
        if link := links.broken(root / LOG):
            raise Damaged(f"{root / LOG} lacks manifest {gap} of {last}, since {link}; bring that back")
        raise Damaged(f"{root / LOG} lacks manifest {gap} of {last}; restore it from a copy of the store")
    found: list[Manifest] = []
    before = read_manifest(root / manifest_path(after), after) if after else None
    for number in range(after + 1, last + 1):
        manifest = read_manifest(root / manifest_path(number), number)
        if what := breaks_chain(before, manifest):
            raise Damaged(f"{root / LOG}: {what}; restore it from a copy of the store")
        found.append(manifest)
        before = manifest
    return found


def numbers(root: Path) -> list[int]:
    """The numbers that files of the log are named by, in order; as large as the names say, and with whatever gaps."""
    names = [path.name for path in (root / LOG).glob("*.json") if MANIFEST.fullmatch(path.name)]
    found = ((int(name.removesuffix(".json")), name) for name in names)
    return sorted(number for number, name in found if manifest_path(number) == f"{LOG}/{name}")


def first_gap(there: list[int]) -> int:
    """The first number from 1 on that is not among those that are there, in order."""
    return next((number for number, found in enumerate(there, 1) if found != number), len(there) + 1)


def breaks_chain(before: Manifest | None, manifest: Manifest) -> str:
    """What is wrong with the way from a manifest to the next one; nothing where they follow each other.

    Args:
        before: the one numbered one less; None for the first.
    """
    is_chained = manifest.format >= CHAINED_FROM
    if before is None:
        return (
            "" if manifest.previous is None else f"manifest {manifest.number} was written after one that is not there"
        )
    if not is_chained and before.format < CHAINED_FROM:
        return ""
    if manifest.previous == before.xxh3_128 and is_chained:
        return ""
    return f"manifest {before.number} is not the one that manifest {manifest.number} was written after"


def log_hash(committed: Iterable[Manifest], before: str = "") -> str:
    """The hash of a log: it changes with any byte of any manifest.

    Args:
        committed: manifests, in order.
        before: the hash of those that come before them; empty where there are none.
    """
    for manifest in committed:
        before = xxhash.xxh3_128_hexdigest((before + manifest.xxh3_128).encode())
    return before


def read_manifest(path: Path, number: int) -> Manifest:
    """One commit.

    Raises:
        Damaged: it cannot be read, or is another's.
        FileNotFoundError: it is not there.
    """
    try:
        content = read_regular(path)
    except FileNotFoundError:
        if link := links.broken(path):
            raise Damaged(f"manifest {path} cannot be read, since {link}; bring that back") from None
        raise
    manifest = Manifest.from_json(content, path)
    if manifest.number != number:
        raise Damaged(
            f"manifest {path} is number {manifest.number} under another's name; restore it from a copy of the store"
        )
    return manifest


def check_sizes(root: Path, committed: list[Manifest]) -> None:
    """Look whether every committed file is there, as long as it was.

    Raises:
        Damaged: the first that is not, by name, or that is no regular file.
        LimitReached: the system allows this process no more.
    """
    for manifest in committed:
        for file in manifest.files:
            what, path = "", root / file.path
            try:
                found = path.stat()
                if found.st_size != file.bytes:
                    what = f"is {found.st_size:,} bytes long, not {file.bytes:,}"
                if not stat.S_ISREG(found.st_mode):
                    raise Damaged(irregular(path, found.st_mode))
            except (FileNotFoundError, NotADirectoryError):
                what = "is missing"
                if link := links.broken(path):
                    raise Damaged(
                        f"{path} is missing, since {link}; bring that back (mount its disk), or put it in the place of the "
                        f"link: commit {manifest.number} names it"
                    ) from None
            except OSError as error:
                if isinstance(error, Damaged):
                    raise
                if reached := limit_reached(error, f"cannot look at {path}"):
                    raise reached from error
                what = f"cannot be looked at ({error.strerror})"
            if what:
                raise Damaged(f"{path} {what}; commit {manifest.number} names it: restore it from a copy of the store")


def manifest_path(number: int) -> str:
    """Of a commit's manifest, inside the store."""
    return f"{LOG}/{number:08d}.json"


def commit(root: Path, manifest: Manifest, before: Manifest | None = None) -> Manifest:
    """Publish a manifest; when this returns, what it names is there for good.

    Args:
        root: the store.
        manifest: the commit.
        before: the last one of the log; None where there is none.

    Returns:
        The manifest as it was published, chained to the one before it.
    """
    chained = replace(manifest, previous=before.xxh3_128 if before else None)
    file = publish(root, manifest_path(manifest.number), chained.to_json())
    return replace(chained, xxh3_128=file.xxh3_128)


def publish(root: Path, path: str, content: bytes | memoryview) -> File:
    """Publish one file, durably, under a name that nothing has yet.

    Args:
        root: the store.
        path: of the file inside the store, with forward slashes.
        content: its bytes.

    Raises:
        Damaged: the name is taken by other bytes.
        NoRoom: the disk is full; nothing is left under the name.
        Unsupported: the file system has no hard links or no fsync; nothing is left under the name.
    """
    file = File(path, len(content), xxhash.xxh3_128_hexdigest(content))
    target = root / path
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    linked = False
    try:
        make_folder(target.parent)
        write_durably(temporary, content)
        try:
            with relying_on("hard links", target.parent):
                os.link(temporary, target)
            linked = True
        except FileExistsError:
            is_as_long = target.stat().st_size == file.bytes
            if not is_as_long or xxhash.xxh3_128_hexdigest(read_regular(target, file.bytes)) != file.xxh3_128:
                raise Damaged(
                    f"{target} exists with other content, and no commit names it: another writer is at work on this store, "
                    "or left it behind a link; if none is at work, remove that file"
                ) from None
        finally:
            os.unlink(temporary)
        fsync_folder(target.parent)
    except OSError as error:
        for left in (temporary, *[target] * linked):  # a name that may not outlive a power cut is no publication
            with suppress(OSError):
                left.unlink(missing_ok=True)
        if error.errno in DISK_FULL:
            raise NoRoom(
                f"no room for {target} ({len(content):,} bytes): {error.strerror}; free some, then go on"
            ) from error
        say_where(error, target)
        raise
    return file


def say_where(error: OSError, path: Path) -> None:
    """Name the path that a system's error is about; calls on a descriptor know none."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


@contextmanager
def needing_room(path: Path) -> Iterator[None]:
    """Turn the system's error of a full disk into the package's.

    Raises:
        NoRoom: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise NoRoom(f"no room for {error.filename or path}: {error.strerror}; free some, then go on") from error
        say_where(error, path)
        raise


@contextmanager
def relying_on(ability: str, path: Path) -> Iterator[None]:
    """Name what a file system lacks, where it refuses a call for want of it.

    Args:
        ability: one of ABILITIES.
        path: what the call is about.

    Raises:
        Unsupported: it lacks it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in ABILITIES[ability]:
            raise
        raise Unsupported(
            f"the file system of {path} has no {ability} ({error.strerror}), and nothing can be written there that is sure to "
            "stay whole; name a place on another file system"
        ) from error


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a read-only file and wait until the disk has it."""
    left = memoryview(content).cast("B")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        if len(left) >= DIRECT_FROM:
            left = _write_blocks_directly(descriptor, left)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fchmod(descriptor, 0o444)
        sync(descriptor, path)
    finally:
        os.close(descriptor)


def _write_blocks_directly(descriptor: int, content: memoryview) -> memoryview:
    """Write the whole blocks of a page-aligned content straight to the disk, and return what is left to write.

    The copy into the page cache would take more of the processor than all the rest of a commit, and take it from the model
    that runs beside. Where the file system cannot do without it, everything is left.
    """
    o_direct = getattr(os, "O_DIRECT", 0)  # Linux has it
    if not o_direct or np.frombuffer(content, np.uint8).ctypes.data % BLOCK:
        return content
    flags, written, blocks = fcntl.fcntl(descriptor, fcntl.F_GETFL), 0, len(content) // BLOCK * BLOCK
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | o_direct)
        while written < blocks:
            written += os.write(descriptor, content[written:blocks])
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return content[written:]


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each entry on the disk before anything is put inside."""
    if not folder.is_dir():
        make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            what = "a link that leads nowhere" if folder.is_symlink() else "no folder"
            raise Damaged(
                f"{folder} is {what}, where a folder belongs: move it away, or put back what it led to, then go on"
            ) from error
        try:
            fsync_folder(folder.parent)
        except OSError:
            with suppress(OSError):
                folder.rmdir()  # else the next try would take it for durable
            raise


def replace_file(temporary: Path, final: Path) -> None:
    """Put a file in the place of another, if there is one.

    Raises:
        Damaged: a folder stands there.
    """
    try:
        os.replace(temporary, final)
    except IsADirectoryError as error:
        raise Damaged(f"{final} is a folder, where the store has a file: move it away, then go on") from error


def fsync(path: Path) -> None:
    """Wait until the disk has a file's content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor, path)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor, folder)
    finally:
        os.close(descriptor)


def sync(descriptor: int, path: Path) -> None:
    """Wait until the disk has what a descriptor leads to.

    Raises:
        Unsupported: the file system cannot say.
    """
    with relying_on("fsync", path):
        os.fsync(descriptor)


@dataclass(frozen=True)
class Lease:
    """The right to write to a store, while `lease` lasts."""

    root: Path
    descriptor: int
    process: int = field(default_factory=os.getpid)

    def check(self) -> None:
        """Look whether the store is still where it was; what is written elsewhere would belong to no store.

        Raises:
            Damaged: it was moved or removed, or another is in its place.
            BadInput: this process was forked from the one that holds the lease.
        """
        check_process(self.process)
        try:
            is_same = os.path.samestat(os.stat(self.root / LOCK), os.fstat(self.descriptor))
        except OSError:
            is_same = False
        if not is_same:
            raise Damaged(
                f"{self.root} was moved, removed or replaced while it was written; put it back, then run the same command: "
                "what was committed is in it, and it goes on from there"
            )


@contextmanager
def lease(root: Path, wait: float = 0.0) -> Iterator[Lease]:
    """Hold the store for writing; the kernel drops it with the process, however that ends.

    Args:
        wait: seconds to wait for another process that holds it.

    Raises:
        Busy: another process holds it, and did so for all that time; the message says which.
        Unsupported: the file system has no locks.
    """
    deadline = time.monotonic() + wait
    with open(root / LOCK, "a+", encoding="utf-8", errors="backslashreplace", opener=_open_lock) as file:  # any bytes
        while not _taken(file.fileno(), root):
            if not time.monotonic() < deadline:  # NaN waits for nothing
                file.seek(0)
                holder = file.read().strip() or "another process"
                waited = f" (waited {wait:g} s; --wait SECONDS sets how long)" if wait else ""
                raise Busy(f"{root} is being written by {holder}; wait for it or stop it, then go on{waited}")
            time.sleep(LOOK_AGAIN)
        with suppress(OSError):  # a disk may have no room for who holds it, and the lease holds all the same
            _sign(file.fileno())
        held = Lease(root, file.fileno())
        yield held
        with suppress(OSError):
            if os.getpid() == held.process:  # one that was forked leaves the name of the one that still holds it
                os.ftruncate(file.fileno(), 0)


def _open_lock(path: str, flags: int) -> int:
    """Descriptor of the lease's file, made if need be.

    Raises:
        Damaged: something else stands there.
    """
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # a pipe would wait
    except (IsADirectoryError, FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{path} cannot be opened ({error.strerror}); remove what stands there, then go on") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{path} is no regular file; remove it, then go on")
    return descriptor


def wait_until_free(root: Path, wait: float) -> None:
    """Wait until no process holds the store for writing; for work whose end is to write, before it begins.

    Args:
        root: a store; where there is none yet, nothing holds it.
        wait: seconds.

    Raises:
        Busy: another process held it for all that time.
        OSError: the store cannot be written.
    """
    if (root / "store.json").exists():
        with lease(root, wait):
            pass


def _taken(descriptor: int, root: Path) -> bool:
    try:
        with relying_on("locks (flock)", root):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(descriptor: int) -> None:
    """Write into the lease's file who holds it, on one line, whatever the process's arguments."""
    command = " ".join(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]).split())
    os.ftruncate(descriptor, 0)
    os.write(
        descriptor, f"process {os.getpid()} on {socket.gethostname()}: {command}\n".encode(errors="backslashreplace")
    )


def sweep(root: Path, committed: list[Manifest]) -> list[str]:
    """Remove what an interrupted writer left: files under the store's own folders that no manifest names (see `strays`).

    Folders that are empty then go too: one that was made and not fsynced must be made again. Only the holder of the lease
    may call it, and it touches no folder that is not the store's own.

    Returns:
        The paths removed.
    """
    for path in root.glob(".catalog.*.tmp*"):  # one that was never put in place
        discard(path)
    removed = strays(root, committed)
    for stray in removed:
        (root / stray).unlink()
    for place in [root / folder for folder in FOLDERS if not (root / folder).is_symlink()]:
        for at, inner, _ in os.walk(place, topdown=False):
            for name in inner:
                with suppress(OSError):  # not empty, or a link
                    os.rmdir(os.path.join(at, name))
    return removed


def strays(root: Path, committed: Iterable[Manifest]) -> list[str]:
    """Paths inside a store that no manifest names and that lead to none that one names: a sweep removes them.

    A folder that was moved to another disk, with a link in its place, goes on being the store's; what else lies behind the
    link is never removed.
    """
    named = {file.path for manifest in committed for file in manifest.files}
    named |= {manifest_path(manifest.number) for manifest in committed} | {f"{ARRAYS}/zarr.json"}
    return links.unnamed(root, FOLDERS, named)


def discard(path: Path) -> None:
    """Remove what stands under a name, if anything: a file, a link, or a folder and all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def check_room(root: Path, wanted: int, what: str) -> int:
    """Bytes free where the store is (or will be).

    Raises:
        NoRoom: fewer than `wanted` bytes are free.
    """
    existing = root
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < wanted:
        raise NoRoom(
            f"{what} needs {wanted / 1e9:.2f} GB and {existing} has {free / 1e9:.2f} GB free; free some or ask for less"
        )
    return free
