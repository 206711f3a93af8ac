"""The commands that answer questions: study, report, and record for results that they kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actstore.cli import complete
from actstore.cli.group import main, note, say
from actstore.cli.options import (
    engine_options,
    long_output_options,
    no_check_option,
    no_record_option,
    param_option,
    store_argument,
    table_option,
    wait_option,
)
from actstore.errors import ActstoreError, advised
from actstore.storage.machine import check_memory

if TYPE_CHECKING:
    from actstore.cli.output import Output
    from actstore.store import Store


seed_option = click.option("--seed", default=0, show_default=True, help="Seed of everything random.")
confirm_option = click.option(
    "--confirm",
    shell_complete=complete.datasets,
    metavar="DATASET",
    help="Test the findings again on this stored set of trees, drawn apart from the run's own.",
)


def _look_before(store: Path, wait: float) -> None:
    """Wait for another writer before the work; warn if nobody can write to the store."""
    from actstore.writing import recording

    if why := recording.wait_until_free(store, wait):
        say(f"actstore: {store} cannot be written ({why}): the answers are printed, and not recorded in it", err=True)


def _announce(store: Store, names: list[str], runs: tuple[str, ...], options: dict[str, Any]) -> None:
    """Say what is asked, before it is computed, where it may take minutes."""
    from actstore.queries import studies

    with suppress(ActstoreError):  # which the study itself will say
        if said := studies.announcement(store, names, runs, options):
            note(said, err=True)


def _kept(store: Path) -> Callable[[Path], None]:
    """A function that prints where results are kept that the store cannot take, and how to record them."""

    def say_it(file: Path) -> None:
        command = advised("record", store, file)
        say(f"actstore: not recorded; {file} keeps the results, and {command} records them", err=True)

    return say_it


@main.command()
@store_argument
@click.argument("name", shell_complete=complete.studies)
@click.option(
    "--run", "runs", multiple=True, shell_complete=complete.runs, help="The run to study; default: every run that fits."
)
@seed_option
@click.option(
    "-o", "--option", "options", type=(str, str), multiple=True, metavar="NAME VALUE", help="An option of the study."
)
@click.option(
    "--query",
    metavar="SQL",
    help="Of the studies probe and erase: SQL that yields token_id, label and maybe split; or FILE.sql.",
)
@param_option
@table_option
@confirm_option
@click.option("--plot", metavar="FILE", help="Draw the figure: .png, .svg or .pdf; with several runs, FILE-RUN.")
@engine_options
@click.option("--caption", is_flag=True, help="Write a caption beside each figure, as FILE.txt.")
@no_record_option
@wait_option
@no_check_option
@long_output_options
def study(
    store: Path,
    name: str,
    runs: tuple[str, ...],
    seed: int,
    options: tuple[tuple[str, str], ...],
    query: str | None,
    params: dict[str, str],
    tables: dict[str, str],
    confirm: str | None,
    plot: str | None,
    engine: str | None,
    address: str | None,
    workers: int | None,
    caption: bool,
    no_record: bool,
    wait: float,
    check: bool,
    output: Output,
) -> None:
    """Run a study: print its table, record it, draw its figure.

    The studies are probes, depth, last-edge, swap, dreams, attention, compare and probe, and those
    of causes: ablate, patching, path-patching, knockout, scrub and erase. `dtype-bill` says what a run
    costs and saves that is stored otherwise than as float32. If the store lacks what a
    study needs, the message names the `actstore ingest` that adds it. `compare` takes every pair of models over
    the same trees among the named runs; with one run, every pair of that run; by default, for each set of trees,
    its first run against every other model.

    `probe` reads labels of your own, of trees or of any other sequences: --query yields token_id,
    label and, if the sequences' own split is not meant, split. `-o baselines FILE.sql,…` names
    queries that yield token_id and guess, `-o sites` the sites, `-o label NAME` the label's name in
    `results`. With --confirm, the query takes $dataset. `compare` needs no trees either: of other
    sequences it compares next tokens and the similarity of sites. --table NAME=FILE is a table that
    the queries of a study read, those of `-o pairs` and `-o donors`, too.

    Studies of causes run the model again with edited activations. `knockout` takes attention away,
    by layer: `-o from` roles of tokens, `-o to` classes of keys, or `-o pairs FILE.sql`, a query for
    token_id and key_token_id; `-o trees N`.
    `ablate` takes away what a site adds at the tokens of a role: `-o sites attn_out,mlp_out`, or
    `z` for heads; `-o roles`; `-o how zero,mean,resample`; `-o trees N`.
    `patching` gives a tree the activations that another tree, a donor with another first step, has
    at the tokens of a role: `-o sites resid_post,attn_out,mlp_out`, `-o roles`, `-o direction
    noise|denoise`, `-o pairs FILE.sql`, a query for the token_id and donor_token_id of root tokens.
    `path-patching` gives a later site, the receiver, what a donor's sender brings it through the
    residual stream alone: `-o senders attn_out,mlp_out` or `z` for heads, and `-o from` roles of
    their tokens; `-o receivers attn_out,mlp_out,z,logits`, and `-o to` roles; the others as of
    `patching`.
    `scrub` gives the root token what a layer's attention brings there in another tree, a donor, as
    Brinkmann et al. do: `-o n N` clean trees of a path length, `-o listed any` for trees that are
    not listed backward, `-o second_path N` for the least length of their second path, `-o donors
    FILE.sql` for donors of your own: a query for token_id and donor_token_id that may use $layer.
    `erase` takes a label out of the activations of a site, by LEACE and by a probe's directions:
    `-o sites`, `-o token_role` and `-o labels` as of `probes`, or --query as of `probe`.

    With --engine ray, the workers of a Ray cluster probe the sites of `probes`; the results are the
    same.

    `dtype-bill` compares a run in float32 with those of its model over its trees that are stored with
    `ingest --dtype` or `--codec`: bytes, reads, probes, predictions from what is stored, and what
    donors move: `-o sites`, `-o token_role` and `-o labels` as of `probes`, `-o role` of the tokens
    that get a donor's activation, `-o trees N`, `-o repeats 0` for no times.

    With --confirm, each test that is significant after Holm's correction is repeated on a second
    set of trees. The second set's test uses the same model's run over that set, and leaves out
    trees that both sets hold. Each finding is then reported as found here, and as confirmed there
    or not.

    Example:

    \b
        actstore study demo.act probes --engine ray --address auto
        actstore study demo.act probes --plot probes.pdf --caption
        actstore study demo.act depth --run reproduction --confirm fresh
        actstore study demo.act probes --run reproduction -o token_role separator -o labels source,goal
        actstore study demo.act compare --run reproduction --run baseline
        actstore study demo.act depth --json
        actstore study demo.act ablate --run reproduction -o how zero --plot ablate.png
        actstore study demo.act patching --run reproduction -o sites attn_out --plot patching.png
        actstore study demo.act path-patching --run reproduction -o senders attn_out --plot paths.png
        actstore study demo.act probe --query "select token_id, source as label from edge_targets" -o sites resid_post
        actstore study demo.act knockout --run reproduction -o to "goal,targets on path" --plot knockout.png
        actstore study demo.act scrub --run reproduction --plot scrub.png
        actstore study demo.act erase --run reproduction -o labels goal -o sites resid_post --plot erase.png
        actstore study demo.act dtype-bill --run reproduction
        actstore study notes.act probe --query verbs.sql -p tense past -o baselines by_word.sql --plot verbs.png
        actstore study demo.act probe --query "select token_id, label from mine" --table mine=labels.csv
    """
    from actstore.cli.progress import progress
    from actstore.outputs import CAPTION, FIGURES, check_file
    from actstore.queries import studies
    from actstore.queries.confirm import rows
    from actstore.queries.study import CAUSAL
    from actstore.store import Store
    from actstore.verbs import patching

    check_memory(models=name in CAUSAL)
    check_file(plot, "--plot", FIGURES)
    if caption and not plot:
        raise click.UsageError("got --caption and no --plot; say where the figure goes (--plot FILE.pdf)")
    chosen: dict[str, Any] = {
        key: int(value) if value.isdecimal() and len(value) < 19 else value for key, value in options
    }
    of_engine = {"engine": engine, "address": address, "workers": workers}
    chosen |= {key: value for key, value in of_engine.items() if value is not None}
    chosen |= ({"query": query} if query is not None else {}) | ({"params": params} if params else {})
    with Store(store, check) as opened, patching(opened) as patch:
        if not no_record:
            _look_before(store, wait)
        _announce(opened, [name], runs, chosen)
        asked = studies.answer(opened, name, runs, seed, chosen, confirm, progress, patch, tables)
    answers = [one.answer for one in asked if one.answer]
    confirmed = [one.confirmation for one in asked if one.confirmation]
    for lack in filter(None, (one.lacks for one in asked)):
        say(f"actstore: {lack}", err=True)
    try:
        as_table = output.is_table
        for one in answers if as_table else ():
            if len(answers) > 1:
                say(f"{' and '.join(one.of)}:")
            output.write(one.frame, fold=True)
        if not as_table:
            output.write(*rows(studies.as_frame(answers), confirmed))
        for line in "\n".join([one.sentence for one in answers] + [one.sentence for one in confirmed]).splitlines():
            say(line, err=not as_table)
        for file in studies.save_figures(answers, plot, caption) if plot else ():
            note(f"{'caption' if file.suffix == CAPTION else 'figure'}: {file}", err=True)
    finally:
        if not no_record:
            studies.record(opened, asked, wait, _kept(store))
    for fault in [one.error for one in asked if one.error and one.fault]:
        raise fault
    if confirm is not None and not confirmed:
        raise click.exceptions.Exit(1)


@main.command()
@store_argument
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--run",
    "runs",
    multiple=True,
    shell_complete=complete.runs,
    help="A run to study; default: every run over drawn trees.",
)
@seed_option
@confirm_option
@no_record_option
@wait_option
@no_check_option
def report(
    store: Path,
    out: Path,
    runs: tuple[str, ...],
    seed: int,
    confirm: str | None,
    no_record: bool,
    wait: float,
    check: bool,
) -> None:
    """Run every study, and write one page of them, OUT/index.html.

    The page needs no other file. If the store lacks what a study needs, the page shows the `actstore ingest` that adds it. If a
    study fails, the page shows the reason, and the exit code is 1. Each pair of models over the
    same trees is compared.

    With --confirm, the findings of each study are tested again on a second set of trees (see
    `actstore study --help`). If a study cannot be tested there, the page shows the reason.

    Example:

    \b
        actstore report demo.act report/
        actstore report demo.act report/ --confirm fresh
        actstore report demo.act report/ --run reproduction --run baseline
    """
    from actstore.cli.progress import progress
    from actstore.outputs import check_file
    from actstore.queries import studies
    from actstore.queries.report import PAGE, TITLES
    from actstore.queries.report import report as make
    from actstore.store import Store

    check_file(out / PAGE, "OUT", make=True)
    with Store(store, check) as opened, progress("report", None, "questions") as advance:
        if not no_record:
            _look_before(store, wait)
        _announce(opened, list(TITLES), runs, {})
        made = make(opened, out, runs, seed, confirm, advance)
    note(str(made))
    for fault in made.faults:
        say(f"actstore: {fault}", err=True)
    if not no_record:
        studies.record(opened, made.asked, wait, _kept(store))
    if made.faults:
        raise click.exceptions.Exit(1)


@main.command()
@store_argument
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE…")
@wait_option
def record(store: Path, files: tuple[Path, ...], wait: float) -> None:
    """Record results that a study kept in a file.

    A study keeps them there while another process writes to the store.

    Example:

    \b
        actstore record demo.act results-3f9c0a1b2d4e.parquet
    """
    from actstore import verbs
    from actstore.cli.progress import waiting

    with waiting("record"):
        results = verbs.record(store, files, wait)
    note(f"{store}: {len(results)} answers recorded, {sum(map(len, results)):,} rows of `results`")
