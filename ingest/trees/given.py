"""A set of trees from a table of the user's own: edges, root, goal and path of each.

A table has a row per tree: `edges`, a list of [source, target] in the order in which the prompt
lists them; `root`; `goal`, a leaf; and, if the user likes, `path`, the labels from the root's child
to the goal, which is compared with the path that is found. In .csv, lists are written as JSON.
All trees of a set have one number of nodes, and the labels 0 to n_nodes - 1. Every other column
becomes a column of a declared table, whose key is sequence_id, the tree's tree_id.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from actstore.catalog.declared import Relation, as_name, declare
from actstore.errors import BadInput, NotStored
from actstore.ingest.corpus.documents import open_documents
from actstore.ingest.task import Read
from actstore.ingest.trees.draw import MAX_NODES, MIN_NODES, NO_NODE, Trees, at_label, concatenate
from actstore.ingest.trees.task import SHARD_ROWS
from actstore.ingest.trees.tokens import WORDS, Drawn, decode, encode, n_positions

COLUMNS = ("edges", "root", "goal", "path")
OF_TREES = ("depth", "height", "n_leaves", "backward", "tree_hash", "variant_of", "change")  # columns of `trees`


@dataclass(frozen=True)
class GivenDrawn(Drawn):
    """A range of given trees.

    Attributes:
        table: name of the declared table; "" without one.
        others: its rows, in the trees' order; None without one.
    """

    table: str = ""
    others: pl.DataFrame | None = None

    def rows(self, *args: Any, **kwargs: Any) -> dict[str, pl.DataFrame]:
        """The rows of `trees`, `edges`, `tokens` and the declared table; see Drawn."""
        found = super().rows(*args, **kwargs)
        if self.others is not None:
            found[self.table] = self.others.with_columns(sequence_id=found["trees"]["tree_id"].cast(pl.Int64))
        return found


@dataclass(frozen=True)
class GivenTrees:
    """Trees that were given, as a set to run a model over; it has the attributes of a TreeSet.

    Attributes:
        name: of the set.
        n_trees, n_nodes: trees of the set, and nodes of each.
        trees_per_shard: trees per batch.
        get: gives the trees start…stop-1.
        get_others: gives their rows of the declared table; None without one.
        declared: the table's row of `relations`; None without one.
        recipe: file names and a hash of the trees, JSON.
        seed: of continuations that a model draws.
    """

    name: str
    n_trees: int
    n_nodes: int
    trees_per_shard: int
    get: Callable[[int, int], Trees] = field(repr=False, compare=False)
    get_others: Callable[[int, int], pl.DataFrame | None] = field(repr=False, compare=False)
    declared: pl.DataFrame | None = field(repr=False, compare=False)
    recipe: str | None = None
    seed: int = 0
    distribution: None = None
    depths: None = None
    variant_of: None = None
    change: None = None
    task: str = "trees"

    @property
    def n_sequences(self) -> int:
        """Trees of the set."""
        return self.n_trees

    @property
    def n_batches(self) -> int:
        """Batches of the set."""
        return -(-self.n_trees // self.trees_per_shard)

    @cached_property
    def n_tokens(self) -> int:
        """Tokens of all trees, estimated from the first 1,000."""
        return round(self.n_trees * float(self.between(0, min(1000, self.n_trees)).lengths.mean()))

    def between(self, start: int, stop: int) -> Drawn:
        """Trees start…stop-1 of the set, ready to be written as words and as rows."""
        table = "" if self.declared is None else str(self.declared["name"][0])
        return GivenDrawn(start, self.get(start, stop), None, table, self.get_others(start, stop))

    def drawn(self, batch: int) -> Drawn:
        """Draw one batch of the set."""
        return self.between(batch * self.trees_per_shard, min((batch + 1) * self.trees_per_shard, self.n_trees))

    def row(self) -> dict[str, Any]:
        """The set's row of `datasets`, without first_tree_id; distribution and seed are NULL."""
        return {
            "dataset": self.name,
            "distribution": None,
            "seed": None,
            "n_nodes": self.n_nodes,
            "depths": None,
            "n_trees": self.n_trees,
            "n_positions": n_positions(self.n_nodes),
            "trees_per_shard": self.trees_per_shard,
            "variant_of": None,
            "change": None,
            "recipe": self.recipe,
        }

    def parts(self) -> dict[str, pl.DataFrame]:
        """The row of `relations`, if there is a declared table."""
        return {} if self.declared is None else {"relations": self.declared}


def from_table(source: Any, name: str | None = None, trees_per_shard: int | None = None) -> GivenTrees:
    """The trees of a table.

    Args:
        source: a .parquet, .jsonl or .csv file, or a frame.
        name: of the set; default: the file's name.
        trees_per_shard: trees per batch; default: as for drawn trees.

    Raises:
        BadInput: the table lacks a column, or a row is no tree, goal and path; the
            message names the row.
    """
    documents = open_documents(source, "edges")
    names = documents.schema.names()
    if missing := [column for column in COLUMNS[:3] if column not in names]:
        raise BadInput(f"{documents.said} has no column {missing[0]!r}; it has {', '.join(names)}")
    if taken := [column for column in names if column.lower() in OF_TREES]:
        raise BadInput(
            f"{documents.said} has a column {taken[0]!r}, the name of a column of the table trees; rename it or leave it out"
        )
    batches, pieces, n_nodes, done = list[Trees](), list[pl.DataFrame](), None, 0
    for piece in documents.read():
        if len(piece):
            pieces.append(piece)
            batches.append(_parsed(piece, documents.said, done, n_nodes))
            n_nodes, done = batches[-1].n_nodes, done + len(piece)
    if n_nodes is None:
        raise BadInput(f"{documents.said} holds no tree")
    trees = concatenate(batches)
    sha256 = hashlib.sha256(encode(trees).tobytes()).hexdigest()
    stem = Path(documents.names[0]).stem if documents.names else "trees"
    called = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", stem).lstrip("._=,+-")[:100] or "trees"
    called = name or called
    relation, others = _others(pl.concat(pieces).drop(COLUMNS, strict=False), called, documents.said)
    fitting = SHARD_ROWS // n_positions(n_nodes) // 64 * 64
    return GivenTrees(
        called,
        done,
        n_nodes,
        trees_per_shard or min(done, fitting),
        lambda start, stop: trees[start:stop],
        lambda start, stop: None if others is None else others[start:stop],
        None if relation is None else pl.DataFrame([relation.row()]),
        json.dumps({"input": documents.names, "words_sha256": sha256}),
    )


def _others(columns: pl.DataFrame, name: str, said: str) -> tuple[Relation | None, pl.DataFrame | None]:
    """The declared table of the columns that are of no tree, and its rows; None without columns."""
    if not columns.width:
        return None, None
    structs = [column for column, dtype in columns.schema.items() if isinstance(dtype, pl.Struct)]
    rows = columns.with_columns(pl.col(column).struct.json_encode() for column in structs)
    rows = rows.with_columns(sequence_id=pl.int_range(pl.len(), dtype=pl.Int64))
    comments = dict.fromkeys(columns.columns, f"of {said}") | dict.fromkeys(structs, f"of {said}, JSON")
    relation = declare(as_name(name), "sequence", "documents", name, rows, comments)
    return relation, relation.fit(rows)


def stored(row: Mapping[str, Any], read: Read) -> GivenTrees:
    """A stored set of given trees, read from its rows.

    Args:
        row: of `datasets`.
        read: gives the set's stored rows. Those of `trees` and `edges` are enough, and those of
            `tokens` are, too.
    """
    per_batch = int(row["trees_per_shard"])

    def get(start: int, stop: int) -> Trees:
        if stop <= start:
            return _of_batch(row, read, 0)[:0]
        first = start // per_batch
        held = concatenate([_of_batch(row, read, batch) for batch in range(first, -(-stop // per_batch))])
        return held[start - first * per_batch : stop - first * per_batch]

    def get_others(start: int, stop: int) -> pl.DataFrame | None:
        if declared is None or stop <= start:
            return None
        first = start // per_batch
        try:
            held = pl.concat(
                [read(declared["name"][0], batch).sort("sequence_id") for batch in range(first, -(-stop // per_batch))]
            )
        except NotStored:
            return None  # the trees can be run without
        return held[start - first * per_batch : stop - first * per_batch]

    try:
        declared = read("relations", None)
    except NotStored:
        declared = None
    return GivenTrees(
        row["dataset"], row["n_trees"], row["n_nodes"], per_batch, get, get_others, declared, row.get("recipe")
    )


def _of_batch(row: Mapping[str, Any], read: Read, batch: int) -> Trees:
    """The trees of one stored batch."""
    n_nodes = int(row["n_nodes"])
    with suppress(NotStored):
        trees, edges = read("trees", batch).sort("tree_id"), read("edges", batch).sort("tree_id", "edge")
        depth = trees["depth"].to_numpy().astype(np.uint8)
        path = np.full((len(trees), n_nodes - 1), NO_NODE, np.uint8)
        path[np.arange(n_nodes - 1) < depth[:, None]] = trees["path"].explode().to_numpy()
        listed = edges.select("source", "target").to_numpy().astype(np.uint8).reshape(len(trees), n_nodes - 1, 2)
        root, goal = (trees[name].to_numpy().astype(np.uint8) for name in ("root", "goal"))
        return Trees(listed, root, goal, path, depth)
    tokens = read("tokens", batch).sort("token_id")
    of_tree = tokens["tree_id"].rle_id().to_numpy()
    words = np.zeros((int(of_tree[-1]) + 1, n_positions(n_nodes)), np.uint8)
    numbers = {word: number for number, word in enumerate(WORDS)}
    spelled = tokens["token"].cast(pl.String).replace_strict(numbers, return_dtype=pl.UInt8)
    words[of_tree, tokens["position"].to_numpy()] = spelled.to_numpy()
    return decode(words)


def _parsed(piece: pl.DataFrame, said: str, first: int, n_nodes: int | None) -> Trees:
    """The trees of some rows, checked.

    Args:
        first: number of the piece's first row.
        n_nodes: nodes of the trees before; None for the first piece.
    """
    edges = _lists(piece, "edges", pl.List(pl.List(pl.Int64)), said)
    path = _lists(piece, "path", pl.List(pl.Int64), said) if "path" in piece.columns else None
    ends = {name: _integers(piece, name, said) for name in ("root", "goal")}

    def refuse(bad: Any, what: str) -> None:
        bad = np.asarray(bad, bool)
        if bad.any():
            others = f" (and {int(bad.sum()) - 1} rows after it)" if bad.sum() > 1 else ""
            raise BadInput(f"{said}, row {first + int(bad.argmax())}{others}: {what}")

    pairs = edges.list.eval(pl.element().list.len() == 2).list.all()
    nulls = edges.is_null() | edges.list.eval(pl.element().list.eval(pl.element().is_null()).list.any()).list.any()
    refuse((nulls | ~pairs).fill_null(True), "its edges are no list of [source, target]")
    sizes = edges.list.len().to_numpy().astype(np.int64)
    n_nodes = int(sizes[0]) + 1 if n_nodes is None else n_nodes
    refuse(
        ~np.isin(sizes + 1, np.arange(MIN_NODES, MAX_NODES + 1)),
        f"a tree has {MIN_NODES} to {MAX_NODES} nodes, and one edge less",
    )
    refuse(sizes != n_nodes - 1, f"it has another number of edges than row 0 ({n_nodes - 1}); make a set of each size")
    listed = np.array(edges.to_list(), np.int64).reshape(len(piece), n_nodes - 1, 2)
    root, goal = ends["root"], ends["goal"]
    labels = np.concatenate([listed.reshape(len(piece), -1), root[:, None], goal[:, None]], axis=1)
    refuse(
        ((labels < 0) | (labels >= n_nodes)).any(axis=1),
        f"the labels of a tree of {n_nodes} nodes are 0 to {n_nodes - 1}",
    )
    source, target = listed[:, :, 0], listed[:, :, 1]
    refuse((target == root[:, None]).any(axis=1), "an edge leads to the root")
    ordered = np.sort(target, axis=1)
    refuse((ordered[:, 1:] == ordered[:, :-1]).any(axis=1), "two edges lead to one node")
    ordered = np.sort(source, axis=1)
    refuse((ordered[:, 2:] == ordered[:, :-2]).any(axis=1), "a node has three children; trees are binary")
    trees = Trees(
        listed.astype(np.uint8),
        root.astype(np.uint8),
        goal.astype(np.uint8),
        np.full((len(piece), n_nodes - 1), NO_NODE, np.uint8),
        np.zeros(len(piece), np.uint8),
    )
    depths = trees.node_depths()
    refuse((depths != NO_NODE).sum(axis=1) != n_nodes, "not every node is reached from the root")
    refuse((source == goal[:, None]).any(axis=1), "the goal is no leaf")
    trees = _with_paths(trees, depths)
    if path is not None:
        given = np.full((len(piece), n_nodes), -1, np.int64)
        for row, steps in enumerate(path.to_list()):
            kept = [-2 if step is None else step for step in steps or [-2]][:n_nodes]
            given[row, : len(kept)] = kept
        found = np.where(trees.path == NO_NODE, -1, trees.path.astype(np.int64))
        wrong = (given[:, :-1] != found).any(axis=1) | (given[:, -1] != -1)
        row = int(wrong.argmax())
        steps = trees.path[row][: trees.depth[row]].tolist()
        refuse(wrong, f"its path is {path[row].to_list() if path[row] is not None else None}, not {steps}")
    return trees


def _with_paths(trees: Trees, depths: np.ndarray) -> Trees:
    """The trees with the path from root to goal."""
    parents = trees.parents()
    depth = at_label(depths, trees.goal[:, None])[:, 0]
    path, node = trees.path.copy(), trees.goal.copy()
    for _ in range(int(depth.max(initial=0))):
        at = at_label(depths, node[:, None])[:, 0].astype(np.intp)
        climbing = np.flatnonzero(node != trees.root)
        path[climbing, at[climbing] - 1] = node[climbing]
        above = at_label(parents, node[:, None])[:, 0]
        node = np.where(node == trees.root, node, above)
    return Trees(trees.edges, trees.root, trees.goal, path, depth)


def _lists(piece: pl.DataFrame, name: str, dtype: pl.DataType, said: str) -> pl.Series:
    """A column of lists of integers; JSON texts are parsed."""
    column = piece[name]
    try:
        if column.dtype == pl.String:
            column = pl.Series(name, [None if text is None else json.loads(text) for text in column], strict=True)
        inner: Any = column.dtype
        while isinstance(inner, (pl.List, pl.Array)):
            inner = inner.inner
        if not (inner.is_integer() or inner == pl.Null):
            raise TypeError(f"it is {column.dtype}")
        return column.cast(dtype)
    except (TypeError, ValueError, OverflowError, RecursionError, pl.exceptions.PolarsError) as error:
        form = "a list of [source, target]" if name == "edges" else "a list of labels"
        raise BadInput(f"column {name!r} of {said} is not {form} per row ({str(error).splitlines()[0]})") from error


def _integers(piece: pl.DataFrame, name: str, said: str) -> np.ndarray:
    """int64 [rows]: a column of labels; -1 for none."""
    column = piece[name]
    if not column.dtype.is_integer():
        raise BadInput(f"column {name!r} of {said} is {column.dtype}; labels are integers")
    return column.cast(pl.Int64, strict=False).fill_null(-1).to_numpy()
