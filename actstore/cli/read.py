"""The commands that read a store: info, sql, tables, schema, read, export, query, show, attention."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actstore.cli import complete
from actstore.cli.group import main, note, say
from actstore.cli.options import (
    check_option,
    limit_options,
    no_check_option,
    output_options,
    param_option,
    store_argument,
    table_option,
)

if TYPE_CHECKING:
    import polars as pl

    from actstore.cli.output import Output
    from actstore.reading.activations import Dtype
    from actstore.sql.rows import Rows
    from actstore.store import Store

ENUM_VALUE = re.compile(r"'(?:[^']|'')*'")
VALUES_SHOWN = 8  # of a large ENUM


@main.command()
@store_argument
@output_options
def info(store: Path, output: Output) -> None:
    """Print what a store holds: runs, models, sets, sites and sizes.

    A table names the layers of a site as a range. The other formats name each.

    Example:

    \b
        actstore info demo.act
    """
    from actstore.sites import by_family, in_short
    from actstore.store import Store

    with Store(store) as opened:
        rows = opened.info_rows()
    if output.is_table:
        named = [row["sites"] for row in rows.dicts()]
        rows = rows.with_column("sites", [names and in_short(by_family(names.split())) for names in named])
    output.write(rows)


@main.command()
@store_argument
@click.argument("query", required=False)
@click.option(
    "-f", "--file", type=click.Path(), metavar="FILE", help="Read the query from a file; `-`: from standard input."
)
@click.option(
    "--run",
    shell_complete=complete.runs,
    help="Ask in the session of this run, in which every table holds only this run's rows.",
)
@param_option
@table_option
@limit_options
@check_option
@output_options
def sql(
    store: Path,
    query: str | None,
    file: str | None,
    run: str | None,
    params: dict[str, str],
    check: bool,
    output: Output,
    **more: Any,
) -> None:
    """Run SQL over a store's tables; without a QUERY, open a prompt.

    QUERY may be `-`, which reads standard input. A query that is piped in is read without it. A
    vector is a value, see the last example. The prompt completes tables, columns and named queries,
    and keeps its history; `.help` says more.

    Example:

    \b
        actstore sql demo.act "select role, count(*) from tokens group by all"
        actstore sql demo.act "from trees where depth = \\$d::int" -p d 7 --csv
        actstore sql demo.act "select avg(greedy_right::int) from outcomes" --run reproduction
        actstore sql demo.act "select act(token_id, run, 'embed') as x from predictions limit 5" --timeout 10 --memory 2GB
        actstore sql demo.act "from tokens join mine using (token_id)" --table mine=labels.csv
        actstore sql demo.act -f mine.sql -o md
        echo "from runs" | actstore sql demo.act - -o jsonl
        actstore sql demo.act
    """
    from actstore.cli.progress import waiting
    from actstore.store import Store

    if query is not None and file is not None:
        raise click.UsageError("got a QUERY and --file; leave one out")
    with Store(store, check) as opened:
        asked = opened if run is None else opened.of(run)

        def answer(text: str) -> pl.DataFrame | Rows:
            with waiting("sql"):
                return asked.rows(text, params, **more) if output.takes_rows else asked.sql(text, params, **more)

        if query is None and file is None and sys.stdin.isatty():
            from actstore.cli import prompt

            prompt.converse(asked, answer, output)
            return
        rows = answer(_text(query, file))
    output.write(rows)


def _text(query: str | None, file: str | None) -> str:
    """The text of a query: the argument, a file, or standard input."""
    if query not in (None, "-"):
        return str(query)
    if file in (None, "-"):
        return sys.stdin.read()
    from actstore.queries import read_sql

    return read_sql(str(file), "query")


@main.command()
@store_argument
@output_options
def tables(store: Path, output: Output) -> None:
    """List a store's tables and views, with their rows and columns.

    Example:

    \b
        actstore tables demo.act
    """
    from actstore.store import Store

    with Store(store) as opened:
        output.write(opened.tables_rows())


@main.command()
@store_argument
@click.argument("table", required=False, shell_complete=complete.tables)
@output_options
def schema(store: Path, table: str | None, output: Output) -> None:
    """List the columns of a store's tables, or of TABLE.

    Each has its name, its type and what it holds. A table counts the values of a large ENUM, which
    the other formats name.

    Example:

    \b
        actstore schema demo.act
        actstore schema demo.act edge_targets
    """
    from actstore.store import Store

    with Store(store) as opened:
        rows = opened.schema_rows(table)
    if output.is_table:
        rows = rows.with_column("type", [_short_type(row["type"]) for row in rows.dicts()])
    output.write(rows)


def _short_type(type: str) -> str:
    """A type for a table: of an ENUM of many values, their number and the first ones."""
    values = ENUM_VALUE.findall(type) if type.startswith("ENUM(") else []
    some = ", ".join(values[:VALUES_SHOWN])
    return type if len(values) <= 2 * VALUES_SHOWN else f"ENUM({some}, … {len(values)} in all)"


@main.command()
@store_argument
@click.argument("query")
@click.option("--run", shell_complete=complete.runs, help="The run to read; required if the store holds several runs.")
@click.option(
    "--site",
    "sites",
    shell_complete=complete.sites,
    multiple=True,
    default=("resid_post.0",),
    show_default=True,
    help="Where in the network. Several sites (repeat --site, or use commas) or a family (resid_post: every stored layer) "
    "give X [n, n_sites, d_model].",
)
@click.option("--dtype", default="float32", show_default=True, help="Dtype of X: float32, float16 or float64.")
@click.option("--explain", is_flag=True, help="Print what would be read, and read nothing.")
@click.option("--out", metavar="FILE", help="Write X and the rows to .npz, .safetensors or .parquet.")
@click.option(
    "--check/--no-check",
    default=None,
    help="Compare every file that is read with its committed hash; default with --out.",
)
@param_option
@table_option
@limit_options
@output_options
def read(
    store: Path,
    query: str,
    run: str | None,
    sites: tuple[str, ...],
    dtype: Dtype,
    explain: bool,
    out: str | None,
    check: bool | None,
    params: dict[str, str],
    output: Output,
    **more: Any,
) -> None:
    """Read the activations of the tokens that a query names.

    Row i of X belongs to row i of the query. --out keeps X and each column of the query as arrays of
    their own. In .safetensors, a column of text is codes, -1 for NULL, and NAME.vocabulary the JSON
    list of the texts that they mean, as bytes.

    Example:

    \b
        actstore read demo.act "select token_id, source from edge_targets where is_last" --site resid_post.0 --out x.npz
        actstore read demo.act "from edge_targets" --site embed,resid_post.0,resid_post.5 --out x.safetensors
        actstore read demo.act "from edge_targets" --explain
    """
    import polars as pl

    from actstore.arrays.families import FAMILIES
    from actstore.cli.activation_files import ACTIVATION_FILES, check_columns, save_activations
    from actstore.cli.progress import waiting
    from actstore.outputs import check_file
    from actstore.store import Store

    check_file(out, "--out", ACTIVATION_FILES)
    names = [name.strip() for listed in sites for name in listed.split(",")]
    where: dict[str, Any] = {"sites": names} if len(names) > 1 or names[0] in FAMILIES else {"site": names[0]}
    where |= {"params": params, **more}
    with Store(store, bool(out) if check is None else check) as opened:
        if explain:
            with waiting("explain"):
                explanation = opened.explain(query, run, **where)
            if output.is_table:
                say(str(explanation))
            else:
                output.write(pl.DataFrame([explanation.to_dict()]), explanation.to_dict())
            return
        with waiting("read"):
            X, rows = opened.read(query, run, dtype=dtype, columns=lambda names: check_columns(names, out), **where)
    if out:
        save_activations(out, X, rows)
        note(f"{out}: X {X.dtype} {list(X.shape)} and {', '.join(rows.columns)}")
    else:
        output.write(rows.with_columns(pl.Series("x", X)))


@main.command()
@store_argument
@click.argument("out", type=click.Path())
@click.option("--run", shell_complete=complete.runs, help="The run to read; required if the store holds several runs.")
@click.option(
    "--site", shell_complete=complete.sites, default="resid_post.0", show_default=True, help="Where in the network."
)
@click.option("--query", help="A SELECT with a column token_id; default: every token that the run holds at the site.")
@click.option(
    "--format",
    help="saelens (a Hugging Face dataset of cached activations, a folder), parquet (the query's rows and x) or npy (X alone); "
    "default: as the ending of OUT says.",
)
@click.option(
    "--context",
    type=int,
    metavar="N",
    help="Tokens per row of a dataset; default: as many as each sequence has among the rows, if that is one number, else 128.",
)
@click.option("--dtype", default="float32", show_default=True, help="Dtype of the activations: float32 or float16.")
@no_check_option
@param_option
@table_option
@limit_options
def export(
    store: Path,
    out: str,
    run: str | None,
    site: str,
    query: str | None,
    format: str | None,
    context: int | None,
    dtype: str,
    check: bool,
    params: dict[str, str],
    **more: Any,
) -> None:
    """Write activations for other tools, whole or not at all.

    Example:

    \b
        actstore export demo.act acts --site resid_post.2 --context 32
        actstore export demo.act last.parquet --query "select * from edge_targets where is_last"
        actstore export demo.act x.npy --site embed --dtype float16
        actstore export demo.act mine.npy --query "select token_id from mine" --table mine=labels.csv
    """
    from actstore.cli.progress import progress
    from actstore.store import Store

    asked: dict[str, Any] = {"format": format, "context": context, "dtype": dtype, **more}
    with Store(store, check) as opened:
        note(str(opened.export(out, query, run, site, params, progress=progress, **asked)))


@main.command()
@store_argument
@click.argument("name", required=False, shell_complete=complete.queries)
@param_option
@table_option
@limit_options
@check_option
@output_options
def query(store: Path, name: str | None, params: dict[str, str], check: bool, output: Output, **more: Any) -> None:
    """Run a named query, or a file NAME.sql; without a name, list them.

    Example:

    \b
        actstore query demo.act
        actstore query demo.act accuracy_by_depth
        actstore query demo.act accuracy_by_depth -p run reproduction
        actstore query demo.act mine.sql --table mine=labels.csv
    """
    from actstore import queries
    from actstore.cli.progress import waiting
    from actstore.store import Store

    with Store(store, check) as opened, waiting("query"):
        rows = queries.select(Asking(opened, more), name, **params) if name else queries.listing()
    output.write(rows)


@main.command()
@store_argument
@click.argument("tree", type=int)
def show(store: Path, tree: int) -> None:
    """Draw a tree, its prompt, and each model's answer.

    Example:

    \b
        actstore show demo.act 17
    """
    from rich.console import Console

    from actstore.queries.show import draw_tree
    from actstore.store import Store

    console = Console(soft_wrap=True, highlight=False)
    with Store(store) as opened:
        console.print(draw_tree(opened, tree, console.width if console.is_terminal else None))


@main.command()
@store_argument
@click.argument("tree", type=int)
@click.option("--run", shell_complete=complete.runs, help="The run to draw; required if the store holds several runs.")
@click.option("--layer", type=int, help="One layer; default: all layers, in a .pdf each on a page.")
@click.option("--head", default=0, show_default=True, help="The head that a figure shows; a page shows all heads.")
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
    from actstore.outputs import check_file
    from actstore.queries.attention.page import ENDINGS, save
    from actstore.store import Store

    check_file(out, "--out", ENDINGS)
    with Store(store, check) as opened:
        save(opened, opened.resolve_run(run), tree, out, layer, head)
    note(out)


@main.command(name="open")
@store_argument
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="PORT", help="Default: any free port.")
@click.option("--no-browser", is_flag=True, help="Print the address, and open no browser.")
def open_(store: Path, port: int, no_browser: bool) -> None:
    """Look at a store in the browser, until Ctrl-C.

    The page is served on this machine alone, to who knows the token in its address. It reads the
    store, and writes nothing. It needs the extra `actstore[app]`.

    Example:

    \b
        actstore open demo.act
        actstore open demo.act --no-browser --port 8000
    """
    from actstore.queries.app.serve import check_installed, serve, shared

    check_installed()
    shared(store)  # a wrong store is said here, not in the page
    serve(store, port, not no_browser, lambda address: click.echo(f"{address}\nCtrl-C ends it."))


class Asking:
    """A store whose every query has some tables and limits, for code that queries by itself.

    Args:
        more: further arguments of Store.sql.
    """

    def __init__(self, store: Store, more: Mapping[str, Any]) -> None:
        self.resolve_run, self.runs, self._store, self._more = store.resolve_run, store.runs, store, more

    def of(self, run: str) -> Asking:
        """See Store.of."""
        return Asking(self._store.of(run), self._more)

    def sql(self, query: str, params: Mapping[str, Any] | None = None) -> pl.DataFrame:
        """See Store.sql."""
        return self._store.sql(query, params, **self._more)
