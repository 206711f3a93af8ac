"""The site: it builds without a broken link, and its code blocks run."""

from __future__ import annotations

import html
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import actstore
from actstore.catalog import tables
from actstore.cli import main
from tests import tiny_models

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
WRITTEN = [README, *(path for folder in (".", "tutorials", "how-to") for path in sorted((DOCS / folder).glob("*.md")))]
FEWER = {
    "--trees 2000": "--trees 40",
    "trees=2000": "trees=40",
    "seed0-2000": "seed0-40",
    "ablate --run reproduction": "ablate --run reproduction -o sites attn_out.0 -o roles root -o how zero",
}
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(page: Path, marked: bool = False) -> list[tuple[str, str]]:
    """(kind, code) of the blocks of a page that can run, or of those that are marked as not run."""
    found = [(m["kind"], m["code"]) for m in BLOCK.finditer(page.read_text()) if bool(m["why"]) == marked]
    assert {kind for kind, _ in found} <= {"bash", "python", "console", "text"}  # text is what is printed
    return found


def lines(code: str) -> list[list[str]]:
    """The words of each command of a bash block; a line ends a command, but not within double quotes."""
    parts = code.replace("\\\n", " ").split('"')
    parts[::2] = [part.replace("\n", " ; ") for part in parts[::2]]
    commands: list[list[str]] = [[]]
    for word in shlex.split('"'.join(parts)):
        if word == ";":
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def run(page: Path, replaced: dict[str, str]) -> tuple[dict[str, object], list[str]]:
    """Run the blocks of a page in order, in the working folder; the names of its Python, and what each command prints."""
    names: dict[str, object] = {}
    printed = []
    for kind, code in blocks(page):
        for old, new in replaced.items():
            code = code.replace(old, new)
        if kind == "python":
            exec(compile(code, page.name, "exec"), names)
        for program, *words in lines(code) if kind == "bash" else []:
            assert program == "actstore", f"{page.name}: {program}"
            done = CliRunner().invoke(main, words)
            assert done.exit_code == 0, f"{page.name}: {words}: {done.output}"
            printed.append(done.stdout)
    return names, printed


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> tuple[Path, dict[str, object], list[str]]:
    """The folder in which the tutorial of trees ran, with fewer trees, and the names of its Python."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, *run(DOCS / "tutorials/trees.md", FEWER)


def test_the_tutorial_of_trees_ends_with_a_figure(trees):
    folder, names, _ = trees
    assert (folder / "probes.png").stat().st_size > 10_000
    assert len(names["X"]) == len(names["rows"]) == 40 * 15
    (query,) = re.findall(r'"(select site, label, value[^"]*)"', (DOCS / "tutorials/trees.md").read_text())
    with actstore.Store(folder / "demo.act") as store:
        assert len(store.sql(query)) == 14, "an edge's source and target at seven sites"


def test_the_tutorial_of_a_language_model_ends_with_a_figure(tmp_path, monkeypatch):
    tiny_models.llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names, _ = run(DOCS / "tutorials/language-model.md", {"smollm2.gguf": "model"})
    assert (tmp_path / "names.png").stat().st_size > 10_000
    assert set(names["rows"]["label"]) == {"person", "place"}
    with actstore.Store(tmp_path / "text.act") as store:
        info = store.info().row(0, named=True)
        assert info["sequences"] == info["planned"] == 164
        assert store.sql("select count(*) from results where study = 'probe'").item() > 0


def test_the_readmes_python_runs_as_it_stands(trees, monkeypatch, capsys):
    monkeypatch.chdir(trees[0])
    names, _ = run(README, FEWER)
    assert 0 <= float(capsys.readouterr().out) <= 1
    assert names["wrong"].columns == ["path", "greedy_path", "failure"]


def test_the_readme_shows_what_a_terminal_of_80_columns_shows(trees, monkeypatch, capsys):
    """The command as it stands, and of its output what does not depend on how many trees there are."""
    ((_, code),) = [block for block in blocks(README) if block[0] == "console"]
    command, *shown = code.splitlines()
    monkeypatch.chdir(trees[0])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(shlex.split(command.removeprefix("$ actstore ")), standalone_mode=False)
    printed = [line.rstrip() for line in click.unstyle(capsys.readouterr().out).splitlines()]
    assert shown[:4] == printed[:4]
    assert [line.split()[0] for line in shown[4:-1]] == [line.split()[0] for line in printed[4:7]]
    assert shown[-1] == "…"


def test_the_tutorial_shows_the_tree_that_a_terminal_of_80_columns_shows(trees, monkeypatch, capsys):
    """The first trees are the same, however many are drawn."""
    shown = next(code for kind, code in blocks(DOCS / "tutorials/trees.md") if kind == "text")
    monkeypatch.chdir(trees[0])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(["show", "demo.act", "1"], standalone_mode=False)
    printed = click.unstyle(capsys.readouterr().out).partition("path    ")
    assert printed[0] == shown.replace("seed0-2000", "seed0-40").partition("path    ")[0]


RUN_HERE = ["share", "cite", "read", "ask", "script", "dtypes", "command-line"]


def test_each_how_to_page_with_blocks_is_run():
    with_blocks = {
        page.stem for page in (DOCS / "how-to").glob("*.md") if {kind for kind, _ in blocks(page)} - {"text"}
    }
    assert with_blocks == {*RUN_HERE, "patch", "study"}


@pytest.mark.parametrize("name", RUN_HERE)
def test_a_how_to_page_runs_after_the_tutorial(trees, name, monkeypatch):
    monkeypatch.chdir(trees[0])
    run(DOCS / f"how-to/{name}.md", FEWER)


def test_the_page_of_patches_takes_answers_away_and_gives_a_donors(trees, monkeypatch, capsys):
    """The patched run is joined with its base, and the patched forward pass answers for the other tree."""
    monkeypatch.chdir(trees[0])
    names, printed = run(DOCS / "how-to/patch.md", FEWER)
    counted = [line.split() for line in printed[1].splitlines()[2:]]  # as_before, as_donor, trees
    assert sum(int(n) for *_, n in counted) == 39, "the last tree has no next one"
    before, donor = (sum(int(row[2]) for row in counted if row[place] == "True") for place in (0, 1))
    assert donor > before
    (path,) = names["store"].sql("select path from trees where tree_id = 1")["path"]
    assert capsys.readouterr().out.split()[-1] == f"→{path[0]}"
    all_steps = "select avg(p_target) as p_right, count(*) as steps from predictions"
    (lost,), (before,) = (frame.rows(named=True) for frame in (names["lost"], names["store"].sql(all_steps)))
    assert lost["steps"] == before["steps"]
    assert lost["p_right"] < 0.5 < before["p_right"]
    assert Path("ablate.png").exists()


def test_what_the_page_of_studies_finds_is_confirmed_on_a_second_set(trees, monkeypatch):
    page = DOCS / "how-to/study.md"
    (shown,) = [code for kind, code in blocks(page) if kind == "text"]
    claim = " ".join(shown.split()).partition(" (+")[0]
    monkeypatch.chdir(trees[0])
    _, printed = run(page, FEWER)
    assert claim.endswith(": found here")
    (last,) = [text.splitlines()[-1] for text in printed if "confirmed there (" in text]
    assert last.startswith(claim)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_each_command_of_a_page_exists_and_takes_its_options(page):
    code = "".join(code for marked in (False, True) for kind, code in blocks(page, marked) if kind == "bash")
    commands = [words[1:] for words in lines(code) if words[0] == "actstore"]
    commands += [shlex.split(line) for line in re.findall(r"^(?:    |\$ )actstore (.*)$", page.read_text(), re.M)]
    assert commands or page.stem in ("index", "names")
    for words in commands:
        parse(words)


def parse(words: list[str]) -> None:
    """Parse a command line without running it; click raises for what does not exist."""
    if words[0].startswith("-"):
        return
    context = click.Context(main, info_name="actstore", **main.context_settings)  # click keeps the help option it makes
    command: click.Command = main
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(context, words)
        context = click.Context(command, info_name=name, parent=context)
    command.make_parser(context).parse_args(args=list(words))


def test_a_command_that_does_not_exist_is_seen():
    with pytest.raises(click.UsageError):
        parse(["ingest", "demo.act", "--no-such-option"])
    with pytest.raises(click.UsageError):
        parse(["no-such-command"])


def build(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout as `make docs` builds it; a warning fails the build."""
    (arguments,) = re.findall(r"^\t\$\(BIN\)/python (-m properdocs .*)$", (ROOT / "Makefile").read_text(), re.M)
    command = [sys.executable, *arguments.split(), "--site-dir", str(folder)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The site of this checkout."""
    folder = tmp_path_factory.mktemp("built") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize(
    "broken",
    ["[a](gone.md)", "[a](names.md#gone)", "[a](../gone.py)", "[a](promises.md#gone)", "![a](images/gone.png)"],
)
def test_a_broken_link_fails_the_build(broken, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(DOCS, copy / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.name != "docs" and not path.name.startswith("."):
            (copy / path.name).symlink_to(path)
    with (copy / "docs/names.md").open("a") as page:
        page.write(f"\n{broken}\n")
    done = build(copy, tmp_path / "site")
    assert done.returncode == 1
    assert "gone" in done.stdout + done.stderr


def test_the_site_builds_without_a_broken_link(built):
    assert (built / "index.html").exists()
    pages = [path for path in DOCS.rglob("*.md") if path.name != "README.md"]
    for path in pages:
        assert (built / path.relative_to(DOCS).with_suffix(".html")).exists(), path


def test_a_page_asks_nothing_of_another_machine(built):
    for page in built.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*>", page.read_text()):
            assert not re.search(r"(?:src|href)=\"(?:https?:)?//", tag) or 'rel="canonical"' in tag, (
                f"{page.name}: {tag}"
            )


def help_of(command: str) -> str:
    done = CliRunner().invoke(main, [*command.split(), "--help"], terminal_width=80, prog_name="actstore")
    return done.stdout.strip()


def test_the_reference_names_all_that_is_public(built):
    python = (built / "reference/python.html").read_text()
    assert all(f">actstore.{name}<" in python for name in actstore.__all__ if name != "__version__")
    assert ">Store.read<" in python
    commands = (built / "reference/commands.html").read_text()
    letters = "".join(html.unescape(commands).split())  # however wide the terminal is, which also breaks at hyphens
    assert all(f">actstore {name}<" in commands for name in main.commands)
    for command in ("ingest", "models sites"):
        assert "".join(help_of(command).split()) in letters
    columns = (built / "reference/tables.html").read_text()
    assert all(f">{table}<" in columns for table in tables.TABLE_NAMES)
    assert columns.count("<td><code>") == len(tables.columns())


@pytest.fixture(scope="module")
def site():
    """The module docs/site.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("docs_site", DOCS / "site.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_that_leave_the_pages_are_led_back_or_become_text(site):
    said = "[a](../../actstore/README.md#the-chain) [b](../../Makefile) [c](001-manifests.md) [d](https://x.org/)"
    text, missing = site.relinked(said, "design/README.md")
    assert text == "[a](../promises.md#the-chain) b [c](001-manifests.md) [d](https://x.org/)"
    assert missing == []


def test_a_link_may_go_on_in_the_next_line(site):
    assert site.relinked("[a\nb](../../data/README.md)", "design/README.md") == ("[a\nb](../data.md)", [])


def test_a_link_to_a_file_that_is_not_there_is_told(site):
    assert site.relinked("[a](../../gone.py)", "design/README.md") == ("a", ["../../gone.py"])
    assert site.relinked("    [a](../../gone.py)", "design/README.md")[1] == [], "a line of code"
