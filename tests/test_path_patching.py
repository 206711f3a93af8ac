"""The study `path-patching` on a model in which the answer goes from the goal's token to the colon, and on to the root."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.ingest.models.load import Model, from_bytes
from actstore.ingest.models.weights import canonical
from actstore.ingest.trees.tokens import WORDS
from actstore.queries import path_patching as module
from actstore.queries import study
from actstore.queries.figures import TALLEST
from actstore.queries.pairs import Contrast, pairs_of
from actstore.queries.path_patching import Paths, Place
from actstore.store import Store
from actstore.verbs import patching
from tests.hops import N_NODES, PLACES, TREES, hops, stored
from tests.reference import weights
from tests.test_figures import assert_legible
from tests.test_output import lines_at_80

MODEL = hops({0: ("goal", "colon"), 1: ("colon", "root")})
SITES = ["embed", "resid_post", "attn_out", "mlp_out", "z"]


def noisy() -> Model:
    """The model with noise in all weights: it answers as before, and every path carries something."""
    rng = torch.Generator().manual_seed(0)
    state = {name: w + 0.15 * torch.randn(w.shape, generator=rng) for name, w in sorted(weights(MODEL).items())}
    return from_bytes(canonical(state), MODEL.config, "noisy", "noisy.safetensors")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = stored(tmp_path_factory.mktemp("paths") / "s.act", MODEL, SITES)
    stored(path, MODEL, ["attn_out", "mlp_out"], "s", replace(TREES, seed=9, name="fresh"))
    return stored(path, noisy(), SITES, "noisy")


def ask(path, run="r", **options):
    with Store(path) as store, patching(store) as patch:
        return study.ask(store, "path-patching", run, patch=patch, **options)


@pytest.fixture(scope="module")
def answer(path):
    return ask(path, to="root,colon", trees=40, **{"from": "goal,colon,root"})


def found(answer):
    return {(test.site, test.token_role, test.label) for test in answer.tests if test.found}


def test_the_path_is_found_hop_by_hop_and_no_other_moves_anything(answer):
    on_the_way = {
        ("attn_out.0", "colon", "noise, to attn_out.1 at root"),
        ("attn_out.1", "root", "noise, to logits"),
    }
    assert found(answer) == on_the_way
    moved = answer.results.filter(metric="moved_beyond_control")
    shares = {(row["site"], row["token_role"], row["label"]): row["value"] for row in moved.iter_rows(named=True)}
    for key, share in shares.items():
        assert share == pytest.approx(float(key in on_the_way), abs=1e-3), (
            key
        )  # attention looks elsewhere, too, a little
    absent = {
        ("attn_out.0", "colon", "noise, to attn_out.2 at root"),  # which looks elsewhere
        ("attn_out.0", "goal", "noise, to attn_out.1 at root"),  # which is written at the colon
    }
    assert absent < shares.keys()


def test_paths_that_cannot_be_are_not_tested(answer):
    paths = {(test.site, test.token_role, test.label.partition(", to ")[2]) for test in answer.tests}
    assert ("attn_out.0", "root", "logits") in paths
    assert ("attn_out.0", "colon", "logits") not in paths  # another token's stream
    assert ("attn_out.0", "root", "attn_out.1 at colon") not in paths  # a later token
    assert ("attn_out.1", "root", "attn_out.1 at root") not in paths
    assert ("mlp_out.0", "goal", "attn_out.1 at colon") in paths
    one = Place("attn_out.1", None, "goal")
    assert one.reaches(Place("mlp_out.1", None, "goal"))
    assert not one.reaches(Place("mlp_out.1", None, "colon"))
    assert not Place("mlp_out.1", None, "goal").reaches(Place("z.1", 0, "goal"))
    assert Place("mlp_out.1", None, "edge_target").reaches(Place("z.2", 0, "edge_source"))


def test_a_tree_as_its_own_donor_changes_nothing(answer):
    control = answer.results.filter(label=module.CONTROL)
    assert len(control) == 6
    assert control["value"].max() < 1e-6  # the second pass computes again what the base run stored


def test_heads_send_and_receive(path):
    heads = ask(path, senders="z.0", receivers="z.1,z.2", **{"from": "colon,goal"})
    assert found(heads) == {("z.0", "colon", "noise head 0, to z.1 head 0 at root")}
    assert len(heads.tests) == 2 * 2 * 2 * 2  # heads and roles of the sender, layers and heads of the receiver
    (test,) = [test for test in heads.tests if test.found]
    assert test.estimate == pytest.approx(1, abs=1e-3)
    assert "most that from z.0 head 0 at colon to z.1 head 0 at root: +99.9" in heads.sentence


# against hooks

PATHS = [
    (("attn_out.0", None, "colon"), ("attn_out.1", None, "root")),
    (("attn_out.0", None, "goal"), ("attn_out.1", None, "colon")),
    (("mlp_out.0", None, "edge_target"), ("mlp_out.1", None, "edge_target")),
    (("attn_out.1", None, "root"), ("mlp_out.1", None, "root")),
    (("z.0", 1, "edge_source"), ("z.2", 0, "root")),
    (("z.0", 0, "colon"), ("z.1", 1, "root")),
    (("mlp_out.1", None, "root"), ("logits", None, "root")),
    (("z.1", 1, "root"), ("logits", None, "root")),
]


def by_hooks(model, ids, donor_ids, at, sender, receiver):
    """The logits of path patching by two passes with hooks, in which all between is frozen, [tree, pos, d_vocab].

    Args:
        ids, donor_ids: int64 [tree, pos].
        at: role → positions of its tokens.
    """
    run, hook_names = model.bridge.run_with_hooks, ("hook_attn_out", "hook_mlp_out", "attn.hook_z")
    every = [f"blocks.{layer}.{name}" for layer in range(model.config.n_layers) for name in hook_names]

    def hook_of(site):
        family, _, layer = site.partition(".")
        return f"blocks.{layer}.{'attn.' * (family == 'z')}hook_{family}"

    def keep(into, name):
        return name, lambda x, hook: into.update({name: x.clone()})

    def cached(ids):
        kept = {}
        run(ids, fwd_hooks=[keep(kept, name) for name in every])
        return kept

    def put(values, place):
        def edit(x, hook):
            x = x.clone()
            where = (slice(None), at[place.role], *(() if place.head is None else (place.head,)))
            x[where] = values[where]
            return x

        return hook_of(place.site), edit

    own, donor, taken = cached(ids), cached(donor_ids), {}
    hooks, carries = (
        [put(donor[hook_of(sender.site)], sender)],
        hook_of(sender.site).replace("attn.hook_z", "hook_attn_out"),
    )
    if receiver.site != "logits":
        hooks.append(keep(taken, hook_of(receiver.site)))
    frozen = [name for name in every if not name.endswith("hook_z") and name != carries]
    first = run(ids, fwd_hooks=[*hooks, *((name, lambda x, hook, name=name: own[name].clone()) for name in frozen)])
    if receiver.site == "logits":
        return first
    return run(ids, fwd_hooks=[put(taken[hook_of(receiver.site)], receiver)])


@pytest.mark.parametrize(("sender", "receiver"), PATHS)
@torch.no_grad()
def test_a_path_patch_is_that_of_two_passes_with_frozen_hooks(path, sender, receiver):
    sender, receiver, model = Place(*sender), Place(*receiver), noisy()
    with Store(path) as store, patching(store) as patch:
        chosen, _ = pairs_of(store, "noisy", None, 30, "noise", np.random.default_rng(0))
        contrast = Contrast(store, "noisy", patch, chosen, "attn_out.0")
        ours = Paths(store, "noisy", patch, contrast, 3).moved(sender, receiver, "donor")
        pairs = contrast.pairs
        words = store.sql(
            "select tree_id, list(token::varchar order by position) as words, list(role::varchar order by position) as roles "
            "from tokens where position <= $root group by tree_id",
            {"root": PLACES["root"]},
        )
    text = dict(zip(words["tree_id"].to_list(), words["words"].to_list(), strict=True))
    roles = np.array(words["roles"][0].to_list())
    at = {role: np.flatnonzero(roles == role) for role in set(roles)}

    def ids_of(trees):
        numbers = np.array([[list(WORDS).index(word) for word in text[tree]] for tree in trees], np.uint8)
        return torch.from_numpy(model.config.vocabulary.encode(numbers))

    def difference(logits):
        words = [[list(WORDS).index(row[name]) for name in ("answer", "other")] for row in pairs.to_dicts()]
        two = torch.from_numpy(model.config.vocabulary.encode(np.array(words, np.uint8)))
        of_both = logits[:, PLACES["root"]].log_softmax(-1).gather(1, two)
        return (of_both[:, 0] - of_both[:, 1]).double().numpy()

    ids, donors = ids_of(pairs["tree_id"]), ids_of(pairs["donor"])
    before, after = difference(model.bridge(ids)), difference(model.bridge(donors))
    theirs = (before - difference(by_hooks(model, ids, donors, at, sender, receiver))) / (before - after)
    assert np.abs(theirs).max() > 1e-4  # the path carries something
    np.testing.assert_allclose(ours, theirs, atol=0.01 * np.abs(theirs).max())


# shown, confirmed, refused


def test_the_table_fits_a_terminal_and_the_figure_frames_what_was_found(answer, monkeypatch):
    assert max(map(len, lines_at_80(answer.frame, monkeypatch))) <= 80
    figure = study.plot(replace(answer, tests=()))
    panels = {axis.get_title("left"): len(axis.patches) for axis in figure.axes if axis.get_title("left")}
    assert {title for title, n in panels.items() if n} == {"attention to attn_out.1 at root", "attention to logits"}
    assert panels["MLP to logits"] == 0
    assert_legible(figure)
    assert figure.get_figheight() <= TALLEST
    rows = {
        axis.get_title("left"): axis.images[0].get_array().shape[0] for axis in figure.axes if axis.get_title("left")
    }
    assert rows["attention to attn_out.1 at root"] == 1, "a receiver's map has the layers before it alone"


def test_the_findings_are_confirmed_on_a_second_set_that_lacks_the_shared_trees(path, tmp_path):
    shutil.copytree(path, tmp_path / "s.act")
    words = ["study", tmp_path / "s.act", "path-patching", "--run", "r", "--confirm", "fresh", "--csv"]
    words += ["--plot", tmp_path / "a.png", "-o", "senders", "attn_out", "-o", "from", "colon,root"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "2 of 2 are confirmed on 'fresh'" in done.stderr
    assert "by the path to attn_out.1 at root" in done.stderr
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"senders": "resid_post"}, "no site 'resid_post'"),
        ({"receivers": "logit"}, "no site 'logit'"),
        ({"from": "path"}, "no role 'path'"),
        ({"to": "gaol"}, "no role 'gaol'"),
        ({"senders": "attn_out.2", "receivers": "attn_out.1"}, "got 0 possible paths, of which 1 to 500 can be tested"),
        ({"senders": "all", "receivers": "all", "to": "all"}, "possible paths, of which 1 to 500 can be tested"),
        ({"direction": "up"}, "no direction 'up'"),
        ({"trees": 1}, "got -o trees 1"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(path, options, said):
    with pytest.raises(BadInput) as refused:
        ask(path, **options)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_head_needs_what_its_attention_adds_and_the_message_says_how_to_add_it(path):
    with pytest.raises(NotStored, match=r"does not hold z, which .* --run s --sites z` adds them"):
        ask(path, "s", senders="z")


def test_tokens_of_no_edited_tree_have_no_activations(path):
    from actstore.interventions import Edit

    rows = pl.DataFrame({"token_id": [PLACES["root"]]})
    edit = Edit("from rows", "attn_out.1", "zero", tables={"rows": rows})
    with Store(path) as store, patching(store) as patch:
        X = patch.activations("r", [edit], "resid_post.1", [PLACES["root"], 0])
        own, _ = store.read([PLACES["root"], 0], "r", "resid_post.1")
        assert np.abs(X[0] - own[0]).max() > 0.1
        np.testing.assert_array_equal(X[1], own[1])
        with pytest.raises(BadInput, match="1 of 2 tokens are of no edited sequence of run 'r'"):
            patch.activations("r", [edit], "resid_post.1", [PLACES["root"], 256])
    assert N_NODES == 6
