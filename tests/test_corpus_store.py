"""Sets of sequences in a store: what the catalog shows of them, and the sets that are read back from it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from actstore.arrays.layout import Layout
from actstore.arrays.pack import ShardBuffer
from actstore.commits import log
from actstore.errors import BadInput, NotStored
from actstore.ingest.corpus import corpus as corpora
from actstore.ingest.corpus.corpus import Corpus, from_text, from_tokens
from actstore.ingest.corpus.tokens import Vocabulary
from actstore.ingest.jobs.sets import stored_set
from actstore.ingest.replay.remake import files_of
from actstore.ingest.trees.given import GivenTrees, from_table
from actstore.ingest.trees.task import TreeSet
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.committed import check_plan
from actstore.writing.contents import batch_contents
from actstore.writing.parts import rows_committed
from actstore.writing.plan import RunPlan, SitePlan
from actstore.writing.writer import open_writer
from tests.stores import files
from tests.tokenizers_made import vocabulary

D = 3
TEXTS = ["the cat sat on the mat", "größer als je zuvor", "log", "the dog"] * 30


def commit(root: Path, made: Corpus, run: str) -> None:
    """Store a run whose activation at a token is its number and its position."""
    row = made.row()
    in_rows = row["layout"] == "rows"
    shape = (row["n_ids"], D) if in_rows else (row["n_sequences"], row["n_positions"], D)
    layout = Layout(shape, None if in_rows else 1, row["rows_per_chunk"], stride=row["stride"] or 256)
    axes = ("row", "d_model") if in_rows else ("sequence", "position", "d_model")
    site = SitePlan("blocks.0.hook_resid_post", "resid_post.0", "vector", layout, axes)
    weights = hashlib.sha256(run.encode()).hexdigest()
    model = {
        "weights_sha256": weights,
        "model": run,
        "config": "{}",
        "tokenizer": row["vocabulary"],
        "weights_kept": False,
    }
    facts = {"device": "cpu", "versions": "{}"}
    plan = RunPlan(run, model, b"", row, [site], facts, made.parts())
    with open_writer(root, make=True) as writer:
        first = writer.define(plan)
        for number in range(made.n_batches):
            drawn = made.drawn(number)
            of_batch = first.of_batch(row, number, drawn.start)
            buffer = ShardBuffer(layout)
            if in_rows:
                values = np.stack([drawn.numbers, drawn.positions, drawn.positions * 0], axis=1)
            else:
                ids = drawn.ids()
                values = np.stack([ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), ids * 0], axis=2)
            buffer.put(0, torch.from_numpy(values.astype(np.float32)))
            rows = drawn.rows(of_batch, made.name)
            contents = batch_contents(plan, number, rows, {}, {site.site: buffer.seal(drawn.lengths)})
            writer.commit_batch(plan, number, of_batch.sequence_id, len(drawn), contents)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "IDS_PER_BATCH", 512)
        for name, made in sets().items():
            with made:
                commit(root, made, f"r-{name}")
    return root


def sets() -> dict[str, Corpus]:
    frame = pl.DataFrame({"text": TEXTS, "id": range(len(TEXTS)), "day": [None] * len(TEXTS)})
    return {
        "texts": from_text(frame, vocabulary(), n_ctx=16, name="texts"),
        "grid": from_tokens([[i, 1, i, 3] for i in range(200)], Vocabulary(None, None, 300), n_ctx=16, name="grid"),
        "again": from_text(TEXTS[:3], vocabulary(), n_ctx=16, name="again"),
    }


def test_the_catalog_shows_tokens_documents_and_columns(root: Path) -> None:
    with Store(root) as store:
        joined = store.sql(
            "select s.document, t.position, t.start, t.stop, t.token::varchar as token, x.id, x.text, x.text_start, "
            "t.number, t.dataset from tokens t join sequences s using (sequence_id) join texts x using (sequence_id) "
            "order by token_id"
        )
        for row in joined.iter_rows(named=True):
            assert row["text"].encode()[row["start"] - row["text_start"] : row["stop"] - row["text_start"]].strip(b" ")
            assert row["id"] == row["document"]
            assert row["dataset"] == "texts"
            assert row["token"] == vocabulary().pieces[row["number"]]
        assert joined["document"].n_unique() == len(TEXTS)
        described = store.sql("select dataset, n_sequences, n_tokens, layout from datasets order by first_token_id")
        assert described["dataset"].to_list() == ["texts", "grid", "again"]
        counted = store.sql(
            "select d.dataset, count(*) as n, sum(s.n_tokens)::bigint as m from sequences s join datasets d using (dataset) "
            "group by d.dataset, d.first_token_id order by d.first_token_id"
        )
        assert counted["n"].to_list() == described["n_sequences"].to_list()
        assert counted["m"].to_list() == described["n_tokens"].to_list()


@pytest.mark.parametrize("name", ["texts", "grid", "again"])
def test_rows_of_the_array_are_those_of_the_tokens(root: Path, name: str) -> None:
    with Store(root) as store:
        query = f"select token_id, number, position from tokens where dataset = '{name}' order by hash(token_id)"
        X, table = store.read(query, f"r-{name}", "resid_post.0")
        np.testing.assert_array_equal(X[:, 0], table["number"].to_numpy())
        np.testing.assert_array_equal(X[:, 1], table["position"].to_numpy())


@pytest.mark.parametrize("name", ["texts", "grid", "again"])
def test_a_stored_set_is_the_one_from_the_file(root: Path, name: str) -> None:
    manifests = log.manifests(root)
    row = rows_committed(root, manifests, "datasets").filter(pl.col("dataset") == name).row(0, named=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "IDS_PER_BATCH", 512)
        made = sets()[name]
    again: Any = stored_set(root, manifests, row)
    assert {key: again.row()[key] for key in made.row()} == made.row()
    for batch in range(made.n_batches):
        np.testing.assert_array_equal(again.drawn(batch).ids(), made.drawn(batch).ids())
        np.testing.assert_array_equal(again.drawn(batch).documents, made.drawn(batch).documents)
    commit(root, again, f"second-{name}")  # another model over the same set: no row is written twice
    parts = [part.path for manifest in log.manifests(root) for part in manifest.parts]
    assert len(parts) == len(set(parts))
    lost = [manifest for manifest in manifests if manifest.kind != "batch"]
    with pytest.raises(NotStored, match=f"holds no sound rows of tokens of batch 0 of dataset '{name}'"):
        stored_set(root, lost, row).drawn(0)  # type: ignore[call-arg]


def test_trees_that_were_given_are_read_back_as_given_and_drawn_ones_are_drawn(root: Path, tmp_path: Path) -> None:
    edges = [[[0, 1], [0, 2], [1, 3]], [[2, 0], [2, 1], [1, 3]]]
    made = from_table(pl.DataFrame({"edges": edges, "root": [0, 2], "goal": [3, 3], "author": ["a", "b"]}), "mine")
    drawn = TreeSet("deep", 3, n_nodes=4, depths=(2,))
    for trees in (made, drawn):
        facts = {"device": "cpu", "versions": "{}"}
        weights = hashlib.sha256(b"w").hexdigest()
        parts = trees.parts() if isinstance(trees, GivenTrees) else {}
        plan = RunPlan(
            f"r-{trees.row()['dataset']}",
            {"weights_sha256": weights, "config": "{}"},
            b"w",
            trees.row(),
            [],
            facts,
            parts,
        )
        with open_writer(root, make=True) as writer:
            first = writer.define(plan)
            batch = trees.between(0, trees.n_trees)
            contents = batch_contents(plan, 0, batch.rows(first, trees.row()["dataset"]), {}, {})
            writer.commit_batch(plan, 0, first.sequence_id, trees.n_trees, contents)
    manifests = log.manifests(root)
    rows = {row["dataset"]: row for row in rows_committed(root, manifests, "datasets").to_dicts()}
    again = stored_set(root, manifests, rows["mine"])
    assert isinstance(again, GivenTrees)
    assert again.row() == made.row()
    np.testing.assert_array_equal(again.between(0, 2).trees.edges, edges)
    assert stored_set(root, manifests, rows[drawn.row()["dataset"]]).row() == drawn.row()
    with Store(root) as store:
        shown = store.sql(
            "select root, goal, path, split::varchar as split, tree_id from trees where dataset = 'mine' order by tree_id"
        )
        assert shown["path"].to_list() == [[1, 3], [1, 3]]
        assert store.sql("select author, goal from trees join mine on tree_id = sequence_id order by 1").rows() == [
            ("a", 3),
            ("b", 3),
        ]
        assert store.sql("select task, distribution, seed from datasets where dataset = 'mine'").row(0) == (
            "trees",
            None,
            None,
        )


def test_a_store_of_texts_and_given_trees_is_verified_and_mended_from_its_catalog(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.act"
    shutil.copytree(root, copy)
    assert verify(copy).damage == []
    parts = [part for part in copy.glob("parts/*/*.parquet") if part.parent.name not in ("models", "runs", "sites")]
    whole = {part: part.read_bytes() for part in parts}
    for part in parts:
        part.chmod(0o644)
        part.write_bytes(b"x" * len(whole[part]))
    assert repair(copy, files_of).left == []
    assert {part: part.read_bytes() for part in parts} == whole


def test_a_set_whose_table_has_the_name_of_another_sets_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with from_text(["the cat"], vocabulary(), n_ctx=9, name="a-b") as made:
        commit(tmp_path / "s.act", made, "r")
    before = files(tmp_path / "s.act")
    with (
        from_text(["the dog"], vocabulary(), n_ctx=9, name="a_b") as made,
        pytest.raises(
            BadInput, match=r"dataset 'a_b' would be table a_b, which is the table of dataset 'a-b'; name the new"
        ),
    ):
        commit(tmp_path / "s.act", made, "other")
    plan = RunPlan("other", {}, b"", made.row(), [], {}, made.parts())
    with pytest.raises(BadInput, match="which is the table of dataset 'a-b'"):
        check_plan(tmp_path / "s.act", plan)
    assert files(tmp_path / "s.act") == before
