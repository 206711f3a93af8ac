"""docs/names.md: each name that it gives a site is the same activation, in tiny models of transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from actstore.ingest.models.forward import forward
from actstore.ingest.models.load import load
from tests import tiny_models

PAGE = (Path(__file__).parents[1] / "docs" / "names.md").read_text()
ROWS = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:3] == "| `"
]
LAYERS = 2


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The kind, what each site gives, what each of the bridge's hooks gives, the model of transformers, and the ids."""
    from transformers import AutoModelForCausalLM

    folder = getattr(tiny_models, request.param)(tmp_path_factory.mktemp("names") / request.param)
    model = load(str(folder))
    ids = torch.arange(22).reshape(2, 11)
    found: dict[str, torch.Tensor] = {}
    specs = model.sites([row[0].replace(".L", "") for row in ROWS])
    forward(model, ids, specs, lambda site, X: found.__setitem__(site.short, X.clone()))
    names = {site.short: site.name for site in specs}
    _, cache = model.bridge.run_with_cache(ids)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return request.param, found, names, cache, theirs, ids


def test_the_page_has_every_site_of_both_models(both):
    _, found, names, *_ = both
    wanted = {
        row[0].replace("L", str(layer)): row[1].replace("L", str(layer)) for row in ROWS for layer in range(LAYERS)
    }
    assert names == wanted
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_name_is_the_same_activation(both, row):
    kind, found, _, cache, theirs, ids = both
    compared = 0
    for layer in range(LAYERS):
        wanted = found[row[0].replace("L", str(layer))]
        for key in (row[1], row[2]):
            torch.testing.assert_close(cache[re.sub(r"\bL\b", str(layer), key)].reshape(wanted.shape), wanted)
        if path := row[3 if kind == "llama" else 4]:
            got = as_nnsight(theirs, path.replace("L", str(layer)), ids)
            torch.testing.assert_close(got.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)
            compared += 1
        with torch.no_grad():
            out = theirs(ids, output_hidden_states=True, output_attentions=True)
        if row[5]:
            name, at = re.fullmatch(r"(\w+)\[(.*)\]", row[5]).groups()
            at = layer + ("+ 1" in at)
            is_last = name == "hidden_states" and at == LAYERS
            close = torch.allclose(out[name][at], wanted, rtol=1e-4, atol=1e-5)
            assert close != is_last, "the page says that the last one has been through the final norm"
            compared += 1
    assert compared


def as_nnsight(model: torch.nn.Module, path: str, ids: torch.Tensor) -> torch.Tensor:
    """What nnsight gives for `model.model.layers[0].output[0]`: a module's output or first input, by a hook of torch."""
    module_path, kind, item = re.fullmatch(r"model\.(.*)\.(input|output)(\[0\])?", path).groups()
    module = model.get_submodule(module_path.replace("[", ".").replace("]", ""))
    seen: list[object] = []
    if kind == "output":
        handle = module.register_forward_hook(lambda _, inputs, output: seen.append(output))
    else:
        handle = module.register_forward_pre_hook(
            lambda _, inputs, kwargs: seen.append(inputs[0] if inputs else kwargs["hidden_states"]), with_kwargs=True
        )
    with handle, torch.no_grad():
        model(ids)
    (value,) = seen
    return value[0] if item else value
