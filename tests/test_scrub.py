"""The study `scrub` on a model by hand, whose layer 2 brings the node at distance 2 from the goal to the root token."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.patched import patching
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.load import from_bytes
from actstore.ingest.models.weights import canonical, shapes
from actstore.ingest.trees.given import from_table
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import root_at
from actstore.interventions import Edit
from actstore.queries import studies, study
from actstore.queries.figures import COLUMN
from actstore.queries.scrub.donors import drawn, trees_of
from actstore.queries.scrub.sums import kept_keys, patched, sums
from actstore.store import Store
from tests.reference import one_thread  # noqa: F401
from tests.test_figures import assert_legible
from tests.test_pipeline import small_model

N_NODES, LAYER = 6, 2
ROOT, HELD = root_at(N_NODES), 7  # positions: the root, and the target of edge 2, which the model copies
SITES = ("pattern", "v", "resid_post")


def copying() -> dict[str, torch.Tensor]:
    """Weights: at the root layer 2 attends to position 7 alone and writes its word as the answer; no other layer does a thing.

    The residual stream has a number for each token, each position and each answer. LayerNorm
    scales all tokens alike, since all are one token and one position.
    """
    config = ModelConfig("reproduction", N_NODES)
    n_words, n_ctx = config.d_vocab, config.n_ctx
    config = shaped(config)
    state = {name: torch.zeros(shape) for name, shape in shapes(config).items()}
    state |= {
        name: torch.ones_like(state[name])
        for name in state
        if name.endswith((".ln1.w", ".ln2.w")) or name == "ln_final.w"
    }
    words = torch.eye(n_words)
    state["embed.W_E"][:, :n_words] = words
    state["pos_embed.W_pos"][:, n_words : n_words + n_ctx] = torch.eye(n_ctx)
    attention = f"blocks.{LAYER}.attn."
    state[attention + "W_Q"][0, n_words + ROOT, 0] = state[attention + "W_K"][0, n_words + HELD, 0] = 4.0
    state[attention + "W_V"][0, :n_words] = words
    state[attention + "W_O"][0, :, n_words + n_ctx :] = words
    state["unembed.W_U"][n_words + n_ctx :] = 2 * words
    return state


def shaped(config: ModelConfig) -> ModelConfig:
    d_model = 2 * config.d_vocab + config.n_ctx
    return ModelConfig("reproduction", N_NODES, n_layers=3, d_model=d_model, d_head=config.d_vocab, d_mlp=1)


def trees(n: int, seed: int) -> pl.DataFrame:
    """Backward trees of 6 nodes, path lengths 1 to 4, whose edge 2 leads to the node at distance 2 or to the root's child."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(n):
        length = 1 + number % 4
        root, *rest = rng.permutation(N_NODES).tolist()
        path, other = [root, *rest[:length]], [root, *rest[length:]]
        down, across = (list(pairwise(chain))[::-1] for chain in (path, other))
        at = min(2, length - 1)  # of `down`, the edge to hold
        before = [*down[:at], *across[: len(across) - 2]] if length < 4 else down[:at]
        edges = [*before, down[at], *(across[-2:] if length < 4 else [down[-1], *across])]
        rows.append({"edges": [list(map(int, edge)) for edge in edges], "root": root, "goal": path[-1]})
    return pl.DataFrame(rows)


@pytest.fixture(scope="module")
def model():
    return from_bytes(
        canonical(copying()), shaped(ModelConfig("reproduction", N_NODES)), "by hand", "by-hand.safetensors"
    )


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    """Runs `r` and `s` of the model over two sets of such trees."""
    path = tmp_path_factory.mktemp("scrub") / "s.act"
    for run, name, seed in (("r", "first", 0), ("s", "fresh", 1)):
        execute(
            Ingest(
                path, model, from_table(trees(240, seed), name), run, [site.short for site in model.sites(list(SITES))]
            )
        )
    return path


@pytest.fixture(scope="module")
def answer(path):
    with Store(path) as store:
        return study.ask(store, "scrub", "r", patch=patching(store))


def recovered(answer, kind, **where):
    """Mean recovered by a kind of donor: (hypothesis, layer, length) → share."""
    rows = answer.results.filter(pl.col("metric") == f"recovered, {kind}")
    return {(*row["label"].split(", length "), row["site"]): row["value"] for row in rows.iter_rows(named=True)}


def test_the_trees_hold_the_node_at_distance_2_at_edge_2(path):
    with Store(path) as store:
        rows = store.of("r").sql(
            "select depth, backward, path[greatest(depth - 2, 1)] = target as held, n_leaves from trees join edges using (tree_id) "
            "where edge = 2"
        )
        right = store.of("r").sql(
            "select depth, avg(correct::int) from predictions join trees using (tree_id) where step = 0 group by all"
        )
    assert rows["backward"].all()
    assert rows["held"].all()
    assert dict(right.iter_rows()) == {1: 1, 2: 1, 3: 1, 4: 0}


def test_matched_donors_recover_everything_and_others_nothing_at_the_layer_that_carries_it(answer):
    matched, others, elsewhere = (recovered(answer, kind) for kind in ("matched", "disagreeing", "elsewhere"))
    assert len(matched) == 3 * 3 * 3  # length 4 is answered wrongly, and so has no clean tree
    assert len(elsewhere) == 9
    for (hypothesis, length, site), share in matched.items():
        assert share == pytest.approx(1, abs=1e-3)
        carries = (
            site == "z.2" and hypothesis != "H3"
        )  # H3 leaves the targets' terms as they are, and position 7 is one
        nothing = pytest.approx(1, abs=1e-3)  # was lost
        for control in (others, elsewhere) if hypothesis == "H1" else (others,):
            other = control[hypothesis, length, site]
            assert other < 0 if carries else other == nothing


def test_the_tree_itself_recovers_exactly_everything(answer):
    itself = recovered(answer, "itself")
    assert len(itself) == 9
    assert all(share == pytest.approx(1, abs=1e-5) for share in itself.values())


def test_the_tests_find_the_layer_and_nothing_else(answer):
    found = {(test.site, test.label) for test in answer.tests if test.found}
    assert found == {("z.2", f"{hypothesis}, length {length}") for hypothesis in ("H1", "H2") for length in (1, 2, 3)}
    assert len(answer.tests) == 27
    says = "matched donors recover 90 % and more at layers 0 to 2 at every length; disagreeing donors at layers 0 and 1"
    assert says in answer.sentence
    assert "60 clean trees whose first step is wrong are left out" in answer.sentence
    figure = study.plot(answer)
    assert [axis.get_title("left") for axis in figure.axes] == ["layer 0", "layer 1", "layer 2"]
    assert_legible(figure)
    assert figure.get_figwidth() == COLUMN
    at = [np.asarray(line.lines[0].get_xdata()) for line in figure.axes[0].containers]
    assert np.abs(np.diff(at, axis=0)).min() > 0.2, "hypotheses of one share lie upon each other"


def test_one_hypothesis_alone_gives_its_own_numbers(path, answer):
    with Store(path) as store:
        alone = study.ask(store, "scrub", "r", patch=patching(store), hypotheses="H2")
    for kind in ("matched", "disagreeing"):
        every = recovered(answer, kind)
        assert recovered(alone, kind) == {key: share for key, share in every.items() if key[0] == "H2"}
    assert list(recovered(alone, "itself").values()) == pytest.approx([1] * 9, abs=1e-5)
    assert len(alone.tests) == 9
    assert "H2 (" in alone.sentence
    assert "H1 (" not in alone.sentence
    assert len(study.plot(alone).axes) == 3


def test_findings_are_confirmed_on_a_second_set(path, answer):
    with Store(path) as store:
        (asked,) = studies.answer(
            store, "scrub", ["r"], options={"second_path": 2}, confirm="fresh", patch=patching(store)
        )
    assert asked.confirmation is not None
    assert asked.answer.results["value"].equals(answer.results["value"])  # the same numbers again
    assert [claim.confirmed for claim in asked.confirmation.claims] == [True] * 6


def test_noise_gives_no_finding(path):
    """Whatever the edit, the answers are drawn at random."""
    rng = np.random.default_rng(0)

    def at_random(run, edits, measure=None):
        ids = edits[0].tables["rows"]["token_id"]
        return pl.DataFrame({"token_id": ids, "p_target": rng.random(len(ids)).astype(np.float32)})

    with Store(path) as store:
        answer = study.ask(store, "scrub", "r", patch=at_random)
    assert not any(test.significant for test in answer.tests)
    assert "significantly more than disagreeing ones nowhere" in answer.sentence


def test_a_donor_is_drawn_among_all_that_fit_and_no_others(path):
    with Store(path) as store:
        found = trees_of(store, "r", N_NODES, 3, "backward", 2, 200, seed=0)
    for layer in range(3):
        donors = drawn(found, layer, seed=0)
        here, clean = found.nodes[:, layer], found.clean
        assert (here[donors["matched"]] == here[clean]).all()
        assert (donors["matched"] != clean).all()
        assert (here[donors["disagreeing"]] != here[clean]).all()
        other = found.nodes[:, layer - 1 if layer else 1]
        assert (here[donors["elsewhere"]] != here[clean]).all()
        assert (other[donors["elsewhere"]] == other[clean]).all()
        for kind in ("matched", "disagreeing", "elsewhere"):
            assert (found.depth[donors[kind]] > layer).all()
        assert set(np.unique(found.depth[donors["matched"]])) == set(range(layer + 1, 5))


@pytest.fixture(scope="module")
def random_store(tmp_path_factory):
    """A random model with two heads over 40 baseline trees, at every site that is compared."""
    model, path = small_model(), tmp_path_factory.mktemp("sums") / "s.act"
    sites = [site.short for site in model.sites([*SITES, "z", "attn_out"])]
    execute(Ingest(path, model, TreeSet("baseline", 40, n_nodes=6, name="d"), "r", sites))
    with Store(path) as store:
        yield store


def test_sums_are_those_of_brute_force(random_store):
    ids = (
        random_store.of("r")
        .sql("select token_id from tokens where role = 'root' order by token_id")["token_id"]
        .to_numpy()
    )
    whole, kept = sums(random_store, "r", 1, ids, N_NODES)
    pattern, _ = random_store.read(ids, "r", "pattern.1")
    keys = {0: [], 1: [6, 8, 9, 11, 12, 14, 15], 2: [1, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]}
    for tree in (0, 7, 39):
        v, _ = random_store.read(np.arange(ids[tree] - ROOT, ids[tree] + 1), "r", "v.1")
        for head in range(2):
            terms = [pattern[tree, head, key] * v[key, head] for key in range(ROOT + 1)]
            np.testing.assert_allclose(whole[tree, head], sum(terms), atol=1e-5)
            for number, which in keys.items():
                wanted = sum((terms[key] for key in which), np.zeros(8))
                np.testing.assert_allclose(kept[number, tree, head], wanted, atol=1e-5)
    np.testing.assert_allclose(whole, random_store.read(ids, "r", "z.1")[0], atol=1e-5)
    z = patched(whole, kept[1], np.array([3]), np.array([5]))
    mixed = [(3 if key in keys[1] else 5, key) for key in range(ROOT + 1)]
    vs = {tree: random_store.read(np.arange(ids[tree] - ROOT, ids[tree] + 1), "r", "v.1")[0] for tree in (3, 5)}
    wanted = sum(pattern[tree, :, key, None] * vs[tree][key] for tree, key in mixed)
    np.testing.assert_allclose(z[0], wanted.ravel(), atol=1e-5)


def test_the_kept_keys_of_16_nodes_are_the_authors():
    kept = kept_keys(16)
    assert np.flatnonzero(kept[1]).tolist() == [36, 38, 39, 41, 42, 44, 45]
    assert np.flatnonzero(kept[2]).tolist() == sorted({*range(1, 45, 3), 36, 38, 39, 41, 42, 44, 45})
    assert not kept[0].any()


def test_a_donors_z_is_its_attn_out(random_store):
    """H1 at z equals the authors' edit at attn_out."""
    ids = (
        random_store.of("r")
        .sql("select token_id from tokens where role = 'root' order by token_id")["token_id"]
        .to_numpy()
    )
    donors = np.roll(ids, 1)
    whole, _ = sums(random_store, "r", 0, donors, N_NODES)
    rows = pl.DataFrame({"token_id": ids, "donor_token_id": donors, "z": whole.reshape(len(ids), -1)})
    patch = patching(random_store)
    theirs = patch("r", [Edit("select token_id, donor_token_id from rows", at="attn_out.0", tables={"rows": rows})])
    ours = patch("r", [Edit("select token_id, z as vector from rows", at="z.0", tables={"rows": rows})])
    np.testing.assert_allclose(ours["p_target"], theirs["p_target"], atol=1e-6)
    unedited = random_store.of("r").sql("select p_target from predictions order by token_id")
    assert np.abs(ours["p_target"].to_numpy() - unedited["p_target"].to_numpy()).max() > 1e-3


OWN = """
-- the donor with the same root's child and the least id; of a path of 3 steps or fewer, whose edge 2 leads there
select token_id, min_by(other.root_token, other.root_token) as donor_token_id
from (select *, tree_id::bigint * 256 + 17 as token_id from trees) as clean
join (select *, tree_id::bigint * 256 + 17 as root_token from trees where depth <= 3) as other
    on other.path[1] = clean.path[1] and other.tree_id != clean.tree_id
where $layer >= 0
group by all
"""


def test_donors_of_ones_own(path, tmp_path):
    (tmp_path / "own.sql").write_text(OWN)
    with Store(path) as store:
        answer = study.ask(store, "scrub", "r", patch=patching(store), donors=str(tmp_path / "own.sql"), n=20)
    matched, shuffled = recovered(answer, "matched"), recovered(answer, "shuffled")
    assert all(share == pytest.approx(1, abs=1e-3) for share in matched.values())
    assert all(shuffled["H1", str(length), "z.2"] < 0.5 for length in (1, 2, 3))
    assert shuffled["H1", "1", "z.1"] == pytest.approx(1, abs=1e-3)
    assert "shuffled donors at layers 0 and 1 at every length" in answer.sentence


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"listed": "bakward"}, "did you mean"),
        ({"n": 0}, "whole number, 1 or more"),
        ({"hypotheses": "H4"}, "no hypothesis 'H4'"),
        ({"second_path": "x"}, "whole number, 0 or more"),
        ({"donors": "select token_id from tokens"}, "no donor_token_id"),
        (
            {"donors": "select token_id, token_id as donor_token_id from tokens"},
            "are no root token of a tree of run 'r'",
        ),
        ({"donors": "select token_id, 'x' as donor_token_id from predictions where step = 0"}, "no integer"),
        (
            {"donors": "select token_id, token_id as donor_token_id from (from predictions where step = 0), range(2)"},
            "names a clean tree twice",
        ),
        ({"donors": "select token_id, token_id as donor_token_id from predictions where false"}, "has a donor"),
    ],
)
def test_options_without_a_meaning_are_refused(path, options, says):
    with Store(path) as store, pytest.raises(BadInput, match=re.escape(says)):
        study.ask(store, "scrub", "r", patch=patching(store), **options)


def test_what_the_store_lacks_is_said_with_the_command_that_adds_it(model, tmp_path):
    path = tmp_path / "s.act"
    execute(Ingest(path, model, TreeSet("deep", 30, n_nodes=6, depths=(5,), name="d"), "r", ["resid_post.0"]))
    run = "r"
    for says in ("lacks pattern.0, pattern.1, pattern.2, v.0", "no answered tree of run 'r' lists its edges backward"):
        with Store(path) as store, pytest.raises(NotStored, match=says) as caught:
            study.ask(store, "scrub", run, patch=patching(store))
        (command,) = re.findall(r"`actstore ([^`]+)`", str(caught.value))
        words = [{"10000": "60"}.get(word, word) for word in shlex.split(command)]
        done = CliRunner().invoke(main, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    with Store(path) as store:
        answer = study.ask(store, "scrub", "r-scrub", patch=patching(store), listed="any", second_path=0)
    assert "cells have fewer than 150 trees" in answer.sentence
