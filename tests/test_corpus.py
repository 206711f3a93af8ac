"""Text and token ids as sequences: nothing is lost between a document and its rows, and each fault is one line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.arrays.address import CHUNKS_PER_SHARD, Ids
from actstore.catalog.declared import parsed
from actstore.catalog.part_types import every_column
from actstore.errors import BadInput, NotStored
from actstore.ingest.corpus import corpus as corpora
from actstore.ingest.corpus.corpus import Corpus, from_text, from_tokens, pack
from actstore.ingest.corpus.documents import OURS
from actstore.ingest.corpus.drawn import Drawn
from actstore.ingest.corpus.tokens import Vocabulary
from actstore.writing.parts import as_stored
from tests.tokenizers_made import tokenizer, vocabulary

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
FIRST = Ids(32_768, 700)


def batches(corpus: Corpus) -> list[Drawn]:
    return [corpus.drawn(batch) for batch in range(corpus.n_batches)]


def every_row(corpus: Corpus, table: str) -> pl.DataFrame:
    """All rows of a table, as the batches bring them."""
    frames = []
    for number, drawn in enumerate(batches(corpus)):
        frames.append(drawn.rows(FIRST.of_batch(corpus.row(), number, drawn.start), corpus.name)[table])
    return pl.concat(frames)


def tokens_of(corpus: Corpus) -> list[list[int]]:
    frame = every_row(corpus, "tokens")
    return frame.group_by("sequence_id", maintain_order=True).agg("number")["number"].to_list()


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(6, 9))
def test_whole_sequences_are_packed_in_order_and_each_batch_is_as_full_as_it_can_be(
    lengths: list[int], bits: int
) -> None:
    bounds = pack(np.cumsum(lengths), 2**bits)
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    for start, stop in pairwise(bounds):
        assert 0 < sum(lengths[start:stop]) <= 2**bits
        assert sum(lengths[start : stop + 1]) > 2**bits or stop == len(lengths)


@given(st.lists(st.lists(st.integers(0, 339), min_size=1, max_size=300), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_packing_and_reading_back_changes_no_token(documents: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "IDS_PER_BATCH", 512)
        with from_tokens(documents, Vocabulary(None, None, 340), n_ctx=300) as corpus:
            assert tokens_of(corpus) == documents
            row, listed, tokens = corpus.row(), every_row(corpus, "listed_sequences"), every_row(corpus, "tokens")
            padded = [drawn.ids()[i, :n].tolist() for drawn in batches(corpus) for i, n in enumerate(drawn.lengths)]
            assert padded == documents
            ids, first = tokens["token_id"], listed["first_token_id"]
            assert ids.is_unique().all()
            assert FIRST.token_id <= ids.min()
            assert ids.max() < FIRST.token_id + row["n_ids"]  # type: ignore[operator]
            begins = first.gather(tokens["sequence_id"] - FIRST.sequence_id)
            assert (ids == begins + tokens["position"].cast(pl.Int64)).all()
            if row["layout"] == "rows":
                assert row["rows_per_shard"] == row["rows_per_chunk"] * CHUNKS_PER_SHARD
                ends = first + listed["n_tokens"] - 1
                assert ((first // row["rows_per_shard"]) == (ends // row["rows_per_shard"])).all()
            else:
                assert len({len(each) for each in documents}) == 1
            for value, each, split in zip(listed["hash"], documents, listed["split"], strict=True):
                assert value == xxhash.xxh3_64_intdigest(np.array(each, "<u4").tobytes())
                assert split == ("test" if value % 5 == 0 else "train")


@given(st.lists(TEXT, min_size=1, max_size=6), st.integers(3, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_bytes_of_a_token_are_its_piece_and_the_parts_of_a_document_are_its_text(
    texts: list[str], context: int, adds: bool
) -> None:
    made = tokenizer(adds)
    with from_text(texts, vocabulary(adds), n_ctx=context) as corpus:
        listed, tokens, parts = (every_row(corpus, table) for table in ("listed_sequences", "tokens", "documents"))
        assert listed["n_tokens"].max() <= context
        joined = listed.join(parts, "sequence_id")
        whole = joined.group_by("document", maintain_order=True).agg(pl.col("text").str.join(""))
        assert whole["text"].to_list() == texts
        documents = listed["document"].gather(tokens["sequence_id"] - FIRST.sequence_id)
        own = [[] for _ in texts]  # type: list[list[int]]
        for number, start, stop, document, piece in zip(
            tokens["number"], tokens["start"], tokens["stop"], documents, tokens["token"], strict=True
        ):
            if start is None:
                assert piece in ("<s>", "</s>")
                continue
            own[document].append(number)
            spelled = texts[document].encode()[start:stop]
            assert spelled.decode()  # whole characters
            surface = made.decode([number], clean_up_tokenization_spaces=False)
            if "\ufffd" not in surface and "<" not in spelled.decode():
                assert surface == spelled.decode()
        for text, numbers in zip(texts, own, strict=True):
            assert numbers == made(text, add_special_tokens=False)["input_ids"]


def test_each_piece_of_a_cut_document_has_the_tokens_that_the_tokenizer_adds() -> None:
    text = "the cat sat on the mat"
    whole = tokenizer(True)(text)["input_ids"]
    with from_text([text, "the"], vocabulary(True), n_ctx=9, context=4, cut="split") as corpus:
        assert [each[0] for each in tokens_of(corpus)] == [0] * corpus.n_sequences
        assert [each[-1] for each in tokens_of(corpus)] == [1] * corpus.n_sequences
        assert [n for each in tokens_of(corpus)[:-1] for n in each[1:-1]] == whole[1:-1]
        assert json.loads(corpus.row()["recipe"])["cut_documents"] == 1
    with from_text([text, "the"], vocabulary(True), n_ctx=9, context=4, cut="truncate") as corpus:
        assert tokens_of(corpus)[0] == [0, *whole[1:3], 1]
        parts = every_row(corpus, "documents")
        tokens = every_row(corpus, "tokens")
        assert parts["text"][0] == text[: tokens["stop"][2]]


def test_every_other_column_is_a_column_of_the_documents_table() -> None:
    frame = pl.DataFrame({"id": ["a", "b"], "text": ["the cat sat on the mat", "log"], "meta": [{"n": 1}, {"n": None}]})
    with from_text(frame, vocabulary(), n_ctx=4, name="My set") as corpus:
        relation = parsed(corpus.parts()["relations"].row(0, named=True))
        assert (relation.name, relation.owner, relation.grain) == ("my_set", "My set", "sequence")
        assert [name for name, *_ in relation.columns] == ["sequence_id", "id", "text", "text_start", "meta"]
        rows = every_row(corpus, "my_set")
        assert rows["id"].to_list() == ["a"] * (corpus.n_sequences - 1) + ["b"]
        assert json.loads(rows["meta"][-1]) == {"n": None}
        assert rows["sequence_id"].to_list() == list(range(700, 700 + corpus.n_sequences))


def test_sequences_of_one_length_lie_in_a_grid_of_batches_of_nearly_one_size() -> None:
    with from_tokens([[i] * 300 for i in range(60)], Vocabulary(None, None, 99), n_ctx=300) as corpus:
        row = corpus.row()
        assert (row["layout"], row["stride"], row["rows_per_chunk"], row["rows_per_shard"]) == ("grid", 512, 30, None)
        assert row["n_ids"] == 60 * 512
        assert [len(drawn) for drawn in batches(corpus)] == [30, 30]
        assert every_row(corpus, "listed_sequences")["first_token_id"].diff().drop_nulls().unique().to_list() == [512]


def test_exact_duplicates_share_a_split_and_are_counted() -> None:
    with from_text(["the cat", "the dog", "the cat"], vocabulary(), n_ctx=9) as corpus:
        listed = every_row(corpus, "listed_sequences")
        assert listed["hash"][0] == listed["hash"][2] != listed["hash"][1]
        assert listed["split"][0] == listed["split"][2]
        assert "1 sequences repeat another exactly" in corpus.said()


WORDS = st.sampled_from(["the cat", " sat", " on the mat", "größer", " 😀", "\n"])


@given(
    st.lists(st.lists(WORDS, min_size=1, max_size=8).map("".join), min_size=1, max_size=5),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    *[st.booleans(), st.sampled_from(["split", "truncate"])],
)
@settings(max_examples=50, deadline=None)
def test_no_document_is_on_both_sides_and_equal_documents_are_on_one(
    texts: list[str], chosen: list[int], numbered: bool, cut: str
) -> None:
    documents: list[Any] = [texts[i % len(texts)] for i in chosen]
    if numbered:
        documents = [tokenizer()(text)["input_ids"] for text in documents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "IDS_PER_BATCH", 8)  # parts of a document lie in several batches
        patch.setattr(corpora, "split_numbers", lambda hashes: (hashes % 2).astype("uint8"))
        made = (from_tokens if numbered else from_text)(documents, vocabulary(), n_ctx=4, cut=cut)
        with made:
            listed = every_row(made, "listed_sequences")
            assert every_row(stored(made), "listed_sequences").equals(listed)
            parts = every_row(made, "tokens").group_by("sequence_id", maintain_order=True).agg("number")["number"]
            texts_kept = every_row(made, "documents")["text"].to_list() if not numbered else []
    kept: list[bytes] = [b""] * len(documents)
    for i, document in enumerate(listed["document"]):
        kept[document] += np.array(parts[i], "<u4").tobytes() if numbered else texts_kept[i].encode()
    by_hand = [("train", "test")[xxhash.xxh3_64_intdigest(content) % 2] for content in kept]
    assert listed["split"].to_list() == [by_hand[document] for document in listed["document"]]
    sides: dict[str, set[str]] = {}
    for document, side in listed.select("document", "split").iter_rows():
        sides.setdefault(str(documents[document]), set()).add(side)
    assert {len(each) for each in sides.values()} == {1}
    if cut == "split":
        assert kept == [np.array(each, "<u4").tobytes() if numbered else each.encode() for each in documents]


def test_about_one_document_in_five_is_held_out() -> None:
    with from_tokens([[i % 340, i // 340, 7] * 2 for i in range(500)], Vocabulary(None, None, 340), n_ctx=3) as corpus:
        listed = every_row(corpus, "listed_sequences")
    sides = listed.group_by("document").agg(pl.col("split").n_unique().alias("n"), pl.col("split").first())
    assert sides["n"].to_list() == [1] * 500
    assert 70 < (sides["split"] == "test").sum() < 130


def stored(corpus: Corpus) -> Corpus:
    """The set as it is read back from its parts."""
    first = {"first_token_id": FIRST.token_id, "first_sequence_id": FIRST.sequence_id}
    parts: dict[tuple[str, int | None], pl.DataFrame] = {(name, None): rows for name, rows in corpus.parts().items()}
    for number, drawn in enumerate(batches(corpus)):
        rows = drawn.rows(FIRST.of_batch(corpus.row(), number, drawn.start), corpus.name)
        for table, frame in rows.items():
            parts[table, number] = as_stored(table, frame) if table in every_column() else frame

    def read(table: str, batch: int | None) -> pl.DataFrame:
        if (table, batch) not in parts:
            raise NotStored(table)
        return parts[table, batch]

    return corpora.stored({**corpus.row(), **first}, read)


@given(st.lists(TEXT, min_size=1, max_size=12), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_set_read_back_from_its_rows_is_the_one_from_the_file(texts: list[str], adds: bool, numbered: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "IDS_PER_BATCH", 256)
        known = vocabulary(adds)
        if numbered:
            source = pl.DataFrame({"tokens": [list(text.encode()) for text in texts], "n": range(len(texts))})
            made = from_tokens(source, known, n_ctx=200, name="texts")
        else:
            made = from_text(pl.DataFrame({"text": texts, "n": range(len(texts))}), known, n_ctx=20, name="texts")
        with made:
            again = stored(made)
            assert again.row() == made.row()
            assert again.n_batches == made.n_batches
            assert all(again.parts()[table].equals(rows) for table, rows in made.parts().items())
            for table in ("listed_sequences", "tokens", "texts"):
                assert every_row(again, table).equals(every_row(made, table)), table
            for one, other in zip(batches(made), batches(again), strict=True):
                np.testing.assert_array_equal(one.ids(), other.ids())
            again.check(known, 200)
            with pytest.raises(BadInput, match="holds tokens of the tokenizer"):
                again.check(vocabulary(not adds), 200)


STRANGE = ["x", "x" * 100_000, "a\x00b", "😀👩‍👩‍👧", "שלום עולם", "\u202e reversed", "e\u0301", " \t\n ", "<s> no </s>"]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "frame"])
def test_strange_texts_arrive_as_they_are(text: str, kind: str, tmp_path: Path) -> None:
    frame = pl.DataFrame({"text": [text]})
    source: Any = tmp_path / f"a.{kind}"
    if kind == "frame":
        source = frame
    else:
        (frame.write_ndjson if kind == "jsonl" else frame.write_parquet)(source)
    with from_text(source, vocabulary(), n_ctx=8192, name="strange") as corpus:
        assert "".join(every_row(corpus, "strange")["text"]) == text
        assert [n for each in tokens_of(corpus) for n in each] == tokenizer()(text, verbose=False)["input_ids"]


TABLE = pl.DataFrame({"text": ["the cat", "größer, als", "log"], "label": [1, 2, 3]})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder", "arrow", "lazy", "pyarrow", "list", "txt"])
def test_a_text_is_read_alike_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    source: Any = tmp_path / f"a file [1].{kind}"
    if kind == "folder":
        source = tmp_path / "texts"
        source.mkdir()
        TABLE[:2].write_parquet(source / "part-0.parquet")
        TABLE[2:].write_parquet(source / "part-1.parquet")
    elif kind == "arrow":
        datasets = pytest.importorskip("datasets")
        source = tmp_path / "saved"
        datasets.Dataset.from_dict(TABLE.to_dict(as_series=False)).save_to_disk(str(source), num_shards=2)
    elif kind == "txt":
        source.write_bytes(b"\xef\xbb\xbf\n \nthe cat\r\n\r\n" + "größer, als\n\n\nlog".encode())
    elif kind in ("lazy", "pyarrow", "list"):
        source = {"lazy": TABLE.lazy(), "pyarrow": TABLE.to_arrow(), "list": TABLE["text"].to_list()}[kind]
    else:
        {"jsonl": TABLE.write_ndjson, "csv": TABLE.write_csv, "parquet": TABLE.write_parquet}[kind](source)
    with from_text(source, vocabulary(), n_ctx=64) as corpus:
        rows = every_row(corpus, corpus.parts()["relations"]["name"][0])
        assert rows["text"].to_list() == TABLE["text"].to_list()
        if kind not in ("txt", "list"):
            assert rows["label"].to_list() == [1, 2, 3]
        assert corpus.name == {"arrow": "data-00000-of-00002", "folder": "part-0"}.get(
            kind, "documents" if kind in ("lazy", "pyarrow", "list") else "a-file-1-"
        )


def test_a_file_is_read_in_pieces(tmp_path: Path) -> None:
    n = 2_300
    pl.DataFrame({"text": [f"cat {i}" for i in range(n)], "i": range(n)}).write_csv(tmp_path / "a.csv")
    with from_text(tmp_path / "a.csv", vocabulary(), n_ctx=64) as corpus:
        assert every_row(corpus, "a")["i"].to_list() == list(range(n))
        assert every_row(corpus, "listed_sequences")["document"].to_list() == list(range(n))
        assert len(list(corpora.open_documents(tmp_path / "a.csv", "text").read())) > 2


def made(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no file": ("nowhere.txt", {}, r"there is no file nowhere\.txt"),
    "an empty file": (("a.txt", b""), {}, r"a\.txt is empty; it holds no document"),
    "blank lines": (("a.txt", b"\n \n"), {}, r"a\.txt holds no document"),
    "a csv of names": (("a.csv", b"text,n\n"), {}, r"a\.csv holds no document"),
    "latin-1": (("a.txt", b"gr\xf6\xdfer"), {}, r"a\.txt is not UTF-8 text: byte 2 is 0xf6; save it as UTF-8"),
    "latin-1 in jsonl": (("a.jsonl", b'{"text": "gr\xf6"}\n'), {}, r"a\.jsonl is not UTF-8 text: byte 12"),
    "cut off": (("a.txt", "größ".encode()[:-1]), {}, r"not UTF-8 text: byte 4 is 0xc3"),
    "a word document": (("a.docx", b"PK"), {}, r"got a\.docx; documents are read from \.txt"),
    "half": (
        ("a.jsonl", rb'{"text": "\ud83d\ude00 \\ud800"}' + b"\n" + rb'{"text": "\ude00\ud83d"}'),
        {},
        r"a\.jsonl, line 2, holds half of a character \(\\ude00, a lone surrogate\)",
    ),
    "half in a list": (["\ud800"], {}, r"got documents that make no frame"),
    "broken jsonl": (("a.jsonl", b'{"text": "a"}\n{"text":\n'), {}, r"a\.jsonl cannot be read as documents"),
    "no parquet": (("a.parquet", b"hello"), {}, r"a\.parquet cannot be read as documents"),
    "empty documents": (
        pl.DataFrame({"text": ["a", "", None]}),
        {},
        r"2 documents of the frame are empty, the first being row 1; drop them",
    ),
    "no such column": (
        pl.DataFrame({"texts": ["a"], "n": [1]}),
        {},
        r"the frame has no column 'text' \(did you mean 'texts'\?\); it has texts, n \(--column\)",
    ),
    "numbers": (pl.DataFrame({"text": [1]}), {}, r"column 'text' of the frame is Int64; texts are strings"),
    "ours": (pl.DataFrame({"text": ["a"], "Token_ID": [1]}), {}, r"has a column 'Token_ID', the name of a column of"),
    "no type": (pl.DataFrame({"text": ["a"], "b": [b"x"]}), {}, r"column 'b' is Binary; a table holds"),
    "twice": (pl.DataFrame({"text": ["a"], "b": [1], "B": [1]}), {}, r"two columns of one name"),
    "too long": (
        pl.DataFrame({"text": ["a", "the cat sat on the mat"]}),
        {"context": 2, "cut": "error"},
        r"1 documents of the frame are longer than 2 tokens, the first being row 1 of \d+; raise --context",
    ),
    "no cut": (
        ["a"],
        {"cut": "spilt"},
        r"got --cut 'spilt' \(did you mean 'split'\?\); there are split, truncate, error",
    ),
    "no context": (["a"], {"context": 0}, r"got a context of 0 tokens; this model takes 1 to 64"),
    "a long context": (["a"], {"context": 65}, r"got a context of 65 tokens; this model takes 1 to 64"),
    "no documents": ([], {}, r"the frame holds no document|is Null"),
    "no frame": (5, {}, r"got documents that make no frame"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_text_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    source, options, said = BAD[what]
    if isinstance(source, tuple):
        source = made(tmp_path / source[0], source[1])
    with pytest.raises(BadInput, match=said) as caught:
        from_text(source, vocabulary(), **{"n_ctx": 64, **options})
    assert "\n" not in str(caught.value)


BAD_IDS: dict[str, tuple[Any, str]] = {
    "outside": (
        [[1], [340, -1], [2]],
        r"2 token ids of the frame are outside the vocabulary, the first being 340 in row 1; this model has 0 to 339",
    ),
    "none": ([[1, None]], r"1 token ids of the frame are outside the vocabulary, the first being -1 in row 0"),
    "empty": ([[1], []], r"1 documents of the frame are empty, the first being row 1"),
    "fractions": ([[0.5]], r"column 'tokens' of the frame is List\(Float64\); token ids are lists of integers"),
    "no lists": ([1, 2], r"column 'tokens' of the frame is Int64"),
    "huge": (pl.DataFrame({"tokens": [[2**64 - 1]]}, schema={"tokens": pl.List(pl.UInt64)}), r"the first being -1"),
}


@pytest.mark.parametrize("what", BAD_IDS)
def test_what_is_no_token_id_is_refused_in_one_line(what: str) -> None:
    source, said = BAD_IDS[what]
    with pytest.raises(BadInput, match=said) as caught:
        from_tokens(source, vocabulary(), n_ctx=64)
    assert "\n" not in str(caught.value)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(BadInput, match="has no fast tokenizer"):
        from_text(["a"], Vocabulary(None, None, 10), n_ctx=64)


@pytest.mark.parametrize(("d_vocab", "n", "name"), [(305, 320, "h"), (320, 320, "h"), (400, 400, "h-400")])
def test_a_vocabulary_has_a_piece_for_every_number(d_vocab: int, n: int, name: str) -> None:
    made = Vocabulary(tokenizer(), "h", d_vocab)
    assert made.frame().columns == ["vocabulary", "number", "token"]
    assert made.frame()["number"].to_list() == list(range(n))
    assert set(made.frame()["vocabulary"]) == {name} == {made.name}
    spelled, n_known = made.frame()["token"].to_list(), len(tokenizer())
    assert spelled == made.pieces
    assert spelled[:n_known] == tokenizer().convert_ids_to_tokens(list(range(n_known)))
    assert spelled[n_known:] == [f"<{number}>" for number in range(n_known, n)]


def test_a_model_that_cannot_read_a_set_is_refused() -> None:
    with from_text(["the cat sat on the mat"], vocabulary(), n_ctx=64, name="a") as corpus:
        corpus.check(Vocabulary(tokenizer(), "made0", 999), 64)  # the same tokens, other padding
        with pytest.raises(BadInput, match=r"has a sequence of .* tokens, and this model takes 2; .*--context 2"):
            corpus.check(vocabulary(), 2)
    with from_tokens([[1, 50]], Vocabulary(None, None, 60), n_ctx=64, name="a") as corpus:
        corpus.check(Vocabulary(None, None, 51), 64)
        with pytest.raises(BadInput, match="holds the token id 50, and this model has 0 to 49"):
            corpus.check(Vocabulary(None, None, 50), 64)
        with pytest.raises(BadInput, match="holds tokens of the tokenizer none, and this model's is made0"):
            corpus.check(vocabulary(), 64)


def test_names_that_are_refused_are_those_of_the_tables() -> None:
    columns = every_column()
    assert {*columns["listed_sequences"], *columns["tokens"], "dataset"} == OURS


def test_the_temporary_files_go_with_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    corpus = from_text(["the cat"], vocabulary(), n_ctx=64)
    assert list(tmp_path.iterdir())
    corpus.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput):
        from_text(["the cat", ""], vocabulary(), n_ctx=64)
    assert not list(tmp_path.iterdir())
