"""Documents from files, folders and frames, read piece by piece.

    .txt             a document is a block of lines between blank lines, as it is written, without
                     its last newline
    .jsonl .ndjson   a document per line
    .csv .parquet    a document per row
    a folder         what `datasets` saved (save_to_disk), or Parquet files in the order of their
                     names
    a frame          of polars, pandas or Arrow; or a list of texts or of token ids

A piece holds some hundred documents, so that memory does not grow with their number.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from actstore.errors import BadInput, nearest

DOCUMENTS_PER_PIECE = 500
CHARACTERS_PER_PIECE = 4_000_000  # of a text file, which has no rows to count
OURS = frozenset(  # columns of `sequences` and `tokens`: beside them a column of one of these names could not be told
    {
        *("sequence_id", "dataset", "first_token_id", "n_tokens", "hash", "split", "document"),
        *("token_id", "tree_id", "position", "token", "role", "edge", "node", "step", "number", "start", "stop"),
    }
)
TEXT_START = "text_start"
HALF = rb"\\u[dD][89abcdefABCDEF][0-9a-fA-F]{2}"  # in JSON: of a character beyond the first 65,536
PAIR = rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"


@dataclass(frozen=True)
class Documents:
    """Documents to be read once, from the first to the last.

    Attributes:
        names: the input's files, without their folders; empty for a frame.
        column: the column that holds the texts or the token ids.
        schema: columns and types of every piece.
        pieces: reads frames of some documents each.
    """

    names: list[str]
    column: str
    schema: pl.Schema
    pieces: Callable[[], Iterator[pl.DataFrame]]

    @property
    def others(self) -> list[str]:
        """The columns beside the texts or token ids."""
        return [name for name in self.schema.names() if name != self.column]

    @property
    def said(self) -> str:
        """The input's name in a message."""
        return ", ".join(self.names[:3]) + (" …" if len(self.names) > 3 else "") if self.names else "the frame"

    def read(self) -> Iterator[pl.DataFrame]:
        """Read the documents, piece by piece.

        Raises:
            BadInput: a file cannot be read.
        """
        with _reading(self.said):
            yield from self.pieces()


def open_documents(source: Any, column: str) -> Documents:
    """Find the documents of a file, a folder or a frame, and their columns; reads few of them.

    Args:
        source: a path, a frame (polars, pandas, Arrow), or a list.
        column: the column with the texts or the token ids.

    Raises:
        BadInput: there is no such file or column, the text is not UTF-8, the file cannot be read,
            or a column is named like one of the store's own.
    """
    if isinstance(source, (str, Path)):
        found = _of_path(Path(source), column)
    else:
        found = _of_frame(source, column)
    names = found.schema.names()
    if column not in names:
        there = ", ".join(names) or "none"
        raise BadInput(f"{found.said} has no column {column!r}{nearest(column, names)}; it has {there} (--column)")
    if taken := [name for name in names if name.lower() in OURS or (name.lower() == TEXT_START)]:
        raise BadInput(
            f"{found.said} has a column {taken[0]!r}, the name of a column of the store's own tables; rename it "
            f"(taken are {', '.join(sorted({*OURS, TEXT_START}))})"
        )
    return found


def _of_path(path: Path, column: str) -> Documents:
    if path.is_dir():
        return _of_folder(path, column)
    if not path.is_file():
        raise BadInput(f"there is no file {path}")
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl", ".ndjson", ".csv", ".parquet"):
        raise BadInput(
            f"got {path.name}; documents are read from .txt, .jsonl, .csv, .parquet, or a folder of datasets"
        )
    if not path.stat().st_size:
        raise BadInput(f"{path.name} is empty; it holds no document")
    if kind != ".parquet":
        check_utf8(path)
    if kind in (".jsonl", ".ndjson"):
        _check_surrogates(path)
    if kind == ".txt":
        schema = pl.Schema({"text": pl.String()})
        return Documents([path.name], "text", schema, lambda: _blocks(path))
    with _reading(path.name):
        if kind == ".csv":
            named = pl.scan_csv(path, infer_schema_length=0, glob=False).collect_schema().names()
            texts = {name: pl.String for name in (column,) if name in named}  # a text of digits is no number
            return _of_scan(
                pl.scan_csv(path, infer_schema_length=None, schema_overrides=texts, glob=False), [path.name], column
            )
        if kind == ".parquet":
            return _of_scan(pl.scan_parquet(path, glob=False, hive_partitioning=False), [path.name], column)
        # a name with wildcards polars would take for several files
        lines = io.BytesIO(path.read_bytes()) if re.search(r"[*?[]", str(path)) else path
        return _of_scan(pl.scan_ndjson(lines, infer_schema_length=None), [path.name], column)


def _of_folder(path: Path, column: str) -> Documents:
    state = path / "state.json"
    if state.is_file():
        with _reading(state.name):
            files = [path / Path(file["filename"]).name for file in json.loads(state.read_bytes())["_data_files"]]
            with pa.memory_map(str(files[0])) as first:
                schema = pl.from_arrow(pa.ipc.open_stream(first).schema.empty_table()).schema  # type: ignore[union-attr]
        return Documents([file.name for file in files], column, schema, lambda: _arrow(files))
    if (path / "dataset_dict.json").is_file():
        splits = sorted(folder.parent.name for folder in path.glob("*/state.json"))
        raise BadInput(f"{path} holds the datasets {', '.join(splits)}; name one, {path / (splits or ['train'])[0]}")
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise BadInput(f"{path} is no folder of documents: it has no state.json (save_to_disk) and no .parquet files")
    with _reading(path.name):
        scan = pl.scan_parquet(files, glob=False, hive_partitioning=False)
        return _of_scan(scan, [file.name for file in files], column)


def _of_frame(source: Any, column: str) -> Documents:
    if isinstance(source, pl.LazyFrame):
        with _reading("the frame"):
            return _of_scan(source, [], column)
    try:
        frame = source if isinstance(source, pl.DataFrame) else _as_frame(source, column)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError, pa.ArrowException) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"got documents that make no frame ({said}); give a path, a frame or a list") from error
    return Documents([], column, frame.schema, lambda: frame.iter_slices(DOCUMENTS_PER_PIECE))


def _as_frame(source: Any, column: str) -> pl.DataFrame:
    if hasattr(source, "__arrow_c_stream__"):
        return pl.DataFrame(source)
    if type(source).__module__.startswith("pandas"):
        return pl.from_pandas(source)
    return pl.DataFrame({column: list(source)})


def _of_scan(scan: pl.LazyFrame, names: list[str], column: str) -> Documents:
    def pieces() -> Iterator[pl.DataFrame]:
        return scan.collect_batches(maintain_order=True, chunk_size=DOCUMENTS_PER_PIECE)

    return Documents(names, column, scan.collect_schema(), pieces)


def _arrow(files: Iterable[Path]) -> Iterator[pl.DataFrame]:
    """The record batches of Arrow streams, as `datasets` saves them."""
    for file in files:
        with pa.memory_map(str(file)) as held:
            for batch in pa.ipc.open_stream(held):
                frame = pl.from_arrow(pa.Table.from_batches([batch]))
                assert isinstance(frame, pl.DataFrame)
                yield from frame.iter_slices(DOCUMENTS_PER_PIECE)


def _blocks(path: Path) -> Iterator[pl.DataFrame]:
    """The blocks of lines of a text file."""
    piece, size = list[str](), 0
    for block in _split(path):
        piece.append(block)
        size += len(block)
        if len(piece) >= DOCUMENTS_PER_PIECE or size >= CHARACTERS_PER_PIECE:
            yield pl.DataFrame({"text": piece})
            piece, size = [], 0
    if piece:
        yield pl.DataFrame({"text": piece})


def _split(path: Path) -> Iterator[str]:
    lines = list[str]()
    with path.open(encoding="utf-8-sig", newline="") as file:  # line ends stay as they are
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield re.sub(r"(\r\n|\r|\n)\Z", "", "".join(lines))
                lines = []
    if lines:
        yield re.sub(r"(\r\n|\r|\n)\Z", "", "".join(lines))


def check_utf8(path: Path) -> None:
    """Check that a file is UTF-8 text.

    Raises:
        BadInput: it is not; the message names the first byte that is wrong.
    """
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        try:
            while block := file.read(1 << 20):
                read += len(block)
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            at = read - len(error.object) + error.start
            raise BadInput(
                f"{path.name} is not UTF-8 text: byte {at:,} is 0x{error.object[error.start]:02x}; save it as UTF-8"
            ) from error


def _check_surrogates(path: Path) -> None:
    """Refuse half of a character in JSON, such as \\ud800 alone, which polars reads as NUL."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if b"\\ud" in line.lower():
                left = re.sub(PAIR, b"", line.replace(b"\\\\", b""))
                if found := re.search(HALF, left):
                    raise BadInput(
                        f"{path.name}, line {number:,}, holds half of a character ({found[0].decode()}, a lone surrogate); "
                        "write the text anew in Unicode"
                    )


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what polars, Arrow and the system say of a file into one line."""
    try:
        yield
    except BadInput:
        raise
    except (
        *(OSError, KeyError, TypeError, ValueError, IndexError, pa.ArrowException),
        *(pl.exceptions.PolarsError, pl.exceptions.PanicException),
    ) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"{name} cannot be read as documents ({said})") from error
