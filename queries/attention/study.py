"""The study `attention`: what tokens of edges and paths attend to, by layer; the last edge.

The paper claims that a target token gathers its edge's source in the first layer. The study
measures attention at three kinds of tokens: at an edge's target, on its own source, on itself and
on edges before; at an edge's separator (the bar after the last edge), on the edge that it closes;
at the root and the path's tokens, on the edge to take next. Chance is even attention, 1 / (number
of tokens so far). The last edge is compared with the edge before it on the same trees, since a late
token has more tokens to attend to.

Neighbours in the list differ everywhere, and with many trees the interval of each difference
excludes 0. The last pair is therefore compared with all pairs of neighbours. Its p is the share of
pairs that are as far from their median (of n pairs at least 1 / n), adjusted for all sites and
heads (Holm).

With `by=ancestor` the study asks something else: which ancestors of the goal the root token looks
at, see ancestors.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.advice import ingest_sites
from actstore.errors import BadInput, NotStored
from actstore.intervals import n_as_far
from actstore.queries.attention import ancestors
from actstore.queries.figures import GREY, by_site, entitle, heading, legend, most, panels, percents, points
from actstore.queries.last_edge import interval
from actstore.queries.study import (
    Answer,
    Progress,
    Test,
    adjusted,
    adjustment,
    mean_row,
    p_shown,
    result_rows,
    test_rows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME = "attention"
TOKENS = """
-- one row per token of an edge or a path; e: the token's edge, or the edge of the next step
select token_id, tree_id, position, role::varchar as role, edge as e, is_last
from tokens join edges using (tree_id, edge) semi join held_trees($run) using (tree_id)
where role in ('edge_target', 'separator', 'bar')
union all
select token_id, tree_id, position_of(token_id), 'path', edges.edge, is_last
from answer_tokens join edges using (tree_id, step) semi join held_trees($run) using (tree_id)
order by token_id
"""
N_NODES = "select n_nodes from runs join datasets using (dataset) where run = $run"
HOLDERS = """
select run from runs semi join (from sites where kind = 'pattern') as patterns using (run)
where (weights_sha256, dataset) = (select (weights_sha256, dataset) from runs where run = $run)
and (run = $run or run not in (select run from interventions))
order by run = $run desc, runs.rowid
"""
LOOKS = {  # kind of token → names of the sums of its attention
    "edge_target": ("own source", "itself", "before"),
    "separator": ("own edge", "itself", "before"),
    "bar": ("own edge", "itself", "before"),
    "path": ("next edge", "itself", "elsewhere"),
}
ROUNDING = 1e-6  # of weights stored in float32
FIRST = {role: looks[0] for role, looks in LOOKS.items()}  # the sum that the study asks for
LAST = "last less the one before"
CLOSES = {
    "edge_target": ("edge_target",),
    "bar": ("separator", "bar"),
}  # last edge's role → roles of the tokens to compare, one per edge


def study(store: Store, run: str, seed: int, progress: Progress, by: str | None = None) -> Answer:
    """Sum attention by target, at every stored layer and head.

    Args:
        store: an open store.
        run: name of the run; without patterns, another run of the same model over the same trees is
            used.
        seed: seed of the bootstrap.
        progress: called after each layer.
        by: `ancestor` asks which ancestors of the goal the root token looks at.

    Raises:
        NotStored: there is no pattern; gives the ingest command that adds them.
        BadInput: the trees have one edge, or `by` has no meaning.
    """
    if by not in (None, ancestors.BY):
        raise BadInput(f"got by {by!r}; write {ancestors.BY}, for the attention of the root token by ancestor (-o by)")
    holder = pattern_run(store, run)
    if store.sql(N_NODES, {"run": run}).item() == 2:
        raise BadInput(
            f"run {run!r} is over trees of 2 nodes, whose one edge cannot be compared with another; ingest larger ones (--nodes)"
        )
    sites = pattern_sites(store, holder)
    if by:
        return _by_ancestor(store, run, holder, sites, seed, progress)
    params = {"run": holder}
    rows: list[dict[str, Any]] = []
    tests: list[Test] = []
    for done, site in enumerate(sites, start=1):
        patterns, tokens = store.read(TOKENS, run=holder, site=site, params=params)
        for head in range(patterns.shape[1]):
            name = f"{site} head {head}" if head else site
            rows += _of_head(patterns[:, head], tokens, {"site": name}, seed)
            of_pairs, its = _neighbours(patterns[:, head], tokens, name, seed)
            rows += of_pairs
            tests += its
        progress(done, len(sites), site)
    tests = list(adjusted(tests))
    results = result_rows(
        [*rows, *test_rows(tests)], study=NAME, run=run, query=TOKENS, params=params, snapshot=store.snapshot, seed=seed
    )
    return Answer(NAME, as_frame(results), results, sentence(results, tests), tuple(tests))


def _by_ancestor(store: Store, run: str, holder: str, sites: Sequence[str], seed: int, progress: Progress) -> Answer:
    """The answer of `by=ancestor`, from the patterns of the run `holder`."""
    rows, found = ancestors.compare(store, holder, sites, seed, progress)
    tests = adjusted(found)
    results = result_rows(
        [*rows, *test_rows(tests)],
        study=NAME,
        run=run,
        query=ancestors.EDGES,
        params={"run": holder, "by": ancestors.BY},
        snapshot=store.snapshot,
        seed=seed,
    )
    return Answer(NAME, ancestors.as_frame(results), results, ancestors.sentence(results, tests), tests)


def pattern_run(store: Store, run: str) -> str:
    """The run itself if it holds patterns, else a run of the same model and trees that does.

    Raises:
        NotStored: there is no such run; gives the ingest command that adds one.
    """
    found = store.sql(HOLDERS, {"run": run})["run"].to_list()
    if not found:
        raise NotStored(
            f"neither run {run!r} nor another run of its model over its trees holds attention patterns; "
            f"{ingest_sites(store, run, 'pattern')} adds them"
        )
    return str(found[0])


def pattern_sites(store: Store, run: str) -> list[str]:
    """Short names of a run's pattern sites, by layer."""
    query = "select short from sites where run = $run and kind = 'pattern'"
    held = store.whole.sql(query, {"run": run})["short"].to_list()
    return [site for site in store.whole.sites(run) if site in held]


def looks(pattern: np.ndarray, tokens: pl.DataFrame, role: str) -> dict[str, np.ndarray]:
    """Sum each token's attention by target.

    Args:
        pattern: float32 [n, key]; each row sums to 1.
        tokens: columns `position` of the token and `e` of its edge.
        role: role of all tokens, one of LOOKS.

    Returns:
        Name → float64 [n], with the names of LOOKS, which sum to 1, and `even`: the first of them
        under even attention.
    """
    rows, e = np.arange(len(pattern)), tokens["e"].to_numpy().astype(np.intp)
    position = tokens["position"].to_numpy().astype(np.intp)
    wide = pattern.astype(np.float64)
    source, target = wide[rows, 3 * e], wide[rows, 3 * e + 1]  # an edge takes three positions
    itself = wide[rows, position]
    first = source if role == "edge_target" else source + target
    n_first = 1 if role == "edge_target" else 2
    names = LOOKS[role]
    return {
        names[0]: first,
        names[1]: itself,
        names[2]: np.nansum(wide, axis=1) - first - itself,
        "even": n_first / (position + 1.0),
    }


def _of_head(pattern: np.ndarray, tokens: pl.DataFrame, at: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Means over last edges and over all other edges."""
    rows = []
    for role in LOOKS:
        which = (tokens["role"] == role).to_numpy()
        chosen_tokens = tokens.filter(which)
        for name, values in looks(pattern[which], chosen_tokens, role).items():
            for kind, chosen in _kinds(role, chosen_tokens["is_last"].to_numpy()).items():
                rows.append(
                    mean_row(
                        values[chosen],
                        chosen_tokens["tree_id"].to_numpy()[chosen],
                        seed,
                        **at,
                        token_role=role,
                        label=kind,
                        metric=name,
                    )
                )
    return rows


def _kinds(role: str, last: np.ndarray) -> dict[str, np.ndarray]:
    if role in ("separator", "bar"):  # the bar is the last edge's
        return {"last" if role == "bar" else "others": np.ones(len(last), bool)}
    return {"others": ~last, "last": last}


def _neighbours(
    pattern: np.ndarray, tokens: pl.DataFrame, site: str, seed: int
) -> tuple[list[dict[str, Any]], list[Test]]:
    """Compare each target's attention on its own edge with that of the edge before.

    Separators are compared likewise. Attention is taken above even attention, which falls with the
    position. There is one row per pair of neighbours, labels `edge 3 less 2` and LAST. A row
    `as_far` counts the pairs, of n, that are as far from the median as the last pair. With another
    pair, the last pair is tested.
    """
    rows: list[dict[str, Any]] = []
    tests: list[Test] = []
    n_edges = int(tokens["e"].to_numpy().max()) + 1
    for role, roles in CLOSES.items():
        which = tokens["role"].is_in(roles).to_numpy()
        chosen = tokens.filter(which)  # by tree, then in the order of the list
        apart = np.diff(_beyond_even(pattern[which], chosen, roles[0]).reshape(-1, n_edges), axis=1)
        trees, n_pairs = chosen["tree_id"].to_numpy()[::n_edges], apart.shape[1]
        about = {"site": site, "token_role": role}
        labels = [*(f"edge {edge + 1} less {edge}" for edge in range(n_pairs - 1)), LAST]
        pairs = [
            mean_row(apart[:, pair], trees, seed, **about, label=label, metric=FIRST[role])
            for pair, label in enumerate(labels)
        ]
        as_far = n_as_far([row["value"] for row in pairs], n_pairs - 1, ROUNDING)
        rows += [*pairs, {**about, "label": LAST, "metric": "as_far", "value": float(as_far), "n": n_pairs}]
        if n_pairs > 1:
            what = f"attention of {WHAT[role]} to its own edge, less that of the edge before"
            tests.append(Test.of(pairs[-1], as_far / n_pairs, what))
    return rows, tests


WHAT = {"edge_target": "the last edge's target", "bar": "the bar after the last edge"}


def _beyond_even(pattern: np.ndarray, tokens: pl.DataFrame, role: str) -> np.ndarray:
    """float64 [n]: the attention on a token's own edge, less even attention."""
    found = looks(pattern, tokens, role)
    return found[FIRST[role]] - found["even"]


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """One row per layer, in percent of the attention."""
    rows = []
    for (site,), of_site in results.group_by("site", maintain_order=True):
        row: dict[str, Any] = {"site": site}
        last, spread, as_far, n_pairs = _last_pair(results, str(site), "edge_target")
        for name, (role, kind) in COLUMNS.items():
            found = of_site.filter(token_role=role, metric=FIRST[role], label=kind)["value"]
            row[f"{name} %"] = None if found[0] is None else round(100 * found[0], 2)
            if kind == "last" and role == "edge_target":
                row[f"{LAST}, points"] = interval(last)
                row |= {"pairs as far from their median": f"{as_far} of {n_pairs}"} if n_pairs > 1 else {}
        both = of_site.filter(token_role="path", metric="next edge")
        row["path → next edge %"] = round(100 * float(np.average(both["value"].fill_null(0), weights=both["n"])), 2)
        if n_pairs > 1:
            row["other neighbours (half of them), points"] = f"{_ends(spread, 0, 4)} ({_ends(spread, 1, 3)})"
        rows.append(row)
    return pl.DataFrame(rows)


def _last_pair(results: pl.DataFrame, site: str, role: str) -> tuple[dict[str, Any], np.ndarray, int, int]:
    """The last pair's row, quantiles of the other pairs in points, the number as far out, and n.

    The quantiles are minimum, quartiles and maximum; they are empty without other pairs.

    """
    found = results.filter(site=site, token_role=role)
    others = 100 * found.filter(pl.col("label").str.starts_with("edge "))["value"].to_numpy()
    last = found.filter(label=LAST, metric=FIRST[role]).row(0, named=True)
    far = found.filter(label=LAST, metric="as_far").row(0, named=True)
    spread = np.quantile(others, [0, 0.25, 0.5, 0.75, 1]) if len(others) else others
    return last, spread, int(far["value"]), far["n"]


def _ends(spread: np.ndarray, first: int, last: int) -> str:
    return f"{spread[first]:+.3f} to {spread[last]:+.3f}"


COLUMNS = {  # name in the table → role of the tokens, and which edges
    "target → its source": ("edge_target", "others"),
    "target → its source, last": ("edge_target", "last"),
    "separator → its edge": ("separator", "others"),
    "bar → last edge": ("bar", "last"),
}


def sentence(results: pl.DataFrame, tests: Sequence[Test]) -> str:
    """The layer whose targets attend most to their own source, and how the last edge compares."""
    own = results.filter(token_role="edge_target", metric="own source", label="others")
    even = results.filter(token_role="edge_target", metric="even", label="others")
    best = own.sort("value", descending=True, maintain_order=True).row(0, named=True)
    chance = even.filter(site=best["site"])["value"].item()
    apart = "more than" if best["low"] - ROUNDING > chance else "less than"
    if best["low"] - ROUNDING <= chance <= best["high"] + ROUNDING:
        apart = "no more than"
    by_key = {test.key: test for test in tests}
    return " ".join(
        [
            f"In run {best['run']!r}, target tokens give most attention to their own source at {best['site']}: "
            f"{100 * best['value']:.2f} % ({100 * best['low']:.2f} to {100 * best['high']:.2f}, n = {best['n']:,} edges). This "
            f"share is {apart} even attention gives ({100 * chance:.2f} %).",
            *(_beside(results, best["site"], role, by_key) for role in CLOSES),
            *([adjustment(tests)] if tests else []),
        ]
    )


def _beside(results: pl.DataFrame, site: str, role: str, tests: Mapping[Any, Test]) -> str:
    """The difference of the last pair, compared with those of other pairs."""
    last, spread, as_far, n_pairs = _last_pair(results, site, role)
    answer = (
        f"There, relative to even attention, {WHAT[role]} gives its own edge {interval(last)} points compared with the edge "
        f"before on the same {last['n']:,} trees."
    )
    test = tests.get((site, role, LAST))
    if test is None:
        return f"{answer} The list has no other pair of neighbours to compare with."
    verdict = "so the last pair does not stand out from other neighbours"
    if test.found:
        verdict = (
            f"so the difference of the last pair is {'higher' if last['value'] > spread[2] else 'lower'} than usual"
        )
    elif as_far == 1:
        verdict = f"but {n_pairs} pairs are too few to exclude chance"
    return (
        f"{answer} The other {n_pairs - 1} pairs of neighbours differ by {_ends(spread, 0, 4)} points, half of them by "
        f"{_ends(spread, 1, 3)}. Of all {n_pairs} pairs, {as_far} lie{'s' * (as_far == 1)} as far from their median as the last "
        f"({p_shown(test.p_holm)} by rank), {verdict}."
    )


def plot(answer: Answer) -> Figure:
    """Draw attention by layer: target on source, separator on its edge, path on the next edge."""
    if ancestors.ROLE in answer.results["token_role"]:
        return ancestors.plot(answer)
    figure, axes = panels(3, 1.5, sharex=True)
    for axis, (title, series) in zip(axes, _PANELS.items(), strict=True):
        sites: list[str] = []
        for turn, (role, kind, name) in enumerate(series):
            rows = answer.results.filter(token_role=role, metric=FIRST[role], label=kind).drop_nulls("value")
            points(axis, list(range(len(rows))), rows, name, turn)
        chance = answer.results.filter(token_role=series[0][0], metric="even", label=series[0][1]).drop_nulls("value")
        axis.plot(range(len(chance)), 100 * chance["value"].to_numpy(), "--", color=GREY, label="even attention")
        sites = chance["site"].to_list()
        entitle(axis, title)
        percents(axis)
    by_site(axes[-1], sites)
    axes[1].set_ylabel("share of the attention (%)")
    legend(figure, *axes)
    n = most(answer.results.filter(token_role="edge_target", metric="own source", label="others")["n"])
    heading(
        figure,
        "What the tokens of an edge and of the path attend to",
        f"run {answer.results['run'][0]}; up to {n:,} tokens; bars are 95 % intervals over trees",
    )
    return figure


_PANELS = {
    "target → its own source": [("edge_target", "others", "other edges"), ("edge_target", "last", "the last edge")],
    "separator → its own edge": [
        ("separator", "others", "separators"),
        ("bar", "last", "the bar after the last edge"),
    ],
    "root and path → the next edge": [("path", "others", "other edges"), ("path", "last", "the last edge")],
}
