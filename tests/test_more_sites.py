"""Sites that are added to a stored run: as if they had been asked for at once, and the run's files stay as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import actstore
from actstore.catalog import tables
from actstore.errors import BadInput, ComputedOtherwise
from actstore.ingest.answers import tree_paths
from actstore.ingest.answers.next_token import Asked
from actstore.ingest.jobs import local as jobs
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.prepare import prepare
from actstore.ingest.models.load import load
from actstore.ingest.models.model import Model
from actstore.ingest.replay import compare
from actstore.ingest.replay.remake import files_of
from actstore.ingest.trees.task import TreeSet
from actstore.storage.local import Local
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from tests import tiny_models
from tests.damaged import damage, flip
from tests.stores import files
from tests.test_pipeline import small_model
from tests.test_text import small_corpus, texts

TASKS = ["trees", "text"]
OWN = {"trees": ["resid_post.0", "pattern.1"], "text": ["resid_pre.1", "z.0"]}
MORE = {"trees": ["embed", "resid_post.1", "pattern.0"], "text": ["embed", "resid_post.1", "pattern.0"]}
TREES = TreeSet("reproduction", 10, n_nodes=6, name="d", trees_per_shard=4)

Make = Callable[..., Ingest]


@pytest.fixture(scope="module")
def makes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    """The run of each task, at sites that a test names."""
    folder = tiny_models.llama(tmp_path_factory.mktemp("models") / "tiny")
    of_trees, of_text = small_model(), load(str(folder))
    corpus = small_corpus(of_text, pl.DataFrame({"text": texts(40)}))

    def trees(root: Path, sites: list[str], model: Model = of_trees, sequences: Any = TREES, **more: Any) -> Ingest:
        return Ingest(root, model, sequences, "r", sites, **{"batch_size": 3, **more})

    def text(root: Path, sites: list[str], model: Model = of_text, sequences: Any = corpus, **more: Any) -> Ingest:
        return Ingest(root, model, sequences, "r", sites, **{"batch_size": 5, "asked": Asked(2), **more})

    return {"trees": trees, "text": text}


@pytest.fixture(scope="module")
def stores(makes: dict[str, Make], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By task: `own`, the run at its first sites; `whole`, with all sites at once; `added`, in two steps. Not to be changed."""
    found = {}
    for task, make in makes.items():
        root = tmp_path_factory.mktemp(task)
        execute(make(root / "own.act", OWN[task]))
        execute(make(root / "whole.act", OWN[task] + MORE[task]))
        shutil.copytree(root / "own.act", root / "added.act")
        execute(make(root / "added.act", MORE[task]))
        found[task] = root
    return found


@pytest.fixture
def copied(stores: dict[str, Path], tmp_path: Path) -> Callable[[str, str], Path]:
    """A copy of one of the stores, to be changed."""

    def copy(task: str, which: str) -> Path:
        return Path(shutil.copytree(stores[task] / f"{which}.act", tmp_path / "s.act"))

    return copy


def committed(root: Path, under: str) -> dict[str, bytes]:
    return {path: content for path, content in files(root).items() if path.startswith(under)}


@pytest.mark.parametrize("task", TASKS)
def test_added_sites_are_those_of_a_run_with_all_sites_at_once(stores: dict[str, Path], task: str) -> None:
    own, whole, added = (stores[task] / f"{which}.act" for which in ("own", "whole", "added"))
    assert committed(added, "activations.zarr") == committed(whole, "activations.zarr")
    before, now = (committed(root, ("log/", "parts/", "activations.zarr/", "models/")) for root in (own, added))
    assert before.items() <= now.items(), "a file of the run was changed"
    new = [path for path in now.keys() - before.keys() if path.startswith("parts/")]
    assert all(path.startswith("parts/sites/r/") for path in new), "answers were stored again"
    assert verify(added).findings == []


@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_two_commits_is_read_as_one_of_one(stores: dict[str, Path], tmp_path: Path, task: str) -> None:
    query = "select token_id from tokens order by hash(token_id) limit 50"
    names = OWN[task] + MORE[task]
    vectors = ["resid_post.1", *(name for name in names if name.startswith("resid") and name != "resid_post.1")]
    with Store(stores[task] / "whole.act", check=True) as whole, Store(stores[task] / "added.act", check=True) as added:
        for table in ("predictions", "outcomes", "tokens"):
            assert added.sql(f"from {table}").equals(whole.sql(f"from {table}"))
        assert added.sql("from sites order by site").equals(whole.sql("from sites order by site"))
        assert added.sites("r") == whole.sites("r") == list(map(str, added.info()["sites"][0].split()))
        for name in names:
            (X, _), (wanted, _) = added.read(query, site=name), whole.read(query, site=name)
            assert np.array_equal(X, wanted, equal_nan=True)
            assert added.explain(query, site=name) == whole.explain(query, site=name)
        norms = "select token_id, list_sum(act(token_id, 'r', 'embed')::float[]) from tokens order by all"
        assert added.sql(norms).equals(whole.sql(norms))
        X, _ = added.read(query, sites=vectors)
        assert np.array_equal(X, whole.read(query, sites=vectors)[0])
        for store, out in ((added, "added"), (whole, "whole")):
            store.export(tmp_path / f"{out}.npy", query, site="resid_post.1")
        assert (tmp_path / "added.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    copy = actstore.copy(stores[task] / "added.act", tmp_path / "copy.act", ["r"])
    assert verify(copy.out).findings == []
    assert committed(copy.out, "activations.zarr") == committed(stores[task] / "whole.act", "activations.zarr")
    actstore.drop(copy.out, run="r")
    assert repair(copy.out, files_of).left == []
    assert committed(copy.out, "activations.zarr/r") == {}


@pytest.mark.parametrize(("files_published", "batches_left"), [(2, 3), (4, 3), (5, 2)])
def test_stopped_between_files_the_same_command_goes_on_and_repeats_nothing(
    makes: dict[str, Make],
    copied: Callable[[str, str], Path],
    stores: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    files_published: int,
    batches_left: int,
) -> None:
    """Files are published in this order: metadata, rows, manifest; then of each batch shard and manifest."""
    root, make, publish, begin = copied("trees", "own"), makes["trees"], Local.publish, jobs.begin
    published, ran = list[str](), list[int]()

    def cut(place: Local, path: str, content: Any) -> Any:
        published.append(path)
        if len(published) > files_published:
            raise KeyboardInterrupt
        return publish(place, path, content)

    def counted(job: Ingest, number: int, *more: Any) -> Any:
        ran.append(number)
        return begin(job, number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Local, "publish", cut)
        with pytest.raises(KeyboardInterrupt):
            execute(make(root, ["embed"]))
    assert len(published) == files_published + 1
    monkeypatch.setattr(jobs, "begin", counted)
    again = make(root, ["embed"])
    there = f"{3 - batches_left} of 3 batches are there"
    assert (there in again.announcement()) == (batches_left < 3)
    execute(again)
    assert ran == [0, 1, 2][-batches_left:]
    array = "activations.zarr/r/hook_embed"
    assert committed(root, array) == committed(stores["trees"] / "whole.act", array)
    assert len(committed(root, "log/")) == len(committed(stores["trees"] / "own.act", "log/")) + 4
    assert verify(root).findings == []


@pytest.mark.parametrize("task", TASKS)
def test_what_is_there_is_skipped_and_said(
    makes: dict[str, Make], copied: Callable[[str, str], Path], task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copied(task, "own")
    job = makes[task](root, [*OWN[task], "resid_post.1"])
    there = " and ".join(sorted(OWN[task]))
    said = job.announcement()
    assert "adds resid_post.1 (" in said
    assert all(name in said for name in there.split(" and "))
    assert "are there already" in said
    on_disk = sum(map(len, files(root).values()))
    estimated = job.bytes_left()
    execute(job)
    shards = committed(root, "activations.zarr/r/blocks.1.hook_resid_post/c")
    assert sum(map(len, files(root).values())) > on_disk
    assert 0.5 * estimated < sum(map(len, shards.values())) + 4_000_000 < 1.5 * estimated
    before = files(root)
    monkeypatch.setattr(jobs, "begin", None)  # nothing is run
    for sites in ([*OWN[task], "resid_post.1"], ["resid_post.1"], []):
        again = makes[task](root, sites)
        assert again.bytes_left() == 0
        execute(again)
    assert files(root) == before


@pytest.mark.parametrize("task", TASKS)
def test_other_weights_sequences_or_passes_are_refused_and_nothing_is_touched(
    makes: dict[str, Make], copied: Callable[[str, str], Path], task: str
) -> None:
    root, make = copied(task, "own"), makes[task]
    model = make(root, ["embed"]).model
    if task == "trees":
        others = [
            ({"model": small_model(seed=2)}, "weights_sha256"),
            ({"sequences": replace(TREES, seed=3)}, "seed 0, not 3"),
        ]
        others.append(({"sequences": replace(TREES, name="e")}, "dataset d, not e"))
    else:
        bridge = replace(model, weights_sha256="0" * 64)
        short = small_corpus(model, pl.DataFrame({"text": texts(30)}))
        others = [({"model": bridge}, "weights_sha256"), ({"sequences": short}, "dataset 'notes' is stored with")]
        others.append(
            ({"model": replace(model, facts={**model.facts, "dtype": "bfloat16"})}, "dtype float32, not bfloat16")
        )
        others.append(
            ({"model": replace(model, facts={**model.facts, "attention": "sdpa"})}, "attention eager, not sdpa")
        )
        others.append(({"asked": Asked()}, "answers next, top 2, not next"))
    others.append(({"batch_size": 4}, "batch_size [35], not 4"))
    before = files(root)
    for other, said in others:
        with pytest.raises(BadInput, match=said):
            execute(make(root, ["embed"], **other))
        assert files(root) == before


def test_a_run_that_is_not_finished_is_finished_first(makes: dict[str, Make], tmp_path: Path) -> None:
    root, make = tmp_path / "s.act", makes["trees"]

    def stop(done: int, total: int) -> None:
        if done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(make(root, OWN["trees"]), stop)
    before = files(root)
    said = r"'r' is not finished: 1 of 3 batches .* by the same command with --sites resid_post.0,pattern.1, then"
    for sites in (["embed"], [*OWN["trees"], "embed"], OWN["trees"][:1], []):
        with pytest.raises(BadInput, match=said):
            execute(make(root, sites))
        assert files(root) == before
    execute(make(root, ["resid_post.0", "pattern.1"]))
    execute(make(root, ["embed"]))
    assert verify(root).findings == []


def test_a_name_that_an_appended_site_has_is_refused(
    makes: dict[str, Make], copied: Callable[[str, str], Path]
) -> None:
    root = copied("trees", "own")
    with Store(root) as store:
        store.append("r", "embed", [0, 1], np.ones((2, 3)))
    with pytest.raises(BadInput, match="'embed' that was appended"):
        execute(makes["trees"](root, ["embed"]))
    execute(makes["trees"](root, ["resid_post.1"]))
    assert verify(root).findings == []


@pytest.mark.parametrize("task", TASKS)
def test_added_sites_are_computed_again_and_mended(copied: Callable[[str, str], Path], task: str) -> None:
    root = copied(task, "added")
    found = compare.compare(root, 5)
    assert all(of.agrees and not of.cannot for of in found)
    assert {of.what for of in found} >= {*OWN[task], *MORE[task], "predictions"}
    before = committed(root, ("activations.zarr", "log/", "parts/"))
    lost = sorted(path for path in before if "/hook_embed/c/" in path)[1]
    (root / lost).unlink()
    others = ["activations.zarr/r/hook_embed/zarr.json", "parts/sites/r/hook_embed.parquet", "parts/sites/r.parquet"]
    for path in [*others, tables.CATALOG]:
        damage(root / path, flip(40))
    done = repair(root, files_of)
    assert (set(done.mended), done.left) == ({lost, *others, tables.CATALOG}, [])
    assert committed(root, ("activations.zarr", "log/", "parts/")) == before


@pytest.mark.parametrize("task", TASKS)
def test_a_site_that_is_half_added_is_said_and_the_rest_compared(
    makes: dict[str, Make], copied: Callable[[str, str], Path], task: str
) -> None:
    root, make = copied(task, "own"), makes[task]
    batches = []

    def stop(done: int, total: int) -> None:
        batches.append(done)
        if len(batches) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(make(root, ["embed"]), stop)
    left = make(root, ["embed"]).left()
    assert left
    found = compare.compare(root, 5)
    assert all(of.agrees for of in found)
    (unfinished,) = [of for of in found if of.cannot]
    assert (unfinished.what, "not added to the end" in unfinished.cannot) == ("embed", True)
    execute(make(root, ["embed", "resid_post.1"]))  # of which a part is there
    assert verify(root).findings == []
    assert all(of.agrees and not of.cannot for of in compare.compare(root, 5))


def test_two_stores_of_a_run_to_which_some_of_the_same_sites_were_added_are_merged(
    makes: dict[str, Make], copied: Callable[[str, str], Path], stores: dict[str, Path], tmp_path: Path
) -> None:
    root = copied("trees", "own")
    execute(makes["trees"](root, ["embed"]))
    merged = actstore.merge([root, stores["trees"] / "added.act"], tmp_path / "merged.act")
    assert verify(merged.out).findings == []
    assert committed(merged.out, "activations.zarr") == committed(stores["trees"] / "whole.act", "activations.zarr")


def test_answers_that_differ_are_noted(
    makes: dict[str, Make], copied: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tree_paths.prediction_rows
    monkeypatch.setattr(
        tree_paths, "prediction_rows", lambda *asked: rows(*asked).with_columns(pl.col("p_target") * np.float32(0.999))
    )
    root = copied("trees", "own")
    stored = committed(root, "parts/predictions")
    with pytest.warns(ComputedOtherwise, match="predictions of batch 0 differ .* run 'r'"):
        execute(makes["trees"](root, ["embed"]))
    assert committed(root, "parts/predictions") == stored


@pytest.mark.parametrize("task", TASKS)
def test_in_python_the_runs_own_passes_and_sites_are_the_default(
    makes: dict[str, Make], copied: Callable[[str, str], Path], stores: dict[str, Path], task: str
) -> None:
    root, of = copied(task, "own"), makes[task](Path("unused.act"), ["embed"])
    model, dataset = of.model if task == "trees" else of.model.bridge, of.plan.dataset["dataset"]
    own = prepare(root, model, dataset=dataset, run="r")
    assert sorted(spec.short for spec in own.specs) == sorted(OWN[task])
    assert (own.per_pass, own.left(), own.asked) == (of.per_pass, [], of.asked)
    with pytest.raises(BadInput, match="batch_size"):
        prepare(root, model, dataset=dataset, run="r", sites="embed", batch_size=7)
    assert actstore.ingest(root, model, dataset=dataset, run="r", sites=",".join(MORE[task])) == "r"
    assert committed(root, "activations.zarr") == committed(stores[task] / "whole.act", "activations.zarr")
    noted = [json.loads(content)["kind"] for content in committed(root, "log/").values()]
    assert noted.count("run") == 1
