"""Run random sequences of text of a stored run again, and compare with what is stored.

The tokens and the split are those of the store. The sequences' hashes are computed anew, and so is
all that the model makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import polars as pl
import torch
from torch import Tensor

from actstore.arrays.address import Ids
from actstore.ingest.answers.passes import as_rows, passes
from actstore.ingest.answers.text_continuations import TextGenerator, generation_rows
from actstore.ingest.corpus.drawn import Drawn
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.models.forward import activations as activations_of
from actstore.ingest.models.forward import forward
from actstore.ingest.models.sites import SiteSpec
from actstore.ingest.replay.difference import DRAWN_OTHERWISE, P_TOLERANCE, TIE, Difference, of_rows, of_site
from actstore.store import Store
from actstore.writing.plan import SitePlan

AT_ONCE = 4  # sequences per forward pass
KEYS = {"listed_sequences": "sequence_id", "tokens": "token_id"}


def compare_text(
    store: Store,
    job: Ingest,
    first: Ids,
    batches: Sequence[int],
    n_sequences: int,
    seed: int,
    step: Callable[[int], None] = lambda done: None,
) -> list[Difference]:
    """Run random sequences again, and compare each site, and each prediction.

    Args:
        first: the first ids of the run's dataset.
        batches: numbers of the run's committed batches.
        n_sequences: sequences to draw among those of these batches.
        seed: seed of the draw.
        step: called with the number of sequences done.
    """
    if not batches:
        return []
    found: dict[int, list[int]] = {}
    starts = _starts(store, job, first)
    every = np.concatenate([np.stack([np.full(n, b), np.arange(n)], 1) for b, n in starts.items() if b in batches])
    chosen = np.random.default_rng(seed).choice(len(every), min(n_sequences, len(every)), replace=False)
    for batch, sequence in every[np.sort(chosen)].tolist():
        found.setdefault(batch, []).append(sequence)
    of_batches, n_done = list[list[Difference]](), 0
    for b, some in found.items():
        within = partial(_after, step, n_done)
        of_batches.append(_compare_batch(store, job, job.sequences.drawn(b), first, b, np.array(some), within))
        step(n_done := n_done + len(some))
    return [_worst([differences[i] for differences in of_batches]) for i in range(len(of_batches[0]))]


def _after(step: Callable[[int], None], before: int, done: int) -> None:
    step(before + done)


def _starts(store: Store, job: Ingest, first: Ids) -> dict[int, int]:
    """Number of sequences of each batch of the run's dataset."""
    dataset = job.plan.dataset
    batch = (
        f"(first_token_id - {first.token_id}) // {int(dataset['rows_per_shard'])}"
        if dataset["layout"] == "rows"
        else f"(sequence_id - {first.sequence_id}) // {int(dataset['rows_per_chunk'])}"
    )
    query = (
        f"select {batch} as batch, count(*) as n from listed_sequences where dataset = $dataset group by 1 order by 1"
    )
    return dict(store.sql(query, {"dataset": dataset["dataset"]}).rows())


def _worst(differences: list[Difference]) -> Difference:
    """The comparisons of several batches as one."""
    worst = max(differences, key=lambda each: each.worst)
    return Difference(
        worst.run, worst.what, worst.worst, worst.tolerance, sum(each.n for each in differences), worst.first
    )


def _compare_batch(
    store: Store,
    job: Ingest,
    drawn: object,
    first: Ids,
    batch: int,
    chosen: np.ndarray,
    step: Callable[[int], None],
) -> list[Difference]:
    """Compare some sequences of one batch.

    Args:
        chosen: intp [n], numbers of the sequences in the batch, ascending.
        step: called with the number of these sequences that are done.
    """
    assert isinstance(drawn, Drawn)
    run, dataset = job.plan.run, str(job.plan.dataset["dataset"])
    of_batch = first.of_batch(job.plan.dataset, batch, drawn.start)
    sequence_ids = drawn.sequence_ids(of_batch)[chosen]
    if isinstance(job.generator, TextGenerator):
        return [_generations(store, job, job.generator, drawn, of_batch, chosen)]
    rows = drawn.rows(of_batch, dataset)
    found = [_rows(store, run, name, rows[name], sequence_ids) for name in KEYS]
    is_chosen = np.repeat(np.isin(np.arange(len(drawn)), chosen), drawn.lengths)
    token_ids = drawn.token_ids(of_batch)[is_chosen]
    held = None
    if job.asked is not None:
        query = (
            "select token_id, target, predicted, p_target, correct, loss, rank from predictions where run = $run and "
        )
        query += "sequence_id in (select unnest($ids)) order by token_id"
        held = store.sql(query, {"run": run, "ids": sequence_ids.tolist()})
    rerun = _run(job, drawn, chosen, held, step)
    for site in job.plan.sites:
        found.append(_site(store, run, site, rerun.sites[site.site], token_ids))
    if held is not None:
        found.append(_predictions(run, held, rerun))
    return found


def _generations(
    store: Store, job: Ingest, generator: TextGenerator, drawn: Drawn, of_batch: Ids, chosen: np.ndarray
) -> Difference:
    """Compare the continuations of some sequences; a draw at a border of two tokens may differ."""
    run = job.plan.run
    ours = generation_rows(generator.go_on(drawn, chosen, AT_ONCE), drawn, run, of_batch)
    order = "sequence_id, sample, position"
    query = f"from generations where run = $run and sequence_id in (select unnest($ids)) order by {order}"
    held = store.sql(query, {"run": run, "ids": drawn.sequence_ids(of_batch)[chosen].tolist()})
    both = [
        rows.group_by("sequence_id", "sample", maintain_order=True).agg(pl.col("token").cast(pl.String), "p")
        for rows in (ours, held.cast({"sample": pl.UInt8}))
    ]
    joined = both[0].join(both[1], on=["sequence_id", "sample"], suffix="_held", how="full")
    alike = [row["token"] == row["token_held"] for row in joined.iter_rows(named=True)]
    agreeing = joined.filter(pl.Series(alike, dtype=pl.Boolean))
    apart = np.abs(agreeing["p"].explode().to_numpy() - agreeing["p_held"].explode().to_numpy()).max(initial=0.0)
    otherwise = 1 - float(np.mean(alike)) if alike else 0.0
    first = f"sequence {joined['sequence_id'][alike.index(False)]}" if not all(alike) else ""
    worst = otherwise if apart <= P_TOLERANCE else 1.0
    return Difference(run, "generations", worst, DRAWN_OTHERWISE, len(joined), first)


def _rows(store: Store, run: str, name: str, expected: pl.DataFrame, sequence_ids: np.ndarray) -> Difference:
    """Compare a table's rows of the chosen sequences with those that the stored tokens give."""
    ids = sequence_ids.tolist()
    expected = expected.filter(pl.col("sequence_id").is_in(ids))
    query = f"from {name} where sequence_id in (select unnest($ids)) order by {KEYS[name]}"
    return of_rows(run, name, store.sql(query, {"ids": ids}), expected)


def _none() -> np.ndarray:
    return np.zeros(0)


@dataclass(frozen=True)
class _Rerun:
    """What the model gives to the chosen sequences.

    Attributes:
        sites: TransformerLens name → float32 [token, *row], tokens of one sequence after another.
        pieces: spelling of each token number.
        target: int64 [n], numbers of the predicted tokens.
        p_target, p_best, p_held: float32 [n], probabilities of the target, of the likeliest token,
            and of the token that is stored as predicted.
        fewest, most: int64 [n], between these numbers lies the target's rank.
    """

    sites: dict[str, np.ndarray]
    pieces: Sequence[str]
    target: np.ndarray = field(default_factory=_none)
    p_target: np.ndarray = field(default_factory=_none)
    p_best: np.ndarray = field(default_factory=_none)
    p_held: np.ndarray = field(default_factory=_none)
    fewest: np.ndarray = field(default_factory=_none)
    most: np.ndarray = field(default_factory=_none)


def _run(
    job: Ingest, drawn: Drawn, chosen: np.ndarray, held: pl.DataFrame | None, step: Callable[[int], None]
) -> _Rerun:
    """Run the model over some sequences of a batch.

    Args:
        held: the stored predictions of these sequences, by token_id.
        step: called with the number of these sequences that are done.
    """
    n_done, lengths = 0, drawn.lengths[chosen]
    rows: dict[str, list[Tensor]] = {spec.name: [torch.empty(0)] * len(chosen) for spec in job.specs}
    answers: list[list[np.ndarray]] = [[]] * len(chosen)
    number = {piece: i for i, piece in enumerate(drawn.pieces)}
    at = np.cumsum(lengths - 1) - (lengths - 1)
    predicted = None
    if held is not None and len(held) == int((lengths - 1).sum()):
        predicted = np.array([number.get(piece, 0) for piece in held["predicted"].cast(pl.String)], np.int64)
    shapes = {site.site: site.layout.row_shape for site in job.plan.sites}
    for some in passes(lengths, AT_ONCE):
        padded = np.zeros((len(some), int(lengths[some].max())), np.int64)
        for place, i in enumerate(some.tolist()):
            padded[place, : lengths[i]] = drawn.numbers[drawn.ends[chosen[i]] : drawn.ends[chosen[i] + 1]]
        ids = torch.from_numpy(padded).to(job.device)

        def take(spec: SiteSpec, activations: Tensor, some: np.ndarray = some) -> None:
            for row, i in enumerate(some.tolist()):
                kept = as_rows(activations[row], spec, int(lengths[i]), shapes[spec.name])
                rows[spec.name][i] = kept.cpu().clone()

        step(n_done)
        n_done += len(some)
        if held is None:
            activations_of(job.model, ids, job.specs, take, lengths[some])
            continue
        logits = forward(job.model, ids, job.specs, take, lengths[some])
        for row, i in enumerate(some.tolist()):
            n = int(lengths[i]) - 1
            given = None if predicted is None else torch.from_numpy(predicted[at[i] : at[i] + n]).to(job.device)
            answers[i] = _graded(logits[row, :n], ids[row, 1 : n + 1], given)
    sites = {name: torch.cat(of_each).numpy() for name, of_each in rows.items()}
    columns = [np.concatenate(column) for column in zip(*answers, strict=True)] if held is not None else []
    return _Rerun(sites, drawn.pieces, *columns)


def _graded(logits: Tensor, target: Tensor, held: Tensor | None) -> list[np.ndarray]:
    """The columns of _Rerun from `target` on, of one sequence."""
    p = torch.softmax(logits, dim=-1)
    p_target = p.gather(1, target[:, None])
    p_best = p.max(1).values
    p_held = p_best if held is None else p.gather(1, held[:, None])[:, 0]
    fewest, most = ((p > p_target * (1 + TIE)).sum(1), (p >= p_target * (1 - TIE)).sum(1) - 1)
    return [column.cpu().numpy() for column in (target, p_target[:, 0], p_best, p_held, fewest, most)]


def _site(store: Store, run: str, site: SitePlan, ours: np.ndarray, token_ids: np.ndarray) -> Difference:
    held, _ = store.read("select unnest($ids)::bigint as token_id", run, site.short, {"ids": token_ids.tolist()})
    apart = np.nan_to_num(np.abs(held - ours), nan=np.inf)
    apart[np.isnan(held) & np.isnan(ours)] = 0.0  # keys of a pattern that the sequence has not
    largest = float(np.nanmax(np.abs(ours)))
    apart = apart.reshape(len(ours), -1).max(axis=1) / max(largest, 1e-30)
    worst, tolerance = int(apart.argmax()), of_site(site.layout.dtype, largest)
    return Difference(run, site.short, float(apart[worst]), tolerance, len(ours), f"token {token_ids[worst]}")


def _predictions(run: str, held: pl.DataFrame, rerun: _Rerun) -> Difference:
    """Compare predictions; of tokens that are equally likely, either is right."""
    n = len(rerun.target)
    if len(held) != n:
        return Difference(run, "predictions", 1.0, P_TOLERANCE, n, f"{len(held)} rows, not {n}")
    if not n:
        return Difference(run, "predictions", 0.0, P_TOLERANCE, 0, "")
    p, loss, rank = (held[name].to_numpy() for name in ("p_target", "loss", "rank"))
    apart = np.maximum(np.abs(p - rerun.p_target), np.abs(np.exp(-loss) - rerun.p_target))
    target, predicted = (held[name].cast(pl.String) for name in ("target", "predicted"))
    wrong = (target != pl.Series(rerun.pieces, dtype=pl.String).gather(rerun.target)).to_numpy()
    wrong |= ((target == predicted) != held["correct"]).to_numpy()
    wrong |= (rerun.p_held < rerun.p_best - TIE) | (rank < rerun.fewest) | (rank > rerun.most)
    apart[wrong] = 1.0
    worst = int(apart.argmax())
    return Difference(run, "predictions", float(apart[worst]), P_TOLERANCE, n, f"token {held['token_id'][worst]}")
