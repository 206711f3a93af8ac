"""What the commands do, as functions: the same verbs, with the same arguments.

    actstore.ingest("demo.act", model="reproduction", trees=2000)
    asked = actstore.study("demo.act", "depth")

The package exports these functions; `ingest` is in ingest/jobs/verb.py. A command prints what its
function returns. Functions that begin with an open Store (`model`, `record_rows`,
`cache`, `export_rows`) are what the methods of Store call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from actstore.errors import BadInput, NotStored
from actstore.interventions import Edit
from actstore.outputs import Exported, Work, check_file, silent
from actstore.storage.at import place
from actstore.storage.machine import check_memory
from actstore.store import Store
from actstore.version import __version__

if TYPE_CHECKING:
    from transformer_lens import ActivationCache
    from transformer_lens.model_bridge import TransformerBridge

    from actstore.ingest.jobs.patched import Unstored
    from actstore.ingest.training.evaluation import Evaluation
    from actstore.queries.report import Report as Page
    from actstore.queries.studies import Asked
    from actstore.upkeep.copying import Copy
    from actstore.upkeep.merging import Merge
    from actstore.upkeep.repair import Repair
    from actstore.upkeep.verify import Report
    from actstore.writing.appending import Appended
    from actstore.writing.slices import Taken


def _path(store: str | Path | Store) -> Path:
    return store.path if isinstance(store, Store) else place(store)


@contextmanager
def _opened(store: str | Path | Store, check: bool) -> Iterator[Store]:
    """Yield an open store unchanged, or open a path and close the store at the end."""
    if isinstance(store, Store):
        yield store
    else:
        with Store(store, check) as opened:
            yield opened


def verify(
    store: str | Path | Store,
    quick: bool = False,
    recompute: int | None = None,
    seed: int = 0,
    progress: Work = silent,
) -> Report:
    """Read everything that was committed, and list what has changed.

    Args:
        store: a path, or an open store.
        quick: check only sizes and the shards' index checksums.
        recompute: rerun this many random trees or texts per run, if nothing is damaged.
        seed: seed of the random trees.
        progress: see `outputs.Work`.

    Returns:
        A report. `damage` is empty if the store is whole; `differences` compares the reruns.

    Raises:
        NotStored, TooNew: there is no store, or a later version made the store.
    """
    from actstore.upkeep import verify as verifying

    root = _path(store)
    with progress("verify", None, "bytes") as advance:
        report = verifying.verify(root, quick, advance)
    if recompute is None or report.damage:
        return report
    from actstore.ingest.replay import compare
    from actstore.ingest.replay.asked import planned

    asked = planned(root, recompute)
    with progress("recompute", asked.n, asked.unit) as advance:
        return replace(report, differences=compare.compare(root, recompute, seed, advance))


def repair(store: str | Path | Store, wait: float = 10.0, progress: Work = silent) -> Repair:
    """Restore what is damaged to the committed bytes, and rebuild the catalog.

    Args:
        store: a path, or an open store, which keeps its snapshot.
        wait: seconds to wait for another process that writes to the store.
        progress: see `outputs.Work`.

    Raises:
        Busy, Damaged, NotStored, TooNew: see upkeep.repair.
        LimitReached: a model has to be run, and this process may map too little memory for one.
    """
    from actstore.upkeep import repair as repairing

    with progress("repair", None, "bytes") as advance:
        read = (0, 0)  # bytes, and of how many

        def told(*done: int) -> None:
            nonlocal read
            read = done[0], done[1]
            advance(*read)

        def recompute(root: Path, manifests: Any, run: str, batch: int | None) -> dict[str, bytes]:
            check_memory(models=True)
            from actstore.ingest.replay.remake import files_of

            advance(*read, f"makes run {run} again" + (f", batch {batch}" if batch is not None else ""))
            return files_of(root, manifests, run, batch)

        return repairing.repair(_path(store), recompute, told, wait)


def commit(store: str | Path | Store, wait: float = 10.0) -> list[Taken]:
    """Commit the batches that slices of runs published whole (`ingest`, slice).

    Where no slice is at work any more, what was published and is not whole is freed.

    Args:
        store: a path, or an open store, which keeps its snapshot.
        wait: seconds to wait for another process that writes to the store.

    Returns:
        What was found of each run that has slices: its batches that were committed now, how many
        are in all, and who is still at work.

    Raises:
        Busy, Damaged, NotStored, TooNew: see writing.writer.open_writer.
    """
    from actstore.writing import slices

    return slices.commit(_path(store), wait)


def copy(store: str | Path | Store, out: str | Path, runs: Sequence[str] = (), progress: Work = silent) -> Copy:
    """Copy a store, or some of its runs, into a new store, which appears whole or not at all.

    Args:
        store: a path, or an open store; the store's present commit is copied.
        out: the new store.
        runs: runs to copy, with their datasets and models; labels and results of studies are
            then left out.
            Default: everything.
        progress: see `outputs.Work`.

    Raises:
        NotStored, TooOld, TooNew, BadInput, Damaged, NoRoom: see upkeep.copying.copy.
    """
    from actstore.upkeep import copying

    with progress("copy", None, "bytes") as advance:
        return copying.copy(_path(store), out, runs, advance)


def merge(
    stores: Sequence[str | Path | Store],
    out: str | Path,
    rename: Sequence[tuple[str | Path | Store, str, str, str]] = (),
    progress: Work = silent,
) -> Merge:
    """Merge stores into a new store, which appears whole or not at all.

    The first store keeps its ids; further datasets get new ones, in every table. Datasets, runs,
    labels and models that several stores hold alike are held once. A shard is no copy where the
    new store is on the same disk: both stores then have the same file, by a hard link.

    Args:
        stores: two or more paths, or open stores; the present commit of each is merged.
        out: the new store.
        rename: (store, `run`, `dataset` or `label`, its name there, its new name), for each name
            under which two stores hold something else.
        progress: see `outputs.Work`.

    Raises:
        NotStored, TooOld, TooNew, BadInput, Damaged, NoRoom: see upkeep.merging.merge.
    """
    from actstore.upkeep import merging

    if isinstance(stores, str | Path | Store):
        raise BadInput(f"got {stores!r} for the stores to merge; give a list of two or more")
    renamed = [(_path(store), *names) for store, *names in rename]
    with progress("merge", None, "bytes") as advance:
        return merging.merge([_path(store) for store in stores], out, renamed, advance)  # type: ignore[arg-type]


def study(
    store: str | Path | Store,
    name: str,
    runs: Sequence[str] = (),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    query: str | None = None,
    params: Mapping[str, Any] | None = None,
    tables: Mapping[str, Any] | None = None,
    confirm: str | None = None,
    plot: str | Path | None = None,
    record: bool = True,
    wait: float = 10.0,
    check: bool = True,
    progress: Work = silent,
    engine: str | None = None,
    address: str | None = None,
    workers: int | None = None,
    caption: bool = False,
) -> list[Asked]:
    """Run a study, record it in `results`, draw its figure.

    Args:
        store: a path, or an open store.
        name: name of the study.
        runs: the runs to ask, or one run's name; default: every run over drawn trees; of `probe`
            and `compare` every run over other sequences, too.
        seed: seed of everything random.
        options: the study's own options.
        query, params: of the study `probe`, see `actstore study probe --help`.
        tables: tables of your own for the study's queries, see Store.sql.
        confirm: a second dataset, on which findings are confirmed.
        plot: a file for the figure, .png, .svg or .pdf; of several runs FILE-RUN.
        record: whether to record the answers. An open store shows them when it is opened again.
        wait: seconds to wait for another process that writes to the store.
        check: compare files with their committed hashes; an open store does as it was opened.
        progress: see `outputs.Work`.
        engine, address, workers: `ray` has a Ray cluster probe the sites of the study `probes`, see
            queries/probes/study.py.
        caption: write a caption beside each figure, as FILE.txt.

    Returns:
        Each question with what came of it: `asked[0].answer.frame`, `.sentence`, `.results`.

    Raises:
        NotStored, BadInput: there is no such study or run, or nothing could be answered.
        Busy, NoRoom: the answers cannot be recorded; a warning says which file keeps them.
    """
    from actstore.outputs import FIGURES
    from actstore.queries import studies
    from actstore.writing import recording

    check_file(plot, "plot", FIGURES)
    if record:
        recording.wait_until_free(_path(store), wait)
    asks = ({"query": query} if query is not None else {}) | ({"params": params} if params else {})
    of_engine = {"engine": engine, "address": address, "workers": workers}
    given: dict[str, Any] = {name: value for name, value in of_engine.items() if value is not None}
    with _opened(store, check) as opened, patching(opened) as patch:
        asked = studies.answer(
            opened, name, runs, seed, {**(options or {}), **asks, **given}, confirm, progress, patch, tables
        )
        if plot:
            list(studies.save_figures([one.answer for one in asked if one.answer], plot, caption))
        if record:
            studies.record(opened, asked, wait)
    return asked


class _Unstored:
    """As Unstored of ingest/jobs/patched.py, which is imported at the first use."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @cached_property
    def _made(self) -> Unstored:
        from actstore.ingest.jobs import patched

        return patched.patching(self._store)

    def __call__(self, run: str, edits: Sequence[Edit], measure: pl.DataFrame | None = None) -> pl.DataFrame:
        return self._made(run, edits, measure)

    def activations(self, run: str, edits: Sequence[Edit], site: str, token_ids: np.ndarray) -> np.ndarray:
        """See interventions.Patching."""
        return self._made.activations(run, edits, site, token_ids)

    def __enter__(self) -> _Unstored:
        return self

    def __exit__(self, *error: object) -> None:
        if "_made" in self.__dict__:
            self._made.close()


def patching(store: Store) -> _Unstored:
    """Runs edits for studies, see interventions.Patching; a context manager.

    Leaving it closes what it opened. The model is loaded, and torch imported, at the first use.
    """
    return _Unstored(store)


def report(
    store: str | Path | Store,
    out: str | Path,
    runs: Sequence[str] = (),
    seed: int = 0,
    confirm: str | None = None,
    record: bool = True,
    wait: float = 10.0,
    check: bool = True,
    progress: Work = silent,
) -> Page:
    """Run every study, record the answers, and write one page of them all, OUT/index.html.

    Args:
        store: a path, or an open store.
        out: a folder, made if missing.
        runs: the runs to ask, or one run's name; default: every run over drawn trees.
        seed: seed of everything random.
        confirm: a second dataset, on which findings are confirmed.
        record: whether to record the answers. An open store shows them when it is opened again.
        wait: seconds to wait for another process that writes to the store.
        check: compare files with their committed hashes; an open store does as it was opened.
        progress: see `outputs.Work`.

    Raises:
        NotStored, BadInput: there is no such run, or no page can be written there.
        Busy, NoRoom: the answers cannot be recorded; a warning says which file keeps them.
    """
    from actstore.queries import studies
    from actstore.queries.report import report as write
    from actstore.writing import recording

    if record:
        recording.wait_until_free(_path(store), wait)
    with _opened(store, check) as opened, progress("report", None, "questions") as advance:
        made = write(opened, out, runs, seed, confirm, advance)
        if record:
            studies.record(opened, made.asked, wait)
    return made


def record(
    store: str | Path | Store, files: str | Path | Sequence[str | Path], wait: float = 10.0
) -> list[pl.DataFrame]:
    """Record results that a study kept in files while another process was writing to the store.

    Args:
        store: a path, or an open store, which keeps its snapshot.
        files: results-….parquet; one file or several.
        wait: seconds to wait for the other process.

    Returns:
        The rows of `results`, one frame per answer.

    Raises:
        BadInput: a file holds no results, or results of another store.
        Busy: another process still writes.
    """
    from actstore.writing import recording
    from actstore.writing.writer import open_writer

    named = [files] if isinstance(files, str | Path) else files
    results = [frame for file in named for frame in recording.read_kept(Path(file))]
    with _opened(store, False) as opened:
        recording.check_belongs(opened.path, results, opened.whole.runs(), opened.snapshot)
    with open_writer(_path(store), wait=wait) as writer:
        for frame in results:
            writer.record(frame)
    return results


def patch(
    store: str | Path | Store,
    base: str,
    edits: str | Edit | Sequence[Edit] = (),
    at: str | None = None,
    how: str = "replace",
    run: str | None = None,
    sites: Sequence[str] | None = None,
    donors: str | None = None,
    donor_site: str | None = None,
    params: Mapping[str, Any] | None = None,
    tables: Mapping[str, Any] | None = None,
    answers: str | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    wait: float = 10.0,
    progress: Work = silent,
    dtype: str | None = None,
    codec: str | None = None,
) -> str:
    """Run a stored run's model again with some activations edited, and store the answers as a run.

        actstore.patch("demo.act", "reproduction", "select token_id, … as donor_token_id", at="z.3")

    The new run holds the edited sequences alone: `predictions`, `outcomes` and, if asked for,
    activations. Its definition is in `interventions` and `edits`. One join on token_id leads to the
    base run's answers.

    Args:
        store: a path, or an open store, which keeps its snapshot.
        base: name of the base run.
        edits: an edit's query, with `at`, `how` and so on; or several `Edit`s. None for a `run`
            that is stored, to go on with it or to add `sites` to it.
        at, how, donors, donor_site, params, tables: of the one edit, see interventions.Edit.
        run: name of the new run; default: made from the base's, how and where.
        sites: sites whose activations are stored; default: none, or the stored run's own.
        answers: `all`; or `next`, without `outcomes` of trees; default: all, or the stored run's.
        batch_size: sequences per forward pass; default: the stored run's, or the base run's.
        device: "cpu" or "cuda".
        wait: seconds to wait for another process that writes to the store.
        progress: see `outputs.Work`.
        dtype, codec: how `sites` are stored; default: float32 and none, or the stored run's.

    Returns:
        The new run's name.

    Raises:
        NotStored: there is no such run, site or token; or the base's weights are not stored.
        BadInput: an edit has no meaning, or another run has the name.
        Busy: another process still writes.
    """
    from actstore.ingest.jobs.local import execute
    from actstore.ingest.jobs.patched import prepare_patch

    if isinstance(edits, str):
        if at is None:
            raise BadInput("got a query and no site; say where it edits (at=…, --at)")
        edits = Edit(edits, at, how, donors, donor_site, params or {}, tables or {})
    elif at is not None or how != "replace" or donors or donor_site or params or tables:
        raise BadInput(
            "got Edits, and at, how, donors, donor_site, params or tables beside them; give these to each Edit"
        )
    listed = [edits] if isinstance(edits, Edit) else list(edits)
    job = prepare_patch(_path(store), base, listed, run, sites, batch_size, answers, device, wait, dtype, codec)
    assert job.patch is not None
    with closing(job.patch), progress(f"patch {job.plan.run}", job.sequences.n_sequences, job.unit) as advance:
        execute(job, advance)
    return job.plan.run


def label(
    store: str | Path | Store,
    name: str,
    labels: Any,
    on: Literal["token_id", "sequence_id", "span"] = "token_id",
    wait: float = 10.0,
    *,
    replace: bool = False,
    add: bool = False,
) -> pl.DataFrame:
    """Store labels of your own as a table; see Store.label.

    Args:
        store: a path, or an open store, which keeps its snapshot.
        name, labels, on, wait, replace, add: see Store.label.

    Returns:
        The table's rows.
    """
    from actstore.reading import given
    from actstore.writing.labels import added
    from actstore.writing.writer import open_writer

    if replace and add:
        raise BadInput("got both replace and add; labels take the place of others, or are added to them: choose one")
    frame = given.table(labels, "the labels")
    with _opened(store, False) as opened:
        relation, rows = opened.whole.labelled(name, frame, on)
    with open_writer(_path(store), wait=wait) as writer:
        if add:
            relation, rows = added(*writer.labels(name), rows, on == "span")
        writer.label(relation, rows, replace or add)
    return rows


def view(store: str | Path | Store, name: str, query: str, wait: float = 10.0, *, replace: bool = False) -> None:
    """Store a SELECT of your own as a view; see Store.view.

    Args:
        store: a path, or an open store, which keeps its snapshot.
        name, query, wait, replace: see Store.view.
    """
    from actstore.writing.writer import open_writer

    with _opened(store, False) as opened:
        declared = opened.whole.checked_view(name, query)
    with open_writer(_path(store), wait=wait) as writer:
        writer.view(declared, replace)


def append(
    store: str | Path | Store,
    run: str,
    site: str,
    token_ids: Any,
    X: Any,
    lineage: Mapping[str, Any] | None = None,
    allow_nan: bool = False,
    wait: float = 10.0,
) -> int:
    """Store activations of your own as a new site of a run; see Store.append.

    Args:
        store: a path, or an open store, which keeps its snapshot.
        run, site, token_ids, X, lineage, allow_nan, wait: see Store.append.

    Returns:
        The number of tokens whose activations are stored.
    """
    from actstore.reading import given
    from actstore.reading.rows import token_ids as checked_ids
    from actstore.writing import appending
    from actstore.writing.writer import open_writer

    ids = checked_ids(*given.frame_of(token_ids, None))
    numbers = appending.checked(X, len(ids), allow_nan)
    with _opened(store, False) as opened:
        appended = _appended(opened.whole, opened.resolve_run(run), site, ids, numbers, lineage or {})
    with open_writer(_path(store), wait=wait) as writer:
        writer.append(appended)
    return len(ids)


def _appended(
    store: Store, run: str, site: str, token_ids: np.ndarray, X: np.ndarray, lineage: Mapping[str, Any]
) -> Appended:
    """Activations as an appended site, after each id is known to be one of the run's dataset."""
    from actstore.arrays.address import Ids
    from actstore.writing.appending import Appended, site_plan

    if site in store.sql("select unnest([site, short]) from sites where run = $run", {"run": run}).to_series():
        raise BadInput(f"run {run!r} holds a site {site!r}; take another name")
    if not len(token_ids):
        raise BadInput("got no token ids; give at least one")
    query = "select datasets.* from runs join datasets using (dataset) where run = $run"
    dataset = store.sql(query, {"run": run}).row(0, named=True)
    given = {"given_ids": pl.DataFrame({"token_id": token_ids})}
    wrong = store.sql(
        "select token_id from given_ids anti join (select token_id from tokens where dataset = $dataset) using (token_id)",
        {"dataset": dataset["dataset"]},
        tables=given,
    )["token_id"]
    if len(wrong):
        raise NotStored(
            f"{len(wrong):,} of {len(token_ids):,} token ids are of no token of dataset {dataset['dataset']!r}, that of run "
            f"{run!r}, the first {min(wrong)}; give ids of its tokens"
        )
    twice = pl.Series(token_ids)
    if (repeated := twice.filter(twice.is_duplicated())).len():
        raise BadInput(f"{repeated.n_unique():,} token ids are given twice, the first {min(repeated)}; give each once")
    sequences = store.sql(
        "select first_token_id, n_tokens, sequence_id from sequences where dataset = $dataset order by first_token_id",
        {"dataset": dataset["dataset"]},
    )
    starts, lengths, sequence_ids = (sequences[name].to_numpy().astype(np.int64) for name in sequences.columns)
    plan, order = site_plan(site, dataset, X.shape[1:], lineage), np.argsort(token_ids)
    return Appended(run, plan, Ids.of_dataset(dataset), token_ids[order], X[order], starts, lengths, sequence_ids)


def drop(
    store: str | Path | Store,
    run: str | None = None,
    dataset: str | None = None,
    label: str | None = None,
    wait: float = 10.0,
) -> list[str]:
    """Drop a run, a dataset or a label, in one commit.

    A run goes with its arrays, answers and recorded results, and with its model if no other run is
    of that model. Its dataset stays. A dataset goes with its sequences, tokens and documents, if no
    run and no label is left over it. Its ids are never given again. The next writer, or `repair`,
    frees the bytes. A store that is open keeps its snapshot; after the bytes are freed, it cannot
    read what was dropped.

    Args:
        store: a path, or an open store.
        run, dataset, label: the name of what is dropped; one of the three.
        wait: seconds to wait for another process that writes to the store.

    Returns:
        Paths of the files that are dropped.

    Raises:
        NotStored: the store holds nothing of the name.
        BadInput: a run or a label is left over the dataset; or not one name was given.
        Busy: another process still writes.
    """
    from actstore.writing import dropping

    return dropping.drop(_path(store), *dropped_name(run, dataset, label), wait).files


def dropped_name(
    run: str | None, dataset: str | None, label: str | None
) -> tuple[Literal["run", "dataset", "label"], str]:
    """What is to be dropped, and its name.

    Raises:
        BadInput: not one name was given.
    """
    named = [(run, "run"), (dataset, "dataset"), (label, "label")]
    given = [(kind, name) for name, kind in named if name is not None]
    if len(given) != 1:
        raise BadInput(
            f"got {len(given)} names to drop; give one: a run, a dataset or a label (--run, --dataset, --label)"
        )
    return given[0]  # type: ignore[return-value]


def record_rows(store: Store, name: str, frame: pl.DataFrame, wait: float) -> None:
    """See Store.record."""
    from actstore.queries import check_names
    from actstore.queries.study import RESULTS, STUDIES
    from actstore.writing import recording

    if name in STUDIES or not name:
        raise BadInput(f"got the name {name!r}; take one of your own, which is none of {', '.join(STUDIES)}")
    if not isinstance(frame, pl.DataFrame):
        raise BadInput(f"got a {type(frame).__name__} to record; give a polars frame with columns metric and value")
    check_names("a frame of results", frame.columns, ("metric", "value"), RESULTS)
    shared = {"study": name, "params": "{}", "snapshot": store.snapshot, "version": __version__}
    if "run" not in frame.columns:
        shared["run"] = store.resolve_run(None)
    rows = pl.DataFrame(schema=RESULTS)
    try:
        given = frame.with_columns(pl.lit(value).alias(column) for column, value in shared.items())
        rows = pl.concat([rows, given.cast({column: RESULTS[column] for column in given.columns})], how="diagonal")
    except pl.exceptions.PolarsError as error:
        raise BadInput(f"the frame is none of results ({str(error).splitlines()[0]}); see store.schema()") from error
    for run in rows["run"].unique():
        store.resolve_run(run)
    recording.record(store.path, [rows], wait)


def model(store: Store, run: str | None, device: str) -> TransformerBridge:
    """See Store.model."""
    from actstore.ingest.jobs.stored import model_of

    return model_of(store.path, store.resolve_run(run), device).bridge


def cache(store: Store, *asked: Any) -> ActivationCache:
    """See Store.cache."""
    from actstore.export.cache import cache

    return cache(store, *asked)


def check_out(out: str | Path, format: str | None) -> None:
    """Refuse what `Store.export` cannot write, before anything is read."""
    from actstore.export.export import check_out

    check_out(out, format)


def export_rows(store: Store, *asked: Any) -> Exported:
    """See Store.export."""
    from actstore.export.export import export

    return export(store, *asked)


def evaluate(
    model: str,
    config: str | None = None,
    checkpoint: int | None = None,
    distribution: str | None = None,
    trees: int = 20_000,
    seed: int = 20_000_000,
    nodes: int | None = None,
    device: str = "cpu",
    progress: Work = silent,
) -> Evaluation:
    """Grade a model on fresh trees.

    Args:
        model: a model's name, or the path of a checkpoint.
        config: the checkpoint's YAML; default: the file beside the weights.
        checkpoint: a step of the training, instead of the trained weights.
        distribution: default: each of them.
        trees: number of fresh trees per distribution.
        seed: seed of the trees.
        nodes: nodes per tree; default: the model's own.
        device: "cpu" or "cuda".
        progress: see `outputs.Work`.

    Raises:
        NotStored, BadInput: there is no such model, distribution or device.
    """
    from actstore.ingest.models.load import check_device, find, load
    from actstore.ingest.training import evaluation
    from actstore.ingest.training.recipe import recipe_of

    found = find(model, config, checkpoint)
    recipe = recipe_of(found.yaml)
    evaluation.check(found.config, distribution, trees, seed, nodes, recipe)
    check_device(device)
    loaded = load(model, config, device, checkpoint)
    total = trees * len(evaluation.distributions(found.config, distribution))
    with progress(f"evaluate {found.name}", total, "trees") as advance:
        return evaluation.evaluate(loaded, distribution, trees, seed, nodes, recipe, advance)


def train(
    name: str,
    out: str | Path,
    steps: int | None = None,
    nodes: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    grade: int = 20_000,
    wandb: str | None = None,
    progress: Work = silent,
) -> tuple[Path, Evaluation]:
    """Train a system or a YAML configuration into the folder OUT, and grade the model.

    Args:
        name: reproduction, baseline or the path of a YAML file.
        out: the run's folder; a training that was started there continues.
        steps: optimizer steps; default: the configuration's.
        nodes: nodes per tree; default: the configuration's.
        seed: seed of weights and trees; default: the configuration's.
        device: "cpu" or "cuda".
        grade: number of fresh trees per distribution to grade the model on.
        wandb: a project of Weights & Biases that gets the log, too.
        progress: see `outputs.Work`.

    Returns:
        The trained weights, beside which the model card is written, and how the model was graded.

    Raises:
        BadInput, NoRoom: see ingest.training.train.train. BadInput also if the model could not be
            graded, since the training would see nearly every tree of this size.
    """
    from actstore.ingest.training import evaluation
    from actstore.ingest.training import train as training
    from actstore.ingest.training.card import write_card
    from actstore.ingest.training.recipe import Row, read_config
    from actstore.outputs import check_folder

    out = Path(out)
    check_folder(out, "OUT")
    _, shape, recipe = read_config(name, nodes, steps, seed)
    if grade < 1:
        raise BadInput(f"got {grade} trees to grade it on; take 1 or more (--grade)")
    evaluation.check(shape, recipe=recipe)  # what could not be graded at the end
    evaluation.check_unseen(shape, recipe)
    send = training.to_wandb(wandb, out) if wandb else None
    with progress(f"train {Path(name).stem}", recipe.steps, "steps") as advance:

        def show(row: Row) -> None:
            advance(row["step"], recipe.steps, training.summary(row))
            if send:
                send(row)

        weights = training.train(name, out, steps, nodes, seed, device, show)
    with progress(f"grade {weights.stem}", grade * len(evaluation.distributions(shape)), "trees") as advance:
        return weights, write_card(weights, grade, device, advance)
