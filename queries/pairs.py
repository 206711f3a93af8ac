"""Pairs of trees with different answers, and how far edits move one tree's answer to the other's.

The answer is the first step of the path, which the root's token predicts. Both trees have as many
nodes, so each token up to the root has a counterpart at its position.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from actstore.arrays.address import POSITIONS_PER_TREE
from actstore.errors import BadInput
from actstore.interventions import Edit
from actstore.queries.causes import LEAST, ROLES, TOKENS, answered, log, some
from actstore.queries.probes.labelled import parameters, sql_of

if TYPE_CHECKING:
    from actstore.interventions import Patching
    from actstore.store import Store

BEFORE = tuple(role for role in ROLES if role != "path")  # roles of the tokens that the first step can depend on
DIRECTIONS = ("noise", "denoise")
GAP = 1.0  # nats: shares of a smaller logit difference would be rounding and noise
DRAWN = "one random pair per tree: the same root, another first step, both answered right"


def pairs_of(
    store: Store, run: str, pairs: str | Path | None, n: int, direction: str, rng: np.random.Generator
) -> tuple[pl.DataFrame, str]:
    """Pairs of an edited tree and a donor tree, and what chose them.

    Args:
        pairs: an .sql file, or SQL, that yields token_id and donor_token_id, the root's tokens of
            the clean and of the corrupted tree; default: pairs are drawn, see DRAWN.
        n: at most so many pairs.
        direction: of DIRECTIONS; with `noise` the clean tree is edited, with `denoise` the other.

    Returns:
        Columns token_id (the edited tree's root token), tree_id, donor and same (tree ids), answer
        and other (the first steps of edited tree and donor); `same` is a random tree with the
        edited tree's root and first step, and is never the donor. A pair without one is left out.

    Raises:
        NotStored: the run has no answers.
        BadInput: there are too few pairs, or the query's rows are no pairs.
    """
    first = answered(store, run).filter(step=0).select("token_id", "tree_id", "root", "target", "correct")
    right = first.filter("correct")
    if pairs is None:
        chosen, query = _drawn(right, rng), DRAWN
    else:
        query = sql_of(pairs)
        chosen = _given(store.of(run).sql(query, parameters(store, run, query, {})), first)
    if direction == "denoise":
        chosen = chosen.rename({"tree_id": "donor", "donor": "tree_id"}).unique(
            "tree_id", keep="first", maintain_order=True
        )
    about = first.select("tree_id", "token_id", "root", answer="target")
    chosen = chosen.join(about, on="tree_id").join(first.select(donor="tree_id", other="target"), on="donor")
    chosen = chosen.filter(pl.col("answer") != pl.col("other")).sort("tree_id")
    chosen = chosen.with_columns(same=_alike(chosen, right, rng)).drop_nulls("same")
    kept = some(chosen["tree_id"].to_numpy(), n, rng) if len(chosen) >= LEAST else None
    if kept is None:
        raise BadInput(
            f"there are {len(chosen)} pairs of trees with different first steps, to which a third tree has the root and the first "
            f"step of the edited one; a study needs {LEAST}: ingest more trees"
        )
    return chosen.filter(pl.col("tree_id").is_in(kept)), query


def _drawn(right: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """Columns tree_id and donor: one random tree of another answer and the same root per tree."""
    found = []
    for _, of_root in sorted(right.group_by("root")):
        ids, target = of_root["tree_id"].to_numpy(), of_root["target"].to_numpy()
        for tree, answer in zip(ids, target, strict=True):
            others = ids[target != answer]
            if len(others):
                found.append((int(tree), int(rng.choice(others))))
    schema = {"tree_id": right.schema["tree_id"], "donor": right.schema["tree_id"]}
    return pl.DataFrame(found, schema=schema, orient="row")


def _given(found: pl.DataFrame, first: pl.DataFrame) -> pl.DataFrame:
    """Columns tree_id and donor of a user's rows."""
    if not {"token_id", "donor_token_id"} <= {*found.columns}:
        raise BadInput(
            f"the query of pairs yields {', '.join(found.columns) or 'nothing'}; it must yield token_id and donor_token_id, "
            "the root's tokens of the clean and of the corrupted tree"
        )
    tree_of = first.select("token_id", "tree_id")
    known = tree_of["token_id"].implode()
    for column in ("token_id", "donor_token_id"):
        if (wrong := ~found[column].is_in(known).fill_null(False)).any():
            raise BadInput(
                f"{int(wrong.sum()):,} of {len(found):,} values of {column} are no root token of a tree that the run answered, the "
                f"first {found[column].filter(wrong)[0]}; select from answer_tokens where step = 0"
            )
    if (twice := found["token_id"].is_duplicated()).any():
        raise BadInput(
            f"the query of pairs names token {found['token_id'].filter(twice)[0]} twice; give each clean tree one donor"
        )
    donors = tree_of.select(donor_token_id="token_id", donor="tree_id")
    return (
        found.join(tree_of, on="token_id", maintain_order="left")
        .join(donors, on="donor_token_id", maintain_order="left")
        .select("tree_id", "donor")
    )


def _alike(chosen: pl.DataFrame, right: pl.DataFrame, rng: np.random.Generator) -> pl.Series:
    """For each pair a random other tree with the edited tree's root and first step; else NULL."""
    groups = {key: ids["tree_id"].to_numpy() for key, ids in right.group_by("root", "target")}
    found = []
    for tree, root, answer in chosen.select("tree_id", "root", "answer").iter_rows():
        ids = groups.get((root, answer), np.zeros(0, int))
        ids = ids[ids != tree]
        found.append(int(rng.choice(ids)) if len(ids) else None)
    return pl.Series("same", found, dtype=right.schema["tree_id"])


class Contrast:
    """How far edits move the answers of edited trees to those of their donors.

    The logit difference is log p(the edited tree's first step) - log p(the donor's). A share of 0
    is the edited tree's own difference, and 1 the difference that the donor's own run has.

    Args:
        pairs: see `pairs_of`; pairs whose two differences are less than GAP apart are left out.
        site: a stored site, at which a tree is its own donor to measure what no edit changes.

    Raises:
        BadInput: fewer than LEAST pairs are left.
    """

    def __init__(self, store: Store, run: str, patch: Patching, pairs: pl.DataFrame, site: str) -> None:
        self._run, self._patch, self._site = run, patch, site
        moved = (pairs["donor"].cast(pl.Int64) - pairs["tree_id"]) * POSITIONS_PER_TREE
        own = self._difference(pairs["token_id"], pairs["other"])
        donors = -self._difference(pairs["token_id"] + moved, pairs["answer"])
        far = np.abs(own - donors) >= GAP
        self.n_left_out, self.pairs = int((~far).sum()), pairs.filter(far)
        if len(self.pairs) < LEAST:
            raise BadInput(
                f"{len(self.pairs)} of {len(pairs)} pairs have logit differences that are {GAP:g} nat apart, and a study needs "
                f"{LEAST}; give pairs of trees that the model answers otherwise (-o pairs)"
            )
        self._before, self._after = own[far], donors[far]
        self._tokens = store.sql(TOKENS, {"trees": self.pairs["tree_id"].to_list()}).filter(
            pl.col("role").is_in(BEFORE)
        )

    def tokens(self, role: str | None = None) -> pl.DataFrame:
        """token_id of the edited trees' tokens of a role, up to the root, and their counterparts.

        Returns:
            Columns token_id, donor and same: tokens of the edited tree, its donor and `same`.
        """
        found = self._tokens if role is None else self._tokens.filter(role=role)
        both = found.join(self.pairs.select("tree_id", "donor", "same"), on="tree_id", maintain_order="left")
        at = [
            (pl.col("token_id") + (pl.col(name).cast(pl.Int64) - pl.col("tree_id")) * POSITIONS_PER_TREE).alias(name)
            for name in ("donor", "same")
        ]
        return both.select("token_id", *at)

    def moved(self, edits: Sequence[Edit]) -> np.ndarray:
        """float64 [n_pairs]: the share of the way that edits move each edited tree's answer."""
        measure = self.pairs.select("token_id", token="other")
        edited = self._patch(self._run, edits, measure)
        found = self.pairs.select("token_id").join(edited, on="token_id", how="left", maintain_order="left")
        now = log(found["p_target"]) - log(found["p_other"])
        return np.asarray((self._before - now) / (self._before - self._after))

    def _difference(self, tokens: pl.Series, words: pl.Series) -> np.ndarray:
        """float64 [n]: log p of the first step less that of a word, at root tokens."""
        asked = pl.DataFrame({"token_id": tokens, "token": words}).with_row_index()
        turn = pl.int_range(pl.len()).over("token_id")
        found = np.zeros(len(asked))
        for _, of_turn in asked.with_columns(turn=turn).group_by("turn"):  # a token is measured once in a call
            itself = Edit("select token_id, token_id as donor_token_id from rows", self._site, tables={"rows": of_turn})
            after = of_turn.join(
                self._patch(self._run, [itself], of_turn.select("token_id", "token")), on="token_id", how="left"
            )
            found[after["index"].to_numpy()] = log(after["p_target"]) - log(after["p_other"])
        return found
