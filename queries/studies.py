"""Studies put to a store: whom a study is asked of, what came of each question, and how answers are kept.

    asked = studies.answer(store, "depth", runs=["reproduction"])
    studies.record(store, asked)

`actstore study`, `actstore report` and `actstore.study` are made of these functions.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from actstore.errors import ActstoreError, BadInput, NotStored, advised
from actstore.outputs import Work, save_figure, silent
from actstore.queries import confirm as confirming
from actstore.queries import second
from actstore.queries import study as each_study
from actstore.queries.confirm import Confirmation
from actstore.queries.study import Answer, Progress, Question, questions
from actstore.writing import recording

if TYPE_CHECKING:
    from actstore.store import Store


@dataclass(frozen=True)
class Asked:
    """A question, and what came of it.

    Attributes:
        question: the study and the run.
        answer: None where there is none.
        confirmation: what a second set of trees says of the answer; None where none was named, or where it failed.
        error: why the answer, or its confirmation, is missing; None where nothing is.
        figure: the answer drawn, as PNG; None where nobody drew it.
    """

    question: Question
    answer: Answer | None = None
    confirmation: Confirmation | None = None
    error: Exception | None = None
    figure: bytes | None = None

    @property
    def lacks(self) -> str:
        """What the store, or the question, lacks; empty where it lacks nothing."""
        return str(self.error) if isinstance(self.error, NotStored | BadInput) else ""

    @property
    def fault(self) -> str:
        """What went wrong where nothing should have, as one line (of a bug its class and place, too); empty where nothing did."""
        if self.error is None or self.lacks:
            return ""
        if isinstance(self.error, ActstoreError | OSError):
            return str(self.error)
        place = traceback.extract_tb(self.error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        return f"{type(self.error).__name__}: {self.error} ({where}); this is a fault of actstore"


def answer(
    store: Store,
    name: str,
    runs: Sequence[str] = (),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    confirm: str | None = None,
    progress: Work = silent,
) -> list[Asked]:
    """Put a study to every run that it is about. A run that lacks something costs no other run its answer.

    Args:
        store: an open store.
        name: of the study.
        runs: see `study.questions`.
        seed: of everything random.
        options: the study's own.
        confirm: a second set of trees, to which what is found is put, see `confirm.confirm`.
        progress: see `outputs.Work`.

    Returns:
        Each question with what came of it; one at least is answered.

    Raises:
        NotStored: there is no such study or run.
        Exception: no question was answered; it is the first fault, or else the first of what lacks.
    """
    asked = questions(store, name, runs, **(options or {}))
    if confirm is not None:
        asked = confirming.of_other_sets(store, asked, confirm, bool(runs))
    found = []
    for question in asked:
        with progress(f"study {name} {question.of}", None, "parts") as advance:
            found.append(put(store, question, seed, confirm, advance))
    if not any(one.answer for one in found):
        raise min(found, key=lambda one: not one.fault).error or AssertionError(name)
    return found


def put(
    store: Store, question: Question, seed: int = 0, confirm: str | None = None, progress: Progress | None = None
) -> Asked:
    """Put one question to a store; whatever goes wrong costs this question alone. Arguments are those of `answer`."""
    answered = confirmed = None
    given = {**question.options, "progress": progress}
    try:
        if confirm is not None:  # what lacks is told before anything is computed
            second.look(store, question, confirm)
        answered = each_study.run(store, question.study, **{**given, "run": question.run, "seed": seed})
        if confirm is not None:
            confirmed = confirming.confirm(store, answered, confirm, seed, **given)
    except Exception as error:
        return Asked(question, answered, error=error)
    return Asked(question, answered, confirmed)


def record(
    store: Store, asked: Sequence[Asked], wait: float = 10.0, kept: Callable[[Path], None] | None = None
) -> None:
    """Record answers, and what confirmed them, in the table `results`, one commit each.

    Args:
        store: that was asked; it may be closed by now. Its snapshot stays as it is: open the store again to see the rows.
        asked: see `answer`.
        wait: seconds to wait for another process that writes to the store.
        kept: called with the file that keeps what could not be recorded, before the error is raised; a warning by default.

    Raises:
        Busy, NoRoom, Damaged, OSError: the store cannot take them.
    """
    results = [one.answer.results for one in asked if one.answer]
    results += [one.confirmation.results for one in asked if one.confirmation and len(one.confirmation.results)]

    def warn(file: Path) -> None:
        warnings.warn(
            f"{file} keeps what is not recorded; {advised('record', store.path, file)} records it", stacklevel=4
        )

    recording.record(store.path, results, wait, kept or warn)


def tables(answers: Sequence[Answer]) -> pl.DataFrame:
    """The tables of several answers as one, with a column `run` before (and `other`); of one its own."""
    if len(answers) == 1:
        return answers[0].table
    named = [
        answer.table.select(
            *(pl.lit(run).alias(name) for name, run in zip(("run", "other"), answer.of, strict=False)), pl.all()
        )
        for answer in answers
    ]
    return pl.concat(named, how="diagonal_relaxed")


def save_figures(answers: Sequence[Answer], file: str | Path) -> Iterator[Path]:
    """Draw each answer into a file, and yield its path: FILE of one answer, FILE-RUN of several (of a pair FILE-RUN-OTHER)."""
    for answer in answers:
        path = Path(file) if len(answers) == 1 else Path(file).with_stem("-".join([Path(file).stem, *answer.of]))
        save_figure(path, each_study.plot(answer))
        yield path
