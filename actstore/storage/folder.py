"""A store's folder, held open, so that reads stay in it even if another takes its place."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from actstore.errors import BadInput, Damaged, advised
from actstore.storage.hashing import hash_of
from actstore.storage.local import Local
from actstore.storage.machine import check_process, finalize_here
from actstore.storage.regular import open_regular

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # `s3://`, or what pathlib makes of it


def place(path: str | os.PathLike[str]) -> Path:
    """The folder that a caller names for a store; `~` is the home folder.

    Args:
        path: the caller's text or path.

    Raises:
        BadInput: the argument is not a path, or it addresses another machine.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or not text or "\0" in text:
        raise BadInput(f"got {path!r} for a store; name its folder, such as 'demo.act'")
    if (address := ADDRESS.match(text)) and not os.path.lexists(text):
        here = f"write it as /{text[address.end() :]}" if address[1] == "file" else "copy it here, and name that folder"
        raise BadInput(f"got {text}; a store is a folder of this machine, and {address[1]}: leads to none: {here}")
    return Path(text if os.path.lexists(text) else os.path.expanduser(text))


def check_path(root: Path) -> None:
    """Refuse a path that DuckDB would misread or not find; links to such a path are allowed.

    Raises:
        BadInput: the absolute path holds a `?` (DuckDB ends the path there) or a backslash (DuckDB
            reads a slash), or is not UTF-8.
    """
    path = str(root.absolute())
    wrong = next((f"a path with `{character}` in it" for character in "?\\" if character in path), None)
    if not is_unicode(path):
        wrong = "a path that is not UTF-8"
    if wrong:
        raise BadInput(f"DuckDB cannot open {wrong}, and got {path}; give the store another name, or another folder")


class Folder(Local):
    """A folder whose files are opened by descriptor: a store put in its place is never read.

    Raises:
        OSError: the folder does not exist.
    """

    opens_whole = False  # True if `open` reads the whole file, to check it

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._process = os.getpid()
        self._close = finalize_here(self, os.close, self._descriptor)

    def close(self) -> None:
        """Close the folder's descriptor."""
        self._close()
        self._descriptor = -1  # the number may soon be another file's

    def identity(self) -> tuple[int, int]:
        """Device and inode, by which another process can tell whether it has the same folder.

        Raises:
            BadInput: the folder is closed, or this process was forked after it was opened.
        """
        check_process(self._process)
        if not self._close.alive:
            raise BadInput("the store is closed; open it again")
        about = os.fstat(self._descriptor)
        return about.st_dev, about.st_ino

    def open(self, path: Path) -> int:
        """See open_for_map; takes the whole path, as arrays have it."""
        return self.open_for_map(path.relative_to(self.root).as_posix())

    def open_for_map(self, path: str) -> int:
        """Open a file inside for reading, and return its descriptor.

        Args:
            path: relative to the folder, with forward slashes.

        Raises:
            OSError: the file cannot be opened, see os.open.
            BadInput: this process was forked after the folder was opened.
            Damaged: the path is not a regular file.
        """
        check_process(self._process)
        return open_regular(path, self._descriptor)

    def check(self) -> None:
        """Check that the folder is still what its path leads to.

        Raises:
            Damaged: the folder was moved or removed, or another is in its place.
            BadInput: this process was forked after the folder was opened.
        """
        check_process(self._process)
        try:
            is_same = os.path.samestat(os.stat(self.root), os.fstat(self._descriptor))
        except OSError:
            is_same = False
        if not is_same:
            raise Damaged(f"{self.root} was moved or replaced since it was opened; open the store again")


class CheckedFolder(Folder):
    """A folder that compares each file, whole, with its committed hash when the file is opened.

    A file is hashed when it is first opened, and again when it is opened after it moved or changed.
    Changes under an existing map are not seen. The crc32c of a chunk is not checked, since the
    file's hash covers the same bytes, and since a chunk of another shard has a right crc32c, too.

    Args:
        path: the folder.
        committed: xxh3-128 of each file that may be opened, by its path inside the folder, with
            forward slashes.
    """

    opens_whole = True

    def __init__(self, path: Path, committed: Mapping[str, str]) -> None:
        super().__init__(path)
        self.committed = committed
        self._whole: dict[
            str, tuple[int, int]
        ] = {}  # files that were, and what the system says of one that is unchanged

    def open_for_map(self, path: str) -> int:
        """See Folder.open_for_map.

        Args:
            path: relative to the folder, with forward slashes.

        Raises:
            Damaged: the file is not what was committed.
        """
        descriptor = super().open_for_map(path)
        try:
            self._check_hash(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_hash(self, descriptor: int, path: str) -> None:
        about = os.fstat(descriptor)
        state = about.st_ino, about.st_ctime_ns
        if self._whole.get(path) == state:
            return
        if hash_of(descriptor) != self.committed.get(path):
            raise Damaged(
                f"{self.root / path} is not what was committed (its hash is another): look with "
                f"{advised('verify', self.root)}, then mend it with {advised('repair', self.root)}"
            )
        self._whole[path] = state


def is_unicode(text: str) -> bool:
    """False if a text holds a surrogate, as arguments and paths that are not UTF-8 do."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
