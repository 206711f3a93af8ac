"""The Jupyter form of the marimo notebooks: the same cells in the same order, with outputs.

    python -m tests.jupyter tour FOLDER        # runs the notebook in the folder that holds its store

`make notebooks` does so for each. queries/notebooks/NAME.py is the source and holds no outputs.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "queries" / "notebooks"
MARIMO = "import marimo as mo"  # a cell that only marimo needs; in its place stands what only Jupyter needs:
JUPYTER = "%matplotlib inline"
WIDGET = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def of(source: Path) -> nbformat.NotebookNode:
    """The notebook without outputs, made from a marimo file."""
    command = [sys.executable, "-m", "marimo", "export", "ipynb", str(source), "--sort", "top-down"]
    made = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    notebook = nbformat.reads(made, as_version=4)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for cell in notebook.cells:
        cell.metadata.clear()
        cell.source = JUPYTER if cell.source == MARIMO else cell.source
    return notebook


def run(notebook: nbformat.NotebookNode, folder: Path, timeout: int = 600) -> None:
    """Run all cells in a folder, and keep what they show."""
    client = NotebookClient(
        notebook, timeout=timeout, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    notebook.metadata.pop("widgets", None)  # bars of progress, which show nothing later
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]


def main(name: str, folder: str) -> None:
    """Write NAME.ipynb with the outputs of its store."""
    notebook = of(NOTEBOOKS / f"{name}.py")
    os.environ["OMP_WAIT_POLICY"] = "passive"
    run(notebook, Path(folder))
    nbformat.write(notebook, NOTEBOOKS / f"{name}.ipynb")


if __name__ == "__main__":
    main(*sys.argv[1:])
