"""The log of commits: files are published once, and the manifest that names them is the commit.

A file is written to a temporary name, fsynced, and `link()`ed to its own name. `link` fails if the
name exists, so the first writer wins. Then the folder is fsynced. The manifest is published last,
in the same way. It lists every file of the commit with size and xxh3-128 hash. A file that no
manifest names does not exist. A lease keeps a second writer out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from actstore.commits import pending
from actstore.commits.format import ARRAYS, CHAINED_FROM, FOLDERS, LOG, SWAPPED, store_around
from actstore.commits.manifest import MANIFEST, Dropped, Manifest, manifest_path
from actstore.errors import ActstoreError, Damaged, advised
from actstore.storage.at import at
from actstore.storage.machine import limit_reached
from actstore.storage.several import several


def manifests(root: Path, after: int = 0, least: int = 0) -> list[Manifest]:
    """The commits numbered after+1 and later, in order.

    Args:
        after: number of commits that the caller knows already.
        least: number of commits that the catalog holds; with fewer, the log was cut short.

    Raises:
        Damaged: a manifest is missing, cannot be read, has another number than its name, or does
            not follow the one before it.
    """
    there = numbers(root)
    last = max([*there[-1:], least])
    if (gap := first_gap(there)) <= last:
        if link := at(root).broken(LOG):
            raise Damaged(f"{root / LOG} lacks manifest {gap} of {last}, since {link}; bring that back")
        unless = f", or, if the catalog only says that it was there, run {advised('repair', root)}" * (gap > len(there))
        what = f"lacks manifest {gap} of {last}{foreign(root, there, gap) if gap > least else ''}"
        raise Damaged(f"{root / LOG} {what}; restore it from a copy of the store{unless}")
    return chained(root, after, last)


def foreign(root: Path, there: list[int], gap: int) -> str:
    """What to do if the first file after a gap is not the store's; "" if no file follows the gap.

    Args:
        there: see `numbers`.
        gap: see `first_gap`; the catalog holds fewer commits.
    """
    after = next((number for number in there if number > gap), None)
    return (
        "" if after is None else f" (if no commit of the store wrote {root / manifest_path(after)}, remove that file)"
    )


def chained(root: Path, after: int, last: int) -> list[Manifest]:
    """The commits numbered after+1 to last, in order, without a look at what else is in the log.

    Raises:
        Damaged: a manifest cannot be read, has another number than its name, or does not follow
            the one before it.
        FileNotFoundError: a manifest is missing.
    """
    found: list[Manifest] = []
    before = read_manifest(root, after) if after else None
    wanted = range(after + 1, last + 1)
    known = at(root).ahead([manifest_path(number) for number in wanted])
    for number in wanted:
        manifest = read_manifest(root, number, known.get(manifest_path(number)))
        if what := breaks_chain(before, manifest):
            raise Damaged(f"{root / LOG}: {what}; restore it from a copy of the store")
        found.append(manifest)
        before = manifest
    return found


def numbers(root: Path) -> list[int]:
    """Numbers in the names of the log's files, in order; gaps and large numbers are possible."""
    paths = at(root).list(f"{LOG}/")
    named = ((int(path[len(LOG) + 1 : -5]), path) for path in paths if MANIFEST.fullmatch(path[len(LOG) + 1 :]))
    return sorted(number for number, path in named if manifest_path(number) == path)


def first_gap(there: list[int]) -> int:
    """The first number from 1 on that is missing among the sorted numbers given."""
    return next((number for number, found in enumerate(there, 1) if found != number), len(there) + 1)


def breaks_chain(before: Manifest | None, manifest: Manifest) -> str:
    """What is wrong between a manifest and the one before it; "" if they follow each other.

    Args:
        before: the manifest numbered one less; None before the first.
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


def live(committed: Sequence[Manifest]) -> list[Manifest]:
    """The commits without the files that a later one of them dropped; the number of each stays.

    What else the commits of a dropped run brought, rows of its dataset, say, stays. These commits
    then bear no run, so that a run of the same name is another. Whoever asks which files or rows
    are stored asks for these; the log itself (numbers, chain, hash) is that of all commits.
    """
    found = list(committed)
    for place, manifest in enumerate(committed):
        if manifest.dropped:
            found[:place] = [_without(earlier, manifest.dropped) for earlier in found[:place]]
    return found


def _without(manifest: Manifest, dropped: Dropped) -> Manifest:
    gone = set(dropped.files)
    run = None if dropped.kind == "run" and dropped.name == manifest.run else manifest.run
    if run == manifest.run and gone.isdisjoint(file.path for file in manifest.files):
        return manifest
    return replace(
        manifest,
        run=run,
        parts=[part for part in manifest.parts if part.path not in gone],
        shards=[shard for shard in manifest.shards if shard.path not in gone],
        others=[file for file in manifest.others if file.path not in gone],
    )


def log_hash(committed: Iterable[Manifest], before: str = "") -> str:
    """The hash of a log; it changes with any byte of any manifest.

    Args:
        committed: manifests, in order.
        before: the hash of the manifests before those; "" if there are none.
    """
    for manifest in committed:
        before = xxhash.xxh3_128_hexdigest((before + manifest.xxh3_128).encode())
    return before


def read_manifest(root: Path, number: int, content: bytes | None = None) -> Manifest:
    """Read one manifest.

    Args:
        number: the number that it must have.
        content: its bytes; default: those of the file.

    Raises:
        Damaged: the file cannot be read, or has another number.
        FileNotFoundError: the file does not exist.
    """
    place, name = at(root), manifest_path(number)
    path = root / name
    try:
        content = place.read(name) if content is None else content
    except FileNotFoundError:
        if link := place.broken(name):
            raise Damaged(f"manifest {path} cannot be read, since {link}; bring that back") from None
        raise
    manifest = Manifest.from_json(content, path)
    if manifest.number != number:
        raise Damaged(
            f"manifest {path} is number {manifest.number} under another's name; restore it from a copy of the store"
        )
    return manifest


def check_sizes(root: Path, committed: list[Manifest]) -> None:
    """Check that every committed file exists and has its committed size, but for dropped ones.

    Raises:
        Damaged: names the first file that is missing, has another size, or is not a regular file.
        LimitReached: the system allows this process no more open files or memory.
    """
    place, there = at(root), live(committed)
    known = place.sizes([file.path for manifest in there for file in manifest.files])
    for manifest in there:
        for file in manifest.files:
            what = ""
            try:
                size = known[file.path] if file.path in known else place.size(file.path)
                if size != file.bytes:
                    what = f"is {size:,} bytes long, not {file.bytes:,}"
            except (FileNotFoundError, NotADirectoryError):
                what = "is missing"
                if link := place.broken(file.path):
                    raise Damaged(
                        f"{root / file.path} is missing, since {link}; bring that back (mount its disk), or put it in the "
                        f"place of the link: commit {manifest.number} names it"
                    ) from None
            except OSError as error:
                if isinstance(error, ActstoreError):
                    raise
                if reached := limit_reached(error, f"cannot look at {root / file.path}"):
                    raise reached from error
                what = f"cannot be looked at ({error.strerror})"
            if what:
                raise Damaged(
                    f"{root / file.path} {what}; commit {manifest.number} names it: restore it from a copy of the store"
                )


def commit(root: Path, manifest: Manifest, before: Manifest | None = None) -> Manifest:
    """Publish a manifest; when this returns, the commit is there for good.

    Args:
        manifest: the commit.
        before: the last manifest of the log; None if the log is empty.

    Returns:
        The manifest as it was published, chained to the one before it.
    """
    chained = replace(manifest, previous=before.xxh3_128 if before else None)
    file = at(root).publish(manifest_path(manifest.number), chained.to_json())
    return replace(chained, xxh3_128=file.xxh3_128)


def sweep(root: Path, committed: list[Manifest]) -> list[str]:
    """Remove files under the store's own folders that no manifest names; see `strays`.

    An interrupted writer leaves such files, and so does a drop. Empty folders are removed too,
    since a folder that was made and not fsynced must be made again. Only the holder of the lease
    may call this. Folders that are not the store's own are not touched.

    Returns:
        The paths removed.
    """
    place, removed = at(root), strays(root, committed)
    for _ in several(place.delete, removed, place.at_once):
        pass
    place.tidy(SWAPPED, () if pending.is_open(root, live(committed)) else FOLDERS)
    return removed


def strays(root: Path, committed: Sequence[Manifest]) -> list[str]:
    """Paths inside a store that no manifest names, or that were dropped.

    None of them leads to a named file. What slices of a run may still write is left out, see
    pending.py.

    A folder that was moved to another disk, with a link in its place, still belongs to the store.
    Other files behind the link are never listed.
    """
    named = {file.path for manifest in live(committed) for file in manifest.files}
    named |= {manifest_path(manifest.number) for manifest in committed} | {f"{ARRAYS}/zarr.json"}
    is_kept = pending.kept(root, live(committed))
    return [path for path in at(root).unnamed(FOLDERS, named) if not is_kept(path)]


def led_astray(root: Path, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(link, what is wrong with it) for links on the way to files that lead into another store."""
    for place in at(root).linked(paths):
        around = store_around(root / place)
        if around is not None and around != Path(os.path.realpath(root)):
            yield place, f"it leads into another store, {around}"


def refuse_astray(root: Path, committed: Sequence[Manifest]) -> None:
    """Check where links lead, before anything is written or removed.

    Raises:
        Damaged: a link on the way to a committed file leads nowhere, or into another store.
    """
    paths = [*FOLDERS, *(file.path for manifest in live(committed) for file in manifest.files)]
    links = at(root).linked(paths)
    for place in links:
        if what := at(root).broken(place):
            raise Damaged(
                f"{what}; bring that back (mount its disk), or put it in the place of the link: nothing was touched"
            )
    for place, what in led_astray(root, links):
        raise Damaged(f"{root / place} is a link: {what}; put the store's own files in its place: nothing was touched")
