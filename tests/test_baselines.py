"""What is guessed from the tree alone: each named baseline against its guess written out, and how a study holds probes to it."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from actstore import queries
from actstore.cli import main
from actstore.errors import BadInput
from actstore.ingest.trees.draw import draw
from actstore.queries import study
from actstore.queries.probes import baselines
from actstore.store import Store
from tests.planted import plant
from tests.test_output import lines_at_80

N_TREES, N_NODES, D_MODEL = 150, 8, 24
N_EDGES = N_NODES - 1
WIDTH = 4 * N_NODES - 1
TREES = draw("reproduction", 3, 0, N_TREES, N_NODES)
IS_TEST = TREES.hashes() % 5 == 0
OFFSETS = {"edge_source": 0, "edge_target": 1, "separator": 2, "next_source": 3}


def sites():
    """Noise, and in `resid_post.0` at each edge's target token its source."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, N_TREES, WIDTH, D_MODEL)).astype(np.float32)
    noise[1, :, 1 : 3 * N_EDGES : 3] += 4 * rng.normal(size=(N_NODES, D_MODEL)).astype(np.float32)[TREES.edges[:, :, 0]]
    return {"embed": noise[0], "resid_post.0": noise[1]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with Store(plant(tmp_path_factory.mktemp("b") / "s.act", TREES, sites())) as opened:
        yield opened


@pytest.fixture(scope="module")
def found(store):
    return study.ask(store, "probes")


def value(answer, metric, column="value", **where):
    return answer.results.filter(metric=metric, **where)[column].item()


# Each named baseline, written out.


def asked(role):
    """(tree, edge) of every row of a role in the order of token ids; of the path (tree, step)."""
    n = N_EDGES - (role in ("separator", "next_source"))
    return [(tree, at) for tree in range(N_TREES) for at in range(TREES.depth[tree] if role == "path" else n)]


def listed(tree, n):
    return [tuple(edge) for edge in TREES.edges[tree, :n].tolist()]


def children(tree, node, n=N_EDGES):
    return [target for source, target in listed(tree, n) if source == node]


def alike(labels):
    return {label: 1 / len(labels) for label in labels}


def height(tree, node, n):
    return max((1 + height(tree, child, n) for child in children(tree, node, n)), default=0)


def leaves(tree, node):
    below = children(tree, node)
    return [leaf for child in below for leaf in leaves(tree, child)] if below else [node]


def n_above(tree, node, n):
    sources = [source for source, target in listed(tree, n) if target == node]
    return 1 + n_above(tree, sources[0], n) if sources else 0


def commonest(role, seen, label):
    """The guess of each row: the commonest label, the least of equals, of the training rows that look the same."""
    rows, known = asked(role), {}
    for row in rows:
        if not IS_TEST[row[0]]:
            known.setdefault(seen(*row), Counter())[label(*row)] += 1
    most = {what: min(counts, key=lambda one: (-counts[one], one)) for what, counts in known.items()}
    return [{most[seen(*row)]: 1} if seen(*row) in most else {} for row in rows]


def on_path(tree, edge):
    return int(TREES.edges_on_path()[tree, edge])


def node_at(tree, step):
    return int(TREES.root[tree] if step == 0 else TREES.path[tree, step - 1])


def inner_child(tree, step):
    below = children(tree, node_at(tree, step))
    goal = int(TREES.goal[tree])
    return [goal] if goal in below else [child for child in below if children(tree, child)]


def bag(tree, edge, which):
    counts = Counter(pair[which] for pair in listed(tree, edge + 1))
    return {node: n / (edge + 1) for node, n in counts.items()}


def looks(role):
    """What is known below an edge: its place, the longest way down, and how many of its siblings are listed."""

    def seen(tree, edge):
        source, target = TREES.edges[tree, edge].tolist()
        below = height(tree, source, edge) if role == "edge_source" else height(tree, target, edge + 1)
        return edge, below, len(children(tree, source, edge))

    return seen


def expected(name, role):
    """By row of `asked`, the guesses with their probabilities."""
    ahead = int(role == "next_source")
    each = {
        "source_word": lambda t, e: {int(TREES.edges[t, e, 0]): 1},
        "target_word": lambda t, e: {int(TREES.edges[t, e, 1]): 1},
        "source_listed": lambda t, e: bag(t, e, 0),
        "target_listed": lambda t, e: bag(t, e, 1),
        "target_unlisted": lambda t, e: alike(
            set(range(N_NODES)) - {target for _, target in listed(t, e)} - {int(TREES.edges[t, e, 0])}
        ),
        "goal_leaf": lambda t, e: alike(set(range(N_NODES)) - {source for source, _ in listed(t, e + 1 + ahead)}),
        "goal_below": lambda t, s: alike(leaves(t, node_at(t, s))),
        "next_child": lambda t, s: alike(children(t, node_at(t, s))),
        "next_inner": lambda t, s: alike(inner_child(t, s)),
    }
    if name in each:
        return [each[name](*row) for row in asked(role)]
    if name == "on_path_inner":
        return commonest(role, lambda t, e: bool(children(t, TREES.edges[t, e, 1], e + 1 + ahead)), on_path)
    if name == "on_path_height":
        return commonest(role, looks(role), on_path)
    depths = TREES.node_depths()
    source = TREES.edges[:, :, 0]
    return commonest(role, lambda t, e: (e, n_above(t, source[t, e], e + 1)), lambda t, e: int(depths[t, source[t, e]]))


EDGES = ("edge_source", "edge_target", "separator", "next_source")
OF_ROLES = {
    "source_word": ("edge_source",),
    "target_word": ("edge_target",),
    "source_listed": EDGES,
    "target_listed": EDGES[1:],
    "target_unlisted": ("edge_source",),
    "goal_leaf": EDGES,
    "goal_below": ("path",),
    "next_child": ("path",),
    "next_inner": ("path",),
    "on_path_inner": EDGES[1:],
    "on_path_height": EDGES,
    "depth_above": EDGES,
}


def test_every_baseline_there_is_is_written_out_here():
    assert {one.name.removeprefix("baseline_") for one in baselines.stored()} == set(OF_ROLES)


@pytest.mark.parametrize(("name", "role"), [(name, role) for name, roles in OF_ROLES.items() for role in roles])
def test_a_baseline_guesses_what_it_says(store, name, role):
    one = next(one for one in baselines.stored() if one.name == f"baseline_{name}")
    params = {"run": "planted", "token_role": role}
    rows = store.sql(one.sql, {param: params[param] for param in queries.load(one.name).params})
    start = 3 * N_NODES - 1 if role == "path" else OFFSETS[role]
    ids = [256 * tree + start + (at if role == "path" else 3 * at) for tree, at in asked(role)]
    assert set(rows["token_id"]) <= set(ids), "it guesses tokens that the probe reads, and no others"
    guesses = {token_id: {} for token_id in ids}
    for token_id, guess, p in rows.select("token_id", one.label, "p").iter_rows():
        guesses[token_id][guess] = p
    for row, written_out in zip(guesses.values(), expected(name, role), strict=True):
        assert row == pytest.approx(written_out)


def test_a_baseline_of_other_tokens_has_no_row(store):
    for one in baselines.stored():
        roles = OF_ROLES[one.name.removeprefix("baseline_")]
        if "path" not in roles:
            for role in {*OFFSETS, "path"} - set(roles):
                assert not len(store.sql(one.sql, {"run": "planted", "token_role": role})), (one.name, role)


# What a study makes of them.


def test_a_study_scores_a_guess_by_its_probability(found):
    right = [expected("source_listed", "edge_target")[i] for i, (tree, _) in enumerate(asked("edge_target"))]
    by_hand = [
        guess.get(int(TREES.edges[tree, edge, 0]), 0)
        for guess, (tree, edge) in zip(right, asked("edge_target"), strict=True)
        if IS_TEST[tree]
    ]
    for site in ("embed", "resid_post.0"):
        assert value(found, "baseline_source_listed", site=site, label="source") == pytest.approx(np.mean(by_hand))
        above = value(found, "accuracy", site=site, label="source") - np.mean(by_hand)
        assert value(found, "above_baseline", site=site, label="source") == pytest.approx(above)
    assert value(found, "baseline_target_word", site="embed", label="target") == 1


def test_only_what_is_above_the_highest_baseline_is_claimed(found):
    row = found.frame.row(by_predicate=pl.col("site") == "resid_post.0", named=True)
    share = 100 * value(found, "baseline_source_listed", site="embed", label="source")
    assert (row["source, best baseline"], row["source, tree alone %"]) == ("source_listed", round(share, 2))
    assert (row["target, best baseline"], row["target, tree alone %"]) == ("target_word", 100)
    best = {
        end: 100 * value(found, "above_baseline", end, site="resid_post.0", label="source") for end in ("low", "high")
    }
    assert 0 < best["low"] < best["high"] < 100 - share + 10
    said = f"The tree alone gives {share:.2f} % (source_listed), and the probe is above this baseline at 1 of 2 sites, most at"
    assert f"{said} resid_post.0" in found.sentence
    assert f"points ({best['low']:+.2f} to {best['high']:+.2f}; p < 0.001)" in found.sentence
    assert "The tree alone gives 100.00 % (target_word), and the probe is below this baseline at" in found.sentence


def test_a_probe_below_its_baseline_is_said_to_be_and_not_found(found):
    below = [test for test in found.tests if test.label == "target"]
    assert [(test.estimate < 0, test.significant, test.found) for test in below] == [(True, True, False)] * 2
    assert "the probe is below this baseline at 2 of 2 sites, most at" in found.sentence


def test_the_most_frequent_label_is_a_baseline_too(store):
    answer = study.ask(store, "probes", labels="on_path", sites="embed")
    row = answer.frame.row(0, named=True)
    guesses = answer.results.filter(pl.col("metric").str.starts_with("baseline_") | (pl.col("metric") == "majority"))
    assert set(guesses["metric"]) == {"baseline_on_path_inner", "baseline_on_path_height", "majority"}
    assert row["baseline %"] == round(100 * guesses["value"].max(), 2)


OWN = "select token_id, (goal + i)::utinyint as goal, 0.5 as p from edge_targets, range(2) as two(i)"


def own(folder, sql, name="mine.sql"):
    (folder / name).write_text(sql)
    return str(folder / name)


def test_a_baseline_of_ones_own_stands_beside_the_stored_ones(store, tmp_path):
    sure = own(tmp_path, "select token_id, target as goal from edge_targets where edge < 2;", "sure.sql")
    for file, name, share in ((sure, "sure", None), (own(tmp_path, OWN), "mine", 0.5)):
        answer = study.ask(store, "probes", labels="goal", sites="embed", baseline=file)
        goals = (TREES.edges[IS_TEST][:, :2, 1] == TREES.goal[IS_TEST][:, None]).sum()
        by_hand = share or goals / (IS_TEST.sum() * N_EDGES)
        assert value(answer, f"baseline_{name}", label="goal") == pytest.approx(by_hand)
        assert answer.frame[f"{name} %"].item() == round(100 * by_hand, 2)
        assert "as goal" in json.loads(answer.results["params"][0])["baseline"]
        assert len(answer.results.filter(metric="baseline_goal_leaf")) == 1


def test_a_baseline_of_ones_own_may_take_the_run_and_the_token(store, tmp_path):
    file = own(tmp_path, queries.load("baseline_source_listed").sql)
    answer = study.ask(store, "probes", token_role="separator,edge_target", sites="embed", baseline=file)
    for role in ("separator", "edge_target"):
        where = {"token_role": role, "label": "source"}
        assert value(answer, "baseline_mine", **where) == value(answer, "baseline_source_listed", **where)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("select token_id, node as gaol from tokens", "token_id, one label (source, target, goal"),
        ("select token_id, source, target from edge_targets", "yields token_id, source, target"),
        ("select source from edges", "yields source"),
        ("select token_id, source, 2 as p from edge_targets", "add up to 2"),
        ("select token_id, source, -1 as p from edge_targets", "are negative"),
        ("select token_id, source from edge_targets where false", "guesses the source of none of the tokens"),
        ("select token_id, goal from edge_targets", "guesses the tree's goal of none of the tokens"),
        ("selec token_id", "selec"),
    ],
)
def test_a_baseline_that_is_none_is_refused(store, tmp_path, sql, words):
    with pytest.raises(BadInput) as error:
        study.ask(store, "probes", sites="embed", baseline=own(tmp_path, sql))
    assert words in str(error.value)


def test_a_baseline_that_cannot_be_read_or_told_from_a_stored_one_is_refused(store, tmp_path):
    with pytest.raises(BadInput, match=r"cannot read the baseline 'no\.sql'"):
        study.ask(store, "probes", baseline="no.sql")
    with pytest.raises(BadInput, match="has the name of a stored query"):
        study.ask(store, "probes", baseline=own(tmp_path, OWN, "baseline_goal_leaf.sql"))


# By place in the list.


@pytest.fixture(scope="module")
def by_place(tmp_path_factory):
    """At each separator the source of its edge: in `resid_post.0` of edge 0 alone, in `resid_post.1` of all, but at each place
    in directions of its own, which no probe of all places can read; and noise."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=(2, N_TREES, WIDTH, D_MODEL)).astype(np.float32)
    directions = 6 * rng.normal(size=(N_NODES, D_MODEL)).astype(np.float32)
    sources = TREES.edges[:, :, 0]
    values[0, :, 2] += directions[sources[:, 0]]
    for edge in range(N_EDGES - 1):
        values[1, :, 3 * edge + 2] += directions[(sources[:, edge] + edge) % N_NODES]
    planted = {"resid_post.0": values[0], "resid_post.1": values[1]}
    with Store(plant(tmp_path_factory.mktemp("place") / "s.act", TREES, planted)) as opened:
        yield study.ask(opened, "probes", token_role="separator", labels="source", by="place")


def at(answer, metric, site):
    """The value of a metric at each place, in order."""
    rows = [
        answer.results.filter(metric=f"place_{metric}", site=site, label=f"source, edge {edge}") for edge in range(6)
    ]
    return np.array([row["value"].item() for row in rows])


def test_by_place_shows_what_the_mean_hides(by_place):
    shares = at(by_place, "accuracy", "resid_post.0")
    assert shares[0] > 0.9
    assert shares[1:].max() < 0.5
    assert shares.mean() == pytest.approx(value(by_place, "accuracy", site="resid_post.0", label="source"))
    n_test = int(IS_TEST.sum())
    assert set(by_place.results.filter(metric="place_accuracy")["n"]) == {n_test}


def test_a_probe_of_its_own_finds_what_a_place_keeps_in_directions_of_its_own(by_place):
    assert at(by_place, "own_accuracy", "resid_post.1").min() > 0.8
    assert at(by_place, "accuracy", "resid_post.1").mean() < 0.5


def test_by_place_each_place_has_its_own_baseline(by_place):
    sources = [TREES.edges[tree, :, 0].tolist() for tree in np.flatnonzero(IS_TEST)]
    by_hand = [np.mean([row[: edge + 1].count(row[edge]) / (edge + 1) for row in sources]) for edge in range(6)]
    np.testing.assert_allclose(at(by_place, "baseline_source_listed", "resid_post.0"), by_hand)
    above = at(by_place, "accuracy", "resid_post.0") - np.maximum(by_hand, at(by_place, "majority", "resid_post.0"))
    np.testing.assert_allclose(at(by_place, "above_baseline", "resid_post.0"), above)
    assert by_hand[0] == 1, "of one edge listed there is nothing to tell apart"


def test_by_place_is_what_the_table_the_sentence_and_the_figure_show(by_place):
    table = by_place.frame
    assert table.select("site", "edge").rows() == [
        (site, e) for site in ("resid_post.0", "resid_post.1") for e in range(6)
    ]
    first = table.row(0, named=True)
    assert first["accuracy %"] == round(100 * at(by_place, "accuracy", "resid_post.0")[0], 2)
    assert first["n"] == IS_TEST.sum()
    assert (first["best baseline"], first["baseline %"]) == ("source_listed", 100)
    assert "By place in the list, the accuracy for the source at" in by_place.sentence
    axis = study.plot(by_place).axes[0]
    drawn = [line.get_ydata() for line in axis.get_lines() if len(line.get_ydata()) == 6]
    assert any(np.allclose(y, 100 * at(by_place, "accuracy", "resid_post.0")) for y in drawn)


def test_the_data_pages_table_by_place_and_checkpoint_is_what_its_command_prints(tmp_path):
    """The separators of each run keep the source at other places; the runs are named as checkpoints are."""
    page = (Path(__file__).parents[1] / "data" / "README.md").read_text()
    study_line, sql = re.search(
        r"actstore (study separator.act .*)\n    actstore sql separator.act \"(.*?)\"", page, re.S
    ).groups()
    root, rng = tmp_path / "s.act", np.random.default_rng(5)
    directions = 6 * rng.normal(size=(N_NODES, D_MODEL)).astype(np.float32)
    for run, place in (("reproduction-step500", 2), ("reproduction", 0)):
        values = rng.normal(size=(N_TREES, WIDTH, D_MODEL)).astype(np.float32)
        values[:, 3 * place + 2] += directions[TREES.edges[:, place, 0]]
        plant(root, TREES, {"resid_post.0": values}, run)
    made = CliRunner().invoke(main, ["study", str(root), *study_line.split()[2:]])
    assert made.exit_code == 0, made.output
    with Store(root) as opened:
        table = opened.sql(sql)
    assert table["edge"].to_list() == list(range(N_EDGES - 1))
    assert table["500"].to_numpy().argmax() == 2
    assert table["16000"].to_numpy().argmax() == 0
    assert table["0"].null_count() == len(table), "no such run"
    assert table.columns == ["edge", "0", "250", "500", "1000", "2000", "5000", "16000"]


def test_by_place_adds_rows_and_changes_none(store, found):
    answer = study.ask(store, "probes", by="place")
    rest = answer.results.filter(~pl.col("label").str.contains(", edge ") & (pl.col("metric") != "p_holm"))
    assert rest.drop("params").equals(found.results.filter(pl.col("metric") != "p_holm").drop("params"))
    assert len(answer.tests) == len(found.tests) + 2 * 2 * 7, "so Holm asks more of each"
    with pytest.raises(BadInput, match="got by 'depth'; write place, for"):
        study.ask(store, "probes", by="depth")


def test_the_table_by_place_fits_a_terminal_of_80_columns(by_place, monkeypatch):
    lines = lines_at_80(by_place.frame, monkeypatch)
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert not any("…" in line for line in lines)
    assert " 100" in "".join(lines)
