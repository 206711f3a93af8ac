"""The trees of scrubbing: which are clean, and which trees donate to them, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actstore.advice import ingest_command
from actstore.errors import BadInput, NotStored, nearest
from actstore.queries.probes.baselines import named_in
from actstore.queries.probes.labelled import sql_of

if TYPE_CHECKING:
    from actstore.store import Store

LISTED = ("backward", "any")  # which trees take part: those whose edges are listed backward, or all
MATCHED, CONTRASTS = "matched", ("disagreeing", "shuffled")  # of drawn donors, and of a user's own
ELSEWHERE, ITSELF = "elsewhere", "itself"
TREES = """
-- one row per tree that a run answered: its path, and the run's first step
with recursive other as (  -- the edges of the root's subtree without the goal
    select tree_id, target, 1 as target_depth
    from edges
    where source_depth = 0 and not on_path
    union all
    select edges.tree_id, edges.target, target_depth + 1
    from other
    join edges on edges.tree_id = other.tree_id and edges.source = other.target
),
second as (
    select tree_id, max(target_depth) as other_depth
    from other
    group by tree_id
)
select
    predictions.token_id,
    depth,
    path,
    backward,
    n_nodes - 1 - depth as left_over,
    coalesce(other_depth, 0) as other_depth,
    correct,
    p_target
from predictions
join trees using (tree_id)
join datasets using (dataset)
left join second using (tree_id)
where predictions.run = $run and predictions.step = 0
order by token_id
"""


@dataclass(frozen=True)
class Trees:
    """The trees of a run that take part.

    Attributes:
        token_ids: int64 [n], ascending: each tree's root token, the first of its path.
        depth: int64 [n], edges from root to goal.
        nodes: int64 [n, n_layers]: the node at each distance from the goal, up the path. Past the
            path's end the root's child is repeated.
        p: float64 [n], the run's probability of the right first step.
        may_donate: bool [n].
        clean: int64 [n_clean], rows of the clean trees.
        n_wrong: trees that would be clean, but whose first step the run gets wrong.
    """

    token_ids: np.ndarray
    depth: np.ndarray
    nodes: np.ndarray
    p: np.ndarray
    may_donate: np.ndarray
    clean: np.ndarray
    n_wrong: int


def trees_of(
    store: Store, run: str, n_nodes: int, n_layers: int, listed: str, second_path: int, n: int, seed: int
) -> Trees:
    """Read a run's trees, and draw the clean ones.

    Args:
        listed: one of LISTED.
        second_path: least depth of the deepest leaf in the root's other subtree, of clean trees. It
            is not asked of trees whose path leaves fewer nodes.
        n: most clean trees of a path length.
        seed: seed of the draw.

    Raises:
        BadInput: an option has no meaning.
        NotStored: no tree can be clean.
    """
    if listed not in LISTED:
        raise BadInput(f"got listed {listed!r}{nearest(str(listed), LISTED)}; take {' or '.join(LISTED)} (-o listed)")
    for name, value, least in (("n", n, 1), ("second_path", second_path, 0)):
        if not isinstance(value, int) or value < least:
            raise BadInput(f"got {name} {value!r}; it is a whole number, {least} or more (-o {name})")
    found = store.sql(TREES, {"run": run})
    depth, path = found["depth"].to_numpy().astype(np.int64), found["path"].to_list()
    nodes = [[steps[max(len(steps) - 1 - distance, 0)] for distance in range(n_layers)] for steps in path]
    fits = depth <= n_nodes - 2  # the authors' longest path is 14, of 16 nodes
    if listed == "backward":
        fits &= found["backward"].to_numpy().astype(bool)
    other, left_over = found["other_depth"].to_numpy(), found["left_over"].to_numpy()
    clean = fits & ((other >= second_path) | (left_over < second_path))
    right = found["correct"].to_numpy().astype(bool)
    if not (clean & right).any():
        raise NotStored(_no_tree(store, run, listed, second_path, bool(clean.any())))
    rng = np.random.default_rng([seed, n])
    drawn = [rng.permutation(np.flatnonzero(clean & right & (depth == length)))[:n] for length in np.unique(depth)]
    return Trees(
        token_ids=found["token_id"].to_numpy(),
        depth=depth,
        nodes=np.array(nodes, np.int64),
        p=found["p_target"].to_numpy().astype(np.float64),
        may_donate=fits,
        clean=np.sort(np.concatenate(drawn)),
        n_wrong=int((clean & ~right).sum()),
    )


def _no_tree(store: Store, run: str, listed: str, second_path: int, answered: bool) -> str:
    """Why no tree of a run is clean, and how to store trees that are."""
    if answered:
        return f"run {run!r} gets the first step wrong on every tree that could be scrubbed; name a run that answers (--run)"
    drawing = ("--distribution", "baseline", "--trees", "10000", "--sites", "pattern,v,resid_post")
    command = ingest_command(store, ("--model-of", run), f"{run}-scrub", f"{run}-scrub", *drawing)
    what = "lists its edges backward and has" if listed == "backward" else "has"
    return (
        f"no answered tree of run {run!r} {what} a second path of {second_path} from its root; {command} stores a run over trees "
        "of which half do; or take all trees by -o listed any -o second_path 0"
    )


def drawn(trees: Trees, layer: int, seed: int) -> dict[str, np.ndarray]:
    """Draw a donor of each kind for each clean tree, evenly among the trees that fit.

    The donor's path is longer than the layer's number. MATCHED donors have the clean tree's node
    at that distance from the goal, and nothing else is asked of them. The first of CONTRASTS has
    another node there. ELSEWHERE has another node there, and the clean tree's at the distance
    before (at layer 0, the one after). ITSELF is the clean tree.

    Returns:
        Kind of donor → int64 [n_clean], rows of the trees; -1 where no tree fits.
    """
    rng = np.random.default_rng([seed, layer])
    pool = np.flatnonzero(trees.may_donate & (trees.depth > layer))
    other = layer - 1 if layer else min(1, trees.nodes.shape[1] - 1)
    here, there = trees.nodes[pool, layer], trees.nodes[pool, other]
    found: dict[str, list[int]] = {MATCHED: [], CONTRASTS[0]: [], ELSEWHERE: []}
    for row in trees.clean.tolist():
        same = (here == trees.nodes[row, layer]) & (pool != row)
        apart = here != trees.nodes[row, layer]
        for kind, fits in (
            (MATCHED, same),
            (CONTRASTS[0], apart),
            (ELSEWHERE, apart & (there == trees.nodes[row, other])),
        ):
            among = pool[fits]
            found[kind].append(int(among[rng.integers(len(among))]) if len(among) else -1)
    return {**{kind: np.array(rows) for kind, rows in found.items()}, ITSELF: trees.clean}


def own(store: Store, run: str, trees: Trees, query: str, layer: int, seed: int) -> dict[str, np.ndarray]:
    """The donors that a user's query names, the same shuffled among the clean trees, and ITSELF.

    Args:
        query: SQL, or the path of an .sql file, that yields token_id, the root token of a clean
            tree, and donor_token_id, the root token of another; $layer, $run and $dataset have
            their values. Rows of trees that are not drawn as clean trees are left out.

    Returns:
        As `drawn`.

    Raises:
        BadInput: the query has other columns, names a clean tree twice, or names tokens that are
            no tree's root token.
    """
    sql = sql_of(query)
    dataset = store.sql("select dataset from runs where run = $run", {"run": run}).item()
    frame = store.of(run).sql(sql, named_in(sql, {"run": run, "dataset": dataset, "layer": layer}))
    if lacking := [name for name in ("token_id", "donor_token_id") if name not in frame.columns]:
        raise BadInput(
            f"the query of -o donors yields {', '.join(frame.columns)} and no {lacking[0]}; select both columns"
        )
    rows = []
    for name in ("token_id", "donor_token_id"):
        if not frame[name].dtype.is_integer() or frame[name].null_count():
            raise BadInput(f"the query of -o donors yields a {name} that is no integer or NULL; give ids of tokens")
        ids = frame[name].to_numpy()
        row = np.searchsorted(trees.token_ids, ids).clip(max=len(trees.token_ids) - 1)
        if len(wrong := ids[trees.token_ids[row] != ids]):
            raise BadInput(
                f"{len(wrong):,} of {len(ids):,} values of the donors' {name} are no root token of a tree of run {run!r}, the "
                f"first {wrong[0]}; take tokens of step 0: `select token_id from predictions where step = 0`"
            )
        rows.append(row)
    clean, donor = rows
    if frame["token_id"].n_unique() < len(frame):
        raise BadInput(
            "the query of -o donors names a clean tree twice; a tree has one donor: add `qualify row_number() over (partition by "
            "token_id) = 1`"
        )
    donors = np.full(len(trees.token_ids), -1)
    donors[clean] = donor
    matched = donors[trees.clean]
    order = np.random.default_rng([seed, layer]).permutation(np.flatnonzero(matched >= 0))
    shuffled = np.full(len(matched), -1)
    shuffled[order] = np.roll(matched[order], 1)
    return {MATCHED: matched, CONTRASTS[1]: shuffled, ITSELF: np.where(matched >= 0, trees.clean, -1)}
