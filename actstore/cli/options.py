"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from actstore.cli import complete

Option = Callable[[Callable[..., Any]], Callable[..., Any]]
FORMATS = ("table", "csv", "json", "jsonl", "md", "parquet")  # see output.Output


def store_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument STORE, the first argument of every command that takes a store."""
    return click.argument("store", callback=_place, shell_complete=complete.stores)(command)


def _place(ctx: click.Context, parameter: click.Parameter, value: str) -> Path:
    from actstore.storage.at import place

    return place(value)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add -o FORMAT, and --csv, --json and --parquet FILE; default: a table."""
    return _output_options(command, "-o", "--output")


def long_output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the same to a command whose -o is something else."""
    return _output_options(command, "--output")


def _output_options(command: Callable[..., Any], *names: str) -> Callable[..., Any]:
    @wraps(command)
    def wrapped(
        *args: Any, output_format: str | None, as_csv: bool, as_json: bool, parquet: str | None, **options: Any
    ) -> Any:
        from actstore.cli.output import Output
        from actstore.outputs import check_file

        check_file(parquet, "--parquet")
        if bool(output_format) + as_csv + as_json + bool(parquet) > 1:
            raise click.UsageError(f"choose one of {names[-1]}, --csv, --json and --parquet")
        chosen = output_format or ("csv" if as_csv else "json" if as_json else "table")
        return command(*args, output=Output(chosen, parquet), **options)

    for option in (
        click.option("--parquet", metavar="FILE", help="Write the rows to a Parquet file."),
        click.option("--json", "as_json", is_flag=True, help="Print rows as JSON."),
        click.option("--csv", "as_csv", is_flag=True, help="Print rows as CSV."),
        click.option(
            *names,
            "output_format",
            type=click.Choice(FORMATS),
            metavar="FORMAT",
            help="table (the default), csv, json, jsonl (a row a line), md (Markdown) or parquet, to stdout.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config, --hub, --revision, --untrained and --tokenizer, which say what --model means."""
    for option in (
        click.option("--tokenizer", type=click.Path(), metavar="FOLDER", help="A tokenizer; default: the model's own."),
        click.option(
            "--untrained",
            type=click.IntRange(min=0),
            is_flag=False,
            flag_value=0,
            metavar="[SEED]",
            help="Random weights of the same configuration; default seed 0.",
        ),
        click.option("--revision", metavar="REVISION", help="With --hub: a branch, tag or commit."),
        click.option("--hub", is_flag=True, help="The model is a name of the Hugging Face hub: fetch it."),
        click.option("--config", type=click.Path(), help="The checkpoint's YAML, if not beside it."),
    ):
        command = option(command)
    return command


param_option: Option = click.option(
    "-p",
    "--param",
    "params",
    type=(str, str),
    multiple=True,
    callback=lambda ctx, parameter, pairs: dict(pairs),
    metavar="NAME VALUE",
    help="Value of a $NAME, as text; cast the text to a number in SQL (`$NAME::int`).",
)


def table_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --table NAME=FILE, a table for this query alone; see Store.sql."""
    return click.option(
        "--table",
        "tables",
        multiple=True,
        callback=_tables,
        metavar="NAME=FILE",
        help="A .parquet, .csv or .jsonl file that the query reads as table NAME; it is not stored.",
    )(command)


def _tables(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if wrong := [value for value, (name, _, file) in zip(values, pairs, strict=True) if not name or not file]:
        raise click.BadParameter(f"got {wrong[0]!r}; give NAME=FILE")
    return {name: file for name, _, file in pairs}


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --timeout and --memory, limits of the query; see Store.sql."""
    command = click.option("--memory", metavar="SIZE", help="Stop the query when it holds more: 2GB, 512MB.")(command)
    return click.option("--timeout", type=float, metavar="SECONDS", help="Stop the query after this time.")(command)


check_option: Option = click.option(
    "--check", is_flag=True, help="Compare every file that is read with its committed hash (see Store)."
)
no_check_option: Option = click.option(
    "--no-check",
    "check",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Do not compare the files that are read with their committed hashes.",
)
wait_option: Option = click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for another process that writes to the store.",
)
checkpoint_option: Option = click.option(
    "--checkpoint",
    type=int,
    metavar="STEP",
    help="The weights at this step of training (`actstore models list`), instead of the trained weights.",
)


no_record_option: Option = click.option("--no-record", is_flag=True, help="Do not write the results into the store.")


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --engine, --address and --workers."""
    for option in (
        click.option(
            "--workers",
            type=int,
            metavar="N",
            help="With --engine ray: workers; default: as many as there is room for.",
        ),
        click.option(
            "--address",
            metavar="HOST:PORT",
            help="With --engine ray: the cluster's head, or auto; default: RAY_ADDRESS, or this machine alone.",
        ),
        click.option("--engine", help="local (the default), or ray: the workers of a Ray cluster compute it."),
    ):
        command = option(command)
    return command
