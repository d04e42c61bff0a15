"""Models as programs of torch.export: read back they answer as the model does, or there is no file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from wsi_mmm import api
from wsi_mmm.errors import ModelError, OutputError
from wsi_mmm.model import pt2
from wsi_mmm.model.checkpoint import load_model
from wsi_mmm.model.exporting import Graph, compared
from wsi_mmm.model.fold import folded


@pytest.mark.slow
def test_a_program_answers_as_the_model_does_for_any_number_and_size(small_model: Path, tmp_path: Path) -> None:
    """Read back from the file by torch alone; it says what it is."""
    done = api.export_model(small_model, output=tmp_path / "new" / "small.pt2", to="pt2")
    assert (done.tasks, done.side) == (("nuclei", "stain"), None) and done.difference < 1e-6
    extra = {pt2.FACTS: ""}
    program = torch.export.load(done.path, extra_files=extra).module()
    assert json.loads(extra[pt2.FACTS])["wsi_mmm.model"] == load_model(small_model).card.name
    model = folded(load_model(small_model))
    for shape in ((1, 64, 64, 3), (5, 96, 160, 3)):
        pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        with torch.no_grad():
            vector, logits = model.forward_all(model.prepare(pixels))
            found = program(pixels)
        for one, other in zip(found, [vector, *logits.values()], strict=True):
            assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())
    assert [path.name for path in done.path.parent.iterdir()] == ["small.pt2"]


def test_a_program_that_answers_otherwise_is_not_written(small_model: Path) -> None:
    """The comparison names who differs, and by how much."""
    model = folded(load_model(small_model))
    graph = Graph(model, ("stain",))

    def wrong(pixels: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [1.1 * x.numpy() for x in graph(torch.from_numpy(pixels))]

    with pytest.raises(ModelError, match=r"the program's answers differ from torch's by 1\.0e-01"):
        compared(graph, wrong, 64, "the program")


def test_what_cannot_be_is_said(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that the model lacks; a folder that is a file; a graph that torch does not trace."""
    with pytest.raises(ModelError, match="has no task 'no'"):
        api.export_model(small_model, output=tmp_path / "x.pt2", tasks="no", to="pt2")
    monkeypatch.setattr(pt2, "_traced", lambda graph, side: Plain(graph))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        api.export_model(small_model, output=tmp_path / "file" / "x.pt2", to="pt2")
    monkeypatch.undo()
    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(ModelError, match=r"torch cannot export .* at 64 px: not this one"):
        api.export_model(small_model, output=tmp_path / "x.pt2", tile_size=64, to="pt2")


class Plain:
    """Stands in for a traced program."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def module(self) -> Graph:
        """The graph itself."""
        return self.graph


def refuse(*_: object, **__: object) -> None:
    """As torch does what it cannot trace."""
    raise RuntimeError("not this one")
