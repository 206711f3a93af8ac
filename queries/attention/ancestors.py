"""Which ancestors of the goal the root token looks at: the study `attention` with `by=ancestor`.

Distance 0 is the goal, 1 its parent, and so on up to the root's child. The root token's attention
to the target of the edge that leads to such a node is compared with what the same head gives to the
targets of edges off the path, which lead to no ancestor. A token's place in the list alone can draw
attention, so the comparison is with edges at the same place, in trees that are listed alike
(backward, or not). Each distance is tested tree by tree, by sign flips, with Holm's correction over
all sites, heads and distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.intervals import sign_flip
from actstore.queries.figures import (
    FEW,
    GREY,
    entitle,
    heading,
    legend,
    most,
    panels,
    percents,
    points,
    whole_numbers,
)
from actstore.queries.study import Answer, Progress, Test, adjustment, mean_row, p_shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

BY = "ancestor"
ROLE = "root"
LEAST = 2  # trees: one gives no interval
EDGES = """
-- one row per edge of a tree, by place in the list, with the tree's root token
select token_id, tree_id, edge, on_path, depth - source_depth - 1 as distance, backward
from (select tree_id, edge, on_path, source_depth from edges)
join (select tree_id, depth, backward from trees) using (tree_id)
join (select tree_id, token_id from answer_tokens where step = 0) using (tree_id)
semi join held_trees($run) using (tree_id)
order by tree_id, edge
"""


def compare(
    store: Store, run: str, sites: Sequence[str], seed: int, progress: Progress
) -> tuple[list[dict[str, Any]], list[Test]]:
    """Compare ancestors with other nodes, at every site and head.

    Args:
        store: an open store.
        run: name of a run that holds the patterns.
        sites: short names of its patterns.
        seed: seed of the bootstrap and of the sign flips.
        progress: called after each site.

    Returns:
        Rows of `results`, without p, and tests without Holm's correction. The label is `distance
        N`; the metrics are `attention`, `others` (the comparison's) and `beyond` (the difference).
    """
    edges = store.sql(EDGES, {"run": run})
    n_edges = int(edges["edge"].to_numpy().max()) + 1
    by_tree = {name: edges[name].to_numpy().reshape(-1, n_edges) for name in edges.columns}
    tokens, trees = (by_tree[name][:, 0] for name in ("token_id", "tree_id"))
    on_path, distance = by_tree["on_path"], by_tree["distance"]
    rows: list[dict[str, Any]] = []
    tests: list[Test] = []
    for done, site in enumerate(sites, start=1):
        patterns, _ = store.read(tokens, run, site)
        for head in range(patterns.shape[1]):
            weights = patterns[:, head, 1 : 3 * n_edges : 3].astype(np.float64)  # an edge takes three positions
            others = expected(weights, on_path, by_tree["backward"][:, 0])
            for steps in range(int(distance[on_path].max()) + 1):
                its = on_path & (distance == steps) & ~np.isnan(others)  # one edge per tree at most
                if its.sum() < LEAST:
                    continue
                about = {"site": f"{site} head {head}" if head else site, "token_role": ROLE}
                about["label"] = f"distance {steps}"
                of_trees, beyond = trees[its.any(axis=1)], weights[its] - others[its]
                measured = {"attention": weights[its], "others": others[its], "beyond": beyond}
                found = [mean_row(values, of_trees, seed, **about, metric=name) for name, values in measured.items()]
                rows += found
                what = f"attention of the root token to the node {steps} above the goal"
                tests.append(Test.of(found[-1], sign_flip(beyond, seed), what, exceeds="that to others at its place"))
        progress(done, len(sites), site)
    return rows, tests


def expected(weights: np.ndarray, on_path: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """What an edge's place in the list is given where the edge is off the path.

    Args:
        weights: float64 [tree, place], attention to the target of each edge.
        on_path: bool [tree, place].
        backward: bool [tree], whether the tree is listed backward.

    Returns:
        float64 [tree, place], means over the trees that are listed alike; NaN where all edges at a
        place are on their paths.
    """
    found = np.full(weights.shape, np.nan)
    for listed in np.unique(backward):
        its = backward == listed
        off = ~on_path[its]
        n, total = off.sum(axis=0), (weights[its] * off).sum(axis=0)
        found[its] = np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)
    return found


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """One row per distance: % of the attention at each site (and of edges off the path)."""
    cells = {(row["site"], row["label"], row["metric"]): row for row in results.iter_rows(named=True) if row["site"]}
    rows = []
    for label in results["label"].unique(maintain_order=True):
        sites = results.filter(label=label, metric="attention")["site"].to_list()
        row: dict[str, Any] = {"ancestor": label, "n": cells[sites[0], label, "attention"]["n"]}
        for site in sites:
            its, others = (100 * cells[site, label, metric]["value"] for metric in ("attention", "others"))
            row[site] = f"{its:.1f} ({others:.1f})"
        rows.append(row)
    return pl.DataFrame(rows)


def sentence(results: pl.DataFrame, tests: Sequence[Test]) -> str:
    """Of each site the ancestors that get more than others, and the one that gets most."""
    first, n = results.row(0, named=True), max(test.n for test in tests)
    parts = [
        f"In run {first['run']!r}, the root token's attention to the goal (distance 0) and its ancestors is compared with what "
        f"the targets of edges off the path get at the same place in the list, on up to {n:,} trees."
    ]
    for site in results["site"].unique(maintain_order=True):
        found = [test for test in tests if test.site == site and test.found]
        if not found:
            parts.append(f"At {site} no distance gets significantly more.")
            continue
        most = max(found, key=lambda test: test.estimate)
        row = results.filter(site=site, label=most.label, metric="attention").row(0, named=True)
        others = results.filter(site=site, label=most.label, metric="others")["value"].item()
        parts.append(
            f"At {site} more goes to distance{'s' * (len(found) > 1)} {', '.join(test.label.split()[1] for test in found)}, the "
            f"excess is largest at {most.label}: {100 * row['value']:.2f} % ({100 * row['low']:.2f} to {100 * row['high']:.2f}, n "
            f"= {row['n']:,}), where others get {100 * others:.2f} % ({p_shown(most.p_holm)})."
        )
    return " ".join([*parts, adjustment(tests)])


def plot(answer: Answer) -> Figure:
    """Attention against distance from the goal, a panel per site; edges off the path in grey."""
    results = answer.results
    sites = results["site"].unique(maintain_order=True).to_list()
    figure, axes = panels(len(sites), 1.3, columns=2, sharex=True, sharey=True)
    for axis, site in zip(axes, sites, strict=True):
        its, others = (results.filter(site=site, metric=metric) for metric in ("attention", "others"))
        at = its["label"].str.split(" ").list.get(1).cast(pl.Int64).to_list()
        points(axis, at, its, "the goal and its ancestors", few=(its["n"] < FEW).to_list())
        axis.plot(at, 100 * others["value"].to_numpy(), "--", color=GREY, label="off the path, same place in the list")
        entitle(axis, site)
    percents(axes[0])
    for axis in axes[-2:]:
        whole_numbers(axis)
        axis.set_xlabel("edges from the goal")
    figure.supylabel("attention of the root token (%)", fontsize=8)
    legend(figure, axes[0])
    n = most(results.filter(metric="attention")["n"])
    heading(
        figure,
        "Ancestors that the root token attends to",
        f"run {results['run'][0]}; up to {n:,} trees; bars are 95 % intervals; hollow: fewer than {FEW} trees",
    )
    return figure
