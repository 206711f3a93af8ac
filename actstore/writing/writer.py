"""A store opened for writing: define a run, commit batches, record results, publish the catalog.

One process at a time holds a store for writing. A commit is a pure function of the run's definition
and the batch's number, so a writer that starts again after an interruption finds or makes the same
bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import polars as pl

from actstore.arrays.address import Ids
from actstore.catalog import build, witness
from actstore.catalog import tables as catalog_tables
from actstore.catalog.declared import Relation, View, parsed
from actstore.commits import checkpoint, log
from actstore.commits.format import check_format
from actstore.commits.log import refuse_astray
from actstore.commits.manifest import Dropped, Manifest, Shard
from actstore.errors import BadInput, Damaged, NotStored, nearest
from actstore.storage.at import at, place
from actstore.storage.backend import Held
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
from actstore.writing.contents import Content, array_contents, definition_contents, part_content, set_contents
from actstore.writing.create import create
from actstore.writing.parts import rows_committed
from actstore.writing.plan import RunPlan
from actstore.writing.published import Published


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
        built_from = catalog_tables.built_from(root)
        self._log = log.manifests(root, least=witness.least(root, built_from))
        log.check_sizes(root, self._log)
        refuse_astray(root, self._log)
        witness.refuse_conflict(root, self._log, built_from)
        last_drop = max((manifest.number for manifest in self._log if manifest.dropped), default=0)
        if last_drop and last_drop > built_from[0]:
            build.publish(root)  # or the catalog would name files that the sweep removes
        log.sweep(root, self._log)
        catalog_tables.discard_beside(at(root), catalog_tables.CATALOG)
        self._published = Published(root, self._log, lease.check)
        self._in_catalog = 0  # commits that a catalog of this writer holds
        self._publishing = threading.Lock()

    @property
    def committed(self) -> Sequence[Manifest]:
        """All commits, in order."""
        return self._log

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
        with self._publishing:
            self._lease.check()
            if not self._log or self._in_catalog != len(self._log):
                self._in_catalog = build.publish(self.root)
            checkpoint.write(self.root, self._log)
            return self._in_catalog

    def publish_after(self, wait: Callable[[], None]) -> None:
        """Bring the catalog up to the last commit, most of it before that commit is made.

        For a thread of its own; `publish` waits for it.

        Args:
            wait: called when the rows of the commits so far are in the new catalog; returns when
                the last batch is committed. If it raises, no catalog is published.
        """

        def wait_and_check() -> None:
            wait()
            self._lease.check()

        if at(self.root).at_once == 1:  # a bucket notes the number of commits before the catalog is made
            with self._publishing:
                self._in_catalog = build.publish(self.root, wait=wait_and_check)

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
        rows = [
            part_content("models", model["weights_sha256"], [model]),
            part_content("datasets", dataset, [plan.dataset_row(first)]),
            *set_contents(plan),
            part_content("runs", plan.run, [plan.row(first)]),
            part_content("sites", plan.run, [site.row(plan.run) for site in plan.sites]),
            *(part_content(table, plan.run, rows) for table, rows in plan.of_run.items()),
        ]
        published = self._published
        parts = [*chain.from_iterable(published.each(published.part, rows))]
        others = [*chain.from_iterable(published.each(published.other, definition_contents(plan, first)))]
        self._commit(Manifest(len(self._log) + 1, "run", plan.run, None, parts, [], others))
        return first

    def _add(self, plan: RunPlan, first: Ids) -> None:
        """Commit the definition of those sites of a plan that its stored run lacks."""
        models, sites = (self.rows_of(table).to_dicts() for table in ("models", "sites"))
        if new := new_sites(models, sites, plan, self.sites_of(plan.run)):
            rows = [part_content("sites", f"{plan.run}/{site.site}", [site.row(plan.run)]) for site in new]
            others = [
                file
                for each in array_contents(plan, new, first)
                for file in self._published.file(each.path, each.content)
            ]
            parts = [part for row in rows for part in self._published.part(row)]
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
        contents: Iterable[Content],
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
        made = self._published.batch(plan, batch, first_sequence_id, n_sequences, contents, kind, pool)
        self._commit(replace(made, number=len(self._log) + 1))

    def commit_published(self, made: Manifest) -> bool:
        """Commit a batch whose files are published.

        Args:
            made: see Published.batch; its batch is not committed, or it adds sites to one.

        Returns:
            False if it adds sites that are there; nothing is done then.

        Raises:
            BadInput: one of the files is committed with other content.
            Damaged: one of the files is missing.
        """
        lacking = self._published.lacking(made.files)
        if made.kind == "site" and not lacking:
            return False
        parts = [part for part in made.parts if part.path in lacking]
        shards = [shard for shard in made.shards if shard.path in lacking]
        number = len(self._log) + 1
        self._commit(replace(made, number=number, previous=None, parts=parts, shards=shards))
        return True

    def record(self, results: pl.DataFrame) -> int:
        """Commit a study's results and return the commit's number.

        Args:
            results: rows of `results` without `recorded`.
        """
        number = len(self._log) + 1
        rows = results.with_columns(recorded=pl.lit(number, pl.Int32))
        self._commit(
            Manifest(number, "results", parts=self._published.part(part_content("results", f"{number:08d}", rows)))
        )
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
        others = self._published.file(f"{folder}/zarr.json", appended.metadata())
        shards = [
            Shard(**vars(file), run=run, site=site, batch=batch, first_tree_id=first, n_trees=n)
            for batch, first, n, content in appended.shards()
            for file in self._published.file(f"{folder}/{layout.shard_name(batch)}", content)
        ]
        parts = self._published.part(part_content("sites", f"{run}/{site}", [appended.plan.row(run)]))
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
        parts = [file for part in contents_of for file in self._published.part(part)]
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

    def agrees(self, part: Content) -> bool:
        """True if the committed part of the same path holds the same rows; see Published."""
        return self._published.agrees(part)

    def _commit(self, manifest: Manifest) -> None:
        self._lease.check()
        log.check_sizes(self.root, [manifest])  # a second writer that ignores the lease may have removed files
        self._log.append(log.commit(self.root, manifest, self._log[-1] if self._log else None))
        self._published.files |= {file.path: file for file in manifest.files}
        for path in manifest.dropped.files if manifest.dropped else ():
            del self._published.files[path]
