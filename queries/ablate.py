"""The study `ablate`: how much worse the answers are without what a layer writes at some tokens.

The output of the attention or of the MLP of a layer, or of a head, is taken away at all tokens of
a role. It becomes 0 (`zero`), the mean over the role's tokens (`mean`), or the activation at the
same position of another random tree whose path is no shorter (`resample`). The loss is the run's
stored probability of the right step less that of the edited run, on the same steps of the same
trees. Each loss is tested by sign flips over trees, with Holm's correction over all cells. The
control is `resample` with the tree itself as donor, which must change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.arrays.address import POSITIONS_PER_TREE
from actstore.errors import BadInput
from actstore.intervals import change_over_trees, sign_flip
from actstore.interventions import Edit
from actstore.queries.causes import (
    ENDS,
    MOST,
    ROLES,
    TOKENS,
    answered,
    by_tree,
    check_stored,
    log,
    mean_over_trees,
    roles_of,
    shape_of,
    sites_of,
    some,
)
from actstore.queries.figures import FRAMED, colour_bar, entitle, heading, heat, maps, most
from actstore.queries.last_edge import interval
from actstore.queries.study import (
    Answer,
    Progress,
    Test,
    adjusted,
    adjustment,
    chosen,
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

NAME = "ablate"
FAMILIES = {"attn_out": "attention", "mlp_out": "MLP", "z": "head"}
HOWS = ("zero", "mean", "resample")
LISTED = 12  # rows of the table
CONTROL = "control: itself"


@dataclass(frozen=True)
class Cell:
    """What is taken away, where and how; `head` None for a whole site."""

    site: str
    head: int | None
    role: str
    how: str

    @property
    def label(self) -> str:
        """`zero`, or `zero, head 1`."""
        return self.how if self.head is None else f"{self.how}, head {self.head}"

    def edit(self, tokens: pl.DataFrame) -> Edit:
        """The edit of some tokens, which have a donor each."""
        rows = tokens.filter(role=self.role).select("token_id", *(["donor_token_id"] if self.how == "resample" else []))
        rows = rows.drop_nulls()
        if self.head is not None:
            rows = rows.with_columns(head=pl.lit(self.head, pl.Int64))
        how = "replace" if self.how == "resample" else self.how
        return Edit("from rows", self.site, how, tables={"rows": rows})


def study(
    store: Store,
    run: str,
    seed: int,
    progress: Progress,
    patch: Patching,
    sites: str | Sequence[str] = "attn_out,mlp_out",
    roles: str | Sequence[str] = "all",
    how: str | Sequence[str] = "all",
    trees: int = 500,
) -> Answer:
    """Ablate sites, role by role.

    Args:
        store: an open store.
        run: a run over whole tasks.
        seed: seed of the trees, donors, sign flips and bootstrap.
        progress: called after each cell and each control.
        patch: runs edits.
        sites: families (`attn_out`, `mlp_out`, and `z`, which is ablated head by head) or sites
            (`z.3`).
        roles: some of ROLES.
        how: some of HOWS.
        trees: number of trees, drawn from the run's.

    Raises:
        NotStored: the run has no answers, or lacks sites that `mean` and `resample` read.
        BadInput: an option has no meaning, or there are so many cells that none could be found.
    """
    n_layers, n_heads = shape_of(store, run)
    named, hows = sites_of(sites, list(FAMILIES), n_layers), chosen(how, HOWS, "how")
    asked = roles_of(roles)
    if hows != ["zero"]:
        check_stored(store, run, named, n_layers, "; `-o how zero` reads none of them")
    steps = answered(store, run)
    rng = np.random.default_rng(seed)
    drawn = some(steps["tree_id"].unique().to_numpy(), trees, rng)
    tokens = with_donors(store.sql(TOKENS, {"trees": drawn.tolist()}), steps, rng)
    steps = steps.filter(pl.col("tree_id").is_in(drawn))
    there = [role for role in asked if role in tokens["role"]]
    cells = [
        Cell(site, head, role, way)
        for site, role, way in product(named, there, hows)
        for head in (range(n_heads) if site.startswith("z.") else [None])
    ]
    if not 0 < len(cells) <= MOST:
        raise BadInput(
            f"got {len(cells)} cells to test, of which 1 to {MOST} can be; name other sites, roles or how (-o)"
        )
    controls = named if hows != ["zero"] else []
    total, rows, tests = len(cells) + len(controls), [], []
    for done, cell in enumerate(cells, start=1):
        after = patch(run, [cell.edit(tokens)])
        of_cell, test = compared(cell, steps.join(after, on="token_id", suffix="_after", maintain_order="left"), seed)
        rows += of_cell
        tests.append(test)
        progress(done, total, f"{cell.site} {cell.role} {cell.label}")
    for done, site in enumerate(controls, start=len(cells) + 1):
        itself = Edit(
            "select token_id, token_id as donor_token_id from rows",
            site,
            tables={"rows": tokens.filter(pl.col("role").is_in(there))},
        )
        rows += unchanged(site, steps.join(patch(run, [itself]), on="token_id", suffix="_after"))
        progress(done, total, f"{site} control")
    tests = list(adjusted(tests))
    params = {"run": run, "trees": trees, "sites": named, "roles": there, "how": hows}
    results = result_rows(
        [*rows, *test_rows(tests)], study=NAME, run=run, query=TOKENS, params=params, snapshot=store.snapshot, seed=seed
    )
    return Answer(NAME, as_frame(results), results, sentence(results, tests), tuple(tests))


def with_donors(tokens: pl.DataFrame, steps: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """Tokens with donor_token_id: the token at their position of another random tree.

    A tree has one donor, whose path is no shorter. The only tree of the largest depth has none.

    Args:
        tokens: columns token_id and tree_id.
        steps: see `causes.answered`; the donors are drawn from its trees.
    """
    every = steps.select("tree_id", "depth").unique().sort("depth", "tree_id")
    depth, ids = every["depth"].to_numpy(), every["tree_id"].to_numpy()
    first = np.searchsorted(depth, depth)  # the first tree that is as deep
    n_others, place = len(ids) - first - 1, np.arange(len(ids))
    donor = first + (rng.random(len(ids)) * n_others).astype(np.intp)
    donor = (donor + (donor >= place)).clip(max=len(ids) - 1)  # any of them but the tree itself
    pairs = pl.DataFrame({"tree_id": ids, "donor": ids[donor]}).filter(n_others > 0)
    pairs = pairs.cast({"tree_id": tokens.schema["tree_id"]})
    moved = (pl.col("donor").cast(pl.Int64) - pl.col("tree_id")) * POSITIONS_PER_TREE
    return tokens.join(pairs, on="tree_id", how="left", maintain_order="left").with_columns(
        donor_token_id=pl.col("token_id") + moved
    )


def compared(cell: Cell, both: pl.DataFrame, seed: int) -> tuple[list[dict[str, Any]], Test]:
    """The rows of a cell, and its test.

    Args:
        both: the edited steps before and after.
    """
    trees, about = both["tree_id"].to_numpy(), {"site": cell.site, "token_role": cell.role, "label": cell.label}
    p = (both["p_target"].cast(pl.Float64) - both["p_target_after"].cast(pl.Float64)).to_numpy()
    right = (both["correct"].cast(pl.Float64) - both["correct_after"].cast(pl.Float64)).to_numpy()
    rows: list[dict[str, Any]] = []
    for metric, drop in (("p_drop", p), ("accuracy_drop", right)):
        low, high = change_over_trees(drop, trees)
        rows.append({**about, "metric": metric, "value": float(drop.mean()), "low": low, "high": high, "n": len(both)})
    rise = mean_over_trees(log(both["p_target"]) - log(both["p_target_after"]), trees, seed)
    rows.append({**about, "metric": "loss_rise", **dict(zip(ENDS, rise, strict=True)), "n": len(both)})
    return rows, Test.of(rows[0], sign_flip(by_tree(p, trees), seed), f"p of the right step lost to {cell.label}")


def unchanged(site: str, both: pl.DataFrame) -> list[dict[str, Any]]:
    """The rows of a control: the largest change of a probability, and how many answers changed."""
    change = (both["p_target"] - both["p_target_after"]).abs().max()
    n_other = int((both["predicted"] != both["predicted_after"].cast(pl.String)).sum())
    found = {"largest_change": change, "other_answers": n_other}
    return [
        {"site": site, "label": CONTROL, "metric": metric, "value": value, "n": len(both)}
        for metric, value in found.items()
    ]


def as_frame(results: pl.DataFrame) -> pl.DataFrame:
    """The cells with the largest changes of the right step's probability, in percentage points."""
    by_key = dict(iter(results.group_by("site", "token_role", "label")))
    largest = results.filter(metric="p_drop").sort(pl.col("value").abs(), descending=True, maintain_order=True)
    rows = []
    changed = largest.filter(pl.col("value") != 0)
    for row in (changed if len(changed) else largest).head(LISTED).iter_rows(named=True):
        found = {
            other["metric"]: other
            for other in by_key[row["site"], row["token_role"], row["label"]].iter_rows(named=True)
        }
        rows.append(
            {
                "site": row["site"],
                "tokens": row["token_role"],
                "becomes": row["label"],
                "p lost, points": interval(row),
                "Holm": p_shown(found["p_holm"]["value"]),
                "accuracy lost": interval(found["accuracy_drop"]),
                "loss, nats": round(found["loss_rise"]["value"], 4),
                "steps": row["n"],
            }
        )
    return pl.DataFrame(rows)


def sentence(results: pl.DataFrame, tests: Sequence[Test]) -> str:
    """The cells that the answers need, the largest first, and the control."""
    first = results.row(0, named=True)
    worse = sorted((test for test in tests if test.found and test.estimate > 0), key=lambda test: -test.estimate)
    better = [test for test in tests if test.found and test.estimate < 0]
    text = (
        f"Run {first['run']!r} loses probability of the right step significantly in {len(worse)} of {len(tests)} cells of site, "
        f"role and kind of ablation"
    )
    if worse:
        most = worse[0]
        text += (
            f", most at {most.site}, {most.token_role}, {most.label}: {shown(most)} points (n = {most.n:,} steps, "
            f"{p_shown(most.p_holm)})"
        )
    text += f"; it gains some in {len(better)}."
    control = results.filter(label=CONTROL)
    if len(control):
        most_changed = max(control.filter(metric="largest_change")["value"].to_list())
        n_other = int(control.filter(metric="other_answers")["value"].sum())
        text += (
            f" With each tree as its own donor (the control), {n_other} answers change, and no probability by more than "
            f"{most_changed:.1g}."
        )
    else:
        text += " No control was run, since `zero` reads no donor."
    return f"{text} {adjustment(tests)}"


def plot(answer: Answer) -> Figure:
    """Heat maps of the probability lost, layer × role, one per kind and part."""
    found = answer.results.filter(metric="p_drop").with_columns(
        how=pl.col("label").str.split(", ").list.first(),
        part=pl.concat_str(
            pl.col("site").str.split(".").list.first().replace(FAMILIES),
            pl.col("label").str.extract(r" (head \d+)"),
            ignore_nulls=True,
        ),
        layer=pl.col("site").str.split(".").list.last().cast(pl.Int64),
    )
    hows = [how for how in HOWS if how in found["how"]]
    parts, roles = (
        found["part"].unique(maintain_order=True).to_list(),
        [role for role in ROLES if role in found["token_role"]],
    )
    layers, largest = sorted(found["layer"].unique()), max(1e-3, *found["value"].abs().to_list())
    framed = significant(answer.results)
    pairs = [(how, part) for how in hows for part in parts]
    figure, axes = maps([len(layers)] * len(pairs))
    for axis, (how, part) in zip(axes, pairs, strict=True):
        cells = found.filter(how=how, part=part)
        shown_at = {(row["layer"], row["token_role"]): row for row in cells.iter_rows(named=True)}
        values = [
            [shown_at[layer, role]["value"] if (layer, role) in shown_at else None for role in roles]
            for layer in layers
        ]
        marked = [
            [
                (layer, role) in shown_at
                and (shown_at[layer, role]["site"], role, shown_at[layer, role]["label"]) in framed
                for role in roles
            ]
            for layer in layers
        ]
        image = heat(axis, values, marked, roles, layers, largest)
        entitle(axis, f"{part}, {how}")
    colour_bar(figure, image, axes, "probability of the right step lost (points)")
    heading(
        figure,
        "What the answers need at the tokens of a role",
        f"run {answer.results['run'][0]}; up to {most(found['n']):,} steps per cell; {FRAMED}",
    )
    return figure
