"""The notebooks run from top to bottom, on a small store, and are kept with the outputs of a large one."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "queries" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_where_a_demo_store_is(path, demo_path):
    notebook = nbformat.read(path, as_version=4)
    kept = [bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(demo_path.parent)}}).execute()
    assert [bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"] == kept
    texts = [str(output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any("'output_type': 'error'" in text for text in texts)
