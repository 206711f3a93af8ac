"""The tokens and labels of a user's query, checked, and the guesses of a user's baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore.errors import BadInput
from actstore.queries import read_sql
from actstore.queries.probes.baselines import check_shares, name_of, named_in

if TYPE_CHECKING:
    from actstore.store import Store

OF_THE_RUN = ("run", "dataset")  # parameters that the study sets
LEAST = 2  # test documents or sequences: one gives no interval, since every resample is itself
SIDES = ("train", "test")
SHOWN = 3  # classes that a message names
ABOUT = """
-- unit: the first sequence of the same document; of sequences without documents, the sequence itself
select
    token_id,
    sequence_id,
    if(document is null, sequence_id, min(sequence_id) over (partition by document)) as unit,
    document is not null as of_document,
    token::varchar as token,
    position,
    sequences.split::varchar as own_split
from tokens
join sequences using (sequence_id)
semi join (select unnest($ids) as token_id) using (token_id)
"""


@dataclass(frozen=True)
class Labelled:
    """The rows of a user's query.

    Attributes:
        tokens: n rows with columns token_id, label (as text), token, position, unit (see `units`),
            split.
        units_are: what the units are, in words: documents or sequences.
        y: int64 [n], the class of each row, a place in `classes`.
        classes: names of the classes, in the order of the labels.
    """

    tokens: pl.DataFrame
    y: np.ndarray
    classes: np.ndarray
    units_are: str

    @property
    def train(self) -> np.ndarray:
        """bool [n], rows for training."""
        return (self.tokens["split"] == "train").to_numpy()

    @property
    def units(self) -> np.ndarray:
        """int64 [n], the document or sequence of each row; rows of several are independent.

        A document is named by the first of its sequences among the rows.
        """
        return self.tokens["unit"].to_numpy()


def sql_of(query: str | Path) -> str:
    """The text of a query, or of the .sql file that is named in its place.

    Raises:
        BadInput: the file cannot be read.
    """
    text = str(query).strip()
    return read_sql(text, "query") if text.endswith(".sql") else text.rstrip(";").rstrip()


def parameters(store: Store, run: str, sql: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a query's parameters: the user's, and $run and $dataset where they are used.

    Raises:
        BadInput: the user gives a value to $run or $dataset.
    """
    if taken := [name for name in OF_THE_RUN if name in params]:
        raise BadInput(f"the study itself gives ${taken[0]} its value, from the run; leave `-p {taken[0]}` out")
    dataset = store.sql("select dataset from runs where run = $run", {"run": run}).item()
    return {**(named_in(sql, {"run": run, "dataset": dataset}) or {}), **params}


def labelled(store: Store, run: str, sql: str, params: Mapping[str, Any]) -> Labelled:
    """Run a query for labels in the session of a run, and check that probes can use its rows.

    Args:
        store: an open store.
        run: name of the run.
        sql: a query that yields token_id, label and, if the sequences' own split is not meant,
            split.
        params: values of its parameters.

    Raises:
        BadInput: a column is missing or has another type; a label or token_id is NULL; a token
            comes twice or is none of the run's; the rows of a document or sequence are on both
            sides of the split; or a class, or one side of the split, has too few rows.
    """
    found = store.of(run).sql(sql, dict(params) or None)
    _check_columns(found, run)
    about = store.of(run).sql(ABOUT, {"ids": found["token_id"].to_list()})
    unknown = found.join(about, on="token_id", how="anti")
    if len(unknown) and store.whole is store:  # a store without the trees of a set lacks theirs on purpose
        raise BadInput(
            f"the query yields {len(unknown):,} token ids that are no tokens of the dataset of run {run!r}, the first being "
            f"{unknown['token_id'][0]}; choose them from `tokens`, which holds only those of the run"
        )
    tokens = found.join(about, on="token_id", how="inner", maintain_order="left")
    split = pl.col("split").cast(pl.String) if "split" in found.columns else pl.col("own_split")
    by_name = tokens["label"].dtype in (pl.Enum, pl.Categorical)  # whose own order is not that of the text
    classes = (tokens["label"].cast(pl.String) if by_name else tokens["label"]).unique().sort().cast(pl.String)
    units_are = "documents" if tokens["of_document"].any() else "sequences"
    tokens = tokens.select(
        "token_id", pl.col("label").cast(pl.String), "token", "position", "unit", split.alias("split")
    )
    number = {name: place for place, name in enumerate(classes.to_list())}
    y = np.array([number[label] for label in tokens["label"].to_list()], np.int64)
    _check_split(tokens, run, units_are)
    _check_classes(tokens, run)
    return Labelled(tokens, y, classes.to_numpy(), units_are)


def _check_columns(found: pl.DataFrame, run: str) -> None:
    """Refuse rows without a token_id or a label that a probe can be fitted to."""
    if lacking := [name for name in ("token_id", "label") if name not in found.columns]:
        raise BadInput(
            f"the query yields {', '.join(found.columns)}, and no {' and no '.join(lacking)}; it yields token_id, label and, "
            "where wanted, split (`… as label`)"
        )
    if not len(found):
        raise BadInput(f"the query yields no row in run {run!r}; look at what the run holds (store.of({run!r}).sql(…))")
    ids, labels = found["token_id"], found["label"]
    if not ids.dtype.is_integer():
        raise BadInput(f"the query's token_id holds {ids.dtype}; it holds ids of tokens, whole numbers")
    for column in (ids, labels):
        if n := column.null_count():
            first = found.filter(column.is_null())["token_id"][0]
            raise BadInput(
                f"the query's {column.name} is NULL in {n:,} of {len(found):,} rows, the first at token_id {first}; leave them "
                f"out with `where {column.name} is not null`"
            )
    _check_kind(labels, "the query's label")
    if twice := len(found) - ids.n_unique():
        first = found.filter(ids.is_duplicated())["token_id"][0]
        raise BadInput(
            f"the query yields {twice:,} tokens again, the first being token_id {first}; give one row per token, or rows would "
            "count twice"
        )


def _check_kind(column: pl.Series, what: str) -> None:
    """Refuse a column that does not hold classes."""
    kind = column.dtype
    if not (kind.is_integer() or kind in (pl.String, pl.Boolean, pl.Categorical, pl.Enum)):
        raise BadInput(
            f"{what} holds {kind}; a probe reads classes: give text, whole numbers or true and false, such as "
            f"`(value > 0.5) as {column.name}`"
        )


def _check_split(tokens: pl.DataFrame, run: str, units_are: str) -> None:
    """Refuse a split with other values than train and test, and one that cuts what depends."""
    strange = tokens.filter(~pl.col("split").is_in(SIDES).fill_null(False))
    if len(strange):
        raise BadInput(
            f"the query's split is {strange['split'][0]!r} in {len(strange):,} rows; it is 'train' or 'test', as in `sequences`"
        )
    sides = tokens.group_by("unit", maintain_order=True).agg(pl.col("split").n_unique())
    cut = sides.filter(pl.col("split") > 1)
    if len(cut):
        first = f"that of sequence_id {cut['unit'][0]}" if units_are == "documents" else f"sequence_id {cut['unit'][0]}"
        raise BadInput(
            f"the query's split puts rows of {len(cut):,} {units_are} on both sides, the first being {first}; rows of one "
            f"{units_are[:-1]} depend on each other: split by {'document' if units_are == 'documents' else 'sequence_id'}"
        )
    n_train, n_test = (tokens.filter(split=side)["unit"].n_unique() for side in SIDES)
    if not n_train or n_test < LEAST:
        raise BadInput(
            f"the query's rows in run {run!r} are of {n_train:,} training and {n_test:,} test {units_are}; 1 and {LEAST} are "
            f"needed: choose rows of more {units_are}, or ingest more"
        )


def _check_classes(tokens: pl.DataFrame, run: str) -> None:
    """Refuse a single class, and classes that cannot be learned or tested."""
    counted = tokens.group_by("label", maintain_order=True).agg(
        pl.len().alias("n"), (pl.col("split") == "train").sum().alias("n_train")
    )
    leave = "leave them out, or join classes (`qualify count(*) over (partition by label) > 1`)"
    if len(counted) < 2:
        raise BadInput(
            f"all {len(tokens):,} rows of the query in run {run!r} have the label {counted['label'][0]!r}; a probe tells two "
            "classes or more apart"
        )
    if len(single := counted.filter(n=1)):
        raise BadInput(f"{_named(single)} one row each, which is in training or in test and not in both; {leave}")
    if len(unseen := counted.filter(n_train=0)):
        raise BadInput(f"{_named(unseen)} no row in training, so no probe can know them; {leave}")


def _named(classes: pl.DataFrame) -> str:
    """`2 classes ('a', 'b') have`."""
    names = ", ".join(map(repr, classes["label"].head(SHOWN).to_list())) + ", …" * (len(classes) > SHOWN)
    return f"{len(classes):,} classes ({names}) have" if len(classes) > 1 else f"1 class ({names}) has"


def guesses(
    store: Store, run: str, files: Iterable[str | Path], rows: Labelled, params: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Score a user's baselines: queries that yield token_id, guess and, if not sure, p.

    Args:
        store: an open store.
        run: name of the run, in whose session the queries run.
        files: paths of .sql files.
        rows: the rows of the query for labels.
        params: values of $run, $dataset and the user's parameters; unused ones are ignored.

    Returns:
        Name → float64 [n_test], the probability that the guess is right; and name → SQL.

    Raises:
        BadInput: a file cannot be read, lacks a column, guesses none of the test rows, or gives
            impossible probabilities.
    """
    scored: dict[str, np.ndarray] = {}
    used: dict[str, str] = {}
    test = rows.tokens.filter(~pl.Series(rows.train)).select("token_id", "label")
    for file in files:
        sql, name = read_sql(file, "baseline"), name_of(file)
        given = store.of(run).sql(sql, named_in(sql, params))
        if lacking := [column for column in ("token_id", "guess") if column not in given.columns]:
            raise BadInput(
                f"the baseline {str(file)!r} yields {', '.join(given.columns)}, and no {' and no '.join(lacking)}; it yields "
                "token_id, guess and, where a guess is not sure, its probability p"
            )
        _check_kind(given["guess"], f"the guess of the baseline {str(file)!r}")
        p = pl.col("p").cast(pl.Float64) if "p" in given.columns else pl.lit(1.0)
        given = given.select(pl.col("token_id").cast(pl.Int64), pl.col("guess").cast(pl.String), p.alias("p"))
        both = test.join(given.drop_nulls(), on="token_id", how="left", maintain_order="left")
        if not both["guess"].count():
            raise BadInput(f"the baseline {str(file)!r} guesses the label of none of the {len(test):,} test rows")
        right = pl.when(pl.col("guess") == pl.col("label")).then("p").otherwise(0.0)
        of_token = both.group_by("token_id", maintain_order=True).agg(
            right.sum().alias("right"), pl.col("p").sum().alias("all"), pl.col("p").min().alias("least")
        )
        numbers = of_token.fill_null(0.0)
        check_shares(name, float(numbers["least"].to_numpy().min()), float(numbers["all"].to_numpy().max()))
        scored[name], used[name] = numbers["right"].to_numpy(), sql
    return scored, used


def files_in(named: str | Path | Sequence[str | Path] | None) -> list[str | Path]:
    """Paths from a comma-separated text or a list."""
    if named is None:
        return []
    return list(named) if isinstance(named, list | tuple) else [part.strip() for part in str(named).split(",")]
