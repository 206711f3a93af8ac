"""Lists that must agree: what the pages say and what there is."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

import actstore
from actstore import queries
from actstore.catalog import tables
from actstore.cli import main
from actstore.queries.study import STUDIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_readme_and_the_page_of_the_command_line_name_every_command_and_no_other():
    page = (ROOT / "docs/how-to/command-line.md").read_text()
    named = set(re.findall(r"^    actstore (\w+)", README, re.MULTILINE))
    named |= set(re.findall(r"^actstore (\w+)", page, re.MULTILINE))
    assert named == set(main.commands)


def test_the_readme_names_every_table_and_view():
    schema = tables.schema()
    for name in re.findall(r"^create (?:table|view) (\w+)", schema, re.MULTILINE):
        assert f"`{name}`" in README or name == "snapshot"


@pytest.fixture(scope="module")
def demo(demo_path, tmp_path_factory):
    """A folder with a copy of the demo store, which the README's commands may write to."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(demo_path, folder / "demo.act")
    return folder


def test_the_readmes_python_runs_as_it_stands(demo, monkeypatch, capsys):
    monkeypatch.chdir(demo)
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
    score, answer = capsys.readouterr().out.split()
    assert 0 <= float(score) <= 1
    (path,) = names["store"].sql("select path from trees where tree_id = 1")["path"]
    assert answer == f"→{path[0]}"
    (lost,) = names["lost"].rows(named=True)
    (before,) = (
        names["store"].sql("select avg(p_target) as p_right, count(*) as steps from predictions").rows(named=True)
    )
    assert lost["steps"] == before["steps"]
    assert lost["p_right"] < 0.5 < before["p_right"]


def test_the_readmes_patched_run_is_stored_and_joined(demo, monkeypatch):
    """Its commands as they stand; what they print is about the trees of a smaller store."""
    monkeypatch.chdir(demo)
    section = README.partition("\n## What causes it\n")[2].partition("\n## ")[0]
    commands = re.findall(
        r"^    actstore ((?:ingest|sql) demo\.act (?:--base|\").*(?:\n        .*)*)", section, re.MULTILINE
    )
    assert len(commands) == 2
    for command in commands:
        done = CliRunner().invoke(main, [*shlex.split(command), *(["--csv"] if command.startswith("sql") else [])])
        assert done.exit_code == 0, done.output
    rows = pl.read_csv(done.stdout.encode())
    assert rows.columns == ["as_before", "as_donor", "trees"]
    assert rows["trees"].sum() == 39, "the last tree has no next one"
    assert rows.filter("as_donor")["trees"].sum() > rows.filter("as_before")["trees"].sum()


def test_the_readmes_study_of_causes_runs(demo, monkeypatch):
    """Its commands as they stand, but over fewer trees, and at one site."""
    monkeypatch.chdir(demo)
    section = README.partition("\n## What causes it\n")[2].partition("\n## ")[0]
    commands = re.findall(
        r"^    actstore ((?:ingest|study) demo\.act (?:--model-of|ablate) .*)$", section, re.MULTILINE
    )
    assert len(commands) == 2
    for command in commands:
        less = ["-o", "sites", "attn_out.0", "-o", "roles", "root", "-o", "how", "zero"] * command.startswith("study")
        done = CliRunner().invoke(main, [*shlex.split(command.replace("seed0-2000", "seed0-40")), *less])
        assert done.exit_code == 0, done.output
    assert (demo / "ablate.png").exists()


def test_what_the_readme_finds_is_confirmed_on_a_second_set(demo_path, tmp_path, monkeypatch):
    """Its commands as they stand, but for fewer trees."""
    commands = re.findall(
        r"^    actstore ((?:ingest .* --dataset fresh|study .* --confirm fresh).*)$", README, re.MULTILINE
    )
    (quoted,) = re.findall(r"^The last line of the output is\n\n((?:    .*\n)+)", README, re.MULTILINE)
    claim = " ".join(quoted.split()).partition(" (+")[0]
    shutil.copytree(demo_path, tmp_path / "demo.act")
    monkeypatch.chdir(tmp_path)
    assert len(commands) == 2
    for command in commands:
        done = CliRunner().invoke(main, command.replace("--trees 2000", "--trees 40").split())
        assert done.exit_code == 0, done.output
    assert claim.endswith(": found here")
    last = done.stdout.splitlines()[-1]
    assert last.startswith(claim)
    assert ", confirmed there (" in last


def test_the_readmes_test_command_is_all_that_ci_calls():
    assert "make test" in README
    commands = [
        line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith(("#", "set", "cd"))
    ]
    assert commands == ["CI=true make test"]


def test_every_folder_of_the_package_is_installed():
    packages = set()
    for top in ("actstore", *PROJECT["tool"]["setuptools"]["package-dir"].values()):
        for folder in {path.parent for path in (ROOT / top).rglob("*.py")}:
            assert (folder / "__init__.py").exists(), folder
            parts = folder.relative_to(ROOT).parts
            packages.add(".".join(parts if top == "actstore" else ("actstore", *parts)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_every_dependency_is_pinned_and_the_version_is_one():
    pinned = {
        re.split("[=@ ]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["bench"], *extras["app"]]
    assert {re.split("[>=]", name)[0].lower().replace("_", "-") for name in wanted} <= pinned
    assert PROJECT["project"]["version"] == actstore.__version__
    assert f"## {actstore.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("files", "extra"),
    [
        (("actstore/**/*.py", "ingest/**/*.py", "queries/**/*.py"), ("wandb", "export", "s3", "ray", "app")),
        (("tests/*.py",), ("dev", "s3", "ray", "app")),
        (("tests/benchmarks/*.py",), ("dev", "bench")),
    ],
)
def test_every_import_is_a_declared_dependency(files, extra):
    wanted = [*PROJECT["project"]["dependencies"]]
    for name in extra:
        wanted += PROJECT["project"]["optional-dependencies"][name]
    declared = {re.split("[>=]", name)[0].lower().replace("_", "-") for name in wanted}
    owners = {
        "datasets": ["datasets"],
        "h5py": ["h5py"],
        "lance": ["pylance"],
    } | packages_distributions()  # not installed to test
    for path in (path for pattern in files for path in ROOT.glob(pattern)):
        for module in imported(ast.parse(path.read_text())) - set(sys.stdlib_module_names) - {"actstore", "tests"}:
            assert {owner.lower().replace("_", "-") for owner in owners[module]} & declared, f"{path} imports {module}"


def imported(tree: ast.Module) -> set[str]:
    plain = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    other = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in plain | other}


def test_the_data_page_names_every_file_of_data():
    page = (ROOT / "data" / "README.md").read_text()
    for path in [*(ROOT / "data" / "checkpoints").iterdir(), *(ROOT / "data" / "configs").iterdir()]:
        assert path.name in page or (f"NAME{path.suffix}" in page and f"`{path.stem}`" in page) or path.is_dir()


def test_every_query_and_study_has_a_summary_that_the_listing_shows():
    listed = queries.listing()
    assert listed["query"].to_list() == queries.names()
    assert all(listed["summary"].str.len_chars() > 20)
    assert {f"`{name}`" for name in queries.names() if not name.startswith("baseline_")} <= set(
        re.findall(r"`\w+`", README)
    )
    assert set(STUDIES) <= set(re.findall(r"actstore study \S+ ([\w-]+)", README))


def test_every_column_is_commented_with_what_it_holds():
    commented = tables.column_comments()
    for table, body in re.findall(r"^create table (\w+) \((.*?)^\);", tables.schema(), re.DOTALL | re.MULTILINE):
        columns = [line.split()[0] for line in body.strip().splitlines()]
        assert columns == [column for name, column in commented if name == table]
