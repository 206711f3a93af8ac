"""What a study is: a named question put to one run of a store, with a table to print, results to record and a figure.

What a study decides, it tests, and its tests are adjusted for each other (Holm): the sentence claims what is left standing.
A study is a module with two functions, `study(store, run, seed, progress, **options) -> Answer` and
`plot(study) -> Figure`; STUDIES says which. Modules are imported when they are asked for, since scikit-learn is slow to.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import polars as pl

from actstore.errors import NotStored, advised
from actstore.intervals import holm
from actstore.queries import check_names, nearest
from actstore.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

STUDIES = {
    "probes": "actstore.queries.probes.study",
    "depth": "actstore.queries.depth",
    "last-edge": "actstore.queries.last_edge",
    "swap": "actstore.queries.swap",
    "dreams": "actstore.queries.dreams.study",
    "attention": "actstore.queries.attention.study",
    "compare": "actstore.queries.compare.study",
}

OF_THE_MODEL = (
    "swap",
    "dreams",
    "attention",
)  # find other runs of the model over the trees, so answer once for them all
RUNS = """
select
    run,
    weights_sha256,
    dataset,
    coalesce(prompt, 'task') = 'task' as answers,
    variant_of is null as drawn,
    coalesce((select list(short) from sites where sites.run = runs.run and kind = 'resid'), []) as held
from runs join datasets using (dataset)
order by runs.rowid
"""

Row = Mapping[str, Any]
Progress = Callable[[int, int, str], None]  # parts done, parts in all, the part that was just done

RESULTS = {  # the columns of the table `results`, but for `recorded`, which the store gives
    "study": pl.String(),
    "run": pl.String(),
    "site": pl.String(),
    "token_role": pl.String(),
    "label": pl.String(),
    "metric": pl.String(),
    "value": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "n": pl.Int64(),
    "query": pl.String(),
    "params": pl.String(),
    "snapshot": pl.Int32(),
    "seed": pl.Int64(),
    "version": pl.String(),
    "name": pl.String(),
    "direction": pl.List(pl.Float32),
}


LEVEL = 0.05  # of an adjusted p; below, something was found


@dataclass(frozen=True)
class Test:
    """One comparison that a study tests.

    Attributes:
        label: names it, with site and token_role, among the study's own; its rows of `results` carry the three.
        estimate: what is found: a difference, or how far from an explanation.
        p: that it is none, for this comparison alone; p_holm: adjusted for all that the study tests.
        n: what it is over.
        low, high: ends of the 95 % interval, for this comparison alone; None where there is none.
        what: the comparison in words; the label by default.
        points: the estimate is a share, and shown in percentage points.
    """

    __test__ = False  # for pytest, which collects classes of this name

    label: str
    estimate: float
    p: float
    n: int
    low: float | None = None
    high: float | None = None
    what: str = ""
    site: str | None = None
    token_role: str | None = None
    points: bool = True
    p_holm: float = float("nan")

    @property
    def key(self) -> tuple[str | None, str | None, str]:
        return self.site, self.token_role, self.label

    @property
    def named(self) -> str:
        """The comparison in words, and where it was read."""
        where = ", ".join(name for name in (self.token_role, self.site) if name)
        return f"{self.what or self.label}{f' ({where})' * bool(where)}"

    @property
    def found(self) -> bool:
        """Holm leaves it standing."""
        return self.p_holm < LEVEL


@dataclass(frozen=True)
class Answer:
    """What a study returns.

    Attributes:
        name: of the study.
        table: what is printed, a few rows.
        results: rows of the table `results`, columns as in RESULTS.
        sentence: the answer in one sentence.
        tests: all that was tested, adjusted for each other.
    """

    name: str
    table: pl.DataFrame
    results: pl.DataFrame
    sentence: str
    tests: tuple[Test, ...] = ()

    @property
    def of(self) -> list[str]:
        """The run, or both that are compared."""
        first = self.results.row(0, named=True)
        other = json.loads(first["params"]).get("other")
        return [first["run"], *([other] if other else [])]


def run(
    store: Store, name: str, run: str | None = None, seed: int = 0, progress: Progress | None = None, **options: Any
) -> Answer:
    """Run a study; the same store, run, seed and options give the same numbers.

    Args:
        store: an open store.
        name: one of STUDIES.
        run: which run; may be left out where the store holds one.
        seed: of everything random.
        progress: called with (done, total, what) whenever a part is done.
        options: the study's own, see its module.

    Raises:
        NotStored: there is no such study or run.
        BadInput: the study has no such option, or the run holds too little for it.
    """
    module = _module(name)
    known = [
        option
        for option in inspect.signature(module.study).parameters
        if option not in ("store", "run", "seed", "progress")
    ]
    check_names(f"study {name!r}", options, (), known)
    return module.study(store.whole, store.resolve_run(run), seed, progress or _silent, **options)


@dataclass(frozen=True)
class Question:
    """A study put to one run.

    Attributes:
        study: its name.
        run: the run.
        options: the study's own; `other` of `compare` among them.
    """

    study: str
    run: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def of(self) -> str:
        """The run, or both that are compared."""
        return f"{self.run} and {self.options['other']}" if "other" in self.options else self.run


def questions(store: Store, study: str, runs: Sequence[str] = (), **options: Any) -> list[Question]:
    """The runs, or pairs of runs, that a study is put to.

    Args:
        store: an open store.
        study: one of STUDIES.
        runs: which; every run over drawn trees by default. A study that finds the other runs of a model over the same trees
            by itself is put to the first of them alone. `compare` is put to every pair of those named, to one against every
            other model over its trees where one is named, and by default, for each set of trees, to the first run against
            every other model.
        options: the study's own.

    Raises:
        NotStored: there is no such study, or no such run, or none over drawn trees.
    """
    _module(study)
    named = list(dict.fromkeys(store.resolve_run(run) for run in runs))
    known: dict[str, Row] = {row["run"]: row for row in store.sql(RUNS).iter_rows(named=True)}
    every = [row for row in known.values() if row["answers"] and row["drawn"]]
    asked: list[Row] = [known[run] for run in named] or every
    if not asked:
        command = advised("ingest", store.path, "--model", "reproduction")
        raise NotStored(f"{store.path} holds no run over drawn trees; ingest one with {command}")
    if study == "compare" and "other" not in options:
        pairs = _pairs(asked, asked if len(named) > 1 else list(known.values()), all_pairs=len(named) > 1)
        alone = Question(study, asked[0]["run"], options)  # says what is lacking
        return [Question(study, run, {**options, "other": other}) for run, other in pairs] or [alone]
    if study in OF_THE_MODEL:
        asked = _firsts(asked, "weights_sha256", "dataset")
    return [Question(study, row["run"], options) for row in asked]


def _pairs(asked: Sequence[Row], among: Sequence[Row], all_pairs: bool) -> list[tuple[str, str]]:
    """Runs of two models over the same trees: each pair of models once, or the first run of each set with each other."""
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    for base in asked if all_pairs else _firsts(asked, "dataset"):
        for other in most_alike(base, among):
            key = (base["dataset"], *sorted((base["weights_sha256"], other["weights_sha256"])))
            found.setdefault(key, (base["run"], other["run"]))
    return list(found.values())


def _firsts(rows: Iterable[Row], *keys: str) -> list[Row]:
    """The first row of each value of the keys."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), row)
    return list(found.values())


def most_alike(base: Row, among: Iterable[Row]) -> list[Row]:
    """Of each other model over a run's trees one run, that which shares most residual sites with it, or the first.

    Args:
        base, among: rows of RUNS.
    """
    others = [
        row
        for row in among
        if row["answers"] and row["dataset"] == base["dataset"] and row["weights_sha256"] != base["weights_sha256"]
    ]
    order = [row["weights_sha256"] for row in _firsts(others, "weights_sha256")]
    best = _firsts(sorted(others, key=lambda row: -len({*row["held"]} & {*base["held"]})), "weights_sha256")
    return sorted(best, key=lambda row: order.index(row["weights_sha256"]))


def plot(answer: Answer) -> Figure:
    """Draw a study; `plot(answer).savefig(FILE)` writes it, and needs no display."""
    return _module(answer.name).plot(answer)


def adjusted(tests: Iterable[Test]) -> tuple[Test, ...]:
    """The tests of a study, each with its p_holm."""
    tests = list(tests)
    return tuple(replace(test, p_holm=p) for test, p in zip(tests, holm([test.p for test in tests]), strict=True))


def test_rows(tests: Iterable[Test]) -> list[dict[str, Any]]:
    """Two rows of `results` a test, but for what `result_rows` shares out: metrics p and p_holm."""
    return [
        {
            "site": test.site,
            "token_role": test.token_role,
            "label": test.label,
            "metric": metric,
            "value": p,
            "n": test.n,
        }
        for test in tests
        for metric, p in (("p", test.p), ("p_holm", test.p_holm))
    ]


def adjustment(tests: Sequence[Test]) -> str:
    """What every sentence says of the p and the intervals that it gives."""
    return f"of {len(tests)} comparison{'s' * (len(tests) != 1)}, Holm; each interval is for its comparison alone"


def shown(test: Test) -> str:
    """`-0.120 [-0.400, +0.150]`, percentage points; what is no share as it is."""
    scale = 100 if test.points else 1
    ends = "" if test.low is None or test.high is None else f" [{scale * test.low:+.3f}, {scale * test.high:+.3f}]"
    return f"{scale * test.estimate:+.3f}{ends}"


def p_shown(p: float) -> str:
    """`p = 0.012`, `p < 0.001`."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def result_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    study: str,
    run: str,
    query: str,
    params: Mapping[str, Any],
    snapshot: int,
    seed: int,
) -> pl.DataFrame:
    """Rows of the table `results`, columns as in RESULTS.

    Args:
        rows: of each what is its own (site, token_role, label, metric, value, low, high, n, name, direction); what is
            left out is NULL.
        study, run, query, params, snapshot, seed: what they share.
    """
    shared: dict[str, Any] = {
        "study": study,
        "run": run,
        "query": query,
        "params": json.dumps(dict(params), sort_keys=True),
    }
    shared |= {"snapshot": snapshot, "seed": seed, "version": __version__}
    return pl.DataFrame([{**row, **shared} for row in rows], schema=RESULTS)


def _module(name: str) -> ModuleType:
    if name not in STUDIES:
        raise NotStored(f"no study {name!r}; there are {', '.join(STUDIES)}{nearest(name, STUDIES)}")
    return import_module(STUDIES[name])


def _silent(done: int, total: int, what: str) -> None:
    """No progress was asked for."""
