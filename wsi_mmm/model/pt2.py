"""A model as a program of torch.export (.pt2), for AOTInductor, ExecuTorch and C++: it runs without this package.

What goes in and comes out: see `model.exporting`; answers come as a tuple, features first.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wsi_mmm.errors import ModelError, OutputError
from wsi_mmm.model.exporting import STEP, Exported, Graph, any_size, asked, compared, facts, noise
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.types import U8

FACTS = "wsi_mmm.json"
"""Name of the extra file in the archive that says what the model is."""

_MOST = 1024  # tiles of a batch, and strides of a side


def export_pt2(
    model: MultiTaskModel, path: Path, *, tasks: Sequence[str] | None = None, side: int | None = None
) -> Exported:
    """Write ``model`` (folded and in evaluation mode) with ``tasks`` (None: all that a tile answers) to ``path``.

    It is written whole or not at all. ``side``: fix the tile size at so many px; None: leave it free where the encoder
    allows, else the card's. ModelError when torch cannot trace the model or the program gives other answers;
    OutputError when the file cannot be written.
    """
    names = asked(model, tasks)
    graph = Graph(copy.deepcopy(model).cpu(), names).eval().requires_grad_(False)
    for tensor in (*graph.parameters(), *graph.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)  # archives want no views of buffers
    fixed = side or (None if any_size(model) else model.card.tile_size)
    program = _traced(graph, fixed)
    run = program.module()

    def session(pixels: U8) -> list[np.ndarray[Any, Any]]:
        with torch.no_grad():
            return [x.numpy() for x in run(torch.from_numpy(pixels))]

    difference = compared(graph, session, fixed, "the exported program")
    told = json.dumps(facts(model, names))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pt2-", dir=path.parent) as folder:
            half = Path(folder) / "half.pt2"
            torch.export.save(program, half, extra_files={FACTS: told})
            half.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return Exported(path, names, fixed, difference)


def _traced(graph: Graph, side: int | None) -> torch.export.ExportedProgram:
    shown = side or graph.model.card.tile_size
    free: dict[int, Any] = {0: torch.export.Dim("n", min=1, max=_MOST)}
    if side is None:
        free[1] = STEP * torch.export.Dim("rows", min=1, max=_MOST)
        free[2] = STEP * torch.export.Dim("columns", min=1, max=_MOST)
    try:
        with torch.inference_mode(False), torch.no_grad():
            return torch.export.export(graph, (noise(2, shown, shown),), dynamic_shapes=(free,))
    except Exception as error:  # its tree is wide and holds bare RuntimeErrors: one meaning for us
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"torch cannot export '{graph.model.card.name}' at {shown} px: {line}") from error
