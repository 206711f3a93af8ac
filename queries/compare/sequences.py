"""The part of `compare` that needs no tree: next tokens, and the similarity of all pairs of sites.

Next tokens are those of `predictions`: how often each model is right, and its mean loss. Similarity
is linear CKA at tokens drawn from all sequences that both runs hold. The first token of a sequence
is left out: its vector is the same in every sequence, and in many models far longer than all
others. Intervals are over sequences. Two sequences of one document are not independent: where
sequences know their document, intervals are over documents. The answers by depth of the goal, and
the transfer of a probe for an edge's source, need trees.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput
from actstore.intervals import bootstrap, sign_flip
from actstore.queries.compare.similarity import cka, cka_interval_of_rows
from actstore.queries.figures import by_site, heading, most, panels, points
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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from actstore.store import Store

NAME = "compare"
MAX_TOKENS = 2000  # compared by activations: the interval of a site takes a second
LEAST = 10  # sequences
NEXT, LOSS = "next token", "loss"  # labels
CKA = "cka"  # metric
SITES = "select short from sites where run = $run and kind in ('resid', 'vector')"
UNITS = """
    select sequence_id, if(document is null, sequence_id, min(sequence_id) over (partition by document)) as unit,
        document is not null as of_document
    from sequences where dataset = (select dataset from runs where run = $run)
"""  # unit: the first sequence of the same document, or without documents the sequence itself
HELD = f"""
-- one row per token, but the first of each sequence, that both runs hold
select token_id, unit, of_document
from tokens
join ({UNITS}) using (sequence_id)
semi join (select tree_id as sequence_id from held_trees($run)) using (sequence_id)
semi join (select tree_id as sequence_id from held_trees($other)) using (sequence_id)
where position > 0
order by token_id
"""
BOTH = f"""
-- one row per token whose next token both runs predicted
select
    token_id, unit, of_document, mine.correct as right, theirs.correct as other_right, mine.loss,
    theirs.loss as other_loss
from predictions as mine
join predictions as theirs using (token_id)
join ({UNITS}) as units on units.sequence_id = mine.sequence_id
where mine.run = $run and theirs.run = $other
order by token_id
"""
LEFT_OUT = (
    "Left out, since they are about trees, are the answers by depth and the transfer of a probe for an edge's source with its "
    "map and controls; the study `probe` asks one run about a label of your own."
)


def compare_sequences(store: Store, run: str, other: str, seed: int, progress: Progress) -> Answer:
    """Compare two runs over the same sequences; see compare/study.py for the arguments.

    Raises:
        BadInput: the runs share neither predictions nor a site, or too few sequences.
    """
    used = {"run": run, "other": other}
    both, n_units = store.sql(BOTH, used), dict[str, int]()
    rows, tests = _next_tokens(both, seed)
    if rows:
        n_units[NEXT] = both["unit"].n_unique()
    mine, theirs = (store.sql(SITES, {"run": name})["short"].to_list() for name in (run, other))
    sites = [site for site in store.sites(run) if site in mine and site in theirs]
    if not rows and not sites:
        raise BadInput(
            f"runs {run!r} and {other!r} share no site ({', '.join(mine) or 'none'}; {', '.join(theirs) or 'none'}) and no "
            "prediction: ingest the same sites of both"
        )
    of_documents = bool(both["of_document"].any())
    if sites:
        tokens = _compared_tokens(store, used, seed)
        of_documents, n_units[CKA] = bool(tokens["of_document"].any()), tokens["unit"].n_unique()
        rows += _similarities(store, used, tokens, sites, seed, progress)
    tests = list(adjusted(tests))
    params = {**used, "max_tokens": MAX_TOKENS, "n_units": n_units}
    params["units_are"] = "documents" if of_documents else "sequences"
    results = result_rows(
        [*rows, *test_rows(tests)],
        study=NAME,
        run=run,
        query=f"{BOTH};\n{HELD}",
        params=params,
        snapshot=store.snapshot,
        seed=seed,
    )
    return Answer(NAME, as_frame(results), results, sentence(results, other, tests), tuple(tests))


def _next_tokens(both: pl.DataFrame, seed: int) -> tuple[list[dict[str, Any]], list[Test]]:
    """Accuracy and loss of both runs, the differences, and a test of each difference."""
    if not len(both):
        return [], []
    about = both["unit"].to_numpy()
    right, other_right = (both[name].to_numpy().astype(np.float64) for name in ("right", "other_right"))
    rows = [
        mean_row(values, about, seed, label=NEXT, metric=metric)
        for metric, values in (
            ("accuracy", right),
            ("other_accuracy", other_right),
            ("other_less_run", other_right - right),
        )
    ]
    tests = [
        _test(
            rows[-1], other_right - right, about, seed, "right next tokens of the second model, less those of the first"
        )
    ]
    known = both.drop_nulls(["loss", "other_loss"])
    if len(known):
        about = known["unit"].to_numpy()
        loss, other_loss = (known[name].to_numpy().astype(np.float64) for name in ("loss", "other_loss"))
        for metric, values in (("loss", loss), ("other_loss", other_loss), ("other_loss_less_run", other_loss - loss)):
            low, high = _mean_interval(values, about, seed)
            ends = {"low": low, "high": high, "n": len(values)}
            rows.append({"label": LOSS, "metric": metric, "value": float(values.mean()), **ends})
        what = "loss of the second model, less that of the first"
        tests.append(_test(rows[-1], other_loss - loss, about, seed, what, points=False))
    return rows, tests


def _mean_interval(values: np.ndarray, sequences: np.ndarray, seed: int) -> tuple[float, float]:
    """The bootstrap interval of a mean of rows, over sequences."""
    _, at = np.unique(sequences, return_inverse=True)
    total, n = np.bincount(at, weights=values), np.bincount(at).astype(np.float64)
    return bootstrap(lambda counts: np.asarray(counts @ total / (counts @ n)), len(n), seed)


def _test(
    row: dict[str, Any], change: np.ndarray, sequences: np.ndarray, seed: int, what: str, points: bool = True
) -> Test:
    by_sequence = np.bincount(np.unique(sequences, return_inverse=True)[1], weights=change)
    return Test.of(row, sign_flip(by_sequence, seed), what, points=points)


def _compared_tokens(store: Store, used: dict[str, Any], seed: int) -> pl.DataFrame:
    """At most MAX_TOKENS tokens of both runs, drawn at random.

    Returns:
        The columns of HELD, and shuffled: the number of another row.

    Raises:
        BadInput: the runs share too few sequences.
    """
    tokens = store.sql(HELD, used)
    if (n_units := tokens["unit"].n_unique()) < LEAST:
        of = "documents with sequences" if tokens["of_document"].any() else "sequences"
        raise BadInput(
            f"runs {used['run']!r} and {used['other']!r} share {n_units} {of} of two tokens or more; {LEAST} are "
            "needed: ingest more"
        )
    rng = np.random.default_rng(seed)
    kept = tokens[np.sort(rng.choice(len(tokens), min(MAX_TOKENS, len(tokens)), replace=False))]
    return kept.with_columns(shuffled=rng.permutation(len(kept)))


def _similarities(
    store: Store, used: dict[str, Any], tokens: pl.DataFrame, sites: Sequence[str], seed: int, progress: Progress
) -> list[dict[str, Any]]:
    """CKA of every pair of sites; equal sites have an interval and the shuffled control."""
    ids, about, shuffled = (tokens[name].to_numpy() for name in ("token_id", "unit", "shuffled"))
    held = [{site: store.read(ids, used[which], site)[0] for site in sites} for which in ("run", "other")]
    rows: list[dict[str, Any]] = []
    for done, (site, X) in enumerate(held[0].items(), start=1):
        for other_site, Z in held[1].items():
            row = {"site": site, "label": other_site, "metric": "cka", "value": cka(X, Z), "n": len(ids)}
            if site == other_site:
                row["low"], row["high"] = cka_interval_of_rows(X, Z, about, seed)
                control = cka(X, Z[shuffled])
                rows.append({**row, "metric": "cka_shuffled", "value": control, "low": None, "high": None})
            rows.append(row)
        progress(done, len(sites), site)
    return rows


def is_of_sequences(results: pl.DataFrame) -> bool:
    """Whether results are of sequences that are no trees."""
    return "max_tokens" in json.loads(results["params"][0])


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """One row per site: CKA in equal sites; without sites, the comparison of next tokens."""
    rows: list[dict[str, Any]] = []
    for site in results.drop_nulls("site")["site"].unique(maintain_order=True):
        of_site = results.filter(site=site)
        same = of_site.filter(metric="cka", label=site).row(0, named=True)
        shuffled = of_site.filter(metric="cka_shuffled")["value"].item()
        row = {"site": site, "CKA": round(same["value"], 3), "CKA, rows shuffled": round(shuffled, 3), "n": same["n"]}
        rows.append({**row, "CKA 95 %": f"[{same['low']:.3f}, {same['high']:.3f}]"})
    if rows:
        return pl.DataFrame(rows)
    compared = results.filter(pl.col("site").is_null() & ~pl.col("metric").is_in(["p", "p_holm"]))
    return compared.select("label", "metric", "value", "low", "high", "n")


def sentence(results: pl.DataFrame, other: str, tests: Sequence[Test]) -> str:
    """Which model predicts better, how similar the sites are, and what is left out."""
    params = json.loads(results["params"][0])
    of = {what: f"{n:,} {params['units_are']}" for what, n in params["n_units"].items()}
    parts = [_predicted(results, other, tests, of.get(NEXT, ""))]
    same = results.filter((pl.col("metric") == "cka") & (pl.col("label") == pl.col("site")))
    if len(same):
        least, most = (same.sort("value", maintain_order=True).row(at, named=True) for at in (0, -1))
        shuffled = results.filter(metric="cka_shuffled")["value"].to_numpy().max()
        parts.append(
            f"At {most['n']:,} tokens of {of[CKA]}, equal sites are most alike at {most['site']} (CKA {most['value']:.3f}) and "
            f"least alike at {least['site']} ({least['value']:.3f}); shuffled rows give at most {shuffled:.3f}."
        )
    else:
        parts.append("The runs share no site with a vector per token, so their sites are not compared.")
    return " ".join(
        [*parts, LEFT_OUT, *([adjustment(tests)] if tests else []), f"The intervals are over {params['units_are']}."]
    )


def _predicted(results: pl.DataFrame, other: str, tests: Sequence[Test], of: str) -> str:
    """The next tokens of both models in words; `of` says over how many documents or sequences."""
    run, found = results["run"][0], {row["metric"]: row for row in results.iter_rows(named=True)}
    if not tests:
        return f"Runs {run!r} and {other!r} hold no predictions of the same tokens, so next tokens are not compared."
    mine, theirs = (100 * found[metric]["value"] for metric in ("accuracy", "other_accuracy"))
    text = (
        f"Of {found['accuracy']['n']:,} next tokens of {of}, {run!r} predicts {mine:.2f} % and {other!r} {theirs:.2f} %. "
        f"{_difference(tests[0], 'The second is right {} often', ('more', 'less'), 'The shares')}"
    )
    if LOSS in [test.label for test in tests]:
        text += (
            f" The mean loss is {found['loss']['value']:.3f} and {found['other_loss']['value']:.3f} nats. "
            f"{_difference(tests[1], 'That of the second is {}', ('higher', 'lower'), 'The losses')}"
        )
    return text


def _difference(test: Test, found: str, ways: tuple[str, str], what: str) -> str:
    scale, unit = (100, "points") if test.points else (1, "nats")
    numbers = f"{scale * test.estimate:+.3f} {unit}, {scale * (test.low or 0):+.3f} to {scale * (test.high or 0):+.3f}"
    if test.found:
        return f"{found.format(ways[test.estimate < 0])} ({numbers}; {p_shown(test.p_holm)})."
    return f"{what} do not differ significantly ({numbers}; {p_shown(test.p_holm)})."


def plot_sequences(results: pl.DataFrame) -> Figure:
    """Draw CKA of all pairs of sites; without sites, the accuracy of both runs."""
    params = json.loads(results["params"][0])
    run, other = results["run"][0], params["other"]
    sites = results.drop_nulls("site")["site"].unique(maintain_order=True).to_list()
    figure, (axis,) = panels(1, 2.9 if sites else 2.0)
    if not sites:
        rows = results.filter(pl.col("metric").is_in(["accuracy", "other_accuracy"]))
        points(axis, [0, 1], rows, "right next tokens", line=False)
        axis.set_xticks([0, 1], [run, other])
        axis.set_xlim(-0.5, 1.5)
        axis.set_ylabel("right next tokens (%)")
        said = f"{most(rows['n']):,} tokens; bars are 95 % intervals over {params['units_are']}"
        heading(figure, "Which model predicts better?", said)
        return figure
    grid = [[results.filter(site=site, label=of, metric="cka")["value"].item() for of in sites] for site in sites]
    draw_cka(axis, grid, sites, run, other)
    n = most(results.filter(metric="cka")["n"])
    heading(figure, "How alike are two models' layers?", f"linear CKA at {n:,} tokens of all sequences")
    return figure


def draw_cka(axis: Axes, grid: Sequence[Sequence[float]], sites: Sequence[str], run: str, other: str) -> None:
    """Draw CKA of all pairs of sites, each cell with its number.

    Args:
        grid: CKA, from 0 to 1, [site of run, site of other].
    """
    axis.grid(False)
    axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto")
    for (y, x), value in np.ndenumerate(np.array(grid, float)):
        text = f"{value:.2f}".removeprefix("0") if np.isfinite(value) else ""
        axis.text(x, y, text, ha="center", va="center", fontsize=6, color="white" if value < 0.5 else "black")
    axis.tick_params(length=0)
    by_site(axis, sites)
    axis.set_yticks(range(len(sites)), sites)
    axis.set_ylabel(f"sites of {run}")
    axis.set_xlabel(f"sites of {other}")
