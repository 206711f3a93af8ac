"""A map: the activations of a query's rows at a site, drawn on a plane, coloured by any column."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from actstore.errors import BadInput, NotStored

if TYPE_CHECKING:
    from actstore.store import Store

MOST = 5_000  # rows that are drawn unless told
MOST_CLASSES = 16  # a column with more values is coloured by its order, if it has one
PCA, UMAP = METHODS = ("PCA", "UMAP")
MOST_OF_UMAP = 2_000  # rows: more take longer than one waits
WAITING = {PCA: "PCA", UMAP: "UMAP: some seconds, and half a minute more at the first one"}
LONGEST_LIST = 5_000  # ids that a query names; a longer list fills the box


@dataclass(frozen=True)
class Plane:
    """Rows on a plane.

    Attributes:
        rows: the query's rows that are drawn.
        places: float32 [n, 2], row by row.
        axes: names of both axes.
        said: how many rows are drawn of how many, and how.
    """

    rows: pl.DataFrame
    places: np.ndarray
    axes: tuple[str, str]
    said: str


@dataclass(frozen=True)
class Coloured:
    """The colour of each row.

    Attributes:
        values: float32 [n]: a class, or a share in [0, 1]; NaN for NULL.
        classes: names of the classes; empty for shares.
        ends: both ends of the shares.
    """

    values: np.ndarray
    classes: list[str]
    ends: list[str]


def first(store: Store, run: str) -> str:
    """The query that a map begins with: the targets of edges, or every token of a text."""
    if store.of(run).sql("select count(*) from trees").item():
        return "select token_id, source, target, depth, on_path\nfrom edge_targets"
    return "select token_id, position, token, sequence_id\nfrom tokens"


def sites(store: Store, run: str) -> list[str]:
    """The sites of a run that have a row of numbers per token, in the order of the forward pass."""
    patterns = store.of(run).sql("select short from sites where kind = 'pattern'")["short"].to_list()
    return [site for site in store.sites(run) if site not in patterns]


def columns(rows: pl.DataFrame) -> list[str]:
    """The columns that can colour rows, token_id last."""
    flat = [name for name, dtype in rows.schema.items() if not dtype.is_nested()]
    return sorted(flat, key=lambda name: name == "token_id")


def plane(store: Store, query: str, run: str, site: str, method: str = PCA, n: int = MOST, seed: int = 0) -> Plane:
    """Place the activations of a query's rows on a plane.

    Args:
        query: a SELECT with a column token_id.
        method: PCA or UMAP.
        n: the most rows to draw; more are sampled by the seed, in the query's order. UMAP draws
            MOST_OF_UMAP at most.
        seed: of the sample, and of UMAP.

    Raises:
        NotStored, BadInput: see Store.read; or there are fewer than three rows; or umap-learn is
            not installed.
    """
    if method == UMAP:
        umap, n = _umap(), min(n, MOST_OF_UMAP)
    rows = store.of(run).sql(query.strip().rstrip(";"))
    if "token_id" not in rows.columns:
        raise BadInput(f"got a query without a column token_id; its columns are {', '.join(rows.columns)}")
    n_rows = len(rows)
    if n_rows > n:
        rows = rows[np.sort(np.random.default_rng(seed).choice(n_rows, n, replace=False))]
    if len(rows) < 3:
        raise BadInput(f"got {len(rows)} rows; a map takes 3 or more")
    X, _ = store.read(rows, run, site)
    flat = X.reshape(len(X), -1).astype(np.float64)
    sampled = f"{len(rows):,} of {n_rows:,} rows, sampled by seed {seed}" if n_rows > n else f"all {n_rows:,} rows"
    if method == UMAP:
        neighbours = min(15, len(flat) - 1)
        placed = umap.UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(flat)
        return Plane(rows, placed.astype(np.float32), ("UMAP 1", "UMAP 2"), f"{sampled}; UMAP of {site}")
    placed, shares = principal(flat)
    axes = f"PC 1 ({100 * shares[0]:.1f} % of the variance)", f"PC 2 ({100 * shares[1]:.1f} %)"
    return Plane(rows, placed.astype(np.float32), axes, f"{sampled}; PCA of {site}, of the rows drawn")


def _umap() -> ModuleType:
    """The library umap-learn.

    Raises:
        NotStored: it is not installed.
    """
    try:
        return import_module("umap")
    except ModuleNotFoundError as error:
        raise NotStored(
            f"UMAP needs {error.name}; install with `pip install 'actstore[umap]'`, or draw by PCA"
        ) from None


def principal(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components, by the covariance.

    Args:
        X: float64 [n, width].

    Returns:
        float64 [n, 2], and the share of the variance of each.
    """
    centred = X - X.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), range(axes.shape[1])])  # the sign is free: fix it
    if axes.shape[1] < 2:
        axes, values = np.column_stack([axes, np.zeros(len(axes))]), np.array([0.0, *values])
    return centred @ axes, values[:-3:-1] / max(values.sum(), np.finfo(float).tiny)


def coloured(column: pl.Series) -> Coloured:
    """Colours of a column: up to 16 values are classes, more numbers are shares of their range."""
    n = column.n_unique()
    if column.dtype.is_numeric() and n > MOST_CLASSES:
        numbers = column.cast(pl.Float64).to_numpy()
        low, high = float(np.nanmin(numbers)), float(np.nanmax(numbers))
        return Coloured(((numbers - low) / ((high - low) or 1)).astype(np.float32), [], [f"{low:g}", f"{high:g}"])
    numeric = column.dtype.is_numeric()
    words = column.cast(pl.String)
    counted = column.drop_nulls().value_counts(sort=True)[column.name]
    kept = (counted.sort() if numeric else counted).cast(pl.String).to_list()
    shown = kept if len(kept) <= MOST_CLASSES else [*kept[: MOST_CLASSES - 1], "others"]
    number = {name: float(min(i, len(shown) - 1)) for i, name in enumerate(kept)}
    return Coloured(np.array([number.get(word, np.nan) for word in words], np.float32), shown, [])


def labels(rows: pl.DataFrame) -> list[str]:
    """What is shown of each row under the mouse: its columns that are no lists."""
    flat = rows.select([name for name, dtype in rows.schema.items() if not dtype.is_nested()])
    return ["\n".join(f"{name}: {value}" for name, value in row.items()) for row in flat.iter_rows(named=True)]


def brushed(rows: pl.DataFrame, chosen: list[int]) -> str:
    """The query for the tokens of chosen rows, `… where token_id in (…)`; empty without any."""
    ids = sorted({int(rows["token_id"][i]) for i in chosen if 0 <= i < len(rows)})
    if not ids:
        return ""
    cut = f"-- the first {LONGEST_LIST:,} of {len(ids):,} chosen tokens\n" if len(ids) > LONGEST_LIST else ""
    return f"{cut}select * from tokens\nwhere token_id in ({', '.join(map(str, ids[:LONGEST_LIST]))})"
