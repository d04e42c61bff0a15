"""Trackers of a training's metrics: a JSON-lines file always, TensorBoard by default, W&B and MLflow when asked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from wsi_mmm.errors import OutputError, WsiError
from wsi_mmm.plugins import import_package
from wsi_mmm.storage import store
from wsi_mmm.training.config import TrackingPart
from wsi_mmm.types import U8

LINES = "metrics.jsonl"
BOARD = "tensorboard"
_MISSING = "tracking with {0} needs its package: pip install 'wsi-mmm[{0}]'"


class Tracker(Protocol):
    """One place that figures go to."""

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Named numbers of a step, such as ``loss/nuclei`` or ``val/nuclei/f1``."""

    def close(self) -> None:
        """Write the rest, and end."""


class Lines:
    """``metrics.jsonl``: one object per call, with its step. OutputError when it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; values that are not finite become null."""
        found = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **found}) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Nothing is held."""


class TensorBoard:
    """Event files for ``tensorboard --logdir``; on this machine only. OutputError when they cannot be written."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.writer: Any = SummaryWriter(str(folder))
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def pictures(self, step: int, name: str, pixels: U8) -> None:
        """uint8[n, h, w, 3] as a row of pictures."""
        row = torch.from_numpy(pixels).permute(1, 0, 2, 3).reshape(pixels.shape[1], -1, 3)
        self.writer.add_image(name, row, step, dataformats="HWC")

    def close(self) -> None:
        """See `Tracker`."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases. Figures and the configuration leave this machine; pictures never do."""

    def __init__(self, project: str, folder: Path, facts: Mapping[str, Any]) -> None:
        wandb = import_package("wandb", _MISSING.format("wandb"))
        self.error = wandb.Error
        with _translate_errors("wandb", self.error):
            self.run = wandb.init(project=project, dir=str(folder), config=dict(facts))

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        with _translate_errors("wandb", self.error):
            self.run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        with _translate_errors("wandb", self.error):
            self.run.finish()


class MLflow:
    """A run of an MLflow experiment, at the server that ``MLFLOW_TRACKING_URI`` names. Figures and the configuration
    leave this machine; pictures never do."""

    def __init__(self, experiment: str, facts: Mapping[str, Any]) -> None:
        self.mlflow = import_package("mlflow", _MISSING.format("mlflow"))
        self.error = import_package("mlflow.exceptions", _MISSING.format("mlflow")).MlflowException
        with _translate_errors("mlflow", self.error):
            self.mlflow.set_experiment(experiment)
            self.mlflow.start_run()
            self.mlflow.log_params({name: str(value)[:250] for name, value in facts.items()})

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`; slashes in names are folders there."""
        with _translate_errors("mlflow", self.error):
            self.mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        with _translate_errors("mlflow", self.error):
            self.mlflow.end_run()


@contextmanager
def _translate_errors(name: str, error: type[Exception]) -> Iterator[None]:
    """What the package says is wrong, as ours."""
    try:
        yield
    except error as said:
        raise WsiError(f"tracking with {name} failed ({said}); check its account and server, or leave it out") from said


def open_trackers(part: TrackingPart, out: str, facts: Mapping[str, Any]) -> Sequence[Tracker]:
    """Open the trackers that ``part`` asks for; logs lie below ``out`` where that is a folder. MissingPackage says what
    to install.

    ``facts`` must hold no secret: they go where figures go.
    """
    found: list[Tracker] = []
    folder = store.local_path(out) if store.is_local(out) else None
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make {folder}: {error.strerror or error}") from error
        found.append(Lines(folder / LINES))
    if part.tensorboard and folder is not None:
        found.append(TensorBoard(folder / BOARD))
    if part.wandb:
        found.append(Wandb(part.wandb, folder or Path.cwd(), facts))
    if part.mlflow:
        found.append(MLflow(part.mlflow, facts))
    return found
