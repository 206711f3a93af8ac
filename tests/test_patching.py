"""The study `patching` on a model in which attention in one layer carries the answer from the goal's token to the root's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

import actstore
from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.queries import patching as module
from actstore.queries import study
from actstore.queries.figures import COLUMN
from actstore.queries.pairs import pairs_of
from actstore.queries.study import adjusted
from actstore.store import Store
from actstore.verbs import patching
from tests.hops import TREES, hops, stored
from tests.test_figures import assert_legible
from tests.test_output import lines_at_80

MODEL = hops({1: ("goal", "root")})
CARRY = {("resid_post.0", "goal"), ("attn_out.1", "root"), ("resid_post.1", "root"), ("resid_post.2", "root")}
PAIRS = """
-- each tree with the next of another first step, whatever the root
select a.token_id, min(b.token_id) as donor_token_id
from answer_tokens a join answer_tokens b on b.token_id > a.token_id and b.next_node != a.next_node
where a.step = 0 and b.step = 0
group by a.token_id
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = stored(tmp_path_factory.mktemp("patching") / "s.act", MODEL, ["resid_post", "attn_out", "mlp_out"])
    return stored(path, MODEL, ["attn_out", "resid_post"], "s", replace(TREES, seed=9, name="fresh"))


def ask(path, run="r", **options):
    with Store(path) as store:
        return study.ask(store, "patching", run, patch=patching(store), **options)


@pytest.fixture(scope="module")
def answer(path):
    return ask(path)


def test_the_cells_on_the_way_of_the_answer_are_found_and_no_other_moves_anything(answer):
    assert len(answer.tests) == 3 * 3 * 7  # sites, layers, roles up to the root
    assert {(test.site, test.token_role) for test in answer.tests if test.found} == CARRY
    others = answer.results.filter(metric="moved_beyond_control").filter(
        ~pl.struct("site", "token_role").is_in([{"site": site, "token_role": role} for site, role in CARRY])
    )
    assert others["value"].abs().max() == 0.0
    for metric, share in (("recovered", 0.0), ("recovered_control", 1.0), ("moved_beyond_control", 1.0)):
        there = answer.results.filter(site="attn_out.1", token_role="root", metric=metric)
        assert there["value"].item() == pytest.approx(share, abs=1e-5)
        assert there["n"].item() >= 60


def test_a_tree_as_its_own_donor_recovers_everything(answer):
    control = answer.results.filter(label=module.CONTROL)
    assert len(control) == 9
    assert set(control["value"]) == {0.0}


def test_in_the_other_direction_the_clean_activation_restores_the_answer(path):
    found = ask(path, sites="attn_out", roles="root,goal", direction="denoise")
    assert {(test.site, test.token_role) for test in found.tests if test.found} == {("attn_out.1", "root")}
    shares = found.results.filter(token_role="root", metric="recovered").sort("site")["value"].to_list()
    assert shares == pytest.approx([0, 1, 0], abs=1e-5)


def test_pairs_may_be_chosen_by_sql(path, tmp_path):
    (tmp_path / "next.sql").write_text(PAIRS)
    found = ask(path, sites="attn_out.1", roles="root", pairs=str(tmp_path / "next.sql"), trees=30)
    assert found.results["query"][0].strip() == PAIRS.strip()
    assert found.tests[0].found
    assert found.tests[0].n <= 30


def test_drawn_pairs_share_the_root_and_differ_in_the_answer(path):
    with Store(path) as store:
        pairs, _ = pairs_of(store, "r", None, 60, "noise", np.random.default_rng(0))
        trees = {
            row["tree_id"]: row for row in store.sql("select tree_id, root, path[1] as first from trees").to_dicts()
        }
    assert len(pairs) == 60
    assert pairs["tree_id"].is_unique().all()
    for row in pairs.to_dicts():
        edited, donor, same = (trees[row[name]] for name in ("tree_id", "donor", "same"))
        assert edited["root"] == donor["root"] == same["root"]
        assert edited["first"] == same["first"] != donor["first"]
        assert row["same"] != row["tree_id"]
        assert (row["answer"], row["other"]) == (f"→{edited['first']}", f"→{donor['first']}")


def test_shares_that_scatter_as_the_controls_do_are_not_found():
    rng, contrast = np.random.default_rng(0), SimpleNamespace(pairs=pl.DataFrame({"tree_id": range(80)}))
    tests = []
    for cell in range(60):
        about = {"site": f"attn_out.{cell}", "token_role": "root", "label": "noise"}
        tests.append(module.compared(about, contrast, *rng.normal(0.5, 1, (2, 80)), seed=cell)[1])
    assert not any(test.found for test in adjusted(tests))
    assert min(test.p for test in tests) < 0.1


def test_the_table_fits_a_terminal_and_the_figure_frames_what_was_found(answer, monkeypatch):
    assert max(map(len, lines_at_80(answer.frame, monkeypatch))) <= 80
    figure = study.plot(replace(answer, tests=()))
    panels = [axis for axis in figure.axes if axis.get_title("left")]
    assert [len(axis.patches) for axis in panels] == [0, 0, 0, 3, 1, 0]
    assert figure.get_figwidth() == COLUMN
    assert_legible(figure)


def test_the_findings_are_confirmed_on_a_second_set_that_lacks_the_shared_trees(path, tmp_path):
    shutil.copytree(path, tmp_path / "s.act")
    words = [
        "study",
        str(tmp_path / "s.act"),
        "patching",
        "--run",
        "r",
        "--confirm",
        "fresh",
        "--plot",
        str(tmp_path / "a.png"),
    ]
    done = CliRunner().invoke(main, [*words, "-o", "sites", "attn_out", "-o", "roles", "root,goal", "--csv"])
    assert done.exit_code == 0, done.output
    assert "1 of 1 are confirmed on 'fresh'" in done.stderr.replace("is confirmed", "are confirmed")
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"roles": "path"}, "no role 'path'"),
        ({"direction": "nosie"}, "no direction 'nosie'"),
        ({"trees": 1}, "got -o trees 1; give a number of at least 2"),
        ({"pairs": "select 1 as a"}, "yields a; it must yield token_id and donor_token_id"),
        (
            {"pairs": "select token_id, token_id as donor_token_id from tokens"},
            "are no root token of a tree that the run answered",
        ),
        ({"pairs": f"from ({PAIRS}) union all from ({PAIRS})"}, "twice; give each clean tree one donor"),
        ({"pairs": "select token_id, token_id as donor_token_id from answer_tokens"}, "there are 0 pairs of trees"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(path, options, said):
    with pytest.raises(BadInput) as refused:
        ask(path, **options)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_site_that_is_not_stored_is_added_by_the_command_that_is_named(path):
    with pytest.raises(NotStored, match=r"does not hold mlp_out, .* --run s --sites mlp_out` adds them"):
        ask(path, "s")


@pytest.mark.parametrize("by", ["verb", "command"])
def test_a_study_of_causes_closes_every_store_that_it_opens(path, monkeypatch, by):
    opened, closed = [], []
    init, close = Store.__init__, Store.close

    def noted(self, *args, **options):
        init(self, *args, **options)
        opened.append(self)

    def shut(self):
        closed.append(self)
        close(self)

    monkeypatch.setattr(Store, "__init__", noted)
    monkeypatch.setattr(Store, "close", shut)
    options = {"sites": "attn_out.1", "roles": "root", "trees": 5}
    if by == "verb":
        actstore.study(path, "patching", "r", options=options, record=False)
    else:
        words = [word for name, value in options.items() for word in ("-o", name, str(value))]
        done = CliRunner().invoke(main, ["study", str(path), "patching", "--run", "r", "--no-record", *words])
        assert done.exit_code == 0, done.output
    by_user = [store for store in opened if store not in {one._whole for one in opened}]  # a store closes its own whole
    assert len(by_user) > 1
    assert {id(store) for store in by_user} <= {id(store) for store in closed}
