"""Variants of trees: two edges trade places, everything else stays, and the store says what was changed."""

from dataclasses import replace

import numpy as np
import pytest

from actstore.errors import BadInput
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.prepare import prepare
from actstore.ingest.trees import variants
from actstore.ingest.trees.draw import draw
from actstore.ingest.trees.rows import edge_rows
from actstore.ingest.trees.task import TreeSet
from actstore.store import Store
from tests.stores import committed_files
from tests.test_pipeline import small_model


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """40 trees of 6 nodes, and both variants of them, with sites and without."""
    root, model = tmp_path_factory.mktemp("variants") / "s.act", small_model()
    base = TreeSet("baseline", 40, seed=3, n_nodes=6, name="base", trees_per_shard=16)
    execute(Ingest(root, model, base, sites=["embed"]))
    for change, sites in (("swap_last", ["embed"]), ("swap_inner", [])):
        varied = replace(base, name=f"base-{change}", variant_of="base", change=change)
        execute(Ingest(root, model, varied, sites=sites))
    return root


def listed(store, dataset):
    """[tree]: the edges of each in the order listed, and which of them the path takes."""
    rows = store.sql(
        "select tree_id, list((source, target) order by edge) as edges, list(on_path order by edge) as on_path, "
        "any_value(path) as path, any_value(root) as root, any_value(variant_of) as variant_of, "
        "any_value(change) as change, any_value(split) as split "
        "from edges join trees using (tree_id) where dataset = $d group by tree_id order by tree_id",
        {"d": dataset},
    )
    return rows.to_dicts()


@pytest.mark.parametrize("change", variants.CHANGES)
def test_a_variant_differs_from_its_original_by_two_edges_that_traded_places(stored, change):
    with Store(stored) as store:
        before, after = listed(store, "base"), listed(store, f"base-{change}")
    assert len(after) == 40
    for old, new in zip(before, after, strict=True):
        assert new["variant_of"] == old["tree_id"]
        assert (new["path"], new["root"], new["split"]) == (old["path"], old["root"], old["split"])
        places = [place for place in range(5) if old["edges"][place] != new["edges"][place]]
        if new["change"] is None:
            assert not places
            continue
        a, b = places
        assert (new["edges"][a], new["edges"][b]) == (old["edges"][b], old["edges"][a])
        assert sorted(new["change"].split()[1::3]) == sorted([str(a), str(b)])
        assert old["on_path"][a] != old["on_path"][b]
        assert (b == 4) == (change == "swap_last")


def test_of_a_pair_just_one_path_runs_through_the_last_edge(stored):
    with Store(stored) as store:
        before, after = listed(store, "base"), listed(store, "base-swap_last")
    for old, new in zip(before, after, strict=True):
        assert old["on_path"][-1] != new["on_path"][-1] or new["change"] is None
    assert {row["change"] is None for row in after} == {False, True}, "some tree is all path, and nothing can trade"


def test_each_edge_of_the_path_is_as_likely_as_another():
    trees = draw("deep", 0, 0, 3000, 8, depths=[4])
    _, said = variants.vary(trees, "swap_inner", 1, 0)
    moved = np.array([int(text.split()[1]) for text in said if text])
    on_path = edge_rows(trees, 0)["on_path"].to_numpy().reshape(-1, 7)[:, :6]
    expected = (on_path / on_path.sum(axis=1, keepdims=True))[[text is not None for text in said]].sum(axis=0)
    counts = np.bincount(moved, minlength=6)
    assert ((counts - expected) ** 2 / expected).sum() < 25  # chi-square, 5 degrees of freedom: 1 in 10,000 is above


@pytest.mark.parametrize("change", variants.CHANGES)
def test_a_range_of_a_stream_varies_as_it_does_within_the_whole(change):
    whole, said = variants.vary(draw("reproduction", 5, 0, 50, 9), change, 5, 0)
    part, part_said = variants.vary(draw("reproduction", 5, 20, 33, 9), change, 5, 20)
    np.testing.assert_array_equal(part.edges, whole.edges[20:33])
    assert part_said == said[20:33]


def test_an_interrupted_variant_goes_on_to_the_same_bytes(stored, tmp_path):
    root, model = tmp_path / "s.act", small_model()
    base = TreeSet("baseline", 40, seed=3, n_nodes=6, name="base", trees_per_shard=16)
    execute(Ingest(root, model, base, sites=["embed"]))
    varied = replace(base, name="base-swap_last", variant_of="base", change="swap_last")

    def stop(done, total):
        if done > 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(Ingest(root, model, varied, sites=["embed"]), stop)
    execute(Ingest(root, model, varied, sites=["embed"]))
    execute(Ingest(root, model, replace(varied, name="base-swap_inner", change="swap_inner"), sites=[]))
    mine, whole = committed_files(root), committed_files(stored)
    assert {path for path in mine if "log/" not in path} == {path for path in whole if "log/" not in path}
    assert all(mine[path] == whole[path] for path in mine if "log/" not in path)


def test_a_run_without_sites_is_a_run(stored):
    with Store(stored) as store:
        run = store.runs()[2]
        assert run == "small-swap_inner"
        assert store.sites(run) == []
        assert store.info().filter(run=run)["sequences"].item() == 40
        with pytest.raises(LookupError, match="site"):
            store.read("select token_id from tokens limit 1", run, "embed")


def test_another_model_runs_over_a_stored_variant(stored, tmp_path):
    import shutil

    root = tmp_path / "s.act"
    shutil.copytree(stored, root)
    with Store(root) as store:
        row = store.sql("from datasets where dataset = 'base-swap_last'").to_dicts()[0]
    again = TreeSet("baseline", 40, 3, 6, None, "base-swap_last", 16, row["variant_of"], row["change"])
    execute(Ingest(root, small_model(seed=2, name="other"), again, sites=[]))
    with Store(root) as store:
        assert store.sql("select count(*) as n from trees where dataset = 'base-swap_last'")["n"].item() == 40


def test_what_no_variant_can_be_made_of_is_refused(stored, monkeypatch):
    for looking in ("find", "load"):
        monkeypatch.setattr(f"actstore.ingest.jobs.chosen.{looking}", lambda *args, **options: small_model())
    monkeypatch.setattr("actstore.ingest.jobs.chosen.task_of", lambda *args, **options: "trees")
    with pytest.raises(BadInput, match="no set 'nothing' is stored"):
        prepare(stored, "small", dataset="nothing", variant="swap_last")
    with pytest.raises(BadInput, match="no set was named"):
        prepare(stored, "small", variant="swap_last")
    with pytest.raises(BadInput, match="is a variant of base already"):
        prepare(stored, "small", dataset="base-swap_last", variant="swap_inner")
    with pytest.raises(BadInput, match="there are swap_last, swap_inner"):
        prepare(stored, "small", dataset="base", variant="swap_first")
    assert not prepare(stored, "small", dataset="base", variant="swap_last", sites="none").left()  # nothing to add
    job = prepare(stored, "small", dataset="base", variant="swap_last", sites="embed")
    assert (job.plan.run, job.plan.dataset["dataset"]) == ("small-swap_last", "base-swap_last")
