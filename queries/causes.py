"""What the studies of causes share: trees with their answers, tokens by role, sites, means.

A study of causes edits the activations of a site at all tokens of a role, and reads the change of
the answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from actstore.advice import ingest_sites
from actstore.errors import BadInput, NotStored
from actstore.intervals import N_DRAWS, bootstrap
from actstore.queries.depth import unanswered
from actstore.queries.study import LEVEL, chosen, names_in

if TYPE_CHECKING:
    from actstore.store import Store

ROLES = ("edge_source", "edge_target", "separator", "bar", "goal", "colon", "root", "path")
LEAST = 2  # trees: one gives no interval, since every resample is the tree itself
MOST = int(LEVEL * (1 + N_DRAWS))  # cells: with more, Holm leaves the smallest p above LEVEL
ENDS = ("value", "low", "high")  # of a row of `results`
SURELY = 1e-30  # a probability below counts as this one in logarithms
SHAPE = "select n_layers, n_heads from runs join models using (weights_sha256) where run = $run"
ANSWERED = """
-- one row per predicted step of the run's trees
select
    predictions.token_id, predictions.tree_id, predictions.step, target::varchar as target, predicted::varchar as predicted,
    p_target, correct, root, trees.depth
from predictions join trees using (tree_id)
where run = $run
order by token_id
"""
TOKENS = """
-- one row per token of the trees
select token_id, tree_id, role::varchar as role
from tokens
where tree_id in (select unnest($trees))
order by token_id
"""


def shape_of(store: Store, run: str) -> tuple[int, int]:
    """Number of layers and of heads of a run's model."""
    n_layers, n_heads = store.sql(SHAPE, {"run": run}).row(0)
    return int(n_layers), int(n_heads)


def answered(store: Store, run: str) -> pl.DataFrame:
    """The predicted steps of a run's trees.

    Returns:
        Columns token_id, tree_id, step, target, predicted, p_target, correct, root and depth, by
        token_id.

    Raises:
        NotStored: the run answered no tree, see `depth.unanswered`.
    """
    found = store.sql(ANSWERED, {"run": run})
    if not len(found):
        raise unanswered(store, run)
    return found


def some(ids: np.ndarray, n: object, rng: np.random.Generator) -> np.ndarray:
    """At most n of some ids, drawn at random, ascending.

    Raises:
        BadInput: n is no number from LEAST on, or there are fewer ids than LEAST.
    """
    if not isinstance(n, int) or n < LEAST:
        raise BadInput(f"got -o trees {n}; give a number of at least {LEAST}")
    if len(ids) < LEAST:
        raise BadInput(f"there are {len(ids)} trees to study, and an interval needs {LEAST}; ingest more trees")
    return np.sort(rng.choice(ids, n, replace=False)) if len(ids) > n else np.sort(ids)


def roles_of(wanted: str | Sequence[str], known: Iterable[str] = ROLES) -> list[str]:
    """The wanted roles, see `study.chosen`."""
    return chosen(wanted, list(known), "role")


def sites_of(wanted: str | Sequence[str], families: Sequence[str], n_layers: int) -> list[str]:
    """The wanted sites of some families, layer by layer.

    Args:
        wanted: families (`attn_out`) and sites (`mlp_out.2`), or `all`.

    Raises:
        BadInput: a name is unknown.
    """
    known = [f"{family}.{layer}" for layer in range(n_layers) for family in families]
    names = [
        known if name == "all" else of_family(name, n_layers) if name in families else [name]
        for name in names_in(wanted)
    ]
    return chosen([name for group in names for name in group], known, "site")


def of_family(family: str, n_layers: int) -> list[str]:
    """The family's site of each layer."""
    return [f"{family}.{layer}" for layer in range(n_layers)]


def sites_read(senders: Sequence[str]) -> list[str]:
    """The sites that path patching reads: the senders and, of heads, what the attention adds."""
    read = [[site, site.replace("z.", "attn_out.")] if site.startswith("z.") else [site] for site in senders]
    return list(dict.fromkeys(site for group in read for site in group))


def check_stored(store: Store, run: str, sites: Sequence[str], n_layers: int, otherwise: str = "") -> None:
    """Refuse sites that a run does not hold.

    Args:
        otherwise: what else can be done, said after the command.

    Raises:
        NotStored: gives the command that adds the sites.
    """
    held = store.sites(run)
    lacking = [site for site in sites if site not in held]
    if not lacking:
        return
    families = list(dict.fromkeys(site.partition(".")[0] for site in lacking))
    whole = [family for family in families if set(of_family(family, n_layers)) <= {*lacking}]
    named = [*whole, *(site for site in lacking if site.partition(".")[0] not in whole)]
    raise NotStored(
        f"run {run!r} does not hold {', '.join(named)}, which are read here; {ingest_sites(store, run, *named)} adds them"
        f"{otherwise}"
    )


def mean_over_trees(values: np.ndarray, trees: np.ndarray, seed: int) -> tuple[float, float | None, float | None]:
    """A mean of rows of any size, with its bootstrap interval over trees; no ends if all agree.

    Args:
        values: float [n].
        trees: int [n], the tree of each row.
    """
    _, tree, n = np.unique(trees, return_inverse=True, return_counts=True)
    sums = np.bincount(tree, weights=values)
    low, high = bootstrap(lambda counts: (counts @ sums) / (counts @ n), len(sums), seed)
    return float(np.mean(values)), *(None if np.isnan(end) else end for end in (low, high))  # type: ignore[return-value]


def by_tree(values: np.ndarray, trees: np.ndarray) -> np.ndarray:
    """float64 [n_trees]: the sums of rows, tree by tree."""
    _, tree = np.unique(trees, return_inverse=True)
    return np.bincount(tree, weights=np.asarray(values, np.float64))


def log(p: pl.Series) -> np.ndarray:
    """float64 [n]: natural logarithms of probabilities; of those below SURELY, that of SURELY."""
    return np.log(p.cast(pl.Float64).clip(lower_bound=SURELY).to_numpy())
