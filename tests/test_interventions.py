"""Edited forward passes: they are what the equations give, and a window of them is the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actstore.ingest.interventions import rows as of_edits
from actstore.ingest.interventions.change import Changes
from actstore.ingest.interventions.patch import Patch
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.patched import Base
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.model import Model
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.given import from_table
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import PAD, root_at
from actstore.interventions import Edit
from tests.reference import random_model, reference, weights
from tests.test_given_trees import table_of

N_LAYERS, N_NODES = 3, 6
EVERY = ["embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern"]
VECTORS = ["embed", *(f"{name}.1" for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"))]
HEADS = [f"{name}.1" for name in "qkvz"]


def tiny() -> Model:
    """Three layers of two heads, with random weights."""
    config = ModelConfig("reproduction", N_NODES, n_layers=N_LAYERS, n_heads=2, d_model=16, d_head=8, d_mlp=24)
    return replace(random_model(config, 7), name="tiny")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `drawn` and `given` of a tiny model, at every site, over 10 drawn and 7 given trees of several depths."""
    root = tmp_path_factory.mktemp("edited") / "s.act"
    drawn = TreeSet("deep", 10, n_nodes=N_NODES, name="d", trees_per_shard=4)
    own = from_table(table_of(draw("deep", 3, 0, 7, N_NODES)), "own")
    for name, trees in {"drawn": drawn, "given": own}.items():
        execute(Ingest(root, tiny(), trees, name, EVERY, batch_size=3))
    return root


@pytest.fixture(scope="module")
def bases(root: Path) -> dict[str, Base]:
    return {name: Base(root, name) for name in ("drawn", "given")}


@dataclass(frozen=True)
class Ran:
    """A forward pass of the edited trees.

    Attributes:
        numbers: intp [n], numbers in the set of the trees of the pass.
        words: uint8 [n, pos], what they read.
        logits: of each step, [n, step, d_vocab].
        sites: TransformerLens' name → activations.
    """

    numbers: np.ndarray
    words: np.ndarray
    logits: Tensor
    sites: dict[str, Tensor]


def words_of(base: Base) -> np.ndarray:
    """uint8 [n, pos]: all trees of the base."""
    return np.concatenate([base.set.drawn(batch).words for batch in range(base.set.n_batches)])


def ran(base: Base, edits: Sequence[Edit], whole: bool) -> Ran:
    """Run the edits in one pass."""
    specs = [of_edits.site_of(base.model, edit.at) for edit in edits]
    rows = [
        of_edits.asked(base.store, base.run, edit, spec, base.sequences)
        for edit, spec in zip(edits, specs, strict=True)
    ]
    patch = Patch(base.opened, base.run, rows, base.sequences, whole=whole)
    words = words_of(base)[patch.numbers]
    taken: dict[str, Tensor] = {}
    logits = patch._steps(
        base.model,
        base.model.sites(EVERY),
        words,
        patch.numbers,
        Changes(rows, patch.numbers, base.store),
        lambda spec, x: taken.update({spec.name: x.clone()}),
    )
    return Ran(patch.numbers, words, logits, taken)


def close(found: Ran, sites: Mapping[str, Tensor], logits: Tensor, tolerance: float = 1e-4) -> None:
    """Every site and logit at the trees' tokens differs by less than a part of the site's largest value."""
    is_token = torch.from_numpy(found.words != PAD)
    steps = is_token[:, root_at(N_NODES) + 1 :]
    pairs = {"logits": (found.logits[steps], logits[steps])}
    for site, x in found.sites.items():
        theirs = sites[site][found.numbers] if len(sites[site]) > len(x) else sites[site]
        is_pattern = site.endswith("hook_pattern")
        pairs[site] = tuple(  # type: ignore[assignment]
            torch.nan_to_num((a.movedim(1, 2) if is_pattern else a)[is_token]).double() for a in (x, theirs)
        )
    for site, (ours, theirs) in pairs.items():
        apart = float((ours.double() - theirs.double()).abs().max()) / float(theirs.abs().max())
        assert apart < tolerance, (site, apart)


# against the equations


def tokens(base: Base, *places: tuple[int, int]) -> list[int]:
    """Token ids of (number in the set, position)."""
    return [int(base.sequences.token_ids(np.array([number]))[0]) + position for number, position in places]


PLACES = [(1, 0), (1, 16), (1, 18), (2, 5), (4, 17), (9, 17), (9, 9)]
DONORS = [(3, 2), (0, 17), (1, 18), (2, 4), (2, 0), (5, 1), (9, 16)]


def of_rows(**columns: Any) -> dict[str, pl.DataFrame]:
    return {"rows": pl.DataFrame(columns)}


def project(x: Tensor, directions: Tensor) -> Tensor:
    """x without its part in the span of directions, by least squares."""
    flat = x.flatten()
    part = torch.linalg.lstsq(directions.T, flat[:, None]).solution
    return (flat - (directions.T @ part)[:, 0]).reshape(x.shape)


def expected(base: Base, site: str, how: Callable[[int, Tensor, Tensor], None]) -> dict[str, Tensor]:
    """The equations over all trees, where `how` is given each place's number, and the edited and the unedited site."""
    words = words_of(base)
    ids, state = torch.from_numpy(base.model.config.vocabulary.encode(words)), weights(base.model)
    clean = reference(state, ids)[site]

    def edit(name: str, x: Tensor) -> Tensor:
        if name == site:
            for number in range(len(PLACES)):
                how(number, x, clean)
        return x

    return reference(state, ids, edit=edit)


HOWS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # the activation, the donor's, vectors → the new one
    "replace": lambda x, donor, vectors: donor,
    "add": lambda x, donor, vectors: x + donor,
    "replace a vector": lambda x, donor, vectors: vectors[0].reshape(x.shape),
    "add a vector": lambda x, donor, vectors: x + vectors[0].reshape(x.shape),
    "project 1": lambda x, donor, vectors: project(x, vectors[:1]),
    "project 3": lambda x, donor, vectors: project(x, vectors),
    "zero": lambda x, donor, vectors: torch.zeros_like(x),
}


@pytest.mark.parametrize(
    ("at", "by_head"), [*((at, False) for at in (*VECTORS, *HEADS)), *((at, True) for at in HEADS)]
)
def test_an_edit_at_a_site_is_what_the_equations_give(bases: dict[str, Base], at: str, by_head: bool):
    base = bases["drawn"]
    spec = of_edits.site_of(base.model, at)
    heads = [0, 1, 1, 0, 1, 0, 1]
    width = 8 if by_head else 16
    vectors = np.random.default_rng(0).standard_normal((len(PLACES), 3, width)).astype(np.float32)
    for called, new in HOWS.items():
        how, _, more = called.partition(" ")
        columns: dict[str, Any] = {"token_id": tokens(base, *PLACES)}
        if how == "project" or more:
            columns["vector"] = vectors[:, : int(more) if how == "project" else 1].reshape(len(PLACES), -1).tolist()
        elif how != "zero":
            columns["donor_token_id"] = tokens(base, *DONORS)
        if by_head:
            columns["head"] = heads

        def edit(number: int, x: Tensor, clean: Tensor, new: Any = new) -> None:
            place = (*PLACES[number], heads[number]) if by_head else PLACES[number]
            donor = clean[(*DONORS[number], heads[number])] if by_head else clean[DONORS[number]]
            x[place] = new(x[place], donor, torch.from_numpy(vectors[number]).double())

        theirs = expected(base, spec.name, edit)
        found = ran(base, [Edit("from rows", at, how, tables=of_rows(**columns))], whole=True)
        assert found.numbers.tolist() == [1, 2, 4, 9]
        steps = theirs["logits"][found.numbers, root_at(N_NODES) : -1]
        close(found, theirs, steps)


@pytest.mark.parametrize("at", ["resid_post.1", "resid_mid.0", "z.2"])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_mean_is_over_the_querys_rows_of_a_group(bases: dict[str, Base], at: str, grouped: bool):
    base, heads = bases["drawn"], at.startswith("z")
    spec, groups = of_edits.site_of(base.model, at), ["a", "b", "a", None, "b", None, "a"]
    columns: dict[str, Any] = {"token_id": tokens(base, *PLACES)}
    if grouped:
        columns["group"] = groups
    if heads:
        columns["head"] = [1, 1, 1, 0, 0, 0, 1]

    def edit(number: int, x: Tensor, clean: Tensor) -> None:
        same = [
            i
            for i in range(len(PLACES))
            if (not grouped or groups[i] == groups[number])
            and (not heads or columns["head"][i] == columns["head"][number])
        ]
        at_place = [(*PLACES[i], columns["head"][i]) if heads else PLACES[i] for i in same]
        x[at_place[same.index(number)]] = torch.stack([clean[place] for place in at_place]).mean(0)

    theirs = expected(base, spec.name, edit)
    query = "select * from rows order by hash(token_id)"
    found = ran(base, [Edit(query, at, "mean", tables=of_rows(**columns))], whole=True)
    close(found, theirs, theirs["logits"][found.numbers, root_at(N_NODES) : -1])


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("how", ["replace", "zero", "knockout"])
def test_an_edit_of_attention_is_what_the_equations_give(bases: dict[str, Base], how: str, by_head: bool):
    base, heads = bases["drawn"], [0, 1, 1, 0, 1, 0, 1]
    donors = [(3, 0), (0, 16), (2, 18), (7, 5), (4, 17), (1, 17), (0, 9)]
    keys = [(tree, max(position - 3 * (position % 2), 0)) for tree, position in PLACES]
    columns: dict[str, Any] = {"token_id": tokens(base, *PLACES)}
    columns |= {"donor_token_id": tokens(base, *donors)} if how == "replace" else {}
    columns |= {"key_token_id": tokens(base, *keys)} if how == "knockout" else {}
    columns |= {"head": heads} if by_head else {}

    def edit(number: int, x: Tensor, clean: Tensor) -> None:
        tree, query = PLACES[number]
        for head in [heads[number]] if by_head else [0, 1]:
            row = x[tree, head, query]
            if how == "replace":
                row[:] = clean[donors[number][0], head, donors[number][1]]
            elif how == "zero":
                row[:] = 0
            else:
                row[keys[number][1]] = 0
                row /= max(float(row.sum()), 1e-30)

    theirs = expected(base, "blocks.1.attn.hook_pattern", edit)
    found = ran(base, [Edit("from rows", "pattern.1", how, tables=of_rows(**columns))], whole=True)
    close(found, theirs, theirs["logits"][found.numbers, root_at(N_NODES) : -1])


def test_several_keys_are_knocked_out_of_one_token_together(bases: dict[str, Base]):
    base = bases["given"]
    (query,), keys = tokens(base, (2, 17)), tokens(base, (2, 3), (2, 16), (2, 17))
    found = ran(
        base,
        [Edit("from rows", "pattern.2", "knockout", tables=of_rows(token_id=[query] * 3, key_token_id=keys))],
        whole=True,
    )
    words = words_of(base)
    ids, state = torch.from_numpy(base.model.config.vocabulary.encode(words)), weights(base.model)

    def edit(name: str, x: Tensor) -> Tensor:
        if name == "blocks.2.attn.hook_pattern":
            x[2, :, 17, [3, 16, 17]] = 0
            x[2, :, 17] /= x[2, :, 17].sum(-1, keepdim=True)
        return x

    theirs = reference(state, ids, edit=edit)
    close(found, theirs, theirs["logits"][found.numbers, root_at(N_NODES) : -1])


def test_a_knockout_of_a_head_leaves_the_others_as_edits_before_it_left_them(bases: dict[str, Base]):
    base = bases["given"]
    (query,), (key,) = tokens(base, (2, 17)), tokens(base, (2, 3))
    knocked = Edit("from rows", "pattern.2", "knockout", tables=of_rows(token_id=[query], key_token_id=[key], head=[1]))
    rows = of_edits.asked(base.store, base.run, knocked, of_edits.site_of(base.model, knocked.at), base.sequences)
    before = torch.full((1, 2, 18, 18), 0.25)  # rows that an earlier edit made, and whose sum is not 1
    after = Changes([rows], np.array([2]), base.store).apply(rows.spec.name, before.clone())
    expected = before.clone()
    expected[0, 1, 17] = 1 / 17
    expected[0, 1, 17, 3] = 0
    assert torch.allclose(after, expected, rtol=1e-6)


# a window against the whole


@st.composite
def some_edits(draw: st.DrawFn) -> tuple[str, list[tuple[str, str, list[int], bool]], int]:
    """A base; edits as site, how, numbers of tokens and whether one head is meant; and a seed for what is put there."""
    edits = []
    for _ in range(draw(st.integers(1, 4))):
        family = draw(st.sampled_from(EVERY))
        at = family if family == "embed" else f"{family}.{draw(st.integers(0, N_LAYERS - 1))}"
        hows = ["zero", "knockout", "replace"] if family == "pattern" else ["zero", "replace", "add", "project", "mean"]
        picked = draw(st.lists(st.integers(0, 10_000), min_size=1, max_size=6))
        edits.append((at, draw(st.sampled_from(hows)), picked, draw(st.booleans())))
    return draw(st.sampled_from(["drawn", "given"])), edits, draw(st.integers(0, 1000))


def edit_of(base: Base, at: str, how: str, picked: Sequence[int], by_head: bool, rng: np.random.Generator) -> Edit:
    """One edit of some of the base's tokens."""
    lengths, starts = base.sequences.n_tokens, base.sequences.first_token_id
    every = np.concatenate([start + np.arange(n) for start, n in zip(starts, lengths, strict=True)])
    ids = np.unique(every[np.array(picked) % len(every)])
    family = at.partition(".")[0]
    columns: dict[str, Any] = {"token_id": ids}
    is_headed = by_head and family in (*"qkvz", "pattern")
    if is_headed:
        columns["head"] = rng.integers(0, 2, len(ids))
    _, position, _ = base.sequences.places(ids)
    if how == "knockout":
        columns["key_token_id"] = ids - (rng.random(len(ids)) * (position + 1)).astype(int)
    elif family == "pattern" and how == "replace":
        there = [starts[lengths > p] + p for p in position]
        columns["donor_token_id"] = [int(rng.choice(some)) for some in there]
    elif how in ("replace", "add") and rng.random() < 0.5:
        columns["donor_token_id"] = rng.choice(every, len(ids))
    elif how in ("replace", "add", "project"):
        n = int(rng.integers(1, 4)) if how == "project" else 1
        columns["vector"] = rng.standard_normal((len(ids), n * (8 if is_headed else 16))).astype(np.float32).tolist()
    return Edit("from rows", at, how, tables=of_rows(**columns))


@settings(max_examples=40)
@given(some_edits())
def test_a_window_is_the_whole(bases: dict[str, Base], asked: tuple[str, list[tuple[str, str, list[int], bool]], int]):
    name, edits, seed = asked
    base, rng = bases[name], np.random.default_rng(seed)
    made = [edit_of(base, *edit, rng) for edit in edits]
    whole, window = (ran(base, made, whole) for whole in (True, False))
    close(window, whole.sites, whole.logits)


@pytest.mark.parametrize("at", ["resid_post.2", "z.0", "embed", "pattern.1"])
def test_a_window_over_the_first_and_the_last_token_is_the_whole(bases: dict[str, Base], at: str):
    base = bases["drawn"]
    lasts = [(number, int(n) - 1) for number, n in enumerate(base.sequences.n_tokens)]
    for places in (lasts, [(3, 0)], [*lasts, (3, 0), (8, 17)]):
        edit = Edit("from rows", at, "zero", tables=of_rows(token_id=tokens(base, *places)))
        whole, window = (ran(base, [edit], whole) for whole in (True, False))
        close(window, whole.sites, whole.logits)
