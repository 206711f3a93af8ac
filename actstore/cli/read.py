"""The command `actstore`: each command opens a store, makes one library call and prints.

Heavy imports stay inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actstore import __version__
from actstore.cli import terminal
from actstore.cli.terminal import printable
from actstore.errors import ActstoreError, BadInput, NotStored, SeveralRuns, advised
from actstore.storage.machine import check_memory, limit_reached, raise_descriptors

if TYPE_CHECKING:
    import polars as pl

    from actstore.cli.output import Output
    from actstore.store import Store

KEPT = "actstore.kept"  # where a command that can be stopped and gone on with leaves what says how far it is


def say(text: str, err: bool = False) -> None:
    """Print a line for eyes."""
    click.echo(printable(text), err=err)


class Command(click.Command):
    """A command of a store's; `--help` is answered before it begins."""

    def invoke(self, ctx: click.Context) -> Any:
        check_memory()
        return super().invoke(ctx)


class Commands(click.Group):
    """A group that turns the package's own errors, a full disk and Ctrl-C into one line and an exit code."""

    command_class = Command

    def main(self, *args: Any, **extra: Any) -> Any:
        terminal.prepare()
        try:
            return super().main(*args, **extra)
        except OSError as error:  # of printing help; a command's own are met below
            say(f"actstore: {error.strerror or error}", err=True)
            raise SystemExit(1) from None
        finally:
            terminal.finish()

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with terminal.notes(SeveralRuns):
                return super().invoke(ctx)
        except ActstoreError as error:
            say(f"actstore: {error}", err=True)
            ctx.exit(error.exit_code)
        except click.exceptions.NoArgsIsHelpError:  # a group's help
            raise
        except click.UsageError as error:
            of = [*error.ctx.command_path.split()[1:]] if error.ctx else [*filter(None, [ctx.invoked_subcommand])]
            command = " ".join(["actstore", *of])
            say(f"actstore: {error.format_message().rstrip('.')}; `{command} --help` says what there is", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            say(f"actstore: stopped{_goes_on(ctx)}", err=True)
            ctx.exit(1)
        except BrokenPipeError:  # `actstore sql … | head`
            ctx.exit(1)
        except OSError as error:
            where = error.filename or "the system"
            said = limit_reached(error, where) or f"{where}: {error.strerror or error}"
            say(f"actstore: {said}{_goes_on(ctx)}", err=True)
            ctx.exit(1)
        except BaseException as error:  # of any library that could have no more memory, or not be loaded for want of it
            if not (reached := limit_reached(error, f"cannot run {ctx.command_path}")):
                raise
            say(f"actstore: {reached}{_goes_on(ctx)}", err=True)
            ctx.exit(1)


def _goes_on(ctx: click.Context) -> str:
    """What was kept of a command's work, where it has said how to tell."""
    with suppress(ActstoreError, OSError):
        return f"; {ctx.meta[KEPT]()}" if KEPT in ctx.meta else ""
    return ""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="actstore")
def main() -> None:
    """Residual streams of path-finding transformers in Zarr, what they mean in DuckDB, studies in SQL.

    Example:

    \b
        actstore ingest demo.act --model reproduction --trees 2000
        actstore sql demo.act "select role, count(*) from tokens group by all"
        actstore study demo.act probes --plot probes.png
    """
    raise_descriptors()


def store_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Every command's first argument."""
    return click.argument("store", callback=_place)(command)


def _place(ctx: click.Context, parameter: click.Parameter, value: str) -> Path:
    from actstore.storage.folder import place

    return place(value)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--csv, --json, --parquet FILE; a table without them."""

    def wrapped(*args: Any, as_csv: bool, as_json: bool, parquet: str | None, **options: Any) -> Any:
        from actstore.cli.output import Output, check_file

        check_file(parquet, "--parquet")
        if as_csv + as_json + bool(parquet) > 1:
            raise click.UsageError("choose one of --csv, --json and --parquet")
        return command(*args, output=Output("csv" if as_csv else "json" if as_json else "table", parquet), **options)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--parquet", metavar="FILE", help="Write the rows to a Parquet file."),
        click.option("--json", "as_json", is_flag=True, help="Print rows as JSON."),
        click.option("--csv", "as_csv", is_flag=True, help="Print rows as CSV."),
    ):
        wrapped = option(wrapped)
    return wrapped


param_option = click.option(
    "-p",
    "--param",
    "params",
    type=(str, str),
    multiple=True,
    metavar="NAME VALUE",
    help="Value of a $NAME, as text; cast it where a number is meant (`$NAME::int`).",
)


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--timeout and --memory of the query."""
    command = click.option("--memory", metavar="SIZE", help="Stop it when it holds more than this: 2GB, 512MB.")(
        command
    )
    return click.option("--timeout", type=float, metavar="SECONDS", help="Stop the query after so long.")(command)


check_option = click.option(
    "--check", is_flag=True, help="Hold what is read against the hashes it was committed with (see Store)."
)
no_check_option = click.option(
    "--no-check",
    "check",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Do not hold what is read against the hashes it was committed with.",
)

wait_option = click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for another process that writes to the store.",
)

checkpoint_option = click.option(
    "--checkpoint",
    type=int,
    metavar="STEP",
    help="Its weights at this step of training (`actstore models list`), not the trained ones.",
)


@main.command()
@store_argument
@click.option("--model", help="A model's name (`actstore models list`) or a checkpoint's path.")
@click.option(
    "--model-of", metavar="RUN", help="In its place: the model of a stored run, whose weights the store keeps."
)
@click.option("--config", type=click.Path(), help="The checkpoint's YAML, if not beside it.")
@checkpoint_option
@click.option("--trees", type=int, help="How many trees; default 10,000.")
@click.option("--distribution", help="reproduction, baseline or deep; the model's own by default.")
@click.option("--depths", help="Goal depths of `deep` trees: 1-15 or 3,5,7.")
@click.option("--nodes", type=int, help="Nodes of each tree, 2 to 64; as many as the model has labels by default.")
@click.option("--seed", type=int, help="Names the stream of trees; default 0.")
@click.option("--dataset", help="Name of the set of trees: a stored one, or a new one of the above.")
@click.option("--run", help="Name of the run; the model's name by default.")
@click.option(
    "--sites",
    help="embed, resid_pre, resid_mid, resid_post, pattern, or one layer's (resid_post.0); with commas; or none.",
)
@click.option(
    "--variant", help="swap_last or swap_inner: an edge of each path of the stored set --dataset trades places."
)
@click.option(
    "--prompt",
    default="task",
    show_default=True,
    help="tree: give the edges alone, and store what the model goes on with.",
)
@click.option("--samples", type=int, help="Of --prompt tree: continuations drawn beside the greedy one; 1 by default.")
@click.option("--batch-size", default=128, show_default=True, help="Trees a forward pass.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@wait_option
def ingest(store: Path, **options: Any) -> None:
    """Run a model over generated trees, and store its activations and answers.

    Stopped or killed, the same command goes on where the last commit was, and ends with the same bytes.

    Example:

    \b
        actstore ingest demo.act --model reproduction --trees 2000
        actstore ingest demo.act --model reproduction --run patterns --trees 500 --sites pattern,resid_post.0
        actstore ingest demo.act --model reproduction --trees 2000 --checkpoint 1000
        actstore ingest demo.act --model mine.pt --config mine.yaml --dataset reproduction-16nodes-seed0-2000
        actstore ingest demo.act --model reproduction --dataset reproduction-16nodes-seed0-2000 --variant swap_last
        actstore ingest demo.act --model reproduction --dataset reproduction-16nodes-seed0-2000 --prompt tree
    """
    from actstore.cli.progress import progress
    from actstore.ingest.jobs.job import prepare
    from actstore.ingest.jobs.local import execute

    job = prepare(store, **options)
    click.get_current_context().meta[KEPT] = job.kept
    say(job.announcement())
    with progress(f"ingest {job.plan.run}", job.trees.n_trees, "trees") as advance:
        execute(job, advance)
    look = advised("info", store)
    say(f"{store}: run {job.plan.run} holds {job.trees.n_trees:,} trees; look with {look}")


@main.command()
@store_argument
@output_options
def info(store: Path, output: Output) -> None:
    """What a store holds: runs, models, sets of trees, sites, sizes.

    Example:

    \b
        actstore info demo.act
    """
    from actstore.store import Store

    with Store(store) as opened:
        output.write(opened.info())


@main.command()
@store_argument
@click.argument("query")
@click.option("--run", help="Ask in the session of this run: every table holds its rows alone.")
@param_option
@limit_options
@check_option
@output_options
def sql(
    store: Path,
    query: str,
    run: str | None,
    params: tuple[tuple[str, str], ...],
    timeout: float | None,
    memory: str | None,
    check: bool,
    output: Output,
) -> None:
    """Run SQL over a store's tables, vectors included.

    Example:

    \b
        actstore sql demo.act "select role, count(*) from tokens group by all"
        actstore sql demo.act "from trees where depth = \\$d::int" -p d 7 --csv
        actstore sql demo.act "select avg(greedy_right::int) from outcomes" --run reproduction
        actstore sql demo.act "select act(token_id, run, 'embed') as x from predictions limit 5" --timeout 10 --memory 2GB
    """
    from actstore.cli.progress import waiting
    from actstore.store import Store

    with Store(store, check) as opened, waiting("sql"):
        asked = opened if run is None else opened.of(run)
        rows = asked.sql(query, dict(params), timeout, memory)
    output.write(rows)


@main.command()
@store_argument
@click.argument("query")
@click.option("--run", help="Whose activations; needed where the store holds several runs.")
@click.option(
    "--site",
    "sites",
    multiple=True,
    default=("resid_post.0",),
    show_default=True,
    help="Where in the network; several, repeated or with commas, or a family (resid_post: every layer that is stored) give "
    "X [n, n_sites, d_model].",
)
@click.option("--dtype", default="float32", show_default=True, help="Of X: float32, float16 or float64.")
@click.option("--explain", is_flag=True, help="Say what would be read, and read nothing.")
@click.option("--out", metavar="FILE", help="Write X and the rows to .npz, .safetensors or .parquet.")
@click.option(
    "--check/--no-check",
    default=None,
    help="Hold what is read against the hashes it was committed with; default with --out.",
)
@param_option
@limit_options
@output_options
def read(
    store: Path,
    query: str,
    run: str | None,
    sites: tuple[str, ...],
    dtype: str,
    explain: bool,
    out: str | None,
    check: bool | None,
    params: tuple[tuple[str, str], ...],
    timeout: float | None,
    memory: str | None,
    output: Output,
) -> None:
    """Read the activations of the tokens that a query names, row for row.

    Example:

    \b
        actstore read demo.act "select token_id, source from edge_targets where is_last" --site resid_post.0 --out x.npz
        actstore read demo.act "from edge_targets" --site embed,resid_post.0,resid_post.5 --out x.safetensors
        actstore read demo.act "from edge_targets" --explain
    """
    import polars as pl

    from actstore.cli.output import ACTIVATION_FILES, check_columns, check_file, save_activations
    from actstore.cli.progress import waiting
    from actstore.ingest.models.sites import FAMILIES
    from actstore.store import Store

    check_file(out, "--out", ACTIVATION_FILES)
    names = [name.strip() for some in sites for name in some.split(",")]
    where: dict[str, Any] = {"sites": names} if len(names) > 1 or names[0] in FAMILIES else {"site": names[0]}
    where |= {"timeout": timeout, "memory": memory}
    with Store(store, bool(out) if check is None else check) as opened:
        if explain:
            with waiting("explain"):
                explanation = opened.explain(query, run, params=dict(params), **where)
            if output.format == "table" and not output.parquet:
                say(str(explanation))
            else:
                output.write(pl.DataFrame([explanation.to_dict()]), explanation.to_dict())
            return
        with waiting("read"):
            check_columns(_columns(opened, query, dict(params), timeout, memory), out)
            X, rows = opened.read(query, run, params=dict(params), dtype=dtype, **where)
    if out:
        save_activations(out, X, rows)
        say(f"{out}: X {X.dtype} {list(X.shape)} and {', '.join(rows.columns)}")
    else:
        check_columns(rows.columns, None)
        output.write(rows.with_columns(pl.Series("x", X)))


def _columns(opened: Store, query: str, params: dict[str, str], *limits: Any) -> list[str]:
    """The names that a query will yield; none where DESCRIBE does not take it, and then they are looked at afterwards."""
    try:
        return opened.sql(f"describe {query}", params, *limits)["column_name"].to_list()
    except ActstoreError:  # what is wrong with the query itself, the read says
        return []


@main.command()
@store_argument
@click.argument("name", required=False)
@param_option
@limit_options
@check_option
@output_options
def query(
    store: Path,
    name: str | None,
    params: tuple[tuple[str, str], ...],
    timeout: float | None,
    memory: str | None,
    check: bool,
    output: Output,
) -> None:
    """Run a named query; without a name, list them.

    Example:

    \b
        actstore query demo.act
        actstore query demo.act accuracy_by_depth -p run reproduction
    """
    from actstore import queries
    from actstore.cli.progress import waiting
    from actstore.sql.process import Limited
    from actstore.store import Store

    with Store(store, check) as opened, waiting("query"):
        rows = queries.select(Limited(opened, timeout, memory), name, **dict(params)) if name else queries.listing()
    output.write(rows)


@main.command()
@store_argument
@click.argument("tree", type=int)
def show(store: Path, tree: int) -> None:
    """Draw a tree, its prompt, and what each model answered.

    Example:

    \b
        actstore show demo.act 17
    """
    from rich.console import Console

    from actstore.queries.show import draw_tree
    from actstore.store import Store

    with Store(store) as opened:
        Console(soft_wrap=True, highlight=False).print(draw_tree(opened, tree))


@main.command()
@store_argument
@click.argument("tree", type=int)
@click.option("--run", help="Whose; needed where the store holds several.")
@click.option("--layer", type=int, help="One layer; all of them unless told.")
@click.option("--head", default=0, show_default=True, help="Of a figure; a page has them all.")
@click.option(
    "--out", metavar="FILE", required=True, help="A figure (.png, .svg, .pdf), or a page for a browser (.html)."
)
@no_check_option
def attention(store: Path, tree: int, run: str | None, layer: int | None, head: int, out: str, check: bool) -> None:
    """Draw the attention patterns of one tree, with its tokens.

    Example:

    \b
        actstore attention demo.act 17 --run patterns --layer 0 --out tree17.png
        actstore attention demo.act 17 --run patterns --out tree17.html
    """
    from actstore.cli.output import check_file
    from actstore.queries.attention.page import ENDINGS, save
    from actstore.store import Store

    check_file(out, "--out", ENDINGS)
    with Store(store, check) as opened:
        save(opened, opened.run(run), tree, out, layer, head)
    say(out)


no_record_option = click.option("--no-record", is_flag=True, help="Do not write the results into the store.")


def _look_before(store: Path, wait: float) -> None:
    """Wait for another writer before anything is computed; say it where nobody can write to the store."""
    from actstore.writing import recording

    if why := recording.wait_until_free(store, wait):
        say(f"actstore: {store} cannot be written ({why}): the answers are printed, and not recorded in it", err=True)


def _record(store: Path, results: list[pl.DataFrame], wait: float) -> None:
    """Record results; where the store cannot take them, say where they are kept, and how to record them from there."""
    from actstore.writing import recording

    def kept(file: Path) -> None:
        command = advised("record", store, file)
        say(f"actstore: not recorded; {file} keeps the results, and {command} records them", err=True)

    recording.record(store, results, wait, kept)


@main.command()
@store_argument
@click.argument("name")
@click.option("--run", "runs", multiple=True, help="Which run; every one that was given whole tasks by default.")
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@click.option(
    "-o", "--option", "options", type=(str, str), multiple=True, metavar="NAME VALUE", help="One of the study's own."
)
@click.option(
    "--confirm",
    metavar="DATASET",
    help="Put what is found to this stored set of trees, too, drawn apart from the run's own.",
)
@click.option("--plot", metavar="FILE", help="Draw the figure: .png, .svg or .pdf; of several runs FILE-RUN.")
@no_record_option
@wait_option
@no_check_option
@output_options
def study(
    store: Path,
    name: str,
    runs: tuple[str, ...],
    seed: int,
    options: tuple[tuple[str, str], ...],
    confirm: str | None,
    plot: str | None,
    no_record: bool,
    wait: float,
    check: bool,
    output: Output,
) -> None:
    """Run a study, print its table, record it in `results`, draw its figure.

    The studies are probes, depth, last-edge, swap, dreams, attention and compare; one that needs what the store lacks says
    which `actstore ingest` adds it. `compare` takes every pair of models over the same trees among the runs named; of one run
    every pair that it is in; by default, for each set of trees, its first run against every other model.

    With --confirm what was found (left standing by Holm) is put to a second set of trees, to the same model's run over it, without
    the trees that both sets hold; each claim is then told as found here, and confirmed there or not.

    Example:

    \b
        actstore study demo.act probes --plot probes.png
        actstore study demo.act depth --run reproduction --confirm fresh
        actstore study demo.act probes --run reproduction -o token_role separator -o labels source,goal
        actstore study demo.act compare --run reproduction --run baseline
        actstore study demo.act depth --json
    """
    from actstore.cli.output import FIGURES, check_file, save_figure
    from actstore.cli.progress import progress
    from actstore.queries import confirm as confirming
    from actstore.queries import second
    from actstore.queries import study as studies
    from actstore.store import Store

    check_file(plot, "--plot", FIGURES)
    chosen = {key: int(value) if value.isdecimal() and len(value) < 19 else value for key, value in options}
    with Store(store, check) as opened:
        asked = studies.questions(opened, name, runs, **chosen)
        if confirm is not None:
            asked = confirming.of_other_sets(opened, asked, confirm, bool(runs))
        if not no_record:
            _look_before(store, wait)
        answers, confirmed, lacking, failed = [], [], [], []
        for question in asked:
            with progress(f"study {name} {question.of}", None, "parts") as advance:
                try:
                    if confirm is not None:  # what lacks is told before anything is computed
                        second.look(opened, question, confirm)
                    given = {**question.options, "seed": seed, "progress": advance}
                    answers.append(studies.run(opened, name, run=question.run, **given))
                    if confirm is not None:
                        given = {**question.options, "progress": advance}
                        confirmed.append(confirming.confirm(opened, answers[-1], confirm, seed, **given))
                except (NotStored, BadInput) as error:  # another run may have what this one lacks
                    lacking.append(error)
                except Exception as error:  # what the others answered is not lost with it
                    failed.append(error)
    if not answers:
        raise [*failed, *lacking][0]
    for lack in lacking:
        say(f"actstore: {lack}", err=True)
    try:
        as_table = output.format == "table" and not output.parquet
        output.write(*confirming.rows(studies.tables(answers), confirmed, as_table))
        sentences = [answer.sentence for answer in answers] + [one.sentence for one in confirmed]
        for line in "\n".join(sentences).splitlines():
            say(line, err=not as_table)
        for answer in answers if plot else []:
            file = studies.figure_file(Path(str(plot)), answer, alone=len(answers) == 1)
            save_figure(file, studies.plot(answer))
            say(f"figure: {file}", err=True)
    finally:
        if not no_record:
            found = [answer.results for answer in answers] + [one.results for one in confirmed if len(one.results)]
            _record(store, found, wait)
    if failed:
        raise failed[0]
    if confirm is not None and not confirmed:
        raise click.exceptions.Exit(1)


@main.command()
@store_argument
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--run", "runs", multiple=True, help="Which; every run over drawn trees by default.")
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@no_record_option
@wait_option
@no_check_option
def report(store: Path, out: Path, runs: tuple[str, ...], seed: int, no_record: bool, wait: float, check: bool) -> None:
    """Run every study, and write one page of them all, OUT/index.html, that needs nothing beside itself.

    A study that needs what the store lacks stands there with the `actstore ingest` that adds it; one that fails, with the
    reason, and the exit code is 1. Each pair of models over the same trees is compared.

    Example:

    \b
        actstore report demo.act report/
        actstore report demo.act report/ --run reproduction --run baseline
    """
    from actstore.cli.output import check_file
    from actstore.cli.progress import progress
    from actstore.queries.report import PAGE
    from actstore.queries.report import report as make
    from actstore.store import Store

    check_file(out / PAGE, "OUT", make=True)
    with Store(store, check) as opened, progress("report", None, "questions") as advance:
        if not no_record:
            _look_before(store, wait)
        made = make(opened, out, runs, seed, advance)
    say(str(made))
    for fault in made.faults:
        say(f"actstore: {fault}", err=True)
    if not no_record:
        _record(store, [answer.results for answer in made.studies], wait)
    if made.faults:
        raise click.exceptions.Exit(1)


@main.command()
@store_argument
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE…")
@wait_option
def record(store: Path, files: tuple[Path, ...], wait: float) -> None:
    """Record results that a study kept in a file, because another process was writing to the store.

    Example:

    \b
        actstore record demo.act results-3f9c0a1b2d4e.parquet
    """
    from actstore.store import Store
    from actstore.writing import recording
    from actstore.writing.writer import open_writer

    results = [frame for file in files for frame in recording.read_kept(file)]
    with Store(store) as opened:
        recording.check_belongs(store, results, opened.runs(), opened.snapshot)
    with open_writer(store, wait=wait) as writer:
        for frame in results:
            writer.record(frame)
    say(f"{store}: {len(results)} answers recorded, {sum(map(len, results)):,} rows of `results`")


@main.command()
@store_argument
@click.option("--quick", is_flag=True, help="Look at sizes and index checksums alone.")
@click.option(
    "--recompute", type=click.IntRange(1), metavar="N", help="Run N random trees of each run anew, and compare."
)
@click.option("--seed", default=0, show_default=True, help="Of the random trees.")
@output_options
def verify(store: Path, quick: bool, recompute: int | None, seed: int, output: Output) -> None:
    """Read everything that was committed, and find what is not as it was.

    With --recompute, models run again by the weights that the store keeps, and every site, token and prediction of the trees
    drawn is held against what is stored: to a 10,000th of a site's largest number and to 0.001 of a probability, since sums of
    float32 round differently in other batches and on other machines.

    Example:

    \b
        actstore verify demo.act
        actstore verify demo.act --quick
        actstore verify demo.act --recompute 20
    """
    from actstore.cli.progress import progress
    from actstore.upkeep import verify as verifying

    total = sum(file.bytes for manifest in verifying.read_manifests(store)[0] for file in manifest.files)
    with progress("verify", total, "bytes") as advance:
        report = verifying.verify(store, quick, advance)
    if recompute is None or report.damage:
        output.write(report.table())
    say(f"{store}: {report.n_files:,} files, {report.n_bytes / 1e9:.2f} GB, {len(report.damage)} damaged", err=True)
    verifying.raise_if_damaged(report, store)
    if recompute is not None:
        from actstore.ingest.replay import compare, difference

        with progress("recompute", None, "runs") as advance:
            found = compare.compare(store, recompute, seed, advance)
        output.write(difference.table(found))
        difference.raise_if_apart(found, store)


@main.command()
@store_argument
@wait_option
@output_options
def repair(store: Path, wait: float, output: Output) -> None:
    """Mend what is damaged, to the bytes that were committed, and build the catalog anew.

    A store of an earlier version is brought up to date. Rows come from the catalog or from the definition of the trees,
    activations from the run's own weights.

    Example:

    \b
        actstore repair demo.act
    """
    from actstore.cli.progress import progress
    from actstore.errors import Damaged
    from actstore.upkeep import repair as repairing
    from actstore.upkeep import verify as verifying

    def recompute(*asked: Any) -> dict[str, bytes]:
        from actstore.ingest.replay.remake import files_of

        return files_of(*asked)

    total = sum(file.bytes for manifest in verifying.read_manifests(store)[0] for file in manifest.files)
    with progress("verify", total, "bytes") as advance:
        done = repairing.repair(store, recompute, advance, wait)
    if done.mended or done.left:
        output.write(repairing.table(done))
    say(f"{store}: catalog rebuilt from {done.snapshot:,} commits, {len(done.mended)} files mended")
    if done.left:
        raise Damaged(f"{len(done.left)} files could not be mended, the first {done.left[0].path}: {done.left[0].what}")


@main.command()
@click.argument("name")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--steps", type=int, help="Optimizer steps; the configuration's by default.")
@click.option("--nodes", type=int, help="Nodes of each tree; the configuration's by default.")
@click.option("--seed", type=int, help="Of weights and trees; the configuration's by default.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--grade",
    default=20_000,
    show_default=True,
    metavar="TREES",
    help="Fresh trees of each distribution to grade it on at the end.",
)
@click.option("--wandb", metavar="PROJECT", help="Send the log to this project of Weights & Biases too.")
def train(
    name: str,
    out: Path,
    steps: int | None,
    nodes: int | None,
    seed: int | None,
    device: str,
    grade: int,
    wandb: str | None,
) -> None:
    """Train a system (reproduction, baseline) or a YAML configuration, into the folder OUT.

    Every 25 steps its state is saved and OUT/NAME.jsonl has a row more; killed, the same command goes on from there and ends
    with the same weights. OUT/NAME.md, the model card, says how good it is on trees of each distribution.

    Example:

    \b
        actstore train reproduction runs/mine
        actstore train baseline runs/small --nodes 8 --steps 3000
    """
    from actstore.cli.output import Output, check_folder
    from actstore.cli.progress import progress
    from actstore.ingest.training import evaluation
    from actstore.ingest.training.card import write_card
    from actstore.ingest.training.recipe import Row, read_config
    from actstore.ingest.training.train import kept, summary, to_wandb
    from actstore.ingest.training.train import train as train_model

    check_folder(out, "OUT")
    _, shape, recipe = read_config(name, nodes, steps, seed)
    if grade < 1:
        raise BadInput(f"got {grade} trees to grade it on; take 1 or more (--grade)")
    evaluation.check(shape, recipe=recipe)  # what could not be graded at the end
    click.get_current_context().meta[KEPT] = lambda: kept(out)
    total = recipe.steps
    send = to_wandb(wandb, out) if wandb else None
    with progress(f"train {Path(name).stem}", total, "steps") as advance:

        def show(row: Row) -> None:
            advance(row["step"], total, summary(row))
            if send:
                send(row)

        weights = train_model(name, out, steps, nodes, seed, device, show)
    with progress(f"grade {weights.stem}", grade * len(evaluation.distributions(shape)), "trees") as advance:
        graded = write_card(weights, grade, device, advance)
    Output().write(graded.table)
    say(f"{weights}: trained; {weights.with_suffix('.md')} is its card")


@main.command()
@click.argument("model")
@click.option("--config", type=click.Path(), help="The checkpoint's YAML, if not beside it.")
@checkpoint_option
@click.option("--distribution", help="reproduction, baseline or deep alone; each of them by default.")
@click.option("--trees", default=20_000, show_default=True, help="How many fresh trees of each distribution.")
@click.option(
    "--seed", default=20_000_000, show_default=True, help="Names the stream of trees; far from those trained on."
)
@click.option("--nodes", type=int, help="Nodes of each tree; the model's own by default.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@output_options
def evaluate(
    model: str,
    config: str | None,
    distribution: str | None,
    trees: int,
    seed: int,
    nodes: int | None,
    device: str,
    checkpoint: int | None,
    output: Output,
) -> None:
    """Grade a model on fresh trees: tokens, whole paths and greedy answers, by distribution and goal depth.

    Intervals are exact ones at 95 %. Each distribution is asked for, since a model that is right on its own trees may fail on
    others; of the baseline's, those whose edges are listed backward and those shuffled stand apart.

    Example:

    \b
        actstore evaluate reproduction --trees 5000
        actstore evaluate reproduction --checkpoint 1000 --distribution deep --json
    """
    from actstore.cli.progress import progress
    from actstore.ingest.models.load import check_device, find, load
    from actstore.ingest.training import evaluation
    from actstore.ingest.training.recipe import recipe_of

    found = find(model, config, checkpoint)
    recipe = recipe_of(found.yaml)
    evaluation.check(found.config, distribution, trees, seed, nodes, recipe)
    check_device(device)
    loaded, total = (
        load(model, config, device, checkpoint),
        trees * len(evaluation.distributions(found.config, distribution)),
    )
    with progress(f"evaluate {found.name}", total, "trees") as advance:
        answer = evaluation.evaluate(loaded, distribution, trees, seed, nodes, recipe, advance)
    output.write(answer.table, answer.to_dict())
    say(answer.sentence(), err=True)


@main.group()
def models() -> None:
    """The models that can be named.

    Example:

    \b
        actstore models list
    """


@models.command(name="list")
@output_options
def models_list(output: Output) -> None:
    """Name the models there are, and where.

    Example:

    \b
        actstore models list
    """
    from actstore.ingest.models.load import listing

    output.write(listing())


@models.command(name="add")
@click.argument("name")
@click.argument("weights", type=click.Path(dir_okay=False))
@click.option(
    "--config", type=click.Path(dir_okay=False), help="The notebook's YAML; by default the file beside the weights."
)
@click.option("--system", help="reproduction or baseline, where there is no YAML.")
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="By default $ACTSTORE_MODELS, or the user's own folder, ~/.local/share/actstore/models.",
)
def models_add(name: str, weights: str, config: str | None, system: str | None, into: Path | None) -> None:
    """Import a checkpoint: a HookedTransformer state dict (.pt), or safetensors.

    It is then found by its name from any folder.

    Example:

    \b
        actstore models add mine checkpoints/6L_step=220000.pt --config conf/6L.yaml
        actstore models add baseline model.pt --system baseline
    """
    from actstore.cli.output import check_folder
    from actstore.ingest.models.load import add, own_folder, place

    if into:
        check_folder(into, "--into")

    model = add(name, weights, config, system, into)
    target = (into or own_folder()) / f"{name}.safetensors"
    say(f"{target}: {model.config.system}, weights sha256 {model.weights_sha256}")
    found = place(name)
    if found is None or not found.samefile(target):
        by_name = f"here the name {name} means {found}" if found else f"the name {name} is not looked up there"
        say(f"actstore: {by_name}; set ACTSTORE_MODELS to that folder, or give the path of the file", err=True)
