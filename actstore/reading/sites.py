"""Open a site of a run for reading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from actstore.arrays.address import MOST_POSITIONS, POSITIONS_PER_TREE, Arrangement
from actstore.arrays.coded import CodedReader
from actstore.arrays.foreign import ForeignReader
from actstore.arrays.layout import Layout
from actstore.arrays.metadata import as_written
from actstore.arrays.ranged import RangedReader
from actstore.arrays.reader import SiteReader
from actstore.arrays.site import Reader, not_stored
from actstore.errors import ActstoreError, Damaged
from actstore.reading.catalog_rows import catalog_rows, impossible
from actstore.sites import not_held
from actstore.storage.content import Count, Hash, Positive, Text, check_inside, json_object
from actstore.storage.machine import limit_reached

if TYPE_CHECKING:
    from actstore.sql.snapshot import Snapshot

Kind = Literal["resid", "vector", "heads", "pattern"]  # see sites.kind in schema.sql
MOST_BATCHES = 1 << 20  # per site: a reader keeps 2 kB of each, and a process maps 65,530 by default
MOST_NUMBERS = 1 << 36  # per tree and site

NOT_EDITED = """
-- tokens of the sequences that a run with edits does not hold; none of any other run
select token_id from store.main.tokens
where token_id in (select unnest($ids::bigint[]))
    and $run in (select run from store.main.interventions)
    and sequence_id not in (
        select sequence_id from store.main.edits join store.main.tokens using (token_id) where edits.run = $run
    )
"""


def open_site(store: Snapshot, run: str, site: str) -> Reader:
    """Open one site: mapped shards if laid out as actstore writes them, else through zarr-python.

    Args:
        site: the site's short name, or TransformerLens' name.

    Raises:
        NotStored: the run holds no such site.
        Damaged: the site's metadata cannot be read.
    """
    wanted = (
        "from sites join runs using (run) join datasets using (dataset) where run = $run and $site in (site, short)"
    )
    rows = store.session.look_up(
        "select site, kind, shape, path, lineage, coalesce(trees_per_shard, rows_per_chunk) as rows_per_chunk, layout, stride, "
        f"datasets.first_token_id {wanted}",
        {"run": run, "site": site},
    )
    if not rows:
        raise not_held(store, run, site)
    found = catalog_rows(store, SiteRow, rows)[0]
    shards = store.session.look_up(
        "select batch, path from shards where run = $run and site = $site", {"run": run, "site": found.site}
    )
    paths = {row.batch: row.path for row in catalog_rows(store, ShardRow, shards)}
    where, first = f"{found.site} of run {run!r}", found.first_token_id
    layout = found.as_layout()
    if max(paths, default=0) >= layout.n_shards:
        raise impossible(store, f"batch {max(paths)} of {layout.n_shards} of {where}")

    def is_token(ids: np.ndarray) -> np.ndarray:
        if found.lineage is not None:
            raise not_stored(where, ids, np.ones(len(ids), bool), "not given when the site was appended, or padding")
        asked = {"ids": np.unique(ids).tolist()}
        known = store.sql("select token_id from tokens where token_id in (select unnest($ids::bigint[]))", asked)
        others = store.session.sql(NOT_EDITED, {**asked, "run": run})
        if len(others):
            whose = "of a sequence that no edit of the run names: the base run holds it"
            raise not_stored(where, ids, np.isin(ids, others["token_id"].to_numpy()), whose)
        return np.isin(ids, known["token_id"].to_numpy())

    written = as_written(_zarr_json(store, found.path), layout)
    if written is None and store.check:
        raise Damaged(
            f"{store.path / found.path} of {where} does not lie as actstore writes arrays, so no hash says whether what is "
            "read is what was committed; read it without check (check=False, --no-check)"
        )
    if written is None:
        return ForeignReader(store.local(found.path), layout, first, paths, where, is_token, store.folder.check)
    if written.codec != "none":
        return CodedReader(written, first, paths, where, store.folder, is_token)
    kind = RangedReader if store.folder.reads_ranges and store.folder.committed is None else SiteReader
    return kind(written, first, paths, where, store.folder, is_token)


def shard_hashes(store: Snapshot, run: str, readers: Sequence[Reader]) -> dict[str, str]:
    """xxh3-128 of each shard of some sites of a run, by the shard's path."""
    rows = store.session.look_up("select batch, path, xxh3_128 from shards where run = $run", {"run": run})
    paths = {path for reader in readers for path in reader.shards.values()}
    found = {row.path: row.xxh3_128 for row in catalog_rows(store, HashedRow, rows)}
    return {path: found[path] for path in paths if path in found}


@dataclass(frozen=True)
class ShardRow:
    """A shard's row in the catalog."""

    batch: Count
    path: Text

    def __post_init__(self) -> None:
        check_inside(self.path)


@dataclass(frozen=True)
class HashedRow(ShardRow):
    """A shard's row in the catalog, with the hash of the shard."""

    xxh3_128: Hash


@dataclass(frozen=True)
class SiteRow:
    """A site's row in the catalog, with its run's dataset."""

    site: Text
    kind: Kind
    shape: Annotated[list[Annotated[int, Meta(ge=1, lt=2**53)]], Meta(min_length=2, max_length=4)]
    path: Text
    rows_per_chunk: Positive
    layout: Arrangement
    stride: Positive | None
    first_token_id: Annotated[int, Meta(ge=0, lt=2**53)]
    lineage: str | None = None

    def __post_init__(self) -> None:
        check_inside(self.path)
        layout, n_axes = self.as_layout(), {"resid": 2, "vector": 2, "heads": 3, "pattern": 3}[self.kind]
        in_rows = layout.position_axis is None
        power = layout.rows_per_chunk if in_rows else layout.stride
        fits = in_rows or layout.chunks_per_shard <= layout.stride
        if (
            len(self.shape) != n_axes + (not in_rows)
            or power & (power - 1)
            or layout.stride > MOST_POSITIONS
            or not fits
        ):
            raise ValueError(f"{self.site} has shape {self.shape}, and no {self.kind} has it")
        if layout.n_shards > MOST_BATCHES or math.prod(self.shape[1:]) > MOST_NUMBERS:
            raise ValueError(f"{self.site} has shape {self.shape}, which is larger than any array")

    def as_layout(self) -> Layout:
        """The array's layout; its dtype is in the array's own metadata."""
        axis = None if self.layout == "rows" else 2 if self.kind == "pattern" else 1
        return Layout(tuple(self.shape), axis, self.rows_per_chunk, stride=self.stride or POSITIONS_PER_TREE)


def _zarr_json(store: Snapshot, path: str) -> dict[str, Any]:
    """An array's metadata; empty for Zarr v2, whose metadata has another name."""
    file = store.path / path / "zarr.json"
    try:
        return json_object(store.folder.read(f"{path}/zarr.json"))
    except ActstoreError:
        raise
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise limit_reached(error, f"cannot read {file}") or Damaged(
            f"{file} cannot be read ({error}); restore it from a copy of the store"
        ) from error
