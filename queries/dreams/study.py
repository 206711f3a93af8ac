"""The study `dreams`: given the tree alone, does a model make up goals of its own, and does it find the way to them?

A continuation is well formed when it begins `goal : root` with two labels of the tree. No training ever graded what
stands there: the loss of the reproduction is on the path alone, that of the baseline on everything after the root. So
what a model dreams is what its weights happen to say, and not something that it was taught. Where no goal is made up,
the study says what is: the commonest first word, whether it stops, and whether steps follow edges of the tree down to
a leaf, beside the same words on another tree.

The depths and places of the goals it makes up are held against explanations, on the very same trees: that they are
drawn as the trees' own goals were (the training distribution, where the trees are drawn from it; a recipe may have
practised others beside, see the model's card), that they are drawn evenly among each tree's leaves, and, for places,
evenly along the list. Each is tested by the total variation between histograms and what it is under the explanation:
for the first the dreamed and the given goal of a tree are swapped at random, for the others a leaf of each tree, or a
place, is drawn. These tests take one goal a tree. That steps follow the tree more than another tree is tested by sign flips
of each tree's difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.advice import ingest_more
from actstore.errors import NotStored
from actstore.intervals import change_over_trees, over_trees, share, sign_flip, total_variation
from actstore.queries.dreams.figures import EXPLANATIONS, LEAST, WALK, draw, sentence, table
from actstore.queries.dreams.grading import CONTINUATIONS, Continuations, grade
from actstore.queries.study import LEVEL, Answer, Progress, Test, adjusted, result_rows, test_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME = "dreams"
N_DRAWS = 999  # of each explanation: the smallest p is then 1 in 1,000
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
        run: one that was given whole tasks; the same model's continuations are found by its weights.
        seed: of the draws that the explanations are tested with.
        progress: called when the greedy and when the drawn continuations are done.

    Raises:
        NotStored: there are no continuations; says which ingest command adds them.
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
    for done, (kind, some) in enumerate(kinds.items(), start=1):
        if len(some):
            found, tested = _rows(grade(some), kind, seed)
            rows += [{"label": kind, **row} for row in found]
            tests += tested
        progress(done, len(kinds), kind)
    if not rows:
        raise NotStored(f"run {found[0]!r} has no continuation yet; let its ingest go on")
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
    return Answer(NAME, table(results, held), results, sentence(results, held, given), held)


def _rows(said: Continuations, kind: str, seed: int) -> tuple[list[dict[str, Any]], list[Test]]:
    """Rows of `results`, but for the label, of one kind of continuations; and what is tested of them."""

    def among(metric: str, hits: np.ndarray, among: np.ndarray) -> dict[str, Any]:
        return _share(metric, hits[among], said.tree[among])

    everyone = np.ones(len(said.tree), bool)
    words, counts = np.unique(said.first_word, return_counts=True)
    commonest = str(words[counts.argmax()])
    rows = [
        among("well_formed", said.formed, everyone),
        among("stopped", said.stopped, everyone),
        among("first_step", said.stepped, everyone),
        among(f"first_word {commonest}", said.first_word == commonest, everyone),
        among("from_root", said.from_root, said.stepped),
        among("from_root_elsewhere", said.other_from_root, said.stepped),
        among("to_leaf", said.to_leaf, said.inside),
        among("to_leaf_elsewhere", said.other_to_leaf, said.other_inside),
        among("root_right", said.root_right, said.formed),
        among("leaf", said.leaf, said.formed),
        among("not_root", said.depth > 0, said.formed),
        among("way_found", said.way_found, said.root_right),
    ]
    if n := int(said.formed.sum()):
        even, beyond = said.leaf_share[said.formed], (said.leaf - said.leaf_share)[said.formed]
        low, high = change_over_trees(beyond, said.tree[said.formed])
        rows.append({"metric": "leaf_if_even", "value": float(even.mean()), "n": n})
        rows.append({"metric": "leaf_beyond_even", "value": float(beyond.mean()), "low": low, "high": high, "n": n})
    origins, tests = _origins(said, kind, seed)
    return [*rows, *origins], [*_walks(said, kind, seed), *tests]


def _share(metric: str, hits: np.ndarray, trees: np.ndarray) -> dict[str, Any]:
    """A share with its interval over trees."""
    value = float(hits.mean()) if len(hits) else None
    low, high = over_trees(hits, trees)
    return {"metric": metric, "value": value, "low": low, "high": high, "n": len(hits)}


def _walks(said: Continuations, kind: str, seed: int) -> list[Test]:
    """Whether steps follow their own tree more than another, where they begin inside of both."""
    both = said.inside & said.other_inside
    if not both.any():
        return []
    names, tree = np.unique(said.tree[both], return_inverse=True)
    more = said.to_leaf[both].astype(np.float64) - said.other_to_leaf[both]
    by_tree = np.bincount(tree, weights=more) / np.bincount(tree)
    low, high = change_over_trees(by_tree, names)
    p = sign_flip(by_tree, seed)
    return [
        Test(
            f"{kind}, {WALK}",
            float(by_tree.mean()),
            p,
            len(names),
            low,
            high,
            f"{kind}: down its own tree, less another",
        )
    ]


def _origins(said: Continuations, kind: str, seed: int) -> tuple[list[dict[str, Any]], list[Test]]:
    """Where leaf goals are from, by depth and by place in the list: rows, and a test of each explanation."""
    chosen = said.leaf_goal
    if chosen.sum() < LEAST:
        return [], []
    rows: list[dict[str, Any]] = []
    for what, dreamed, given, of_leaves in (
        ("depth", said.depth, said.given_depth, said.leaf_depths),
        ("place", said.place, said.given_place, said.leaf_places),
    ):
        leaves = [of for of, kept in zip(of_leaves, chosen.tolist(), strict=True) if kept]
        places = said.n_edges if what == "place" else None
        rows += _explained(what, dreamed[chosen], given[chosen], leaves, places, seed)
    found, n = {row["metric"]: row["value"] for row in rows}, int(chosen.sum())
    tests = [
        Test(
            f"{kind}, {name}",
            found[name.replace("_p_", "_distance_")],
            found[name],
            n,
            what=f"{kind}: {what}, total variation",
            points=False,
        )
        for name, what in EXPLANATIONS.items()
    ]
    return rows, tests


def _explained(
    what: str, dreamed: np.ndarray, given: np.ndarray, leaves: list[list[int]], places: int | None, seed: int
) -> list[dict[str, Any]]:
    """Histograms of the dreamed goals and of the explanations, and how well each explains them."""
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
    said = np.bincount(dreamed, minlength=size)
    rows: list[dict[str, Any]] = []
    for name, (expected, once) in explanations.items():
        distance = total_variation(said, expected)
        p = (1 + sum(once() >= distance - 1e-12 for _ in range(N_DRAWS))) / (1 + N_DRAWS)
        rows.append({"metric": f"{what}_distance_{name}", "value": distance, "n": n})
        rows.append({"metric": f"{what}_p_{name}", "value": p, "n": n})
    for value in range(size):
        low, high = share(int(said[value]), n)
        rows.append({"metric": f"{what} {value}", "value": said[value] / n, "low": low, "high": high, "n": n})
        for name, (expected, _) in explanations.items():
            expected_share = float(expected[value] / expected.sum())
            rows.append({"metric": f"{what} {value} {name}", "value": expected_share, "n": n})
    return rows


def plot(answer: Answer) -> Figure:
    """What continuations begin with; where there are goals, their depth and place beside the explanations."""
    return draw(answer.results)
