"""The second set of a confirmation: which runs over it are needed, what lacks, and how a store is read without shared trees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import polars as pl

from actstore.advice import ingest_command, together
from actstore.errors import BadInput, NotStored
from actstore.named import NAME
from actstore.queries import nearest
from actstore.queries.study import Question

if TYPE_CHECKING:
    from actstore.store import Store

Row = Mapping[str, Any]

DATASETS = "from datasets order by rowid"
RUNS = """
select
    runs.run,
    weights_sha256,
    dataset,
    coalesce(prompt, 'task') as prompt,
    samples,
    variant_of,
    change,
    coalesce((select list(short) from sites where sites.run = runs.run), []) as held
from runs join datasets using (dataset)
order by runs.rowid
"""
SHARED = """
with first as (select distinct tree_hash from trees where dataset = $first)
select count(*) as n, count(first.tree_hash) as n_shared
from trees left join first using (tree_hash) where dataset = $second
"""
DRAWN_BY = ("distribution", "n_nodes", "depths")  # what two sets have in common that were drawn alike
CLOSE = 0.8  # how near a name is to a stored one to be a misspelling of it, which is not offered to be made
LONGEST = 95  # characters of a run's name, so that a number may be added
BY_TREE = (  # all that has rows by tree
    *("trees", "edges", "tokens", "predictions", "outcomes", "generations"),
    *("edge_sources", "edge_targets", "edge_separators", "answer_tokens"),
)


@dataclass(frozen=True)
class Second:
    """The second set, and who answers there.

    Attributes:
        first, dataset: names of the two sets of trees.
        runs: the runs over the second: of the model, or of both that are compared.
        n_trees, n_shared: trees of the second, and how many of these the first holds, too.
    """

    first: str
    dataset: str
    runs: tuple[str, ...]
    n_trees: int
    n_shared: int


@dataclass(frozen=True)
class Need:
    """A run of a model over the second set, or over a variant of it.

    Attributes:
        of: a row of RUNS, the run on whose trees something was found.
        prompt, change: as of `runs` and `datasets`.
        sites: short names of what it must hold; `pattern` stands for any attention pattern.
        samples: continuations that are drawn beside the greedy one.
    """

    of: Row
    prompt: str = "task"
    change: str | None = None
    sites: tuple[str, ...] = ()
    samples: int | None = None

    def met(self, dataset: str, runs: Iterable[Row]) -> str | None:
        """The first run that is what is needed."""
        for run in runs:
            over = run["variant_of"] if self.change else run["dataset"]
            kind = run["weights_sha256"], over, run["change"] if self.change else None, run["prompt"]
            held = {*run["held"], *(site.partition(".")[0] for site in run["held"] if site.startswith("pattern"))}
            if kind == (self.of["weights_sha256"], dataset, self.change, self.prompt) and held.issuperset(self.sites):
                return str(run["run"])
        return None

    def name(self, dataset: str) -> str:
        """Of the run that is to be made."""
        more = self.change or ("dreams" if self.prompt == "tree" else None)
        return "-".join(filter(None, [self.of["run"], dataset, more]))[:LONGEST]

    @property
    def words(self) -> list[str]:
        """What `actstore ingest` is told, beside the model and the trees."""
        if self.prompt == "tree":
            return ["--prompt", "tree", *(["--samples", str(self.samples)] if self.samples not in (None, 1) else [])]
        return [*(["--variant", self.change] if self.change else []), "--sites", ",".join(self.sites) or "none"]


def look(store: Store, question: Question, dataset: str, sites: Sequence[str] = ()) -> Second:
    """Find all that a confirmation needs; nothing is computed.

    Args:
        store: an open store.
        question: the study, and the run, or both, that it was put to.
        dataset: the second set.
        sites: short names of the residual sites that the claims are about.

    Raises:
        NotStored: a set or a run that is needed is not stored; says the command line that adds all that lacks.
        BadInput: the second set is the first, is not drawn as the first was, or has no tree that the first has not.
    """
    sets = {row["dataset"]: row for row in store.sql(DATASETS).iter_rows(named=True)}
    every = list(store.sql(RUNS).iter_rows(named=True))
    by_name = {row["run"]: row for row in every}
    asked = [by_name[run] for run in (question.run, question.options.get("other")) if run]
    first = sets[asked[0]["dataset"]]
    needed = [need for row in asked for need in _needs(question.study, row, tuple(sites), every)]

    def elsewhere() -> str:
        """What to name in place of a set that will not do."""
        alike = [name for name, row in sets.items() if name not in (first["dataset"], dataset) and _alike(first, row)]
        if alike:
            return f"name another set (--confirm): {', '.join(alike)}"
        tried = (f"{first['dataset']}-{word}" for word in chain(["again"], count(2)))
        free = next(name for name in tried if name not in sets)
        return (
            f"{_line(store, needed, free, _drawing(first, sets.values()))} draws another, to be named: --confirm {free}"
        )

    if dataset not in sets:
        there = f"no set of trees {dataset!r}; there are {', '.join(sets)}"
        if get_close_matches(dataset, sets, 1, CLOSE) or not NAME.fullmatch(dataset):
            raise NotStored(f"{there}{nearest(dataset, sets)}")
        line = _line(store, needed, dataset, _drawing(first, sets.values()))
        raise NotStored(f"{there}; {line} draws one of that name, and stores what {question.study!r} needs there")
    if dataset == first["dataset"]:
        raise BadInput(f"the claims were found on {dataset!r} itself, and a second set is drawn apart: {elsewhere()}")
    if not _alike(first, sets[dataset]):
        raise BadInput(
            f"{dataset!r} was not drawn as {first['dataset']!r} was, on which the claims were found ({_drawn(sets[dataset])}, "
            f"and not {_drawn(first)}): {elsewhere()}"
        )
    if lacking := [need for need in needed if not need.met(dataset, every)]:
        whose = " and ".join(dict.fromkeys(repr(need.of["run"]) for need in lacking))
        raise NotStored(
            f"runs of the model of {whose} over {dataset!r} that {question.study!r} needs are lacking; "
            f"{_line(store, lacking, dataset)} stores what lacks"
        )
    n, n_shared = store.sql(SHARED, {"first": first["dataset"], "second": dataset}).row(0)
    if n == n_shared:
        raise BadInput(f"all {n:,} trees of {dataset!r} are in {first['dataset']!r}, too: {elsewhere()}")
    runs = [next(need for need in needed if need.of is row).met(dataset, every) for row in asked]
    return Second(first["dataset"], dataset, tuple(map(str, runs)), n, n_shared)


def _needs(study: str, of: Row, sites: tuple[str, ...], runs: Sequence[Row]) -> list[Need]:
    """The runs that a study needs over the second set; the first of them is the one that it is put to."""
    if study == "attention":
        return [Need(of, sites=("pattern",))]
    if study == "swap":
        from actstore.queries.swap import CHANGES

        return [Need(of), *(Need(of, change=change) for change in CHANGES)]
    if study == "dreams":
        dreams = Need(of, prompt="tree").met(of["dataset"], runs)
        samples = next((row["samples"] for row in runs if row["run"] == dreams), None)
        return [Need(of), Need(of, prompt="tree", samples=samples)]
    return [Need(of, sites=sites)]


def _line(store: Store, needs: Sequence[Need], dataset: str, drawing: Sequence[str] = ()) -> str:
    """One command line that stores runs over a set of trees, which its first command draws where that is told how to."""
    commands: list[str] = []
    for need in needs:
        more = [*drawing, *need.words] if not commands else need.words
        commands.append(ingest_command(store, ("--model-of", need.of["run"]), dataset, need.name(dataset), *more))
    return together(commands)


def _drawing(first: Row, sets: Iterable[Row]) -> list[str]:
    """How a set is drawn as the first was, from a stream that no stored set is of."""
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
    """Whether two sets are drawn alike; variants are made, and not drawn."""
    return not second["variant_of"] and all(first[key] == second[key] for key in DRAWN_BY)


def _drawn(row: Row) -> str:
    """`reproduction trees of 16 nodes`."""
    if row["variant_of"]:
        return f"variants of {row['variant_of']!r}"
    depths = f", goals at depths {', '.join(map(str, row['depths']))}" if row["depths"] else ""
    return f"{row['distribution']} trees of {row['n_nodes']} nodes{depths}"


class Apart:
    """A store whose queries see no tree that a set holds, by its canonical hash, nor what belongs to that tree.

    Args:
        store: an open store. What has no trees in it is its own; a method that is not here is not to be had.
        dataset: the set.
    """

    OWN = ("path", "snapshot", "run", "runs", "sites")

    def __init__(self, store: Store, dataset: str) -> None:
        self._store = store
        named = dataset.replace("'", "''")
        self._dataset = dataset
        shadows = [
            f"every_{name} as not materialized (from {name})" for name in BY_TREE
        ]  # before the name is another's
        shadows += [
            f"{name} as not materialized (from every_{name} anti join seen using (tree_id))" for name in BY_TREE
        ]
        self._before = (
            "with seen as (select tree_id from store.main.trees where tree_hash in "
            f"(select tree_hash from store.main.trees where dataset = '{named}')), {', '.join(shadows)} from (\n"
        )

    def __getattr__(self, name: str) -> Any:
        if name not in self.OWN:
            raise AttributeError(f"a store without the trees of {self._dataset!r} has no {name!r}")
        return getattr(self._store, name)

    @property
    def whole(self) -> Apart:
        return Apart(self._store.whole, self._dataset)

    def of(self, run: str) -> Apart:
        return Apart(self._store.of(run), self._dataset)

    def sql(self, query: str, params: Mapping[str, Any] | None = None, *limits: Any) -> pl.DataFrame:
        return self._store.sql(f"{self._before}{query}\n)", params, *limits)

    def read(self, query: str, *args: Any, **options: Any) -> tuple[Any, pl.DataFrame]:
        return self._store.read(f"{self._before}{query}\n)", *args, **options)
