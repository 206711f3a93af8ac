"""Confirmation: what a study found on one set of trees is put to a second set, which was drawn apart.

A claim is a comparison that Holm leaves standing. The same model's run over the second set is found by the hash of its weights,
and the study is put to that run. Of its tests there those of the claims alone count, adjusted for each other (Holm). A claim is
confirmed where its test there is left standing, too, in the same direction. Trees that both sets hold, by their canonical hash,
are left out of the second, so no tree speaks twice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from actstore.queries import study as studies
from actstore.queries.second import RUNS, Apart, Second, look
from actstore.queries.study import Answer, Progress, Question, Test, adjusted, p_shown, result_rows, shown

if TYPE_CHECKING:
    from actstore.store import Store


@dataclass(frozen=True)
class Claim:
    """What was found, and its test on the second set; None where nothing tests it there.

    `there.p_holm` is adjusted for all claims that were put to the second set.
    """

    here: Test
    there: Test | None

    @property
    def confirmed(self) -> bool:
        """Holm leaves it standing there, too, in the same direction."""
        return self.there is not None and self.there.found and self.there.estimate * self.here.estimate > 0

    @property
    def verdict(self) -> str:
        return "confirmed there" if self.confirmed else "not confirmed there"

    @property
    def sentence(self) -> str:
        there = _numbers(self.there) if self.there else "nothing tests it there"
        return f"{self.here.named}: found here ({_numbers(self.here)}), {self.verdict} ({there})."


@dataclass(frozen=True)
class Confirmation:
    """What came of the claims of a study.

    Attributes:
        study: its name.
        of: the run, or both that are compared, on whose trees the claims were found.
        second: what the claims were put to.
        n_tests: what the study tested.
        claims: all that was found; none where nothing was.
        results: rows of the table `results`, columns as in study.RESULTS; none where nothing was found.
    """

    study: str
    of: list[str]
    second: Second
    n_tests: int
    claims: tuple[Claim, ...]
    results: pl.DataFrame

    @property
    def sentence(self) -> str:
        """How many claims are confirmed, and of each its numbers on both sets, a line a claim."""
        second, who = self.second, " and ".join(map(repr, self.of))
        if not self.n_tests:
            return f"The study {self.study!r} tests nothing of {who}, so there is no claim to be put to {second.dataset!r}."
        if not self.claims:
            return (
                f"Nothing that {self.study!r} tests was found of {who} (of {self.n_tests} comparisons, Holm), so there is no "
                f"claim to be put to {second.dataset!r}."
            )
        n, n_put = len(self.claims), sum(claim.there is not None for claim in self.claims)
        head = (
            f"Of {n} claim{'s' * (n != 1)} that {self.study!r} found of {who}, {sum(claim.confirmed for claim in self.claims)} "
            f"confirmed on {second.dataset!r}: {second.n_trees - second.n_shared:,} trees drawn apart"
            f" ({second.n_shared:,} left out that {second.first!r} holds, too), run {' and '.join(map(repr, second.runs))}, "
            f"Holm over the {n_put} put to it."
        )
        return "\n".join([head, *(claim.sentence for claim in self.claims)])

    @property
    def table(self) -> pl.DataFrame:
        """One row a claim; effects in percentage points, but for what is no share."""
        return pl.DataFrame(
            [
                {
                    "run": " and ".join(self.of),
                    "claim": claim.here.named,
                    "verdict": f"found here, {claim.verdict}",
                    **_cells("here", self.second.first, claim.here),
                    **_cells("there", self.second.dataset, claim.there),
                }
                for claim in self.claims
            ],
            schema=COLUMNS,
        )


COLUMNS: dict[str, Any] = {"run": pl.String, "claim": pl.String, "verdict": pl.String}
COLUMNS |= {
    f"{what}{where}": dtype
    for where in ("here", "there")
    for what, dtype in (("", pl.String), ("effect ", pl.String), ("n ", pl.Int64), ("p by Holm ", pl.Float64))
}


def _cells(where: str, dataset: str, test: Test | None) -> dict[str, Any]:
    effect, n, p = (shown(test), test.n, test.p_holm) if test else (None, None, None)
    return {where: dataset, f"effect {where}": effect, f"n {where}": n, f"p by Holm {where}": p}


def _numbers(test: Test) -> str:
    return f"{shown(test)}{' points' * test.points}, n = {test.n:,}, {p_shown(test.p_holm)}"


def confirm(
    store: Store, found: Answer, dataset: str, seed: int = 0, progress: Progress | None = None, **options: Any
) -> Confirmation:
    """Put what a study found to a second set of trees.

    Args:
        store: an open store.
        found: the study's answer.
        dataset: the second set, drawn as the first was, of another seed.
        seed: of everything random.
        progress: as of `study.run`; not called where nothing was found.
        options: those that the study was put with.

    Raises:
        NotStored, BadInput: the second set, or a run over it, is not what is needed, see `second.look`.
    """
    store, tests = store.whole, [test for test in found.tests if test.found]
    sites = list(dict.fromkeys(test.site for test in tests if test.site and not test.site.startswith("pattern")))
    if found.name == "compare" and sites and "embed" in _held_by_all(store, found.of):
        sites.append("embed")  # a control of the linear map
    question = Question(found.name, found.of[0], {**options, **dict(zip(["other"], found.of[1:], strict=False))})
    second = look(store, question, dataset, sites)
    if not tests:
        return Confirmation(found.name, found.of, second, len(found.tests), (), found.results.clear())
    given = {**question.options, **dict(zip(["other"], second.runs[1:], strict=False))}
    if found.name == "probes":
        given["sites"] = sites
    apart = cast("Store", Apart(store, second.first)) if second.n_shared else store
    answer = studies.run(apart, found.name, second.runs[0], seed, progress, **given)
    claims = _claims(tests, answer.tests)
    params = {**json.loads(found.results["params"][0]), "confirm": dataset, "runs": second.runs}
    params |= {"n_trees": second.n_trees, "n_left_out": second.n_shared}
    results = result_rows(
        [row for claim in claims for row in _rows(claim)],
        study=found.name,
        run=found.of[0],
        query=found.results["query"][0],
        params=params,
        snapshot=store.snapshot,
        seed=seed,
    )
    return Confirmation(found.name, found.of, second, len(found.tests), claims, results)


def _held_by_all(store: Store, runs: Sequence[str]) -> set[str]:
    """Short names of the sites that each of the runs holds."""
    return set.intersection(*(set(store.sites(run)) for run in runs))


def _claims(found: Sequence[Test], there: Sequence[Test]) -> tuple[Claim, ...]:
    """The claims, each with its test there, which is adjusted for those of the claims alone."""
    keys = {test.key for test in found}
    put = {test.key: test for test in adjusted(test for test in there if test.key in keys)}
    return tuple(Claim(test, put.get(test.key)) for test in found)


def _rows(claim: Claim) -> list[dict[str, Any]]:
    """Rows of `results`: metrics `confirm_here`, `confirm_there`, each with its `_p` and `_p_holm`, and `confirmed`, 0 or 1."""
    about = {"site": claim.here.site, "token_role": claim.here.token_role, "label": claim.here.label}
    rows: list[dict[str, Any]] = []
    for where, test in (("here", claim.here), ("there", claim.there)):
        if test:
            ends = {"low": test.low, "high": test.high}
            rows.append({**about, "metric": f"confirm_{where}", "value": test.estimate, **ends, "n": test.n})
            rows.append({**about, "metric": f"confirm_{where}_p", "value": test.p, "n": test.n})
            rows.append({**about, "metric": f"confirm_{where}_p_holm", "value": test.p_holm, "n": test.n})
    return [
        *rows,
        {**about, "metric": "confirmed", "value": float(claim.confirmed), "n": claim.there.n if claim.there else 0},
    ]


def of_other_sets(store: Store, asked: Sequence[Question], dataset: str, named: bool) -> list[Question]:
    """The questions but those of runs over the second set itself; all of them where the runs were named, or there is no other."""
    over = {row["run"] for row in store.sql(RUNS).iter_rows(named=True) if row["dataset"] == dataset}
    others = [question for question in asked if question.run not in over]
    return list(asked) if named or not others else others


def rows(
    table: pl.DataFrame, confirmed: Sequence[Confirmation], as_table: bool
) -> tuple[pl.DataFrame, dict[str, Any] | None]:
    """What is printed of a study's table and of confirmations: a frame, and for JSON what stands in its place.

    Args:
        table: of the study.
        as_table: for eyes, which read the claims in sentences; else the frame has the rows of both.
    """
    if not confirmed:
        return table, None
    claims = pl.concat([one.table for one in confirmed])
    whole = {"study": table.to_dicts(), "confirmation": claims.to_dicts()}
    return (table if as_table else pl.concat([table, claims], how="diagonal_relaxed")), whole
