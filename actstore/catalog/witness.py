"""Compare a store's manifests with each other and with the catalog: each witnesses the commits.

A manifest's checksum shows that the manifest is whole. It does not show that the manifest is the
one that was written, since an editor can also write a new checksum. An edited manifest
still must name its own files, and the catalog records what the manifests said when it was built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import duckdb

from actstore.catalog import hash_note, part_types, tables
from actstore.catalog.declared import identifier
from actstore.commits import log
from actstore.commits.format import ARRAYS, WEIGHTS, part_path
from actstore.commits.log import log_hash
from actstore.commits.manifest import Dropped, Manifest, Part
from actstore.errors import Damaged, advised

OF_RUN = (
    "predictions",
    "outcomes",
    "generations",
    "interventions",
    "edits",
)  # tables whose parts bear a run's name; the others' bear a dataset's


def at_odds(manifests: list[Manifest]) -> Iterator[tuple[int, str]]:
    """Find manifests that name what belongs to another.

    Each manifest must name files of its own run and batch, and no file twice, unless it was dropped
    in between.

    Yields:
        (number of the manifest, what is wrong with it).
    """
    by_path: dict[str, int] = {}
    by_name: dict[tuple[str, str | None, int | None], int] = {}
    for manifest in manifests:
        name = manifest.kind, manifest.run, manifest.batch
        first = by_name.setdefault(name, manifest.number)
        if manifest.kind in ("run", "batch") and manifest.run is not None and first != manifest.number:
            yield manifest.number, f"it commits {_called(manifest)}, which manifest {first} commits"
        elif what := _of_another(manifest):
            yield manifest.number, f"it says that it commits {_called(manifest)}, and names {what}"
        if manifest.dropped:
            if lacking := [path for path in manifest.dropped.files if by_path.pop(path, None) is None]:
                yield manifest.number, f"it drops {lacking[0]}, which no commit before it brought"
            if manifest.dropped.kind == "run":
                by_name = {name: number for name, number in by_name.items() if name[1] != manifest.dropped.name}
        for file in manifest.files:
            first = by_path.setdefault(file.path, manifest.number)
            if first != manifest.number:
                yield manifest.number, f"it names {file.path}, which manifest {first} brought"
                break


def _called(manifest: Manifest) -> str:
    if manifest.run is None:
        return f"{manifest.kind} {manifest.number}"
    called = {"run": "", "site": "a site of ", "batch": f"batch {manifest.batch} of "}
    return f"{called.get(manifest.kind, manifest.kind + ' of ')}run {manifest.run!r}"


def _of_another(manifest: Manifest) -> str:
    """The manifest's first file that does not belong to what it commits; "" if all files do."""
    if manifest.kind == "drop" and not manifest.dropped:
        return "nothing that it drops"
    if manifest.dropped and manifest.kind != "drop" and not _replaces_labels(manifest, manifest.dropped):
        return "what it drops"
    for shard in manifest.shards:
        lies = f"{ARRAYS}/{manifest.run}/{shard.site}/"
        batch = shard.batch if manifest.is_appended else manifest.batch  # such a site comes with all its batches
        if (shard.run, shard.batch) != (manifest.run, batch) or not shard.path.startswith(lies):
            return f"{shard.path} of batch {shard.batch} of run {shard.run!r}"
    for part in manifest.parts:
        if part.path != part_path(part.table, part.owner, part.batch) or not _may_bring(manifest, part):
            return part.path
    for other in manifest.others:
        if not other.path.startswith((f"{ARRAYS}/{manifest.run}/", f"{WEIGHTS}/")):
            return other.path
    return ""


def _replaces_labels(manifest: Manifest, dropped: Dropped) -> bool:
    """True if a commit of labels drops those of the same name."""
    owners = {part.owner for part in manifest.parts}
    return manifest.kind == "labels" and dropped.kind == "label" and owners == {dropped.name}


def _may_bring(manifest: Manifest, part: Part) -> bool:
    """True if a commit can bring rows of that table and owner."""
    if manifest.kind == "results":
        return (part.table, part.owner) == ("results", f"{manifest.number:08d}")
    if manifest.kind == "labels":
        return part.table in ("relations", part.owner) and part.batch in (None, manifest.number)
    if manifest.kind == "site":
        return part.table == "sites" and part.owner.startswith(f"{manifest.run}/") and part.batch is None
    if manifest.kind == "run":
        of_definition = part.table in ("models", "datasets", "vocabularies", "relations")
        return of_definition or (
            part.table in ("runs", "sites", "interventions", "edits") and part.owner == manifest.run
        )
    of_batch = manifest.kind == "batch" and part.batch == manifest.batch
    return of_batch and (part.table not in OF_RUN or part.owner == manifest.run)


def conflicts(root: Path, manifests: list[Manifest], connection: duckdb.DuckDBPyConnection) -> Iterator[str]:
    """Compare a catalog with the manifests, without reading parts.

    Args:
        root: a store whose catalog has a noted hash.
        manifests: all of them, each whole.
        connection: has the catalog attached, see tables.attached.

    Yields:
        One sentence per difference.
    """
    held, hash_of_log = tables.snapshot_of(connection)
    committed = (manifests if held <= len(manifests) else log.manifests(root))[:held]  # a writer went on meanwhile
    if held > len(committed):
        yield f"the catalog says that it holds {held:,} commits, and there are {len(committed):,} manifests"
    if hash_of_log is not None and log_hash(committed) != hash_of_log:
        yield f"the catalog was built from manifests of hash {hash_of_log}, and these have {log_hash(committed)}"
    committed = log.live(committed)
    named = {shard.path: shard.xxh3_128 for manifest in committed for shard in manifest.shards}
    rows = {"shards": len(named)}
    for part in [part for manifest in committed for part in manifest.parts]:
        rows[part.table] = rows.get(part.table, 0) + part.rows
    held_tables = tables_held(connection)
    for table in held_tables:
        n = connection.execute(f"select count(*) from there.{identifier(table)}").fetchall()[0][0]
        if n != rows.get(table, 0):
            yield f"the catalog holds {n:,} rows of table {table}, and the manifests name {rows.get(table, 0):,}"
    if lacking := [table for table in rows if table not in (*held_tables, *part_types.tables())]:
        yield f"the catalog has no table {lacking[0]}, and the manifests name {rows[lacking[0]]:,} rows of it"
    for path, hashed in connection.execute("select path, xxh3_128 from there.shards order by path").fetchall():
        if named.get(path) != hashed:
            what = f"hash {named[path]}" if path in named else "no such file"
            yield f"the catalog holds {path} with hash {hashed}, and the manifests name {what}"
            break


def tables_held(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """The tables of an attached catalog that commits fill: today's, then declared ones."""
    there = [row[0] for row in connection.execute(tables.TABLES_ATTACHED).fetchall()]
    own = [table for table in part_types.tables() if table in there and table != "snapshot"]
    return own + sorted(set(there) - part_types.tables().keys())


def least(root: Path, built_from: tuple[int, str | None] | None = None) -> int:
    """The number of commits that the log must hold: the catalog's, unless the number is damaged.

    The catalog holds the hash of its log, too. Where that is the hash of the manifests that are
    there, they are all, and the number is wrong.

    Args:
        built_from: what tables.built_from says of the root; default: it is asked.
    """
    held, hash_of_log = built_from or tables.built_from(root)
    n_there = len(log.numbers(root))
    with suppress(Damaged, FileNotFoundError):
        if held > n_there and log_hash(log.manifests(root)) == hash_of_log:
            return n_there
    return held


def doubt(root: Path, n_there: int) -> str:
    """What to do where the catalog names more manifests than there are, and is damaged itself.

    Returns:
        "" if the catalog has a noted hash.
    """
    if hash_note.is_whole(root):
        return ""
    return (
        f", by the catalog, which is not what {tables.HASHES} notes: if the store never had more than {n_there} commits, remove "
        f"{root / tables.CATALOG} and run {advised('repair', root)}"
    )


def conflict(root: Path, committed: list[Manifest], built_from: tuple[int, str | None] | None = None) -> str:
    """Compare a whole catalog with the manifests by their hash.

    Args:
        committed: all manifests.
        built_from: see least.

    Returns:
        The differences; "" if there are none. Also "" if the catalog is no witness: it is damaged,
        or of a format that recorded no hash.
    """
    held, hash_of_log = built_from or tables.built_from(root)
    if hash_of_log is None or log_hash(committed[:held]) == hash_of_log or not hash_note.is_whole(root):
        return ""
    with tables.attached(root) as connection:
        return "; ".join(conflicts(root, committed, connection))


def refuse_conflict(root: Path, committed: list[Manifest], built_from: tuple[int, str | None] | None = None) -> None:
    """Check that the catalog was built from these manifests, before unnamed files are removed.

    Args:
        committed: all manifests.
        built_from: see least.

    Raises:
        Damaged: the catalog is whole and was built from other manifests.
    """
    if what := conflict(root, committed, built_from):
        raise Damaged(in_conflict(root, what))


def in_conflict(root: Path, what: str) -> str:
    """The message for a store whose catalog and manifests are whole and disagree.

    Args:
        what: the differences.
    """
    return (
        f"the manifests of {root} and its catalog are each whole and disagree, so one of them was edited or replaced: {what}; "
        "nothing was touched. Restore the store from a copy; or, if the manifests are right, remove "
        f"{root / tables.CATALOG} and run {advised('repair', root)}, which removes what they do not name"
    )
