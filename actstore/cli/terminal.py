"""What reaches a terminal: streams that are there and take any text, and no character that would steer the terminal."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from actstore.outputs import printable

HANDLES_ANY_TEXT = "backslashreplace"  # `→` is `\u2192` where an encoding lacks it


@contextmanager
def notes(kind: type[Warning]) -> Iterator[None]:
    """Print each warning of a kind as one line to stderr, every time it is given; others are shown as ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", kind)
        as_ever = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, kind):
                print(printable(f"actstore: note: {message}"), file=sys.stderr)
            else:
                as_ever(message, category, *where, **more)

        warnings.showwarning = show
        yield


def prepare() -> None:
    """Open what is closed of stdin, stdout and stderr, and let stdout print any text in any encoding."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else a file of the store would get the number
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors=HANDLES_ANY_TEXT)


def print_data(text: str) -> None:
    """Print text that a program reads: as it is, in UTF-8 where stdout's own encoding lacks one of its characters."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        try:
            text.encode(sys.stdout.encoding)
        except UnicodeEncodeError:
            sys.stdout.reconfigure(encoding="utf-8", errors=HANDLES_ANY_TEXT)
    sys.stdout.write(text)


def finish() -> None:
    """Write out what stdout still holds.

    Raises:
        SystemExit: 1 where stdout takes it no more: silently where its reader has left (`| head`), else with the reason.
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
    """Let what a stream still holds go to /dev/null; else the interpreter complains at exit."""
    try:
        descriptor = stream.fileno()
    except OSError:  # a stream of no file
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
