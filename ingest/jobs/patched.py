"""From a base run and edits to a job, or to predictions that are not stored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from actstore.advice import ingest_sites
from actstore.arrays.address import Ids
from actstore.commits.log import manifests
from actstore.commits.manifest import Manifest
from actstore.errors import BadInput, NotStored, nearest
from actstore.ingest.answers.next_token import Asked, understood
from actstore.ingest.interventions import rows as of_edits
from actstore.ingest.interventions import window
from actstore.ingest.interventions.kept import Kept
from actstore.ingest.interventions.patch import Patch
from actstore.ingest.interventions.rows import Sequences
from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.sets import stored_set
from actstore.ingest.jobs.stored import model_of_row, row_where
from actstore.ingest.models.config import there_are
from actstore.ingest.models.load import check_device
from actstore.ingest.models.model import Model
from actstore.ingest.models.sites import SiteSpec
from actstore.ingest.task import Sequences as Set
from actstore.ingest.trees.tokens import WORDS
from actstore.interventions import Edit, hash_of
from actstore.storage.at import place
from actstore.store import Store
from actstore.writing.committed import check_plan, must_agree, sites_of
from actstore.writing.parts import rows_committed

EDITED = "select distinct base_run from interventions where run = $run"
ANSWERS = ("all", "next")  # greedy answers too, or next tokens alone
MOST_EDITS = 255  # an edit's number is a byte
Row = dict[str, Any]


class Base:
    """The run that edits start from: its model, set and sequences.

    Args:
        root: the store's folder.
        run: name of the base run.
        device: "cpu" or "cuda".
        committed: the store's commits; default: all of them. Repair leaves out what is damaged.
    """

    def __init__(self, root: Path, run: str, device: str = "cpu", committed: Sequence[Manifest] | None = None) -> None:
        self.root, self.run, self.device = root, run, device
        committed = manifests(root) if committed is None else committed
        rows = {name: rows_committed(root, committed, name).to_dicts() for name in ("runs", "models", "datasets")}
        self._runs: list[Row] = rows["runs"]
        found = next((row for row in self._runs if row["run"] == run), None)
        if found is None:
            raise NotStored(f"{root} holds no run {run!r}, from which edits start; restore it from a copy")
        self.about: Row = found
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

    @property
    def held(self) -> frozenset[str]:
        """TransformerLens' names of the sites that every batch of the run has."""
        return frozenset.intersection(*map(frozenset, sites_of(self._committed, self.run).values()))

    def refuse_unfinished(self) -> None:
        """Refuse a run of which batches are missing."""
        of_batches = sites_of(self._committed, self.run)
        if len(of_batches) < self.set.n_batches:
            raise BadInput(
                f"run {self.run!r} is not finished: {len(of_batches)} of {self.set.n_batches} batches are stored; finish it "
                "first, by the command that began it"
            )

    @cached_property
    def store(self) -> Store:
        """The store, opened for reading."""
        return Store(self.root)

    def opened(self) -> Store:
        """As `store`, for whoever needs it later."""
        return self.store

    def close(self) -> None:
        """Close the store, if it was opened."""
        if "store" in self.__dict__:
            self.store.close()

    @cached_property
    def sequences(self) -> Sequences:
        """The stored sequences of the run."""
        return Sequences.of(self.store, self.run)

    @cached_property
    def site_rows(self) -> list[Row]:
        """The rows of `sites` of all runs."""
        return rows_committed(self.root, self._committed, "sites").to_dicts()

    @cached_property
    def edits(self) -> pl.DataFrame:
        """The rows of `edits` of all runs."""
        return rows_committed(self.root, self._committed, "edits")

    @property
    def noted(self) -> Mapping[str, Any]:
        """What the run noted beside its versions."""
        return self.noted_of(self.run)

    def noted_of(self, run: str) -> Mapping[str, Any]:
        """What a run noted beside its versions."""
        about = row_where(self._runs, "run", run, "runs")
        found: Mapping[str, Any] = json.loads(about["versions"])
        return found


def prepare_patch(
    store: str | Path,
    base: str,
    edits: Sequence[Edit] = (),
    run: str | None = None,
    sites: Sequence[str] | None = None,
    batch_size: int | None = None,
    answers: str | None = None,
    device: str = "cpu",
    wait: float = 10.0,
    dtype: str | None = None,
    codec: str | None = None,
) -> Ingest:
    """A job that stores a run with edited activations; nothing is written.

    The job keeps the store open for its donors; close the job's `patch` after the job has run.

    Where the base run stored what enters the layers that the edits can change, only those layers
    and tokens are run. Otherwise whole forward passes are. A run that is stored already keeps its
    edits, whatever their queries would yield now. If the base run is not stored as float32, whole
    forward passes are run, and only what the edits read of it is rounded: donors and means.

    Args:
        base: name of a stored run over whole tasks or text, whose weights can be read.
        edits: what is edited, see interventions.Edit; none for a run that is stored.
        run: name of the new run; default: made from the base's, how and where.
        sites: sites whose activations are stored; default: none, or the stored run's own.
        batch_size: sequences per forward pass; default: the stored run's own, or the base run's.
        answers: `all`; or `next`, which leaves out `outcomes` of trees, so that no wrong answer is
            continued greedily. Default: the stored run's own, or `all`.
        dtype, codec: see `prepare`; whatever the base run's are.
        wait: seconds to wait for another process that writes to the store.

    Raises:
        NotStored: there is no such run, site or token; or the base's weights are not stored.
        BadInput: an edit has no meaning, or another run has the name.
    """
    root = place(store)
    check_device(device)
    if run == "":
        raise BadInput("got an empty name for --run; give one, or leave --run out")
    if answers is not None and answers not in ANSWERS:
        raise BadInput(f"got --answers {answers}{nearest(answers, ANSWERS)}; {there_are(ANSWERS)}")
    if len(edits) > MOST_EDITS or not (edits or run):
        raise BadInput(
            f"got {len(edits)} edits; give 1 to {MOST_EDITS} (--patch), or name a stored run with edits (--run)"
        )
    with Store(root) as opened:
        base = opened.resolve_run(base)
        if start := opened.sql(EDITED, {"run": base})["base_run"].to_list():
            raise BadInput(
                f"run {base!r} holds edits of run {start[0]!r}, which a new run would not have; name {start[0]!r} (--base), and "
                "give all edits (--patch …, several times)"
            )
        origin = Base(root, base, device)
        specs = [of_edits.site_of(origin.model, edit.at) for edit in edits]
        name = run or f"{base}-{edits[0].how}-{specs[0].short}"
        is_taken = name in opened.runs()
        stored = opened.sql("select * from interventions where run = $run order by edit", {"run": name}).to_dicts()
    if not stored and is_taken:
        raise BadInput(f"run {name!r} is stored, and holds no edits; name the new run otherwise (--run)")
    if not stored and not edits:
        raise NotStored(f"{root} holds no run {name!r} with edits; give its edits (--patch), or name another (--run)")
    with ExitStack() as undone:
        undone.callback(origin.close)
        noted = None
        if stored:
            _must_agree(origin, stored, edits, specs)
            patch, noted = stored_patch(origin, name, stored), origin.noted_of(name)
            answers = answers or ANSWERS[not patch.greedy]
            batch_size = noted["batch_size"] if batch_size is None else batch_size
            dtype, codec = dtype or noted.get("dtype"), codec or noted.get("codec")
            must_agree(
                f"run {name!r}", {"answers": ANSWERS[not patch.greedy]}, {"answers": answers}, "name a new run (--run)"
            )
            own = [row["short"] for row in origin.site_rows if row["run"] == name and row.get("lineage") is None]
            wanted = _sites(origin, own if sites is None else sites)
            _must_fit(origin, patch, wanted)
        else:
            patch, wanted = _asked(origin, edits, specs), _sites(origin, sites or [])
            patch.greedy = answers != "next"
            patch.whole = not fits_window(origin, specs, wanted)
        how = dtype or "float32", codec or "none"
        job = job_of(origin, patch, name, [spec.short for spec in wanted], batch_size, wait, *how, noted)
        check_plan(root, job.plan)
        undone.pop_all()
    return job


def _sites(origin: Base, names: Sequence[str]) -> list[SiteSpec]:
    return origin.model.sites(list(names)) if names else []


def _asked(origin: Base, edits: Sequence[Edit], specs: Sequence[SiteSpec]) -> Patch:
    """The edits that queries yield, with their rows of `interventions`."""
    origin.refuse_unfinished()
    store, about, found = origin.store, [], []
    for edit, spec in zip(edits, specs, strict=True):
        rows = of_edits.asked(store.whole, origin.run, edit, spec, origin.sequences)
        found.append(rows)
        about.append(
            {
                **_about(origin.run, edit, spec),
                **{"donor_run": rows.donors, "donor_site": rows.donor_site, "snapshot": store.snapshot},
                **{"n_edits": len(rows), "donors_xxh3_128": rows.donors_hash(store)},
            }
        )
    if all(row["donor_run"] is None for row in about):
        for edit in edits:
            if named := [name for name in ("donors", "donor_site") if getattr(edit, name) is not None]:
                option = named[0].replace("_", "-")
                raise BadInput(f"got --{option}, and no query yields donor_token_id; leave it out")
    return Patch(origin.opened, origin.run, found, origin.sequences, about=about, close=origin.close)


def _must_agree(origin: Base, stored: Sequence[Row], edits: Sequence[Edit], specs: Sequence[SiteSpec]) -> None:
    """Refuse other edits than those of a stored run; none are the stored ones."""
    run, advice = stored[0]["run"], "name the new run otherwise (--run)"
    must_agree(f"run {run!r}", {"base": stored[0]["base_run"]}, {"base": origin.run}, advice)
    if not edits:
        return
    must_agree(f"run {run!r}", {"edits": len(stored)}, {"edits": len(edits)}, advice)
    for row, edit, spec in zip(stored, edits, specs, strict=True):
        wanted = _about(origin.run, edit, spec)
        if row["donor_run"] is not None:
            donors = origin.run if edit.donors is None else origin.store.resolve_run(edit.donors)
            site = spec.short if edit.donor_site is None else edit.donor_site
            wanted |= {"donor_run": donors, "donor_site": site}
        must_agree(f"edit {row['edit']} of run {run!r}", row, wanted, advice)


def _must_fit(origin: Base, patch: Patch, wanted: Sequence[SiteSpec]) -> None:
    """Refuse sites that a run of windows cannot take from its base run."""
    if patch.whole:
        return
    if never := [spec.short for spec in wanted if window.first_layer(spec.name) is None]:
        raise BadInput(
            f"a run that computes only what its edits can change has no {never[0]}; leave it out (--sites), or store the edits "
            "as a new run (--run) with that site"
        )
    if lacking := [spec.short for spec in wanted if spec.name not in origin.held]:
        raise NotStored(
            f"a run that computes only what its edits can change takes the rest from its base run {origin.run!r}, which does not "
            f"hold {', '.join(lacking)}: {ingest_sites(origin.store, origin.run, *lacking)} adds what is missing"
        )


def job_of(
    origin: Base,
    patch: Patch,
    run: str,
    sites: Sequence[str],
    batch_size: int | None = None,
    wait: float = 0.0,
    dtype: str = "float32",
    codec: str = "none",
    noted: Mapping[str, Any] | None = None,
) -> Ingest:
    """The job of a run with edits.

    It stores the answers that its base run stores, and next tokens if the base run stores none.

    Args:
        noted: what the run noted beside its versions, if it is stored.
    """
    asked = understood((origin.noted if noted is None else noted).get("answers") or "next")
    if noted is None:
        asked = asked or Asked()
    size = origin.noted.get("batch_size") if batch_size is None else batch_size
    return Ingest(
        origin.root,
        origin.model,
        origin.set,
        run,
        sites,
        size,
        wait=wait,
        asked=asked,
        patch=patch,
        dtype=dtype,
        codec=codec,
    )


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


def stored_patch(origin: Base, run: str, stored: Sequence[Row]) -> Patch:
    """The edits of a stored run.

    Args:
        stored: the run's rows of `interventions`, in the order of their numbers.

    Raises:
        NotStored: rows of `interventions` or `edits` are lost.
    """
    held = origin.edits.filter(pl.col("run") == run) if len(origin.edits) else origin.edits
    noted = origin.noted_of(run)
    if not stored or not len(held) or hash_of(pl.DataFrame(stored, infer_schema_length=None), held) != noted["edits"]:
        raise NotStored(
            f"what run {run!r} edited is lost (its parts of interventions and edits); restore it from a copy"
        )
    rows = [
        of_edits.stored(
            held.filter(pl.col("edit") == row["edit"]),
            row,
            of_edits.site_of(origin.model, row["site"]),
            origin.sequences,
        )
        for row in stored
    ]
    columns = [{name: value for name, value in row.items() if name not in ("run", "edit")} for row in stored]
    whole, greedy = noted["forward"] != "window", bool(noted["greedy"])
    return Patch(origin.opened, origin.run, rows, origin.sequences, whole, greedy, columns, close=origin.close)


def fits_window(origin: Base, edited: Sequence[SiteSpec], wanted: Sequence[SiteSpec]) -> bool:
    """Whether the base run stored all that the edits cannot change, as it was computed.

    Args:
        edited: the edited sites.
        wanted: the sites to be stored.
    """
    if origin.noted.get("dtype", "float32") != "float32":
        return False
    if origin.model.task != "trees" or origin.model.config.attention_dir != "causal":
        return False
    layers = [window.first_layer(spec.name) for spec in (*edited, *wanted)]
    if None in layers:
        return False
    first = min(layer for layer in layers[: len(edited)] if layer is not None)
    needed = {f"blocks.{layer - 1}.hook_resid_post" for layer in range(max(first, 1), origin.model.config.n_layers)}
    needed |= {f"blocks.{first - 1}.hook_resid_post"} if first else set()
    return needed | {spec.name for spec in wanted} <= origin.held


class Unstored:
    """Runs edits without storing them; see interventions.Patching.

    A context manager: it opens the store of each base run, and closes these stores at its end.

    Args:
        store: an open store; the last commit is read.
        device: "cpu" or "cuda".
    """

    def __init__(self, store: Store, device: str = "cpu") -> None:
        self._root, self._device = store.path, device
        self._bases: dict[str, Base] = {}

    def __call__(self, run: str, edits: Sequence[Edit], measure: pl.DataFrame | None = None) -> pl.DataFrame:
        """See interventions.Patching."""
        origin, patch = self._asked(run, edits, [])
        patch.measured = None if measure is None else _measured(measure)
        found = [
            answers["predictions"].drop("run") for _, _, answers in _ran(origin, patch, []) if "predictions" in answers
        ]
        if not found:
            raise BadInput(f"the model of run {run!r} predicts no token, so that edits of it have no answers")
        return pl.concat(found)

    def activations(self, run: str, edits: Sequence[Edit], site: str, token_ids: np.ndarray) -> np.ndarray:
        """See interventions.Patching."""
        spec = of_edits.site_of(self._base(run).model, site)
        origin, patch = self._asked(run, edits, [spec])
        token_ids = np.asarray(token_ids, np.int64)
        number, position, good = origin.sequences.places(token_ids)
        good &= np.isin(number, patch.numbers)
        if not good.all() or not len(token_ids):
            raise BadInput(
                f"{int((~good).sum()):,} of {len(token_ids):,} tokens are of no edited sequence of run {run!r}; give tokens of "
                "the sequences that the edits name"
            )
        found: np.ndarray | None = None
        for drawn, kept, _ in _ran(origin, patch, [spec]):
            for sequence in patch.edited(drawn.start, len(drawn.lengths)).tolist():
                begin, n = int(drawn.lengths[:sequence].sum()), int(drawn.lengths[sequence])
                rows, asked = kept[spec.name].rows(sequence, begin, n), number == drawn.start + sequence
                found = np.empty((len(token_ids), *rows.shape[1:]), np.float32) if found is None else found
                found[asked] = rows[position[asked]]
        assert found is not None
        return found

    def close(self) -> None:
        """Close the stores that were opened; a later call opens them again."""
        for base in self._bases.values():
            base.close()
        self._bases.clear()

    def __enter__(self) -> Unstored:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _base(self, run: str) -> Base:
        if run not in self._bases:
            self._bases[run] = Base(self._root, run, self._device)
        return self._bases[run]

    def _asked(self, run: str, edits: Sequence[Edit], wanted: Sequence[SiteSpec]) -> tuple[Base, Patch]:
        """The base run, and the edits that queries yield."""
        origin = self._base(run)
        origin.refuse_unfinished()
        specs = [of_edits.site_of(origin.model, edit.at) for edit in edits]
        rows = [
            of_edits.asked(origin.store.whole, run, edit, spec, origin.sequences)
            for edit, spec in zip(edits, specs, strict=True)
        ]
        return origin, Patch(
            origin.opened, run, rows, origin.sequences, not fits_window(origin, specs, wanted), greedy=False
        )


def patching(store: Store, device: str = "cpu") -> Unstored:
    """Runs edits without storing them; see Unstored."""
    return Unstored(store, device)


def _ran(
    origin: Base, patch: Patch, sites: Sequence[SiteSpec]
) -> Iterator[tuple[Any, dict[str, Kept], dict[str, pl.DataFrame]]]:
    """Run each batch with edits: the batch, its activations at some sites, and its answers."""
    job, first = job_of(origin, patch, "patched", [spec.short for spec in sites]), Ids.of_dataset(origin.dataset)
    batches = range(job.n_batches) if job.of_text else np.unique(patch.numbers // origin.dataset["trees_per_shard"])
    for batch in map(int, batches):
        drawn = job.sequences.drawn(batch)
        if not len(patch.edited(drawn.start, len(drawn.lengths))):
            continue
        kept = {site.site: Kept(site.layout) for site in job.plan.sites}
        of_batch = first.of_batch(origin.dataset, batch, drawn.start)
        yield drawn, kept, job.answers(drawn, of_batch, kept, lambda done: None)()


def _measured(measure: pl.DataFrame) -> pl.DataFrame:
    """Measured tokens, with the numbers of their words."""
    numbers = {word: number for number, word in enumerate(WORDS)}
    words = measure["token"].cast(pl.String).replace_strict(numbers, default=None, return_dtype=pl.UInt8)
    if words.null_count():
        raise BadInput(
            f"got the token {measure['token'].cast(pl.String).filter(words.is_null())[0]!r} to measure, which is no word"
        )
    return pl.DataFrame({"token_id": measure["token_id"], "word": words}).sort("token_id")
