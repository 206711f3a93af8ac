"""Checkpoints and configurations that are not what a model is run from: one line says why, and nothing takes long."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actstore.errors import BadInput, LimitReached
from actstore.ingest.models import pretrained
from actstore.ingest.models.config import LONGEST, ModelConfig
from actstore.ingest.models.load import load
from actstore.ingest.models.native import boot, described, put
from actstore.ingest.models.weights import canonical, check_weights, read_state, shapes
from actstore.ingest.training.recipe import read_config
from tests.tiny_models import llama

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
        (lambda weight: weight.to(torch.float8_e4m3fn), r"is float8_e4m3fn \[.*; save it as one of float32"),
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
    monkeypatch.setattr("yaml.load", lambda text, Loader: pytest.fail("it was parsed"))
    for read in (ModelConfig.from_yaml, read_config):
        with pytest.raises(BadInput, match=f"x.yaml has more than {LONGEST:,} characters"):
            read(str(tmp_path / "x.yaml"))


# Files that grow as they are read, and names that fill a message.


def saved(weights: dict) -> bytes:
    torch.save(weights, buffer := io.BytesIO())
    return buffer.getvalue()


def test_a_compressed_pt_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *read, **how: pytest.fail("it was unpacked"))
    with (
        zipfile.ZipFile(io.BytesIO(saved(WEIGHTS))) as plain,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in plain.infolist():
            content = bytes(10_000_000) if part.filename.endswith("data/0") else plain.read(part)
            packed.writestr(part.filename, content)
    with pytest.raises(BadInput, match=r"x\.pt is compressed, 10,"):
        read(tmp_path / "x.pt")


def test_a_tensor_of_more_numbers_than_its_file_is_refused(tmp_path):
    torch.save({**WEIGHTS, NAME: torch.zeros(1).as_strided((10**6, 10**6), (0, 0))}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=r"'embed\.W_E' has 1,000,000,000,000 numbers, more than its file"):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize("key", ["x" * 1_000_000, ("a", ("b",) * 1000) * 1000, 3], ids=["long", "tuple", "number"])
def test_a_weight_of_a_strange_name_is_one_short_line(tmp_path, key):
    torch.save({**WEIGHTS, key: torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(BadInput) as caught:
        read(tmp_path / "x.pt")
    assert len(str(caught.value)) < 600


def test_too_little_memory_for_a_checkpoint_is_no_damage(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(saved(WEIGHTS))

    def no_memory(*read: object, **how: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: Error code 12 (Cannot allocate memory)")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(LimitReached, match="memory"):
        read(tmp_path / "x.pt")


MERGES = "base: &a0 {x: 1}\n" + "".join(
    f"m{level}: &a{level + 1}\n  <<: [{', '.join([f'*a{level}'] * 9)}]\n" for level in range(12)
)


def test_merges_of_merges_are_not_written_out(tmp_path):
    (tmp_path / "x.yaml").write_text(MERGES)  # 9^12 keys
    with pytest.raises(BadInput, match="a mapping has more than 200 keys"):
        read_config(str(tmp_path / "x.yaml"))


# Native models, and models of transformers.

FIELDS = {"n_layers": 1, "d_model": 4, "n_heads": 1, "d_head": 4, "n_ctx": 8, "d_vocab": 5, "attn_only": True}


@pytest.fixture(scope="module")
def native():
    return boot(FIELDS, 0, "x.yaml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: weight.to_sparse(), "is a sparse_coo tensor"),
        (lambda weight: weight.to_sparse_csr(), "is a sparse_csr tensor"),
        (lambda weight: weight.to("meta"), "is a meta tensor"),
        (lambda weight: torch.nested.nested_tensor([weight[0], weight[1, :2]]), "is a nested tensor"),
        (lambda weight: weight.to(torch.complex64), "is complex64"),
        (lambda weight: weight > 0, "is bool"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "is float8_e4m3fn"),
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.quint8), "is quint8"),
        (lambda weight: torch.full_like(weight, 1e39, dtype=torch.float64), "infinite numbers in float32"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_native_model_takes_no_other_tensors(native, change, said):
    weights = dict(native.state_dict())
    weights["embed.weight"] = change(weights["embed.weight"])
    with pytest.raises(BadInput, match=f"x.pt: weight 'embed.weight' .*{said}"):
        put(native, weights, "x.pt")


def test_a_native_model_of_countless_layers_is_not_built(tmp_path):
    (tmp_path / "x.yaml").write_text(f"transformer_lens: {json.dumps({**FIELDS, 'n_layers': 10**8})}")
    with pytest.raises(BadInput, match="n_layers is 100000000; it is a whole number from 1 to 1,000"):
        described(tmp_path / "x.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("models") / "tiny")


def changed(folder: Path, to: Path, **files: str | bytes | None) -> Path:
    """A copy of a model's folder with other files; a JSON of the folder takes the keys of a dict."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    for name, content in files.items():
        path = to / name.replace("__", ".")
        if isinstance(content, dict):
            content = json.dumps({**json.loads(path.read_text()), **content})
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return to


EVIL = "import os\nos.mkdir(__file__ + '-ran')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config__json": "[" * 100_000}, "RecursionError"),
        ({"config__json": {"pad": "x" * 10_000_000}}, "and is no configuration"),
        ({"config__json": {"num_hidden_layers": 10**8}}, "100,000,000 layers"),
        ({"config__json": {"architectures": 3}}, "of architecture 3"),
        ({"config__json": {"architectures": [{"a": 1}]}}, "of architecture"),
        ({"config__json": {"hidden_size": 64}}, "have other shapes than its configuration's"),
        (
            {"config__json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}, "evil__py": EVIL},
            "contains custom code",
        ),
        ({"tokenizer__json": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": ["a b"]}}}, "Panic"),
        ({"model__safetensors": b""}, "header too small"),
    ],
    ids=["deep", "long", "layers", "architectures", "architecture", "shapes", "code", "panic", "empty"],
)
def test_a_folder_that_is_no_model_is_one_line(folder, tmp_path, files, said):
    with pytest.raises(BadInput, match=said) as caught:
        load(str(changed(folder, tmp_path / "x", **files)))
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.rglob("*-ran")]


def test_code_that_a_folder_brings_is_never_run(folder, tmp_path):
    code = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    load(str(changed(folder, tmp_path / "x", config__json=code, evil__py=EVIL)))  # an architecture that is known
    assert not [*tmp_path.rglob("*-ran")]


def test_weights_of_a_folder_that_are_not_finite_are_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    name = "model.norm.weight"
    save_file(
        {**weights, name: weights[name] * float("nan")}, there := tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(BadInput, match=r"'model\.norm\.weight' holds 32 NaN or infinite numbers"):
        load(str(changed(folder, tmp_path / "x", model__safetensors=there.read_bytes())))


@pytest.mark.parametrize("shard", ["../tiny/model.safetensors", "model-9.safetensors", 3, "."])
def test_an_index_names_shards_beside_it_only(folder, tmp_path, shard):
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors", "lm_head.weight": shard}}
    whole = changed(folder, tmp_path / "x", model__safetensors__index__json=json.dumps(index))
    (whole / "model.safetensors").rename(whole / "model-1.safetensors")
    with pytest.raises(BadInput, match="which does not lie beside it; get the missing files"):
        pretrained.find_checkpoint(whole)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"weight_map": null}', "x"])
def test_an_index_that_is_none_is_one_line(folder, tmp_path, text):
    whole = changed(folder, tmp_path / "x", model__safetensors__index__json=text)
    (whole / "model.safetensors").rename(whole / "model-1.safetensors")
    with pytest.raises(BadInput, match="is no index of shards"):
        pretrained.find_checkpoint(whole)
