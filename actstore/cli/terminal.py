"""The standard streams, made to exist and to take any text, and data printed to them."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from actstore.errors import BadInput
from actstore.outputs import printable
from actstore.storage.refused import DISK_FULL

QUIET = [False]  # see group.quiet_option
HANDLES_ANY_TEXT = "backslashreplace"  # `→` is `\u2192` where an encoding lacks it
REFUSE_SOME_TEXT = ("strict", "surrogateescape")  # the second is Python's own in the C locale


@contextmanager
def notes(*kinds: type[Warning]) -> Iterator[None]:
    """Print each warning of some kinds as one line to stderr, every time; leave other warnings."""
    with warnings.catch_warnings():
        for kind in kinds:
            warnings.simplefilter("always", kind)
        as_ever = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, kinds):
                print(printable(f"actstore: note: {message}"), file=sys.stderr)
            else:
                as_ever(message, category, *where, **more)

        warnings.showwarning = show
        yield


def prepare() -> None:
    """Open those of stdin, stdout and stderr that are closed; let stdout print any text."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # or a file of the store would get the number
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in REFUSE_SOME_TEXT:
        sys.stdout.reconfigure(errors=HANDLES_ANY_TEXT)


def print_data(text: str) -> None:
    """Print text for a program, unchanged; in UTF-8 if stdout's encoding lacks a character."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        try:
            text.encode(sys.stdout.encoding)
        except UnicodeEncodeError:
            sys.stdout.reconfigure(encoding="utf-8", errors=HANDLES_ANY_TEXT)
    sys.stdout.write(text)


def print_bytes(content: bytes) -> None:
    """Print bytes for a program.

    Raises:
        BadInput: stdout is a terminal.
    """
    if sys.stdout.isatty():
        raise BadInput("a Parquet file is not for a terminal; send it to a file: … -o parquet > x.parquet")
    sys.stdout.flush()
    sys.stdout.buffer.write(content)


def say_beside(text: str) -> None:
    """Print a line for a person beside data: to stderr, and not with --quiet."""
    if not QUIET[0]:
        print(printable(text), file=sys.stderr)


def pager() -> list[str]:
    """The command of the pager, as words; empty where there is none.

    A pager needs a terminal on both sides. It is $PAGER, or less; `cat` or nothing turns it off.
    """
    try:
        is_terminal = os.isatty(sys.stdin.fileno()) and os.isatty(sys.stdout.fileno())
    except (OSError, ValueError):  # a stream without a file
        return []
    told = shlex.split(os.environ.get("PAGER", "less"))
    able = is_terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    return told if able and told and told != ["cat"] and shutil.which(told[0]) else []


def page(text: str, command: list[str]) -> None:
    """Print text; what is longer than the screen goes through a pager.

    Args:
        command: see `pager`.
    """
    if len(text.splitlines()) < shutil.get_terminal_size().lines:
        sys.stdout.write(text)
        return
    sys.stdout.flush()
    # quit at once where it fits, keep colours and the screen, and scroll wide lines sideways
    with subprocess.Popen(command, stdin=subprocess.PIPE, env={"LESS": "FRSX", **os.environ}) as process:
        with suppress(OSError, KeyboardInterrupt):  # the reader may leave before the end
            process.communicate(text.encode())
        while process.poll() is None:
            with suppress(KeyboardInterrupt):  # which is the pager's, too, and means "stop searching" there
                process.wait()


def wrapped(text: str, stream: TextIO | None = None) -> str:
    """Break lines between words where a stream's terminal ends; without a terminal, leave them.

    What stands in backticks, a command to be copied, is not broken, nor is a line of DuckDB's,
    under which a caret points at a column.

    Args:
        stream: default: stdout.
    """
    if not (stream or sys.stdout).isatty():
        return text
    columns = shutil.get_terminal_size().columns
    return "\n".join(line if line.startswith("LINE ") else _filled(line, columns) for line in text.split("\n"))


def _filled(line: str, columns: int) -> str:
    """Break a line into lines of so many columns, which an indented line indents by two more.

    NUL stands for a blank that is not a place to break.
    """
    kept = re.sub("`[^`]*`", lambda found: found[0].replace(" ", "\0"), line)
    mark = len(line) - len(line.lstrip("! "))  # of a line of `doctor`: two blanks, or `! `
    more = " " * (mark + 2) if mark else ""
    filled = textwrap.fill(kept, columns, subsequent_indent=more, break_long_words=False, break_on_hyphens=False)
    return filled.replace("\0", " ")


def place_of(error: OSError) -> str:
    """What an error of the system is about: a file, stdout, or the system.

    Whatever writes a file names it, so an unnamed error of a full disk is one of printing.
    """
    return str(error.filename or ("stdout" if error.errno in DISK_FULL else "the system"))


def finish() -> None:
    """Write out what stdout still holds.

    Raises:
        SystemExit: code 1 if stdout cannot be written: without a message if its reader has gone (`|
            head`), otherwise with the reason.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        _lead_nowhere(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            print(f"actstore: stdout: {error.strerror or error}", file=sys.stderr)
        if isinstance(error.__context__, Exception):  # on its way up, and says more
            return
        raise SystemExit(1) from None


def _lead_nowhere(stream: TextIO) -> None:
    """Send what a stream still holds to /dev/null, or the interpreter complains at exit."""
    try:
        descriptor = stream.fileno()
    except OSError:  # the stream has no file
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
