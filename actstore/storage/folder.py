"""A store's folder, held open: what is read from it stays its own, whatever takes its place meanwhile."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from actstore.cli.terminal import is_unicode
from actstore.commits.log import ARRAYS, FOLDERS, FORMAT_VERSION, LOG, PARTS, Manifest
from actstore.errors import BadInput, Damaged, NotStored, TooNew, TooOld, advised
from actstore.storage import links, sealed
from actstore.storage.content import Positive, Text, as_a, json_object
from actstore.storage.hashing import hash_of
from actstore.storage.machine import check_process, finalize_here, within_limits
from actstore.storage.regular import open_regular, read_regular

MOST_BESIDE = 100  # stores that are looked at for a name like one that is not there
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # `s3://`, or what pathlib makes of it


@dataclass(frozen=True)
class About:
    """What store.json says, of any format."""

    format: Positive
    made_by: Text = "an unknown version"


WITHOUT_CHECKSUM = {"format", "made_by", "made_at"}  # what store.json holds where a development version made it


def place(path: str | os.PathLike[str]) -> Path:
    """The folder that a caller names for a store; `~` is the home folder.

    Raises:
        BadInput: it is no path, or the address of another machine.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or not text or "\0" in text:
        raise BadInput(f"got {path!r} for a store; name its folder, such as 'demo.act'")
    if (address := ADDRESS.match(text)) and not os.path.lexists(text):
        here = f"write it as /{text[address.end() :]}" if address[1] == "file" else "copy it here, and name that folder"
        raise BadInput(f"got {text}; a store is a folder of this machine, and {address[1]}: leads to none: {here}")
    return Path(text if os.path.lexists(text) else os.path.expanduser(text))


def check_format(root: Path, older: bool = False) -> dict[str, Any]:
    """The content of a store's store.json.

    Args:
        older: whether an earlier version's store will do.

    Raises:
        BadInput: DuckDB cannot open a path like this one.
        NotStored: the folder is no store.
        TooNew: a later version of actstore made it.
        TooOld: an earlier one did.
        Damaged: store.json cannot be read.
    """
    check_path(root)
    content = b""
    try:
        with within_limits(f"cannot read {root / 'store.json'}"):
            content = read_regular(root / "store.json")
        about = json_object(content)
        if "format" not in about:
            raise ValueError("it has no format")
    except (FileNotFoundError, NotADirectoryError):
        raise _no_store(root) from None
    except ValueError as error:
        raise Damaged(f"{root / 'store.json'} cannot be read ({error}); {_mend(root, content)}") from error
    try:
        described = as_a(About, about)
    except ValueError as error:
        raise Damaged(
            f"{root / 'store.json'} names no format, or no maker ({error}); {_mend(root, content)}"
        ) from error
    version, maker = described.format, described.made_by
    if not about.keys() <= WITHOUT_CHECKSUM and not sealed.is_whole(content):
        raise Damaged(
            f"{root / 'store.json'} is not what was written (its checksum does not match); {_mend(root, content)}"
        )
    if version < FORMAT_VERSION and not older:
        raise TooOld(
            f"{root} has format {version}, made by {maker}; this version "
            f"reads it as it is, and writes format {FORMAT_VERSION} alone: bring it up to date with "
            f"{advised('repair', root)}, which keeps all that it holds"
        )
    if version > FORMAT_VERSION:
        raise TooNew(
            f"{root} has format {version}, made by {maker}; this version reads format "
            f"{FORMAT_VERSION}: install the version that made it, or a later one"
        )
    return about


def _no_store(root: Path) -> NotStored:
    """Says which store is near, if only by its name, and else how to make one."""
    around = store_around(root)
    if around and around != Path(os.path.realpath(root)):
        return NotStored(f"{root} lies in a store; name the store itself, {around}")
    what = "is no actstore store (it has no store.json)" if root.exists() else "does not exist"
    with suppress(OSError):
        beside = [folder.parent.name for folder in islice(root.absolute().parent.glob("*/store.json"), MOST_BESIDE)]
        if near := get_close_matches(root.name, beside, 1, cutoff=0.75):
            return NotStored(f"{root} {what}; did you mean {root.with_name(near[0])}, beside it?")
    return NotStored(f"{root} {what}; make one with {advised('ingest', root, '--model', 'reproduction')}")


def _mend(root: Path, content: bytes) -> str:
    """What to do about a store.json that is not whole: of what repair cannot mend, a copy alone will do."""
    if sealed.flipped_back(content) is None:
        return "it cannot be made again: restore it from a copy of the store"
    return f"mend it with {advised('repair', root)}"


def check_path(root: Path) -> None:
    """Refuse a path whose files DuckDB would look for elsewhere, or not find; links that lead there are no matter.

    Raises:
        BadInput: the path, made absolute, holds a `?` (for DuckDB its end) or a backslash (a slash), or is not UTF-8.
    """
    path = str(root.absolute())
    wrong = next((f"a path with `{character}` in it" for character in "?\\" if character in path), None)
    if not is_unicode(path):
        wrong = "a path that is not UTF-8"
    if wrong:
        raise BadInput(f"DuckDB cannot open {wrong}, and got {path}; give the store another name, or another folder")


def store_around(path: Path) -> Path | None:
    """The store that a path is, or lies in, after links and `..`; None outside any. A damaged store counts."""
    place = Path(os.path.realpath(path))
    return next((folder for folder in (place, *place.parents) if _looks_like_a_store(folder)), None)


def _looks_like_a_store(folder: Path) -> bool:
    described = os.path.lexists(folder / "store.json") or os.path.lexists(folder / "catalog.duckdb")
    return described and any((folder / name).is_dir() for name in (LOG, PARTS, ARRAYS))


def led_astray(root: Path, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(link, what is wrong with it) of those on the way to files of a store that lead into another store."""
    for place in links.linked(root, paths):
        around = store_around(root / place)
        if around is not None and around != Path(os.path.realpath(root)):
            yield place, f"it leads into another store, {around}"


def refuse_astray(root: Path, committed: Iterable[Manifest]) -> None:
    """Look where links lead, before anything is written or removed.

    Raises:
        Damaged: a link on the way to a committed file leads nowhere, or into another store.
    """
    paths = [*FOLDERS, *(file.path for manifest in committed for file in manifest.files)]
    for place in links.linked(root, paths):
        if what := links.broken(root / place):
            raise Damaged(
                f"{what}; bring that back (mount its disk), or put it in the place of the link: nothing was touched"
            )
    for place, what in led_astray(root, paths):
        raise Damaged(f"{root / place} is a link: {what}; put the store's own files in its place: nothing was touched")


class Folder:
    """A folder that files are opened in by descriptor, so that a store put in its place is never read for it.

    Raises:
        OSError: there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._process = os.getpid()
        self._close = finalize_here(self, os.close, self._descriptor)

    def close(self) -> None:
        self._close()
        self._descriptor = -1  # the number may soon be another file's

    def identity(self) -> tuple[int, int]:
        """Device and inode, by which another process can tell whether it has the same folder.

        Raises:
            BadInput: the folder is closed, or this process was forked since it was opened.
        """
        check_process(self._process)
        if not self._close.alive:
            raise BadInput("the store is closed; open it again")
        about = os.fstat(self._descriptor)
        return about.st_dev, about.st_ino

    def open(self, path: Path) -> int:
        """The descriptor of a file inside, to be read; as os.open raises where there is none.

        Raises:
            BadInput: this process was forked since the folder was opened.
            Damaged: what is there is no regular file.
        """
        check_process(self._process)
        return open_regular(path.relative_to(self.path), self._descriptor)

    def read(self, path: Path) -> bytes:
        """The content of a file inside; raises as `open`."""
        with os.fdopen(self.open(path), "rb") as file:
            return file.read()

    def check(self) -> None:
        """Look whether the folder is still what its path leads to.

        Raises:
            Damaged: it was moved or removed, or another is in its place.
            BadInput: this process was forked since it was opened.
        """
        check_process(self._process)
        try:
            is_same = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            is_same = False
        if not is_same:
            raise Damaged(f"{self.path} was moved or replaced since it was opened; open the store again")


class CheckedFolder(Folder):
    """A folder whose files are held against the hashes they were committed with: each whole, when it is first opened.

    A file that changes its place or its content is hashed again when it is opened again; what changes under a map that is
    there already is not seen. The crc32c of a chunk is not looked at beside the hash of the file: it is of the same bytes,
    and a chunk of another shard has a right one, too.

    Args:
        path: of the folder.
        committed: xxh3-128 of each file that may be opened, by its path inside the folder, with forward slashes.
    """

    def __init__(self, path: Path, committed: Mapping[str, str]) -> None:
        super().__init__(path)
        self.committed = committed
        self._whole: dict[
            str, tuple[int, int]
        ] = {}  # files that were, and what the system says of one that is unchanged

    def open(self, path: Path) -> int:
        """As Folder.open.

        Raises:
            Damaged: the file is not what was committed.
        """
        descriptor = super().open(path)
        try:
            self._check_hash(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_hash(self, descriptor: int, path: Path) -> None:
        name, about = path.relative_to(self.path).as_posix(), os.fstat(descriptor)
        state = about.st_ino, about.st_ctime_ns
        if self._whole.get(name) == state:
            return
        if hash_of(descriptor) != self.committed.get(name):
            raise Damaged(
                f"{path} is not what was committed (its hash is another): look with "
                f"{advised('verify', self.path)}, then mend it with {advised('repair', self.path)}"
            )
        self._whole[name] = state
