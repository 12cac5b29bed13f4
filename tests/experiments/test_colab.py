"""The notebook runs from top to bottom, in its small mode, and holds no outputs."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="executing a notebook needs nbclient")
nbclient = pytest.importorskip("nbclient", reason="executing a notebook needs nbclient")
pytest.importorskip("ipykernel", reason="executing a notebook needs ipykernel")

ROOT = Path(__file__).parents[2]
SMALL = """
import jax

WORKDIR = {workdir!r}
STEPS, MAX_MINUTES, INSTALL = 2, 1e-6, False
SETTINGS = {{
    "model.dim": 32, "model.layers": 1, "model.heads": 1, "model.state_size": 16,
    "train.batch_size": 8, "train.seq_len": 16, "train.eval_tokens": 512, "train.sample_tokens": 8,
}}
TESTS = "matches_reference_in_every_decay_regime and typical and float32"
"""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(ROOT / "experiments" / "colab.ipynb", as_version=4)


def test_no_outputs_are_kept(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)


def test_notebook_runs_and_continues_where_it_was_stopped(notebook, tmp_path):
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if "parameters" in cell.metadata.get("tags", ()):
            small = SMALL.format(workdir=str(tmp_path / "run"))
            cells.append(nbformat.v4.new_code_cell(small))
        elif "train(from_config_dict" in cell.source:  # out of time; once more, with time
            cells += [nbformat.v4.new_code_cell("MAX_MINUTES = 60.0"), nbformat.from_dict(cell)]
    ran = nbformat.from_dict(notebook | {"cells": cells})
    nbclient.NotebookClient(
        ran, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    for expected in (
        "wkv6 runs as ",
        "stopped by train.max_minutes=1e-06 after step 1",
        "resuming at step 1",
        "KING HENRY:",
        "2 passed",
    ):
        assert expected in printed, printed
    shown = [output.data for cell in code for output in cell.outputs if "data" in output]
    assert any("image/png" in data for data in shown)
    assert any("<iframe" in data.get("text/html", "") for data in shown)
