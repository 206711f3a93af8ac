"""Links on the way to a committed file: a store's folder may be a link to another disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

MOST = 40  # links that the system follows per path (Linux: MAXSYMLINKS)


def way(path: str) -> Iterator[str]:
    """Every name that the system looks up on the way to a file, as absolute paths.

    Args:
        path: absolute; links are followed.

    Yields:
        Each path, its own folder resolved.
    """
    left, at, n_links = path.split("/")[::-1], "/", 0
    while left:
        name = left.pop()
        if name in ("", "."):
            continue
        at = os.path.dirname(at) if name == ".." else os.path.join(at, name)
        yield at
        try:
            target = os.readlink(at)
        except (OSError, ValueError):
            continue
        n_links += 1
        if n_links > MOST:
            return
        left += target.split("/")[::-1]
        at = "/" if target.startswith("/") else os.path.dirname(at)


def broken(path: Path) -> str:
    """Describe the link on the way to a file that leads nowhere; "" if there is none."""
    for place in way(os.path.abspath(path)):
        if os.path.islink(place) and not os.path.exists(place):
            return f"{place} is a link to {os.readlink(place)}, which is not there"
    return ""


def linked(root: Path, paths: Iterable[str]) -> list[str]:
    """Those of some paths in a store, and of the folders above, that are links; outermost first."""
    places: set[str] = set()
    for path in paths:
        while path and path not in places:
            places.add(path)
            path = path.rpartition("/")[0]
    top = f"{root}/"  # not Path, which takes longer than the system
    return sorted(place for place in places if os.path.islink(top + place))


def unnamed(root: Path, folders: Iterable[str], named: Iterable[str]) -> list[str]:
    """Files and links in some folders of a store that are not on the way to a named path.

    No link is entered, since its target may belong to others.

    Args:
        folders: folders of the store.
        named: paths inside the store, with forward slashes.

    Returns:
        Paths inside the store, sorted.
    """
    top, folders, named = os.path.realpath(root), list(folders), set(named)
    kept = {f"{top}/{path}" for path in named}
    links = [f"{top}/{folder}" for folder in folders if os.path.islink(f"{top}/{folder}")]
    entered = [place for folder in folders if (place := f"{top}/{folder}") not in links]
    found = [path for place in entered for path in _files(place, links)]
    inside = tuple(f"{folder}/" for folder in folders)
    if links or not all(path.startswith(inside) for path in named):
        kept = {place for path in kept for place in way(path)}
    return sorted(path[len(top) + 1 :] for path in found if path not in kept)


def remove_empty(folder: str) -> bool:
    """Remove the folders in a folder that hold no file; True if the folder itself holds none.

    A link is like a file, and is not entered.
    """
    is_empty = True
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False) and remove_empty(entry.path):
                try:
                    os.rmdir(entry.path)
                except OSError:  # not empty any more, or another's
                    is_empty = False
            else:
                is_empty = False
        return is_empty
    return False


def _files(folder: str, links: list[str]) -> Iterator[str]:
    """Paths of the files and links in a folder and in the folders below it; no link is entered.

    Args:
        folder: no link.
        links: gets the links among them.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, links)
                continue
            if entry.is_symlink():
                links.append(entry.path)
            yield entry.path
