"""One page of all studies: every study that a store can answer, of every run over drawn trees, figures and lineage included.

The page holds everything it needs, so it can be sent and read without a network.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

import actstore
from actstore.errors import BadInput, NotStored
from actstore.queries import study as studies
from actstore.queries.study import Progress, Study

if TYPE_CHECKING:
    from actstore.store import Store

TITLES = {
    "depth": "How does accuracy fall with the goal's depth?",
    "last-edge": "What if the path goes through the last edge: does performance drop?",
    "swap": "The same tree, its edges listed in another order",
    "dreams": "Do the models dream of goals of their own?",
    "attention": "What do an edge's tokens look at?",
    "probes": "Where can an edge's nodes be read by a linear probe?",
    "compare": "Two models on the same trees",
}
LINEAGE = """
select run, dataset, models.model, models.system, runs.weights_sha256, runs.versions, distribution, datasets.seed, datasets.n_trees
from runs join models using (weights_sha256) join datasets using (dataset) where run = $run
"""


@dataclass(frozen=True)
class Answer:
    """A study of a run: its answer, or the line that says what the store lacks for it."""

    name: str
    run: str
    study: Study | None
    lacks: str = ""


def report(
    store: Store, out: str | Path, runs: Sequence[str] | None = None, seed: int = 0, progress: Progress | None = None
) -> tuple[Path, list[Study]]:
    """Run every study and write OUT/index.html.

    Args:
        store: an open store.
        out: a folder, made if need be.
        runs: which; every run over drawn trees unless told.
        seed: of everything random.
        progress: called with (studies done, studies in all, the one just done).

    Returns:
        The page, and the studies that were answered, to be recorded.

    Raises:
        NotStored: there is no run over drawn trees, or none of that name.
    """
    asked = [
        (name, run)
        for name in TITLES
        for run in studies.task_runs(store, name)
        if runs is None or run in [store.run(one) for one in runs]
    ]
    answers = []
    for done, (name, run) in enumerate(asked, start=1):
        try:
            answers.append(Answer(name, run, studies.run(store, name, run=run, seed=seed)))
        except (NotStored, BadInput) as error:
            answers.append(Answer(name, run, None, str(error)))
        if progress:
            progress(done, len(asked), f"{name} {run}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    page.write_text(render(store, answers, seed), encoding="utf-8")
    return page, [answer.study for answer in answers if answer.study]


def render(store: Store, answers: Sequence[Answer], seed: int) -> str:
    """The page, as HTML that needs nothing else."""
    escape = html.escape
    name = escape(store.path.resolve().name)
    parts = [HEAD.replace("TITLE", name), f"<h1>Studies over {name}</h1>"]
    parts.append(
        f"<p>Snapshot {store.snapshot}, seed {seed}, actstore {escape(actstore.__version__)}. Each number stands in the store's "
        "table <code>results</code> with the query that made it, and comes out the same when the page is made again.</p>"
    )
    names = [study for study in TITLES if any(answer.name == study for answer in answers)]
    parts.append(
        "<nav><ul>"
        + "".join(f'<li><a href="#{study}">{escape(TITLES[study])}</a></li>' for study in names)
        + "</ul></nav>"
    )
    for study in names:
        parts.append(f'<section id="{study}"><h2>{escape(TITLES[study])}</h2>')
        parts += [_answer(store, answer) for answer in answers if answer.name == study]
        parts.append("</section>")
    parts.append(_runs(store, sorted({answer.run for answer in answers})))
    return "\n".join([*parts, "</body></html>", ""])


def _answer(store: Store, answer: Answer) -> str:
    run = html.escape(answer.run)
    if answer.study is None:
        return f'<h3>{run}</h3><p class="lacks">Not answered: {html.escape(answer.lacks)}</p>'
    first = answer.study.results.row(0, named=True)
    params = json.dumps(json.loads(first["params"]), indent=1, sort_keys=True)
    return (
        f"<h3>{run}</h3><p>{html.escape(answer.study.sentence)}</p>{_figure(answer.study)}"
        f'<div class="wide">{_table(answer.study.table)}</div>'
        f"<details><summary>How it was made</summary><pre>{html.escape(first['query'])}</pre>"
        f"<pre>{html.escape(params)}</pre></details>"
    )


def _figure(answer: Study) -> str:
    buffer = io.BytesIO()
    studies.plot(answer).savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    alternative = html.escape(f"Figure of the study {answer.name}: {answer.sentence}", quote=True)
    return f'<img alt="{alternative}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _table(frame: pl.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in frame.columns)
    numeric = [dtype.is_numeric() for dtype in frame.dtypes]
    rows = []
    for row in frame.iter_rows():
        cells = (
            f"<td{' class=number' if right else ''}>{html.escape(_shown(value))}</td>"
            for value, right in zip(row, numeric, strict=True)
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _runs(store: Store, runs: Sequence[str]) -> str:
    lineage = pl.concat([store.sql(LINEAGE, {"run": run}) for run in runs])
    return f'<section id="runs"><h2>Runs</h2><div class="wide">{_table(lineage)}</div></section>'


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Studies over TITLE</title>
<style>
  body { font: 16px/1.55 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
  h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; }
  img { max-width: 100%; height: auto; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; }
  th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
  td.number { text-align: right; font-variant-numeric: tabular-nums; }
  pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem; }
  .lacks { color: #8a3b00; }
  @media print { details { display: none; } section { break-inside: auto; } img { break-inside: avoid; } }
</style></head><body>"""
