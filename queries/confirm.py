"""Confirmation: a study's findings on one set of trees are tested on a second, independent set.

A claim is a test that stays significant after Holm's correction, in either direction. A claim that
is below what it has to exceed, such as a probe below its baseline, is called so and never `found`.
The study is repeated on the same model's run over the second set, which the hash of the weights
identifies. Only the claims are tested there, with Holm's correction over the claims. A claim is
confirmed if its test on the second set is significant, too, in the same direction. Trees of both
sets, by their canonical hash, are left out of the second set, so that no tree counts twice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from actstore.queries import study as studies
from actstore.queries.causes import sites_read
from actstore.queries.second import Apart, Second, runs_over
from actstore.queries.study import RUNS, Answer, Progress, Question, Test, adjusted, p_shown, result_rows, shown

if TYPE_CHECKING:
    from actstore.interventions import Patching
    from actstore.store import Store


@dataclass(frozen=True)
class Claim:
    """A finding and its test on the second set.

    Attributes:
        here: the significant test on the first set.
        there: the same test on the second set, with p_holm over all claims; None if there is no
            such test.
    """

    here: Test
    there: Test | None

    @property
    def confirmed(self) -> bool:
        """Whether the second set's test is significant, too, in the same direction."""
        return self.there is not None and self.there.significant and self.there.estimate * self.here.estimate > 0

    @property
    def verdict(self) -> str:
        """`found here, confirmed there`; a difference below its baseline is not called found."""
        here = f"below {self.here.exceeds}" if self.here.below else "found"
        return f"{here} here, {'' if self.confirmed else 'not '}confirmed there"

    @property
    def sentence(self) -> str:
        """The claim, its verdict, and the numbers of both sets."""
        there = _numbers(self.there) if self.there else "no test there"
        here, confirmed = self.verdict.split(", ")
        return f"{self.here.named}: {here} ({_numbers(self.here)}), {confirmed} ({there})."


@dataclass(frozen=True)
class Confirmation:
    """The claims of a study, tested on a second set.

    Attributes:
        study: name of the study.
        of: the run whose trees gave the claims, or both compared runs.
        second: the second set and its runs.
        n_tests: number of tests of the study.
        claims: all significant tests.
        results: rows of the table `results`, columns as in study.RESULTS; empty without claims.
    """

    study: str
    of: list[str]
    second: Second
    n_tests: int
    claims: tuple[Claim, ...]
    results: pl.DataFrame

    @property
    def sentence(self) -> str:
        """The number of confirmed claims, then one line per claim with the numbers of both sets."""
        second, who = self.second, " and ".join(map(repr, self.of))
        if not self.n_tests:
            return f"The study {self.study!r} tests nothing on {who}, so {second.dataset!r} tests no claim."
        if not self.claims:
            return (
                f"The study {self.study!r} finds nothing on {who} (of {self.n_tests} comparisons, Holm), so "
                f"{second.dataset!r} tests no claim."
            )
        n, n_put = len(self.claims), sum(claim.there is not None for claim in self.claims)
        n_confirmed, many = sum(claim.confirmed for claim in self.claims), len(second.runs) > 1
        head = (
            f"{n} comparison{'s' * (n != 1)} of {self.study!r} on {who} {'are' if n != 1 else 'is'} significant here, and "
            f"{n_confirmed} of {n} {'are' if n_confirmed != 1 else 'is'} confirmed on {second.dataset!r}. The second set has "
            f"{second.n_trees - second.n_shared:,} {second.things} that were drawn apart ({second.n_shared:,} {second.things} that "
            f"{second.first!r} also holds are left out). The test there uses the run{'s' * many} "
            f"{' and '.join(map(repr, second.runs))}, with Holm's correction over {n_put} comparison{'s' * (n_put != 1)}."
        )
        return "\n".join([head, *(claim.sentence for claim in self.claims)])

    def as_frame(self) -> pl.DataFrame:
        """One row per claim; effects of shares are in percentage points."""
        return pl.DataFrame(
            [
                {
                    "run": " and ".join(self.of),
                    "claim": claim.here.named,
                    "verdict": claim.verdict,
                    **_cells("here", self.second.first, claim.here),
                    **_cells("there", self.second.dataset, claim.there),
                }
                for claim in self.claims
            ]
        )


def _cells(where: str, dataset: str, test: Test | None) -> dict[str, Any]:
    effect, n, p = (shown(test), test.n, test.p_holm) if test else (None, None, None)
    return {where: dataset, f"effect {where}": effect, f"n {where}": n, f"p by Holm {where}": p}


def _numbers(test: Test) -> str:
    return f"{shown(test)}{' points' * test.points}, n = {test.n:,}, {p_shown(test.p_holm)}"


def confirm(
    store: Store,
    found: Answer,
    second: Second,
    seed: int = 0,
    progress: Progress | None = None,
    patch: Patching | None = None,
    **options: Any,
) -> Confirmation:
    """Test the findings of a study on a second set of trees.

    Args:
        store: an open store.
        found: the study's answer.
        second: the second set, see `second.look`.
        seed: seed of everything random.
        progress: see `study.ask`; not called without findings.
        patch: see `study.ask`.
        options: the options of the study.

    Raises:
        NotStored: no run over the second set holds the sites of the findings.
    """
    store, tests = store.whole, [test for test in found.tests if test.significant]
    options_there, sites = _again(found.name, tests)
    if found.name == "compare" and sites and "embed" in _held_by_all(store, found.of):
        sites.append("embed")  # a control of the linear map
    question = Question(found.name, found.of[0], {**options, **dict(zip(["other"], found.of[1:], strict=False))})
    second = replace(second, runs=runs_over(store, question, second.dataset, sites))
    if not tests:
        return Confirmation(found.name, found.of, second, len(found.tests), (), found.results.clear())
    given = {**question.options, **dict(zip(["other"], second.runs[1:], strict=False))}
    given |= options_there
    apart = cast("Store", Apart(store, second.first)) if second.n_shared else store
    answer = studies.ask(apart, found.name, second.runs[0], seed, progress, patch, **given)
    claims = _claims(tests, answer.tests)
    params = {**json.loads(found.results["params"][0]), "confirm": second.dataset, "runs": second.runs}
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


def _again(study: str, tests: Sequence[Test]) -> tuple[dict[str, Any], list[str]]:
    """What of a study is repeated for its claims.

    Returns:
        Options that leave out what no claim is about, and the sites that the second run has to
        hold.
    """
    sites = list(dict.fromkeys(test.site for test in tests if test.site and not test.site.startswith("pattern")))
    if study == "path-patching":
        return {"senders": sites}, sites_read(sites)
    if study == "ablate":
        hows = list(dict.fromkeys(test.label.partition(",")[0] for test in tests))
        return {"sites": sites, "how": hows}, [] if hows == ["zero"] else sites
    return {"sites": sites} if study in ("probes", "probe", "patching", "erase") else {}, sites


def _held_by_all(store: Store, runs: Sequence[str]) -> set[str]:
    """Short names of the sites that all runs hold."""
    return set.intersection(*(set(store.sites(run)) for run in runs))


def _claims(found: Sequence[Test], there: Sequence[Test]) -> tuple[Claim, ...]:
    """Pair each finding with its test on the second set; p_holm covers the claims only."""
    keys = {test.key for test in found}
    put = {test.key: test for test in adjusted(test for test in there if test.key in keys)}
    return tuple(Claim(test, put.get(test.key)) for test in found)


def _rows(claim: Claim) -> list[dict[str, Any]]:
    """Rows of `results`: `confirm_here`, `confirm_there`, their `_p` and `_p_holm`, `confirmed`."""
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
    """Leave out questions to runs over the second set, unless runs were named or none is left."""
    over = {row["run"] for row in store.sql(RUNS).iter_rows(named=True) if row["dataset"] == dataset}
    others = [question for question in asked if question.run not in over]
    return list(asked) if named or not others else others


def rows(frame: pl.DataFrame, confirmed: Sequence[Confirmation]) -> tuple[pl.DataFrame, dict[str, Any] | None]:
    """The rows of a study and of its confirmations: a frame, and the data for JSON.

    Args:
        frame: the study's frame.
        confirmed: the confirmations; without any, the data is None.
    """
    if not confirmed:
        return frame, None
    claims = pl.concat([confirmation.as_frame() for confirmation in confirmed], how="diagonal_relaxed")
    whole = {"study": frame.to_dicts(), "confirmation": claims.to_dicts()}
    return pl.concat([frame, claims], how="diagonal_relaxed"), whole
