"""Run random sequences of a run with edits again, by whole forward passes, and compare.

A run that was computed from the tokens and layers which its edits can change is thereby compared
with the forward pass that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl

from actstore.arrays.address import Ids
from actstore.errors import ActstoreError
from actstore.ingest.interventions.kept import Kept
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.replay.difference import P_TOLERANCE, TIE, TOLERANCE, Difference, not_compared, of_site
from actstore.store import Store


def compare_edited(
    store: Store,
    job: Ingest,
    first: Ids,
    batches: set[int],
    n_sequences: int,
    seed: int,
    step: Callable[[int], None] = lambda done: None,
) -> list[Difference]:
    """Compare the edits' donors, each site, and each prediction.

    Args:
        first: the first ids of the base run's dataset.
        batches: numbers of the run's committed batches.
        n_sequences: edited sequences to draw.
        seed: seed of the draw.
        step: called with the number of sequences done.
    """
    assert job.patch is not None
    run, patch, found = job.plan.run, job.patch, list[Difference]()
    try:
        for number, (rows, about) in enumerate(zip(patch.edits, patch.about, strict=True)):
            if rows.donors is not None:
                same = rows.donors_hash(store) == about["donors_xxh3_128"]
                found.append(Difference(run, f"donors of edit {number}", float(not same), 0.0, len(rows), "their hash"))
    except ActstoreError as error:  # donors that were dropped
        return [not_compared(run, "donors", str(error))]
    chosen = np.random.default_rng(seed).permutation(patch.numbers)[:n_sequences]
    some = replace(patch, edits=[rows.of(chosen) for rows in patch.edits], whole=True)
    some.edits = [rows for rows in some.edits if len(rows)]
    rerun = replace(job, patch=some)
    kept = {spec.name: Kept(site.layout) for spec, site in zip(job.specs, job.plan.sites, strict=True)}
    ours = list[pl.DataFrame]()
    apart, tolerance = dict.fromkeys(kept, 0.0), dict.fromkeys(kept, TOLERANCE)
    n_tokens = n_done = 0
    for batch in sorted(batches):
        drawn = job.sequences.drawn(batch)
        edited = some.edited(drawn.start, len(drawn))
        if not len(edited):
            continue
        of_batch = first.of_batch(job.plan.dataset, batch, drawn.start)
        answers = rerun.answers(drawn, of_batch, kept, lambda done: None)()
        if "predictions" in answers:
            ours.append(answers["predictions"])
        for sequence in edited.tolist():
            n, ids = int(drawn.lengths[sequence]), some.sequences.token_ids(np.array([drawn.start + sequence]))[0]
            n_tokens += n
            begin = int(drawn.lengths[:sequence].sum())
            for spec in job.specs:
                X, _ = store.read(ids + np.arange(n), run, spec.short)
                given = kept[spec.name].rows(sequence, begin, n)
                worst = np.abs(np.nan_to_num(X, nan=0.0) - np.nan_to_num(given, nan=0.0)).max()
                largest = float(np.nanmax(np.abs(given)))
                apart[spec.name] = max(apart[spec.name], float(worst / max(largest, 1e-30)))
                tolerance[spec.name] = max(tolerance[spec.name], of_site(job.dtype, largest))
        step(n_done := n_done + len(edited))
    for spec in job.specs:
        found.append(
            Difference(run, spec.short, apart[spec.name], tolerance[spec.name], n_tokens, "an edited sequence")
        )
    if ours:
        theirs = pl.concat(ours)
        query = "from predictions where run = $run and token_id in (select unnest($ids)) order by token_id"
        held = store.sql(query, {"run": run, "ids": theirs["token_id"].to_list()})
        found.append(_predictions(run, held, theirs))
    return found


def _predictions(run: str, held: pl.DataFrame, ours: pl.DataFrame) -> Difference:
    """Compare predictions; where two words are equally likely, either is right."""
    ours = ours.sort("token_id")
    if len(held) != len(ours):
        return Difference(run, "predictions", 1.0, P_TOLERANCE, len(ours), f"{len(held)} rows, not {len(ours)}")
    apart = np.abs(held["p_target"].to_numpy() - ours["p_target"].to_numpy())
    for column in ("token_id", "target"):
        apart[(held[column].cast(pl.String) != ours[column].cast(pl.String)).to_numpy()] = 1.0
    same = (held["predicted"].cast(pl.String) == ours["predicted"].cast(pl.String)).to_numpy()
    apart[~same & (held["p_target"].to_numpy() > 0.5 + TIE)] = 1.0  # then the target alone can be the likeliest
    worst = int(apart.argmax())
    return Difference(
        run, "predictions", float(apart[worst]), P_TOLERANCE, len(ours), f"token {held['token_id'][worst]}"
    )
