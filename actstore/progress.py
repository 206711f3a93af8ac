"""Progress of long work: a bar on a terminal, a plain line now and then where there is none; both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]  # (done, total=None, what=None): units done; a total or a name where they change

SECONDS_BEFORE_A_LINE = 5.0  # short work says nothing but its result


@contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Show how far a piece of work is.

    Args:
        what: named in front of the bar.
        total: units in all, None where the work itself will say.
        unit: plural noun, "trees".

    Yields:
        A function to call with the units done so far (and the total, and the name of the part just done).
    """
    if sys.stderr.isatty():
        with _bar(what, total, unit) as advance:
            yield advance
    else:
        yield _lines(what, total, unit)


@contextmanager
def _bar(what: str, total: int | None, unit: str) -> Iterator[Advance]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console, details = Console(stderr=True), Text(style="dim")  # below the bar, where a long line leaves it its room
    bars = Progress(*columns, console=console)
    task = bars.add_task(what, total=total)

    def advance(done: int, total: int | None = None, part: str | None = None) -> None:
        bars.update(task, completed=done, total=total)
        details.plain = part or ""

    with Live(Group(bars, details), console=console):
        yield advance


def _lines(what: str, total: int | None, unit: str) -> Advance:
    started = last = time.monotonic()

    def advance(done: int, changed: int | None = None, part: str | None = None) -> None:
        nonlocal last
        now, of = time.monotonic(), changed or total or done
        if now - last >= SECONDS_BEFORE_A_LINE or (done == of and now - started >= SECONDS_BEFORE_A_LINE):
            last = now
            said = f"{what}: {done:,} of {of:,} {unit}, {now - started:.0f} s" + (f", {part}" if part else "")
            print(said, file=sys.stderr, flush=True)

    return advance
