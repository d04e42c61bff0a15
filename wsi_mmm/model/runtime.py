"""How a model's pass is carried out: eager, compiled, in bfloat16, through ONNX. Numbers differ; the hash says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from wsi_mmm.errors import ModelError
from wsi_mmm.model.exporting import Session
from wsi_mmm.model.identity import RUNTIMES, check_runtime
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.onnx import cached_session

Pass = Callable[[Tensor, Sequence[str]], tuple[Tensor, dict[str, Tensor]]]


def forward_pass(model: MultiTaskModel, runtime: str, device: torch.device, *, folder: Path | None = None) -> Pass:
    """uint8[n, s, s, 3] on the device, tasks -> (vectors, logits), by ``runtime``.

    ``folder``: where files that take long to make are kept (ONNX). ModelError if there is no such runtime,
    MissingPackage if it is not installed.
    """
    if runtime not in RUNTIMES:
        raise ModelError(f"there is no runtime '{runtime}'; choose one of: {', '.join(RUNTIMES)}")
    check_runtime(runtime)
    if runtime == "onnx":
        return _onnx_pass(model, device, folder)
    network = model.forward_all
    if runtime == "compile":
        network = torch.compile(model.forward_all, dynamic=False, options={"freezing": True})

    def run(pixels: Tensor, tasks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        with _autocast_for(runtime, device):
            return network(model.prepare(pixels), tuple(tasks))

    return run


def _onnx_pass(model: MultiTaskModel, device: torch.device, folder: Path | None) -> Pass:
    """A session per tile size and choice of tasks, all threads share it. On CUDA pixels pass through the host."""
    sessions: dict[tuple[int, tuple[str, ...]], Session] = {}
    lock = threading.Lock()

    def session(side: int, tasks: tuple[str, ...]) -> Session:
        with lock:  # the first to come makes the file, the others wait for it
            if (side, tasks) not in sessions:
                sessions[side, tasks] = cached_session(model, tasks, side, device=device, folder=folder)
            return sessions[side, tasks]

    def run(pixels: Tensor, tasks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        names = tuple(name for name in tasks if model.card.task(name).head != "bag")  # answered elsewhere
        found = session(pixels.shape[1], names)(pixels.cpu().numpy())
        vector, *logits = (torch.from_numpy(one).to(device) for one in found)
        return vector, dict(zip(names, logits, strict=True))

    return run


def _autocast_for(runtime: str, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if runtime == "bf16" else nullcontext()
