"""Copy a store, or some of its runs, into a new store.

Files are copied byte for byte, and each is compared with its committed hash on the way. A whole
copy has the same manifests. A copy of some runs has a log of its own: the commits of these runs,
with the rows of their datasets and models, whichever run brought them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actstore.catalog.witness import OF_RUN
from actstore.commits import checkpoint, log
from actstore.commits.format import check_format, unembedding_path, weights_path
from actstore.commits.manifest import Manifest, Part, Shard, manifest_path
from actstore.errors import BadInput, Damaged, NotStored, advised, nearest
from actstore.storage.at import at, check_room, place
from actstore.storage.backend import File
from actstore.storage.several import several
from actstore.writing.create import create, is_store
from actstore.writing.parts import rows_committed

Advance = Callable[[int, int], None]  # bytes copied so far, bytes of all files


@dataclass(frozen=True)
class Copy:
    """What was copied.

    Attributes:
        out: the new store.
        commits: number of its commits.
        n_files: number of files that were copied, without manifests.
        n_bytes: size of these files.
        also: runs that were copied since a run with edits rests on them: its base, and its donors.
    """

    out: Path
    commits: int
    n_files: int
    n_bytes: int
    also: tuple[str, ...] = ()


def copy(
    path: str | Path, out: str | Path, runs: Sequence[str] = (), advance: Advance = lambda done, total: None
) -> Copy:
    """Copy a store at its present commit; the new store appears whole or not at all.

    Args:
        path: the store, which is only read.
        out: the new store.
        runs: runs to copy; default: everything. Labels, results of studies and datasets of other
            runs are then left out. The base and the donors of a run with edits come with it.
        advance: called with the bytes copied so far and the bytes of all files.

    Raises:
        NotStored: there is no store, or no such run.
        TooOld, TooNew: another version made the store.
        BadInput: `out` is a store, or can become none.
        Damaged: a file is not what was committed; nothing is left of the copy.
        NoRoom: the disk is full.
    """
    root, target = place(path), place(out)
    check_format(root)
    if is_store(target):
        raise BadInput(f"{target} is a store already; name a new one, which the copy makes")
    committed = log.manifests(root)
    live = log.live(committed)
    also = _rested_on(root, live, runs)
    copied = _of_runs(root, live, [*runs, *also]) if runs else live
    files = {file.path: file for manifest in copied for file in manifest.files}
    total = sum(file.bytes for file in files.values())
    check_room(target, total, "the copy")

    def fill(new: Path) -> None:
        done, before = 0, None
        at_once = max(at(root).at_once, at(new).at_once)
        every = [file for manifest in copied for file in manifest.files]
        with closing(several(partial(_copy_file, root, new), every, at_once, lambda file: file.bytes)) as copies:
            for manifest in copied:
                for _ in manifest.files:
                    done += next(copies)
                    advance(done, total)
                if runs:
                    before = log.commit(new, manifest, before)
                else:
                    at(new).publish(manifest_path(manifest.number), at(root).read(manifest_path(manifest.number)))
        checkpoint.write(new, log.manifests(new))

    create(target, fill=fill)
    return Copy(target, len(copied), len(files), total, also)


def _rested_on(root: Path, committed: Sequence[Manifest], runs: Sequence[str]) -> tuple[str, ...]:
    """The runs that some runs with edits rest on, other than those, each after what rests on it."""
    edits, found = rows_committed(root, committed, "interventions").to_dicts(), [*runs]
    for run in found:
        of_run = [row for row in edits if row["run"] == run]
        rested_on = dict.fromkeys(row[name] for row in of_run for name in ("base_run", "donor_run"))
        found += [name for name in rested_on if name is not None and name not in found]
    return tuple(found[len(runs) :])


def _copy_file(root: Path, new: Path, file: File) -> int:
    """Copy a file and return its bytes."""
    try:
        content = at(root).read(file.path, file.bytes)
    except (FileNotFoundError, NotADirectoryError):
        content = b""
    if at(new).publish(file.path, content) != File(file.path, file.bytes, file.xxh3_128):
        raise Damaged(
            f"{root / file.path} is missing, or is not what was committed; mend it with {advised('repair', root)}, then copy again"
        )
    return file.bytes


def _of_runs(root: Path, committed: Sequence[Manifest], runs: Iterable[str]) -> list[Manifest]:
    """The manifests of a log of some runs; they are numbered anew and not chained.

    Args:
        committed: without what was dropped, see log.live.
    """
    stored = {row["run"]: row for row in rows_committed(root, committed, "runs").to_dicts()}
    datasets = {row["dataset"]: row for row in rows_committed(root, committed, "datasets").to_dicts()}
    for run in runs:
        if run not in stored:
            raise NotStored(
                f"{root} holds no run {run!r}{nearest(run, stored)}; it holds {', '.join(stored) or 'none'}"
            )
    wanted, placed, found = set(runs), set[str](), list[Manifest]()
    by_batch: dict[int | None, list[File]] = {}
    for manifest in (each for each in committed if each.kind in ("run", "batch")):
        by_batch.setdefault(manifest.batch, []).extend([*manifest.parts, *manifest.others])
    for manifest in committed:
        if manifest.run not in wanted:
            continue
        row = stored[manifest.run]
        vocabulary = datasets[row["dataset"]].get("vocabulary")
        shared = [file for file in by_batch.get(manifest.batch, []) if _belongs(file, manifest, row, vocabulary)]
        files = [file for file in dict.fromkeys([*manifest.files, *shared]) if file.path not in placed]
        placed |= {file.path for file in files}
        parts = [file for file in files if isinstance(file, Part)]
        others = [file for file in files if not isinstance(file, Part | Shard)]
        kind, batch = manifest.kind, manifest.batch
        found.append(Manifest(len(found) + 1, kind, manifest.run, batch, parts, manifest.shards, others))
    return found


def _belongs(file: File, manifest: Manifest, run: Mapping[str, Any], vocabulary: str | None) -> bool:
    """True if a copy of a run brings a file of any commit with this commit of the run.

    Args:
        manifest: a definition, a batch or an appended site.
        run: the run's row.
        vocabulary: of the run's dataset.
    """
    if not isinstance(file, Part):
        weights = (weights_path(run["weights_sha256"]), unembedding_path(run["weights_sha256"]))
        return manifest.kind == "run" and file.path in weights
    if file.table in ("runs", "sites", "results", *OF_RUN) or file.batch != manifest.batch:
        return False
    owners = {"models": run["weights_sha256"], "vocabularies": vocabulary}
    return file.owner == owners.get(file.table, run["dataset"])
