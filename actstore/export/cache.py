"""Whole sequences of a run as TransformerLens' ActivationCache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.errors import BadInput, NotStored
from actstore.sites import Site, wanted

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

    from actstore.store import Store


def cache(
    store: Store, sequence_ids: Sequence[int], sites: Sequence[Site] | None, run: str | None, model: Any
) -> ActivationCache:
    """See Store.cache."""
    import torch
    from transformer_lens import ActivationCache

    run = store.resolve_run(run)
    ids = _checked(sequence_ids)
    names = store.sites(run) if sites is None else wanted(store, run, None, sites)
    first, lengths = _sequences(store.whole.of(run), run, ids)
    inside = np.arange(lengths.max()) < lengths[:, None]  # [sequence, position]
    token_ids = (first[:, None] + np.arange(lengths.max()))[inside]
    held = {}
    for name in dict.fromkeys(names):
        X, _ = store.read(token_ids, run, name)
        about = store.whole.sql(
            "select site, kind from sites where run = $run and $name in (site, short)", _of(run, name)
        )
        ((site, kind),) = about.rows()
        held[site] = torch.from_numpy(_padded(X, inside, kind == "pattern"))
    return ActivationCache(held, model, has_batch_dim=True)


def _of(run: str, name: str) -> dict[str, str]:
    return {"run": run, "name": name}


def _checked(sequence_ids: Sequence[int]) -> np.ndarray:
    """int64 [n] of a caller's ids."""
    try:
        ids = np.asarray(sequence_ids)
    except ValueError:  # lists of several lengths
        ids = np.empty((0, 0))
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise BadInput(
            f"got sequence_ids {' '.join(repr(sequence_ids)[:40].split())}; give a list of one or more ids, such as those "
            "of `select sequence_id from sequences` (a tree's is its tree_id)"
        )
    return ids.astype(np.int64)


def _sequences(store: Store, run: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n] each: first token id and number of tokens of each sequence."""
    asked = {"ids": np.unique(ids).tolist()}
    query = "select sequence_id, first_token_id, n_tokens from sequences where sequence_id in (select unnest($ids::bigint[]))"
    known = store.sql(f"{query} order by sequence_id", asked)
    there = known["sequence_id"].to_numpy()
    if (missing := ~np.isin(ids, there)).any():
        raise NotStored(
            f"{int(missing.sum()):,} of {len(ids):,} sequence_ids, the first being {ids[missing][0]}, are of no sequence of "
            f"run {run!r}; choose from `select sequence_id from sequences` in the session of the run (store.of({run!r}))"
        )
    place = np.searchsorted(there, ids)
    return known["first_token_id"].to_numpy()[place], known["n_tokens"].to_numpy()[place].astype(np.int64)


def _padded(X: np.ndarray, inside: np.ndarray, is_pattern: bool) -> np.ndarray:
    """Rows of tokens as [sequence, position, …], zero past each sequence's end.

    Args:
        X: float32 [n, *row], the tokens' rows, one sequence after the other.
        inside: bool [sequence, position], True for the n places of tokens.
        is_pattern: a row is [head, key]; the result is [sequence, head, query, key].
    """
    n_sequences, width = inside.shape
    if is_pattern:
        X = X[..., :width]
    whole = np.zeros((n_sequences, width, *X.shape[1:]), np.float32)
    whole[inside] = X
    if not is_pattern:
        return whole
    return np.where(inside[:, None, None, :], np.moveaxis(whole, 2, 1), np.float32(0))
