"""The commands that look after a store: doctor, verify, repair, drop, copy and merge."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from actstore.cli import complete
from actstore.cli.group import LightCommand, main, note, say
from actstore.cli.options import output_options, store_argument, wait_option
from actstore.errors import ActstoreError, advised
from actstore.storage.machine import check_memory

if TYPE_CHECKING:
    from actstore.cli.output import Output


def _place_or_none(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    from actstore.storage.at import place

    return None if value is None else place(value)


@main.command(cls=LightCommand)
@click.argument("store", required=False, callback=_place_or_none, shell_complete=complete.stores)
@output_options
def doctor(store: Path | None, output: Output) -> None:
    """Say what is installed, what limits hold, what would be slow.

    Versions, memory, processors and disks are looked at; with a STORE its disk, its size and its
    state. A line with a `!` is something to look at, and says what to do. The exit code is 0
    whatever is found.

    Example:

    \b
        actstore doctor
        actstore doctor demo.act
        actstore doctor demo.act -o json
    """
    from actstore.checkup import doctor as examine
    from actstore.sql.rows import Rows

    facts = examine(store)
    if not output.is_table:
        names = ["about", "what", "found", "advice"]
        rows = [(fact.about, fact.what, fact.found, fact.advice) for fact in facts]
        output.write(Rows(names, ["VARCHAR"] * 4, ["text"] * 4, rows))
        return
    for turn, fact in enumerate(facts):
        if not turn or facts[turn - 1].about != fact.about:
            say(fact.about)
        say(f"{'!' if fact.advice else ' '} {fact}")
    n = sum(fact.advice is not None for fact in facts)
    say(f"{n} to look at, marked with !" if n else "nothing to look at")


@main.command()
@store_argument
@click.option("--quick", is_flag=True, help="Check only sizes and the shards' index checksums.")
@click.option(
    "--recompute",
    type=click.IntRange(1),
    metavar="N",
    help="Run the model again on N random trees or texts per run; compare.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the random trees and texts.")
@output_options
def verify(store: Path, quick: bool, recompute: int | None, seed: int, output: Output) -> None:
    """Read everything that was committed, and list what has changed.

    With --recompute, the model runs again on random trees or texts, and every site, token and
    prediction is compared with the stored values. The tolerance is 1/10,000 of a site's largest
    number, and 0.001 of a probability, since sums of float32 round differently in other batches and
    on other machines. Where the model is gone, `agrees` is empty.

    Example:

    \b
        actstore verify demo.act
        actstore verify demo.act --quick
        actstore verify demo.act --recompute 20
    """
    from actstore import verbs
    from actstore.cli.progress import progress
    from actstore.ingest.replay import difference
    from actstore.ingest.replay.asked import planned
    from actstore.upkeep.verify import raise_if_damaged

    check_memory(models=recompute is not None)
    if recompute is not None:
        with suppress(ActstoreError):  # which `verify` itself will say
            note(str(planned(store, recompute)), err=True)
    report = verbs.verify(store, quick, recompute, seed, progress)
    if report.findings or (recompute is None and output.is_for_a_program):
        output.write(report.as_frame())
    note(f"{store}: {report.n_files:,} files, {report.n_bytes / 1e9:.2f} GB, {len(report.damage)} damaged", err=True)
    raise_if_damaged(report, store)
    if recompute is not None:
        output.write(difference.as_frame(report.differences))
        difference.raise_if_apart(report.differences, store)


@main.command()
@store_argument
@wait_option
@output_options
def repair(store: Path, wait: float, output: Output) -> None:
    """Restore what is damaged to the committed bytes.

    The catalog is built anew. A store of an earlier version is brought up to date. Rows come from the catalog or from the
    definition of the trees, activations from the run's own weights.

    Example:

    \b
        actstore repair demo.act
    """
    from actstore import verbs
    from actstore.cli.progress import progress
    from actstore.errors import Damaged
    from actstore.upkeep.repair import as_frame

    done = verbs.repair(store, wait, progress)
    if done.mended or done.left or output.is_for_a_program:
        output.write(as_frame(done))
    note(f"{store}: catalog rebuilt from {done.snapshot:,} commits, {len(done.mended)} files mended", err=True)
    if done.left:
        raise Damaged(f"{len(done.left)} files could not be mended, the first {done.left[0].path}: {done.left[0].what}")


@main.command()
@store_argument
@click.option(
    "--run",
    shell_complete=complete.runs,
    help="A run, with its arrays, answers and recorded results; its dataset stays.",
)
@click.option(
    "--dataset",
    shell_complete=complete.datasets,
    help="A dataset that no run is left over, with its sequences and tokens.",
)
@click.option("--label", shell_complete=complete.labels, help="Labels, by the name of their table.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@wait_option
def drop(store: Path, run: str | None, dataset: str | None, label: str | None, yes: bool, wait: float) -> None:
    """Drop a run, a dataset or a label.

    The drop is a commit, after which no query finds what was dropped. The next writer, or `actstore
    repair`, frees the bytes. A name may be used again; the ids of a dropped dataset are not.

    Example:

    \b
        actstore drop demo.act --run reproduction
        actstore drop demo.act --dataset reproduction-16nodes-seed0-2000 --yes
        actstore drop demo.act --label sentiment --yes
    """
    from actstore import verbs
    from actstore.cli.progress import waiting
    from actstore.writing import dropping

    kind, name = verbs.dropped_name(run, dataset, label)
    planned, n_bytes = dropping.plan(store, kind, name)
    if not yes:
        size = f"{len(planned.files):,} files, {n_bytes / 1e6:,.1f} MB"
        click.confirm(f"Drop {kind} {name} from {store} ({size})?", abort=True, err=True)
    with waiting("drop"):
        files = verbs.drop(store, run, dataset, label, wait)
    note(f"{store}: {kind} {name} is dropped, {len(files):,} files; {advised('repair', store)} frees the bytes")


@main.command()
@store_argument
@click.argument("out", type=click.Path())
@click.option(
    "--run",
    "runs",
    multiple=True,
    shell_complete=complete.runs,
    help="A run to copy, with its dataset and model; default: everything.",
)
def copy(store: Path, out: str, runs: tuple[str, ...]) -> None:
    """Copy a store, or some of its runs, into a new store.

    Each file is compared with its committed hash. A copy of some runs leaves out labels, and the
    results of studies. The base and the donors of a run with edits come with it.

    Example:

    \b
        actstore copy demo.act backup.act
        actstore copy demo.act small.act --run reproduction
    """
    from actstore import verbs
    from actstore.cli.progress import progress

    done = verbs.copy(store, out, runs, progress)
    with_it = f"; with {', '.join(done.also)}, on which edits rest" if done.also else ""
    note(f"{done.out}: {done.commits:,} commits, {done.n_files:,} files, {done.n_bytes / 1e9:.2f} GB{with_it}")


@main.command()
@store_argument
@click.argument("others", nargs=-1, required=True, type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--rename",
    nargs=4,
    type=(str, click.Choice(["run", "dataset", "label"]), str, str),
    multiple=True,
    metavar="STORE KIND NAME NEW",
    help="A new name for a run, dataset or label of a store; KIND is one of the three.",
)
def merge(store: Path, others: tuple[str, ...], out: str, rename: tuple[tuple[str, str, str, str], ...]) -> None:
    """Merge STORE and OTHERS into the new store OUT.

    STORE keeps its ids, and further datasets get new ones. What several stores hold alike is held
    once: datasets, runs, labels, models. If two hold something else under one name, the merge is
    refused, and the message says how to rename it. On one disk, the shards of OUT are hard links to
    those of the stores, and take no room.

    Example:

    \b
        actstore merge monday.act tuesday.act week.act
        actstore merge a.act b.act c.act --rename b.act run reproduction reproduction-2
    """
    from actstore import verbs
    from actstore.cli.progress import progress

    done = verbs.merge([store, *others], out, rename, progress)
    once = f"; held once: {', '.join(done.shared)}" if done.shared else ""
    note(f"{done.out}: {done.commits:,} commits, {done.n_files:,} files, {done.n_bytes / 1e9:.2f} GB{once}")
