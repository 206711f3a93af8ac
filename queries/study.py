"""A study: a named question to a run, answered by table, sentence, figure and rows of `results`.

A study tests whatever it decides. Holm's correction covers all tests of a study, and the sentence
claims only significant tests. A study is a module with two functions, `study(store, run, seed,
progress, **options) -> Answer` and `plot(answer) -> Figure`; STUDIES lists the modules. A module is
imported at its first use, since some import slowly.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from keyword import iskeyword
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput, NotStored, advised, nearest
from actstore.intervals import holm, share_over_trees
from actstore.queries import check_names
from actstore.queries.figures import style
from actstore.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.interventions import Patching
    from actstore.store import Store

STUDIES = {
    "probes": "actstore.queries.probes.study",
    "probe": "actstore.queries.probes.own",
    "depth": "actstore.queries.depth",
    "last-edge": "actstore.queries.last_edge",
    "swap": "actstore.queries.swap",
    "dreams": "actstore.queries.dreams.study",
    "attention": "actstore.queries.attention.study",
    "compare": "actstore.queries.compare.study",
    "knockout": "actstore.queries.knockout",
    "ablate": "actstore.queries.ablate",
    "scrub": "actstore.queries.scrub.study",
    "patching": "actstore.queries.patching",
    "path-patching": "actstore.queries.path_patching",
    "erase": "actstore.queries.erase",
    "dtype-bill": "actstore.queries.dtype_bill",
}

OF_THE_MODEL = (
    "swap",
    "dreams",
    "attention",
    "dtype-bill",
)  # these find other runs of the model over the trees: one answer serves all
OF_ANSWERS = (
    "depth",
    "last-edge",
    "knockout",
    "ablate",
    "patching",
    "path-patching",
)  # these read answers alone, which are the same in each run of a model over the trees
ANY_SEQUENCES = ("probe", "compare")  # these need no tree
CAUSAL = (
    "knockout",
    "ablate",
    "scrub",
    "patching",
    "path-patching",
    "erase",
    "dtype-bill",
)  # these run the model again with edited activations, and take `patch`
RUNS = """
-- one row per run; held: its sites, vectors: those with a vector per token
select
    run,
    weights_sha256,
    dataset,
    coalesce(prompt, 'task') as prompt,
    samples,
    variant_of,
    change,
    coalesce(task, 'trees') as task,
    run in (select run from interventions) as edited,
    versions like '%"answers": "none"%' as unanswered,
    coalesce((select list(short) from sites where sites.run = runs.run), []) as held,
    coalesce((select list(short) from sites where sites.run = runs.run and kind in ('resid', 'vector')), []) as vectors
from runs join datasets using (dataset)
order by runs.rowid
"""

Row = Mapping[str, Any]
Progress = Callable[[int, int, str], None]  # parts done, parts in all, the part just done

RESULTS = {  # columns of the table `results`, without `recorded`, which the store sets
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


ARGUMENTS = ("store", "run", "seed", "progress", "patch")  # of every study; the others are its options
LEVEL = 0.05  # an adjusted p below is significant


@dataclass(frozen=True)
class Test:
    """One tested comparison of a study.

    Attributes:
        label: with site and token_role, identifies the test within the study and its rows of
            `results`.
        estimate: the effect: a difference, or a distance from an explanation.
        p: p of no effect, for this comparison alone.
        p_holm: p adjusted for all tests of the study.
        n: number of observations.
        low, high: 95 % interval for this comparison alone; None without an interval.
        what: the comparison in words; default: the label.
        points: whether the estimate is a share, shown in percentage points.
        exceeds: what the estimate has to exceed, such as `its baseline`: a significant estimate
            below 0 is then no finding. Empty if either sign is one.
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
    exceeds: str = ""
    p_holm: float = float("nan")

    @classmethod
    def of(cls, row: Row, p: float, what: str = "", **more: Any) -> Test:
        """The test of a row of `results`: of its label, place and numbers."""
        ends = row.get("low"), row.get("high")
        return cls(row["label"], row["value"], p, row["n"], *ends, what, row.get("site"), row.get("token_role"), **more)

    @property
    def key(self) -> tuple[str | None, str | None, str]:
        """Site, token role and label, which identify the test."""
        return self.site, self.token_role, self.label

    @property
    def named(self) -> str:
        """The comparison in words, with token role and site."""
        where = ", ".join(name for name in (self.token_role, self.site) if name)
        return f"{self.what or self.label}{f' ({where})' * bool(where)}"

    @property
    def significant(self) -> bool:
        """Whether the test is significant after Holm's correction."""
        return self.p_holm < LEVEL

    @property
    def below(self) -> bool:
        """Whether the estimate is significantly below what it has to exceed."""
        return self.significant and bool(self.exceeds) and self.estimate < 0

    @property
    def found(self) -> bool:
        """Whether the test is significant, and not below what it has to exceed."""
        return self.significant and not self.below


@dataclass(frozen=True)
class Answer:
    """A study's answer.

    Attributes:
        name: name of the study.
        frame: a few rows to print, with the most important columns first.
        results: rows of the table `results`, columns as in RESULTS.
        sentence: the answer in one sentence.
        tests: all tests, with adjusted p.
    """

    name: str
    frame: pl.DataFrame
    results: pl.DataFrame
    sentence: str
    tests: tuple[Test, ...] = ()

    @property
    def of(self) -> list[str]:
        """The run, or both compared runs."""
        first = self.results.row(0, named=True)
        other = json.loads(first["params"]).get("other")
        return [first["run"], *([other] if other else [])]


def ask(
    store: Store,
    name: str,
    run: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    patch: Patching | None = None,
    **options: Any,
) -> Answer:
    """Run a study; the same store, run, seed and options give the same numbers.

    Args:
        store: an open store.
        name: one of STUDIES.
        run: name of the run; optional if the store holds one run.
        seed: seed of everything random.
        progress: called with (done, total, what) after each part.
        patch: runs edits; of a study in CAUSAL.
        options: options of the study, see its module.

    Raises:
        NotStored: there is no such study or run.
        BadInput: the study has no such option, or the run holds too little for it.
    """
    check_options(name, options)
    run = store.resolve_run(run)
    given = {f"{option}_" if iskeyword(option) else option: value for option, value in options.items()}
    if name in CAUSAL:
        if patch is None:
            raise BadInput(f"the study {name!r} runs the model again; ask it by {advised('study', store.path, name)}")
        given["patch"] = patch
    return _module(name).study(store.whole, run, seed, progress or _silent, **given)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a study does not take.

    Raises:
        NotStored: there is no such study.
        BadInput: the study has no such option, or the option has an argument of its own.
    """
    taken = _options(name)
    for option in options:
        if option.rstrip("s") in ARGUMENTS[1:3] and option not in taken:
            argument = f"--{option.rstrip('s')} {options[option]}"
            raise BadInput(f"{option!r} is no option of the study {name!r}; write {argument} in its place")
    check_names(f"study {name!r}", options, (), taken)


def _options(name: str) -> list[str]:
    """Names of the options of a study."""
    parameters = inspect.signature(_module(name).study).parameters
    return [option.removesuffix("_") for option in parameters if option not in ARGUMENTS]  # `from` is a word of Python


def taken_by(name: str, options: Sequence[str]) -> list[str]:
    """Those of some options that a study takes."""
    return [option for option in options if option in _options(name)]


@dataclass(frozen=True)
class Question:
    """A study and the run that it asks about.

    Attributes:
        study: name of the study.
        run: name of the run.
        options: options of the study, such as `other` of `compare`.
    """

    study: str
    run: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def of(self) -> str:
        """The run, or both compared runs."""
        return f"{self.run} and {self.options['other']}" if "other" in self.options else self.run


def questions(store: Store, study: str, runs: Sequence[str] = (), **options: Any) -> list[Question]:
    """The questions that a study asks: runs, or pairs of runs.

    A study in OF_THE_MODEL asks about the first run of each model and set of trees; a study in
    OF_ANSWERS does, too, unless runs are named. `compare` asks
    about every pair of several named runs; about a single named run and every other model over its
    trees; and by default, per set of trees, about the first run and every other model.

    Args:
        store: an open store.
        study: one of STUDIES.
        runs: names of runs, or one run's name; default: every run over drawn trees, and for a study
            in ANY_SEQUENCES every run over other sequences, too.
        options: options of the study.

    Raises:
        NotStored: there is no such study or run, or no run over drawn trees.
        BadInput: a named run is over other sequences than trees, and the study needs trees.
    """
    _module(study)
    named = list(dict.fromkeys(store.resolve_run(run) for run in ([runs] if isinstance(runs, str) else runs)))
    known: dict[str, Row] = {row["run"]: row for row in store.sql(RUNS).iter_rows(named=True)}
    of_any = study in ANY_SEQUENCES
    if others := [run for run in named if known[run]["task"] != "trees" and not of_any]:
        raise BadInput(
            f"the study {study!r} is about trees, and run {others[0]!r} is over other sequences; {' and '.join(ANY_SEQUENCES)} "
            "need no tree"
        )
    if study in CAUSAL and (edited := [run for run in named if known[run]["edited"]]):
        raise BadInput(f"run {edited[0]!r} holds edited activations; name the run that it starts from (--run)")
    every = [
        row
        for row in known.values()
        if row["prompt"] == "task"
        and not row["variant_of"]
        and not row["edited"]
        and (of_any or row["task"] == "trees")
    ]
    asked: list[Row] = [known[run] for run in named] or every
    if not asked:
        command = advised("ingest", store.path, "--model", "reproduction")
        raise NotStored(f"{store.path} holds no run over drawn trees; ingest one with {command}")
    if study == "compare" and "other" not in options:
        pairs = _pairs(asked, asked if len(named) > 1 else list(known.values()), all_pairs=len(named) > 1)
        alone = Question(study, asked[0]["run"], options)  # its answer is an error that says what is lacking
        return [Question(study, run, {**options, "other": other}) for run, other in pairs] or [alone]
    if study in OF_THE_MODEL or (study in OF_ANSWERS and not named):
        answered_first = sorted(asked, key=lambda row: bool(row["unanswered"]))
        asked = _firsts(answered_first, "weights_sha256", "dataset")
    return [Question(study, row["run"], options) for row in asked]


def _pairs(asked: Sequence[Row], among: Sequence[Row], all_pairs: bool) -> list[tuple[str, str]]:
    """Pairs of runs of two models over the same sequences; each pair of models is asked once."""
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
    """One run of each other model over a run's sequences: the one that shares most sites.

    Args:
        base: a row of RUNS.
        among: rows of RUNS; the first wins among equals.
    """
    others = [
        row
        for row in among
        if row["prompt"] == "task"
        and not row["edited"]
        and row["dataset"] == base["dataset"]
        and row["weights_sha256"] != base["weights_sha256"]
    ]
    order = [row["weights_sha256"] for row in _firsts(others, "weights_sha256")]
    best = _firsts(sorted(others, key=lambda row: -len({*row["vectors"]} & {*base["vectors"]})), "weights_sha256")
    return sorted(best, key=lambda row: order.index(row["weights_sha256"]))


def plot(answer: Answer, dark: bool = False) -> Figure:
    """Draw an answer, one column of a paper wide.

    `plot(answer).savefig(FILE)` writes the figure, without a display.

    Args:
        dark: light text on a dark background, for a screen.
    """
    with style(dark):
        figure: Figure = _module(answer.name).plot(answer)
        figure.draw_without_rendering()  # ticks are made here, in this style
    return figure


def caption(answer: Answer, figure: Figure) -> str:
    """What stands below a figure in a paper: what it shows, the answer, and how to make it again.

    Args:
        figure: the answer's figure, see `plot`.
    """
    what, said = (" ".join(part.split()) for part in figure.get_suptitle().partition("\n")[::2])
    first = answer.results.row(0, named=True)
    return (
        f"{what}{'' if what.endswith('?') else '.'} {said[:1].upper()}{said[1:]}. {answer.sentence} (actstore, study "
        f"{answer.name}, seed {first['seed']}, snapshot {first['snapshot']}.)"
    )


def adjusted(tests: Iterable[Test]) -> tuple[Test, ...]:
    """Holm's correction over the tests of a study: sets p_holm."""
    tests = list(tests)
    return tuple(replace(test, p_holm=p) for test, p in zip(tests, holm([test.p for test in tests]), strict=True))


def chosen(wanted: str | Sequence[str], known: Iterable[str], what: str) -> list[str]:
    """The wanted names (see `names_in`) or `all`, once each, in the order of `known`.

    Raises:
        BadInput: a name is unknown, or there are no names.
    """
    names = names_in(wanted)
    if names == ["all"]:
        return list(known)
    for name in names or [""]:
        if name not in known:
            raise BadInput(f"no {what} {name!r}{nearest(name, known)}; there are {', '.join(known)}, and all")
    return [name for name in known if name in names]


def names_in(wanted: str | Sequence[str]) -> list[str]:
    """Names from a comma-separated text or a list; a number from the command line is a name."""
    return (
        [str(name) for name in wanted]
        if isinstance(wanted, list | tuple)
        else [n.strip() for n in str(wanted).split(",")]
    )


def mean_row(values: np.ndarray, trees: np.ndarray, seed: int, **about: Any) -> dict[str, Any]:
    """A row of `results`: the mean of values with its interval over trees; NULL without values."""
    if not len(values):
        return {**about, "value": None, "n": 0}
    low, high = share_over_trees(values, trees, seed)
    return {**about, "value": float(values.mean()), "low": low, "high": high, "n": len(values)}


def test_rows(tests: Iterable[Test]) -> list[dict[str, Any]]:
    """Two rows per test, metrics p and p_holm, without the columns that `result_rows` adds."""
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


def significant(results: pl.DataFrame, above: str = "") -> set[tuple[str | None, str | None, str]]:
    """Site, token role and label of the tests that are significant after Holm's correction.

    A figure marks these, since it can be drawn again from recorded rows alone.

    Args:
        results: rows of one answer.
        above: a metric that has to be above 0, for tests whose estimate has to exceed something.
    """
    key = ("site", "token_role", "label")
    found = set(results.filter(pl.col("value") < LEVEL, metric="p_holm").select(key).rows())
    return found & set(results.filter(pl.col("value") > 0, metric=above).select(key).rows()) if above else found


def adjustment(tests: Sequence[Test]) -> str:
    """The note on p and intervals that every answer ends with."""
    n = len(tests)
    covered = f"all {n} comparisons" if n != 1 else "the one comparison"
    return f"Holm's correction covers {covered} of the study; each interval covers its own comparison alone."


def shown(test: Test) -> str:
    """`-0.120 [-0.400, +0.150]`, in percentage points if the estimate is a share."""
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
        rows: the rows' own columns (site, token_role, label, metric, value, low, high, n, name,
            direction); missing ones are NULL.
        study, run, query, params, snapshot, seed: columns that all rows share.
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
        raise NotStored(f"no study {name!r}{nearest(name, STUDIES)}; there are {', '.join(STUDIES)}")
    return import_module(STUDIES[name])


def _silent(done: int, total: int, what: str) -> None:
    """The default progress: nothing."""
