"""Activations against a network written from its equations, and the names that sites go by."""

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor

from actstore.errors import BadInput
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.forward import forward
from actstore.ingest.models.load import Model
from actstore.ingest.models.sites import SiteSpec, all_sites, site_specs
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.tokens import encode
from tests.reference import ACTIVATIONS, one_thread, random_model, reference, weights  # noqa: F401

SMALL = [
    ModelConfig("reproduction", 7, n_layers=2, n_heads=1, d_model=24, d_head=24, d_mlp=40),
    ModelConfig("reproduction", 5, n_layers=1, n_heads=4, d_model=24, d_head=6, d_mlp=17),
    ModelConfig("baseline", 7, n_layers=3, n_heads=3, d_model=16, d_head=10, d_mlp=64, n_ctx=40),  # 3 × 10 is not 16
    *(ModelConfig("baseline", 4, n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=9, act_fn=fn) for fn in ACTIVATIONS),
]


def prompts(model: Model, n_trees: int = 6) -> Tensor:
    config = model.config
    return torch.from_numpy(config.vocabulary.encode(encode(draw(config.system, 5, 0, n_trees, config.n_nodes))))


def activations(model: Model, ids: Tensor, sites: list[SiteSpec]) -> tuple[dict[str, Tensor], Tensor]:
    taken: dict[str, Tensor] = {}

    def take(site: SiteSpec, activation: Tensor) -> None:
        assert site.name not in taken
        taken[site.name] = activation.clone()

    logits = jaxtyped(typechecker=beartype)(forward)(model, ids, sites, take)
    return taken, logits


def test_every_site_of_the_shipped_model_is_what_the_equations_say(shipped):
    check_every_site(shipped)


@pytest.mark.parametrize("config", SMALL)
def test_every_site_of_a_random_model_is_what_the_equations_say(config):
    check_every_site(random_model(config))


def check_every_site(model: Model) -> None:
    ids = prompts(model)
    taken, logits = activations(model, ids, all_sites(model.config))
    expected = reference(weights(model), ids, model.config.act_fn)
    for name, activation in {**taken, "logits": logits}.items():
        # softmax passes on the error of its scores, which is relative to the largest of them
        scale = expected[name.replace("hook_pattern", "hook_attn_scores")].abs().max()
        assert activation.dtype == torch.float32
        assert activation.shape == expected[name].shape
        assert (activation - expected[name]).abs().max() <= 1e-5 * scale, name
    assert len(taken) == 1 + 4 * model.config.n_layers


def test_sites_are_handed_on_in_the_order_in_which_they_are_computed_and_only_those_asked_for():
    model = random_model(SMALL[0])
    sites = all_sites(model.config)
    taken, logits = activations(model, prompts(model), sites)
    assert list(taken) == [site.name for site in sites]
    some, same_logits = activations(model, prompts(model), [sites[4], sites[0]])
    assert set(some) == {sites[4].name, sites[0].name}
    assert torch.equal(some[sites[4].name], taken[sites[4].name])
    assert torch.equal(logits, same_logits)


def test_no_hook_stays_behind_even_when_taking_fails():
    model, calls = random_model(SMALL[0]), []

    def fail(site: SiteSpec, activation: Tensor) -> None:
        calls.append(site)
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        forward(model, prompts(model), all_sites(model.config), fail)
    forward(model, prompts(model), [], fail)
    assert len(calls) == 1


def test_what_comes_later_in_a_prompt_changes_nothing_before_it():
    model = random_model(SMALL[2])
    ids = prompts(model)
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % model.config.d_vocab
    first, _ = activations(model, ids, all_sites(model.config))
    second, _ = activations(model, changed, all_sites(model.config))
    for site in all_sites(model.config):
        (before, after), (kept, differing) = split_at_10(site, first[site.name]), split_at_10(site, second[site.name])
        torch.testing.assert_close(kept, before, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(differing, after, rtol=1e-3, atol=1e-3)


def split_at_10(site: SiteSpec, activation: Tensor) -> tuple[Tensor, Tensor]:
    if site.kind == "pattern":  # [tree, head, query, key]
        return activation[:, :, :10, :10], activation[:, :, 10:]
    return activation[:, :10], activation[:, 10:]


def test_activations_carry_no_gradient():
    model = random_model(SMALL[0])
    taken, logits = activations(model, prompts(model), all_sites(model.config))
    assert not any(tensor.requires_grad for tensor in [*taken.values(), logits])


CONFIG = ModelConfig("reproduction", 5, n_layers=3, d_model=8, d_head=8)


@pytest.mark.parametrize(
    ("names", "shorts"),
    [
        (None, ["embed", "resid_post.0", "resid_post.1", "resid_post.2"]),
        (["embed"], ["embed"]),
        (["hook_embed", "embed"], ["embed"]),
        (["blocks.1.hook_resid_mid"], ["resid_mid.1"]),
        (["pattern"], ["pattern.0", "pattern.1", "pattern.2"]),
        (["blocks.2.attn.hook_pattern", "resid_pre.0"], ["resid_pre.0", "pattern.2"]),
        (
            ["resid_post.2", "resid_post", "resid_pre.1"],
            ["resid_post.0", "resid_pre.1", "resid_post.1", "resid_post.2"],
        ),
    ],
)
def test_sites_go_by_short_names_long_names_and_families_and_come_in_network_order(names, shorts):
    assert [site.short for site in site_specs(names, CONFIG)] == shorts


def test_every_site_is_found_by_both_of_its_names_and_says_its_kind():
    sites = all_sites(CONFIG)
    assert len(sites) == 1 + 4 * 3
    for site in sites:
        assert site_specs([site.name], CONFIG) == site_specs([site.short], CONFIG) == [site]
        assert site.kind == ("pattern" if "pattern" in site.name else "resid")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["resid_post.3"], "did you mean 'resid_post.2'"),
        (["embed", "resid_pots.1"], "did you mean 'resid_post.1'"),
        (["blocks.0.hook_resid_pots"], "did you mean 'blocks.0.hook_resid_post'"),
        (["resid"], "there are embed, and resid_pre, resid_mid, resid_post, pattern of all or of one"),
        (["blocks.0.hook_mlp_oot"], "did you mean 'blocks.0.hook_mlp_out'"),
        ([""], "no site ''"),
        ([], "no site asked for"),
    ],
)
def test_a_site_that_is_not_there_is_refused_with_what_is(names, said):
    with pytest.raises(BadInput) as refused:
        site_specs(names, CONFIG)
    assert said in str(refused.value)
    assert "3 layers" in str(refused.value)
    assert "\n" not in str(refused.value)
