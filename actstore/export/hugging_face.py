"""Activations as a Hugging Face dataset, in the form in which SAELens reads cached activations.

A row of the dataset holds `context` tokens: their activations in a column named like the hook,
Array2D((context, d_in)), the tokens' numbers in the model's vocabulary in `token_ids` (left out if
the store does not know them), and their ids in the store in `store_token_ids`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.errors import BadInput
from actstore.export.selected import Selected, converted, not_finite

if TYPE_CHECKING:
    from datasets import Features

SHARD_BYTES = 1 << 30  # of activations in a file of the dataset; SAELens wants 2 GB at most
MOST_CONTEXT = 128  # tokens of a row where the sequences do not tell another number

NUMBERS = """
select token_id, coalesce(number, list_position(vocabulary, token::varchar) - 1)::int as number
from tokens, (select models.vocabulary from runs join models using (weights_sha256))
"""


def check_installed() -> None:
    """Refuse to begin without the library `datasets`.

    Raises:
        BadInput: says how to install it.
    """
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise BadInput(
            "a Hugging Face dataset needs the library `datasets`; install it with pip install 'actstore[export]'"
        ) from error


def context_of(selected: Selected, context: int | None) -> int:
    """Tokens per row of the dataset.

    Args:
        context: the number asked for; default: as many as each sequence has among the rows, if
            that is one number, else MOST_CONTEXT, or all if they are fewer.

    Raises:
        BadInput: there are fewer tokens, or none were asked for.
    """
    n = len(selected.rows)
    if context is not None:
        if not 1 <= context <= n:
            raise BadInput(f"got context {context} for {n:,} tokens; a row holds 1 to {n:,} of them (--context)")
        return context
    of_each = selected.of_tokens("select token_id, sequence_id from tokens")["sequence_id"].rle().struct.field("len")
    return int(of_each[0]) if of_each.n_unique() == 1 and of_each[0] > 1 else min(MOST_CONTEXT, n)


def save(selected: Selected, folder: Path, context: int, dtype: str, advance: Callable[[int], None]) -> int:
    """Write a dataset into a folder; tokens after the last whole row are left out.

    Args:
        selected: the tokens; a row of several axes is written flat.
        folder: the folder, which exists and is empty.
        context: tokens per row.
        dtype: float32 or float16.
        advance: called with the number of tokens written.

    Returns:
        How many of the tokens' rows hold a NaN or an infinity.
    """
    from datasets import DatasetInfo
    from datasets.arrow_writer import ArrowWriter

    width, hook = int(np.prod(selected.row_shape)), selected.hook
    tokens = selected.of_tokens(NUMBERS)
    features = _features(hook, context, width, dtype, tokens["number"].null_count() == 0)
    n_rows, bad = len(tokens) // context, 0
    per_file = max(1, SHARD_BYTES // (context * width * np.dtype(dtype).itemsize))
    n_files = -(-n_rows // per_file)
    names = [f"data-{i:05d}-of-{n_files:05d}.arrow" for i in range(n_files)]
    for i, name in enumerate(names):
        stop = min((i + 1) * per_file, n_rows) * context
        with ArrowWriter(features=features, path=str(folder / name)) as writer:
            for start, X in selected.pieces(context, i * per_file * context, stop):
                of_piece = tokens[start : start + len(X)]
                columns = {
                    hook: converted(X, dtype).reshape(-1, context, width),
                    "token_ids": of_piece["number"].to_numpy().reshape(-1, context),
                    "store_token_ids": of_piece["token_id"].to_numpy().reshape(-1, context),
                }
                writer.write_batch({name: columns[name] for name in features})
                bad += not_finite(X)
                advance(start + len(X))
            writer.finalize()
    DatasetInfo(features=features).write_to_directory(str(folder))
    _write_state(folder, names)
    return bad


def _features(hook: str, context: int, width: int, dtype: str, has_numbers: bool) -> Features:
    from datasets import Array2D, Features, Sequence, Value

    of_tokens = {**({"token_ids": "int32"} if has_numbers else {}), "store_token_ids": "int64"}
    ids = {name: Sequence(Value(kind), length=context) for name, kind in of_tokens.items()}
    return Features({hook: Array2D((context, width), dtype), **ids})


def _write_state(folder: Path, names: list[str]) -> None:
    """The file that names a dataset's files, as `Dataset.save_to_disk` writes it."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": folder.name.encode().hex()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
