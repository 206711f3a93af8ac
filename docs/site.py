"""What the site holds besides the pages of docs/: a reference, and pages from other folders.

ProperDocs calls `on_files` once and `on_page_markdown` for each page. The reference is made from
docstrings, from schema.sql and from the help of each command, at every build.
"""

from __future__ import annotations

import inspect
import logging
import posixpath
import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import click
from properdocs.structure.files import File

import actstore
from actstore.catalog import tables
from actstore.cli import main

ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # file of the repository → page of the site
    "actstore/README.md": "promises.md",
    "data/README.md": "data.md",
    "tests/benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
}
ORIGINS = {page: path for path, page in ELSEWHERE.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
WIDTH = 80  # columns of the commands' help
log = logging.getLogger("properdocs.hooks.site")  # under --strict, a warning fails the build


def on_files(files: Any, config: Any) -> Any:
    """Add the reference, the pages from elsewhere, and the images that these pages show."""
    made = {"reference/python.md": python(), "reference/commands.md": commands(), "reference/tables.md": columns()}
    for path, page in ELSEWHERE.items():
        made[page] = (ROOT / path).read_text(encoding="utf-8")
        for sign, _, target in LINK.findall(made[page]):
            if sign and not target.startswith("http"):
                image = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
                files.append(File.generated(config, f"files/{image}", abs_src_path=str(ROOT / image)))
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn a page's links to files of the repository into links of the site, or into plain text."""
    del config, files
    text, missing = relinked(markdown, page.file.src_uri)
    for target in missing:
        log.warning("%s links to %s, which the repository does not hold", page.file.src_uri, target)
    return text


def relinked(markdown: str, page: str) -> tuple[str, list[str]]:
    """Give each link of a page the target that it has in the site.

    A link within docs/ is kept. A link to one of ELSEWHERE leads to its page. A link to another
    file of the repository, source code for example, becomes its own text.

    Args:
        markdown: the page.
        page: where the site holds the page, 'design/README.md' for example.

    Returns:
        The page, and the targets that the repository does not hold.
    """
    origin = ORIGINS.get(page, f"docs/{page}")
    missing: list[str] = []

    def replace(found: re.Match[str]) -> str:
        sign, text, target = found.groups()
        path, hash_sign, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return found[0]
        held = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if held.startswith("docs/") and origin.startswith("docs/"):
            return found[0]  # ProperDocs checks it
        if not (ROOT / held).exists():
            missing.append(target)
        in_site = f"files/{held}" if sign else ELSEWHERE.get(held, held.removeprefix("docs/"))
        if in_site == held:
            return text
        relative = posixpath.relpath(in_site, posixpath.dirname(page) or ".")
        return f"{sign}[{text}]({relative}{hash_sign}{anchor})"

    fenced, lines = False, []
    for line in markdown.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        lines.append((fenced or line.startswith("    "), line))
    parts = [(is_code, "\n".join(line for _, line in of)) for is_code, of in groupby(lines, itemgetter(0))]
    return "\n".join(part if is_code else LINK.sub(replace, part) for is_code, part in parts), missing


def python() -> str:
    """The page of the public names: each with its signature and its docstring."""
    parts = ["# Python\n\n`import actstore` gives these names. Each command is a function of the same name.\n"]
    public = [name for name in actstore.__all__ if name != "__version__"]
    found = {name: getattr(actstore, name) for name in public}
    errors = {name for name, of in found.items() if inspect.isclass(of) and issubclass(of, BaseException)}
    for name in ["Store", *(name for name in public if name not in errors | {"Store"}), *sorted(errors)]:
        of = found[name]
        if name == "ingest":  # a package that can be called
            from actstore.ingest.jobs.verb import ingest as of
        parts.append(described("##", f"actstore.{name}", of, signed=name not in errors))
        if name == "Store":
            parts += [described("###", f"Store.{method}", member) for method, member in members(of)]
    return "\n".join(parts)


def members(of: type) -> Iterator[tuple[str, Any]]:
    """The documented public methods and properties of a class, in the order of the file."""
    for name, member in vars(of).items():
        if not name.startswith("_") and inspect.getdoc(member):
            yield name, member


def described(heading: str, name: str, of: Any, signed: bool = True) -> str:
    """A name's heading, its signature where it has one, and its docstring as it stands."""
    lines = [f"{heading} {name}\n"]
    if signed and callable(of):
        lines.append(f"```text\n{name.rpartition('.')[2]}{signature(of)}\n```\n")
    return "\n".join([*lines, f"```text\n{inspect.getdoc(of)}\n```\n"])


class Bare(str):
    """An annotation, which a signature shows without quotation marks."""

    __repr__ = str.__str__


def signature(of: Any) -> str:
    """The signature of a function or a class; one parameter on a line where it is long."""
    whole = inspect.signature(of)

    def bare(annotation: Any) -> Any:
        return Bare(annotation) if isinstance(annotation, str) else annotation

    parameters = [one.replace(annotation=bare(one.annotation)) for one in whole.parameters.values()]
    whole = whole.replace(parameters=parameters, return_annotation=bare(whole.return_annotation))
    shown = str(whole)
    if len(shown) <= WIDTH:
        return shown
    keyword_only = next((i for i, one in enumerate(parameters) if one.kind is one.KEYWORD_ONLY), None)
    lines = [str(one) for one in parameters]
    if keyword_only is not None and not any(one.kind is one.VAR_POSITIONAL for one in parameters):
        lines.insert(keyword_only, "*")
    _, arrow, result = shown.rpartition(") -> ")
    return "".join(["(\n", *(f"    {line},\n" for line in lines), ")", arrow[1:], result if arrow else ""])


def commands() -> str:
    """The page of the commands: what `--help` prints of each."""
    settings = {**main.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(main, info_name="actstore", **settings)
    said = {name: main.commands[name].get_short_help_str(limit=200) for name in main.list_commands(context)}
    rows = [f"| [`{name}`](#actstore-{name}) | {text} |" for name, text in said.items()]
    table = "\n".join(["| command | what it does |", "|---|---|", *rows])
    return "\n".join([f"# Commands\n\n{table}\n", *helps("actstore", main, context)])


def helps(name: str, command: click.Command, context: click.Context) -> Iterator[str]:
    """The help of a command and of the commands in its group."""
    yield f"## {name}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for word in command.list_commands(context):
            inner = command.get_command(context, word)
            assert inner
            below = click.Context(inner, info_name=word, parent=context)  # width and options are the parent's
            yield from helps(f"{name} {word}", inner, below)


def columns() -> str:
    """The page of the tables: each column with type and comment, and the SQL of each view."""
    parts = [
        "# Tables and views\n\n`actstore sql` and `Store.sql` read these. `Store.schema()` lists them for a store.\n"
    ]
    table = None
    for (name, column), (dtype, comment) in tables.columns().items():
        if name != table:
            table = name
            parts.append(f"\n## {name}\n\n| column | type | what it holds |\n|---|---|---|")
        cells = comment.replace("|", "\\|").replace("<", "&lt;")
        parts.append(f"| `{column}` | {dtype.lower()} | {cells} |")
    for name, said in re.findall(r"^create view (\w+) as  -- ([^\n]*)$", tables.schema(), re.MULTILINE):
        parts.append(f"\n## {name}\n\nA view: {said}.\n\n```sql\n{tables.view(name)}\n```")
    return "\n".join(parts) + "\n"
