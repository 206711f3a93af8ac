"""The study `ablate` on a model in which one head of one layer carries the answer, at the root's token."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from actstore import patch
from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.ingest.trees import tokens
from actstore.interventions import Edit
from actstore.queries import ablate, causes, study
from actstore.queries.ablate import with_donors
from actstore.queries.figures import COLUMN
from actstore.store import Store
from actstore.verbs import patching
from tests.hops import TREES, hops, stored
from tests.test_figures import assert_legible
from tests.test_output import lines_at_80

MODEL = hops({1: ("goal", "root")})
NOISE = hops({1: ("goal", "root")}, name="noise", answers=False)
CARRIES = ("attn_out.1", "root")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = stored(tmp_path_factory.mktemp("ablate") / "s.act", MODEL, ["attn_out", "mlp_out", "z"])
    stored(path, MODEL, ["attn_out"], "s", replace(TREES, seed=9, name="fresh"))
    return stored(path, NOISE, ["attn_out"], "noise")


def ask(path, run="r", **options):
    with Store(path) as store:
        return study.ask(store, "ablate", run, patch=patching(store), **options)


@pytest.fixture(scope="module")
def answer(path):
    return ask(path)


def test_the_one_cell_that_carries_the_answer_is_found_and_all_others_change_nothing(answer):
    assert len(answer.tests) == 3 * 2 * 8 * 3  # layers, sites, roles, kinds
    found = [test for test in answer.tests if test.found]
    assert {(test.site, test.token_role) for test in found} == {CARRIES}
    assert {test.label for test in found} == {"zero", "mean", "resample"}
    assert all(test.estimate > 0.7 for test in found)
    others = [test for test in answer.tests if not test.found]
    assert {(test.estimate, test.p) for test in others} == {(0.0, 1.0)}


def test_the_loss_is_what_the_equations_say(path, answer):
    """Without the head, the logits of the root's token are those of the bare embedding, which answers nothing."""
    (row,) = answer.results.filter(site="attn_out.1", token_role="root", label="zero", metric="p_drop").to_dicts()
    with Store(path) as store:
        before = store.sql("select avg(p_target) from predictions where run = 'r'").item()
    assert row["value"] == pytest.approx(before - 1 / 16, abs=0.03)
    assert row["low"] < row["value"] < row["high"]
    right = answer.results.filter(site="attn_out.1", token_role="root", label="zero", metric="accuracy_drop")
    assert right["value"].item() >= 0.9


def test_a_tree_as_its_own_donor_changes_nothing(answer):
    control = answer.results.filter(label=ablate.CONTROL)
    assert set(control["site"]) == {f"{name}.{layer}" for name in ("attn_out", "mlp_out") for layer in range(3)}
    assert set(control["value"]) == {0.0}
    assert "no probability by more than 0" in answer.sentence


def test_the_table_names_only_cells_that_change_something_and_fits_a_terminal(answer, monkeypatch):
    assert set(answer.frame["site"]) == {"attn_out.1"}
    assert len(answer.frame) == 3
    assert max(map(len, lines_at_80(answer.frame, monkeypatch))) <= 80


def test_one_head_of_the_layer_carries_it(path):
    found = ask(path, sites="z", roles="root,path", how="zero")
    assert len(found.tests) == 3 * 2 * 2  # layers, heads, roles
    assert [test.key for test in found.tests if test.found] == [("z.1", "root", "zero, head 0")]


def test_what_has_nothing_to_do_with_the_answer_is_not_found(path):
    """The head carries a label that the answer's probability depends on, and another tree's label is as good."""
    found = ask(path, "noise", sites="attn_out", how="resample")
    assert len(found.tests) == 3 * 8
    assert not any(test.found for test in found.tests)
    moved = found.results.filter(site="attn_out.1", token_role="root", metric="loss_rise")
    assert moved["high"].item() - moved["low"].item() > 0.05


def test_zero_needs_no_stored_site_and_the_other_kinds_say_how_to_store_it(path, answer):
    with pytest.raises(
        NotStored, match=r"run 's' does not hold mlp_out, .* --run s --sites mlp_out` adds them"
    ) as refused:
        ask(path, "s")
    assert "\n" not in str(refused.value)
    with pytest.raises(NotStored, match=r"hold mlp_out\.2,"):
        ask(path, "s", sites="mlp_out.2,attn_out", how="mean")
    alone = ask(path, "s", sites="mlp_out.2,attn_out.1", roles="root", how="zero")
    assert [test.site for test in alone.tests if test.found] == ["attn_out.1"]
    assert "No control was run" in alone.sentence


def test_a_donor_is_another_tree_whose_path_is_no_shorter():
    steps = pl.DataFrame({"tree_id": [1, 2, 3, 4, 5], "depth": [1, 1, 2, 2, 3]})
    every = pl.DataFrame({"token_id": [256 * tree + 7 for tree in range(1, 6)], "tree_id": [1, 2, 3, 4, 5]})
    drawn = set()
    for seed in range(200):
        found = with_donors(every, steps, np.random.default_rng(seed))["donor_token_id"].to_list()
        assert found[4] is None
        drawn |= {(tree, donor // 256) for tree, donor in enumerate(found, start=1) if donor is not None}
        assert all(donor % 256 == 7 for donor in found[:4])
    depth = dict(steps.iter_rows())
    assert drawn == {(a, b) for a in depth for b in depth if a != b and depth[b] >= depth[a] and a != 5}


def test_the_same_seed_gives_the_same_numbers_and_another_draws_other_trees(path):
    few = {"sites": "attn_out.1", "roles": "root", "how": "resample", "trees": 20}
    first, again, other = (ask(path, seed=seed, **few).results for seed in (1, 1, 2))
    assert first.equals(again)
    assert first["value"].to_list() != other["value"].to_list()
    assert first.filter(metric="p_drop")["n"].item() == 20


def test_the_finding_is_confirmed_on_a_second_set_that_lacks_the_shared_trees(path, tmp_path):
    shutil.copytree(path, tmp_path / "s.act")
    words = [
        "study",
        str(tmp_path / "s.act"),
        "ablate",
        "--run",
        "r",
        "--confirm",
        "fresh",
        "--plot",
        str(tmp_path / "a.png"),
    ]
    done = CliRunner().invoke(main, [*words, "-o", "sites", "attn_out", "-o", "roles", "root,goal", "--csv"])
    assert done.exit_code == 0, done.output
    assert "3 of 3 are confirmed on 'fresh'" in done.stderr
    assert "80 trees that were drawn apart" not in done.stderr
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_figure_frames_what_was_found_and_needs_recorded_rows_alone(answer):
    figure = study.plot(replace(answer, tests=()))
    panels = [axis for axis in figure.axes if axis.get_title("left")]
    assert [axis.get_title("left") for axis in panels] == [
        f"{part}, {how}" for how in ("zero", "mean", "resample") for part in ("attention", "MLP")
    ]
    assert [len(axis.patches) for axis in panels] == [1, 0] * 3
    assert figure.get_figwidth() == COLUMN
    assert_legible(figure)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"roles": "gaol"}, "no role 'gaol'"),
        ({"sites": "attn_out.7"}, "no site 'attn_out.7'"),
        ({"how": "none"}, "no how 'none'"),
        ({"trees": 1}, "got -o trees 1; give a number of at least 2"),
        ({"trees": "many"}, "got -o trees many"),
        ({"donors": "x"}, "'donors'"),
    ],
)
def test_an_option_without_meaning_is_refused_in_one_line(path, options, said):
    with pytest.raises(BadInput) as refused:
        ask(path, **options)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_more_cells_than_can_be_tested_are_refused(path, monkeypatch):
    monkeypatch.setattr(ablate, "MOST", 10)
    with pytest.raises(BadInput, match="got 144 cells to test, of which 1 to 10 can be"):
        ask(path)


def test_a_run_with_edits_is_no_base(path, tmp_path):
    shutil.copytree(path, copy := tmp_path / "s.act")
    patch(copy, "r", Edit("select token_id from tokens where role = 'root'", "attn_out.1", "zero"), run="edited")
    with Store(copy) as store, pytest.raises(BadInput, match="run 'edited' holds edited activations"):
        study.questions(store, "ablate", ["edited"])


def test_without_what_runs_edits_the_command_that_does_is_advised(path):
    with Store(path) as store, pytest.raises(BadInput, match=r"ask it by `actstore study .* ablate`"):
        study.ask(store, "ablate", "r")


def test_the_roles_are_those_that_tokens_have():
    assert causes.ROLES == tokens.ROLES


def test_what_reads_no_site_is_confirmed_on_a_run_without_one(path, tmp_path):
    shutil.copytree(path, tmp_path / "s.act")
    stored(tmp_path / "s.act", MODEL, [], "bare", replace(TREES, seed=11, name="bare"))
    words = ["study", str(tmp_path / "s.act"), "ablate", "--run", "r", "--confirm", "bare", "--csv"]
    words += ["-o", "sites", "attn_out", "-o", "roles", "root,goal", "-o", "how"]
    done = CliRunner().invoke(main, [*words, "zero"])
    assert done.exit_code == 0, done.output
    assert "1 of 1 is confirmed on 'bare'" in done.stderr
    lacking = CliRunner().invoke(main, [*words, "zero,mean"])
    assert lacking.exit_code == 1
    assert "'bare' lacks runs of the model of 'r' that 'ablate' needs" in lacking.stderr
