"""Edits of runs over text: what is stored is what a hooked pass over each sequence alone gives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import actstore
from actstore.errors import BadInput, NotStored
from actstore.ingest.interventions.rows import site_of
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.patched import prepare_patch
from actstore.ingest.models.load import load
from actstore.ingest.models.model import Model
from actstore.ingest.replay import compare
from actstore.interventions import Edit
from actstore.store import Store
from actstore.upkeep.verify import verify
from actstore.verbs import patching
from tests import tiny_models
from tests.test_text import folder, job, model  # noqa: F401

HELD = ["embed", "resid_post", "z"]
READ = ["resid_post.1", "z.1", "pattern.1"]
HOOKS = {
    "resid_post.0": "blocks.0.hook_resid_post",
    "z.1": "blocks.1.attn.hook_z",
    "resid_post.1": "blocks.1.hook_resid_post",
}
HOOKS["pattern.1"] = "blocks.1.attn.hook_pattern"
SOME = "select token_id from tokens where sequence_id in (select sequence_id from sequences where dataset = 'notes' "
SOME += "order by sequence_id limit 3) and position = 0"


@pytest.fixture(scope="module")
def root(folder: Path, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Run `tiny` over sequences of many lengths, in several batches; not to be changed."""
    root = tmp_path_factory.mktemp("edited_text") / "s.act"
    execute(job(root, model, folder, sites=HELD, batch_size=8))
    return root


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root, tmp_path / "s.act")
    return tmp_path / "s.act"


def drawn_rows(store: Store, how: str, seed: int) -> pl.DataFrame:
    """Edits of one to three tokens in half of the sequences, with donors in other sequences."""
    rng = np.random.default_rng(seed)
    tokens = store.sql("select token_id, sequence_id from tokens where dataset = 'notes' order by token_id")
    chosen = []
    for _, ids in tokens.group_by("sequence_id", maintain_order=True):
        if rng.random() < 0.5:
            chosen += rng.permutation(ids["token_id"].to_numpy())[: rng.integers(1, 4)].tolist()
    rows = pl.DataFrame({"token_id": sorted(chosen)})
    donors = rng.choice(tokens["token_id"].to_numpy(), len(rows))
    return rows if how == "zero" else rows.with_columns(donor_token_id=donors)


def alone(of: Model, numbers: list[int], at: str, how: str, places: dict[int, np.ndarray]) -> dict[str, torch.Tensor]:
    """One sequence without padding, in a pass whose hook edits it: each site of READ by token, and `logits`.

    Args:
        places: position → what its donor gives; of `zero` unused.
    """
    kept: dict[str, torch.Tensor] = {}

    def edit(x: torch.Tensor, hook: object) -> torch.Tensor:
        x = x.clone()
        for position, donor in places.items():
            given = torch.from_numpy(donor)
            x[0, position] = {"replace": given, "zero": torch.zeros_like(given), "add": x[0, position] + given}[how]
        return x

    def keep(site: str) -> tuple[str, Callable[..., None]]:
        return HOOKS[site], lambda x, hook: kept.update({site: x[0].clone()})

    hooks = [(HOOKS[at], edit), *map(keep, READ)]
    kept["logits"] = of.bridge.run_with_hooks(torch.tensor([numbers]), fwd_hooks=hooks)[0]
    return {**kept, "pattern.1": kept["pattern.1"].movedim(1, 0)}


@pytest.mark.parametrize("at", ["resid_post.0", "z.1"])
@pytest.mark.parametrize("how", ["replace", "zero", "add"])
@torch.no_grad()
def test_an_edited_run_is_a_hooked_pass_over_each_sequence_alone(copied: Path, model: Model, at: str, how: str):  # noqa: F811
    with Store(copied) as store:
        rows = drawn_rows(store, how, seed=len(at + how))
        donors = rows["token_id" if how == "zero" else "donor_token_id"].to_numpy()
        donated = dict(zip(rows["token_id"], store.read(donors, "tiny", at)[0], strict=True))
        sequences = store.sql(
            "select first_token_id, list(number order by position) as numbers from tokens "
            "join sequences using (sequence_id, dataset) where dataset = 'notes' group by all order by 1"
        ).rows()
    actstore.patch(copied, "tiny", "from rows", at, how, run="edited", sites=READ, tables={"rows": rows})
    lengths = []
    with Store(copied) as store:
        held = store.sql("from predictions where run = 'edited' order by token_id")
        for first, numbers in sequences:
            n = len(numbers)
            places = {id - first: donor for id, donor in donated.items() if first <= id < first + n}
            of_one = held.filter(pl.col("token_id").is_between(first, first + n - 1))
            if not places:
                assert not len(of_one)
                continue
            lengths.append(n)
            theirs = alone(model, numbers, at, how, places)
            for site in READ:
                ours, _ = store.read(first + np.arange(n), "edited", site)
                np.testing.assert_allclose(ours[..., : theirs[site].shape[-1]], theirs[site], rtol=1e-4, atol=2e-5)
            target = torch.tensor(numbers[1:], dtype=torch.long)
            loss = torch.nn.functional.cross_entropy(theirs["logits"][:-1], target, reduction="none")
            np.testing.assert_allclose(of_one["loss"], loss, rtol=1e-4, atol=1e-5)
    assert len(lengths) > 20
    assert len(set(lengths)) > 10  # so that passes are padded


def test_edits_of_text_that_are_not_stored_are_those_that_are(copied: Path):
    with Store(copied) as store:
        rows = drawn_rows(store, "add", seed=1)
    edit = Edit("from rows", "resid_post.0", "add", tables={"rows": rows})
    actstore.patch(copied, "tiny", edit, run="edited", sites=["resid_post.1"])
    asked = rows["token_id"].to_numpy()[::-3]  # in another order
    with Store(copied) as store, patching(store) as patch:
        ours, theirs = (
            patch.activations("tiny", [edit], "resid_post.1", asked),
            store.read(asked, "edited", "resid_post.1"),
        )
        np.testing.assert_allclose(ours, theirs[0], rtol=1e-5, atol=1e-6)
        held = store.sql("from predictions where run = 'edited' order by token_id")
        np.testing.assert_allclose(patch("tiny", [edit]).sort("token_id")["loss"], held["loss"], rtol=1e-5)


def test_batches_of_which_no_sequence_is_edited_hold_nothing_and_are_whole(copied: Path):
    with Store(copied) as store:
        n_batches = store.sql("select count(*) from shards where run = 'tiny' and site = 'hook_embed'").item()
        wanted = store.sql(f"select sequence_id from tokens semi join ({SOME}) using (token_id)")[
            "sequence_id"
        ].to_list()
    assert n_batches > 3
    actstore.patch(copied, "tiny", SOME, "resid_post.0", "zero", run="few", sites=["resid_post.1"])
    with Store(copied) as store:
        assert (
            store.sql("select distinct sequence_id from predictions where run = 'few' order by 1")[
                "sequence_id"
            ].to_list()
            == wanted
        )
        assert store.sql("select count(*) from shards where run = 'few'").item() == n_batches
        with pytest.raises(NotStored, match="no edit of the run names: the base run holds it"):
            store.read("select max(token_id) as token_id from tokens where dataset = 'notes'", "few", "resid_post.1")
        with patching(store) as patch:
            answers = patch("tiny", [Edit(SOME, "resid_post.0", "zero")])
            assert sorted(answers["sequence_id"].unique()) == wanted
    assert verify(copied).findings == []
    assert all(of.agrees and not of.cannot for of in compare.compare(copied, 3))


def test_a_base_whose_weights_were_moved_says_where_they_were_and_how_to_keep_them(tmp_path: Path):
    root, base = tmp_path / "s.act", tmp_path / "one"
    tiny_models.llama(base)
    actstore.ingest(
        root, base, text=["the cat sat", "the dog ran to the cat"], sites="resid_post", dataset="d", run="base"
    )
    base.rename(tmp_path / "moved")
    edit = ("select token_id from tokens where position = 1", "resid_post.0", "zero")
    with pytest.raises(NotStored) as refused:
        actstore.patch(root, "base", *edit, run="x")
    assert f"not where they were, at {base} (there is nothing)" in str(refused.value)
    assert "--keep-weights" in str(refused.value)
    assert "\n" not in str(refused.value)
    actstore.ingest(root, tmp_path / "moved", dataset="d", run="kept", sites="none", keep_weights=True)
    actstore.patch(root, "base", *edit, run="x")  # as the message said
    with Store(root) as store:
        assert store.sql("select count(*) from predictions where run = 'x'").item() > 0


def test_a_base_of_a_bridge_says_how_to_keep_its_weights(tmp_path: Path):
    root = tmp_path / "s.act"
    tiny_models.llama(tmp_path / "one")
    bridge, options = (
        load(str(tmp_path / "one")).bridge,
        {"dataset": "d", "tokenizer": str(tmp_path / "one"), "sites": "none"},
    )
    actstore.ingest(root, bridge, text=["the cat sat"], run="base", **options)
    edit = ("select token_id from tokens where position = 1", "resid_post.0", "zero")
    with pytest.raises(NotStored, match=r"keep_weights=True\), as another run over the same dataset") as refused:
        actstore.patch(root, "base", *edit, run="x")
    assert "\n" not in str(refused.value)
    actstore.ingest(root, bridge, run="kept", keep_weights=True, **options)
    actstore.patch(root, "base", *edit, run="x")


def test_an_edit_of_no_token_is_refused_beside_others(root: Path):
    with (
        Store(root) as store,
        patching(store) as patch,
        pytest.raises(BadInput, match="yields no row, so that nothing would be"),
    ):
        patch("tiny", [Edit(SOME, "resid_post.0", "zero"), Edit(f"{SOME} and false", "z.1", "zero")])


def test_attention_that_bert_has_used_is_no_site_of_edits(tmp_path: Path):
    """Before, an edit there was stored, and changed nothing."""
    bert = load(str(tiny_models.bert(tmp_path / "bert")))
    with pytest.raises(
        BadInput, match=r"edit at pattern\.1, which TransformerLens gives after the pass has used it"
    ) as refused:
        site_of(bert, "pattern.1")
    assert "edit q, k or v of the layer" in str(refused.value)
    ids = torch.arange(3, 9)[None]
    for name in ("q.1", "k.1", "v.1"):  # as the message says: these change the answers
        hooks = [(site_of(bert, name).name, lambda x, hook: 0 * x)]
        changed, before = bert.bridge.run_with_hooks(ids, fwd_hooks=hooks), bert.bridge(ids)
        assert float((changed - before).abs().max()) > 1e-4


def test_a_site_on_which_no_logit_rests_is_refused(model: Model):  # noqa: F811
    """Of what enters the rotary embedding only the dtype is used: before, an edit there was stored."""
    named = "rotary_emb.hook_in"
    with pytest.raises(BadInput, match=r"edit at rotary_emb\.hook_in, and no logit changes when noise is added there"):
        site_of(model, named)
    for name in ("embed", "resid_post.0", "z.1", "pattern.1", "q.0", "k.0", "v.0", "mlp_out.1"):
        assert site_of(model, name).short == name


def test_a_job_with_edits_closes_the_store_that_it_read(copied: Path):
    """Before, the store stayed open for as long as someone held the job."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("/proc/self/fd is Linux's")

    def held() -> list[str]:
        links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
        return [path for path in links if path.startswith(str(copied))]

    prepared = prepare_patch(copied, "tiny", [Edit(SOME, "resid_post.0", "zero")], "x")
    execute(prepared)
    assert prepared.patch is not None
    assert held()
    prepared.patch.close()
    assert not held()
