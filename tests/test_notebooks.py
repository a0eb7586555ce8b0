"""Every notebook runs from top to bottom, and is the same as the text it is paired with."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
TEXTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_a_notebook_runs_as_it_is_committed(text, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(text).cells], (
        f"jupytext --sync {text.name}"
    )
    shown = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert shown, "is committed without what it shows"
    assert not [out for out in shown if out.get("name") == "stderr"], "warnings name the machine that made them"
    assert all("image/png" in out.get("data", {}) or out.output_type != "display_data" for out in shown)
    NotebookClient(notebook, timeout=170, resources={"metadata": {"path": str(FOLDER)}}).execute()


def test_there_are_three():
    assert len(TEXTS) == len(list(FOLDER.glob("*.ipynb"))) == 3
