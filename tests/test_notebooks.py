"""The notebooks: committed without outputs, readable as code, and run from top to bottom."""

import ast
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

SHOWS = {
    "01_first_steps": {"video": 2, "picture": 3},
    "02_your_own_fusion": {"video": 1, "picture": 1},
    "03_time_alignment": {"video": 0, "picture": 4},
    "04_read_a_sweep": {"video": 0, "picture": 1},
    "05_published_weights": {"video": 2, "picture": 0},
}
"""The least that each must show: cells with players, cells with pictures."""


def test_all_of_them_are_known():
    assert [path.stem for path in NOTEBOOKS] == sorted(SHOWS)


@notebooks
def test_stripped_and_tidy(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), (
            "strip the outputs"
        )
        assert cell.metadata == {}
        assert cell.source.strip(), "an empty cell"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}, "nothing of the machine it was edited on"
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")


@notebooks
def test_every_cell_compiles(path):
    """And none hides a shell command or a magic, which would tie it to one front end."""
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code":
            ast.parse(cell.source, f"{path.name}, cell {number}")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Where all of them run, so that the clips are drawn once; the study lies where it lies in the repository."""
    root = tmp_path_factory.mktemp("notebooks")
    (root / "benchmarks").symlink_to(FOLDER.parent / "benchmarks")
    (root / "notebooks").mkdir()
    return root / "notebooks"


@pytest.mark.slow
@notebooks
def test_it_runs(path, work, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if path.stem == "05_published_weights":
        pytest.importorskip("peft")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OVI_CACHE", str(work / "cache"))
    for name in ("OVI_MODEL", "OVI_LATENTS"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": work}}
    )
    client.execute()  # raises with the traceback of the cell that fails
    if os.environ.get("OVI_KEEP_NOTEBOOKS"):
        nbformat.write(notebook, Path(os.environ["OVI_KEEP_NOTEBOOKS"]) / path.name)
    shown = {"video": 0, "picture": 0}
    for cell in notebook.cells:
        outputs = [output.get("data", {}) for output in cell.get("outputs", ())]
        shown["video"] += any("data:video/mp4;base64," in data.get("text/html", "") for data in outputs)
        shown["picture"] += any("image/png" in data for data in outputs)
        warned = [o.text for o in cell.get("outputs", ()) if o.output_type == "stream" and o.name == "stderr"]
        printed = [o.text for o in cell.get("outputs", ()) if o.output_type == "stream" and o.name == "stdout"]
        assert "\x1b[" not in "".join(printed), "signs for a terminal"
        assert not warned, f"{cell.source[:60]}...: {warned}"
    assert all(shown[kind] >= least for kind, least in SHOWS[path.stem].items()), shown
