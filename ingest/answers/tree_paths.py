"""The model's answers: teacher-forced predictions, the greedy answer, and how a wrong answer fails.

Greedy answers are as long as the path, as in the notebook. Before its first wrong step, a greedy
answer equals the path, and its tokens equal the teacher-forced predictions. A greedy answer is
right if and only if all predictions are right, so only trees with a wrong step are run again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from actstore.arrays.address import positions, token_ids
from actstore.ingest.models.forward import forward
from actstore.ingest.models.load import Model
from actstore.ingest.trees.draw import NO_NODE, at_label
from actstore.ingest.trees.rows import enum_series, null_where_no_node
from actstore.ingest.trees.tokens import PAD, WORDS, decode, is_arrow, n_nodes_of, path_at, root_at, word_label

FAILURES = ("wrong_child", "not_a_child", "not_a_step")
# (rows in the batch, intp [n]; words so far, uint8 [n, pos]; positions, intp [n]) → likeliest words
NextWord = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Answers:
    """Answers to n_trees trees of n_nodes nodes; words are numbers of ingest/trees/tokens.py.

    Attributes:
        target: uint8 [n_trees, n_nodes - 1], the word of each step of the path, then PAD.
        predicted: uint8 [n_trees, n_nodes - 1], the likeliest word after the right steps so far,
            then PAD.
        p_target: float32 [n_trees, n_nodes - 1], probability of the target, then NaN.
        greedy: uint8 [n_trees, n_nodes - 1], labels of the greedy answer's steps, then NO_NODE. The
            answer is at most as long as the path and ends before a word that is not a step.
        first_wrong_step: uint8 [n_trees], of the greedy answer; NO_NODE for a right answer.
        failure: uint8 [n_trees], index in FAILURES, kind of the first wrong step; NO_NODE for a
            right answer.
    """

    target: np.ndarray
    predicted: np.ndarray
    p_target: np.ndarray
    greedy: np.ndarray
    first_wrong_step: np.ndarray
    failure: np.ndarray

    def __len__(self) -> int:
        return len(self.target)


def answer(model: Model, words: np.ndarray, logits: Tensor) -> Answers:
    """Grade a batch of trees, of one forward pass.

    Args:
        words: uint8 [n_trees, 4n-1] word numbers, see `tokens.encode`.
        logits: float32 [n_trees, 4n-1, d_vocab], on the model's device.
    """
    given = predictions(model, words, of_steps(words, logits))
    return graded(words, *given, next_words(model, max(1, len(words))))


def of_steps(words: np.ndarray, logits: Tensor) -> Tensor:
    """The logits of each step, [n_trees, n - 1, d_vocab], among those of each position."""
    return logits[:, root_at(n_nodes_of(words)) : -1]  # the root predicts step 0; the last step predicts nothing


def predictions(model: Model, words: np.ndarray, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What a model predicts for each step after the right steps so far.

    Args:
        words: uint8 [n_trees, 4n-1] word numbers.
        logits: float32 [n_trees, n - 1, d_vocab], of each step, on the model's device.

    Returns:
        `predicted` and `p_target`, see Answers.
    """
    target = words[:, path_at(n_nodes_of(words)) :]
    vocabulary, past_end = model.config.vocabulary, target == PAD
    ids = torch.from_numpy(vocabulary.encode(target)).to(logits.device)
    p_target = torch.softmax(logits, dim=-1).gather(2, ids[:, :, None])[:, :, 0].cpu().numpy()
    likeliest = vocabulary.decode(logits.argmax(dim=-1).cpu().numpy())
    return np.where(past_end, PAD, likeliest).astype(np.uint8), np.where(past_end, np.float32("nan"), p_target)


def graded(words: np.ndarray, predicted: np.ndarray, p_target: np.ndarray, next_word: NextWord | None) -> Answers:
    """Grade a batch of trees.

    Args:
        words: uint8 [n_trees, 4n-1] word numbers, see `tokens.encode`.
        predicted, p_target: see `predictions`.
        next_word: continues greedily from wrong answers; None leaves `greedy` at the first wrong
            step.
    """
    target = words[:, path_at(n_nodes_of(words)) :]
    wrong = predicted != target
    failed = np.flatnonzero(wrong.any(axis=1))
    first = wrong[failed].argmax(axis=1)
    spoken = target.copy()
    if next_word is not None:
        spoken[failed] = _greedy(words[failed], failed, first, predicted[failed, first], next_word)
    first_wrong_step, failure = np.full((2, len(words)), NO_NODE, np.uint8)
    first_wrong_step[failed] = first
    failure[failed] = _failures(words[failed], first, predicted[failed, first])
    greedy = np.where(is_arrow(spoken), word_label(spoken), NO_NODE).astype(np.uint8)
    return Answers(target, predicted, p_target, greedy, first_wrong_step, failure)


def _greedy(
    words: np.ndarray, rows: np.ndarray, first: np.ndarray, word: np.ndarray, next_word: NextWord
) -> np.ndarray:
    """Greedy answers of trees with a wrong step.

    Args:
        rows: intp [n_trees], their rows in the batch.
        first: intp [n_trees], the wrong step.
        word: uint8 [n_trees], the wrong word.

    Returns:
        uint8 [n_trees, n - 1] words, as long as the path or up to the first word that is not a
        step; then PAD.
    """
    n_nodes = n_nodes_of(words)
    prompt, path = np.split(words, [path_at(n_nodes)], axis=1)
    depth = (path != PAD).sum(axis=1)
    spoken = np.where(np.arange(n_nodes - 1) < first[:, None], path, PAD).astype(np.uint8)
    going, step = np.arange(len(words)), first
    while len(going):
        spoken[going, step] = word
        on = is_arrow(word) & (step + 1 < depth[going])
        going, step = going[on], step[on] + 1
        if len(going):
            so_far = np.concatenate([prompt[going], spoken[going]], axis=1)
            word = next_word(rows[going], so_far, root_at(n_nodes) + step)
    return spoken


def next_words(model: Model, per_pass: int) -> NextWord:
    """How a model continues trees greedily.

    Args:
        per_pass: most trees of a forward pass. A pass of few trees takes nearly as long as one of
            many, so that trees of a whole batch are best continued at once.
    """

    def likeliest(rows: np.ndarray, words: np.ndarray, stood_on: np.ndarray) -> np.ndarray:
        parts = range(0, len(words), per_pass)
        found = [_likeliest(model, words[at : at + per_pass], stood_on[at : at + per_pass]) for at in parts]
        return np.concatenate(found)

    return likeliest


def _likeliest(model: Model, words: np.ndarray, stood_on: np.ndarray) -> np.ndarray:
    """uint8 [n_trees]: the likeliest word after position `stood_on`, intp [n_trees]."""
    vocabulary = model.config.vocabulary
    device = next(model.bridge.parameters()).device
    ids = torch.from_numpy(vocabulary.encode(words[:, : stood_on.max() + 1])).to(device)
    logits = forward(model, ids, [], lambda site, activations: None)
    return vocabulary.decode(logits.argmax(dim=-1).cpu().numpy()[np.arange(len(words)), stood_on])


def _failures(words: np.ndarray, first: np.ndarray, word: np.ndarray) -> np.ndarray:
    """uint8 [n_trees]: index in FAILURES of each wrong word at step `first`."""
    if not len(words):
        return np.zeros(0, np.uint8)
    trees, rows = decode(words), np.arange(len(words))
    stood_on = np.concatenate([trees.root[:, None], trees.path], axis=1)[rows, first]
    parents = np.append(trees.parents(), np.full((len(words), 1), NO_NODE, np.uint8), axis=1)
    label = np.minimum(
        word_label(word), parents.shape[1] - 1
    )  # a word without a label reads the last column, which has no parent
    a_child = at_label(parents, label[:, None])[:, 0] == stood_on
    kinds = np.where(a_child, FAILURES.index("wrong_child"), FAILURES.index("not_a_child"))
    return np.where(is_arrow(word), kinds, FAILURES.index("not_a_step")).astype(np.uint8)


def prediction_rows(answers: Answers, run: str, first_tree_id: int) -> pl.DataFrame:
    """The rows of `predictions`, one per step of a path, by (tree, step), as in schema.sql."""
    tree, step = np.nonzero(answers.target != PAD)
    tree_id = first_tree_id + tree
    target, predicted = answers.target[tree, step], answers.predicted[tree, step]
    root = root_at(answers.target.shape[1] + 1)
    return pl.DataFrame(
        {
            "run": pl.repeat(run, len(tree), dtype=pl.String, eager=True),
            "token_id": token_ids(tree_id, root + step),
            "tree_id": tree_id.astype(np.int32),
            "step": step.astype(np.uint8),
            "target": enum_series(target, WORDS),
            "predicted": enum_series(predicted, WORDS),
            "p_target": answers.p_target[tree, step],
            "correct": predicted == target,
        }
    )


def outcome_rows(answers: Answers, run: str, first_tree_id: int) -> pl.DataFrame:
    """The rows of `outcomes`, one per tree, in tree order, as in schema.sql."""
    n_trees, n_steps = answers.greedy.shape
    lengths = (answers.greedy != NO_NODE).sum(axis=1).astype(np.uint8)
    greedy = pl.Series(answers.greedy, dtype=pl.Array(pl.UInt8, n_steps)).arr.to_list()
    right = answers.first_wrong_step == NO_NODE
    return pl.DataFrame(
        {
            "run": pl.repeat(run, n_trees, dtype=pl.String, eager=True),
            "tree_id": np.arange(first_tree_id, first_tree_id + n_trees, dtype=np.int32),
            "teacher_forced_right": (answers.predicted == answers.target).all(axis=1),
            "greedy_path": greedy.list.head(pl.lit(pl.Series(lengths))),
            "greedy_right": right,
            "first_wrong_step": null_where_no_node(answers.first_wrong_step),
            "failure": null_where_no_node(answers.failure).cat.to(pl.Enum(FAILURES)),
        }
    )


def of_trees(rows: pl.DataFrame, tree_ids: np.ndarray) -> pl.DataFrame:
    """Replace tree numbers 0, 1, 2, … in rows by these tree ids, and adapt token ids."""
    ids = tree_ids[rows["tree_id"].to_numpy()]
    rows = rows.with_columns(tree_id=pl.Series(ids, dtype=pl.Int32))
    if "token_id" not in rows.columns:
        return rows
    moved = token_ids(ids, positions(rows["token_id"].to_numpy()))
    return rows.with_columns(token_id=pl.Series(moved, dtype=pl.Int64))
