"""A stored set of sequences, of any task, from the rows that the store holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from actstore.commits.log import live
from actstore.commits.manifest import Manifest
from actstore.errors import NotStored
from actstore.ingest.corpus import corpus as of_text
from actstore.ingest.corpus.tokens import Vocabulary
from actstore.ingest.task import Read
from actstore.ingest.trees import given
from actstore.ingest.trees.task import TreeSet
from actstore.writing.parts import read_part


def stored_set(
    root: Path, manifests: Sequence[Manifest], row: Mapping[str, Any], vocabulary: Vocabulary | None = None
) -> TreeSet | given.GivenTrees | of_text.Corpus:
    """The set of a row of `datasets`, to run a model over.

    Drawn trees are drawn again. All others are read from the rows that the store holds.

    Args:
        root: the store's folder.
        manifests: its commits, without damaged parts.
        vocabulary: of the model; for text whose own vocabulary is lost.

    Raises:
        NotStored: the tokens' spellings are lost. A batch whose rows are lost is refused when it is
            drawn.
    """
    if row.get("task") == "tokens":
        return of_text.stored(row, reader(root, manifests, row), vocabulary)
    if row["distribution"] is None:
        return given.stored(row, reader(root, manifests, row))
    depths = row.get("depths")
    return TreeSet(
        row["distribution"],
        row["n_trees"],
        row["seed"],
        row["n_nodes"],
        None if depths is None else tuple(depths),
        row["dataset"],
        row["trees_per_shard"],
        row.get("variant_of"),
        row.get("change"),
    )


def reader(root: Path, manifests: Sequence[Manifest], row: Mapping[str, Any]) -> Read:
    """Reads the stored rows of a set: a table's part of one batch, or of its definition.

    Args:
        row: the set's row of `datasets`.
    """
    owners = {"vocabularies": row.get("vocabulary")}  # which sets share
    parts = {
        (part.table, part.batch): part.path
        for manifest in live(manifests)
        for part in manifest.parts
        if part.owner == owners.get(part.table, row["dataset"])
    }

    def read(table: str, batch: int | None) -> pl.DataFrame:
        if (table, batch) not in parts:
            which = f" of batch {batch}" if batch is not None else ""
            raise NotStored(
                f"{root} holds no sound rows of {table}{which} of dataset {row['dataset']!r}; restore them from a copy"
            )
        return read_part(root, parts[table, batch])

    return read
