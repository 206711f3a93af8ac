"""Lists that must agree: what the pages say and what there is."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import actstore
from actstore import queries
from actstore.catalog import tables
from actstore.cli import main
from actstore.queries.study import STUDIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HOW_TO = ROOT / "docs" / "how-to"
ASK = (HOW_TO / "ask.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_page_of_sql_names_every_table_and_view():
    for name in re.findall(r"^create (?:table|view) (\w+)", tables.schema(), re.MULTILINE):
        assert f"`{name}`" in ASK or name == "snapshot"


def test_the_readme_fits_two_screens():
    assert len(README.splitlines()) <= 130


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
            if folder.name == "notebooks":  # read in the repository, and not installed
                continue
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
    wanted = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["bench"], *extras["app"], *extras["umap"]]
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


def test_every_command_that_a_page_or_a_notebook_names_exists():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("queries/notebooks/*.*")]
    pages += [ROOT / "actstore/README.md", ROOT / "data/README.md", ROOT / "tests/benchmarks/README.md"]
    for page in pages:
        assert set(re.findall(r"`actstore ([a-z][\w-]*)", page.read_text())) <= set(main.commands), page


def test_the_data_page_names_every_file_of_data():
    page = (ROOT / "data" / "README.md").read_text()
    for path in [*(ROOT / "data" / "checkpoints").iterdir(), *(ROOT / "data" / "configs").iterdir()]:
        assert path.name in page or (f"NAME{path.suffix}" in page and f"`{path.stem}`" in page) or path.is_dir()


def test_every_query_and_study_has_a_summary_that_the_listing_shows():
    listed = queries.listing()
    assert listed["query"].to_list() == queries.names()
    assert all(listed["summary"].str.len_chars() > 20)
    assert {f"`{name}`" for name in queries.names() if not name.startswith("baseline_")} <= set(
        re.findall(r"`\w+`", ASK)
    )
    pages = "".join((HOW_TO / f"{name}.md").read_text() for name in ("study", "patch", "dtypes"))
    assert set(STUDIES) <= set(re.findall(r"`([\w-]+)`", pages))


def test_every_column_is_commented_with_what_it_holds():
    commented = tables.column_comments()
    for table, body in re.findall(r"^create table (\w+) \((.*?)^\);", tables.schema(), re.DOTALL | re.MULTILINE):
        columns = [line.split()[0] for line in body.strip().splitlines()]
        assert columns == [column for name, column in commented if name == table]
