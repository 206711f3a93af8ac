"""Runs over text: what is stored is what transformers computes of each sequence alone, and it is kept as trees are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner

import actstore
from actstore.arrays.pack import ShardBuffer
from actstore.cli import main
from actstore.errors import BadInput
from actstore.ingest.answers.next_token import Asked
from actstore.ingest.answers.passes import passes
from actstore.ingest.corpus import corpus as corpora
from actstore.ingest.corpus.corpus import Corpus, from_text, from_tokens
from actstore.ingest.corpus.tokens import Vocabulary
from actstore.ingest.jobs.job import Ingest, default_batch_size
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.prepare import prepare
from actstore.ingest.models.load import load
from actstore.ingest.models.model import Model
from actstore.ingest.replay import compare
from actstore.ingest.trees.task import TreeSet
from actstore.store import Store
from actstore.upkeep.verify import verify
from tests import tiny_models
from tests.stores import files
from tests.test_pipeline import small_model

WORDS = tiny_models.WORDS.split()
SITES = ["embed", "resid_pre.0", "resid_post", "pattern.1", "z.0"]
SMALL = 512  # ids per batch: a few sequences, so that a run has several batches
CONTEXT = 40


def texts(n: int = 60) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) + "é" * (i % 3) for i in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model's folder, and the documents that it reads, as a user has them."""
    root = tmp_path_factory.mktemp("text")
    tiny_models.llama(root / "tiny")
    rows = [{"text": text, "year": 1900 + i} for i, text in enumerate(texts())]
    (root / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load(str(folder / "tiny"))


def vocabulary(model: Model) -> Vocabulary:
    return Vocabulary(model.tokenizer, model.tokenizer_sha256, model.d_vocab)


def small_corpus(model: Model, documents, name: str = "notes", context: int = CONTEXT) -> Corpus:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "IDS_PER_BATCH", SMALL)
        return from_text(documents, vocabulary(model), n_ctx=model.n_ctx, context=context, name=name)


def job(root: Path, model: Model, folder: Path, **more) -> Ingest:
    """The run of these tests; not executed."""
    options = {"sites": SITES, "batch_size": 5, "asked": Asked(3), **more}
    return Ingest(root, model, small_corpus(model, str(folder / "notes.jsonl")), **options)


@pytest.fixture(scope="module")
def root(folder, model, tmp_path_factory) -> Path:
    """Trees and text in one store; not to be changed."""
    root = tmp_path_factory.mktemp("stored") / "s.act"
    execute(Ingest(root, small_model(), TreeSet("reproduction", 10, n_nodes=6, name="few", trees_per_shard=4)))
    execute(job(root, model, folder))
    return root


@pytest.fixture
def copy(root, tmp_path) -> Path:
    shutil.copytree(root, tmp_path / "s.act")
    return tmp_path / "s.act"


@pytest.fixture(scope="module")
def expected(folder, root) -> dict[str, torch.Tensor]:
    """What transformers gives each sequence, alone and without padding, token after token in the order of token_id."""
    import transformers

    theirs = transformers.LlamaForCausalLM.from_pretrained(folder / "tiny", attn_implementation="eager").eval()
    found: dict[str, list[torch.Tensor]] = {}
    with Store(root) as store:
        longest = store.sql("select n_positions from datasets where dataset = 'notes'").item()
        sequences = store.sql(
            "select sequence_id, list(number order by token_id) as numbers from tokens where dataset = 'notes' group by 1 "
            "order by 1"
        )["numbers"].to_list()
    for numbers in sequences:
        with torch.no_grad():
            of_one = theirs(torch.tensor([numbers]), output_hidden_states=True, output_attentions=True)
        pattern = torch.full((len(numbers), 4, longest), torch.nan)
        pattern[:, :, : len(numbers)] = of_one.attentions[1][0].movedim(0, 1)
        about = {
            **{"embed": of_one.hidden_states[0][0], "resid_pre.0": of_one.hidden_states[0][0]},
            **{"resid_post.0": of_one.hidden_states[1][0], "pattern.1": pattern},
            **{"logits": of_one.logits[0, :-1], "target": torch.tensor(numbers[1:], dtype=torch.long)},
        }
        for name, values in about.items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in found.items()}


def committed(root: Path) -> dict[str, bytes]:
    return {
        name: content for name, content in files(root).items() if not name.startswith((".lock", "catalog", "store."))
    }


def run(*words: object) -> object:
    return CliRunner().invoke(main, [str(word) for word in words])


# what is stored


@pytest.mark.parametrize("site", ["embed", "resid_pre.0", "resid_post.0", "pattern.1"])
def test_stored_rows_are_those_of_each_sequence_alone(site, root, expected):
    with Store(root) as store:
        X, _ = store.read("select token_id from tokens where dataset = 'notes' order by token_id", "tiny", site)
        assert store.sql("select count(*) from shards where run = 'tiny' and site = 'hook_embed'").item() > 2
    torch.testing.assert_close(torch.from_numpy(X), expected[site], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_predictions_are_graded_as_the_logits_say(root, expected, model):
    logits, target = expected["logits"], expected["target"]
    with Store(root) as store:
        held = store.sql("from predictions where run = 'tiny' order by token_id")
        tokens = store.sql("from tokens where dataset = 'notes' order by token_id")
    last = tokens["sequence_id"] != tokens["sequence_id"].shift(-1)
    assert held["token_id"].equals(tokens.filter(~last.fill_null(True))["token_id"])
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    np.testing.assert_allclose(held["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(held["p_target"], torch.softmax(logits, 1).gather(1, target[:, None])[:, 0], rtol=1e-4)
    spelled = model.tokenizer.convert_ids_to_tokens
    assert held["predicted"].cast(pl.String).to_list() == spelled(logits.argmax(1).tolist())
    assert held["target"].cast(pl.String).to_list() == spelled(target.tolist())
    assert held["correct"].to_list() == (logits.argmax(1) == target).tolist()
    assert held["rank"].to_list() == (logits > logits.gather(1, target[:, None])).sum(1).tolist()
    assert held["top"].to_list() == [spelled(row) for row in logits.topk(3).indices.tolist()]


def test_every_way_of_reading_gives_the_same_rows(root):
    query = "select token_id, year from tokens join notes using (sequence_id) where year < 1930 order by hash(token_id)"
    with Store(root) as store:
        X, rows = store.read(query, "tiny", "z.0")
        assert X.shape == (len(rows), 4, 8)
        assert rows["year"].max() == 1929
        flat, rows = store.read(query, "tiny", "resid_post.1")
        by_id = dict(zip(rows["token_id"].to_list(), flat, strict=True))
        batches = store.batches(query, "tiny", "resid_post.1", batch_size=64)
        read = {
            id: x for Xb, columns in batches for id, x in zip(columns["token_id"].tolist(), Xb.numpy(), strict=True)
        }
        lazy = store.scan("tiny", "resid_post.1").filter(pl.col("year") < 1930).select("token_id", "x").collect()
        scanned = dict(zip(lazy["token_id"].to_list(), lazy["x"].to_numpy(), strict=True))
        sql = store.sql(f"select token_id, act(token_id, 'tiny', 'resid_post.1') as x from ({query})")
        acted = dict(zip(sql["token_id"].to_list(), sql["x"].to_list(), strict=True))
    for other in (read, scanned, acted):
        assert other.keys() == by_id.keys()
        assert all(np.array_equal(other[id], by_id[id]) for id in by_id)


def test_sequences_of_one_length_lie_in_a_grid_with_the_same_rows(tmp_path, model):
    numbers = np.random.default_rng(0).integers(0, model.d_vocab, (9, 7)).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "IDS_PER_BATCH", 28)
        grid = from_tokens(numbers, vocabulary(model), n_ctx=64, name="grid")
    ragged = from_tokens([*numbers, [1]], vocabulary(model), n_ctx=64, name="ragged")
    assert (grid.row()["layout"], ragged.row()["layout"], grid.n_batches) == ("grid", "rows", 3)
    for made in (grid, ragged):
        execute(Ingest(tmp_path / "s.act", model, made, made.name, sites=SITES))
    with Store(tmp_path / "s.act") as store:
        ids = "select token_id from tokens where dataset = $d and sequence_id - (select min(sequence_id) from tokens "
        ids += "where dataset = $d) < 9 order by token_id"
        for site in store.sites("grid"):
            ours, theirs = (store.read(ids, d, site, {"d": d})[0] for d in ("grid", "ragged"))
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        losses = store.sql("select run, sum(loss) as loss from predictions group by 1 order by 1")["loss"]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(of.agrees for of in compare.compare(tmp_path / "s.act", 4))


def test_padding_costs_no_byte(tmp_path, model):
    rng = np.random.default_rng(1)
    lengths = [*rng.integers(1, 64, 640)]
    tokens = [rng.integers(0, model.d_vocab, n).tolist() for n in lengths]
    made = from_tokens(tokens, vocabulary(model), n_ctx=64, name="many")
    assert made.n_tokens > 20_000
    job = Ingest(tmp_path / "s.act", model, made, sites=["resid_post.1"], asked=None)
    execute(job)
    with Store(tmp_path / "s.act") as store:
        stored = store.sql("select sum(bytes) from shards").item()
        assert stored <= 1.02 * made.n_tokens * 32 * 4
        assert store.sql("select count(*) from predictions").item() == 0
    on_disk = sum(len(content) for content in files(tmp_path / "s.act").values())
    assert 0.3 * on_disk < job.bytes_of(job.n_batches) - 4_000_000 < on_disk


def test_tree_queries_are_those_of_a_store_of_trees_alone(root, tmp_path):
    alone = tmp_path / "alone.act"
    execute(Ingest(alone, small_model(), TreeSet("reproduction", 10, n_nodes=6, name="few", trees_per_shard=4)))
    with Store(alone) as one, Store(root) as both:
        for query in (
            *("from trees order by all", "from edge_targets order by all", "from answer_tokens order by all"),
            *("from edges order by all", "from outcomes order by all"),
            "select * exclude (token) , token::varchar as t from tokens where tree_id is not null order by token_id",
            "select token_id, step, p_target, correct from predictions where run = 'small' order by all",
        ):
            assert one.sql(query).equals(both.sql(query)), query
        asked = "select token_id, source from edge_targets order by token_id"
        ours, theirs = (store.read(asked, run="small", site="resid_post.1") for store in (one, both))
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1].equals(theirs[1])


# stopped, damaged, checked

COMMAND = """
import sys
from pathlib import Path
from tests.test_text import execute, job, load
folder = Path(sys.argv[1])
model = load(str(folder / "tiny"))
print("ready", flush=True)
execute(job(Path(sys.argv[2]), model, folder))
"""


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(folder, model, tmp_path):
    store = tmp_path / "cut.act"
    command = [sys.executable, "-c", COMMAND, str(folder), str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process, ExitStack() as end:
        end.callback(process.kill)
        process.stdout.readline()
        while not (store / "log" / "00000002.json").exists():
            assert process.poll() is None
            time.sleep(0.002)
    again = job(store, model, folder)
    assert 0 < len(again.left()) < again.n_batches, "it was done before the blow: nothing was tested"
    assert "batches are there" in again.announcement()
    assert "go" in again.kept()
    execute(again)
    execute(job(tmp_path / "whole.act", model, folder))
    assert committed(store) == committed(tmp_path / "whole.act")


def test_a_ctrl_c_keeps_the_batches_that_are_done(folder, model, tmp_path):
    def stop(done: int, total: int) -> None:
        if done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job(tmp_path / "s.act", model, folder), stop)
    left = job(tmp_path / "s.act", model, folder).left()
    assert left
    assert left[0] > 0
    with pytest.raises(BadInput, match="stored with answers next, top 3, not next"):
        execute(job(tmp_path / "s.act", model, folder, asked=Asked()))


def test_what_the_model_computes_again_agrees(root):
    assert verify(root).findings == []
    found = compare.compare(root, 7)
    assert all(of.agrees and not of.cannot for of in found)
    assert {of.what for of in found if of.run == "tiny"} == {
        *("listed_sequences", "tokens", "embed", "resid_pre.0", "resid_post.0", "resid_post.1", "pattern.1", "z.0"),
        "predictions",
    }


def test_shuffled_rows_and_other_predictions_are_caught(folder, model, tmp_path, monkeypatch):
    from actstore.ingest.answers import next_token

    seal, rows = ShardBuffer.seal, next_token.Grades.rows

    def shuffled(self, lengths):
        if len(self.rows.shape) == 3:
            self.rows[:8] = self.rows[:8][::-1].copy()
        return seal(self, lengths)

    def shifted(self, *args):
        return rows(self, *args).with_columns(pl.col("p_target").shift(1, fill_value=0.5))

    monkeypatch.setattr(ShardBuffer, "seal", shuffled)
    monkeypatch.setattr(next_token.Grades, "rows", shifted)
    execute(job(tmp_path / "s.act", model, folder))
    monkeypatch.undo()
    assert verify(tmp_path / "s.act").findings == []
    apart = {of.what for of in compare.compare(tmp_path / "s.act", 30) if not of.agrees}
    assert {"embed", "resid_post.1", "predictions"} <= apart
    assert "tokens" not in apart


def test_damaged_files_are_made_again_byte_for_byte(copy):
    before = committed(copy)
    lost = [
        *("activations.zarr/tiny/hook_embed/c/1/0", "activations.zarr/tiny/blocks.1.attn.hook_pattern/c/0/0/0"),
        *("parts/predictions/tiny-000001.parquet", "activations.zarr/tiny/blocks.0.attn.hook_z/zarr.json"),
    ]
    lost += [name for name in before if name.endswith("unembed.safetensors")]
    for name in lost:
        (copy / name).unlink()
    (copy / "catalog.duckdb").unlink()
    done = actstore.repair(copy)
    assert (set(lost) <= set(done.mended), done.left) == (True, [])
    assert committed(copy) == before


def test_a_model_that_is_gone_is_said_to_be(folder, copy, tmp_path, monkeypatch):
    lost = "activations.zarr/tiny/hook_embed/c/1/0"
    (folder / "tiny").rename(tmp_path / "moved")
    try:
        found = compare.compare(copy, 3)
        (copy / lost).unlink()
        done = actstore.repair(copy)
    finally:
        (tmp_path / "moved").rename(folder / "tiny")
    (of_text,) = [of for of in found if of.run == "tiny"]
    assert of_text.what == "model"
    assert "not where they were" in of_text.cannot
    assert all(of.agrees for of in found)
    (left,) = done.left
    assert left.path == lost
    assert "could not be computed again" in left.what
    assert "not where they were" in left.what
    assert actstore.repair(copy).mended == [lost]


def test_kept_weights_need_no_folder(folder, tmp_path):
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    root = tmp_path / "s.act"
    notes = pl.read_ndjson(folder / "notes.jsonl").head(5)
    actstore.ingest(root, tmp_path / "tiny", text=notes, sites="resid_post", keep_weights=True, dataset="d")
    shutil.rmtree(tmp_path / "tiny")
    assert all(of.agrees and not of.cannot for of in compare.compare(root, 3))
    actstore.ingest(root, model_of="tiny", dataset="d", run="again", sites="resid_post")
    with pytest.raises(BadInput, match="--tokenizer"):
        actstore.ingest(root, model_of="tiny", text=["the cat"], dataset="more", run="more")
    actstore.ingest(root, model_of="tiny", text=["the cat"], dataset="more", run="more", tokenizer=folder / "tiny")
    with Store(root) as store:
        assert store.model("tiny").cfg.d_model == 32
        one, two = (store.read("select token_id from tokens", name, "resid_post.1")[0] for name in ("tiny", "again"))
    np.testing.assert_array_equal(one, two)


# what may be asked for


def test_the_command_stores_a_file_and_a_second_model_reads_its_tokens(folder, tmp_path):
    root = tmp_path / "s.act"
    first = run("ingest", root, "--model", folder / "tiny", "--text", folder / "notes.jsonl", "--sites", "embed,z.1")
    assert first.exit_code == 0, first.output
    assert "60 sequences" in first.stdout
    assert "tokens, 2 sites" in first.stdout
    other = tiny_models.llama(tmp_path / "other", seed=4)
    second = run("ingest", root, "--model", other, "--dataset", "notes", "--run", "two", "--answers", "none")
    assert second.exit_code == 0, second.output
    with Store(root) as store:
        assert store.sql("select run, count(*) from predictions group by all").rows() == [("tiny", 60 * 0 + _n(store))]
        assert store.sql("select count(*) from tokens").item() == store.sql("select n_tokens from datasets").item()
        assert store.sql("select prompt from runs").rows() == [(None,), (None,)]
        of_both = [store.read("select token_id from tokens", name, "embed")[0].shape for name in ("tiny", "two")]
    assert of_both[0] == of_both[1]
    short = tiny_models.llama(tmp_path / "short", max_position_embeddings=8)
    refused = run("ingest", root, "--model", short, "--dataset", "notes", "--run", "three")
    assert refused.exit_code == 2
    assert "takes 8" in refused.output
    gpt2 = tiny_models.llama(tmp_path / "else")
    about = json.loads((gpt2 / "tokenizer.json").read_text())
    about["model"]["merges"].pop()
    (gpt2 / "tokenizer.json").write_text(json.dumps(about))
    refused = run("ingest", root, "--model", gpt2, "--dataset", "notes", "--run", "three")
    assert refused.exit_code == 2
    assert "this model's is" in refused.output


def _n(store: Store) -> int:
    return store.sql("select sum(n_tokens - 1) from sequences").item()


def test_a_bridge_is_a_model_to_run(folder, model, tmp_path):
    root = tmp_path / "s.act"
    documents = ["the cat sat on the mat", "the dog"]
    options = {"sites": "mlp_out.0", "run": "mine", "tokenizer": model.tokenizer}
    run_name = actstore.ingest(root, model.bridge, text=documents, dataset="d", **options)
    with Store(root) as store:
        assert (run_name, store.sites("mine")) == ("mine", ["mlp_out.0"])
        ids, rows = store.read("select token_id, text from tokens join d using (sequence_id)", "mine", "mlp_out.0")
        assert len(ids) == len(rows)
        assert set(rows["text"]) == set(documents)
        about = json.loads(store.sql("select facts from models").item())
    assert about["mask"]
    assert about["how"] == "bridge"
    (cannot,) = compare.compare(root, 1)
    assert "given as a bridge" in cannot.cannot
    with pytest.raises(BadInput, match="got a model of type int"):
        actstore.ingest(root, 3, text=documents)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "no text was named"),
        ({"dataset": "nothing"}, "no dataset 'nothing' is stored"),
        ({"dataset": "few"}, "holds trees"),
        ({"trees": 5}, "got --trees, which is of trees"),
        ({"text": ["a"], "tokens": [[1]]}, "one file"),
        ({"cut": "split"}, "add --text FILE"),
        ({"text": ["a"], "cut": "halve"}, "no cut|got --cut"),
        ({"text": ["a"], "prompt": "tree"}, "got --prompt, which is of trees"),
        ({"text": ["a"], "variant": "swap_last"}, "got --variant"),
        ({"text": ["a"], "top": 3, "answers": "none"}, "leave one out"),
        ({"text": ["a"], "top": -1}, "got --top -1"),
        ({"text": ["a"], "answers": "nxt"}, "did you mean 'next'"),
        ({"text": ["a"], "sites": "resid_pots"}, "resid_post"),
        ({"text": ["a"], "batch_size": 0}, "batch size of 0"),
        ({"text": "no such file"}, "no file|no such"),
        ({"text": ["a"], "context": 65}, "this model takes 1 to 64"),
        ({"text": ["a"], "run": "small"}, "weights_sha256"),
        ({"text": ["a"], "revision": "main"}, "--hub"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options, said, root, folder):
    with pytest.raises(BadInput, match=said) as refused:
        prepare(root, str(folder / "tiny"), **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": ["a"]}, "got --text, which is of text"),
        ({"dataset": "notes"}, "holds text"),
        ({"answers": "next"}, "got --answers next, and model 'reproduction' reads trees; there are all, none"),
        ({"trees_from": "x", "seed": 3}, "got --trees-from and --seed"),
        ({"keep_weights": True, "model_of": "small", "model": None}, "got --keep-weights"),
    ],
)
def test_a_path_finding_system_reads_trees_alone(options, said, root):
    with pytest.raises(BadInput, match=said):
        prepare(root, **{"model": "reproduction", **options})


def test_given_trees_are_stored_and_graded_like_drawn_ones(tmp_path, shipped):
    rows = [
        {"edges": [[(i - 1) // 2, i] for i in range(1, 16)], "root": 0, "goal": 15},
        {"edges": [[i, i + 1] for i in range(15)], "root": 0, "goal": 15},
    ]
    actstore.ingest(tmp_path / "s.act", "reproduction", trees_from=pl.DataFrame(rows), dataset="mine", sites="embed")
    actstore.ingest(tmp_path / "s.act", "reproduction", dataset="mine", run="again", sites="resid_post.0")
    with Store(tmp_path / "s.act") as store:
        assert store.sql("select goal, depth from trees order by tree_id").rows() == [(15, 4), (15, 15)]
        assert store.sql("select count(*) from outcomes where run in ('reproduction', 'again')").item() == 4
    assert all(of.agrees for of in compare.compare(tmp_path / "s.act", 2))


def test_a_pass_takes_the_next_sequences_by_length():
    found = passes(np.array([3, 9, 3, 1, 9]), 2)
    assert [some.tolist() for some in found] == [[1, 4], [0, 2], [3]]
    assert [default_batch_size({"task": "tokens", "n_positions": n}) for n in (1, 64, 512, 9000)] == [128, 64, 8, 1]


def test_a_cache_has_the_numbers_of_run_with_cache(root: Path, model: Model):
    with Store(root) as store:
        run = next(name for name in store.runs() if "resid_pre.0" in store.sites(name))
        ids = (
            store.of(run)
            .sql("select sequence_id from sequences order by n_tokens desc")["sequence_id"][[5, 0, -1]]
            .to_list()
        )
        cache = store.cache(ids, run=run, model=model.bridge)
        assert set(cache.keys()) == set(store.of(run).sql("select site from sites")["site"])
        for row, sequence in enumerate(ids):
            query = "select number from tokens where sequence_id = $i order by token_id"
            numbers = store.sql(query, {"i": sequence})["number"].to_list()
            n, (_, alone) = len(numbers), model.bridge.run_with_cache(torch.tensor([numbers]))
            for hook in cache:
                held = cache[hook][row, :, :n, :n] if "pattern" in hook else cache[hook][row, :n]
                torch.testing.assert_close(held, alone[hook][0], rtol=1e-4, atol=1e-5)
                assert cache[hook][row].count_nonzero() == held.count_nonzero()  # zero past the end
