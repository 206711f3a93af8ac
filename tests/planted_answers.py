"""A store whose answers, patterns, activations and directions are made up: a model, its checkpoints, a run that stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from actstore.ingest.trees.draw import Trees, draw
from actstore.queries.study import result_rows
from actstore.writing.writer import open_writer
from tests.planted import plant

N_TREES, N_NODES, N_HEADS, D_MODEL, PER_SHARD = 150, 8, 2, 6, 80
ROOT_AT, WIDTH = 3 * N_NODES - 1, 4 * N_NODES - 1
TREES = draw("baseline", 0, 0, N_TREES, N_NODES)  # every second tree lists its edges backward
CHECKPOINTS = {"tiny-step100": 0.5, "tiny-step20": 0.2}  # run and model → share of steps that it gets right
RIGHT = {"tiny": 0.85, **CHECKPOINTS, "half": 0.9, "tiny-stepped": 0.1}
rng = np.random.default_rng(0)
X = rng.standard_normal((N_TREES, WIDTH, D_MODEL), dtype=np.float32)
PATTERN = np.tril(rng.random((N_TREES, N_HEADS, WIDTH, WIDTH), dtype=np.float32))
PATTERN /= PATTERN.sum(axis=3, keepdims=True)
KNOWN = range(N_NODES - 1)  # the classes of the probe: it saw no edge from the last label
DIRECTIONS = rng.standard_normal((len(KNOWN), D_MODEL)).astype(np.float32)
OFFSETS = rng.standard_normal(len(KNOWN))


def children(tree: int, node: int, trees: Trees = TREES) -> list[int]:
    """The labels below a node, in the order listed."""
    return [int(target) for source, target in trees.edges[tree] if source == node]


def answers(run: str, trees: Trees = TREES, seed: int = 0) -> dict[str, pl.DataFrame]:
    """Rows of `predictions` and `outcomes`: a wrong step goes to the sibling, to the root, or is a comma."""
    draws = np.random.default_rng([seed, *run.encode()])
    steps, outcomes = [], []
    for tree in range(len(trees)):
        path = trees.path[tree, : trees.depth[tree]].tolist()
        nodes, wrong = [int(trees.root[tree]), *path], []
        for step, node in enumerate(path):
            said, kind = f"→{node}", None
            if draws.random() > RIGHT.get(run, 0.5):
                others = [child for child in children(tree, nodes[step], trees) if child != node]
                which = draws.integers(3)
                said, kind = (",", "not_a_step") if which == 0 else (f"→{nodes[0]}", "not_a_child")
                if which == 2 and others:
                    said, kind = f"→{others[0]}", "wrong_child"
                wrong.append((step, kind, said))
            steps.append((tree, step, f"→{node}", said, float(draws.random())))
        first, kind, said = wrong[0] if wrong else (None, None, "")
        spoken = path if first is None else [*path[:first], *([int(said[1:])] if said != "," else [])]
        outcomes.append((tree, not wrong, spoken, not wrong, first, kind))
    named = ("tree_id", "step", "target", "predicted", "p_target")
    of_outcomes = ("tree_id", "teacher_forced_right", "greedy_path", "greedy_right", "first_wrong_step", "failure")
    return {
        "predictions": pl.DataFrame(steps, schema=named, orient="row").with_columns(
            run=pl.lit(run),
            token_id=pl.col("tree_id") * 256 + ROOT_AT + pl.col("step"),
            correct=pl.col("target") == pl.col("predicted"),
        ),
        "outcomes": pl.DataFrame(outcomes, schema=of_outcomes, orient="row").with_columns(run=pl.lit(run)),
    }


def directions(of: np.ndarray, offsets: np.ndarray, snapshot: int, label: str = "source") -> pl.DataFrame:
    """Rows of `results`, as `probes` records them: a direction per class of KNOWN."""
    about = {"site": "resid_post.0", "token_role": "edge_target", "label": label, "metric": "direction"}
    rows = [
        {**about, "value": float(offset), "name": f"tiny/resid_post.0/edge_target/{label}={of_class}", "direction": row}
        for of_class, row, offset in zip(KNOWN, of.tolist(), offsets, strict=True)
    ]
    return result_rows(
        rows, study="probes", run="tiny", query="", params={"snapshot": snapshot}, snapshot=snapshot, seed=0
    )


def plant_answers(root: Path) -> Path:
    """Commit all of it to a new store."""
    sites = {"resid_post.0": X, "pattern.0": PATTERN}
    for run in RIGHT:
        some = {"batches": [0]} if run == "half" else {}
        plant(root, TREES, sites if run == "tiny" else {}, run, None, answers(run), trees_per_shard=PER_SHARD, **some)
    with open_writer(root) as writer:
        writer.record(directions(DIRECTIONS[::-1], OFFSETS[::-1], snapshot=1))  # of a probe before the last
        writer.record(directions(DIRECTIONS, OFFSETS, snapshot=2))
    return root
