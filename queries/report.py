"""One HTML page of every study of every run over drawn trees, with figures and lineage.

The page is self-contained: it can be sent, and read without a network.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import polars as pl

from actstore.errors import advised
from actstore.outputs import check_file, write_text
from actstore.queries import study as studies
from actstore.queries.confirm import of_other_sets
from actstore.queries.studies import Asked, draw, look, put
from actstore.queries.study import Answer, Progress
from actstore.version import __version__

if TYPE_CHECKING:
    from actstore.store import Store

PAGE = "index.html"
LONGEST_LINE = 40  # characters of a table's cell; a longer text is wrapped, and a number or an interval never is
TITLES = {
    "depth": "How does accuracy fall with the goal's depth?",
    "last-edge": "Does performance drop if the path goes through the last edge?",
    "swap": "Does the answer change if edges of the same tree are listed in another order?",
    "dreams": "Does a model make up goals if it is given a tree alone?",
    "attention": "What do the tokens of an edge attend to?",
    "probes": "At which sites can a linear probe read the nodes of an edge?",
    "compare": "How do two models differ on the same trees?",
}
LINEAGE = """
select run, dataset, models.model, models.system, runs.weights_sha256, runs.versions, distribution, datasets.seed, datasets.n_trees
from runs join models using (weights_sha256) join datasets using (dataset) where run = $run
"""


@dataclass(frozen=True)
class Report:
    """A written page and its questions."""

    page: Path
    asked: list[Asked]

    @property
    def answers(self) -> list[Answer]:
        """The answers on the page."""
        return [asked.answer for asked in self.asked if asked.answer]

    @property
    def faults(self) -> list[str]:
        """Faults, one line each."""
        return [f"{asked.question.study} {asked.question.of}: {_fault(asked)}" for asked in self.asked if asked.fault]

    def __str__(self) -> str:
        counts = {
            "answered": len(self.answers),
            "tested again on the second set": sum(bool(asked.confirmation) for asked in self.asked),
            "lacking something": sum(bool(asked.lacks) for asked in self.asked),
            "failed": len(self.faults),
        }
        counted = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        return f"{self.page}: of {len(self.asked)} questions {counted}"


def report(
    store: Store,
    out: str | Path,
    runs: Sequence[str] | None = None,
    seed: int = 0,
    confirm: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run every study and write OUT/index.html, atomically.

    A study without an answer is on the page with the reason.

    Args:
        store: an open store.
        out: a folder, which is made if missing.
        runs: names of runs; default: every run over drawn trees, with each pair of models compared.
        seed: seed of everything random.
        confirm: name of a second set of trees that tests the findings, see `confirm.confirm`; the
            page gives the reason where a study cannot be tested there.
        progress: called with (questions done, questions in all, the question just done).

    Raises:
        NotStored: there is no such run, or no run over drawn trees; or the second set can test no
            study.
        BadInput: the page cannot be written there, or would lie in a store; or the second set fits
            no study.
    """
    page = Path(out) / PAGE
    check_file(page, "OUT", make=True)
    questions = [question for name in TITLES for question in studies.questions(store, name, runs or ())]
    if confirm is not None:
        questions = of_other_sets(store, questions, confirm, bool(runs))
    seconds = [look(store, question, confirm) for question in questions]
    lacking = [second for second in seconds if isinstance(second, Exception)]
    if lacking and len(lacking) == len(seconds):
        raise lacking[0]
    asked = []
    for done, (question, second) in enumerate(zip(questions, seconds, strict=True), start=1):
        asked.append(_drawn(put(store, question, seed, second)))
        if progress:
            progress(done, len(questions), f"{question.study} {question.of}")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, render(store, asked, seed))
    return Report(page, asked)


def _drawn(asked: Asked) -> Asked:
    """Add the figure; a failure keeps the answer and other questions."""
    if asked.answer is None:
        return asked
    try:
        return replace(asked, figure=draw(asked.answer))
    except Exception as error:
        return replace(asked, error=error)


def render(store: Store, asked: Sequence[Asked], seed: int) -> str:
    """The page as self-contained HTML."""
    escape = html.escape
    name = escape(store.path.resolve().name)
    parts = [HEAD.replace("TITLE", name), f"<h1>Studies over {name}</h1>"]
    parts.append(
        f"<p>Snapshot {store.snapshot}, seed {seed}, actstore {escape(__version__)}. The store's table <code>results</code> "
        "holds each recorded number with its query. The same snapshot and seed give the same page.</p>"
    )
    names = [study for study in TITLES if any(one.question.study == study for one in asked)]
    parts.append(_contents(names, asked))
    parts.append(_unconfirmed(asked))
    for study in names:
        parts.append(f'<section id="{study}"><h2>{escape(TITLES[study])}</h2>')
        parts += [_asked(store, one, seed) for one in asked if one.question.study == study]
        parts.append("</section>")
    parts.append(_runs(store, sorted({one.question.run for one in asked})))
    return "\n".join([*parts, "</body></html>", ""])


def _contents(names: Sequence[str], asked: Sequence[Asked]) -> str:
    """The table of contents: each question, and under it the runs that were asked."""
    entries = []
    for study in names:
        of = [one for one in asked if one.question.study == study]
        runs = ", ".join(f'<a href="#{_place(one)}">{html.escape(one.question.of)}</a>' for one in of)
        entries.append(f'<li><a href="#{study}">{html.escape(TITLES[study])}</a> {runs}</li>')
    return f'<nav><ul>{"".join(entries)}<li><a href="#runs">Runs</a></li></ul></nav>'


def _place(asked: Asked) -> str:
    """The anchor of an answer on the page."""
    return quote(f"{asked.question.study}-{asked.question.of}", safe="")


def _unconfirmed(asked: Sequence[Asked]) -> str:
    """What was found and not confirmed on the second set; or that nothing was put to one."""
    tested = [one for one in asked if one.confirmation]
    if not tested:
        found = sum(test.found for one in asked if one.answer for test in one.answer.tests)
        text = f"No finding ({found:,} significant comparisons) was tested on a second set (<code>--confirm</code>)."
        return f'<section id="unconfirmed"><h2>What is not confirmed</h2><p>{text}</p></section>'
    lines = [
        f"<li>{html.escape(f'{one.question.study}, {one.question.of}: {claim.sentence}')}</li>"
        for one in tested
        if one.confirmation
        for claim in one.confirmation.claims
        if not claim.confirmed
    ]
    lines += [
        f"<li>{html.escape(f'{one.question.study}, {one.question.of}: not tested on the second set')}</li>"
        for one in asked
        if one.answer and not one.confirmation
    ]
    body = f"<ul>{''.join(lines)}</ul>" if lines else "<p>Each finding is confirmed on the second set.</p>"
    return f'<section id="unconfirmed"><h2>What is not confirmed</h2>{body}</section>'


def _fault(asked: Asked) -> str:
    what = "" if not asked.answer else "its confirmation: " if asked.figure else "its figure: "
    return asked.fault and what + asked.fault


def _asked(store: Store, asked: Asked, seed: int) -> str:
    heading = f'<h3 id="{_place(asked)}">{html.escape(asked.question.of)}</h3>'
    parts, answer = [heading], asked.answer
    if answer:
        parts.append(f"<p>{html.escape(answer.sentence)}</p>{_figure(asked)}")
    if asked.confirmation:
        head, *claims = (html.escape(line) for line in asked.confirmation.sentence.splitlines())
        parts.append(f"<p>{head}</p><ul>{''.join(f'<li>{claim}</li>' for claim in claims)}</ul>")
    lacks = "Not tested on the second set" if answer else "Not answered"
    for begins, what in ((lacks, asked.lacks), ("Failed", _fault(asked))):
        if what:
            parts.append(f'<p class="lacks">{begins}: {html.escape(what)}</p>')
    if answer:
        first = answer.results.row(0, named=True)
        params = json.dumps(json.loads(first["params"]), indent=1, sort_keys=True)
        runs = [word for run in answer.of for word in ("--run", run)]
        command = advised("study", store.path.name, answer.name, *runs, "--seed", str(seed))
        made_by = f"<code>{html.escape(command.strip('`'))}</code>"
        parts.append(
            f'<div class="wide">{_table(answer.frame)}</div><p>{_csv(asked, answer.frame)}, made by {made_by}</p>'
            f"<details><summary>The query and its parameters</summary><pre>{html.escape(first['query'])}</pre>"
            f"<pre>{html.escape(params)}</pre></details>"
        )
    return "".join(parts)


def _figure(asked: Asked) -> str:
    drawn, answer = asked.figure, asked.answer
    if drawn is None or answer is None:
        return ""
    alternative = html.escape(f"Figure of the study {answer.name}: {answer.sentence}", quote=True)
    light, dark = (_data("image/svg+xml", content) for content in (drawn.light, drawn.dark))
    return (
        f'<figure><img class="light" alt="{alternative}" src="{light}"><img class="dark" alt="{alternative}" src="{dark}">'
        f"<figcaption>{html.escape(_without(drawn.caption, answer.sentence))}</figcaption></figure>"
    )


def _without(caption: str, sentence: str) -> str:
    """A caption without the answer, which stands above it."""
    return " ".join(caption.replace(sentence, "").split())


def _csv(asked: Asked, frame: pl.DataFrame) -> str:
    """A link to the table as CSV, which lies in the page itself."""
    data = _data("text/csv;charset=utf-8", frame.write_csv().encode())
    return f'<a download="{_place(asked)}.csv" href="{data}">The table as CSV</a>'


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _table(frame: pl.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in frame.columns)
    numeric = [dtype.is_numeric() for dtype in frame.dtypes]
    rows = []
    for row in frame.iter_rows():
        cells = (_td(_shown(value), right) for value, right in zip(row, numeric, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _td(text: str, is_number: bool) -> str:
    kind = " class=number" if is_number else " class=long" if len(text) > LONGEST_LINE else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _runs(store: Store, runs: Sequence[str]) -> str:
    """One column per run, so that no hash runs out of the page."""
    lineage = pl.concat([store.sql(LINEAGE, {"run": run}) for run in runs])
    rows = []
    for name in lineage.columns[1:]:
        cells = "".join(_td(_shown(value), False) for value in lineage[name])
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    head = "".join(f"<th>{html.escape(run)}</th>" for run in lineage["run"])
    table = f"<table><thead><tr><th>run</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<section id="runs"><h2>Runs</h2><div class="wide">{table}</div></section>'


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Studies over TITLE</title>
<style>
  :root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --line: #d4d4d4; --quiet: #f6f6f6; --lacks: #8a3b00; }
  :root { --link: #0059a8; }
  @media screen and (prefers-color-scheme: dark) {
    :root { --paper: #16181d; --ink: #e8e8e8; --line: #444; --quiet: #22252b; --lacks: #f0a060; --link: #7cc0f5; }
  }
  body { font: 16px/1.55 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
  body { color: var(--ink); background: var(--paper); }
  a { color: var(--link); }
  h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
  figure { margin: 1rem 0; max-width: 30rem; }
  img { width: 100%; height: auto; }
  img.dark { display: none; }  /* and no <picture>, whose choice a browser does not make again for paper */
  @media screen and (prefers-color-scheme: dark) {
    img.dark { display: inline; }
    img.light { display: none; }
  }
  figcaption { font-size: .85rem; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; }
  th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
  td { white-space: nowrap; }
  td.long { white-space: normal; min-width: 10rem; overflow-wrap: anywhere; }
  td.number { text-align: right; font-variant-numeric: tabular-nums; }
  pre { background: var(--quiet); padding: .8rem; overflow-x: auto; font-size: .8rem; }
  code { background: var(--quiet); overflow-wrap: anywhere; }
  .lacks { color: var(--lacks); }
  @media print {
    nav, details { display: none; }
    body { margin: 0; max-width: none; font-size: 10pt; }
    figure, tr { break-inside: avoid; }
    figure { max-width: none; }
    img { width: auto; max-width: 100%; max-height: 8.5in; }  /* as wide as a column, its text 6 to 8 points */
    figcaption { max-width: 30rem; }
    h2 { margin-top: 1.5rem; }
    h2, h3 { break-after: avoid; }
    p { orphans: 3; widows: 3; }
    .wide { overflow: visible; }
    table { font-size: 6.5pt; }
    th, td { padding: .12rem .35rem; }
  }
</style></head><body>"""
