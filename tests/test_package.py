"""The wheel and the source archive: what is inside, and that the wheel works outside of any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import actstore
from actstore import queries

ROOT = Path(__file__).parents[1]
PLACES = {"actstore": "actstore", **{top: f"actstore/{top}" for top in ("ingest", "queries", "data")}}
NOT_INSTALLED = (".ipynb", ".png", ".csv")  # and the folders' README.md; a model's card is installed
NOTEBOOKS = ROOT / "queries" / "notebooks"  # are for those who have the checkout
BUILD = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"
RUN = """
import sys, actstore
from importlib.metadata import distribution
(command,) = distribution("actstore").entry_points.select(name="actstore")  # as pip, pipx and uv make it
main = command.load()
print(actstore.__file__)
for line in sys.argv[1:]:
    main(line.split(), standalone_mode=False)
"""


def shipped() -> dict[str, str]:
    """Every file that a user needs: its path in the checkout, and where it is installed."""
    found = {}
    for top, place in PLACES.items():
        for path in (ROOT / top).rglob("*"):
            if path.is_dir() or "__pycache__" in path.parts or path.name == "README.md":
                continue
            if path.suffix not in NOT_INSTALLED and path.parent != NOTEBOOKS:
                found[path.relative_to(ROOT).as_posix()] = f"{place}/{path.relative_to(ROOT / top).as_posix()}"
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source archive of a copy of this checkout; needs no network."""
    folder = tmp_path_factory.mktemp("built")
    for name in (*PLACES, "tests", "docs"):
        shutil.copytree(ROOT / name, folder / "copy" / name, ignore=shutil.ignore_patterns("__pycache__", "*.act"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "copy")
    command = [sys.executable, "-c", BUILD, folder]
    done = subprocess.run(command, cwd=folder / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == set(shipped().values())


def test_the_source_archive_holds_what_the_wheel_is_built_from_and_nothing_else(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in (member.name for member in opened if member.isfile())}
    beside = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "PKG-INFO", "setup.cfg"}
    assert {name for name in names if not name.startswith("actstore.egg-info/")} == set(shipped()) | beside


def test_the_wheel_stores_and_studies_outside_of_any_checkout(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    elsewhere = {name: value for name, value in os.environ.items() if name != "ACTSTORE_MODELS"}
    elsewhere |= {"PYTHONPATH": str(tmp_path / "site"), "XDG_DATA_HOME": str(tmp_path / "user")}
    lines = (
        "--version",
        "ingest s.act --model reproduction --trees 8 --sites embed",
        "info s.act",
        "query s.act",
        "query s.act role_counts",
        "models list",
        "study s.act depth",
    )
    command = [sys.executable, "-c", RUN, *lines]
    done = subprocess.run(command, cwd=tmp_path / "work", env=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'site' / 'actstore' / '__init__.py'}\n")
    assert f"version {actstore.__version__}" in done.stdout
    assert all(name in done.stdout for name in queries.names())
    assert "by greedy decoding" in done.stdout
