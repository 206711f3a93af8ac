"""Confirmation: what was planted in both sets is confirmed, what was planted in the first alone is not."""

import html
import json
import re
import shlex
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.rows import tree_rows
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import n_positions, token_rows
from actstore.intervals import holm
from actstore.queries import confirm, load, study
from actstore.queries.second import SHARED, Apart, look
from actstore.store import Store
from tests.answering import Answering, Dreaming, noise
from tests.planted import plant
from tests.stores import all_right
from tests.test_pipeline import small_model
from tests.test_study_answers import fails_when_deep, first_listed_leaf, ignores_the_last_edge

MODEL = small_model()
FIRST = TreeSet("reproduction", 400, seed=5, n_nodes=6, name="d")
SECOND, OTHERS = replace(FIRST, seed=6, name="fresh"), replace(FIRST, seed=7, name="others")


def answer(root, trees, says, run, changes=()):
    execute(Answering(root, MODEL, trees, run, sites=[], says=says))
    for change in changes:
        varied = replace(trees, name=f"{trees.name}-{change}", variant_of=trees.name, change=change)
        execute(Answering(root, MODEL, varied, f"{run}-{change}", sites=[], says=says))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """On `d` and `fresh` a model that never takes the last edge, and dreams of the leaf listed first; by chance on `others`."""
    path, swaps = tmp_path_factory.mktemp("confirm") / "s.act", ("swap_last", "swap_inner")
    answer(path, FIRST, ignores_the_last_edge, "r", swaps)
    answer(path, SECOND, ignores_the_last_edge, "s", swaps)
    answer(path, OTHERS, noise, "t", swaps)
    for trees, run in ((FIRST, "r-dreams"), (SECOND, "s-dreams")):
        execute(Dreaming(path, MODEL, trees, run, prompt="tree", samples=0, dreams=first_listed_leaf))
    return path


def test_a_store_without_trees_has_no_method_that_would_show_them(path):
    with Store(path) as store, pytest.raises(AttributeError, match="without the trees of 'd' has no 'scan'"):
        Apart(store, "d").scan("r")


def put(path, name, dataset="fresh", run="r", **options):
    with Store(path) as store:
        found = study.ask(store, name, run, **options)
        apart = look(store, study.Question(name, run, options), dataset)
        return found, confirm.confirm(store, found, apart, **options)


@pytest.mark.parametrize("name", ["last-edge", "swap"])
def test_what_is_in_both_sets_is_confirmed(path, name):
    found, put_there = put(path, name)
    assert len(put_there.claims) == sum(test.found for test in found.tests) >= 3
    assert all(claim.confirmed for claim in put_there.claims)
    assert (
        put_there.sentence.count(": found here (")
        == put_there.sentence.count(", confirmed there (")
        == len(put_there.claims)
    )
    assert "not confirmed" not in put_there.sentence


@pytest.mark.parametrize("name", ["last-edge", "swap"])
def test_what_is_in_the_first_set_alone_is_not_confirmed(path, name):
    _, put_there = put(path, name, "others")
    assert len(put_there.claims) >= 3
    assert not any(claim.confirmed for claim in put_there.claims)
    assert put_there.sentence.count(", not confirmed there (") == len(put_there.claims)
    assert f"and 0 of {len(put_there.claims)} are confirmed on 'others'" in put_there.sentence


def test_where_nothing_is_found_nothing_is_put_to_the_second_set(path):
    found, put_there = put(path, "last-edge", run="t")
    assert not any(test.found for test in found.tests)
    assert (put_there.claims, len(put_there.results), len(put_there.as_frame())) == ((), 0, 0)
    assert "The study 'last-edge' finds nothing on 't' (of 3 comparisons, Holm)" in put_there.sentence


def test_a_study_that_tests_nothing_says_so(path):
    with Store(path) as store:
        found = replace(study.ask(store, "depth", "r"), tests=())
        apart = look(store, study.Question("depth", "r"), "fresh")
        assert "tests nothing on 'r'" in confirm.confirm(store, found, apart).sentence


def test_an_effect_that_turned_round_is_not_confirmed():
    here = study.Test("path", -0.2, 0.001, 100, p_holm=0.001)
    assert confirm.Claim(here, here).confirmed
    assert not confirm.Claim(here, replace(here, estimate=0.2)).confirmed
    assert not confirm.Claim(here, replace(here, p_holm=0.06)).confirmed
    assert not confirm.Claim(here, None).confirmed
    assert "not confirmed there (no test there)" in confirm.Claim(here, None).sentence


def test_what_is_below_its_baseline_is_called_so_and_never_found():
    here = study.Test("source", -0.2, 0.001, 100, p_holm=0.001, exceeds="its baseline")
    assert (here.significant, here.found, here.below) == (True, False, True)
    assert replace(here, exceeds="").found, "a difference whose direction is the question may be negative"
    sentence = confirm.Claim(here, here).sentence
    assert sentence.startswith(
        "source: below its baseline here (-20.000 points, n = 100, p = 0.001), confirmed there ("
    )
    assert "found" not in sentence
    assert confirm.Claim(replace(here, estimate=0.2), None).verdict == "found here, not confirmed there"


def test_claims_are_adjusted_there_for_those_put_and_no_other():
    found = study.adjusted([study.Test(str(i), 0.1, p, 9) for i, p in enumerate((0.001, 0.002, 0.9, 0.8))])
    there = study.adjusted([study.Test(str(i), 0.1, p, 9) for i, p in enumerate((0.02, 0.03, 0.04, 0.5))])
    claims = confirm._claims([test for test in found if test.found], there)
    assert [claim.here.label for claim in claims] == ["0", "1"]
    assert [claim.there.p_holm for claim in claims] == holm([0.02, 0.03])
    assert all(claim.confirmed for claim in claims)
    assert not any(test.found for test in there)


def test_a_depth_that_the_second_set_lacks_is_not_confirmed(tmp_path):
    deep = replace(FIRST, n_trees=400)
    answer(tmp_path / "s", deep, fails_when_deep, "r")
    answer(tmp_path / "s", replace(deep, seed=6, name="fresh", n_trees=30), fails_when_deep, "s")
    _, put_there = put(tmp_path / "s", "depth")
    lacking = [claim for claim in put_there.claims if claim.there is None]
    with Store(tmp_path / "s") as store:
        depths = store.sql("select distinct depth from trees where dataset = 'fresh'")["depth"].to_list()
    assert [int(claim.here.label.split()[1]) in depths for claim in put_there.claims] == [
        claim.there is not None for claim in put_there.claims
    ]
    assert all(not claim.confirmed for claim in lacking)


def test_dreams_are_put_to_the_second_sets_continuations(path):
    found, put_there = put(path, "dreams")
    assert [claim.here.label for claim in put_there.claims] == [test.label for test in found.tests if test.found] != []
    assert all(claim.confirmed for claim in put_there.claims)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """At a target token of `d` its edge's source is written, by both models; of `fresh` too, of `others` by neither."""
    path, rng = tmp_path_factory.mktemp("written") / "s.act", np.random.default_rng(0)
    directions = rng.standard_normal((6, 12))
    for number, name in enumerate(("d", "fresh", "others")):
        trees = draw("deep", number, 0, 150, 6)
        of_trees = tree_rows(trees, 150 * number, name), token_rows(trees, 150 * number)
        for model in ("one", "two"):
            values = rng.standard_normal((150, n_positions(6), 12))
            if name != "others":
                for edge in range(5):
                    values[:, 3 * edge + 1] += 9 * directions[trees.edges[:, edge, 0]]
            run = model if name == "d" else f"{model}-{name}"
            sites, about = {"resid_post.0": values.astype(np.float32)}, {"dataset": name, "seed": number}
            plant(path, trees, sites, run, of_run=all_right(run, *of_trees), weights=model.encode(), **about)
    return path


@pytest.mark.parametrize(("dataset", "confirmed"), [("fresh", True), ("others", False)])
def test_what_a_probe_reads_is_confirmed_where_it_is_written(written, dataset, confirmed):
    _, put_there = put(written, "probes", dataset, "one", labels="source")
    assert [(claim.here.label, claim.confirmed) for claim in put_there.claims] == [("source", confirmed)]
    assert "resid_post.0): found here (+" in put_there.sentence


@pytest.mark.parametrize(("dataset", "confirmed"), [("fresh", True), ("others", False)])
def test_what_a_linear_map_carries_over_is_confirmed_where_both_models_hold_it(written, dataset, confirmed):
    _, put_there = put(written, "compare", dataset, "one", other="two")
    assert (put_there.of, put_there.second.runs) == (["one", "two"], (f"one-{dataset}", f"two-{dataset}"))
    assert len(put_there.claims) == 2, "both ways"
    assert all(claim.confirmed is confirmed for claim in put_there.claims)


# The second set is apart.


def test_trees_that_both_sets_hold_are_left_out_and_counted(tmp_path):
    """Wrong on the trees of the first set and right on all others: what is said of the second set does not see them."""
    first, second = (
        TreeSet("reproduction", 300, seed=seed, n_nodes=5, name=name) for seed, name in ((5, "d"), (6, "fresh"))
    )
    answer(tmp_path / "s", first, ignores_the_last_edge, "r")
    answer(tmp_path / "s", second, ignores_the_last_edge, "s")
    with Store(tmp_path / "s") as store:
        hashes = {
            name: store.sql("select tree_hash from trees where dataset = $d", {"d": name})["tree_hash"]
            for name in ("d", "fresh")
        }
        shared = hashes["fresh"].is_in(hashes["d"].implode())
        assert 0 < shared.sum() < len(shared)
        apart = Apart(store, "d")
        for table in (
            "trees",
            "edges",
            "tokens",
            "outcomes",
            "predictions",
            "edge_targets",
            "edge_sources",
            "answer_tokens",
        ):
            ids = apart.sql(f"with x as (from {table}) select distinct tree_id from x")["tree_id"]
            held = store.sql(
                "select tree_hash from trees where tree_id in (select unnest($ids))", {"ids": ids.to_list()}
            )
            assert not held["tree_hash"].is_in(hashes["d"].implode()).any(), table
        ids = apart.of("s").sql("select tree_id from outcomes")["tree_id"]
        assert len(ids) == 300 - shared.sum()
        assert apart.whole.sql("from trees").equals(apart.sql("from trees"))
        second = look(store, study.Question("depth", "r"), "fresh")
        assert (second.n_trees, second.n_shared) == (300, shared.sum())
    _, put_there = put(tmp_path / "s", "last-edge")
    assert (
        f"{300 - shared.sum()} trees that were drawn apart ({shared.sum()} trees that 'd' also holds"
        in put_there.sentence
    )
    path = next(claim for claim in put_there.claims if claim.here.label == "path")
    assert (path.here.n, path.there.n) == (300, 300 - shared.sum())


def test_a_query_with_order_params_and_ctes_of_its_own_is_read_the_same_where_nothing_is_shared(path):
    queries = {
        "tree_outcomes": {"run": "s"},
        "path_steps": {"run": "s"},
        "edge_tokens": {"run": "s", "token_role": "bar"},
    }
    with Store(path) as store:
        apart = Apart(store, "no such set")
        for name, params in queries.items():
            assert apart.sql(load(name).sql, params).equals(store.sql(load(name).sql, params))


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("d", r"found on 'd' itself, and a second set is drawn apart: name another set \(--confirm\): fresh, others$"),
        (
            "d-swap_last",
            r"variants of 'd', and not reproduction trees of 6 nodes\): name another set \(--confirm\): fresh, others$",
        ),
        ("a b", r"no set of trees 'a b'; there are d, [^`]*$"),
        ("frseh", r"no set of trees 'frseh' \(did you mean 'fresh'\?\); there are d, "),
    ],
)
def test_a_set_that_is_not_apart_is_refused(path, dataset, said):
    with Store(path) as store, pytest.raises((BadInput, NotStored), match=said):
        look(store, study.Question("depth", "r"), dataset)


# What lacks is told, and the line that tells it works.


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def do(line):
    """Run a command line, `actstore … && actstore …`."""
    for command in line.split(" && "):
        program, *words = shlex.split(command)
        done = run(*words)
        assert (program, done.exit_code) == ("actstore", 0), done.output


@pytest.fixture(scope="module")
def added_to(path, tmp_path_factory):
    """A copy, in a folder whose name has a blank, with attention patterns."""
    shutil.copytree(path, copy := tmp_path_factory.mktemp("confirm with") / "my store.act")
    execute(Ingest(copy, MODEL, FIRST, "r-patterns", sites=["pattern.0"]))
    return copy


@pytest.mark.parametrize(("name", "n_commands"), [("depth", 1), ("swap", 3), ("dreams", 2), ("attention", 1)])
def test_what_the_second_set_lacks_is_one_command_line_that_works(added_to, name, n_commands):
    ask = ["study", added_to, name, "--run", "r", "--confirm", f"of-{name}", "--no-record"]
    refused = run(*ask)
    assert refused.exit_code == 1
    (line,) = re.findall(r"`(actstore .*?)`", refused.stderr)
    assert line.count("actstore ingest") == n_commands
    do(line)
    done = run(*ask)
    assert done.exit_code == 0, done.output
    assert f"'of-{name}'" in done.stdout


def test_a_line_that_draws_another_set_works(tmp_path):
    path, model = tmp_path / "s.act", ["--model", "reproduction", "--nodes", 3, "--trees", 40]
    assert run("ingest", path, *model, "--run", "r", "--dataset", "d", "--sites", "none").exit_code == 0
    refused = run("study", path, "depth", "--run", "r", "--confirm", "d")
    assert refused.exit_code == 2
    do(re.findall(r"`(actstore .*?)`", refused.stderr)[0])
    again = run("study", path, "depth", "--run", "r", "--confirm", "d-again")
    assert again.exit_code in (0, 2)
    assert "are in 'd', too" in again.stderr or "'d-again'" in again.stdout


# On the command line.


def test_claims_are_printed_given_as_json_and_recorded(path, tmp_path):
    shutil.copytree(path, copy := tmp_path / "s")
    said = run("study", path, "last-edge", "--run", "r", "--confirm", "others", "--no-record").stdout
    assert (
        len(re.findall(r"^.*: found here \(.* points, n = .*\), not confirmed there \(.*\)\.$", said, re.MULTILINE))
        == 3
    )
    done = run("study", copy, "last-edge", "--run", "r", "--confirm", "others", "--json")
    assert done.exit_code == 0, done.output
    given = json.loads(done.stdout)
    assert [row["verdict"] for row in given["confirmation"]] == ["found here, not confirmed there"] * 3
    assert len(given["study"]) == 3
    csv = run("study", copy, "last-edge", "--run", "r", "--confirm", "others", "--csv", "--no-record").stdout
    assert len(pl.read_csv(csv.encode())) == 6
    with Store(copy) as store:
        rows = store.sql(
            "select label, value, params->>'confirm' as dataset, params->'$.runs' as runs from results "
            "where study = 'last-edge' and run = 'r' and metric = 'confirmed' order by label"
        )
        estimates = store.sql(
            "select n, low < value and value < high as inside from results where metric = 'confirm_there'"
        )
    assert rows["label"].to_list() == ["p_target", "path", "step"]
    assert (rows["value"].to_list(), rows["dataset"].unique().to_list()) == ([0.0] * 3, ["others"])
    assert rows["runs"].unique().to_list() == ['["t"]']
    assert (len(estimates), estimates["inside"].all()) == (3, True)


def test_runs_over_the_second_set_are_not_put_to_it_unless_they_are_named(path):
    words = ["study", path, "depth", "--confirm", "fresh", "--no-record"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "run 'r'" in done.stdout.lower() or "of 'r'" in done.stdout
    refused = run(*words, "--run", "s")
    assert refused.exit_code == 2
    assert "on 'fresh' itself" in refused.stderr


def test_a_report_puts_each_study_to_the_second_set_or_says_why_not(path, tmp_path):
    shutil.copytree(path, copy := tmp_path / "s")
    done = run("report", copy, tmp_path / "out", "--run", "r", "--confirm", "others")
    assert done.exit_code == 0, done.output
    page = html.unescape((tmp_path / "out" / "index.html").read_text())
    studied = run("study", copy, "last-edge", "--run", "r", "--confirm", "others", "--no-record").stdout
    claims = [line for line in studied.splitlines() if ": found here (" in line]
    assert len(claims) == 3
    assert all(f"<li>{claim}</li>" in page for claim in claims)
    (lacks,) = re.findall(r"Not tested on the second set: (.*?)</p>", page)
    assert "--run t-dreams" in lacks or "--prompt tree" in lacks, "there are no continuations over `others`"
    assert page.count("Not answered: ") == 3, "probes, attention and compare lack more than a second set"
    assert "tested again on the second set" in done.stdout
    with Store(copy) as store:
        rows = store.sql("select distinct study from results where metric = 'confirmed' order by study")
    assert rows["study"].to_list() == ["depth", "last-edge", "swap"] or rows["study"].to_list() == ["last-edge", "swap"]


def test_a_second_set_that_fits_no_study_is_refused_before_the_report_computes(path, tmp_path, monkeypatch):
    monkeypatch.setattr("actstore.queries.depth.study", None)
    refused = run("report", path, tmp_path / "out", "--run", "r", "--confirm", "frseh", "--no-record")
    assert refused.exit_code == 1
    assert "did you mean 'fresh'" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_the_second_set_is_looked_up_once(path, monkeypatch):
    looked, real = [], Store.sql

    def counted(self, query, *args):
        looked.append(query)
        return real(self, query, *args)

    monkeypatch.setattr(Store, "sql", counted)
    done = run("study", path, "last-edge", "--run", "r", "--confirm", "fresh", "--no-record")
    assert done.exit_code == 0, done.output
    assert looked.count(SHARED) == 1


@pytest.mark.parametrize(
    ("option", "said"), [("run", "write --run s in"), ("runs", "write --run s in"), ("seed", "write --seed s in")]
)
def test_what_has_an_argument_of_its_own_is_refused_as_an_option(path, option, said):
    refused = run("study", path, "depth", "-o", option, "s", "--no-record")
    assert refused.exit_code == 2
    assert said in refused.stderr
