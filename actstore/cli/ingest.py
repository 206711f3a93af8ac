"""The command that fills a store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from actstore.cli import complete
from actstore.cli.group import KEPT, ModelCommand, main, note, say
from actstore.cli.options import (
    checkpoint_option,
    engine_options,
    model_options,
    param_option,
    store_argument,
    table_option,
    wait_option,
)
from actstore.errors import advised

if TYPE_CHECKING:
    from actstore.ingest.jobs.job import Ingest
    from actstore.ingest.jobs.local import Advance
    from actstore.ingest.jobs.slices import Slice

OF_PATCH = ("base", "patches", "at", "how", "donors", "donor_site", "params", "tables")  # parameters, of --base
TAKEN_WITH_BASE = ("run", "sites", "batch_size", "device", "wait", "answers", "dtype", "codec")
SPELLED = {"patches": "patch", "params": "param", "tables": "table", "donor_site": "donor-site"}


@main.command(cls=ModelCommand)
@store_argument
@click.option(
    "--model",
    shell_complete=complete.models,
    help="A model's name (`actstore models list`), or the path of a checkpoint, a .gguf, or a model's folder.",
)
@click.option(
    "--model-of", metavar="RUN", help="Instead of --model: the model of a stored run, by the weights in the store."
)
@model_options
@click.option("--keep-weights", is_flag=True, help="Keep the weights of a model of text in the store, too.")
@checkpoint_option
@click.option(
    "--text", type=click.Path(), metavar="FILE", help="Documents: .txt, .jsonl, .csv, .parquet, or a dataset."
)
@click.option(
    "--tokens", type=click.Path(), metavar="FILE", help="Token ids: .parquet or .jsonl with a column of lists."
)
@click.option("--column", help="The column of --text or --tokens; default: text, or tokens.")
@click.option(
    "--context", type=int, metavar="N", help="Most tokens of a sequence; default: as many as the model takes."
)
@click.option("--cut", help="What becomes of longer documents: split (the default), truncate or error.")
@click.option(
    "--answers",
    help="none: store no answers, and run the model only as far as the last of --sites. Default: the run's own; of a new run "
    "all, predictions and outcomes of trees, or next, next-token predictions of text.",
)
@click.option("--top", type=int, metavar="K", help="Name the K likeliest tokens of each prediction, too.")
@click.option("--trees", type=int, help="How many trees; default 10,000.")
@click.option("--distribution", help="reproduction, baseline or deep; default: the model's own.")
@click.option("--depths", help="Goal depths of `deep` trees: 1-15 or 3,5,7.")
@click.option("--nodes", type=int, help="Nodes per tree, 2 to 64; default: the model's number of labels.")
@click.option("--seed", type=int, help="Seed of the stream of trees; default 0.")
@click.option(
    "--trees-from", type=click.Path(), metavar="FILE", help="Trees of your own: a table of edges, root, goal and path."
)
@click.option(
    "--dataset",
    shell_complete=complete.datasets,
    help="Name of the set of trees or text: a stored set, or a new set as the options above say.",
)
@click.option("--run", shell_complete=complete.runs, help="Name of the run; default: the model's name.")
@click.option(
    "--sites",
    help="embed, resid_post and so on, one layer (resid_post.0), or any hook (`actstore models sites`), separated by "
    "commas; or none. A finished run gets those that it lacks. Default: the run's own; of a new run embed, resid_post.",
)
@click.option(
    "--variant",
    help="swap_last or swap_inner: in each tree of the stored --dataset, an edge of the path trades places.",
)
@click.option(
    "--prompt",
    default="task",
    show_default=True,
    help="tree: give the model only the edges, and store its continuations.",
)
@click.option(
    "--samples",
    type=int,
    help="With --prompt tree or --continue: continuations drawn besides the greedy one; default 1.",
)
@click.option(
    "--continue",
    "continued",
    type=int,
    metavar="N",
    help="Continue each sequence of text by N tokens, and store the continuations alone.",
)
@click.option(
    "--batch-size",
    type=int,
    help="Sequences per forward pass; default: the run's own, or 128 trees, or about 4,096 tokens of text.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="Threads of a forward pass on the CPU; default: OMP_NUM_THREADS, or as many as there are processors. Threads sleep "
    "while they wait, so that two ingests side by side keep half their speed each, or more, with any number.",
)
@click.option(
    "--dtype",
    help="Store activations as float32, float16, bfloat16 or int8 (with a scale for each vector); they are read as "
    "float32. Default: the run's own, or float32.",
)
@click.option(
    "--codec",
    help="Compress activations without loss, by zstd or blosc (which shuffles bytes before); reads decode whole chunks. "
    "Default: the run's own, or none.",
)
@click.option(
    "--from-arrays",
    metavar="FILE",
    help="Instead of a model: token_id and X of this .npz, .safetensors or .parquet, as --site of the stored --run.",
)
@click.option("--site", help="With --from-arrays: name of the new site.")
@click.option("--lineage", metavar="TEXT", help="With --from-arrays: what X is, from which site, by which code.")
@click.option(
    "--allow-nan", is_flag=True, help="With --from-arrays: accept NaN (not as a row's first number) and infinity."
)
@click.option(
    "--base",
    metavar="RUN",
    shell_complete=complete.runs,
    help="Instead of a model: run this stored run again, with activations edited (--patch).",
)
@click.option(
    "--patch",
    "patches",
    multiple=True,
    metavar="QUERY",
    help="With --base: SQL, or a .sql file, whose rows are the edits. Several make several edits.",
)
@click.option("--at", multiple=True, metavar="SITE", help="With --patch: the site that is edited.")
@click.option(
    "--how",
    multiple=True,
    metavar="HOW",
    help="With --patch: replace (the default), add, project, zero, mean, knockout.",
)
@click.option(
    "--donors",
    metavar="RUN",
    shell_complete=complete.runs,
    help="With --patch: the run that donor_token_id is of; default: --base.",
)
@click.option(
    "--donor-site", metavar="SITE", help="With --patch: the site that the donors are read from; default: --at."
)
@param_option
@table_option
@click.option(
    "--slice",
    metavar="I/N",
    help="Compute only the I-th of N slices of the batches, beside other processes, without the lease.",
)
@engine_options
@wait_option
def ingest(
    store: Path,
    from_arrays: str | None,
    site: str | None,
    lineage: str | None,
    allow_nan: bool,
    threads: int | None,
    slice: str | None,
    engine: str | None,
    address: str | None,
    workers: int | None,
    **options: Any,
) -> None:
    """Run a model over trees or text, and store what it computes.

    That is activations and answers. If the command is stopped or killed, the same command continues after the last commit, and ends
    with the same bytes. With further --sites, it adds them to the run: it runs the model over the
    same batches again, and stores only what is not there.

    With --slice, any number of processes, on any machines that see the store, share a run: those of
    a Slurm array, say. A slice that is killed goes on by the same command. The last slice commits
    the run; `actstore commit` takes what is whole before that. With --engine ray, the workers of a
    Ray cluster compute the batches (pip install 'actstore[ray]'), and this process commits them.

    Example:

    \b
        actstore ingest demo.act --model reproduction --trees 2000
        actstore ingest demo.act --model reproduction --run patterns --trees 500 --sites pattern,resid_post.0
        actstore ingest demo.act --model reproduction --trees 2000 --sites resid_mid
        actstore ingest demo.act --model reproduction --trees 2000 --checkpoint 1000
        actstore ingest demo.act --model mine.pt --config mine.yaml --dataset reproduction-16nodes-seed0-2000
        actstore ingest demo.act --model reproduction --dataset reproduction-16nodes-seed0-2000 --variant swap_last
        actstore ingest demo.act --model reproduction --dataset reproduction-16nodes-seed0-2000 --prompt tree
        actstore ingest demo.act --from-arrays sae.npz --run reproduction --site sae.3 --lineage "SAE of resid_post.3"
        actstore ingest text.act --model path/to/model-folder --text notes.txt --context 512 --sites resid_post
        actstore ingest text.act --model path/to/other-folder --dataset notes --run other
        actstore ingest demo.act --base reproduction --patch "from edge_targets where is_last" --at resid_post.2 --how mean
        actstore ingest demo.act --model reproduction --trees 100000 --engine ray --address auto
        sbatch --array=1-8 --wrap 'actstore ingest demo.act --model reproduction --slice $SLURM_ARRAY_TASK_ID/8'
    """
    shared = {"slice": slice, "engine": engine, "address": address, "workers": workers}
    if (of_several := [name for name in shared if shared[name] is not None]) and (from_arrays or options["base"]):
        alone = "--from-arrays" if from_arrays else "--base"
        raise click.UsageError(
            f"got {alone} with --{of_several[0]}, and one process stores that alone; leave --{of_several[0]} out"
        )
    if from_arrays is not None:
        _append(store, from_arrays, options["run"], site, lineage, allow_nan, options["wait"])
        return
    if threads is not None:
        _take(threads)
    of_patch = {name: options.pop(name) for name in OF_PATCH}
    if of_patch["base"] is not None:
        _patch(store, of_patch, options)
        return
    if given := [name for name in OF_PATCH if of_patch[name]]:
        raise click.UsageError(f"--{SPELLED.get(given[0], given[0])} comes with --base, the stored run that is edited")
    if site or lineage or allow_nan:
        raise click.UsageError("--site, --lineage and --allow-nan come with --from-arrays (a model's sites: --sites)")
    from actstore.cli.progress import waiting
    from actstore.ingest.jobs.prepare import prepare

    which, of_ray = None, False
    if of_several:
        from actstore.ingest.jobs.verb import asked

        which, of_ray = asked(slice, engine, address, workers)
    if which is not None:
        with waiting("model and input"):
            job = prepare(store, **options)
        _execute_slice(job, which)
        return
    with waiting("model and input"):
        job = prepare(store, **options)
    if of_ray:
        from actstore.ingest.jobs.on_ray import execute_on_ray

        n_sequences, job = _execute(job, partial(execute_on_ray, job, options, address, workers))
    else:
        n_sequences, job = _execute(job)
    look = advised("info", store)
    note(f"{store}: run {job.plan.run} holds {n_sequences:,} {job.unit}; look with {look}")


def _take(threads: int) -> None:
    """Have torch use so many threads."""
    from actstore.storage.machine import check_threads

    check_threads(threads)
    import torch

    torch.set_num_threads(threads)


def _execute(job: Ingest, how: Callable[[Advance], None] | None = None) -> tuple[int, Ingest]:
    """Store a run, with its cost before it and its progress.

    Args:
        how: stores it, given what is told how far it is; default: this process does.
    """
    from actstore.cli.progress import foretelling, progress
    from actstore.ingest.jobs.local import execute

    click.get_current_context().meta[KEPT] = job.kept
    note(job.announcement())
    n_sequences = job.sequences.n_sequences
    with progress(f"ingest {job.plan.run}", n_sequences, job.unit) as shown:
        advance = foretelling(shown, _foretell)
        how(advance) if how else execute(job, advance)
    return n_sequences, job


def _foretell(left: str) -> None:
    """Say how long an ingest is likely to take, once that is known."""
    note(
        f"at this rate the rest takes about {left}; Ctrl-C keeps the batches that are whole, and the same command goes on",
        err=True,
    )


def _execute_slice(job: Ingest, which: Slice) -> None:
    """Publish a slice of a run, with its cost before it and its progress."""
    from actstore.cli.progress import foretelling, progress
    from actstore.ingest.jobs.slices import execute_slice, kept

    click.get_current_context().meta[KEPT] = partial(kept, job, which)
    say(f"{job.announcement()}; slice {which}")
    with progress(f"ingest {job.plan.run} {which}", job.sequences.n_sequences, job.unit) as shown:
        done = execute_slice(job, which, foretelling(shown, _foretell))
    of_slice = f"{job.store}: slice {which} of run {job.plan.run}: {done.n_published} of its {done.n_batches} batches published now"
    if done.is_committed:
        say(f"{of_slice}; the run is whole, and committed; look with {advised('info', job.store)}")
    else:
        left = f"{done.n_left} batches of the run are left to the other slices"
        say(f"{of_slice}; {left}; {advised('commit', job.store)} commits what is whole")


@main.command()
@store_argument
@wait_option
def commit(store: Path, wait: float) -> None:
    """Commit what slices of a run have published.

    `actstore ingest --slice` makes slices, and the last one commits by itself. Before it, or where a
    slice failed, this takes the batches that are whole; the slices may be at work meanwhile. Where
    none is, what was published and is not whole is freed, and the slices compute it again.

    Example:

    \b
        actstore commit demo.act
    """
    from actstore import verbs
    from actstore.cli.progress import waiting

    with waiting("commit"):
        found = verbs.commit(store, wait)
    for of in found:
        working = f"; slices at work: {len(of.at_work)}" if of.at_work else ""
        again = "" if of.n_committed == of.n_batches or of.at_work else "; run the slices again for the others"
        there = f"{of.n_committed} of {of.n_batches} in all"
        say(f"{store}: run {of.run}: {len(of.taken)} batches committed, {there}{working}{again}")
    if not found:
        say(f"{store}: no slice published anything that is not committed")


def _patch(store: Path, of_patch: dict[str, Any], options: dict[str, Any]) -> None:
    """Store a run with edited activations."""
    from actstore.cli.progress import waiting
    from actstore.ingest.jobs.patched import prepare_patch
    from actstore.ingest.jobs.prepare import parse_sites
    from actstore.interventions import Edit
    from actstore.queries.probes.baselines import named_in

    context = click.get_current_context()
    for name in options:
        if name not in TAKEN_WITH_BASE and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"got --{name.replace('_', '-')}, which has no meaning with --base; leave it out")
    queries, sites, hows = of_patch["patches"], of_patch["at"], of_patch["how"] or ("replace",)
    n = len(queries)
    is_stored = not n and not sites and not of_patch["how"] and options["run"] is not None
    if not is_stored and (not n or len(sites) not in (1, n) or len(hows) not in (1, n)):
        raise click.UsageError(
            f"got {n} --patch, {len(sites)} --at and {len(of_patch['how'])} --how; give each --patch its --at and "
            "--how, or one for all; or the name of a stored run with edits alone (--run)"
        )
    texts = [_query(query) for query in queries]
    if unnamed := [name for name in of_patch["params"] if not any(named_in(text, {name: ""}) for text in texts)]:
        raise click.UsageError(f"got -p {unnamed[0]}, and no --patch names ${unnamed[0]}; leave it out")
    shared = {name: of_patch[name] for name in ("donors", "donor_site", "tables")}
    edits = [
        Edit(text, at, how, params=named_in(text, of_patch["params"]) or {}, **shared)
        for text, at, how in zip(texts, cycle(sites), cycle(hows), strict=False)
    ]
    with waiting("model and edits"):
        job = prepare_patch(
            store,
            of_patch["base"],
            edits,
            options["run"],
            parse_sites(options["sites"]),
            options["batch_size"],
            options["answers"],
            options["device"],
            options["wait"],
            options["dtype"],
            options["codec"],
        )
    assert job.patch is not None
    with closing(job.patch):
        _execute(job)
    look = advised("sql", store, f"from predictions where run = '{job.plan.run}'")
    note(f"{store}: run {job.plan.run} holds {len(job.patch.numbers):,} edited {job.unit}; look with {look}")


def _query(given: str) -> str:
    """A query as it is, or that of a .sql file."""
    from actstore.queries.probes.labelled import sql_of

    return sql_of(given)


def _append(
    store: Path, file: str, run: str | None, site: str | None, lineage: str | None, allow_nan: bool, wait: float
) -> None:
    from actstore import verbs
    from actstore.reading.files import read_arrays

    if run is None or site is None:
        raise click.UsageError("--from-arrays needs the stored --run, and the name of the new --site")
    said = {"file": Path(file).name} | ({"what": lineage} if lineage else {})
    n = verbs.append(store, run, site, *read_arrays(Path(file)), said, allow_nan, wait)
    note(f"{store}: site {site} of run {run} holds {n:,} tokens")
