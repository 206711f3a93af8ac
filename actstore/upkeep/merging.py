"""Merge stores into a new one: shards as they are, rows with new ids where ids would meet.

The first store keeps its ids. The datasets of each further store get the ids after those before,
unless the same dataset is there already. A file has one path, so whatever two stores hold under one
path must be the same, but for the ids; then the merged store holds it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

import polars as pl
import xxhash

from actstore.arrays.address import Ids, is_of_trees
from actstore.catalog.declared import not_a_name
from actstore.commits import checkpoint, log
from actstore.commits.format import ARRAYS, WEIGHTS, check_format, part_path, unembedding_path, weights_path
from actstore.commits.manifest import Manifest, Part, Shard
from actstore.errors import BadInput, Damaged, NotStored, advised, nearest
from actstore.named import NAME
from actstore.storage.at import at, check_room, place
from actstore.storage.backend import File
from actstore.upkeep.moved import OF_THE_RUN, Moved, Names, spans_of
from actstore.writing.committed import dropped_ids
from actstore.writing.create import create, is_store
from actstore.writing.parts import as_parquet, as_stored, read_part, rows_committed

Advance = Callable[[int, int], None]  # bytes done so far, bytes of all files
Rename = tuple[str | Path, str, str, str]  # a store, `run`, `dataset` or `label`, its name there, its new name
KINDS = ("run", "dataset", "label")
FIRST_IDS = ("first_tree_id", "first_token_id", "first_sequence_id")


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


@dataclass
class _Source:
    """A store that is merged; `committed` is its log without what was dropped."""

    root: Path
    committed: list[Manifest]
    moved: Moved
    at_commit: list[int] = field(default_factory=lambda: [0])  # commits of the new store, after each of this one

    def rows(self, table: str) -> list[dict[str, Any]]:
        return rows_committed(self.root, self.committed, table).to_dicts()

    @cached_property
    def held(self) -> dict[str, list[str]]:
        """Names of the runs, datasets and labels."""
        runs, datasets, relations = (self.rows(table) for table in ("runs", "datasets", "relations"))
        return {
            "run": [row["run"] for row in runs],
            "dataset": [row["dataset"] for row in datasets],
            "label": [row["name"] for row in relations if row["kind"] == "labels"],
        }

    @cached_property
    def files(self) -> dict[str, tuple[Manifest, File]]:
        return {file.path: (manifest, file) for manifest in self.committed for file in manifest.files}

    def content(self, file: File) -> bytes:
        """The bytes of a file, which are those that were committed."""
        try:
            content = at(self.root).read(file.path, file.bytes)
        except (FileNotFoundError, NotADirectoryError):
            content = b""
        if len(content) != file.bytes or xxhash.xxh3_128_hexdigest(content) != file.xxh3_128:
            raise self.damaged(file)
        return content

    def part(self, manifest: Manifest, part: Part) -> pl.DataFrame:
        """The rows of a part as the new store holds them; those of results without their number."""
        self.content(part)
        rows = as_stored(part.table, read_part(self.root, part.path))
        try:
            rows = as_stored(part.table, self.moved.rows(manifest, part.table, rows))
        except Damaged as error:
            raise Damaged(f"{self.root / part.path} cannot be merged ({error})") from error
        if part.table == "results":
            snapshots = dict(enumerate(self.at_commit))
            return rows.with_columns(pl.col("snapshot").replace(snapshots), recorded=None)
        return rows

    def is_changed(self, manifest: Manifest, file: File) -> bool:
        """True if a file has other bytes in the new store, perhaps."""
        if isinstance(file, Part):
            return self.moved.changes or manifest.kind in ("results", "labels")
        return self.moved.changes and not isinstance(file, Shard) and file.path.startswith(f"{ARRAYS}/")

    def damaged(self, file: File) -> Damaged:
        return Damaged(
            f"{self.root / file.path} is missing, or is not what was committed; mend it with "
            f"{advised('repair', self.root)}, then merge again"
        )


@dataclass
class _Commit:
    """A commit of the new store, and the files that it takes, each from its store."""

    source: _Source
    manifest: Manifest
    number: int
    files: list[tuple[_Source, Manifest, File]]


class _Conflict(Exception):
    """Two stores hold something else under one name."""

    def __init__(self, source: _Source, kind: str, name: str, what: str) -> None:
        self.source, self.kind, self.name, self.what = source, kind, name, what


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
    plan = _planned(roots, target, [(place(store), *names) for store, *names in rename])
    files = [each for commit in plan.commits for each in commit.files]
    total = sum(file.bytes for *_, file in files)
    near = {root for root in roots if at(target).shares(at(root))}
    copied = [each for each in files if each[0].root not in near or each[0].is_changed(*each[1:])]
    check_room(target, sum(file.bytes for *_, file in copied), "the merge")

    def fill(new: Path) -> None:
        done, before = 0, None
        for commit in plan.commits:
            written = list[File]()
            for source, manifest, file in commit.files:
                written.append(_written(new, commit, source, manifest, file))
                done += file.bytes
                advance(done, total)
            before = log.commit(new, _manifest(commit, written), before)
        checkpoint.write(new, log.manifests(new))

    create(target, fill=fill)
    return Merge(target, len(plan.commits), len(files), total, list(plan.shared))


def _manifest(commit: _Commit, files: Sequence[File]) -> Manifest:
    """The manifest of a commit of the new store, not yet chained."""
    parts = [file for file in files if isinstance(file, Part)]
    shards = [file for file in files if isinstance(file, Shard)]
    others = [file for file in files if not isinstance(file, Part | Shard)]
    run = commit.source.moved.names.run.get(commit.manifest.run or "", commit.manifest.run)
    return Manifest(commit.number, commit.manifest.kind, run, commit.manifest.batch, parts, shards, others)


def _written(new: Path, commit: _Commit, source: _Source, manifest: Manifest, file: File) -> File:
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
            published = at(new).publish(path, moved.metadata(source.content(file)))
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
        batch=file.batch,
        first_tree_id=first,
        n_trees=file.n_trees,
    )


def _planned(roots: Sequence[Path], out: Path, rename: Sequence[tuple[Any, ...]]) -> _Plan:
    """The plan of a merge.

    Raises:
        BadInput: two stores hold something else under one name; names the command that renames all
            such names.
    """
    asked, first = list(rename), None
    while True:
        sources = _sources(roots, asked)
        plan = _Plan(sources)
        try:
            for source in sources:
                plan.add(source)
        except _Conflict as conflict:
            first = first or conflict
            of = conflict.source.root, conflict.kind, conflict.name
            taken = {*chain(*(source.held[conflict.kind] for source in sources))}
            taken |= {new for _, kind, _, new in asked if kind == conflict.kind}
            joint = "_" if conflict.kind == "label" else "-"
            names = (f"{conflict.name[:55]}{joint}{turn}" for turn in count(2))
            free = next(name for name in names if name not in taken)
            asked = [*(names for names in asked if names[:3] != of), (*of, free)]
            continue
        if first is None:
            return plan
        options = [word for names in asked for word in ("--rename", *names)]
        raise BadInput(
            f"{first.source.root} holds another {first.kind} {first.name!r} than a store before it ({first.what}); rename it "
            f"with {advised('merge', *roots, out, *options)}"
        )


def _sources(roots: Sequence[Path], rename: Sequence[tuple[Any, ...]]) -> list[_Source]:
    """The stores, with the new names that were asked for."""
    sources = [_Source(root, log.live(log.manifests(root)), Moved(Names())) for root in roots]
    for store, kind, name, new in rename:
        of = [source for source in sources if source.root == store]
        if not of or kind not in KINDS:
            raise BadInput(
                f"got {store} {kind} to rename; name one of the stores as it is merged, and {', '.join(KINDS)}"
            )
        if name not in (held := of[0].held[kind]):
            raise NotStored(
                f"{store} holds no {kind} {name!r}{nearest(name, held)}; it holds {', '.join(held) or 'none'}"
            )
        why = not_a_name(new) if kind == "label" else "" if NAME.fullmatch(new) and new != "zarr.json" else "no name"
        if why or new in held:
            raise BadInput(
                f"got {new!r} for {kind} {name!r} of {store} ({why or 'it holds one of that name'}); take another"
            )
        of[0].moved.names.of(kind)[name] = new
    return sources


class _Plan:
    """The commits of the merged store."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        self.sources = sources
        self.commits: list[_Commit] = []
        self.shared: dict[str, None] = {}
        self._datasets: dict[str, dict[str, Any]] = {}  # rows of `datasets`, with new names and ids
        self._placed: dict[str, tuple[_Source, Manifest, File]] = {}
        self._declared: dict[str, tuple[str, str]] = {}  # table → kind and owner
        self._done: set[tuple[str, str, int | None]] = set()
        self._results: list[pl.DataFrame] = []

    def add(self, source: _Source) -> None:
        """Plan the commits that a store brings.

        Raises:
            _Conflict: a name is taken by something else.
            BadInput: a model or vocabulary is another than the one of the same hash.
        """
        self._place_datasets(source)
        recorded = list(self._results)  # of the stores before
        for manifest in source.committed:
            if manifest.kind == "results":
                self._add_results(source, manifest, recorded)
            else:
                self._add(source, manifest)
            source.at_commit.append(len(self.commits))

    def _place_datasets(self, source: _Source) -> None:
        """Find the ids of a store's datasets."""
        names = source.moved.names.dataset
        dropped = dropped_ids(log.manifests(self.sources[0].root))
        for row in source.rows("relations"):
            if row["kind"] == "documents":
                source.moved.documents[row["name"]] = row["owner"]
        for row in source.rows("datasets"):
            name, original = row["dataset"], row.get("variant_of") or ""
            wanted = {**row, "dataset": names.get(name, name), "variant_of": names.get(original, original) or None}
            there = self._datasets.get(wanted["dataset"])
            if there is not None:
                if what := _difference(there, wanted, FIRST_IDS):
                    raise _Conflict(source, "dataset", name, what)
                first = Ids.of_dataset(there)
            elif source is self.sources[0]:
                first = Ids.of_dataset(row)
            else:
                first = Ids.after([*self._datasets.values()], row, dropped)
            source.moved.spans.append(spans_of(row, first))
            ids = {"first_token_id": first.token_id, "first_sequence_id": first.sequence_id}
            ids = {"first_tree_id": first.sequence_id} if is_of_trees(row) else ids
            self._datasets[wanted["dataset"]] = {**wanted, **ids}

    def _add(self, source: _Source, manifest: Manifest) -> None:
        """Plan one commit other than results: what no store before has brought."""
        run = source.moved.names.run.get(manifest.run or "", manifest.run)
        taken = list[tuple[_Source, Manifest, File]]()
        for file in manifest.files:
            if file.path.startswith(f"{WEIGHTS}/"):
                continue  # they come with the row of the model
            path = source.moved.path(manifest, file)
            if path in self._placed:
                self._compare(source, manifest, file, path)
            elif isinstance(file, Part) and file.table == "models":
                taken += self._model(source, manifest, file)
            else:
                if isinstance(file, Part) and file.table == "relations":
                    self._declare(source, manifest, file)
                taken.append((source, manifest, file))
        key = (manifest.kind, run or "", manifest.batch)
        is_new = run is not None and manifest.kind in ("run", "batch") and key not in self._done
        if (
            taken
            and run is not None
            and (key in self._done or (manifest.kind == "site" and len(taken) < len(manifest.files)))
        ):
            raise _Conflict(source, "run", str(manifest.run), f"{taken[0][2].path} is of one of them alone")
        if taken or is_new:
            self._done |= {key} if is_new else set()
            self._placed |= {each[0].moved.path(each[1], each[2]): each for each in taken}
            self.commits.append(_Commit(source, manifest, len(self.commits) + 1, taken))

    def _add_results(self, source: _Source, manifest: Manifest, recorded: Sequence[pl.DataFrame]) -> None:
        """Plan a commit of results, unless a store before has recorded the same."""
        for part in manifest.parts:
            rows = source.part(manifest, part).drop("recorded", "snapshot")
            if any(rows.equals(there) for there in recorded):
                continue
            self._results.append(rows)
            self.commits.append(_Commit(source, manifest, len(self.commits) + 1, [(source, manifest, part)]))

    def _model(self, source: _Source, manifest: Manifest, part: Part) -> Iterator[tuple[_Source, Manifest, File]]:
        """A model's row and its weights, from a store that keeps the weights if one does."""
        [sha256] = source.part(manifest, part)["weights_sha256"]
        keeper = next((each for each in self.sources if {weights_path(sha256), part.path} <= each.files.keys()), source)
        yield keeper, *keeper.files[part.path]
        for path in (weights_path(sha256), unembedding_path(sha256)):
            for each in (keeper, *self.sources):
                if path in each.files:
                    yield each, *each.files[path]
                    break

    def _declare(self, source: _Source, manifest: Manifest, part: Part) -> None:
        """Refuse a declared table whose name another dataset or label has."""
        for row in source.part(manifest, part).to_dicts():
            mine = row["kind"], row["owner"]
            if self._declared.setdefault(row["name"], mine) != mine:
                kind, owner = self._declared[row["name"]]
                what = f"its table {row['name']} is that of {'dataset' if kind == 'documents' else 'label'} {owner!r}"
                raise _Conflict(source, "label" if manifest.kind == "labels" else "dataset", part.owner, what)

    def _compare(self, source: _Source, manifest: Manifest, file: File, path: str) -> None:
        """Refuse a file that differs from the one that another store brought under its path."""
        other, its, there = self._placed[path]
        if there is file:  # a model's row, which came with the weights
            return
        if other is source:
            raise Damaged(f"two commits of {source.root} name {file.path}; restore the store from a copy")
        what = ""
        if isinstance(file, Part) and isinstance(there, Part):
            mine, theirs = source.part(manifest, file), other.part(its, there)
            if file.table == "models":
                what = _difference(theirs.row(0, named=True), mine.row(0, named=True), (), ("weights_sha256", "config"))
            elif manifest.kind == "labels" and file.table != "relations":
                key = mine.columns[0]
                what = "" if mine.sort(key).equals(theirs.sort(key)) else "its rows differ"
            elif not mine.equals(theirs):
                one_row = len(mine) == len(theirs) == 1
                what = (
                    one_row and _difference(theirs.row(0, named=True), mine.row(0, named=True))
                ) or f"{file.path} differs"
        elif source.is_changed(manifest, file) or other.is_changed(its, there):
            is_same = source.moved.metadata(source.content(file)) == other.moved.metadata(other.content(there))
            what = "" if is_same else f"{file.path} differs"
        elif file.xxh3_128 != there.xxh3_128:
            what = f"{file.path} differs"
        kind, name = _whose(manifest, file)
        if what and kind not in KINDS:
            raise BadInput(
                f"{source.root} and {other.root} hold another {kind} under one hash, {name[:12]} ({what}); keep them apart"
            )
        if what:
            raise _Conflict(source, kind, name, what)
        if isinstance(file, Part) and file.table in ("datasets", "runs", "relations", "models"):
            self.shared[f"{kind} {name[:12] if kind == 'model' else name}"] = None


def _whose(manifest: Manifest, file: File) -> tuple[str, str]:
    """What a file is of, and its name in its store: run, dataset, label, model, vocabulary."""
    if not isinstance(file, Part) or file.table in OF_THE_RUN:
        return "run", str(manifest.run)
    if manifest.kind == "labels":
        return "label", file.owner
    return {"models": "model", "vocabularies": "vocabulary"}.get(file.table, "dataset"), file.owner


def _difference(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], but: Sequence[str] = (), only: Sequence[str] = ()
) -> str:
    """The first column in which two rows differ; "" if they differ in none."""
    for key in only or dict.fromkeys([*stored, *wanted]):
        if key not in but and stored.get(key) != wanted.get(key):
            mine, theirs = str(wanted.get(key)), str(stored.get(key))
            return f"{key} {mine}, not {theirs}" if len(mine + theirs) < 80 else f"another {key}"
    return ""
