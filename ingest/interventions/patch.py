"""The edits of a run, and the forward passes over the sequences that they name.

A run of edits holds the edited sequences alone: those of which a row of an edit names a token. All
others are as the base run stored them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from actstore.arrays.address import Ids, positions
from actstore.arrays.address import tree_ids as tree_ids_of
from actstore.ingest.answers import next_token, tree_paths
from actstore.ingest.answers.next_token import Asked
from actstore.ingest.answers.passes import padded, passes, put
from actstore.ingest.interventions import window
from actstore.ingest.interventions.change import Changes
from actstore.ingest.interventions.rows import Rows, Sequences
from actstore.ingest.models.forward import forward
from actstore.ingest.models.sites import SiteSpec
from actstore.ingest.models.weights import parse
from actstore.ingest.trees.draw import concatenate
from actstore.ingest.trees.rows import enum_series
from actstore.ingest.trees.tokens import PAD, WORDS, n_nodes_of, root_at
from actstore.interventions import hash_of

if TYPE_CHECKING:
    from actstore.ingest.corpus.drawn import Drawn
    from actstore.ingest.models.model import Model
    from actstore.ingest.trees.tokens import Drawn as TreesDrawn
    from actstore.store import Store

Into = Mapping[str, Any]  # TransformerLens name → a ShardBuffer, or what takes its place
Take = Callable[[SiteSpec, Tensor], None]


@dataclass
class Patch:
    """The edits of a run.

    Attributes:
        store: opens the store that base and donors are read from.
        base: name of the base run.
        edits: their rows, each at one site.
        sequences: of the base run's dataset.
        whole: run whole forward passes. Otherwise only the tokens and layers that the edits can
            change, where the base run stored the rest.
        greedy: continue greedily from wrong answers, too, for `outcomes` of trees.
        about: of each edit, its row of `interventions` without run and number.
        measured: columns token_id and word, uint8: a second word whose probability is measured.
        close: closes the store; call it after the last batch.
    """

    store: Callable[[], Store]
    base: str
    edits: Sequence[Rows]
    sequences: Sequences
    whole: bool = True
    greedy: bool = True
    about: Sequence[Mapping[str, Any]] = ()
    measured: pl.DataFrame | None = None
    close: Callable[[], None] = lambda: None
    _weights: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def tables(self, run: str) -> dict[str, pl.DataFrame]:
        """The rows of `interventions` and `edits` of a run of these edits; none without `about`."""
        if not self.about:
            return {}
        numbered = [
            rows.frame.with_columns(run=pl.lit(run), edit=pl.lit(number, pl.UInt8))
            for number, rows in enumerate(self.edits)
        ]
        about = [{"run": run, "edit": number, **row} for number, row in enumerate(self.about)]
        return {"interventions": pl.DataFrame(about, infer_schema_length=None), "edits": pl.concat(numbered)}

    def noted(self, tables: Mapping[str, pl.DataFrame]) -> dict[str, Any]:
        """What a run of these edits notes beside its versions: their hash, and how they are run."""
        if not tables:
            return {}
        forward = "whole" if self.whole else "window"
        return {"edits": hash_of(tables["interventions"], tables["edits"]), "forward": forward, "greedy": self.greedy}

    def said(self) -> str:
        """The edits in words."""
        sites = ", ".join(dict.fromkeys(rows.spec.short for rows in self.edits))
        n = sum(len(rows) for rows in self.edits)
        how = "whole forward passes" if self.whole else f"layers {self.layer} on alone"
        return f"{n:,} edits of {len(self.numbers):,} sequences of run {self.base} at {sites}, {how}"

    @cached_property
    def numbers(self) -> np.ndarray:
        """intp [n], ascending: numbers in the set of the edited sequences."""
        return np.unique(np.concatenate([rows.sequence for rows in self.edits]))

    @cached_property
    def begins(self) -> np.ndarray:
        """intp [n]: position of the first edit of each of `numbers`."""
        begins = np.full(len(self.numbers), np.iinfo(np.intp).max)
        for rows in self.edits:
            np.minimum.at(begins, np.searchsorted(self.numbers, rows.sequence), rows.position)
        return begins

    @property
    def layer(self) -> int:
        """The first block that a window has to run."""
        return min(window.first_layer(rows.spec.name) or 0 for rows in self.edits)

    def edited(self, start: int, n: int) -> np.ndarray:
        """intp: which of n sequences, from number `start` of the set on, are edited; from 0."""
        first, last = np.searchsorted(self.numbers, (start, start + n))
        return self.numbers[first:last] - start

    def run_trees(
        self,
        model: Model,
        specs: Sequence[SiteSpec],
        drawn: TreesDrawn,
        first: Ids,
        per_pass: int,
        asked: Asked | None,
        run: str,
        into: Into,
        advance: Callable[[int], None] = lambda done: None,
    ) -> dict[str, pl.DataFrame]:
        """Run the edited trees of a batch.

        Args:
            drawn: all trees of the batch.
            first: ids of the batch's first tree.
            per_pass: trees of a forward pass.
            asked: of text alone.
            run: name of the run.
            into: receives the activations; NaN of trees that are not edited.
            advance: called with the number of trees of the set done so far.

        Returns:
            The rows of `predictions`, and those of `outcomes` if `greedy`.
        """
        words, start, first_tree_id = drawn.words, drawn.start, first.sequence_id
        chosen = self.edited(start, len(words))
        begins = self.begins[np.searchsorted(self.numbers, start + chosen)]
        chosen = chosen[np.argsort(begins, kind="stable")]
        answers, others = [], []
        for at in range(0, len(chosen), per_pass):
            some = chosen[at : at + per_pass]
            changes = Changes(self.edits, start + some, self.store())

            def take(spec: SiteSpec, activations: Tensor, some: np.ndarray = some) -> None:
                for row, sequence in enumerate(some.tolist()):
                    into[spec.name].put(sequence, activations[row : row + 1])

            of_steps = self._steps(model, specs, words[some], start + some, changes, take)
            next_word = partial(self._next_word, model, start + some) if self.greedy else None
            given = tree_paths.predictions(model, words[some], of_steps)
            answers.append(tree_paths.graded(words[some], *given, next_word))
            others.append(self._others(model, words[some], of_steps, first_tree_id + some))
            advance(start + at + len(some))
        _blank(into, np.setdiff1d(np.arange(len(words)), chosen), np.ones(len(words), np.intp))
        advance(start + len(words))
        if not answers:
            return {}
        graded, tree_ids = concatenate(answers), first_tree_id + chosen
        rows = tree_paths.of_trees(tree_paths.prediction_rows(graded, run, 0), tree_ids)
        if self.measured is not None:
            tree, step = np.nonzero(graded.target != PAD)
            word, p = (np.concatenate(column)[tree, step] for column in zip(*others, strict=True))
            named = pl.Series(word != PAD)
            rows = rows.with_columns(
                other=pl.when(named).then(enum_series(word, WORDS)), p_other=pl.when(named).then(pl.Series(p))
            )
        found = {"predictions": rows.sort("token_id")}
        if self.greedy:
            outcomes = tree_paths.of_trees(tree_paths.outcome_rows(graded, run, 0), tree_ids)
            found["outcomes"] = outcomes.sort("tree_id")
        return found

    def _steps(
        self,
        model: Model,
        specs: Sequence[SiteSpec],
        words: np.ndarray,
        numbers: np.ndarray,
        changes: Changes,
        take: Take,
    ) -> Tensor:
        """The logits of each step, float32 [n, n_nodes - 1, d_vocab], of the trees of one pass.

        Args:
            numbers: intp [n], the trees' numbers in the set.
        """
        ids = torch.from_numpy(model.config.vocabulary.encode(words)).to(model.device)
        root = root_at(n_nodes_of(words))
        if self.whole:
            return forward(model, ids, specs, take, changes=changes)[:, root:-1]
        begin = min(root, int(self.begins[np.searchsorted(self.numbers, numbers)].min()))
        n_tokens = (words != PAD).sum(axis=1)
        logits = self._window(model, specs, ids, n_tokens, begin, numbers, changes, take)
        steps = logits.new_zeros(len(ids), ids.shape[1] - 1 - root, logits.shape[-1])
        live = logits[:, root - begin :][:, : steps.shape[1]]
        steps[:, : live.shape[1]] = live
        return steps

    def _window(
        self,
        model: Model,
        specs: Sequence[SiteSpec],
        ids: Tensor,
        n_tokens: np.ndarray,
        begin: int,
        numbers: np.ndarray,
        changes: Changes,
        take: Take,
    ) -> Tensor:
        """Run the tokens from `begin` on through the layers that the edits can change.

        Returns:
            The logits, float32 [n, longest - begin, d_vocab].
        """
        if not self._weights:
            held = parse(model.weights, model.source)
            self._weights.update({name: weight.float().to(model.device) for name, weight in held.items()})
        w, config, layer = self._weights, model.config, self.layer
        end = int(n_tokens.max())
        enter = [f"resid_post.{i - 1}" for i in range(max(layer, 1), config.n_layers + (layer == config.n_layers))]
        held = self._of_base(enter, numbers, n_tokens.clip(max=end), end).to(model.device)
        changed: dict[str, Tensor] = {}
        wanted = {spec.name for spec in specs}

        def touch(site: str, x: Tensor) -> Tensor:
            x = changes.apply(site, x, begin)
            if site in wanted:
                changed[site] = x.clone()
            return x

        before = [held[:, :begin, i] for i in range(held.shape[2])]
        if layer == 0:
            whole = window.embedded(w, ids[:, :begin], 0, lambda site, x: x)
            resid, before = window.embedded(w, ids[:, begin:end], begin, touch), [whole, *before]
        else:
            resid = touch(f"blocks.{layer - 1}.hook_resid_post", held[:, begin:end, 0].contiguous())
        with torch.no_grad():
            logits = window.run(w, config, layer, resid, before[: config.n_layers - layer], touch)
        for spec in specs:
            take(spec, self._whole_site(spec, numbers, n_tokens, ids.shape[1], begin, changed.get(spec.name)))
        return logits

    def _of_base(self, sites: Sequence[str], numbers: np.ndarray, n_tokens: np.ndarray, width: int) -> Tensor:
        """What the base run stored, float32 [n, width, n_sites, *row]; 0 past a sequence's end.

        Args:
            numbers: intp [n], the sequences' numbers in the set.
            n_tokens: intp [n], tokens to read of each.
        """
        if not sites:
            return torch.zeros(len(numbers), width, 0, 0)
        sequence, position = np.nonzero(np.arange(width) < n_tokens[:, None])
        ids = self.sequences.token_ids(numbers)[sequence] + position
        X, _ = self.store().read(ids, self.base, sites=list(sites))
        held = torch.zeros(len(numbers), width, *X.shape[1:])
        held[torch.from_numpy(sequence), torch.from_numpy(position)] = torch.from_numpy(X)
        return held

    def _whole_site(
        self,
        spec: SiteSpec,
        numbers: np.ndarray,
        n_tokens: np.ndarray,
        width: int,
        begin: int,
        changed: Tensor | None,
    ) -> Tensor:
        """A site of whole sequences: as the base run stored it, and as the window changed it."""
        held = self._of_base([spec.short], numbers, n_tokens, width)[:, :, 0]
        if spec.kind == "pattern":
            held = held.movedim(1, 2)  # [sequence, head, query, key]
            if changed is not None:
                held[:, :, begin : begin + changed.shape[2], : changed.shape[3]] = changed.cpu()
        elif changed is not None:
            held[:, begin : begin + changed.shape[1]] = changed.cpu()
        return held

    def _next_word(
        self, model: Model, numbers: np.ndarray, rows: np.ndarray, words: np.ndarray, at: np.ndarray
    ) -> np.ndarray:
        """uint8 [n]: the likeliest word after a position, of some trees of a pass.

        Args:
            numbers: intp, numbers in the set of the trees of the pass.
            rows: intp [n], which of them.
            words: uint8 [n, pos], what they read.
            at: intp [n], the positions.
        """
        vocabulary = model.config.vocabulary
        ids = torch.from_numpy(vocabulary.encode(words[:, : at.max() + 1])).to(model.device)
        changes = Changes(self.edits, numbers[rows], self.store(), ids.shape[1])
        logits = forward(model, ids, [], lambda site, activations: None, changes=changes)
        return vocabulary.decode(logits.argmax(dim=-1).cpu().numpy()[np.arange(len(words)), at])

    def _others(
        self, model: Model, words: np.ndarray, of_steps: Tensor, tree_ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The measured word of each step, uint8 [n, n_nodes - 1] or PAD, and its probability."""
        n_nodes = n_nodes_of(words)
        word = np.full((len(words), n_nodes - 1), PAD, np.uint8)
        if self.measured is not None:
            ids = self.measured["token_id"].to_numpy()
            tree, step = tree_ids_of(ids), positions(ids) - root_at(n_nodes)
            order = np.argsort(tree_ids)
            row = np.searchsorted(tree_ids[order], tree).clip(max=len(order) - 1)
            good = (tree_ids[order[row]] == tree) & (step >= 0) & (step < n_nodes - 1)
            word[order[row[good]], step[good]] = self.measured["word"].to_numpy()[good]
        numbers = torch.from_numpy(model.config.vocabulary.encode(np.where(word == PAD, words[:, :1], word)))
        p = of_steps.softmax(-1).gather(2, numbers.to(of_steps.device)[:, :, None])[:, :, 0]
        return word, p.cpu().numpy()

    def run_text(
        self,
        model: Model,
        specs: Sequence[SiteSpec],
        drawn: Drawn,
        first: Ids,
        per_pass: int,
        asked: Asked | None,
        run: str,
        into: Into,
        advance: Callable[[int], None] = lambda done: None,
    ) -> dict[str, pl.DataFrame]:
        """Run the edited sequences of a batch of text; see `passes.run_text` and `run_trees`."""
        lengths, begins = drawn.lengths, drawn.ends[:-1]
        chosen = self.edited(drawn.start, len(drawn))
        graded = None if asked is None else next_token.Grades(int(lengths.sum()), asked.top)
        for which in passes(lengths[chosen], per_pass):
            some = chosen[which]
            ids = torch.from_numpy(padded(drawn.numbers, begins[some], lengths[some])).to(model.device)
            changes = Changes(self.edits, drawn.start + some, self.store())

            def take(spec: SiteSpec, activations: Tensor, some: np.ndarray = some) -> None:
                put(into[spec.name], spec, activations, some, begins[some], lengths[some])

            logits = forward(model, ids, specs, take, lengths[some], changes)
            if graded is not None:
                graded.add(logits, ids, lengths[some], begins[some])
        _blank(into, np.setdiff1d(np.arange(len(drawn)), chosen), lengths)
        advance(drawn.start + len(drawn))
        if graded is None or not len(chosen):
            return {}
        ids_of, sequence_ids = drawn.token_ids(first), np.repeat(drawn.sequence_ids(first), lengths)
        return {"predictions": graded.rows(run, ids_of, sequence_ids, drawn.pieces)}


def _blank(into: Into, sequences: np.ndarray, lengths: np.ndarray) -> None:
    """Fill the rows of sequences that are not edited with NaN.

    Args:
        lengths: intp, rows of each sequence of the batch in the layout `rows`.
    """
    begins = np.cumsum(lengths) - lengths
    for buffer in into.values():
        shape, at = buffer.layout.row_shape, buffer.layout.position_axis
        for sequence in sequences.tolist():
            if at is None:
                buffer.put(int(begins[sequence]), torch.full((int(lengths[sequence]), *shape), torch.nan))
            else:
                whole = buffer.layout.shape[1:]
                buffer.put(sequence, torch.full((1, *whole), torch.nan))
