"""A process that has everything imported, and forks a child for each attempt: starting Python anew would take seconds a kill.

The template itself never uses polars or DuckDB, whose threads do not survive a fork; whatever does runs in a child.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STOPPED = 77  # exit code of a child that Ctrl-C stopped


def fork(work: Callable[[], object]) -> int:
    """Start a child that does the work, and return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except KeyboardInterrupt:
        code = STOPPED
    except BaseException as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11 wraps one that comes as a class is made
            code = STOPPED
        else:
            traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """A child's exit code; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(work: Callable[[], object]) -> None:
    """Do work in a child, and stop everything where it fails."""
    code = wait(fork(work))
    if code:
        raise SystemExit(f"a check ended with {code}")


def attempt(work: Callable[[], object], after: float, how: signal.Signals) -> bool:
    """Do work in a child, and send it a signal after so many seconds. Returns whether it had finished before.

    Raises:
        SystemExit: it failed, other than by the signal.
    """
    child = fork(work)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code:
                raise SystemExit(f"an attempt ended with {code} before it was stopped")
            return True
        time.sleep(0.002)
    os.kill(child, how)
    code = wait(child)
    if code == 0:
        return True
    if code not in (-how, STOPPED):
        raise SystemExit(f"an attempt that got {how.name} ended with {code}")
    return False
