"""Every error actstore raises on purpose, grouped by what the caller can do about it.

ActstoreError
├── NotStored   (also a LookupError)    ask for something else, or ingest it        exit code 1
├── BadInput    (also a ValueError)     mend the argument, the query or the config  exit code 2
├── Damaged     (also an OSError)       the files are not what was committed        exit code 1
├── TooNew      (also an OSError)       install a later actstore                    exit code 1
├── TooOld      (also an OSError)       bring it up to date: `actstore repair`      exit code 1
├── NoRoom      (also an OSError)       free disk space, then run the command again exit code 1
├── Unsupported (also an OSError)       write to a file system that is able to      exit code 1
├── Unreachable (also an OSError)       look at the network and the credentials     exit code 1
├── LimitReached (also a RuntimeError)  raise the limit, or ask for less            exit code 1
└── Busy        (also a TimeoutError)   another writer holds the store              exit code 1

Each message is one line: what was got, what exists, what to do. Each class has a `kind`, a name
that stays the same whatever the class is called: the process of a query with limits, and DuckDB,
hand an error on by its kind.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import PurePath


def advised(*words: object) -> str:
    """Quote a command of actstore for a message, so that it can be typed as it stands.

    Words with blanks are quoted, by marks that need no escape where there are such. A path that
    begins with a dash gets a `./`, or it would be an option.
    """
    typed = [f"./{word}" if isinstance(word, PurePath) and str(word).startswith("-") else str(word) for word in words]
    return f"`actstore {' '.join(map(_quoted, typed))}`"


def _quoted(word: str) -> str:
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint ` (did you mean 'x'?)` to follow a misspelt name; "" if no known name is near."""
    near = get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class ActstoreError(Exception):
    """The root of all errors that actstore raises on purpose."""

    exit_code = 1
    kind = "error"

    @classmethod
    def of_kind(cls, kind: str, message: str) -> ActstoreError:
        """An error of the class of that kind."""
        return next(each for each in (cls, *cls.__subclasses__()) if each.kind == kind)(message)


class NotStored(ActstoreError, LookupError):
    """The store does not hold what was asked for."""

    kind = "not_stored"

    def __str__(self) -> str:  # a LookupError such as KeyError would print its repr
        return str(self.args[0]) if self.args else ""


class BadInput(ActstoreError, ValueError):
    """An argument, a query, a configuration or a checkpoint has no meaning."""

    kind = "bad_input"
    exit_code = 2


class Damaged(ActstoreError, OSError):
    """Files of the store are missing, cut short or changed since they were committed."""

    kind = "damaged"


class TooNew(ActstoreError, OSError):
    """The store was made by a later version, whose format this one does not know."""

    kind = "too_new"


class TooOld(ActstoreError, OSError):
    """An earlier version made the store; `actstore repair` brings it up to date, losing nothing."""

    kind = "too_old"


class NoRoom(ActstoreError, OSError):
    """The disk lacks room for what was to be written."""

    kind = "no_room"


class Unsupported(ActstoreError, OSError):
    """The file system lacks what a safe write needs: hard links, locks or fsync."""

    kind = "unsupported"


class Unreachable(ActstoreError, OSError):
    """The server of a bucket does not answer, or refuses this access."""

    kind = "unreachable"


class LimitReached(ActstoreError, RuntimeError):
    """A query reached its limit of time or memory, or the system allows no more files or memory."""

    kind = "limit_reached"


class SeveralRuns(UserWarning):
    """A warning: an answer may mix rows of several runs, which nothing tells apart.

    `warnings.simplefilter("error", actstore.SeveralRuns)` makes it an error; "ignore" silences it.
    """


class ComputedOtherwise(UserWarning):
    """A warning: while sites were added to a run, its model gave other answers than stored."""


class HalvedBatch(UserWarning):
    """A warning: a GPU lacks memory, so that a run takes half as many sequences per pass."""


class Busy(ActstoreError, TimeoutError):
    """Another process writes to the store, or has its catalog open to write."""

    kind = "busy"


def outside() -> int:
    """Number of calls between the caller and the first function outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "actstore":
        frame, level = frame.f_back, level + 1
    return level
