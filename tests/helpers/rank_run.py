"""One rank of a small training, as a script: ``rank_run.py FOLDER MODE [HOST PORT RANK WORLD]``.

Modes: "plain" (20 steps; "plain+RULE+RULE": a training by each rule, in a folder of its own), "kill" and "hang" (rank
1 is killed, or stopped, in step 3), "nan" (in step 5 rank 1 meets one).
Without HOST and the rest the ranks are those of torchrun, or it is alone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from helpers.training import batch, tiny
from wsi_mmm.errors import WsiError
from wsi_mmm.training.fit import FitPlan, TrainingFeed, fit
from wsi_mmm.training.loader import TrainBatch
from wsi_mmm.training.optim import OptimPlan
from wsi_mmm.training.ranks import ALONE, Meeting, Ranks, joined
from wsi_mmm.training.strategies import StrategyPlan

STEPS = 20
KINDS = ["classify", "segment", "bag-regress"]


def infinite(task: str, target: torch.Tensor) -> torch.Tensor:
    """Values of the bags' task that no loss can take."""
    return torch.full_like(target, torch.inf) if task == "t2" else target


def work(folder: str, mode: str, ranks: Ranks, strategy: str = "accumulate") -> None:
    """Train in float64; what came out is the checkpoint of the last step."""
    torch.set_num_threads(1)
    model, tasks = tiny(KINDS, seed=ranks.rank)  # all must begin with rank 0's weights
    model.double()

    def whole(step: int) -> list[TrainBatch]:
        """Tasks of unequal length: segment in every step, classify in half of them, bags seldom. One step is empty, in
        another one all items of one batch failed."""
        if step == 7:
            return [TrainBatch("broken", (), failed=("x: unreadable",))]
        kinds = [{"t1": "segment"}, *([{"t0": "classify", "t1": "segment"}] if step % 2 else [])]
        found = [batch(tasks, k, seed=100 * step + i, items=2) for i, k in enumerate(kinds)]
        if step == 5:
            found.append(TrainBatch("broken", (), failed=("x: unreadable",)))
        if step % 5 == 0:
            found.append(batch(tasks, {"t2": "bag-regress"}, seed=100 * step + 9, items=2))
        return found

    def batches(first: int) -> Iterator[tuple[TrainBatch, ...]]:
        for step in range(first, STEPS):
            if step == 3 and ranks.rank == 1 and mode in ("kill", "hang"):
                os.kill(os.getpid(), signal.SIGKILL if mode == "kill" else signal.SIGSTOP)
            found = whole(step)[ranks.rank :: ranks.world]
            if step == 5 and mode == "nan":
                found = [replace(b, targets={k: infinite(k, t) for k, t in b.targets.items()}) for b in found]
            yield tuple(found)

    plan = FitPlan(
        STEPS, optim=OptimPlan(rate=1e-2, warmup=3, average=0.9, clip=1.0), folder=folder,
        strategy=StrategyPlan(strategy), config={"mode": mode},
    )  # fmt: skip
    fit(model, tasks, TrainingFeed(batches), plan=plan, ranks=ranks)


def main(folder: str, mode: str, *where: str) -> int:
    """0, or 3 after an error of ours in one line."""
    meeting = Meeting(where[0], int(where[1]), int(where[2]), int(where[3])) if where else None
    try:
        with joined("cpu", wait=float(os.environ.get("RANK_WAIT", "60")), meeting=meeting) as ranks:
            kind, *strategies = mode.split("+")
            for strategy in strategies:
                work(f"{folder}/{strategy}", kind, ranks, strategy)
            if not strategies:
                work(folder, kind, ranks)
    except WsiError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    assert ALONE.world == 1
    sys.exit(main(*sys.argv[1:]))
