"""The notebooks run from top to bottom, in the interpreter of the tests, without a network."""

import os
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
OFFLINE = "import os, warnings; os.environ |= {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}; warnings.simplefilter('default')"


def test_there_are_notebooks_and_they_hold_no_output():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None), path.name


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # of Jupyter's own libraries
def test_runs(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(OFFLINE))
    NotebookClient(notebook, kernel_name="python3", timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "VERDICT: " in said
    assert (tmp_path / "runs/quickstart/report.html").is_file()
