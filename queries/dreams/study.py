"""The study `dreams`: given the tree alone, does a model make up goals, and find the way to them?

A continuation is well formed if it begins `goal : root` with two labels of the tree. No training
graded these words: the loss of the reproduction covers the path alone, that of the baseline
everything after the root. A made-up goal is therefore a by-product of the weights, not something
that was taught. Without made-up goals, the study reports the commonest first word, stops, and
whether steps follow edges down to a leaf, compared with the same words on another tree.

The depths and places of made-up goals are compared with explanations, on the same trees. The goals
may be distributed like the trees' own goals (the training distribution, if the trees are drawn from
it; a recipe may add other trees, see the model's card), evenly among each tree's leaves, or, for
places, evenly along the list. The test statistic is the total variation between histograms. Its
distribution under the first explanation comes from random swaps of a tree's made-up and given goal,
under the others from a random leaf per tree or a random place. These tests take one goal per tree.
Sign flips of each tree's difference test whether steps follow their own tree more often than
another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.advice import ingest_more
from actstore.errors import NotStored
from actstore.intervals import change_over_trees, over_trees, share, sign_flip, total_variation
from actstore.queries.dreams.figures import EXPLANATIONS, LEAST, WALK, as_frame, sentence
from actstore.queries.dreams.figures import plot as plot
from actstore.queries.dreams.grading import CONTINUATIONS, Continuations, grade
from actstore.queries.study import LEVEL, Answer, Progress, Test, adjusted, result_rows, test_rows

if TYPE_CHECKING:
    from actstore.store import Store

NAME = "dreams"
N_DRAWS = 999  # draws per explanation: the smallest p is 1 / 1,000
COMPANION = """
select dreams.run as run from runs as base
join runs as dreams on dreams.dataset = base.dataset and dreams.weights_sha256 = base.weights_sha256
where base.run = $run and dreams.prompt = 'tree'
order by dreams.rowid limit 1
"""
ABOUT = """
select system, distribution
from runs join models using (weights_sha256) join datasets using (dataset) where run = $run
"""


def study(store: Store, run: str, seed: int, progress: Progress) -> Answer:
    """Grade the free continuations of a run's model over the run's trees.

    Args:
        store: an open store.
        run: a run over whole tasks; the hash of its weights finds the same model's continuations.
        seed: seed of the draws of the tests.
        progress: called after the greedy and after the sampled continuations.

    Raises:
        NotStored: there are no continuations; gives the ingest command that adds them.
    """
    found = store.sql(COMPANION, {"run": run})["run"].to_list()
    about = store.sql(ABOUT, {"run": run}).row(0, named=True)
    if not found:
        command = ingest_more(store, run, f"{run}-dreams", "--prompt", "tree")
        raise NotStored(f"no free continuations of the model of {run!r} over its trees; {command} adds them")
    rows: list[dict[str, Any]] = []
    tests: list[Test] = []
    frame = store.sql(CONTINUATIONS, {"dreams": found[0]})
    kinds = {"greedy": frame.filter(sample=0), "drawn": frame.filter(pl.col("sample") > 0)}
    for done, (kind, of_kind) in enumerate(kinds.items(), start=1):
        if len(of_kind):
            found, tested = _rows(grade(of_kind), kind, seed)
            rows += [{"label": kind, **row} for row in found]
            tests += tested
        progress(done, len(kinds), kind)
    if not rows:
        raise NotStored(f"run {found[0]!r} has no continuation yet; let the ingest of this run go on")
    held = adjusted(tests)
    rows += test_rows(held)
    params = {"run": run, "dreams": found[0], "n_draws": N_DRAWS, "level": LEVEL}
    results = result_rows(
        rows, study=NAME, run=run, query=CONTINUATIONS, params=params, snapshot=store.snapshot, seed=seed
    )
    at_home = about["distribution"] == about["system"]
    given = (
        "the goals of its training distribution" if at_home else f"the goals of these `{about['distribution']}` trees"
    )
    return Answer(NAME, as_frame(results, held), results, sentence(results, held, given), held)


def _rows(graded: Continuations, kind: str, seed: int) -> tuple[list[dict[str, Any]], list[Test]]:
    """Rows of `results`, without label, and tests of one kind of continuations."""

    def among(metric: str, hits: np.ndarray, among: np.ndarray) -> dict[str, Any]:
        return _share(metric, hits[among], graded.tree[among])

    everyone = np.ones(len(graded.tree), bool)
    words, counts = np.unique(graded.first_word, return_counts=True)
    commonest = str(words[counts.argmax()])
    rows = [
        among("well_formed", graded.formed, everyone),
        among("stopped", graded.stopped, everyone),
        among("first_step", graded.stepped, everyone),
        among(f"first_word {commonest}", graded.first_word == commonest, everyone),
        among("from_root", graded.from_root, graded.stepped),
        among("from_root_elsewhere", graded.other_from_root, graded.stepped),
        among("to_leaf", graded.to_leaf, graded.inside),
        among("to_leaf_elsewhere", graded.other_to_leaf, graded.other_inside),
        among("root_right", graded.root_right, graded.formed),
        among("leaf", graded.leaf, graded.formed),
        among("not_root", graded.depth > 0, graded.formed),
        among("way_found", graded.way_found, graded.root_right),
    ]
    if n := int(graded.formed.sum()):
        even, beyond = graded.leaf_share[graded.formed], (graded.leaf - graded.leaf_share)[graded.formed]
        low, high = change_over_trees(beyond, graded.tree[graded.formed])
        rows.append({"metric": "leaf_if_even", "value": float(even.mean()), "n": n})
        rows.append({"metric": "leaf_beyond_even", "value": float(beyond.mean()), "low": low, "high": high, "n": n})
    origins, tests = _origins(graded, kind, seed)
    return [*rows, *origins], [*_walks(graded, kind, seed), *tests]


def _share(metric: str, hits: np.ndarray, trees: np.ndarray) -> dict[str, Any]:
    """A share with its interval over trees."""
    value = float(hits.mean()) if len(hits) else None
    low, high = over_trees(hits, trees)
    return {"metric": metric, "value": value, "low": low, "high": high, "n": len(hits)}


def _walks(graded: Continuations, kind: str, seed: int) -> list[Test]:
    """Test whether steps that begin inside two trees follow their own more often."""
    both = graded.inside & graded.other_inside
    if not both.any():
        return []
    names, tree = np.unique(graded.tree[both], return_inverse=True)
    more = graded.to_leaf[both].astype(np.float64) - graded.other_to_leaf[both]
    by_tree = np.bincount(tree, weights=more) / np.bincount(tree)
    low, high = change_over_trees(by_tree, names)
    row = {"label": f"{kind}, {WALK}", "value": float(by_tree.mean()), "low": low, "high": high, "n": len(names)}
    what = f"{kind}: steps follow their own tree, less another tree"
    return [Test.of(row, sign_flip(by_tree, seed), what, exceeds="the other tree's share")]


def _origins(graded: Continuations, kind: str, seed: int) -> tuple[list[dict[str, Any]], list[Test]]:
    """Rows and tests of the explanations of leaf goals, by depth and by place in the list."""
    chosen = graded.leaf_goal
    if chosen.sum() < LEAST:
        return [], []
    rows: list[dict[str, Any]] = []
    for what, dreamed, given, of_leaves in (
        ("depth", graded.depth, graded.given_depth, graded.leaf_depths),
        ("place", graded.place, graded.given_place, graded.leaf_places),
    ):
        leaves = [of for of, kept in zip(of_leaves, chosen.tolist(), strict=True) if kept]
        places = graded.n_edges if what == "place" else None
        rows += _explained(what, dreamed[chosen], given[chosen], leaves, places, seed)
    found, n = {row["metric"]: row["value"] for row in rows}, int(chosen.sum())
    tests = [
        Test(
            f"{kind}, {name}",
            found[name.replace("_p_", "_distance_")],
            found[name],
            n,
            what=f"{kind}: {what} (total variation)",
            points=False,
        )
        for name, what in EXPLANATIONS.items()
    ]
    return rows, tests


def _explained(
    what: str, dreamed: np.ndarray, given: np.ndarray, leaves: list[list[int]], places: int | None, seed: int
) -> list[dict[str, Any]]:
    """Histograms of made-up goals and of explanations, and the fit of each explanation."""
    n, size = len(dreamed), places or 1 + max(int(given.max()), max(map(max, leaves)))
    rng = np.random.default_rng(seed)
    n_leaves = np.array([len(of) for of in leaves])
    flat, ends = np.concatenate(leaves), np.cumsum(n_leaves)
    even = np.bincount(flat, weights=np.repeat(1 / n_leaves, n_leaves), minlength=size)

    def swapped() -> float:
        swap = rng.random(n) < 0.5
        first, second = np.where(swap, given, dreamed), np.where(swap, dreamed, given)
        return total_variation(np.bincount(first, minlength=size), np.bincount(second, minlength=size))

    def a_leaf() -> float:
        leaf = flat[ends - n_leaves + (rng.random(n) * n_leaves).astype(int)]
        return total_variation(np.bincount(leaf, minlength=size), even)

    def a_place() -> float:
        return total_variation(np.bincount(rng.integers(size, size=n), minlength=size), np.ones(size))

    explanations: dict[str, tuple[np.ndarray, Callable[[], float]]] = {
        "as_given": (np.bincount(given, minlength=size), swapped),
        "even_leaves": (even, a_leaf),
    }
    if places:
        explanations["even_list"] = (np.ones(size), a_place)
    found = np.bincount(dreamed, minlength=size)
    rows: list[dict[str, Any]] = []
    for name, (expected, once) in explanations.items():
        distance = total_variation(found, expected)
        p = (1 + sum(once() >= distance - 1e-12 for _ in range(N_DRAWS))) / (1 + N_DRAWS)
        rows.append({"metric": f"{what}_distance_{name}", "value": distance, "n": n})
        rows.append({"metric": f"{what}_p_{name}", "value": p, "n": n})
    for value in range(size):
        low, high = share(int(found[value]), n)
        rows.append({"metric": f"{what} {value}", "value": found[value] / n, "low": low, "high": high, "n": n})
        for name, (expected, _) in explanations.items():
            expected_share = float(expected[value] / expected.sum())
            rows.append({"metric": f"{what} {value} {name}", "value": expected_share, "n": n})
    return rows
