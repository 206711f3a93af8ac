"""A store opened for writing: define a run, commit its batches, record a study's results, publish the catalog.

One process at a time holds a store for writing. Whatever it commits is a pure function of the run's definition and the
batch's number, so an interrupted writer that starts again finds or makes the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import polars as pl
import xxhash

import actstore
from actstore.arrays.reader import metadata
from actstore.catalog import build, witness
from actstore.commits import log
from actstore.commits.log import ARRAYS, FORMAT_VERSION, PARTS, WEIGHTS, File, Manifest, Part, Shard, TableOfParts
from actstore.errors import BadInput, Damaged, Unsupported, advised
from actstore.storage import sealed
from actstore.storage.folder import check_format, check_path, place, refuse_astray, store_around
from actstore.storage.machine import limit_reached
from actstore.storage.regular import read_regular
from actstore.writing.plan import RunPlan

GROUP = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}, indent=2).encode()

Rows = list[dict[str, Any]]  # of a table
NEVER_NULL = {  # what rows are found by, and counted with
    "models": ("weights_sha256",),
    "datasets": ("dataset", "n_nodes", "n_trees", "first_tree_id", "trees_per_shard"),
    "runs": ("run", "weights_sha256", "dataset", "first_tree_id"),
    "sites": ("run", "site", "short", "shape", "path"),
}


def create(root: Path, wait: float = 0.0) -> None:
    """Make an empty store, at once or not at all; a store that is there stays as it is.

    Args:
        wait: seconds to wait for another process that is making it.

    Raises:
        BadInput: the folder holds something that is no store.
        Busy: another process is making it.
        NoRoom: the disk is full.
        Unsupported: the file system lacks hard links, locks or fsync; nothing is left there.
    """
    if _is_store(root):
        return
    under_way = root.parent / f".{root.name}.new"
    with log.needing_room(root):
        log.make_folder(under_way)
        try:
            _make(root, under_way, wait)
        except Unsupported:  # no other process can be at work there
            shutil.rmtree(under_way, ignore_errors=True)
            raise


def _make(root: Path, under_way: Path, wait: float) -> None:
    with log.lease(under_way, wait):  # which moves with the folder
        if _is_store(root):  # another process made it since
            shutil.rmtree(under_way, ignore_errors=True)
            return
        for left in under_way.iterdir():  # by a process that was killed
            if left.name != log.LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        _fill(under_way)
        under_way.rename(root)
        log.fsync_folder(root.parent)


def _is_store(root: Path) -> bool:
    """Whether a store is there; refuses what can become none."""
    check_path(root)
    if (root / "store.json").exists():
        return True
    if root.is_symlink() or (root.exists() and (not root.is_dir() or any(root.iterdir()))):
        raise BadInput(f"{root} exists and is no actstore store; name a new folder, or an empty one")
    if around := store_around(root):
        raise BadInput(f"{root} lies in the store {around}; name a folder outside it")
    if root.name in ("", "..") or (root.exists() and root.samefile(Path.cwd())):
        raise BadInput(f"a store is a folder of its own and cannot be made of {str(root)!r}; name a new folder")
    return False


def _fill(root: Path) -> None:
    """Put everything into a folder that makes it a store without commits."""
    for folder in (log.LOG, PARTS, WEIGHTS, ARRAYS):
        log.make_folder(root / folder)
    log.publish(root, f"{ARRAYS}/zarr.json", GROUP)
    build.publish(root)
    about = {
        "format": FORMAT_VERSION,
        "made_by": f"actstore {actstore.__version__}",
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    log.publish(root, "store.json", sealed.to_json(about))


def check_plan(root: Path, plan: RunPlan) -> None:
    """Refuse a plan that `Writer.define` would refuse, without holding the store; no store there is none yet.

    Args:
        plan: where its `model` is empty, whatever is said of the run's weights is taken to be right.

    Raises:
        BadInput: the folder can become no store, or cannot be written, or the run's or dataset's name is taken.
    """
    if _is_store(root):
        check_format(root)
        committed = log.manifests(root)
        datasets, runs, sites = (table(root, committed, name).to_dicts() for name in ("datasets", "runs", "sites"))
        _stored_dataset(datasets, plan.dataset)
        _stored_run(runs, sites, plan)
    above = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "is read-only, or another user's" if above.is_dir() else "is no folder"
        raise BadInput(f"{root} cannot be written, since {above} {what}; name another folder")


def _stored_dataset(datasets: Rows, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The stored row of a set of trees, which must be the one that is wanted; None where the name is free."""
    row = next((row for row in datasets if row["dataset"] == wanted["dataset"]), None)
    if row:
        _must_agree(f"dataset {row['dataset']!r}", row, wanted, "name the new set otherwise (--dataset)")
    return row


def _stored_run(runs: Rows, sites: Rows, plan: RunPlan) -> dict[str, Any] | None:
    """The stored row of a run, which must be the one that is planned; None where the name is free."""
    row = next((row for row in runs if row["run"] == plan.run), None)
    if row:
        wanted = {
            "weights_sha256": plan.model.get("weights_sha256", row["weights_sha256"]),
            "dataset": plan.dataset["dataset"],
            "sites": ", ".join(site.short for site in plan.sites) or "none",
            "prompt": plan.facts.get("prompt", "task"),
            "samples": plan.facts.get("samples"),
        }
        shorts = ", ".join(site["short"] for site in sites if site["run"] == plan.run)
        stored = {**row, "sites": shorts or "none", "prompt": row.get("prompt") or "task"}
        _must_agree(f"run {plan.run!r}", stored, wanted, "name the new run otherwise (--run)")
    return row


def rebuild(path: str | Path) -> int:
    """Make the catalog anew from the committed parts alone, and return how many commits it holds.

    Raises:
        Damaged: a part or a manifest is missing or unreadable, or the catalog that is there was built from other manifests.
        Busy: another process writes to the store.
    """
    root = place(path)
    check_format(root)
    with log.lease(root):
        # what the old catalog knows must not be forgotten
        committed = log.manifests(root, least=build.snapshot(root))
        witness.refuse_conflict(root, committed)
        return build.publish(root, from_nothing=True)


@contextmanager
def open_writer(path: str | Path, *, make: bool = False, wait: float = 0.0) -> Iterator[Writer]:
    """Hold a store for writing, and publish its catalog at the end, also after an error.

    Args:
        path: the store's folder.
        make: make the store if there is none.
        wait: seconds to wait for another process that holds it.

    Raises:
        Busy: another process holds it, and did so for all that time.
        NotStored: there is no store, and none is to be made.
        NoRoom: the disk is full.
        Damaged: a committed file is missing or has another size, a link on the way to one leads nowhere or into another
            store, or the catalog was built from other manifests; nothing was touched.
        Unsupported: the file system lacks hard links, locks or fsync.
    """
    root = place(path)
    if make and not (root / "store.json").exists():
        create(root, wait)
    check_format(root)
    with log.needing_room(root), log.lease(root, wait) as lease:
        writer = Writer(root, lease)
        try:
            yield writer
        finally:
            writer.publish()


def committed_batches(root: Path, run: str) -> set[int]:
    """The batches of a run that are committed, without holding the store.

    Raises:
        NotStored: there is no store.
    """
    check_format(root)
    return _batches(log.manifests(root), run)


def committed_dataset(root: Path, name: str) -> dict[str, Any] | None:
    """The row of `datasets` of that name, without holding the store; None where there is none, or no store."""
    return next((row for row in _datasets(root) if row["dataset"] == name), None)


def committed_datasets(root: Path) -> list[str]:
    """Names of the sets of trees that are stored, without holding the store; none where there is no store."""
    return [row["dataset"] for row in _datasets(root)]


def _datasets(root: Path) -> Rows:
    if not (root / "store.json").exists():
        return []
    check_format(root)
    return table(root, log.manifests(root), "datasets").to_dicts()


def table(root: Path, committed: Sequence[Manifest], name: str) -> pl.DataFrame:
    """All rows that these commits brought to one of the small tables.

    Raises:
        Damaged: a part holds none of its rows, or one without what names it.
    """
    parts = [part for manifest in committed for part in manifest.parts if part.table == name]
    if not parts:
        return pl.DataFrame()
    try:
        rows = _as_stored(name, pl.concat([_read_part(root / part.path) for part in parts], how="diagonal_relaxed"))
    except (BadInput, pl.exceptions.PolarsError) as error:
        raise Damaged(
            f"the parts of {name} in {root} hold no rows of it ({error}); see {advised('verify', root)}"
        ) from error
    for column in NEVER_NULL.get(name, ()):
        if rows[column].null_count() or (rows[column].dtype.is_integer() and (rows[column] < 0).any()):
            raise Damaged(f"a part of {name} in {root} has a row whose {column} is none; see {advised('verify', root)}")
    return rows


def _read_part(path: Path) -> pl.DataFrame:
    """The rows of a part.

    Raises:
        Damaged: it is no Parquet file.
    """
    try:
        return pl.read_parquet(read_regular(path, path.stat().st_size))
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        if isinstance(error, Damaged):
            raise
        raise (isinstance(error, OSError) and limit_reached(error, f"cannot read {path}")) or Damaged(
            f"part {path} cannot be read ({str(error).splitlines()[0]}); restore it from a copy of the store"
        ) from error


def _batches(committed: Sequence[Manifest], run: str) -> set[int]:
    return {m.batch for m in committed if m.kind == "batch" and m.run == run and m.batch is not None}


class Writer:
    """See `open_writer`, which makes one while it holds the lease."""

    def __init__(self, root: Path, lease: log.Lease) -> None:
        self.root, self._lease = root, lease
        self._log = log.manifests(root, least=build.snapshot(root))  # before anything is swept: is the log whole?
        log.check_sizes(root, self._log)
        refuse_astray(root, self._log)
        witness.refuse_conflict(root, self._log)
        log.sweep(root, self._log)
        build.discard_beside(root / build.NAME)
        self._files = {file.path: file for manifest in self._log for file in manifest.files}

    def table(self, name: str) -> pl.DataFrame:
        """All committed rows of one of the small tables (models, datasets, runs, sites)."""
        return table(self.root, self._log, name)

    def batches(self, run: str) -> set[int]:
        """The batches of a run that are committed."""
        return _batches(self._log, run)

    def publish(self) -> int:
        """Bring the catalog up to the last commit, and return its snapshot number."""
        self._lease.check()
        return build.publish(self.root)

    def define(self, plan: RunPlan) -> int:
        """Commit a run's definition, or find that it is the one that was committed.

        Returns:
            tree_id of the first tree of the run's dataset.

        Raises:
            BadInput: the run's or dataset's name is taken by another, or its rows do not fit the tables.
        """
        model = self._model(plan.model)
        first_tree_id = self._first_tree_id(plan.dataset)
        if _stored_run(self.table("runs").to_dicts(), self.table("sites").to_dicts(), plan):
            return first_tree_id
        parts = [
            *self._part(part_content("models", model["weights_sha256"][:16], [model])),
            *self._part(
                part_content("datasets", plan.dataset["dataset"], [{**plan.dataset, "first_tree_id": first_tree_id}])
            ),
            *self._part(part_content("runs", plan.run, [plan.row(first_tree_id)])),
            *self._part(part_content("sites", plan.run, [site.row(plan.run) for site in plan.sites])),
        ]
        others = [
            *self._file(f"{WEIGHTS}/{model['weights_sha256']}.safetensors", plan.weights),
            *self._file(f"{ARRAYS}/{plan.run}/zarr.json", GROUP),
        ]
        of_run = {"weights_sha256": model["weights_sha256"], "first_tree_id": first_tree_id}
        for site in plan.sites:
            about = metadata(site.layout, site.axes, {"run": plan.run, "site": site.site, **of_run})
            others += self._file(f"{site.path(plan.run)}/zarr.json", about)
        self._commit(Manifest(len(self._log) + 1, "run", plan.run, None, parts, [], others))
        return first_tree_id

    def _model(self, model: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row of `models` that these weights have, the stored one if there is one, under whatever name it came."""
        for row in self.table("models").to_dicts():
            if row["weights_sha256"] == model["weights_sha256"]:
                what = f"the model of weights {model['weights_sha256'][:12]}"
                _must_agree(
                    what, row, {"config": model.get("config")}, "use a store of its own for the new configuration"
                )
                return row
        return model

    def _first_tree_id(self, dataset: Mapping[str, Any]) -> int:
        known = self.table("datasets").to_dicts()
        if stored := _stored_dataset(known, dataset):
            return int(stored["first_tree_id"])
        return max((row["first_tree_id"] + row["n_trees"] for row in known), default=0)

    def commit_batch(
        self,
        plan: RunPlan,
        batch: int,
        first_tree_id: int,
        n_trees: int,
        contents: Sequence[Content],
    ) -> None:
        """Commit one batch of trees of a run.

        Args:
            first_tree_id: tree_id of the batch's first tree, n_trees: how many it has.
            contents: its files; see batch_contents.

        Raises:
            BadInput: the batch, or its trees by another run, is committed with other content.
        """
        parts, shards = list[Part](), list[Shard]()
        for content in contents:
            if content.table:
                parts += self._part(content)
            else:
                files = self._file(content.path, content.content)
                shards += [
                    Shard(
                        **vars(file),
                        run=plan.run,
                        site=content.site,
                        batch=batch,
                        first_tree_id=first_tree_id,
                        n_trees=n_trees,
                    )
                    for file in files
                ]
        self._commit(Manifest(len(self._log) + 1, "batch", plan.run, batch, parts, shards))

    def record(self, results: pl.DataFrame) -> int:
        """Commit a study's results (rows of `results` but for `recorded`) and return the commit's number."""
        number = len(self._log) + 1
        rows = results.with_columns(recorded=pl.lit(number, pl.Int32))
        self._commit(Manifest(number, "results", parts=self._part(part_content("results", f"{number:08d}", rows))))
        return number

    def _commit(self, manifest: Manifest) -> None:
        self._lease.check()
        log.check_sizes(self.root, [manifest])  # a second writer that ignores the lease may have swept them
        self._log.append(log.commit(self.root, manifest, self._log[-1] if self._log else None))
        self._files |= {file.path: file for file in manifest.files}

    def _part(self, part: Content) -> list[Part]:
        """Publish rows of a table; an empty list where an earlier commit brought the very same rows."""
        if part.path in self._files and not self._has(part.path, part.content):
            held = pl.read_parquet(
                (self.root / part.path).read_bytes()
            )  # another version may have encoded the same rows otherwise
            if not held.equals(pl.read_parquet(bytes(part.content))):
                raise _otherwise(self.root / part.path)
            return []
        table = cast(TableOfParts, part.table)
        return [Part(**vars(file), table=table, rows=part.rows) for file in self._file(part.path, part.content)]

    def _file(self, path: str, content: bytes | memoryview) -> list[File]:
        """Publish a file; an empty list where an earlier commit brought the very same."""
        if path in self._files:
            if not self._has(path, content):
                raise _otherwise(self.root / path)
            return []
        self._lease.check()
        return [log.publish(self.root, path, content)]

    def _has(self, path: str, content: bytes | memoryview) -> bool:
        return xxhash.xxh3_128_hexdigest(content) == self._files[path].xxh3_128


@dataclass(frozen=True)
class Content:
    """A file to be committed: its path in the store, its bytes, and what its manifest says of it.

    Attributes:
        table, rows: of a part: its table, and how many rows it has.
        site: of a shard: its TransformerLens name.
    """

    path: str
    content: bytes | memoryview
    table: str = ""
    rows: int = 0
    site: str = ""


def batch_contents(
    plan: RunPlan,
    batch: int,
    of_trees: Mapping[str, pl.DataFrame],
    of_run: Mapping[str, pl.DataFrame],
    arrays: Mapping[str, memoryview],
) -> list[Content]:
    """The files of one batch of a run.

    Args:
        of_trees: the rows of `trees`, `edges`, `tokens`; left out where another run over the set brought them.
        of_run: the rows of `predictions` and `outcomes`, or of `generations`.
        arrays: packed shard of each site, by its TransformerLens name.

    Raises:
        BadInput: the rows do not fit their tables.
    """
    owners = ((str(plan.dataset["dataset"]), of_trees), (plan.run, of_run))
    parts = [
        part_content(table, f"{owner}-{batch:06d}", frame)
        for owner, tables in owners
        for table, frame in tables.items()
    ]
    names = {site.site: f"{site.path(plan.run)}/{site.layout.shard_name(batch)}" for site in plan.sites}
    return [*parts, *(Content(path, arrays[site], site=site) for site, path in names.items())]


def part_content(table: str, name: str, rows: pl.DataFrame | Sequence[Mapping[str, Any]]) -> Content:
    """A part of a table, named within it."""
    frame = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(rows, infer_schema_length=None)
    return Content(f"{PARTS}/{table}/{name}.parquet", as_parquet(table, frame), table, len(frame))


def as_parquet(table: str, rows: pl.DataFrame) -> bytes:
    """The bytes of a part: all columns of its table."""
    buffer = io.BytesIO()
    _as_stored(table, rows).write_parquet(buffer, compression="zstd", statistics=False)
    return buffer.getvalue()


def _otherwise(path: Path) -> BadInput:
    return BadInput(
        f"{path} is committed and what is to be stored under its name now differs: it was made by another version or "
        "from other input; name the new run and its set of trees otherwise (--run, --dataset)"
    )


def _as_stored(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Rows with all columns of their table and its types, so that no committed part is one the catalog cannot take."""
    types = build.tables()[table]
    if unknown := [name for name in frame.columns if name not in types]:
        raise BadInput(f"table {table} has no column {', '.join(unknown)}; it has {', '.join(types)}")
    lacking = [pl.lit(None, dtype).alias(name) for name, dtype in types.items() if name not in frame.columns]
    try:
        return frame.with_columns(lacking).select(pl.col(name).cast(dtype) for name, dtype in types.items())
    except pl.exceptions.PolarsError as error:
        raise BadInput(f"the rows do not fit table {table}: {str(error).splitlines()[0]}") from error


def _must_agree(what: str, stored: Mapping[str, Any], wanted: Mapping[str, Any], advice: str) -> None:
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise BadInput(
                f"{what} is stored with {key} {stored.get(key)}, not {value}; {advice}, or ask for what is stored"
            )
