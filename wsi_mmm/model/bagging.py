"""The pass over a bag: the vectors of a slide's tiles -> its answers. Small beside the encoder's, and done once.

Always on the CPU, on one intra-op thread, in one order of tiles: equal features give equal bits, whatever computes
beside. On a GPU, sums over tiles have no fixed order. Measured on a core: 100,000 vectors of 1,024 channels through
gated attention take 1.7 s and 0.5 GB beside themselves; 8,000 through a transformer 2.1 s, and four times as long for
twice as many.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wsi_mmm.errors import ModelError
from wsi_mmm.model.multitask import MultiTaskModel
from wsi_mmm.model.runner import Runner
from wsi_mmm.types import F32


def answer_bag(
    runner: Runner, vectors: F32, tasks: Sequence[str]
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, F32]]:
    """``vectors`` float32[m, D] of one bag (m > 0) -> quantised answers [K] and attention float32[m], by task.

    ModelError when the bag is too large for the memory or a task is not answered per bag.
    """
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, "bag", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return pool.submit(_answer_bag, runner, vectors, tasks).result()
        except (MemoryError, RuntimeError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            text = f"the slide's {len(vectors):,} tiles cannot be answered as one bag ({line}); use a coarser mpp"
            raise ModelError(text) from error
        finally:
            torch.set_num_threads(before)  # the setting is also that of threads begun later


@torch.inference_mode()
def _answer_bag(
    runner: Runner, vectors: F32, tasks: Sequence[str]
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, F32]]:
    model = runner.model if runner.device.type == "cpu" else bag_part(runner.model).to("cpu")
    x = torch.from_numpy(np.ascontiguousarray(vectors, np.float32))
    logits, attention = model.bag_logits(x, torch.zeros(len(x), dtype=torch.int64), tuple(tasks))
    answers = {name: runner.quantise[name](logits[name].float())[0].numpy() for name in tasks}
    return answers, {name: attention[name].float().numpy() for name in tasks}


def bag_part(model: MultiTaskModel) -> MultiTaskModel:
    """A copy of what `bag_logits` needs: the large parts, which it does not run, are left out."""
    needed = ("grouper", "heads")
    left_out = {id(part): nn.Identity() for name, part in model.named_children() if name not in needed}
    return copy.deepcopy(model, memo=dict(left_out))
