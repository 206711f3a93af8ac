"""The study `attention`: what an edge's tokens and the path's look at, layer by layer, and whether the last edge differs.

The paper's claim is that a target token gathers its edge's source in the first layer. Read at an edge's target: how
much attention falls on its own source, on itself, on edges before; at its separator (the bar behind the last edge):
how much falls on the edge it closes; at the root and the path's tokens: how much falls on the edge that must be taken
next. Chance is even attention, one part in as many as there are tokens up to there. The edge listed last is compared
with the one before it on the same trees, since a token late in the list has more to look at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.advice import ingest_more
from actstore.errors import BadInput, NotStored
from actstore.queries.last_edge import interval
from actstore.queries.panels import GREY, panels, points
from actstore.queries.study import Progress, Study, result_rows
from actstore.statistics import share_over_trees

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME = "attention"
TOKENS = """
-- one row a token of the list or of the path that has something to look at; e: its edge, or the edge that its next step takes
with held as (
    select distinct unnest(range(first_tree_id, first_tree_id + n_trees)) as tree_id from shards where run = $run
)
select token_id, tree_id, position, role::varchar as role, edge as e, is_last
from tokens join edges using (tree_id, edge) semi join held using (tree_id)
where role in ('edge_target', 'separator', 'bar')
union all
select token_id, tree_id, (token_id - tree_id::bigint * 256)::utinyint, 'path', edges.edge, is_last
from answer_tokens join edges using (tree_id, step) semi join held using (tree_id)
order by token_id
"""
N_NODES = "select n_nodes from runs join datasets using (dataset) where run = $run"
HOLDERS = """
select run from runs semi join (from sites where kind = 'pattern') as patterns using (run)
where (weights_sha256, dataset) = (select (weights_sha256, dataset) from runs where run = $run)
order by run = $run desc, runs.rowid
"""
LOOKS = {  # kind of token → what its attention is summed over
    "edge_target": ("own source", "itself", "before"),
    "separator": ("own edge", "itself", "before"),
    "bar": ("own edge", "itself", "before"),
    "path": ("next edge", "itself", "elsewhere"),
}
ROUNDING = 1e-6  # of weights stored in float32
FIRST = {role: looks[0] for role, looks in LOOKS.items()}  # what the study is about


def study(store: Store, run: str, seed: int, progress: Progress) -> Study:
    """Sum attention by what it falls on, at every layer and head whose pattern the run holds.

    Args:
        store: an open store.
        run: which; where it holds no pattern, the same model's run over the same trees that does is found by its weights.
        seed: of the bootstrap.
        progress: called when a layer is done.

    Raises:
        NotStored: there is no pattern; says which ingest command adds them.
        BadInput: the trees have one edge.
    """
    holder = pattern_run(store, run)
    if store.sql(N_NODES, {"run": run}).item() == 2:
        raise BadInput(
            f"run {run!r} is over trees of 2 nodes, whose one edge has no other to be held against; ingest larger ones (--nodes)"
        )
    sites, params = pattern_sites(store, holder), {"run": holder}
    rows: list[dict[str, Any]] = []
    for done, site in enumerate(sites, start=1):
        patterns, tokens = store.read(TOKENS, run=holder, site=site, params=params)
        for head in range(patterns.shape[1]):
            rows += _of_head(patterns[:, head], tokens, {"site": site, "head": head}, seed)
        progress(done, len(sites), site)
    results = result_rows(
        [_result(row) for row in rows],
        study=NAME,
        run=run,
        query=TOKENS,
        params=params,
        snapshot=store.snapshot,
        seed=seed,
    )
    return Study(NAME, table(results), results, sentence(results))


def pattern_run(store: Store, run: str) -> str:
    """The run that holds a run's attention patterns: itself, else one of the same model over the same trees.

    Raises:
        NotStored: there is none; says which ingest command adds one.
    """
    found = store.sql(HOLDERS, {"run": run})["run"].to_list()
    if not found:
        command = ingest_more(store, run, f"{run}-patterns", "--sites", "pattern")
        raise NotStored(
            f"run {run!r} holds no attention patterns, nor does another run of its model over its trees; {command} adds one "
            "that does"
        )
    return str(found[0])


def pattern_sites(store: Store, run: str) -> list[str]:
    """Short names of a run's pattern sites, in the order of the layers."""
    held = store.sql("select short from sites where run = $run and kind = 'pattern' order by rowid", {"run": run})
    return list(held["short"])


def _result(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `results`: of the first head the site alone, of another its number too."""
    head = row.pop("head")
    return row if head == 0 else {**row, "site": f"{row['site']} head {head}"}


def looks(pattern: np.ndarray, tokens: pl.DataFrame, role: str) -> dict[str, np.ndarray]:
    """How much attention of each token falls on what.

    Args:
        pattern: float32 [n, key], each row's sum 1.
        tokens: columns `position`, the token's, and `e`, its edge.
        role: of all of them, one of LOOKS.

    Returns:
        float64 [n] by name, as in LOOKS; they sum to 1; and `even`, what the first would be if all were looked at alike.
    """
    rows, e = np.arange(len(pattern)), tokens["e"].to_numpy().astype(np.intp)
    position = tokens["position"].to_numpy().astype(np.intp)
    wide = pattern.astype(np.float64)
    source, target = wide[rows, 3 * e], wide[rows, 3 * e + 1]
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
    """Means over edges but the last, over last edges, and the last less the one before it on the same tree."""
    rows = []
    for role in LOOKS:
        which = (tokens["role"] == role).to_numpy()
        some = tokens.filter(which)
        for name, values in looks(pattern[which], some, role).items():
            for kind, chosen in _kinds(role, some["is_last"].to_numpy()).items():
                rows.append(
                    _mean(
                        values[chosen],
                        some["tree_id"].to_numpy()[chosen],
                        seed,
                        **at,
                        token_role=role,
                        label=kind,
                        metric=name,
                    )
                )
    return rows + _last_against_its_neighbour(pattern, tokens, at, seed)


def _kinds(role: str, last: np.ndarray) -> dict[str, np.ndarray]:
    if role in ("separator", "bar"):  # the bar is the last edge's
        return {"last" if role == "bar" else "others": np.ones(len(last), bool)}
    return {"others": ~last, "last": last}


def _last_against_its_neighbour(
    pattern: np.ndarray, tokens: pl.DataFrame, at: dict[str, Any], seed: int
) -> list[dict[str, Any]]:
    """What the last edge's target, and the bar, give their own edge less what the edge before does, tree by tree.

    Both beyond even attention, which a later token spreads over more.
    """
    rows = []
    last_edge = int(tokens["e"].to_numpy().max())
    for role, other in (("edge_target", "edge_target"), ("bar", "separator")):
        ours = ((tokens["role"] == role) & (tokens["e"] == last_edge)).to_numpy()
        theirs = ((tokens["role"] == other) & (tokens["e"] == last_edge - 1)).to_numpy()
        if not theirs.any():
            continue
        name = FIRST[role]
        first = _beyond_even(pattern[ours], tokens.filter(ours), role)
        second = _beyond_even(pattern[theirs], tokens.filter(theirs), other)
        trees = tokens.filter(ours)["tree_id"].to_numpy()
        rows.append(
            _mean(first - second, trees, seed, **at, token_role=role, label="last less the one before", metric=name)
        )
    return rows


def _beyond_even(pattern: np.ndarray, tokens: pl.DataFrame, role: str) -> np.ndarray:
    """float64 [n]: the attention on a token's own edge, less what it would get if all were looked at alike."""
    found = looks(pattern, tokens, role)
    return found[FIRST[role]] - found["even"]


def _mean(values: np.ndarray, trees: np.ndarray, seed: int, **about: Any) -> dict[str, Any]:
    if not len(values):
        return {**about, "value": None, "n": 0}
    low, high = share_over_trees(values, trees, seed)
    return {**about, "value": float(values.mean()), "low": low, "high": high, "n": len(values)}


def table(results: pl.DataFrame) -> pl.DataFrame:
    """One row a layer, percent of the attention."""
    rows = []
    for (site,), some in results.group_by("site", maintain_order=True):
        row: dict[str, Any] = {"site": site}
        for role, what in FIRST.items():
            for kind in ("others", "last"):
                found = some.filter(token_role=role, metric=what, label=kind)
                if len(found) and role != "path":
                    row[f"{_NAMES[role]}{', last' if kind == 'last' and role == 'edge_target' else ''} %"] = _percent(
                        found
                    )
        both = some.filter(token_role="path", metric="next edge")
        row["path → next edge %"] = round(100 * float(np.average(both["value"].fill_null(0), weights=both["n"])), 2)
        less = some.filter(token_role="edge_target", label="last less the one before")
        row["last less the one before, points"] = interval(less.row(0, named=True)) if len(less) else ""
        rows.append(row)
    return pl.DataFrame(rows)


_NAMES = {
    "edge_target": "target → its source",
    "separator": "separator → its edge",
    "bar": "bar → last edge",
    "path": "path",
}


def _percent(found: pl.DataFrame) -> float | None:
    value = found["value"][0]
    return None if value is None else round(100 * value, 2)


def sentence(results: pl.DataFrame) -> str:
    """In which layer a target token looks at its own source, and whether the last edge's does so less."""
    own = results.filter(token_role="edge_target", metric="own source", label="others")
    even = results.filter(token_role="edge_target", metric="even", label="others")
    best = own.sort("value", descending=True, maintain_order=True).row(0, named=True)
    chance = even.filter(site=best["site"])["value"].item()
    answer = (
        f"In run {best['run']!r} the target tokens give most attention to their own source at {best['site']}: "
        f"{100 * best['value']:.2f} % ({100 * best['low']:.2f} to {100 * best['high']:.2f}, n = {best['n']:,} edges), where even "
        f"attention would give {100 * chance:.2f} %"
    )
    if best["low"] - ROUNDING <= chance <= best["high"] + ROUNDING:
        answer += ", so no more than chance"
    parts = []
    for role, what in (("edge_target", "the last edge's target"), ("bar", "the bar behind it")):
        found = results.filter(token_role=role, label="last less the one before", site=best["site"])
        if len(found):
            row = found.row(0, named=True)
            way = (
                "less"
                if row["high"] < 0
                else "more"
                if row["low"] > 0
                else "neither more nor less that can be told from chance"
            )
            parts.append(f"{what} gives its own edge {way} ({interval(row)} points, n = {row['n']:,} trees)")
    return (
        f"{answer}. Beside the edge before it on the same trees, and beyond even attention, {' and '.join(parts)} there."
        if parts
        else f"{answer}."
    )


def plot(study: Study) -> Figure:
    """By layer: attention of a target on its source, of separators on their edge, of the path on the next edge."""
    figure, axes = panels(3, width=4.4)
    for axis, (title, series) in zip(axes, _PANELS.items(), strict=True):
        for turn, (role, kind, name) in enumerate(series):
            rows = study.results.filter(token_role=role, metric=FIRST[role], label=kind).drop_nulls("value")
            x = list(range(len(rows)))
            points(axis, x, rows, name, turn)
        chance = study.results.filter(token_role=series[0][0], metric="even", label=series[0][1]).drop_nulls("value")
        axis.plot(range(len(chance)), 100 * chance["value"].to_numpy(), "--", color=GREY, label="even attention")
        axis.set_xticks(range(len(chance)), chance["site"].to_list(), rotation=30)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(-2, 102)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("share of the attention (%)")
    figure.suptitle(
        f"What tokens look at, run {study.results['run'][0]}; bars are 95 % intervals over trees", fontsize=10
    )
    return figure


_PANELS = {
    "target → its own source": [("edge_target", "others", "other edges"), ("edge_target", "last", "the last edge")],
    "separator → its own edge": [("separator", "others", "separators"), ("bar", "last", "the bar, behind the last")],
    "root and path → the edge to take next": [("path", "others", "other edges"), ("path", "last", "the last edge")],
}
