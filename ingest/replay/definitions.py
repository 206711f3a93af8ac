"""Restore rows of a run's definition that parts and catalog have lost, from the rest of the store.

A guessed row is accepted only if its part has the hash in the manifest, so a wrong guess does no
harm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import xxhash

from actstore.arrays.codec import CODECS
from actstore.arrays.encoding import STORED_AS
from actstore.commits import log
from actstore.commits.format import ARRAYS, WEIGHTS
from actstore.commits.manifest import Manifest, Part
from actstore.errors import ActstoreError
from actstore.ingest.jobs import job
from actstore.ingest.models import load
from actstore.ingest.trees.draw import DISTRIBUTIONS
from actstore.ingest.trees.tokens import n_positions
from actstore.ingest.trees.variants import CHANGES
from actstore.named import by_name
from actstore.writing import parts
from actstore.writing.parts import as_parquet

SEEDS = 256  # number of seeds to try if the set's name holds none
BATCH_SIZES = (128, 64, 256, 32, 512, 16, 8, 1)  # trees per forward pass to try

Row = dict[str, Any]


def lost_rows(root: Path, sound: list[Manifest], run: str) -> dict[Part, Row]:
    """Part → row of each part of a run's definition that can be restored; excludes `sites`.

    Args:
        sound: the commits without their damaged parts.
        run: name of the run.
    """
    whole = log.live(log.manifests(root))
    lost = {file.path for commit in whole for file in commit.parts} - {
        file.path for commit in sound for file in commit.parts
    }
    rows = {name: parts.rows_committed(root, sound, name).to_dicts() for name in ("models", "datasets", "runs")}
    found: dict[Part, Row] = {}
    of_run = [commit for commit in whole if commit.kind == "run" and commit.run == run]
    for table, guesses in (("models", _models), ("datasets", _datasets), ("runs", _runs)):
        for part in [part for commit in of_run for part in commit.parts if part.table == table and part.path in lost]:
            row = _with_hash(part, guesses(root, whole, part, run, rows))
            if row is not None:
                found[part] = row
                rows[table].append(row)
    return found


def as_part(table: str, rows: list[Row]) -> bytes:
    """The bytes of a part with these rows."""
    return as_parquet(table, pl.DataFrame(rows, infer_schema_length=None))


def _with_hash(part: Part, guesses: Iterable[Row]) -> Row | None:
    for row in guesses:
        if xxhash.xxh3_128_hexdigest(as_part(part.table, [row])) == part.xxh3_128:
            return row
    return None


def _models(root: Path, whole: list[Manifest], part: Part, run: str, rows: dict[str, list[Row]]) -> Iterator[Row]:
    """Guess: a named model with these weights."""
    for name, path in by_name().items():
        if hashlib.sha256(path.read_bytes()).hexdigest().startswith(part.owner):
            with suppress(ActstoreError):
                yield load.load(name).row()


def _datasets(root: Path, whole: list[Manifest], part: Part, run: str, rows: dict[str, list[Row]]) -> Iterator[Row]:
    """Guess: a set like another set of the store, or one that fits name, trees and small seeds."""
    name = part.owner
    about = next((row for row in rows["runs"] if row["dataset"] == name), None)
    first = {part.table: part for commit in whole for part in commit.parts if (part.owner, part.batch) == (name, 0)}
    trees, edges = first.get("trees"), first.get("edges")
    if about is None or trees is None or edges is None:
        return
    fixed = {"dataset": name, "first_tree_id": about["first_tree_id"], "n_trees": about["n_trees"]}
    of_variant: list[tuple[str | None, str | None]] = [(None, None)]
    of_variant += [(name.removesuffix(f"-{change}"), change) for change in CHANGES if name.endswith(f"-{change}")]
    for like, (variant_of, change) in product(rows["datasets"], of_variant):
        yield {**like, **fixed, "variant_of": variant_of, "change": change}
    n_nodes = edges.rows // trees.rows + 1
    depths: list[list[int] | None] = [None]
    with suppress(OSError):
        seen = parts.rows_committed(root, [Manifest(1, "batch", parts=[trees])], "trees")["depth"].unique().to_list()
        depths += [sorted(seen), list(range(1, max(seen) + 1))]
    of_name = name.partition("-seed")[2].partition("-")[0]
    seeds = [*([int(of_name)] if of_name.isdecimal() else []), *range(SEEDS)]
    sizes = {"n_nodes": n_nodes, "n_positions": n_positions(n_nodes), "trees_per_shard": trees.rows}
    for seed, distribution, goal_depths, (variant_of, change) in product(seeds, DISTRIBUTIONS, depths, of_variant):
        of_stream = {"distribution": distribution, "seed": seed, "depths": goal_depths}
        yield {**fixed, **sizes, **of_stream, "variant_of": variant_of, "change": change}


def _runs(root: Path, whole: list[Manifest], part: Part, run: str, rows: dict[str, list[Row]]) -> Iterator[Row]:
    """Guess: a run by the installed versions, or by those of another run of the store."""
    own = [commit for commit in whole if commit.run == run]
    weights = [Path(file.path).stem for commit in own for file in commit.others if file.path.startswith(f"{WEIGHTS}/")]
    weights += [row["weights_sha256"] for row in rows["models"]]
    generated = any(part.table == "generations" for commit in own for part in commit.parts)
    prompts = [("tree", samples) for samples in range(9)] if generated else [("task", None)]
    versions = [json.loads(row["versions"]) for row in rows["runs"]] + [job.versions()]
    sizes = [*(about["batch_size"] for about in versions if "batch_size" in about), *BATCH_SIZES]
    without = [{name: about[name] for name in about if name not in ("dtype", "codec")} for about in versions]
    each = product(
        [{}, *({"dtype": dtype} for dtype in STORED_AS[1:])], [{}, *({"codec": codec} for codec in CODECS[1:])]
    )
    stored_as = [dtype | codec for dtype, codec in each]
    tried = dict.fromkeys(
        json.dumps({**about, "batch_size": size, **how}) for about, size, how in product(without, sizes, stored_as)
    )
    for sha256, dataset, about, (prompt, samples), device in product(
        dict.fromkeys(weights), rows["datasets"], tried, prompts, ("cpu", "cuda:0")
    ):
        yield {
            **{"run": run, "weights_sha256": sha256, "dataset": dataset["dataset"]},
            **{"first_tree_id": dataset["first_tree_id"], "n_trees": dataset["n_trees"], "prompt": prompt},
            **{"samples": samples, "device": device, "versions": about},
        }


def site_names(manifests: Sequence[Manifest], run: str) -> dict[str, list[str]]:
    """The sites that forward passes of a run gave, from the paths of its arrays in the manifests.

    Returns:
        Owner of a part of `sites` → TransformerLens' names of the sites that it holds. A site that
        was added to the run has a part of its own.
    """
    under, found = f"{ARRAYS}/{run}/", dict[str, list[str]]()
    for commit in log.live(manifests):
        if commit.run != run or commit.kind not in ("run", "site") or commit.is_appended:
            continue
        paths = [file.path.removeprefix(under) for file in commit.others if file.path.startswith(under)]
        names = [name for path in paths if (name := path.rpartition("/")[0])]
        found |= {run: names} if commit.kind == "run" else {f"{run}/{name}": [name] for name in names}
    return found
