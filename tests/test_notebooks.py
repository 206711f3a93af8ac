"""The notebooks run from top to bottom, in Jupyter and in marimo alike, and are kept with the outputs of a large store."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace

import nbformat
import polars as pl
import pytest
from matplotlib import rc_context

from actstore.ingest.jobs.job import Ingest
from actstore.ingest.jobs.local import execute
from actstore.ingest.models.load import load
from actstore.ingest.trees.task import TreeSet
from actstore.ingest.trees.variants import CHANGES
from tests import jupyter

NOTEBOOKS = sorted(jupyter.NOTEBOOKS.glob("*.ipynb"))
SOURCES = sorted(jupyter.NOTEBOOKS.glob("*.py"))
ROWS, COLUMNS = 12, 8  # of a frame that a reader takes in


@pytest.fixture(scope="module")
def every_run(shipped, tmp_path_factory):
    """What `make full` stores and the notebook reads, of 80 trees in place of 20,000."""
    root, other = tmp_path_factory.mktemp("full") / "full.act", load("baseline")
    for model in (shipped, other):
        execute(Ingest(root, model, TreeSet("deep", 80, seed=8, name="deep"), f"{model.name}-deep"))
        for seed, name, run in ((7, "trees", model.name), (9, "fresh", f"{model.name}-fresh")):
            trees, sites = TreeSet("reproduction", 80, seed=seed, name=name), ["embed", "resid_post", "pattern"]
            execute(Ingest(root, model, trees, run, sites=sites if name == "trees" else []))
            for change in CHANGES:
                varied = replace(trees, name=f"{name}-{change}", variant_of=name, change=change)
                execute(Ingest(root, model, varied, f"{run}-{change}", sites=[]))
            execute(Ingest(root, model, trees, f"{run}-dreams", prompt="tree"))
    return root


def test_the_notebook_of_the_reproduction_runs_over_every_run(every_run, monkeypatch):
    monkeypatch.setenv("ACTSTORE_STORE", str(every_run))
    shows_as_kept(kept("reproduction"), every_run.parent)


def test_the_reproduction_runs_in_marimo_and_shows_the_same(every_run, monkeypatch):
    monkeypatch.setenv("ACTSTORE_STORE", str(every_run))
    shows_in_marimo("reproduction")


def test_the_reproduction_tells_no_number_that_it_does_not_show():
    notebook = kept("reproduction")
    shown = str([output.get("data", {}).get("text/plain") for cell in code_of(notebook) for output in cell.outputs])
    told = {
        number
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for number in re.findall(r"\d+\.\d+", re.sub(r"\[.*?\]\(.*?\)", "", cell.source))
    }
    assert len(told) > 10
    assert {number for number in told if not re.search(rf"(?<!\d){re.escape(number)}", shown)} == set()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_words_of_a_notebook_count_no_rows_of_the_store(source):
    words = [cell.source for cell in kept(source.stem).cells if cell.cell_type == "markdown"]
    code = re.compile(r"^ {4,}\S.*$|`[^`]*`", re.M)  # a command, which makes the store that it counts
    assert re.findall(r"\d{1,3}(?:,\d{3})+", code.sub("", "\n".join(words))) == []


def test_the_notebook_of_the_reproduction_needs_no_index_arithmetic():
    code = "\n".join(cell.source for cell in kept("reproduction").cells if cell.cell_type == "code")
    assert "arange" not in code


def test_the_notebook_of_the_circuit_makes_its_own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTSTORE_TREES", "90")
    monkeypatch.delenv("ACTSTORE_STORE", raising=False)
    shows_as_kept(kept("circuit"), tmp_path)


def test_the_tour_runs_in_jupyter_where_a_demo_store_is(demo_path):
    shows_as_kept(kept("tour"), demo_path.parent)


def test_the_tour_runs_in_marimo_and_shows_the_same(demo_path, monkeypatch):
    monkeypatch.chdir(demo_path.parent)
    shows_in_marimo("tour")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_both_forms_of_a_notebook_have_the_same_cells(source):
    made = [(cell.cell_type, cell.source) for cell in jupyter.of(source).cells]
    assert [(cell.cell_type, cell.source) for cell in kept(source.stem).cells] == made, "run `make notebooks`"
    assert made[1] == ("code", jupyter.JUPYTER)
    assert jupyter.MARIMO not in dict(made).values()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_shows_figures_and_no_walls_of_frames(source):
    outputs = [output for cell in code_of(kept(source.stem)) for output in cell.outputs if "data" in output]
    frames = [found for output in outputs if (found := re.match(r"shape: \((\d+), (\d+)\)", output.data["text/plain"]))]
    assert all(int(frame[1]) <= ROWS and int(frame[2]) <= COLUMNS for frame in frames)
    assert sum("image/png" in output.data for output in outputs) > len(frames)
    assert source.with_suffix(".ipynb").stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_times_and_no_folders_of_the_machine_that_ran_it(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    assert not re.search(r"/(work|tmp|home|root)/", path.read_text())


def kept(name):
    return nbformat.read(jupyter.NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shows_as_kept(notebook, folder):
    """Execute a copy; the cells that show something must be those that the kept one shows something of."""
    expected = [bool(cell.outputs) for cell in code_of(notebook)]
    jupyter.run(notebook, folder)
    assert [bool(cell.outputs) for cell in code_of(notebook)] == expected
    assert not any(output.output_type == "error" for cell in code_of(notebook) for output in cell.outputs)


def shows_in_marimo(name):
    """Run the marimo form as `python NAME.py` does; a cell shows something where the kept Jupyter cell does."""
    with rc_context(), pl.Config():
        shown, names = runpy.run_path(str(jupyter.NOTEBOOKS / f"{name}.py"))["app"].run()
    names["store"].close()
    assert [
        cell.cell_type == "markdown" or any("data" in output for output in cell.outputs) for cell in kept(name).cells
    ] == [output is not None for output in shown]
