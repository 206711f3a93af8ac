"""Runs that store no answers: a pass ends after the last site, and whatever needs answers says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from actstore.cli import main
from actstore.commits.log import manifests
from actstore.errors import BadInput, NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.patched import Unstored, prepare_patch
from actstore.ingest.jobs.prepare import prepare
from actstore.ingest.models import forward as passes
from actstore.ingest.models.load import Model
from actstore.ingest.replay import compare
from actstore.ingest.replay.remake import files_of
from actstore.ingest.trees.task import TreeSet
from actstore.interventions import Edit
from actstore.queries.study import ask, questions
from actstore.store import Store
from actstore.upkeep.verify import verify
from tests.stores import committed_files
from tests.test_advice import advised_commands
from tests.test_pipeline import small_model
from tests.test_text import folder, job, model  # noqa: F401

TREES = TreeSet("reproduction", 40, n_nodes=6, name="few", trees_per_shard=16)
SITES = ["embed", "resid_post.0"]
MODULES = {"embed": "embed", "resid_post.0": "blocks.0", "resid_post.1": "blocks.1"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `none`, without answers. Not to be changed."""
    root = tmp_path_factory.mktemp("none") / "s.act"
    execute(Ingest(root, small_model(), TREES, "none", SITES, asked=None))
    return root


@pytest.fixture
def root(stored: Path, tmp_path: Path) -> Path:
    shutil.copytree(stored, tmp_path / "s.act")
    return tmp_path / "s.act"


def counted(model: Model) -> dict[str, int]:  # noqa: F811
    """How many forward passes reach each part of a model from now on."""
    reached = dict.fromkeys([*MODULES.values(), "unembed"], 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*given: object) -> None:
            reached[name] += 1

        return hook

    for name in reached:
        model.bridge.get_submodule(name).register_forward_pre_hook(count(name))
    return reached


@pytest.mark.parametrize("last", MODULES)
def test_a_pass_ends_after_the_last_site(tmp_path: Path, last: str) -> None:
    small = small_model()
    reached = counted(small)
    execute(Ingest(tmp_path / "s.act", small, TREES, sites=["embed", last], batch_size=16, asked=None))
    parts = list(reached)
    n_run = parts.index(MODULES[last]) + 1
    assert [reached[part] for part in parts] == [3] * n_run + [0] * (len(parts) - n_run)
    hooks = [point for point in small.bridge.hook_dict.values() if point.has_hooks()]
    assert not hooks


def test_without_sites_and_answers_the_model_does_not_run(tmp_path: Path) -> None:
    small = small_model()
    reached = counted(small)
    execute(Ingest(tmp_path / "s.act", small, TREES, sites=[], asked=None))
    assert not any(reached.values())


def test_what_is_stored_equals_the_activations_of_a_run_with_answers(stored: Path, tmp_path: Path) -> None:
    execute(Ingest(tmp_path / "s.act", small_model(), TREES, "none", SITES))
    ours, theirs = committed_files(stored), committed_files(tmp_path / "s.act")
    shards = [path for path in theirs if "/c/" in path]
    assert len(shards) == 6
    assert all(ours[path] == theirs[path] for path in shards)
    assert {path.split("/")[1] for path in theirs.keys() - ours.keys()} == {"predictions", "outcomes"}
    with Store(stored) as store:
        assert json.loads(store.sql("select versions from runs").item())["answers"] == "none"
        assert store.info().select("sequences", "greedy_right_percent").row(0) == (40, None)


def test_text_ends_after_the_last_site_too(folder: Path, model: Model, tmp_path: Path) -> None:  # noqa: F811
    roots = [tmp_path / "none.act", tmp_path / "next.act"]
    without = job(roots[0], model, folder, sites=["resid_post.0", "pattern.0"], asked=None)
    reached = counted(model)  # after the pass that shows what the hooks give
    execute(without)
    assert reached["blocks.0"]
    assert not reached["blocks.1"]
    assert not reached["unembed"]
    execute(job(roots[1], model, folder, sites=["resid_post.0", "pattern.0"]))
    ours, theirs = map(committed_files, roots)
    shards = [path for path in theirs if "/c/" in path]
    assert shards
    assert all(ours[path] == theirs[path] for path in shards)
    assert all(of.agrees for of in compare.compare(roots[0], 3))


def test_sites_are_added_to_a_finished_run_by_passes_that_end_after_them(tmp_path: Path) -> None:
    root, small = tmp_path / "s.act", small_model()
    execute(Ingest(root, small, TREES, "all", ["embed"], batch_size=16))
    reached = counted(small)
    execute(Ingest(root, small, TREES, "all", ["embed", "resid_post.0"], batch_size=16))
    assert reached["blocks.1"]  # the first batch's answers are compared
    assert reached["blocks.0"] - reached["blocks.1"] == TREES.n_batches - 1


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(stored: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > 16:
            raise KeyboardInterrupt

    ingest = Ingest(tmp_path / "s.act", small_model(), TREES, "none", SITES, asked=None)
    with pytest.raises(KeyboardInterrupt):
        execute(ingest, stop)
    assert len(ingest.left()) == 2
    execute(ingest)
    assert committed_files(tmp_path / "s.act") == committed_files(stored)


def test_a_stored_run_keeps_its_choice(root: Path) -> None:
    again = prepare(root, small_model(), dataset="few", run="none", sites="resid_post")
    assert again.asked is None
    execute(again)
    with Store(root) as store:
        assert store.sites("none") == ["embed", "resid_post.0", "resid_post.1"]
        assert not len(store.sql("from predictions"))
    with pytest.raises(BadInput, match="run 'none' is stored with answers none, not all; name the new run otherwise"):
        prepare(root, small_model(), dataset="few", run="none", answers="all")
    execute(Ingest(root, small_model(), TREES, "all", ["embed"]))
    with pytest.raises(BadInput, match="run 'all' is stored with answers all, not none"):
        prepare(root, small_model(), dataset="few", run="all", answers="none")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"answers": "next"}, "got --answers next, and model 'reproduction' reads trees; there are all, none"),
        ({"answers": "nine"}, "got --answers 'nine'"),
        ({"answers": "none", "prompt": "tree"}, "got --prompt tree and --answers none; .*leave one out"),
    ],
)
def test_a_choice_without_a_meaning_is_refused(tmp_path: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said) as refused:
        prepare(tmp_path / "s.act", "reproduction", **options)
    assert "\n" not in str(refused.value)


def test_recompute_runs_every_tree_of_the_run_and_finds_other_numbers(root: Path, tmp_path: Path) -> None:
    found = {of.what: of for of in compare.compare(root, 12)}
    assert found.keys() == {"vocabulary", "trees", "edges", "tokens", "embed", "resid_post.0"}
    assert all(of.agrees and of.n for of in found.values())
    small = small_model()
    take = passes.forward

    def changed(model: Model, ids: torch.Tensor, *more: object) -> object:  # noqa: F811
        return take(model, ids.flip(1), *more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "forward", changed)
        execute(Ingest(tmp_path / "wrong.act", small, TREES, "none", SITES, asked=None))
    assert verify(tmp_path / "wrong.act").findings == []
    wrong = {of.what for of in compare.compare(tmp_path / "wrong.act", 12) if not of.agrees}
    assert wrong == set(SITES)


def test_a_batch_is_made_again_with_the_same_bytes(stored: Path) -> None:
    committed = committed_files(stored)
    made = files_of(stored, manifests(stored), "none", 1)
    assert made
    assert all(committed[path] == content for path, content in made.items())


@pytest.mark.parametrize("study", ["depth", "last-edge", "knockout", "erase"])
def test_a_study_of_answers_names_the_command_that_adds_them(stored: Path, study: str) -> None:
    with Store(stored) as store, Unstored(store) as patch, pytest.raises(NotStored) as refused:
        ask(store, study, "none", patch=patch)
    assert "run 'none' has no answers to whole tasks; " in str(refused.value)
    assert len(advised_commands(str(refused.value))) == 1


def test_the_swap_of_a_run_without_answers_says_whose_answers_lack(root: Path) -> None:
    execute(Ingest(root, small_model(), TREES, "all", []))
    for change in ("swap_last", "swap_inner"):
        execute(prepare(root, small_model(), dataset="few", run=f"none-{change}", variant=change, answers="none"))
    with Store(root) as store, pytest.raises(NotStored, match="over the variants swap_last, swap_inner"):
        ask(store, "swap", "none")
    for change in ("swap_last", "swap_inner"):
        execute(prepare(root, small_model(), dataset="few", run=change, sites="none", variant=change))
    with Store(root) as store:
        with pytest.raises(
            NotStored, match=r"run 'none' has no answers to whole tasks; name one that has \(--run\): all"
        ):
            ask(store, "swap", "none")
        assert questions(store, "swap")[0].run == "all"
        assert ask(store, "swap", "all").tests


def test_a_study_that_nobody_gave_a_run_takes_one_with_answers(root: Path) -> None:
    execute(Ingest(root, small_model(), TREES, "all", []))
    with Store(root) as store:
        assert {questions(store, study)[0].run for study in ("depth", "last-edge", "knockout")} == {"all"}
        assert ask(store, "depth", "all").frame.height
        with pytest.raises(NotStored, match=r"name one that has \(--run\): all$"):
            ask(store, "depth", "none")


def test_edits_of_such_a_run_have_answers(root: Path) -> None:
    edit = Edit("select token_id from tokens where role = 'goal'", "resid_post.0", "zero")
    execute(Ingest(root, small_model(), TREES, "all", SITES))
    for base in ("none", "all"):
        patched = prepare_patch(root, base, [edit], f"{base}-edited")
        execute(patched)
        assert patched.patch is not None
        patched.patch.close()
    with Store(root) as store:
        rows = [
            store.sql(
                "select * exclude (run) from predictions where run = $run order by token_id", {"run": f"{base}-edited"}
            )
            for base in ("none", "all")
        ]
        assert len(rows[0])
        assert rows[0].equals(rows[1])
        with Unstored(store) as patch:
            unstored = patch("none", [edit]).sort("token_id")
    np.testing.assert_allclose(unstored["p_target"], rows[0]["p_target"], rtol=1e-5)
    assert all(of.agrees for of in compare.compare(root, 5) if of.run.endswith("edited"))


def test_edits_of_text_have_answers_without_those_of_their_base(
    folder: Path,  # noqa: F811
    model: Model,  # noqa: F811
    tmp_path: Path,
) -> None:
    root = tmp_path / "s.act"
    execute(job(root, model, folder, sites=["resid_post.0"], run="tiny", asked=None))
    edit = Edit("select token_id from tokens where position = 0", "resid_post.0", "zero")
    patched = prepare_patch(root, "tiny", [edit], "edited")
    execute(patched)
    assert patched.patch is not None
    patched.patch.close()
    with Store(root) as store, Unstored(store) as patch:
        held = store.sql("select token_id, p_target from predictions where run = 'edited' order by token_id")
        assert len(held) == store.sql("select count(*) - count(distinct sequence_id) from tokens").item()
        assert len(patch("tiny", [edit])) == len(held)
    again = prepare_patch(root, "tiny", [], "edited")
    assert again.asked == patched.asked


def test_the_command_takes_the_choice(tmp_path: Path) -> None:
    root = tmp_path / "s.act"
    execute(Ingest(root, small_model(), TREES, "all", []))
    words = ["ingest", str(root), "--model-of", "all", "--dataset", "few", "--run", "none"]
    done = CliRunner().invoke(main, [*words, "--sites", "embed", "--answers", "none"])
    assert done.exit_code == 0, done.output
    with Store(root) as store:
        held = store.sql("select run, count(*) as n from predictions group by run")
        assert held["run"].to_list() == ["all"]
        assert len(store.read("from tokens", "none", "embed")[0])
