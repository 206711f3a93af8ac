"""Checkpoints and configurations that are not what a model is run from: one line says why, and nothing takes long."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from actstore.errors import BadInput
from actstore.ingest.models.config import LONGEST, ModelConfig
from actstore.ingest.models.weights import canonical, check_weights, read_state, shapes
from actstore.ingest.training.recipe import read_config

CONFIG = ModelConfig("reproduction", 4, n_layers=1, d_model=4, d_head=4, d_mlp=8)
WEIGHTS = {name: torch.zeros(shape) for name, shape in shapes(CONFIG).items()}
NAME = "embed.W_E"


def read(path):
    return canonical(check_weights(read_state(path), CONFIG, str(path)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: weight.to_sparse(), "is a sparse_coo tensor"),
        (lambda weight: weight.to_sparse_csr(), "is a sparse_csr tensor"),
        (lambda weight: weight.to("meta"), "is a meta tensor"),
        (lambda weight: torch.nested.nested_tensor([weight[0], weight[1, :2]]), "is a nested tensor"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "is float8_e4m3fn; save it as one of float32"),
        (lambda weight: weight.to(torch.complex64), "is complex64"),
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.quint8), "is quint8"),
        (lambda weight: torch.full_like(weight, 1e39, dtype=torch.float64), "infinite numbers in float32"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's own, of what it will change
def test_a_pt_of_other_tensors_is_refused(tmp_path, change, said):
    torch.save({**WEIGHTS, NAME: change(WEIGHTS[NAME])}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=f"x.pt: weight '{NAME}' .*{said}") as caught:
        read(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_safetensors_of_float8_is_refused(tmp_path, dtype):
    save_file({**WEIGHTS, NAME: WEIGHTS[NAME].to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match=r"is float8_e.*; save it as one of float32, float64, float16, bfloat16"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "no such dtype"])
def test_a_safetensors_of_a_dtype_that_torch_lacks_is_refused(tmp_path, dtype):
    n_bytes = {"F4": 8, "F6_E2M3": 12}.get(dtype, 16)
    header = json.dumps({NAME: {"dtype": dtype, "shape": [16], "data_offsets": [0, n_bytes]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(n_bytes))
    with pytest.raises(BadInput, match=dtype) as caught:
        read(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_read_and_keep_it(tmp_path, dtype):
    torch.save({name: torch.nn.Parameter(weight.to(dtype)) for name, weight in WEIGHTS.items()}, tmp_path / "x.pt")
    save_file({name: weight.to(dtype) for name, weight in WEIGHTS.items()}, tmp_path / "x.safetensors")
    assert read(tmp_path / "x.pt") == read(tmp_path / "x.safetensors")
    assert read_state(tmp_path / "x.safetensors")[NAME].dtype == dtype


MODEL = "model: {d_model: 1, d_head: 1, n_layers: 1, act_fn: gelu, attention_dir: causal}\n"
ALIASES = "debug:\n  - &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  - &a{level + 1} [{', '.join([f'*a{level}'] * 10)}]\n" for level in range(20)
)
NO_YAML = {
    "many levels of lists": "[" * 20_000,
    "many levels of mappings": "{a: " * 20_000,
    "many levels of items": "- " * 20_000,
    "a number of many digits": "n_nodes: " + "1" * 5_000,
    "no date": "n_nodes: 2001-99-99",
    "no bool": "n_nodes: !!bool x",
    "no time": "n_nodes: !!timestamp x",
    "no number": "n_nodes: !!int ''",
    "an object": "n_nodes: !!python/object/apply:os.getcwd []",
}


@pytest.mark.parametrize("text", NO_YAML.values(), ids=NO_YAML.keys())
@pytest.mark.parametrize("read", [ModelConfig.from_yaml, read_config], ids=["model", "recipe"])
def test_what_pyyaml_stumbles_over_is_no_yaml(tmp_path, text, read):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"x\.yaml: no YAML: ") as caught:
        read(str(tmp_path / "x.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"{ALIASES}n_nodes: *a20\n{MODEL}",
        f"{ALIASES}n_nodes: 4\n{MODEL.replace('d_model: 1', 'd_model: *a20')}",
        f"{ALIASES}n_nodes: 4\n{MODEL}random_seed: *a20\n",
        f"{ALIASES}n_nodes: 4\n{MODEL}training: *a20\n",
    ],
    ids=["n_nodes", "d_model", "seed", "training"],
)
def test_aliases_of_aliases_are_not_written_out(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)  # 10^20 items, in two kilobytes
    with pytest.raises(BadInput):
        read_config(str(tmp_path / "x.yaml"))


def test_a_configuration_of_megabytes_is_not_parsed(tmp_path, monkeypatch):
    (tmp_path / "x.yaml").write_text("n_nodes: " + "x" * 10_000_000)
    monkeypatch.setattr("yaml.safe_load", lambda text: pytest.fail("it was parsed"))
    for read in (ModelConfig.from_yaml, read_config):
        with pytest.raises(BadInput, match=f"x.yaml has more than {LONGEST:,} characters"):
            read(str(tmp_path / "x.yaml"))
