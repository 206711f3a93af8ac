"""Stored runs with edited activations: their rows, joins and bytes; stopped, mended, copied, dropped and merged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from click.testing import CliRunner, Result

import actstore
from actstore.catalog import tables
from actstore.cli import main
from actstore.errors import BadInput, NotStored
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.jobs.patched import prepare_patch
from actstore.ingest.models.load import Model
from actstore.ingest.replay import compare
from actstore.ingest.replay.remake import files_of
from actstore.ingest.trees.draw import NO_NODE
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.tokens import encode, is_arrow, path_at, root_at, word_label
from actstore.interventions import Edit
from actstore.queries import select
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from tests.damaged import damage, flip
from tests.reference import random_model, reference, weights
from tests.stores import committed_files, files
from tests.test_advice import advised_commands
from tests.test_interventions import tiny

SITES = ["embed", "resid_post", "z.1"]
ROOTS = "select token_id from tokens where role = 'root'"
DONATED = """
select token_id, lag(token_id, 1, (select max(token_id) from tokens where role = 'root')) over (order by token_id)
    as donor_token_id
from tokens where role = 'root'
"""
SOME = "select token_id from tokens where role = 'root' and tree_id between 5 and 6"  # of one batch


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `base` of a tiny model over 10 trees in three batches, and `other` of the same weights over other trees."""
    root = tmp_path_factory.mktemp("patched") / "s.act"
    for run, seed in (("base", 0), ("other", 5)):
        trees = TreeSet("deep", 10, seed, n_nodes=6, name=f"d-{run}", trees_per_shard=4)
        execute(Ingest(root, tiny(), trees, run, SITES, batch_size=3))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "s.act")
    return tmp_path / "s.act"


@pytest.fixture(scope="module")
def edited(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store, and runs `swapped` (windows; two edits, one of another run's donors) and `whole` of edits of `base`."""
    root = tmp_path_factory.mktemp("edited") / "s.act"
    shutil.copytree(made, root)
    edits = [
        Edit(DONATED, "resid_post.1"),
        Edit(
            "select token_id, (select min(token_id) from store.main.tokens where tree_id >= 10) as donor_token_id "
            "from tokens where role = 'goal' and tree_id % 2 = 0",
            "z.1",
            donors="other",
        ),
    ]
    actstore.patch(root, "base", edits, run="swapped", sites=["resid_post.2", "embed"])
    actstore.patch(root, "base", SOME, "v.1", "zero", run="whole", sites=["pattern.2"])
    return root


@pytest.fixture
def store(edited: Path, tmp_path: Path) -> Path:
    shutil.copytree(edited, tmp_path / "edited.act")
    return tmp_path / "edited.act"


def of_run(root: Path, run: str) -> dict[str, bytes]:
    """The files of a run alone."""
    mine = re.compile(rf"(parts/\w+|activations\.zarr)/{run}\b.*")
    return {path: content for path, content in committed_files(root).items() if mine.fullmatch(path)}


def ran(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# rows


def test_what_was_edited_is_written_down_and_joins_to_the_base(edited: Path):
    with Store(edited) as store:
        about = store.sql("from interventions where run = 'swapped' order by edit").to_dicts()
        assert [(row["base_run"], row["short"], row["how"]) for row in about] == [
            ("base", "resid_post.1", "replace"),
            ("base", "z.1", "replace"),
        ]
        assert [(row["donor_run"], row["donor_site"], row["n_edits"]) for row in about] == [
            ("base", "resid_post.1", 10),
            ("other", "z.1", 5),
        ]
        assert (about[0]["query"], about[0]["params"], about[0]["snapshot"]) == (DONATED, "{}", 8)
        rows = store.sql("select token_id, donor_token_id from edits where run = 'swapped' and edit = 0 order by all")
        assert rows.equals(store.of("base").sql(f"from ({DONATED}) order by all"))
        joined = store.sql(
            "select count(*) as n, count(*) filter (b.target = a.target) as same, avg(abs(b.p_target - a.p_target)) as apart "
            "from predictions a join predictions b using (token_id) where a.run = 'base' and b.run = 'swapped'"
        ).row(0, named=True)
        assert joined["n"] == joined["same"] == store.of("base").sql("select count(*) from predictions").item()
        assert joined["apart"] > 1e-3
        held = store.sql("select distinct tree_id from outcomes where run = 'whole' order by 1")["tree_id"]
        assert held.to_list() == [5, 6]  # the edited trees alone


def test_a_sequence_that_no_edit_names_is_not_read_but_referred_to_its_base(edited: Path):
    with Store(edited) as store:
        X, _ = store.read("select token_id from tokens where tree_id = 5 order by 1", "whole", "pattern.2")
        assert np.isfinite(X[0, :, 0]).all()
        with pytest.raises(NotStored, match="no edit of the run names: the base run holds it"):
            store.read("select token_id from tokens where tree_id in (4, 5)", "whole", "pattern.2")


def test_named_queries_of_a_run_with_edits_ask_its_edited_trees_alone(edited: Path):
    with Store(edited) as store:
        held = {run: set(store.sql("from held_trees($run)", {"run": run})["tree_id"]) for run in ("base", "whole")}
        assert held == {"base": set(range(10)), "whole": {5, 6}}
        assert set(select(store, "ancestors", run="whole")["tree_id"]) == {5, 6}
        seen = select(store, "attention_by_goal_distance", run="whole", site="pattern.2", token_role="root")
        assert seen.filter(pl.col("head") == 0)["n"].sum() == 2 * 5  # a root's five edges, in each of two trees


def test_a_window_is_computed_where_the_base_has_what_it_needs(edited: Path):
    with Store(edited) as store:
        noted = {row["run"]: json.loads(row["versions"]) for row in store.sql("from runs").to_dicts()}
    assert (noted["swapped"]["forward"], noted["whole"]["forward"]) == ("window", "whole")


def test_the_same_definition_gives_the_same_bytes(edited: Path, root: Path):
    edits = [
        Edit(row["query"], row["site"], donors=row["donor_run"])
        for row in Store(edited).sql("from interventions where run = 'swapped' order by edit").to_dicts()
    ]
    actstore.patch(root, "base", edits, run="swapped", sites=["resid_post.2", "embed"])
    ours, theirs = of_run(root, "swapped"), of_run(edited, "swapped")
    at = {path for path in ours if path.startswith("parts/interventions")}  # which spells the site as it was asked for
    assert {path: ours[path] for path in ours.keys() - at} == {path: theirs[path] for path in theirs.keys() - at}


def greedy(model: Model, words: np.ndarray, depth: int, edit: Callable[[str, torch.Tensor], torch.Tensor]) -> list[int]:
    """The greedy answer to one tree, one word and one whole pass at a time."""
    so_far, answer = words[:, : root_at(16) + 1], list[int]()
    while len(answer) < depth:
        ids = torch.from_numpy(model.config.vocabulary.encode(so_far))
        logits = reference(weights(model), ids, edit=edit)["logits"][:, -1]
        word = model.config.vocabulary.decode(logits.argmax(-1).numpy())
        if not is_arrow(word)[0]:
            break
        answer.append(int(word_label(word)[0]))
        so_far = np.concatenate([so_far, word[:, None].astype(np.uint8)], 1)
    return answer


def test_answers_under_an_edit_are_those_of_one_word_after_another(shipped: Model, demo_path: Path, tmp_path: Path):
    root, places, position = tmp_path / "s.act", {3: 2, 7: 1, 9: 3, 12: 0, 20: 2, 21: 1}, path_at(16)
    shutil.copytree(demo_path, root)
    rows = pl.DataFrame({"token_id": [256 * tree + position - 1 + step for tree, step in places.items()]})
    actstore.patch(root, "reproduction", "from rows", "resid_mid.4", "zero", run="cut", tables={"rows": rows})
    with Store(root) as store:
        found = store.sql("from outcomes where run = 'cut' order by tree_id").to_dicts()
        trees = TreeSet("reproduction", 40, trees_per_shard=16).between(0, 40).trees
        assert sum(not row["greedy_right"] for row in found) > 2
    for row in found:
        tree = row["tree_id"]
        path = [int(label) for label in trees.path[tree] if label != NO_NODE]
        at = position - 1 + places[tree]

        def edit(site: str, x: torch.Tensor, at: int = at) -> torch.Tensor:
            if site == "blocks.4.hook_resid_mid" and x.shape[1] > at:
                x[:, at] = 0
            return x

        answer = greedy(shipped, encode(trees[tree : tree + 1]), len(path), edit)
        assert row["greedy_path"] == answer
        assert row["greedy_right"] == (answer == path)
        wrong = [step for step in range(len(path)) if answer[step : step + 1] != path[step : step + 1]]
        assert row["first_wrong_step"] == (wrong[0] if wrong else None)


def test_the_order_of_sites_is_that_of_the_pass_and_of_one_site_that_of_the_edits(root: Path):
    """Donors are stored rows, so that an edit at an early site cannot rest on one at a later site."""
    edits = [
        Edit("select token_id, token_id - 1 as donor_token_id from tokens where role = 'root'", "resid_post.0"),
        Edit(DONATED, "z.1", "add", donor_site="z.1"),
        Edit(DONATED, "resid_post.0", "add", donor_site="resid_post.2"),  # of a later site
    ]
    actstore.patch(root, "base", edits, run="forth", sites=["resid_post.0", "resid_post.2"])
    actstore.patch(root, "base", [edits[0], edits[2], edits[1]], run="back", sites=["resid_post.0", "resid_post.2"])
    actstore.patch(root, "base", [edits[2], edits[0]], run="last", sites=["resid_post.0"])
    with Store(root) as store:
        query = "select token_id from tokens where tree_id < 10 order by token_id"
        for site in ("resid_post.0", "resid_post.2"):
            forth, back = (store.read(query, run, site)[0] for run in ("forth", "back"))
            np.testing.assert_array_equal(forth, back)
        named = store.of("base").sql(f"from ({DONATED}) order by token_id")
        roots, added = named["token_id"].to_numpy(), named["donor_token_id"].to_numpy()
        donor, _ = store.read(roots - 1, "base", "resid_post.0")
        more, _ = store.read(added, "base", "resid_post.2")
        np.testing.assert_allclose(store.read(roots, "forth", "resid_post.0")[0], donor + more, rtol=1e-6)
        np.testing.assert_array_equal(
            store.read(roots, "last", "resid_post.0")[0], donor
        )  # replaced after the addition


def test_donors_of_another_run_are_that_runs_rows(root: Path):
    """Of other weights and other trees, at an equal shape."""
    changed = replace(random_model(tiny().config, 8), name="changed")
    trees = TreeSet("deep", 5, 21, n_nodes=6, name="theirs", trees_per_shard=4)
    execute(Ingest(root, changed, trees, "theirs", ["resid_post.1", "z.1"]))
    with Store(root) as store:
        first = store.sql("select min(tree_id) from trees join runs using (dataset) where run = 'theirs'").item()
    query = "select token_id, 256 * ($first::int + tree_id % 5) + position as donor_token_id from tokens where role = 'root'"
    edits = [Edit(query, at, donors="theirs", params={"first": first}) for at in ("z.1", "resid_post.1")]
    actstore.patch(root, "base", edits, run="mixed", sites=["z.1", "resid_post.1"])
    with Store(root) as store:
        rows = store.sql("select token_id, donor_token_id from edits where run = 'mixed' and edit = 0 order by 1")
        for site in ("z.1", "resid_post.1"):
            theirs, _ = store.read(rows["donor_token_id"].to_numpy(), "theirs", site)
            np.testing.assert_array_equal(store.read(rows["token_id"].to_numpy(), "mixed", site)[0], theirs)
        about = store.sql("select distinct donor_run from interventions where run = 'mixed'")["donor_run"].to_list()
        assert about == ["theirs"]


# as any run


def test_stopped_between_batches_it_goes_on_with_the_edits_that_are_stored(made: Path, root: Path, tmp_path: Path):
    grows = (
        "select token_id from tokens where role = 'root' and tree_id < (select count(*) from store.main.datasets) + 4"
    )

    def stop(done: int, total: int) -> None:
        if done > 4:
            raise KeyboardInterrupt

    def job(where: Path, **more: Any) -> Ingest:
        return prepare_patch(where, "base", [Edit(grows, "resid_post.0", "zero")], "r", ["resid_post.2"], **more)

    with pytest.raises(KeyboardInterrupt):
        execute(job(root), stop)
    third = TreeSet("deep", 4, 9, n_nodes=6, name="third")
    execute(Ingest(root, tiny(), third, "third", [], batch_size=3))  # now the query would yield another tree
    again = prepare_patch(root, "base", run="r")
    assert len(again.left()) < 3
    execute(again)
    execute(job(root))
    with Store(root) as store:
        assert store.sql("select count(*) from edits where run = 'r'").item() == 6
        assert store.sql("select count(distinct tree_id) from predictions where run = 'r'").item() == 6
    whole = tmp_path / "whole.act"
    shutil.copytree(made, whole)
    execute(job(whole))
    assert of_run(root, "r") == of_run(whole, "r")
    assert verify(root).findings == []


def test_other_edits_under_its_name_are_refused(store: Path):
    before = files(store)
    for edits, more, said in [
        ([Edit(SOME, "v.1", "zero")], {"run": "swapped"}, "edits 2, not 1"),
        ([Edit(ROOTS, "v.1", "zero")], {"run": "whole"}, "query"),
        ([Edit(SOME, "v.0", "zero")], {"run": "whole"}, "site blocks.1.attn.hook_v, not"),
        ([Edit(SOME, "v.1", "zero")], {"run": "whole", "answers": "next"}, "answers all, not next"),
        ([Edit(SOME, "v.1", "zero")], {"run": "whole", "batch_size": 7}, "batch_size 3, not 7"),
        ([], {"run": "base"}, "'base' is stored, and holds no edits"),
        ([Edit(SOME, "v.1", "zero")], {"run": "base"}, "'base' is stored, and holds no edits"),
        ([], {"run": "new"}, "no run 'new' with edits"),
        ([Edit(SOME, "v.1", "zero")], {"run": "a/b"}, "the name 'a/b'"),
        ([], {}, "got 0 edits; give 1 to 255"),
    ]:
        with pytest.raises((BadInput, NotStored), match=said):
            actstore.patch(store, "base", edits, **more)
    with pytest.raises(BadInput, match="base base, not other"):
        actstore.patch(store, "other", run="whole")
    assert files(store) == before


def test_it_is_verified_and_computed_again(edited: Path):
    assert verify(edited).findings == []
    found = [of for of in compare.compare(edited, 6) if of.run in ("swapped", "whole")]
    assert {(of.run, of.what) for of in found} == {
        *(
            ("swapped", what)
            for what in ("donors of edit 0", "donors of edit 1", "resid_post.2", "embed", "predictions")
        ),
        *(("whole", what) for what in ("pattern.2", "predictions")),
    }
    assert all(of.agrees and not of.cannot for of in found)


@pytest.mark.parametrize("what", ["a vector", "an answer", "a donor"])
def test_what_is_not_what_the_edits_give_is_found(root: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    """Planted in runs whose checksums are right."""
    from actstore.arrays.pack import ShardBuffer
    from actstore.ingest.answers import tree_paths
    from actstore.ingest.interventions.rows import Rows

    if what == "a vector":
        seal = ShardBuffer.seal

        def changed(self: ShardBuffer, lengths: np.ndarray) -> memoryview:
            self.rows[17] *= 1.01
            return seal(self, lengths)

        monkeypatch.setattr(ShardBuffer, "seal", changed)
    elif what == "an answer":
        rows = tree_paths.prediction_rows
        monkeypatch.setattr(
            tree_paths, "prediction_rows", lambda *asked: rows(*asked).with_columns(pl.col("p_target") * 0.9)
        )
    else:
        monkeypatch.setattr(Rows, "donors_hash", lambda self, store: "0" * 32)
    actstore.patch(root, "base", DONATED, "resid_post.0", run="r", sites=["resid_post.2"])
    monkeypatch.undo()
    assert verify(root).findings == []
    differing = {of.what for of in compare.compare(root, 6) if of.run == "r" and not of.agrees}
    assert differing == {{"a vector": "resid_post.2", "an answer": "predictions", "a donor": "donors of edit 0"}[what]}


def test_each_of_its_files_is_made_again_to_the_same_bytes(store: Path):
    before = committed_files(store)
    lost = [*of_run(store, "swapped"), *of_run(store, "whole")]
    assert {path.split("/")[1] for path in lost if path.startswith("parts/")} == {
        *("runs", "sites", "interventions", "edits", "predictions", "outcomes")
    }
    for path in lost:
        damage(store / path, flip(len(before[path]) // 2))
    done = repair(store, files_of)
    assert (set(done.mended), done.left) == (set(lost), [])
    assert committed_files(store) == before


def test_without_a_catalog_answers_and_activations_are_made_again_and_edits_are_not(store: Path):
    before = committed_files(store)
    lost = [path for path in of_run(store, "swapped") if "/c/" in path]
    for path in [*lost, tables.CATALOG]:
        damage(store / path, flip(40))
    done = repair(store, files_of)
    assert (set(done.mended), done.left) == ({*lost, tables.CATALOG}, [])
    assert committed_files(store) == before
    batch = "parts/predictions/swapped-000001.parquet"
    for path in (batch, "parts/edits/swapped.parquet", tables.CATALOG):
        damage(store / path, flip(40))
    left = repair(store, files_of).left
    assert {of.path for of in left} == {batch, "parts/edits/swapped.parquet"}
    assert "what run 'swapped' edited is lost" in "".join(of.what for of in left)


def test_sites_are_added_to_it(store: Path):
    before = of_run(store, "whole")
    with Store(store) as opened, pytest.raises(NotStored) as refused:
        opened.read("select token_id from tokens where tree_id = 5", "whole", "resid_mid.2")
    (command,) = advised_commands(str(refused.value))
    assert ran(*command).exit_code == 0, ran(*command).output
    with Store(store) as opened:
        X, _ = opened.read("select token_id from tokens where tree_id = 5", "whole", "resid_mid.2")
        assert np.isfinite(X).all()
    assert before.items() <= of_run(store, "whole").items()
    assert all(of.agrees for of in compare.compare(store, 6))
    lost = next(path for path in committed_files(store) if "whole/blocks.2.hook_resid_mid/c/1" in path)
    damage(store / lost, flip(40))
    assert repair(store, files_of).mended == [lost]


def test_a_site_that_a_run_of_windows_cannot_have_yet_is_added_to_the_base_first(store: Path):
    with pytest.raises(NotStored, match=r"does not hold resid_mid\.2") as refused:
        actstore.patch(store, "base", run="swapped", sites=["resid_mid.2"])
    with pytest.raises(BadInput, match=r"has no attn_scores\.2"):
        actstore.patch(store, "base", run="swapped", sites=["attn_scores.2"])
    (command,) = advised_commands(str(refused.value))
    assert ran(*command).exit_code == 0
    actstore.patch(store, "base", run="swapped", sites=["resid_mid.2"])
    assert all(of.agrees and not of.cannot for of in compare.compare(store, 6))


def test_a_copy_brings_along_what_the_edits_rest_on(store: Path, tmp_path: Path):
    done = ran("copy", store, tmp_path / "copy.act", "--run", "swapped")
    assert done.output.rstrip().endswith("; with base, other, on which edits rest")
    copied = tmp_path / "copy.act"
    with Store(copied) as opened:
        assert opened.runs() == ["base", "other", "swapped"]
    assert verify(copied).findings == []
    assert all(of.agrees and not of.cannot for of in compare.compare(copied, 6))


def test_what_edits_rest_on_is_dropped_after_them(store: Path):
    for name, said in (("other", "donor of swapped"), ("base", "donor of swapped, whole")):
        with pytest.raises(BadInput, match=said) as refused:
            actstore.drop(store, run=name)
    for command in advised_commands(str(refused.value)):
        assert ran(*command, "--yes").exit_code == 0
    actstore.drop(store, run="other")
    actstore.drop(store, run="base")
    assert repair(store, files_of).left == []
    with Store(store) as opened:
        assert opened.runs() == []
        assert opened.sql("select (select count(*) from edits) + (select count(*) from interventions)").item() == 0
    assert not [path for path in files(store) if "swapped" in path or "whole" in path]


# merged


def test_a_merge_moves_the_edits(edited: Path, made: Path, tmp_path: Path):
    before = tmp_path / "before.act"
    execute(Ingest(before, tiny(), TreeSet("deep", 6, 77, n_nodes=6, name="d"), "base", ["resid_post.0"]))
    merged = actstore.merge([before, edited], tmp_path / "merged.act", [(edited, "run", "base", "plain")]).out
    assert verify(merged).findings == []
    assert all(of.agrees and not of.cannot for of in compare.compare(merged, 6))
    with Store(merged) as store, Store(edited) as theirs:
        spelled = (
            "select edit, {} from edits e join tokens t using (token_id) left join tokens d on d.token_id = e.donor_token_id "
            "where run = 'swapped' order by edit, t.tree_id"
        )
        places = "t.tree_id - {0}, t.position, d.tree_id - {0}, d.position"
        assert store.sql(spelled.format(places.format(6))).rows() == theirs.sql(spelled.format(places.format(0))).rows()
        about = store.sql("select base_run, donor_run, snapshot from interventions where run = 'swapped' order by edit")
        assert about.rows() == [("plain", "plain", 10), ("plain", "other", 10)]
    actstore.patch(merged, "plain", run="swapped", sites=["z.1"])  # the run's noted hash is that of the moved edits
    assert verify(merged).findings == []


def test_a_run_with_edits_that_two_stores_hold_is_merged_once(edited: Path, root: Path, tmp_path: Path):
    execute(Ingest(root, tiny(), TreeSet("deep", 6, 77, n_nodes=6, name="d"), "more", ["resid_post.0"]))
    actstore.patch(root, "base", SOME, "v.1", "zero", run="whole", sites=["pattern.2"])  # after more commits
    merged = actstore.merge([edited, root], tmp_path / "merged.act")
    assert "run whole" in merged.shared
    assert verify(merged.out).findings == []
    actstore.patch(root, "base", ROOTS, "v.1", "zero", run="swapped")
    with pytest.raises(BadInput, match="another run 'swapped'"):
        actstore.merge([edited, root], tmp_path / "again.act")
