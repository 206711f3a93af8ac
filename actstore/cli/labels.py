"""The commands that store a user's own labels and views."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from actstore.cli.group import main, note
from actstore.cli.options import store_argument, wait_option


@main.command()
@store_argument
@click.argument("name")
@click.argument("file", type=click.Path())
@click.option(
    "--on",
    type=click.Choice(["token_id", "sequence_id", "span"]),
    default="token_id",
    show_default=True,
    help="Columns that say what a row labels; span: dataset, row, start, end, in characters of the row's text.",
)
@click.option("--replace", is_flag=True, help="Put these labels in the place of those of the same name.")
@click.option("--add", is_flag=True, help="Add these rows to the labels of the same name.")
@wait_option
def label(
    store: Path,
    name: str,
    file: str,
    on: Literal["token_id", "sequence_id", "span"],
    replace: bool,
    add: bool,
    wait: float,
) -> None:
    """Store labels of your own as the table NAME.

    FILE is a .parquet, .csv or .jsonl table with one row for each token or sequence that it labels.
    With --on span, a row labels every token that its characters overlap. `start` counts from 0, and
    `end` is the character after the last.

    With --replace, one commit drops the old labels and brings the new ones. With --add, a row for an
    id that has one is refused.

    Example:

    \b
        actstore label demo.act sentiment labels.csv
        actstore label demo.act sentiment better.csv --replace
        actstore label demo.act topics topics.parquet --on sequence_id
        actstore label demo.act entities entities.jsonl --on span
    """
    from actstore import verbs
    from actstore.cli.progress import waiting

    if replace and add:
        raise click.UsageError("choose one of --replace and --add")
    with waiting("label"):
        rows = verbs.label(store, name, Path(file), on, wait, replace=replace, add=add)
    key = rows.columns[0]
    note(f"{store}: table {name} labels {len(rows):,} {key}s; join it with `join {name} using ({key})`")


@main.command()
@store_argument
@click.argument("name")
@click.argument("query")
@click.option("--replace", is_flag=True, help="Put this view in the place of that of the same name.")
@wait_option
def view(store: Path, name: str, query: str, replace: bool, wait: float) -> None:
    """Store a SELECT of your own as the view NAME.

    The query is checked like one of `actstore sql`, and takes no parameters. It reads tables and
    labels, and no other view of yours. `actstore drop --label NAME` takes the view out.

    Example:

    \b
        actstore view demo.act late "select * from tokens where position > 20"
        actstore sql demo.act "select role, count(*) from late group by all"
    """
    from actstore import verbs

    verbs.view(store, name, query, wait, replace=replace)
    note(f"{store}: view {name} is stored; read it with `from {name}`")
