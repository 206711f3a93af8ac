"""From an edit's query to its rows: which activation is edited, and by what.

The rows are the table `edits` of schema.sql, without run and number. They are checked here, before
anything runs, and stored with the run, so that a batch depends on them alone.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import xxhash

from actstore.errors import BadInput, NotStored, nearest
from actstore.ingest.interventions import window
from actstore.ingest.models.config import there_are
from actstore.ingest.models.sites import SiteSpec
from actstore.interventions import HOWS, Edit

if TYPE_CHECKING:
    from actstore.ingest.models.model import Model
    from actstore.store import Store

COLUMNS: dict[str, Any] = {
    "token_id": pl.Int64(),
    "head": pl.UInt8(),
    "key_token_id": pl.Int64(),
    "donor_token_id": pl.Int64(),
    "vector": pl.List(pl.Float32),
}
GROUP = "group"  # column of the rows that a mean is over
DISCARDED = "A hook on .* returned a modified tensor"  # how TransformerLens says that it ignores an edit
READ_AT_ONCE = 2**25  # numbers of donors that are read at a time: 128 MB


@dataclass(frozen=True)
class Sequences:
    """The stored sequences of the base run's dataset.

    Attributes:
        dataset: its name.
        first_token_id: int64 [n], ascending.
        n_tokens: int64 [n].
        first_sequence_id: sequence_id of the set's first sequence.
        sequence_ids: int64 [n].
    """

    dataset: str
    first_token_id: np.ndarray
    n_tokens: np.ndarray
    first_sequence_id: int
    sequence_ids: np.ndarray

    @classmethod
    def of(cls, store: Store, run: str) -> Sequences:
        """Those of the dataset of a run."""
        query = "select dataset, first_sequence_id from runs join datasets using (dataset) where run = $run"
        dataset, first = store.sql(query, {"run": run}).row(0)
        listed = store.sql(
            "select first_token_id, n_tokens, sequence_id from sequences where dataset = $dataset order by first_token_id",
            {"dataset": dataset},
        )
        columns = (listed[name].to_numpy().astype(np.int64) for name in ("first_token_id", "n_tokens", "sequence_id"))
        starts, lengths, ids = columns
        return cls(dataset, starts, lengths, int(first), ids)

    def token_ids(self, numbers: np.ndarray) -> np.ndarray:
        """int64 [n]: the first token's id of sequences, given their numbers in the set."""
        return self.first_token_id[np.searchsorted(self.sequence_ids, self.first_sequence_id + numbers)]

    def places(self, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number in the set and position of each token, intp [n], and whether it is a token."""
        row = np.searchsorted(self.first_token_id, token_ids, side="right") - 1
        known = np.maximum(row, 0)
        position = token_ids - self.first_token_id[known] if len(self.first_token_id) else np.zeros_like(token_ids)
        good = (row >= 0) & (position < self.n_tokens[known]) if len(self.first_token_id) else row >= 0
        numbers = self.sequence_ids[known] - self.first_sequence_id if len(self.sequence_ids) else known
        return numbers.astype(np.intp), position.astype(np.intp), good


@dataclass(frozen=True)
class Rows:
    """The rows of one edit, by token, head and key.

    Attributes:
        spec: the edited site.
        how: see interventions.Edit.
        frame: columns COLUMNS.
        sequence, position: intp [n]: number in the set, and position, of each row's token.
        key: intp [n], position of each row's key; of `knockout`.
        donors, donor_site: run and short name of the site that the donors are read from; None
            without donors.
    """

    spec: SiteSpec
    how: str
    frame: pl.DataFrame
    sequence: np.ndarray
    position: np.ndarray
    key: np.ndarray | None
    donors: str | None
    donor_site: str | None

    def __len__(self) -> int:
        return len(self.frame)

    @cached_property
    def heads(self) -> np.ndarray | None:
        """intp [n]: the edited head of each row; None for all heads."""
        head = self.frame["head"]
        return None if head.null_count() else head.to_numpy().astype(np.intp)

    @cached_property
    def vectors(self) -> np.ndarray | None:
        """float32 [n, width]: the rows' vectors; None without."""
        if not len(self) or self.frame["vector"].null_count():
            return None
        lists = self.frame["vector"]
        return lists.explode().to_numpy().reshape(len(lists), -1)

    def of(self, numbers: np.ndarray) -> Rows:
        """The rows whose tokens are of these sequences, by their numbers in the set."""
        which = np.flatnonzero(np.isin(self.sequence, numbers))
        arrays = (self.sequence[which], self.position[which], None if self.key is None else self.key[which])
        return Rows(self.spec, self.how, self.frame[which], *arrays, self.donors, self.donor_site)

    def donated(self, store: Store, which: np.ndarray) -> np.ndarray:
        """float32 [n, *row]: what the donors of some rows give at their site.

        Args:
            which: intp [n], numbers of rows.
        """
        ids = self.frame["donor_token_id"].to_numpy()[which]
        X, _ = store.read(ids, self.donors, self.donor_site)
        heads = self.heads
        return np.asarray(X if heads is None else X[np.arange(len(X)), heads[which]])

    def donors_hash(self, store: Store) -> str | None:
        """xxh3-128 of the donors' rows, one after another, float32; None without donors."""
        if self.donors is None:
            return None
        digest, at_once = xxhash.xxh3_128(), max(1, READ_AT_ONCE // prod(self.spec.row_shape or (1,)))
        for start in range(0, len(self), at_once):
            donated = self.donated(store, np.arange(start, min(start + at_once, len(self))))
            digest.update(np.ascontiguousarray(donated, np.float32).tobytes())
        return digest.hexdigest()


def site_of(model: Model, name: str) -> SiteSpec:
    """The one site of a name, which edits may be at.

    Raises:
        BadInput: there is no such site, it is a family of several, or the forward pass has used its
            activations before a hook is given them.
    """
    found = model.sites([name])
    if len(found) > 1:
        raise BadInput(
            f"got --at {name}, which are {len(found)} sites, {found[0].short} to {found[-1].short}; an edit is at one of them"
        )
    if model.task != "trees" or window.first_layer(found[0].name) is None:
        _refuse_discarded(model, found[0])
    return found[0]


def _refuse_discarded(model: Model, spec: SiteSpec) -> None:
    """Refuse a site on which nothing rests, by two passes, one with noise at the site."""
    import torch

    ids = torch.arange(2, device=model.device)[None]
    noise = torch.Generator(model.device).manual_seed(0)

    def disturb(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x + torch.randn(x.shape, generator=noise, device=x.device).to(x.dtype)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", DISCARDED, UserWarning)
        plain = model.bridge(ids, attention_mask=torch.ones_like(ids))
        try:
            hooks = [(spec.name, disturb)]
            noisy = model.bridge.run_with_hooks(ids, attention_mask=torch.ones_like(ids), fwd_hooks=hooks)
        except UserWarning:
            raise BadInput(
                f"got an edit at {spec.short}, which TransformerLens gives after the pass has used it, so that nothing rests on "
                "the edit; edit q, k or v of the layer"
            ) from None
    if torch.equal(plain, noisy):
        raise BadInput(
            f"got an edit at {spec.short}, and no logit changes when noise is added there, so that nothing rests on the edit; "
            "name another site (`actstore models sites`)"
        )


def asked(store: Store, base: str, edit: Edit, spec: SiteSpec, sequences: Sequences) -> Rows:
    """Run an edit's query, and check its rows.

    Args:
        store: the whole store.
        base: name of the base run.
        spec: the edited site, see `site_of`.
        sequences: of the base run.

    Raises:
        BadInput: the query is refused, or its rows are no edits of the site.
        NotStored: a token or a donor is not stored.
    """
    if edit.how not in HOWS:
        raise BadInput(f"got --how {edit.how}{nearest(edit.how, HOWS)}; {there_are(list(HOWS))}")
    found = store.of(base).sql(edit.query, edit.params, tables=edit.tables or None)
    frame = _frame(found, edit.how, spec)
    ids = frame["token_id"].to_numpy()
    sequence, position, good = sequences.places(ids)
    if not good.all():
        raise BadInput(
            f"{int((~good).sum()):,} of {len(ids):,} token ids of the edits are of no token that run {base!r} has, the first "
            f"{ids[~good][0]}; give tokens of its dataset {sequences.dataset!r}"
        )
    order = ["token_id", "head", "key_token_id"]
    if (twice := frame.select(order).is_duplicated()).any():
        first = min(frame.filter(twice)["token_id"].to_list())
        of_head = " and head" if frame["head"].null_count() < len(frame) else ""
        raise BadInput(
            f"the query names {frame.filter(twice)['token_id'].n_unique():,} tokens{of_head} twice, the first {first}; an edit "
            "has one row for each: aggregate, or add `qualify row_number() over (partition by token_id) = 1`"
        )
    frame, key = _with_keys(frame, sequences, sequence, position, edit.how)
    sorted_by = np.lexsort([frame[name].fill_null(0).to_numpy() for name in reversed(order)])
    frame, sequence, position = frame[sorted_by], sequence[sorted_by], position[sorted_by]
    key = None if key is None else key[sorted_by]
    has_donors = frame["donor_token_id"].null_count() == 0
    donors = base if edit.donors is None else store.resolve_run(edit.donors)
    rows = Rows(
        spec,
        edit.how,
        frame,
        sequence,
        position,
        key,
        donors if has_donors else None,
        (spec.short if edit.donor_site is None else edit.donor_site) if has_donors else None,
    )
    if edit.how == "mean":
        groups = found[GROUP] if GROUP in found.columns else pl.repeat(0, len(found), eager=True)
        return _as_means(store, base, rows, groups[sorted_by])
    if has_donors:
        _check_donors(store, rows)
    return rows


def _frame(found: pl.DataFrame, how: str, spec: SiteSpec) -> pl.DataFrame:
    """A query's rows with the columns COLUMNS; what has no meaning for `how` is refused."""
    if twins := [name for name in (*COLUMNS, GROUP) if {name, f"{name}_1"} <= {*found.columns}]:  # as DuckDB names them
        raise BadInput(f"the query yields two columns named {twins[0]}; rename one (`… as other`), or leave it out")
    needs = [name for name in HOWS[how].split(" or ") if name]
    given = [name for name in COLUMNS if name in found.columns and name not in ("token_id", "head")]
    given += [GROUP] if GROUP in found.columns and how != "mean" else []
    columns = ", ".join(found.columns) or "nothing"
    if "token_id" not in found.columns:
        raise BadInput(f"the query yields {columns} and no token_id; select token_id to say which tokens are edited")
    if not len(found):
        raise BadInput("the query yields no row, so that nothing would be edited; let it name tokens")
    if extra := [name for name in given if name not in needs]:
        raise BadInput(f"the query yields {extra[0]}, which has no meaning with --how {how}; leave it out")
    if len(given) != bool(needs):
        said = f"both {' and '.join(given)}" if given else f"{columns} and no {HOWS[how]}"
        raise BadInput(f"the query yields {said}; --how {how} needs {HOWS[how]}")
    if how == "knockout" and spec.kind != "pattern":
        raise BadInput(f"got --how knockout at {spec.short}; attention is taken away at a pattern, such as pattern.0")
    if "head" in found.columns and spec.kind not in ("pattern", "heads"):
        raise BadInput(f"the query yields head, and site {spec.short} has none; leave the column out")
    frame = _cast(found)
    if "head" in found.columns:
        n_heads = spec.row_shape[0]
        if frame["head"].null_count() or int(frame["head"].max()) >= n_heads:  # type: ignore[arg-type]
            raise BadInput(f"the query yields heads that site {spec.short} does not have; it has 0 to {n_heads - 1}")
    if "vector" in given:
        _check_vectors(frame, how, spec)
    return frame


def _cast(found: pl.DataFrame) -> pl.DataFrame:
    """The query's columns in their types; NULLs where a value is needed are refused."""
    columns = []
    for name, dtype in COLUMNS.items():
        if name not in found.columns:
            columns.append(pl.repeat(None, len(found), dtype=dtype, eager=True).alias(name))
            continue
        held = found[name]
        is_list = isinstance(held.dtype, pl.List | pl.Array) and held.dtype.inner.is_numeric()
        if name == "vector" and is_list:
            held = held.arr.to_list() if isinstance(held.dtype, pl.Array) else held
        elif name == "vector" or not held.dtype.is_integer():
            wanted = "numbers, FLOAT[]" if name == "vector" else "an integer"
            raise BadInput(f"the query's {name} is {held.dtype}; it must be {wanted}")
        cast = held.cast(dtype, strict=False)
        if cast.null_count():
            raise BadInput(
                f"{cast.null_count():,} of {len(held):,} values of the query's {name} are NULL or too large; leave these rows "
                f"out (`where {name} is not null`)"
            )
        columns.append(cast.alias(name))
    return pl.DataFrame(columns)


def width_of(spec: SiteSpec, frame: pl.DataFrame) -> int:
    """Numbers that one row of an edit at a site has; 0 where it follows from the sequence."""
    if spec.kind == "pattern":
        return 0
    return prod(spec.row_shape[1:] if frame["head"].null_count() == 0 else spec.row_shape)


def _check_vectors(frame: pl.DataFrame, how: str, spec: SiteSpec) -> None:
    """Refuse vectors of another width, of several widths, or with values that are no numbers."""
    lengths, width = frame["vector"].list.len(), width_of(spec, frame)
    if not width:
        raise BadInput(f"the query yields vectors for {spec.short}; a pattern is edited by donors or by knockout")
    wrong = (lengths % width != 0) | (lengths == 0) | (lengths > width**2) if how == "project" else lengths != width
    if wrong.any():
        several = " (or several vectors one after another)" if how == "project" else ""
        raise BadInput(
            f"the query yields vectors of {int(lengths.filter(wrong)[0])} numbers, and {spec.short} has "
            f"{width}{several}; give as many"
        )
    if lengths.n_unique() > 1:
        raise BadInput("the query yields vectors of several lengths; give each row as many directions")
    numbers = frame["vector"].explode()
    if numbers.null_count() or not numbers.is_finite().all():
        raise BadInput("the query yields vectors with NULL, NaN or infinity; leave these rows out")
    if how == "project" and (zeros := (frame["vector"].list.eval(pl.element().abs()).list.max() == 0)).any():
        first = frame["token_id"].filter(zeros)[0]
        raise BadInput(f"the query yields a vector of zeros, which has no direction, at token_id {first}; leave it out")


def _with_keys(
    frame: pl.DataFrame, sequences: Sequences, sequence: np.ndarray, position: np.ndarray, how: str
) -> tuple[pl.DataFrame, np.ndarray | None]:
    """The positions of the keys that attention is taken away from."""
    if how != "knockout":
        return frame, None
    ids = frame["key_token_id"].to_numpy()
    of_key, key, good = sequences.places(ids)
    good &= (of_key == sequence) & (key <= position)
    if not good.all():
        raise BadInput(
            f"{int((~good).sum()):,} of {len(ids):,} keys are no token that the edited one attends to, the first "
            f"{ids[~good][0]}; give tokens of the same sequence that do not come after it"
        )
    return frame, key


def _check_donors(store: Store, rows: Rows) -> None:
    """Refuse donors of another shape, and donors that are not stored."""
    assert rows.donors is not None
    assert rows.donor_site is not None
    ids = rows.frame["donor_token_id"].to_numpy()
    X, _ = store.read(ids[:1], rows.donors, rows.donor_site)  # says how to store what is not there
    spec, shape = rows.spec, tuple(X.shape[1:])
    wanted = (*spec.row_shape, shape[-1]) if spec.kind == "pattern" else spec.row_shape
    if shape != wanted:
        raise BadInput(
            f"a donor's row at {rows.donor_site} of run {rows.donors!r} is {list(shape)}, and {spec.short} has "
            f"{list(wanted)}; take donors of a run and a site of that shape"
        )
    if spec.kind == "pattern":
        at = store.sql(
            "select g.i, position from asked_for g left join tokens using (token_id) order by g.i",
            tables={"asked_for": pl.DataFrame({"i": np.arange(len(ids)), "token_id": ids})},
        )["position"]
        if (wrong := at != pl.Series(rows.position)).fill_null(True).any():
            raise BadInput(
                f"{int(wrong.fill_null(True).sum()):,} donors stand at another position than the token they are for, and a "
                "row of attention is over positions; take donors at the same position"
            )


def _as_means(store: Store, base: str, rows: Rows, groups: pl.Series) -> Rows:
    """`mean` as `replace` by the means of the base run's stored activations."""
    ids = rows.frame["token_id"].to_numpy()
    if rows.spec.kind == "pattern":
        raise BadInput("got --how mean at a pattern, whose rows are of many lengths; take another site, or knockout")
    X = np.asarray(store.read(ids, base, rows.spec.short)[0], np.float64)
    if rows.heads is not None:
        X = X[np.arange(len(X)), rows.heads]
    keys = pl.DataFrame({"group": groups, "head": rows.frame["head"]})
    _, number = np.unique(
        keys.with_row_index().select(pl.struct("group", "head").rank("dense")).to_series(), return_inverse=True
    )
    sums = np.zeros((number.max() + 1, *X.shape[1:]))
    np.add.at(sums, number, X)
    means = (sums / np.bincount(number).reshape(-1, *[1] * (X.ndim - 1))).astype(np.float32)[number]
    vectors = pl.Series("vector", means.reshape(len(means), -1)).arr.to_list().cast(COLUMNS["vector"])
    return Rows(rows.spec, "mean", rows.frame.with_columns(vectors), rows.sequence, rows.position, None, None, None)


def stored(frame: pl.DataFrame, about: dict[str, Any], spec: SiteSpec, sequences: Sequences) -> Rows:
    """The rows of a stored edit.

    Args:
        frame: rows of `edits` of one run and number, as they were stored.
        about: the edit's row of `interventions`.

    Raises:
        NotStored: the base run's sequences are no longer there.
    """
    frame = frame.select(pl.col(name).cast(dtype) for name, dtype in COLUMNS.items())
    sequence, position, good = sequences.places(frame["token_id"].to_numpy())
    if not good.all():
        raise NotStored(f"the sequences of the edits of run {about['run']!r} are not stored; restore them from a copy")
    key = sequences.places(frame["key_token_id"].to_numpy())[1] if about["how"] == "knockout" else None
    return Rows(spec, about["how"], frame, sequence, position, key, about["donor_run"], about["donor_site"])
