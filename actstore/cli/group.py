"""The group of all commands; it turns errors into one line and an exit code."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import click

from actstore.cli import terminal
from actstore.errors import ActstoreError, ComputedOtherwise, HalvedBatch, SeveralRuns
from actstore.outputs import printable
from actstore.storage.cache import FOLDER
from actstore.storage.machine import check_memory, limit_reached, raise_descriptors, share_processors
from actstore.version import __version__

KEPT = "actstore.kept"  # key of a resumable command's function that says how far the work is


def say(text: str, err: bool = False) -> None:
    """Print a line for a person to read."""
    click.echo(printable(text), err=err)


class Command(click.Command):
    """A command; click answers `--help` before `invoke`."""

    runs_models = False

    def invoke(self, ctx: click.Context) -> Any:
        """Check that there is memory enough for the libraries, then run the command."""
        check_memory(self.runs_models)
        return super().invoke(ctx)


class ModelCommand(Command):
    """A command that runs a model."""

    runs_models = True


class Subgroup(click.Group):
    """A group of commands within the group of all commands."""

    command_class = Command


class Commands(click.Group):
    """A group that turns the package's errors, a full disk and Ctrl-C into a line and a code."""

    command_class, group_class = Command, Subgroup

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command line; the exit code is 1 if help cannot be printed."""
        terminal.prepare()
        try:
            return super().main(*args, **extra)
        except OSError as error:  # an error of printing help; `invoke` handles a command's own errors
            say(f"actstore: {terminal.place_of(error)}: {error.strerror or error}", err=True)
            raise SystemExit(1) from None
        finally:
            terminal.finish()

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and turn its error into one line and an exit code."""
        try:
            with terminal.notes(SeveralRuns, ComputedOtherwise, HalvedBatch):
                return super().invoke(ctx)
        except ActstoreError as error:
            say(f"actstore: {error}", err=True)
            ctx.exit(error.exit_code)
        except click.exceptions.NoArgsIsHelpError:  # the group prints its help
            raise
        except click.UsageError as error:
            words = [*error.ctx.command_path.split()[1:]] if error.ctx else [*filter(None, [ctx.invoked_subcommand])]
            command = " ".join(["actstore", *words])
            say(f"actstore: {error.format_message().rstrip('.')}; `{command} --help` says what there is", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            say(f"actstore: stopped{_goes_on(ctx)}", err=True)
            ctx.exit(1)
        except BrokenPipeError:  # `actstore sql … | head`
            ctx.exit(1)
        except OSError as error:
            where = terminal.place_of(error)
            said = limit_reached(error, where) or f"{where}: {error.strerror or error}"
            say(f"actstore: {said}{_goes_on(ctx)}", err=True)
            ctx.exit(1)
        except BaseException as error:  # a library ran out of memory, or could not be loaded with so little
            if not (reached := limit_reached(error, f"cannot run {ctx.command_path}")):
                raise
            say(f"actstore: {reached}{_goes_on(ctx)}", err=True)
            ctx.exit(1)


def _goes_on(ctx: click.Context) -> str:
    """What was kept of a command's work, if the command has registered a way to tell."""
    with suppress(ActstoreError, OSError):
        return f"; {ctx.meta[KEPT]()}" if KEPT in ctx.meta else ""
    return ""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="actstore")
@click.option(
    "--cache",
    type=click.Path(),
    metavar="DIR",
    help="Catalogs of stores in buckets are kept here; default: ACTSTORE_CACHE, or ~/.cache/actstore.",
)
def main(cache: str | None) -> None:
    """Residual streams of path-finding transformers in Zarr, their meaning in DuckDB, SQL studies.

    Example:

    \b
        actstore ingest demo.act --model reproduction --trees 2000
        actstore sql demo.act "select role, count(*) from tokens group by all"
        actstore study demo.act probes --plot probes.png
    """
    raise_descriptors()
    share_processors()
    if cache is not None:
        os.environ[FOLDER] = os.path.abspath(cache)  # of this process, and of those that it starts
