"""The group of all commands; it turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

import click

from actstore.cli import complete, terminal
from actstore.errors import ActstoreError, ComputedOtherwise, HalvedBatch, SeveralRuns
from actstore.outputs import printable
from actstore.storage.cache import FOLDER
from actstore.storage.machine import check_memory, keep_freed_memory, limit_reached, raise_descriptors, share_processors
from actstore.version import __version__

KEPT = "actstore.kept"  # key of a resumable command's function that says how far the work is


def say(text: str, err: bool = False) -> None:
    """Print text for a person to read, broken between words where a terminal ends."""
    click.echo(terminal.wrapped(printable(text), sys.stderr if err else sys.stdout), err=err)


def note(text: str, err: bool = False) -> None:
    """Print a line that says what was done, and not with --quiet."""
    if not terminal.QUIET[0]:
        say(text, err)


def _be_quiet(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    terminal.QUIET[0] |= value


QUIET = click.Option(
    ["-q", "--quiet"],
    is_flag=True,
    expose_value=False,
    callback=_be_quiet,
    help="Print results, warnings and errors alone: no progress, and no line that says what was done.",
)
STORE = "ACTSTORE"  # environment: the store of commands that name none


class Command(click.Command):
    """A command; click answers `--help` before `invoke`."""

    runs_models = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's parameters, and --quiet."""
        return [*super().get_params(ctx), QUIET]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse a command line, whose store is $ACTSTORE if it names none."""
        told = os.environ.get(STORE)
        if told and self.params and self.params[0].name == "store" and not self._names_a_store(ctx, args):
            args = [told, *args]
        return super().parse_args(ctx, args)

    def _names_a_store(self, ctx: click.Context, args: list[str]) -> bool:
        """True if the first argument is the store, and not what follows a store."""
        if any(option in args for option in ctx.help_option_names):
            return True
        of_options = click.Command(None, params=[param for param in self.params if isinstance(param, click.Option)])
        try:
            _, words, _ = of_options.make_parser(ctx).parse_args(list(args))
        except click.UsageError:  # click will say so
            return True
        takes = [param for param in self.params if isinstance(param, click.Argument)]
        if len(words) < sum(param.required for param in takes):
            return bool(words) and complete.is_store(words[0])
        if len(words) >= len(takes) and all(param.nargs == 1 for param in takes):
            return True
        return bool(words) and complete.is_store(words[0])

    def invoke(self, ctx: click.Context) -> Any:
        """Check that there is memory enough for the libraries, then run the command."""
        check_memory(self.runs_models)
        return super().invoke(ctx)


class LightCommand(Command):
    """A command that runs with any limit of memory, since it loads no large library by itself."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        return click.Command.invoke(self, ctx)


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
        terminal.QUIET[0] = False
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
            if isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11 wraps one that comes as a class is made
                say(f"actstore: stopped{_goes_on(ctx)}", err=True)
                ctx.exit(1)
            if not (reached := limit_reached(error, f"cannot run {ctx.command_path}")):
                raise
            say(f"actstore: {reached}{_goes_on(ctx)}", err=True)
            ctx.exit(1)


def _goes_on(ctx: click.Context) -> str:
    """What was kept of a command's work, if the command has registered a way to tell."""
    with suppress(ActstoreError, OSError):
        return f"; {ctx.meta[KEPT]()}" if KEPT in ctx.meta else ""
    return ""


EPILOG = """
\b
Environment:
    ACTSTORE            the store of commands that name none
    ACTSTORE_MODELS     a folder of models by name
    ACTSTORE_CACHE      where files of stores in buckets are kept
    NO_COLOR, PAGER     no colours; the pager of long tables

\b
Exit codes:
    0   done
    1   what was asked for is not there or cannot be done now: not stored,
        damaged, no room, busy, at a limit, stopped by Ctrl-C
    2   the command, the query or an argument has no meaning
"""


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)
@click.version_option(__version__, prog_name="actstore")
@click.option(
    "--cache",
    type=click.Path(),
    metavar="DIR",
    help="Files of stores in buckets are kept here; default: ACTSTORE_CACHE, or ~/.cache/actstore.",
)
def main(cache: str | None) -> None:
    """Activations of transformers in Zarr, what they mean in DuckDB, studies by SQL.

    Example:

    \b
        actstore ingest demo.act --model reproduction --trees 2000
        actstore sql demo.act "select role, count(*) from tokens group by all"
        actstore study demo.act probes --plot probes.png
    """
    raise_descriptors()
    share_processors()
    keep_freed_memory()
    if cache is not None:
        os.environ[FOLDER] = os.path.abspath(cache)  # of this process, and of those that it starts
