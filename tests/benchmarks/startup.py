"""Seconds from the shell to an answer, and where they go: `python -m tests.benchmarks startup`."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tests.benchmarks import Row, median
from tests.benchmarks.timing import timed
from tests.stores import fake

ROUNDS = 21
GOAL = 0.25  # seconds, of an answer that needs neither polars nor pyarrow
DUCKDB = "import duckdb; duckdb.connect().execute('select 1').fetchall()"
WITHOUT_PANDAS = (
    "import sys; sys.modules['pandas'] = None; from sqlite_utils.cli import cli; cli()"  # which it would load
)
FRAME = "select [[1]] as nested"  # a result that becomes a polars frame


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = Path(folder) / "small.act"
        fake(sites=("embed",)).store(store)
        seconds = _seconds(_commands(store), Path(folder))
    best = {name: min(times) for name, times in seconds.items()}
    found = []
    for name, times in seconds.items():
        goal = name.startswith("actstore") and "frame" not in name
        figure = f"{best[name]:.3f} s at best, {median(times):.3f} in the middle"
        found.append(Row(name, figure, f"≤ {GOAL} s at best" if goal else "", best[name] <= GOAL if goal else None))
    return found


def _commands(store: Path) -> dict[str, list[str]]:
    actstore = [sys.executable, "-m", "actstore"]
    commands = {
        "actstore sql STORE 'select 1'": [*actstore, "sql", str(store), "select 1"],
        "actstore info STORE": [*actstore, "info", str(store)],
        "actstore sql, a result that becomes a polars frame": [*actstore, "sql", str(store), FRAME],
        "of it: Python": [sys.executable, "-c", "pass"],
        "of it: Python, DuckDB and a query": [sys.executable, "-c", DUCKDB],
        "of it: Python and click": [sys.executable, "-c", "import click"],
        "not of it: Python, polars and pyarrow": [sys.executable, "-c", "import polars, pyarrow.compute"],
    }
    if find_spec("sqlite_utils"):
        database = store.with_name("small.db")
        sqlite3.connect(database).close()
        commands["sqlite-utils query DB 'select 1'"] = [
            *(sys.executable, "-c", WITHOUT_PANDAS, "query"),
            *(str(database), "select 1"),
        ]
    return commands


def _seconds(commands: dict[str, list[str]], folder: Path) -> dict[str, list[float]]:
    """Seconds of each command, in turns; each has run once before, which compiles its modules."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = str((folder / "compiled").resolve())
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(ROUNDS + 1):
        for name, command in commands.items():
            took, _ = timed(
                lambda command=command: subprocess.run(command, stdout=subprocess.DEVNULL, env=env, check=True)
            )
            if turn:
                seconds[name].append(took)
    return seconds
