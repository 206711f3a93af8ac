"""Trees that a user brings: the trees of a table are those that were written, and each fault names its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.arrays.address import Ids
from actstore.catalog.declared import parsed
from actstore.catalog.part_types import every_column
from actstore.errors import BadInput, NotStored
from actstore.ingest.corpus.documents import OURS
from actstore.ingest.trees import given as given_trees
from actstore.ingest.trees.draw import DISTRIBUTIONS, NO_NODE, Trees, draw
from actstore.ingest.trees.given import GivenTrees, from_table
from actstore.ingest.trees.task import TreeSet
from actstore.writing.parts import as_stored


def table_of(trees: Trees) -> pl.DataFrame:
    """Trees as a user writes them down."""
    return pl.DataFrame(
        {
            "edges": trees.edges.astype(np.int64).tolist(),
            "root": trees.root.astype(np.int64),
            "goal": trees.goal.astype(np.int64),
            "path": [path[path != NO_NODE].tolist() for path in trees.path],
        }
    )


def same(one: Trees, other: Trees) -> None:
    for name, values in vars(one).items():
        np.testing.assert_array_equal(values, getattr(other, name), err_msg=name)
        assert values.dtype == getattr(other, name).dtype == np.uint8


def stored(trees: GivenTrees, first: int, lost: tuple[str, ...] = ()) -> GivenTrees:
    """The set as it is read back from its parts, without some tables."""
    parts: dict[tuple[str, int | None], pl.DataFrame] = {(name, None): rows for name, rows in trees.parts().items()}
    for batch in range(trees.n_batches):
        drawn = trees.drawn(batch)
        for table, frame in drawn.rows(Ids((first + drawn.start) * 256, first + drawn.start), trees.name).items():
            parts[table, batch] = as_stored(table, frame)

    def read(table: str, batch: int | None) -> pl.DataFrame:
        if table in lost or (table, batch) not in parts:
            raise NotStored(table)
        return parts[table, batch]

    return given_trees.stored({**trees.row(), "first_tree_id": first}, read)


@given(
    st.sampled_from(DISTRIBUTIONS),
    st.integers(2, 12),
    st.integers(1, 20),
    st.integers(1, 7),
    st.integers(0, 99),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_given_trees_are_the_drawn_ones_from_the_table_and_from_the_store(
    distribution: str, n_nodes: int, n_trees: int, per_shard: int, seed: int, has_path: bool
) -> None:
    trees = draw(distribution, seed, 0, n_trees, n_nodes)
    table = table_of(trees) if has_path else table_of(trees).drop("path")
    found = from_table(table, "mine", per_shard)
    whole = found.between(0, n_trees).trees
    same(whole, trees)
    drawn = TreeSet(distribution, n_trees, seed, n_nodes, name="mine", trees_per_shard=per_shard).between(0, n_trees)
    for name, rows in found.between(0, n_trees).rows(Ids(5 * 256, 5), "mine").items():
        assert rows.equals(drawn.rows(Ids(5 * 256, 5), "mine")[name]), name
    for lost in ((), ("trees",), ("tokens",)):
        again = stored(found, 5, lost)
        assert again.row() == found.row()
        for start, stop in ((0, n_trees), (n_trees // 2, n_trees), (0, 0)):
            same(again.between(start, stop).trees, trees[start:stop])
    with pytest.raises(NotStored):
        stored(found, 5, ("trees", "tokens")).between(0, 1)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_trees_are_read_alike_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    trees = draw("baseline", 3, 0, 1200, 6)
    table, path = table_of(trees), tmp_path / f"my trees.{kind}"
    if kind == "csv":
        texts = {name: [json.dumps(value) for value in table[name].to_list()] for name in ("edges", "path")}
        table.with_columns(**{name: pl.Series(values) for name, values in texts.items()}).write_csv(path)
    else:
        {"parquet": table.write_parquet, "jsonl": table.write_ndjson}[kind](path)
    found = from_table(path)
    assert (found.name, found.n_trees, found.n_nodes) == ("my-trees", 1200, 6)
    same(found.between(0, 1200).trees, trees)
    assert found.row()["distribution"] is found.row()["seed"] is None


GOOD: dict[str, Any] = {"edges": [[0, 1], [0, 2], [1, 3]], "root": 0, "goal": 3}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "three numbers": ({"edges": [[0, 1, 2], [0, 2], [1, 3]]}, "its edges are no list of"),
    "a null": ({"edges": [[0, None], [0, 2], [1, 3]]}, "its edges are no list of"),
    "no edges": ({"edges": None}, "its edges are no list of"),
    "an empty tree": ({"edges": []}, "a tree has 2 to 64 nodes"),
    "another size": ({"edges": [[0, 1]], "goal": 1}, r"it has another number of edges than row 0 \(3\)"),
    "a large label": ({"edges": [[0, 1], [0, 4], [1, 3]]}, "the labels of a tree of 4 nodes are 0 to 3"),
    "a negative goal": ({"goal": -1}, "the labels of a tree of 4 nodes are 0 to 3"),
    "no goal": ({"goal": None}, "the labels of a tree of 4 nodes are 0 to 3"),
    "another root": ({"root": 1}, "an edge leads to the root"),
    "two parents": ({"edges": [[0, 1], [0, 3], [1, 3]]}, "two edges lead to one node"),
    "three children": ({"edges": [[0, 1], [0, 2], [0, 3]]}, "a node has three children"),
    "a circle": ({"edges": [[1, 2], [2, 3], [3, 1]]}, "not every node is reached from the root"),
    "an inner goal": ({"goal": 1}, "the goal is no leaf"),
    "a wrong path": ({"path": [2, 3]}, r"its path is \[2, 3\], not \[1, 3\]"),
    "a long path": ({"path": [1, 3, 3, 3, 3]}, r"its path is \[1, 3, 3, 3, 3\], not \[1, 3\]"),
    "no path": ({"path": None}, r"its path is None, not \[1, 3\]"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_tree_is_refused_with_its_row(what: str) -> None:
    changed, said = BAD[what]
    path = {"path": [1, 3]} if "path" in changed else {}
    rows = [{**GOOD, **path}] * 2 + [{**GOOD, **path, **changed}] * 3
    schema = {"edges": pl.List(pl.List(pl.Int64)), "root": pl.Int64, "goal": pl.Int64, "path": pl.List(pl.Int64)}
    frame = pl.DataFrame(rows, schema={name: dtype for name, dtype in schema.items() if name in rows[0]})
    with pytest.raises(BadInput, match=rf"the frame, row 2 \(and 2 rows after it\): {said}") as caught:
        from_table(frame)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"edges": [[[0, 1]]], "root": [0]}, "has no column 'goal'; it has edges, root"),
        (
            {"edges": [[[0, 1]]], "root": [0], "goal": [1], "depth": [1]},
            "has a column 'depth', the name of a column of the",
        ),
        (
            {"edges": [[[0, 1]]], "root": [0], "goal": [1], "split": [1]},
            "has a column 'split', the name of a column of the",
        ),
        ({"edges": [[[0.5, 1.0]]], "root": [0], "goal": [1]}, "column 'edges' of the frame is not a list of"),
        ({"edges": ["0-1"], "root": [0], "goal": [1]}, "column 'edges' of the frame is not a list of"),
        (
            {"edges": [[[0, 1]]], "root": ["0"], "goal": [1]},
            "column 'root' of the frame is String; labels are integers",
        ),
        ({"edges": [], "root": [], "goal": []}, "the frame holds no tree"),
    ],
)
def test_what_is_no_table_of_trees_is_refused_in_one_line(table: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        from_table(pl.DataFrame(table))
    assert "\n" not in str(caught.value)


def test_a_good_row_is_taken_so_that_each_fault_is_one_change() -> None:
    assert from_table(pl.DataFrame([GOOD])).between(0, 1).trees.depth.tolist() == [2]


def test_every_other_column_is_a_column_of_a_declared_table() -> None:
    rows = [{**GOOD, "source": f"s{i}", "about": {"n": i}} for i in range(5)]
    made = from_table(pl.DataFrame(rows), "my trees", 2)
    for found in (made, stored(made, 7)):
        relation = parsed(found.parts()["relations"].row(0, named=True))
        assert (relation.name, relation.owner) == ("my_trees", "my trees")
        assert [name for name, *_ in relation.columns] == ["sequence_id", "source", "about"]
        table = found.drawn(1).rows(Ids(9 * 256, 9), "my trees")["my_trees"]
        assert table["sequence_id"].to_list() == [9, 10]
        assert table["source"].to_list() == ["s2", "s3"]
        assert table["about"].str.json_path_match("$.n").to_list() == ["2", "3"]
    assert "my_trees" not in stored(made, 7, ("my_trees",)).drawn(1).rows(Ids(9 * 256, 9), "my trees")


def test_names_that_are_refused_are_those_of_the_tables() -> None:
    columns = {*every_column()["trees"], *every_column()["edges"]} - {"root", "goal", "path"}
    assert columns - {"source", "target", "source_depth", "on_path", "is_last"} <= {*given_trees.OF_TREES, *OURS}
