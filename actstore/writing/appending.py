"""A site that is appended to a stored run: vectors that no forward pass of the run gave."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from actstore.arrays.address import Ids
from actstore.arrays.metadata import metadata
from actstore.arrays.pack import ShardBuffer
from actstore.errors import BadInput
from actstore.named import NAME
from actstore.version import __version__
from actstore.writing.plan import SitePlan

ROW_AXES = {1: ("vector", ("width",)), 2: ("heads", ("head", "width"))}  # by the axes of a row: kind, their names


@dataclass(frozen=True)
class Appended:
    """Activations of some tokens of a run's dataset, as a site of the run.

    Attributes:
        run: the run's name.
        plan: the site's array, as long as the dataset.
        first: the first ids of the dataset.
        token_ids: int64 [n], in order, of stored tokens, each once.
        X: float32 [n, *row].
        starts: int64 [m]: first token id of each stored sequence of the dataset, in order.
        lengths: intp [m]: tokens of each of them.
        sequence_ids: int64 [m]: their sequence ids.
    """

    run: str
    plan: SitePlan
    first: Ids
    token_ids: np.ndarray
    X: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    sequence_ids: np.ndarray

    def metadata(self) -> bytes:
        """The array's zarr.json."""
        attributes = {"run": self.run, "site": self.plan.site, "first_token_id": self.first.token_id}
        return metadata(
            self.plan.layout, self.plan.axes, {**attributes, "lineage": json.loads(self.plan.lineage or "{}")}
        )

    def shards(self) -> Iterator[tuple[int, int, int, memoryview]]:
        """The shard of each batch that holds a token of these.

        Yields:
            (batch, its first sequence_id, its number of sequences, the shard's bytes, which the
            next shard overwrites). Tokens that were not given are NaN.
        """
        layout, buffer = self.plan.layout, ShardBuffer(self.plan.layout)
        batches, of_sequences = (layout.shard_of(ids - self.first.token_id) for ids in (self.token_ids, self.starts))
        for batch in np.unique(batches).tolist():
            here, sequences = batches == batch, np.flatnonzero(of_sequences == batch)
            row, chunk = layout.split(self.token_ids[here] - self.first.token_id)
            buffer.rows[:] = np.nan
            buffer.rows[chunk, row % layout.rows_per_chunk] = self.X[here]
            lengths = self.lengths[sequences]
            buffer.n_put = int(lengths.sum()) if layout.position_axis is None else len(lengths)
            yield batch, int(self.sequence_ids[sequences[0]]), len(sequences), buffer.seal(lengths)


def site_plan(
    name: str, dataset: Mapping[str, Any], row_shape: tuple[int, ...], lineage: Mapping[str, Any]
) -> SitePlan:
    """The array of an appended site.

    Args:
        name: the site's name, its short name too.
        dataset: the row of `datasets` of the run's dataset, from the catalog.
        row_shape: shape of a token's activation: (width,) or (head, width).
        lineage: what the activations are, from which site, by which code.

    Raises:
        BadInput: the name or the lineage cannot be stored, or rows have another number of axes.
    """
    if not NAME.fullmatch(name) or name == "zarr.json":
        raise BadInput(f"got the name {name!r} for a site; use letters, digits and . _ = , + -, 100 of them at most")
    if len(row_shape) not in ROW_AXES or 0 in row_shape:
        raise BadInput(f"got X [n, {', '.join(map(str, row_shape))}]; give X [n, width] or [n, head, width]")
    kind, names = ROW_AXES[len(row_shape)]
    try:
        said = json.dumps({**lineage, "actstore": __version__}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInput(f"the lineage is no JSON ({error}); give texts, numbers, and lists and dicts of them") from error
    return SitePlan.over(dataset, name, name, kind, row_shape, names, said)


def checked(X: Any, n: int, allow_nan: bool) -> np.ndarray:
    """X as float32 [n, *row].

    Args:
        X: floats or integers [n, …], of numpy, torch or lists.
        n: number of token ids.
        allow_nan: whether NaN and infinity are accepted.

    Raises:
        BadInput: X has other rows or no numbers, a number is NaN, infinite or too large for
            float32, or a row begins with NaN, as those of tokens that are not stored do.
    """
    if hasattr(X, "detach"):  # a tensor, of bfloat16 too
        X = X.detach().cpu().float().numpy()
    try:
        given = np.asarray(X)
    except ValueError as error:
        raise BadInput(f"X is no array ({error}); give floats [n, width]") from error
    if given.dtype.kind not in "fiu" or given.ndim < 2 or len(given) != n:
        raise BadInput(f"got X {given.dtype} {list(given.shape)} for {n:,} token ids; give floats [{n}, width]")
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(given, dtype=np.float32)
    if not np.isfinite(numbers).all() and not (allow_nan and (np.isinf(numbers) == np.isinf(given)).all()):
        bad = (~np.isfinite(numbers)).reshape(n, -1).any(axis=1)
        first = int(np.argmax(bad))
        said = "is too large for float32" if np.isfinite(given[first]).all() else "is NaN or infinite"
        raise BadInput(
            f"{int(bad.sum()):,} of {n:,} rows of X have a number that {said}, the first row {first}; mend them, or allow NaN "
            "and infinity (allow_nan=True, --allow-nan)"
        )
    blank = np.isnan(numbers.reshape(n, -1)[:, 0]) if numbers.size else np.zeros(n, bool)
    if n_blank := int(blank.sum()):
        raise BadInput(
            f"{n_blank:,} of {n:,} rows of X begin with NaN, the first row {int(np.argmax(blank))}, which is how a token that "
            "is not stored reads; leave out the tokens whose rows are NaN, or put another number first"
        )
    return numbers
