"""A corpus: documents or token ids as a set of sequences, packed into batches.

    documents.py  the files, piece by piece
    tokens.py     a text as tokens, cut to a context
    spool.py      the sequences, in temporary files
    drawn.py      one batch, and its rows

In the layout `rows`, a batch is as many whole sequences, in their order, as fit its ids. Sequences
that all have one length lie in a grid.

A sequence is one document, or a part of one that is longer than the context; two documents never
share a sequence. The split is chosen by the hash of what is kept of the document: of its text, or
of its token ids where no text is given. All parts of a document, and documents that are equal, are
therefore on one side of the split. Two documents that differ may still share a part: it has one
`hash`, and may be on both sides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash

from actstore.arrays.address import CHUNKS_PER_SHARD, MOST_POSITIONS, ROWS_PER_CHUNK, stride_of
from actstore.catalog.declared import Relation, as_name, declare
from actstore.errors import BadInput, NotStored
from actstore.ingest.corpus.documents import TEXT_START, Documents, open_documents
from actstore.ingest.corpus.drawn import Drawn, hashes
from actstore.ingest.corpus.spool import Held, Spool
from actstore.ingest.corpus.tokens import NO_PLACE, Encoded, Vocabulary, check_cut, encode
from actstore.ingest.task import SPLITS, Read, split_numbers

IDS_PER_BATCH = ROWS_PER_CHUNK * CHUNKS_PER_SHARD  # 16,384: 32 MiB a site at d_model 512


@dataclass(frozen=True)
class Corpus:
    """A set of sequences of tokens; see ingest/task.py.

    Attributes:
        columns: the set's row of `datasets`, without its first ids.
        tables: rows of `vocabularies` and `relations`, by table.
        draw: gives a batch by its number.
        spool: the temporary files; None for a stored set.
    """

    columns: Mapping[str, Any]
    tables: Mapping[str, pl.DataFrame] = field(repr=False)
    draw: Callable[[int], Drawn] = field(repr=False)
    spool: Spool | None = field(default=None, repr=False)
    task: str = "tokens"

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary files; no batch can be drawn from then on."""
        if self.spool:
            self.spool.close()

    @property
    def name(self) -> str:
        """Name of the set."""
        return str(self.columns["dataset"])

    @property
    def layout(self) -> str:
        """`rows` or `grid`."""
        return str(self.columns["layout"])

    @property
    def n_sequences(self) -> int:
        """Sequences of the set."""
        return int(self.columns["n_sequences"])

    @property
    def n_tokens(self) -> int:
        """Tokens of the set."""
        return int(self.columns["n_tokens"])

    @property
    def n_positions(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.columns["n_positions"])

    @property
    def n_batches(self) -> int:
        """Batches of the set."""
        if self.layout == "grid":
            return -(-self.n_sequences // int(self.columns["rows_per_chunk"]))
        return int(self.columns["n_ids"]) // int(self.columns["rows_per_shard"])

    def row(self) -> dict[str, Any]:
        """The set's row of `datasets`, without its first ids."""
        return dict(self.columns)

    def parts(self) -> dict[str, pl.DataFrame]:
        """The rows of `vocabularies`, and of `relations` if there is a documents' table."""
        return dict(self.tables)

    def drawn(self, batch: int) -> Drawn:
        """Draw one batch.

        Raises:
            NotStored: the rows of a stored set's batch are not there.
        """
        return self.draw(batch)

    def check(self, vocabulary: Vocabulary, n_ctx: int) -> None:
        """Check that a model can read the sequences.

        Raises:
            BadInput: the model has another vocabulary, or a shorter context.
        """
        recipe = json.loads(self.columns["recipe"])
        if vocabulary.sha256 != recipe["tokenizer"]:
            raise BadInput(
                f"dataset {self.name!r} holds tokens of the tokenizer {_short(recipe['tokenizer'])}, and this model's is "
                f"{_short(vocabulary.sha256)}; make a dataset of the model's own tokens (--dataset, --text)"
            )
        if recipe["largest_id"] >= vocabulary.d_vocab:
            raise BadInput(
                f"dataset {self.name!r} holds the token id {recipe['largest_id']}, and this model has 0 to "
                f"{vocabulary.d_vocab - 1}; make a dataset of the model's own tokens (--dataset)"
            )
        if self.n_positions > n_ctx:
            raise BadInput(
                f"dataset {self.name!r} has a sequence of {self.n_positions} tokens, and this model takes {n_ctx}; "
                f"make a dataset that is cut to it (--dataset, --context {n_ctx})"
            )

    def said(self) -> str:
        """What the set is, in one line."""
        recipe = json.loads(self.columns["recipe"])
        parts = [
            f"{recipe['documents']:,} documents as {self.n_sequences:,} sequences of {self.n_tokens:,} tokens, "
            f"{self.n_positions:,} at most"
        ]
        if recipe["cut_documents"]:
            parts.append(
                f"{recipe['cut_documents']:,} documents were longer than {recipe['context']:,} tokens ({recipe['cut']})"
            )
        if recipe["duplicates"]:
            parts.append(f"{recipe['duplicates']:,} sequences repeat another exactly")
        return "; ".join(parts)


def from_text(
    source: Any,
    vocabulary: Vocabulary,
    *,
    n_ctx: int,
    context: int | None = None,
    cut: str = "split",
    column: str = "text",
    name: str | None = None,
) -> Corpus:
    """Documents as a set of sequences.

    The documents are read once, and their tokens are kept in temporary files.

    Args:
        source: see `open_documents`.
        vocabulary: of the model.
        n_ctx: most tokens that the model takes.
        context: most tokens of a sequence; default: n_ctx.
        cut: what becomes of a longer document: it is `split`, or `truncate`d, or is an `error`.
        column: the column with the texts.
        name: of the set; default: the file's name.

    Raises:
        BadInput: an argument has no meaning, the documents cannot be read, or some are empty, or
            longer than the context where that is an error.
    """
    documents = open_documents(source, column)
    dtype = documents.schema[documents.column]
    if not isinstance(dtype, (pl.String, pl.Categorical, pl.Enum)):
        raise BadInput(
            f"column {documents.column!r} of {documents.said} is {dtype}; texts are strings: name their column (--column), "
            "or give token ids (--tokens)"
        )

    def encoded(piece: pl.DataFrame) -> Iterator[Encoded | None]:
        texts = piece[documents.column].cast(pl.String).to_list()
        found = encode([text for text in texts if text], vocabulary)
        return (next(found) if text else None for text in texts)

    return _corpus(
        documents, vocabulary, encoded, check_cut(cut, context, n_ctx), cut, name or _name(documents, "documents")
    )


def from_tokens(
    source: Any,
    vocabulary: Vocabulary,
    *,
    n_ctx: int,
    context: int | None = None,
    cut: str = "split",
    column: str = "tokens",
    name: str | None = None,
) -> Corpus:
    """Token ids as a set of sequences; see `from_text`.

    Args:
        column: the column with the token ids of each document, a list of integers.
    """
    documents = open_documents(source, column)
    dtype = documents.schema[column]
    inner = dtype.inner if isinstance(dtype, (pl.List, pl.Array)) else None
    if inner is None or not inner.is_integer():
        raise BadInput(
            f"column {column!r} of {documents.said} is {dtype}; token ids are lists of integers: name their column (--column)"
        )

    def encoded(piece: pl.DataFrame) -> Iterator[Encoded | None]:
        for ids in piece[column].cast(pl.List(pl.Int64), strict=False):
            if ids is None or not len(ids):
                yield None
            else:
                numbers = ids.fill_null(-1).to_numpy()
                none = np.full(len(numbers), NO_PLACE, np.int32)
                yield Encoded(numbers, none, none)

    return _corpus(
        documents, vocabulary, encoded, check_cut(cut, context, n_ctx), cut, name or _name(documents, "token_ids")
    )


def _short(sha256: str | None) -> str:
    return "none" if sha256 is None else sha256[:12]


def _name(documents: Documents, otherwise: str) -> str:
    """A dataset's name, made of a file's."""
    stem = Path(documents.names[0]).stem if documents.names else otherwise
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "-", stem).lstrip("._=,+-")[:100] or otherwise


@dataclass
class _Refused:
    """Faults of documents, counted, with the first of each kind."""

    said: str
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, what: str, n: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + n
        self.first.setdefault(kind, what)

    def check(self, vocabulary: Vocabulary, context: int) -> None:
        advice = {
            "empty": ("documents of {said} are empty", "drop them"),
            "outside": (
                "token ids of {said} are outside the vocabulary",
                f"this model has 0 to {vocabulary.d_vocab - 1}: use the tokens of its own tokenizer",
            ),
            "long": (
                f"documents of {{said}} are longer than {context} tokens",
                "raise --context, or choose --cut split or --cut truncate",
            ),
        }
        for kind, (what, todo) in advice.items():
            if kind in self.counts:
                raise BadInput(
                    f"{self.counts[kind]:,} {what.format(said=self.said)}, the first being {self.first[kind]}; {todo}"
                )


def _corpus(
    documents: Documents,
    vocabulary: Vocabulary,
    encoded: Callable[[pl.DataFrame], Iterable[Encoded | None]],
    context: int,
    cut: str,
    name: str,
) -> Corpus:
    of_text = not isinstance(documents.schema[documents.column], (pl.List, pl.Array))
    relation = _relation(documents, of_text, name)
    spool, refused, n_documents, n_cut = Spool(), _Refused(documents.said), 0, 0
    try:
        for piece in documents.read():
            sequences, rows = list[Encoded](), list[int]()
            for row, document in enumerate(encoded(piece)):
                at = n_documents + row
                if document is None or not len(document):
                    refused.add("empty", f"row {at}")
                    continue
                wrong = (document.numbers < 0) | (document.numbers >= vocabulary.d_vocab)
                if wrong.any():
                    refused.add("outside", f"{document.numbers[wrong][0]} in row {at}", int(wrong.sum()))
                if len(document) > context:
                    n_cut += 1
                    if cut == "error":
                        refused.add("long", f"row {at} of {len(document):,}")
                    if context <= document.n_before + document.n_after:
                        raise BadInput(
                            f"got a context of {context} tokens, and the tokenizer adds {document.n_before + document.n_after} to "
                            "each sequence; raise --context"
                        )
                pieces = document.cut(context, cut)
                sequences += pieces
                rows += [row] * len(pieces)
            if sequences and not refused.counts:
                _add(
                    spool, sequences, piece, np.array(rows), n_documents, documents.column if of_text else "", relation
                )
            n_documents += len(piece)
        refused.check(vocabulary, context)
        if not n_documents:
            raise BadInput(f"{documents.said} holds no document")
        held = spool.hold()
        recipe = {
            "input": documents.names,
            "column": documents.column,
            "documents": n_documents,
            "context": context,
            "cut": cut,
            "cut_documents": n_cut,
            "duplicates": int(spool.n_sequences - len(np.unique(held.arrays["hashes"]))),
            "add_special_tokens": True if of_text else None,
            "tokenizer": vocabulary.sha256,
            "largest_id": int(held.arrays["numbers"].max()),
            "ids_sha256": held.sha256["numbers"],
            "lengths_sha256": held.sha256["lengths"],
        }
        return _packed(spool, held, vocabulary, relation, name, of_text, recipe)
    except BaseException:
        spool.close()
        raise


def _relation(documents: Documents, of_text: bool, name: str) -> Relation | None:
    """The declaration of the documents' table; None where it would hold its key alone."""
    columns: dict[str, pl.DataType] = {"sequence_id": pl.Int64()}
    comments = dict[str, str]()
    for column, dtype in documents.schema.items():
        if column != documents.column:
            columns[column] = pl.String() if isinstance(dtype, pl.Struct) else dtype
            comments[column] = f"of {documents.said}" + (", JSON" if isinstance(dtype, pl.Struct) else "")
        elif of_text:
            columns |= {column: pl.String(), TEXT_START: pl.Int64()}
            comments[column] = "the part of the document's text that the sequence covers"
            comments[TEXT_START] = "byte of the document's text, UTF-8, at which this part begins"
    if len(columns) == 1:
        return None
    return declare(as_name(name), "sequence", "documents", name, pl.DataFrame(schema=columns), comments)


def _add(
    spool: Spool,
    sequences: list[Encoded],
    piece: pl.DataFrame,
    rows: np.ndarray,
    first_document: int,
    text: str,
    relation: Relation | None,
) -> None:
    """Put sequences into the spool.

    Args:
        rows: intp [sequences]: the piece's row that each was cut from.
        text: name of the text's column; "" without one.
    """
    numbers = np.concatenate([each.numbers for each in sequences])
    lengths = np.array([len(each) for each in sequences])
    frame, contents = None, [each.numbers.astype("<u4").tobytes() for each in sequences]
    if relation:
        json_columns = [name for name, dtype in piece.schema.items() if isinstance(dtype, pl.Struct)]
        frame = piece.with_columns(pl.col(name).struct.json_encode() for name in json_columns)[rows]
        if text:
            parts = list(_texts(piece[text].cast(pl.String).to_list(), sequences, rows.tolist()))
            contents = [part.encode() for part, _ in parts]
            frame = frame.with_columns(
                pl.Series(text, [part for part, _ in parts], pl.String),
                pl.Series(TEXT_START, [start for _, start in parts], pl.Int64),
            )
        ids = pl.Series(np.arange(spool.n_sequences, spool.n_sequences + len(sequences)))
        frame = relation.fit(frame.with_columns(sequence_id=ids))
    spool.add(
        frame,
        numbers=numbers,
        starts=np.concatenate([each.starts for each in sequences]),
        stops=np.concatenate([each.stops for each in sequences]),
        lengths=lengths,
        documents=first_document + rows,
        hashes=hashes(numbers, lengths),
        content=_of_documents(contents, rows.tolist()),
    )


def _of_documents(contents: Iterable[bytes], rows: list[int]) -> np.ndarray:
    """uint64 [sequences]: xxh3-64 of the parts of each sequence's document, one after another.

    Args:
        contents: the part of each sequence.
        rows: the document of each sequence.
    """
    found: dict[int, Any] = {}
    for content, row in zip(contents, rows, strict=True):
        found.setdefault(row, xxhash.xxh3_64()).update(content)
    return np.array([found[row].intdigest() for row in rows], np.uint64)


def _texts(texts: list[str], sequences: list[Encoded], rows: list[int]) -> Iterator[tuple[str, int]]:
    """The part of its document's text that each sequence covers, and the byte where it begins.

    A part goes to the beginning of the next one; the last goes to the end of the text, or, where a
    document was truncated, to the end of its last token.
    """
    for i, (sequence, row) in enumerate(zip(sequences, rows, strict=True)):
        is_first, is_last = i == 0 or rows[i - 1] != row, i + 1 == len(rows) or rows[i + 1] != row
        if is_first:
            content, begin = texts[row].encode(), 0
        if sequence.is_cut_short:
            end = int(sequence.stops.max())
        else:
            end = len(content) if is_last else max(begin, _first_place(sequences[i + 1]))
        yield content[begin:end].decode(), begin
        begin = end


def _first_place(sequence: Encoded) -> int:
    """The byte at which the first token with a place begins."""
    places = sequence.starts[sequence.starts != NO_PLACE]
    return int(places[0]) if len(places) else 0


def _packed(
    spool: Spool,
    held: Held,
    vocabulary: Vocabulary,
    relation: Relation | None,
    name: str,
    of_text: bool,
    recipe: dict[str, Any],
) -> Corpus:
    lengths = held.arrays["lengths"]
    n, longest, shortest = len(lengths), int(lengths.max()), int(lengths.min())
    if longest > MOST_POSITIONS:
        raise BadInput(f"a sequence has {longest:,} tokens; the most is {MOST_POSITIONS:,} (--context)")
    row: dict[str, Any] = {
        "dataset": name,
        "task": "tokens",
        "n_sequences": n,
        "n_tokens": spool.n_tokens,
        "n_positions": longest,
        "vocabulary": vocabulary.name,
        "recipe": json.dumps(recipe),
    }
    if n > 1 and longest == shortest:
        stride, most = stride_of(longest), max(1, IDS_PER_BATCH // longest)
        per_batch = -(-n // -(-n // most))  # batches of nearly one size: a short one is stored as long as the others
        bounds = np.append(np.arange(0, n, per_batch), n)
        row |= {"layout": "grid", "stride": stride, "rows_per_shard": None, "rows_per_chunk": per_batch}
        row["n_ids"] = n * stride
    else:
        stride, per_batch = None, max(IDS_PER_BATCH, 1 << (longest - 1).bit_length())
        bounds = pack(held.arrays["ends"], per_batch)
        row |= {"layout": "rows", "stride": None, "rows_per_shard": per_batch}
        row |= {"rows_per_chunk": per_batch // CHUNKS_PER_SHARD, "n_ids": (len(bounds) - 1) * per_batch}

    def draw(batch: int) -> Drawn:
        start, stop = int(bounds[batch]), int(bounds[batch + 1])
        tokens = held.tokens_of(start, stop)
        starts, stops = [np.array(held.arrays[name][tokens]) if of_text else None for name in ("starts", "stops")]
        return Drawn(
            start,
            np.array(lengths[start:stop], np.intp),
            np.array(held.arrays["numbers"][tokens]),
            starts,
            stops,
            np.array(held.arrays["documents"][start:stop]),
            pl.Series(split_numbers(np.array(held.arrays["content"][start:stop]))).cat.to(pl.Enum(SPLITS)),
            vocabulary.pieces,
            stride,
            relation.name if relation else "",
            held.rows.slice(start, stop) if held.rows else None,
        )

    tables = {"vocabularies": vocabulary.frame()}
    if relation:
        tables["relations"] = pl.DataFrame([relation.row()])
    return Corpus(row, tables, draw, spool)


def pack(ends: np.ndarray, room: int) -> np.ndarray:
    """Pack sequences into batches: whole, in their order, as many as fit.

    Args:
        ends: int64 [n]: the lengths of the sequences, summed up; none is longer than `room`.
        room: tokens of a batch.

    Returns:
        int64 [n_batches + 1]: the first sequence of each batch, and n.
    """
    bounds = [0]
    while bounds[-1] < len(ends):
        before = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, before + room, side="right")))
    return np.array(bounds)


def stored(row: Mapping[str, Any], read: Read, vocabulary: Vocabulary | None = None) -> Corpus:
    """A stored set of sequences, whose tokens are its rows.

    Args:
        row: of `datasets`.
        read: gives the set's stored rows.
        vocabulary: used if the store has lost the set's own.

    Raises:
        NotStored: the tokens' spellings are lost, and no vocabulary is given.
    """
    tables = {}
    try:
        tables["vocabularies"] = read("vocabularies", None)
        pieces = tables["vocabularies"].sort("number")["token"].to_list()
    except NotStored:
        if vocabulary is None or vocabulary.name != row["vocabulary"]:
            raise
        tables["vocabularies"], pieces = vocabulary.frame(), vocabulary.pieces
    with suppress(NotStored):
        tables["relations"] = read("relations", None)
    table = str(tables["relations"]["name"][0]) if "relations" in tables else ""

    def draw(batch: int) -> Drawn:
        tokens, listed, others = read("tokens", batch).sort("token_id"), None, None
        with suppress(NotStored):
            listed = read("listed_sequences", batch).sort("sequence_id")
        with suppress(NotStored):
            others = read(table, batch).sort("sequence_id") if table else None
        sequences = tokens["sequence_id"].to_numpy()
        begins = np.flatnonzero(np.diff(sequences, prepend=-1))
        start = int(sequences[0]) - row["first_sequence_id"]
        starts, stops = [
            tokens[name].fill_null(NO_PLACE).to_numpy() if name in tokens.columns else None
            for name in ("start", "stop")
        ]
        return Drawn(
            start,
            np.diff(begins, append=len(sequences)).astype(np.intp),
            tokens["number"].to_numpy().astype(np.uint32),
            starts,
            stops,
            None if listed is None else listed["document"].to_numpy(),
            None if listed is None else listed["split"].cast(pl.String).cast(pl.Enum(SPLITS), strict=False),
            pieces,
            row.get("stride"),
            table,
            None if others is None else others.with_columns(pl.col("sequence_id") - row["first_sequence_id"]),
        )

    columns = {name: value for name, value in row.items() if name not in ("first_token_id", "first_sequence_id")}
    return Corpus(columns, tables, draw)
