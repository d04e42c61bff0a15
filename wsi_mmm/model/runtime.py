"""How a model's pass is carried out: eager, compiled, or in bfloat16. Numbers differ, and the hash says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from wsi_mmm.errors import ModelError
from wsi_mmm.model.identity import RUNTIMES
from wsi_mmm.model.multitask import MultiTaskModel

Pass = Callable[[Tensor, Sequence[str]], tuple[Tensor, dict[str, Tensor]]]


def forward_pass(model: MultiTaskModel, runtime: str, device: torch.device) -> Pass:
    """uint8[n, s, s, 3] on the device, tasks -> (vectors, logits), by ``runtime``. ModelError if there is none."""
    if runtime not in RUNTIMES:
        raise ModelError(f"there is no runtime '{runtime}'; choose one of: {', '.join(RUNTIMES)}")
    network = model.forward_all
    if runtime == "compile":
        network = torch.compile(model.forward_all, dynamic=False, options={"freezing": True})

    def run(pixels: Tensor, tasks: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        with _precision(runtime, device):
            return network(model.prepare(pixels), tuple(tasks))

    return run


def _precision(runtime: str, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if runtime == "bf16" else nullcontext()
