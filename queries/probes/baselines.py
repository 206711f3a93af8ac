"""The baselines of the study `probes`: how often a label is guessed right from the tree alone, without a network.

A baseline is a query that yields `token_id`, a column named like the label that it guesses, and `p`, the probability that it
gives to that guess: a guess that chooses among several gives each its share, and is scored by the p of the right one, which is
how often it would be right. A token that it does not guess counts as wrong. The named queries `baseline_…` are these, and
their headers say what each uses; a query of one's own, in a file, is scored beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.errors import BadInput
from actstore.queries import load, names
from actstore.queries.probes.figures import BASELINE as PREFIX
from actstore.queries.probes.figures import LABELS, MAJORITY

if TYPE_CHECKING:
    from actstore.store import Store

ROUNDING = 1e-6  # of probabilities that are added up
SCORES = """
with asked as (
    from ({tokens}) where split = 'test'
),
guesses as (
    from ({guesses})
)
select
    coalesce(sum(p) filter (guesses.{label} = asked.{label}), 0)::double as of_right,
    coalesce(sum(p), 0)::double as of_all,
    coalesce(min(p), 0)::double as least,
    count(guesses.{label}) as n_guesses
from asked
left join guesses using (token_id)
group by token_id
order by token_id
"""


@dataclass(frozen=True)
class Baseline:
    """A query that guesses a label.

    Attributes:
        name: of the query, `baseline_` first.
        label: which label it guesses, one of LABELS.
        sql: the query; its parameters are $run and $token_role, or one of them, or none.
    """

    name: str
    label: str
    sql: str


def stored() -> list[Baseline]:
    """The named queries that are baselines, in alphabetical order."""
    queries = [load(name) for name in names() if name.startswith(PREFIX)]
    return [Baseline(query.name, _label(query.name, query.yields), query.sql) for query in queries]


def from_file(store: Store, file: str | Path, params: Mapping[str, Any]) -> Baseline:
    """A baseline of one's own, named after its file; without a column `p` its guesses have probability 1.

    Args:
        store: an open store, which tells the query's columns.
        file: the path of an .sql file.
        params: values of $run and $token_role, for those that the query has.

    Raises:
        BadInput: no such file, or no query that guesses one label.
    """
    try:
        sql = Path(file).read_text(encoding="utf-8").rstrip().rstrip(";")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot read the baseline {str(file)!r} ({getattr(error, 'strerror', None) or error}); give the path of an .sql file"
        ) from None
    columns = store.sql(f"from (\n{sql}\n) limit 0", _named_in(sql, params)).columns
    if Path(file).stem in names():
        raise BadInput(f"the baseline {str(file)!r} has the name of a stored query; give the file another")
    name, label = PREFIX + Path(file).stem.removeprefix(PREFIX), _label(str(file), columns)
    return Baseline(name, label, sql if "p" in columns else f"select *, 1 as p from (\n{sql}\n)")


def _label(name: str, columns: Iterable[str]) -> str:
    columns = list(columns)
    guessed = [label for label in LABELS if label in columns]
    if len(guessed) != 1 or "token_id" not in columns:
        raise BadInput(
            f"baseline {name!r} yields {', '.join(columns)}; it yields token_id, one label ({', '.join(LABELS)}) and, where a "
            "guess is not sure, its probability p"
        )
    return guessed[0]


def _named_in(sql: str, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those parameters that a query has."""
    return {name: value for name, value in params.items() if f"${name}" in sql} or None


def scores(
    store: Store, baselines: Sequence[Baseline], labels: Sequence[str], tokens: str, params: Mapping[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """How likely each baseline's guess is right, for each test token.

    Args:
        store: an open store.
        baselines: which; of those that guess none of the labels, or none of these tokens, nothing is said.
        labels: which labels are asked for.
        tokens: SQL of the tokens, with the labels and the split; rows by token_id.
        params: values of its parameters, $run and $token_role.

    Returns:
        By label and name, float64 [n_test], in [0, 1], in the order of token_id.

    Raises:
        BadInput: probabilities of one token's guesses are negative or add up to more than 1.
    """
    found: dict[str, dict[str, np.ndarray]] = {label: {} for label in labels}
    for baseline in baselines:
        if baseline.label not in found:
            continue
        query = SCORES.format(tokens=tokens, guesses=baseline.sql, label=baseline.label)
        scored = store.of(params["run"]).sql(query, dict(params))
        if not scored["n_guesses"].sum():
            continue
        least, most = float(scored["least"].to_numpy().min()), float(scored["of_all"].to_numpy().max())
        if least < 0 or most > 1 + ROUNDING:
            raise BadInput(
                f"baseline {baseline.name!r} gives the guesses of one token probabilities that "
                f"{'are negative' if least < 0 else f'add up to {most:g}'}; p is a probability, one row a token and guess"
            )
        found[baseline.label][baseline.name] = scored["of_right"].to_numpy()
    return found


def with_majority(guessed: Mapping[str, np.ndarray], y_train: np.ndarray, y_test: np.ndarray) -> dict[str, np.ndarray]:
    """Baselines, float64 [n_test] by name, and `majority`, which guesses the most frequent training label."""
    return {**guessed, MAJORITY: (y_test == np.bincount(y_train).argmax()).astype(np.float64)}


def highest(guessed: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 [n_test]: of baselines the one that is right most often on these rows; the first of equals."""
    return max(guessed.values(), key=lambda of_right: float(of_right.mean()))
