"""Studies on a store: ask questions, collect answers and faults, record and draw answers.

    asked = studies.answer(store, "depth", runs=["reproduction"])
    studies.record(store, asked)

`actstore study`, `actstore report` and `actstore.study` call these functions.
"""

from __future__ import annotations

import io
import json
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from actstore.errors import ActstoreError, BadInput, NotStored, advised
from actstore.outputs import CAPTION, Work, save_figure, silent, write_text
from actstore.queries import confirm as confirming
from actstore.queries import second
from actstore.queries import study as each_study
from actstore.queries.confirm import Confirmation
from actstore.queries.figures import style
from actstore.queries.second import Second
from actstore.queries.study import Answer, Progress, Question, check_options, questions
from actstore.writing import recording

if TYPE_CHECKING:
    from actstore.interventions import Patching
    from actstore.store import Store


MANY_SEQUENCES = 20_000  # over all questions: the linear probes of 13 sites take a minute on two processors
OF_QUERIES = ("query", "baselines", "baseline", "pairs", "donors")  # options that are SQL or name its file


@dataclass(frozen=True)
class Drawn:
    """A figure for a page.

    Attributes:
        light, dark: SVG, for a page with a light background and with a dark one.
        caption: see study.caption.
    """

    light: bytes
    dark: bytes
    caption: str


@dataclass(frozen=True)
class Asked:
    """A question and its outcome.

    Attributes:
        question: the study and the run.
        answer: the answer; None if the study failed.
        confirmation: the test of the answer on a second set of trees; None without such a set, or
            if the test failed.
        error: why answer, confirmation or figure is missing; None if nothing is missing.
        figure: figure of the answer; None if it was not drawn.
    """

    question: Question
    answer: Answer | None = None
    confirmation: Confirmation | None = None
    error: Exception | None = None
    figure: Drawn | None = None

    @property
    def lacks(self) -> str:
        """What the store or the question lacks; empty if nothing."""
        return str(self.error) if isinstance(self.error, NotStored | BadInput) else ""

    @property
    def fault(self) -> str:
        """Any other error as one line, for a bug with class and place; empty without one."""
        if self.error is None or self.lacks:
            return ""
        if isinstance(self.error, ActstoreError | OSError):
            return str(self.error)
        place = traceback.extract_tb(self.error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        return f"{type(self.error).__name__}: {self.error} ({where}); this is a fault of actstore"


def announcement(
    store: Store, names: Sequence[str], runs: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> str:
    """One sentence: what studies ask, where that is much; else "".

    Args:
        names: names of the studies.
        runs, options: see `study.questions`.

    Raises:
        NotStored: there is no such study or run.
        BadInput: a study has no such option.
    """
    if options:
        for name in names:
            check_options(name, options)
    asked = [question for name in names for question in questions(store, name, runs or (), **(options or {}))]
    rows = store.rows("select run, n_sequences from runs join datasets using (dataset)")
    sizes: dict[str, int] = {str(run): int(n) for run, n in rows}
    n = sum(sizes.get(question.run, 0) for question in asked)
    if n < MANY_SEQUENCES:
        return ""
    of = ", ".join(dict.fromkeys(question.of for question in asked))
    return (
        f"{len(asked)} question{'s' * (len(asked) > 1)} to {of}, {n:,} sequences in all: this may take minutes; "
        "--run names one run, and `actstore study --help` has options that ask less"
    )


def answer(
    store: Store,
    name: str,
    runs: Sequence[str] = (),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    confirm: str | None = None,
    progress: Work = silent,
    patch: Patching | None = None,
    tables: Mapping[str, Any] | None = None,
) -> list[Asked]:
    """Ask all questions of a study; a question that fails does not stop the others.

    Args:
        store: an open store.
        name: name of the study.
        runs: see `study.questions`.
        seed: seed of everything random.
        options: options of the study.
        confirm: name of a second set of trees that tests the findings, see `confirm.confirm`.
        progress: see `outputs.Work`.
        patch: runs edits, for studies that run the model again.
        tables: tables of one's own for the queries that `options` name, see Store.sql.

    Returns:
        The questions with their outcomes; at least one has an answer.

    Raises:
        NotStored: there is no such study or run.
        Exception: no question was answered; the first fault, else the first lack.
    """
    each_study.check_options(name, options or {})
    if tables:
        if not {*OF_QUERIES} & {*(options or {})}:
            taken = ", ".join(each_study.taken_by(name, OF_QUERIES)) or "none"
            raise BadInput(
                f"got a table {next(iter(tables))!r} and no query that could read it; options of the study {name!r} that take a "
                f"query: {taken}"
            )
        store = store.beside(tables)
    asked = questions(store, name, runs, **(options or {}))
    if confirm is not None:
        asked = confirming.of_other_sets(store, asked, confirm, bool(runs))
    found = []
    for turn, question in enumerate(asked, 1):
        which = f" ({turn} of {len(asked)})" if len(asked) > 1 else ""
        with progress(f"study {name} {question.of}{which}", None, "parts") as advance:
            apart = look(store, question, confirm)
            if isinstance(apart, Exception):  # reported before anything is computed
                found.append(Asked(question, error=apart))
            else:
                found.append(_with_tables(put(store, question, seed, apart, advance, patch), tables or {}))
    if not any(outcome.answer for outcome in found):
        raise min(found, key=lambda outcome: not outcome.fault).error or AssertionError(name)
    return found


def _with_tables(asked: Asked, tables: Mapping[str, Any]) -> Asked:
    """An outcome whose results say which tables of the user's its queries could read."""
    if asked.answer is None or not tables:
        return asked
    named = {
        name: str(table) if isinstance(table, str | Path) else f"a {type(table).__name__}"
        for name, table in tables.items()
    }
    params = [
        json.dumps({**json.loads(text), "tables": named}, sort_keys=True) for text in asked.answer.results["params"]
    ]
    results = asked.answer.results.with_columns(pl.Series("params", params, pl.String))
    return replace(asked, answer=replace(asked.answer, results=results))


def look(store: Store, question: Question, confirm: str | None) -> Second | Exception | None:
    """The second set of a question, or the error that says why there is none."""
    try:
        return None if confirm is None else second.look(store, question, confirm)
    except Exception as error:
        return error


def put(
    store: Store,
    question: Question,
    seed: int = 0,
    apart: Second | Exception | None = None,
    progress: Progress | None = None,
    patch: Patching | None = None,
) -> Asked:
    """Ask one question; an error becomes part of the outcome.

    Args:
        store: an open store.
        question: the study and its run.
        seed: seed of everything random.
        apart: the second set that tests the findings, see `look`; an error becomes part of the
            outcome once the question is answered.
        progress, patch: see `study.ask`.
    """
    answered = confirmed = None
    try:
        answered = each_study.ask(store, question.study, question.run, seed, progress, patch, **question.options)
        if isinstance(apart, Exception):
            raise apart
        if apart is not None:
            confirmed = confirming.confirm(store, answered, apart, seed, progress, patch, **question.options)
    except Exception as error:
        return Asked(question, answered, error=error)
    return Asked(question, answered, confirmed)


def record(
    store: Store, asked: Sequence[Asked], wait: float = 10.0, kept: Callable[[Path], None] | None = None
) -> None:
    """Record answers and confirmations in the table `results`, with one commit each.

    Args:
        store: the asked store, open or closed. Its snapshot does not change; a new opening sees the
            rows.
        asked: see `answer`.
        wait: seconds to wait for another process that writes to the store.
        kept: called, before an error is raised, with the file that keeps unrecorded rows; default:
            a warning.

    Raises:
        Busy, NoRoom, Damaged, OSError: the rows cannot be written.
    """
    results = [outcome.answer.results for outcome in asked if outcome.answer]
    confirmations = [outcome.confirmation for outcome in asked if outcome.confirmation]
    results += [confirmation.results for confirmation in confirmations if len(confirmation.results)]

    def warn(file: Path) -> None:
        warnings.warn(
            f"{file} keeps what is not recorded; {advised('record', store.path, file)} records it", stacklevel=4
        )

    recording.record(store.path, results, wait, kept or warn)


def as_frame(answers: Sequence[Answer]) -> pl.DataFrame:
    """Concatenate the frames of answers, with columns `run` (and `other`) if there are several."""
    if len(answers) == 1:
        return answers[0].frame
    named = [
        answer.frame.select(
            *(pl.lit(run).alias(name) for name, run in zip(("run", "other"), answer.of, strict=False)), pl.all()
        )
        for answer in answers
    ]
    return pl.concat(named, how="diagonal_relaxed")


def draw(answer: Answer) -> Drawn:
    """Draw an answer for a page; the same answer gives the same bytes."""
    figures = {dark: each_study.plot(answer, dark) for dark in (False, True)}
    drawn = {}
    for dark, figure in figures.items():
        content = io.BytesIO()
        with style(dark):
            figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
        drawn[dark] = content.getvalue()
    return Drawn(drawn[False], drawn[True], each_study.caption(answer, figures[False]))


def save_figures(answers: Sequence[Answer], file: str | Path, caption: bool = False) -> Iterator[Path]:
    """Draw each answer into a file and yield its path.

    One answer gets FILE; several get FILE-RUN, or FILE-RUN-OTHER for a pair.

    Args:
        caption: write each figure's caption beside the figure, as .txt; yield its path, too.
    """
    for answer in answers:
        path = Path(file) if len(answers) == 1 else Path(file).with_stem("-".join([Path(file).stem, *answer.of]))
        figure = each_study.plot(answer)
        with style():  # fonts are embedded as it says
            save_figure(path, figure)
        yield path
        if caption:
            beside = path.with_suffix(CAPTION)
            write_text(beside, each_study.caption(answer, figure) + "\n")
            yield beside
