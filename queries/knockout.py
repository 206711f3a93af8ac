"""The study `knockout`: which tokens do the answers need attention to, and in which layers?

Attention from one kind of token to a class of keys is taken away, in all heads of a layer, and what
is left is scaled to sum to 1. Layers are taken one at a time, from each layer on, and all together.
Every key of a token is in exactly one class. The effect is measured at all steps of the path.

The control takes as many random keys of other classes away from the same tokens, in the same
layers. A random key may be one that the answer needs, so the control of a large class may have an
effect. A class is tested beyond its control, in accuracy and in log-loss; Holm's correction covers
all classes and layers. A class that carries nothing is not found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput, nearest
from actstore.interventions import Edit
from actstore.queries.effects import MEASURES, Effects
from actstore.queries.figures import GREY, entitle, heading, maps, most
from actstore.queries.probes.labelled import parameters, sql_of
from actstore.queries.study import (
    Answer,
    Progress,
    Test,
    adjusted,
    adjustment,
    names_in,
    p_shown,
    result_rows,
    shown,
    significant,
    test_rows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.interventions import Patching
    from actstore.store import Store

NAME = "knockout"
TREES = 200  # of a run, by default: they have some 1,000 steps, and two hundred calls take a minute or two
ANSWERING = ("root", "path")  # the tokens that predict the steps
CLASSES = {  # class of keys → when a key is of the class; the first that holds
    "itself": "keys.token_id = asked.token_id",
    "own edge": "keys.edge = asked.edge",
    "goal": "keys.role = 'goal'",
    "colon": "keys.role = 'colon'",
    "path so far": "keys.role in ('root', 'path')",
    "sources on path": "keys.role = 'edge_source' and on_path",
    "sources off path": "keys.role = 'edge_source'",
    "targets on path": "keys.role = 'edge_target' and on_path",
    "targets off path": "keys.role = 'edge_target'",
    "separators": "keys.role = 'separator'",
    "bar": "keys.role = 'bar'",
}
ROLES = "select unnest(enum_range(null::token_role))::varchar as role"
ASKED = """
-- the tokens that lose attention; of root and path, those that predict a step
with chosen as (select distinct tree_id from predictions where run = $run order by tree_id limit $trees)
select token_id
from tokens semi join chosen using (tree_id)
where list_contains($roles, role::varchar)
and (role not in ('root', 'path') or token_id in (select token_id from answer_tokens))
order by token_id
"""
ASKED_OWN = """
with given as (select token_id, tree_id from tokens semi join (select unnest($ids) as token_id) using (token_id)),
answered as (select distinct tree_id from predictions where run = $run)
select token_id from given
semi join (select distinct tree_id from given semi join answered using (tree_id) order by tree_id limit $trees)
using (tree_id)
"""
PAIRS = f"""
-- one row per token that loses attention and key that it attends to
with asked as (select * from tokens semi join (select unnest($ids) as token_id) using (token_id)),
on_paths as (select tree_id, edge, on_path from edges)
select
    asked.token_id,
    keys.token_id as key_token_id,
    case {" ".join(f"when {when} then '{name}'" for name, when in CLASSES.items())} end as class
from asked
join tokens as keys on keys.tree_id = asked.tree_id and keys.token_id <= asked.token_id
left join on_paths on on_paths.tree_id = keys.tree_id and on_paths.edge = keys.edge
order by asked.token_id, keys.token_id
"""
EDITS = "select token_id, key_token_id from pairs"
N_LAYERS = "select n_layers from runs join models using (weights_sha256) where run = $run"
ALL = "pattern"  # name of all layers together
CONTROL = "as many random keys"


def study(
    store: Store,
    run: str,
    seed: int,
    progress: Progress,
    patch: Patching,
    from_: str | Sequence[str] | None = None,
    to: str | Sequence[str] | None = None,
    pairs: str | Path | None = None,
    trees: int = TREES,
) -> Answer:
    """Take attention away, by layer and class of keys.

    Args:
        store: an open store.
        run: a run over whole tasks. Where the run stores `resid_post`, only the layers that lose
            attention and later ones are run.
        seed: seed of the random keys, the bootstrap and the sign flips.
        progress: called after each class and layer.
        patch: runs the edits.
        from_: (option `from`) roles of the tokens that lose attention; default: `root,path`, of
            which those that predict a step.
        to: classes of keys, see CLASSES; default: each that has a key.
        pairs: path of an .sql file that yields token_id and key_token_id, one class of one's own.
        trees: number of trees, the run's first.

    Raises:
        NotStored: the run has no answers.
        BadInput: an option has no meaning, or no key is of a class.
    """
    if not isinstance(trees, int) or trees < 1:
        raise BadInput(f"got trees {trees!r}; it is a number of trees, 1 or more (default {TREES})")
    effects = Effects(store, run, patch)
    if pairs is None:
        roles, of_class, query = _by_role(store, run, from_, to, trees)
    else:
        if from_ is not None or to is not None:
            raise BadInput("got pairs and from or to; the query of `pairs` says which tokens and which keys")
        roles, of_class, query = _own(store, run, pairs, trees)
    layers = layer_groups(int(store.sql(N_LAYERS, {"run": run}).item()))
    classes = _chosen_classes(of_class, to, Path(pairs).stem if pairs else None)
    rows: list[dict[str, Any]] = []
    tests: list[Test] = []
    for turn, name in enumerate(classes):
        taken = of_class.filter(pl.col("class") == name)
        random = random_keys(of_class, name, np.random.default_rng([seed, turn]))
        about = {"token_role": roles, "label": name}
        rows.append({**about, "metric": "keys", "value": len(taken) / taken["token_id"].n_unique(), "n": len(taken)})
        for done, (site, group) in enumerate(layers.items(), start=1):
            of_keys, control = (effects.of(_edits(frame, group)) for frame in (taken, random))
            beyond = of_keys.less(control)
            for effect, metric in ((of_keys, "change"), (control, "control"), (beyond, "beyond")):
                found = effect.rows(metric, seed, site=site, **about)
                rows += found
            what = f"without attention to {name}, {in_words(site)}"
            tests += beyond.tests(found, seed, what, CONTROL)
            progress(turn * len(layers) + done, len(classes) * len(layers), f"{name} {site}")
    found_tests = adjusted(tests)
    params = {"run": run, "from": roles, "to": classes, "trees": trees}
    params |= {"pairs": str(pairs)} if pairs else {}
    results = result_rows(
        [*rows, *test_rows(found_tests)],
        study=NAME,
        run=run,
        query=query,
        params=params,
        snapshot=store.snapshot,
        seed=seed,
    )
    return Answer(NAME, as_frame(results), results, sentence(results, found_tests), found_tests)


def _by_role(
    store: Store, run: str, from_: str | Sequence[str] | None, to: str | Sequence[str] | None, trees: int
) -> tuple[str, pl.DataFrame, str]:
    """Roles in words, pairs of tokens of these roles and their keys, and the query that chose."""
    known = store.sql(ROLES)["role"].to_list()
    roles = list(ANSWERING) if from_ is None else names_in(from_)
    for role in roles:
        if role not in known:
            raise BadInput(
                f"no role {role!r} to take attention from{nearest(role, known)}; there are {', '.join(known)}"
            )
    for name in names_in(to) if to is not None else ():
        if name not in CLASSES:
            raise BadInput(f"no class of keys {name!r}{nearest(name, CLASSES)}; there are {', '.join(CLASSES)}")
    ids = store.sql(ASKED, {"run": run, "roles": roles, "trees": trees})["token_id"].to_list()
    if not ids:
        raise BadInput(
            f"no answered tree of run {run!r} has a token of the roles {', '.join(roles)}; name others (from)"
        )
    return " and ".join(roles), store.sql(PAIRS, {"ids": ids}), f"{ASKED};\n{PAIRS}"


def _own(store: Store, run: str, file: str | Path, trees: int) -> tuple[str, pl.DataFrame, str]:
    """As `_by_role`, with the pairs of a user's file as a class, and all other keys as `other`."""
    query, keys = sql_of(file), ["token_id", "key_token_id"]
    found = store.of(run).sql(query, parameters(store, run, query, {}) or None)
    if lacking := [column for column in keys if column not in found.columns]:
        raise BadInput(
            f"the pairs {str(file)!r} yield {', '.join(found.columns)}, and no {' and no '.join(lacking)}; they yield token_id "
            "and key_token_id"
        )
    own = found.select(pl.col(keys).cast(pl.Int64)).drop_nulls().unique(maintain_order=True)
    given = {"run": run, "ids": own["token_id"].unique().sort().to_list(), "trees": trees}
    kept = own.join(store.sql(ASKED_OWN, given), on="token_id", how="semi", maintain_order="left")
    if not len(kept):
        raise BadInput(f"the pairs {str(file)!r} are of no answered tree of run {run!r}; choose tokens of its trees")
    every = store.sql(PAIRS, {"ids": kept["token_id"].unique().sort().to_list()})
    if len(strange := kept.join(every, on=keys, how="anti", maintain_order="left")):
        raise BadInput(
            f"the pairs {str(file)!r} hold keys that the token does not attend to, the first key {strange['key_token_id'][0]} "
            f"of token {strange['token_id'][0]}; a key is of the same tree, and does not come after the token"
        )
    every = every.join(kept.with_columns(mine=True), on=keys, how="left", maintain_order="left")
    named = pl.when("mine").then(pl.lit(Path(file).stem)).otherwise(pl.lit("other")).alias("class")
    return "own", every.select(*keys, named), query


def _chosen_classes(pairs: pl.DataFrame, to: str | Sequence[str] | None, own: str | None) -> list[str]:
    """The classes that are taken away, in the order of CLASSES.

    Raises:
        BadInput: a named class has no key.
    """
    if own is not None:
        return [own]
    there = set(pairs["class"].to_list())
    wanted = list(CLASSES) if to is None else names_in(to)
    if empty := [name for name in wanted if name not in there and to is not None]:
        raise BadInput(f"no token attends to a key of the class {empty[0]!r}; there are {', '.join(sorted(there))}")
    return [name for name in CLASSES if name in wanted and name in there]


def random_keys(pairs: pl.DataFrame, name: str, rng: np.random.Generator) -> pl.DataFrame:
    """As many keys of other classes as each token has in a class, or all others if they are fewer.

    Args:
        pairs: columns token_id, key_token_id and class.
        name: the class.
        rng: of the draw.
    """
    wanted = pairs.filter(pl.col("class") == name).group_by("token_id").agg(pl.len().alias("wanted"))
    others = pairs.filter(pl.col("class") != name).join(wanted, on="token_id", maintain_order="left")
    others = others.with_columns(drawn=pl.Series(rng.random(len(others))))
    return others.filter(pl.col("drawn").rank("ordinal").over("token_id") <= pl.col("wanted"))


def layer_groups(n_layers: int) -> dict[str, list[int]]:
    """Name → layers: each alone, then those from a layer on, then all."""
    alone = {f"pattern.{layer}": [layer] for layer in range(n_layers)}
    last = n_layers - 1
    onward = {f"pattern.{layer}-{last}": list(range(layer, n_layers)) for layer in range(1, last)}
    return alone | onward | ({ALL: list(range(n_layers))} if n_layers > 1 else {})


def in_words(site: str) -> str:
    """`in all layers`, `in layer 3`, `from layer 3 on`."""
    _, _, layers = site.partition(".")
    if not layers:
        return "in all layers"
    return f"from layer {layers.split('-')[0]} on" if "-" in layers else f"in layer {layers}"


def _edits(pairs: pl.DataFrame, layers: Sequence[int]) -> list[Edit]:
    frame = pairs.select("token_id", "key_token_id")
    return [Edit(EDITS, f"pattern.{layer}", "knockout", tables={"pairs": frame}) for layer in layers]


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """One row per class: in all layers, and in the layer that alone costs most; in points."""
    rows = []
    whole = results.filter(pl.col("metric") == "accuracy_change")["site"][-1]
    for (name,), of_class in results.filter(pl.col("metric") != "p").group_by("label", maintain_order=True):
        if str(name).endswith(", loss"):
            continue
        lost = of_class.filter(metric="accuracy_change")
        alone = lost.filter(~pl.col("site").str.contains("-", literal=True) & (pl.col("site") != ALL))
        most = alone.sort("value", descending=True, maintain_order=True).row(0, named=True)
        rows.append(
            {
                "without attention to": name,
                "keys": round(of_class.filter(metric="keys")["value"].item(), 1),
                "all layers: points lost": _points(lost.filter(site=whole).row(0, named=True)),
                "random keys": _points(
                    of_class.filter(metric="accuracy_control", site=whole).row(0, named=True), False
                ),
                "more than random": _verdict(of_class, str(whole)),
                "most in one layer": f"{most['site']}: {_points(most, False)}",
            }
        )
    return pl.DataFrame(rows)


def _verdict(of_class: pl.DataFrame, site: str) -> str:
    """`p < 0.001`; a class that costs less than its control does so, whatever its p."""
    beyond, p = (of_class.filter(metric=name, site=site)["value"].item() for name in ("accuracy_beyond", "p_holm"))
    return p_shown(p) if beyond > 0 else "no"


def _points(row: dict[str, Any], ends: bool = True) -> str:
    """`12.3 [11.0, 13.5]`."""
    value = f"{100 * row['value'] + 0.0:.2f}"
    return f"{value} [{100 * row['low']:.2f}, {100 * row['high']:.2f}]" if ends else value


def sentence(results: pl.DataFrame, tests: Sequence[Test]) -> str:
    """What the answers need in all layers, in which layers alone, and what is not needed."""
    of_accuracy = [test for test in tests if test.points]
    whole = str(of_accuracy[-1].site)
    alone = [test for test in of_accuracy if test.site != whole and "-" not in str(test.site)]
    parts = [
        f"Attention from the tokens {results['token_role'][0]} of run {results['run'][0]!r} is taken away, and "
        f"{of_accuracy[0].n:,} steps of up to {json.loads(results['params'][0])['trees']:,} trees are predicted again.",
        _needed(results, [test for test in of_accuracy if test.site == whole], in_words(whole)),
        *([_needed(results, alone, "in one layer alone")] if alone else []),
    ]
    if of_loss := [test for test in tests if not test.points and test.found]:
        most = max(of_loss, key=lambda test: test.estimate)
        parts.append(
            f"Log-loss rises more than with {CONTROL} in {len(of_loss)} of {len(tests) // 2} comparisons, most without "
            f"attention to {most.label.removesuffix(', loss')} {in_words(str(most.site))}: {shown(most)} nats "
            f"({p_shown(most.p_holm)})."
        )
    else:
        parts.append(f"Log-loss rises more than with {CONTROL} in no comparison.")
    return " ".join([*parts, adjustment(tests)])


def _needed(results: pl.DataFrame, tests: Sequence[Test], where: str) -> str:
    """The classes that cost accuracy beyond the control, by their largest loss, and all others."""
    found: dict[str, Test] = {}
    for test in sorted((test for test in tests if test.found), key=lambda test: -test.estimate):
        found.setdefault(test.label, test)
    others = [test for test in tests if test.label not in found]
    rest = ""
    if others:
        keys = {(test.site, test.label) for test in others}
        of_others = results.filter(pl.col("metric") == "accuracy_change").iter_rows(named=True)
        most = max(row["high"] for row in of_others if (row["site"], row["label"]) in keys)
        names = ", ".join(dict.fromkeys(test.label for test in others))
        rest = f"; {names} {'do' if len(others) > 1 else 'does'} not (intervals leave at most {100 * most:.2f} points)"
    if not found:
        return f"{where.capitalize()}, no class of keys costs more accuracy than {CONTROL}{rest}."
    listed = [
        f"{name} ({_lost(results, test)}{f', {in_words(str(test.site))}' * where.endswith('alone')}, {p_shown(test.p_holm)})"
        for name, test in found.items()
    ]
    return f"{where.capitalize()}, these cost more accuracy than {CONTROL}: {', '.join(listed)}{rest}."


def _lost(results: pl.DataFrame, test: Test) -> str:
    """`52.3 points, random keys 1.2`."""
    found = results.filter(site=test.site, label=test.label)
    lost, control = (found.filter(metric=f"accuracy_{metric}")["value"].item() for metric in ("change", "control"))
    return f"{100 * lost:.2f} points, random keys {100 * control:.2f}"


def plot(answer: Answer) -> Figure:
    """Heat maps, layers × classes: accuracy and log-loss, of the classes and of random keys."""
    results = answer.results
    found = significant(results)
    sites = results.filter(metric="accuracy_change")["site"].unique(maintain_order=True).to_list()
    labels = results.filter(metric="keys")["label"].to_list()
    figure, axes = maps([len(labels)] * 4)
    drawn = iter(axes)
    for measure, scale, unit in (("accuracy", 100, "points"), ("loss", 1, "nats")):
        grids = [_grid(results, f"{measure}_{metric}", sites, labels) * scale for metric in ("change", "control")]
        largest = max(np.abs(grid).max() for grid in grids) or 1.0
        more = _grid(results, f"{measure}_beyond", sites, labels) > 0
        for grid, title in zip(grids, ("these keys", CONTROL), strict=True):
            axis = next(drawn)
            axis.grid(False)
            axis.tick_params(length=0)
            axis.imshow(grid, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
            entitle(axis, f"{MEASURES[measure]} ({unit}), {title}")
            axis.set_xticks(range(len(sites)), [_tick(site).replace(" ", "\n") for site in sites])
            axis.set_yticks(range(len(labels)), labels)
            for y, x in np.ndindex(grid.shape):
                key = (sites[x], results["token_role"][0], labels[y] + ", loss" * (measure == "loss"))
                digits = 0 if scale > 1 else 1
                text = f"{round(float(grid[y, x]), digits) + 0.0:.{digits}f}"  # no -0
                bold = "bold" if title != CONTROL and more[y, x] and key in found else "normal"
                dark = abs(grid[y, x]) > 0.6 * largest
                colour = "white" if dark else "black" if bold == "bold" else GREY
                axis.text(x, y, text, ha="center", va="center", fontsize=6, color=colour, weight=bold)
    axes[-1].set_xlabel("layers that lose it (1 on: layers from 1)")
    heading(
        figure,
        f"Attention from {results['token_role'][0]} taken away",
        f"run {results['run'][0]}; {most(results.filter(metric='accuracy_change')['n']):,} steps; bold: more than random keys "
        "(Holm); 95 % intervals: in the table",
    )
    return figure


def _grid(results: pl.DataFrame, metric: str, sites: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """float64 [label, site]: the values of a metric."""
    values = {(row["label"], row["site"]): row["value"] for row in results.filter(metric=metric).iter_rows(named=True)}
    return np.array([[values[label, site] for site in sites] for label in labels], np.float64)


def _tick(site: str) -> str:
    """`3`, `3 on`, `all`."""
    layers = site.partition(".")[2]
    return "all" if not layers else f"{layers.split('-')[0]} on" if "-" in layers else layers
