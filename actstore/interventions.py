"""What an intervention is: edits of activations in the forward pass of a stored run.

    Edit("select token_id, donor_token_id from donors", at="resid_post.2")

The rows of an edit's query say which tokens of the base run are edited, and by what. The edited run
is the base run's model over the base run's sequences, with these activations replaced. Studies
describe edits; `ingest/interventions` runs them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import polars as pl
import xxhash

HOWS = {  # how an activation is edited → what the query's rows have to say
    "replace": "donor_token_id or vector",
    "add": "donor_token_id or vector",
    "project": "vector",
    "zero": "",
    "mean": "",
    "knockout": "key_token_id",
}


@dataclass(frozen=True)
class Edit:
    """Edits at one site of a forward pass, one per row of a query.

    A donor is a row of the store, so that no edit rests on another edit of its pass, and no edit
    can come before what it rests on. Edits of one site are made in the order in which they are
    given. Sites are edited in the order of the forward pass, in whatever order they are given.

    Attributes:
        query: SQL over the store as the base run sees it. `token_id` says which token is edited; no
            two rows name one token. Further columns, by `how`:
            `donor_token_id`: the row of another token, of `donors` at `donor_site`;
            `vector`: numbers, FLOAT[] as long as a row of the site;
            `head`: of attention patterns and of sites with heads, the one head that is edited;
            `group`: of `mean`, over which rows each mean is;
            `key_token_id`: of `knockout`, the token that is no longer attended to.
        at: name of the site.
        how: `replace` puts donor or vector in the activation's place; `add` adds it; `zero` puts 0;
            `mean` puts the mean of the base run's stored activations over the query's rows (of each
            `group`); `project` removes the part along `vector`, or along the span of several
            vectors written one after another; `knockout` takes attention to a key away, and divides
            what is left so that it sums to 1.
        donors: run of the donors; default: the base run.
        donor_site: site of the donors; default: `at`.
        params: values of the query's parameters.
        tables: tables that the query reads besides the store's.
    """

    query: str
    at: str
    how: str = "replace"
    donors: str | None = None
    donor_site: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


class Patching(Protocol):
    """Runs edits without storing them; what a study of causes is given."""

    def __call__(self, run: str, edits: Sequence[Edit], measure: pl.DataFrame | None = None) -> pl.DataFrame:
        """The predictions of the edited sequences.

        Args:
            run: name of the base run.
            edits: at least one; an edit of none of the base's tokens is refused.
            measure: columns token_id and token: a second token whose probability is measured there.

        Returns:
            Rows of `predictions` of the edited sequences, with columns `other` and `p_other` where
            `measure` is given, by token_id.

        Raises:
            NotStored: a run, a donor, or the base's weights are not stored.
            BadInput: an edit has no meaning, or nothing rests on its site.
        """
        ...

    def activations(self, run: str, edits: Sequence[Edit], site: str, token_ids: np.ndarray) -> np.ndarray:
        """The activations of a site in the edited pass.

        Args:
            run, edits: see `__call__`.
            site: name of one site. Where the base run stores the site, only later tokens and layers
                than the edits are run.
            token_ids: int64 [n], tokens of edited sequences, in any order.

        Returns:
            float32 [n, *row], as `Store.read` gives them.

        Raises:
            NotStored: see `__call__`.
            BadInput: see `__call__`; or a token is of no edited sequence.
        """
        ...


def hash_of(interventions: pl.DataFrame, edits: pl.DataFrame) -> str:
    """xxh3-128 of what a run edits: one run's rows of both tables.

    The run's name is left out, and so is the snapshot, which a merge numbers anew.
    """
    about = interventions.drop("run", "snapshot").sort("edit").to_dicts()
    digest = xxhash.xxh3_128(json.dumps(about, sort_keys=True).encode())
    for name in ("edit", "token_id", "head", "key_token_id", "donor_token_id"):
        digest.update(edits[name].cast(pl.Int64).fill_null(-1).to_numpy().tobytes())
    digest.update(edits["vector"].list.len().cast(pl.Int64).fill_null(-1).to_numpy().tobytes())
    digest.update(edits["vector"].explode(empty_as_null=False, keep_nulls=False).cast(pl.Float32).to_numpy().tobytes())
    return digest.hexdigest()
