"""The study `dreams`: given the tree alone, does a model make up goals of its own, and does it find the way to them?

A continuation is well formed when it begins `goal : root` with two labels of the tree. No training ever graded what
stands there: the loss is on what follows `goal : root`. So what a model dreams is what its weights happen to say.

The depths and places of the goals it makes up are held against two explanations, on the very same trees: that they
are drawn as the trees' own goals were (the training distribution, where the trees are drawn from it), and that they
are drawn evenly among each tree's leaves. Each is tested by the total variation between histograms and what it is
under the explanation: for the first the dreamed and the given goal of a tree are swapped at random, for the second a
leaf of each tree is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import NotStored
from actstore.queries.panels import panels, points
from actstore.queries.study import Progress, Study, result_rows
from actstore.statistics import total_variation, wilson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME = "dreams"
N_DRAWS = 999  # of each explanation: the smallest p is then 1 in 1,000
LEVEL = 0.05  # below, an explanation is refuted
LEAST = 20  # dreams with a goal, before their distribution is spoken of
NO_NODE = 255
COMPANION = """
select dreams.run as run from runs as base
join runs as dreams on dreams.dataset = base.dataset and dreams.weights_sha256 = base.weights_sha256
where base.run = $run and dreams.prompt = 'tree'
order by dreams.rowid limit 1
"""
DREAMS = """
-- one row a continuation, its tokens in order, beside the tree it goes on from
with said as (
    select tree_id, sample, list(token::varchar order by position) as said
    from generations where run = $dreams group by tree_id, sample
),
listed as (
    select tree_id, list(source order by edge) as sources, list(target order by edge) as targets
    from edges semi join said using (tree_id) group by tree_id
)
select tree_id, sample, said, sources, targets, root, goal, depth
from said join listed using (tree_id) join trees using (tree_id)
order by sample, tree_id
"""


@dataclass(frozen=True)
class Dreams:
    """Continuations, graded: one row each of n.

    Attributes:
        formed: bool, begins `goal : root` with labels of the tree.
        root_right: bool, and names the tree's root.
        leaf: bool, its goal is a leaf.
        right: bool, what follows is the path to its goal, whole.
        step_first: bool, its first word is a step, `→k`.
        depth: int, of its goal; place: int, of the edge that leads to it in the list; -1 where there is none.
        given_depth, given_place: of the tree's own goal.
        leaf_depths, leaf_places: of each tree's leaves, lists.
    """

    formed: np.ndarray
    root_right: np.ndarray
    leaf: np.ndarray
    right: np.ndarray
    step_first: np.ndarray
    depth: np.ndarray
    place: np.ndarray
    given_depth: np.ndarray
    given_place: np.ndarray
    leaf_depths: Sequence[list[int]]
    leaf_places: Sequence[list[int]]

    @property
    def has_goal(self) -> np.ndarray:
        """bool [n]: well formed, and the goal is a leaf, so that it can be held against goals that were given."""
        return self.formed & self.leaf & (self.depth > 0)


def study(store: Store, run: str, seed: int, progress: Progress) -> Study:
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
    if not found:
        about = store.sql(
            "select model, dataset from runs join models using (weights_sha256) where run = $run", {"run": run}
        ).row(0, named=True)
        raise NotStored(
            f"no free continuations of the model of {run!r} over its trees; `actstore ingest {store.path} --model "
            f"{about['model']} --dataset {about['dataset']} --prompt tree` adds them"
        )
    rows: list[dict[str, Any]] = []
    frame = store.sql(DREAMS, {"dreams": found[0]})
    kinds = {"greedy": frame.filter(sample=0), "drawn": frame.filter(pl.col("sample") > 0)}
    for done, (kind, some) in enumerate(kinds.items(), start=1):
        if len(some):
            rows += _rows(kind, grade(some), seed)
        progress(done, len(kinds), kind)
    if not rows:
        raise NotStored(f"run {found[0]!r} has no continuation yet; let its ingest go on")
    params = {"run": run, "dreams": found[0], "n_draws": N_DRAWS, "level": LEVEL}
    results = result_rows(rows, study=NAME, run=run, query=DREAMS, params=params, snapshot=store.snapshot, seed=seed)
    return Study(NAME, table(results), results, sentence(results))


def grade(frame: pl.DataFrame) -> Dreams:
    """Grade rows of DREAMS, one by one."""
    graded = [_grade_one(**row) for row in frame.drop("tree_id", "sample").iter_rows(named=True)]
    columns = list(zip(*graded, strict=True))
    arrays: list[Any] = [np.array(column, bool) for column in columns[:5]] + [
        np.array(column) for column in columns[5:9]
    ]
    return Dreams(*arrays, *columns[9:])


def _grade_one(
    said: list[str], sources: list[int], targets: list[int], root: int, goal: int, depth: int
) -> tuple[Any, ...]:
    parent = dict(zip(targets, sources, strict=True))
    place_of = {target: place for place, target in enumerate(targets)}
    leaves = sorted(set(targets) - set(sources))
    nodes = {str(node): node for node in [root, *targets]}
    dreamed, colon, start = [*said, "", "", ""][:3]
    formed = dreamed in nodes and colon == ":" and start in nodes
    node = nodes[dreamed] if formed else root
    way = _way(node, parent)
    return (
        formed,
        formed and nodes[start] == root,
        formed and node not in sources,
        formed and bool(way) and said[3 : 3 + len(way)] == [f"→{step}" for step in way],
        dreamed.startswith("→"),
        len(way) if formed else -1,
        place_of.get(node, -1) if formed else -1,
        depth,
        place_of[goal],
        [len(_way(leaf, parent)) for leaf in leaves],
        [place_of[leaf] for leaf in leaves],
    )


def _way(node: int, parent: dict[int, int]) -> list[int]:
    """Labels from the root's child to a node."""
    way: list[int] = []
    while node in parent:
        way.append(node)
        node = parent[node]
    return way[::-1]


def _rows(kind: str, dreams: Dreams, seed: int) -> list[dict[str, Any]]:
    formed, n = int(dreams.formed.sum()), len(dreams.formed)
    chosen = dreams.has_goal
    rows = [_share(kind, "well_formed", formed, n), _share(kind, "first_step", int(dreams.step_first.sum()), n)]
    rows += [
        _share(kind, metric, int((dreams.formed & which).sum()), formed)
        for metric, which in (("root_right", dreams.root_right), ("leaf", dreams.leaf), ("not_root", dreams.depth > 0))
    ]
    rows.append(_share(kind, "way_found", int((dreams.right & dreams.root_right).sum()), int(dreams.root_right.sum())))
    if chosen.sum() < LEAST:
        return rows
    for what, dreamed, given, of_leaves in (
        ("depth", dreams.depth, dreams.given_depth, dreams.leaf_depths),
        ("place", dreams.place, dreams.given_place, dreams.leaf_places),
    ):
        leaves = [of for of, kept in zip(of_leaves, chosen.tolist(), strict=True) if kept]
        rows += _explained(kind, what, dreamed[chosen], given[chosen], leaves, seed)
    return rows


def _share(kind: str, metric: str, n_right: int, n: int) -> dict[str, Any]:
    low, high = wilson(n_right, n)
    return {"label": kind, "metric": metric, "value": n_right / n if n else None, "low": low, "high": high, "n": n}


def _explained(
    kind: str, what: str, dreamed: np.ndarray, given: np.ndarray, leaves: list[list[int]], seed: int
) -> list[dict[str, Any]]:
    """Histograms of the dreamed goals and of both explanations, and how well each explains them."""
    n, size = len(dreamed), 1 + max(int(dreamed.max()), int(given.max()), max(map(max, leaves)))
    rng = np.random.default_rng(seed)
    n_leaves = np.array([len(of) for of in leaves])
    flat, ends = np.concatenate(leaves), np.cumsum(n_leaves)
    even = np.bincount(flat, weights=np.repeat(1 / n_leaves, n_leaves), minlength=size)

    def swapped() -> float:
        swap = rng.random(n) < 0.5
        first, second = np.where(swap, given, dreamed), np.where(swap, dreamed, given)
        return total_variation(np.bincount(first, minlength=size), np.bincount(second, minlength=size))

    def drawn() -> float:
        leaf = flat[ends - n_leaves + (rng.random(n) * n_leaves).astype(int)]
        return total_variation(np.bincount(leaf, minlength=size), even)

    said = np.bincount(dreamed, minlength=size)
    rows = []
    explanations: dict[str, tuple[np.ndarray, Callable[[], float]]] = {
        "as_given": (np.bincount(given, minlength=size), swapped),
        "even_leaves": (even, drawn),
    }
    for name, (expected, once) in explanations.items():
        distance = total_variation(said, expected)
        p = (1 + sum(once() >= distance - 1e-12 for _ in range(N_DRAWS))) / (1 + N_DRAWS)
        rows.append({"label": kind, "metric": f"{what}_distance_{name}", "value": distance, "n": n})
        rows.append({"label": kind, "metric": f"{what}_p_{name}", "value": p, "n": n})
    for value in range(size):
        low, high = wilson(int(said[value]), n)
        at = {"label": kind, "n": n}
        rows.append({**at, "metric": f"{what} {value}", "value": said[value] / n, "low": low, "high": high})
        for name, (expected, _) in explanations.items():
            rows.append({**at, "metric": f"{what} {value} {name}", "value": float(expected[value] / expected.sum())})
    return rows


SHARES = {
    "well_formed": "begins `goal : root`",
    "first_step": "begins with a step, as if a goal stood there",
    "root_right": "names the tree's root",
    "leaf": "goal is a leaf",
    "not_root": "goal is not the root",
    "way_found": "then finds the way",
}
TESTS = {
    "depth_p_as_given": "depths as given ones: p",
    "depth_p_even_leaves": "depths as even among leaves: p",
    "place_p_as_given": "places as given ones: p",
    "place_p_even_leaves": "places as even among leaves: p",
}


def table(results: pl.DataFrame) -> pl.DataFrame:
    """One row a question; percent of n, or the p of an explanation."""
    rows = []
    for kind in results["label"].unique(maintain_order=True):
        some = {row["metric"]: row for row in results.filter(label=kind).iter_rows(named=True)}
        for metric, name in SHARES.items():
            row = some[metric]
            shown = "none" if row["value"] is None else f"{100 * row['value']:.2f} %"
            interval = f"[{100 * row['low']:.2f}, {100 * row['high']:.2f}]"
            rows.append({"continuations": kind, "question": name, "answer": shown, "95 %": interval, "n": row["n"]})
        for metric, name in TESTS.items():
            if metric in some:
                rows.append(
                    {
                        "continuations": kind,
                        "question": name,
                        "answer": f"{some[metric]['value']:.3f}",
                        "95 %": "",
                        "n": some[metric]["n"],
                    }
                )
    return pl.DataFrame(rows)


def sentence(results: pl.DataFrame) -> str:
    """Does the model make up goals, does it reach them, and where are they from?"""
    run = results["run"][0]
    parts = []
    for kind in results["label"].unique(maintain_order=True):
        some = {row["metric"]: row for row in results.filter(label=kind).iter_rows(named=True)}
        formed, found = some["well_formed"], some["way_found"]
        said = (
            f"Left alone with a tree ({kind}), run {run!r} makes up a well-formed goal in {100 * formed['value']:.2f} % "
            f"({100 * formed['low']:.2f} to {100 * formed['high']:.2f}) of {formed['n']:,} continuations"
        )
        if not formed["value"]:
            said += f"; its first word is a step in {100 * some['first_step']['value']:.2f} %"
        if found["value"] is not None:
            said += f", and then finds the way in {100 * found['value']:.2f} % of {found['n']:,}"
        parts.append(f"{said}; {origin(some)}")
    return ". ".join(parts) + "."


def origin(some: dict[str, dict[str, Any]]) -> str:
    """Which explanations the depths of the goals leave standing."""
    if "depth_p_as_given" not in some:
        return f"fewer than {LEAST} of these are leaves, so nothing is said of where the goals are from"
    n = some["depth_p_as_given"]["n"]
    as_given, even = some["depth_p_as_given"]["value"] >= LEVEL, some["depth_p_even_leaves"]["value"] >= LEVEL
    verdicts = {
        (True, True): "as goals given in training and as leaves drawn evenly, which these trees do not tell apart",
        (True, False): "as goals given in training, and not as leaves drawn evenly",
        (False, True): "as leaves drawn evenly, and not as goals given in training",
        (False, False): "neither as goals given in training nor as leaves drawn evenly",
    }
    distance = some["depth_distance_as_given"]["value"]
    spread = f"the depths of its {n:,} leaf goals are spread {verdicts[as_given, even]}"
    return f"{spread} (total variation {distance:.3f} from the given)"


def plot(study: Study) -> Figure:
    """Depth and place of dreamed goals beside both explanations."""
    figure, axes = panels(2)
    for axis, what in zip(axes, ("depth", "place"), strict=True):
        for turn, kind in enumerate(study.results["label"].unique(maintain_order=True)):
            rows = study.results.filter((pl.col("label") == kind) & pl.col("metric").str.contains(f"^{what} \\d+$"))
            x = [int(metric.split()[1]) for metric in rows["metric"]]
            points(axis, x, rows, f"dreamed, {kind}", turn)
        first = study.results["label"][0]
        for name, style, shown in (("as_given", "--", "given goals"), ("even_leaves", ":", "leaves drawn evenly")):
            rows = study.results.filter(
                (pl.col("label") == first) & pl.col("metric").str.contains(f"^{what} \\d+ {name}$")
            )
            x = [int(metric.split()[1]) for metric in rows["metric"]]
            axis.plot(x, 100 * rows["value"].to_numpy(), style, color="0.3", label=shown)
        axis.set_xlabel("depth of the goal" if what == "depth" else "place in the list of the edge to the goal")
        axis.set_ylabel("share of the goals (%)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Goals that run {study.results['run'][0]} makes up; bars are 95 % intervals", fontsize=10)
    return figure
