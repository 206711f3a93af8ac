"""The second set of a confirmation: the runs it needs, and a store without the shared trees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import polars as pl

from actstore.advice import ingest_command, together
from actstore.errors import BadInput, NotStored, nearest
from actstore.named import NAME
from actstore.queries.probes.labelled import sql_of
from actstore.queries.study import RUNS, Question, Row

if TYPE_CHECKING:
    from actstore.store import Store

DATASETS = "from datasets order by rowid"
SHARED = """
with first as (select distinct hash from sequences where dataset = $first)
select count(*) as n, count(first.hash) as n_shared
from sequences left join first using (hash) where dataset = $second
"""
DRAWN_BY = ("task", "vocabulary", "distribution", "n_nodes", "depths")  # equal for two sets that are drawn alike
CLOSE = 0.8  # similarity from which a name is a misspelling of a stored one, and no new set
LONGEST = 95  # characters of a run's name, which leaves room for a number
BY_TREE = (  # every table and view with a tree_id and no sequence_id
    *("trees", "edges", "outcomes", "generations"),
    *("edge_sources", "edge_targets", "edge_separators", "answer_tokens"),
)
BY_SEQUENCE = ("tokens", "predictions", "sequences", "listed_sequences")  # those with a sequence_id


@dataclass(frozen=True)
class Second:
    """The second set, and the runs over it.

    Attributes:
        first: name of the first set of trees.
        dataset: name of the second set.
        runs: the model's run over the second set, or both compared models' runs.
        n_trees: number of trees in the second set.
        n_shared: number of these trees that the first set holds, too.
        things: what the sets hold, in words.
    """

    first: str
    dataset: str
    runs: tuple[str, ...]
    n_trees: int
    n_shared: int
    things: str = "trees"


@dataclass(frozen=True)
class Need:
    """A needed run of a model over the second set, or over a variant of the second set.

    Attributes:
        of: a row of RUNS, the run over the first set.
        prompt, change: as in `runs` and `datasets`.
        sites: short names of the needed sites; `pattern` means any attention pattern.
        samples: number of sampled continuations.
    """

    of: Row
    prompt: str = "task"
    change: str | None = None
    sites: tuple[str, ...] = ()
    samples: int | None = None

    def met(self, dataset: str, runs: Iterable[Row]) -> str | None:
        """The first run that fits; None if there is none."""
        for run in runs:
            if run["edited"]:
                continue
            over = run["variant_of"] if self.change else run["dataset"]
            kind = run["weights_sha256"], over, run["change"] if self.change else None, run["prompt"]
            held = {*run["held"], *(site.partition(".")[0] for site in run["held"] if site.startswith("pattern"))}
            if kind == (self.of["weights_sha256"], dataset, self.change, self.prompt) and held.issuperset(self.sites):
                return str(run["run"])
        return None

    def name(self, dataset: str) -> str:
        """The name for a new run that fits."""
        more = self.change or ("dreams" if self.prompt == "tree" else None)
        return "-".join(filter(None, [self.of["run"], dataset, more]))[:LONGEST]

    @property
    def words(self) -> list[str]:
        """Arguments of `actstore ingest`, without the model and the trees."""
        if self.prompt == "tree":
            return ["--prompt", "tree", *(["--samples", str(self.samples)] if self.samples not in (None, 1) else [])]
        return [*(["--variant", self.change] if self.change else []), "--sites", ",".join(self.sites) or "none"]


def look(store: Store, question: Question, dataset: str) -> Second:
    """Find the set and the runs that a confirmation needs; nothing is computed.

    Args:
        store: an open store.
        question: the study and its run or runs.
        dataset: name of the second set.

    Raises:
        NotStored: a needed set or run is missing; gives the command line that adds all of them.
        BadInput: the second set is the first set, is drawn otherwise, or has only trees of the
            first set.
    """
    query = question.options.get("query") or ""
    if (query or question.study == "probe") and "$dataset" not in sql_of(query):
        raise BadInput(
            "a label's query can be asked of a second set only if it takes $dataset, the name of the set: add "
            "`where dataset = $dataset`"
        )
    sets = {row["dataset"]: row for row in store.sql(DATASETS).iter_rows(named=True)}
    asked, needed, _ = _needed(store, question)
    first = sets[asked[0]["dataset"]]

    def elsewhere() -> str:
        """Another set to name, in words."""
        alike = [name for name, row in sets.items() if name not in (first["dataset"], dataset) and _alike(first, row)]
        if alike:
            return f"name another set (--confirm): {', '.join(alike)}"
        if first["task"] == "tokens":
            return "ingest another set of sequences with the same model, and name its dataset (--confirm)"
        tried = (f"{first['dataset']}-{word}" for word in chain(["again"], count(2)))
        free = next(name for name in tried if name not in sets)
        return (
            f"{_line(store, needed, free, _drawing(first, sets.values()))} draws another, to be named: --confirm {free}"
        )

    if dataset not in sets:
        lacks, there = f"no set of trees {dataset!r}", f"there are {', '.join(sets)}"
        if get_close_matches(dataset, sets, 1, CLOSE) or not NAME.fullmatch(dataset):
            raise NotStored(f"{lacks}{nearest(dataset, sets)}; {there}")
        if first["task"] == "tokens":
            raise NotStored(f"{lacks.replace('trees', 'sequences')}; {there}: {elsewhere()}")
        line = _line(store, needed, dataset, _drawing(first, sets.values()))
        raise NotStored(
            f"{lacks}; {there}; {line} draws one of that name, and stores what {question.study!r} needs there"
        )
    if dataset == first["dataset"]:
        raise BadInput(f"the claims were found on {dataset!r} itself, and a second set is drawn apart: {elsewhere()}")
    if not _alike(first, sets[dataset]):
        raise BadInput(
            f"{dataset!r} was not drawn as {first['dataset']!r} was, on which the claims were found ({_drawn(sets[dataset])}, "
            f"and not {_drawn(first)}): {elsewhere()}"
        )
    runs = runs_over(store, question, dataset)
    n, n_shared = store.sql(SHARED, {"first": first["dataset"], "second": dataset}).row(0)
    if n == n_shared:
        raise BadInput(f"all {n:,} {_things(first)} of {dataset!r} are in {first['dataset']!r}, too: {elsewhere()}")
    return Second(first["dataset"], dataset, runs, n, n_shared, _things(first))


def runs_over(store: Store, question: Question, dataset: str, sites: Sequence[str] = ()) -> tuple[str, ...]:
    """The run of each model of a question over the second set.

    Args:
        store: an open store.
        question: the study and its run or runs.
        dataset: name of the second set.
        sites: short names of the residual sites of the claims.

    Raises:
        NotStored: a needed run is missing; gives the command line that adds all of them.
    """
    asked, needed, every = _needed(store, question, sites)
    if lacking := [need for need in needed if not need.met(dataset, every)]:
        whose = " and ".join(dict.fromkeys(repr(need.of["run"]) for need in lacking))
        raise NotStored(
            f"{dataset!r} lacks runs of the model of {whose} that {question.study!r} needs; "
            f"{_line(store, lacking, dataset)} stores these runs"
        )
    return tuple(str(next(need for need in needed if need.of is row).met(dataset, every)) for row in asked)


def _needed(store: Store, question: Question, sites: Sequence[str] = ()) -> tuple[list[Row], list[Need], list[Row]]:
    """The asked rows of RUNS, what each needs over the second set, and all rows of RUNS."""
    every: list[Row] = list(store.sql(RUNS).iter_rows(named=True))
    by_name = {row["run"]: row for row in every}
    asked: list[Row] = [by_name[run] for run in (question.run, question.options.get("other")) if run]
    return asked, [need for row in asked for need in _needs(question.study, row, tuple(sites), every)], every


def _needs(study: str, of: Row, sites: tuple[str, ...], runs: Sequence[Row]) -> list[Need]:
    """The runs that a study needs over the second set; the study is put to the first."""
    if study == "attention":
        return [Need(of, sites=("pattern",))]
    if study == "swap":
        from actstore.queries.swap import CHANGES

        return [Need(of), *(Need(of, change=change) for change in CHANGES)]
    if study == "dreams":
        dreams = Need(of, prompt="tree").met(of["dataset"], runs)
        samples = next((row["samples"] for row in runs if row["run"] == dreams), None)
        return [Need(of), Need(of, prompt="tree", samples=samples)]
    if study == "scrub":
        return [
            Need(of, sites=tuple(site for site in of["held"] if site.startswith(("pattern.", "v.", "resid_post."))))
        ]
    return [Need(of, sites=sites)]


def _line(store: Store, needs: Sequence[Need], dataset: str, drawing: Sequence[str] = ()) -> str:
    """One command line that stores runs over a set; with `drawing`, it draws the set first."""
    commands: list[str] = []
    for need in needs:
        more = [*drawing, *need.words] if not commands else need.words
        commands.append(ingest_command(store, ("--model-of", need.of["run"]), dataset, need.name(dataset), *more))
    return together(commands)


def _drawing(first: Row, sets: Iterable[Row]) -> list[str]:
    """Arguments that draw a set like the first, from a seed that no stored set has."""
    taken = {row["seed"] for row in sets}
    seed = next(seed for seed in count() if seed not in taken)
    words = [
        "--distribution",
        first["distribution"],
        "--nodes",
        first["n_nodes"],
        "--trees",
        first["n_trees"],
        "--seed",
        seed,
    ]
    words += ["--depths", ",".join(map(str, first["depths"]))] if first["depths"] else []
    return list(map(str, words))


def _alike(first: Row, second: Row) -> bool:
    """Whether two sets are drawn alike; a variant is never drawn."""
    return not second["variant_of"] and all(first[key] == second[key] for key in DRAWN_BY)


def _things(row: Row) -> str:
    """What a dataset holds: trees, or other sequences."""
    return "sequences" if row["task"] == "tokens" else "trees"


def _drawn(row: Row) -> str:
    """`reproduction trees of 16 nodes`."""
    if row["task"] == "tokens":
        return "sequences that are no trees"
    if row["variant_of"]:
        return f"variants of {row['variant_of']!r}"
    depths = f", goals at depths {', '.join(map(str, row['depths']))}" if row["depths"] else ""
    return f"{row['distribution']} trees of {row['n_nodes']} nodes{depths}"


class Apart:
    """A store whose queries do not see a set's sequences (by their hash) nor rows of those.

    Only `sql`, `read`, `of`, `whole` and the names in OWN are available.

    Args:
        store: an open store.
        dataset: name of the set.
    """

    OWN = ("path", "snapshot", "resolve_run", "runs", "sites")

    def __init__(self, store: Store, dataset: str) -> None:
        self._store = store
        named = dataset.replace("'", "''")
        self._dataset = dataset
        keys = dict.fromkeys(BY_TREE, "tree_id") | dict.fromkeys(BY_SEQUENCE, "sequence_id")
        shadows = [f"every_{name} as not materialized (from {name})" for name in keys]  # before the name is shadowed
        shadows += [
            f"{name} as not materialized (from every_{name} anti join seen using ({key}))" for name, key in keys.items()
        ]
        self._before = (
            "with seen as (select sequence_id, sequence_id as tree_id from store.main.sequences where hash in "
            f"(select hash from store.main.sequences where dataset = '{named}')), {', '.join(shadows)} from (\n"
        )

    def __getattr__(self, name: str) -> Any:
        if name not in self.OWN:
            raise AttributeError(f"a store without the trees of {self._dataset!r} has no {name!r}")
        return getattr(self._store, name)

    @property
    def whole(self) -> Apart:
        """The whole store, without the set's trees."""
        return Apart(self._store.whole, self._dataset)

    def of(self, run: str) -> Apart:
        """The session of a run, without the set's trees; see Store.of."""
        return Apart(self._store.of(run), self._dataset)

    def sql(self, query: str, params: Mapping[str, Any] | None = None, *limits: Any) -> pl.DataFrame:
        """See Store.sql."""
        return self._store.sql(f"{self._before}{query}\n)", params, *limits)

    def read(self, query: Any, *args: Any, **options: Any) -> tuple[Any, pl.DataFrame]:
        """See Store.read; ids were chosen without the set's sequences."""
        if not isinstance(query, str):
            return self._store.read(query, *args, **options)
        return self._store.read(f"{self._before}{query}\n)", *args, **options)
