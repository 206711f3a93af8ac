"""Sequences that are no trees: their tables, ids and arrays, beside trees in one store."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import xxhash

from actstore.arrays.address import CHUNKS_PER_SHARD, Ids
from actstore.arrays.layout import Layout
from actstore.arrays.pack import ShardBuffer
from actstore.catalog.declared import Relation, declare
from actstore.errors import BadInput, Damaged, NotStored
from actstore.ingest.replay.remake import files_of
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.contents import batch_contents, part_content
from actstore.writing.plan import RunPlan, SitePlan
from actstore.writing.writer import open_writer
from tests.stores import fake, files

PER_CHUNK, D = 4, 3
PER_SHARD = PER_CHUNK * CHUNKS_PER_SHARD
PIECES = ["<s>", "Ġthe", ",", "→1", "Ġcat", "ĠSat", "'s", "é"]  # some are words of trees
LENGTHS = [[3, 500, 1], [700], [2, 2]]  # of the sequences of each batch


def document(number: int) -> dict[str, object]:
    return {"text": f"text {number}", "year": 1900 + number, "tags": ["a", "b"][: number % 3]}


def relation(dataset: str, documents: pl.DataFrame) -> Relation:
    return declare(f"{dataset}_documents", "sequence", "documents", dataset, documents, {"year": "when it was written"})


def plan(run: str, dataset: str, weights: bytes = b"w") -> RunPlan:
    n = sum(len(lengths) for lengths in LENGTHS)
    shape = (len(LENGTHS) * PER_SHARD, D)
    documents = pl.DataFrame([document(i) for i in range(n)]).with_columns(sequence_id=pl.int_range(n, dtype=pl.Int64))
    return RunPlan(
        run=run,
        model={
            "weights_sha256": xxhash.xxh3_128_hexdigest(weights),
            "model": run,
            "architecture": "Made",
            "weights_kept": False,
        },
        weights=b"",
        dataset={
            "dataset": dataset,
            "n_positions": 700,
            "task": "tokens",
            "layout": "rows",
            "n_ids": len(LENGTHS) * PER_SHARD,
            "n_sequences": n,
            "n_tokens": sum(map(sum, LENGTHS)),
            "rows_per_shard": PER_SHARD,
            "rows_per_chunk": PER_CHUNK,
            "vocabulary": f"of {dataset}",
            "recipe": "{}",
        },
        sites=[
            SitePlan("hook_embed", "embed", "resid", Layout(shape, None, PER_CHUNK), ("row", "d_model")),
            SitePlan(
                "blocks.0.attn.hook_z",
                "z.0",
                "heads",
                Layout((shape[0], 2, 5), None, PER_CHUNK),
                ("row", "head", "d_head"),
            ),
        ],
        facts={"prompt": "task", "samples": None, "device": "cpu", "versions": "{}"},
        parts={
            "vocabularies": pl.DataFrame(
                {"vocabulary": f"of {dataset}", "number": range(len(PIECES)), "token": PIECES}
            ),
            "relations": pl.DataFrame([relation(dataset, documents).row()]),
        },
    )


def write(root: Path, run: str = "text", dataset: str = "stories", batches: tuple[int, ...] = (0, 1, 2)) -> RunPlan:
    """Store a run over sequences of many lengths; each activation tells its token id and its number in the row."""
    made = plan(run, dataset)
    with open_writer(root, make=True) as writer:
        first = writer.define(made)
        for batch in batches:
            start = sum(len(lengths) for lengths in LENGTHS[:batch])
            here = first.of_batch(made.dataset, batch, start)
            lengths = np.array(LENGTHS[batch])
            begins = here.token_id + np.cumsum(lengths) - lengths
            sequence = np.repeat(np.arange(len(lengths)), lengths)
            token_ids = here.token_id + np.arange(lengths.sum())
            number = token_ids % len(PIECES)
            tokens = pl.DataFrame(
                {
                    "token_id": token_ids,
                    "sequence_id": here.sequence_id + sequence,
                    "position": token_ids - begins[sequence],
                    "token": [PIECES[at] for at in number],
                    "number": number,
                }
            )
            n = len(lengths)
            listed = {
                "sequence_id": here.sequence_id + np.arange(n),
                "dataset": dataset,
                "first_token_id": begins,
                "n_tokens": lengths,
                "hash": np.arange(n, dtype=np.uint64) + 2**63,
                "split": ["test", *["train"] * (n - 1)],
                "document": start + np.arange(n),
            }
            documents = pl.DataFrame([document(start + i) for i in range(n)]).with_columns(
                sequence_id=pl.Series(here.sequence_id + np.arange(n))
            )
            arrays = {}
            for site in made.sites:
                buffer = ShardBuffer(site.layout)
                buffer.put(0, torch.from_numpy(expected(token_ids, site.layout.row_shape)))
                arrays[site.site] = buffer.seal(lengths)
            of_set = {
                "listed_sequences": pl.DataFrame(listed),
                "tokens": tokens,
                f"{dataset}_documents": relation(dataset, documents).fit(documents),
            }
            of_run = {
                "predictions": pl.DataFrame(
                    {
                        "run": run,
                        "token_id": token_ids[:1],
                        "sequence_id": here.sequence_id,
                        "target": "Ġcat",
                        "predicted": "é",
                    }
                ).with_columns(p_target=pl.lit(0.25), correct=False, loss=pl.lit(1.386), rank=3)
            }
            writer.commit_batch(made, batch, here.sequence_id, n, batch_contents(made, batch, of_set, of_run, arrays))
    return made


def expected(token_ids: np.ndarray, row_shape: tuple[int, ...] = (D,)) -> np.ndarray:
    n = int(np.prod(row_shape))
    return (token_ids[:, None] + np.arange(n) / 16).astype(np.float32).reshape(-1, *row_shape)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trees, text, and trees again."""
    root = tmp_path_factory.mktemp("sequences") / "s.act"
    fake("trees", "few", seed=1).store(root)
    write(root)
    fake("more", "others", seed=2, weights=b"2").store(root)
    return root


@pytest.fixture
def store(root: Path):
    with Store(root) as store:
        yield store


def test_rows_are_read_as_they_were_put(store: Store) -> None:
    X, rows = store.read("select token_id, sequence_id from tokens order by hash(token_id)", run="text", site="embed")
    assert len(rows) == sum(map(sum, LENGTHS))
    np.testing.assert_array_equal(X, expected(rows["token_id"].to_numpy()))
    heads, rows = store.read("select token_id from tokens where token = 'Ġcat'", run="text", site="z.0")
    np.testing.assert_array_equal(heads, expected(rows["token_id"].to_numpy(), (2, 5)))
    lazy = store.scan("text", "embed").filter(pl.col("year") == 1901).select("token_id", "token", "x").collect()
    assert len(lazy) == 500
    np.testing.assert_array_equal(lazy["x"].to_numpy(), expected(lazy["token_id"].to_numpy()))
    X = store.sql("select act(token_id, 'text', 'embed') as x, token_id from tokens where dataset = 'stories' limit 9")
    np.testing.assert_array_equal(np.stack(X["x"].to_list()), expected(X["token_id"].to_numpy()))
    assert store.sql("select count(x) as n from activations('text', 'embed')").item() == sum(map(sum, LENGTHS))
    batches = store.batches("select token_id from tokens", "text", "embed", batch_size=100)
    seen = torch.cat([columns["token_id"] for _, columns in batches])
    assert len(seen) == sum(map(sum, LENGTHS)) == len(seen.unique())


def test_what_is_no_token_is_not_read(store: Store) -> None:
    (first,) = store.sql("select first_token_id from datasets where dataset = 'stories'")["first_token_id"]
    for past in (504, 507, 508, PER_SHARD - 1):  # in the last chunk of the batch, and behind it
        with pytest.raises(NotStored, match=f"the first being {first + past}"):
            store.read([first, first + past], run="text", site="embed")
        with pytest.raises(NotStored, match=f"the first being {first + past}"):
            store.batches([first, first + past], "text", "embed")
    with pytest.raises(NotStored, match="of no sequence of this run"):
        store.read([0], run="text", site="embed")


def test_ids_of_sequences_and_trees_do_not_meet(store: Store) -> None:
    spans = store.sql("select dataset, first_token_id, n_ids, first_sequence_id, n_sequences from datasets").rows()
    assert [name for name, *_ in spans] == ["few", "stories", "others"]
    for (_, first, n, first_sequence, n_sequences), (_, after, _, sequence_after, _) in pairwise(spans):
        assert first + n <= after
        assert first_sequence + n_sequences <= sequence_after
    trees = store.sql("select tree_id, sequence_id, token_id from tokens where tree_id is not null")
    assert (trees["tree_id"] == trees["sequence_id"]).all()
    assert (trees["token_id"] // 256 == trees["tree_id"]).all()
    assert store.sql("select count(*) from (select token_id from tokens group by all having count(*) > 1)").item() == 0
    assert (
        store.sql(
            "select count(*) from tokens join sequences using (sequence_id) where tokens.dataset <> sequences.dataset"
        ).item()
        == 0
    )
    of_sequences = store.sql(
        "select n_tokens, count(*) as n from sequences join tokens using (sequence_id) group by n_tokens, sequence_id"
    )
    assert (of_sequences["n_tokens"] == of_sequences["n"]).all()


def test_the_inputs_columns_are_a_table(store: Store) -> None:
    rows = store.sql("select text, year, tags from stories_documents order by sequence_id").to_dicts()
    assert rows == [document(i) for i in range(6)]
    comments = store.sql(
        "select comment from duckdb_columns() where table_name = 'stories_documents' and column_name = 'year'"
    )
    assert comments.item() == "when it was written"
    of_run = store.of("text")
    assert of_run.sql("select count(*) from tokens").item() == sum(map(sum, LENGTHS))
    assert of_run.sql("select count(*) from trees").item() == 0
    assert store.of("more").sql("select count(*) from sequences").item() == 5
    predicted = store.sql("select loss, rank, target from predictions where run = 'text' limit 1")
    assert predicted.row(0) == (pytest.approx(1.386), 3, "Ġcat")


def test_it_is_verified_and_mended_from_the_catalog(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.act"
    shutil.copytree(root, copy)
    assert verify(copy).damage == []
    before = files(copy)
    for part in [*copy.glob("parts/*/stories*.parquet"), *copy.glob("parts/predictions/text-*.parquet")]:
        part.chmod(0o644)
        part.write_bytes(b"x" * part.stat().st_size)
        assert repair(copy, files_of).left == [], part
    assert {path: content for path, content in files(copy).items() if path.startswith("parts")} == {
        path: content for path, content in before.items() if path.startswith("parts")
    }
    (copy / "catalog.duckdb").unlink()
    assert repair(copy, files_of).left == []
    with Store(copy) as again, Store(root) as store:
        for table in ("tokens", "sequences", "stories_documents", "relations", "vocabularies", "datasets"):
            assert again.sql(f"from {table} order by all").equals(store.sql(f"from {table} order by all")), table


def test_rows_of_a_table_that_nobody_declared_are_refused(tmp_path: Path) -> None:
    made = plan("text", "stories")
    strange = pl.DataFrame({"sequence_id": [0]})
    contents = [part_content("strange", "stories", strange, 0)]
    with open_writer(tmp_path / "s.act", make=True) as writer:
        first = writer.define(made)
        with pytest.raises(BadInput, match="nobody declared a table strange"):
            writer.commit_batch(made, 0, first.sequence_id, 1, contents)


@pytest.mark.parametrize(
    ("name", "columns", "why"),
    [
        ("tokens", {"a": [1]}, "a table or view of every store"),
        ("select", {"a": [1]}, "a word of SQL"),
        ("Stories", {"a": [1]}, "no identifier"),
        ("a; drop table tokens", {"a": [1]}, "no identifier"),
        ("mine", {"a": [b"bytes"]}, "column 'a' is Binary"),
        ("mine", {"a": [1], "A": [2]}, "two columns of one name"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(name: str, columns: dict, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        declare(name, "sequence", "labels", "mine", pl.DataFrame({"sequence_id": [1], **columns}))


@pytest.mark.parametrize(
    "declared",
    [
        "[",
        "[" * 100_000,
        "{}",
        '[["sequence_id", "BIGINT", ""], ["a", "INTEGER); drop table tokens; --", ""]]',
        '[["sequence_id", "BIGINT", ""], ["a", "STRUCT(b INTEGER)", ""]]',
        '[["token_id", "BIGINT", ""]]',
        "[]",
    ],
)
def test_a_strange_declaration_in_a_part_is_damage_and_no_sql(tmp_path: Path, declared: str) -> None:
    made = plan("text", "stories")
    row = {"name": "mine", "grain": "sequence", "kind": "documents", "owner": "stories", "declared": declared}
    made.parts["relations"] = pl.DataFrame([row])  # type: ignore[index]
    with pytest.raises(Damaged, match="cannot be built"), open_writer(tmp_path / "s.act", make=True) as writer:
        writer.define(made)


def test_first_ids_follow_on(tmp_path: Path) -> None:
    trees = {"dataset": "t", "first_tree_id": 3, "n_trees": 5}
    rows = {"dataset": "r", "first_token_id": 4096, "n_ids": 2048, "first_sequence_id": 8, "n_sequences": 900}
    assert Ids.after([], {"dataset": "t"}) == (0, 0)
    assert Ids.after([trees], {"dataset": "u"}) == (8 * 256, 8)
    assert Ids.after([trees], {"task": "tokens", "rows_per_shard": 1024}) == (2048, 8)
    assert Ids.after([trees, rows], {"dataset": "u", "task": "trees"}) == (908 * 256, 908)
    assert Ids.after([trees, rows], {"task": "tokens", "stride": 4096}) == (8192, 908)
