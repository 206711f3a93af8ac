"""From a query to activations: its token ids, the sites asked for, and one X that rows of every site are copied into."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import polars as pl
from msgspec import Meta

from actstore.arrays.foreign import ForeignReader, mapped_dtype
from actstore.arrays.mapped import POSITIONS_PER_TREE
from actstore.arrays.reader import Layout, SiteReader
from actstore.catalog.build import NAME
from actstore.errors import BadInput, Damaged, NotStored, advised
from actstore.reading.given import Tokens, frame_of
from actstore.sites import not_held
from actstore.storage.content import Count, Positive, T, Text, as_a, check_inside, json_object
from actstore.storage.machine import limit_reached

if TYPE_CHECKING:
    from actstore.store import Store

DTYPES = ("float32", "float16", "float64", "bfloat16")
MOST_BATCHES = 1 << 20  # that a site can have: a reader keeps 2 kB of each, and a process maps 65,530 by default
MOST_NUMBERS = 1 << 36  # of one tree at one site
RENAMED = re.compile(r"(.+)_\d+")  # DuckDB hands a second column `a` on as `a_1`


def check_form(dtype: Any, out: str) -> str:
    """The name of a dtype (`float16`, np.float16 and torch.float16 are one); refuse a form of X that there is not.

    Raises:
        BadInput: says which there are.
    """
    if out not in ("numpy", "torch"):
        raise BadInput(f"got out {out!r}; X comes as 'numpy' or 'torch'")
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype).removeprefix("torch."))
    if name not in DTYPES:
        raise BadInput(f"got dtype {dtype!r}; X comes as {', '.join(DTYPES)}")
    if name == "bfloat16" and out == "numpy":
        raise BadInput("numpy has no bfloat16; ask for out='torch', or for float16 or float32")
    return str(name)


def read_ids(
    store: Store,
    run: str,
    query: Tokens,
    params: Mapping[str, Any] | None,
    timeout: float | None = None,
    memory: str | int | None = None,
) -> tuple[np.ndarray, pl.DataFrame]:
    """The token ids that a query of a run yields, int64 [n], and its frame; limits as of Store.sql. Ids and frames stand for
    themselves.

    Raises:
        NotStored: an id is too large for any token.
        BadInput: the query is refused, has two columns of one name, yields no integer token_id without NULLs, or one that is
            another id renamed.
        LimitReached: it took longer, or held more.
    """
    if not isinstance(query, str):
        rows, of = frame_of(query, params)
        return token_ids(rows, of), rows
    rows = store._ask(query, params, timeout, memory, reads=run)
    _refuse_twins(store, query, params, rows.columns, timeout, memory)
    return token_ids(rows), rows


def token_ids(rows: pl.DataFrame, of: str = "the query") -> np.ndarray:
    """int64 [n] from the column token_id of a frame, which a message calls `of`; raises as read_ids."""
    if "token_id" not in rows.columns:
        raise BadInput(
            f"{of} yields {', '.join(rows.columns) or 'nothing'} and no token_id; select token_id to say which tokens to read"
        )
    ids = rows["token_id"]
    if not ids.dtype.is_integer():
        raise BadInput(f"{of}'s token_id is {ids.dtype}; it must be an integer, as in the tables")
    if ids.null_count():
        raise BadInput(
            f"{ids.null_count():,} of {len(ids):,} token_ids are NULL; add `where token_id is not null`, or join the tokens"
        )
    as_stored = ids.cast(pl.Int64, strict=False)  # NULL where an id does not fit
    if as_stored.null_count():
        raise NotStored(f"no token has token_id {ids.filter(as_stored.is_null())[0]}; select token_id from the tables")
    return as_stored.to_numpy()


def _refuse_twins(
    store: Store,
    query: str,
    params: Mapping[str, Any] | None,
    columns: Sequence[str],
    timeout: float | None,
    memory: str | int | None,
) -> None:
    """Two columns of one name would come back as `a` and `a_1`, and nobody could say which is which."""
    known = {name.lower() for name in columns}
    if not any((found := RENAMED.fullmatch(name.lower())) and found[1] in known for name in columns):
        return
    try:
        described = store.sql(f"describe {store._session.statement(query)}", params, timeout, memory)[
            "column_name"
        ].to_list()
    except BadInput as error:  # a query that DESCRIBE does not take, such as SHOW
        raise BadInput(
            f"the query yields {', '.join(columns)}, where a name may be of a second column; write it as SELECT, or rename"
        ) from error
    names = [name.lower() for name in described]
    if twins := [name for place, name in enumerate(described) if name.lower() in names[:place]]:
        raise BadInput(f"the query yields two columns named {twins[0]}; rename one (`… as other`), or leave it out")


def read_activations(readers: Sequence[SiteReader], token_ids: np.ndarray, one_site: bool, dtype: str, out: str) -> Any:
    """X [n, *row] of one site, or [n, n_sites, *row]; see Store.read."""
    if one_site and dtype == "float32":
        X = readers[0].gather(token_ids)
        return _as_torch(X) if out == "torch" else X
    shape = (len(token_ids), len(readers), *readers[0].layout.row_shape)
    if dtype == "bfloat16":
        import torch

        in_torch = torch.empty(shape, dtype=torch.bfloat16)
        for place, reader in enumerate(readers):
            in_torch[:, place] = whole = torch.from_numpy(reader.gather(token_ids))
            infinite = in_torch[:, place].isinf()
            if infinite.any() and whole[infinite].isfinite().any():
                raise BadInput("an activation is too large for bfloat16; read it as float32")
        return in_torch[:, 0] if one_site else in_torch
    X = np.empty(shape, dtype)
    for place, reader in enumerate(readers):
        reader.gather(token_ids, out=X[:, place])
    X = X[:, 0] if one_site else X
    return _as_torch(X) if out == "torch" else X


def _as_torch(X: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(X)


def same_row_shape(readers: Sequence[SiteReader], sites: Sequence[str]) -> None:
    """Refuse sites whose rows differ in shape, which no one X holds.

    Raises:
        BadInput: names the first two that differ.
    """
    for reader, site in zip(readers, sites, strict=True):
        if reader.layout.row_shape != readers[0].layout.row_shape:
            raise BadInput(
                f"{sites[0]} has rows of {list(readers[0].layout.row_shape)} and {site} of {list(reader.layout.row_shape)}; "
                "read sites of one shape in one call"
            )


def open_site(store: Store, run: str, site: str) -> SiteReader:
    """A reader of one site of a run: of mapped shards where they lie as actstore writes them, else through zarr-python.

    Raises:
        NotStored: the run holds no such site.
        Damaged: its metadata cannot be read.
    """
    wanted = (
        "from sites join runs using (run) join datasets using (dataset) where run = $run and $site in (site, short)"
    )
    rows = store.sql(
        f"select site, kind, shape, path, trees_per_shard, datasets.first_tree_id {wanted}", {"run": run, "site": site}
    ).to_dicts()
    if not rows:
        raise not_held(store, run, site)
    found = catalog_rows(store, SiteRow, rows)[0]
    shards = store.sql(
        "select batch, path from shards where run = $run and site = $site", {"run": run, "site": found.site}
    ).to_dicts()
    paths = {row.batch: store.path / row.path for row in catalog_rows(store, ShardRow, shards)}
    where, first = f"{found.site} of run {run!r}", found.first_tree_id
    if max(paths, default=0) >= found.n_batches:
        raise _impossible(store, f"batch {max(paths)} of {found.n_batches} of {where}")

    def is_token(ids: np.ndarray) -> np.ndarray:
        asked = {"ids": np.unique(ids).tolist()}
        known = store.sql("select token_id from tokens where token_id in (select unnest($ids::bigint[]))", asked)
        return np.isin(ids, known["token_id"].to_numpy())

    layout = Layout(tuple(found.shape), found.position_axis, found.trees_per_shard)
    dtype = mapped_dtype(_zarr_json(store, found.path), layout)
    if dtype is None and store.check:
        raise Damaged(
            f"{store.path / found.path} of {where} does not lie as actstore writes arrays, so no hash says whether what is "
            "read is what was committed; read it without check (check=False, --no-check)"
        )
    if dtype is None:
        return ForeignReader(store.path / found.path, layout, first, paths, where, is_token, store.folder.check)
    return SiteReader(replace(layout, dtype=dtype), first, paths, where, is_token, store.folder.open, store.check)


@dataclass(frozen=True)
class ShardRow:
    """What the catalog says of a shard."""

    batch: Count
    path: Text

    def __post_init__(self) -> None:
        check_inside(self.path)


@dataclass(frozen=True)
class SiteRow:
    """What the catalog says of a site, and of its run's set of trees."""

    site: Text
    kind: Literal["resid", "pattern"]
    shape: Annotated[list[Positive], Meta(min_length=3, max_length=4)]
    path: Text
    trees_per_shard: Positive
    first_tree_id: Count

    def __post_init__(self) -> None:
        check_inside(self.path)
        n_axes = 3 if self.kind == "resid" else 4
        if len(self.shape) != n_axes or self.shape[self.position_axis] > POSITIONS_PER_TREE:
            raise ValueError(f"{self.site} has shape {self.shape}, and no {self.kind} has it")
        if self.n_batches > MOST_BATCHES or math.prod(self.shape[1:]) > MOST_NUMBERS:
            raise ValueError(f"{self.site} has shape {self.shape}, which is larger than any array")

    @property
    def position_axis(self) -> int:
        return 1 if self.kind == "resid" else 2

    @property
    def n_batches(self) -> int:
        """Batches that are planned, whether they are there or not."""
        return -(-self.shape[0] // self.trees_per_shard)


def catalog_rows(store: Store, kind: type[T], rows: list[Any]) -> list[T]:
    """Rows of the catalog as what they must be.

    Raises:
        Damaged: one is not.
    """
    try:
        return [as_a(kind, row) for row in rows]
    except ValueError as error:
        raise _impossible(store, str(error)) from error


def _impossible(store: Store, what: str) -> Damaged:
    return Damaged(f"{store.path / NAME} says what cannot be ({what}); rebuild it with {advised('repair', store.path)}")


def _zarr_json(store: Store, path: str) -> dict[str, Any]:
    """An array's metadata; empty where it is of Zarr v2, whose metadata has another name."""
    file = store.path / path / "zarr.json"
    try:
        return json_object(store.folder.read(file))
    except Damaged:
        raise
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise limit_reached(error, f"cannot read {file}") or Damaged(
            f"{file} cannot be read ({error}); restore it from a copy of the store"
        ) from error
