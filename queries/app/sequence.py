"""One tree or text of a run: its tokens, the answers, and what sites say at each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from actstore import queries
from actstore.errors import NotStored
from actstore.queries.attention.study import pattern_run, pattern_sites

if TYPE_CHECKING:
    from actstore.store import Store

WIDEST = 64  # tokens that a heat map shows: more cannot be read
MOST_LOGITS, FEWEST = 10_000_000, 8  # logits of one heat map, so that it comes within a second; tokens in any case
MEAN = "mean of the heads"
BLANKS = {"Ġ": " ", "▁": " ", "Ċ": "⏎", "<0x0A>": "⏎"}  # how tokenizers spell a blank and a line's end
OF_TREES = ("edge_source", "edge_target", "separator", "path")  # roles whose labels `probe_tokens` knows

TOKENS = """
select token_id, position, token::varchar as token, role::varchar as role, edge, node, step, number
from tokens where sequence_id = $sequence order by position
"""
ANSWERS = """
select
    p.token_id, t.position, p.step, p.target::varchar as "right", p.predicted::varchar as predicted, p.p_target, p.correct,
    p.loss
from predictions p join tokens t using (token_id) where p.sequence_id = $sequence order by t.position
"""
HELD = """
select min(sequence_id) as first, max(sequence_id) as last, count(*) as n, any_value(dataset) as dataset from sequences
"""
READ_BY_PROBES = """
with directions as (
    select site, token_role, label, run, count(distinct name) as classes
    from latest_results join runs using (run)
    where metric = 'direction' and name is not null
      and weights_sha256 = (select weights_sha256 from runs where run = $run)
    group by all
)
select label, token_role, run, list(site order by site) as sites, max(classes) as classes
from directions group by label, token_role, run order by if(run = $run, 0, 1), run, token_role, label
"""
DIRECTIONS = """
select name, value, direction from latest_results
where metric = 'direction' and run = $run and site = $site and token_role is not distinct from $role and label = $label
  and recorded = (
    select max(recorded) from results
    where metric = 'direction' and run = $run and site = $site and token_role is not distinct from $role and label = $label
  )
"""
PIECES = """
select number, token from vocabularies
where vocabulary = (select vocabulary from store.main.datasets join store.main.runs using (dataset) where run = $run)
order by number
"""
LENS = """
select token_id, logit_lens(token_id, $run, $site) as logits
from tokens where token_id in (select unnest($ids)) order by token_id
"""
ATTENTION = "select attention(token_id, $run, $site) as weights from tokens where token_id = $token"


@dataclass(frozen=True)
class Sequence:
    """A sequence of a run.

    Attributes:
        run: the run that answers.
        sequence_id: of a tree, its tree_id.
        tokens: a row per token, by position: token_id, position, token, role, edge, node, step.
        tree: the row of `trees`; None for a text.
        edges: source, target, edge and on_path of a tree's edges; no rows for a text.
        answers: a row per prediction: token_id, position, step, right, predicted, p_target, correct
            and loss.
        greedy: the nodes of the greedy path; None for a text.
    """

    run: str
    sequence_id: int
    tokens: pl.DataFrame
    tree: dict[str, Any] | None
    edges: pl.DataFrame
    answers: pl.DataFrame
    greedy: list[int] | None

    @property
    def words(self) -> list[str]:
        """Each token as a person reads it."""
        return [spelled(token) for token in self.tokens["token"]]

    @property
    def asked(self) -> int:
        """Position of the first token that predicts: of a tree the root, of a text the middle."""
        at = self.tokens["role"].to_list().index("root") if self.tree else len(self.tokens) // 2
        return min(at, len(self.tokens) - 1)

    def window(self, at: int, widest: int = WIDEST) -> range:
        """The positions around a token that fit into one heat map."""
        first = max(0, min(at - widest // 2, len(self.tokens) - widest))
        return range(first, min(first + widest, len(self.tokens)))


@dataclass(frozen=True)
class Grid:
    """Numbers in [0, 1] by site and position, with a word in each cell.

    Attributes:
        sites: name of each row.
        positions: of each column.
        shares: [site, position]; None where there is nothing.
        words: [site, position].
        marked: [site, position], whether a cell is wrong.
        dim: by position, whether the column is no token of the kind that was asked for.
        said: what it shows, and how it was cut.
    """

    sites: list[str]
    positions: list[int]
    shares: list[list[float | None]]
    words: list[list[str]]
    marked: list[list[bool]]
    dim: list[bool]
    said: str


def spelled(token: str) -> str:
    """A token as a person reads it: blanks and line ends for a tokenizer's signs."""
    for sign, blank in BLANKS.items():
        token = token.replace(sign, blank)
    return token


def held(store: Store, run: str) -> dict[str, Any]:
    """The sequences of a run: first and last sequence_id, n and dataset."""
    return store.of(run).sql(HELD).row(0, named=True)


def sequence(store: Store, run: str, sequence_id: int) -> Sequence:
    """Look up one sequence, with the answers of a run.

    Raises:
        NotStored: the run has no such sequence.
    """
    seen = store.of(run)
    tokens = seen.sql(TOKENS, {"sequence": sequence_id})
    if not len(tokens):
        has = held(store, run)
        raise NotStored(
            f"run {run!r} has no sequence {sequence_id}; it has {has['n']:,}, numbered {has['first']} to {has['last']}"
        )
    of_tree = {"tree": sequence_id}
    trees = seen.sql("select * from trees where tree_id = $tree", of_tree).to_dicts()
    edges = seen.sql("select edge, source, target, on_path from edges where tree_id = $tree order by edge", of_tree)
    greedy = seen.sql("select greedy_path from outcomes where tree_id = $tree", of_tree)["greedy_path"].to_list()
    return Sequence(
        run,
        sequence_id,
        tokens,
        trees[0] if trees else None,
        edges,
        seen.sql(ANSWERS, {"sequence": sequence_id}),
        greedy[0] if greedy and greedy[0] is not None else None,
    )


def layers(store: Store, run: str) -> list[str]:
    """The attention patterns of a run, or of another run of its model over its sequences.

    Raises:
        NotStored: there are none; the message says how to add them.
    """
    return pattern_sites(store, pattern_run(store, run))


def attention(store: Store, asked: Sequence, site: str, at: int, head: str = MEAN) -> np.ndarray:
    """A token's weights to the tokens of its sequence, float64 [n_tokens].

    Args:
        at: position of the token.
        head: number of a head, or MEAN.

    Raises:
        NotStored: no such pattern is stored.
    """
    holder, token = pattern_run(store, asked.run), int(asked.tokens["token_id"][at])
    found = store.sql(ATTENTION, {"run": holder, "site": site, "token": token})["weights"].to_list()
    by_head = np.array(found[0], float)[:, : len(asked.tokens)]
    return by_head.mean(0) if head == MEAN else by_head[int(head)]


def heads(store: Store, run: str, site: str) -> list[str]:
    """The heads of a run's pattern, by number, after MEAN."""
    holder, token = pattern_run(store, run), int(store.of(run).sql("select min(first_token_id) from sequences").item())
    (weights,) = store.sql(ATTENTION, {"run": holder, "site": site, "token": token})["weights"].to_list()
    return [MEAN, *map(str, range(len(weights)))]


def most(asked: Sequence, weights: np.ndarray, at: int, n: int = 5) -> str:
    """The tokens that a token attends to most, in a sentence."""
    words = asked.words
    largest = [int(k) for k in np.argsort(-weights, kind="stable")[:n] if weights[k] > 0.0005]
    listed = ", ".join(f"{words[k]!r} ({k}): {100 * weights[k]:.1f} %" for k in largest)
    return f"{words[at]!r} at position {at} attends to {listed}."


def residuals(store: Store, run: str) -> list[str]:
    """The sites of a run whose rows can be read as logits: the residual stream."""
    return [site for site in store.sites(run) if site.partition(".")[0] in ("embed", "resid_post")]


def lens(store: Store, asked: Sequence, at: int, of: str = "likeliest") -> Grid:
    """The logit lens: what each layer would answer at each token.

    Args:
        at: the position in the middle of what is shown, if the sequence is too long.
        of: `likeliest`, the probability of the likeliest token; or `right`, of the right one.

    Raises:
        NotStored: the run holds no residual stream.
    """
    sites = residuals(store, asked.run)
    if not sites:
        raise NotStored(f"run {asked.run!r} holds no resid_post; ingest it again with `--sites embed,resid_post`")
    vocabulary = words_of(store, asked.run)
    window = asked.window(at, min(WIDEST, max(FEWEST, MOST_LOGITS // (len(sites) * max(1, len(vocabulary))))))
    ids = asked.tokens["token_id"].gather(list(window))
    right = _right(asked, vocabulary)
    grid: dict[str, list[list[Any]]] = {"shares": [], "words": [], "marked": []}
    for site in sites:
        found = store.sql(LENS, {"run": asked.run, "site": site, "ids": ids})
        logits = found["logits"].explode().to_numpy().reshape(len(found), -1)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        best = p.argmax(1)
        goals = [right.get(position) for position in window]
        shares = [
            float(row[top]) if of == "likeliest" else None if goal is None else float(row[goal])
            for row, top, goal in zip(p, best, goals, strict=True)
        ]
        grid["shares"].append(shares)
        grid["words"].append([vocabulary[top] if top < len(vocabulary) else f"#{top}" for top in best])
        grid["marked"].append([goal is not None and goal != top for goal, top in zip(goals, best, strict=True)])
    what = "the likeliest token" if of == "likeliest" else "the right token"
    cut = "" if len(window) == len(asked.tokens) else f"; {len(window)} of {len(asked.tokens)} tokens, around {at}"
    said = (
        f"Each cell names the likeliest next token there; colour: probability of {what}{cut}. Red: not the right one."
    )
    return Grid(sites, list(window), **grid, dim=[False] * len(window), said=said)


def words_of(store: Store, run: str) -> list[str]:
    """The spelling of each token number of a run's model, as `tokens` spells it.

    A model of text may have more numbers than its tokenizer has tokens; `lens` names these #NUMBER.
    """
    if len(of_text := store.of(run).sql(PIECES, {"run": run})):
        pieces = dict(of_text.rows())
        return [spelled(pieces.get(number, f"#{number}")) for number in range(max(pieces) + 1)]
    (words,) = store.of(run).sql("select vocabulary from models")["vocabulary"].to_list()
    of_trees = store.of(run).sql("select n_nodes from models").item() is not None
    return [f"→{word[1:]}" if of_trees and word.startswith(">") else spelled(word) for word in words or []]


def _right(asked: Sequence, vocabulary: list[str]) -> dict[int, int]:
    """Position → number of the right next token, where one is known."""
    if asked.tree is None:
        numbers = asked.tokens["number"].to_list()
        return {at: number for at, number in enumerate(numbers[1:]) if number is not None}
    number = {word: i for i, word in enumerate(vocabulary)}
    pairs = asked.answers.select("position", "right").iter_rows()
    return {position: number[word] for position, word in pairs if word in number}


def probes(store: Store, run: str) -> pl.DataFrame:
    """The probes recorded for a run's model: label, token_role, run, sites and classes."""
    return store.whole.sql(READ_BY_PROBES, {"run": run})


def readouts(store: Store, asked: Sequence, probe: dict[str, Any], at: int) -> Grid:
    """What a recorded probe reads at each token, at each of its sites that the run holds.

    Args:
        probe: a row of `probes`.
        at: the position in the middle of what is shown, if the sequence is too long.

    Raises:
        NotStored: the run holds none of the probe's sites.
    """
    sites = [site for site in store.sites(asked.run) if site in probe["sites"]]
    if not sites:
        raise NotStored(f"run {asked.run!r} holds none of the probe's sites: {', '.join(probe['sites'])}")
    window, role, label = asked.window(at), probe["token_role"], probe["label"]
    seen = asked.tokens[window.start : window.stop]
    truth = _truth(store, asked, role, label)
    grid: dict[str, list[list[Any]]] = {"shares": [], "words": [], "marked": []}
    for site in sites:
        about = {"run": probe["run"], "site": site, "role": role, "label": label}
        directions = store.whole.sql(DIRECTIONS, about)
        classes = [name.rpartition("=")[2] for name in directions["name"]]
        X, _ = store.read(seen.select("token_id"), asked.run, site)
        W = np.array(directions["direction"].to_list(), float)
        logits = X @ W.T + directions["value"].to_numpy()
        if len(classes) == 1:  # of two classes one direction is recorded
            logits, classes = np.column_stack([np.zeros(len(X)), logits]), [f"not {classes[0]}", classes[0]]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        best = p.argmax(1)
        read = [classes[k] for k in best]
        known = [truth.get(int(token)) for token in seen["token_id"]]
        grid["shares"].append([float(row[k]) for row, k in zip(p, best, strict=True)])
        grid["words"].append(read)
        grid["marked"].append([one is not None and one != said for one, said in zip(known, read, strict=True)])
    is_own = [role is None or own == role or (role == "path" and own == "root") for own in seen["role"]]
    others = "" if all(is_own) else f"; fitted at {role} tokens, and pale at others"
    said = f"Each cell names the {label} that the probe reads; colour: its probability{others}. Red: not the right one."
    return Grid(sites, list(window), **grid, dim=[not own for own in is_own], said=said)


def _truth(store: Store, asked: Sequence, role: str | None, label: str) -> dict[int, str]:
    """token_id → the right class, for labels of trees that `probe_tokens` knows."""
    if asked.tree is None or role not in OF_TREES:
        return {}
    query = queries.load("probe_tokens")
    if label not in query.yields:
        return {}
    of_tree = f"select token_id, {label} as label from (\n{query.sql}\n) where tree_id = {int(asked.sequence_id)}"
    rows = store.of(asked.run).sql(of_tree, {"run": asked.run, "token_role": role})
    return {token: str(value) for token, value in rows.iter_rows() if value is not None}
