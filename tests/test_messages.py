"""What a newcomer is told of a typical mistake, in one line: what was got, what there is, and what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from actstore.cli import main
from tests.stores import files

INGEST = "ingest STORE --model reproduction"
NEW = "ingest NEW --model reproduction"
TOKENS = ["read", "STORE", "select token_id from tokens"]
MISTAKES: list[tuple[str | list[str], int, tuple[str, ...]]] = [
    # commands and options
    ("ingset STORE", 2, ("'ingset'", "ingest", "actstore --help")),
    ("models lst", 2, ("'lst'", "list", "actstore models --help")),
    (f"{INGEST} --modle x", 2, ("--modle", "--model", "actstore ingest --help")),
    ("ingest", 2, ("STORE", "actstore ingest --help")),
    ("train reproduction", 2, ("OUT", "actstore train --help")),
    # models
    ("ingest NEW --model gpt2", 1, ("'gpt2'", "baseline, reproduction", "a folder", "actstore models add")),
    ("ingest NEW --model openai-community/gpt2", 1, ("gpt2", "baseline, reproduction", "actstore models add")),
    ("ingest NEW --model reproductoin", 1, ("'reproductoin'", "did you mean 'reproduction'", "there are baseline")),
    ("ingest NEW --model mine.pt", 2, ("mine.pt", "path of a file", "baseline, reproduction")),
    (f"{NEW} --config conf.yml", 2, ("conf.yml", "YAML files there: none", "--config")),
    (f"{NEW} --checkpoint 123", 1, ("checkpoint 123 of reproduction", "0, 250, 500", "--checkpoint")),
    (f"{NEW} --checkpoint last", 2, ("--checkpoint", "'last'", "integer", "actstore ingest --help")),
    (f"{NEW} --device gpu", 2, ("'gpu'", "cpu or cuda")),
    (f"{NEW} --device cuda", 2, ("'cuda'", "no CUDA device", "use cpu")),
    ("evaluate reproductoin", 1, ("'reproductoin'", "did you mean 'reproduction'", "there are baseline")),
    ("evaluate reproduction --checkpoint 3", 1, ("checkpoint 3 of reproduction", "0, 250", "--checkpoint")),
    ("models add mine mine.pt", 2, ("no checkpoint mine.pt", ".safetensors, .pt, .pth", "path of a file")),
    ("models add my/model SHIPPED", 2, ("'my/model'", "use letters, digits")),
    ("models add mine.pt SHIPPED", 2, ("'mine.pt'", "use letters, digits", "without .safetensors")),
    ("models add mine SHIPPED --system brinkmann", 2, ("'brinkmann'", "there are reproduction, baseline")),
    ("models add mine SHIPPED --system baseline", 2, ("reproduction.yaml", "'baseline'", "leave one out")),
    ("models add mine SHIPPED --config mine.yaml", 2, ("mine.yaml", "YAML files there: none", "--config")),
    ("ingest STORE --model-of reproductoin", 1, ("'reproductoin'", "did you mean 'reproduction'", "there are")),
    ("ingest STORE", 2, ("--model", "actstore models list", "--model-of")),
    # trees
    (f"{NEW} --trees 0", 2, ("got 0 trees", "1 or more", "--trees")),
    (f"{NEW} --trees -5", 2, ("got -5 trees", "1 or more", "--trees")),
    (f"{NEW} --trees 1e4", 2, ("--trees", "'1e4'", "integer", "actstore ingest --help")),
    (f"{NEW} --nodes 99", 2, ("got 99 nodes", "2 to 64", "--nodes")),
    (f"{NEW} --nodes 17", 2, ("17 nodes", "labels for 16", "--nodes 16 or less")),
    (f"{NEW} --seed -1", 2, ("got seed -1", "0 or more", "--seed")),
    (f"{NEW} --distribution shallow", 2, ("'shallow'", "reproduction, baseline, deep", "--distribution")),
    (f"{NEW} --distribution reproductoin", 2, ("'reproductoin'", "did you mean 'reproduction'", "--distribution")),
    (f"{NEW} --depths 3", 2, ("depths", "--distribution deep", "'reproduction' draws its own")),
    (f"{NEW} --distribution deep --depths 0", 2, ("depths [0]", "1 to 15", "--depths")),
    (f"{NEW} --distribution deep --depths 9-3", 2, ("--depths 9-3", "1-15", "3,5,7")),
    (f"{NEW} --distribution deep --depths 1-9-3", 2, ("--depths 1-9-3", "1-15", "3,5,7")),
    (f"{NEW} --distribution deep --depths 1-99999999999", 2, ("--depths 1-9999", "1-15", "3,5,7")),
    (f"{INGEST} --variant swap_last", 2, ("no set was named", "reproduction-16nodes-seed0-40", "--dataset")),
    (f"{INGEST} --variant swap_last --dataset tree", 2, ("'tree'", "reproduction-16nodes-seed0-40", "--dataset")),
    (
        f"{INGEST} --variant swap --dataset reproduction-16nodes-seed0-40",
        2,
        ("no variant 'swap'", "swap_last, swap_inner", "--variant"),
    ),
    # what is run, and stored
    (f"{NEW} --sites resid_pots", 2, ("'resid_pots'", "did you mean 'resid_post'", "resid_pre, resid_mid", "--sites")),
    (f"{NEW} --sites resid_post.9", 2, ("'resid_post.9'", "resid_post.0 to resid_post.5", "--sites")),
    (f"{NEW} --sites none,embed", 2, ("none,embed", "none stands alone")),
    (f"{NEW} --prompt forest", 2, ("'forest'", "there are task, tree")),
    (f"{NEW} --samples 3", 2, ("--samples", "--prompt tree")),
    (f"{NEW} --prompt tree --samples 300", 2, ("got 300 samples", "0 to 255", "--samples")),
    (f"{NEW} --batch-size 0", 2, ("batch size of 0", "1 sequence or more", "--batch-size")),
    (f"{NEW} --run my/run", 2, ("'my/run'", "--run", "letters, digits")),
    (f"{INGEST} --trees 41", 2, ("'reproduction'", "seed0-40", "seed0-41", "--run")),
    (f"{INGEST} --trees 40 --batch-size 5", 2, ("'reproduction'", "batch_size 8, not 5", "--run")),
    # places
    ("ingest FILE --model reproduction", 2, ("file exists and is no actstore store", "name a new folder")),
    ("ingest FILE/s.act --model reproduction", 2, ("file is no folder", "name another folder")),
    ("ingest . --model reproduction", 2, ("exists and is no actstore store", "name a new folder")),
    ("train reproduction FILE/out", 2, ("file/out", "is no folder", "name another place")),
    ("verify NEW", 1, ("does not exist", "actstore ingest")),
    ("repair NEW", 1, ("does not exist", "actstore ingest")),
    # training and grading
    ("train reproductoin OUT", 2, ("'reproductoin'", "did you mean 'reproduction'", "path of a YAML file")),
    ("train reproduction OUT --steps 0", 2, ("got steps 0", "1 or more")),
    ("train reproduction OUT --steps many", 2, ("--steps", "'many'", "actstore train --help")),
    ("train reproduction OUT --nodes 99", 2, ("99 nodes", "2 to 64", "--nodes")),
    ("train reproduction OUT --seed -1", 2, ("seed -1", "0 or more")),
    ("train reproduction OUT --seed 20000000", 2, ("seed 20000000", "take another", "--seed")),
    ("train reproduction OUT --device gpu", 2, ("'gpu'", "cpu or cuda")),
    ("train reproduction OUT --grade 0", 2, ("got 0 trees", "1 or more", "--grade")),
    ("evaluate reproduction --trees 0", 2, ("got 0 trees", "1 or more", "--trees")),
    ("evaluate reproduction --distribution depe", 2, ("'depe'", "did you mean 'deep'", "--distribution")),
    ("evaluate reproduction --nodes 17", 2, ("got 17 nodes", "16 or fewer", "--nodes")),
    ("evaluate reproduction --seed 42", 2, ("seed 42", "take another", "--seed")),
    # questions
    ("study STORE probs", 1, ("'probs'", "did you mean 'probes'", "there are probes, probe, depth")),
    ("study STORE depth --run reproductoin", 1, ("'reproductoin'", "holds reproduction")),
    ("study STORE depth -o rum 1", 2, ("'rum'", "takes no parameters")),
    ("query STORE acuracy_by_depth", 1, ("'acuracy_by_depth'", "did you mean 'accuracy_by_depth'", "there are")),
    ([*TOKENS, "--run", "reproductoin"], 1, ("'reproductoin'", "holds reproduction")),
    ([*TOKENS, "--site", "resid_post.9"], 1, ("'resid_post.9'", "resid_post.5")),
    ("show STORE 4711", 1, ("4711", "40 trees", "up to 39")),
]


def said(arguments: list[str], code: int) -> str:
    """The one line that a command refuses its arguments with."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stderr.startswith("actstore: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    MISTAKES,
    ids=[typed if isinstance(typed, str) else " ".join(typed) for typed, *_ in MISTAKES],
)
def test_a_mistake_is_told_with_what_was_got_what_there_is_and_what_to_do(
    demo_path, tmp_path, monkeypatch, typed, code, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("file").write_text("no store")
    shipped = Path(__file__).parents[1] / "data" / "checkpoints" / "reproduction.safetensors"
    places = {"STORE": demo_path, "NEW": "new.act", "OUT": "out", "FILE": "file", "SHIPPED": shipped}
    places |= {"FILE/out": "file/out", "FILE/s.act": "file/s.act"}
    before = files(demo_path)
    line = said([str(places.get(word, word)) for word in (typed.split() if isinstance(typed, str) else typed)], code)
    for word in words:
        assert word in line
    assert files(demo_path) == before
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("store", ["STORE", "new.act"])
def test_a_store_that_cannot_be_written_is_told_before_the_model_is_read(demo_path, tmp_path, monkeypatch, store):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr("actstore.ingest.jobs.chosen.load", lambda *_, **options: pytest.fail("the model was read"))
    place = str(demo_path if store == "STORE" else store)
    line = said(["ingest", place, "--model", "reproduction", "--trees", "40"], 2)
    assert "cannot be written" in line
    assert "name another folder" in line
