"""From a base run and edits to a job, or to predictions that are not stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from actstore.arrays.address import Ids
from actstore.commits.log import manifests
from actstore.errors import BadInput, nearest
from actstore.ingest.answers.next_token import understood
from actstore.ingest.interventions import rows as of_edits
from actstore.ingest.interventions import window
from actstore.ingest.interventions.patch import Patch
from actstore.ingest.interventions.rows import Sequences
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.sets import stored_set
from actstore.ingest.jobs.stored import model_of_row, row_where
from actstore.ingest.models.config import there_are
from actstore.ingest.models.model import Model
from actstore.ingest.models.sites import SiteSpec
from actstore.ingest.task import Sequences as Set
from actstore.ingest.trees.tokens import WORDS
from actstore.interventions import Edit
from actstore.storage.at import place
from actstore.store import Store
from actstore.writing.committed import check_plan, must_agree
from actstore.writing.parts import rows_committed

ANSWERS = ("all", "next")  # greedy answers too, or next tokens alone
MOST_EDITS = 255  # an edit's number is a byte
Row = dict[str, Any]


class Base:
    """The run that edits start from: its model, set and sequences.

    Args:
        root: the store's folder.
        run: name of the base run.
        device: "cpu" or "cuda".
    """

    def __init__(self, root: Path, run: str, device: str = "cpu") -> None:
        self.root, self.run, self.device = root, run, device
        committed = manifests(root)
        rows = {name: rows_committed(root, committed, name).to_dicts() for name in ("runs", "models", "datasets")}
        self.about: Row = row_where(rows["runs"], "run", run, "runs")
        if self.about.get("prompt") in ("tree", "text"):
            raise BadInput(
                f"run {run!r} holds continuations; edits start from a run over whole tasks: name that (--base)"
            )
        self.model_row = row_where(rows["models"], "weights_sha256", self.about["weights_sha256"], "models")
        self.dataset = row_where(rows["datasets"], "dataset", self.about["dataset"], "datasets")
        self._committed = committed

    @cached_property
    def model(self) -> Model:
        """The run's model, from the store's weights."""
        return model_of_row(self.root, self.model_row, self.device)

    @cached_property
    def set(self) -> Set:
        """The run's set of sequences."""
        return stored_set(self.root, self._committed, self.dataset)

    @cached_property
    def store(self) -> Store:
        """The store, opened for reading."""
        return Store(self.root)

    def opened(self) -> Store:
        """As `store`, for whoever needs it later."""
        return self.store

    @cached_property
    def sequences(self) -> Sequences:
        """The stored sequences of the run."""
        return Sequences.of(self.store, self.run)

    @property
    def noted(self) -> Mapping[str, Any]:
        """What the run noted beside its versions."""
        found: Mapping[str, Any] = json.loads(self.about["versions"])
        return found


def prepare_patch(
    store: str | Path,
    base: str,
    edits: Sequence[Edit],
    run: str | None = None,
    sites: Sequence[str] | None = (),
    batch_size: int | None = None,
    answers: str = "all",
    device: str = "cpu",
    wait: float = 10.0,
) -> Ingest:
    """A job that stores a run with edited activations; nothing is written.

    Where the base run stored what enters the layers that the edits can change, only those layers
    and tokens are run. Otherwise whole forward passes are.

    Args:
        base: name of a stored run over whole tasks or text, whose weights can be read.
        edits: what is edited, see interventions.Edit.
        run: name of the new run; default: made from the base's, how and where.
        sites: sites whose activations are stored; default: none.
        batch_size: sequences per forward pass; default: the base run's.
        answers: `all`; or `next`, which leaves out `outcomes` of trees, so that no wrong answer is
            continued greedily.
        wait: seconds to wait for another process that writes to the store.

    Raises:
        NotStored: there is no such run, site or token; or the base's weights are not stored.
        BadInput: an edit has no meaning, or another run has the name.
    """
    root = place(store)
    if answers not in ANSWERS:
        raise BadInput(f"got --answers {answers}{nearest(answers, ANSWERS)}; {there_are(ANSWERS)}")
    if not 0 < len(edits) <= MOST_EDITS:
        raise BadInput(f"got {len(edits)} edits; give 1 to {MOST_EDITS} (--patch)")
    name = run or f"{base}-{edits[0].how}-{edits[0].at}"
    with Store(root) as held:
        base = held.resolve_run(base)
        stored = held.sql("select * from interventions where run = $run order by edit", {"run": name})
    origin = Base(root, base, device)
    specs = [of_edits.site_of(origin.model, edit.at) for edit in edits]
    asked = [_about(base, edit, spec) for edit, spec in zip(edits, specs, strict=True)]
    if len(stored):
        patch = _stored(origin, stored.to_dicts(), asked, specs)
    else:
        rows = [
            of_edits.asked(origin.store.whole, base, edit, spec, origin.sequences)
            for edit, spec in zip(edits, specs, strict=True)
        ]
        about = [
            {
                **of_edit,
                **{"donor_run": found.donors, "donor_site": found.donor_site, "snapshot": origin.store.snapshot},
                **{"n_edits": len(found), "donors_xxh3_128": found.donors_hash(origin.store)},
            }
            for of_edit, found in zip(asked, rows, strict=True)
        ]
        patch = Patch(origin.opened, base, rows, origin.sequences, about=about)
    wanted = origin.model.sites(list(sites)) if sites else []
    fits = fits_window(origin, [rows.spec for rows in patch.edits], wanted)
    patch.whole, patch.greedy = not fits or (patch.whole and bool(len(stored))), answers == "all"
    job = job_of(origin, patch, name, [spec.short for spec in wanted], batch_size, wait)
    check_plan(root, job.plan)
    return job


def job_of(
    origin: Base, patch: Patch, run: str, sites: Sequence[str], batch_size: int | None = None, wait: float = 0.0
) -> Ingest:
    """The job of a run with edits."""
    asked = understood(origin.noted.get("answers") or "next")
    size = batch_size or origin.noted.get("batch_size")
    return Ingest(origin.root, origin.model, origin.set, run, sites, size, wait=wait, asked=asked, patch=patch)


def _about(base: str, edit: Edit, spec: SiteSpec) -> Row:
    """An edit's row of `interventions`, as far as it is asked for."""
    return {
        "base_run": base,
        "site": spec.name,
        "short": spec.short,
        "how": edit.how,
        "query": edit.query,
        "params": json.dumps(dict(edit.params), sort_keys=True, default=str),
    }


def _stored(origin: Base, stored: Sequence[Row], asked: Sequence[Row], specs: Sequence[SiteSpec]) -> Patch:
    """The edits of a run that is stored already; those asked for must agree."""
    run = stored[0]["run"]
    must_agree(f"run {run!r}", {"edits": len(stored)}, {"edits": len(asked)}, "name the new run otherwise (--run)")
    for row, wanted in zip(stored, asked, strict=True):
        must_agree(f"edit {row['edit']} of run {run!r}", row, wanted, "name the new run otherwise (--run)")
    return stored_patch(origin, run, stored, specs)


def stored_patch(origin: Base, run: str, stored: Sequence[Row], specs: Sequence[SiteSpec] | None = None) -> Patch:
    """The edits of a stored run.

    Args:
        stored: the run's rows of `interventions`, in the order of their numbers.
        specs: the edited sites; default: read off the model.
    """
    committed = manifests(origin.root)
    held = rows_committed(origin.root, committed, "edits").filter(pl.col("run") == run)
    about = row_where(rows_committed(origin.root, committed, "runs").to_dicts(), "run", run, "runs")
    found = specs or [of_edits.site_of(origin.model, row["short"]) for row in stored]
    rows = [
        of_edits.stored(held.filter(pl.col("edit") == row["edit"]), row, spec, origin.sequences)
        for row, spec in zip(stored, found, strict=True)
    ]
    noted = json.loads(about["versions"])
    columns = [{name: value for name, value in row.items() if name not in ("run", "edit")} for row in stored]
    whole, greedy = noted.get("forward") != "window", bool(noted.get("greedy", True))
    return Patch(origin.opened, origin.run, rows, origin.sequences, whole, greedy, columns)


def fits_window(origin: Base, edited: Sequence[SiteSpec], wanted: Sequence[SiteSpec]) -> bool:
    """Whether the base run stored all that the edits cannot change.

    Args:
        edited: the edited sites.
        wanted: the sites to be stored.
    """
    if origin.model.task != "trees" or origin.model.config.attention_dir != "causal":
        return False
    layers = [window.first_layer(spec.name) for spec in (*edited, *wanted)]
    if None in layers:
        return False
    held = set(origin.store.sites(origin.run))
    first = min(layer for layer in layers[: len(edited)] if layer is not None)
    needed = {f"resid_post.{layer - 1}" for layer in range(max(first, 1), origin.model.config.n_layers)}
    needed |= {f"resid_post.{first - 1}"} if first else set()
    return needed | {spec.short for spec in wanted} <= held


def patching(store: Store, device: str = "cpu") -> Callable[..., pl.DataFrame]:
    """Runs edits without storing them; see interventions.Patching.

    Args:
        store: an open store; the last commit is read.
    """
    bases: dict[str, Base] = {}

    def patch(run: str, edits: Sequence[Edit], measure: pl.DataFrame | None = None) -> pl.DataFrame:
        if run not in bases:
            bases[run] = Base(store.path, run, device)
        origin = bases[run]
        specs = [of_edits.site_of(origin.model, edit.at) for edit in edits]
        rows = [
            of_edits.asked(origin.store.whole, run, edit, spec, origin.sequences)
            for edit, spec in zip(edits, specs, strict=True)
        ]
        patch = Patch(origin.opened, run, rows, origin.sequences, not fits_window(origin, specs, []), False)
        patch.measured = None if measure is None else _measured(measure)
        job = job_of(origin, patch, "patched", [])
        first, found = Ids.of_dataset(origin.dataset), []
        batches = range(job.n_batches) if job.of_text else np.unique(patch.numbers // origin.dataset["trees_per_shard"])
        for batch in map(int, batches):
            drawn = job.sequences.drawn(batch)
            of_batch = first.of_batch(origin.dataset, batch, drawn.start)
            found.append(job.answers(drawn, of_batch, {}, lambda done: None))
        return pl.concat([answers["predictions"].drop("run") for answers in found if answers])

    return patch


def _measured(measure: pl.DataFrame) -> pl.DataFrame:
    """Measured tokens, with the numbers of their words."""
    numbers = {word: number for number, word in enumerate(WORDS)}
    words = measure["token"].cast(pl.String).replace_strict(numbers, default=None, return_dtype=pl.UInt8)
    if words.null_count():
        raise BadInput(
            f"got the token {measure['token'].cast(pl.String).filter(words.is_null())[0]!r} to measure, which is no word"
        )
    return pl.DataFrame({"token_id": measure["token_id"], "word": words}).sort("token_id")
