"""Models that are no path-finding system: loading, sites, forward passes, facts, and the last layer."""

import hashlib
import json
import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from actstore.arrays.families import in_order
from actstore.cli import main
from actstore.commits.format import unembedding_path
from actstore.errors import BadInput, Damaged, NotStored
from actstore.ingest.models.forward import forward
from actstore.ingest.models.general import from_kept
from actstore.ingest.models.load import again, load, task_of
from actstore.ingest.models.model import Model, from_bridge, tokenizer_hash
from actstore.ingest.models.sites import SiteSpec
from actstore.ingest.models.weights import canonical, stream
from actstore.sql.logit_lens import read_unembedding
from tests import tiny_models

ATTENTION_ONLY = (
    "transformer_lens: {n_layers: 2, d_model: 32, n_heads: 4, d_head: 8, n_ctx: 16, d_vocab: 50, attn_only: true}\n"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: getattr(tiny_models, name)(root / name) for name in ("llama", "gpt2", "bert", "gemma")}


@pytest.fixture(scope="module")
def models(folders) -> dict[str, Model]:
    return {name: load(str(folder)) for name, folder in folders.items()}


def run(model: Model, ids: torch.Tensor, names: list[str], lengths: list[int] | None = None) -> dict[str, torch.Tensor]:
    taken: dict[str, torch.Tensor] = {}

    def take(site: SiteSpec, activation: torch.Tensor) -> None:
        assert site.short not in taken
        taken[site.short] = activation.clone()

    logits = forward(model, ids, model.sites(names), take, lengths)
    return {**taken, "logits": logits}


def some_ids(model: Model, n_sequences: int, n_positions: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, model.d_vocab, (n_sequences, n_positions)))


# the forward pass


@pytest.mark.parametrize(("name", "kind"), [("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")])
def test_activations_are_those_of_transformers(name, kind, folders, models):
    import transformers

    theirs = getattr(transformers, kind).from_pretrained(folders[name], attn_implementation="eager").eval()
    ids = some_ids(models[name], 3, 11)
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True, output_attentions=True)
    ours = run(models[name], ids, ["resid_pre", "resid_post", "pattern"])
    pairs = {"logits": expected.logits, "resid_post.0": expected.hidden_states[1]}
    for layer in range(2):
        pairs |= {f"resid_pre.{layer}": expected.hidden_states[layer], f"pattern.{layer}": expected.attentions[layer]}
    for site, theirs_of_it in pairs.items():
        # a bridge multiplies GPT-2's queries, keys and values one by one, so that sums are rounded in another order
        torch.testing.assert_close(ours[site], theirs_of_it, rtol=0, atol=0 if name == "llama" else 2e-6, msg=site)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma"])
def test_padded_rows_are_those_of_an_unpadded_forward(name, models):
    model, lengths = models[name], [11, 5, 1]
    ids = some_ids(model, 3, 11)
    padded = run(model, ids, ["embed", "resid_post", "z", "pattern"], lengths)
    for i, length in enumerate(lengths):
        alone = run(model, ids[i : i + 1, :length], ["embed", "resid_post", "z", "pattern"])
        for site, expected in alone.items():
            got = padded[site][i, :, :length, :length] if site.startswith("pattern") else padded[site][i, :length]
            torch.testing.assert_close(got, expected[0], rtol=1e-4, atol=1e-5, msg=site)


def test_an_encoder_without_the_lengths_sees_its_padding(models):
    model = models["bert"]
    ids = some_ids(model, 1, 11)
    unmasked, alone = (run(model, tokens, ["resid_post.1"])["resid_post.1"] for tokens in (ids, ids[:, :5]))
    assert (unmasked[0, :5] - alone[0]).abs().max() > 1e-2


def test_a_site_of_another_shape_than_in_the_first_pass_is_refused(models):
    model = models["llama"]
    changed = replace(model.sites(["z.1"])[0], row_shape=(2, 8))
    with pytest.raises(BadInput, match=r"gave \[1, 4, 4, 8\], and its first forward pass makes it \[1, 4, 2, 8\]"):
        forward(model, some_ids(model, 1, 4), [changed], lambda site, activation: None)


# sites


def test_any_hook_is_a_site_with_its_axes(models):
    model = models["llama"]
    names = [
        "pattern.1",
        "k.0",
        "blocks.1.mlp.hook_out",
        "post.0",
        "attn_out",
        "hook_unembed",
        "blocks.0.ln1.hook_scale",
    ]
    assert [(s.short, s.kind, s.axes, s.row_shape) for s in model.sites(names)] == [
        ("blocks.0.ln1.hook_scale", "vector", ("width",), (1,)),
        ("k.0", "heads", ("head", "d_head"), (2, 8)),
        ("attn_out.0", "vector", ("d_model",), (32,)),
        ("post.0", "vector", ("d_mlp",), (48,)),
        ("pattern.1", "pattern", ("head", "key"), (4,)),
        ("attn_out.1", "vector", ("d_model",), (32,)),
        ("blocks.1.mlp.hook_out", "vector", ("d_model",), (32,)),
        ("hook_unembed", "vector", ("d_vocab",), (model.d_vocab,)),
    ]
    assert [site.short for site in model.sites(None)] == ["embed", "resid_post.0", "resid_post.1"]
    assert model.sites(["pattern.1"])[0].row(9) == (4, 9)


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("resid_posd.0", r"no site 'resid_posd.0' \(did you mean 'resid_post.0'\?\)"),
        ("blocks.0.mlp.hook_oot", "did you mean 'blocks.0.mlp.hook_out'"),
        ("resid_post.2", "no site 'resid_post.2'"),
        ("rotary_emb.hook_cos", r"gives \[1, 3, 8\], and a site has a row per token, \[2, 3, …\]"),
        ("embed.hook_in", "gives int64"),
        ("blocks.0.attn.hook_result", "switched off .*use_attn_result"),
        ("blocks.0.attn.hook_hidden_states", "does not fire"),
    ],
)
def test_a_hook_that_cannot_be_stored_is_refused_with_its_reason(site, said, models):
    with pytest.raises(BadInput, match=said) as refused:
        models["llama"].sites([site])
    assert "\n" not in str(refused.value)


def test_a_path_finding_system_stores_any_hook_too(shipped):
    assert [site.short for site in shipped.sites(["z.5", "embed"])] == ["embed", "z.5"]
    assert shipped.sites(["mlp_out.0"])[0].row_shape == (128,)
    with pytest.raises(BadInput, match="of 6 layers there are embed"):
        shipped.sites(["resid_posd"])


def test_the_command_lists_each_hook_once(folders):
    done = CliRunner().invoke(main, ["models", "sites", str(folders["llama"]), "--json"], catch_exceptions=False)
    rows = pl.DataFrame(json.loads(done.stdout))
    of_pattern = rows.row(by_predicate=pl.col("short") == "pattern.0", named=True)
    assert (of_pattern["site"], of_pattern["axes"], of_pattern["shape"]) == (
        "blocks.0.attn.hook_pattern",
        ["head", "key"],
        [4],
    )
    assert rows.row(by_predicate=pl.col("short") == "z.1", named=True)["same_as"] == ["blocks.1.attn.o.hook_in"]
    names = rows["site"].to_list() + rows["same_as"].explode().drop_nulls().to_list()
    assert len(names) == len(set(names))


def test_a_table_names_a_hook_of_every_layer_once(folders):
    done = CliRunner().invoke(main, ["models", "sites", str(folders["llama"])], catch_exceptions=False)
    rows = [line.split() for line in done.stdout.splitlines()]
    n_layers = len({name for row in rows for name in row if name == "resid_post.L"})
    assert n_layers == 1
    (row,) = [row for row in rows if row[0] == "resid_post.L"]
    assert row[1:4] == ["0-1", "resid", "d_model"]
    assert next(row for row in rows if row[0] == "embed")[:3] == ["embed", "resid", "d_model"]


# what is written down


@pytest.mark.parametrize(("name", "without"), [("llama", ""), ("gemma", ""), ("gpt2", "attn_scores")])
def test_sites_are_in_the_order_in_which_hooks_fire(name, without, models):
    """GPT-2's bridge fires scores after z, and positions before embeddings."""
    sites = [
        site for site in models[name].hooks.sites.values() if site.short.partition(".")[0] not in (without, "pos_embed")
    ]
    fired = {site.name: site.short for site in sites if site.short != site.name}
    stored = dict(sorted(fired.items(), key=lambda item: hash(item[0][::-1])))
    assert in_order(stored) == list(fired.values())


def test_the_row_says_what_was_loaded(folders, models):
    model, row = models["llama"], models["llama"].row()
    facts = json.loads(row["facts"])
    assert (row["architecture"], row["normalization"], row["n_layers"], row["d_vocab"], row["n_ctx"]) == (
        *("LlamaForCausalLM", "RMS", 2),
        *(model.d_vocab, 64),
    )
    assert row["system"] is row["n_nodes"] is row["vocabulary"] is None
    assert row["weights_kept"] is False
    assert row["tokenizer"] == tokenizer_hash(model.tokenizer)
    expected = {"dtype": "float32", "attention": "eager", "padding": "right", "mask": True, "compatibility_mode": False}
    assert {key: facts[key] for key in expected} == expected
    for file in facts["files"]:
        content = (folders["llama"] / file["file"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file["file"] for file in facts["files"]}
    assert str(folders["llama"]) not in row["config"]


def test_the_hash_of_a_tokenizer_does_not_change_with_use(models):
    before = tokenizer_hash(models["llama"].tokenizer)
    models["llama"].tokenizer.pad_token = "<eos>"
    models["llama"].tokenizer(["the cat", "the"], padding=True, truncation=True, max_length=3)
    assert tokenizer_hash(models["llama"].tokenizer) == before


def test_the_row_of_a_path_finding_system_is_what_it_was(shipped):
    row = shipped.row()
    assert list(row) == [
        *("weights_sha256", "model", "system", "n_nodes", "n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx"),
        *("d_vocab", "n_params", "vocabulary", "config", "source"),
    ]
    assert json.loads(row["config"]) == shipped.config.to_mapping()
    assert (row["model"], row["system"], row["n_nodes"], row["n_params"]) == (
        "reproduction",
        "reproduction",
        16,
        1_207_808,
    )
    assert (shipped.task, shipped.unembedding, shipped.tokenizer_sha256) == ("trees", b"", None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_kept_weights_are_hashed_and_make_the_model_again(name, folders):
    model = load(str(folders[name]), keep_weights=True)
    assert hashlib.sha256(model.weights).hexdigest() == model.weights_sha256 == load(str(folders[name])).weights_sha256
    kept = from_kept(model.row(), model.weights)
    assert kept.row() == {**model.row(), "tokenizer": None}
    ids = some_ids(model, 2, 7)
    assert all(torch.equal(*pair) for pair in zip(*(run(m, ids, ["z"]).values() for m in (model, kept)), strict=True))


def test_a_referenced_model_is_found_again_if_it_has_the_same_weights(tmp_path):
    folder = tiny_models.llama(tmp_path / "mine")
    model = load(str(folder))
    assert again(model.row()).weights_sha256 == model.weights_sha256
    tiny_models.llama(folder, seed=1)
    with pytest.raises(NotStored, match="other weights than the run's"):
        again(model.row())
    shutil.rmtree(folder)
    with pytest.raises(NotStored, match="not where they were"):
        again(model.row())
    with pytest.raises(NotStored, match="given as a bridge"):
        again(from_bridge(model.bridge, "mine").row())


def test_a_bridge_is_run_as_it_is(models):
    bridge = models["gpt2"].bridge
    model = from_bridge(bridge, "mine", models["gpt2"].tokenizer)
    assert (model.name, model.weights_sha256, model.task) == ("mine", models["gpt2"].weights_sha256, "tokens")
    assert json.loads(model.row()["facts"])["how"] == "bridge"


def test_random_weights_come_from_the_seed(folders):
    state = torch.get_rng_state()
    first, again_, other = (load(str(folders["llama"]), untrained=seed) for seed in (0, 0, 7))
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.name, other.name) == ("llama-untrained", "llama-untrained7")
    assert first.weights_sha256 == again_.weights_sha256 != other.weights_sha256
    assert load("reproduction", untrained=1).weights_sha256 != load("reproduction", untrained=2).weights_sha256


def test_the_streamed_bytes_are_those_of_the_file():
    made = {
        dtype: torch.ones(3, 2).to(getattr(torch, dtype))
        for dtype in ("float32", "bfloat16", "float64", "int64", "bool")
    }
    made |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3), "é": torch.arange(12.0).reshape(3, 4).T}
    assert b"".join(stream(made)) == canonical(made)


# native models


def test_a_native_model_without_an_mlp(tmp_path):
    (tmp_path / "ao.yaml").write_text(ATTENTION_ONLY)
    model = load(str(tmp_path / "ao.yaml"), untrained=1, keep_weights=True)
    assert model.config.d_mlp is None
    assert [site.short for site in model.sites(["attn_out", "z.0"])] == ["z.0", "attn_out.0", "attn_out.1"]
    with pytest.raises(BadInput, match="no site 'mlp_out'"):
        model.sites(["mlp_out"])
    (tmp_path / "ao.safetensors").write_bytes(model.weights)
    read = load(str(tmp_path / "ao.safetensors"))
    assert (read.name, read.weights_sha256) == ("ao", model.weights_sha256)
    assert from_kept(model.row(), model.weights).weights_sha256 == model.weights_sha256
    ids = some_ids(model, 2, 9)
    padded, alone = run(model, ids, ["resid_post.1"], [9, 4]), run(model, ids[1:, :4], ["resid_post.1"])
    torch.testing.assert_close(padded["resid_post.1"][1, :4], alone["resid_post.1"][0])


def test_a_hooked_transformers_names_are_read(tmp_path):
    (tmp_path / "ao.yaml").write_text(ATTENTION_ONLY)
    model = load(str(tmp_path / "ao.yaml"), untrained=1)
    held = model.bridge.state_dict()
    named = {"embed.W_E": held["embed.weight"], "pos_embed.W_pos": held["pos_embed.weight"]}
    named |= {"ln_final.w": held["ln_final.weight"], "ln_final.b": held["ln_final.bias"]}
    named |= {"unembed.W_U": held["unembed.weight"].T, "unembed.b_U": held["unembed.bias"]}
    for layer in range(2):
        named |= {
            f"blocks.{layer}.ln1.{new}": held[f"blocks.{layer}.ln1.{old}"]
            for new, old in (("w", "weight"), ("b", "bias"))
        }
        for part in "QKV":
            of_part = f"blocks.{layer}.attn.{part.lower()}"
            named[f"blocks.{layer}.attn.W_{part}"] = held[f"{of_part}.weight"].reshape(4, 8, 32).transpose(1, 2)
            named[f"blocks.{layer}.attn.b_{part}"] = held[f"{of_part}.bias"].reshape(4, 8)
        named[f"blocks.{layer}.attn.W_O"] = held[f"blocks.{layer}.attn.o.weight"].T.reshape(4, 8, 32)
        named[f"blocks.{layer}.attn.b_O"] = held[f"blocks.{layer}.attn.o.bias"]
    torch.save({key: tensor.clone() for key, tensor in named.items()}, tmp_path / "ao.pt")
    assert load(str(tmp_path / "ao.pt")).weights_sha256 == model.weights_sha256


# the last layer


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_the_last_layer_of_either_norm_is_the_models(name, models, tmp_path):
    model = models[name]
    store = SimpleNamespace(path=tmp_path)
    path = tmp_path / unembedding_path(model.weights_sha256)
    path.parent.mkdir()
    path.write_bytes(model.unembedding)
    ids = some_ids(model, 2, 7)
    got = run(model, ids, ["resid_post.1"])
    logits = read_unembedding(store, model.weights_sha256).logits(got["resid_post.1"].flatten(0, 1).numpy())
    np.testing.assert_allclose(logits, got["logits"].flatten(0, 1), rtol=1e-4, atol=1e-5)
    damaged = bytearray(model.unembedding)
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(Damaged, match="its sha256 is another"):
        read_unembedding(store, model.weights_sha256)


def test_a_model_of_another_last_layer_has_no_file_of_it(tmp_path, models):
    assert models["bert"].unembedding == b""
    headless = load(str(tiny_models.bert(tmp_path / "headless", "BertModel")))
    assert (headless.unembedding, headless.predicts, models["bert"].predicts, models["llama"].predicts) == (
        b"",
        False,
        False,
        True,
    )
    store = SimpleNamespace(path=tmp_path, sql=lambda query, params: pl.DataFrame({"architecture": ["BertModel"]}))
    with pytest.raises(NotStored, match="holds no last layer"):
        read_unembedding(store, headless.weights_sha256)


# bad input


def test_nothing_is_fetched_from_the_network(folders, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a connection was tried"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    load(str(folders["llama"]))
    assert "HF_HUB_OFFLINE" not in os.environ


def no_model(tmp_path: Path, folders: dict[str, Path]) -> str:
    return str(tmp_path)


def no_weights(tmp_path: Path, folders: dict[str, Path]) -> str:
    shutil.copy(folders["llama"] / "config.json", tmp_path)
    return str(tmp_path)


def a_pickle(tmp_path: Path, folders: dict[str, Path]) -> str:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    return no_weights(tmp_path, folders)


def changed(tmp_path: Path, folders: dict[str, Path], **keys: object) -> str:
    shutil.copytree(folders["llama"], tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return str(tmp_path / "changed")


def unknown_architecture(tmp_path: Path, folders: dict[str, Path]) -> str:
    return changed(tmp_path, folders, architectures=["MyOwnModel"], model_type="xglm")


def no_such_type(tmp_path: Path, folders: dict[str, Path]) -> str:
    return changed(tmp_path, folders, model_type="nothing")


def lacking_weights(tmp_path: Path, folders: dict[str, Path]) -> str:
    return changed(tmp_path, folders, num_hidden_layers=3)


def other_sizes(tmp_path: Path, folders: dict[str, Path]) -> str:
    return changed(tmp_path, folders, intermediate_size=40)


def own_code(tmp_path: Path, folders: dict[str, Path]) -> str:
    return changed(tmp_path, folders, model_type="mine", auto_map={"AutoConfig": "configuration.Mine"})


def cut_short(tmp_path: Path, folders: dict[str, Path]) -> str:
    folder = Path(changed(tmp_path, folders))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    return str(folder)


def of_complex_numbers(tmp_path: Path, folders: dict[str, Path]) -> str:
    """As published, with an imaginary part that transformers leaves out."""
    folder = Path(changed(tmp_path, folders))
    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"] + 1j
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def another_vocabulary(tmp_path: Path, folders: dict[str, Path]) -> str:
    folder = tiny_models.llama(tmp_path / "small", vocab_size=100)
    return str(folder)


def two_sequences(tmp_path: Path, folders: dict[str, Path]) -> str:
    from transformers import T5Config

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return str(tiny_models.save(T5Config(vocab_size=50, **sizes), "T5ForConditionalGeneration", tmp_path / "t5"))


def a_configuration(tmp_path: Path, folders: dict[str, Path]) -> str:
    (tmp_path / "ao.yaml").write_text(ATTENTION_ONLY)
    return str(tmp_path / "ao.yaml")


def no_gguf(tmp_path: Path, folders: dict[str, Path]) -> str:
    return str(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (no_model, r"is no model: it holds no config\.json and no \*\.gguf"),
        (no_weights, r"is no model: it holds no \*\.safetensors"),
        (a_pickle, "a pickle, which can run code; save them as safetensors"),
        (unknown_architecture, "is of architecture MyOwnModel, which TransformerLens does not know"),
        (no_such_type, "is no model that transformers reads"),
        (own_code, "is no model that transformers reads"),
        (lacking_weights, "lacks 9 weights that its configuration needs, the first 'model.layers.2"),
        (other_sizes, "cannot be loaded"),
        (cut_short, "cannot be loaded"),
        (of_complex_numbers, r"1 weights of complex numbers, the first 'model.norm.weight' in model.safetensors"),
        (another_vocabulary, r"the tokenizer has token ids up to \d+, and small knows 100"),
        (two_sequences, "reads two sequences"),
        (a_configuration, "is a configuration; give the weights"),
        (no_gguf, "no file .*none.gguf"),
    ],
)
def test_what_is_no_model_is_refused_on_one_line(made, said, tmp_path, folders):
    with pytest.raises(BadInput, match=said) as refused:
        load(made(tmp_path, folders))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("transformer_lens: {n_layers: 2}", "transformer_lens.d_model is None"),
        (
            ATTENTION_ONLY.replace("attn_only", "attn_onl"),
            r"unknown key 'transformer_lens.attn_onl' \(did you mean 'attn_only'\?\)",
        ),
        (ATTENTION_ONLY + "seed: 3", "unknown key 'seed'"),
        (ATTENTION_ONLY.replace("attn_only: true", "act_fn: nothing"), "builds no such model"),
        ("transformer_lens: 3", "'transformer_lens' is int"),
        (ATTENTION_ONLY + "tokenizer: none", "holds no tokenizer"),
    ],
)
def test_a_native_configuration_is_checked(line, said, tmp_path):
    (tmp_path / "bad.yaml").write_text(line)
    with pytest.raises(BadInput, match=said):
        load(str(tmp_path / "bad.yaml"), untrained=0)


def test_a_checkpoint_that_does_not_fit_a_native_configuration_is_refused(tmp_path):
    (tmp_path / "ao.yaml").write_text(ATTENTION_ONLY)
    held = load(str(tmp_path / "ao.yaml"), untrained=1).bridge.state_dict()
    for change, said in (
        ({"ln_final.weight": None}, "weight 'ln_final.weight' is missing"),
        ({"more": torch.ones(1)}, "unknown weight 'more'"),
        ({"ln_final.weight": torch.ones(3)}, r"has the shape \[3\]"),
        ({"ln_final.weight": torch.full((32,), torch.nan)}, "NaN or infinite"),
    ):
        made = {key: tensor for key, tensor in {**held, **change}.items() if tensor is not None}
        (tmp_path / "ao.safetensors").write_bytes(canonical(made))
        with pytest.raises(BadInput, match=said):
            load(str(tmp_path / "ao.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"model": "reproduction", "revision": "main"}, BadInput, "add --hub"),
        ({"model": "reproduction", "tokenizer": "x"}, BadInput, "has its own vocabulary"),
        ({"model": "llama", "checkpoint": 3}, BadInput, "a step of a path-finding system's training"),
        ({"model": "llama", "config": "x.yaml"}, BadInput, "brings its own configuration"),
        ({"model": "someone/model"}, NotStored, r"a folder, a .gguf file, or a name of the hub \(--hub\)"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, error, said, folders):
    model = arguments.pop("model")
    with pytest.raises(error, match=said):
        load(str(folders.get(model, model)), **arguments)


def test_a_hub_that_cannot_be_reached_is_said_on_one_line(monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(NotStored, match="the hub gives no model 'no-one/nothing' at revision v1") as refused:
        load("no-one/nothing", hub=True, revision="v1")
    assert "\n" not in str(refused.value)


def test_a_hubs_model_is_loaded_from_where_it_was_fetched(folders, monkeypatch, tmp_path):
    import huggingface_hub

    commit = shutil.copytree(folders["llama"], tmp_path / "0123abcd")
    asked = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any(re.search(r"\.(bin|pt|py)$", pattern) for pattern in allow_patterns)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = load("someone/tiny", hub=True, revision="v1")
    assert (model.name, model.facts["how"], model.facts["asked"]["revision"]) == ("tiny", "hub", "0123abcd")
    assert again(model.row()).weights_sha256 == model.weights_sha256
    assert asked == [("someone/tiny", "v1"), ("someone/tiny", "0123abcd")]


def test_what_a_name_means_is_known_without_loading(folders, tmp_path):
    (tmp_path / "ao.yaml").write_text(ATTENTION_ONLY)
    assert [task_of(m) for m in ("reproduction", str(folders["llama"]), str(tmp_path / "ao.yaml"), "x.gguf")] == [
        *("trees", "tokens"),
        *("tokens", "tokens"),
    ]
    assert task_of("someone/model", hub=True) == "tokens"
