"""The pass over a bag: the vectors of a slide's tiles -> its answers. Small beside the encoder's, and done once.

One intra-op thread and one order of tiles: on a CPU the answers are the same to the bit, whatever computes beside.
On a GPU sums over tiles have no fixed order: answers agree to within `TOLERANCE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wsi_mmm.errors import ModelError
from wsi_mmm.model.runner import Runner
from wsi_mmm.types import F32

TOLERANCE = 1e-5
"""Largest difference between two passes over one bag on a GPU, as a share of the largest answer."""


def answer_bag(
    runner: Runner, vectors: F32, tasks: Sequence[str]
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, F32]]:
    """``vectors`` float32[m, D] of one bag (m > 0) -> quantised answers [K] and attention float32[m], by task.

    ModelError when the bag is too large for the device's memory or a task is not answered per bag.
    """
    with ThreadPoolExecutor(1, "bag", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return pool.submit(_answer, runner, vectors, tasks).result()
        except (MemoryError, RuntimeError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            text = f"the slide's {len(vectors):,} tiles cannot be answered as one bag ({line}); use a coarser mpp"
            raise ModelError(text) from error


@torch.inference_mode()
def _answer(runner: Runner, vectors: F32, tasks: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, F32]]:
    x = torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(runner.device)
    bag = torch.zeros(len(x), dtype=torch.int64, device=runner.device)
    logits, attention = runner.model.bag_logits(x, bag, tuple(tasks))
    answers = {name: runner.quantise[name](logits[name].float())[0].cpu().numpy() for name in tasks}
    return answers, {name: attention[name].float().cpu().numpy() for name in tasks}
