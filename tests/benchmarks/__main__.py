"""`make bench`: run every benchmark, print the table and keep it in README.md beside this file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("POLARS_MAX_THREADS", "1")  # trees per second are of one core; set before polars is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command `actstore` has it; before torch is imported

from rich.console import Console
from rich.table import Table

from actstore.storage.machine import keep_freed_memory
from tests.benchmarks import (
    Row,
    cache,
    curve,
    generate,
    ingest,
    large,
    long_log,
    opening,
    patch,
    probes,
    side_by_side,
    startup,
    text,
    trust,
)

README = Path(__file__).with_name("README.md")
VERSIONS = (
    *("torch", "transformer_lens", "duckdb", "zarr", "polars", "numpy"),
    *("pyarrow", "h5py", "pylance", "datasets"),
)
BEGIN, END = "<!-- measured -->", "<!-- end -->"


SECTIONS = {
    "ingest": ("Ingest", ingest.speed),
    "cache": ("One site, without answers, against a cache as SAELens writes it", cache.rows),
    "side": ("Two ingests side by side", side_by_side.rows),
    "opening": ("Ids past SQL, and the opening", opening.rows),
    "trust": ("What trust costs", trust.rows),
    "probes": ("The notebook's grid of probes", probes.rows),
    "patch": ("Edits of one position", patch.rows),
    "text": ("Text through a language model", text.rows),
    "startup": ("From the shell to an answer", startup.rows),
    "log": ("Opening a store with a long log", long_log.rows),
}
CURVE = "One site of the shipped model, 10,000 to 1,000,000 trees"  # `large --model`: 16 GB of disk, and eight minutes
BY_NAME = {"large": ("Stores of 10,000 to 1,000,000 trees", large.rows)}  # 17 GB of disk, and four minutes


def main() -> None:
    """Run all sections, or those that are named; each one's figures are kept as soon as they are there."""
    keep_freed_memory()  # as the command has it
    if sys.argv[1:3] == ["large", "--model"]:
        _replace({CURVE: curve.rows(tuple(map(int, sys.argv[3:])) or curve.SIZES)})
        return
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            title, section = (SECTIONS | BY_NAME)[name]
            _replace({title: section()})
        return
    _head()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        large = Path(folder) / "large.act"
        _replace({"Trees with their token, edge and tree rows, one core": generate.rows()})
        _replace({"Memory of an ingest": ingest.memory(large)})
        _replace(_reads(large))
    for title, section in SECTIONS.values():
        _replace({title: section()})


def _reads(store: Path) -> dict[str, list[Row]]:
    """In a process of its own, where polars has all its threads and the peers' libraries are loaded."""
    rows = store.with_name("reads.json")
    threads = {name: value for name, value in os.environ.items() if name != "POLARS_MAX_THREADS"}
    subprocess.run([sys.executable, "-m", "tests.benchmarks.read", store, "--json", rows], env=threads, check=True)
    return {title: [Row(**row) for row in section] for title, section in json.loads(rows.read_text()).items()}


def _replace(sections: dict[str, list[Row]]) -> None:
    """Put the figures of some sections in the place of the ones in README.md, or behind them all."""
    text = README.read_text()
    for title, rows in sections.items():
        _print(title, rows)
        section = "\n".join(_section(title, rows)) + "\n"
        before, found, rest = text.partition(f"\n### {title}\n")
        if not found:
            before, _, rest = text.partition(END)
            text = before + section + END + rest
            continue
        ends = [at for at in (rest.find("\n### "), rest.find(END)) if at >= 0]
        text = before + section + rest[min(ends) :]
    README.write_text(text)


def _section(title: str, rows: list[Row]) -> list[str]:
    lines = [f"\n### {title}\n", "| | measured | goal | |", "|---|---|---|---|"]
    return lines + [f"| {row.what} | {row.figure} | {row.goal} | {_verdict(row)} |" for row in rows]


def _print(title: str, rows: list[Row]) -> None:
    table = Table("", "measured", "goal", "", title=title, title_justify="left")
    for row in rows:
        table.add_row(row.what, row.figure, row.goal, _verdict(row))
    Console().print(table)


def _verdict(row: Row) -> str:
    return "" if row.met is None else "met" if row.met else "NOT met"


def _head() -> None:
    """Name the machine and the versions above the figures."""
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    head = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {versions}."
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{head}\n\n###" + rest.partition("\n###")[2])


if __name__ == "__main__":
    main()
