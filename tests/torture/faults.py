"""A disk that fails at any call: whatever the n-th change to a store's folder meets, what is there is a known prefix.

    python -m tests.torture.faults           # every call × every fault; needs a C compiler, and says so where there is none
    python -m tests.torture.faults --share 0.02

fault.c counts the calls that change files, of Python, polars and DuckDB alike, and lets one fail. Then a reader opens what is
left, the same run goes on without faults, and every byte and row is held against a store that never met one.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import ctypes
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from actstore.cli.progress import progress
from actstore.errors import NoRoom
from tests.torture.kills import same_store
from tests.torture.template import STOPPED, check, fork, wait

SOURCE = Path(__file__).with_name("fault.c")
NO_FAULT = 0
FAULTS = {  # as in fault.c; the errors that the run may end in, None where it must not end in one
    1: ("no space", NoRoom),
    2: ("input/output error", OSError),
    3: ("a short write", None),
    4: ("SIGKILL", None),
    5: ("SIGINT", KeyboardInterrupt),
    6: ("no space from here on", NoRoom),
    7: ("read-only from here on", OSError),
}
N_TREES, PER_SHARD = 3, 2


def compile_shim(folder: Path) -> str:
    """Build fault.so; returns why it cannot be built, or nothing."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or not compiler:
        return "it takes Linux and a C compiler"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / "fault.so"), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[0] if done.returncode else ""


def store(root: Path) -> None:
    """A run of two batches, into a store that is made."""
    from tests.stores import fake

    fake(n_trees=N_TREES, trees_per_shard=PER_SHARD, sites=("resid_post.0",)).store(root)


def look(root: Path) -> None:
    """Whatever is there is one of the known states."""
    from actstore.store import Store
    from actstore.upkeep.verify import verify

    if not (root / "store.json").exists():
        return
    with Store(root) as opened:
        held = opened.sql("select (select count(*) from trees) as t, (select count(*) from outcomes) as o").row(0)
        expected = min(N_TREES, PER_SHARD * max(0, opened.snapshot - 1))
        assert held == (expected, expected), f"snapshot {opened.snapshot} holds {held}"
        if expected:
            X, rows = opened.read("select token_id, tree_id from tokens", "r", "resid_post.0")
            assert (X[:, 0] == rows["tree_id"].to_numpy()).all()
    assert verify(root).damage == []


class Disk:
    """The folder that a store is made in, and the shim that lets it fail."""

    def __init__(self, folder: Path, shim: ctypes.CDLL) -> None:
        self.folder, self.whole, self._said, self._shim = folder / "disk", folder / "whole.act", folder / "said", shim
        self.folder.mkdir()
        self.root = self.folder / "s.act"

    def attempt(self, turn: int, fault: int) -> tuple[int, str]:
        """Store the run while the turn-th call meets a fault. Returns the exit code, and the error that it ended in."""

        def work() -> None:
            self._shim.fault_arm(os.fsencode(self.folder) + b"/", turn, fault)
            try:
                store(self.root)
            except Exception as error:
                self._shim.fault_arm(b"", 0, 0)
                self._said.write_text(f"{_kind(error, fault)}\n{type(error).__name__}: {error}")
                return
            finally:
                count = self._shim.fault_count()
                self._shim.fault_arm(b"", 0, 0)
                self._said.with_suffix(".count").write_text(str(count))

        self._said.write_text("")
        code = wait(fork(work))
        return code, self._said.read_text()

    def count(self) -> int:
        """The calls that a run without a fault makes."""
        code, said = self.attempt(0, NO_FAULT)
        assert (code, said) == (0, ""), (code, said)
        self.root.rename(self.whole)
        return int(self._said.with_suffix(".count").read_text())

    def meet(self, turn: int, fault: int) -> str:
        """One fault, and what comes after it. Returns what was said."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        name, expected = FAULTS[fault]
        where = f"call {turn} meets {name}"
        code, said = self.attempt(turn, fault)
        fine = {0, STOPPED} if expected is KeyboardInterrupt else {0, -signal.SIGKILL} if name == "SIGKILL" else {0}
        assert code in fine, f"{where}: exit code {code}"
        verdict, _, error = said.partition("\n")
        assert verdict in ("", "expected"), f"{where}: {error}"
        assert "\n" not in error, f"{where}: {error}"
        check(lambda: self._go_on(where))
        return re.sub(r"/\S*/", "", error)

    def _go_on(self, where: str) -> None:
        try:
            look(self.root)
            store(self.root)
            same_store(self.root, self.whole)
            assert os.listdir(self.folder) == ["s.act"]
        except BaseException:
            print(where, flush=True)
            raise


def _kind(error: Exception, fault: int) -> str:
    expected = FAULTS[fault][1]
    says_where = isinstance(error, NoRoom) or (isinstance(error, OSError) and error.filename)
    return "expected" if expected and isinstance(error, expected) and says_where else "unexpected"


def run(share: float, seed: int) -> None:
    """In a process that has the shim loaded, and all that its children need."""
    import tests.stores  # noqa: F401

    rng, said = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        disk = Disk(Path(folder), ctypes.CDLL(os.environ["LD_PRELOAD"]))
        n_calls = disk.count()
        todo = [(turn, fault) for turn in range(1, n_calls + 1) for fault in FAULTS]
        chosen = rng.sample(todo, max(1, round(share * len(todo))))
        failures = 0
        with progress("faults", len(chosen), "faults") as advance:
            for done, (turn, fault) in enumerate(sorted(chosen), start=1):
                try:
                    said[disk.meet(turn, fault)] += 1
                except (AssertionError, SystemExit) as error:
                    print(error, flush=True)
                    failures += 1
                advance(done)
    for text, n in said.most_common():
        print(f"{n:5} {text or 'done, killed or stopped'}")
    if failures:
        raise SystemExit(f"{failures} of {len(chosen)} faults did harm")
    print(f"{len(chosen)} faults at {n_calls} calls: each left a known state, and went on to the same bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--share", type=float, default=1.0, help="of all calls and faults, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if "LD_PRELOAD" in os.environ:
        run(asked.share, asked.seed)
        return
    with tempfile.TemporaryDirectory() as folder:
        if why := compile_shim(Path(folder)):
            print(f"skipped: {why}")
            return
        preloaded = {**os.environ, "LD_PRELOAD": str(Path(folder) / "fault.so")}
        done = subprocess.run([sys.executable, "-m", "tests.torture.faults", *sys.argv[1:]], env=preloaded, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
