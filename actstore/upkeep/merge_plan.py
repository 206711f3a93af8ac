"""What a merged store will hold: which commits of which stores, and where two stores disagree.

A file has one path, so whatever two stores hold under one path must be the same, but for the ids;
then the merged store holds it once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

import polars as pl
import xxhash

from actstore.arrays.address import Ids, is_of_trees
from actstore.catalog import witness
from actstore.catalog.declared import not_a_name
from actstore.commits.format import ARRAYS, WEIGHTS, unembedding_path, weights_path
from actstore.commits.log import live, manifests
from actstore.commits.manifest import Manifest, Part, Shard, manifest_path
from actstore.errors import ActstoreError, BadInput, Damaged, NotStored, advised, nearest
from actstore.interventions import hash_of
from actstore.named import NAME
from actstore.storage.at import at
from actstore.storage.backend import File
from actstore.upkeep.moved import OF_THE_RUN, Moved, Names, spans_of
from actstore.writing.committed import dropped_ids
from actstore.writing.parts import as_stored, rows_committed

KINDS = ("run", "dataset", "label")
OF_SNAPSHOTS = ("results", "interventions")  # tables whose rows name a commit
FIRST_IDS = ("first_tree_id", "first_token_id", "first_sequence_id")


@dataclass
class Source:
    """A store that is merged.

    Attributes:
        root: the store.
        log: its commits, none of which names what belongs to another.
        moved: its new ids and names.
        at_commit: number of commits of the new store after each of its own; the first is 0.
    """

    root: Path
    log: list[Manifest]
    moved: Moved = field(default_factory=lambda: Moved(Names()))
    at_commit: list[int] = field(default_factory=lambda: [0])

    @cached_property
    def committed(self) -> list[Manifest]:
        """The log without what was dropped."""
        return live(self.log)

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All rows of one of the small tables."""
        for part in [part for manifest in self.committed for part in manifest.parts if part.table == table]:
            self.content(part)
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
        """Path → the file, and the commit that brought it."""
        return {file.path: (manifest, file) for manifest in self.committed for file in manifest.files}

    def content(self, file: File) -> bytes:
        """The bytes of a file, which are those that were committed."""
        try:
            content = at(self.root).read(file.path, file.bytes)
        except (FileNotFoundError, NotADirectoryError, Damaged):
            raise self.damaged(file) from None
        if len(content) != file.bytes or xxhash.xxh3_128_hexdigest(content) != file.xxh3_128:
            raise self.damaged(file)
        return content

    def part(self, manifest: Manifest, part: Part) -> pl.DataFrame:
        """The rows of a part as the new store holds them; those of results without their number."""
        content = self.content(part)
        with self._holding(part):
            rows = as_stored(part.table, pl.read_parquet(content))
            rows = as_stored(part.table, self.moved.rows(manifest, part.table, rows))
            if part.table == "models" and len(rows) != 1:
                raise ValueError(f"{len(rows)} models")
            if part.table in OF_SNAPSHOTS:
                rows = rows.with_columns(pl.col("snapshot").replace(dict(enumerate(self.at_commit))))
            if part.table == "results":
                rows = rows.with_columns(recorded=None)
            if part.table == "runs":
                rows = self._with_hash(manifest, rows)
        return rows

    def _with_hash(self, manifest: Manifest, rows: pl.DataFrame) -> pl.DataFrame:
        """A run's row, which notes the hash of the edits as the new store holds them."""
        parts = {part.table: part for part in manifest.parts}
        if "edits" not in parts:
            return rows
        edited = hash_of(*(self.part(manifest, parts[table]) for table in ("interventions", "edits")))
        return rows.with_columns(versions=pl.lit(json.dumps(json.loads(rows["versions"][0]) | {"edits": edited})))

    def metadata(self, file: File) -> bytes:
        """The zarr.json of an array or group, as the new store holds it."""
        content = self.content(file)
        with self._holding(file):
            return self.moved.metadata(content)

    @contextmanager
    def _holding(self, file: File) -> Iterator[None]:
        """Turn what a file of another content leads to into one error."""
        try:
            yield
        except (ActstoreError, pl.exceptions.PolarsError, LookupError, TypeError, ValueError, AttributeError) as error:
            said = str(error).splitlines()[0]
            raise Damaged(
                f"{self.root / file.path} does not hold what it should ({said}); restore it from a copy"
            ) from error

    def is_changed(self, manifest: Manifest, file: File) -> bool:
        """True if a file has other bytes in the new store, perhaps."""
        if isinstance(file, Part):
            return self.moved.changes or file.table in OF_SNAPSHOTS
        return self.moved.changes and not isinstance(file, Shard) and file.path.startswith(f"{ARRAYS}/")

    def damaged(self, file: File) -> Damaged:
        """The error for a file that is not what was committed."""
        return Damaged(
            f"{self.root / file.path} is missing, or is not what was committed; mend it with "
            f"{advised('repair', self.root)}, then merge again"
        )


@dataclass
class Commit:
    """A commit of the new store, and the files that it takes, each from its store."""

    source: Source
    manifest: Manifest
    number: int
    files: list[tuple[Source, Manifest, File]]


class Conflict(Exception):
    """Two stores hold something else under one name."""

    def __init__(self, source: Source, kind: str, name: str, what: str) -> None:
        self.source, self.kind, self.name, self.what = source, kind, name, what


def _whole_log(root: Path) -> list[Manifest]:
    """A store's log.

    Raises:
        Damaged: the log is not whole, or not the one that the catalog was built from.
    """
    committed = manifests(root, least=witness.least(root))
    witness.refuse_conflict(root, committed)
    for number, what in witness.at_odds(committed):
        raise Damaged(f"{root / manifest_path(number)}: {what}; restore it from a copy of the store")
    return committed


def planned(roots: Sequence[Path], out: Path, rename: Sequence[tuple[Any, ...]]) -> Plan:
    """The plan of a merge.

    Raises:
        BadInput: two stores hold something else under one name; names the command that renames all
            such names.
    """
    asked, first = list(rename), None
    logs = [_whole_log(root) for root in roots]
    while True:
        sources = _renamed([Source(root, log) for root, log in zip(roots, logs, strict=True)], asked)
        plan = Plan(sources)
        try:
            for source in sources:
                plan.add(source)
        except Conflict as conflict:
            first = first or conflict
            of = conflict.source.root, conflict.kind, conflict.name
            taken = {*chain(*(source.held[conflict.kind] for source in sources))}
            taken |= {new for _, kind, _, new in asked if kind == conflict.kind}
            joint = "_" if conflict.kind == "label" else "-"
            tried = (f"{conflict.name[:55]}{joint}{turn}" for turn in count(2))
            free = next(name for name in tried if name not in taken)
            asked = [*(names for names in asked if names[:3] != of), (*of, free)]
            continue
        if first is None:
            return plan
        options = [word for names in asked for word in ("--rename", *names)]
        raise BadInput(
            f"{first.source.root} holds another {first.kind} {first.name!r} than a store before it ({first.what}); rename it "
            f"with {advised('merge', *roots, out, *options)}"
        )


def _renamed(sources: list[Source], rename: Sequence[tuple[Any, ...]]) -> list[Source]:
    """The stores, with the new names that were asked for."""
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


class Plan:
    """The commits of the merged store."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.commits: list[Commit] = []
        self.shared: dict[str, None] = {}
        self._datasets: dict[str, dict[str, Any]] = {}  # rows of `datasets`, with new names and ids
        self._placed: dict[str, tuple[Source, Manifest, File]] = {}
        self._declared: dict[str, tuple[str, str]] = {}  # table → kind and owner
        self._done: set[tuple[str, str, int | None]] = set()
        self._results: list[pl.DataFrame] = []

    def add(self, source: Source) -> None:
        """Plan the commits that a store brings.

        Raises:
            Conflict: a name is taken by something else.
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

    def _place_datasets(self, source: Source) -> None:
        """Find the ids of a store's datasets."""
        names = source.moved.names.dataset
        dropped = dropped_ids(self.sources[0].log)
        for row in source.rows("relations"):
            if row["kind"] == "documents":
                source.moved.documents[row["name"]] = row["owner"]
        for row in source.rows("datasets"):
            if not _has_ids(row):
                raise Damaged(f"{source.root} holds a dataset {row['dataset']!r} without ids; restore it from a copy")
            name, original = row["dataset"], row.get("variant_of") or ""
            wanted = {**row, "dataset": names.get(name, name), "variant_of": names.get(original, original) or None}
            there = self._datasets.get(wanted["dataset"])
            if there is not None:
                if what := _difference(there, wanted, FIRST_IDS):
                    raise Conflict(source, "dataset", name, what)
                first = Ids.of_dataset(there)
            elif source is self.sources[0]:
                first = Ids.of_dataset(row)
            else:
                first = Ids.after([*self._datasets.values()], row, dropped)
            source.moved.spans.append(spans_of(row, first))
            ids = {"first_token_id": first.token_id, "first_sequence_id": first.sequence_id}
            ids = {"first_tree_id": first.sequence_id} if is_of_trees(row) else ids
            self._datasets[wanted["dataset"]] = {**wanted, **ids}

    def _add(self, source: Source, manifest: Manifest) -> None:
        """Plan one commit other than results: what no store before has brought."""
        run = source.moved.names.run.get(manifest.run or "", manifest.run)
        taken = list[tuple[Source, Manifest, File]]()
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
            and (key in self._done or (manifest.is_appended and len(taken) < len(manifest.files)))
        ):
            raise Conflict(source, "run", str(manifest.run), f"{taken[0][2].path} is of one of them alone")
        if taken or is_new:
            self._done |= {key} if is_new else set()
            self._placed |= {each[0].moved.path(each[1], each[2]): each for each in taken}
            self.commits.append(Commit(source, manifest, len(self.commits) + 1, taken))

    def _add_results(self, source: Source, manifest: Manifest, recorded: Sequence[pl.DataFrame]) -> None:
        """Plan a commit of results, unless a store before has recorded the same."""
        for part in manifest.parts:
            rows = source.part(manifest, part).drop("recorded", "snapshot")
            if any(rows.equals(there) for there in recorded):
                continue
            self._results.append(rows)
            self.commits.append(Commit(source, manifest, len(self.commits) + 1, [(source, manifest, part)]))

    def _model(self, source: Source, manifest: Manifest, part: Part) -> Iterator[tuple[Source, Manifest, File]]:
        """A model's row and its weights, from a store that keeps the weights if one does."""
        [sha256] = source.part(manifest, part)["weights_sha256"]
        keeper = next((each for each in self.sources if {weights_path(sha256), part.path} <= each.files.keys()), source)
        yield keeper, *keeper.files[part.path]
        for path in (weights_path(sha256), unembedding_path(sha256)):
            for each in (keeper, *self.sources):
                if path in each.files:
                    yield each, *each.files[path]
                    break

    def _declare(self, source: Source, manifest: Manifest, part: Part) -> None:
        """Refuse a declared table whose name another dataset or label has."""
        for row in source.part(manifest, part).to_dicts():
            mine = row["kind"], row["owner"]
            if self._declared.setdefault(row["name"], mine) != mine:
                kind, owner = self._declared[row["name"]]
                what = f"its table {row['name']} is that of {'dataset' if kind == 'documents' else 'label'} {owner!r}"
                raise Conflict(source, "label" if manifest.kind == "labels" else "dataset", part.owner, what)

    def _compare(self, source: Source, manifest: Manifest, file: File, path: str) -> None:
        """Refuse a file that differs from the one that another store brought under its path."""
        other, its, there = self._placed[path]
        if there is file:  # a model's row, which came with the weights
            return
        if other is source:
            raise Damaged(f"two commits of {source.root} name {file.path}; restore the store from a copy")
        what = ""
        if isinstance(file, Part) and isinstance(there, Part):
            mine, theirs = source.part(manifest, file), other.part(its, there)
            if file.table == "interventions":  # one run may have been made after more or fewer commits
                mine, theirs = mine.drop("snapshot"), theirs.drop("snapshot")
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
            is_same = source.metadata(file) == other.metadata(there)
            what = "" if is_same else f"{file.path} differs"
        elif file.xxh3_128 != there.xxh3_128:
            what = f"{file.path} differs"
        kind, name = _whose(manifest, file)
        if what and kind not in KINDS:
            raise BadInput(
                f"{source.root} and {other.root} hold another {kind} under one hash, {name[:12]} ({what}); keep them apart"
            )
        if what:
            raise Conflict(source, kind, name, what)
        if isinstance(file, Part) and file.table in ("datasets", "runs", "relations", "models"):
            self.shared[f"{kind} {name[:12] if kind == 'model' else name}"] = None


def _has_ids(dataset: Mapping[str, Any]) -> bool:
    """False if a row of `datasets` lacks its first ids or their number, as no writer writes it."""
    try:
        return Ids.beyond([dict(dataset)]) >= Ids.of_dataset(dataset)
    except TypeError:
        return False


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
