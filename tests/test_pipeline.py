"""The ingest loop: what is stored is what the model computes, whoever interrupted it and however often."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actstore.arrays.address import POSITIONS_PER_TREE
from actstore.errors import BadInput, Busy, NoRoom
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.prepare import _parse_depths, prepare
from actstore.ingest.models.config import ModelConfig
from actstore.ingest.models.load import load
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import decode, encode
from actstore.storage import local
from actstore.storage.local import Local
from actstore.store import Store
from tests.reference import random_model, reference, weights
from tests.stores import files

EVERY_SITE = ["embed", "resid_pre", "resid_mid", "resid_post", "pattern"]


def small_model(system="reproduction", seed=1, name="small"):
    config = ModelConfig(system, 6, n_layers=2, n_heads=2, d_model=16, d_head=8, d_mlp=24)
    return replace(random_model(config, seed), name=name)


def trees(n=10, **more):
    return TreeSet("reproduction", n, n_nodes=6, trees_per_shard=4, **more)


@pytest.mark.parametrize("system", ["reproduction", "baseline"])
def test_every_stored_activation_is_the_reference_forwards(tmp_path, system):
    model = small_model(system)
    execute(Ingest(tmp_path / "s.act", model, trees(), sites=EVERY_SITE, batch_size=3))
    words = encode(draw("reproduction", 0, 0, 10, 6))
    expected = reference(weights(model), torch.from_numpy(model.config.vocabulary.encode(words)))
    with Store(tmp_path / "s.act") as store:
        for site, short in store.sql("select site, short from sites").rows():
            X, rows = store.read("select token_id, tree_id, position from tokens order by hash(token_id)", site=short)
            wanted = expected[site].numpy()
            wanted = np.moveaxis(wanted, 2, 1) if short.startswith("pattern") else wanted
            wanted = wanted[rows["tree_id"], rows["position"]]
            np.testing.assert_allclose(X, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
            assert len(rows) == (words != 0).sum()


def test_the_tables_read_back_as_the_trees_that_were_drawn(demo_store, shipped):
    drawn = draw("reproduction", 0, 0, 40)
    ids = np.zeros((40, 63), np.int64)
    tokens = demo_store.sql(
        "select tree_id, position, list_position(v.vocabulary, token::varchar) - 1 as id from tokens, models v"
    )
    ids[tokens["tree_id"], tokens["position"]] = tokens["id"]
    read = decode(shipped.config.vocabulary.decode(ids))
    for name in ("edges", "root", "goal", "path", "depth"):
        np.testing.assert_array_equal(getattr(read, name), getattr(drawn, name))


def test_an_activation_predicts_what_is_stored_as_predicted(demo_store, shipped):
    X, rows = demo_store.read("select token_id, predicted::varchar as predicted from predictions", site="resid_post.5")
    with torch.no_grad():
        logits = shipped.bridge.unembed(shipped.bridge.ln_final(torch.from_numpy(X)))
    words = shipped.config.vocabulary.words()
    assert [words[i] for i in logits.argmax(1)] == rows["predicted"].to_list()


def test_two_models_over_the_same_trees_share_them_and_join(tmp_path):
    store = tmp_path / "s.act"
    execute(Ingest(store, small_model(name="one"), trees()))
    execute(Ingest(store, small_model("baseline", name="two"), trees()))
    execute(Ingest(store, small_model(name="one"), trees(seed=5), run="elsewhere"))
    with Store(store) as opened:
        assert opened.sql("select count(*) from trees").item() == 20
        joined = opened.sql(
            "select count(*) from predictions a join predictions b using (token_id) where a.run = 'one' and b.run = 'two'"
        )
        assert joined.item() == opened.sql("select sum(depth) from trees where tree_id < 10").item()
        assert opened.sql("select min(tree_id), max(tree_id) from outcomes where run = 'elsewhere'").row(0) == (10, 19)
        X, _ = opened.read("select token_id from tokens where tree_id = 12", run="elsewhere", site="embed")
        assert np.isfinite(X).all()


def test_interrupted_after_any_commit_the_same_command_ends_with_the_same_bytes(tmp_path, monkeypatch):
    model, sites = small_model(), ["embed"]
    execute(Ingest(tmp_path / "whole.act", model, trees(6), sites=sites))
    publish, calls = Local.publish, []
    for stop_after in range(1, 60):
        store = tmp_path / "cut.act"
        shutil.rmtree(store, ignore_errors=True)

        def cut(place, path, content, limit=stop_after):
            calls.append(path)
            if len(calls) > limit:
                raise KeyboardInterrupt
            return publish(place, path, content)

        calls.clear()
        monkeypatch.setattr(Local, "publish", cut)
        interrupted = True
        try:
            execute(Ingest(store, model, trees(6), sites=sites))
            interrupted = False
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(Local, "publish", publish)
        execute(Ingest(store, model, trees(6), sites=sites))
        assert contents(store) == contents(tmp_path / "whole.act")
        if not interrupted:
            break
    else:
        pytest.fail("the loop never ran to the end, so its last steps were not cut")
    assert stop_after > 20


def contents(store: Path) -> dict[str, bytes]:
    """Every committed byte; the catalog is derived, and compared as tables elsewhere."""
    return {
        name: content
        for name, content in files(store).items()
        if not name.startswith((".lock", "catalog", "store.json"))
    }


COMMAND = """
from pathlib import Path
import sys
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.trees.task import TreeSet
from tests.test_pipeline import small_model
print("ready", flush=True)
execute(Ingest(Path(sys.argv[1]), small_model(), TreeSet("reproduction", 120, n_nodes=6, trees_per_shard=4), batch_size=4))
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_while_it_runs_it_goes_on_to_the_same_bytes(tmp_path, blow):
    model = small_model()
    wanted = TreeSet("reproduction", 120, n_nodes=6, trees_per_shard=4)
    store = tmp_path / "cut.act"
    command = [sys.executable, "-c", COMMAND, str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process, ExitStack() as end:
        end.callback(process.kill)
        process.stdout.readline()
        while not (store / "log" / "00000004.json").exists():
            assert process.poll() is None
            time.sleep(0.005)
        with pytest.raises(Busy, match=str(process.pid)):
            execute(Ingest(store, model, wanted))
        process.send_signal(blow)
        assert process.wait() != 0
    assert len(list((store / "log").iterdir())) < 31, "it was done before the blow: nothing was tested"
    execute(Ingest(store, model, wanted, batch_size=4))
    execute(Ingest(tmp_path / "whole.act", model, wanted, batch_size=4))
    assert contents(store) == contents(tmp_path / "whole.act")
    with Store(store) as cut, Store(tmp_path / "whole.act") as whole:
        for table in (
            "trees",
            "edges",
            "tokens",
            "predictions",
            "outcomes",
            "shards",
            "runs",
            "sites",
            "models",
            "datasets",
        ):
            assert cut.sql(f"from {table}").equals(whole.sql(f"from {table}"))


def test_a_run_with_other_weights_or_trees_is_refused_and_changes_nothing(tmp_path):
    store = tmp_path / "s.act"
    execute(Ingest(store, small_model(), trees()))
    before = files(store)
    for other, message in (
        (Ingest(store, small_model(seed=2), trees()), "weights_sha256"),
        (Ingest(store, small_model(), trees(11)), "dataset"),
        (Ingest(store, small_model(), trees(10, name="mine")), "dataset"),
        (
            Ingest(store, small_model(), TreeSet("deep", 10, n_nodes=6, name=trees().row()["dataset"]), run="x"),
            "distribution",
        ),
    ):
        with pytest.raises(BadInput, match=message):
            execute(other)
        assert files(store) == before


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(local.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(NoRoom, match="GB free"):
        execute(Ingest(tmp_path / "s.act", small_model(), trees()))
    assert not list(tmp_path.iterdir())


def test_the_cost_said_beforehand_covers_what_is_written_and_not_much_more(tmp_path):
    job = Ingest(tmp_path / "s.act", small_model(), TreeSet("reproduction", 1000, n_nodes=6, trees_per_shard=250))
    said = job.bytes_left()
    execute(job)
    written = sum(len(content) for content in files(tmp_path / "s.act").values())
    assert 0.8 * said < written < 1.2 * said
    assert job.bytes_left() == 0


def test_token_ids_are_the_same_arithmetic_in_python_and_in_sql(demo_store):
    rows = demo_store.sql("select token_id, tree_id, position from tokens")
    assert (rows["token_id"] == rows["tree_id"].cast(int) * POSITIONS_PER_TREE + rows["position"].cast(int)).all()
    for view, role in (("edge_sources", "edge_source"), ("edge_targets", "edge_target"), ("answer_tokens", "root")):
        found = demo_store.sql(
            f"select role::varchar as role from {view} join tokens using (token_id) order by token_id"
        )["role"]
        assert role in found.to_list()
    assert (
        demo_store.sql(
            "select count(*) from edge_targets v join tokens t using (token_id) where t.node is distinct from v.target"
        ).item()
        == 0
    )
    assert (
        demo_store.sql(
            "select count(*) from edge_sources v join tokens t using (token_id) where t.node is distinct from v.source"
        ).item()
        == 0
    )
    assert (
        demo_store.sql(
            "select count(*) from edge_separators v join tokens t using (token_id)"
            " where (t.role = 'bar') is distinct from v.is_last or t.node is not null"
        ).item()
        == 0
    )
    assert (
        demo_store.sql(
            "select count(*) from answer_tokens a join predictions p using (token_id)"
            " where p.target::varchar is distinct from '→' || a.next_node or p.step <> a.step"
        ).item()
        == 0
    )
    assert (
        demo_store.sql("select count(*) from answer_tokens").item()
        == demo_store.sql("select count(*) from predictions").item()
    )


def test_trees_longer_than_the_models_context_are_refused(tmp_path):
    model = random_model(ModelConfig("reproduction", 6, n_layers=1, d_model=8, d_head=8, d_mlp=8, n_ctx=22))
    with pytest.raises(BadInput, match="context of 22"):
        Ingest(tmp_path / "s.act", model, trees())
    execute(Ingest(tmp_path / "s.act", model, TreeSet("reproduction", 3, n_nodes=5), sites=["embed"]))


def test_a_stored_set_of_trees_is_named_and_keeps_its_seed_and_batches(tmp_path):
    store = tmp_path / "s.act"
    execute(Ingest(store, small_model(), trees(10, seed=3)))
    again = prepare(store, "reproduction", dataset=trees(10, seed=3).row()["dataset"], run="other", sites="embed")
    assert (again.trees.seed, again.trees.n_trees, again.trees.n_nodes) == (3, 10, 6)
    assert again.plan.dataset["trees_per_shard"] == 4
    execute(again)
    with Store(store) as opened:
        assert opened.sql("select count(*) from trees").item() == 10
        assert opened.sql("select count(*) from outcomes where run in ('small', 'other')").item() == 20


def test_depths_are_parsed_from_ranges_and_lists():
    assert _parse_depths("1-3,7") == (1, 2, 3, 7)
    with pytest.raises(BadInput, match="range"):
        _parse_depths("deep")


def test_a_model_by_path_is_the_model_by_name(shipped):
    path = Path(__file__).parents[1] / "data" / "checkpoints" / "reproduction.safetensors"
    assert load(str(path)).weights_sha256 == shipped.weights_sha256
