"""The baselines of the study `probes`: labels guessed from the tree alone, without a network.

A baseline is a query that yields `token_id`, a column named like the guessed label, and `p`, the
probability of the guess. A token may have several guesses with a share each. The score of a token
is the p of the right guess: how often the guess would be right. A token without guesses counts as
wrong. The named queries `baseline_…` are the stored baselines, and their headers describe them. A
user's query, in a file, is scored in addition.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.errors import BadInput
from actstore.queries import load, names, read_sql
from actstore.queries.probes.figures import BASELINE as PREFIX
from actstore.queries.probes.figures import LABELS, MAJORITY

if TYPE_CHECKING:
    from actstore.store import Store

ROUNDING = 1e-6  # tolerance of a sum of probabilities
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
        name: name of the query, which begins with `baseline_`.
        label: the guessed label, one of LABELS.
        sql: the query; it may have the parameters $run and $token_role.
    """

    name: str
    label: str
    sql: str


def stored() -> list[Baseline]:
    """The named queries that are baselines, in alphabetical order."""
    queries = [load(name) for name in names() if name.startswith(PREFIX)]
    return [Baseline(query.name, _label(query.name, query.yields), query.sql) for query in queries]


def from_file(store: Store, file: str | Path, params: Mapping[str, Any]) -> Baseline:
    """A user's baseline, named after its file; without a column `p`, guesses have probability 1.

    Args:
        store: an open store, on which the query's columns are looked up.
        file: path of an .sql file.
        params: values of $run and $token_role; unused ones are ignored.

    Raises:
        BadInput: there is no such file, or the query does not guess exactly one label.
    """
    sql = read_sql(file, "baseline")
    columns = store.sql(f"from (\n{sql}\n) limit 0", named_in(sql, params)).columns
    name, label = name_of(file), _label(str(file), columns)
    return Baseline(name, label, sql if "p" in columns else f"select *, 1 as p from (\n{sql}\n)")


def name_of(file: str | Path) -> str:
    """The name of a user's baseline: that of its file, with the prefix of all baselines.

    Raises:
        BadInput: a stored query has the name.
    """
    if Path(file).stem in names():
        raise BadInput(f"the baseline {str(file)!r} has the name of a stored query; give the file another")
    return PREFIX + Path(file).stem.removeprefix(PREFIX)


def _label(name: str, columns: Iterable[str]) -> str:
    columns = list(columns)
    guessed = [label for label in LABELS if label in columns]
    if len(guessed) != 1 or "token_id" not in columns:
        raise BadInput(
            f"baseline {name!r} yields {', '.join(columns)}; it yields token_id, one label ({', '.join(LABELS)}) and, where a "
            "guess is not sure, its probability p"
        )
    return guessed[0]


def named_in(sql: str, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parameters that a query uses."""
    return {name: value for name, value in params.items() if re.search(rf"\${name}\b", sql)} or None


def check_shares(name: str, least: float, most: float) -> None:
    """Refuse probabilities of one token's guesses that are no probabilities.

    Args:
        name: name of the baseline.
        least: the smallest probability of a guess.
        most: the largest sum of a token's probabilities.

    Raises:
        BadInput: a probability is negative, or a token's probabilities sum to more than 1.
    """
    if least < 0 or most > 1 + ROUNDING:
        raise BadInput(
            f"baseline {name!r} gives the guesses of one token probabilities that "
            f"{'are negative' if least < 0 else f'add up to {most:g}'}; p is a probability, with one row per token and guess"
        )


def scores(
    store: Store, baselines: Sequence[Baseline], labels: Sequence[str], tokens: str, params: Mapping[str, Any]
) -> dict[str, dict[str, np.ndarray]]:
    """The probability that each baseline's guess is right, for each test token.

    Args:
        store: an open store.
        baselines: baselines to score; those without a guess for these labels or tokens are left
            out.
        labels: the wanted labels.
        tokens: SQL of the tokens, with labels and split, ordered by token_id.
        params: values of $run and $token_role.

    Returns:
        Label → name → float64 [n_test] in [0, 1], in the order of token_id.

    Raises:
        BadInput: the probabilities of a token's guesses are negative or sum to more than 1.
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
        check_shares(baseline.name, least, most)
        found[baseline.label][baseline.name] = scored["of_right"].to_numpy()
    return found


def with_majority(guessed: Mapping[str, np.ndarray], y_train: np.ndarray, y_test: np.ndarray) -> dict[str, np.ndarray]:
    """Add `majority`, which guesses the commonest training label: name → float64 [n_test]."""
    return {**guessed, MAJORITY: (y_test == np.bincount(y_train).argmax()).astype(np.float64)}


def highest(guessed: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 [n_test]: the baseline with the highest mean on these rows; first among equals."""
    return max(guessed.values(), key=lambda of_right: float(of_right.mean()))
