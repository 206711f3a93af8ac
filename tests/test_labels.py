"""Labels of one's own: a table that is committed, joined, verified and dropped; and tables of one query."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import duckdb
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from actstore import verbs
from actstore.catalog import build, tables, witness
from actstore.catalog.declared import declare
from actstore.cli import main
from actstore.commits import log
from actstore.errors import BadInput, LimitReached, NotStored
from actstore.reading.opened import Opened
from actstore.store import Store
from actstore.upkeep.repair import repair
from actstore.upkeep.verify import verify
from actstore.writing.contents import batch_contents
from actstore.writing.plan import RunPlan
from actstore.writing.writer import open_writer
from tests.damaged import damage, flip
from tests.stores import fake, files

DOCUMENTS = ["né à Rome 🏛️ ok", "plain"]
PIECE = 3  # characters of a token


def text_store(root: Path, cut: int = 8) -> None:
    """A run without sites over DOCUMENTS, in tokens of PIECE characters and sequences of `cut` characters."""
    pieces = [(row, at, text[at : at + cut]) for row, text in enumerate(DOCUMENTS) for at in range(0, len(text), cut)]
    starts = [len(DOCUMENTS[row][:at].encode()) for row, at, _ in pieces]
    documents = pl.DataFrame({"text": [part for *_, part in pieces], "text_start": starts}).with_columns(
        sequence_id=pl.int_range(pl.len(), dtype=pl.Int64)
    )
    relation = declare("stories_documents", "sequence", "documents", "stories", documents)
    lengths = [-(-len(part) // PIECE) for *_, part in pieces]
    dataset = {
        **{"dataset": "stories", "n_positions": max(lengths), "task": "tokens", "layout": "rows", "n_ids": 1024},
        **{"n_sequences": len(pieces), "n_tokens": sum(lengths), "rows_per_shard": 1024, "rows_per_chunk": 4},
        **{"vocabulary": "v", "recipe": json.dumps({"column": "text"})},
    }
    model = {"weights_sha256": hashlib.sha256(b"w").hexdigest(), "model": "m", "weights_kept": False}
    vocabulary = pl.DataFrame({"vocabulary": "v", "number": [0], "token": ["x"]})
    parts = {"vocabularies": vocabulary, "relations": pl.DataFrame([relation.row()])}
    plan = RunPlan("text", model, b"", dataset, [], {"device": "cpu", "versions": "{}"}, parts)
    with open_writer(root, make=True) as writer:
        first = writer.define(plan)
        tokens, listed = list[dict[str, Any]](), list[dict[str, Any]]()
        for number, ((row, _, part), start) in enumerate(zip(pieces, starts, strict=True)):
            begins = first.token_id + len(tokens)
            for position, at in enumerate(range(0, len(part), PIECE)):
                stop = start + len(part[: at + PIECE].encode())
                place = {"start": start + len(part[:at].encode()), "stop": stop, "position": position}
                tokens.append({"token_id": first.token_id + len(tokens), "token": "x", "number": 0, **place})
                tokens[-1]["sequence_id"] = first.sequence_id + number
            listed.append(
                {
                    **{"sequence_id": first.sequence_id + number, "dataset": "stories", "first_token_id": begins},
                    **{"n_tokens": lengths[number], "hash": number, "split": "train", "document": row},
                }
            )
        rows = {
            "listed_sequences": pl.DataFrame(listed),
            "tokens": pl.DataFrame(tokens),
            "stories_documents": relation.fit(documents.with_columns(pl.col("sequence_id") + first.sequence_id)),
        }
        contents = batch_contents(plan, 0, rows, {}, {})
        writer.commit_batch(plan, 0, first.sequence_id, len(pieces), contents)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels") / "trees"
    fake("r", "d").store(root)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    fake("r", "d").store(tmp_path / "s")
    return tmp_path / "s"


LABELS = pl.DataFrame(
    {"token_id": [258, 0, 2], "score": [0.5, None, 2.0], "kind": ["a", "é", None], "Of It": [[1, 2], [], None]}
)


def none(*asked: object) -> dict[str, bytes]:
    raise AssertionError("nothing is to be computed again")


def test_labels_are_joined_verified_and_part_of_the_snapshot(root: Path) -> None:
    with Store(root) as before:
        before.label("mine", LABELS)
        assert "mine" not in before.tables
    with Store(root, check=True) as store:
        assert store.snapshot == before_snapshot(root)
        assert "mine" in store.tables
        joined = store.sql(
            'select token_id, position, score, kind, "Of It" from tokens join mine using (token_id) order by 1'
        )
        assert joined.drop("position").equals(LABELS.sort("token_id"))
        assert joined["position"].to_list() == [0, 2, 2]
        X, rows = store.read("select token_id, score from mine where score is not null", site="resid_post.0")
        assert X[:, 0].tolist() == [0, 1]
        assert rows["score"].to_list() == [2.0, 0.5]
    assert not verify(root).findings


def before_snapshot(root: Path) -> int:
    return len(list((root / "log").iterdir()))


def test_labels_are_compared_with_the_tokens_between_their_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison with all tokens takes time that follows what is stored."""
    asked, ask = list[tuple[str, Any]](), Opened.sql

    def sql(store: Opened, query: str, params: Any = None, *args: Any) -> pl.DataFrame:
        asked.append((query, params))
        return ask(store, query, params, *args)

    monkeypatch.setattr(Opened, "sql", sql)
    given = pl.DataFrame({"token_id": [2, 0, 1], "x": 1})
    verbs.label(root, "marks", given)
    [(query, params)] = [one for one in asked if "given_labels" in one[0]]
    with duckdb.connect(str(root / tables.CATALOG), read_only=True) as connection:
        connection.register("given_labels", given.to_arrow())
        [(_, profile)] = connection.execute(f"explain (analyze, format json) {query}", params).fetchall()
        n_tokens = connection.execute("select count(*) from tokens").fetchall()[0][0]
    assert json.loads(profile)["query"]["total_intermediate_rows"] == 2 * len(given), "no other token leaves the scan"
    assert n_tokens > len(given)


def test_labels_of_sequences_come_from_any_file(root: Path, tmp_path: Path) -> None:
    frame = pl.DataFrame({"topic": ["x", "y"], "sequence_id": [1, 3]})
    for ending, write in (("csv", frame.write_csv), ("jsonl", frame.write_ndjson), ("parquet", frame.write_parquet)):
        file = tmp_path / f"of.{ending}"
        write(file)
        done = CliRunner().invoke(main, ["label", str(root), f"of_{ending}", str(file), "--on", "sequence_id"])
        assert done.exit_code == 0, done.output
        assert "2 sequence_ids" in done.output
        with Store(root) as store:
            held = store.sql(f"select * from trees join of_{ending} on tree_id = sequence_id order by tree_id")
            assert held["topic"].to_list() == ["x", "y"]


def test_a_damaged_part_of_labels_is_mended_from_the_catalog(root: Path) -> None:
    verbs.label(root, "mine", LABELS)
    for path in ("parts/mine/mine.parquet", "parts/relations/mine.parquet"):
        committed = (root / path).read_bytes()
        damage(root / path, flip(0))
        assert [finding.path for finding in verify(root).damage] == [path]
        assert repair(root, none).mended == [path]
        assert (root / path).read_bytes() == committed


def test_a_catalog_that_lacks_labels_or_holds_others_is_found(root: Path) -> None:
    import duckdb

    from actstore.catalog.hash_note import note_hash

    verbs.label(root, "mine", LABELS)
    catalog = root / tables.CATALOG
    catalog.chmod(0o644)
    with duckdb.connect(str(catalog)) as connection:
        connection.execute("update mine set score = 7 where token_id = 2")
    note_hash(root, catalog, None)
    assert "rows of table mine" in " ".join(finding.what for finding in verify(root).damage)


def test_labels_are_dropped_and_brought_again(root: Path) -> None:
    verbs.label(root, "mine", LABELS)
    with pytest.raises(BadInput, match=r"replace them \(--replace, replace=True\), add rows to them \(--add"):
        verbs.label(root, "mine", LABELS)
    verbs.drop(root, label="mine")
    with Store(root) as store:
        assert "mine" not in store.tables
        assert store.sql("from relations").is_empty()
    verbs.label(root, "mine", LABELS.select("token_id"))
    with Store(root) as store:
        assert store.sql("from mine").columns == ["token_id"]
    assert not verify(root).findings


def rows_there(root: Path, query: str = "from mine order by all") -> list[tuple[Any, ...]]:
    with Store(root, check=True) as store:
        return store.sql(query).rows()


def test_labels_take_the_place_of_others_in_one_commit(root: Path, tmp_path: Path) -> None:
    verbs.label(root, "mine", LABELS)
    before = Store(root)
    commits = before_snapshot(root)
    for number, frame in enumerate([{"sequence_id": [1], "topic": ["x"]}, {"token_id": [0, 2], "y": [1.5, 2.5]}], 1):
        with Store(root) as store:
            store.label("mine", frame, on=next(iter(frame)), replace=True)  # type: ignore[arg-type]
        assert before_snapshot(root) == commits + number
        assert rows_there(root) == list(zip(*frame.values(), strict=True))
        assert not verify(root).damage
    assert before.sql("select score from mine order by token_id")["score"].to_list() == [None, 2.0, 0.5]
    build.publish(root, from_nothing=True)
    assert rows_there(root) == [(0, 1.5), (2, 2.5)]
    assert len(rows_there(root, "from relations")) == 1
    with open_writer(root):
        pass
    assert not verify(root).findings
    assert len([path for path in files(root) if "mine" in path]) == 2  # the old rows are gone
    verbs.copy(root, tmp_path / "copied")
    assert rows_there(tmp_path / "copied") == [(0, 1.5), (2, 2.5)]
    assert not verify(tmp_path / "copied").findings
    verbs.drop(root, label="mine")
    verbs.label(root, "mine", LABELS, replace=True)  # there is none to be replaced
    with open_writer(root):
        pass
    assert len(rows_there(root)) == 3
    assert not verify(root).findings


def test_a_writer_that_ends_after_the_commit_leaves_the_old_labels_or_the_new_ones(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbs.label(root, "mine", {"token_id": [0], "y": [1]})
    frame = pl.DataFrame({"token_id": [2], "y": [2]})
    with monkeypatch.context() as killed, open_writer(root) as writer:
        writer.label(declare("mine", "token", "labels", "mine", frame), frame, replace=True)
        killed.setattr(writer, "publish", lambda: 0)
    assert rows_there(root) == [(0, 1)]
    assert not verify(root).damage
    with open_writer(root):
        pass
    assert rows_there(root) == [(2, 2)]
    assert not verify(root).findings


def test_damaged_labels_that_replaced_others_are_mended_from_the_catalog(root: Path) -> None:
    for _ in range(2):
        verbs.label(root, "mine", LABELS, replace=True)
    number = before_snapshot(root)
    for path in (f"parts/mine/mine-{number:06d}.parquet", f"parts/relations/mine-{number:06d}.parquet"):
        committed = (root / path).read_bytes()
        damage(root / path, flip(0))
        assert path in [finding.path for finding in verify(root).damage]
        assert path in repair(root, none).mended
        assert (root / path).read_bytes() == committed


def test_a_commit_of_labels_that_drops_what_is_not_their_own_is_found(root: Path) -> None:
    verbs.label(root, "mine", {"token_id": [0]})
    verbs.label(root, "mine", {"token_id": [2]}, replace=True)
    last = log.manifests(root)[-1]
    assert last.dropped
    others = replace(last, dropped=replace(last.dropped, name="other"))
    of_run = replace(last, dropped=replace(last.dropped, kind="run"))
    for wrong, said in ((others, "what it drops"), (of_run, "what it drops"), (replace(last, kind="drop"), "mine")):
        assert said in dict(witness.at_odds([*log.manifests(root)[:-1], wrong]))[last.number]


def test_rows_are_added_to_labels(root: Path) -> None:
    verbs.label(root, "mine", {"token_id": [258, 0], "y": [1, 2], "kind": ["b", "a"]})
    commits = before_snapshot(root)
    added = verbs.label(root, "mine", {"kind": ["c"], "y": [0.5], "token_id": [2]}, add=True)
    assert added.rows() == rows_there(root) == [(0, 2.0, "a"), (2, 0.5, "c"), (258, 1.0, "b")]
    assert before_snapshot(root) == commits + 1
    assert not verify(root).damage
    refused: list[tuple[Any, str, type[Exception], str]] = [
        (
            {"token_id": [4, 2, 0], "y": [1] * 3, "kind": ["x"] * 3},
            "mine",
            BadInput,
            "2 of 3 token_ids have a row .* the first 0",
        ),
        (
            {"token_id": [4], "y": [1]},
            "mine",
            BadInput,
            "have the columns token_id, y, kind, and the new rows token_id, y",
        ),
        ({"token_id": [4], "y": [[1]], "kind": ["x"]}, "mine", BadInput, "do not fit labels mine"),
        ({"token_id": [4], "y": [1]}, "mime", NotStored, r"no labels 'mime' \(did you mean 'mine'"),
    ]
    for frame, name, error, said in refused:
        with pytest.raises(error, match=said):
            verbs.label(root, name, frame, add=True)
    with pytest.raises(BadInput, match="have the columns"):
        verbs.label(root, "mine", {"sequence_id": [4], "y": [1], "kind": ["x"]}, "sequence_id", add=True)
    with pytest.raises(BadInput, match="choose one"):
        verbs.label(root, "mine", LABELS, add=True, replace=True)
    assert before_snapshot(root) == commits + 1


def test_spans_that_are_added_are_numbered_after_those_there(tmp_path: Path) -> None:
    text_store(tmp_path / "s")
    for start in (0, 3):
        span = {"dataset": ["stories"], "row": [1], "start": [start], "end": [start + 1]}
        verbs.label(tmp_path / "s", "mine", span, "span", add=start > 0)
    assert rows_there(tmp_path / "s", "select span, start from mine join tokens using (token_id) order by all") == [
        (0, 0),
        (1, 3),
    ]


def test_the_documents_of_a_dataset_are_not_replaced_by_labels(tmp_path: Path) -> None:
    text_store(tmp_path / "s")
    for how in ({"replace": True}, {}):
        with pytest.raises(BadInput, match="holds the documents of dataset 'stories'"):
            verbs.label(tmp_path / "s", "stories_documents", {"sequence_id": [0]}, "sequence_id", **how)  # type: ignore[arg-type]


def test_the_command_replaces_and_adds(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    label = ["label", str(root), "mine", str(file)]
    for content, options, exit_code, n in (
        ("token_id,y\n0,1\n", [], 0, 1),
        ("token_id,y\n2,1\n", [], 2, 1),
        ("token_id,y\n2,1\n", ["--add"], 0, 2),
        ("token_id,z\n2,1\n", ["--replace"], 0, 1),
        ("token_id,z\n2,1\n", ["--replace", "--add"], 2, 1),
    ):
        file.write_text(content)
        done = CliRunner().invoke(main, [*label, *options])
        assert done.exit_code == exit_code, done.output
        assert len(rows_there(root)) == n


def test_a_run_of_one_dataset_sees_the_labels_of_its_tokens(root: Path) -> None:
    fake("other", "e", seed=4).store(root)
    verbs.label(root, "mine", {"token_id": [0, 5 * 256], "y": [1, 2]})
    with Store(root) as store:
        assert store.read("select token_id, y from mine", "other", "resid_post.0")[1]["y"].to_list() == [2]
        assert store.of("r").sql("select y from mine")["y"].to_list() == [1]


@pytest.mark.parametrize(
    ("name", "labels", "on", "error", "said"),
    [
        ("tokens", {"token_id": [0]}, "token_id", BadInput, "a table or view of every store"),
        ("Mine", {"token_id": [0]}, "token_id", BadInput, "lower-case"),
        ("select", {"token_id": [0]}, "token_id", BadInput, "a word of SQL"),
        ("mine", {"id": [0]}, "token_id", BadInput, "lack the column token_id; they have id"),
        ("mine", {"token_id": [0]}, "tree_id", BadInput, "got on 'tree_id'"),
        (
            "mine",
            {"token_id": [0, 0, 2, 1, 1]},
            "token_id",
            BadInput,
            "2 of 3 token_ids have more than one row, the first 0",
        ),
        (
            "mine",
            {"token_id": [0, 255, 2**40]},
            "token_id",
            NotStored,
            "2 of 3 rows .* the first 255; are they of another",
        ),
        ("mine", {"sequence_id": [5]}, "sequence_id", NotStored, "of no sequence"),
        ("mine", {"token_id": [0.0]}, "token_id", BadInput, "Float64; it must be an integer"),
        ("mine", {"token_id": [0, None]}, "token_id", BadInput, "1 of 2 rows"),
        ("mine", {"token_id": [0], "role": ["x"]}, "token_id", BadInput, "a column role, as tokens or sequences do"),
        ("mine", {"token_id": [0], "Split": ["x"]}, "token_id", BadInput, "a column Split"),
        ("mine", {"token_id": [0], "y": [{"a": 1}]}, "token_id", BadInput, "column 'y' is Struct"),
        ("mine", {"token_id": []}, "token_id", BadInput, "no rows"),
        ("mine", {"token_id": [0], "x": [1], "X": [1]}, "token_id", BadInput, "two columns of one name"),
        ("mine", "no.csv", "token_id", BadInput, "there is no file no.csv"),
        ("mine", "no.xls", "token_id", BadInput, "ends in .parquet, .csv"),
    ],
)
def test_bad_labels_are_refused_counted_and_the_first_is_named(
    trees: Path, name: str, labels: Any, on: Any, error: type[Exception], said: str
) -> None:
    before = len(list((trees / "log").iterdir()))
    with pytest.raises(error, match=said):
        verbs.label(trees, name, labels, on)
    assert len(list((trees / "log").iterdir())) == before


def test_the_documents_of_a_dataset_cannot_take_the_name_of_labels(root: Path) -> None:
    verbs.label(root, "stories_documents", {"token_id": [0]})
    with pytest.raises(BadInput, match="which is the table of label"):
        text_store(root)
    assert not verify(root).damage


# Spans of characters.


def test_a_span_of_characters_labels_every_token_that_it_overlaps(tmp_path: Path) -> None:
    fake("r", "d").store(tmp_path / "s")  # so that ids do not begin at 0
    text_store(tmp_path / "s")
    text = DOCUMENTS[0]
    spans = {"city": text.index("Rome"), "end": text.index("ok")}
    ends = {"city": spans["city"] + 4, "end": spans["end"] + 2}
    frame = pl.DataFrame(
        {
            **{"dataset": "stories", "row": [0, 0, 1], "start": [*spans.values(), 0], "end": [*ends.values(), 2]},
            "what": [*spans, "word"],
        }
    )
    with Store(tmp_path / "s") as store:
        store.label("entities", frame, on="span")
    with Store(tmp_path / "s") as store:
        found = store.sql(
            "select document, start, stop, span, what from entities join tokens using (token_id) "
            "join sequences using (sequence_id) order by token_id"
        )
        by_hand = []
        for row, document in enumerate(DOCUMENTS):
            for sequence in range(0, len(document), 8):
                for at in range(sequence, min(sequence + 8, len(document)), PIECE):
                    stop = min(at + PIECE, sequence + 8, len(document))
                    for number, (of_row, start, end) in enumerate(frame.select("row", "start", "end").iter_rows()):
                        if of_row == row and at < end and stop > start:
                            in_bytes = len(document[:at].encode()), len(document[:stop].encode())
                            by_hand.append((row, *in_bytes, number, frame["what"][number]))
        assert found.rows() == by_hand
        assert len(by_hand) == 6
    assert not verify(tmp_path / "s").findings


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"dataset": ["storys"]}, NotStored, "did you mean 'stories'"),
        ({"dataset": ["d"]}, NotStored, "holds no text"),
        ({"row": [7]}, NotStored, "row 7"),
        ({"end": [99]}, BadInput, "whose stored text has 5"),
        ({"start": [2], "end": [2]}, BadInput, "1 of 1 spans .* the first in row 0 of the file"),
        ({"start": [-1]}, BadInput, "at characters -1 to 3"),
        ({"start": [0.5]}, BadInput, "start must be an integer"),
        (
            {"start": [0, 1], "end": [2, 3], "row": [1, 1], "dataset": ["stories"] * 2},
            BadInput,
            "two spans cover one token",
        ),
        ({"span": [1]}, BadInput, "a column span"),
    ],
)
def test_bad_spans_are_refused(tmp_path: Path, change: dict[str, Any], error: type[Exception], said: str) -> None:
    text_store(tmp_path / "s")
    if change == {"dataset": ["d"]}:
        fake("r", "d").store(tmp_path / "s")
    with pytest.raises(error, match=said):
        verbs.label(
            tmp_path / "s", "mine", {"dataset": ["stories"], "row": [1], "start": [0], "end": [3], **change}, "span"
        )


# Tables of one query.


def test_a_table_of_one_query_is_joined_in_every_way_of_asking(trees: Path) -> None:
    mine = pl.DataFrame({"token_id": [258, 0], "y": ["b", "a"]})
    query = "select token_id, y, position from tokens join mine using (token_id) order by token_id"
    with Store(trees) as store:
        for asked in (store, store.of("r")):
            assert asked.sql(query, tables={"mine": mine})["y"].to_list() == ["a", "b"]
        assert store.sql(query, tables={"mine": mine}, timeout=60)["y"].to_list() == ["a", "b"]
        vectors = store.sql(
            "select act(token_id, 'r', 'resid_post.0') as x, y from mine order by y", tables={"mine": mine.lazy()}
        )
        assert vectors["x"].to_numpy()[:, 0].tolist() == [0, 1]
        X, rows = store.read(query, site="resid_post.0", tables={"mine": mine.to_arrow()})
        assert X[:, 1].tolist() == [0, 2]
        assert rows["y"].to_list() == ["a", "b"]
        assert store.explain(query, site="resid_post.0", tables={"mine": mine}).rows == 2
        ((X, columns),) = store.batches(query, site="resid_post.0", tables={"mine": mine}, shuffle=False)
        assert columns["y"] == ["a", "b"]
        assert np.asarray(X)[:, 1].tolist() == [0, 2]
        scanned = store.scan(site="resid_post.0", tables={"mine": mine}).filter(pl.col("y") == "b").collect()
        assert scanned["token_id"].to_list() == [258]
        assert scanned["x"].to_numpy()[:, 1].tolist() == [2]
        with pytest.raises(BadInput, match="mine"):
            store.sql(query)  # it was of those queries alone
        assert store.sql("select count(*) from tokens").item() > 2  # the functions outlive the copy
        assert store.sql("select act(token_id, 'r', 'resid_post.0') as x from tokens where token_id = 0").height == 1


def test_a_table_of_one_query_has_its_limits_and_opens_nothing(trees: Path, tmp_path: Path) -> None:
    big = pl.DataFrame({"n": np.arange(3000)})
    file = tmp_path / "secret.csv"
    file.write_text("a\n1\n")
    with Store(trees) as store:
        with pytest.raises(LimitReached):
            store.sql(
                "select count(*) from mine a, mine b, mine c, mine d where a.n + b.n + c.n = d.n",
                tables={"mine": big},
                timeout=0.5,
            )
        for query in (
            f"select * from mine, read_csv('{file}')",
            f"from '{file}'",
            "create table t as from mine",
            "insert into mine values (1)",
            "drop view mine",
        ):
            with pytest.raises(BadInput):
                store.sql(query, tables={"mine": big})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens": {"a": [1]}}, "a table or view of every store"),
        ({"r's": {"a": [1]}}, "no identifier"),
        ({"mine": {"a": [1], "A": [2]}}, "two columns named a"),
        ({"mine": 3}, "for table 'mine'"),
        ({"mine": {}}, "columns"),
        ([1], "for tables"),
    ],
)
def test_a_table_of_one_query_that_cannot_be_is_refused(trees: Path, given: Any, said: str) -> None:
    with Store(trees) as store, pytest.raises(BadInput, match=said):
        store.sql("select 1", tables=given)


def test_a_table_of_one_query_cannot_hide_labels(root: Path) -> None:
    verbs.label(root, "mine", LABELS)
    with Store(root) as store, pytest.raises(BadInput, match="which the store holds"):
        store.sql("from mine", tables={"mine": {"a": [1]}})


def test_the_command_line_reads_the_file_before_the_session_does_anything(trees: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("token_id,y\n0,a\n258,b\n")
    query = "select token_id, y from mine join tokens using (token_id) order by y"
    own = tmp_path / "own.sql"
    own.write_text(f"-- without a header\n{query};\n")
    table = ["--table", f"mine={file}"]
    for command in (["sql", query], ["read", query, "--site", "resid_post.0"], ["query", str(own)]):
        done = CliRunner().invoke(main, [command[0], str(trees), *command[1:], *table, "--json"])
        assert done.exit_code == 0, done.output
        assert [row["y"] for row in json.loads(done.output)] == ["a", "b"]
    out = tmp_path / "x.npy"
    done = CliRunner().invoke(
        main, ["export", str(trees), str(out), "--query", query, "--site", "resid_post.0", *table]
    )
    assert done.exit_code == 0, done.output
    assert np.load(out)[:, 1].tolist() == [0, 2]
    wrong = CliRunner().invoke(main, ["sql", str(trees), "select 1", "--table", "mine"])
    assert wrong.exit_code == 2
    assert "give NAME=FILE" in wrong.output


def test_every_command_that_takes_sql_takes_a_table(trees: Path) -> None:
    having = {
        option: {name for name, command in main.commands.items() if option in _options(command)}
        for option in ("-p", "--table")
    }
    assert having["-p"] <= having["--table"]


def _options(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


# Views of one's own.


def test_a_view_is_read_like_a_table_and_sees_the_run_that_is_asked(root: Path, tmp_path: Path) -> None:
    fake("other", "e", seed=4).store(root)
    verbs.label(root, "mine", {"token_id": [2, 0, 5 * 256], "y": [3, 1, 5]})
    query = "select token_id, y * 2 as z from mine join tokens using (token_id) -- doubled"
    with Store(root) as store:
        store.view("doubled", query)
        with pytest.raises(BadInput, match="Table with name doubled does not exist"):
            store.sql("from doubled")
    with Store(root, check=True) as store:
        every = "select z from Doubled order by z"
        assert store.sql(every)["z"].to_list() == [2, 6, 10]
        assert store.sql(every, timeout=60)["z"].to_list() == [2, 6, 10]
        assert store.of("r").sql(every)["z"].to_list() == [2, 6]
        assert store.sql(f"explain {every}").height
        assert store.sql("describe doubled")["column_name"].to_list() == ["token_id", "z"]
        assert "doubled" in store.tables
        assert "doubled" in store.of("r").tables
        assert store.sql('select "doubled".z from (pivot doubled on z using count(*)) p, doubled').height == 9
        assert store.sql("with doubled as (select 1 as one) from doubled").rows() == [(1,)]
        assert store.sql("select doubled from (select 7 as doubled)").rows() == [(7,)]
        X, rows = store.read("from doubled order by z", "r", "resid_post.0")
        assert (X[:, 1].tolist(), rows["z"].to_list()) == ([0, 2], [2, 6])
        ((_, columns),) = store.batches("from doubled", "r", "resid_post.0", shuffle=False)
        assert sorted(columns["z"].tolist()) == [2, 6]
        with pytest.raises(BadInput, match="which the store holds"):
            store.sql("from doubled", tables={"doubled": {"a": [1]}})
    assert not verify(root).findings
    build.publish(root, from_nothing=True)
    verbs.copy(root, tmp_path / "copied")
    for place in (root, tmp_path / "copied"):
        assert len(rows_there(place, "from doubled")) == 3


def test_a_view_is_replaced_dropped_and_says_what_it_lacks(root: Path) -> None:
    verbs.label(root, "mine", {"token_id": [2, 0], "y": [3, 1]})
    verbs.view(root, "v", "select y from mine")
    for name, error in (("v", "holds a view of that name"), ("mine", "that table holds labels")):
        with pytest.raises(BadInput, match=error):
            verbs.view(root, name, "select 1 as one")
    with pytest.raises(BadInput, match="that is a view"):
        verbs.label(root, "v", {"token_id": [2]}, replace=True)
    done = CliRunner().invoke(main, ["view", str(root), "v", "select y + 1 as y from mine", "--replace"])
    assert done.exit_code == 0, done.output
    assert rows_there(root, "from v order by y") == [(2,), (4,)]
    verbs.drop(root, label="mine")
    with Store(root) as store:
        with pytest.raises(BadInput, match="view v cannot be read: Catalog Error: Table with name mine does not exist"):
            store.sql("from v")
        assert store.sql("select 1 as v").rows() == [(1,)]
    verbs.drop(root, label="v")
    assert rows_there(root, "from relations") == []
    with open_writer(root):
        pass
    assert not verify(root).findings


@pytest.mark.parametrize(
    ("name", "query", "said"),
    [
        ("tokens", "select 1 as one", "a table or view of every store"),
        ("v", "select $x as x", "lacks a value for \\$x"),
        ("v", "select ? as x", "lacks a value"),
        ("v", "select 1; select 2", "got 2 statements"),
        ("v", "select 1) union (select 2", "syntax error"),
        ("v", "create table x as select 1", "cannot do CREATE"),
        ("v", "select * from read_text('/etc/hosts')", "disabled by configuration"),
        ("v", "from v", "Table with name v does not exist"),
        ("v", "select y from other_view", "Table with name other_view does not exist"),
        ("v", "select act(tree_id, 'r', 'embed') as x from tokens", "takes tree_id for a token_id"),
        ("v", "select tree_id as token_id, act(token_id, 'r', 'embed') as x from trees", "tree_id renamed"),
        ("v", "select tree_id, greedy_right from outcomes", "yield the column run"),
        ("v", f"select '{'x' * 100_000}' as x", "100,000 at most"),
        ("v", " ", "100,000 at most"),
        ("v", 3, "give SQL as text"),
    ],
)
def test_a_view_that_cannot_be_is_refused(root: Path, name: str, query: Any, said: str) -> None:
    verbs.view(root, "other_view", "select 1 as y")
    before = before_snapshot(root)
    with pytest.raises(BadInput, match=said):
        verbs.view(root, name, query)
    assert before_snapshot(root) == before
