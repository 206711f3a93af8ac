"""Merge stores into a new one: shards as they are, rows with new ids where ids would meet.

The first store keeps its ids. The datasets of each further store get the ids after those before,
unless the same dataset is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from actstore.commits import checkpoint, log
from actstore.commits.format import check_format, part_path
from actstore.commits.manifest import Manifest, Part, Shard
from actstore.errors import BadInput, Damaged
from actstore.storage.at import at, check_room, place
from actstore.storage.backend import File
from actstore.storage.several import several
from actstore.upkeep.merge_plan import Commit, Source, planned
from actstore.writing.create import create, is_store
from actstore.writing.parts import as_parquet

Advance = Callable[[int, int], None]  # bytes done so far, bytes of all files
Rename = tuple[str | Path, str, str, str]  # a store, `run`, `dataset` or `label`, its name there, its new name


@dataclass(frozen=True)
class Merge:
    """What was merged.

    Attributes:
        out: the new store.
        commits: number of its commits.
        n_files: number of its files, without manifests.
        n_bytes: size of these files.
        shared: what several of the stores hold and the new one holds once: `dataset d`, `run r`,
            `label l`.
    """

    out: Path
    commits: int
    n_files: int
    n_bytes: int
    shared: list[str]


def merge(
    paths: Sequence[str | Path],
    out: str | Path,
    rename: Sequence[Rename] = (),
    advance: Advance = lambda done, total: None,
) -> Merge:
    """Merge stores, each at its present commit; the new store appears whole or not at all.

    Args:
        paths: the stores, two or more, which are only read. The first keeps its ids.
        out: the new store.
        rename: (store, `run`, `dataset` or `label`, its name there, its name in the new store).
        advance: called with the bytes done so far and the bytes of all files.

    Raises:
        NotStored: there is no store, or none of the name that is to be renamed.
        TooOld, TooNew: another version made a store.
        BadInput: `out` is a store, or can become none; or two stores hold something else under one
            name, and the message says how to rename it.
        Damaged: a file is not what was committed; nothing is left of the new store.
        NoRoom: the disk is full.
    """
    roots, target = [place(path) for path in paths], place(out)
    if len(roots) < 2:
        raise BadInput(f"got {len(roots)} store to merge; give two or more, and then the new store")
    for root in roots:
        check_format(root)
    if is_store(target):
        raise BadInput(f"{target} is a store already; name a new one, which the merge makes")
    plan = planned(roots, target, [(place(store), *names) for store, *names in rename])
    files = [each for commit in plan.commits for each in commit.files]
    total = sum(file.bytes for *_, file in files)
    near = {root for root in roots if at(target).shares(at(root))}
    copied = [each for each in files if each[0].root not in near or each[0].is_changed(*each[1:])]
    check_room(target, sum(file.bytes for *_, file in copied), "the merge")

    n_bytes = 0

    def fill(new: Path) -> None:
        nonlocal n_bytes
        done, before = 0, None
        at_once = max(at(root).at_once for root in (*roots, new))
        every = [(commit, *each) for commit in plan.commits for each in commit.files]
        with closing(
            several(lambda each: _written(new, *each), every, at_once, lambda each: each[-1].bytes)
        ) as published:
            for commit in plan.commits:
                written = list[File]()
                for *_, file in commit.files:
                    written.append(next(published))
                    n_bytes += written[-1].bytes
                    done += file.bytes
                    advance(done, total)
                before = log.commit(new, _manifest(commit, written), before)
        checkpoint.write(new, log.manifests(new))

    create(target, fill=fill)
    return Merge(target, len(plan.commits), len(files), n_bytes, list(plan.shared))


def _manifest(commit: Commit, files: Sequence[File]) -> Manifest:
    """The manifest of a commit of the new store, not yet chained."""
    parts = [file for file in files if isinstance(file, Part)]
    shards = [file for file in files if isinstance(file, Shard)]
    others = [file for file in files if not isinstance(file, Part | Shard)]
    run = commit.source.moved.names.run.get(commit.manifest.run or "", commit.manifest.run)
    return Manifest(commit.number, commit.manifest.kind, run, commit.manifest.batch, parts, shards, others)


def _written(new: Path, commit: Commit, source: Source, manifest: Manifest, file: File) -> File:
    """Publish one file in the new store, with new ids and names."""
    moved, path, rows = source.moved, source.moved.path(manifest, file), None
    if source.is_changed(manifest, file):
        if isinstance(file, Part):
            rows = source.part(manifest, file)
            if file.table == "results":
                rows = rows.with_columns(recorded=pl.lit(commit.number, pl.Int32))
                path = part_path("results", f"{commit.number:08d}")
            published = at(new).publish(path, as_parquet(file.table, rows))
        else:
            published = at(new).publish(path, source.metadata(file))
    else:
        try:
            published = at(new).adopt(path, at(source.root), file)
        except (FileNotFoundError, NotADirectoryError, Damaged):
            raise source.damaged(file) from None
    if isinstance(file, Shard):
        return moved.shard(file, published)
    if not isinstance(file, Part):
        return published
    owner = f"{commit.number:08d}" if file.table == "results" else moved.owner(manifest, file)
    n_rows, first = file.rows if rows is None else len(rows), moved.sequence_id(file.first_tree_id)
    table = moved.table(manifest, file.table)
    return Part(
        **vars(published),
        table=table,
        rows=n_rows,
        owner=owner,
        batch=moved.batch(manifest, file),
        first_tree_id=first,
        n_trees=file.n_trees,
    )
