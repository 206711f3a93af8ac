"""Write a user's files whole or not at all, outside every store; printable text; progress."""

from __future__ import annotations

import os
import shutil
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actstore.commits.format import store_around
from actstore.errors import BadInput
from actstore.storage.at import is_unicode
from actstore.storage.refused import needing_room
from actstore.storage.whole import beside, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (".png", ".svg", ".pdf")
CAPTION = ".txt"  # of the file beside a figure

# Shows progress, as `actstore.progress` does. Called with (name, total or None, unit in the plural)
# per piece of work; yields a function to call with the units done and, optionally, the total and
# the part just done.
Work = Callable[[str, int | None, str], AbstractContextManager[Callable[..., None]]]


@dataclass(frozen=True)
class Exported:
    """What `Store.export` has written.

    Attributes:
        out: the file or folder.
        format: saelens, parquet or npy.
        n_tokens: rows of activations that were written.
        n_left_out: tokens after the last whole row of a dataset.
        shape: of one token's activation, as written.
        context: tokens per row of a dataset; None for a file.
        n_not_finite: rows that were written and hold a NaN or an infinity.
    """

    out: Path
    format: str
    n_tokens: int
    n_left_out: int
    shape: tuple[int, ...]
    context: int | None
    n_not_finite: int

    def __str__(self) -> str:
        """One line for a person to read."""
        said = f"{self.out}: {self.n_tokens:,} tokens of {list(self.shape)}"
        if self.context is not None:
            said += f", {self.context} to a row"
        if self.n_left_out:
            said += f"; the last {self.n_left_out:,} fill no row and are left out"
        if self.n_not_finite:
            said += f"; {self.n_not_finite:,} rows hold a NaN or an infinity"
        return said


def silent(what: str, total: int | None, unit: str) -> AbstractContextManager[Callable[..., None]]:
    """A Work that shows nothing."""
    return nullcontext(lambda *done: None)


def save_figure(path: str | Path, figure: Figure, dpi: float | None = None) -> None:
    """Write a figure, whole or not at all, in the format of the file's ending (one of FIGURES)."""
    kind = Path(path).suffix.removeprefix(".")
    replacing(path, lambda target: figure.savefig(target, format=kind, dpi=dpi or "figure"))


def save_pages(path: str | Path, figures: Iterable[Figure]) -> None:
    """Write figures as the pages of a .pdf, whole or not at all."""
    from matplotlib.backends.backend_pdf import PdfPages

    def write(target: Path) -> None:
        with PdfPages(target) as pages:
            for figure in figures:
                pages.savefig(figure)

    replacing(path, write)


def check_file(path: str | Path | None, option: str, endings: Sequence[str] = (), make: bool = False) -> None:
    """Refuse a file that cannot or must not be written, before any work is done for it.

    Args:
        path: the file; None if no file is asked for.
        endings: the endings allowed; default: any.
        make: True if the file's folder will be made.

    Raises:
        BadInput: the ending is not allowed, the file lies in a store, or no file can be written
            there.
    """
    if path is None:
        return
    check_ending(str(path), endings, option)
    target, got = Path(os.path.realpath(path)), f"got {option} {path}"
    _check_unicode(path, got)
    _check_folder(Path(path).parent, got, make)
    if around := store_around(target):
        raise BadInput(f"{got}, which leads into the store {around}; name a file outside it")
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise BadInput(f"{got}: {error.strerror}; name another file") from error
    if not stat.S_ISREG(mode):
        raise BadInput(f"{got}, which is {'a folder' if stat.S_ISDIR(mode) else 'no plain file'}; name a file")


def check_folder(path: str | Path, option: str) -> None:
    """Refuse a folder as check_file refuses a file; the folder need not exist.

    Raises:
        BadInput: the path lies in a store, is not a folder, or cannot be written.
    """
    _check_folder(Path(path), f"got {option} {path}", make=True)


def check_new_folder(path: str | Path, option: str) -> None:
    """Refuse a folder that cannot be made; an empty folder may be there.

    Raises:
        BadInput: the path lies in a store, is taken, or cannot be written.
    """
    check_folder(path, option)
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise BadInput(f"got {option} {path}, which is there; name a new folder, or remove that one")
    _check_folder(Path(os.path.realpath(path)).parent, f"got {option} {path}", make=False)


@contextmanager
def making_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder whole or not at all: filled next to its place, then renamed into place.

    Args:
        path: the new folder; see check_new_folder.

    Yields:
        The empty folder to fill.

    Raises:
        BadInput: as check_new_folder.
        NoRoom: the disk is full.
    """
    check_new_folder(path, "the folder")
    target = Path(os.path.realpath(path))
    under_way = beside(target)
    with needing_room(target):
        under_way.mkdir()
        try:
            yield under_way
            os.rename(under_way, target)
        except BaseException:
            shutil.rmtree(under_way, ignore_errors=True)
            raise


def _check_unicode(path: str | Path, got: str) -> None:
    if not is_unicode(os.path.realpath(path)):
        raise BadInput(f"{got}, a path that is not UTF-8, which not every library can write to; name another place")


def _check_folder(path: Path, got: str, make: bool) -> None:
    folder = Path(os.path.realpath(path))
    _check_unicode(folder, got)
    if around := store_around(folder):
        raise BadInput(f"{got}, which lies in the store {around}; name a place outside it")
    while make and not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        what = "is no folder" if os.path.lexists(folder) else "is not there"
        raise BadInput(f"{got}, and the folder {folder} {what}; make it, or name another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"{got}, and the folder {folder} cannot be written; name another place")


def check_ending(path: str | None, endings: Sequence[str], option: str) -> None:
    """Refuse a file's ending, before any work is done for the file.

    Args:
        endings: the endings allowed.

    Raises:
        BadInput: names the endings allowed.
    """
    if path and endings and Path(path).suffix not in endings:
        raise BadInput(f"got {option} {path}; a file ends in {', '.join(endings)}")


def replacing(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: next to its place, durably, then renamed into place.

    Args:
        path: the file; an existing file is replaced, and a link is followed.
        write: takes the path to write to, which has no ending.

    Raises:
        BadInput: the file lies in a store, or no file can be written there.
        NoRoom: the disk is full.
    """
    check_file(path, "the file")
    target = Path(os.path.realpath(path))
    with needing_room(target):
        write_whole(target, write, surely=False)


def write_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all; raises as `replacing` does."""
    replacing(path, lambda target: target.write_text(text, encoding="utf-8"))


STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's control, format, surrogate, line and paragraph separator


def printable(text: str) -> str:
    """Escape control characters (ESC as `\\x1b`); line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(_written_out(character) for character in text)


def _written_out(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in STEERING:
        return character
    return character.encode("unicode_escape").decode()
