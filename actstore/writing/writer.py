"""A store opened for writing: define a run, commit batches, record results, publish the catalog.

One process at a time holds a store for writing. A commit is a pure function of the run's definition
and the batch's number, so a writer that starts again after an interruption finds or makes the same
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl
import xxhash

from actstore.arrays.address import Ids
from actstore.arrays.metadata import metadata
from actstore.catalog import build, part_types, witness
from actstore.catalog import tables as catalog_tables
from actstore.catalog.declared import Relation, View, parsed
from actstore.commits import checkpoint, log
from actstore.commits.format import ARRAYS, check_format, part_path, unembedding_path, weights_path
from actstore.commits.log import refuse_astray
from actstore.commits.manifest import Dropped, Manifest, Part, Shard
from actstore.errors import BadInput, Damaged, NotStored, nearest
from actstore.storage.at import at, place
from actstore.storage.backend import File, Held
from actstore.storage.refused import needing_room
from actstore.writing.appending import Appended
from actstore.writing.committed import (
    batches_of,
    check_tables,
    dropped_ids,
    must_agree,
    new_sites,
    sites_of,
    stored_dataset,
    stored_run,
)
from actstore.writing.create import create
from actstore.writing.parts import GROUP, as_parquet, read_part, rows_committed
from actstore.writing.plan import RunPlan, SitePlan


@contextmanager
def open_writer(path: str | Path, *, make: bool = False, wait: float = 0.0) -> Iterator[Writer]:
    """Hold a store for writing, and publish its catalog at the end, also after an error.

    Args:
        path: the store's folder.
        make: make the store if it does not exist.
        wait: seconds to wait for another process that holds the store.

    Yields:
        The Writer.

    Raises:
        Busy: another process held the store for all that time.
        NotStored: the store does not exist, and `make` is false.
        NoRoom: the disk is full.
        Damaged: a committed file is missing or has another size, a link on the way to a file leads
            nowhere or into another store, or the catalog was built from other manifests; nothing
            was touched.
        Unsupported: the file system lacks hard links, locks or fsync.
    """
    root = place(path)
    if make and not at(root).has("store.json"):
        create(root, wait)
    check_format(root)
    with needing_room(root), at(root).lease(wait) as lease:
        writer = Writer(root, lease)
        try:
            yield writer
        finally:
            writer.publish()


class Writer:
    """The writing end of a store, while its lease is held; see `open_writer`."""

    def __init__(self, root: Path, lease: Held) -> None:
        self.root, self._lease = root, lease
        # before anything is swept: is the log whole?
        self._log = log.manifests(root, least=witness.least(root))
        log.check_sizes(root, self._log)
        refuse_astray(root, self._log)
        witness.refuse_conflict(root, self._log)
        last_drop = max((manifest.number for manifest in self._log if manifest.dropped), default=0)
        if last_drop and last_drop > catalog_tables.snapshot(root):
            build.publish(root)  # or the catalog would name files that the sweep removes
        log.sweep(root, self._log)
        catalog_tables.discard_beside(at(root), catalog_tables.CATALOG)
        self._files = {file.path: file for manifest in log.live(self._log) for file in manifest.files}

    def rows_of(self, table: str) -> pl.DataFrame:
        """All committed rows of one of the small tables (models, datasets, runs, sites)."""
        return rows_committed(self.root, self._log, table)

    def batches(self, run: str) -> set[int]:
        """Numbers of the run's committed batches."""
        return batches_of(self._log, run)

    def sites_of(self, run: str) -> dict[int, set[str]]:
        """Number of each committed batch of the run → TransformerLens' names of its sites."""
        return sites_of(self._log, run)

    def publish(self) -> int:
        """Bring catalog and checkpoint up to the last commit, and return its snapshot number."""
        self._lease.check()
        snapshot = build.publish(self.root)
        checkpoint.write(self.root, self._log)
        return snapshot

    def define(self, plan: RunPlan) -> Ids:
        """Commit a run's definition; an equal definition that is committed already is kept.

        If the plan has sites that the stored run lacks, their definition is committed.

        Returns:
            The first ids of the run's dataset.

        Raises:
            BadInput: the run's or dataset's name is taken by another, the rows do not fit the
                tables, or the run is not finished and the plan has other sites.
        """
        model = self._model(plan.model)
        known = self.rows_of("datasets").to_dicts()
        stored = stored_dataset(known, plan.dataset)
        first = Ids.of_dataset(stored) if stored else Ids.after(known, plan.dataset, dropped_ids(self._log))
        if stored_run(self.rows_of("runs").to_dicts(), plan):
            self._add(plan, first)
            return first
        check_tables(self.rows_of("relations").to_dicts(), plan)
        dataset = str(plan.dataset["dataset"])
        parts = [
            *self._part(part_content("models", model["weights_sha256"], [model])),
            *self._part(part_content("datasets", dataset, [plan.dataset_row(first)])),
            *(part for content in set_contents(plan) for part in self._part(content)),
            *self._part(part_content("runs", plan.run, [plan.row(first)])),
            *self._part(part_content("sites", plan.run, [site.row(plan.run) for site in plan.sites])),
            *(part for table, rows in plan.of_run.items() for part in self._part(part_content(table, plan.run, rows))),
        ]
        contents = definition_contents(plan, first)
        others = [file for content in contents for file in self._file(content.path, content.content)]
        self._commit(Manifest(len(self._log) + 1, "run", plan.run, None, parts, [], others))
        return first

    def _add(self, plan: RunPlan, first: Ids) -> None:
        """Commit the definition of those sites of a plan that its stored run lacks."""
        models, sites = (self.rows_of(table).to_dicts() for table in ("models", "sites"))
        if new := new_sites(models, sites, plan, self.sites_of(plan.run)):
            rows = [part_content("sites", f"{plan.run}/{site.site}", [site.row(plan.run)]) for site in new]
            others = [file for each in array_contents(plan, new, first) for file in self._file(each.path, each.content)]
            parts = [part for row in rows for part in self._part(row)]
            self._commit(Manifest(len(self._log) + 1, "site", plan.run, None, parts, [], others))

    def _model(self, model: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row of `models` for these weights: the stored row if there is one, under any name."""
        for row in self.rows_of("models").to_dicts():
            if row["weights_sha256"] == model["weights_sha256"]:
                what = f"the model of weights {model['weights_sha256'][:12]}"
                must_agree(
                    what, row, {"config": model.get("config")}, "use a store of its own for the new configuration"
                )
                return row
        return model

    def commit_batch(
        self,
        plan: RunPlan,
        batch: int,
        first_sequence_id: int,
        n_sequences: int,
        contents: Sequence[Content],
        kind: Literal["batch", "site"] = "batch",
        pool: Executor | None = None,
    ) -> None:
        """Commit one batch of sequences of a run, or of sites that are added to it.

        Args:
            first_sequence_id: sequence_id of the batch's first sequence; a tree's is its tree_id.
            n_sequences: number of sequences in the batch.
            contents: the batch's files; see batch_contents.
            kind: `site` for sites of a batch that is committed already.
            pool: publishes the shards, several at a time; default: one after another.

        Raises:
            BadInput: the batch, or the same trees by another run, are committed with other content.
        """
        parts, shards = list[Part](), list[Shard]()
        known = {"", *part_types.every_column(), *plan.declared}
        for content in contents:
            if content.table not in known:
                raise BadInput(
                    f"nobody declared a table {content.table}; declare it first, with the dataset that it belongs to"
                )
        of_shards = [content for content in contents if not content.table]
        published = (pool.map if pool else map)(lambda shard: self._file(shard.path, shard.content), of_shards)
        for content in contents:
            if content.table:
                parts += self._part(content, first_sequence_id, n_sequences)
        for content, files in zip(of_shards, published, strict=True):
            shards += [
                Shard(
                    **vars(file),
                    run=plan.run,
                    site=content.site,
                    batch=batch,
                    first_tree_id=first_sequence_id,
                    n_trees=n_sequences,
                )
                for file in files
            ]
        self._commit(Manifest(len(self._log) + 1, kind, plan.run, batch, parts, shards))

    def record(self, results: pl.DataFrame) -> int:
        """Commit a study's results and return the commit's number.

        Args:
            results: rows of `results` without `recorded`.
        """
        number = len(self._log) + 1
        rows = results.with_columns(recorded=pl.lit(number, pl.Int32))
        self._commit(Manifest(number, "results", parts=self._part(part_content("results", f"{number:08d}", rows))))
        return number

    def append(self, appended: Appended) -> int:
        """Commit a new site of a stored run, and return the commit's number.

        Raises:
            BadInput: the run has a site of the name.
        """
        run, site, number = appended.run, appended.plan.site, len(self._log) + 1
        held = [row for row in self.rows_of("sites").to_dicts() if row["run"] == run]
        if any(site in (row["site"], row["short"]) for row in held):
            raise BadInput(f"run {run!r} holds a site {site!r}; take another name")
        folder, layout = appended.plan.path(run), appended.plan.layout
        others = self._file(f"{folder}/zarr.json", appended.metadata())
        shards = [
            Shard(**vars(file), run=run, site=site, batch=batch, first_tree_id=first, n_trees=n)
            for batch, first, n, content in appended.shards()
            for file in self._file(f"{folder}/{layout.shard_name(batch)}", content)
        ]
        parts = self._part(part_content("sites", f"{run}/{site}", [appended.plan.row(run)]))
        self._commit(Manifest(number, "site", run, None, parts, shards, others))
        return number

    def label(self, relation: Relation, rows: pl.DataFrame, replace: bool = False) -> int:
        """Commit a user's labels as a declared table, and return the commit's number.

        Args:
            relation: the table; its owner is its own name.
            rows: see Relation.fit.
            replace: drop the labels of the name, if there are any, in the same commit.

        Raises:
            BadInput: the store has a table of the name, which is not to be replaced.
        """
        return self._declare(relation, "labels", {relation.name: rows}, replace)

    def view(self, view: View, replace: bool = False) -> int:
        """Commit a user's view, which a session has checked, and return the commit's number.

        Args:
            replace: drop the view of the name, if there is one, in the same commit.

        Raises:
            BadInput: the store has a table or view of the name, which is not to be replaced.
        """
        return self._declare(view, "view", {}, replace)

    def _declare(self, declared: Relation | View, kind: str, rows: Mapping[str, pl.DataFrame], replace: bool) -> int:
        name = declared.name
        self._refuse_declared(name, kind, replace)
        number = len(self._log) + 1
        held = [part for manifest in log.live(self._log) if manifest.kind == "labels" for part in manifest.parts]
        old = [part.path for part in held if part.owner == name]
        dropped = Dropped("label", name, old, *self._ids_beyond()) if old else None
        version = number if old else None  # in the names of the files, since the old ones are still there
        contents = {"relations": pl.DataFrame([declared.row()]), **rows}
        contents_of = [part_content(table, name, frame, version) for table, frame in contents.items()]
        parts = [file for part in contents_of for file in self._part(part)]
        self._commit(Manifest(number, "labels", parts=parts, dropped=dropped))
        return number

    def labels(self, name: str) -> tuple[Relation, pl.DataFrame]:
        """The committed labels of a name: their declaration and their rows.

        Raises:
            NotStored: there are none.
            Damaged: a part is not what was committed.
        """
        rows = [row for row in self.rows_of("relations").to_dicts() if row["kind"] == "labels"]
        names = [row["name"] for row in rows]
        if name not in names:
            raise NotStored(
                f"no labels {name!r}{nearest(name, names)}; {self.root} holds {', '.join(names) or 'none'}: leave out --add"
            )
        try:
            return parsed(rows[names.index(name)]), self.rows_of(name)
        except ValueError as error:
            raise Damaged(f"labels {name!r} of {self.root} are not what was committed ({error})") from error

    def _ids_beyond(self) -> Ids:
        return Ids.beyond(self.rows_of("datasets").to_dicts(), dropped_ids(self._log))

    def _refuse_declared(self, name: str, kind: str, replace: bool) -> None:
        """Refuse labels or a view with the name of a declared table, unless they replace it."""
        for row in (row for row in self.rows_of("relations").to_dicts() if row["name"] == name):
            if row["kind"] != kind:
                of = {
                    "documents": f"table holds the documents of dataset {row['owner']!r}",
                    "labels": "table holds labels",
                }
                raise BadInput(f"got the name {name!r}; that {of.get(row['kind'], 'is a view')}: take another name")
            if not replace and kind == "view":
                raise BadInput(
                    f"got the name {name!r}; {self.root} holds a view of that name: replace it (--replace, replace=True), or take "
                    "another name"
                )
            if not replace:
                raise BadInput(
                    f"got the name {name!r}; {self.root} holds labels of that name: replace them (--replace, replace=True), add "
                    "rows to them (--add, add=True), or take another name"
                )

    def drop(self, dropped: Dropped) -> int:
        """Commit that files are dropped, and return the commit's number.

        The next writer, or `repair`, removes them; whoever has the store open still reads them.

        Args:
            dropped: see dropping.plan.
        """
        number = len(self._log) + 1
        self._commit(Manifest(number, "drop", dropped=dropped))
        return number

    def _commit(self, manifest: Manifest) -> None:
        self._lease.check()
        log.check_sizes(self.root, [manifest])  # a second writer that ignores the lease may have removed files
        self._log.append(log.commit(self.root, manifest, self._log[-1] if self._log else None))
        self._files |= {file.path: file for file in manifest.files}
        for path in manifest.dropped.files if manifest.dropped else ():
            del self._files[path]

    def _part(self, part: Content, first_tree_id: int | None = None, n_trees: int | None = None) -> list[Part]:
        """Publish rows of a table; returns [] if an earlier commit brought the same rows."""
        if part.path in self._files:
            if not self.agrees(part):
                raise _otherwise(self.root / part.path)
            return []
        table = part.table
        origin = part.owner, part.batch, first_tree_id, n_trees
        files = self._file(part.path, part.content)
        return [Part(file.path, file.bytes, file.xxh3_128, table, part.rows, *origin) for file in files]

    def agrees(self, part: Content) -> bool:
        """True if the committed part of the same path holds the same rows.

        Args:
            part: rows of a part that is committed.
        """
        if self._has(part.path, part.content):
            return True
        held = read_part(self.root, part.path)  # another version may encode the same rows otherwise
        return held.equals(pl.read_parquet(bytes(part.content)))

    def _file(self, path: str, content: bytes | memoryview) -> list[File]:
        """Publish a file; returns [] if an earlier commit brought the same bytes."""
        if path in self._files:
            if not self._has(path, content):
                raise _otherwise(self.root / path)
            return []
        self._lease.check()
        return [at(self.root).publish(path, content)]

    def _has(self, path: str, content: bytes | memoryview) -> bool:
        return xxhash.xxh3_128_hexdigest(content) == self._files[path].xxh3_128


@dataclass(frozen=True)
class Content:
    """A file to commit: its path in the store, its bytes, and facts for its manifest.

    Attributes:
        path: relative to the store.
        content: the file's bytes.
        table: a part's table.
        rows: a part's number of rows.
        owner: whose rows a part holds; see manifest.Part.
        batch: which batch of the owner's trees a part holds; None for no batch.
        site: a shard's site, TransformerLens' name.
    """

    path: str
    content: bytes | memoryview
    table: str = ""
    rows: int = 0
    owner: str = ""
    batch: int | None = None
    site: str = ""


def set_contents(plan: RunPlan) -> list[Content]:
    """The parts that come with a dataset's definition, besides its row."""
    owners = {"vocabularies": plan.dataset.get("vocabulary")}
    return [
        part_content(table, str(owners.get(table, plan.dataset["dataset"])), rows) for table, rows in plan.parts.items()
    ]


def definition_contents(plan: RunPlan, first: Ids) -> list[Content]:
    """The files of a run's definition other than its parts: weights, and metadata of its arrays.

    Args:
        first: the first ids of the run's dataset.
    """
    arrays = array_contents(plan, plan.sites, first)
    held = {weights_path: plan.weights, unembedding_path: plan.unembedding}
    weights = [Content(path(plan.model["weights_sha256"]), content) for path, content in held.items() if content]
    return [*weights, Content(f"{ARRAYS}/{plan.run}/zarr.json", GROUP), *arrays]


def array_contents(plan: RunPlan, sites: Sequence[SitePlan], first: Ids) -> list[Content]:
    """The metadata of some arrays of a run.

    Args:
        first: the first ids of the run's dataset.
    """
    begins = {"first_tree_id": first.sequence_id} if plan.of_trees else {"first_token_id": first.token_id}
    of_run = {"weights_sha256": plan.model["weights_sha256"], **begins}
    return [
        Content(
            f"{site.path(plan.run)}/zarr.json",
            metadata(site.layout, site.axes, {"run": plan.run, "site": site.site, **of_run}),
        )
        for site in sites
    ]


def batch_contents(
    plan: RunPlan,
    batch: int,
    of_trees: Mapping[str, pl.DataFrame],
    of_run: Mapping[str, pl.DataFrame],
    arrays: Mapping[str, memoryview],
) -> list[Content]:
    """The files of one batch of a run.

    Args:
        of_trees: rows of `trees`, `edges`, `tokens`; empty if another run over the dataset brought
            them.
        of_run: rows of `predictions` and `outcomes`, or of `generations`.
        arrays: the packed shard of each site, by TransformerLens' name.

    Raises:
        BadInput: the rows do not fit their tables.
    """
    owners = ((str(plan.dataset["dataset"]), of_trees), (plan.run, of_run))
    parts = [part_content(table, owner, frame, batch) for owner, tables in owners for table, frame in tables.items()]
    names = {site.site: f"{site.path(plan.run)}/{site.layout.shard_name(batch)}" for site in plan.sites}
    return [*parts, *(Content(path, arrays[site], site=site) for site, path in names.items())]


def part_content(
    table: str, owner: str, rows: pl.DataFrame | Sequence[Mapping[str, Any]], batch: int | None = None
) -> Content:
    """A part of a table.

    Args:
        owner: whose rows they are; see manifest.Part.
        batch: the batch of the owner's trees; None for no batch.
    """
    frame = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(rows, infer_schema_length=None)
    return Content(part_path(table, owner, batch), as_parquet(table, frame), table, len(frame), owner, batch)


def _otherwise(path: Path) -> BadInput:
    return BadInput(
        f"{path} is committed and what is to be stored under its name now differs: it was made by another version or "
        "from other input; name the new run and its set of trees otherwise (--run, --dataset)"
    )
