"""The study `scrub`: does a layer's attention at the root token carry one node of the path only?

Brinkmann et al. (arXiv 2402.11917) claim that layer L brings the node at distance L from the goal
to the root token. They replace what that layer's attention brings there by what it brings in
another tree, a donor, whose path has the same node at that distance (`drawn` in donors.py), under
three hypotheses about the keys that matter (sums.py). One layer is scrubbed at a time. The score of
a clean tree is the share of its loss that is recovered: 1 if the scrubbed run is as good as the run
itself, 0 if its loss is that of an even guess among their 35 tokens, below 0 if it is worse.

There are three controls, which they do not have: donors with another node at that distance, donors
that agree at another distance, and the tree itself, which recovers everything. The last two are
asked under the first hypothesis alone, since the tree's own z is the same under all. Where the
answer does not rest on a layer, any donor recovers everything. The tests therefore compare donors
with the same node and donors with another node, on the same clean trees, by sign flips.

Three choices differ from theirs. Only clean trees whose first step is right count, so that the
run's likeliest token is the right one. The score is the model's own, with the bias of its
unembedding. Donors are trees of the run's own set, and may have a second path, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.advice import ingest_sites
from actstore.errors import BadInput, NotStored
from actstore.intervals import change_over_trees, sign_flip
from actstore.interventions import Edit
from actstore.queries.scrub.donors import CONTRASTS, ITSELF, MATCHED, TREES, Trees, drawn, own, trees_of
from actstore.queries.scrub.show import as_frame, sentence
from actstore.queries.scrub.show import plot as plot
from actstore.queries.scrub.sums import HYPOTHESES, patched, sums
from actstore.queries.study import Answer, Progress, Test, adjusted, chosen, result_rows, test_rows

if TYPE_CHECKING:
    from actstore.interventions import Patching
    from actstore.store import Store

NAME = "scrub"
SITES = ("pattern", "v")  # families that every layer needs; resid_post makes the study faster
EVEN_GUESS = math.log(35)  # loss of an even guess among the paper's tokens; the reproduction has one more
SHAPE = """
select n_layers, datasets.n_nodes
from runs join models using (weights_sha256) join datasets using (dataset)
where run = $run
"""


def study(
    store: Store,
    run: str,
    seed: int,
    progress: Progress,
    patch: Patching,
    n: int = 150,
    donors: str | Path | None = None,
    listed: str = "backward",
    second_path: int = 2,
    hypotheses: str | Sequence[str] = "all",
) -> Answer:
    """Scrub a run's attention at the root token, layer by layer.

    Args:
        store: an open store.
        run: a run over drawn trees that holds pattern and v of every layer.
        seed: seed of the clean trees, donors and sign flips.
        progress: called after each scrubbed pass.
        patch: runs edits.
        n: most clean trees of each path length.
        donors: SQL or the path of an .sql file with donors of one's own, see donors.own.
        listed: `backward`, as in the paper; or `any`: trees whose edges are listed in any order.
        second_path: least depth of the deepest leaf in the root's other subtree, of clean trees.
        hypotheses: some of HYPOTHESES; a search over donors needs the first alone.

    Raises:
        NotStored: the run lacks a site, or no tree can be clean.
        BadInput: an option has no meaning, or no clean tree has a donor.
    """
    asked = chosen(hypotheses, HYPOTHESES, "hypothesis")
    n_layers, n_nodes = store.sql(SHAPE, {"run": run}).row(0)
    _check_sites(store, run, n_layers)
    trees = trees_of(store, run, n_nodes, n_layers, listed, second_path, n, seed)
    kept = {"run": run, "n": n, "listed": listed, "second_path": second_path, "donors": donors and str(donors)}
    by_layer = {
        layer: own(store, run, trees, str(donors), layer, seed) if donors else drawn(trees, layer, seed)
        for layer in range(n_layers)
    }
    if not any((of_layer[MATCHED] >= 0).any() for of_layer in by_layer.values()):
        raise BadInput(
            f"none of {len(trees.clean):,} clean trees of run {run!r} has a donor; ingest more trees, or let the query of -o "
            "donors name more"
        )
    scrubbing = Scrubbing(store, run, n_nodes, trees, patch)
    kept["hypotheses"] = asked
    kinds = {hypothesis: _kinds(list(by_layer[0]), hypothesis == asked[0]) for hypothesis in asked}
    cells, done, total = [], 0, n_layers * sum(map(len, kinds.values()))
    for layer, of_layer in by_layer.items():
        whole, kept_sums, place = scrubbing.sums(layer, of_layer)
        for hypothesis in asked:
            number, recovered = list(HYPOTHESES).index(hypothesis), {}
            for kind in kinds[hypothesis]:
                recovered[kind] = scrubbing.recovered(layer, of_layer[kind], whole, kept_sums[number], place)
                done += 1
                progress(done, total, f"{hypothesis}, layer {layer}, {kind} donors")
            cells += [_Cell(layer, hypothesis, length, of_cell) for length, of_cell in _by_length(trees, recovered)]
    rows = [row for cell in cells for row in cell.rows()]
    tests = adjusted(test for cell in cells if (test := cell.test(seed)))
    kept |= {"n_wrong": trees.n_wrong, "even_guess": EVEN_GUESS, "n_layers": n_layers}
    results = result_rows(
        [*rows, *test_rows(tests)], study=NAME, run=run, query=TREES, params=kept, snapshot=store.snapshot, seed=seed
    )
    return Answer(NAME, as_frame(results), results, sentence(results, tests, n, trees.n_wrong), tests)


def _kinds(every: list[str], first: bool) -> list[str]:
    """The kinds of donors: all under the first hypothesis, the tested ones under the others."""
    return every if first else [kind for kind in every if kind in (MATCHED, *CONTRASTS)]


def _check_sites(store: Store, run: str, n_layers: int) -> None:
    """Refuse a run that lacks a pattern or v.

    Raises:
        NotStored: names the command that adds them.
    """
    held = store.sites(run)
    wanted = [f"{family}.{layer}" for family in SITES for layer in range(n_layers)]
    if lacking := [site for site in wanted if site not in held]:
        raise NotStored(
            f"run {run!r} lacks {', '.join(lacking)}, from which donors are made; {ingest_sites(store, run, *SITES, 'resid_post')} "
            "adds them, and what makes the study fast"
        )


@dataclass(frozen=True)
class Scrubbing:
    """The scrubbed passes of a run.

    Attributes:
        n_nodes: nodes per tree.
        trees: the trees that take part.
        patch: runs edits.
    """

    store: Store
    run: str
    n_nodes: int
    trees: Trees
    patch: Patching

    def sums(self, layer: int, donors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`sums` of one layer's trees, and int64 [n_trees]: where each tree stands among them."""
        used = np.unique(np.concatenate([self.trees.clean, *donors.values()]))
        used = used[used >= 0]
        place = np.zeros(len(self.trees.token_ids), np.int64)
        place[used] = np.arange(len(used))
        whole, kept = sums(self.store, self.run, layer, self.trees.token_ids[used], self.n_nodes)
        return whole, kept, place

    def recovered(
        self, layer: int, donors: np.ndarray, whole: np.ndarray, kept: np.ndarray, place: np.ndarray
    ) -> np.ndarray:
        """Share of each clean tree's loss that donors recover, float64 [n_clean]; NaN without one.

        Args:
            donors: int64 [n_clean], rows of the trees; -1 for none.
            whole, kept: see sums.patched.
            place: see `sums`.
        """
        has, trees = np.flatnonzero(donors >= 0), self.trees
        share = np.full(len(donors), np.nan)
        if not len(has):
            return share
        clean = trees.clean[has]
        z = patched(whole, kept, place[clean], place[donors[has]])
        rows = pl.DataFrame({"token_id": trees.token_ids[clean], "vector": z})
        edit = Edit("select token_id, vector from rows", at=f"z.{layer}", tables={"rows": rows})
        answers = self.patch(self.run, [edit]).select("token_id", "p_target")
        p = (
            rows.select("token_id")
            .join(answers, on="token_id", how="left", maintain_order="left")["p_target"]
            .to_numpy()
        )
        share[has] = (_loss(p) - EVEN_GUESS) / (_loss(trees.p[clean]) - EVEN_GUESS)
        return share


def _loss(p: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(np.asarray(p, np.float64), np.finfo(np.float32).tiny))


def _by_length(trees: Trees, recovered: dict[str, np.ndarray]) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Path lengths, and of each kind of donor the shares of its trees."""
    lengths = trees.depth[trees.clean]
    return [
        (int(length), {kind: share[lengths == length] for kind, share in recovered.items()})
        for length in np.unique(lengths)
    ]


@dataclass(frozen=True)
class _Cell:
    """One layer under one hypothesis, at one path length.

    Attributes:
        recovered: kind of donor → float64 [n], of the same trees; NaN without a donor.
    """

    layer: int
    hypothesis: str
    length: int
    recovered: dict[str, np.ndarray]

    @property
    def about(self) -> dict[str, Any]:
        """Site and label of the cell's rows of `results`."""
        return {"site": f"z.{self.layer}", "label": f"{self.hypothesis}, length {self.length}"}

    def rows(self) -> list[dict[str, Any]]:
        """Of each kind of donor the mean with its interval, and the spread over trees."""
        rows: list[dict[str, Any]] = []
        for kind, share in self.recovered.items():
            share = share[~np.isnan(share)]
            n = len(share)
            if not n:
                rows.append({**self.about, "metric": f"recovered, {kind}", "value": None, "n": 0})
                continue
            rows.append({**self.about, "metric": f"recovered, {kind}", **_mean(share), "n": n})
            if kind != ITSELF:
                rows.append({**self.about, "metric": f"spread, {kind}", "value": float(share.std()), "n": n})
        return rows

    def test(self, seed: int) -> Test | None:
        """Matched donors beyond those of the contrast; None where no tree has both."""
        contrast = next(kind for kind in self.recovered if kind in CONTRASTS)
        beyond = self.recovered[MATCHED] - self.recovered[contrast]
        beyond = beyond[~np.isnan(beyond)]
        if not len(beyond):
            return None
        what = f"recovered by matched donors, less by {contrast} ones, {self.about['label']}"
        row = {**self.about, **_mean(beyond), "n": len(beyond)}
        return Test.of(row, sign_flip(beyond, seed), what, exceeds=f"the {contrast} donors")


def _mean(values: np.ndarray) -> dict[str, float]:
    """A mean over trees with its interval, as if no value could be larger than the largest seen."""
    most = float(np.abs(values).max()) or 1.0
    low, high = change_over_trees(values, np.arange(len(values)), most)
    return {"value": float(values.mean()), "low": low, "high": high}
