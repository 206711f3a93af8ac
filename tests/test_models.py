"""Configurations, checkpoints and names: what loads is what was saved, and what is wrong is refused in one line."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import struct
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

from actstore.errors import BadInput, NotStored
from actstore.ingest.models.config import ACT_FNS, CONFIG_KEYS, NEEDED_KEYS, ModelConfig
from actstore.ingest.models.load import add, build, from_bytes, listing, load
from actstore.ingest.models.weights import canonical, read_state, save, shapes, state
from actstore.named import available
from tests.reference import one_thread, random_model, random_state, weights  # noqa: F401

ROOT = Path(__file__).parents[1]
TINY = ModelConfig("reproduction", 4, n_layers=2, n_heads=2, d_model=8, d_head=6, d_mlp=12)
NOTEBOOK = """\
random_seed: 42
n_nodes: 16
model:
  d_model: 128
  d_head: 128
  n_layers: 6
  act_fn: gelu
  attention_dir: causal
optimizer:
  lr: 0.001
  weight_decay: 0.01
batch_size: 64
epoch_len_steps: 5000
checkpoint_every_epoch: 2
device: cpu
debug: false
use_wandb: true
wandb:
  project: reasoning-mech-interp
  name: 00_6L_nodes=16
max_iters: null
"""


def refusal(*call) -> str:
    """What a call that must be refused says; one line, as all refusals."""
    function, *arguments = call
    with pytest.raises(BadInput) as refused:
        function(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], config: ModelConfig = TINY, name: str = "tiny.pt"
) -> Path:
    """A checkpoint as a user has it: the state dict, and its YAML beside it."""
    path = folder / name
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config.to_mapping()))
    return path


# configurations


def test_the_notebooks_configuration_is_a_reproduction_of_16_nodes():
    config = ModelConfig.from_mapping(yaml.safe_load(NOTEBOOK), "conf.yaml")
    assert config == ModelConfig("reproduction", 16, 6, 1, 128, 128, 512, "gelu", "causal", 68)
    assert config.d_vocab == 36


@pytest.mark.parametrize(
    ("system", "n_ctx", "d_vocab", "lr"), [("reproduction", 68, 36, 1e-3), ("baseline", 65, 35, 1e-3)]
)
def test_the_shipped_configurations_are_the_two_systems(system, n_ctx, d_vocab, lr):
    path = ROOT / "data" / "configs" / f"{system}.yaml"
    config, training = ModelConfig.from_yaml(path), yaml.safe_load(path.read_text())
    assert config == ModelConfig(system, 16)
    assert (config.n_ctx, config.d_vocab) == (n_ctx, d_vocab)
    assert training["optimizer"]["lr"] == lr
    assert training["optimizer"]["weight_decay"] == 0.01
    assert training["batch_size"] == 64


def test_a_context_fits_the_longest_prompt_and_path_of_every_size():
    for n_nodes in range(2, 65):
        for system in ("reproduction", "baseline"):
            assert ModelConfig(system, n_nodes).n_ctx >= 4 * n_nodes - 1


configs = st.builds(
    ModelConfig,
    system=st.sampled_from(["reproduction", "baseline"]),
    n_nodes=st.integers(2, 64),
    n_layers=st.integers(1, 255),
    n_heads=st.integers(1, 255),
    d_model=st.integers(1, 65_535),
    d_head=st.integers(1, 65_535),
    d_mlp=st.integers(1, 65_535),
    act_fn=st.sampled_from(ACT_FNS),
    n_ctx=st.integers(0, 65_535),
)


@given(configs)
def test_a_configuration_written_as_yaml_or_json_reads_back_the_same(config):
    for text in (yaml.safe_dump(config.to_mapping()), json.dumps(config.to_mapping())):
        assert ModelConfig.from_mapping(yaml.safe_load(text), "conf.yaml") == config


def test_what_the_notebook_leaves_out_is_what_a_hooked_transformer_makes_of_it():
    mapping = yaml.safe_load(NOTEBOOK)
    mapping["model"]["d_head"] = 32
    config = ModelConfig.from_mapping(mapping, "conf.yaml")
    assert (config.n_heads, config.d_mlp) == (4, 512)


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in NEEDED_KEYS.items() for key in keys])
def test_a_missing_key_is_named(section, key):
    mapping = yaml.safe_load(NOTEBOOK)
    del (mapping[section] if section else mapping)[key]
    said = refusal(ModelConfig.from_mapping, mapping, "conf.yaml")
    assert said.startswith(f"conf.yaml: key '{section and section + '.'}{key}' is missing")


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in CONFIG_KEYS.items() for key in keys])
def test_a_misspelt_key_is_named_with_the_one_that_was_meant(section, key):
    mapping = yaml.safe_load(NOTEBOOK)
    where = mapping[section] if section else mapping
    misspelt = key + key[-1]
    where[misspelt] = where.pop(key, 1)
    said = refusal(ModelConfig.from_mapping, mapping, "conf.yaml")
    assert f"unknown key '{section and section + '.'}{misspelt}' (did you mean '{key}'?)" in said
    assert ", ".join(CONFIG_KEYS[section]) in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_nodes": 65}, "65 nodes"),
        ({"n_nodes": "16"}, "n_nodes '16'"),
        ({"system": "baselin"}, "no system 'baselin'; there are reproduction, baseline"),
        ({"model": None}, "'model' is NoneType; expected the keys d_model"),
        ({"model": {"n_layers": 0}}, "n_layers 0"),
        ({"model": {"n_layers": True}}, "n_layers True"),
        ({"model": {"d_model": "128"}}, "d_model '128'"),
        ({"model": {"d_head": 0}}, "d_head 0"),
        ({"model": {"d_mlp": 1.5}}, "d_mlp 1.5"),
        ({"model": {"act_fn": "gleu"}}, "act_fn 'gleu'; there are gelu, gelu_new, relu, silu"),
        ({"model": {"attention_dir": "bidirectional"}}, "attention_dir 'bidirectional'; there is causal"),
        ({"optimizer": [0.001]}, "'optimizer' is list"),
    ],
)
def test_a_value_that_makes_no_model_is_named(change, said):
    mapping = yaml.safe_load(NOTEBOOK)
    for key, value in change.items():
        if isinstance(value, dict):
            mapping[key].update(value)
        else:
            mapping[key] = value
    assert said in refusal(ModelConfig.from_mapping, mapping, "conf.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model: [1, 2", "no YAML"),
        (b"", "a configuration is NoneType"),
        (b"16", "a configuration is int"),
        (b"\xff\xfe\x00", "cannot read a configuration"),
        (None, "No such file"),
    ],
)
def test_a_configuration_that_is_none_is_refused_by_its_path(tmp_path, content, said):
    path = tmp_path / "conf.yaml"
    if content is not None:
        path.write_bytes(content)
    message = refusal(ModelConfig.from_yaml, path)
    assert message.startswith(str(path))
    assert said in message


# weights

SHAPES = [
    TINY,
    ModelConfig("baseline", 6, n_layers=1, n_heads=1, d_model=10, d_head=10, d_mlp=40, n_ctx=30),
    ModelConfig("baseline", 3, n_layers=3, n_heads=3, d_model=7, d_head=2, d_mlp=5),
]


@pytest.mark.parametrize("config", SHAPES)
def test_state_undoes_the_conversion_of_a_hooked_transformers_checkpoint(config):
    bridge, given_state = build(config, seed=0), random_state(config, seed=1)
    converted = convert_tl_checkpoint(given_state, bridge.cfg)
    bridge.load_state_dict(converted)
    assert equal(state(bridge, config), given_state)
    assert equal(convert_tl_checkpoint(state(bridge, config), bridge.cfg), bridge.state_dict())


@pytest.mark.parametrize("config", SHAPES)
def test_a_state_is_a_copy_that_training_on_does_not_change(config):
    bridge = build(config, seed=0)
    before = state(bridge, config)
    kept = copy.deepcopy(before)
    with torch.no_grad():
        for parameter in bridge.original_model.parameters():
            parameter += 1
    assert equal(before, kept)
    unchanged = {name for name, after in state(bridge, config).items() if torch.equal(after, before[name])}
    assert unchanged == {"unembed.b_U"}  # a buffer in TransformerLens: loaded and used, never trained


def test_a_saved_file_has_the_hash_that_sha256sum_prints_whatever_the_order_of_the_keys(tmp_path):
    tensors = random_state(TINY)
    sha256 = save(tensors, tmp_path / "a.safetensors")
    again = save(dict(reversed(tensors.items())), tmp_path / "b.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    assert sha256 == again == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "b.safetensors").read_bytes() == content
    assert equal(load_file(tmp_path / "a.safetensors"), tensors)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert list(header) == sorted(tensors)  # and no __metadata__
    assert from_bytes(content, TINY, "tiny", "a.safetensors").weights_sha256 == sha256


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save(random_state(TINY, seed=1), path)
    content = path.read_bytes()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(random_state(TINY, seed=2), path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == content


def test_whoever_has_the_old_file_open_goes_on_reading_it(tmp_path):
    path = tmp_path / "a.safetensors"
    save(random_state(TINY, seed=1), path)
    with open(path, "rb") as reader:
        save(random_state(TINY, seed=2), path)
        assert reader.read() == canonical(random_state(TINY, seed=1))
    assert path.read_bytes() == canonical(random_state(TINY, seed=2))


def test_weights_that_share_memory_are_saved_like_any_others():
    tensors = random_state(TINY)
    tensors["blocks.1.ln1.w"] = tensors["blocks.0.ln1.w"]
    assert from_bytes(canonical(tensors), TINY, "tiny", "tiny.safetensors")


def test_half_precision_weights_run_as_their_float32_values_and_keep_the_hash_of_their_file(tmp_path):
    half = {name: tensor.half() for name, tensor in random_state(TINY).items()}
    sha256 = save(half, tmp_path / "half.safetensors")
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(TINY.to_mapping()))
    model = load(str(tmp_path / "half.safetensors"))
    assert model.weights_sha256 == sha256
    assert equal(state(model.bridge, TINY), {name: tensor.float() for name, tensor in half.items()})


def test_a_built_model_is_its_seed_and_draws_nothing_from_the_callers_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (state(build(TINY, seed), TINY) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert equal(first, again)
    assert not torch.equal(first["blocks.0.attn.W_Q"], other["blocks.0.attn.W_Q"])


def test_a_built_model_trains_and_a_loaded_one_does_not():
    built, loaded = build(TINY, 0), random_model(TINY).bridge
    assert built.training
    assert all(parameter.requires_grad for parameter in built.original_model.parameters())
    assert not any(module.training for module in loaded.original_model.modules())
    assert not any(parameter.requires_grad for parameter in loaded.original_model.parameters())


# checkpoints


def with_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as a HookedTransformer saves it: in its own order, the causal masks in between."""
    buffers = {}
    for layer in range(2):
        buffers[f"blocks.{layer}.attn.mask"] = torch.ones(20, 20).tril().bool()
        buffers[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-torch.inf)
    return {**buffers, **dict(reversed(tensors.items()))}


def test_a_hooked_transformers_pt_and_its_safetensors_are_the_same_model(tmp_path):
    tensors = random_state(TINY)
    from_pt = load(str(write_checkpoint(tmp_path, with_buffers(tensors), name="a.pt")))
    from_safetensors = load(str(write_checkpoint(tmp_path, tensors, name="b.safetensors")))
    assert from_pt.weights == from_safetensors.weights == canonical(tensors)
    assert equal(state(from_pt.bridge, TINY), tensors)
    assert (from_pt.name, from_pt.source) == ("a", "a.pt")


class Code:
    """A pickle of this would leave a file behind when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_of_code_is_refused_and_not_run(tmp_path, recwarn):
    mark = tmp_path / "ran"
    for name, write in (("a.pt", torch.save), ("b.pt", lambda code, path: path.write_bytes(pickle.dumps(code)))):
        write({"embed.W_E": Code(mark)}, tmp_path / name)
        said = refusal(read_state, tmp_path / name)
        assert "a pickle of code, which was not run; expected the state dict" in said
    assert not recwarn.list  # nor does torch talk beside it
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists()  # so it would have been


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_cut_short_anywhere_is_refused(tmp_path, suffix):
    whole = write_checkpoint(tmp_path, random_state(TINY), name=f"a{suffix}").read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        said = refusal(read_state, cut)
        assert str(cut) in said
        assert "cut short" in said or "damaged" in said


@given(content=st.binary(max_size=300), suffix=st.sampled_from([".pt", ".safetensors"]))
def test_noise_is_no_checkpoint(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("noise") / f"noise{suffix}"
    path.write_bytes(content)
    refusal(read_state, path)


def drop(key: str, tensors: dict[str, Tensor]) -> None:
    del tensors[key]


def rename(key: str, tensors: dict[str, Tensor]) -> None:
    tensors[f"{key}s"] = tensors.pop(key)


def transpose(key: str, tensors: dict[str, Tensor]) -> None:
    tensors[key] = tensors[key].mT.contiguous()


def spoil(key: str, tensors: dict[str, Tensor]) -> None:
    tensors[key].flatten()[3] = torch.nan


def overflow(key: str, tensors: dict[str, Tensor]) -> None:
    tensors[key].flatten()[:2] = torch.inf


def whole_numbers(key: str, tensors: dict[str, Tensor]) -> None:
    tensors[key] = tensors[key].long()


@pytest.mark.parametrize(
    ("wrong", "key", "said"),
    [
        (
            drop,
            "unembed.W_U",
            "weight 'unembed.W_U' is missing; expected the state dict of a HookedTransformer with 2 layers",
        ),
        (drop, "blocks.1.attn.b_K", "weight 'blocks.1.attn.b_K' is missing"),
        (rename, "blocks.0.mlp.W_in", "unknown weight 'blocks.0.mlp.W_ins' (did you mean 'blocks.0.mlp.W_in'?)"),
        (transpose, "embed.W_E", "weight 'embed.W_E' is float32 [8, 12], which the configuration makes float [12, 8]"),
        (transpose, "blocks.0.attn.W_Q", "is float32 [2, 6, 8], which the configuration makes float [2, 8, 6]"),
        (spoil, "blocks.1.mlp.W_out", "weight 'blocks.1.mlp.W_out' holds 1 NaN or infinite numbers"),
        (overflow, "ln_final.w", "weight 'ln_final.w' holds 2 NaN or infinite numbers"),
        (whole_numbers, "pos_embed.W_pos", "weight 'pos_embed.W_pos' is int64 [20, 8]"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_weight_that_is_not_the_configurations_is_named(tmp_path, wrong, key, said, suffix):
    tensors = random_state(TINY)
    wrong(key, tensors)
    path = write_checkpoint(tmp_path, tensors, name=f"tiny{suffix}")
    message = refusal(load, str(path))
    assert message.startswith(str(path))
    assert said in message


@pytest.mark.parametrize("change", ["system", "n_nodes", "n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx"])
def test_weights_of_another_configuration_are_refused(tmp_path, change):
    other = TINY.to_mapping()
    where = other["model"] if change in other["model"] else other
    where[change] = "baseline" if change == "system" else where[change] + 1
    path = write_checkpoint(tmp_path, random_state(TINY), ModelConfig.from_mapping(other, "conf.yaml"))
    assert "weight '" in refusal(load, str(path))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([torch.ones(2)], "holds list; expected the state dict"),
        ({"step": 3, "model": {}}, "holds a dict of ['step', 'model'], …; expected the state dict"),
        (torch.ones(2), "holds Tensor; expected the state dict"),
    ],
)
def test_a_pt_of_something_else_is_refused_with_what_it_holds(tmp_path, found, said):
    torch.save(found, tmp_path / "a.pt")
    assert said in refusal(read_state, tmp_path / "a.pt")


def test_a_checkpoint_that_is_not_there_or_of_another_kind_is_refused(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    assert "no checkpoint: expected a file in .safetensors, .pt, .pth" in refusal(read_state, tmp_path / "model.bin")
    assert "No such file" in refusal(read_state, tmp_path / "a.pt")
    assert "Is a directory" in refusal(read_state, tmp_path / "folder.pt")
    assert f"no checkpoint {tmp_path / 'a.pt'}" in refusal(load, str(tmp_path / "a.pt"))


def test_a_checkpoint_without_its_yaml_names_those_that_lie_there(tmp_path):
    path = write_checkpoint(tmp_path, random_state(TINY))
    path.with_suffix(".yaml").rename(tmp_path / "conf.yaml")
    said = refusal(load, str(path))
    assert "has no tiny.yaml beside it (YAML files there: conf.yaml): name one with --config" in said
    assert load(str(path), config=str(tmp_path / "conf.yaml")).config == TINY


def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = str(write_checkpoint(tmp_path, random_state(TINY)))
    assert "torch finds no CUDA device here; use cpu" in refusal(load, path, None, "cuda")
    for device in ("gpu", "meta", ""):
        assert f"got device {device!r}; use cpu or cuda" in refusal(load, path, None, device)


# names


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder of models of one's own, and nothing in ./data."""
    monkeypatch.setenv("ACTSTORE_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


def test_an_added_checkpoint_goes_by_its_name_and_keeps_its_configuration_word_for_word(tmp_path, models):
    path = write_checkpoint(tmp_path, with_buffers(random_state(TINY)))
    text = f"# as it was\n{path.with_suffix('.yaml').read_text()}wandb:\n  name: mine\n"
    path.with_suffix(".yaml").write_text(text)
    added = add("mine", path, None, None, models)
    model = load("mine")
    assert "mine" in available()
    assert (models / "mine.yaml").read_text() == text
    assert (
        model.weights_sha256
        == added.weights_sha256
        == hashlib.sha256((models / "mine.safetensors").read_bytes()).hexdigest()
    )
    assert (model.name, model.config, model.source) == ("mine", TINY, "mine.safetensors")
    assert equal(weights(model), random_state(TINY))
    assert {"model": "mine", "n_nodes": 4, "n_layers": 2}.items() <= listing().row(
        by_predicate=pl.col("model") == "mine", named=True
    ).items()


def test_adding_twice_is_adding_once_but_a_name_is_never_given_to_other_weights(tmp_path, models):
    path = write_checkpoint(tmp_path, random_state(TINY, seed=1))
    add("mine", path, None, None, models)
    add("mine", path, None, None, models)
    other = write_checkpoint(tmp_path, random_state(TINY, seed=2), name="other.pt")
    assert "mine.safetensors holds other weights; choose another name" in refusal(
        add, "mine", other, None, None, models
    )
    assert equal(weights(load("mine")), random_state(TINY, seed=1))


@pytest.mark.parametrize("name", ["", "../mine", "a/b", ".hidden", "-x", "mine.pt", "mine.safetensors", "a\nb"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, models, name):
    path = write_checkpoint(tmp_path, random_state(TINY))
    assert "got the name" in refusal(add, name, path, None, None, models)
    assert not models.exists()


def test_a_baselines_checkpoint_without_yaml_takes_the_systems_own_shape(tmp_path, models):
    tensors = random_state(ModelConfig("baseline", 16))
    assert tensors["embed.W_E"].shape == (35, 128)
    assert tensors["pos_embed.W_pos"].shape == (65, 128)
    torch.save(tensors, tmp_path / "model.pt")
    assert add("paper", tmp_path / "model.pt", None, "baseline", models).config == ModelConfig("baseline", 16)
    assert load("paper").config == ModelConfig("baseline", 16)
    said = refusal(add, "mine", tmp_path / "model.pt", None, "reproduction", models)
    assert "'embed.W_E' is float32 [35, 128], which the configuration makes float [36, 128]" in said
    assert "has no model.yaml beside it" in refusal(add, "mine", tmp_path / "model.pt", None, None, models)


def test_a_system_may_be_told_where_the_yaml_does_not_say_but_not_against_it(tmp_path, models):
    config = ModelConfig("baseline", 4, n_layers=1, d_model=8, d_head=8, d_mlp=32)
    path = write_checkpoint(tmp_path, random_state(config), config)
    said = path.with_suffix(".yaml").read_text()
    assert "says system 'baseline', and --system 'reproduction'" in refusal(
        add, "a", path, None, "reproduction", models
    )
    path.with_suffix(".yaml").write_text(said.replace("system: baseline\n", ""))
    assert add("a", path, None, "baseline", models).config == config
    assert load("a").config == config
    assert "no system 'paper'; there are reproduction, baseline" in refusal(add, "b", path, None, "paper", models)


def test_a_name_that_no_model_has_is_refused_with_those_there_are(tmp_path, models):
    add("mine", write_checkpoint(tmp_path, random_state(TINY)), None, None, models)
    with pytest.raises(
        NotStored, match="no model 'mime' \\(did you mean 'mine'\\?\\); there are baseline, mine, reproduction"
    ) as refused:
        load("mime")
    assert "\n" not in str(refused.value)


def test_a_model_of_ones_own_comes_before_the_shipped_one_of_that_name(tmp_path, models):
    assert load("reproduction").config.n_nodes == 16
    add("reproduction", write_checkpoint(tmp_path, random_state(TINY)), None, None, models)
    assert load("reproduction").config == TINY


def test_the_shipped_models_are_their_files(shipped):
    path = ROOT / "data" / "checkpoints" / "reproduction.safetensors"
    assert shipped.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert shipped.config == ModelConfig("reproduction", 16)
    assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == shapes(shipped.config)


def test_decoding_and_logit_lens_divide_by_the_same_layer_norm():
    from actstore.ingest.models.equations import LN_EPS
    from actstore.sql.logit_lens import LAYER_NORM_EPS

    assert LN_EPS == LAYER_NORM_EPS
