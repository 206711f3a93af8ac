"""The study `erase`: does the model use what a probe reads?

A label is taken out of the activations of one site, the model goes on from there, and its answers
are compared with those of before. Erasures are fitted on training trees and made in test trees, at
the tokens that the label belongs to. There are two (see leace.py): LEACE, after which no linear
probe beats a constant, and the directions in which a probe reads, one fewer than classes.

The control takes as many random directions, the mean of several draws; erasures are tested beyond
it, in accuracy and log-loss. A second control erases a meaningless label by LEACE: Hewitt and
Liang's, which gives each type of token a random class (see fit.control_labels). A new probe is
fitted to the erased rows, as a check. Holm's correction covers all tests of the study.

A label that a probe reads at a site is `used` there if LEACE costs accuracy or log-loss beyond
random directions, and `read, not used` if not. Two limits: whatever is linearly correlated with a
label goes with it, and a label that is not linearly encoded stays. Where no probe reads the label,
LEACE may therefore cost something too, and says nothing of the label: the verdict is `not read`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput
from actstore.intervals import sign_flip
from actstore.interventions import Edit
from actstore.named import NAME as NAMES
from actstore.queries import load
from actstore.queries.effects import MEASURES, Effect, Effects
from actstore.queries.figures import (
    COLUMN,
    GREY,
    PAGE,
    by_site,
    entitle,
    heading,
    legend,
    most,
    panels,
    percents,
    points,
)
from actstore.queries.last_edge import interval
from actstore.queries.leace import Erasure
from actstore.queries.probes.asked import Asked
from actstore.queries.probes.figures import LABELS
from actstore.queries.probes.fit import MAX_ITER, Sides, Whitening, control_labels, fit_all
from actstore.queries.probes.labelled import Labelled, labelled, parameters, sql_of
from actstore.queries.probes.study import labels_by_role, sites_to_probe
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

    from actstore.interventions import Patching
    from actstore.store import Store

NAME = "erase"
DRAWS = 3  # of random directions
LEAST_ROWS = 10  # training rows of a class; a rarer class is left out
METHODS = {"leace": "LEACE", "probe": "the probe's directions"}
CONTROL = "as many random directions"
LABEL = """
select token_id, {label} as label, split
from (
{tokens}
)
where {label} is not null
qualify count(*) filter (where split = 'train') over (partition by {label}) >= {least}
"""
EDIT = "select token_id, vector from erased"


@dataclass(frozen=True)
class _Label:
    """A label of some tokens.

    Attributes:
        role: role of the tokens; None of the tokens of a query of one's own.
        name: of the label.
        query, params: what chose the rows.
        rows: token ids, classes, split.
    """

    role: str | None
    name: str
    query: str
    params: Mapping[str, Any]
    rows: Labelled


def study(
    store: Store,
    run: str,
    seed: int,
    progress: Progress,
    patch: Patching,
    token_role: str | Sequence[str] = "path",
    labels: str | Sequence[str] = "all",
    sites: str | Sequence[str] | None = None,
    query: str | Path | None = None,
    params: Mapping[str, Any] | None = None,
    label: str = "label",
    draws: int = DRAWS,
    max_iter: int = MAX_ITER,
) -> Answer:
    """Erase labels at sites of a run.

    Args:
        store: an open store.
        run: a run over whole tasks that holds the sites. Where the run stores `resid_post`, only
            the layers after the edit are run.
        seed: seed of random directions, the meaningless label, the bootstrap and the sign flips.
        progress: called after each site and label.
        patch: runs the edits.
        token_role: roles of tokens, as of the study `probes`: `path` by default, or `all`.
        labels: labels, as of the study `probes`; default: all that the tokens have.
        sites: names of sites or of families; default: every residual site.
        query: in place of token_role and labels, a SELECT that yields token_id, label and, where
            wanted, split; or the path of an .sql file. See the study `probe`.
        params: values of the query's parameters.
        label: what the query's label is called in `results`.
        draws: number of draws of random directions.
        max_iter: largest number of iterations of a probe's fit.

    Raises:
        NotStored: the run has no answers, or does not hold a site.
        BadInput: an option has no meaning, or the rows are too few.
    """
    for name, number in (("draws", draws), ("max_iter", max_iter)):
        if not isinstance(number, int) or number < 1:
            raise BadInput(f"got {name} {number!r}; it is a number, 1 or more")
    erased = sites_to_probe(store, run, sites, more=("vector",))
    effects = Effects(store, run, patch)
    asked = list(_asked(store, run, token_role, labels, query, params or {}, label))
    recorded: list[tuple[list[dict[str, Any]], _Label]] = []
    tests: list[Test] = []
    for turn, its in enumerate(asked):
        rows: list[dict[str, Any]] = []
        for done, site in enumerate(erased, start=1):
            X, _ = store.read(its.rows.tokens["token_id"].to_numpy(), run, site)
            found, tested = erase_site(np.asarray(X), its, site, effects, seed, draws, max_iter)
            rows += found
            tests += tested
            progress(turn * len(erased) + done, len(asked) * len(erased), f"{its.name} {site}")
        recorded.append((rows, its))
    found_tests = adjusted(tests)
    shared: dict[str, Any] = {"study": NAME, "run": run, "snapshot": store.snapshot, "seed": seed}
    results = pl.concat(
        result_rows(
            [*rows, *test_rows(test for test in found_tests if _of(test) == (its.role, its.name))],
            query=its.query,
            params={**its.params, "run": run, "draws": draws, "max_iter": max_iter},
            **shared,
        )
        for rows, its in recorded
    )
    return Answer(NAME, as_frame(results, found_tests), results, sentence(results, found_tests), found_tests)


def _of(test: Test) -> tuple[str | None, str]:
    """Role and label that a test is about."""
    return test.token_role, test.label.partition(",")[0]


def _asked(
    store: Store,
    run: str,
    token_role: str | Sequence[str],
    labels: str | Sequence[str],
    query: str | Path | None,
    params: Mapping[str, Any],
    label: str,
) -> Iterator[_Label]:
    """The labels with their rows: those of a user's query, or those of the study `probes`."""
    if query:
        if not NAMES.fullmatch(str(label)) or "," in str(label):
            raise BadInput(f"got {label!r} for the label's name; take letters, digits and . _ = + -")
        sql = sql_of(query)
        used = parameters(store, run, sql, params)
        yield _Label(None, str(label), sql, used, labelled(store, run, sql, used))
        return
    for role, its in labels_by_role(token_role, labels).items():
        for name in its:
            sql = LABEL.format(label=name, tokens=load("probe_tokens").sql, least=LEAST_ROWS)
            used = {"run": run, "token_role": role}
            yield _Label(role, name, sql, used, labelled(store, run, sql, used))


def erase_site(
    X: np.ndarray, its: _Label, site: str, effects: Effects, seed: int, draws: int, max_iter: int
) -> tuple[list[dict[str, Any]], list[Test]]:
    """Erase a label at one site; return rows of `results` and tests.

    Args:
        X: float32 [n, d_model], the rows as stored.
        its: the label of the n rows.
        site: short name of the site.
        effects: runs the edits.
        seed, draws, max_iter: see `study`.
    """
    rows, y, train = its.rows, its.rows.y, its.rows.train
    whiten = Whitening.of(X[train])
    whitened = whiten(X)
    read = fit_all([(whitened, y)], train, max_iter)[0]
    asked = Asked(rows.tokens, rows.units, train, {}, {}, {})
    meaningless = control_labels(asked.types, y, train, seed)
    by_method = {
        "leace": Erasure.leace(whiten, whitened[train], y[train]),
        "probe": Erasure.of_probe(whiten, read.weights),
    }
    rank, rng = by_method["leace"].rank, np.random.default_rng([seed, *site.encode()])
    of_nothing = Erasure.leace(whiten, whitened[train], meaningless[train])
    at_random = [Erasure.at_random(whiten, rank, rng) for _ in range(draws)]
    again = _read_again(X, y, train, by_method, max_iter)

    def effect(erasure: Erasure) -> Effect:
        return effects.of([_edit(rows.tokens["token_id"].to_numpy()[~train], erasure(X[~train]), site)])

    control = Effect.mean([effect(erasure) for erasure in at_random])
    about = {"site": site, "token_role": its.role, "label": its.name}
    found, tests = _reading(read.right, again, y, asked, about, seed)
    found.append({**about, "metric": "rank", "value": float(rank), "n": int(train.sum())})
    found += control.rows("random", seed, **about) + effect(of_nothing).rows("meaningless", seed, **about)
    for method, erasure in by_method.items():
        of_label = effect(erasure)
        found += of_label.rows(method, seed, **about)
        beyond = of_label.less(control)
        its_rows = beyond.rows(f"{method}_beyond", seed, **about)
        found += its_rows
        named = [{**row, "label": f"{its.name}, {method}"} for row in its_rows]
        tests += beyond.tests(
            named, seed, f"with the {LABELS.get(its.name, its.name)} erased by {METHODS[method]}", CONTROL
        )
    return found, tests


def _read_again(
    X: np.ndarray, y: np.ndarray, train: np.ndarray, by_method: Mapping[str, Erasure], max_iter: int
) -> dict[str, np.ndarray]:
    """Method → bool [n_test], test rows that a new probe of the erased rows gets right."""
    jobs = []
    for erasure in by_method.values():
        erased = erasure(X)
        jobs.append((Sides.whitened(erased, train), y))
    return {method: fit.right for method, fit in zip(by_method, fit_all(jobs, train, max_iter), strict=True)}


def _reading(
    right: np.ndarray, again: Mapping[str, np.ndarray], y: np.ndarray, asked: Asked, about: Mapping[str, Any], seed: int
) -> tuple[list[dict[str, Any]], list[Test]]:
    """What probes read before and after, and the commonest class; whether they read is tested."""
    commonest = (y[~asked.train] == np.bincount(y[asked.train]).argmax()).astype(np.float64)
    measured = {"read": right.astype(np.float64), "commonest": commonest, "read_above": right - commonest}
    measured |= {f"read_after_{method}": values.astype(np.float64) for method, values in again.items()}
    trees = asked.test_sequences
    rows = [mean_row(values, trees, seed, **about, metric=metric) for metric, values in measured.items()]
    by_tree = np.bincount(np.unique(trees, return_inverse=True)[1], weights=measured["read_above"])
    row = {**rows[2], "label": f"{about['label']}, read"}
    what = f"a probe for the {LABELS.get(about['label'], about['label'])}, less its commonest class"
    return rows, [Test.of(row, sign_flip(by_tree, seed), what, exceeds="its commonest class")]


def _edit(token_ids: np.ndarray, vectors: np.ndarray, site: str) -> Edit:
    vector = pl.Series("vector", np.ascontiguousarray(vectors, np.float32)).arr.to_list()
    return Edit(EDIT, site, "replace", tables={"erased": pl.DataFrame({"token_id": token_ids, "vector": vector})})


def verdicts(tests: Sequence[Test]) -> dict[tuple[str | None, str | None, str], str]:
    """(site, token role, label) → `used`, `read, not used` or `not read`."""
    found: dict[tuple[str | None, str | None, str], set[str]] = {}
    for test in tests:
        label, _, kind = test.label.partition(", ")
        found.setdefault((test.site, test.token_role, label), set()).update([kind] if test.found else [])
    return {
        key: "not read" if "read" not in kinds else "used" if kinds & {"leace", "leace, loss"} else "read, not used"
        for key, kinds in found.items()
    }


def as_frame(results: pl.DataFrame, tests: Sequence[Test]) -> pl.DataFrame:
    """One row per label and site: what is read before and after, and what the erasure costs."""
    rows = []
    several = results["token_role"].n_unique() > 1
    for (site, role, label), verdict in verdicts(tests).items():
        by_metric = {row["metric"]: row for row in _about(results, role, label, site).iter_rows(named=True)}
        after, common = (_percent(by_metric[metric]) for metric in ("read_after_leace", "commonest"))
        rows.append(
            {
                "label": f"{role} {label}" if several else label,
                "site": site,
                "verdict": verdict,
                "read %": _percent(by_metric["read"]),
                "after (commonest)": f"{after} ({common})",
                "LEACE: points lost": interval(by_metric["accuracy_leace"]),
                "random": _percent(by_metric["accuracy_random"]),
                "nats": round(by_metric["loss_leace"]["value"], 3),
                "random nats": round(by_metric["loss_random"]["value"], 3),
            }
        )
    return pl.DataFrame(rows)


def _about(results: pl.DataFrame, role: str | None, label: str, site: str | None = None) -> pl.DataFrame:
    """The rows about a label of tokens of a role, at a site or at all."""
    found = results.filter(pl.col("token_role").eq_missing(pl.lit(role, pl.String)), label=label)
    return found if site is None else found.filter(site=site)


def _percent(row: Mapping[str, Any]) -> float:
    """A share in percent."""
    return round(100 * row["value"] + 0.0, 2)


def sentence(results: pl.DataFrame, tests: Sequence[Test]) -> str:
    """Of each label, at which sites it is used, and at which it is read and not used."""
    n_test = results.filter(metric="accuracy_leace")["n"][0]
    parts = [
        f"Labels are erased from activations of run {results['run'][0]!r}, and {n_test:,} steps of test trees are predicted "
        "again."
    ]
    decided = verdicts(tests)
    for role, label in dict.fromkeys((role, label) for _, role, label in decided):
        its = {site: verdict for (site, of, name), verdict in decided.items() if (of, name) == (role, label)}
        here = _about(results, role, label)
        where = f" at tokens {role}" if role else ""
        said = [
            _used(here, [site for site in its if its[site] == "used"], tests, (role, label)),
            _unused(here, [site for site in its if its[site] == "read, not used"]),
        ]
        if none := [str(site) for site in its if its[site] == "not read"]:
            said.append(f"not read at {_listed(none)}")
        parts.append(f"The {LABELS.get(label, label)}{where} is {', and '.join(filter(None, said))}.")
    after = results.filter(metric="read_after_leace")
    most = after.sort("value", descending=True, maintain_order=True).row(0, named=True)
    common = results.filter(metric="commonest", label=most["label"], site=most["site"])["value"][0]
    parts.append(
        f"After LEACE, a new probe reads at most {100 * most['value']:.2f} % ({most['label']}, {most['site']}; its commonest "
        f"class is {100 * common:.2f} %)."
    )
    return " ".join([*parts, adjustment(tests)])


def _used(here: pl.DataFrame, sites: Sequence[str | None], tests: Sequence[Test], of: tuple[str | None, str]) -> str:
    """`used at resid_post.3 (…)`, with the numbers of the site where the erasure costs most."""
    if not sites:
        return ""
    lost = here.filter(pl.col("site").is_in(sites), metric="accuracy_leace")
    most = lost.sort("value", descending=True, maintain_order=True).row(0, named=True)
    random = here.filter(metric="accuracy_random", site=most["site"])["value"].item()
    by_loss = here.filter(metric="loss_leace_beyond", site=most["site"]).row(0, named=True)
    its = {test.label: test for test in tests if (test.site, _of(test)) == (most["site"], of)}
    p = min(its[f"{of[1]}, leace{more}"].p_holm for more in ("", ", loss"))
    ends = "" if by_loss["low"] is None else f" [{by_loss['low']:+.3f}, {by_loss['high']:+.3f}]"
    return (
        f"used at {_listed(sites)}, most at {most['site']}, where LEACE costs {interval(most)} points of accuracy and random "
        f"directions {100 * random + 0.0:.3f}, and log-loss rises by {by_loss['value']:+.3f}{ends} nats beyond theirs "
        f"({p_shown(p)})"
    )


def _unused(here: pl.DataFrame, sites: Sequence[str | None]) -> str:
    """`read but not used at …`, with how much the intervals leave possible."""
    if not sites:
        return ""
    read = here.filter(pl.col("site").is_in(sites), metric="read")["value"].to_list()
    most = here.filter(pl.col("site").is_in(sites), metric="accuracy_leace")["high"].to_list()
    return (
        f"read but not used at {_listed(sites)}: a probe reads {100 * min(read):.2f} to {100 * max(read):.2f} %, and LEACE "
        f"costs no more than random directions (intervals leave at most {100 * max(most):.2f} points)"
    )


def _listed(names: Sequence[str | None]) -> str:
    """`a, b and c`."""
    texts = list(map(str, names))
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


READ = {"read": "as stored", "read_after_leace": "after LEACE", "read_after_probe": "without a probe's directions"}
COSTS = {
    "leace": "LEACE",
    "probe": "a probe's directions",
    "random": "random directions",
    "meaningless": "a meaningless label",
}


def plot(answer: Answer) -> Figure:
    """Per label: what a probe reads before and after; accuracy lost; log-loss gained; by site.

    The three panels of one label stand in a column. With several labels, each has a row as wide as
    a page.
    """
    results = answer.results
    asked = results.filter(metric="read").select("token_role", "label").unique(maintain_order=True).rows()
    columns, width = (1, COLUMN) if len(asked) == 1 else (3, PAGE)
    figure, axes = panels(3 * len(asked), 1.5, columns, width, sharex=True)
    for number, (role, label) in enumerate(asked):
        row = axes[3 * number : 3 * number + 3]
        here = _about(results, role, label)
        sites = here.filter(metric="read")["site"].to_list()
        for turn, (metric, name) in enumerate(READ.items()):
            points(row[0], range(len(sites)), here.filter(metric=metric), name, turn)
        common = here.filter(metric="commonest")["value"][0]
        row[0].axhline(100 * common, color=GREY, linestyle="--", linewidth=1, label="commonest class")
        percents(row[0])
        for axis, measure, scale in ((row[1], "accuracy", 100.0), (row[2], "loss", 1.0)):
            for turn, (metric, name) in enumerate(COSTS.items()):
                rows = here.filter(metric=f"{measure}_{metric}")
                points(axis, range(len(sites)), rows, f"erased: {name}", turn, scale=scale)
        read = f"probe for the {LABELS.get(label, label)}{f' at {role}' if role else ''}"
        for axis, title, unit in zip(
            row, (read, MEASURES["accuracy"], MEASURES["loss"]), ("read (%)", "points", "nats"), strict=True
        ):
            entitle(axis, title)
            axis.set_ylabel(unit)
    by_site(axes[-1], sites, *axes[-columns:-1])
    legend(figure, *axes[:2])
    n = most(results.filter(pl.col("metric").str.starts_with("accuracy_"))["n"])
    heading(
        figure,
        "Read and used? What erasing a label costs",
        f"run {results['run'][0]}; {n:,} steps; bars are 95 % intervals over trees",
    )
    return figure
