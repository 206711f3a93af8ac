"""What studies recorded: figures drawn from stored rows, and the numbers of runs side by side."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from actstore.errors import NotStored, advised
from actstore.queries import study as studies
from actstore.queries.app.sequence import Grid
from actstore.queries.figures import style
from actstore.queries.study import RESULTS, Answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.store import Store

LISTED = """
select study, run, max(recorded) as recorded, count(*) as numbers
from results where not starts_with(metric, 'confirm') group by all order by study, run
"""
ROWS = """
select * from results where study = $study and run = $run and not starts_with(metric, 'confirm')
  and recorded = (
    select max(recorded) from results where study = $study and run = $run and not starts_with(metric, 'confirm')
  )
order by rowid
"""
BESIDE = """
select run, site, token_role, label, value, low, high, n from latest_results
where study = $study and metric = $metric
"""
NUMBER = re.compile(r"(\d+)")


def listed(store: Store) -> pl.DataFrame:
    """One row per study and run with results: study, run, recorded, numbers."""
    return store.sql(LISTED)


def answer_of(store: Store, study: str, run: str) -> Answer:
    """The last recorded answer of a study, without its sentence and its tests.

    Raises:
        NotStored: the study recorded nothing of this run.
    """
    rows = store.sql(ROWS, {"study": study, "run": run})
    if not len(rows):
        command = advised("study", store.path, study, "--run", run)
        raise NotStored(f"the study {study!r} recorded nothing of run {run!r}; ask it by {command}")
    return Answer(study, pl.DataFrame(), rows.select(list(RESULTS)), "")


def figures(store: Store, study: str, runs: Sequence[str]) -> list[str | NotStored]:
    """A study's figures of several runs, drawn from what it recorded, on one scale.

    Returns:
        The figure of each run as SVG; an error where nothing is recorded, or where the rows are not
        enough for the study's figure.
    """
    drawn: list[Figure | NotStored] = []
    for run in runs:
        try:
            drawn.append(studies.plot(answer_of(store, study, run)))
        except NotStored as error:
            drawn.append(error)
        except Exception as error:  # rows of another version of the study
            drawn.append(NotStored(f"the figure of {study} cannot be drawn from its rows of run {run!r} ({error})"))
    with style():
        _on_one_scale([figure for figure in drawn if not isinstance(figure, NotStored)])
        return [figure if isinstance(figure, NotStored) else _svg(figure) for figure in drawn]


def _on_one_scale(drawn: Sequence[Figure]) -> None:
    """Give panels in one place of several figures one range of y; not so maps and marked panels."""
    if len({len(figure.axes) for figure in drawn}) != 1:
        return
    for axes in zip(*(figure.axes for figure in drawn), strict=True):
        if any(axis.images or axis.texts or axis.get_subplotspec() is None for axis in axes):  # the last: a colour bar
            continue
        ends = np.array([axis.get_ylim() for axis in axes])
        ticks = axes[int(np.argmax(ends[:, 1] - ends[:, 0]))].get_yticks()
        for axis in axes:
            axis.set_yticks(ticks)
            axis.set_ylim(ends.min(), ends.max())


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def metrics(store: Store, study: str) -> list[str]:
    """The metrics of a study: accuracy first, then the most frequent, and p last."""
    query = """select metric from latest_results where study = $study and metric <> 'direction'
        and not starts_with(metric, 'confirm') group by metric 
        order by metric <> 'accuracy', metric in ('p', 'p_holm'), count(*) desc, metric"""
    return store.sql(query, {"study": study})["metric"].to_list()


def beside(store: Store, study: str, metric: str) -> pl.DataFrame:
    """A study's numbers, a column per run.

    Returns:
        site, token_role and label, where the study has them, then a text `value [low, high]` per
        run.
    """
    rows = store.sql(BESIDE, {"study": study, "metric": metric})
    names = rows.select("run", "site", "token_role", "label").rows()
    rows = rows[sorted(range(len(rows)), key=lambda row: [_natural(name) for name in names[row]])]
    shown = [
        f"{value:.4g}" + (f" [{low:.4g}, {high:.4g}]" if low is not None and high is not None else "")
        if value is not None
        else ""
        for value, low, high in rows.select("value", "low", "high").iter_rows()
    ]
    keys = [key for key in ("site", "token_role", "label") if rows[key].null_count() < len(rows)]
    table = rows.select(*keys, "run").with_columns(value=pl.Series(shown, dtype=pl.String))
    if not keys:
        return table
    return table.pivot("run", index=keys, values="value", aggregate_function="last")


def _natural(name: str | None) -> list[tuple[str, int]]:
    """A name's place in an order in which resid_post.10 comes after resid_post.2."""
    parts = NUMBER.split(name or "")
    return [("", int(part)) if turn % 2 else (part, 0) for turn, part in enumerate(parts)]


def probe_grid(store: Store, study: str, run: str) -> tuple[Grid, list[str]] | None:
    """Accuracy by label and site, for studies of probes.

    Returns:
        A grid with a row per label, and its columns' names, sites; None if the study recorded no
        accuracy of sites.
    """
    found = answer_of(store, study, run).results.filter(metric="accuracy").drop_nulls(["site", "value"])
    if not len(found):
        return None
    held = store.sites(run)
    sites = sorted(found["site"].unique(), key=lambda site: held.index(site) if site in held else len(held))
    numbers = {tuple(key): value for *key, value in found.select("token_role", "label", "site", "value").iter_rows()}
    asked = found.select("token_role", "label").unique(maintain_order=True).rows()[::-1]
    shares = [[numbers.get((*row, site)) for site in sites] for row in asked]
    grid = Grid(
        sites=[f"{label}, {role}" if role else str(label) for role, label in asked],
        positions=list(range(len(sites))),
        shares=shares,
        words=[["" if share is None else f"{100 * share:.1f}" for share in row] for row in shares],
        marked=[[False] * len(sites) for _ in asked],
        dim=[False] * len(sites),
        said=f"Accuracy of the probes of run {run}, in %",
    )
    return grid, sites
