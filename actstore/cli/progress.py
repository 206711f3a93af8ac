"""Progress of long work, on stderr: a bar or a spinner on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from actstore.cli import terminal
from actstore.outputs import printable

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress

Advance = Callable[..., None]  # (done, total=None, what=None): units done; a total or a name where they change

SECONDS_BEFORE_A_BAR = 2.0  # shorter work prints only its result
SECONDS_BEFORE_A_LINE = 5.0


@contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Show how far a piece of work is.

    Args:
        what: text in front of the bar.
        total: number of units; None if the work itself will say.
        unit: plural noun, "trees".

    Yields:
        A function to call with the units done so far, and optionally the total and the name of the
        part just done.
    """
    if terminal.QUIET[0]:
        yield lambda *done, **more: None
    elif sys.stderr.isatty():
        with _bar(what, total, unit) as advance:
            yield advance
    else:
        yield _lines(what, total, unit)


@contextmanager
def _bar(what: str, total: int | None, unit: str) -> Iterator[Advance]:
    from rich import progress as rich
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    counted = (rich.BarColumn(), rich.MofNCompleteColumn(), rich.TextColumn(unit))
    timed = (rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn())
    console, details = Console(stderr=True), Text(style="dim")  # below the bar, where a long line leaves it its room
    bars = rich.Progress(rich.TextColumn("{task.description}", markup=False), *counted, *timed, console=console)
    task = bars.add_task(printable(what), total=total)

    def advance(done: int, total: int | None = None, part: str | None = None) -> None:
        bars.update(task, completed=done, total=total)
        details.plain = printable(part or "")

    with _shown_late(Live(Group(bars, details), console=console)):
        yield advance


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show how long a piece of work has been running that cannot say how far it is.

    Args:
        what: text beside the spinner, or in the lines. The first line comes after five seconds,
            each later line after twice the time.
    """
    shown: AbstractContextManager[None]
    shown = nullcontext() if terminal.QUIET[0] else _spinner(what) if sys.stderr.isatty() else _waiting_lines(what)
    with shown:
        yield


@contextmanager
def _spinner(what: str) -> Iterator[None]:
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.SpinnerColumn(), rich.TextColumn("{task.description}", markup=False), rich.TimeElapsedColumn())
    spinner = rich.Progress(*columns, console=Console(stderr=True), transient=True)
    spinner.add_task(printable(what), total=None)
    with _shown_late(spinner):
        yield


@contextmanager
def _shown_late(live: Live | Progress) -> Iterator[None]:
    """Show something after two seconds, so that short work does not flash."""
    timer = threading.Timer(SECONDS_BEFORE_A_BAR, live.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        live.stop()


@contextmanager
def _waiting_lines(what: str) -> Iterator[None]:
    started, done = time.monotonic(), threading.Event()

    def say() -> None:
        wait_until = SECONDS_BEFORE_A_LINE
        while not done.wait(started + wait_until - time.monotonic()):
            _say(f"{what}: {time.monotonic() - started:.0f} s")
            wait_until *= 2

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _lines(what: str, total: int | None, unit: str) -> Advance:
    started = last = time.monotonic()

    def advance(done: int, changed: int | None = None, part: str | None = None) -> None:
        nonlocal last
        now, goal = time.monotonic(), changed or total or done
        if now - last >= SECONDS_BEFORE_A_LINE or (done == goal and now - started >= SECONDS_BEFORE_A_LINE):
            last = now
            said = f"{what}: {done:,} of {goal:,} {unit}, {now - started:.0f} s" + (f", {part}" if part else "")
            _say(said)

    return advance


def _say(line: str) -> None:
    with suppress(OSError):  # the work continues even if nobody can read its progress
        print(printable(line), file=sys.stderr, flush=True)
