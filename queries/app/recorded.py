"""What studies recorded: figures drawn from stored rows, and the numbers of runs side by side."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import polars as pl

from actstore.errors import NotStored, advised
from actstore.queries import study as studies
from actstore.queries.app.sequence import Grid
from actstore.queries.study import RESULTS, Answer

if TYPE_CHECKING:
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
order by run, site, token_role, try_cast(regexp_extract(label, '[0-9]+') as integer), label
"""


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


def figure(store: Store, study: str, run: str) -> str:
    """A study's figure as SVG, drawn from what it recorded.

    Raises:
        NotStored: see `answer_of`; or the rows are not enough for the study's figure.
    """
    answer = answer_of(store, study, run)
    buffer = io.StringIO()
    try:
        studies.plot(answer).savefig(buffer, format="svg")
    except Exception as error:  # rows of another version of the study
        raise NotStored(f"the figure of {study} cannot be drawn from its rows of run {run!r} ({error})") from error
    return buffer.getvalue()


def metrics(store: Store, study: str) -> list[str]:
    """The metrics of a study: accuracy first, then the most frequent."""
    query = """select metric from latest_results where study = $study and metric <> 'direction'
        and not starts_with(metric, 'confirm') group by metric order by metric <> 'accuracy', count(*) desc, metric"""
    return store.sql(query, {"study": study})["metric"].to_list()


def beside(store: Store, study: str, metric: str) -> pl.DataFrame:
    """A study's numbers, a column per run.

    Returns:
        site, token_role and label, where the study has them, then a text `value [low, high]` per
        run.
    """
    rows = store.sql(BESIDE, {"study": study, "metric": metric})
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
