"""The notebook: it runs from top to bottom, and is stored without outputs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def test_it_is_stored_without_outputs() -> None:
    """No cell has an output or a count, so that what a reader sees is what their machine said."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains both tasks, exports, and ends with a picture of what was found."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Jupyter's own packages; the kernel is another process
        import nbformat
        from nbclient import NotebookClient

        book = nbformat.read(NOTEBOOK, as_version=4)
        NotebookClient(book, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert {path.name for path in (tmp_path / "runs/quickstart/model").iterdir()} == {"card.json", "model.safetensors"}
    steps = [json.loads(line) for line in (tmp_path / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 30 and "val/tissue/accuracy" in steps[-1]
    last = book.cells[-1]["outputs"][0]["data"]
    assert "image/png" in last and (tmp_path / "results/slide0/result.geojson.gz").exists()
