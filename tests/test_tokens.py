"""Tokens against a writer and a reader that know only the spelling, and vocabularies against lists written by hand."""

from __future__ import annotations

import re
from importlib.resources import files

import duckdb
import networkx as nx
import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actstore.arrays.address import POSITIONS_PER_TREE
from actstore.catalog import tables
from actstore.errors import BadInput
from actstore.ingest.trees.draw import MAX_NODES, MIN_NODES, Trees, draw
from actstore.ingest.trees.rows import edge_rows, tree_rows
from actstore.ingest.trees.tokens import (
    COMMA,
    PAD,
    ROLES,
    SYSTEMS,
    WORDS,
    Vocabulary,
    decode,
    encode,
    n_positions,
    spell,
    token_rows,
)
from tests.test_trees import assert_same, batches

REPRODUCTION_16 = (
    "<PAD> , | : 0 →0 1 →1 2 →2 3 →3 4 →4 5 →5 6 →6 7 →7 8 →8 9 →9 10 →10 11 →11 12 →12 13 →13 14 →14 15 →15"
)
BASELINE_16 = ", : | >10 >11 >12 >13 >14 >15 >0 >1 >2 >3 >4 >5 >6 >7 >8 >9 10 11 12 13 14 15 0 1 2 3 4 5 6 7 8 9"
PROMPT = re.compile(r"(?P<edges>\d+ →\d+( , \d+ →\d+)*) \| (?P<goal>\d+) : (?P<root>\d+)(?P<path>( →\d+)+)")
each_system = pytest.mark.parametrize("system", SYSTEMS)


# A writer and a reader that share nothing with the code under test but the spelling.


def naive_words(trees: Trees, i: int) -> list[str]:
    """Tree i as the page says it is written: `source →target ,` …, `|`, `goal : root`, then a `→node` a step."""
    prompt = " , ".join(f"{source} →{target}" for source, target in trees.edges[i].tolist())
    steps = "".join(f" →{node}" for node in trees.path[i, : trees.depth[i]].tolist())
    return f"{prompt} | {trees.goal[i]} : {trees.root[i]}{steps}".split()


def naive_roles(words: list[str]) -> list[tuple[str, int | None, int | None, int | None]]:
    """(role, edge, node, step) of each word, told from the words before it."""
    told: list[tuple[str, int | None, int | None, int | None]] = []
    edge, step, after_bar = 0, 0, 0
    for word in words:
        node = int(word.lstrip("→>")) if word not in {",", "|", ":"} else None
        if after_bar:
            role = ("goal", "colon", "root")[after_bar - 1] if after_bar <= 3 else "path"
            told.append((role, None, node, step if role == "path" else None))
            step += role == "path"
            after_bar += 1
        elif word == "|":
            told.append(("bar", edge, None, None))
            after_bar = 1
        elif word == ",":
            told.append(("separator", edge, None, None))
            edge += 1
        else:
            told.append(("edge_source" if word[0].isdigit() else "edge_target", edge, node, None))
    return told


def naive_reading(words: list[str]) -> tuple[list[tuple[int, int]], int, int, list[int]] | None:
    """Edges, root, goal and path of 4n-1 words, <PAD> or commas behind; None where networkx sees no such binary tree."""
    prompt = PROMPT.fullmatch(re.sub(r"( <PAD>| ,)+$", "", " ".join(words)))
    if not prompt:
        return None
    edges = [(int(source), int(target)) for source, target in re.findall(r"(\d+) →(\d+)", prompt["edges"])]
    root, goal, path = (
        int(prompt["root"]),
        int(prompt["goal"]),
        [int(step) for step in re.findall(r"\d+", prompt["path"])],
    )
    graph = nx.DiGraph(edges)
    if not (len(edges) == (len(words) + 1) // 4 - 1 == len(graph.edges) and {root, goal} <= set(graph)):
        return None
    good = nx.is_arborescence(graph) and graph.in_degree(root) == 0 == graph.out_degree(goal)
    good = good and max(degree for _, degree in graph.out_degree()) <= 2
    return (edges, root, goal, path) if good and nx.shortest_path(graph, root, goal)[1:] == path else None


# A tree and its words.


def three_nodes() -> Trees:
    """2 → 0 and 2 → 1, the goal is 1; and 0 → 2 → 1, the goal is 1."""
    return Trees(
        edges=np.array([[[2, 0], [2, 1]], [[2, 1], [0, 2]]], np.uint8),
        root=np.array([2, 0], np.uint8),
        goal=np.array([1, 1], np.uint8),
        path=np.array([[1, 255], [2, 1]], np.uint8),
        depth=np.array([1, 2], np.uint8),
    )


def test_a_small_tree_is_spelled_as_one_would_by_hand() -> None:
    words = encode(three_nodes())
    assert words.dtype == np.uint8
    assert words.shape == (2, 11)
    assert spell(words[0]) == ["2", "→0", ",", "2", "→1", "|", "1", ":", "2", "→1"]
    assert spell(words[1]) == ["2", "→1", ",", "0", "→2", "|", "1", ":", "0", "→2", "→1"]
    assert words[0].tolist() == [8, 5, 1, 8, 7, 2, 6, 3, 8, 7, 0]


def test_a_small_tree_has_the_token_rows_found_by_hand() -> None:
    rows = token_rows(three_nodes()[:1], first_tree_id=9)
    assert rows.rows() == [
        (2304, 9, 0, "2", "edge_source", 0, 2, None),
        (2305, 9, 1, "→0", "edge_target", 0, 0, None),
        (2306, 9, 2, ",", "separator", 0, None, None),
        (2307, 9, 3, "2", "edge_source", 1, 2, None),
        (2308, 9, 4, "→1", "edge_target", 1, 1, None),
        (2309, 9, 5, "|", "bar", 1, None, None),
        (2310, 9, 6, "1", "goal", None, 1, None),
        (2311, 9, 7, ":", "colon", None, None, None),
        (2312, 9, 8, "2", "root", None, 2, None),
        (2313, 9, 9, "→1", "path", None, 1, 0),
    ]


@given(batches())
def test_trees_are_written_as_a_naive_writer_writes_them(trees: Trees) -> None:
    words = encode(trees)
    assert words.shape == (len(trees), 4 * trees.n_nodes - 1)
    for i in range(len(trees)):
        written = naive_words(trees, i)
        assert spell(words[i]) == written
        assert (words[i, len(written) :] == PAD).all()


@given(batches())
def test_a_tree_its_words_and_back_is_the_same_tree(trees: Trees) -> None:
    assert_same(decode(encode(trees)), trees)


@given(batches(), st.integers(0, 2**31 - 100))
def test_token_rows_are_those_of_a_naive_writer(trees: Trees, first_tree_id: int) -> None:
    expected = [
        ((first_tree_id + i) * POSITIONS_PER_TREE + position, first_tree_id + i, position, word, *told)
        for i in range(len(trees))
        for words in [naive_words(trees, i)]
        for position, (word, told) in enumerate(zip(words, naive_roles(words), strict=True))
    ]
    rows = token_rows(trees, first_tree_id)
    assert rows.columns == ["token_id", "tree_id", "position", "token", "role", "edge", "node", "step"]
    assert rows.rows() == expected


def test_every_position_of_the_largest_tree_has_its_own_token_id() -> None:
    assert n_positions(MAX_NODES) == 255 <= POSITIONS_PER_TREE
    rows = token_rows(draw("deep", 0, 0, 4, n_nodes=MAX_NODES, depths=[MAX_NODES - 1]))
    assert len(rows) == 4 * n_positions(MAX_NODES)
    assert rows["token_id"].is_unique().all()


@pytest.mark.parametrize("table", ["tokens", "edges", "trees"])
def test_rows_fill_the_table_of_the_schema_and_come_back_unchanged(table: str) -> None:
    trees = draw("baseline", 0, 3, 40, n_nodes=12, n_labels=MAX_NODES)
    rows = {"tokens": token_rows(trees, 3), "edges": edge_rows(trees, 3), "trees": tree_rows(trees, 3, "d")}[table]
    with duckdb.connect() as con:
        con.execute((files("actstore.catalog") / "schema.sql").read_text())
        con.register("rows", rows)
        con.execute(f"insert into {table} by name select * from rows")
        stored = con.sql(f"select * from {table}").pl()
    small = {kind for kind in stored.schema.dtypes() if kind.is_unsigned_integer()} - {pl.UInt64()}  # but a tree's hash
    assert not small, "depth - 2 must not overflow"
    of_the_catalog = {*tables.ADDED.get(table, ()), *([tables.DERIVED[table]] if table in tables.DERIVED else [])}
    assert set(stored.columns) - set(rows.columns) == of_the_catalog
    assert stored.select(rows.columns).cast(rows.schema).equals(rows)


# Words that are no tree.


@given(batches(max_nodes=12, max_trees=1), st.data())
def test_mangled_words_are_refused_unless_networkx_finds_another_tree_in_them(
    trees: Trees, data: st.DataObject
) -> None:
    words = encode(trees)
    at = data.draw(st.integers(0, words.shape[1] - 1))
    near = st.sampled_from(sorted(set(words[0].tolist()) | {PAD, COMMA}))  # likelier to hit upon another tree
    words[0, at] = data.draw(near | st.integers(0, 255))
    assert_read_alike(words)


@given(batches(max_nodes=8, max_trees=1), st.data())
def test_swapped_words_are_refused_unless_networkx_finds_another_tree_in_them(
    trees: Trees, data: st.DataObject
) -> None:
    words = encode(trees)
    at, to = (data.draw(st.integers(0, words.shape[1] - 1)) for _ in range(2))
    words[0, [at, to]] = words[0, [to, at]]
    assert_read_alike(words)


@given(st.integers(3, 6), st.booleans(), st.booleans(), st.data())
def test_random_edges_and_goals_are_read_exactly_when_networkx_finds_a_tree_in_them(
    n_nodes: int, downward: bool, walked: bool, data: st.DataObject
) -> None:
    root, *targets = order = data.draw(st.permutations(range(n_nodes)))
    above = [order[:place] if downward else order for place in range(1, n_nodes)]  # no circles, or circles too
    parents = {target: data.draw(st.sampled_from(labels)) for target, labels in zip(targets, above, strict=True)}
    goal = data.draw(st.sampled_from([label for label in order if label not in parents.values()] or order))
    climb = [goal]
    while walked and climb[0] in parents and len(climb) < n_nodes:
        climb.insert(0, parents[climb[0]])
    steps = climb[1:] if walked else data.draw(st.lists(st.integers(0, n_nodes - 1), max_size=n_nodes - 1))
    prompt = " , ".join(f"{parents[target]} →{target}" for target in targets)
    row = f"{prompt} | {goal} : {root} {' '.join(f'→{step}' for step in steps)}".split()
    row += ["<PAD>"] * (n_positions(n_nodes) - len(row))
    assert_read_alike(np.array([[WORDS.index(word) for word in row]], np.uint8))


def assert_read_alike(words: np.ndarray) -> None:
    """decode reads the row of words as networkx does, and refuses it where networkx sees no tree with a path."""
    reading = naive_reading([WORDS[word] if word < len(WORDS) else f"?{word}" for word in words[0].tolist()])
    if reading is None:
        with pytest.raises(BadInput, match="row 0 is no tree, goal and path") as refusal:
            decode(words)
        assert "\n" not in str(refusal.value)
    else:
        read = decode(words)
        edges, root, goal, path = reading
        assert [tuple(edge) for edge in read.edges[0].tolist()] == edges
        assert (read.root[0], read.goal[0], read.depth[0]) == (root, goal, len(path))
        assert read.path[0].tolist() == path + [255] * (len(edges) - len(path))


@pytest.mark.parametrize(
    ("spelled", "what"),
    [
        ("0 →1 , 0 →2 , 0 →3 | 3 : 0 →3", "three children"),
        ("0 →1 , 1 →2 , 1 →3 | 1 : 0 →1", "a goal that is no leaf"),
        ("0 →1 , 2 →3 , 3 →2 | 1 : 0 →1", "a circle beside the tree"),
        ("0 →1 , 1 →0 , 2 →3 | 1 : 0 →1", "a circle through the root"),
        ("0 →1 , 0 →2 , 1 →2 | 2 : 0 →2", "two parents"),
        ("0 →1 , 0 →1 , 0 →2 | 1 : 0 →1", "an edge twice"),
        ("0 →1 , 1 →2 , 2 →3 | 3 : 1 →2 →3", "a root with a parent"),
        ("0 →1 , 1 →2 , 2 →3 | 3 : 0 →1 →3", "a path that leaves a node out"),
        ("0 →1 , 1 →2 , 2 →3 | 3 : 0 →1 →2", "a path that stops before its goal"),
        ("0 →1 , 1 →2 , 2 →3 | 3 : 0 →1 <PAD> →2", "a path with a gap"),
        ("0 →1 , 0 →2 , 2 →3 | 1 : 0 →1 <PAD> →3", "a word behind the path"),
        ("0 →1 , 0 →2 , 2 →3 | 1 : 0", "no path at all"),
        ("0 →1 , 0 →2 , 2 →3 , 2 →4 | 1 : 0 <PAD> →0 →1 →1", "a gap before a second root"),
        ("0 →1 , 0 →2 , 2 →3 | | : 0", "no goal and no path"),
        ("0 →1 , 0 →2 , 2 →3 | 1 : | →1", "no root"),
        ("0 →1 , 1 →2 | 2 →3 | 3 : 0 →1 →2 →3", "two bars"),
        ("0 →1 , 1 2 , 2 →3 | 3 : 0 →1 →2 →3", "a target without its arrow"),
    ],
)
def test_what_is_no_tree_is_refused(spelled: str, what: str) -> None:
    row = [WORDS.index(word) for word in spelled.split()]
    words = np.array([row + [PAD] * (15 - len(row))], np.uint8)  # 4 nodes, or 5 where they fill their 19 words
    good = encode(draw("deep", 0, 0, 1, n_nodes=4 if len(row) <= 15 else 5))
    with pytest.raises(BadInput, match="row 1 is no tree"):
        decode(np.concatenate([good, words]))


@pytest.mark.parametrize("shape", [(2, 3), (2, 60), (2, 64), (2, 4 * 65 - 1), (63,), (1, 2, 63), (0, 0)])
def test_words_of_no_tree_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="n 2 to 64"):
        decode(np.zeros(shape, np.uint8))


# Vocabularies.


def test_the_vocabularies_of_16_nodes_are_those_the_models_were_trained_on() -> None:
    assert Vocabulary("reproduction", 16).words() == REPRODUCTION_16.split()
    assert Vocabulary("baseline", 16).words() == BASELINE_16.split()
    assert (len(Vocabulary("reproduction", 16)), len(Vocabulary("baseline", 16))) == (36, 35)


def test_a_small_tree_has_the_ids_found_by_hand() -> None:
    words = encode(three_nodes())[0]  # 2 →0 , 2 →1 | 1 : 2 →1 <PAD>
    assert Vocabulary("reproduction", 3).encode(words).tolist() == [8, 5, 1, 8, 7, 2, 6, 3, 8, 7, 0]
    assert Vocabulary("baseline", 3).encode(words).tolist() == [8, 3, 0, 8, 4, 2, 7, 1, 8, 4, 0]


@each_system
@pytest.mark.parametrize("n_nodes", range(MIN_NODES, MAX_NODES + 1))
def test_every_id_has_its_own_word_and_goes_back_to_its_id(system: str, n_nodes: int) -> None:
    vocabulary = Vocabulary(system, n_nodes)
    ids = np.arange(len(vocabulary))
    np.testing.assert_array_equal(vocabulary.encode(vocabulary.decode(ids)), ids)
    marks, arrow = ({"<PAD>", ",", "|", ":"}, "→") if system == "reproduction" else ({",", "|", ":"}, ">")
    labels = [str(label) for label in range(n_nodes)]
    assert len(vocabulary.words()) == len(vocabulary)
    assert set(vocabulary.words()) == {*marks, *labels, *(arrow + label for label in labels)}


@given(st.integers(MIN_NODES, MAX_NODES), st.data())
def test_every_word_goes_to_its_id_and_back_but_the_baselines_padding_which_is_its_comma(
    n_nodes: int, data: st.DataObject
) -> None:
    words = np.array(data.draw(st.lists(st.integers(0, 3 + 2 * n_nodes), min_size=1)), np.uint8)
    reproduction, baseline = (Vocabulary(system, n_nodes) for system in ("reproduction", "baseline"))
    np.testing.assert_array_equal(reproduction.decode(reproduction.encode(words)), words)
    commas = np.where(words == PAD, COMMA, words)
    np.testing.assert_array_equal(baseline.decode(baseline.encode(words)), commas)
    np.testing.assert_array_equal(baseline.encode(words), baseline.encode(commas))


@each_system
@given(trees=batches())
def test_a_tree_its_token_ids_and_back_is_the_same_tree(system: str, trees: Trees) -> None:
    vocabulary = Vocabulary(system, MAX_NODES)
    ids = vocabulary.encode(encode(trees))
    assert ids.dtype == np.int64
    assert_same(decode(vocabulary.decode(ids)), trees)


@given(batches())
def test_both_vocabularies_put_the_same_role_and_node_at_the_same_position(trees: Trees) -> None:
    told: list[list[list[tuple]]] = []
    for system in SYSTEMS:
        vocabulary = Vocabulary(system, int(trees.edges.max()) + 1 if trees.edges.max() else MIN_NODES)
        words = [[vocabulary.words()[token] for token in row] for row in vocabulary.encode(encode(trees)).tolist()]
        padding = {"reproduction": "<PAD>", "baseline": ","}[system]
        told.append([])
        for row in words:
            while row[-1] == padding:
                row.pop()
            told[-1].append(
                [(*roles, word.replace(">", "→")) for roles, word in zip(naive_roles(row), row, strict=True)]
            )
    reproduction, baseline = told
    assert reproduction == baseline
    rows = token_rows(trees).select("role", "edge", "node", "step", "token").rows()
    assert rows == [word for row in reproduction for word in row]


@each_system
@given(n_nodes=st.integers(MIN_NODES, MAX_NODES - 1), data=st.data())
def test_a_label_too_large_for_the_vocabulary_is_refused_by_name(
    system: str, n_nodes: int, data: st.DataObject
) -> None:
    word = data.draw(st.integers(4 + 2 * n_nodes, len(WORDS) - 1))
    with pytest.raises(BadInput, match=rf"vocabulary of {n_nodes} nodes has no '{WORDS[word]}'; use trees of at most"):
        Vocabulary(system, n_nodes).encode(np.array([[4, 5, word]], np.uint8))


@each_system
@given(outside=st.integers(-300, 300))
def test_an_id_outside_the_vocabulary_is_refused(system: str, outside: int) -> None:
    vocabulary = Vocabulary(system, 16)
    assume(not 0 <= outside < len(vocabulary))
    with pytest.raises(BadInput, match=f"the vocabulary has 0 to {len(vocabulary) - 1}"):
        vocabulary.decode(np.array([0, outside]))


@pytest.mark.parametrize(
    ("system", "n_nodes", "says"),
    [
        ("gpt2", 16, "there are reproduction, baseline"),
        ("baseline", 1, "there are 2 to 64"),
        ("reproduction", 65, "there are 2 to 64"),
    ],
)
def test_a_vocabulary_that_no_system_has_is_refused(system: str, n_nodes: int, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Vocabulary(system, n_nodes)


def test_the_schema_spells_words_and_roles_in_the_order_of_their_numbers() -> None:
    with duckdb.connect() as con:
        con.execute((files("actstore.catalog") / "schema.sql").read_text())
        kinds = con.sql("select enum_range(null::token_word), enum_range(null::token_role)").fetchall()[0]
    assert kinds == (list(WORDS), list(ROLES))


def test_no_trees_are_no_tokens() -> None:
    none, some = draw("deep", 0, 0, 0), draw("deep", 0, 0, 2)
    assert encode(none).shape == (0, 63)
    assert len(decode(encode(none))) == 0
    assert len(token_rows(none)) == 0
    assert token_rows(none).schema == token_rows(some).schema
    assert token_rows(some).schema["token"] == pl.Enum(WORDS)
