"""What becomes of a store's rows and files in a merged store: new ids, and new names where asked.

Each dataset owns ranges of token ids and of sequence ids. A merged store may give a dataset other
ranges of the same length, so an id moves with its dataset's range.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from actstore.arrays.address import Ids
from actstore.catalog.declared import as_name
from actstore.catalog.part_types import every_column
from actstore.catalog.witness import OF_RUN
from actstore.commits.format import ARRAYS, part_path
from actstore.commits.manifest import Manifest, Part, Shard
from actstore.errors import Damaged
from actstore.storage.backend import File

TOKENS = (
    "token_id",
    "first_token_id",
    "key_token_id",
    "donor_token_id",
)  # columns of token ids, in the tables of every store
SEQUENCES = ("tree_id", "sequence_id", "first_tree_id", "first_sequence_id")  # columns of sequence ids
OF_THE_RUN = ("runs", "sites", *OF_RUN)  # tables whose parts a run owns
SHARED = ("models", "vocabularies")  # tables whose parts are owned by a hash


@dataclass(frozen=True)
class Span:
    """A dataset's ids in a store, and where they begin in the merged one."""

    first: Ids
    n: Ids  # how many ids of each kind
    new: Ids

    @property
    def is_moved(self) -> bool:
        """True if the ids change."""
        return self.first != self.new


@dataclass
class Names:
    """New names: old → new, of runs, datasets and labels; names that are absent stay."""

    run: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, str] = field(default_factory=dict)
    label: dict[str, str] = field(default_factory=dict)

    def of(self, kind: str) -> dict[str, str]:
        """The new names of one kind."""
        return {"run": self.run, "dataset": self.dataset, "label": self.label}[kind]


@dataclass
class Moved:
    """How one store's rows and files change.

    Attributes:
        names: new names.
        spans: of each dataset.
        documents: declared table of documents → its dataset.
    """

    names: Names
    spans: list[Span] = field(default_factory=list)
    documents: dict[str, str] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """True if an id or a name changes."""
        return any(self.names.of(kind) for kind in vars(self.names)) or any(span.is_moved for span in self.spans)

    def owner(self, manifest: Manifest, part: Part) -> str:
        """The new owner of a part; that of results is their commit's number, see `table`."""
        if part.table in SHARED or part.table == "results":
            return part.owner
        if manifest.kind == "labels":
            return self.names.label.get(part.owner, part.owner)
        if part.table in OF_THE_RUN:
            run, slash, site = part.owner.partition("/")
            return self.names.run.get(run, run) + slash + site
        return self.names.dataset.get(part.owner, part.owner)

    def table(self, manifest: Manifest, table: str) -> str:
        """The new name of a part's table."""
        if table in every_column():
            return table
        if manifest.kind == "labels":
            return self.names.label.get(table, table)
        return self._documents(table)

    def _documents(self, table: str) -> str:
        """A table of documents is named as its dataset."""
        dataset = self.documents.get(table, "")
        return as_name(self.names.dataset[dataset]) if dataset in self.names.dataset else table

    def batch(self, manifest: Manifest, part: Part) -> int | None:
        """The batch of a part; None of labels, which take no others' place in a new store."""
        return None if manifest.kind == "labels" else part.batch

    def path(self, manifest: Manifest, file: File) -> str:
        """The new path of a file; that of results follows from their commit's number."""
        if isinstance(file, Part):
            return part_path(self.table(manifest, file.table), self.owner(manifest, file), self.batch(manifest, file))
        run = manifest.run or ""
        under = f"{ARRAYS}/{run}/"
        is_array = file.path.startswith(under) and run in self.names.run
        return f"{ARRAYS}/{self.names.run[run]}/{file.path.removeprefix(under)}" if is_array else file.path

    def sequence_id(self, first: int | None) -> int | None:
        """The new id of a batch's first sequence."""
        return None if first is None else self._id(first, SEQUENCES[0])

    def shard(self, shard: Shard, file: File) -> Shard:
        """A shard of the merged store, given its file there."""
        run = self.names.run.get(shard.run, shard.run)
        first = self.sequence_id(shard.first_tree_id)
        return Shard(**{**vars(shard), **vars(file), "run": run, "first_tree_id": first})

    def rows(self, manifest: Manifest, table: str, rows: pl.DataFrame) -> pl.DataFrame:
        """A part's rows with new ids and names.

        Raises:
            Damaged: a row names an id of no dataset.
        """
        if table in every_column():
            ids = [name for name in rows.columns if name in (*TOKENS, *SEQUENCES)]
            ids += ["variant_of"] * (table == "trees" and "variant_of" in rows.columns)
        else:
            ids = rows.columns[:1]  # the others are the user's own
        moved = rows.with_columns([self._ids(rows[name], name) for name in ids])
        if ids and moved.select(ids).null_count().row(0) != rows.select(ids).null_count().row(0):
            raise Damaged(f"a row of {table} names an id of no dataset")
        return self._renamed(manifest, table, moved) if table in every_column() else moved

    def _ids(self, ids: pl.Series, column: str) -> pl.Series:
        """The new ids; null for null, and for ids of no dataset."""
        at = int(column not in TOKENS)  # the place in Ids
        spans = sorted((span.first[at], span.n[at], span.new[at]) for span in self.spans)
        if not spans:
            return ids.clear(len(ids))
        firsts, counts, news = np.array(spans, np.int64).T
        known = ids.cast(pl.Int64).fill_null(-1).to_numpy()
        span = np.maximum(np.searchsorted(firsts, known, side="right") - 1, 0)
        is_inside = (known >= firsts[span]) & (known < firsts[span] + counts[span])
        moved = pl.Series(ids.name, known - firsts[span] + news[span])
        return moved.set(pl.Series(~is_inside), None)

    def _id(self, number: int, column: str) -> int:
        """One new id.

        Raises:
            Damaged: the id is of no dataset.
        """
        moved = self._ids(pl.Series([number], dtype=pl.Int64), column).item()
        if moved is None:
            raise Damaged(f"a file names the id {number}, which is of no dataset")
        return int(moved)

    def _renamed(self, manifest: Manifest, table: str, rows: pl.DataFrame) -> pl.DataFrame:
        runs, datasets, names = self.names.run, self.names.dataset, []
        if runs:
            of_runs = [name for name in ("run", "base_run", "donor_run") if name in rows.columns]
            names += [pl.col(name).replace(runs) for name in of_runs]
        if runs and table == "sites":
            begins = [(f"{ARRAYS}/{old}/", f"{ARRAYS}/{new}/") for old, new in runs.items()]
            names.append(_replaced("path", begins))
        if runs and table == "results":
            names.append(_replaced("name", [(f"{old}/", f"{new}/") for old, new in runs.items()]))
        if datasets:
            of_dataset = ["dataset", *["variant_of"] * (table == "datasets")]
            names += [pl.col(name).replace(datasets) for name in of_dataset if name in rows.columns]
        if table == "relations":
            owners = self.names.label if manifest.kind == "labels" else datasets
            tables = {name: self.table(manifest, name) for name in rows["name"]}
            names += [pl.col("owner").replace(owners), pl.col("name").replace(tables)]
        return rows.with_columns(names)

    def metadata(self, content: bytes) -> bytes:
        """The zarr.json of a run's array or group, whose attributes name the run and a first id."""
        about = json.loads(content)
        attributes = about.get("attributes", {})
        if "run" in attributes:
            attributes["run"] = self.names.run.get(attributes["run"], attributes["run"])
        for column in (*TOKENS, *SEQUENCES):
            if column in attributes:
                attributes[column] = self._id(attributes[column], column)
        return json.dumps(about, indent=2).encode()


def spans_of(dataset: Mapping[str, Any], new: Ids) -> Span:
    """The span of a dataset, from its row of `datasets` as a part holds it."""
    first = Ids.of_dataset(dataset)
    stop = Ids.beyond([dict(dataset)])
    return Span(first, Ids(stop.token_id - first.token_id, stop.sequence_id - first.sequence_id), new)


def _replaced(column: str, begins: Iterable[tuple[str, str]]) -> pl.Expr:
    """A column of texts, with another beginning where it begins with one of some."""
    found = pl.col(column)
    for old, new in begins:
        begins_so = pl.col(column).str.starts_with(old)
        found = pl.when(begins_so).then(pl.lit(new) + pl.col(column).str.slice(len(old))).otherwise(found)
    return found.alias(column)
