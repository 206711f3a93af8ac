"""The notebooks run from top to bottom, on a small store, and are kept with the outputs of a large one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import load
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.variants import CHANGES

NOTEBOOKS = sorted((Path(__file__).parents[1] / "queries" / "notebooks").glob("*.ipynb"))


OVER_A_DEMO = [path for path in NOTEBOOKS if path.stem not in ("circuit", "reproduction")]


@pytest.fixture(scope="module")
def every_run(shipped, tmp_path_factory):
    """What `make full` stores, of 120 trees in place of 20,000."""
    root, other = tmp_path_factory.mktemp("full") / "full.act", load("baseline")
    trees = TreeSet("reproduction", 120, seed=7, name="trees")
    for model in (shipped, other):
        execute(Ingest(root, model, trees, sites=["embed", "resid_post", "pattern"]))
        execute(Ingest(root, model, TreeSet("deep", 120, seed=8, name="deep"), f"{model.name}-deep"))
        for change in CHANGES:
            varied = replace(trees, name=f"trees-{change}", variant_of="trees", change=change)
            execute(Ingest(root, model, varied, sites=[]))
        execute(Ingest(root, model, trees, prompt="tree"))
    return root


def test_the_notebook_of_the_reproduction_runs_over_every_run(every_run, monkeypatch):
    monkeypatch.setenv("ACTSTORE_STORE", str(every_run))
    runs_to_its_end(NOTEBOOKS[0].with_name("reproduction.ipynb"), every_run.parent)


def test_the_notebook_of_the_reproduction_needs_no_index_arithmetic():
    notebook = nbformat.read(NOTEBOOKS[0].with_name("reproduction.ipynb"), as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "arange" not in code
    assert len(code.splitlines()) < 120


def test_the_notebook_of_the_circuit_makes_its_own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTSTORE_TREES", "90")
    monkeypatch.delenv("ACTSTORE_STORE", raising=False)
    runs_to_its_end(NOTEBOOKS[0].with_name("circuit.ipynb"), tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_times_and_no_folders_of_the_machine_that_ran_it(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    assert not re.search(r"/(work|tmp|home|root)/", path.read_text())


@pytest.mark.parametrize("path", OVER_A_DEMO, ids=lambda path: path.stem)
def test_a_notebook_runs_where_a_demo_store_is(path, demo_path):
    runs_to_its_end(path, demo_path.parent)


def runs_to_its_end(path, folder):
    """Execute a copy; the cells that show something must be those that the kept one shows something of."""
    notebook = nbformat.read(path, as_version=4)
    kept = [bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert [bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"] == kept
    texts = [str(output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any("'output_type': 'error'" in text for text in texts)
