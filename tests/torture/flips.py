"""Flip random bits of a store, one at a time: each must be found, and mended to the same bytes.

python -m tests.torture.flips 1000
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from actstore.commits import log
from actstore.ingest.replay.remake import files_of
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from tests.damaged import make
from tests.stores import committed_files
from tests.torture.kills import flip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("flips", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder) / "s.act")
        before = committed_files(root)
        files = [file for manifest in log.manifests(root) for file in [*manifest.parts, *manifest.shards]]
        names = [file.path for file in files] + ["catalog.duckdb"] * (len(files) // 10)
        for done in range(asked.flips):
            name = rng.choice(names)
            flip(root / name, rng)
            assert [finding.path for finding in verify(root).damage] == [name], f"flip {done} of {name} was not found"
            assert repair(root, files_of).mended == [name], f"flip {done} of {name} was not mended"
            assert committed_files(root) == before, f"flip {done} of {name}: other bytes"
    print(f"{asked.flips} flips: all found, all mended to the same bytes")


if __name__ == "__main__":
    main()
