"""Progress of long work: a bar on a terminal, a line that changes in a notebook, lines in a log.

All of it goes to stderr, or into the notebook's cell, so that stdout holds results alone.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from actstore.cli import terminal
from actstore.outputs import printable

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress

Advance = Callable[..., None]  # (done, total=None, what=None): units done; a total or a name where they change

SECONDS_BEFORE_A_BAR = 2.0  # shorter work prints only its result
SECONDS_BEFORE_A_LINE = 5.0
SECONDS_OF_A_RATE = 60.0  # the rate is of the last minute, in which several batches end
LINES_PER_TIME = 10  # a line comes after another tenth of the time so far: some two hundred lines in a day
LONG = 60.0  # seconds that a piece of work has left: worth a line of its own
LONGEST_SILENCE = 600.0  # seconds between lines: who reads a log sees that it lives
BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (0, "kB"))


class Pace:
    """How far a piece of work is, how fast it goes, and how long the rest takes.

    The rate is measured from the first call of `at` on: what was done before that counts as done,
    and not as speed.

    Args:
        total: number of units; None if it is not known yet.
        unit: plural noun, "trees"; "bytes" are said in kB to TB.
    """

    def __init__(self, total: int | None, unit: str) -> None:
        self.done, self.total, self._unit = 0, total, unit
        self.started = time.monotonic()
        self._samples: deque[tuple[float, int]] = deque()  # (when, units done then)

    def at(self, done: int, total: int | None) -> None:
        """Take note of how far the work is now."""
        now = time.monotonic()
        if self._samples and done < self._samples[-1][1]:  # another piece began
            self._samples.clear()
        self.done, self.total = done, total or self.total
        self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - SECONDS_OF_A_RATE:
            self._samples.popleft()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.started

    @property
    def per_second(self) -> float | None:
        """Units per second; None if nothing was done since the first call."""
        if not self._samples:
            return None
        (began, before), (now, done) = self._samples[0], self._samples[-1]
        return (done - before) / (now - began) if done > before and now > began else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at this rate; None if that cannot be known."""
        rate = self.per_second
        return None if rate is None or self.total is None else max(self.total - self.done, 0) / rate

    def counted(self) -> str:
        """What is done: `1,200 of 2,000 trees, 310 trees/s`."""
        goal, rate = self.total or self.done, self.per_second
        if not goal:
            return f"no {self._unit} yet"
        if self._unit == "bytes":
            size, unit = next((size or 1e3, unit) for size, unit in BYTES if goal >= size)
            said = f"{self.done / size:,.1f} of {goal / size:,.1f} {unit}"
            return said if rate is None else f"{said}, {rate / 1e6:,.0f} MB/s"
        said = f"{self.done:,} of {goal:,} {self._unit}"
        if rate is None:
            return said
        return (
            f"{said}, {_rounded(rate)} {self._unit}/s"
            if rate >= 1
            else f"{said}, {_rounded(rate * 60)} {self._unit}/min"
        )

    def line(self, part: str | None) -> str:
        """All of it in words: `1,200 of 2,000 trees, 310 trees/s, 4 s, 3 s left`."""
        left = self.seconds_left if self.done != self.total else None
        said = [self.counted(), _time(self.seconds), *([] if left is None else [f"{_time(left)} left"])]
        return ", ".join([*said, *([part] if part else [])])


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Show how far a piece of work is, how fast it goes, and when it ends.

    A terminal gets a bar, after two seconds. A Jupyter notebook gets one line, which changes and
    stays with its last words. Otherwise lines are printed: one after five seconds, and each later
    one after another tenth of the time so far, so that a day of work makes some eighty.

    Args:
        what: text in front of the bar.
        total: number of units; None if the work itself will say.
        unit: plural noun, "trees"; "bytes" are said in kB to TB.

    Yields:
        A function to call with the units done so far, and optionally the total and the name of the
        part just done. A first call before any work says what was done before; it is no speed.
    """
    if terminal.QUIET[0]:
        yield lambda *done, **more: None
    elif sys.stderr.isatty():
        with _bar(what, total, unit) as advance:
            yield advance
    elif (cell := _cell()) is not None:
        yield _in_a_cell(what, Pace(total, unit), cell)
    else:
        with _lines(what, Pace(total, unit)) as advance:
            yield advance


def foretelling(advance: Advance, say: Callable[[str], None]) -> Advance:
    """Say once how long the rest of a long piece of work takes, as soon as that is known.

    It is known after five seconds of work. Less than a minute is not said.

    Args:
        advance: is told how far the work is, see `progress`.
        say: called with the time, "12 min".

    Returns:
        A function to call in place of `advance`, first before any work.
    """
    pace, is_known = Pace(None, ""), False

    def told(done: int, total: int | None = None, part: str | None = None) -> None:
        nonlocal is_known
        advance(done, total, part)
        pace.at(done, total)
        if not is_known and pace.seconds_left is not None and pace.seconds >= SECONDS_BEFORE_A_LINE:
            is_known = True
            if pace.seconds_left >= LONG:
                say(_time(pace.seconds_left))

    return told


@contextmanager
def _bar(what: str, total: int | None, unit: str) -> Iterator[Advance]:
    from rich import progress as rich
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    timed = (rich.TimeElapsedColumn(), rich.TextColumn("{task.fields[left]}"))
    console, details = Console(stderr=True), Text(style="dim")  # below the bar, where a long line leaves it its room
    columns = (rich.TextColumn("{task.description}", markup=False), rich.BarColumn(bar_width=30), *timed)
    bars, pace = rich.Progress(*columns, console=console), Pace(total, unit)
    task = bars.add_task(printable(what), total=total, left="")

    def advance(done: int, changed: int | None = None, part: str | None = None) -> None:
        pace.at(done, changed)
        left = pace.seconds_left
        bars.update(task, completed=done, total=pace.total, left="" if left is None else f"{_time(left)} left")
        details.plain = printable("  ".join(filter(None, [pace.counted(), part])))

    with _shown_late(Live(Group(bars, details), console=console)):
        yield advance


def _cell() -> Callable[[str], None] | None:
    """Shows a line in a Jupyter notebook's cell, in place of the line before; None elsewhere."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel"):
        return None
    publish = shell.display_pub.publish
    place, shown = {"display_id": uuid.uuid4().hex}, [False]

    def show(line: str) -> None:
        publish({"text/plain": line}, {}, transient=place, update=shown[0])
        shown[0] = True

    return show


def _in_a_cell(what: str, pace: Pace, show: Callable[[str], None]) -> Advance:
    last = 0.0  # seconds after the beginning

    def advance(done: int, total: int | None = None, part: str | None = None) -> None:
        nonlocal last
        pace.at(done, total)
        is_last = pace.done == pace.total and last > 0
        if is_last or (pace.seconds >= SECONDS_BEFORE_A_BAR and pace.seconds - last >= 1):
            last = pace.seconds
            show(printable(f"{what}: {pace.line(part)}"))

    return advance


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


@contextmanager
def _lines(what: str, pace: Pace) -> Iterator[Advance]:
    """Lines of a log: also while no part is done, so that nobody takes long work for dead."""
    last, said, ended, one_at_a_time = (
        0.0,
        -1,
        threading.Event(),
        threading.Lock(),
    )  # seconds, and units, at the last line
    part_now: str | None = None

    def wait() -> float:
        """Seconds from the last line to the next."""
        return max(SECONDS_BEFORE_A_LINE, min(last / LINES_PER_TIME, LONGEST_SILENCE))

    def say() -> None:
        nonlocal last, said
        last, said = pace.seconds, pace.done
        _say(f"{what}: {pace.line(part_now)}")

    def advance(done: int, total: int | None = None, part: str | None = None) -> None:
        nonlocal part_now
        with one_at_a_time:
            pace.at(done, total)
            part_now = part
            ends = said != done == (pace.total or done) and pace.seconds >= SECONDS_BEFORE_A_LINE
            if ends or pace.seconds - last >= wait():
                say()

    def wake() -> None:
        while not ended.wait(max(last + wait() - pace.seconds, 0.01)):
            with one_at_a_time:
                if pace.seconds - last >= wait():
                    say()

    waker = threading.Thread(target=wake, daemon=True)
    waker.start()
    try:
        yield advance
    finally:
        ended.set()
        waker.join()


def _say(line: str) -> None:
    with suppress(OSError):  # the work continues even if nobody can read its progress
        print(printable(line), file=sys.stderr, flush=True)
