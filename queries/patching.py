"""The study `patching`: which activations carry the answer from a donor tree into another?

At one site, the activations of all tokens of a role are replaced by those at the same positions of
a donor tree whose first step is another. The logit difference is log p(clean first step) less log
p(corrupted first step), at the root's token. The recovered share is (patched - corrupted) / (clean
- corrupted): 1 is the clean tree's own answer, 0 the corrupted tree's.

Trees of a pair differ in more than the answer, so a donor that the model cannot use changes the
answer, too. The control is a third tree with the edited tree's root and first step, as donor. A
cell is tested beyond this control, pair by pair, by sign flips, with Holm's correction over all
cells. A second control takes each tree as its own donor, which must recover everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput, nearest
from actstore.intervals import sign_flip
from actstore.interventions import Edit
from actstore.queries.causes import ENDS, check_stored, mean_over_trees, roles_of, shape_of, sites_of
from actstore.queries.figures import FRAMED, colour_bar, entitle, heading, heat, maps, most
from actstore.queries.pairs import BEFORE, DIRECTIONS, Contrast, pairs_of
from actstore.queries.study import (
    Answer,
    Progress,
    Test,
    adjusted,
    adjustment,
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

NAME = "patching"
FAMILIES = {"resid_post": "residual stream", "attn_out": "attention", "mlp_out": "MLP"}
LISTED = 12  # rows of the table
CONTROL = "control: itself"
WHAT = "the donor's answer, beyond a donor with the edited tree's own"


def study(
    store: Store,
    run: str,
    seed: int,
    progress: Progress,
    patch: Patching,
    sites: str | Sequence[str] = "all",
    roles: str | Sequence[str] = "all",
    direction: str = "noise",
    pairs: str | Path | None = None,
    trees: int = 200,
) -> Answer:
    """Patch sites, role by role, with the activations of donor trees.

    Args:
        store: an open store.
        run: a run over whole tasks.
        seed: seed of the pairs, sign flips and bootstrap.
        progress: called after each cell and each control.
        patch: runs edits.
        sites: families (see FAMILIES) or sites (`attn_out.3`).
        roles: some of BEFORE.
        direction: `noise`, where the clean tree gets the corrupted tree's activation, or `denoise`.
        pairs: see `pairs.pairs_of`.
        trees: at most so many pairs.

    Raises:
        NotStored: the run has no answers, or lacks a site.
        BadInput: an option has no meaning, or there are too few pairs.
    """
    check_direction(direction)
    n_layers, _ = shape_of(store, run)
    named, asked = sites_of(sites, list(FAMILIES), n_layers), roles_of(roles, BEFORE)
    check_stored(store, run, named, n_layers)
    chosen, query = pairs_of(store, run, pairs, trees, direction, np.random.default_rng(seed))
    contrast = Contrast(store, run, patch, chosen, named[0])
    cells, rows, tests = list(product(named, asked)), [], []
    for done, (site, role) in enumerate(cells, start=1):
        tokens = contrast.tokens(role)
        moved, control = (contrast.moved([_edit(site, tokens, donor)]) for donor in ("donor", "same"))
        about = {"site": site, "token_role": role, "label": direction}
        of_cell, test = compared(about, contrast, moved, control, seed)
        rows += of_cell
        tests.append(test)
        progress(done, len(cells) + len(named), f"{site} {role}")
    for done, site in enumerate(named, start=len(cells) + 1):
        moved = contrast.moved([_edit(site, contrast.tokens(), "token_id")])
        rows.append(
            {
                "site": site,
                "label": CONTROL,
                "metric": "largest_share",
                "value": float(np.abs(moved).max()),
                "n": len(moved),
            }
        )
        progress(done, len(cells) + len(named), f"{site} control")
    tests = list(adjusted(tests))
    params = {
        "run": run,
        "trees": trees,
        "sites": named,
        "roles": asked,
        "direction": direction,
        "left_out": contrast.n_left_out,
    }
    results = result_rows(
        [*rows, *test_rows(tests)], study=NAME, run=run, query=query, params=params, snapshot=store.snapshot, seed=seed
    )
    return Answer(NAME, as_frame(results), results, sentence(results, tests, contrast.n_left_out), tuple(tests))


def check_direction(direction: str) -> None:
    """Refuse a direction that does not exist."""
    if direction not in DIRECTIONS:
        raise BadInput(
            f"no direction {direction!r}{nearest(str(direction), DIRECTIONS)}; there are {', '.join(DIRECTIONS)}"
        )


def _edit(site: str, tokens: pl.DataFrame, donor: str) -> Edit:
    """Every token gets the activation of its counterpart in `donor`."""
    rows = tokens.select("token_id", donor_token_id=pl.col(donor))
    return Edit("from rows", site, tables={"rows": rows})


def compared(
    about: dict[str, Any], contrast: Contrast, moved: np.ndarray, control: np.ndarray, seed: int, what: str = WHAT
) -> tuple[list[dict[str, Any]], Test]:
    """The rows of a cell, and its test: the share moved beyond the control, pair by pair.

    Args:
        about: site, token_role and label; the label begins with the direction.
        moved, control: float64 [n_pairs], shares moved by the donor and by `same`.
        what: the test in words.
    """
    back, pairs = about["label"].startswith("noise"), contrast.pairs["tree_id"].to_numpy()
    measured = {
        "recovered": 1 - moved if back else moved,
        "recovered_control": 1 - control if back else control,
        "moved_beyond_control": moved - control,
    }
    rows = [
        {
            **about,
            "metric": metric,
            **dict(zip(ENDS, mean_over_trees(values, pairs, seed), strict=True)),
            "n": len(values),
        }
        for metric, values in measured.items()
    ]
    p = sign_flip(measured["moved_beyond_control"], seed)
    return rows, Test.of(rows[2], p, what, exceeds="that of a donor with the same answer")


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """The cells that move most of the answer beyond their control, in percent."""
    by_key = dict(iter(results.group_by("site", "token_role", "label")))
    largest = results.filter(metric="moved_beyond_control").sort("value", descending=True, maintain_order=True)
    moving = largest.filter(pl.col("value") != 0)
    rows = []
    for row in (moving if len(moving) else largest).head(LISTED).iter_rows(named=True):
        found = {
            other["metric"]: other
            for other in by_key[row["site"], row["token_role"], row["label"]].iter_rows(named=True)
        }
        rows.append(
            {
                "site": row["site"],
                "tokens": row["token_role"],
                "recovered %": percent(found["recovered"]),
                "same answer %": percent(found["recovered_control"]),
                "Holm": p_shown(found["p_holm"]["value"]),
                "moved beyond it %": percent(row),
                "pairs": row["n"],
            }
        )
    return pl.DataFrame(rows)


def percent(row: dict[str, Any]) -> str:
    """`12.3 [10.1, 14.2]`; without ends the value alone."""
    ends = "" if row["low"] is None else f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    return f"{100 * row['value']:.1f}{ends}"


def sentence(results: pl.DataFrame, tests: Sequence[Test], n_left_out: int) -> str:
    """The cells that carry the answer, the first and the largest, and the controls."""
    first, n_pairs = results.row(0, named=True), tests[0].n
    found = sorted((test for test in tests if test.found), key=lambda test: -test.estimate)
    text = (
        f"Over {n_pairs:,} pairs of trees, {len(found)} of {len(tests)} cells of site and role carry the first step of the donor "
        f"into run {first['run']!r} significantly, beyond a donor with the same first step"
    )
    if found:
        most = found[0]
        text += f", most at {most.site}, {most.token_role}: {shown(most)} percent of the logit difference ({p_shown(most.p_holm)})"
    text += f"; {n_left_out} pairs are left out, whose logit differences are too close."
    own = max(results.filter(metric="largest_share")["value"].to_list())
    text += f" With each tree as its own donor, the share changes by at most {own:.1g} (the control)."
    return f"{text} {adjustment(tests)}"


def plot(answer: Answer) -> Figure:
    """Heat maps, layer × role: what the donor moves, and what it moves beyond its control."""
    results = answer.results.with_columns(
        family=pl.col("site").str.split(".").list.first(), layer=pl.col("site").str.split(".").list.last()
    )
    families = [family for family in FAMILIES if family in results["family"]]
    roles = [role for role in BEFORE if role in results["token_role"]]
    layers = sorted(results["layer"].unique(), key=int)
    back = results["label"][0] == "noise"
    framed = {(site, role) for site, role, _ in significant(results, "moved_beyond_control")}
    metrics = ("recovered", "moved_beyond_control")
    drawn = [(metric, family) for metric in metrics for family in families]
    figure, axes = maps([len(layers)] * len(drawn))
    for axis, (metric, family) in zip(axes, drawn, strict=True):
        rows = results.filter(family=family, metric=metric).select("layer", "token_role", "value").rows()
        turned = metric == "recovered" and back
        value = {(layer, role): 1 - share if turned else share for layer, role, share in rows}
        values = [[value.get((layer, role)) for role in roles] for layer in layers]
        beyond = metric != "recovered"
        marked = [[beyond and (f"{family}.{layer}", role) in framed for role in roles] for layer in layers]
        image = heat(axis, values, marked, roles, layers, 1.0)
        entitle(axis, f"{FAMILIES[family]}{', beyond a donor with the same answer' * beyond}")
    colour_bar(figure, image, axes, "logit difference moved to the donor's answer (%)")
    heading(
        figure,
        "What carries the first step",
        f"run {answer.results['run'][0]}; up to {most(results.filter(metric='recovered')['n']):,} pairs per cell; {FRAMED}",
    )
    return figure
