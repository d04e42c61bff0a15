"""A model as an ONNX file, and an ONNX file run by ONNX Runtime. Home of onnx, onnxscript and onnxruntime.

A file takes ``pixels`` uint8[n, h, w, 3] (RGB; normalising is part of the graph) and gives ``features`` float32[n, D]
and the logits of each task. n is free; h and w are free for convolutional encoders, else fixed. Nothing is published
before ONNX Runtime and torch agree about it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from wsi_mmm.errors import ModelError, OutputError, first_line
from wsi_mmm.model.card import card_json
from wsi_mmm.model.fold import seeded_noise
from wsi_mmm.model.identity import check_runtime
from wsi_mmm.model.multitask import ModelPass, MultiTaskModel, normalise, resize_tiles
from wsi_mmm.storage.local import atomic_file
from wsi_mmm.types import U8

TOLERANCE = 1e-3
"""Largest difference between an export and the model, as a share of the largest answer, that is published."""

PIXELS, FEATURES = "pixels", "features"
STEP = 32  # px: the coarsest stride of the encoders
_FORMAT = 1  # raised when the same model would give another graph
_LIMIT = 2_000_000_000  # bytes: protobuf cannot hold more in one file

Session = Callable[[U8], list[np.ndarray[Any, Any]]]
"""uint8[n, h, w, 3] -> features and the asked-for answers, float32, in the file's order."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported file. ``side``: the one tile size in px that fits, or None: any multiple of 32 px, also oblong.

    ``difference``: the largest from the model on seeded noise, as a share of the largest answer.
    """

    path: Path
    tasks: tuple[str, ...]
    side: int | None
    difference: float


class Graph(nn.Module):
    """The traced module: pixels in, a tuple of answers out."""

    def __init__(self, model: MultiTaskModel, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.tasks = model, tasks

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """uint8[n, h, w, 3] -> (features, logits, ...)."""
        x, encoder = pixels.permute(0, 3, 1, 2).float(), self.model.card.encoder
        x = resize_tiles(x, encoder.input_px, encoder.interpolation) if encoder.input_px else x
        x = normalise(x, self.model.get_buffer("mean"), self.model.get_buffer("std"))
        vector, logits = self.model.forward_all(x, self.tasks)
        return (vector, *(logits[name] for name in self.tasks))


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
    program.model.metadata_props.update(_file_metadata(model, names))
    with atomic_file(path) as half:
        program.save(str(half), external_data=False)
        difference = _compare_export(graph, open_session(half, torch.device("cpu")), fixed)
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
        name, line = graph.model.card.name, first_line(error)
        raise ModelError(f"torch cannot write '{name}' at {shown} px as ONNX: {line}") from error
    assert program is not None
    return program


def select_tasks(model: MultiTaskModel, tasks: Sequence[str] | None) -> tuple[str, ...]:
    """``tasks``, each once (None: all that a tile answers). ModelError for one that no file can hold."""
    if tasks is None:
        names = tuple(name for name in model.tasks if name not in model.bag_heads)
    else:
        names = model.check_tasks(tuple(dict.fromkeys(tasks)))
    for name in names:
        if name in model.bag_heads:
            raise ModelError(
                f"task '{name}' answers for many tiles at once; a file holds what a tile gives: leave it out"
            )
        if name in (PIXELS, FEATURES):
            raise ModelError(f"a task called '{name}' cannot be exported: the file uses that name itself; rename it")
    return names


def fits_any_size(model: MultiTaskModel) -> bool:
    """Return whether the tile size can stay free: transformers and TensorFlow's padding depend on it."""
    if model.encoder.resampled or model.card.encoder.input_px:
        return False
    kinds = {type(module).__name__ for module in model.modules()}
    return not any("Attention" in kind or kind.endswith(("Same", "MSA2d")) for kind in kinds)


def _file_metadata(model: MultiTaskModel, tasks: tuple[str, ...]) -> dict[str, str]:
    """Metadata of the file: text, JSON where it is not a plain value."""
    card = model.card
    described = [
        {"name": task.name, "kind": task.kind, "head": task.head, "classes": task.classes}
        for task in (card.task(name) for name in tasks)
    ]
    return {
        "wsi_mmm.model": card.name,
        "wsi_mmm.card_sha256": hashlib.sha256(card_json(card).encode()).hexdigest(),
        "wsi_mmm.mpp": f"{card.mpp:g}",
        "wsi_mmm.tile_size": str(card.tile_size),
        "wsi_mmm.tasks": json.dumps(described),
    }


def _compare_export(graph: Graph, session: Session, side: int | None) -> float:
    """The largest difference between ``session`` and the model on seeded noise, as a share of the largest answer.
    ModelError beyond `TOLERANCE`."""
    card = graph.model.card.tile_size
    sizes = [(side, side)] if side else [(card, card), (2 * STEP, 3 * STEP)]
    worst = 0.0
    for height, width in sizes:
        pixels = seeded_noise(3, height, width)
        with torch.inference_mode():
            vector, logits = graph.model.forward_all(graph.model.prepare(pixels), graph.tasks)
        for wanted, found in zip([vector, *logits.values()], session(pixels.numpy()), strict=True):
            apart = np.abs(found - wanted.numpy()).max() / max(float(wanted.abs().max()), 1e-30)
            worst = max(worst, float(apart) if np.isfinite(apart) else float("inf"))
    if worst > TOLERANCE:
        raise ModelError(
            f"ONNX Runtime's answers differ from torch's by {worst:.1e} of the largest, beyond {TOLERANCE:g}; "
            "nothing was written: run it with the runtime eager"
        )
    return worst


# ---------------------------------------------------------------- running


def open_session(path: Path, device: torch.device) -> Session:
    """The file at ``path`` ready to run, on the thread that calls; several may. ModelError if it cannot be used."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # its own threads would change bits, as torch's do
    options.enable_cpu_mem_arena = False  # as fast (`host_tuning` keeps what is freed), and nothing grows
    options.log_severity_level = 3
    wanted = _choose_providers(device, providers())
    try:
        session = ort.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:  # onnxruntime's errors have no common base but this
        raise ModelError(f"ONNX Runtime cannot use {path}: {first_line(error)}") from error
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
    parts = {"format": _FORMAT, "torch": torch.__version__, "card": card, "tasks": tasks, "side": side}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def onnx_pass(model: MultiTaskModel, device: torch.device, folder: Path | None) -> ModelPass:
    """A session per tile size and choice of tasks, all threads share it. On CUDA pixels pass through the host."""
    sessions: dict[tuple[int, tuple[str, ...]], Session] = {}
    lock = threading.Lock()

    def run(pixels: Tensor, tasks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        names = tuple(name for name in tasks if name not in model.bag_heads)  # answered elsewhere
        key = (pixels.shape[1], names)
        with lock:  # the first to come makes the file, the others wait for it
            if key not in sessions:
                sessions[key] = cached_session(model, names, key[0], device=device, folder=folder)
        vector, *logits = (torch.from_numpy(one).to(device) for one in sessions[key](pixels.cpu().numpy()))
        return vector, dict(zip(names, logits, strict=True))

    return run
