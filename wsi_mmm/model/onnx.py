"""A model as an ONNX file, and an ONNX file run by ONNX Runtime. Home of onnx, onnxscript and onnxruntime.

What goes in and comes out, under which names: see `model.exporting`. Nothing is published before ONNX Runtime and torch
agree about it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from wsi_mmm.errors import ModelError, OutputError
from wsi_mmm.model.exporting import (
    FEATURES,
    PIXELS,
    Exported,
    Graph,
    Session,
    compare_export,
    facts,
    fits_any_size,
    seeded_noise,
    select_tasks,
)
from wsi_mmm.model.identity import check_runtime
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.storage.local import atomic_file

_FORMAT = 1  # raised when the same model would give another graph
_LIMIT = 2_000_000_000  # bytes: protobuf cannot hold more in one file


def export_onnx(
    model: MultiTaskModel, path: Path, *, tasks: Sequence[str] | None = None, side: int | None = None
) -> Exported:
    """Write ``model`` (folded and in evaluation mode) with ``tasks`` (None: all that a tile answers) to ``path``.

    It is written whole or not at all.

    ``side``: fix the tile size at so many px; None: leave it free where the encoder allows, else the card's.
    MissingPackage without the packages; ModelError when torch cannot translate the model, when it is too large for one
    file, or when ONNX Runtime gives other answers; OutputError when the file cannot be written.
    """
    check_runtime("onnx")
    names = select_tasks(model, tasks)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if size > _LIMIT:
        raise ModelError(f"the model has {size / 1e9:.1f} GB of weights; an ONNX file holds at most 2 GB")
    graph = Graph(copy.deepcopy(model).cpu(), names).eval()
    fixed = side or (None if fits_any_size(model) else model.card.tile_size)
    with torch.inference_mode(False), torch.no_grad():
        program = _trace_graph(graph, fixed)
    program.model.metadata_props.update(facts(model, names))
    with atomic_file(path) as half:
        program.save(str(half), external_data=False)
        difference = compare_export(graph, open_session(half, torch.device("cpu")), fixed, "ONNX Runtime")
    return Exported(path, names, fixed, difference)


def _trace_graph(graph: Graph, side: int | None) -> Any:
    """torch's ONNX program of the graph, its batch free, and its height and width too when ``side`` is None."""
    free = {0: torch.export.Dim("n")}
    if side is None:
        free |= {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    shown = side or graph.model.card.tile_size
    try:
        program = torch.onnx.export(
            graph, (seeded_noise(2, shown, shown),), dynamo=True, dynamic_shapes=(free,), verbose=False,
            input_names=[PIXELS], output_names=[FEATURES, *graph.tasks],
        )  # fmt: skip
    except Exception as error:  # its tree is wide and holds bare RuntimeErrors: one meaning for us
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"torch cannot write '{graph.model.card.name}' at {shown} px as ONNX: {line}") from error
    assert program is not None
    return program


# ---------------------------------------------------------------- running


def open_session(path: Path, device: torch.device) -> Session:
    """The file at ``path`` ready to run, on the thread that calls; several may. ModelError if it cannot be used."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # its own threads would change bits, as torch's do
    options.enable_cpu_mem_arena = False  # as fast (memory.py keeps what is freed), and nothing grows
    options.log_severity_level = 3
    wanted = _choose_providers(device, providers())
    try:
        session = ort.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:  # onnxruntime's errors have no common base but this
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"ONNX Runtime cannot use {path}: {line}") from error
    if session.get_providers()[0] != wanted[0][0]:
        raise ModelError(f"ONNX Runtime could not start on {device}: see its log, or use --device cpu")
    return lambda pixels: cast("list[np.ndarray[Any, Any]]", session.run(None, {PIXELS: pixels}))


def providers() -> list[str]:
    """Return the execution providers of the installed ONNX Runtime, by its own names."""
    import onnxruntime as ort

    return list(ort.get_available_providers())


def _choose_providers(device: torch.device, there: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Choose providers for this kind of device, with settings that keep bits the same from run to run."""
    if device.type == "cpu":
        return [("CPUExecutionProvider", {})]
    if device.type != "cuda" or "CUDAExecutionProvider" not in there:
        raise ModelError(
            f"the ONNX Runtime here cannot use {device}; pip install onnxruntime-gpu in place of onnxruntime, "
            "or use --device cpu"
        )
    number = str(device.index or 0)
    settings = {"device_id": number, "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    return [("CUDAExecutionProvider", settings), ("CPUExecutionProvider", {})]


def cached_session(
    model: MultiTaskModel, tasks: tuple[str, ...], side: int, *, device: torch.device, folder: Path | None
) -> Session:
    """``model`` with ``tasks`` for tiles of ``side`` px, from its file below ``folder``, which is made if need be.

    Without a folder, or with one that cannot be written, the file lives as long as it takes to read it.
    """
    if folder is not None:
        path = folder / "onnx" / f"{_file_key(model, tasks, side)}.onnx"
        try:
            return _open_cached(model, path, tasks, side, device)
        except OutputError:
            pass
    with tempfile.TemporaryDirectory(prefix="wsi-mmm-onnx-") as there:
        return _open_cached(model, Path(there) / "model.onnx", tasks, side, device)


def _open_cached(model: MultiTaskModel, path: Path, tasks: tuple[str, ...], side: int, device: torch.device) -> Session:
    if path.is_file():
        try:
            return open_session(path, device)
        except ModelError:  # cut short or foreign: made anew below, and a real reason is then raised
            pass
    export_onnx(model, path, tasks=tasks, side=side)
    return open_session(path, device)


def _file_key(model: MultiTaskModel, tasks: tuple[str, ...], side: int) -> str:
    """Names what a kept file depends on: the weights themselves, since "random" ones share a name."""
    card = model.card.model_dump(mode="json", exclude={"data", "licence", "metrics", "limits"})
    facts = {"format": _FORMAT, "torch": torch.__version__, "card": card, "tasks": tasks, "side": side}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
