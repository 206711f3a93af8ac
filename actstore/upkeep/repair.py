"""Repair a store: make damaged files again, and replace a file only by exactly the committed bytes.

A store of an earlier version is brought up to date on the way: its catalog is built with today's
tables from its own parts.

Rows come from the catalog if the catalog is whole. Activations come from the run's own weights over
its own trees, and so do rows without a catalog. Without a catalog, the rows of a definition follow
from the rest of the store (see ingest/replay/definitions.py). The catalog comes from the parts.
Manifests and store.json cannot be made again, since they say how all else must be; but a single
flipped bit is found by their checksums, and flipped back.

What slices of a run published and nobody committed is committed where it is whole. The rest is
freed, unless a slice of the run is still at work. Both wait until nothing is damaged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import xxhash

from actstore.catalog import build, part_types, tables, witness
from actstore.catalog.declared import Relation, parsed
from actstore.commits import checkpoint, log, pending
from actstore.commits.format import ARRAYS, FOLDERS, FORMAT_VERSION, WEIGHTS, check_format
from actstore.commits.log import refuse_astray
from actstore.commits.manifest import Manifest, Part
from actstore.errors import Damaged, advised
from actstore.storage import sealed
from actstore.storage.at import at, place
from actstore.storage.backend import File, Held
from actstore.upkeep.verify import Advance, Finding, read_manifests, verify_files
from actstore.upkeep.verify_catalog import CONFLICT
from actstore.writing.parts import GROUP, as_parquet
from actstore.writing.slices import take
from actstore.writing.writer import Writer

Recompute = Callable[
    [Path, list[Manifest], str, int | None], dict[str, bytes]
]  # root, commits, run, batch → path → bytes


@dataclass(frozen=True)
class Repair:
    """What a repair has done.

    Attributes:
        mended: paths whose committed bytes are restored.
        left: files that could not be mended, and why.
        snapshot: number of commits in the catalog.
    """

    mended: list[str]
    left: list[Finding]
    snapshot: int


def repair(
    path: str | Path, recompute: Recompute, advance: Advance = lambda done, total: None, wait: float = 0.0
) -> Repair:
    """Verify a store, mend what is damaged, and rebuild its catalog.

    Args:
        recompute: makes the files of a batch again, or of a run's definition if the batch is None;
            see ingest/replay/remake.py.
        advance: called with the bytes read so far and the bytes of all files.
        wait: seconds to wait for another process that writes to the store.

    Returns:
        What was mended and what was not.

    Raises:
        NotStored: there is no store.
        TooNew: a later version made the store.
        Busy: another process writes to the store.
        Damaged: the manifests are not whole, so nothing says how the rest must be; the catalog is
            whole and disagrees with the manifests; or a link on the way to a committed file leads
            nowhere or into another store. Nothing was touched.
    """
    root = place(path)
    with suppress(Damaged):
        check_format(root, older=True)  # a folder that is no store gets no lock
    with at(root).lease(wait) as lease:
        about, manifests, flipped_back = _committed(root)
        is_older = about["format"] < FORMAT_VERSION
        report = verify_files(root, manifests, [], checkpoint.content(root), is_older, False, advance)
        if conflict := [finding.what for finding in report.damage if finding.kind == CONFLICT]:
            raise Damaged(witness.in_conflict(root, "; ".join(conflict)))
        damaged = {finding.path: finding for finding in report.damage}
        stored = log.live(manifests)
        _refuse_shared_places(root, stored, damaged.keys())
        for name, content in flipped_back.items():
            at(root).swap(name, content)
        log.sweep(root, manifests)  # removes what an interrupted repair left
        tables.discard_beside(at(root), tables.CATALOG)
        done, left = _mend_all(root, stored, damaged, recompute)
        mended = [*flipped_back, *done]
        mended += _zarr_group(root)
        if not any(finding.kind == "part" for finding in left):
            build.publish(root, from_nothing=True)
            checkpoint.write(root, manifests)
            if left and any(finding.kind == "catalog" for finding in damaged.values()):
                done, left = _mend_all(root, stored, {of.path: damaged[of.path] for of in left}, recompute)
                mended += done  # edited runs are computed from what the catalog finds
            mended += [path for path, finding in damaged.items() if finding.kind in ("catalog", "checkpoint")]
            if is_older:
                about = {key: value for key, value in about.items() if key != sealed.CHECKSUM}
                at(root).swap("store.json", sealed.to_json({**about, "format": FORMAT_VERSION}))
                mended.append("store.json")
        return Repair(mended, left, len(manifests) if left else _take(root, lease, len(manifests)))


def _take(root: Path, lease: Held, n_committed: int) -> int:
    """Commit what slices of runs published whole, and free the rest where none is at work.

    Returns:
        The number of commits after that.
    """
    if not pending.runs(root):
        return n_committed
    writer = Writer(root, lease)
    take(writer)
    return writer.publish()


def _committed(root: Path) -> tuple[dict[str, Any], list[Manifest], dict[str, bytes]]:
    """What store.json says, all manifests, and the bytes of files of which one bit has flipped.

    Raises:
        Damaged: more than a bit of such a file is damaged, or a link on the way to a committed file
            leads nowhere or into another store.
    """
    manifests, broken = read_manifests(root)
    names = [finding.path for finding in broken]
    try:
        check_format(root, older=True)
    except Damaged:
        names.append("store.json")
    flipped_back = dict[str, bytes]()
    for name in names:
        with suppress(OSError):
            if content := sealed.flipped_back(at(root).read(name)):
                flipped_back[name] = content
    about = check_format(root, older=True, content=flipped_back.get("store.json"))
    if flipped_back:
        manifests, broken = read_manifests(root, flipped_back)
    refuse_astray(root, manifests)
    if broken:
        what = broken[0].what.removesuffix("; restore it from a copy of the store")
        raise Damaged(f"{root / broken[0].path}: {what}; it cannot be made again: restore it from a copy of the store")
    return about, manifests, flipped_back


def _refuse_shared_places(root: Path, manifests: list[Manifest], damaged: Collection[str]) -> None:
    """Check that no damaged file lies, behind a link, in the place of another committed file.

    Raises:
        Damaged: mending the one would damage the other.
    """
    files = {file.path: file for manifest in manifests for file in manifest.files}
    if not at(root).linked([*FOLDERS, *files]):
        return
    there: dict[str, list[File]] = {}
    for file in files.values():
        folder, _, name = file.path.rpartition("/")
        there.setdefault(os.path.join(os.path.realpath(root / folder), name), []).append(file)
    for shared in there.values():
        of_one, *others = sorted(shared, key=lambda file: file.path not in damaged)
        if of_one.path in damaged and any(file.xxh3_128 != of_one.xxh3_128 for file in others):
            raise Damaged(
                f"{root / of_one.path} and {root / others[0].path} were committed apart and lead to one file; remove the link, "
                f"then run {advised('repair', root)} again: nothing was touched"
            )


def _without(manifest: Manifest, damaged: Collection[str]) -> Manifest:
    return replace(manifest, parts=[part for part in manifest.parts if part.path not in damaged])


def _mend(
    root: Path,
    manifests: list[Manifest],
    manifest: Manifest,
    damage: list[Finding],
    damaged: Collection[str],
    recompute: Recompute,
) -> tuple[list[str], list[Finding]]:
    """Mend the damaged files of one commit; rows from the catalog come first.

    Files that are computed need the rows.

    Returns:
        The paths of mended files, and the findings that remain, each with what to do.
    """
    files = {file.path: file for file in manifest.files}
    left = [finding for finding in damage if not _put(root, files[finding.path], _kept(root, files[finding.path]))]
    done = [finding.path for finding in damage if finding not in left]
    if not left:
        return done, left
    made, why = dict[str, bytes](), ""
    try:
        if manifest.run is None or manifest.is_appended:
            raise Damaged("only the catalog, which is damaged, too, would tell it")
        still_damaged = set(damaged) - set(done)  # nothing that is computed may rest on them
        sound = [_without(committed, still_damaged) for committed in manifests]
        made = recompute(root, sound, manifest.run, manifest.batch)
    except (Damaged, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        why = f"it could not be computed again: {str(error).splitlines()[0]}"
    still = []
    for finding in left:
        file, content = files[finding.path], made.get(finding.path)
        if _put(root, file, content):
            done.append(finding.path)
            continue
        differs = "what is computed here differs: it was made by other versions or on another machine (see runs)"
        reason = why or (differs if content is not None else "nothing else in the store tells it")
        still.append(replace(finding, what=f"{finding.what}; {reason}; {_how_to_remake(root, manifest, file)}"))
    return done, still


def _mend_all(
    root: Path, manifests: list[Manifest], damaged: dict[str, Finding], recompute: Recompute
) -> tuple[list[str], list[Finding]]:
    """Mend damaged files, commit after commit; see `_mend`."""
    mended, left = list[str](), list[Finding]()
    for manifest in manifests:
        of_this = [damaged[file.path] for file in manifest.files if file.path in damaged]
        if of_this:
            done, not_done = _mend(root, manifests, manifest, of_this, damaged.keys(), recompute)
            damaged = {path: finding for path, finding in damaged.items() if path not in done}
            mended, left = mended + done, left + not_done
    return mended, left


def _put(root: Path, file: File, content: bytes | None) -> bool:
    """Put bytes in a committed file's place; False if they are not the committed bytes."""
    is_committed = content is not None and xxhash.xxh3_128_hexdigest(content) == file.xxh3_128
    if content is not None and is_committed:
        at(root).swap(file.path, content)
    return is_committed


def _how_to_remake(root: Path, manifest: Manifest, file: File) -> str:
    """Advice for a file that cannot be mended: a copy, or the command that makes it again."""
    table = file.table if isinstance(file, Part) else ""
    if table == "models" or file.path.startswith(f"{WEIGHTS}/"):
        how = f"put the model that was run where it is found ({advised('models', 'add')}), then run {advised('repair', root)}"
    elif manifest.kind == "labels":
        name = file.owner if isinstance(file, Part) else ""
        how = f"drop the label ({advised('drop', root, '--label', name)}) and bring it again ({advised('label')})"
    elif manifest.is_appended:
        how = f"bring its numbers again in another store ({advised('ingest')} … --from-arrays)"
    elif table == "results":
        how = f"store the runs again in another store, and make the results there ({advised('study')})"
    else:
        how = f"store the run again in another store ({advised('ingest')} … --run {manifest.run})"
    return f"restore it from a copy of the store, or {how}"


def _kept(root: Path, file: File) -> bytes | None:
    """Make a file's bytes of what the store holds besides: a part of its rows in the catalog.

    A damaged catalog may still hold them; the hash of the part tells whether it does.
    """
    if file.path.startswith(f"{ARRAYS}/") and file.path.count("/") == 2:  # the Zarr group of a run
        return GROUP
    if not isinstance(file, Part):
        return None
    with suppress(duckdb.Error, OSError, LookupError, ValueError):  # also for a manifest that no writer wrote
        with tables.attached(root) as connection:
            where, values = _rows_of(connection, file)
            rows = connection.sql(f'from there."{file.table}" {where}', params=values).pl()
            declared = _declared(connection, file.table)
        if declared:
            return as_parquet(file.table, declared.fit(rows))
        return as_parquet(file.table, part_types.as_in_parts(file.table, rows).head(file.rows))
    return None


def _declared(connection: duckdb.DuckDBPyConnection, table: str) -> Relation | None:
    """The declaration of a table that is none of every store's."""
    if table in part_types.tables():
        return None
    rows = connection.sql("from there.relations where name = ?", params=[table]).pl().to_dicts()
    return parsed(rows[0])


def _rows_of(connection: duckdb.DuckDBPyConnection, part: Part) -> tuple[str, list[object]]:
    """SQL condition for the rows that a part brought to its table."""
    if part.table == "results":
        return "where recorded = ?", [int(part.owner)]
    if part.table == "models":
        return "where starts_with(weights_sha256, ?)", [part.owner]
    if part.table == part.owner and part.first_tree_id is None:
        return "", []  # a label
    if part.table == "sites" and "/" in part.owner:
        return "where run = ? and site = ?", [*part.owner.split("/", 1)]
    if part.batch is None or part.table == "relations":
        keys = {"datasets": "dataset", "vocabularies": "vocabulary", "relations": "owner"}
        return f"where {keys.get(part.table, 'run')} = ?", [part.owner]
    of_run, first, n = part.table in witness.OF_RUN, part.first_tree_id, part.n_trees
    if first is None:
        dataset = "(select dataset from there.runs where run = ?)" if of_run else "?"
        trees = (
            f"select first_tree_id + trees_per_shard * ?, trees_per_shard from there.datasets where dataset = {dataset}"
        )
        first, n = connection.execute(trees, [part.batch, part.owner]).fetchall()[0]
    key = "tree_id" if part.table in ("trees", "edges", "outcomes") else "sequence_id"
    condition = f"where {key} between ? and ?" + " and run = ?" * of_run
    return condition, [first, first + (n or 0) - 1, *[part.owner] * of_run]


def _zarr_group(root: Path) -> list[str]:
    """Restore the Zarr group of all arrays, which no manifest names."""
    path = f"{ARRAYS}/zarr.json"
    try:
        if at(root).read(path) == GROUP:
            return []
    except OSError:
        pass
    at(root).swap(path, GROUP)
    return [path]


def as_frame(done: Repair) -> pl.DataFrame:
    """One row per file: its path, and `mended` or why the file was left."""
    rows = [{"path": path, "result": "mended"} for path in done.mended]
    rows += [{"path": of.path, "result": of.what} for of in done.left]
    return pl.DataFrame(rows, schema={"path": pl.String, "result": pl.String})
